// The module `_C`: schedule.h and build information for Python. No arithmetic of its own.
#include <pybind11/pybind11.h>

#include "build_info.h"
#include "schedule.h"

namespace py = pybind11;
using schedulefree::AdamDenominator;
using schedulefree::ScheduleOptions;
using schedulefree::ScheduleState;
using schedulefree::ScheduleStep;

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
      [](std::int64_t k, double weight_sum, double lr_max, double lr, std::int64_t warmup_steps, double r,
         double weight_lr_power, double beta, double beta_next) {
        return schedulefree::advance(ScheduleState{k, weight_sum, lr_max},
                                     ScheduleOptions{lr, warmup_steps, r, weight_lr_power, beta, beta_next});
      },
      py::kw_only(), py::arg("k"), py::arg("weight_sum"), py::arg("lr_max"), py::arg("lr"),
      py::arg("warmup_steps"), py::arg("r"), py::arg("weight_lr_power"), py::arg("beta"),
      py::arg("beta_next"),
      "Scalars of the step after the given state (schedule.h). Raises ValueError outside the domain.");

  m.def(
      "adam_denominator",
      [](std::int64_t k, double beta2, double inner_momentum, double eps) {
        const AdamDenominator d = schedulefree::adam_denominator(k, beta2, inner_momentum, eps);
        return py::make_tuple(d.scale, d.eps);
      },
      py::kw_only(), py::arg("k"), py::arg("beta2"), py::arg("inner_momentum"), py::arg("eps"),
      "(scale, eps) of Adam's denominator scale * sqrt(v) + eps, bias corrections included.");

  m.def("version", &schedulefree_cpp_version, "Version of the operator library.");
  m.def("compiler", &schedulefree_cpp_compiler, "Compiler that built the operator library.");
  m.def("min_torch", &schedulefree_cpp_min_torch, "Oldest torch the operator library runs with.");
  m.def("cpu_isa", &schedulefree_cpp_cpu_isa, "Instruction set of the CPU kernels in use.");
}
