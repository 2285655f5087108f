// The module `_C`: schedule.h, build information and the gathering of parameters for Python. No arithmetic
// of its own, and nothing of torch's C++ interface: a tensor is a Python object with an attribute `grad`.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <stdexcept>
#include <utility>
#include <vector>

#include "build_info.h"
#include "schedule.h"

namespace py = pybind11;
using schedulefree::PolyakStep;
using schedulefree::ScheduleOptions;
using schedulefree::ScheduleState;
using schedulefree::ScheduleStep;
using schedulefree::StepFactors;
using schedulefree::StepKind;

namespace {

// What one operator call updates: parameters, their gradients and their state, position by position.
struct Batch {
  py::list y, grad, state;
  PyObject* has_low;           // Py_True or Py_False: whether y has a low half
  std::vector<PyObject*> own;  // the values of `keys`, borrowed; null where the state has none
  bool plain = true;           // whether no parameter is of a type of its own, as DTensor is

  Batch(PyObject* has_low, std::vector<PyObject*> own) : has_low(has_low), own(std::move(own)) {}
};

// Names and values of torch that gathering looks at for every parameter.
struct Names {
  py::str grad{"grad"}, layout{"layout"}, dtype{"dtype"}, z{"z"}, y_lo{"y_lo"};
  py::object bfloat16 = py::module_::import("torch").attr("bfloat16");
  py::object tensor = py::module_::import("torch").attr("Tensor");
  py::object parameter = py::module_::import("torch").attr("nn").attr("Parameter");
};

py::object get(py::handle object, const py::str& name) {
  PyObject* const value = PyObject_GetAttr(object.ptr(), name.ptr());
  if (!value) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

// Borrowed; null where the dict has no such key.
PyObject* find(PyObject* dict, py::handle key) {
  PyObject* const value = PyDict_GetItemWithError(dict, key.ptr());
  if (!value && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

bool equal(PyObject* l, PyObject* r) {
  if (l == r) return true;
  if (!l || !r) return false;
  const int result = PyObject_RichCompareBool(l, r, Py_EQ);
  if (result < 0) throw py::error_already_set();
  return result != 0;
}

// Sorts parameters into batches, and returns the positions of those that need attention. The states of a
// batch agree in having a `y_lo` and in their values for `keys`.
//
// With `grads`, parameters without a gradient are left out, and attention goes to those without a `z` in
// their state, with `check_low` to bfloat16 ones that lack a `y_lo` and others that have one, and, unless
// `layout` is None, to those whose gradient has another layout. Without `grads`, parameters without a `z`
// are left out.
//
// In C++ since in Python it would take a quarter of a step over many small parameters.
py::tuple gather(const Names& names, const py::list& params, const py::dict& states, bool grads,
                 bool check_low, const py::object& layout, const py::tuple& keys) {
  std::vector<Batch> batches;
  py::list attention;
  std::vector<PyObject*> own(keys.size());
  for (std::size_t i = 0; i < params.size(); ++i) {
    const py::handle p = PyList_GET_ITEM(params.ptr(), static_cast<Py_ssize_t>(i));
    py::object grad;
    if (grads) {
      grad = get(p, names.grad);
      if (grad.is_none()) continue;
      if (!layout.is_none() && !get(grad, names.layout).is(layout)) {
        attention.append(i);
        continue;
      }
    }
    PyObject* const state = find(states.ptr(), p);
    if (!state || !PyDict_Check(state) || !find(state, names.z)) {
      if (grads) attention.append(i);
      continue;
    }
    PyObject* const has_low = find(state, names.y_lo) ? Py_True : Py_False;
    if (check_low && (has_low == Py_True) != get(p, names.dtype).is(names.bfloat16)) {
      attention.append(i);
      continue;
    }
    for (std::size_t key = 0; key < own.size(); ++key)
      own[key] = find(state, PyTuple_GET_ITEM(keys.ptr(), static_cast<Py_ssize_t>(key)));
    auto batch = batches.begin();
    while (batch != batches.end() &&
           !(batch->has_low == has_low && std::equal(own.begin(), own.end(), batch->own.begin(), equal)))
      ++batch;
    if (batch == batches.end()) batch = batches.emplace(batch, has_low, own);
    batch->y.append(p);
    const PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(p.ptr()));
    batch->plain = batch->plain && (type == names.parameter.ptr() || type == names.tensor.ptr());
    if (grads) batch->grad.append(grad);
    batch->state.append(py::handle(state));
  }
  py::list result;
  for (const Batch& batch : batches)
    result.append(py::make_tuple(batch.y, batch.grad, batch.state, py::handle(batch.has_low), batch.plain));
  return py::make_tuple(result, attention);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Host schedule and build information of schedulefree_cpp.";

  py::class_<ScheduleStep>(m, "ScheduleStep",
                           "Scalars of one optimizer step and the schedule's state after it.")
      .def_readonly("lr", &ScheduleStep::lr)
      .def_readonly("c", &ScheduleStep::c)
      .def_readonly("w", &ScheduleStep::w)
      .def_readonly("a", &ScheduleStep::a)
      .def_property_readonly("k", [](const ScheduleStep& s) { return s.next.k; })
      .def_property_readonly("weight_sum", [](const ScheduleStep& s) { return s.next.weight_sum; })
      .def_property_readonly("lr_max", [](const ScheduleStep& s) { return s.next.lr_max; });

  m.def(
      "advance",
      [](std::int64_t k, double weight_sum, double lr_max, double lr, double lr_factor,
         std::int64_t warmup_steps, std::int64_t c_warmup, double r, double weight_lr_power, double beta,
         double beta_next) {
        return schedulefree::advance(
            ScheduleState{k, weight_sum, lr_max},
            ScheduleOptions{lr, lr_factor, warmup_steps, c_warmup, r, weight_lr_power, beta, beta_next});
      },
      py::kw_only(), py::arg("k"), py::arg("weight_sum"), py::arg("lr_max"), py::arg("lr"),
      py::arg("lr_factor"), py::arg("warmup_steps"), py::arg("c_warmup") = 0, py::arg("r"),
      py::arg("weight_lr_power"), py::arg("beta"), py::arg("beta_next"),
      "Scalars of the step after the given state (schedule.h). Raises ValueError outside the domain.");

  m.def(
      "step_factors",
      [](int kind, std::int64_t k, double beta2, double eps, double inner_momentum, bool silent_sgd_phase) {
        const StepFactors f = schedulefree::step_factors(static_cast<StepKind>(kind), k,
                                                         {beta2, eps, inner_momentum, silent_sgd_phase});
        return py::make_tuple(f.lr_factor, f.denom_scale, f.denom_eps);
      },
      py::kw_only(), py::arg("kind"), py::arg("k"), py::arg("beta2") = 0.0, py::arg("eps") = 0.0,
      py::arg("inner_momentum") = 0.0, py::arg("silent_sgd_phase") = true,
      "(lr_factor, denom_scale, denom_eps): how a kind of STEP_KINDS scales step k.");

  const auto value_of = [](StepKind kind) { return static_cast<int>(kind); };
  m.attr("STEP_KINDS") =
      py::dict(py::arg("sgd") = value_of(StepKind::kSgd), py::arg("adamw") = value_of(StepKind::kAdamW),
               py::arg("adamw_paper") = value_of(StepKind::kAdamWPaper),
               py::arg("radam") = value_of(StepKind::kRAdam));

  const auto coefficients =
      py::make_tuple("take", "lr", "w", "a", "weight_decay", "grad_mul", "beta2", "denom_scale", "denom_eps",
                     "inner_momentum", "k", "weight_sum", "lr_max", "scheduled_lr", "beta");
  if (coefficients.size() != schedulefree::kStepCoefficients) throw std::logic_error("StepCoefficients");
  m.attr("COEFFICIENTS") = coefficients;

  m.def("clip_factor", &schedulefree::clip_factor, py::arg("norm"), py::arg("max_norm"),
        "Factor on gradients of this norm, as torch.nn.utils.clip_grad_norm_ has it.");

  m.def("annealed_beta", &schedulefree::annealed_beta, py::kw_only(), py::arg("k"), py::arg("beta"),
        py::arg("beta_max"), py::arg("anneal_steps"), "ScheduleFree+'s beta at step k.");

  py::class_<PolyakStep>(m, "PolyakStep", "ScheduleFree+'s step size and the sums it comes from.")
      .def_readonly("lr_factor", &PolyakStep::lr_factor)
      .def_readonly("grad_l1_ema", &PolyakStep::grad_l1_ema)
      .def_readonly("grad_l1_ema_corr", &PolyakStep::grad_l1_ema_corr);

  m.def("polyak_step", &schedulefree::polyak_step, py::kw_only(), py::arg("k"), py::arg("function_value"),
        py::arg("grad_l1"), py::arg("ip_term"), py::arg("polyak_beta"), py::arg("grad_l1_ema"),
        "The Polyak step size (schedule.h). Raises ValueError for what is not finite.");

  m.def("y_to_x_weight", &schedulefree::y_to_x_weight, py::arg("beta"), "Weight of z that turns y into x.");
  m.def("x_to_y_weight", &schedulefree::x_to_y_weight, py::arg("beta"), "Weight of z that turns x into y.");

  m.def(
      "gather",
      [names = Names()](const py::list& params, const py::dict& states, bool grads, bool check_low,
                        const py::object& layout, const py::tuple& keys) {
        return gather(names, params, states, grads, check_low, layout, keys);
      },
      py::arg("params"), py::arg("states"), py::arg("grads"), py::arg("check_low"), py::arg("layout"),
      py::arg("keys"),
      "([(y, grad, state, has_low, plain), ...], attention): parameters in batches that agree in `keys`.");

  m.def("version", &schedulefree_cpp_version, "Version of the operator library.");
  m.def("compiler", &schedulefree_cpp_compiler, "Compiler that built the operator library.");
  m.def("min_torch", &schedulefree_cpp_min_torch, "Oldest torch the operator library runs with.");
  m.def("cuda_build", &schedulefree_cpp_cuda_build, "What was built for CUDA, or why nothing was.");
  m.def(
      "load_cuda", &schedulefree_cpp_load_cuda,
      "Loads the CUDA kernels into a process with a CUDA torch. Returns None, or why they cannot be loaded.");
  m.def("cpu_isa", &schedulefree_cpp_cpu_isa, "Instruction set of the CPU kernels in use.");
}
