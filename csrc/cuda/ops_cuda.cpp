// Which CUDA function each operator has.
#include "cuda/ops_cuda.h"

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_IMPL(schedulefree_cpp, CUDA, m) {
  m.impl("sgd_step_", &schedulefree::sgd_step_cuda);
  m.impl("adamw_step_", &schedulefree::adamw_step_cuda);
  m.impl("schedule_step_", &schedulefree::schedule_step_cuda);
  m.impl("y_to_x_", &schedulefree::y_to_x_cuda);
  m.impl("x_to_y_", &schedulefree::x_to_y_cuda);
  m.impl("polyak_sums", &schedulefree::polyak_sums_cuda);
  m.impl("grad_norm", &schedulefree::grad_norm_cuda);
}
