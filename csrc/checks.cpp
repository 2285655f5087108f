#include "checks.h"

#include <cmath>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string_view>
#include <vector>

#include "checks/overlap.h"
#include "checks/plan.h"
#include "checks/tensor_facts.h"
#include "schedule.h"

namespace schedulefree {
namespace {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// ---- lists -------------------------------------------------------------------------------------------

enum class Kind { kSgdStep, kAdamwStep, kSwap, kBaseStep, kReduction };

std::vector<ListSpec> list_specs(const CheckedLists& lists, Kind kind) {
  const bool writes_y = kind != Kind::kReduction, writes_z = writes_y && kind != Kind::kSwap;
  std::vector<ListSpec> specs = {
      {"y", &lists.y, &TensorArgs::y, Role::kY, writes_y, false},
      {"y_lo", &lists.y_lo, &TensorArgs::y_lo, Role::kYLo, writes_y, true},
  };
  if (kind != Kind::kSwap && kind != Kind::kBaseStep)
    specs.push_back({"grad", &lists.grad, &TensorArgs::grad, Role::kGrad, false, false});
  specs.push_back({"z", &lists.z, &TensorArgs::z, Role::kZ, writes_z, false});
  specs.push_back({"z_lo", &lists.z_lo, &TensorArgs::z_lo, Role::kZLo, writes_z, true});
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
  call.plan = make_plan(op, backend, list_specs(call.lists, kind), Formats::kStepped);
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
  call.plan = make_plan(op, backend, list_specs(call.lists, Kind::kSwap), Formats::kAny);
  return call;
}

BaseStepCall check_base_step(const char* op, StableIValue* stack, Backend backend, bool before) {
  Arguments arguments(stack);
  BaseStepCall call;
  call.lists.y = arguments.next<TensorList>();
  call.lists.y_lo = arguments.next<TensorList>();
  call.lists.z = arguments.next<TensorList>();
  call.coefs_tensor = arguments.next<Tensor>();
  const auto beta = before ? arguments.next<double>() : 1;
  call.exchange = arguments.next<bool>();
  check_domain(op, "beta", beta);
  call.to_x = y_to_x_weight(beta);
  fill_coefs(op, call, backend);
  call.plan = make_plan(op, backend, list_specs(call.lists, Kind::kBaseStep),
                        call.exchange ? Formats::kWhole : Formats::kWholeState);
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
  refuse_overlap(op, find_overlap(extents));
  return call;
}

SwapCall check_y_to_x(StableIValue* stack, Backend backend) {
  return check_swap("y_to_x_", stack, backend, &y_to_x_weight);
}

SwapCall check_x_to_y(StableIValue* stack, Backend backend) {
  return check_swap("x_to_y_", stack, backend, &x_to_y_weight);
}

BaseStepCall check_before_base_step(StableIValue* stack, Backend backend) {
  return check_base_step("before_base_step_", stack, backend, true);
}

BaseStepCall check_after_base_step(StableIValue* stack, Backend backend) {
  return check_base_step("after_base_step_", stack, backend, false);
}

ReductionCall check_polyak_sums(StableIValue* stack, Backend backend) {
  Arguments arguments(stack);
  ReductionCall call;
  call.lists.y = arguments.next<TensorList>();
  call.lists.y_lo = arguments.next<TensorList>();
  call.lists.grad = arguments.next<TensorList>();
  call.lists.z = arguments.next<TensorList>();
  call.lists.z_lo = arguments.next<TensorList>();
  call.plan = make_plan("polyak_sums", backend, list_specs(call.lists, Kind::kReduction), Formats::kStepped);
  return call;
}

ReductionCall check_grad_norm(StableIValue* stack, Backend backend) {
  Arguments arguments(stack);
  ReductionCall call;
  call.lists.grad = arguments.next<TensorList>();
  call.plan =
      make_plan("grad_norm", backend, {{"grad", &call.lists.grad, &TensorArgs::grad, Role::kY, false, false}},
                Formats::kAny);
  return call;
}

}  // namespace schedulefree
