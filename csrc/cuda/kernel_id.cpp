#include "cuda/kernel_id.h"

#include <utility>

namespace schedulefree::cuda {
namespace {

const char* name_of(Format format) {
  static constexpr const char* kNames[] = {"Float32",   "Float64",   "Fp16",   "Bf16",
                                           "SplitFp16", "SplitBf16", "Split24"};
  return kNames[static_cast<std::size_t>(format)];
}

DType word_of(Format format) {
  return format == Format::kFloat64                                ? DType::kFloat64
         : format == Format::kFloat32                              ? DType::kFloat32
         : format == Format::kFp16 || format == Format::kSplitFp16 ? DType::kFloat16
                                                                   : DType::kBFloat16;
}

std::string text_of(bool value) { return value ? "true" : "false"; }

std::string text_of(DecayAt where) {
  return where == DecayAt::kY ? "DecayAt::kY" : where == DecayAt::kZ ? "DecayAt::kZ" : "DecayAt::kNowhere";
}

Format plain(DType dtype) {
  return dtype == DType::kFloat64    ? Format::kFloat64
         : dtype == DType::kFloat32  ? Format::kFloat32
         : dtype == DType::kBFloat16 ? Format::kBf16
                                     : Format::kFp16;
}

}  // namespace

std::string KernelId::name() const {
  const std::string Y = name_of(y), G = name_of(grad), real = wide() ? "double" : "float";
  const std::string streams = op < Op::kTotal ? std::to_string(streams_of(*this).size()) : "";
  const std::string tensors = table == TableKind::kLarge   ? "LargeTable<" + streams + '>'
                              : table == TableKind::kSmall ? "SmallTable<" + streams + '>'
                                                           : "StridedTensor<" + streams + '>';
  const std::string moment = op != Op::kAdamwStep ? "NoMoment"
                             : moment8            ? "Moment8"
                                                  : "WholeMoment<" + real + '>';
  const std::string options = captured ? "Captured<" + text_of(decay_at) + '>'
                                       : "Known<" + text_of(decay_at) + ", " + text_of(at_random) + '>';
  switch (op) {
    case Op::kSgdStep:
    case Op::kAdamwStep:
      return "update_kernel<Step<" + Y + ", " + G + ", " + moment + ", " + text_of(inner) + ", " + options +
             ">, " + tensors + '>';
    case Op::kSwap:
      return "update_kernel<Swap<" + Y + ">, " + tensors + '>';
    case Op::kBeforeBaseStep:
    case Op::kAfterBaseStep:
      return "update_kernel<BaseStep<" + Y + ", " + text_of(op == Op::kBeforeBaseStep) + ", " +
             text_of(exchange) + ", " + options + ">, " + tensors + '>';
    case Op::kPolyakSums:
      return "sum_kernel<PolyakSums<" + Y + ", " + G + ">, " + tensors + '>';
    case Op::kGradNorm:
      return "sum_kernel<SumOfSquares<" + G + ">, " + tensors + '>';
    case Op::kTotal:
      return "total_kernel<" + std::to_string(sums) + ", " + text_of(root) + '>';
    case Op::kResolve:
      return "resolve_kernel<" + real + '>';
    case Op::kSchedule:
      return "schedule_step_kernel<StepKind(" + std::to_string(static_cast<int>(kind)) + ")>";
  }
  return "";
}

int size_of(DType dtype) {
  static constexpr int kSizes[] = {4, 8, 2, 2, 2, 1, 1};
  return kSizes[static_cast<std::size_t>(dtype)];
}

std::vector<StreamInfo> streams_of(const KernelId& id) {
  const bool adam = id.op == Op::kAdamwStep, of_24_bits = id.y == Format::kSplit24;
  const bool low = of_24_bits || id.y == Format::kSplitBf16 || id.y == Format::kSplitFp16;
  const DType y = word_of(id.y), grad = word_of(id.grad),
              state = id.wide() ? DType::kFloat64 : DType::kFloat32;
  if (id.op == Op::kGradNorm) return {{"grad", &TensorArgs::grad, grad}};
  std::vector<StreamInfo> streams = {{"y", &TensorArgs::y, y}};
  if (id.is_step() || id.is_sum()) streams.push_back({"grad", &TensorArgs::grad, grad});
  streams.push_back({"z", &TensorArgs::z, of_24_bits ? y : state});
  if (adam) streams.push_back({"exp_avg_sq", &TensorArgs::exp_avg_sq, id.moment8 ? DType::kUInt8 : state});
  if (adam && id.inner) streams.push_back({"exp_avg", &TensorArgs::exp_avg, state});
  if (adam && id.moment8)
    streams.push_back({"exp_avg_sq_scale", &TensorArgs::exp_avg_sq_scale, DType::kFloat32});
  if (low) streams.push_back({"y_lo", &TensorArgs::y_lo, of_24_bits ? DType::kInt8 : DType::kInt16});
  if (of_24_bits) streams.push_back({"z_lo", &TensorArgs::z_lo, DType::kInt8});
  return streams;
}

KernelId kernel_for(Op op, const TensorArgs& tensor) {
  KernelId id;
  id.op = op;
  id.moment8 = tensor.exp_avg_sq_scale.data != nullptr;
  id.inner = tensor.exp_avg.data != nullptr;
  if (tensor.grad.data != nullptr) id.grad = plain(tensor.grad.dtype);
  if (op != Op::kGradNorm) {
    id.y = plain(tensor.y.dtype);
    if (tensor.y_lo.data != nullptr) {
      id.y = id.y == Format::kFp16               ? Format::kSplitFp16
             : tensor.y_lo.dtype == DType::kInt8 ? Format::kSplit24
                                                 : Format::kSplitBf16;
    }
  }
  for (const Stream& stream : {tensor.y, tensor.grad, tensor.z, tensor.exp_avg_sq, tensor.exp_avg,
                               tensor.exp_avg_sq_scale, tensor.y_lo, tensor.z_lo}) {
    if (stream.strides != nullptr) id.table = TableKind::kStrided;
  }
  return id;
}

std::vector<KernelId> common_kernels() {
  std::vector<KernelId> ids;
  // Formats of parameters, and of gradients of the same dtype; those of 16 bits alone are swapped only.
  constexpr std::pair<Format, Format> kFormats[] = {
      {Format::kFloat32, Format::kFloat32}, {Format::kFloat64, Format::kFloat64},
      {Format::kSplitBf16, Format::kBf16},  {Format::kSplitFp16, Format::kFp16},
      {Format::kSplit24, Format::kBf16},    {Format::kBf16, Format::kBf16},
      {Format::kFp16, Format::kFp16}};
  for (const auto& [y, grad] : kFormats) {
    KernelId id;
    id.y = y;
    id.grad = grad;
    const auto add = [&](Op op) {
      id.op = op;
      ids.push_back(id);
    };
    add(Op::kSwap);
    if (y == Format::kBf16 || y == Format::kFp16) continue;
    add(Op::kPolyakSums);
    if (y != Format::kSplit24) {
      add(Op::kGradNorm);
      id.exchange = y == Format::kFloat32 || y == Format::kFloat64;
      for (const bool captured : {false, true}) {
        id.captured = captured;
        add(Op::kBeforeBaseStep);
        add(Op::kAfterBaseStep);
      }
      id.exchange = id.captured = false;
    }
    for (int moments = 0; moments < 5; ++moments) {  // SGD, and the four kinds of AdamW
      id.inner = moments > 0 && moments % 2 == 0;
      id.moment8 = moments > 2;
      if (id.moment8 && id.wide()) continue;
      for (int options = 0; options < 8; ++options) {
        id.captured = options < 2;
        id.at_random = options >= 5;
        id.decay_at = static_cast<DecayAt>(options < 2 ? options : (options - 2) % 3);
        if (!id.at_random || y == Format::kSplit24) add(moments == 0 ? Op::kSgdStep : Op::kAdamwStep);
      }
    }
  }
  for (const Format arithmetic : {Format::kFloat32, Format::kFloat64}) {
    ids.emplace_back();
    ids.back().op = Op::kResolve;
    ids.back().y = arithmetic;
  }
  for (const auto& [sums, root] : {std::pair<int, bool>{1, false}, {1, true}, {2, false}}) {
    ids.emplace_back();
    ids.back().op = Op::kTotal;
    ids.back().sums = sums;
    ids.back().root = root;
  }
  for (int kind = 0; kind < kStepKinds; ++kind) {
    ids.emplace_back();
    ids.back().op = Op::kSchedule;
    ids.back().kind = static_cast<StepKind>(kind);
  }
  return ids;
}

}  // namespace schedulefree::cuda
