#include "schedulefree_cpp/wrapper.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

namespace schedulefree {
namespace {

TEST(Wrapper, Compiles) {
  const torch::Tensor p = torch::randn(3).set_requires_grad(true);
  torch::optim::RMSprop base({p});
  Wrapper wrapper(base);
  const Averaged averaged(wrapper);
  std::stringstream s;
  torch::save(wrapper, s);
  torch::load(wrapper, s);
}

}  // namespace
}  // namespace schedulefree
