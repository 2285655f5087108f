// What the kernels take: raw pointers, 64-bit sizes and tags. No torch types.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "coefficients.h"

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

// A step of SGD or AdamW, as kernels take it that know its scalars.
struct StepUpdate {
  StepScalars<float> single;
  StepScalars<double> wide;  // of float64 parameters
  DecayAt decay_at = DecayAt::kNowhere;

  StepUpdate(const StepCoefficients& coefs, DecayAt decay_at)
      : single(coefs), wide(coefs), decay_at(coefs.weight_decay == 0 ? DecayAt::kNowhere : decay_at) {}
};

// What surrounds the step of a base optimizer.
struct BaseStepUpdate {
  StepUpdate step;
  SwapWeight to_x;  // before it: of the beta that built y
  bool exchange;    // y's memory is lent to the base and z's holds x, not the other way round
};

}  // namespace schedulefree
