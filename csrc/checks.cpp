#include "checks.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>

#include "schedule.h"
#include "storage.h"

namespace schedulefree {
namespace {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// ---- messages --------------------------------------------------------------------------------------

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

std::ostream& operator<<(std::ostream& out, const At& at) {
  out << at.name;
  return at.index == At::kNoList ? out : out << '[' << at.index << ']';
}

struct Shape {
  const std::int64_t* sizes;
  std::int64_t ndim;
};

std::ostream& operator<<(std::ostream& out, const Shape& shape) {
  out << '[';
  for (std::int64_t d = 0; d < shape.ndim; ++d) out << (d ? ", " : "") << shape.sizes[d];
  return out << ']';
}

// ---- what torch says of a tensor -------------------------------------------------------------------

struct DTypeInfo {
  std::int32_t torch_value;
  DType dtype;
  const char* name;
  std::int64_t size;
};

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

const DTypeInfo& info_of(DType dtype) { return known_dtypes()[static_cast<std::size_t>(dtype)]; }

const DTypeInfo* find_dtype(std::int32_t torch_value) {
  for (const DTypeInfo& info : known_dtypes()) {
    if (info.torch_value == torch_value) return &info;
  }
  return nullptr;
}

// The dtypes a user may pass by mistake, for messages only.
std::string name_of_dtype(std::int32_t torch_value) {
  if (const DTypeInfo* info = find_dtype(torch_value)) return info->name;
  if (torch_value == aoti_torch_dtype_int32()) return "int32";
  if (torch_value == aoti_torch_dtype_int64()) return "int64";
  if (torch_value == aoti_torch_dtype_bool()) return "bool";
  if (torch_value == aoti_torch_dtype_complex64()) return "complex64";
  if (torch_value == aoti_torch_dtype_complex128()) return "complex128";
  return "another dtype (torch scalar type " + std::to_string(torch_value) + ")";
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

// Whether tensors have memory that kernels are going to reach.
bool has_memory(Backend backend) { return backend == Backend::kCpu || backend == Backend::kCuda; }

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
  if (has_memory(backend)) TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(tensor, &info.data));
  info.sizes = sizes;
  info.strides = strides;
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

// ---- overlap ---------------------------------------------------------------------------------------

// Dimensions of more than one element, largest stride first.
std::vector<std::pair<std::int64_t, std::int64_t>> stride_size_pairs(const TensorInfo& t) {
  std::vector<std::pair<std::int64_t, std::int64_t>> dims;
  for (std::int64_t d = 0; d < t.ndim; ++d) {
    if (t.sizes[d] != 1) dims.emplace_back(t.strides[d], t.sizes[d]);
  }
  std::sort(dims.begin(), dims.end(), std::greater<>());
  return dims;
}

// Whether two indices may name one address. Views of as_strided that interleave without a collision
// count as overlapping: no slice, transpose or permutation produces one.
bool may_overlap_itself(const TensorInfo& t) {
  if (t.numel == 0) return false;
  std::int64_t extent = 1;
  const auto dims = stride_size_pairs(t);
  for (auto dim = dims.rbegin(); dim != dims.rend(); ++dim) {
    if (dim->first < extent) return true;
    extent += dim->first * (dim->second - 1);
  }
  return false;
}

// A run of bytes that belongs to one tensor of the call.
struct Extent {
  std::uintptr_t begin;
  std::uintptr_t end;
  At at;
  bool written;
};

Extent bounding_extent(At at, const TensorInfo& t, std::int64_t element_size, bool contiguous, bool written) {
  std::int64_t last = t.numel - 1;
  if (!contiguous) {
    last = 0;
    for (std::int64_t d = 0; d < t.ndim; ++d) last += t.strides[d] * (t.sizes[d] - 1);
  }
  const auto begin = reinterpret_cast<std::uintptr_t>(t.data);
  return {begin, begin + static_cast<std::uintptr_t>((last + 1) * element_size), at, written};
}

// The exact memory of a tensor, as runs of its innermost dimension.
void append_runs(At at, const TensorInfo& t, std::int64_t element_size, bool written,
                 std::vector<Extent>& extents) {
  auto dims = stride_size_pairs(t);
  std::int64_t run = 1;
  while (!dims.empty() && dims.back().first == run) {
    run *= dims.back().second;
    dims.pop_back();
  }
  std::int64_t runs = t.numel == 0 ? 0 : 1;
  for (const auto& dim : dims) runs *= dim.second;
  for (std::int64_t r = 0; r < runs; ++r) {
    std::int64_t offset = 0;
    std::int64_t rest = r;
    for (auto dim = dims.rbegin(); dim != dims.rend(); ++dim) {
      offset += dim->first * (rest % dim->second);
      rest /= dim->second;
    }
    const auto begin =
        reinterpret_cast<std::uintptr_t>(t.data) + static_cast<std::uintptr_t>(offset * element_size);
    extents.push_back({begin, begin + static_cast<std::uintptr_t>(run * element_size), at, written});
  }
}

// Two extents of which one is written and which share a byte.
std::optional<std::pair<At, At>> find_overlap(std::vector<Extent>& extents) {
  const auto by_begin = [](const Extent& l, const Extent& r) { return l.begin < r.begin; };
  if (!std::is_sorted(extents.begin(), extents.end(), by_begin))
    std::sort(extents.begin(), extents.end(), by_begin);
  const Extent* last_written = nullptr;
  const Extent* last_read = nullptr;
  for (const Extent& extent : extents) {
    if (last_written && extent.begin < last_written->end) return {{last_written->at, extent.at}};
    if (extent.written && last_read && extent.begin < last_read->end) return {{last_read->at, extent.at}};
    const Extent*& last = extent.written ? last_written : last_read;
    if (!last || extent.end > last->end) last = &extent;
  }
  return std::nullopt;
}

// ---- iteration -------------------------------------------------------------------------------------

struct Slot {
  const TensorInfo* tensor;
  Stream* stream;
};

// Orders the dimensions by y's strides, merges those that every stream steps through as one, and gives a
// stream strides only where it is not dense in that order.
void plan_strided(StepPlan& plan, TensorArgs& args, const TensorInfo& y, const std::vector<Slot>& slots) {
  std::vector<std::int64_t> order;
  for (std::int64_t d = 0; d < y.ndim; ++d) {
    if (y.sizes[d] != 1) order.push_back(d);
  }
  std::sort(order.begin(), order.end(), [&](std::int64_t l, std::int64_t r) {
    return y.strides[l] != y.strides[r] ? y.strides[l] > y.strides[r] : l < r;
  });

  std::vector<std::int64_t> merged_sizes;
  std::vector<std::int64_t> innermost;  // of each merged dimension: the original one whose stride it has
  for (const std::int64_t d : order) {
    const bool merges = !innermost.empty() && std::all_of(slots.begin(), slots.end(), [&](const Slot& slot) {
      return slot.tensor->strides[innermost.back()] == slot.tensor->strides[d] * y.sizes[d];
    });
    if (merges) {
      merged_sizes.back() *= y.sizes[d];
      innermost.back() = d;
    } else {
      merged_sizes.push_back(y.sizes[d]);
      innermost.push_back(d);
    }
  }

  const std::size_t ndim = merged_sizes.size();
  const auto keep = [&](const std::vector<std::int64_t>& values) {
    plan.dims.push_back(std::make_unique<std::int64_t[]>(values.size()));
    std::copy(values.begin(), values.end(), plan.dims.back().get());
    return static_cast<const std::int64_t*>(plan.dims.back().get());
  };
  args.sizes = keep(merged_sizes);
  args.ndim = static_cast<std::int64_t>(ndim);
  for (const Slot& slot : slots) {
    std::vector<std::int64_t> strides(ndim);
    bool dense = true;
    std::int64_t expected = 1;
    for (std::size_t d = ndim; d-- > 0;) {
      strides[d] = slot.tensor->strides[innermost[d]];
      dense = dense && strides[d] == expected;
      expected *= merged_sizes[d];
    }
    if (!dense) slot.stream->strides = keep(strides);
  }
}

// ---- lists to plan ---------------------------------------------------------------------------------

bool is_float(DType dtype) {
  return dtype == DType::kFloat32 || dtype == DType::kFloat64 || dtype == DType::kBFloat16 ||
         dtype == DType::kFloat16;
}

bool has_low_half(DType y) { return y == DType::kBFloat16 || y == DType::kFloat16; }

// The arithmetic's precision, and that of z and the moments where they are kept in it.
DType state_dtype(DType y) { return y == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

enum class Role { kY, kYLo, kGrad, kZ, kZLo, kMoment, kScale, kMean };

struct ListSpec {
  const char* name;
  const TensorList* list;
  Stream TensorArgs::* stream;
  Role role;
  bool written;
  bool optional;
};

// What is known of a parameter's format when a tensor of it is checked: the lists stand in the order of Role.
struct FormatInfo {
  DType y = DType::kFloat32;
  bool has_y_lo = false, of_24_bits = false, of_8_bits = false;
  bool empty = false;  // without elements, y and y_lo do not tell the format
};

const DTypeInfo& check_dtype(const char* op, At at, Role role, FormatInfo& format, std::int32_t got) {
  const DTypeInfo* info = find_dtype(got);
  const auto refuse = [&](const auto&... expected) {
    fail(op, at, ": expected dtype ", expected..., ", got ", name_of_dtype(got));
  };
  const auto require = [&](bool ok, const auto&... expected) {
    if (!info || !ok) refuse(expected...);
  };
  const auto is = [&](DType dtype) { return info && info->dtype == dtype; };
  const char* const y_name = info_of(format.y).name;
  const DTypeInfo& state = info_of(state_dtype(format.y));
  switch (role) {
    case Role::kY:
      require(info && is_float(info->dtype), "float32, float64, bfloat16 or float16");
      format.y = info->dtype;
      break;
    case Role::kYLo:
      if (!has_low_half(format.y))
        fail(op, at, ": expected no low half, since y[", at.index, "] is ", y_name,
             " and not bfloat16 or float16");
      format.has_y_lo = true;
      format.of_24_bits = format.y == DType::kBFloat16 && is(DType::kInt8);
      require(is(DType::kInt16) || format.of_24_bits,
              format.y == DType::kBFloat16 ? "int16 or int8" : "int16");
      break;
    case Role::kGrad:
      if (format.y == DType::kFloat64) {
        require(is(DType::kFloat64), "float64 like y[", at.index, "]");
      } else {
        require(info && is_float(info->dtype) && !is(DType::kFloat64),
                "float32, bfloat16 or float16 for the ", y_name, " y[", at.index, "]");
      }
      break;
    case Role::kZ:
      if (format.empty && format.y == DType::kBFloat16 && is(DType::kBFloat16)) break;
      if (format.of_24_bits) {
        require(is(DType::kBFloat16), "bfloat16 beside the low half of 8 bits of y[", at.index, "]");
      } else {
        require(is(state.dtype), state.name, " for the ", y_name, " y[", at.index, "]");
      }
      break;
    case Role::kZLo:
      if (!format.of_24_bits) fail(op, at, ": expected no low half, since y_lo[", at.index, "] is not int8");
      require(is(DType::kInt8), "int8");
      break;
    case Role::kMoment:
      format.of_8_bits = is(DType::kUInt8);
      require(is(state.dtype) || (format.of_8_bits && format.y != DType::kFloat64), state.name,
              format.y == DType::kFloat64 ? "" : " or uint8", " for the ", y_name, " y[", at.index, "]");
      break;
    case Role::kScale:
      if (!format.of_8_bits)
        fail(op, at, ": expected no scales, since exp_avg_sq[", at.index, "] is not uint8");
      require(is(DType::kFloat32), "float32");
      break;
    case Role::kMean:
      require(is(state.dtype), state.name, " for the ", y_name, " y[", at.index, "]");
      break;
  }
  return *info;
}

bool same_shape(const TensorInfo& l, const TensorInfo& r) {
  return l.ndim == r.ndim && std::equal(l.sizes, l.sizes + l.ndim, r.sizes);
}

// What some formats have and others lack. A tensor without elements stands for none, so that one call takes
// parameters of all formats.
bool is_part_of_a_format(Role role) {
  return role == Role::kYLo || role == Role::kZLo || role == Role::kScale;
}

bool is_absent(const ListSpec& spec, std::size_t i) {
  std::int64_t numel = 1;
  return is_part_of_a_format(spec.role) && aoti_torch_get_numel((*spec.list)[i], &numel) == TORCH_SUCCESS &&
         numel == 0;
}

// Refuses a parameter with elements that lacks a part of its format. Swaps take 16 bits alone.
void check_parts(const char* op, std::size_t i, const FormatInfo& format, const TensorArgs& args,
                 bool swaps) {
  const auto require = [&](bool has, const char* name, const char* why, const char* dtype) {
    if (!has) fail(op, At{name, i}, ": expected a tensor of dtype ", dtype, ", since ", why, ", got none");
  };
  if (has_low_half(format.y) && !swaps)
    require(format.has_y_lo, "y_lo", "y has 16 bits",
            format.y == DType::kBFloat16 ? "int16 or int8" : "int16");
  if (format.of_24_bits) require(args.z_lo.data != nullptr, "z_lo", "y_lo has 8 bits", "int8");
  if (format.of_8_bits)
    require(args.exp_avg_sq_scale.data != nullptr, "exp_avg_sq_scale", "exp_avg_sq has 8 bits", "float32");
}

void check_scales(const char* op, At at, const TensorInfo& scales, std::int64_t numel) {
  const std::int64_t expected = (numel + Moment8::kBlock - 1) / Moment8::kBlock;
  if (scales.ndim != 1 || scales.numel != expected || !is_contiguous(scales)) {
    fail(op, at, ": expected ", expected, " contiguous elements in one dimension, one for each ",
         Moment8::kBlock, " of y[", at.index, "], got shape ", scales.shape());
  }
}

StepPlan make_plan(const char* op, Backend backend, const std::vector<ListSpec>& all_lists) {
  const TensorList& parameters = *all_lists.front().list;
  std::vector<ListSpec> lists;
  for (const ListSpec& spec : all_lists) {
    if (spec.optional && spec.list->empty()) continue;
    if (spec.list->size() != parameters.size()) {
      fail(op, spec.name, ": expected ", parameters.size(), " tensors, one for each of y,",
           spec.optional ? " or none," : "", " got ", spec.list->size());
    }
    lists.push_back(spec);
  }

  const bool swaps =
      std::none_of(lists.begin(), lists.end(), [](const ListSpec& spec) { return spec.role == Role::kGrad; });
  StepPlan plan;
  plan.tensors.resize(parameters.size());
  std::vector<Extent> extents;
  extents.reserve(parameters.size() * lists.size());
  bool all_contiguous = true;
  std::vector<TensorInfo> infos(lists.size());

  for (std::size_t i = 0; i < parameters.size(); ++i) {
    TensorArgs& args = plan.tensors[i];
    const TensorInfo& y = infos.front();
    FormatInfo format;
    bool linear = true;

    for (std::size_t l = 0; l < lists.size(); ++l) {
      const ListSpec& spec = lists[l];
      if (is_absent(spec, i)) continue;
      const At at{spec.name, i};
      TensorInfo& tensor = infos[l];
      tensor = inspect(op, at, (*spec.list)[i], backend);
      if (l == 0) format.empty = !tensor.symbolic && tensor.numel == 0;
      const DTypeInfo& dtype = check_dtype(op, at, spec.role, format, tensor.dtype);
      if (tensor.device != y.device) {
        fail(op, at, ": expected a tensor on device ", y.device, " like ", At{lists.front().name, i},
             ", got one on device ", tensor.device);
      }
      if (tensor.symbolic || y.symbolic) continue;
      if (spec.role == Role::kScale) {
        check_scales(op, at, tensor, y.numel);
      } else if (!same_shape(tensor, y)) {
        fail(op, at, ": expected shape ", y.shape(), " like y[", i, "], got ", tensor.shape());
      }

      const bool contiguous = is_contiguous(tensor);
      linear = linear && contiguous;
      if (spec.written && !contiguous && may_overlap_itself(tensor)) {
        fail(op, at,
             ": expected every element to have memory of its own, got a tensor that overlaps itself (an "
             "expanded view?)");
      }
      if (tensor.numel > 0)
        extents.push_back(bounding_extent(at, tensor, dtype.size, contiguous, spec.written));
      Stream& stream = args.*spec.stream;
      stream.data = tensor.data;
      stream.dtype = dtype.dtype;
    }

    args.numel = y.numel;
    args.device = y.device;
    if (has_memory(backend) && y.numel > 0) check_parts(op, i, format, args, swaps);
    all_contiguous = all_contiguous && linear;
    if (!linear && y.numel > 0 && has_memory(backend)) {
      std::vector<Slot> slots;
      for (std::size_t l = 0; l < lists.size(); ++l) {
        if (lists[l].role != Role::kScale && !is_absent(lists[l], i))
          slots.push_back({&infos[l], &(args.*lists[l].stream)});
      }
      plan_strided(plan, args, y, slots);
    }
  }

  if (backend == Backend::kNone && !parameters.empty()) {
    fail(op, "no kernel takes tensors of these devices together");
  }
  if (has_memory(backend)) {
    auto overlap = find_overlap(extents);
    if (overlap && !all_contiguous) {
      // Bounds of tensors with gaps may cross where their elements do not.
      extents.clear();
      for (const ListSpec& spec : lists) {
        for (std::size_t i = 0; i < parameters.size(); ++i) {
          if (is_absent(spec, i)) continue;
          const At at{spec.name, i};
          const TensorInfo tensor = inspect(op, at, (*spec.list)[i], backend);
          append_runs(at, tensor, find_dtype(tensor.dtype)->size, spec.written, extents);
        }
      }
      overlap = find_overlap(extents);
    }
    if (overlap) {
      fail(op, overlap->second, ": expected memory of its own, got memory shared with ", overlap->first,
           ", which the operator would change or read at the same time");
    }
  }
  return plan;
}

enum class Kind { kSgdStep, kAdamwStep, kSwap, kReduction };

std::vector<ListSpec> list_specs(const CheckedLists& lists, Kind kind) {
  const bool step = kind == Kind::kSgdStep || kind == Kind::kAdamwStep;
  const bool writes_y = kind != Kind::kReduction;
  std::vector<ListSpec> specs = {
      {"y", &lists.y, &TensorArgs::y, Role::kY, writes_y, false},
      {"y_lo", &lists.y_lo, &TensorArgs::y_lo, Role::kYLo, writes_y, true},
  };
  if (kind != Kind::kSwap)
    specs.push_back({"grad", &lists.grad, &TensorArgs::grad, Role::kGrad, false, false});
  specs.push_back({"z", &lists.z, &TensorArgs::z, Role::kZ, step, false});
  specs.push_back({"z_lo", &lists.z_lo, &TensorArgs::z_lo, Role::kZLo, step, true});
  if (kind == Kind::kAdamwStep) {
    specs.push_back({"exp_avg_sq", &lists.exp_avg_sq, &TensorArgs::exp_avg_sq, Role::kMoment, true, false});
    specs.push_back({"exp_avg_sq_scale", &lists.exp_avg_sq_scale, &TensorArgs::exp_avg_sq_scale, Role::kScale,
                     true, true});
    specs.push_back({"exp_avg", &lists.exp_avg, &TensorArgs::exp_avg, Role::kMean, true, true});
  }
  return specs;
}

// ---- scalars ---------------------------------------------------------------------------------------

DecayAt check_decay_at(const char* op, std::int64_t decay_at) {
  if (decay_at != 0 && decay_at != 1) fail(op, "decay_at: expected 0 (y) or 1 (z), got ", decay_at);
  return static_cast<DecayAt>(decay_at);
}

void check_domain(const char* op, const char* name, double value) {
  try {
    check_hyperparameter(name, value);
  } catch (const std::invalid_argument& error) {
    fail(op, error.what());
  }
}

void check_dtype(const char* op, const char* name, const TensorInfo& info, std::int32_t dtype,
                 const char* dtype_name) {
  if (info.dtype != dtype)
    fail(op, name, ": expected dtype ", dtype_name, ", got ", name_of_dtype(info.dtype));
}

void check_one_element(const char* op, const char* name, const TensorInfo& info) {
  if (!info.symbolic && info.numel != 1) fail(op, name, ": expected one element, got shape ", info.shape());
}

bool is_on_cpu(const Tensor& tensor) {
  std::int32_t device = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device));
  return device == aoti_torch_device_type_cpu();
}

// A number that is where the operator runs, or on the CPU.
ScalarInput scalar_input(const char* op, const char* name, const Tensor& tensor, Backend backend) {
  const bool on_cpu = is_on_cpu(tensor);
  const TensorInfo info = inspect(op, {name}, tensor.get(), on_cpu ? Backend::kCpu : backend);
  check_one_element(op, name, info);
  const DTypeInfo* const dtype = find_dtype(info.dtype);
  if (!dtype || (dtype->dtype != DType::kFloat32 && dtype->dtype != DType::kFloat64))
    fail(op, name, ": expected dtype float32 or float64, got ", name_of_dtype(info.dtype));
  return {info.data, dtype->dtype == DType::kFloat64, on_cpu};
}

// The address of StepCoefficients in a tensor.
double* check_coefs(const char* op, const Tensor& coefs, Backend backend) {
  const TensorInfo info = inspect(op, {"coefs"}, coefs.get(), backend);
  check_dtype(op, "coefs", info, aoti_torch_dtype_float64(), "float64");
  if (!info.symbolic && (info.ndim != 1 || info.numel != kStepCoefficients || !is_contiguous(info))) {
    fail(op, "coefs: expected ", kStepCoefficients, " contiguous elements in one dimension, got shape ",
         info.shape());
  }
  return static_cast<double*>(info.data);
}

// The scalars of a step that is to be taken.
void check_step_coefficients(const char* op, const double* coefs) {
  for (std::int64_t i = 0; i < kStepCoefficients; ++i) {
    const std::string_view name = kCoefficientNames[i];
    // Clipping by a norm that is not finite makes grad_mul what it would make the gradients.
    if (!std::isfinite(coefs[i]) && name != "grad_mul")
      fail(op, "coefs: expected a finite ", name, ", got ", coefs[i]);
  }
  check_domain(op, "beta", step_coefficients(coefs).beta);
}

// Takes a step's scalars, which are where the operator runs or on the CPU.
void fill_coefs(const char* op, StepCall& call, Backend backend) {
  if (!is_on_cpu(call.coefs_tensor)) {
    call.device_coefs = check_coefs(op, call.coefs_tensor, backend);
    return;
  }
  const double* const coefs = check_coefs(op, call.coefs_tensor, Backend::kCpu);
  call.coefs = step_coefficients(coefs);
  const double take = call.coefs.take;
  if (take != 0 && take != 1) fail(op, "coefs: expected take to be 0 or 1, got ", take);
  if (take == 1) check_step_coefficients(op, coefs);
}

// `exp_avg` comes with inner momentum, as far as the host can tell.
void check_exp_avg(const char* op, const StepCall& call) {
  if (call.device_coefs || call.coefs.take == 0) return;
  const double inner_momentum = call.coefs.inner_momentum;
  if (inner_momentum != 0 && call.lists.exp_avg.empty() && !call.lists.y.empty()) {
    fail(op, "exp_avg: expected one tensor for each of y, since inner_momentum is ", inner_momentum,
         ", got none");
  }
  if (inner_momentum == 0 && !call.lists.exp_avg.empty()) {
    fail(op, "exp_avg: expected no tensors, since inner_momentum is 0, got ", call.lists.exp_avg.size());
  }
}

StepCall check_step(const char* op, StableIValue* stack, Backend backend, Kind kind) {
  Arguments arguments(stack);
  StepCall call;
  call.lists.y = arguments.next<TensorList>();
  call.lists.y_lo = arguments.next<TensorList>();
  call.lists.grad = arguments.next<TensorList>();
  call.lists.z = arguments.next<TensorList>();
  if (kind == Kind::kAdamwStep) {
    call.lists.exp_avg_sq = arguments.next<TensorList>();
    call.lists.exp_avg = arguments.next<TensorList>();
  }
  call.coefs_tensor = arguments.next<Tensor>();
  call.lists.z_lo = arguments.next<TensorList>();
  if (kind == Kind::kAdamwStep) call.lists.exp_avg_sq_scale = arguments.next<TensorList>();
  call.decay_at = check_decay_at(op, arguments.next<std::int64_t>());
  fill_coefs(op, call, backend);
  if (kind == Kind::kAdamwStep) check_exp_avg(op, call);
  call.plan = make_plan(op, backend, list_specs(call.lists, kind));
  return call;
}

SwapCall check_swap(const char* op, StableIValue* stack, Backend backend, SwapWeight (*weight_of)(double)) {
  Arguments arguments(stack);
  SwapCall call;
  call.lists.y = arguments.next<TensorList>();
  call.lists.y_lo = arguments.next<TensorList>();
  call.lists.z = arguments.next<TensorList>();
  call.lists.z_lo = arguments.next<TensorList>();
  const auto beta = arguments.next<double>();
  check_domain(op, "beta", beta);
  call.swap = weight_of(beta);
  call.plan = make_plan(op, backend, list_specs(call.lists, Kind::kSwap));
  return call;
}

void check_rule(const char* op, const StepRule& rule, std::int64_t kind) {
  constexpr std::int64_t kinds = std::size(kStepKindNames);
  if (kind < 0 || kind >= kinds) {
    std::ostringstream names;
    for (std::int64_t i = 0; i < kinds; ++i)
      names << (i ? ", " : "") << i << " (" << kStepKindNames[i] << ')';
    fail(op, "kind: expected one of ", names.str(), ", got ", kind);
  }
  check_domain(op, "beta", rule.beta);
  check_domain(op, "warmup_steps", rule.warmup_steps);
  check_domain(op, "r", rule.r);
  check_domain(op, "weight_lr_power", rule.weight_lr_power);
  check_domain(op, "decoupling_c", rule.decoupling_c);
  check_domain(op, "averaging_weight", rule.averaging_weight);
  check_domain(op, "betas[1]", rule.adam.beta2);
  check_domain(op, "eps", rule.adam.eps);
  check_domain(op, "inner_momentum", rule.adam.inner_momentum);
  if (rule.clips) check_domain(op, "max_grad_norm", rule.max_grad_norm);
}

}  // namespace

