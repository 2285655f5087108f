#include "checks/plan.h"

#include <algorithm>
#include <memory>
#include <utility>

#include "checks/overlap.h"
#include "storage.h"

namespace schedulefree {
namespace {

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

// ---- formats -----------------------------------------------------------------------------------------

bool is_float(DType dtype) {
  return dtype == DType::kFloat32 || dtype == DType::kFloat64 || dtype == DType::kBFloat16 ||
         dtype == DType::kFloat16;
}

bool has_low_half(DType y) { return y == DType::kBFloat16 || y == DType::kFloat16; }

// The arithmetic's precision, and that of z and the moments where they are kept in it.
DType state_dtype(DType y) { return y == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

// What is known of a parameter's format when a tensor of it is checked: the lists stand in the order of Role.
struct FormatInfo {
  DType y = DType::kFloat32;
  bool has_y_lo = false, of_24_bits = false, of_8_bits = false;
  bool empty = false;  // without elements, y and y_lo do not tell the format
};

// What the low half of a 16-bit y may be.
const char* low_dtypes(DType y, Formats formats) {
  return y == DType::kBFloat16 && formats < Formats::kWholeState ? "int16 or int8" : "int16";
}

const DTypeInfo& check_dtype(const char* op, At at, Role role, Formats formats, FormatInfo& format,
                             std::int32_t got) {
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
      require(formats != Formats::kWhole || !has_low_half(info->dtype),
              "float32 or float64 to hold z with exchange");
      format.y = info->dtype;
      break;
    case Role::kYLo:
      if (!has_low_half(format.y))
        fail(op, at, ": expected no low half, since y[", at.index, "] is ", y_name,
             " and not bfloat16 or float16");
      format.has_y_lo = true;
      format.of_24_bits = format.y == DType::kBFloat16 && is(DType::kInt8);
      require(is(DType::kInt16) || (format.of_24_bits && formats < Formats::kWholeState),
              low_dtypes(format.y, formats));
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

// Refuses a parameter with elements that lacks a part of its format.
void check_parts(const char* op, std::size_t i, const FormatInfo& format, const TensorArgs& args,
                 Formats formats) {
  const auto require = [&](bool has, const char* name, const char* why, const char* dtype) {
    if (!has) fail(op, At{name, i}, ": expected a tensor of dtype ", dtype, ", since ", why, ", got none");
  };
  if (has_low_half(format.y) && formats != Formats::kAny)
    require(format.has_y_lo, "y_lo", "y has 16 bits", low_dtypes(format.y, formats));
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

// ---- the plan ----------------------------------------------------------------------------------------

// The lists that are there, each with a tensor for every parameter.
std::vector<ListSpec> lists_present(const char* op, const std::vector<ListSpec>& all) {
  const std::size_t parameters = all.front().list->size();
  std::vector<ListSpec> present;
  for (const ListSpec& spec : all) {
    if (spec.optional && spec.list->empty()) continue;
    if (spec.list->size() != parameters) {
      fail(op, spec.name, ": expected ", parameters, " tensors, one for each of y,",
           spec.optional ? " or none," : "", " got ", spec.list->size());
    }
    present.push_back(spec);
  }
  return present;
}

class Planner {
 public:
  Planner(const char* op, Backend backend, const std::vector<ListSpec>& lists, Formats formats)
      : op_(op),
        backend_(backend),
        lists_(lists_present(op, lists)),
        formats_(formats),
        infos_(lists_.size()) {
    extents_.reserve(parameters() * lists_.size());
  }

  StepPlan plan() {
    StepPlan plan;
    plan.tensors.resize(parameters());
    for (std::size_t i = 0; i < parameters(); ++i) add_parameter(plan, i);
    if (backend_ == Backend::kNone && parameters() > 0)
      fail(op_, "no kernel takes tensors of these devices together");
    if (has_memory(backend_)) refuse_shared_memory();
    return plan;
  }

 private:
  std::size_t parameters() const { return lists_.front().list->size(); }

  void add_parameter(StepPlan& plan, std::size_t i) {
    TensorArgs& args = plan.tensors[i];
    const TensorInfo& y = infos_.front();
    FormatInfo format;
    bool linear = true;
    for (std::size_t l = 0; l < lists_.size(); ++l) {
      if (!is_absent(lists_[l], i)) linear = add_tensor(args, format, l, i) && linear;
    }
    args.numel = y.numel;
    args.device = y.device;
    all_contiguous_ = all_contiguous_ && linear;
    if (!has_memory(backend_) || y.numel == 0) return;
    check_parts(op_, i, format, args, formats_);
    if (linear) return;
    std::vector<Slot> slots;
    for (std::size_t l = 0; l < lists_.size(); ++l) {
      if (lists_[l].role != Role::kScale && !is_absent(lists_[l], i))
        slots.push_back({&infos_[l], &(args.*lists_[l].stream)});
    }
    plan_strided(plan, args, y, slots);
  }

  // Returns whether the tensor is contiguous.
  bool add_tensor(TensorArgs& args, FormatInfo& format, std::size_t l, std::size_t i) {
    const ListSpec& spec = lists_[l];
    const At at{spec.name, i};
    const TensorInfo& y = infos_.front();
    const TensorInfo& tensor = infos_[l] = inspect(op_, at, (*spec.list)[i], backend_);
    if (l == 0) format.empty = !tensor.symbolic && tensor.numel == 0;
    const DTypeInfo& dtype = check_dtype(op_, at, spec.role, formats_, format, tensor.dtype);
    if (tensor.device != y.device) {
      fail(op_, at, ": expected a tensor on device ", y.device, " like ", At{lists_.front().name, i},
           ", got one on device ", tensor.device);
    }
    if (tensor.symbolic || y.symbolic) return true;
    if (spec.role == Role::kScale) {
      check_scales(op_, at, tensor, y.numel);
    } else if (!same_shape(tensor, y)) {
      fail(op_, at, ": expected shape ", y.shape(), " like y[", i, "], got ", tensor.shape());
    }
    const bool contiguous = is_contiguous(tensor);
    if (spec.written && !contiguous && may_overlap_itself(tensor)) {
      fail(op_, at,
           ": expected every element to have memory of its own, got a tensor that overlaps itself (an "
           "expanded view?)");
    }
    if (tensor.numel > 0)
      extents_.push_back(bounding_extent(at, tensor, dtype.size, contiguous, spec.written));
    args.*spec.stream = {tensor.data, nullptr, dtype.dtype};
    return contiguous;
  }

  void refuse_shared_memory() {
    auto overlap = find_overlap(extents_);
    if (overlap && !all_contiguous_) {
      // Bounds of tensors with gaps may cross where their elements do not.
      extents_.clear();
      for (const ListSpec& spec : lists_) {
        for (std::size_t i = 0; i < parameters(); ++i) {
          if (is_absent(spec, i)) continue;
          const At at{spec.name, i};
          const TensorInfo tensor = inspect(op_, at, (*spec.list)[i], backend_);
          append_runs(at, tensor, find_dtype(tensor.dtype)->size, spec.written, extents_);
        }
      }
      overlap = find_overlap(extents_);
    }
    refuse_overlap(op_, overlap);
  }

  const char* op_;
  Backend backend_;
  std::vector<ListSpec> lists_;
  Formats formats_;
  std::vector<TensorInfo> infos_;  // of the parameter at hand
  std::vector<Extent> extents_;
  bool all_contiguous_ = true;
};

}  // namespace

StepPlan make_plan(const char* op, Backend backend, const std::vector<ListSpec>& lists, Formats formats) {
  return Planner(op, backend, lists, formats).plan();
}

}  // namespace schedulefree
