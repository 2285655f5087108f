// From an operator's boxed arguments to step_args.h, or an error.
//
// Contract of every function here: it takes ownership of the arguments on `stack` (as a boxed kernel
// must), reads of the tensors' data only a `coefs` on the CPU, and either returns a call that the kernels may
// run without further checks or throws std::runtime_error naming operator, argument, index, what was expected
// and what came. Nothing has been written at that point.
#pragma once

#include <torch/csrc/stable/library.h>

#include "schedule_math.h"
#include "stable_compat.h"
#include "step_args.h"
#include "update_math.h"

namespace schedulefree {

// Where the tensors of a call must be. kMeta skips whatever needs an address; kNone admits no tensor. With
// kCuda, what belongs to one parameter is on one device, and parameters may be on several.
enum class Backend { kCpu, kCuda, kMeta, kNone };

// The tensors stay alive as long as the call does.
struct CheckedLists {
  TensorList y, y_lo, grad, z, z_lo, exp_avg_sq, exp_avg_sq_scale, exp_avg;
};

// A step of SGD or AdamW.
struct StepCall {
  CheckedLists lists;
  StepPlan plan;
  DecayAt decay_at = DecayAt::kY;
  StepCoefficients coefs;                // checked; not where device_coefs is given
  const double* device_coefs = nullptr;  // StepCoefficients that only a kernel can read; null: see coefs
  torch::stable::Tensor coefs_tensor;    // what device_coefs points into
};

struct ScheduleCall {
  ScheduleArgs args;
  std::vector<torch::stable::Tensor> tensors;  // what the pointers point into
};

struct SwapCall {
  CheckedLists lists;
  StepPlan plan;
  SwapWeight swap;
};

// What surrounds the step of a base optimizer.
struct BaseStepCall : StepCall {
  SwapWeight to_x;
  bool exchange = true;
};

// Lists are read only.
struct ReductionCall {
  CheckedLists lists;
  StepPlan plan;
};

StepCall check_sgd_step(StableIValue* stack, Backend backend);
StepCall check_adamw_step(StableIValue* stack, Backend backend);
ScheduleCall check_schedule_step(StableIValue* stack, Backend backend);
SwapCall check_y_to_x(StableIValue* stack, Backend backend);
SwapCall check_x_to_y(StableIValue* stack, Backend backend);
BaseStepCall check_before_base_step(StableIValue* stack, Backend backend);
BaseStepCall check_after_base_step(StableIValue* stack, Backend backend);
ReductionCall check_polyak_sums(StableIValue* stack, Backend backend);
ReductionCall check_grad_norm(StableIValue* stack, Backend backend);

}  // namespace schedulefree