// ---- operators ---------------------------------------------------------------------------------------

StepCall check_sgd_step(StableIValue* stack, Backend backend) {
  return check_step("sgd_step_", stack, backend, Kind::kSgdStep);
}

StepCall check_adamw_step(StableIValue* stack, Backend backend) {
  return check_step("adamw_step_", stack, backend, Kind::kAdamwStep);
}

ScheduleCall check_schedule_step(StableIValue* stack, Backend backend) {
  constexpr const char* op = "schedule_step_";
  Arguments arguments(stack);
  ScheduleCall call;
  std::vector<Extent> extents;
  std::int32_t home = -1;  // the device of coefs
  const auto add_extent = [&](const char* name, void* data, std::int64_t size, bool written) {
    const auto begin = reinterpret_cast<std::uintptr_t>(data);
    if (has_memory(backend))
      extents.push_back({begin, begin + static_cast<std::uintptr_t>(size), {name}, written});
  };
  const auto check_device = [&](const char* name, const Tensor& tensor) {
    if (backend == Backend::kCuda && tensor.get_device_index() != home) {
      fail(op, name, ": expected a tensor on device ", home, " like coefs, got one on device ",
           tensor.get_device_index());
    }
  };

  // All are taken before the first check, which may throw.
  const auto coefs = arguments.next<Tensor>();
  const auto k = arguments.next<Tensor>();
  const auto weight_sum = arguments.next<Tensor>();
  const auto lr_max = arguments.next<Tensor>();
  const auto scheduled_lr = arguments.next<Tensor>();
  const OptionalTensor lr = arguments.next<Tensor>();
  const OptionalTensor weight_decay = arguments.next<Tensor>();
  const auto grad_norm = arguments.next<OptionalTensor>();
  const auto grad_scale = arguments.next<OptionalTensor>();
  const auto found_inf = arguments.next<OptionalTensor>();
  const auto kind = arguments.next<std::int64_t>();
  StepRule& rule = call.args.rule;
  rule.beta = rule.beta_next = arguments.next<double>();
  rule.warmup_steps = arguments.next<double>();
  rule.r = arguments.next<double>();
  rule.weight_lr_power = arguments.next<double>();
  rule.adam.beta2 = arguments.next<double>();
  rule.adam.eps = arguments.next<double>();
  rule.adam.inner_momentum = arguments.next<double>();
  rule.adam.silent_sgd_phase = arguments.next<bool>();
  rule.maximize = arguments.next<bool>();
  const auto max_grad_norm = arguments.next<std::optional<double>>();
  rule.clips = max_grad_norm.has_value();
  rule.max_grad_norm = max_grad_norm.value_or(0);
  rule.decoupling_c = arguments.next<double>();
  rule.averaging_weight = arguments.next<double>();
  rule.stochastic = arguments.next<bool>();
  check_rule(op, rule, kind);
  rule.kind = static_cast<StepKind>(kind);
  if (rule.clips && !grad_norm)
    fail(op, "grad_norm: expected a tensor, since max_grad_norm is given, got none");

  const auto state = [&](const char* name, const Tensor& tensor, std::int32_t dtype, const char* dtype_name) {
    const TensorInfo info = inspect(op, {name}, tensor.get(), backend);
    check_device(name, tensor);
    check_dtype(op, name, info, dtype, dtype_name);
    check_one_element(op, name, info);
    add_extent(name, info.data, 8, true);
    call.tensors.push_back(tensor);
    return info.data;
  };
  const auto number = [&](const char* name, const Tensor& tensor) {
    return static_cast<double*>(state(name, tensor, aoti_torch_dtype_float64(), "float64"));
  };
  const auto input = [&](const char* name, const OptionalTensor& tensor) -> ScalarInput {
    if (!tensor) return {};
    const ScalarInput result = scalar_input(op, name, *tensor, backend);
    if (!result.on_cpu) check_device(name, *tensor);
    add_extent(name, const_cast<void*>(result.data), result.is_float64 ? 8 : 4, false);
    call.tensors.push_back(*tensor);
    return result;
  };
  ScheduleArgs& args = call.args;
  args.coefs = check_coefs(op, coefs, backend);
  if (backend == Backend::kCuda) home = coefs.get_device_index();
  add_extent("coefs", args.coefs, sizeof(StepCoefficients), true);
  call.tensors.push_back(coefs);
  args.k = static_cast<std::int64_t*>(state("k", k, aoti_torch_dtype_int64(), "int64"));
  args.weight_sum = number("weight_sum", weight_sum);
  args.lr_max = number("lr_max", lr_max);
  args.scheduled_lr = number("scheduled_lr", scheduled_lr);
  args.lr = input("lr", lr);
  args.weight_decay = input("weight_decay", weight_decay);
  args.grad_norm = input("grad_norm", grad_norm);
  args.grad_scale = input("grad_scale", grad_scale);
  args.found_inf = input("found_inf", found_inf);

  if (backend == Backend::kNone) fail(op, "no kernel takes tensors of these devices together");
  if (const auto overlap = find_overlap(extents)) {
    fail(op, overlap->second, ": expected memory of its own, got memory shared with ", overlap->first,
         ", which the operator would change or read at the same time");
  }
  return call;
}

SwapCall check_y_to_x(StableIValue* stack, Backend backend) {
  return check_swap("y_to_x_", stack, backend, &y_to_x_weight);
}

SwapCall check_x_to_y(StableIValue* stack, Backend backend) {
  return check_swap("x_to_y_", stack, backend, &x_to_y_weight);
}

ReductionCall check_polyak_sums(StableIValue* stack, Backend backend) {
  Arguments arguments(stack);
  ReductionCall call;
  call.lists.y = arguments.next<TensorList>();
  call.lists.y_lo = arguments.next<TensorList>();
  call.lists.grad = arguments.next<TensorList>();
  call.lists.z = arguments.next<TensorList>();
  call.lists.z_lo = arguments.next<TensorList>();
  call.plan = make_plan("polyak_sums", backend, list_specs(call.lists, Kind::kReduction));
  return call;
}

ReductionCall check_grad_norm(StableIValue* stack, Backend backend) {
  Arguments arguments(stack);
  ReductionCall call;
  call.lists.grad = arguments.next<TensorList>();
  call.plan = make_plan("grad_norm", backend,
                        {{"grad", &call.lists.grad, &TensorArgs::grad, Role::kY, false, false}});
  return call;
}

}  // namespace schedulefree
