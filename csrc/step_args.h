// What the kernels take: raw pointers, 64-bit sizes and tags. No torch types.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "schedule.h"
#include "storage.h"
#include "update_math.h"

namespace schedulefree {

enum class DType : std::int8_t { kFloat32, kFloat64, kBFloat16, kFloat16, kInt16, kInt8, kUInt8 };

// One tensor's memory, seen in the iteration order of its parameter.
struct Stream {
  void* data = nullptr;                   // null: this stream is absent
  const std::int64_t* strides = nullptr;  // elements, per iteration dimension; null: dense in iteration order
  DType dtype = DType::kFloat32;
};

// One parameter with everything that belongs to it. The dtypes of y and y_lo tell its format (storage.h), and
// with it that of z and z_lo.
struct TensorArgs {
  std::int64_t numel = 0;
  std::int32_t device = -1;  // number among the devices of its type; -1 where there is but one
  // Shape of the iteration, outermost first. Only streams with strides need it.
  const std::int64_t* sizes = nullptr;
  std::int64_t ndim = 0;
  Stream y, y_lo, grad, z, z_lo, exp_avg_sq, exp_avg;
  Stream exp_avg_sq_scale;  // a float for every Moment8::kBlock elements in iteration order
};

// A checked operator call. `dims` owns the arrays that the tensors point into.
struct StepPlan {
  std::vector<TensorArgs> tensors;
  std::vector<std::unique_ptr<std::int64_t[]>> dims;
};

// ---- scalars in tensors ------------------------------------------------------------------------------

// One number in memory, float32 or float64.
struct ScalarInput {
  const void* data = nullptr;  // null: absent
  DType dtype = DType::kFloat64;
  bool on_cpu = true;
};

SCHEDULEFREE_HOST_DEVICE inline double value_or(const ScalarInput& input, double absent) {
  if (!input.data) return absent;
  return input.dtype == DType::kFloat64 ? *static_cast<const double*>(input.data)
                                        : static_cast<double>(*static_cast<const float*>(input.data));
}

// What schedule_step_ reads and writes. All but the inputs is where the operator runs.
struct ScheduleArgs {
  double* coefs = nullptr;  // StepCoefficients
  std::int64_t* k = nullptr;
  double* weight_sum = nullptr;
  double* lr_max = nullptr;
  double* scheduled_lr = nullptr;
  ScalarInput lr, weight_decay, grad_norm, grad_scale, found_inf;
  StepRule rule;
};

// What a `coefs` tensor holds.
SCHEDULEFREE_HOST_DEVICE inline StepCoefficients step_coefficients(const double* coefs) {
  StepCoefficients result;
  memcpy(static_cast<void*>(&result), coefs, sizeof(result));
  return result;
}

SCHEDULEFREE_HOST_DEVICE inline SwapScalars swap_scalars(const SwapWeight& weight) {
  return {weight.hi, weight.lo};
}

SCHEDULEFREE_HOST_DEVICE inline StepScalars step_scalars(const StepCoefficients& c, DecayAt decay_at) {
  return {c.lr,
          c.w,
          c.a,
          c.weight_decay,
          c.grad_mul,
          c.weight_decay == 0 ? DecayAt::kNowhere : decay_at,
          swap_scalars(y_to_x_weight(c.beta)),
          swap_scalars(x_to_y_weight(c.beta)),
          scrambled(static_cast<std::uint32_t>(static_cast<std::int64_t>(c.k)) + 1),
          c.stochastic != 0};
}

SCHEDULEFREE_HOST_DEVICE inline AdamScalars adam_scalars(const StepCoefficients& c) {
  return {c.beta2, c.inner_momentum, c.denom_scale, c.denom_eps};
}

}  // namespace schedulefree
