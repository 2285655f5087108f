// From an operator's boxed arguments to step_args.h, or an error.
//
// Contract of every function here: it takes ownership of the arguments on `stack` (as a boxed kernel
// must), reads no tensor data but positions, and either returns a call that the kernels may run without
// further checks or throws std::runtime_error naming operator, argument, index, what was expected and what
// came. Nothing has been written at that point.
#pragma once

#include <torch/csrc/stable/library.h>

#include "stable_compat.h"
#include "step_args.h"
#include "update_math.h"

namespace schedulefree {

// Where the tensors of a call must be. kMeta skips whatever needs an address; kNone admits no tensor. With
// kCuda, what belongs to one parameter is on one device, and parameters may be on several.
enum class Backend { kCpu, kCuda, kMeta, kNone };

// The tensors stay alive as long as the call does.
struct CheckedLists {
  TensorList y, y_lo, grad, z, exp_avg_sq, exp_avg;
};

// The scalars of a step: as arguments, or in a tensor that only the kernels read.
struct SgdCall {
  CheckedLists lists;
  StepPlan plan;
  StepScalars step;
  const double* coefs = nullptr;  // StepCoefficients in place of all scalars but step.decay_at; or null
  ScalarInput grad_norm;  // float64, or absent; step.grad_mul is without the clip_factor() that it gives
  double max_grad_norm = 0;
  std::vector<torch::stable::Tensor> tensors;  // what the pointers point into
};

struct AdamwCall : SgdCall {
  AdamScalars adam;  // in coefs, too
};

struct ScheduleCall {
  ScheduleArgs args;
  std::vector<torch::stable::Tensor> tensors;  // what the pointers point into
};

struct SwapCall {
  CheckedLists lists;
  StepPlan plan;
  SwapScalars swap;
};

// A swap that is to be undone exactly, or the one that undoes it. Elements of a tensor count in the order of
// its dimensions, whatever its strides.
struct ExactSwapCall {
  CheckedLists lists;
  StepPlan plan;
  SwapScalars swap;
  SwapScalars back;
};

struct SwapRestoreCall {
  ExactSwapCall exact;
  torch::stable::Tensor at, value, count;  // what `kept` points into
  std::vector<Kept> kept;                  // of each tensor of the plan
};

// Lists are read only.
struct ReductionCall {
  CheckedLists lists;
  StepPlan plan;
};

SgdCall check_sgd_step(StableIValue* stack, Backend backend);
AdamwCall check_adamw_step(StableIValue* stack, Backend backend);
SgdCall check_sgd_step_capturable(StableIValue* stack, Backend backend);
AdamwCall check_adamw_step_capturable(StableIValue* stack, Backend backend);
ScheduleCall check_schedule_step(StableIValue* stack, Backend backend);
SwapCall check_y_to_x(StableIValue* stack, Backend backend);
SwapCall check_x_to_y(StableIValue* stack, Backend backend);
ExactSwapCall check_y_to_x_keep(StableIValue* stack, Backend backend);
SwapRestoreCall check_x_to_y_restore(StableIValue* stack, Backend backend);
// Completes what check_x_to_y_restore() returns for kCuda, whose tensors the host cannot read: `count` and
// `at` are copies of what `call.count` and `call.at` hold. Throws as the others.
void split_kept(SwapRestoreCall& call, const std::int64_t* count, const std::int64_t* at);

ReductionCall check_polyak_sums(StableIValue* stack, Backend backend);
ReductionCall check_grad_norm(StableIValue* stack, Backend backend);

}  // namespace schedulefree
