// What torch says of a tensor, and the refusals that name it.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstddef>
#include <cstdint>
#include <ostream>
#include <sstream>
#include <stdexcept>
#include <string>

#include "checks.h"

namespace schedulefree {

template <typename... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream message;
  message << "schedulefree_cpp::" << op << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// "z[3]", or "coefs" for a tensor that is in no list; for messages only.
struct At {
  static constexpr std::size_t kNoList = static_cast<std::size_t>(-1);
  const char* name;
  std::size_t index = kNoList;
};

std::ostream& operator<<(std::ostream& out, const At& at);

struct Shape {
  const std::int64_t* sizes;
  std::int64_t ndim;
};

std::ostream& operator<<(std::ostream& out, const Shape& shape);

struct DTypeInfo {
  std::int32_t torch_value;
  DType dtype;
  const char* name;
  std::int64_t size;
};
const DTypeInfo& info_of(DType dtype);
const DTypeInfo* find_dtype(std::int32_t torch_value);  // null for a dtype that no operator takes

// Also of the dtypes that a user may pass by mistake; for messages.
std::string name_of_dtype(std::int32_t torch_value);

// Whether tensors have memory that kernels are going to reach.
bool has_memory(Backend backend);

struct TensorInfo {
  void* data = nullptr;
  std::int64_t numel = 0;
  std::int64_t ndim = 0;
  const std::int64_t* sizes = nullptr;
  const std::int64_t* strides = nullptr;
  std::int32_t dtype = 0;
  std::int32_t device = -1;
  bool symbolic = false;  // shape and strides are unknown

  Shape shape() const { return {sizes, ndim}; }
};

// Refuses a tensor that is undefined, sparse, on another device than the backend's, or larger than its
// storage.
TensorInfo inspect(const char* op, At at, AtenTensorHandle tensor, Backend backend);

// The offset of the last element from the first, for a tensor that has one.
std::int64_t last_offset(const TensorInfo& t);

bool is_contiguous(const TensorInfo& t);

}  // namespace schedulefree
