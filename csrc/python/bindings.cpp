// The module `_C`: schedule.h, hyperparameters.h and build information for Python. No arithmetic of its own,
// and nothing of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <cstring>
#include <iterator>
#include <optional>
#include <string>

#include "build_info.h"
#include "schedule.h"

namespace py = pybind11;
using schedulefree::PolyakStep;
using schedulefree::ScheduleStep;

namespace {

py::tuple coefficients() {
  py::tuple names(std::size(schedulefree::kCoefficientNames));
  for (std::size_t i = 0; i < names.size(); ++i) names[i] = schedulefree::kCoefficientNames[i];
  return names;
}

py::dict step_kinds() {
  py::dict kinds;
  for (std::size_t i = 0; i < std::size(schedulefree::kStepKindNames); ++i)
    kinds[schedulefree::kStepKindNames[i]] = i;
  return kinds;
}

py::dict defaults() {
  py::dict values;
#define SCHEDULEFREE_VALUE(name, value) values[#name] = static_cast<double>(value);
  SCHEDULEFREE_DEFAULTS(SCHEDULEFREE_VALUE)
#undef SCHEDULEFREE_VALUE
  return values;
}

py::tuple values_of(const ScheduleStep& step) {
  const schedulefree::StepCoefficients& c = step.coefs;
#define SCHEDULEFREE_VALUE(name) values[at++] = c.name;
  py::tuple values(static_cast<std::size_t>(schedulefree::kStepCoefficients));
  std::size_t at = 0;
  SCHEDULEFREE_COEFFICIENTS(SCHEDULEFREE_VALUE)
#undef SCHEDULEFREE_VALUE
  return values;
}

void store_coefs(const ScheduleStep& step, const py::buffer& out) {
  const py::buffer_info info = out.request(/*writable=*/true);
  if (info.size * info.itemsize != static_cast<py::ssize_t>(sizeof(step.coefs)))
    throw py::value_error("Invalid out: expected " + std::to_string(sizeof(step.coefs)) + " bytes, got " +
                          std::to_string(info.size * info.itemsize));
  std::memcpy(info.ptr, &step.coefs, sizeof(step.coefs));
}

ScheduleStep schedule_step(int kind, std::int64_t k, double weight_sum, double lr_max, double scheduled_lr,
                           double lr, double weight_decay, double beta, double beta_next, double warmup_steps,
                           std::int64_t c_warmup, double r, double weight_lr_power, double decoupling_c,
                           double averaging_weight, double lr_factor, double beta2, double eps,
                           double inner_momentum, bool silent_sgd_phase, bool maximize, bool stochastic,
                           std::optional<double> max_grad_norm, double grad_norm) {
  if (kind < 0 || kind >= static_cast<int>(std::size(schedulefree::kStepKindNames)))
    throw py::value_error("Invalid kind: " + std::to_string(kind) + ", expected a value of STEP_KINDS");
  schedulefree::StepRule rule;
  rule.kind = static_cast<schedulefree::StepKind>(kind);
  rule.adam = {beta2, eps, inner_momentum, silent_sgd_phase};
  rule.beta = beta;
  rule.beta_next = beta_next;
  rule.warmup_steps = warmup_steps;
  rule.c_warmup = c_warmup;
  rule.r = r;
  rule.weight_lr_power = weight_lr_power;
  rule.decoupling_c = decoupling_c;
  rule.averaging_weight = averaging_weight;
  rule.lr_factor = lr_factor;
  rule.maximize = maximize;
  rule.stochastic = stochastic;
  rule.clips = max_grad_norm.has_value();
  rule.max_grad_norm = max_grad_norm.value_or(0);
  schedulefree::StepInputs inputs;
  inputs.lr = lr;
  inputs.weight_decay = weight_decay;
  inputs.grad_norm = grad_norm;
  return schedulefree::schedule_step({k, weight_sum, lr_max}, scheduled_lr, rule, inputs);
}

// Functions of Python that C calls: kept for the life of the process, and of the last caller.
py::function& progress_function() {
  static auto* const function = new py::function();
  return *function;
}
py::function& log_function() {
  static auto* const function = new py::function();
  return *function;
}

void compile_kernels(const char* architecture, py::function progress) {
  progress_function() = std::move(progress);
  const char* const reason = schedulefree_cpp_compile_kernels(
      architecture, [](const char* line) { progress_function()(line); });
  if (reason != nullptr) throw std::runtime_error(reason);
}

void set_log(py::function log) {
  log_function() = std::move(log);
  schedulefree_cpp_set_log([](const char* line) {
    const py::gil_scoped_acquire lock;
    log_function()(line);
  });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Host schedule, domains of hyperparameters and build information of schedulefree_cpp.";

  m.attr("COEFFICIENTS") = coefficients();
  m.attr("STEP_KINDS") = step_kinds();
  m.attr("DEFAULTS") = defaults();

  m.def("check_hyperparameter", &schedulefree::check_hyperparameter, py::arg("name"), py::arg("value"),
        py::arg("where") = "", "Raises ValueError for a value outside its domain (hyperparameters.h).");

  py::class_<ScheduleStep>(m, "ScheduleStep",
                           "Scalars of one optimizer step and the schedule's state after it.")
      .def_property_readonly("coefs", &values_of, "Values in the order of COEFFICIENTS.")
      .def("store_coefs", &store_coefs, py::arg("out"), "Writes the values into the memory of a buffer.")
      .def_property_readonly("k", [](const ScheduleStep& s) { return s.next.k; })
      .def_property_readonly("weight_sum", [](const ScheduleStep& s) { return s.next.weight_sum; })
      .def_property_readonly("lr_max", [](const ScheduleStep& s) { return s.next.lr_max; })
      .def_readonly("scheduled_lr", &ScheduleStep::scheduled_lr)
      .def_readonly("c", &ScheduleStep::c)
      .def_property_readonly("beta", [](const ScheduleStep& s) { return s.coefs.beta; });

  m.def("schedule_step", &schedule_step, py::kw_only(), py::arg("kind"), py::arg("k"), py::arg("weight_sum"),
        py::arg("lr_max"), py::arg("scheduled_lr") = 0.0, py::arg("lr"), py::arg("weight_decay") = 0.0,
        py::arg("beta"), py::arg("beta_next"), py::arg("warmup_steps") = 0.0, py::arg("c_warmup") = 0,
        py::arg("r") = 0.0, py::arg("weight_lr_power") = 2.0, py::arg("decoupling_c") = 0.0,
        py::arg("averaging_weight") = 0.0, py::arg("lr_factor") = 1.0, py::arg("beta2") = 0.0,
        py::arg("eps") = 0.0, py::arg("inner_momentum") = 0.0, py::arg("silent_sgd_phase") = true,
        py::arg("maximize") = false, py::arg("stochastic") = false, py::arg("max_grad_norm") = py::none(),
        py::arg("grad_norm") = 0.0,
        "The step after the given state (schedule.h). Raises ValueError outside the domain.");

  m.def("annealed_beta", &schedulefree::annealed_beta, py::kw_only(), py::arg("k"), py::arg("beta"),
        py::arg("beta_max"), py::arg("anneal_steps"), "ScheduleFree+'s beta at step k.");

  py::class_<PolyakStep>(m, "PolyakStep", "ScheduleFree+'s step size and the sums it comes from.")
      .def_readonly("lr_factor", &PolyakStep::lr_factor)
      .def_readonly("grad_l1_ema", &PolyakStep::grad_l1_ema)
      .def_readonly("grad_l1_ema_corr", &PolyakStep::grad_l1_ema_corr);

  m.def("polyak_step", &schedulefree::polyak_step, py::kw_only(), py::arg("k"), py::arg("function_value"),
        py::arg("grad_l1"), py::arg("ip_term"), py::arg("polyak_beta"), py::arg("grad_l1_ema"),
        "The Polyak step size (schedule.h). Raises ValueError for what is not finite.");

  const auto pair = [](const schedulefree::SwapWeight& weight) {
    return py::make_tuple(weight.hi, weight.lo);
  };
  m.def(
      "y_to_x_weight", [pair](double beta) { return pair(schedulefree::y_to_x_weight(beta)); },
      py::arg("beta"), "Weight of z that turns y into x, as a sum of two doubles.");
  m.def(
      "x_to_y_weight", [pair](double beta) { return pair(schedulefree::x_to_y_weight(beta)); },
      py::arg("beta"), "Weight of z that turns x into y, as a sum of two doubles.");

  m.def("version", &schedulefree_cpp_version, "Version of the operator library.");
  m.def("compiler", &schedulefree_cpp_compiler, "Compiler that built the operator library.");
  m.def("min_torch", &schedulefree_cpp_min_torch, "Oldest torch the operator library runs with.");
  m.def("load_cuda", &schedulefree_cpp_load_cuda,
        "Registers the CUDA operators in a process with a CUDA torch. Returns None, or why that cannot be.");
  m.def("cuda_report", &schedulefree_cpp_cuda_report,
        "What is known of CUDA here (build_info.h): lines of a name, a tab and a value.");
  m.def("compile_kernels", &compile_kernels, py::arg("architecture"), py::arg("progress"),
        "Compiles common CUDA kernels for an architecture and keeps them. Raises RuntimeError with the reason.");
  m.def("set_log", &set_log, py::arg("log"), "Has `log` called with a line when a first CUDA kernel was compiled.");
  m.def("cpu_isa", &schedulefree_cpp_cpu_isa, "Instruction set of the CPU kernels in use.");
}
