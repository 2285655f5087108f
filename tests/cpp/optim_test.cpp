#include "schedulefree_cpp/optim.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

TEST(Smoke, Steps) {
  torch::nn::Linear model(3, 2);
  schedulefree::AdamW optimizer(model->parameters(), schedulefree::AdamWOptions(0.1).warmup_steps(2));
  optimizer.train();
  for (int i = 0; i < 5; ++i) {
    optimizer.zero_grad();
    model->forward(torch::ones({4, 3})).square().mean().backward();
    optimizer.step();
  }
  optimizer.eval();
  schedulefree::save_state_dict(optimizer, *model, "/tmp/x.pt");
  schedulefree::save_state_dict(optimizer, model, "/tmp/x.pt");
  schedulefree::load_state_dict(optimizer, model, "/tmp/x.pt");
  torch::save(optimizer, "/tmp/y.pt");
  torch::load(optimizer, "/tmp/y.pt");
  optimizer.train();
}
