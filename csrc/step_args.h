// What the kernels take: raw pointers, 64-bit sizes and tags. No torch types.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace schedulefree {

enum class DType : std::int8_t { kFloat32, kFloat64, kBFloat16, kFloat16, kInt16 };

// One tensor's memory, seen in the iteration order of its parameter.
struct Stream {
  void* data = nullptr;                   // null: this stream is absent
  const std::int64_t* strides = nullptr;  // elements, per iteration dimension; null: dense in iteration order
  DType dtype = DType::kFloat32;
};

// One parameter with everything that belongs to it.
struct TensorArgs {
  std::int64_t numel = 0;
  // Shape of the iteration, outermost first. Only streams with strides need it.
  const std::int64_t* sizes = nullptr;
  std::int64_t ndim = 0;
  Stream y, y_lo, grad, z, exp_avg_sq, exp_avg;
};

// A checked operator call. `dims` owns the arrays that the tensors point into.
struct StepPlan {
  std::vector<TensorArgs> tensors;
  std::vector<std::unique_ptr<std::int64_t[]>> dims;
};

}  // namespace schedulefree
