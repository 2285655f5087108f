// The module `_C`: schedule.h, hyperparameters.h and build information for Python. No arithmetic of its own,
// and nothing of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <iterator>
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
#define SCHEDULEFREE_NUMBER(name, key, member, value, domain) SCHEDULEFREE_VALUE(name, value)
  SCHEDULEFREE_OTHER_DEFAULTS(SCHEDULEFREE_VALUE)
  SCHEDULEFREE_NUMBERS(SCHEDULEFREE_NUMBER)
#undef SCHEDULEFREE_NUMBER
#undef SCHEDULEFREE_VALUE
  return values;
}

py::set domains() {
  py::set names;
  for (const schedulefree::NamedDomain& known : schedulefree::kDomains) names.add(py::str(known.name));
  return names;
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

// ---- what a schedule reads of Python dicts -------------------------------------------------------------

double number(PyObject* value) {
  const double result = PyFloat_AsDouble(value);
  if (result == -1 && PyErr_Occurred()) throw py::error_already_set();
  return result;
}

double number_at(PyObject* sequence, Py_ssize_t i) {
  const py::object item = py::reinterpret_steal<py::object>(PySequence_GetItem(sequence, i));
  if (!item) throw py::error_already_set();
  return number(item.ptr());
}

void convert(PyObject* value, py::object& out) { out = py::reinterpret_borrow<py::object>(value); }

void convert(PyObject* value, double& out) { out = number(value); }

void convert(PyObject* value, std::int64_t& out) {
  out = PyLong_AsLongLong(value);
  if (out == -1 && PyErr_Occurred()) throw py::error_already_set();
}

void convert(PyObject* value, bool& out) {
  const int truth = PyObject_IsTrue(value);
  if (truth < 0) throw py::error_already_set();
  out = truth != 0;
}

// The arguments of a step: those that are given by name, and then a parameter group's entries.
class Arguments {
 public:
  Arguments(const py::dict& group, const py::kwargs& given) : group_(group), given_(given) {}

  // Borrowed; null for a name that neither has.
  PyObject* find(PyObject* name) {
    PyObject* value = PyDict_GetItemWithError(given_.ptr(), name);
    if (value) ++used_;
    if (!value && !PyErr_Occurred()) value = PyDict_GetItemWithError(group_.ptr(), name);
    if (!value && PyErr_Occurred()) throw py::error_already_set();
    return value;
  }

  template <class T>
  void read(PyObject* name, T& out) {
    if (PyObject* value = find(name)) convert(value, out);
  }

  template <class T>
  void require(PyObject* name, T& out) {
    PyObject* value = find(name);
    if (!value) throw py::key_error(py::str(name).cast<std::string>());
    convert(value, out);
  }

  void require_all_used() const {
    if (used_ != given_.size())
      throw py::type_error("schedule_step(): got an argument that it does not have, of " +
                           py::repr(given_).cast<std::string>());
  }

 private:
  const py::dict& group_;
  const py::kwargs& given_;
  std::size_t used_ = 0;
};

// An interned text, made once.
#define SCHEDULEFREE_TEXT(text)                                     \
  ([] {                                                             \
    static PyObject* const name = PyUnicode_InternFromString(text); \
    return name;                                                    \
  }())

void read_adam(Arguments& arguments, schedulefree::StepRule& rule) {
  if (PyObject* betas = arguments.find(SCHEDULEFREE_TEXT("betas"))) {
    rule.adam.beta2 = number_at(betas, 1);
  }
  // By their own names; beta2 is one only where it is given beside a group.
#define SCHEDULEFREE_READ(name, key, member, value, domain) \
  arguments.read(SCHEDULEFREE_TEXT(#name), rule.member);
  SCHEDULEFREE_ADAM_NUMBERS(SCHEDULEFREE_READ)
  arguments.read(SCHEDULEFREE_TEXT("silent_sgd_phase"), rule.adam.silent_sgd_phase);
}

// The weight of the next y: given, SGD's momentum, or the first of Adam's betas.
double read_beta(Arguments& arguments, schedulefree::StepKind kind) {
  if (PyObject* given = arguments.find(SCHEDULEFREE_TEXT("beta_next"))) return number(given);
  double beta = 0;
  if (kind == schedulefree::StepKind::kSgd) {
    arguments.require(SCHEDULEFREE_TEXT("momentum"), beta);
  } else {
    py::object betas;
    arguments.require(SCHEDULEFREE_TEXT("betas"), betas);
    beta = number_at(betas.ptr(), 0);
  }
  return beta;
}

ScheduleStep schedule_step(const py::dict& group, const py::kwargs& given) {
  Arguments arguments(group, given);
  schedulefree::StepRule rule;
  std::int64_t kind = 0;
  arguments.require(SCHEDULEFREE_TEXT("kind"), kind);
  if (kind < 0 || kind >= static_cast<std::int64_t>(std::size(schedulefree::kStepKindNames)))
    throw py::value_error("Invalid kind: " + std::to_string(kind) + ", expected a value of STEP_KINDS");
  rule.kind = static_cast<schedulefree::StepKind>(kind);
  if (rule.kind != schedulefree::StepKind::kSgd || group.empty()) read_adam(arguments, rule);
  arguments.require(SCHEDULEFREE_TEXT("beta"), rule.beta);
  rule.beta_next = read_beta(arguments, rule.kind);
  SCHEDULEFREE_COMMON_NUMBERS(SCHEDULEFREE_READ)
#undef SCHEDULEFREE_READ
  if (rule.kind == schedulefree::StepKind::kPlus)
    arguments.read(SCHEDULEFREE_TEXT("c_warmup"), rule.c_warmup);
  arguments.read(SCHEDULEFREE_TEXT("lr_factor"), rule.lr_factor);
  arguments.read(SCHEDULEFREE_TEXT("maximize"), rule.maximize);
  arguments.read(SCHEDULEFREE_TEXT("stochastic"), rule.stochastic);
  if (PyObject* rounding = arguments.find(SCHEDULEFREE_TEXT("rounding")))
    rule.stochastic =
        PyUnicode_Check(rounding) && PyUnicode_CompareWithASCIIString(rounding, "stochastic") == 0;
  PyObject* max_grad_norm = arguments.find(SCHEDULEFREE_TEXT("max_grad_norm"));
  rule.clips = max_grad_norm && max_grad_norm != Py_None;
  if (rule.clips) rule.max_grad_norm = number(max_grad_norm);

  schedulefree::StepInputs inputs;
  arguments.require(SCHEDULEFREE_TEXT("lr"), inputs.lr);
  arguments.read(SCHEDULEFREE_TEXT("weight_decay"), inputs.weight_decay);
  arguments.read(SCHEDULEFREE_TEXT("grad_norm"), inputs.grad_norm);
  schedulefree::ScheduleState state;
  double scheduled_lr = 0;
  arguments.require(SCHEDULEFREE_TEXT("k"), state.k);
  arguments.require(SCHEDULEFREE_TEXT("weight_sum"), state.weight_sum);
  arguments.require(SCHEDULEFREE_TEXT("lr_max"), state.lr_max);
  arguments.read(SCHEDULEFREE_TEXT("scheduled_lr"), scheduled_lr);
  arguments.require_all_used();
  // What an operator would refuse of `coefs`, when other groups have stepped.
  const auto finite = [](const char* name, double value) {
    schedulefree::detail::require(std::isfinite(value), name, value, "a finite number");
  };
  finite("weight_sum", state.weight_sum);
  finite("lr_max", state.lr_max);
  finite("scheduled_lr", scheduled_lr);
  const ScheduleStep step = schedulefree::schedule_step(state, scheduled_lr, rule, inputs);
  schedulefree::detail::require(std::isfinite(step.coefs.w) && std::isfinite(step.coefs.a), "beta",
                                rule.beta_next,
                                "one that is not so far from the one before that y overflows");
  return step;
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
  const char* const reason =
      schedulefree_cpp_compile_kernels(architecture, [](const char* line) { progress_function()(line); });
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
  m.attr("DOMAINS") = domains();

  m.def("check_hyperparameter", &schedulefree::check_hyperparameter, py::arg("name"), py::arg("value"),
        py::arg("where") = "", "Raises ValueError for a value outside its domain (hyperparameters.h).");

  m.def("in_domain", &schedulefree::in_domain, py::arg("name"), py::arg("value"),
        "False for a value outside its domain.");

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

  m.def("schedule_step", &schedule_step, py::arg("group") = py::dict(), py::pos_only(),
        "The step after the given state (schedule.h): of arguments by name, and for what they lack of a "
        "parameter group's entries. Raises ValueError outside the domain.");

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
        "Compiles common CUDA kernels for an architecture and keeps them. Raises RuntimeError with the "
        "reason.");
  m.def("set_log", &set_log, py::arg("log"),
        "Has `log` called with a line when a first CUDA kernel was compiled.");
  m.def("cpu_isa", &schedulefree_cpp_cpu_isa, "Instruction set of the CPU kernels in use.");
}
