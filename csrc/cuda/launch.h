// A checked call as launches: batches of tensors that one kernel takes, and their tables. Plain C++ without
// torch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "cuda/driver.h"
#include "cuda/kernel_id.h"

namespace schedulefree::cuda {

// What launches need of torch.
class Torch {
 public:
  virtual ~Torch() = default;
  // The current stream of a device.
  virtual Handle stream(int device) = 0;
  // Memory on a device, in the order of its current stream, until this object goes.
  virtual void* allocate(int device, std::size_t bytes) = 0;
};

// Tensors on one device that one kernel takes.
struct Batch {
  int device = 0;
  KernelId id;
  std::vector<std::size_t> tensors;  // their places in the plan; never empty
};

// The batches of a plan, of which the tensors without elements are no part. Those of one device follow each
// other; of two of one device, that with the earlier tensor comes first.
//
// Throws std::runtime_error for a tensor of more than kMaxDims dimensions.
std::vector<Batch> batches_of(const StepPlan& plan, Op op, TableKind dense);

// Calls `visit(table, chunks)` for every table that the tensors of a batch fill, each a launch with a block
// for every chunk.
void for_each_table(const StepPlan& plan, const Batch& batch, std::int64_t chunk,
                    const std::function<void(const void* table, std::uint32_t chunks)>& visit);

// The first argument behind the table, as a kernel takes it.
struct alignas(16) Argument {
  unsigned char bytes[256];
};
Argument known_scalars(const KernelId& id, const StepCoefficients& coefs);
Argument captured_scalars(const void* resolved);
Argument swap_weight(const SwapWeight& weight);
// Of what surrounds the step of a base optimizer: `resolved` where it is captured, else `coefs`.
Argument base_step_scalars(const KernelId& id, const StepCoefficients& coefs, const void* resolved,
                           const SwapWeight& to_x);

// A step, with `device_coefs` on device `home` or, where that is null, the scalars in `coefs`.
void launch_step(const StepPlan& plan, Op op, DecayAt decay_at, const StepCoefficients& coefs,
                 const double* device_coefs, int home, Torch& torch);
// What surrounds the step of a base optimizer, with the scalars of a step.
void launch_base_step(const StepPlan& plan, Op op, bool exchange, const SwapWeight& to_x,
                      const StepCoefficients& coefs, const double* device_coefs, int home, Torch& torch);
void launch_swap(const StepPlan& plan, const SwapWeight& weight, Torch& torch);
// The sums over all tensors, into `result` on the device of the first; kGradNorm takes the root.
void launch_sums(const StepPlan& plan, Op op, double* result, Torch& torch);
void launch_schedule(const ScheduleArgs& args, int device, Torch& torch);

}  // namespace schedulefree::cuda
