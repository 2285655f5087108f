#include "schedulefree_cpp/wrapper.h"

#include <gtest/gtest.h>
#include <torch/torch.h>
#include <unistd.h>

#include <cstdio>
#include <functional>
#include <limits>
#include <sstream>

#include "throws.h"

namespace schedulefree {
namespace {

using torch::Tensor;
using torch::optim::OptimizerParamGroup;
using Base = std::unique_ptr<torch::optim::Optimizer>;

Tensor copy(const Tensor& t) { return t.detach().clone(); }

std::vector<Tensor> parameters(torch::Dtype dtype = torch::kFloat, uint64_t seed = 0) {
  torch::Generator generator = at::detail::createCPUGenerator(seed);
  std::vector<Tensor> params;
  for (const auto& sizes : std::vector<std::vector<int64_t>>{{33}, {4, 5}, {}})
    params.push_back(torch::randn(sizes, generator).to(dtype).set_requires_grad(true));
  return params;
}

std::vector<Tensor> copies(const std::vector<Tensor>& params) {
  std::vector<Tensor> all;
  for (const Tensor& p : params) all.push_back(copy(p).set_requires_grad(p.requires_grad()));
  return all;
}

void set_gradients(const std::vector<Tensor>& params, uint64_t seed) {
  torch::Generator generator = at::detail::createCPUGenerator(seed);
  for (const Tensor& p : params) p.mutable_grad() = torch::randn(p.sizes(), generator).to(p.scalar_type());
}

testing::AssertionResult equal(const std::vector<Tensor>& one, const std::vector<Tensor>& other) {
  for (std::size_t i = 0; i < one.size(); ++i)
    if (!torch::equal(one[i], other[i])) return testing::AssertionFailure() << "they differ in number " << i;
  return testing::AssertionSuccess();
}

detail::Dict dict_of(const Wrapper& wrapper) { return wrapper.state_dict(detail::by_number); }

detail::Dict state_of(const Wrapper& wrapper, int64_t number) {
  return dict_of(wrapper).at("state").toGenericDict().at(number).toGenericDict();
}

c10::IValue entry(const Wrapper& wrapper, const std::string& key, std::size_t group = 0) {
  return dict_of(wrapper).at("param_groups").toListRef()[group].toGenericDict().at(key);
}

std::vector<Tensor> zs(const Wrapper& wrapper, std::size_t count) {
  std::vector<Tensor> all;
  for (std::size_t i = 0; i < count; ++i)
    all.push_back(state_of(wrapper, static_cast<int64_t>(i)).at("sf_z").toTensor());
  return all;
}

// The base optimizers that libtorch has, with all that they can keep.
const std::vector<std::pair<const char*, std::function<Base(std::vector<Tensor>)>>> kBases = {
    {"SGD",
     [](auto params) {
       return std::make_unique<torch::optim::SGD>(
           params, torch::optim::SGDOptions(0.01).momentum(0.9).weight_decay(0.1));
     }},
    {"Adam",
     [](auto params) {
       return std::make_unique<torch::optim::Adam>(params, torch::optim::AdamOptions(0.01).amsgrad(true));
     }},
    {"AdamW", [](auto params) { return std::make_unique<torch::optim::AdamW>(params); }},
    {"RMSprop",
     [](auto params) {
       return std::make_unique<torch::optim::RMSprop>(
           params, torch::optim::RMSpropOptions(0.01).momentum(0.5).centered(true));
     }},
    {"Adagrad",
     [](auto params) {
       return std::make_unique<torch::optim::Adagrad>(params, torch::optim::AdagradOptions(0.01));
     }},
    {"LBFGS",
     [](auto params) {
       return std::make_unique<torch::optim::LBFGS>(
           params, torch::optim::LBFGSOptions(0.1).max_iter(3).history_size(4));
     }},
};

// Takes a step whose gradients depend on the numbers of step and call alone, and not on the parameters.
template <class AnyOptimizer>
void take_step(AnyOptimizer& optimizer, const std::vector<Tensor>& params, int step) {
  uint64_t call = static_cast<uint64_t>(step) * 100;
  optimizer.step([&] {
    set_gradients(params, call++);
    return torch::scalar_tensor(1.0 / static_cast<double>(call));
  });
}

TEST(Wrapper, ZIsWhatTheBaseAloneMakes) {
  for (const torch::Dtype dtype : {torch::kFloat, torch::kDouble})
    for (const auto& [name, make] : kBases) {
      const std::vector<Tensor> params = parameters(dtype), alone = copies(params);
      const Base base = make(params), reference = make(alone);
      Wrapper wrapper(*base);
      wrapper.train();
      for (int step = 0; step < 12; ++step) {
        take_step(wrapper, params, step);
        take_step(*reference, alone, step);
        const Averaged averaged(wrapper);
        ASSERT_FALSE(step > 1 && equal(params, alone)) << name;
      }
      EXPECT_TRUE(equal(zs(wrapper, 3), alone)) << name;
    }
}

TEST(Wrapper, TheBaseStepsA16BitParameterInFloat32) {
  for (const torch::Dtype dtype : {torch::kBFloat16, torch::kHalf})
    for (const auto& [name, make] : kBases) {
      const std::vector<Tensor> params = parameters(dtype);
      std::vector<Tensor> wide;
      for (const Tensor& p : params) wide.push_back(copy(p).to(torch::kFloat).set_requires_grad(true));
      const Base base = make(params), reference = make(wide);
      Wrapper wrapper(*base), of_wide(*reference);
      wrapper.train();
      of_wide.train();
      for (int step = 0; step < 12; ++step) {
        uint64_t call = static_cast<uint64_t>(step) * 100;
        take_step(wrapper, params, step);
        of_wide.step([&] {  // gradients with as many bits
          set_gradients(wide, call++);
          for (const Tensor& p : wide) p.mutable_grad() = p.grad().to(dtype).to(torch::kFloat);
          return torch::scalar_tensor(1.0 / static_cast<double>(call));
        });
        for (const Tensor& p : params) {
          ASSERT_EQ(p.scalar_type(), dtype);
          ASSERT_EQ(p.grad().scalar_type(), dtype);
        }
      }
      EXPECT_TRUE(equal(zs(wrapper, 3), zs(of_wide, 3))) << name;
      wrapper.eval();
      of_wide.eval();
      for (std::size_t i = 0; i < params.size(); ++i) {
        EXPECT_TRUE(torch::allclose(params[i].to(torch::kFloat), wide[i], 0.005, 1e-4)) << name;
        EXPECT_EQ(base->param_groups()[0].params()[i].unsafeGetTensorImpl(), params[i].unsafeGetTensorImpl());
      }
    }
}

// Gives every parameter another memory.
struct Replaces : torch::optim::SGD {
  using SGD::SGD;
  Tensor step(LossClosure = nullptr) override {
    const at::NoGradGuard no_grad;
    for (Tensor& p : param_groups()[0].params()) p.set_data(p - 0.5 * p.grad());
    return {};
  }
};

TEST(Wrapper, TheBaseMayGiveParametersAnotherMemory) {
  for (const torch::Dtype dtype : {torch::kFloat, torch::kBFloat16}) {
    const std::vector<Tensor> params = parameters(dtype);
    std::vector<Tensor> alone;
    for (const Tensor& p : params) alone.push_back(copy(p).to(torch::kFloat).set_requires_grad(true));
    Replaces base(params, 0.1), reference(alone, 0.1);
    Wrapper wrapper(base);
    wrapper.train();
    for (uint64_t step = 0; step < 4; ++step) {
      set_gradients(params, step);
      for (std::size_t i = 0; i < params.size(); ++i)
        alone[i].mutable_grad() = params[i].grad().to(torch::kFloat);
      wrapper.step();
      reference.step();
    }
    EXPECT_TRUE(equal(zs(wrapper, 3), alone)) << dtype;
  }
}

TEST(Wrapper, FollowsTheFormula) {
  const double lr = 0.1, beta = 0.8, decay = 0.3;
  const Tensor p = torch::randn({20}, torch::kDouble).set_requires_grad(true);
  torch::optim::SGD base({p}, torch::optim::SGDOptions(lr));
  Wrapper wrapper(base, WrapperOptions().momentum(beta).weight_decay_at_y(decay).r(1).weight_lr_power(1));
  wrapper.train();
  Tensor x = copy(p), z = copy(p), y = copy(p);
  double sum = 0;
  for (int k = 0; k < 20; ++k) {
    p.mutable_grad() = torch::randn({20}, torch::kDouble);
    z = z - lr * decay * y - lr * p.grad();
    wrapper.step();
    sum += (k + 1) * lr;
    const double c = (k + 1) * lr / sum;
    x = (1 - c) * x + c * z;
    y = beta * x + (1 - beta) * z;
    EXPECT_TRUE(torch::allclose(p, y, 1e-12, 1e-12)) << k;
    const Averaged averaged(wrapper);
    EXPECT_TRUE(torch::allclose(p, x, 1e-12, 1e-12)) << k;
  }
}

TEST(Wrapper, EvaluationNeverChangesTraining) {
  for (const torch::Dtype dtype : {torch::kFloat, torch::kDouble, torch::kBFloat16, torch::kHalf}) {
    const std::vector<Tensor> params = parameters(dtype), others = copies(params);
    torch::optim::RMSprop base(params, 0.02), other(others, 0.02);
    Wrapper plain(base, WrapperOptions().weight_decay_at_y(0.1));
    Wrapper evaluated(other, WrapperOptions().weight_decay_at_y(0.1));
    plain.train();
    evaluated.train();
    for (uint64_t step = 0; step < 40; ++step) {
      for (auto& [wrapper, own] : {std::make_pair(&plain, &params), std::make_pair(&evaluated, &others)}) {
        set_gradients(*own, step);
        if (step % 3 == 1) (*own)[1].mutable_grad() = Tensor();
        if (step % 7 == 5) wrapper->options().momentum(step % 2 == 0 ? 0.95 : 0.8);
        wrapper->step();
      }
      const std::vector<Tensor> y = copies(others);
      evaluated.eval();
      EXPECT_NE(step == 0, !equal(others, y));  // the average of one step is z
      evaluated.train();
      ASSERT_TRUE(equal(others, y)) << dtype << " " << step;
    }
    EXPECT_TRUE(equal(params, others)) << dtype;
  }
}

// ---- closures ---------------------------------------------------------------------------------------

// Moves before and between two calls of its closure, and throws then if it is told to.
struct Tries : torch::optim::SGD {
  using SGD::SGD;
  Tensor step(LossClosure closure = nullptr) override {
    const at::NoGradGuard no_grad;
    const Tensor loss = closure ? closure() : Tensor();
    const auto move = [&] {
      for (auto& group : param_groups())
        for (Tensor& p : group.params()) p.add_(1);
    };
    move();
    if (closure) closure();
    move();
    if (raises) throw std::runtime_error("the base failed");
    return loss;
  }
  bool raises = false;
};

TEST(Closures, EveryCallIsAtTheYOfTheZThatIsTried) {
  for (const torch::Dtype dtype : {torch::kFloat, torch::kBFloat16}) {
    const Tensor p = torch::ones({3}, dtype).set_requires_grad(true);
    Tries base({p}, 1.0);
    Wrapper wrapper(base, WrapperOptions().momentum(0.5));
    wrapper.train();
    std::vector<double> seen;
    const auto closure = [&] {
      EXPECT_TRUE(at::GradMode::is_enabled());
      EXPECT_EQ(p.scalar_type(), dtype);
      seen.push_back(p[0].item<double>());
      wrapper.zero_grad();
      const Tensor loss = p.sum() * static_cast<double>(seen.size());
      loss.backward();
      const Averaged averaged(wrapper);  // leaves no trace
      return loss;
    };
    EXPECT_EQ(wrapper.step(closure).item<double>(), 3);
    EXPECT_EQ(seen, (std::vector<double>{1, 1.5}));  // x is 1, z 1 and 2
    EXPECT_EQ(p[0].item<double>(), 3);               // the average of one step is z
    wrapper.step(closure);
    EXPECT_EQ(seen, (std::vector<double>{1, 1.5, 3, 3.5}));
    EXPECT_EQ(p.grad()[0].item<double>(), 4);
    EXPECT_EQ(p[0].item<double>(), 4.5);  // x is 4, z 5
  }
}

TEST(Closures, LBFGSReachesTheMinimum) {
  for (const char* search : {"", "strong_wolfe"}) {
    const Tensor p = torch::full({6}, 3.0).set_requires_grad(true), target = torch::linspace(-1, 1, 6);
    torch::optim::LBFGSOptions options(0.5);
    if (*search) options.line_search_fn(search);
    torch::optim::LBFGS base({p}, options.max_iter(5));
    Wrapper wrapper(base);
    wrapper.train();
    for (int step = 0; step < 100; ++step)
      wrapper.step([&] {
        wrapper.zero_grad();
        const Tensor loss = ((p - target).square() * torch::arange(1, 7)).sum();
        loss.backward();
        return loss;
      });
    wrapper.eval();
    EXPECT_TRUE(torch::allclose(p, target, 0, 0.2)) << p;  // an average, which remembers the start
  }
}

// ---- refused and failed steps -----------------------------------------------------------------------

TEST(Failures, ABaseThatThrowsPutsTheParametersBack) {
  for (const double decay : {0.0, 0.5})
    for (const bool with_closure : {false, true})
      for (const torch::Dtype dtype : {torch::kFloat, torch::kHalf}) {
        const std::vector<Tensor> params = parameters(dtype);
        Tries base(params, 0.1);
        Wrapper wrapper(base, WrapperOptions().weight_decay_at_y(decay));
        wrapper.train();
        const auto closure = [&] {
          set_gradients(params, 1);
          return torch::zeros({});
        };
        for (int i = 0; i < 3; ++i) wrapper.step(closure);
        const std::vector<Tensor> y = copies(params), z = copies(zs(wrapper, 3));
        wrapper.options().momentum(0.7);
        base.raises = true;
        EXPECT_TRUE(throws([&] { wrapper.step(with_closure ? closure : Wrapper::LossClosure()); },
                           "the base failed"));
        EXPECT_EQ(entry(wrapper, "sf_k").toInt(), 3);
        EXPECT_TRUE(wrapper.is_training());
        const double moved = decay == 0 ? 2 : 0;  // without decay z is where the base has come to
        for (std::size_t i = 0; i < params.size(); ++i) {
          EXPECT_TRUE(torch::allclose(zs(wrapper, 3)[i], z[i] + moved, 0, 1e-5));
          const Tensor expected = y[i].to(torch::kDouble) + 0.1 * moved;
          EXPECT_TRUE(torch::allclose(params[i].to(torch::kDouble), expected, 0, moved == 0 ? 1e-6 : 0.01));
        }
        EXPECT_TRUE(decay == 0 || equal(zs(wrapper, 3), z));
        EXPECT_TRUE(decay == 0 || with_closure || equal(params, y)) << dtype;
        base.raises = false;
        wrapper.step();
        EXPECT_EQ(entry(wrapper, "sf_k").toInt(), 4);
      }
}

TEST(Failures, ARefusalOfTheBaseChangesNothing) {
  const std::vector<Tensor> params = parameters();
  torch::optim::LBFGS base(params);
  Wrapper wrapper(base);
  EXPECT_TRUE(throws([&] { wrapper.step(); }, "called in eval mode"));
  wrapper.train();
  take_step(wrapper, params, 0);
  const std::vector<Tensor> y = copies(params), z = copies(zs(wrapper, 3));
  EXPECT_TRUE(throws([&] { wrapper.step(); }, "LBFGS requires a closure"));
  EXPECT_TRUE(equal(params, y));
  EXPECT_TRUE(equal(zs(wrapper, 3), z));
}

TEST(Failures, AClosureThatThrowsLeavesParametersAtY) {
  const std::vector<Tensor> params = parameters(torch::kBFloat16);
  Tries base(params, 0.1);
  Wrapper wrapper(base, WrapperOptions().weight_decay_at_y(0.1));
  wrapper.train();
  take_step(wrapper, params, 0);
  for (const int fails_at : {1, 2}) {
    const std::vector<Tensor> y = copies(params), z = copies(zs(wrapper, 3));
    int calls = 0;
    EXPECT_TRUE(throws(
        [&] {
          wrapper.step([&] {
            if (++calls == fails_at) throw std::runtime_error("no data");
            return torch::zeros({});
          });
        },
        "no data"));
    EXPECT_TRUE(equal(params, y)) << fails_at;
    EXPECT_TRUE(equal(zs(wrapper, 3), z)) << fails_at;
  }
}

TEST(Failures, AnOperatorsRefusalOfALaterGroupUndoesTheEarlier) {
  const Tensor p = torch::randn({5}).set_requires_grad(true), q = torch::randn({5}).set_requires_grad(true);
  torch::optim::SGD base({OptimizerParamGroup({p}), OptimizerParamGroup({q})}, 0.1);
  Wrapper wrapper(base, WrapperOptions().weight_decay_at_y(0.5));
  wrapper.train();
  set_gradients({p, q}, 0);
  wrapper.step();
  const Tensor y = copy(p), z = copy(zs(wrapper, 2)[0]);
  const Tensor own = q.detach();
  q.set_data(torch::zeros({1}).expand({5}));  // elements that share memory
  EXPECT_TRUE(throws([&] { wrapper.step(); }, "before_base_step_"));
  EXPECT_TRUE(torch::equal(p, y));
  q.set_data(own);
  EXPECT_TRUE(torch::equal(zs(wrapper, 2)[0], z));
}

TEST(Failures, WhatCannotBeWrappedIsRefused) {
  const Tensor p = torch::randn({5}).set_requires_grad(true);
  AdamW fused({p});
  EXPECT_TRUE(throws([&] { Wrapper wrapper(fused); }, "Invalid base.*not schedule-free itself"));
  torch::optim::SGD base({p}, 0.1);
  EXPECT_TRUE(throws([&] { Wrapper wrapper(base, WrapperOptions().momentum(0)); },
                     "Invalid momentum in parameter group 0: 0, expected a value in .0, 1.: at 0"));
  EXPECT_TRUE(
      throws([&] { Wrapper wrapper(base, WrapperOptions().weight_decay_at_y(-1)); }, "weight_decay_at_y"));
  torch::optim::SGD complex({torch::ones({2}, at::kComplexFloat).set_requires_grad(true)}, 0.1);
  EXPECT_TRUE(throws([&] { Wrapper wrapper(complex); }, "dtype ComplexFloat, expected Float, Double"));
  base.param_groups()[0].options().set_lr(-1);
  EXPECT_TRUE(throws([&] { Wrapper wrapper(base); }, "Invalid lr in parameter group 0: -1"));
}

// ---- groups -----------------------------------------------------------------------------------------

TEST(WrapperGroups, OneThatRestsTakesNoStepAndFollowsAMovedBeta) {
  const Tensor p = torch::randn({9}, torch::kDouble).set_requires_grad(true);
  const Tensor q = torch::randn({9}, torch::kDouble).set_requires_grad(true);
  torch::optim::SGD base({OptimizerParamGroup({p}), OptimizerParamGroup({q})}, 0.1);
  Wrapper wrapper(base);
  wrapper.options(1).momentum(0.8);
  wrapper.train();
  for (int i = 0; i < 4; ++i) {
    set_gradients({p, q}, i);
    wrapper.step();
  }
  const auto x_of_q = [&] {
    const Averaged averaged(wrapper);
    return copy(q);
  };
  const Tensor x = x_of_q(), y = copy(q), z = copy(zs(wrapper, 2)[1]);
  q.mutable_grad() = Tensor();
  wrapper.step();
  EXPECT_TRUE(torch::equal(q, y));
  wrapper.options(1).momentum(0.6);
  wrapper.step();
  EXPECT_EQ(entry(wrapper, "sf_k", 0).toInt(), 6);
  EXPECT_EQ(entry(wrapper, "sf_k", 1).toInt(), 4);
  EXPECT_TRUE(torch::equal(zs(wrapper, 2)[1], z));
  EXPECT_TRUE(torch::allclose(x_of_q(), x, 1e-14, 1e-14));
  EXPECT_TRUE(torch::allclose(q, 0.6 * x + 0.4 * z, 1e-14, 1e-14));
}

TEST(WrapperGroups, OneThatIsAddedStartsAnAverageOfItsOwn) {
  const Tensor p = torch::randn({9}).set_requires_grad(true), q = torch::randn({9}).set_requires_grad(true);
  torch::optim::RMSprop base({p}, 0.1);
  Wrapper wrapper(base, WrapperOptions().momentum(0.7));
  wrapper.train();
  set_gradients({p}, 0);
  wrapper.step();
  base.add_param_group(OptimizerParamGroup({q}, std::make_unique<torch::optim::RMSpropOptions>(0.5)));
  EXPECT_EQ(wrapper.options(1).momentum(), 0.7);
  const std::vector<Tensor> before = copies({q});
  wrapper.eval();
  EXPECT_TRUE(torch::equal(q, before[0]));
  wrapper.train();
  set_gradients({p, q}, 1);
  wrapper.step();
  EXPECT_EQ(entry(wrapper, "sf_k", 1).toInt(), 1);
  EXPECT_EQ(entry(wrapper, "sf_lr_max", 1).toDouble(), 0.5);
  EXPECT_TRUE(torch::equal(q, zs(wrapper, 2)[1]));  // the average of one step is z
  wrapper.options(1).nonfinite(Nonfinite::kSkip);
  EXPECT_TRUE(
      throws([&] { wrapper.step(); }, "Invalid nonfinite in parameter group 1: skip, expected propag"));
}

TEST(WrapperGroups, SchedulersMoveTheBasesLearningRate) {
  const Tensor p = torch::randn({9}).set_requires_grad(true);
  torch::optim::SGD base({p}, 0.1);
  torch::optim::StepLR scheduler(base, 1, 0.5);
  Wrapper wrapper(base);
  wrapper.train();
  for (int i = 0; i < 3; ++i) {  // of which the first changes nothing
    set_gradients({p}, i);
    wrapper.step();
    scheduler.step();
  }
  EXPECT_EQ(entry(wrapper, "lr").toDouble(), 0.025);
  EXPECT_EQ(entry(wrapper, "sf_scheduled_lr").toDouble(), 0.05);
}

TEST(WrapperGroups, AStepClipsByTheNormOfAllGradients) {
  const std::vector<Tensor> params = parameters(), others = copies(params);
  torch::optim::SGD base(params, 0.1), other(others, 0.1);
  Wrapper clipping(base, WrapperOptions().max_grad_norm(0.5)), plain(other);
  clipping.train();
  plain.train();
  for (uint64_t i = 0; i < 4; ++i) {
    set_gradients(params, i);
    set_gradients(others, i);
    const double norm = torch::nn::utils::clip_grad_norm_(others, 0.5);
    clipping.step();
    plain.step();
    EXPECT_NEAR(clipping.grad_norm().item<double>(), norm, 1e-5);
    for (std::size_t k = 0; k < params.size(); ++k)
      EXPECT_TRUE(torch::allclose(params[k], others[k], 1e-5, 1e-6));
  }
  EXPECT_FALSE(plain.grad_norm().defined());
}

TEST(WrapperGroups, StepsThatAreNotFiniteAreLeftOut) {
  const std::vector<Tensor> params = parameters();
  torch::optim::RMSprop base(params, 0.1);
  Wrapper wrapper(base, WrapperOptions().nonfinite(Nonfinite::kSkip));
  wrapper.train();
  take_step(wrapper, params, 0);
  const std::vector<Tensor> y = copies(params);
  params[1].mutable_grad()[0][1] = std::numeric_limits<double>::infinity();
  wrapper.step();
  EXPECT_TRUE(equal(params, y));
  EXPECT_EQ(entry(wrapper, "sf_k").toInt(), 1);
  EXPECT_EQ(state_of(wrapper, 0).at("step").toTensor().item<double>(), 1);
  wrapper.options().nonfinite(Nonfinite::kRaise);
  EXPECT_TRUE(
      throws([&] { wrapper.step(); }, "the gradient of params.1. in parameter group 0 is not finite"));
}

// ---- checkpoints ------------------------------------------------------------------------------------

struct Model : torch::nn::Module {
  explicit Model(const std::vector<Tensor>& params) {
    for (std::size_t i = 0; i < params.size(); ++i) register_parameter("p" + std::to_string(i), params[i]);
  }
};

// A file that is gone with the test.
struct TemporaryFile {
  std::string path = testing::TempDir() + "schedulefree_wrapper_" + std::to_string(getpid()) + ".pt";
  ~TemporaryFile() { std::remove(path.c_str()); }
};

TEST(WrapperCheckpoints, TrainingGoesOnAsIfItHadNeverStopped) {
  const TemporaryFile file;
  for (const auto& [name, make] : kBases)
    for (const bool trains : {false, true})
      for (const bool in_file : {false, true}) {
        const torch::Dtype dtype = in_file ? torch::kFloat : torch::kBFloat16;
        const std::vector<Tensor> params = parameters(dtype);
        const Base base = make(params);
        Wrapper wrapper(*base, WrapperOptions().weight_decay_at_y(0.1).max_grad_norm(9).r(0.5));
        wrapper.train();
        for (int step = 0; step < 4; ++step) take_step(wrapper, params, step);
        wrapper.options().momentum(0.8);
        base->param_groups()[0].options().set_lr(0.02);
        take_step(wrapper, params, 4);
        wrapper.train(trains);

        std::vector<Tensor> others = in_file ? parameters(dtype, 1) : copies(params);
        const Base other = make(others);
        Wrapper loaded(*other);
        loaded.train();
        take_step(loaded, others, 7);
        if (in_file) {
          Model model(params), other_model(others);
          save_state_dict(wrapper, model, file.path);
          load_state_dict(loaded, other_model, file.path);
        } else {
          std::stringstream stream;
          torch::save(wrapper, stream);
          torch::load(loaded, stream);
          const at::NoGradGuard no_grad;
          for (std::size_t i = 0; i < params.size(); ++i) others[i].copy_(params[i]);
        }
        EXPECT_EQ(loaded.is_training(), trains);
        for (Wrapper* one : {&wrapper, &loaded}) one->train();
        for (int step = 5; step < 9; ++step) {
          take_step(wrapper, params, step);
          take_step(loaded, others, step);
        }
        EXPECT_TRUE(equal(params, others)) << name << dtype << trains << in_file;
        EXPECT_TRUE(equal(zs(wrapper, 3), zs(loaded, 3))) << name << dtype << trains << in_file;
        for (const char* key : {"lr", "sf_momentum", "sf_momentum_of_y", "sf_r", "sf_max_grad_norm", "sf_k",
                                "sf_weight_sum", "sf_lr_max"})
          EXPECT_EQ(c10::str(entry(wrapper, key)), c10::str(entry(loaded, key))) << key;
      }
}

TEST(WrapperCheckpoints, StateFindsItsParameterByName) {
  const TemporaryFile file;
  const std::vector<Tensor> params = parameters();
  torch::optim::RMSprop base(params, 0.1);
  Wrapper wrapper(base);
  wrapper.train();
  take_step(wrapper, params, 0);
  Model model(params);
  save_state_dict(wrapper, model, file.path);
  const std::vector<Tensor> others = copies(params);
  Model other_model(others);
  torch::optim::RMSprop reversed({others[2], others[1], others[0]}, 0.1);
  Wrapper loaded(reversed);
  load_state_dict(loaded, other_model, file.path);
  EXPECT_TRUE(torch::equal(state_of(loaded, 2).at("sf_z").toTensor(), zs(wrapper, 3)[0]));
  EXPECT_TRUE(torch::equal(state_of(loaded, 0).at("square_avg").toTensor(),
                           state_of(wrapper, 2).at("square_avg").toTensor()));
}

TEST(WrapperCheckpoints, AModelInTheOtherModeIsRefused) {
  const std::vector<Tensor> params = parameters();
  torch::optim::RMSprop base(params, 0.1);
  Wrapper wrapper(base);
  wrapper.train();
  for (int step = 0; step < 5; ++step) take_step(wrapper, params, step);
  const detail::Dict saved = dict_of(wrapper).copy();
  wrapper.eval();
  wrapper.load_state_dict(saved, detail::by_number);
  EXPECT_TRUE(throws([&] { wrapper.step(); }, "those of eval mode .* says train mode"));
  wrapper.declare_mode(false);
  wrapper.train();
}

TEST(WrapperCheckpoints, WhatDoesNotFitIsRefusedAndChangesNothing) {
  const std::vector<Tensor> params = parameters();
  torch::optim::RMSprop base(params, 0.1);
  Wrapper wrapper(base);
  wrapper.train();
  take_step(wrapper, params, 0);
  std::stringstream before;
  torch::save(wrapper, before);
  const auto load = [&](const std::function<void(detail::Dict group, detail::Dict state)>& change) {
    std::stringstream stream;
    torch::save(wrapper, stream);
    torch::serialize::InputArchive archive;
    archive.load_from(stream);
    const detail::Dict dict = detail::load(archive, "Wrapper");
    change(dict.at("param_groups").toListRef()[0].toGenericDict(),
           dict.at("state").toGenericDict().at(1).toGenericDict());
    wrapper.load_state_dict(dict, detail::by_number);
  };
  const std::vector<std::pair<std::function<void(detail::Dict, detail::Dict)>, const char*>> cases = {
      {[](auto group, auto) { group.erase(group.find("alpha")); },
       "group 0: it lacks alpha, so it is not of t"},
      {[](auto group, auto) { group.erase(group.find("sf_k")); }, "it lacks sf_k, so it is not of a wrapper"},
      {[](auto group, auto) { group.insert_or_assign("alpha", "x"); }, "Invalid alpha.*expected a number"},
      {[](auto group, auto) { group.insert_or_assign("lr", -1.0); },
       "Invalid lr in parameter group 0 of the"},
      {[](auto group, auto) { group.insert_or_assign("maximize", true); },
       "Invalid maximize in parameter gr"},
      {[](auto group, auto) { group.insert_or_assign("sf_momentum", 2.0); },
       "Invalid momentum.*: 2, expected"},
      {[](auto group, auto) { group.insert_or_assign("sf_k", -1); },
       "Invalid k in parameter group 0 of .*: -1"},
      {[](auto, auto state) {
         state.erase(state.find("sf_z"));
         state.insert("sf_y_lo", torch::zeros({4, 5}, torch::kShort));
       },
       "it lacks sf_z"},
      {[](auto, auto state) { state.insert_or_assign("sf_z", torch::zeros(3)); }, "Invalid z of 1.*shape"},
      {[](auto, auto state) { state.insert_or_assign("square_avg", torch::zeros(3)); },
       "square_avg of 1.*shape"},
      {[](auto, auto state) { state.insert_or_assign("square_avg", "x"); },
       "square_avg of 1.*expected a tensor"},
      {[](auto, auto state) { state.insert_or_assign("step", torch::zeros(3)); }, "Invalid step.*a number"},
  };
  for (const auto& [change, message] : cases)
    EXPECT_TRUE(throws([&, &change = change] { load(change); }, message));
  std::stringstream after;
  torch::save(wrapper, after);
  EXPECT_EQ(before.str(), after.str());

  torch::optim::Adam adam(parameters());
  Wrapper of_adam(adam);
  EXPECT_TRUE(throws([&] { torch::load(of_adam, before); }, "it lacks betas, so it is not of this base"));
}

TEST(WrapperCheckpoints, StateThatNobodyKnowsIsRefused) {
  struct Own : torch::optim::Optimizer {
    explicit Own(std::vector<Tensor> params)
        : Optimizer(std::move(params), std::make_unique<torch::optim::SGDOptions>(0.1)) {}
    Tensor step(LossClosure = nullptr) override { return {}; }
  };
  const std::vector<Tensor> params = parameters();
  Own base(params);
  Wrapper wrapper(base);
  wrapper.train();
  set_gradients(params, 0);
  wrapper.step();
  EXPECT_TRUE(
      throws([&] { dict_of(wrapper); }, "Invalid base: the state of .*Own.* cannot be saved or loaded"));
}

}  // namespace
}  // namespace schedulefree
