#include "checks.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "schedule.h"

namespace schedulefree {
namespace {

using torch::stable::detail::to;

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

const std::array<DTypeInfo, 5>& known_dtypes() {
  static const std::array<DTypeInfo, 5> dtypes = {{
      {aoti_torch_dtype_float32(), DType::kFloat32, "float32", 4},
      {aoti_torch_dtype_float64(), DType::kFloat64, "float64", 8},
      {aoti_torch_dtype_bfloat16(), DType::kBFloat16, "bfloat16", 2},
      {aoti_torch_dtype_float16(), DType::kFloat16, "float16", 2},
      {aoti_torch_dtype_int16(), DType::kInt16, "int16", 2},
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
  if (torch_value == aoti_torch_dtype_int8()) return "int8";
  if (torch_value == aoti_torch_dtype_uint8()) return "uint8";
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

// The order in which a kernel sees the elements of a tensor.
enum class Order { kMemory, kDimensions };

// Orders the dimensions by y's strides, unless they are to stay as they are, merges those that every stream
// steps through as one, and gives a stream strides only where it is not dense in that order.
void plan_strided(StepPlan& plan, TensorArgs& args, const TensorInfo& y, const std::vector<Slot>& slots,
                  Order order_of_elements) {
  std::vector<std::int64_t> order;
  for (std::int64_t d = 0; d < y.ndim; ++d) {
    if (y.sizes[d] != 1) order.push_back(d);
  }
  if (order_of_elements == Order::kMemory) {
    std::stable_sort(order.begin(), order.end(),
                     [&](std::int64_t l, std::int64_t r) { return y.strides[l] > y.strides[r]; });
  }

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

bool is_float(DType dtype) { return dtype != DType::kInt16; }

// The arithmetic's precision, and that of z and the moments.
DType state_dtype(DType y) { return y == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

enum class Role { kY, kYLo, kGrad, kState };

struct ListSpec {
  const char* name;
  const TensorList* list;
  Stream TensorArgs::* stream;
  Role role;
  bool written;
  bool optional;
};

const DTypeInfo& check_dtype(const char* op, At at, Role role, DType y, std::int32_t got) {
  const DTypeInfo* info = find_dtype(got);
  const auto refuse = [&](const auto&... expected) {
    fail(op, at, ": expected dtype ", expected..., ", got ", name_of_dtype(got));
  };
  switch (role) {
    case Role::kY:
      if (!info || !is_float(info->dtype)) refuse("float32, float64, bfloat16 or float16");
      break;
    case Role::kYLo:
      if (y != DType::kBFloat16)
        fail(op, at, ": expected no low half, since y[", at.index, "] is ", info_of(y).name,
             " and not bfloat16");
      if (!info || info->dtype != DType::kInt16) refuse("int16");
      break;
    case Role::kGrad:
      if (y == DType::kFloat64) {
        if (!info || info->dtype != DType::kFloat64) refuse("float64 like y[", at.index, "]");
      } else if (!info || !is_float(info->dtype) || info->dtype == DType::kFloat64) {
        refuse("float32, bfloat16 or float16 for the ", info_of(y).name, " y[", at.index, "]");
      }
      break;
    case Role::kState:
      if (!info || info->dtype != state_dtype(y))
        refuse(info_of(state_dtype(y)).name, " for the ", info_of(y).name, " y[", at.index, "]");
      break;
  }
  return *info;
}

bool same_shape(const TensorInfo& l, const TensorInfo& r) {
  return l.ndim == r.ndim && std::equal(l.sizes, l.sizes + l.ndim, r.sizes);
}

StepPlan make_plan(const char* op, Backend backend, const std::vector<ListSpec>& all_lists,
                   Order order = Order::kMemory) {
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

  StepPlan plan;
  plan.tensors.resize(parameters.size());
  std::vector<Extent> extents;
  extents.reserve(parameters.size() * lists.size());
  bool all_contiguous = true;
  std::vector<TensorInfo> infos(lists.size());

  for (std::size_t i = 0; i < parameters.size(); ++i) {
    TensorArgs& args = plan.tensors[i];
    const TensorInfo& y = infos.front();
    DType y_dtype = DType::kFloat32;
    bool linear = true;

    for (std::size_t l = 0; l < lists.size(); ++l) {
      const ListSpec& spec = lists[l];
      const At at{spec.name, i};
      TensorInfo& tensor = infos[l];
      tensor = inspect(op, at, (*spec.list)[i], backend);
      const DTypeInfo& dtype = check_dtype(op, at, spec.role, y_dtype, tensor.dtype);
      if (l == 0) y_dtype = dtype.dtype;
      if (tensor.device != y.device) {
        fail(op, at, ": expected a tensor on device ", y.device, " like ", At{lists.front().name, i},
             ", got one on device ", tensor.device);
      }
      if (tensor.symbolic || y.symbolic) continue;
      if (!same_shape(tensor, y)) {
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
    all_contiguous = all_contiguous && linear;
    if (!linear && y.numel > 0 && has_memory(backend)) {
      std::vector<Slot> slots;
      for (std::size_t l = 0; l < lists.size(); ++l) slots.push_back({&infos[l], &(args.*lists[l].stream)});
      plan_strided(plan, args, y, slots, order);
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
  specs.push_back({"z", &lists.z, &TensorArgs::z, Role::kState, step, false});
  if (kind == Kind::kAdamwStep) {
    specs.push_back({"exp_avg_sq", &lists.exp_avg_sq, &TensorArgs::exp_avg_sq, Role::kState, true, false});
    specs.push_back({"exp_avg", &lists.exp_avg, &TensorArgs::exp_avg, Role::kState, true, true});
  }
  return specs;
}

// ---- scalars ---------------------------------------------------------------------------------------

DecayAt check_decay_at(const char* op, std::int64_t decay_at) {
  if (decay_at != 0 && decay_at != 1) fail(op, "decay_at: expected 0 (y) or 1 (z), got ", decay_at);
  return static_cast<DecayAt>(decay_at);
}

void fill_step_scalars(const char* op, StepScalars& s, double lr, double w, double a, double weight_decay,
                       std::int64_t decay_at, double grad_mul) {
  s.lr = lr;
  s.w = w;
  s.a = a;
  s.weight_decay = weight_decay;
  s.decay_at = check_decay_at(op, decay_at);
  if (weight_decay == 0) s.decay_at = DecayAt::kNowhere;
  s.grad_mul = grad_mul;
}

SwapScalars swap_scalars(const char* op, double beta, double (*weight_of)(double)) {
  try {
    return {weight_of(beta)};
  } catch (const std::invalid_argument& error) {
    fail(op, error.what());
  }
}

SwapCall check_swap(const char* op, StableIValue* stack, Backend backend, double (*weight_of)(double)) {
  SwapCall call;
  call.lists.y = TensorList(stack[0]);
  call.lists.y_lo = TensorList(stack[1]);
  call.lists.z = TensorList(stack[2]);
  call.swap = swap_scalars(op, to<double>(stack[3]), weight_of);
  call.plan = make_plan(op, backend, list_specs(call.lists, Kind::kSwap));
  return call;
}

ExactSwapCall check_exact_swap(const char* op, StableIValue* stack, double beta, Backend backend) {
  ExactSwapCall call;
  call.lists.y = TensorList(stack[0]);
  call.lists.y_lo = TensorList(stack[1]);
  call.lists.z = TensorList(stack[2]);
  call.swap = swap_scalars(op, beta, &y_to_x_weight);
  call.back = swap_scalars(op, beta, &x_to_y_weight);
  call.plan = make_plan(op, backend, list_specs(call.lists, Kind::kSwap), Order::kDimensions);
  return call;
}

// A vector without gaps.
TensorInfo inspect_vector(const char* op, const char* name, const torch::stable::Tensor& tensor,
                          Backend backend, std::int32_t dtype, const char* dtype_name) {
  const TensorInfo info = inspect(op, {name}, tensor.get(), backend);
  if (info.dtype != dtype)
    fail(op, name, ": expected dtype ", dtype_name, ", got ", name_of_dtype(info.dtype));
  if (!info.symbolic && (info.ndim != 1 || !is_contiguous(info)))
    fail(op, name, ": expected one contiguous dimension, got shape ", info.shape());
  return info;
}

void check_one_element(const char* op, const char* name, const TensorInfo& info) {
  if (!info.symbolic && info.numel != 1) fail(op, name, ": expected one element, got shape ", info.shape());
}

bool is_on_cpu(AtenTensorHandle tensor) {
  std::int32_t device = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor, &device));
  return device == aoti_torch_device_type_cpu();
}

// A number that is where the operator runs, or on the CPU.
ScalarInput scalar_input(const char* op, const char* name, const torch::stable::Tensor& tensor,
                         Backend backend) {
  const bool on_cpu = is_on_cpu(tensor.get());
  const TensorInfo info = inspect(op, {name}, tensor.get(), on_cpu ? Backend::kCpu : backend);
  check_one_element(op, name, info);
  const DTypeInfo* const dtype = find_dtype(info.dtype);
  if (!dtype || (dtype->dtype != DType::kFloat32 && dtype->dtype != DType::kFloat64))
    fail(op, name, ": expected dtype float32 or float64, got ", name_of_dtype(info.dtype));
  return {info.data, dtype->dtype, on_cpu};
}

double* check_coefs(const char* op, const torch::stable::Tensor& coefs, Backend backend) {
  const TensorInfo info = inspect_vector(op, "coefs", coefs, backend, aoti_torch_dtype_float64(), "float64");
  if (!info.symbolic && info.numel != kStepCoefficients)
    fail(op, "coefs: expected ", kStepCoefficients, " elements, got ", info.numel);
  return static_cast<double*>(info.data);
}

using OptionalTensor = std::optional<torch::stable::Tensor>;

// Takes `grad_norm` and `max_grad_norm`, which come together.
void fill_clipping(const char* op, SgdCall& call, StableIValue norm, StableIValue limit, Backend backend) {
  const auto grad_norm = to<OptionalTensor>(norm);
  const auto max_grad_norm = to<std::optional<double>>(limit);
  if (grad_norm.has_value() != max_grad_norm.has_value()) {
    fail(op, grad_norm ? "max_grad_norm" : "grad_norm", ": expected a value, since ",
         grad_norm ? "grad_norm" : "max_grad_norm", " has one, got none");
  }
  if (!grad_norm) return;
  call.grad_norm = scalar_input(op, "grad_norm", *grad_norm, backend);
  if (call.grad_norm.dtype != DType::kFloat64) fail(op, "grad_norm: expected dtype float64, got float32");
  call.tensors.push_back(*grad_norm);
  call.max_grad_norm = *max_grad_norm;
}

void check_positions(const char* op, std::size_t i, const std::int64_t* at, std::int64_t size,
                     std::int64_t numel) {
  for (std::int64_t j = 0; j < size; ++j) {
    const std::int64_t least = j ? at[j - 1] + 1 : 0;
    if (at[j] < least || at[j] >= numel) {
      fail(op, "at: expected ascending positions from 0 to ", numel - 1, " for y[", i, "], got ", at[j],
           j ? " after " : "", j ? std::to_string(at[j - 1]) : "");
    }
  }
}

}  // namespace

namespace {

void take_lists(CheckedLists& lists, const StableIValue* stack, bool adam) {
  lists.y = TensorList(stack[0]);
  lists.y_lo = TensorList(stack[1]);
  lists.grad = TensorList(stack[2]);
  lists.z = TensorList(stack[3]);
  if (!adam) return;
  lists.exp_avg_sq = TensorList(stack[4]);
  lists.exp_avg = TensorList(stack[5]);
}

// The arguments behind the lists of an overload that has its scalars in a tensor.
void fill_capturable(const char* op, SgdCall& call, StableIValue coefs, StableIValue decay_at,
                     Backend backend) {
  call.tensors.push_back(to<torch::stable::Tensor>(coefs));
  call.step.decay_at = check_decay_at(op, to<std::int64_t>(decay_at));
  call.coefs = check_coefs(op, call.tensors.back(), backend);
}

}  // namespace

SgdCall check_sgd_step(StableIValue* stack, Backend backend) {
  constexpr const char* op = "sgd_step_";
  SgdCall call;
  take_lists(call.lists, stack, false);
  fill_clipping(op, call, stack[10], stack[11], backend);
  fill_step_scalars(op, call.step, to<double>(stack[4]), to<double>(stack[5]), to<double>(stack[6]),
                    to<double>(stack[7]), to<std::int64_t>(stack[8]), to<double>(stack[9]));
  call.plan = make_plan(op, backend, list_specs(call.lists, Kind::kSgdStep));
  return call;
}

SgdCall check_sgd_step_capturable(StableIValue* stack, Backend backend) {
  constexpr const char* op = "sgd_step_.capturable";
  SgdCall call;
  take_lists(call.lists, stack, false);
  fill_capturable(op, call, stack[4], stack[5], backend);
  call.plan = make_plan(op, backend, list_specs(call.lists, Kind::kSgdStep));
  return call;
}

AdamwCall check_adamw_step(StableIValue* stack, Backend backend) {
  constexpr const char* op = "adamw_step_";
  AdamwCall call;
  take_lists(call.lists, stack, true);
  fill_clipping(op, call, stack[16], stack[17], backend);
  call.adam.beta2 = to<double>(stack[9]);
  call.adam.denom_scale = to<double>(stack[10]);
  call.adam.denom_eps = to<double>(stack[11]);
  call.adam.inner_momentum = to<double>(stack[12]);
  fill_step_scalars(op, call.step, to<double>(stack[6]), to<double>(stack[7]), to<double>(stack[8]),
                    to<double>(stack[13]), to<std::int64_t>(stack[14]), to<double>(stack[15]));
  if (call.adam.inner_momentum != 0 && call.lists.exp_avg.empty() && !call.lists.y.empty()) {
    fail(op, "exp_avg: expected one tensor for each of y, since inner_momentum is ", call.adam.inner_momentum,
         ", got none");
  }
  if (call.adam.inner_momentum == 0 && !call.lists.exp_avg.empty()) {
    fail(op, "exp_avg: expected no tensors, since inner_momentum is 0, got ", call.lists.exp_avg.size());
  }
  call.plan = make_plan(op, backend, list_specs(call.lists, Kind::kAdamwStep));
  return call;
}

AdamwCall check_adamw_step_capturable(StableIValue* stack, Backend backend) {
  constexpr const char* op = "adamw_step_.capturable";
  AdamwCall call;
  take_lists(call.lists, stack, true);
  fill_capturable(op, call, stack[6], stack[7], backend);
  call.plan = make_plan(op, backend, list_specs(call.lists, Kind::kAdamwStep));
  return call;
}

ScheduleCall check_schedule_step(StableIValue* stack, Backend backend) {
  constexpr const char* op = "schedule_step_";
  using torch::stable::Tensor;
  ScheduleCall call;
  ScheduleArgs& args = call.args;
  StepRule& rule = args.rule;
  for (std::size_t i = 0; i < 8; ++i) call.tensors.push_back(to<Tensor>(stack[i]));
  const std::array<OptionalTensor, 3> optional = {to<OptionalTensor>(stack[8]), to<OptionalTensor>(stack[9]),
                                                  to<OptionalTensor>(stack[10])};
  const auto kind = to<std::int64_t>(stack[11]);
  rule.beta_next = to<double>(stack[12]);
  rule.warmup_steps = to<std::int64_t>(stack[13]);
  rule.r = to<double>(stack[14]);
  rule.weight_lr_power = to<double>(stack[15]);
  rule.adam = {to<double>(stack[16]), to<double>(stack[17]), to<double>(stack[18]), to<bool>(stack[19])};
  rule.maximize = to<bool>(stack[20]);
  const auto max_grad_norm = to<std::optional<double>>(stack[21]);

  if (kind < 0 || kind > static_cast<std::int64_t>(StepKind::kRAdam))
    fail(op, "kind: expected 0 (SGD), 1 (AdamW), 2 (the paper's AdamW) or 3 (RAdam), got ", kind);
  rule.kind = static_cast<StepKind>(kind);
  if (!(rule.beta_next > 0 && rule.beta_next <= 1))
    fail(op, "beta_next: expected a value in (0, 1], got ", rule.beta_next);
  if (max_grad_norm && !optional[0])
    fail(op, "grad_norm: expected a tensor, since max_grad_norm is given, got none");
  rule.clips = max_grad_norm.has_value();
  rule.max_grad_norm = max_grad_norm.value_or(0);

  std::vector<Extent> extents;
  const auto extend = [&](const char* name, const Tensor& tensor, std::int64_t size, bool written) {
    if (has_memory(backend)) {
      const auto begin = reinterpret_cast<std::uintptr_t>(tensor.data_ptr());
      extents.push_back({begin, begin + static_cast<std::uintptr_t>(size), {name}, written});
    }
  };
  args.coefs = check_coefs(op, call.tensors[0], backend);
  const std::int32_t home = backend == Backend::kCuda ? call.tensors[0].get_device_index() : -1;
  const auto check_device = [&](const char* name, std::int32_t device) {
    if (device != home)
      fail(op, name, ": expected a tensor on device ", home, " like coefs, got one on device ", device);
  };
  extend("coefs", call.tensors[0], sizeof(StepCoefficients), true);

  const auto state = [&](const char* name, std::size_t i, const char* dtype_name,
                         std::int32_t dtype) -> void* {
    const TensorInfo info = inspect(op, {name}, call.tensors[i].get(), backend);
    check_device(name, info.device);
    if (info.dtype != dtype)
      fail(op, name, ": expected dtype ", dtype_name, ", got ", name_of_dtype(info.dtype));
    check_one_element(op, name, info);
    extend(name, call.tensors[i], 8, true);
    return info.data;
  };
  args.k = static_cast<std::int64_t*>(state("k", 1, "int64", aoti_torch_dtype_int64()));
  const auto number = [&](const char* name, std::size_t i) {
    return static_cast<double*>(state(name, i, "float64", aoti_torch_dtype_float64()));
  };
  args.weight_sum = number("weight_sum", 2);
  args.lr_max = number("lr_max", 3);
  args.scheduled_lr = number("scheduled_lr", 4);
  args.beta = number("beta", 5);

  const auto input = [&](const char* name, const Tensor& tensor) {
    const ScalarInput result = scalar_input(op, name, tensor, backend);
    if (backend == Backend::kCuda && !result.on_cpu) check_device(name, tensor.get_device_index());
    extend(name, tensor, result.dtype == DType::kFloat64 ? 8 : 4, false);
    return result;
  };
  args.lr = input("lr", call.tensors[6]);
  args.weight_decay = input("weight_decay", call.tensors[7]);
  if (optional[0]) args.grad_norm = input("grad_norm", *optional[0]);
  if (optional[1]) args.grad_scale = input("grad_scale", *optional[1]);
  if (optional[2]) args.found_inf = input("found_inf", *optional[2]);
  for (const OptionalTensor& tensor : optional)
    if (tensor) call.tensors.push_back(*tensor);

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

ExactSwapCall check_y_to_x_keep(StableIValue* stack, Backend backend) {
  return check_exact_swap("y_to_x_keep_", stack, to<double>(stack[3]), backend);
}

SwapRestoreCall check_x_to_y_restore(StableIValue* stack, Backend backend) {
  constexpr const char* op = "x_to_y_restore_";
  using torch::stable::Tensor;
  SwapRestoreCall call;
  call.at = to<Tensor>(stack[3]);
  call.value = to<Tensor>(stack[4]);
  call.count = to<Tensor>(stack[5]);
  call.exact = check_exact_swap(op, stack, to<double>(stack[6]), backend);
  std::swap(call.exact.swap, call.exact.back);
  const std::int32_t positions = aoti_torch_dtype_int64();
  const TensorInfo at = inspect_vector(op, "at", call.at, backend, positions, "int64");
  const TensorInfo value =
      inspect_vector(op, "value", call.value, backend, aoti_torch_dtype_float64(), "float64");
  const TensorInfo count = inspect_vector(op, "count", call.count, backend, positions, "int64");
  const std::vector<TensorArgs>& tensors = call.exact.plan.tensors;
  if (at.symbolic || value.symbolic || count.symbolic) return call;
  if (static_cast<std::size_t>(count.numel) != tensors.size())
    fail(op, "count: expected ", tensors.size(), " elements, one for each of y, got ", count.numel);
  if (value.numel != at.numel) fail(op, "value: expected ", at.numel, " elements like at, got ", value.numel);
  if (backend == Backend::kCpu)
    split_kept(call, static_cast<const std::int64_t*>(count.data), static_cast<const std::int64_t*>(at.data));
  return call;
}

void split_kept(SwapRestoreCall& call, const std::int64_t* count, const std::int64_t* at) {
  constexpr const char* op = "x_to_y_restore_";
  const std::vector<TensorArgs>& tensors = call.exact.plan.tensors;
  const std::int64_t total = call.at.numel();
  const auto* const at_data = static_cast<const std::int64_t*>(call.at.data_ptr());
  const auto* const value_data = static_cast<const double*>(call.value.data_ptr());
  std::int64_t begin = 0;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const std::int64_t size = count[i];
    if (size < 0 || size > total - begin)
      fail(op, "count: expected a sum of ", total, " like the length of at, got ", size, " for y[", i, "]");
    check_positions(op, i, at + begin, size, tensors[i].numel);
    call.kept.push_back({size, at_data + begin, value_data + begin});
    begin += size;
  }
  if (begin != total) fail(op, "count: expected a sum of ", total, " like the length of at, got ", begin);
}

ReductionCall check_grad_norm(StableIValue* stack, Backend backend) {
  ReductionCall call;
  call.lists.grad = TensorList(stack[0]);
  call.plan = make_plan("grad_norm", backend,
                        {{"grad", &call.lists.grad, &TensorArgs::grad, Role::kY, false, false}});
  return call;
}

ReductionCall check_polyak_sums(StableIValue* stack, Backend backend) {
  ReductionCall call;
  call.lists.y = TensorList(stack[0]);
  call.lists.y_lo = TensorList(stack[1]);
  call.lists.grad = TensorList(stack[2]);
  call.lists.z = TensorList(stack[3]);
  call.plan = make_plan("polyak_sums", backend, list_specs(call.lists, Kind::kReduction));
  return call;
}

}  // namespace schedulefree
