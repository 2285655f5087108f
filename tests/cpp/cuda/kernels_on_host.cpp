#include "cuda/kernels_on_host.h"  // of the tests

#include <cxxabi.h>

#include <cstdlib>
#include <map>
#include <string>
#include <typeinfo>

#include "cuda/fiber.h"
// The sources under test, which a fault may be planted in.
#include "cuda/kernels.cuh"
#include "cuda/updates.cuh"

namespace schedulefree {
namespace {

std::map<std::string, RunKernel>& registry() {
  static std::map<std::string, RunKernel> kernels;
  return kernels;
}

void replace(std::string& text, const std::string& from, const std::string& to) {
  for (std::size_t at = 0; (at = text.find(from, at)) != std::string::npos; at += to.size())
    text.replace(at, from.size(), to);
}

// The expression of a type, as it is written.
template <typename T>
std::string name_of() {
  char* const demangled = abi::__cxa_demangle(typeid(T).name(), nullptr, nullptr, nullptr);
  std::string text = demangled;
  std::free(demangled);
  replace(text, "schedulefree::", "");
  replace(text, "(DecayAt)0", "DecayAt::kY");
  replace(text, "(DecayAt)1", "DecayAt::kZ");
  replace(text, "(DecayAt)2", "DecayAt::kNowhere");
  replace(text, "Whole<float>", "Float32");
  replace(text, "Whole<double>", "Float64");
  replace(text, " >", ">");
  return text;
}

template <typename T>
const T& argument(void** arguments, int i) {
  return *static_cast<const T*>(arguments[i]);
}

template <template <int> class Table>
struct TableName;
template <>
struct TableName<LargeTable> {
  static constexpr const char* kName = "LargeTable<";
};
template <>
struct TableName<SmallTable> {
  [[maybe_unused]] static constexpr const char* kName = "SmallTable<";  // not if SCHEDULEFREE_FEW_KERNELS
};
template <>
struct TableName<StridedTensor> {
  static constexpr const char* kName = "StridedTensor<";
};

template <unsigned set, template <int> class Table>
std::string table_name() {
  return TableName<Table>::kName + std::to_string(count_of(set)) + ">>";
}

template <typename Op, template <int> class Table>
void add_update() {
  using Tensors = Table<count_of(Op::kStreams)>;
  registry()["update_kernel<" + name_of<Op>() + ", " + table_name<Op::kStreams, Table>()] =
      [](unsigned blocks, void** arguments) {
        const auto& table = argument<Tensors>(arguments, 0);
        const auto& source = argument<typename Op::Source>(arguments, 1);
        for (unsigned b = 0; b < blocks; ++b)
          fiber::run_block(b, kThreads, [&] { update_kernel<Op, Tensors>(table, source); });
      };
}

template <typename Op, template <int> class Table>
void add_sum() {
  using Tensors = Table<count_of(Op::kStreams)>;
  registry()["sum_kernel<" + name_of<Op>() + ", " + table_name<Op::kStreams, Table>()] =
      [](unsigned blocks, void** arguments) {
        const auto& table = argument<Tensors>(arguments, 0);
        auto* const totals = argument<Totals<Op::kSums>*>(arguments, 1);
        for (unsigned b = 0; b < blocks; ++b)
          fiber::run_block(b, kThreads, [&] { sum_kernel<Op, Tensors>(table, totals); });
      };
}

template <int sums, bool root>
void add_total() {
  registry()["total_kernel<" + std::to_string(sums) + ", " + (root ? "true>" : "false>")] =
      [](unsigned, void** arguments) {
        const auto* const totals = argument<const Totals<sums>*>(arguments, 0);
        const auto count = argument<std::int64_t>(arguments, 1);
        auto* const result = argument<Totals<sums>*>(arguments, 2);
        fiber::run_block(0, kTotalThreads, [&] { total_kernel<sums, root>(totals, count, result); });
      };
}

template <typename Real>
void add_resolve() {
  registry()["resolve_kernel<" + name_of<Real>() + ">"] = [](unsigned, void** arguments) {
    const auto* const coefs = argument<const double*>(arguments, 0);
    auto* const step = argument<ResolvedStep<Real>*>(arguments, 1);
    fiber::run_block(0, 1, [&] { resolve_kernel<Real>(coefs, step); });
  };
}

template <StepKind kind>
void add_schedule() {
  registry()["schedule_step_kernel<StepKind(" + std::to_string(static_cast<int>(kind)) + ")>"] =
      [](unsigned, void** arguments) {
        const auto& args = argument<ScheduleArgs>(arguments, 0);
        const auto& host = argument<StepInputs>(arguments, 1);
        fiber::run_block(0, 1, [&] { schedule_step_kernel<kind>(args, host); });
      };
}

// A step in dense and in strided tables, with scalars of the host and of the device.
template <typename Y, typename Grad, typename V, bool inner>
void add_step() {
  add_update<Step<Y, Grad, V, inner, Known<DecayAt::kY, false>>, LargeTable>();
#if !defined(SCHEDULEFREE_FEW_KERNELS)
  add_update<Step<Y, Grad, V, inner, Known<DecayAt::kY, false>>, StridedTensor>();
  add_update<Step<Y, Grad, V, inner, Captured<DecayAt::kY>>, LargeTable>();
  add_update<Step<Y, Grad, V, inner, Captured<DecayAt::kY>>, StridedTensor>();
  if constexpr (Y::kStochastic) add_update<Step<Y, Grad, V, inner, Known<DecayAt::kY, true>>, LargeTable>();
#endif
}

template <typename Y>
void add_swap() {
  add_update<Swap<Y>, LargeTable>();
  add_update<Swap<Y>, StridedTensor>();
}

// What surrounds the step of a base optimizer, with scalars of the host and of the device.
template <typename Y, bool exchange>
void add_base_step() {
  using OfHost = Known<DecayAt::kNowhere, false>;
  using OfDevice = Captured<DecayAt::kNowhere>;
  add_update<BaseStep<Y, true, exchange, OfHost>, LargeTable>();
  add_update<BaseStep<Y, true, exchange, OfDevice>, LargeTable>();
  add_update<BaseStep<Y, true, exchange, OfHost>, StridedTensor>();
  add_update<BaseStep<Y, true, exchange, OfDevice>, StridedTensor>();
  add_update<BaseStep<Y, false, exchange, OfHost>, LargeTable>();
  add_update<BaseStep<Y, false, exchange, OfDevice>, LargeTable>();
  add_update<BaseStep<Y, false, exchange, OfHost>, StridedTensor>();
  add_update<BaseStep<Y, false, exchange, OfDevice>, StridedTensor>();
}

template <typename Y, typename Grad>
void add_sums() {
  add_sum<PolyakSums<Y, Grad>, LargeTable>();
  add_sum<PolyakSums<Y, Grad>, StridedTensor>();
}

void add_all() {
  using Whole32 = WholeMoment<float>;
  add_step<Float32, Float32, Whole32, false>();
  add_step<SplitBf16, Bf16, NoMoment, false>();
  add_step<Float32, Float32, Moment8, false>();
  add_swap<Float32>();
  add_update<BaseStep<Float32, false, false, Known<DecayAt::kNowhere, false>>, LargeTable>();
  add_sum<SumOfSquares<Float32>, LargeTable>();
#if !defined(SCHEDULEFREE_FEW_KERNELS)
  add_step<Float32, Float32, NoMoment, false>();
  add_step<Float32, Fp16, Whole32, true>();
  add_step<Float64, Float64, NoMoment, false>();
  add_step<Float64, Float64, WholeMoment<double>, true>();
  add_step<SplitBf16, Float32, Whole32, true>();
  add_step<SplitFp16, Fp16, Whole32, false>();
  add_step<SplitFp16, Fp16, NoMoment, false>();
  add_step<Split24, Bf16, NoMoment, false>();
  add_step<Split24, Bf16, Moment8, false>();
  add_step<Split24, Float32, Moment8, true>();
  add_step<SplitBf16, Bf16, Moment8, false>();
  // Of one format every option and table.
  add_update<Step<Float32, Float32, Whole32, false, Known<DecayAt::kNowhere, false>>, LargeTable>();
  add_update<Step<Float32, Float32, Whole32, false, Known<DecayAt::kZ, false>>, LargeTable>();
  add_update<Step<Float32, Float32, Whole32, false, Captured<DecayAt::kZ>>, LargeTable>();
  add_update<Step<Float32, Float32, Whole32, false, Known<DecayAt::kY, false>>, SmallTable>();
  add_swap<Float64>();
  add_swap<Fp16>();
  add_swap<Bf16>();
  add_swap<SplitFp16>();
  add_swap<SplitBf16>();
  add_swap<Split24>();
  add_base_step<Float32, true>();
  add_base_step<Float32, false>();
  add_base_step<Float64, true>();
  add_base_step<SplitBf16, false>();
  add_base_step<SplitFp16, false>();
  add_sums<Float32, Bf16>();
  add_sums<Float64, Float64>();
  add_sums<Split24, Float32>();
  add_sums<SplitFp16, Fp16>();
  add_sum<SumOfSquares<Float64>, LargeTable>();
  add_sum<SumOfSquares<Float64>, StridedTensor>();
  add_sum<SumOfSquares<Fp16>, LargeTable>();
  add_sum<SumOfSquares<Bf16>, LargeTable>();
  add_total<1, true>();
  add_total<1, false>();
  add_total<2, false>();
  add_resolve<float>();
  add_resolve<double>();
  add_schedule<StepKind::kSgd>();
  add_schedule<StepKind::kAdamW>();
  add_schedule<StepKind::kAdamWPaper>();
  add_schedule<StepKind::kRAdam>();
  add_schedule<StepKind::kPlus>();
#endif
}

}  // namespace
}  // namespace schedulefree

extern "C" __attribute__((visibility("default"))) RunKernel find_kernel(const char* name) {
  using schedulefree::registry;
  if (registry().empty()) schedulefree::add_all();
  const auto found = registry().find(name);
  return found == registry().end() ? nullptr : found->second;
}

// The names of all, for the test that they are those that the host asks for.
extern "C" __attribute__((visibility("default"))) void list_kernels(void (*visit)(const char* name)) {
  find_kernel("");
  for (const auto& [name, run] : schedulefree::registry()) visit(name.c_str());
}
