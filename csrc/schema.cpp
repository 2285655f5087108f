// Every operator of the library on one screen, and the kernels that need no device.
#include <torch/csrc/stable/library.h>

#include "checks.h"
#include "stable_compat.h"

// `y` is the parameter in train mode, x in eval mode. Empty lists stand for absent streams: `y_lo` (low
// halves of 16-bit parameters), `z_lo` (those of z, where y has 24 bits), `exp_avg_sq_scale` (scales of a
// second moment of 8 bits) and `exp_avg` (inner momentum). No list that is written is keyword-only: readers
// of schemas take such arguments for `out=`. Formats are in storage.h; `coefs` holds a step's scalars
// (schedule.h).
STABLE_TORCH_LIBRARY(schedulefree_cpp, m) {
  m.def(
      "sgd_step_(Tensor(a!)[] y, Tensor(b!)[] y_lo, Tensor[] grad, Tensor(c!)[] z, Tensor coefs, "
      "Tensor(d!)[] z_lo, *, int decay_at=0) -> ()");
  m.def(
      "adamw_step_(Tensor(a!)[] y, Tensor(b!)[] y_lo, Tensor[] grad, Tensor(c!)[] z, "
      "Tensor(d!)[] exp_avg_sq, Tensor(e!)[] exp_avg, Tensor coefs, "
      "Tensor(f!)[] z_lo, Tensor(g!)[] exp_avg_sq_scale, *, int decay_at=0) -> ()");
  m.def(
      "schedule_step_(Tensor(a!) coefs, Tensor(b!) k, Tensor(c!) weight_sum, Tensor(d!) lr_max, "
      "Tensor(e!) scheduled_lr, Tensor lr, Tensor weight_decay, *, "
      "Tensor? grad_norm=None, Tensor? grad_scale=None, Tensor? found_inf=None, "
      "int kind, float beta, float warmup_steps, float r, float weight_lr_power, "
      "float beta2=0., float eps=0., float inner_momentum=0., bool silent_sgd_phase=True, "
      "bool maximize=False, float? max_grad_norm=None, float decoupling_c=0., "
      "float averaging_weight=0., bool stochastic=False) -> ()");
  m.def("y_to_x_(Tensor(a!)[] y, Tensor(b!)[] y_lo, Tensor[] z, *, Tensor[] z_lo, float beta) -> ()");
  m.def("x_to_y_(Tensor(a!)[] y, Tensor(b!)[] y_lo, Tensor[] z, *, Tensor[] z_lo, float beta) -> ()");
  m.def(
      "before_base_step_(Tensor(a!)[] y, Tensor(b!)[] y_lo, Tensor(c!)[] z, Tensor coefs, *, "
      "float beta, bool exchange=True) -> ()");
  m.def(
      "after_base_step_(Tensor(a!)[] y, Tensor(b!)[] y_lo, Tensor(c!)[] z, Tensor coefs, *, "
      "bool exchange=True) -> ()");
  m.def("polyak_sums(Tensor[] y, Tensor[] y_lo, Tensor[] grad, Tensor[] z, *, Tensor[] z_lo) -> Tensor");
  m.def("grad_norm(Tensor[] grad) -> Tensor");
}

namespace schedulefree {
namespace {

// Shapes cannot depend on the data and nothing is returned, so checking is all there is to do.
template <auto check>
void meta(StableIValue* stack, uint64_t, uint64_t) {
  check(stack, Backend::kMeta);
}

// Reached with empty lists, which belong to no device, and on devices without a kernel.
template <auto check>
void no_device(StableIValue* stack, uint64_t, uint64_t) {
  check(stack, Backend::kNone);
}

void polyak_sums_meta(StableIValue* stack, uint64_t, uint64_t) {
  check_polyak_sums(stack, Backend::kMeta);
  stack[0] = torch::stable::detail::from(new_vector(2, ScalarType::Double, DeviceType::Meta));
}

void polyak_sums_no_device(StableIValue* stack, uint64_t, uint64_t) {
  check_polyak_sums(stack, Backend::kNone);
  torch::stable::Tensor sums = new_vector(2, ScalarType::Double);
  stack[0] = torch::stable::detail::from(torch::stable::zero_(sums));
}

void grad_norm_meta(StableIValue* stack, uint64_t, uint64_t) {
  check_grad_norm(stack, Backend::kMeta);
  stack[0] = torch::stable::detail::from(new_scalar(ScalarType::Double, DeviceType::Meta));
}

void grad_norm_no_device(StableIValue* stack, uint64_t, uint64_t) {
  check_grad_norm(stack, Backend::kNone);
  torch::stable::Tensor norm = new_scalar(ScalarType::Double);
  stack[0] = torch::stable::detail::from(torch::stable::zero_(norm));
}

}  // namespace
}  // namespace schedulefree

STABLE_TORCH_LIBRARY_IMPL(schedulefree_cpp, Meta, m) {
  m.impl("sgd_step_", &schedulefree::meta<schedulefree::check_sgd_step>);
  m.impl("adamw_step_", &schedulefree::meta<schedulefree::check_adamw_step>);
  m.impl("schedule_step_", &schedulefree::meta<schedulefree::check_schedule_step>);
  m.impl("y_to_x_", &schedulefree::meta<schedulefree::check_y_to_x>);
  m.impl("x_to_y_", &schedulefree::meta<schedulefree::check_x_to_y>);
  m.impl("before_base_step_", &schedulefree::meta<schedulefree::check_before_base_step>);
  m.impl("after_base_step_", &schedulefree::meta<schedulefree::check_after_base_step>);
  m.impl("polyak_sums", &schedulefree::polyak_sums_meta);
  m.impl("grad_norm", &schedulefree::grad_norm_meta);
}

STABLE_TORCH_LIBRARY_IMPL(schedulefree_cpp, CompositeExplicitAutograd, m) {
  m.impl("sgd_step_", &schedulefree::no_device<schedulefree::check_sgd_step>);
  m.impl("adamw_step_", &schedulefree::no_device<schedulefree::check_adamw_step>);
  m.impl("schedule_step_", &schedulefree::no_device<schedulefree::check_schedule_step>);
  m.impl("y_to_x_", &schedulefree::no_device<schedulefree::check_y_to_x>);
  m.impl("x_to_y_", &schedulefree::no_device<schedulefree::check_x_to_y>);
  m.impl("before_base_step_", &schedulefree::no_device<schedulefree::check_before_base_step>);
  m.impl("after_base_step_", &schedulefree::no_device<schedulefree::check_after_base_step>);
  m.impl("polyak_sums", &schedulefree::polyak_sums_no_device);
  m.impl("grad_norm", &schedulefree::grad_norm_no_device);
}
