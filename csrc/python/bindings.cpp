// The module `_C`: schedule.h, build information and the gathering of parameters for Python. No arithmetic
// of its own, and nothing of torch's C++ interface: a tensor is a Python object with an attribute `grad`.
#include <pybind11/pybind11.h>

#include "build_info.h"
#include "schedule.h"

namespace py = pybind11;
using schedulefree::AdamDenominator;
using schedulefree::RadamStep;
using schedulefree::ScheduleOptions;
using schedulefree::ScheduleState;
using schedulefree::ScheduleStep;

namespace {

// Parameters whose y has no low half, or those whose y has one: what one operator call updates.
struct Batch {
  py::list y, grad, state;
};

// Sorts the parameters of a group into batches, and returns the positions of those that need attention.
//
// With `grads`, parameters without a gradient are left out, and those without a `z` in their state need
// attention, as do, unless `layout` is None, those whose gradient has another layout than that. Without,
// parameters without a `z` are left out.
//
// In C++ since in Python it would take a quarter of a step over many small parameters.
py::tuple gather(const py::list& params, const py::dict& states, bool grads, const py::object& layout) {
  const py::str grad_name("grad"), layout_name("layout"), z_name("z"), lo_name("y_lo");
  const auto get = [](py::handle object, const py::str& name) {
    PyObject* const value = PyObject_GetAttr(object.ptr(), name.ptr());
    if (!value) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(value);
  };
  const auto holds = [](PyObject* state, const py::str& name) {
    const int found = PyDict_Contains(state, name.ptr());
    if (found < 0) throw py::error_already_set();
    return found != 0;
  };
  Batch plain, split;
  py::list attention;
  for (std::size_t i = 0; i < params.size(); ++i) {
    const py::handle p = PyList_GET_ITEM(params.ptr(), static_cast<Py_ssize_t>(i));
    py::object grad;
    if (grads) {
      grad = get(p, grad_name);
      if (grad.is_none()) continue;
      if (!layout.is_none() && !get(grad, layout_name).is(layout)) {
        attention.append(i);
        continue;
      }
    }
    PyObject* const state = PyDict_GetItemWithError(states.ptr(), p.ptr());
    if (!state && PyErr_Occurred()) throw py::error_already_set();
    if (!state || !PyDict_Check(state) || !holds(state, z_name)) {
      if (grads) attention.append(i);
      continue;
    }
    Batch& batch = holds(state, lo_name) ? split : plain;
    batch.y.append(p);
    if (grads) batch.grad.append(grad);
    batch.state.append(py::handle(state));
  }
  return py::make_tuple(py::make_tuple(plain.y, plain.grad, plain.state),
                        py::make_tuple(split.y, split.grad, split.state), attention);
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
         std::int64_t warmup_steps, double r, double weight_lr_power, double beta, double beta_next) {
        return schedulefree::advance(
            ScheduleState{k, weight_sum, lr_max},
            ScheduleOptions{lr, lr_factor, warmup_steps, r, weight_lr_power, beta, beta_next});
      },
      py::kw_only(), py::arg("k"), py::arg("weight_sum"), py::arg("lr_max"), py::arg("lr"),
      py::arg("lr_factor"), py::arg("warmup_steps"), py::arg("r"), py::arg("weight_lr_power"),
      py::arg("beta"), py::arg("beta_next"),
      "Scalars of the step after the given state (schedule.h). Raises ValueError outside the domain.");

  m.def(
      "adam_denominator",
      [](std::int64_t k, double beta2, double inner_momentum, double eps) {
        const AdamDenominator d = schedulefree::adam_denominator(k, beta2, inner_momentum, eps);
        return py::make_tuple(d.scale, d.eps);
      },
      py::kw_only(), py::arg("k"), py::arg("beta2"), py::arg("inner_momentum"), py::arg("eps"),
      "(scale, eps) of Adam's denominator scale * sqrt(v) + eps, bias corrections included.");

  m.def(
      "radam_step",
      [](std::int64_t k, double beta2, bool silent_sgd_phase) {
        const RadamStep step = schedulefree::radam_step(k, beta2, silent_sgd_phase);
        return py::make_tuple(step.lr_factor, step.adaptive);
      },
      py::kw_only(), py::arg("k"), py::arg("beta2"), py::arg("silent_sgd_phase"),
      "(lr_factor, adaptive) of a RAdam step.");

  m.def("paper_lr_factor", &schedulefree::paper_lr_factor, py::kw_only(), py::arg("k"), py::arg("beta2"),
        "Factor on the learning rate of the paper's AdamW.");

  m.def("gather", &gather, py::arg("params"), py::arg("states"), py::arg("grads"), py::arg("layout"),
        "((y, grad, state), (y, grad, state), attention): the parameters of a group without and with a low "
        "half.");

  m.def("version", &schedulefree_cpp_version, "Version of the operator library.");
  m.def("compiler", &schedulefree_cpp_compiler, "Compiler that built the operator library.");
  m.def("min_torch", &schedulefree_cpp_min_torch, "Oldest torch the operator library runs with.");
  m.def("cpu_isa", &schedulefree_cpp_cpu_isa, "Instruction set of the CPU kernels in use.");
}
