#include "checks/tensor_facts.h"

#include <array>

namespace schedulefree {
namespace {

const std::array<DTypeInfo, 7>& known_dtypes() {
  static const std::array<DTypeInfo, 7> dtypes = {{
      {aoti_torch_dtype_float32(), DType::kFloat32, "float32", 4},
      {aoti_torch_dtype_float64(), DType::kFloat64, "float64", 8},
      {aoti_torch_dtype_bfloat16(), DType::kBFloat16, "bfloat16", 2},
      {aoti_torch_dtype_float16(), DType::kFloat16, "float16", 2},
      {aoti_torch_dtype_int16(), DType::kInt16, "int16", 2},
      {aoti_torch_dtype_int8(), DType::kInt8, "int8", 1},
      {aoti_torch_dtype_uint8(), DType::kUInt8, "uint8", 1},
  }};
  return dtypes;
}

std::string name_of_device(std::int32_t type) {
  if (type == aoti_torch_device_type_cpu()) return "cpu";
  if (type == aoti_torch_device_type_cuda()) return "cuda";
  if (type == aoti_torch_device_type_meta()) return "meta";
  if (type == aoti_torch_device_type_mps()) return "mps";
  if (type == aoti_torch_device_type_xpu()) return "xpu";
  return "another device (torch device type " + std::to_string(type) + ")";
}

// Of the tensors that a backend takes.
std::int32_t device_type(Backend backend) {
  switch (backend) {
    case Backend::kCuda:
      return aoti_torch_device_type_cuda();
    case Backend::kMeta:
      return aoti_torch_device_type_meta();
    case Backend::kCpu:
    case Backend::kNone:
      break;
  }
  return aoti_torch_device_type_cpu();
}

// Refuses a tensor whose storage was made smaller since, as FSDP does to parameters that are not in use.
void check_storage(const char* op, At at, AtenTensorHandle tensor, const TensorInfo& info) {
  if (info.numel == 0) return;
  std::int64_t offset = 0, bytes = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(tensor, &offset));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor, &bytes));
  const auto size = static_cast<std::int64_t>(aoti_torch_dtype_element_size(info.dtype));
  const std::int64_t needed = (offset + last_offset(info) + 1) * size;
  if (needed > bytes)
    fail(op, at, ": expected a storage of ", needed, " bytes or more, got one of ", bytes,
         ", which was made smaller than its tensor");
}

}  // namespace

std::ostream& operator<<(std::ostream& out, const At& at) {
  out << at.name;
  return at.index == At::kNoList ? out : out << '[' << at.index << ']';
}

std::ostream& operator<<(std::ostream& out, const Shape& shape) {
  out << '[';
  for (std::int64_t d = 0; d < shape.ndim; ++d) out << (d ? ", " : "") << shape.sizes[d];
  return out << ']';
}

const DTypeInfo& info_of(DType dtype) { return known_dtypes()[static_cast<std::size_t>(dtype)]; }

const DTypeInfo* find_dtype(std::int32_t torch_value) {
  for (const DTypeInfo& info : known_dtypes()) {
    if (info.torch_value == torch_value) return &info;
  }
  return nullptr;
}

std::string name_of_dtype(std::int32_t torch_value) {
  if (const DTypeInfo* info = find_dtype(torch_value)) return info->name;
  if (torch_value == aoti_torch_dtype_int32()) return "int32";
  if (torch_value == aoti_torch_dtype_int64()) return "int64";
  if (torch_value == aoti_torch_dtype_bool()) return "bool";
  if (torch_value == aoti_torch_dtype_complex64()) return "complex64";
  if (torch_value == aoti_torch_dtype_complex128()) return "complex128";
  return "another dtype (torch scalar type " + std::to_string(torch_value) + ")";
}

bool has_memory(Backend backend) { return backend == Backend::kCpu || backend == Backend::kCuda; }

std::int64_t last_offset(const TensorInfo& t) {
  std::int64_t last = 0;
  for (std::int64_t d = 0; d < t.ndim; ++d) last += t.strides[d] * (t.sizes[d] - 1);
  return last;
}

TensorInfo inspect(const char* op, At at, AtenTensorHandle tensor, Backend backend) {
  bool defined = false;
  TORCH_ERROR_CODE_CHECK(aoti_torch_is_defined(tensor, &defined));
  if (!defined) fail(op, at, ": expected a tensor, got an undefined one");

  std::int32_t layout = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(tensor, &layout));
  if (layout != aoti_torch_layout_strided()) {
    fail(op, at, ": expected a dense (strided) tensor, got a sparse one or another layout");
  }

  std::int32_t device = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor, &device));
  if (backend == Backend::kNone) {
    if (device != aoti_torch_device_type_cpu() && device != aoti_torch_device_type_meta())
      fail(op, at, ": no kernel is available for device ", name_of_device(device));
  } else if (device != device_type(backend)) {
    fail(op, at, ": expected a tensor on ", name_of_device(device_type(backend)),
         " like the others of this call, got one on ", name_of_device(device));
  }

  TensorInfo info;
  if (backend == Backend::kCuda) TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor, &info.device));
  std::int64_t* sizes = nullptr;
  std::int64_t* strides = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor, &info.dtype));
  if (aoti_torch_get_numel(tensor, &info.numel) != TORCH_SUCCESS) {
    // A traced tensor whose shape is symbolic; the real one is checked when the traced program runs.
    if (has_memory(backend))
      fail(op, at, ": expected a tensor with a shape, got one whose shape is symbolic");
    info.symbolic = true;
    return info;
  }
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(tensor, &info.ndim));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor, &sizes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor, &strides));
  info.sizes = sizes;
  info.strides = strides;
  if (has_memory(backend)) {
    check_storage(op, at, tensor, info);
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(tensor, &info.data));
  }
  return info;
}

bool is_contiguous(const TensorInfo& t) {
  std::int64_t expected = 1;
  for (std::int64_t d = t.ndim - 1; d >= 0; --d) {
    if (t.sizes[d] == 1) continue;
    if (t.strides[d] != expected) return false;
    expected *= t.sizes[d];
  }
  return true;
}

}  // namespace schedulefree
