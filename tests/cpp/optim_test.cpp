#include "schedulefree_cpp/optim.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <torch/torch.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <map>
#include <random>
#include <regex>

#include "throws.h"

// What this program has the C library do to files, while a test looks: these stand in for its functions.
std::vector<std::string>* file_calls = nullptr;

extern "C" int fsync(int file) {
  if (file_calls) {
    const auto path = std::filesystem::read_symlink("/proc/self/fd/" + std::to_string(file));
    const auto size = std::filesystem::is_directory(path) ? 0 : std::filesystem::file_size(path);
    file_calls->push_back("fsync " + path.string() + " " + std::to_string(size));
  }
  return static_cast<int>(syscall(SYS_fsync, file));
}

extern "C" int rename(const char* from, const char* to) noexcept {
  if (file_calls) file_calls->push_back(std::string("rename ") + from + " " + to);
  return renameat(AT_FDCWD, from, AT_FDCWD, to);
}

namespace schedulefree {
namespace {

using torch::Tensor;
using torch::optim::OptimizerParamGroup;

Tensor parameter(std::initializer_list<int64_t> sizes = {5}, torch::Dtype dtype = torch::kFloat) {
  return torch::randn(sizes, dtype).set_requires_grad(true);
}

Tensor copy(const Tensor& t) { return t.detach().clone(); }

// Takes steps with gradients that depend on the seed alone.
void take_steps(Optimizer& optimizer, int steps, uint64_t seed = 0) {
  torch::Generator generator = at::detail::createCPUGenerator(seed);
  for (int i = 0; i < steps; ++i) {
    for (auto& group : optimizer.param_groups())
      for (Tensor& p : group.params())
        p.mutable_grad() = torch::randn(p.sizes(), generator).to(p.scalar_type());
    optimizer.step();
  }
}

// One step, without a gradient for the last parameter if that `rests`.
void take_step(Optimizer& optimizer, bool rests, uint64_t seed = 0) {
  torch::Generator generator = at::detail::createCPUGenerator(seed);
  std::vector<Tensor>& params = optimizer.param_groups()[0].params();
  for (Tensor& p : params) p.mutable_grad() = torch::randn(p.sizes(), generator).to(p.scalar_type());
  if (rests) params.back().mutable_grad() = Tensor();
  optimizer.step();
}

double& beta_of(AdamW& optimizer) {
  return std::get<0>(static_cast<AdamWOptions&>(optimizer.param_groups()[0].options()).betas());
}

// A file that is gone with the test.
struct TemporaryFile {
  std::string path = testing::TempDir() + "schedulefree_" + std::to_string(getpid()) + "_" +
                     testing::UnitTest::GetInstance()->current_test_info()->name() + ".pt";
  ~TemporaryFile() { std::remove(path.c_str()); }
};

// An entry of a group's state dict.
c10::IValue entry(const Optimizer& optimizer, const std::string& key, std::size_t group = 0) {
  const detail::Dict dict = optimizer.state_dict([](const Tensor&, int64_t number) { return number; });
  return dict.at("param_groups").toListRef()[group].toGenericDict().at(key);
}

// ---- gradients that are not finite ------------------------------------------------------------------

TEST(Nonfinite, ASkippedStepLeavesEverythingAsItWas) {
  for (const double value :
       {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
    const Tensor p = parameter({100}), q = parameter({7});
    AdamW optimizer({p, q}, AdamWOptions(0.1).nonfinite(Nonfinite::kSkip));
    optimizer.train();
    take_steps(optimizer, 3);
    const auto before = [&] {
      std::vector<Tensor> all = {copy(p), copy(q)};
      for (const auto& item : optimizer.state()) {
        const auto& state = static_cast<const detail::ParamState&>(*item.second);
        all.insert(all.end(), {copy(state.z), copy(state.exp_avg_sq)});
      }
      return all;
    };
    const std::vector<Tensor> old = before();
    beta_of(optimizer) = 0.8;
    q.mutable_grad()[3] = value;
    optimizer.step();
    EXPECT_FALSE(std::isfinite(optimizer.grad_norm().item<double>()));
    const std::vector<Tensor> now = before();
    for (std::size_t i = 0; i < old.size(); ++i) EXPECT_TRUE(torch::equal(old[i], now[i])) << i;
    EXPECT_EQ(entry(optimizer, "k").toInt(), 3);
    EXPECT_EQ(entry(optimizer, "nonfinite").toStringRef(), "skip");
    q.mutable_grad()[3] = 1;
    optimizer.step();
    EXPECT_FALSE(torch::equal(p, old[0]));
    EXPECT_EQ(entry(optimizer, "k").toInt(), 4);
  }
}

TEST(Nonfinite, RaisingNamesTheParameter) {
  const Tensor p = parameter({3}), q = parameter({4});
  std::vector<OptimizerParamGroup> groups;
  groups.emplace_back(std::vector<Tensor>{p});
  groups.emplace_back(std::vector<Tensor>{q});
  SGD optimizer(groups, SGDOptions(0.1).nonfinite(Nonfinite::kRaise));
  optimizer.train();
  take_steps(optimizer, 2);
  const Tensor before = copy(p);
  q.mutable_grad()[1] = std::numeric_limits<double>::infinity();
  EXPECT_TRUE(
      throws([&] { optimizer.step(); }, "the gradient of params.0. in parameter group 1 is not finite"));
  EXPECT_TRUE(torch::equal(p, before));
  EXPECT_EQ(entry(optimizer, "k").toInt(), 2);
  static_cast<SGDOptions&>(optimizer.param_groups()[1].options()).nonfinite(Nonfinite::kSkip);
  EXPECT_TRUE(
      throws([&] { optimizer.step(); }, "Invalid nonfinite in parameter group 1: skip, expected raise"));
}

TEST(Nonfinite, PropagatesUnlessToldOtherwise) {
  const Tensor p = parameter({3});
  SGD optimizer({p});
  optimizer.train();
  p.mutable_grad() = torch::full({3}, std::numeric_limits<double>::quiet_NaN());
  optimizer.step();
  EXPECT_TRUE(torch::isnan(p).all().item<bool>());
  EXPECT_FALSE(optimizer.grad_norm().defined());
}

// ---- modes ------------------------------------------------------------------------------------------

TEST(Modes, StartsInEvalModeWhereStepThrows) {
  const Tensor p = parameter();
  AdamW optimizer({p});
  EXPECT_FALSE(optimizer.is_training());
  p.mutable_grad() = torch::ones(5);
  const Tensor before = copy(p);
  EXPECT_TRUE(throws([&] { optimizer.step(); }, "called in eval mode.*Call optimizer.train"));
  EXPECT_TRUE(torch::equal(p, before));
  EXPECT_TRUE(optimizer.state().empty());
}

TEST(Modes, AClosureIsNotEvaluatedInEvalMode) {
  AdamW optimizer({parameter()});
  bool evaluated = false;
  EXPECT_THROW(optimizer.step([&] {
    evaluated = true;
    return Tensor();
  }),
               c10::Error);
  EXPECT_FALSE(evaluated);
}

TEST(Modes, EvaluationNeverChangesTraining) {
  for (const torch::Dtype dtype : {torch::kFloat, torch::kBFloat16, torch::kHalf}) {
    for (const bool moves : {false, true}) {
      std::mt19937 random(0);
      const Tensor p = parameter({100, 50}, dtype), q = parameter({7}, dtype);
      const Tensor p2 = copy(p).set_requires_grad(true), q2 = copy(q).set_requires_grad(true);
      AdamW plain({p, q}, AdamWOptions(0.1)), evaluated({p2, q2}, AdamWOptions(0.1));
      for (AdamW* optimizer : {&plain, &evaluated}) optimizer->train();
      for (int i = 0; i < 60; ++i) {
        for (AdamW* optimizer : {&plain, &evaluated}) {
          if (moves && i % 7 == 5) beta_of(*optimizer) = i % 2 == 0 ? 0.95 : 0.8;
          take_step(*optimizer, /*rests=*/i % 3 == 1, /*seed=*/i);
        }
        if (random() % 2 == 0) continue;
        const Tensor y = copy(p2);
        if (moves) beta_of(evaluated) = 0.7;  // for a while
        evaluated.eval();
        EXPECT_FALSE(torch::equal(p2, y));
        evaluated.train();
        if (moves) beta_of(evaluated) = beta_of(plain);
        ASSERT_TRUE(torch::equal(p2, y)) << dtype << " " << i;
      }
      EXPECT_TRUE(torch::equal(p, p2)) << dtype;
      EXPECT_TRUE(torch::equal(q, q2)) << dtype;
    }
  }
}

TEST(Modes, AreIdempotent) {
  const Tensor p = parameter({100});
  AdamW optimizer({p}, AdamWOptions(0.1));
  optimizer.train();
  take_steps(optimizer, 5);
  optimizer.eval();
  const Tensor x = copy(p);
  optimizer.eval();
  EXPECT_TRUE(torch::equal(p, x));
  optimizer.train();
  const Tensor y = copy(p);
  optimizer.train();
  EXPECT_TRUE(torch::equal(p, y));
}

TEST(Modes, ParametersThatRestTakeTheBetaOfThoseThatStep) {
  const Tensor p = parameter({50}, torch::kDouble), resting = parameter({50}, torch::kDouble);
  AdamW optimizer({p, resting}, AdamWOptions(0.1));
  optimizer.train();
  take_steps(optimizer, 5);
  const auto x_of_resting = [&] {
    const Averaged averaged(optimizer);
    return copy(resting);
  };
  const Tensor x = x_of_resting(), y = copy(resting);
  beta_of(optimizer) = 0.6;
  take_step(optimizer, /*rests=*/true);
  EXPECT_TRUE(torch::allclose(x_of_resting(), x, 1e-14, 1e-14));
  const Tensor z = (y - 0.9 * x) / 0.1;
  EXPECT_TRUE(torch::allclose(resting, 0.6 * x + 0.4 * z, 1e-12, 1e-12));
}

TEST(Modes, SwitchingBeforeTheFirstStepChangesNothing) {
  const Tensor p = parameter();
  const Tensor before = copy(p);
  SGD optimizer({p});
  optimizer.train();
  optimizer.eval();
  optimizer.train();
  EXPECT_TRUE(torch::equal(p, before));
  EXPECT_TRUE(optimizer.state().empty());
}

TEST(Modes, TheAverageOfOneStepIsZ) {
  const Tensor p = parameter({4}, torch::kDouble);
  const Tensor start = copy(p);
  SGD optimizer({p}, SGDOptions(0.5));
  optimizer.train();
  p.mutable_grad() = torch::ones(4, torch::kDouble);
  optimizer.step();
  optimizer.eval();
  EXPECT_TRUE(torch::allclose(p, start - 0.5, 1e-14, 1e-14));
}

TEST(Modes, ASwitchThatALaterGroupRefusesIsUndone) {
  const Tensor p = parameter(), q = parameter();
  AdamW optimizer({OptimizerParamGroup({p}), OptimizerParamGroup({q})}, AdamWOptions(0.1));
  optimizer.train();
  take_steps(optimizer, 5);
  const Tensor y = copy(p), good = q.detach();
  q.set_data(torch::ones(7));
  EXPECT_TRUE(throws([&] { optimizer.eval(); }, "shape"));
  EXPECT_TRUE(torch::equal(p, y));
  EXPECT_TRUE(optimizer.is_training());
  q.set_data(good);
  optimizer.eval();
  optimizer.train();
  EXPECT_TRUE(torch::equal(p, y));
}

TEST(AveragedGuard, ParametersAreTheAverageInItsScope) {
  const Tensor p = parameter();
  AdamW optimizer({p}, AdamWOptions(0.1));
  optimizer.train();
  take_steps(optimizer, 5);
  const Tensor y = copy(p);
  {
    const Averaged outer(optimizer);
    EXPECT_FALSE(optimizer.is_training());
    const Tensor x = copy(p);
    EXPECT_FALSE(torch::equal(x, y));
    {
      const Averaged inner(optimizer);
      EXPECT_TRUE(torch::equal(p, x));
    }
    EXPECT_FALSE(optimizer.is_training());
    EXPECT_TRUE(torch::equal(p, x));
  }
  EXPECT_TRUE(optimizer.is_training());
  EXPECT_TRUE(torch::equal(p, y));
}

TEST(AveragedGuard, AnExceptionBringsTheParametersBack) {
  const Tensor p = parameter();
  AdamW optimizer({p}, AdamWOptions(0.1));
  optimizer.train();
  take_steps(optimizer, 5);
  const Tensor y = copy(p);
  try {
    const Averaged averaged(optimizer);
    throw std::runtime_error("validation failed");
  } catch (const std::runtime_error&) {
  }
  EXPECT_TRUE(optimizer.is_training());
  EXPECT_TRUE(torch::equal(p, y));
}

TEST(AveragedGuard, EvalModeStays) {
  AdamW optimizer({parameter()});
  {
    const Averaged averaged(optimizer);
  }
  EXPECT_FALSE(optimizer.is_training());
}

TEST(AveragedGuard, AFailedWayBackIsAWarning) {
  const Tensor p = parameter();
  AdamW optimizer({p});
  optimizer.train();
  {
    const Averaged averaged(optimizer);
    optimizer.param_groups()[0].set_options(std::make_unique<SGDOptions>());
  }
  EXPECT_FALSE(optimizer.is_training());
}

TEST(AveragedGuard, AGroupAddedInsideGoesTheWayOfTheFirst) {
  AdamW optimizer({parameter()});
  optimizer.train();
  take_steps(optimizer, 2);
  {
    const Averaged averaged(optimizer);
    optimizer.add_param_group(OptimizerParamGroup({parameter()}));
  }
  EXPECT_TRUE(optimizer.is_training());
}

// ---- groups -----------------------------------------------------------------------------------------

TEST(Groups, OptionsOfTheirOwnSurviveAndTheRestIsInherited) {
  const auto own = [](AdamWOptions options) { return std::make_unique<AdamWOptions>(options); };
  std::vector<OptimizerParamGroup> groups;
  groups.emplace_back(std::vector<Tensor>{parameter()}, own(AdamWOptions(0.5)));
  groups.emplace_back(std::vector<Tensor>{parameter()},
                      own(AdamWOptions().weight_decay(0.3).betas({0.8, 0.9})));
  groups.emplace_back(std::vector<Tensor>{parameter()});
  AdamW optimizer(groups, AdamWOptions(0.1).weight_decay(0.2).eps(1e-3).warmup_steps(7));
  optimizer.add_param_group({{parameter()}, own(AdamWOptions().decay_at(DecayAt::kZ).maximize(true))});

  const auto options = [&](std::size_t i) {
    return static_cast<const AdamWOptions&>(optimizer.param_groups()[i].options());
  };
  EXPECT_EQ(options(0).lr(), 0.5);
  EXPECT_EQ(options(0).weight_decay(), 0.2);
  EXPECT_EQ(options(1).lr(), 0.1);
  EXPECT_EQ(options(1).weight_decay(), 0.3);
  EXPECT_EQ(options(1).betas(), std::make_tuple(0.8, 0.9));
  EXPECT_EQ(options(2).lr(), 0.1);
  EXPECT_EQ(options(3).decay_at(), DecayAt::kZ);
  EXPECT_TRUE(options(3).maximize());
  for (std::size_t i = 0; i < 4; ++i) {
    EXPECT_EQ(options(i).eps(), 1e-3);
    EXPECT_EQ(options(i).warmup_steps(), 7);
  }
}

TEST(Groups, AValueThatIsSetToTheDefaultIsNotInherited) {
  std::vector<OptimizerParamGroup> groups;
  groups.emplace_back(std::vector<Tensor>{parameter()},
                      std::make_unique<SGDOptions>(SGDOptions(1.0).weight_decay(0)));
  SGD optimizer(groups, SGDOptions(0.1).weight_decay(0.2));
  const auto& options = static_cast<const SGDOptions&>(optimizer.param_groups()[0].options());
  EXPECT_EQ(options.lr(), 1.0);
  EXPECT_EQ(options.weight_decay(), 0.0);
}

TEST(Groups, TheirOptionsAreUsed) {
  const Tensor slow = parameter({3}, torch::kDouble), fast = parameter({3}, torch::kDouble);
  const Tensor slow_start = copy(slow), fast_start = copy(fast);
  std::vector<OptimizerParamGroup> groups;
  groups.emplace_back(std::vector<Tensor>{slow});
  groups.emplace_back(std::vector<Tensor>{fast}, std::make_unique<SGDOptions>(1.0));
  SGD optimizer(groups, SGDOptions(0.25));
  optimizer.train();
  for (const Tensor& p : {slow, fast}) p.mutable_grad() = torch::ones(3, torch::kDouble);
  optimizer.step();
  EXPECT_TRUE(torch::allclose(slow, slow_start - 0.25));
  EXPECT_TRUE(torch::allclose(fast, fast_start - 1.0));
}

TEST(Groups, OptionsOfAnotherOptimizerAreRefused) {
  const std::string expected = "Invalid options in parameter group .: expected schedulefree::AdamWOptions";
  const auto wrong = [] { return OptimizerParamGroup({parameter()}, std::make_unique<SGDOptions>()); };
  const auto torchs = [] {
    return OptimizerParamGroup({parameter()}, std::make_unique<torch::optim::AdamWOptions>());
  };
  EXPECT_TRUE(throws([&] { AdamW({wrong()}); }, expected));
  EXPECT_TRUE(throws([&] { AdamW({torchs()}); }, expected));
  AdamW optimizer({parameter()});
  EXPECT_TRUE(throws([&] { optimizer.add_param_group(wrong()); }, expected));
  EXPECT_EQ(optimizer.param_groups().size(), 1U);
  optimizer.train();
  optimizer.param_groups()[0].set_options(std::make_unique<torch::optim::AdamWOptions>());
  EXPECT_TRUE(throws([&] { optimizer.step(); }, expected));
}

TEST(Groups, AGroupAddedByTheBaseClassIsRefused) {
  AdamW optimizer({parameter()});
  static_cast<torch::optim::Optimizer&>(optimizer).add_param_group(
      OptimizerParamGroup({parameter()}, std::make_unique<AdamWOptions>(0.5)));
  EXPECT_TRUE(throws([&] { optimizer.train(); },
                     "2 parameter groups, expected 1.*add_param_group.. of schedulefree::AdamW"));
}

TEST(Groups, AGroupAddedInTrainModeIsInTrainMode) {
  AdamW optimizer({parameter()}, AdamWOptions(0.1));
  optimizer.train();
  take_steps(optimizer, 3);
  const Tensor p = parameter();
  const Tensor before = copy(p);
  optimizer.add_param_group(OptimizerParamGroup({p}));
  EXPECT_TRUE(optimizer.is_training());
  EXPECT_TRUE(torch::equal(p, before));
  take_steps(optimizer, 3);
  const Tensor y = copy(p);
  optimizer.eval();
  EXPECT_FALSE(torch::equal(p, y));
  optimizer.train();
  EXPECT_TRUE(torch::equal(p, y));
}

TEST(Groups, AnOptimizerWithoutParametersIsRefused) {
  const auto check = [](auto make) {
    const char* const expected = "optimizer got an empty parameter list";
    EXPECT_TRUE(throws([&] { make(std::vector<Tensor>{}); }, expected));
    EXPECT_TRUE(throws([&] { make(std::vector<OptimizerParamGroup>{}); }, expected));
    make(std::vector<OptimizerParamGroup>{OptimizerParamGroup(std::vector<Tensor>{})});  // as in torch.optim
  };
  check([](const auto& params) { SGD optimizer(params); });
  check([](const auto& params) { AdamW optimizer(params); });
  check([](const auto& params) { RAdam optimizer(params); });
}

TEST(Groups, UnsuitableParametersAreRefused) {
  const Tensor p = parameter();
  const auto refused = [](std::vector<Tensor> params, const char* pattern) {
    return throws([&] { SGD optimizer(params); }, pattern);
  };
  EXPECT_TRUE(refused({p, p * 2}, "params.1. in parameter group 0: expected a leaf"));
  const Tensor wants_gradient = torch::ones(3, torch::kComplexFloat).set_requires_grad(true);
  EXPECT_TRUE(refused({wants_gradient}, "params.0..*dtype ComplexFloat, expected Float"));
  EXPECT_TRUE(refused({Tensor()}, "params.0. in parameter group 0: an undefined tensor"));
  SGD optimizer({p});
  EXPECT_TRUE(throws([&] { optimizer.add_param_group(OptimizerParamGroup({p})); },
                     "params.0. in parameter group 1: it is in parameter group 0, too"));
  EXPECT_EQ(optimizer.param_groups().size(), 1U);
}

TEST(Groups, AFrozenParameterMayBeOfAnyDtypeUntilItHasAGradient) {
  const TemporaryFile file;
  for (const torch::Dtype dtype : {torch::kByte, torch::kComplexFloat, torch::kFloat8_e4m3fn}) {
    const Tensor frozen = torch::zeros(8, dtype), p = parameter();
    AdamW optimizer({frozen, p}, AdamWOptions(0.1));
    optimizer.train();
    const auto step = [&] {
      p.mutable_grad() = torch::ones(5);
      optimizer.step();
    };
    step();
    optimizer.eval();
    optimizer.train();
    torch::save(optimizer, file.path);
    AdamW other({frozen, copy(p).set_requires_grad(true)});
    torch::load(other, file.path);
    EXPECT_EQ(optimizer.state().size(), 1U);
    if (dtype == torch::kByte) continue;  // torch gives it no gradient
    const Tensor before = copy(p);
    frozen.mutable_grad() = torch::zeros(8, dtype);
    EXPECT_TRUE(throws(step, "params.0. in parameter group 0 of dtype .* has a gradient: expected none"));
    EXPECT_TRUE(torch::equal(p, before));
    EXPECT_EQ(entry(optimizer, "k").toInt(), 1);
    frozen.mutable_grad() = Tensor();
    step();
    EXPECT_EQ(entry(optimizer, "k").toInt(), 2);
  }
}

TEST(Groups, AParameterThatStandsTwiceInAGroupTakesOneStep) {
  const Tensor p = parameter(), q = copy(p).set_requires_grad(true);
  AdamW twice({p, p}, AdamWOptions(0.1)), once({q}, AdamWOptions(0.1));
  for (AdamW* optimizer : {&twice, &once}) {
    optimizer->train();
    take_steps(*optimizer, 5);
  }
  EXPECT_EQ(twice.param_groups()[0].params().size(), 1U);
  EXPECT_TRUE(torch::equal(p, q));
}

// ---- hyperparameters --------------------------------------------------------------------------------

struct Refused {
  std::function<void(AdamWOptions&)> set;
  const char* message;
};

TEST(Hyperparameters, OutsideTheirDomainAreRefusedAtOnceAndLater) {
  static constexpr double kInf = std::numeric_limits<double>::infinity(),
                          kNan = std::numeric_limits<double>::quiet_NaN();
  const std::vector<Refused> refused = {
      {[](auto& o) { o.lr(-1); }, "Invalid lr%: -1, expected a finite value >= 0"},
      {[](auto& o) { o.lr(kInf); }, "Invalid lr%: inf"},
      {[](auto& o) { o.weight_decay(kNan); }, "Invalid weight_decay%: nan"},
      {[](auto& o) { o.eps(-1e-8); }, "Invalid eps%: -1e-08"},
      {[](auto& o) { o.warmup_steps(-2); }, "Invalid warmup_steps%: -2, expected a finite value >= 0"},
      {[](auto& o) { o.r(kInf); }, "Invalid r%: inf, expected a finite value"},
      {[](auto& o) { o.weight_lr_power(kNan); }, "Invalid weight_lr_power%: nan"},
      {[](auto& o) { o.decoupling_c(-1); }, "Invalid decoupling_c%: -1, expected a finite value >= 0"},
      {[](auto& o) { o.averaging_weight(1.5); },
       "Invalid averaging_weight%: 1.5, expected a value in .0, 1."},
      {[](auto& o) { o.betas({0, 0.9}); }, "Invalid betas.0.%: 0, expected a value in .0, 1.: at 0"},
      {[](auto& o) { o.betas({0.9, 1}); }, "Invalid betas.1.%: 1, expected a value in .0, 1."},
      {[](auto& o) { o.inner_momentum(1); }, "Invalid inner_momentum%: 1"},
      {[](auto& o) { o.max_grad_norm(0.0); }, "Invalid max_grad_norm%: 0, expected a value > 0"},
      {[](auto& o) { o.max_grad_norm(kNan); }, "Invalid max_grad_norm%: nan"},
  };
  const auto with = [](std::string text, const char* where) {
    return text.replace(text.find('%'), 1, where);
  };
  for (const Refused& domain : refused) {
    AdamWOptions options;
    domain.set(options);
    const Tensor p = parameter();
    EXPECT_TRUE(throws([&] { AdamW optimizer({p}, options); }, with(domain.message, "")));

    AdamW optimizer({p});
    const OptimizerParamGroup group({parameter()}, std::make_unique<AdamWOptions>(options));
    EXPECT_TRUE(
        throws([&] { optimizer.add_param_group(group); }, with(domain.message, " in parameter group 1")));
    EXPECT_EQ(optimizer.param_groups().size(), 1U);

    optimizer.train();
    p.mutable_grad() = torch::ones(5);
    const Tensor before = copy(p);
    domain.set(static_cast<AdamWOptions&>(optimizer.param_groups()[0].options()));
    EXPECT_TRUE(throws([&] { optimizer.step(); }, with(domain.message, " in parameter group 0")));
    EXPECT_TRUE(torch::equal(p, before));
  }
}

TEST(Hyperparameters, MomentumIsNamedAsSgdNamesIt) {
  EXPECT_TRUE(throws([] { SGD({parameter()}, SGDOptions().momentum(0)); }, "Invalid momentum: 0"));
}

TEST(Hyperparameters, AccessorsAreThoseOfTorch) {
  SGDOptions options(0.5);
  options.momentum() = 0.7;
  EXPECT_EQ(options.momentum(), 0.7);
  EXPECT_EQ(options.get_lr(), 0.5);
  options.set_lr(0.25);
  EXPECT_EQ(options.lr(), 0.25);
}

// ---- the step ---------------------------------------------------------------------------------------

TEST(Step, AClosureRunsWithGradientsAndItsLossIsReturned) {
  const Tensor p = parameter();
  AdamW optimizer({p}, AdamWOptions(0.1));
  optimizer.train();
  const Tensor before = copy(p);
  const torch::NoGradGuard no_grad;
  const Tensor loss = optimizer.step([&] {
    optimizer.zero_grad();
    Tensor l = p.square().sum();
    l.backward();
    return l;
  });
  EXPECT_TRUE(torch::allclose(loss, before.square().sum()));
  EXPECT_FALSE(torch::equal(p, before));
  EXPECT_FALSE(optimizer.step().defined());
}

TEST(Step, WhatAClosureHasMovedIsChecked) {
  const Tensor p = parameter();
  AdamW optimizer({p});
  const auto moves = [&](const std::function<void()>& move) {
    return [&optimizer, move] {
      optimizer.step([&] {
        move();
        return Tensor();
      });
    };
  };
  optimizer.train();
  p.mutable_grad() = torch::ones(5);
  const Tensor before = copy(p);
  auto& options = static_cast<AdamWOptions&>(optimizer.param_groups()[0].options());
  EXPECT_TRUE(throws(moves([&] { options.lr(std::nan("")); }), "Invalid lr in parameter group 0: nan"));
  options.lr(0.1);
  EXPECT_TRUE(throws(moves([&] { optimizer.eval(); }), "called in eval mode"));
  EXPECT_TRUE(torch::equal(p, before));
}

TEST(Step, AScheduleThatOverflowsNamesItsGroup) {
  const Tensor p = parameter();
  SGD optimizer({p}, SGDOptions(1e200));
  optimizer.train();
  p.mutable_grad() = torch::ones(5);
  const Tensor before = copy(p);
  EXPECT_TRUE(throws([&] { optimizer.step(); }, "Invalid weight_sum: inf.* in parameter group 0"));
  EXPECT_TRUE(torch::equal(p, before));
}

TEST(Step, AParameterThatWasAddedTwiceIsRefused) {
  const Tensor p = parameter();
  AdamW optimizer({p}, AdamWOptions(0.1));
  optimizer.param_groups()[0].params().push_back(p);
  optimizer.train();
  p.mutable_grad() = torch::ones(5);
  const Tensor before = copy(p);
  EXPECT_TRUE(throws([&] { optimizer.step(); }, "memory"));
  EXPECT_TRUE(torch::equal(p, before));
  EXPECT_TRUE(optimizer.state().empty());
}

TEST(Step, AThrowingClosureChangesNothing) {
  const Tensor p = parameter();
  AdamW optimizer({p});
  optimizer.train();
  p.mutable_grad() = torch::ones(5);
  const Tensor before = copy(p);
  EXPECT_THROW(optimizer.step([]() -> Tensor { throw std::runtime_error("no loss"); }), std::runtime_error);
  EXPECT_TRUE(torch::equal(p, before));
  EXPECT_EQ(entry(optimizer, "k").toInt(), 0);
}

TEST(Step, GradientsAreOnlyReadAndZeroGradDropsThem) {
  const Tensor p = parameter();
  AdamW optimizer({p}, AdamWOptions().weight_decay(0.1));
  optimizer.train();
  take_steps(optimizer, 1);
  p.mutable_grad() = torch::ones(5);
  optimizer.step();
  EXPECT_TRUE(torch::equal(p.grad(), torch::ones(5)));
  optimizer.zero_grad();
  EXPECT_FALSE(p.grad().defined());
}

TEST(Step, AParameterWithoutGradientRests) {
  const Tensor moving = parameter(), resting = parameter();
  AdamW optimizer({moving, resting});
  optimizer.train();
  const Tensor before = copy(resting);
  moving.mutable_grad() = torch::ones(5);
  optimizer.step();
  optimizer.eval();
  EXPECT_TRUE(torch::equal(resting, before));
  EXPECT_EQ(optimizer.state().size(), 1U);
}

TEST(Step, AGroupWithoutAnyGradientTakesNone) {
  for (const double limit : {0.0, 1.0}) {
    const Tensor p = parameter(), q = parameter(), alone = copy(q).set_requires_grad(true);
    AdamWOptions options = AdamWOptions(0.1).warmup_steps(3);
    if (limit > 0) options.max_grad_norm(limit);
    AdamW optimizer({OptimizerParamGroup({p}), OptimizerParamGroup({q})}, options), other({alone}, options);
    optimizer.train();
    other.train();
    optimizer.step();  // no gradient at all
    for (int i = 0; i < 5; ++i) {
      p.mutable_grad() = torch::zeros(5);
      optimizer.step();
    }
    EXPECT_EQ(entry(optimizer, "k", 0).toInt(), 5);
    for (const char* const key : {"k", "weight_sum", "lr_max", "scheduled_lr"})
      EXPECT_EQ(entry(optimizer, key, 1), entry(other, key)) << key;

    // Its first steps are as large as any, and its beta may have moved while it waited.
    for (AdamW* const each : {&optimizer, &other})
      static_cast<AdamWOptions&>(each->param_groups().back().options()).betas({0.8, 0.99});
    for (int i = 0; i < 3; ++i) {
      const Tensor grad = torch::randn(5) / 10;
      q.mutable_grad() = grad.clone();
      alone.mutable_grad() = grad.clone();
      optimizer.step();
      other.step();
      EXPECT_TRUE(torch::equal(q, alone));
      q.mutable_grad() = Tensor();
      optimizer.step();  // rests for one step
    }
    EXPECT_EQ(entry(optimizer, "k", 1).toInt(), 3);
    EXPECT_EQ(entry(optimizer, "weight_sum", 1), entry(other, "weight_sum"));
    optimizer.eval();
    other.eval();
    EXPECT_TRUE(torch::equal(q, alone));
  }
}

TEST(Step, AParameterWithoutElementsCountsAsOneWithAGradient) {
  const Tensor p = parameter({0}), q = parameter({0}).detach();
  SGD optimizer({OptimizerParamGroup({p}), OptimizerParamGroup({q})}, SGDOptions(0.1));
  optimizer.train();
  optimizer.step();
  EXPECT_EQ(entry(optimizer, "k", 0).toInt(), 1);
  EXPECT_EQ(entry(optimizer, "k", 1).toInt(), 0);  // frozen, as it is on ranks where it has elements
}

// What the host can know of any group is refused before another has moved.
TEST(Step, WhatALaterGroupHasWrongIsRefusedFirst) {
  const auto refused = [](const std::function<void(SGD&, Tensor & p)>& spoil, const char* message) {
    const Tensor first = parameter();
    Tensor p = parameter(), resting = parameter();
    SGD optimizer({OptimizerParamGroup({first}), OptimizerParamGroup({p, resting})},
                  SGDOptions(0.1).momentum(1e-310));
    optimizer.train();
    take_steps(optimizer, 2);
    const Tensor before = copy(first), data = resting.detach();
    spoil(optimizer, p);
    EXPECT_TRUE(throws([&] { optimizer.step(); }, message));
    resting.set_data(data);
    EXPECT_TRUE(torch::equal(first, before)) << message;
    EXPECT_EQ(entry(optimizer, "k", 0).toInt(), 2);
    EXPECT_EQ(entry(optimizer, "k", 1).toInt(), 2);
  };
  const auto options = [](SGD& optimizer) -> SGDOptions& {
    return static_cast<SGDOptions&>(optimizer.param_groups()[1].options());
  };
  refused([&](SGD& o, Tensor&) { options(o).momentum(1.0); },
          "Invalid step in parameter group 1: its w would be -?nan, expected a finite number");
  refused([&](SGD& o, Tensor&) { options(o).lr(1e200); }, "Invalid weight_sum: inf.* in parameter group 1");
  refused([](SGD&, Tensor& p) { p.mutable_grad() = torch::ones(5, torch::kFloat).expand({2, 5}); },
          "params.0. in parameter group 1 of shape .5. on cpu has a gradient of shape .2, 5. on cpu");
  refused(
      [&](SGD& o, Tensor& p) {
        options(o).momentum(0.5);
        p.mutable_grad() = Tensor();
        o.param_groups()[1].params()[1].set_data(torch::ones(4));
        o.param_groups()[1].params()[1].mutable_grad() = Tensor();
        o.param_groups()[1].params().push_back(parameter());
        o.param_groups()[1].params().back().mutable_grad() = torch::ones(5);
      },
      "params.1. in parameter group 1 has shape .4., but its state has shape .5.");
}

TEST(Step, AParameterThatRestsTakesTheNewBetaAndIsSettledForIt) {
  torch::manual_seed(0);
  const Tensor p = parameter({40}), resting = parameter({100'000});
  AdamW optimizer({p, resting}, AdamWOptions(0.1));
  optimizer.train();
  take_steps(optimizer, 1);
  // With the new beta, y is next to 1 and x beyond 2: where a swap moves what is not settled.
  const Tensor x = 2.1 + 1.8 * torch::rand({100'000});
  const Tensor z = (1 - 0.3 * x) / 0.7 + 4e-7 * (torch::rand({100'000}) - 0.5);
  static_cast<const detail::ParamState&>(*optimizer.state().at(detail::key_of(resting))).z.copy_(z);
  resting.data().copy_(0.9 * x + 0.1 * z);
  beta_of(optimizer) = 0.3;
  take_step(optimizer, /*rests=*/true);
  EXPECT_TRUE(torch::allclose(resting, torch::ones({100'000}), 1e-5, 0));
  const Tensor y = copy(resting);
  optimizer.eval();
  EXPECT_TRUE(torch::allclose(resting, x, 1e-5, 0));
  optimizer.train();
  EXPECT_TRUE(torch::equal(resting, y));
}

TEST(Modes, EverySwitchRaisesTheVersionOfTheParameters) {
  const Tensor p = parameter();
  AdamW optimizer({p}, AdamWOptions(0.1));
  optimizer.train();
  take_steps(optimizer, 2);
  for (const bool mode : {false, true}) {
    const auto before = p._version();
    const Tensor loss = p.square().sum();
    optimizer.train(mode);
    EXPECT_GT(p._version(), before);
    EXPECT_TRUE(throws([&] { loss.backward(); }, "modified by an inplace operation"));
  }
}

TEST(Step, ASparseGradientIsRefusedBeforeAnythingChanges) {
  const Tensor dense = parameter(), p = parameter({3, 2});
  AdamW optimizer({OptimizerParamGroup({dense}), OptimizerParamGroup({p})});
  optimizer.train();
  dense.mutable_grad() = torch::ones(5);
  p.mutable_grad() = torch::ones({3, 2}).to_sparse();
  const Tensor before = copy(dense);
  EXPECT_TRUE(
      throws([&] { optimizer.step(); }, "params.0. in parameter group 1 has a gradient of layout Sparse"));
  EXPECT_TRUE(torch::equal(dense, before));
  EXPECT_TRUE(optimizer.state().empty());
}

TEST(Step, AGroupThatAnOperatorRefusesKeepsItsSchedule) {
  const Tensor lonely = parameter({6}), p = parameter({6}), resting = parameter({6});
  // Two leaves over one memory, which only the operator sees.
  const Tensor twin = torch::from_blob(p.data_ptr(), {6}).set_requires_grad(true);
  AdamW optimizer({OptimizerParamGroup({lonely}), OptimizerParamGroup({p, resting})}, AdamWOptions(0.1));
  optimizer.train();
  take_steps(optimizer, 3);
  optimizer.param_groups()[1].params().push_back(twin);
  twin.mutable_grad() = torch::ones(6);
  resting.mutable_grad() = Tensor();
  static_cast<AdamWOptions&>(optimizer.param_groups()[1].options()).betas({0.8, 0.999});
  const Tensor lonely_before = copy(lonely), before = copy(p), resting_before = copy(resting);
  EXPECT_TRUE(throws([&] { optimizer.step(); }, "memory"));
  EXPECT_FALSE(torch::equal(lonely, lonely_before));  // the earlier group has stepped, as in torch::optim
  EXPECT_TRUE(torch::equal(p, before));
  EXPECT_TRUE(torch::equal(resting, resting_before));
  EXPECT_EQ(entry(optimizer, "k", 0).toInt(), 4);
  EXPECT_EQ(entry(optimizer, "k", 1).toInt(), 3);
  EXPECT_EQ(optimizer.state().size(), 3U);

  optimizer.param_groups()[1].params().pop_back();
  optimizer.step();
  EXPECT_FALSE(torch::equal(p, before));
  EXPECT_EQ(entry(optimizer, "k", 1).toInt(), 4);
}

TEST(Step, WarmupNeedNotBeAnInteger) {
  SGD optimizer({parameter()}, SGDOptions(1.0).warmup_steps(2.5));
  optimizer.train();
  std::vector<double> rates;
  for (int i = 0; i < 4; ++i) {
    take_steps(optimizer, 1);
    rates.push_back(entry(optimizer, "scheduled_lr").toDouble());
  }
  EXPECT_EQ(rates, (std::vector<double>{1 / 2.5, 2 / 2.5, 3 / 2.5, 1.0}));
}

TEST(Step, OperatorsTakeTheirScalarsInATensor) {
  const Tensor y = torch::zeros(3), grad = torch::ones(3), z = torch::zeros(3);
  StepCoefficients scalars;
  scalars.take = 1;
  scalars.lr = 0.5;
  scalars.w = 1;
  scalars.grad_mul = 1;
  scalars.beta = 0.9;
  using Lists = at::TensorList;
  using Signature = void(Lists, Lists, Lists, Lists, const Tensor&, Lists, int64_t);
  detail::operator_named<Signature>("schedulefree_cpp::sgd_step_")
      .call({y}, {}, {grad}, {z}, coefs(scalars), {}, 0);
  EXPECT_TRUE(torch::equal(z, torch::full(3, -0.5)));
}

TEST(Step, ClipsToANormWithoutWritingGradients) {
  const Tensor p = parameter({40}, torch::kDouble), q = copy(p).set_requires_grad(true);
  SGD inside({p}, SGDOptions(0.1).max_grad_norm(0.5)), outside({q}, SGDOptions(0.1));
  EXPECT_FALSE(inside.grad_norm().defined());
  inside.train();
  outside.train();
  for (int i = 0; i < 5; ++i) {
    const Tensor grad = torch::randn(40, torch::kDouble);
    p.mutable_grad() = grad.clone();
    q.mutable_grad() = grad.clone();
    const double norm = torch::nn::utils::clip_grad_norm_(q, 0.5);
    inside.step();
    outside.step();
    EXPECT_NEAR(inside.grad_norm().item<double>(), norm, 1e-12);
    EXPECT_TRUE(torch::equal(p.grad(), grad));
    EXPECT_TRUE(torch::allclose(p, q, 1e-12, 1e-12));
  }
}

TEST(Step, AnInfiniteLimitOnlyMeasures) {
  const Tensor p = parameter(), q = parameter();
  SGD optimizer({p, q}, SGDOptions(0.1).max_grad_norm(std::numeric_limits<double>::infinity()));
  optimizer.train();
  p.mutable_grad() = torch::full(5, std::numeric_limits<float>::infinity());
  q.mutable_grad() = torch::ones(5);
  optimizer.step();
  EXPECT_TRUE(std::isinf(optimizer.grad_norm().item<double>()));
  EXPECT_TRUE(q.isfinite().all().item<bool>());
}

TEST(Step, AStaleBackwardIsDetected) {
  const Tensor p = parameter();
  SGD optimizer({p});
  optimizer.train();
  const Tensor loss = p.square().sum();
  p.mutable_grad() = torch::ones(5);
  optimizer.step();
  EXPECT_TRUE(throws([&] { loss.backward(); }, "modified by an inplace operation"));
}

TEST(Step, StateFollowsAModelThatIsCast) {
  torch::nn::Linear model(4, 3);
  AdamW optimizer(model->parameters(), AdamWOptions(0.01));
  optimizer.train();
  take_steps(optimizer, 3);
  for (const torch::Dtype dtype : {torch::kDouble, torch::kBFloat16, torch::kHalf, torch::kFloat}) {
    model->to(dtype);
    const Tensor before = copy(model->weight);
    take_steps(optimizer, 2);
    EXPECT_FALSE(torch::equal(model->weight, before)) << dtype;
    const auto& state =
        static_cast<const detail::ParamState&>(*optimizer.state().at(model->weight.unsafeGetTensorImpl()));
    EXPECT_EQ(state.z.scalar_type(), dtype == torch::kDouble ? torch::kDouble : torch::kFloat);
    EXPECT_EQ(state.y_lo.defined(), dtype == torch::kBFloat16 || dtype == torch::kHalf);
    optimizer.eval();
    optimizer.train();
  }
}

TEST(Step, ALowHalfDoesNotOutliveItsDtype) {
  for (const auto& [from, to] :
       {std::make_pair(torch::kBFloat16, torch::kHalf), std::make_pair(torch::kHalf, torch::kBFloat16)}) {
    torch::nn::Linear model(8, 3);
    model->to(from);
    AdamW optimizer(model->parameters(), AdamWOptions(0.01));
    optimizer.train();
    take_steps(optimizer, 3);
    const auto& state =
        static_cast<const detail::ParamState&>(*optimizer.state().at(model->weight.unsafeGetTensorImpl()));
    EXPECT_NE(state.y_lo.abs().max().item<int>(), 0);
    optimizer.eval();
    optimizer.train();
    EXPECT_NE(state.y_lo.abs().max().item<int>(), 0);
    model->to(to);
    optimizer.state_dict(detail::by_number);
    EXPECT_EQ(state.y_lo.abs().max().item<int>(), 0) << from;
  }
}

TEST(Step, ABfloat16ParameterFollowsFloat32) {
  const Tensor wide = parameter({64}), narrow = copy(wide).to(torch::kBFloat16).set_requires_grad(true);
  wide.data().copy_(narrow);
  AdamW one({wide}, AdamWOptions(1e-3)), other({narrow}, AdamWOptions(1e-3));
  one.train();
  other.train();
  for (int i = 0; i < 50; ++i) {
    const Tensor grad = torch::randn(64).to(torch::kBFloat16);
    wide.mutable_grad() = grad.to(torch::kFloat);
    narrow.mutable_grad() = grad;
    one.step();
    other.step();
  }
  const auto z = [](const Optimizer& optimizer) {
    return static_cast<const detail::ParamState&>(*optimizer.state().begin()->second).z;
  };
  EXPECT_TRUE(torch::equal(z(one), z(other)));
  EXPECT_TRUE(torch::allclose(wide, narrow.to(torch::kFloat), 1e-2, 1e-2));
}

// Every way of keeping a state: what a step leaves, a checkpoint holds, and evaluation does not change.
TEST(Formats, TrainSaveAndResumeExactly) {
  struct Mode {
    torch::Dtype dtype;
    std::int64_t state_bits, moment_bits;
    const char* rounding;
  };
  for (const Mode& mode :
       {Mode{torch::kHalf, 32, 32, "nearest"}, Mode{torch::kHalf, 32, 8, "nearest"},
        Mode{torch::kBFloat16, 24, 32, "nearest"}, Mode{torch::kBFloat16, 24, 8, "nearest"},
        Mode{torch::kBFloat16, 24, 8, "stochastic"}, Mode{torch::kFloat, 32, 8, "nearest"}}) {
    const Tensor p = parameter({3, 67}).detach().to(mode.dtype).set_requires_grad(true);
    const Tensor q = copy(p).set_requires_grad(true);
    const AdamWOptions options = AdamWOptions(0.01)
                                     .state_bits(mode.state_bits)
                                     .exp_avg_sq_bits(mode.moment_bits)
                                     .rounding(mode.rounding);
    AdamW saved({p}, options), loaded({q}, options);
    saved.train();
    take_steps(saved, 5);
    const Tensor y = copy(p);
    saved.eval();
    saved.train();
    EXPECT_TRUE(torch::equal(p, y));
    const auto& state = static_cast<const detail::ParamState&>(*saved.state().begin()->second);
    EXPECT_EQ(state.z.scalar_type(), mode.state_bits == 24 ? torch::kBFloat16 : torch::kFloat);
    EXPECT_EQ(state.z_lo.defined(), mode.state_bits == 24);
    EXPECT_EQ(state.exp_avg_sq.scalar_type(), mode.moment_bits == 8 ? torch::kByte : torch::kFloat);
    EXPECT_EQ(state.exp_avg_sq_scale.defined(), mode.moment_bits == 8);

    q.data().copy_(p);
    loaded.load_state_dict(saved.state_dict(detail::by_number), detail::by_number);
    torch::manual_seed(3);
    take_steps(saved, 5);
    torch::manual_seed(3);
    take_steps(loaded, 5);
    EXPECT_TRUE(torch::equal(p, q));
    const auto& other = static_cast<const detail::ParamState&>(*loaded.state().begin()->second);
    EXPECT_TRUE(torch::equal(state.exp_avg_sq, other.exp_avg_sq));

    // Into another mode: what fits is exact, the rest is rounded to nearest.
    AdamW whole({q}, AdamWOptions(0.01));
    whole.load_state_dict(saved.state_dict(detail::by_number), detail::by_number);
    const auto& wide = static_cast<const detail::ParamState&>(*whole.state().begin()->second);
    EXPECT_EQ(wide.z.scalar_type(), torch::kFloat);
    EXPECT_EQ(wide.exp_avg_sq.scalar_type(), torch::kFloat);
    loaded.load_state_dict(whole.state_dict(detail::by_number), detail::by_number);
    EXPECT_TRUE(
        torch::equal(static_cast<const detail::ParamState&>(*loaded.state().begin()->second).z, state.z));
    take_steps(loaded, 1);
  }
}

TEST(Formats, ABfloat16ThatAProgramSetsIsWhatItWasSetTo) {
  for (const std::int64_t bits : {32, 24})
    for (const torch::Dtype dtype : {torch::kBFloat16, torch::kHalf}) {
      const Tensor p = parameter({3, 400}, dtype);
      AdamW optimizer({p}, AdamWOptions(0.01).state_bits(bits));
      optimizer.train();
      take_steps(optimizer, 3);
      p.detach().zero_();
      optimizer.eval();
      optimizer.train();
      take_steps(optimizer, 2);
      EXPECT_TRUE(torch::isfinite(p).all().item<bool>()) << dtype << " " << bits;
    }
}

// The second moment, as the numbers that it stands for.
Tensor moment_of(const Optimizer& optimizer) {
  const auto& state = static_cast<const detail::ParamState&>(*optimizer.state().begin()->second);
  return state.exp_avg_sq_scale.defined() ? detail::decode_8(state.exp_avg_sq, state.exp_avg_sq_scale)
                                          : state.exp_avg_sq;
}

// Blocks of 128 elements have a scale, so codes mean nothing in another order.
TEST(Formats, SecondMomentsOf8BitsFollowTheMemoryOfTheirParameter) {
  enum class At { kStep, kSwitch, kSave, kLoad };
  for (const At at : {At::kStep, At::kSwitch, At::kSave, At::kLoad}) {
    torch::manual_seed(0);
    const Tensor scale = torch::pow(10.0, torch::linspace(-2, 1, 64)).view({1, 64, 1, 1});
    const Tensor p = torch::randn({64, 64, 3, 3}).set_requires_grad(true);
    const AdamWOptions options = AdamWOptions(1e-3).exp_avg_sq_bits(8);
    AdamW optimizer({p}, options);
    optimizer.train();
    const auto step = [&](AdamW& o, Tensor q) {
      q.mutable_grad() = torch::ones({64, 64, 3, 3}) * scale;
      o.step();
    };
    for (int i = 0; i < 3; ++i) step(optimizer, p);
    const Tensor before = moment_of(optimizer).clone();
    const Tensor moved = p.detach().contiguous(torch::MemoryFormat::ChannelsLast);
    const auto expect_near = [&](const AdamW& o, double factor) {
      const Tensor now = moment_of(o).contiguous(), least = before.contiguous() * factor;
      EXPECT_LT(((now / least).log().abs().max().item<double>()), 0.5) << static_cast<int>(at);
    };
    if (at == At::kLoad) {
      const Tensor q = moved.clone().set_requires_grad(true);
      AdamW other({q}, options);
      other.load_state_dict(optimizer.state_dict(detail::by_number), detail::by_number);
      expect_near(other, 1);
      continue;
    }
    p.set_data(moved);
    if (at == At::kStep) step(optimizer, p);
    if (at == At::kSwitch) optimizer.eval();
    if (at == At::kSave) optimizer.state_dict(detail::by_number);
    expect_near(optimizer, at == At::kStep ? 4.0 / 3 : 1);
    const auto& state = static_cast<const detail::ParamState&>(*optimizer.state().begin()->second);
    EXPECT_EQ(state.exp_avg_sq.strides(), p.strides());
  }
}

TEST(Formats, RoundAConvertedBaseToEven) {
  const Tensor z = torch::tensor({0x3F800080, 0x3F800180}, torch::kInt).view(torch::kFloat);
  const auto [word, low] = detail::split_24(z);
  const Tensor expected = torch::tensor({0x3F800000, 0x3F800200}, torch::kInt).view(torch::kFloat);
  EXPECT_TRUE(torch::equal(detail::join_24(word, low), expected));
}

TEST(Formats, ALoadKeepsTheBitsOfEachGroup) {
  const auto make = [] {
    return AdamW({OptimizerParamGroup({parameter()}),
                  OptimizerParamGroup({parameter()},
                                      std::make_unique<AdamWOptions>(AdamWOptions(0.1).exp_avg_sq_bits(8)))},
                 AdamWOptions(0.1));
  };
  AdamW from = make(), to = make();
  from.train();
  take_steps(from, 2);
  to.load_state_dict(from.state_dict(detail::by_number), detail::by_number);
  for (const auto& [group, dtype] : {std::make_pair(0, torch::kFloat), std::make_pair(1, torch::kByte)}) {
    const Tensor& p = to.param_groups()[group].params()[0];
    const auto& state = static_cast<const detail::ParamState&>(*to.state().at(p.unsafeGetTensorImpl()));
    EXPECT_EQ(state.exp_avg_sq.scalar_type(), dtype) << group;
  }
}

TEST(Formats, RefusesOtherBits) {
  const Tensor p = parameter({3});
  EXPECT_THROW(AdamW({p}, AdamWOptions(0.01).state_bits(16)), c10::ValueError);
  EXPECT_THROW(AdamW({p}, AdamWOptions(0.01).exp_avg_sq_bits(4)), c10::ValueError);
  EXPECT_THROW(AdamW({p}, AdamWOptions(0.01).rounding("up")), c10::ValueError);
}

TEST(Step, AGroupMayHaveParametersOfEveryDtype) {
  std::vector<Tensor> together, apart;
  for (const torch::Dtype dtype : {torch::kFloat, torch::kBFloat16, torch::kDouble, torch::kHalf}) {
    together.push_back(parameter({5}, dtype));
    apart.push_back(copy(together.back()).set_requires_grad(true));
  }
  AdamW one(together, AdamWOptions(0.1));
  AdamW other({OptimizerParamGroup({apart[0], apart[2]}), OptimizerParamGroup({apart[1]}),
               OptimizerParamGroup({apart[3]})},
              AdamWOptions(0.1));
  for (AdamW* optimizer : {&one, &other}) {
    optimizer->train();
    for (int i = 0; i < 5; ++i) {
      for (auto& group : optimizer->param_groups())
        for (Tensor& p : group.params()) p.mutable_grad() = torch::full_like(p, 0.1 * i);
      optimizer->step();
    }
    optimizer->eval();
  }
  for (std::size_t i = 0; i < together.size(); ++i) EXPECT_TRUE(torch::equal(together[i], apart[i])) << i;
}

TEST(Step, AParameterInThePlaceOfAnotherBeginsAnew) {
  AdamW optimizer({parameter()});
  optimizer.train();
  for (int i = 0; i < 20; ++i) {  // tensors that are freed give their addresses to the next
    take_steps(optimizer, 1);
    optimizer.param_groups()[0].params()[0] = Tensor();
    optimizer.param_groups()[0].params()[0] = parameter();
  }
  take_steps(optimizer, 1);
  EXPECT_EQ(optimizer.state().size(), 21U);
}

TEST(Step, AnOptimizerCanBeMoved) {
  const Tensor p = parameter();
  AdamW first({p});
  first.train();
  take_steps(first, 2);
  AdamW second(std::move(first));
  take_steps(second, 1);
  EXPECT_EQ(entry(second, "k").toInt(), 3);
}

TEST(Step, InnerMomentumNeedsItsStateFromTheStart) {
  AdamW optimizer({parameter()});
  optimizer.train();
  take_steps(optimizer, 1);
  static_cast<AdamWOptions&>(optimizer.param_groups()[0].options()).inner_momentum(0.5);
  EXPECT_TRUE(throws([&] { take_steps(optimizer, 1); },
                     "params.0. in parameter group 0 lacks exp_avg, which inner_momentum needs"));
  EXPECT_EQ(entry(optimizer, "k").toInt(), 1);
}

// ---- schedulers -------------------------------------------------------------------------------------

TEST(Schedulers, StepLRMovesTheLearningRate) {
  const Tensor p = parameter({3}, torch::kDouble);
  SGD optimizer({p}, SGDOptions(1.0));
  torch::optim::StepLR scheduler(optimizer, /*step_size=*/2, /*gamma=*/0.5);
  optimizer.train();
  std::vector<double> rates;  // torch's scheduler leaves its first step out
  for (int i = 0; i < 5; ++i) {
    take_steps(optimizer, 1);
    rates.push_back(entry(optimizer, "scheduled_lr").toDouble());
    scheduler.step();
  }
  EXPECT_EQ(rates, (std::vector<double>{1.0, 1.0, 1.0, 0.5, 0.5}));
  EXPECT_EQ(entry(optimizer, "lr_max").toDouble(), 1.0);
}

TEST(Schedulers, ReduceLROnPlateauMovesTheLearningRate) {
  RAdam optimizer({parameter()}, RAdamOptions(0.1));
  torch::optim::ReduceLROnPlateauScheduler scheduler(optimizer, torch::optim::ReduceLROnPlateauScheduler::min,
                                                     /*factor=*/0.1F, /*patience=*/0);
  scheduler.step(1.0F);
  scheduler.step(1.0F);
  EXPECT_NEAR(optimizer.param_groups()[0].options().get_lr(), 0.01, 1e-8);
}

// ---- torch::save and torch::load --------------------------------------------------------------------

template <class Class>
struct Archives : testing::Test {};

using Classes = testing::Types<SGD, AdamW, RAdam>;
TYPED_TEST_SUITE(Archives, Classes);

TYPED_TEST(Archives, ResumeExactlyInEitherMode) {
  for (const bool train : {true, false}) {
    const TemporaryFile file;
    const Tensor p = parameter({20, 30}), q = parameter({7}, torch::kBFloat16),
                 h = parameter({90}, torch::kHalf);
    TypeParam alone({OptimizerParamGroup({p}), OptimizerParamGroup({q, h})});
    const auto twin = [](const Tensor& t) { return copy(t).set_requires_grad(true); };
    const auto make = [&](const Tensor& p2, const Tensor& q2, const Tensor& h2) {
      return std::make_unique<TypeParam>(
          std::vector<OptimizerParamGroup>{OptimizerParamGroup({p2}), OptimizerParamGroup({q2, h2})});
    };
    Tensor p2 = twin(p), q2 = twin(q), h2 = twin(h);
    auto saved = make(p2, q2, h2);
    for (Optimizer* optimizer : {static_cast<Optimizer*>(&alone), static_cast<Optimizer*>(saved.get())}) {
      optimizer->train();
      take_steps(*optimizer, 10);
    }
    for (int i = 0; i < 5; ++i) {
      saved->train(train);
      torch::save(*saved, file.path);
      p2 = twin(p2), q2 = twin(q2), h2 = twin(h2);
      saved = make(p2, q2, h2);
      torch::load(*saved, file.path);
      EXPECT_EQ(saved->is_training(), train);
      saved->train();
      take_steps(alone, 3, /*seed=*/i);
      take_steps(*saved, 3, /*seed=*/i);
    }
    EXPECT_TRUE(torch::equal(p, p2));
    EXPECT_TRUE(torch::equal(q, q2));
    EXPECT_TRUE(torch::equal(h, h2));
    EXPECT_EQ(entry(alone, "weight_sum"), entry(*saved, "weight_sum"));
  }
}

TEST(Archive, TheBetaThatBuiltYComesBack) {
  for (const bool train : {true, false}) {
    const TemporaryFile file;
    const Tensor p = parameter({50});
    AdamW optimizer({p}, AdamWOptions(0.1));
    optimizer.train();
    take_steps(optimizer, 5);
    beta_of(optimizer) = 0.7;  // of the next step
    optimizer.train(train);
    torch::save(optimizer, file.path);
    const Tensor q = copy(p).set_requires_grad(true);
    AdamW other({q});
    torch::load(other, file.path);
    for (AdamW* o : {&optimizer, &other}) {
      o->train();
      take_steps(*o, 5);
    }
    EXPECT_TRUE(torch::equal(p, q));
  }
}

TEST(Archive, HyperparametersComeBackAndAreUsed) {
  const TemporaryFile file;
  const Tensor p = parameter({3}, torch::kDouble);
  SGD saved({p}, SGDOptions(0.25).weight_decay(0.5).decay_at(DecayAt::kZ).warmup_steps(9));
  torch::save(saved, file.path);
  const Tensor q = parameter({3}, torch::kDouble);
  SGD loaded({q}, SGDOptions(1.0).maximize(true));
  torch::load(loaded, file.path);
  const auto& options = static_cast<const SGDOptions&>(loaded.param_groups()[0].options());
  EXPECT_EQ(options.lr(), 0.25);
  EXPECT_EQ(options.weight_decay(), 0.5);
  EXPECT_EQ(options.decay_at(), DecayAt::kZ);
  EXPECT_EQ(options.warmup_steps(), 9);
  EXPECT_TRUE(options.maximize());  // the loading optimizer's own, of which the archive says nothing
  loaded.train();
  take_steps(loaded, 1);
  EXPECT_EQ(entry(loaded, "scheduled_lr").toDouble(), 0.25 / 9);
}

TEST(Archive, AGroupThatTakesADefaultBackKeepsIt) {
  const TemporaryFile file;
  const auto make = [] {
    std::vector<OptimizerParamGroup> groups;
    groups.emplace_back(std::vector<Tensor>{parameter()});
    groups.emplace_back(std::vector<Tensor>{parameter()},
                        std::make_unique<AdamWOptions>(AdamWOptions().maximize(false).inner_momentum(0)));
    return std::make_unique<AdamW>(groups, AdamWOptions(0.1).maximize(true).inner_momentum(0.5));
  };
  const auto optimizer = make(), other = make();
  optimizer->train();
  take_steps(*optimizer, 2);
  torch::save(*optimizer, file.path);
  torch::load(*other, file.path);
  const auto& options = static_cast<const AdamWOptions&>(other->param_groups()[1].options());
  EXPECT_FALSE(options.maximize());
  EXPECT_EQ(options.inner_momentum(), 0.0);
  take_steps(*other, 1);
}

TEST(Archive, AnyEntryOfOthersIsPassedOn) {
  const TemporaryFile file;
  const auto naming = [](const Tensor&, int64_t number) { return number; };
  AdamW optimizer({parameter()});
  const detail::Dict dict = optimizer.state_dict(naming);
  const auto group = dict.at("param_groups").toList().get(0).toGenericDict();
  c10::impl::GenericList list(c10::AnyType::get());
  list.push_back(1.5);
  list.push_back(std::string("x"));
  group.insert("size", 3);
  group.insert("initial_lr", 0.5);
  group.insert("none", c10::IValue());
  group.insert("list", list);
  optimizer.load_state_dict(dict, naming);
  torch::save(optimizer, file.path);
  AdamW other({parameter()});
  torch::load(other, file.path);
  EXPECT_EQ(entry(other, "size").toInt(), 3);
  EXPECT_EQ(entry(other, "initial_lr").toDouble(), 0.5);
  EXPECT_TRUE(entry(other, "none").isNone());
  EXPECT_EQ(entry(other, "list").toListRef()[0].toDouble(), 1.5);
  EXPECT_EQ(entry(other, "list").toListRef()[1].toStringRef(), "x");
}

TEST(Archive, AGroupThatIsChangedAfterLoadingStepsWithTheChange) {
  const TemporaryFile file;
  const Tensor p = parameter();
  SGD optimizer({p}, SGDOptions(0.25));
  optimizer.train();
  take_steps(optimizer, 2);
  torch::save(optimizer, file.path);
  torch::load(optimizer, file.path);
  static_cast<SGDOptions&>(optimizer.param_groups()[0].options()).lr(0.5);
  optimizer.param_groups()[0].params()[0] = parameter();  // another in its place, without state
  optimizer.add_param_group(OptimizerParamGroup({parameter()}));
  take_steps(optimizer, 1);
  EXPECT_EQ(entry(optimizer, "scheduled_lr", 0).toDouble(), 0.5);
  EXPECT_EQ(entry(optimizer, "k", 0).toInt(), 3);
  EXPECT_EQ(entry(optimizer, "k", 1).toInt(), 1);
}

TEST(Archive, LoadedStateIsACopy) {
  std::stringstream stream;
  const Tensor p = parameter();
  AdamW optimizer({p}, AdamWOptions(0.1));
  optimizer.train();
  take_steps(optimizer, 2);
  const detail::Dict dict = optimizer.state_dict([](const Tensor&, int64_t number) { return number; });
  const Tensor z = dict.at("state").toGenericDict().at(0).toGenericDict().at("z").toTensor();
  const Tensor before = copy(z);
  const Tensor q = copy(p).set_requires_grad(true);
  AdamW other({q});
  other.load_state_dict(dict, [](const Tensor&, int64_t number) { return number; });
  take_steps(other, 2);
  EXPECT_TRUE(torch::equal(z, before));
}

// Writes a state dict to an archive as save() does, and changes it on the way.
void save_changed(const Optimizer& optimizer, const std::string& path, const char* name,
                  const std::function<void(detail::Dict)>& change) {
  torch::serialize::OutputArchive archive;
  archive.write("optimizer", std::string(name));
  const detail::Dict dict = optimizer.state_dict(detail::by_number);
  change(dict);
  archive.write("state_dict", c10::IValue(dict));
  archive.save_to(path);
}

TEST(Archive, WithoutAFieldThatCameLaterLoads) {
  const TemporaryFile file;
  AdamW optimizer({parameter()}, AdamWOptions(0.1).eps(1e-3));
  optimizer.train();
  take_steps(optimizer, 2);
  save_changed(optimizer, file.path, "AdamW", [](detail::Dict dict) {
    auto group = dict.at("param_groups").toList().get(0).toGenericDict();
    EXPECT_EQ(group.erase("eps"), 1U);
    EXPECT_EQ(group.erase("scheduled_lr"), 1U);
    group.insert("a_field_of_the_future", 3.0);
    EXPECT_EQ(dict.erase("schedulefree_cpp"), 1U);
  });
  AdamW other({parameter()}, AdamWOptions(0.5).eps(1e-5));
  torch::load(other, file.path);
  const auto& options = static_cast<const AdamWOptions&>(other.param_groups()[0].options());
  EXPECT_EQ(options.lr(), 0.1);
  EXPECT_EQ(options.eps(), 1e-5);  // the optimizer's own
  take_steps(other, 1);
  EXPECT_EQ(entry(other, "k").toInt(), 3);
}

TEST(Archive, OfAnotherKindIsRefusedAndNothingChanges) {
  const TemporaryFile file;
  const Tensor p = parameter();
  AdamW optimizer({p}, AdamWOptions(0.1));
  optimizer.train();
  take_steps(optimizer, 2);
  const auto nothing = [](detail::Dict) {};
  const auto refused = [&](const char* pattern) {
    AdamW other({parameter()}, AdamWOptions(0.7));
    EXPECT_TRUE(throws([&] { torch::load(other, file.path); }, pattern));
    EXPECT_TRUE(other.state().empty());
    EXPECT_EQ(entry(other, "k").toInt(), 0);
    EXPECT_EQ(other.param_groups()[0].options().get_lr(), 0.7);
  };
  save_changed(optimizer, file.path, "RAdam", nothing);
  refused("saved by schedulefree::RAdam, expected schedulefree::AdamW");
  for (const auto& [key, value, message] : std::vector<std::tuple<std::string, c10::IValue, const char*>>{
           {"k", -5, "Invalid k in parameter group 0 of the state dict: -5, expected a number of steps"},
           {"k", 0.5, "Invalid k in the state dict: a value of type Double, expected an integer"},
           {"weight_sum", -1.0, "Invalid weight_sum in parameter group 0 of the state dict: -1"},
           {"lr_max", std::nan(""),
            "Invalid lr_max in parameter group 0 of .*: nan, expected a finite number"},
           {"maximize", 1, "Invalid maximize in the state dict: a value of type Int, expected a bool"},
           {"decay_at", std::string("x"), "Invalid decay_at in the state dict.*expected .y. or .z."},
           {"betas", 0.9, "Invalid betas in the state dict.*expected a list"},
           {"k", std::nan(""), "Invalid k in the state dict.*expected an integer"},
           {"lr_max", -2.0, "Invalid lr_max in parameter group 0 of .*: -2, expected .* >= -1"},
           {"scheduled_lr", std::nan(""), "Invalid scheduled_lr in parameter group 0 of .*: nan"},
           {"lr", -0.5, "Invalid lr in parameter group 0 of the state dict: -0.5, expected a finite value"},
           {"eps", std::nan(""), "Invalid eps in parameter group 0 of the state dict: nan"},
           {"weight_decay", -1.0, "Invalid weight_decay in parameter group 0 of the state dict: -1"},
           {"betas", c10::ivalue::Tuple::create(1.5, 0.9), "Invalid betas.0. in parameter group 0.*: 1.5"},
           {"betas", c10::ivalue::Tuple::create(0.9, 1.0), "Invalid betas.1. in parameter group 0.*: 1"},
           {"params", detail::to_list(std::vector<int64_t>{5}), "it has a state of 0, which none of its"},
           {"params", detail::to_list(std::vector<int64_t>{}), "0 parameters with 0 names, expected 1"},
       }) {
    save_changed(optimizer, file.path, "AdamW", [&, k = key, v = value](detail::Dict dict) {
      dict.at("param_groups").toList().get(0).toGenericDict().insert_or_assign(k, v);
    });
    refused(message);
  }
  for (const auto& [values, message] : std::vector<std::pair<std::vector<double>, const char*>>{
           {{0.0}, "Invalid beta that built y in parameter group 0: 0, expected a value in .0, 1."},
           {{0.9, 0.9}, "Invalid y_beta in the state dict: 2 values, expected one for each of 1"},
       }) {
    save_changed(optimizer, file.path, "AdamW", [&, v = values](detail::Dict dict) {
      dict.at("schedulefree_cpp").toGenericDict().insert_or_assign("y_beta", detail::to_list(v));
    });
    refused(message);
  }
  AdamW pair({OptimizerParamGroup({parameter()}), OptimizerParamGroup({parameter()})});
  save_changed(pair, file.path, "AdamW", [](detail::Dict dict) {
    dict.at("param_groups").toList().get(1).toGenericDict().insert_or_assign("train_mode", true);
  });
  EXPECT_TRUE(throws([&] { torch::load(pair, file.path); }, "Invalid train_mode in parameter group 1"));
  torch::optim::AdamW torchs({p});
  torch::save(torchs, file.path);
  refused("it was not saved by a schedulefree optimizer");
  save_changed(optimizer, file.path, "AdamW", [](detail::Dict dict) {
    dict.at("state").toGenericDict().at(0).toGenericDict().insert_or_assign("exp_avg_sq", torch::ones(4));
  });
  refused("Invalid exp_avg_sq of 0 in parameter group 0: shape .4., expected .5.");
  const auto with = [](const std::string& key, const c10::IValue& value) {
    return [=](detail::Dict dict) {
      dict.at("state").toGenericDict().at(0).toGenericDict().insert_or_assign(key, value);
    };
  };
  for (const auto& [key, value, message] : std::vector<std::tuple<std::string, c10::IValue, const char*>>{
           {"z", 5, "Invalid z of 0 in parameter group 0: expected a tensor, got a value of type Int"},
           {"z", c10::IValue(), "Invalid z of 0 in parameter group 0: expected a tensor"},
           {"z", torch::ones(5, torch::kComplexFloat), "Invalid z of 0 .*ComplexFloat.*expected a float"},
           {"z", torch::ones(5).to_sparse(), "Invalid z of 0 .*layout Sparse.*expected a float, dense"},
           {"z", torch::ones(5, torch::kInt), "Invalid z of 0 in parameter group 0: dtype Int"},
           {"exp_avg_sq", std::string("x"), "Invalid exp_avg_sq of 0 .*got a value of type String"},
           {"exp_avg_sq", torch::ones(5).to(torch::kByte), "it lacks exp_avg_sq_scale"},
       }) {
    save_changed(optimizer, file.path, "AdamW", with(key, value));
    refused(message);
  }
  const std::vector<std::pair<std::function<void(detail::Dict)>, const char*>> changes = {
      {[](detail::Dict dict) { EXPECT_EQ(dict.erase("state"), 1U); }, "expected a dict under \"state\""},
      {[](detail::Dict dict) { EXPECT_EQ(dict.erase("param_groups"), 1U); },
       "expected a list under \"param_groups\""},
      {[](detail::Dict dict) {
         EXPECT_EQ(dict.at("param_groups").toList().get(0).toGenericDict().erase("params"), 1U);
       },
       "0 parameters with 0 names, expected 1"},
      {[](detail::Dict dict) {
         const auto print = dict.at("schedulefree_cpp").toGenericDict().at("fingerprint").toGenericDict();
         print.insert_or_assign("y", print.at("y").toTensor().to_sparse());
       },
       "Invalid y of the fingerprint in the state dict: .*layout Sparse"},
      {[](detail::Dict dict) {
         dict.at("schedulefree_cpp").toGenericDict().insert_or_assign("y_beta", c10::List<double>());
       },
       "Invalid y_beta in the state dict: 0 values"},
  };
  for (const auto& [change, message] : changes) {
    save_changed(optimizer, file.path, "AdamW", change);
    refused(message);
  }
  {
    const Tensor codes = parameter({300});
    AdamW of_8_bits({codes}, AdamWOptions(0.1).exp_avg_sq_bits(8)), other({codes}, AdamWOptions(0.7));
    of_8_bits.train();
    take_steps(of_8_bits, 1);
    for (const double scale : {-1.0, std::nan(""), 1e38}) {
      save_changed(of_8_bits, file.path, "AdamW", with("exp_avg_sq_scale", torch::full(3, scale)));
      EXPECT_TRUE(
          throws([&] { torch::load(other, file.path); },
                 "Invalid exp_avg_sq_scale of 0 in parameter group 0: expected values from 0 to 7.9"));
    }
    AdamW twice({parameter(), parameter()});
    save_changed(twice, file.path, "AdamW", [](detail::Dict dict) {
      dict.at("param_groups")
          .toList()
          .get(0)
          .toGenericDict()
          .insert_or_assign("params", detail::to_list(std::vector<int64_t>{1, 1}));
    });
    EXPECT_TRUE(throws([&] { torch::load(twice, file.path); },
                       "Invalid params in parameter group 0.* 1 stands there twice"));
  }
  save_changed(optimizer, file.path, "AdamW", [](detail::Dict dict) {
    EXPECT_EQ(dict.at("state").toGenericDict().at(0).toGenericDict().erase("z"), 1U);
  });
  refused("Invalid state of 0 in parameter group 0: it lacks z, so it is not of AdamW");
  AdamW two({OptimizerParamGroup({parameter()}), OptimizerParamGroup({parameter()})});
  torch::save(two, file.path);
  refused("2 parameter groups, expected 1");
  SGD sgd({parameter()});
  save_changed(sgd, file.path, "AdamW", nothing);
  refused("it lacks betas, so it is not of AdamW");
}

TEST(Archive, AModelOfTheOtherModeIsRefusedAtFirstUse) {
  const TemporaryFile file;
  const Tensor p = parameter({50});
  AdamW optimizer({p}, AdamWOptions(0.1));
  optimizer.train();
  take_steps(optimizer, 10);
  torch::save(optimizer, file.path);
  optimizer.eval();
  const Tensor q = copy(p).set_requires_grad(true);  // x, with a state that says y
  AdamW other({q});
  torch::load(other, file.path);
  EXPECT_TRUE(
      throws([&] { take_steps(other, 1); }, "parameters are those of eval mode .x.*says train mode .y."));
  optimizer.train();
  const Tensor x = copy(q);
  q.data().copy_(p.detach());
  take_steps(other, 1);  // they belong together now

  // Or with what there is: x is x, whatever the state says.
  const Tensor r = copy(x).set_requires_grad(true);
  AdamW third({r});
  torch::load(third, file.path);
  EXPECT_TRUE(throws([&] { third.train(); }, "call optimizer.declare_mode.false. first"));
  third.declare_mode(false);
  third.train();
  EXPECT_TRUE(torch::allclose(r, p));
}

// ---- files that Python shares -----------------------------------------------------------------------

struct Net : torch::nn::Module {
  Net() {
    linear = register_module("linear", torch::nn::Linear(4, 3));
    norm = register_module("norm", torch::nn::BatchNorm1d(3));
  }
  torch::nn::Linear linear{nullptr};
  torch::nn::BatchNorm1d norm{nullptr};
};

TEST(Checkpoint, HoldsModelAndOptimizer) {
  const TemporaryFile file;
  const auto model = std::make_shared<Net>();
  AdamW optimizer(model->parameters(), AdamWOptions(0.1));
  optimizer.train();
  take_steps(optimizer, 3);
  model->norm->running_mean.fill_(3);
  save_state_dict(optimizer, model, file.path);

  Net other;
  AdamW resumed(other.parameters());
  load_state_dict(resumed, other, file.path);
  for (const auto& item : model->named_parameters())
    EXPECT_TRUE(torch::equal(item.value(), other.named_parameters()[item.key()]));
  EXPECT_TRUE(torch::equal(other.norm->running_mean, torch::full(3, 3.0)));
  take_steps(optimizer, 3, 1);
  take_steps(resumed, 3, 1);
  EXPECT_TRUE(torch::equal(model->linear->weight, other.linear->weight));
}

TEST(Checkpoint, HoldsEveryKindOfTensor) {
  const TemporaryFile file;
  struct Buffers : torch::nn::Module {
    Buffers() {
      register_parameter("empty", torch::randn({0, 3}));
      register_parameter("scalar", torch::randn({}));
      register_buffer("strided", torch::randn({4, 5}).t());
      register_buffer("view", torch::randn({100}).slice(0, 10, 12));
      register_buffer("long", torch::tensor({int64_t{1} << 40, int64_t{-3}}));
      register_buffer("bool", torch::tensor({true, false}));
      register_buffer("half", torch::randn({3}).to(torch::kHalf));
      register_buffer("complex", torch::randn({3}, torch::kComplexFloat).conj());
      register_buffer("nothing", torch::empty({2, 0, 5}, torch::kDouble));
    }
  } model, other;
  SGD optimizer(model.parameters()), loaded(other.parameters());
  save_state_dict(optimizer, model, file.path);
  load_state_dict(loaded, other, file.path);
  for (const auto& item : detail::named_tensors(model)) {
    for (const auto& [name, tensor] : detail::named_tensors(other)) {
      if (name == item.first) {
        EXPECT_TRUE(torch::equal(tensor, item.second)) << name;
      }
    }
  }

  other.register_buffer("tiny", torch::ones(2).to(torch::kFloat8_e4m3fn));
  EXPECT_TRUE(
      throws([&] { save_state_dict(loaded, other, file.path); }, "Invalid tiny: .*Float8_e4m3fn.*written"));
  other.register_buffer("sparse", torch::ones(2).to_sparse());
  EXPECT_TRUE(throws([&] { save_state_dict(loaded, other, file.path); }, "Invalid (tiny|sparse)"));
  load_state_dict(optimizer, model, file.path);  // the file is what it was
}

TEST(Checkpoint, AModelThatCannotBeWrittenToIsRefusedFirst) {
  const TemporaryFile file;
  Net model, other;
  AdamW optimizer(model.parameters(), AdamWOptions(0.3)), loaded(other.parameters(), AdamWOptions(0.7));
  save_state_dict(optimizer, model, file.path);
  const Tensor before = copy(other.linear->weight);
  other.norm->running_var.set_data(torch::ones(1).expand({3}));
  EXPECT_TRUE(throws([&] { load_state_dict(loaded, other, file.path); },
                     "\"norm.running_var\" cannot be written to"));
  EXPECT_EQ(loaded.param_groups()[0].options().get_lr(), 0.7);
  EXPECT_TRUE(torch::equal(other.linear->weight, before));
}

TEST(Checkpoint, NeedsAModelThatHasTheParameters) {
  const TemporaryFile file;
  Net model;
  AdamW optimizer({OptimizerParamGroup(model.parameters()), OptimizerParamGroup({parameter()})});
  EXPECT_TRUE(throws([&] { save_state_dict(optimizer, model, file.path); },
                     "Invalid model: it has no parameter that is number 4 of the optimizer"));
}

// A folder that is gone with the test, and a file in it.
struct TemporaryFolder {
  std::filesystem::path folder = testing::TempDir() + "schedulefree_" + std::to_string(getpid()) + "_" +
                                 testing::UnitTest::GetInstance()->current_test_info()->name();
  std::string path = folder / "x.pt";
  TemporaryFolder() { std::filesystem::create_directory(folder); }
  ~TemporaryFolder() { std::filesystem::remove_all(folder); }

  std::string contents() const {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
  }
  std::ptrdiff_t files() const { return std::distance(std::filesystem::directory_iterator(folder), {}); }
};

TEST(Checkpoint, AFileIsOnDiskBeforeItTakesItsName) {
  const TemporaryFolder to;
  Net model;
  const AdamW optimizer(model.parameters());
  std::vector<std::string> calls;
  file_calls = &calls;
  save_state_dict(optimizer, model, to.path);
  file_calls = nullptr;
  ASSERT_EQ(calls.size(), 3U);
  const std::string partial = to.path + "\\.\\d+\\.partial", size = std::to_string(to.contents().size());
  EXPECT_TRUE(std::regex_match(calls[0], std::regex("fsync " + partial + " " + size))) << calls[0];
  EXPECT_TRUE(std::regex_match(calls[1], std::regex("rename " + partial + " " + to.path))) << calls[1];
  EXPECT_EQ(calls[2], "fsync " + to.folder.string() + " 0");
  EXPECT_EQ(to.files(), 1);
}

TEST(Checkpoint, AFailedSaveLeavesTheOldFile) {
  const TemporaryFolder to;
  Net model;
  AdamW optimizer(model.parameters());
  save_state_dict(optimizer, model, to.path);
  const std::string before = to.contents();
  rlimit limit;
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &limit), 0);
  const rlimit small = {before.size() / 2, limit.rlim_max};
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
  const auto refused = throws([&] { save_state_dict(optimizer, model, to.path); }, "writing .*x.pt failed");
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &limit), 0);
  std::signal(SIGXFSZ, handler);
  EXPECT_TRUE(refused);
  EXPECT_EQ(to.contents(), before);
  EXPECT_EQ(to.files(), 1);
}

TEST(Checkpoint, AFileThatCannotBeOpenedIsNamed) {
  Net model;
  AdamW optimizer(model.parameters());
  EXPECT_TRUE(throws([&] { save_state_dict(optimizer, model, "/no/such/directory/x.pt"); },
                     "cannot open /no/such/directory/x.pt."));
  EXPECT_TRUE(throws([&] { load_state_dict(optimizer, model, "/no/such/file.pt"); },
                     "/no/such/file.pt cannot be read"));
}

// What the archive of a file holds, by name.
using Records = std::map<std::string, std::string>;

Records records_of(const std::string& path) {
  Records records;
  caffe2::serialize::PyTorchStreamReader reader(path);
  for (const std::string& name : reader.getAllRecords()) {
    const auto [data, size] = reader.getRecord(name);
    if (name == "data.pkl" || name.rfind("data/", 0) == 0)
      records[name] = std::string(static_cast<const char*>(data.get()), size);
  }
  return records;
}

c10::IValue written_and_read(const std::string& path, const Records& records) {
  {
    caffe2::serialize::PyTorchStreamWriter writer(path);
    for (const auto& [name, content] : records) writer.writeRecord(name, content.data(), content.size());
    writer.writeEndOfFile();
  }
  return detail::PickleReader::read(path);
}

TEST(Checkpoint, ATensorThatReachesBeyondItsStorageIsRefused) {
  const TemporaryFile file;
  detail::write_pickle(file.path, at::ones({3, 5}));
  Records records = records_of(file.path);
  std::string& storage = records.at("data/0");
  ASSERT_EQ(storage.size(), 60U);
  EXPECT_TRUE(torch::equal(written_and_read(file.path, records).toTensor(), at::ones({3, 5})));
  for (const std::size_t bytes : {59, 56, 4, 0}) {
    storage.resize(bytes);
    EXPECT_TRUE(throws([&] { written_and_read(file.path, records); }, "a tensor reaches beyond its storage"));
  }
}

TEST(Checkpoint, ADamagedPickleIsRefusedAndNeverCrashes) {
  const TemporaryFile file;
  Net model;
  AdamW optimizer(model.parameters(), AdamWOptions(0.1));
  optimizer.train();
  take_steps(optimizer, 2);
  save_state_dict(optimizer, model, file.path);
  Records records = records_of(file.path);
  const std::string pickle = records.at("data.pkl");
  ASSERT_GT(pickle.size(), 500U);
  const auto read = [&](const std::string& damaged) {
    records.at("data.pkl") = damaged;
    return written_and_read(file.path, records);
  };
  EXPECT_TRUE(read(pickle).isGenericDict());
  for (std::size_t size = 0; size < pickle.size(); size += 7)
    EXPECT_THROW(read(pickle.substr(0, size)), c10::Error) << size;
  std::mt19937 random(0);
  for (int i = 0; i < 2000; ++i) {
    std::string damaged = pickle;
    damaged[random() % damaged.size()] = static_cast<char>(random());
    try {
      read(damaged);
    } catch (const std::exception&) {  // it may also be a change that does no harm
    }
  }
}

}  // namespace
}  // namespace schedulefree
