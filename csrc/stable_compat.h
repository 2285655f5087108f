// Where torch's stable ABI falls short of what the operators need. Each piece names the torch version
// that makes it unnecessary.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

namespace schedulefree {

// A `Tensor[]` argument taken from a boxed stack.
//
// Gap: `to<std::vector<torch::stable::Tensor>>` allocates a shared_ptr per tensor, a fifth of the
// cost of a call over many small parameters. Not filled as of torch 2.13.
class TensorList {
 public:
  TensorList() = default;

  // Takes over the reference that the stack holds.
  explicit TensorList(StableIValue value) {
    const auto list = torch::stable::detail::to<StableListHandle>(value);
    std::size_t size = 0;
    TORCH_ERROR_CODE_CHECK(torch_list_size(list, &size));
    handles_.reserve(size);
    for (std::size_t i = 0; i < size; ++i) {
      StableIValue element{};
      TORCH_ERROR_CODE_CHECK(torch_list_get_item(list, i, &element));
      handles_.push_back(torch::stable::detail::to<AtenTensorHandle>(element));
    }
    TORCH_ERROR_CODE_CHECK(torch_delete_list(list));
  }

  ~TensorList() {
    for (AtenTensorHandle handle : handles_) aoti_torch_delete_tensor_object(handle);
  }

  TensorList(const TensorList&) = delete;
  TensorList& operator=(const TensorList&) = delete;
  TensorList(TensorList&& other) noexcept : handles_(std::exchange(other.handles_, {})) {}
  TensorList& operator=(TensorList&& other) noexcept {
    std::swap(handles_, other.handles_);
    return *this;
  }

  std::size_t size() const { return handles_.size(); }
  bool empty() const { return handles_.empty(); }
  AtenTensorHandle operator[](std::size_t i) const { return handles_[i]; }

 private:
  std::vector<AtenTensorHandle> handles_;
};

// The arguments of a boxed call, taken over one after the other in the order of the schema. No gap: `to`
// takes one.
class Arguments {
 public:
  explicit Arguments(const StableIValue* stack) : next_(stack) {}

  template <typename T>
  T next() {
    if constexpr (std::is_same_v<T, TensorList>) {
      return TensorList(*next_++);
    } else {
      return torch::stable::detail::to<T>(*next_++);
    }
  }

 private:
  const StableIValue* next_;
};

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;

// A new one-dimensional tensor. No gap: what the stable `empty` wants six arguments for.
inline torch::stable::Tensor new_vector(std::int64_t size, ScalarType dtype,
                                        DeviceType device = DeviceType::CPU) {
  return torch::stable::empty({size}, dtype, std::nullopt, torch::stable::Device(device));
}

// A new tensor without dimensions.
inline torch::stable::Tensor new_scalar(ScalarType dtype, DeviceType device = DeviceType::CPU) {
  return torch::stable::empty({}, dtype, std::nullopt, torch::stable::Device(device));
}

}  // namespace schedulefree
