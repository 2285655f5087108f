// Random sequences of what a program may do with an optimizer, and random damage to the files that it reads.
//
// SCHEDULEFREE_LONG_TESTS=1 runs many more of both; SCHEDULEFREE_FUZZ_SEED chooses others.
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <torch/torch.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <random>
#include <sstream>
#include <thread>

#include "schedulefree_cpp/optim.h"

namespace schedulefree {
namespace {

using torch::Tensor;
using torch::optim::OptimizerParamGroup;

bool is_long() {
  const char* const value = std::getenv("SCHEDULEFREE_LONG_TESTS");
  return value && std::string(value) == "1";
}

std::uint32_t first_seed() {
  const char* const value = std::getenv("SCHEDULEFREE_FUZZ_SEED");
  return value ? static_cast<std::uint32_t>(std::atoi(value)) : 0;
}

struct TemporaryFile {
  std::string path = testing::TempDir() + "schedulefree_fuzz_" + std::to_string(getpid()) + "_" +
                     std::to_string(std::hash<std::thread::id>()(std::this_thread::get_id())) + ".pt";
  ~TemporaryFile() { std::remove(path.c_str()); }
};

// ---- the oracle: float64, storing x, y and z ---------------------------------------------------------

struct Iterate {
  Tensor x, y, z, v, m;
  explicit Iterate(const Tensor& p) {
    x = p.detach().to(torch::kDouble).clone();
    y = x.clone(), z = x.clone(), v = torch::zeros_like(x), m = torch::zeros_like(x);
  }
};

// A group, with the hyperparameters that it has now.
struct Oracle {
  StepKind kind = StepKind::kSgd;
  double lr = 0, beta = 0.9, beta2 = 0.999, eps = 1e-8, decay = 0, warmup = 0, r = 0, inner = 0;
  DecayAt decay_at = DecayAt::kY;
  double weight_sum = 0, lr_max = -1;
  std::int64_t k = 0;
  std::vector<Iterate> iterates;

  double radam_factor() const {
    const double t = static_cast<double>(k + 1), power = std::pow(beta2, t), limit = 2 / (1 - beta2) - 1;
    const double rho = limit - 2 * t * power / (1 - power);
    return rho <= 4 ? 0 : std::sqrt((rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho));
  }

  void step(const std::vector<Tensor>& grads, double clip) {
    if (std::none_of(grads.begin(), grads.end(), [](const Tensor& g) { return g.defined(); })) {
      for (Iterate& it : iterates) it.y = beta * it.x + (1 - beta) * it.z;
      return;
    }
    const double t = static_cast<double>(k + 1);
    double own = static_cast<double>(k) < warmup ? t / warmup : 1;
    const double rectification = kind == StepKind::kRAdam ? radam_factor() : 1;
    const double step_size = lr * own * rectification;
    lr_max = std::max(step_size, lr_max);
    const double weight = std::pow(t, r) * lr_max * lr_max;
    weight_sum += weight;
    const double c = weight_sum > 0 ? weight / weight_sum : 0;
    for (std::size_t i = 0; i < iterates.size(); ++i) {
      Iterate& it = iterates[i];
      if (grads[i].defined()) {
        const Tensor g = grads[i].to(torch::kDouble) * clip;
        Tensor u = g;
        if (kind != StepKind::kSgd) {
          it.v = beta2 * it.v + (1 - beta2) * g * g;
          it.m = inner * it.m + (1 - inner) * g;
          if (rectification > 0)
            u = it.m / (1 - std::pow(inner, t)) / ((it.v / (1 - std::pow(beta2, t))).sqrt() + eps);
        }
        it.z = it.z - step_size * (u + decay * (decay_at == DecayAt::kY ? it.y : it.z));
        it.x = (1 - c) * it.x + c * it.z;
      }
      it.y = beta * it.x + (1 - beta) * it.z;
    }
    ++k;
  }
};

// ---- one sequence ------------------------------------------------------------------------------------

struct Model : torch::nn::Module {
  explicit Model(const std::vector<Tensor>& params) {
    for (std::size_t i = 0; i < params.size(); ++i) register_parameter("p" + std::to_string(i), params[i]);
  }
};

struct Stop : std::exception {};

bool same(const Tensor& a, const Tensor& b) {
  return a.scalar_type() == b.scalar_type() && torch::equal(torch::isnan(a), torch::isnan(b)) &&
         torch::equal(torch::nan_to_num(a), torch::nan_to_num(b));
}

// One optimizer that is looked at, saved and badly used, a twin that only steps, and the oracle.
template <class Class, class Opts>
struct Sequence {
  std::mt19937 random;
  torch::Dtype dtype = torch::kFloat;
  Opts defaults;
  std::vector<std::vector<Tensor>> params, others;  // of each group
  std::unique_ptr<Class> one, twin;
  std::vector<Oracle> oracle;
  Nonfinite policy = Nonfinite::kPropagate;

  int draw(int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); }

  Tensor fresh(at::IntArrayRef sizes) {
    return torch::randn(sizes, at::detail::createCPUGenerator(random())).to(dtype).set_requires_grad(true);
  }

  static Tensor copy(const Tensor& p) { return p.detach().clone().set_requires_grad(p.requires_grad()); }

  static Opts& options(Class& optimizer, std::size_t group) {
    return static_cast<Opts&>(optimizer.param_groups()[group].options());
  }

  std::unique_ptr<Class> make(const std::vector<std::vector<Tensor>>& of_groups) {
    std::vector<OptimizerParamGroup> groups;
    for (const std::vector<Tensor>& own : of_groups) groups.emplace_back(own);
    return std::make_unique<Class>(groups, defaults);
  }

  Oracle oracle_of(std::size_t group) {
    const detail::Hyperparameters h = options(*one, group).hyperparameters();
    Oracle result;
    result.kind = h.rule.kind, result.lr = h.inputs.lr, result.beta = h.rule.beta_next;
    result.beta2 = h.rule.adam.beta2, result.eps = h.rule.adam.eps, result.decay = h.inputs.weight_decay;
    result.warmup = h.rule.warmup_steps, result.r = h.rule.r, result.inner = h.rule.adam.inner_momentum;
    result.decay_at = h.decay_at;
    for (const Tensor& p : params[group]) result.iterates.emplace_back(p);
    return result;
  }

  explicit Sequence(std::uint32_t seed) : random(seed) {
    constexpr torch::Dtype kDtypes[] = {torch::kFloat, torch::kDouble, torch::kBFloat16, torch::kHalf};
    dtype = kDtypes[draw(4)];
    policy = static_cast<Nonfinite>(draw(3));
    defaults.lr(0.05).weight_decay(0.05 * draw(2)).r(0.5 * draw(2)).nonfinite(policy);
    if (draw(2)) defaults.decay_at(DecayAt::kZ);
    if constexpr (!std::is_same_v<Opts, RAdamOptions>) defaults.warmup_steps(3 * draw(2));
    if constexpr (std::is_same_v<Opts, AdamWOptions>) defaults.inner_momentum(0.6 * draw(2));
    params = {{fresh({3, 5}), fresh({})}, {fresh({33})}};
    for (const auto& own : params) {
      others.emplace_back();
      for (const Tensor& p : own) others.back().push_back(copy(p));
    }
    one = make(params), twin = make(others);
    one->train(), twin->train();
    for (std::size_t i = 0; i < params.size(); ++i) oracle.push_back(oracle_of(i));
  }

  std::vector<Tensor> snapshot() const {
    std::vector<Tensor> all;
    for (const auto& own : params)
      for (const Tensor& p : own) {
        all.push_back(p.detach().clone());
        const auto it = one->state().find(detail::key_of(p));
        if (it == one->state().end()) continue;
        for (const auto& [key, t] : static_cast<detail::ParamState&>(*it->second).tensors())
          if (t->defined()) all.push_back(t->clone());
      }
    return all;
  }

  void expect_unchanged(const std::vector<Tensor>& before) const {
    const std::vector<Tensor> now = snapshot();
    ASSERT_EQ(now.size(), before.size());
    for (std::size_t i = 0; i < now.size(); ++i) ASSERT_TRUE(same(now[i], before[i])) << i;
  }

  void draw_gradients(bool some_rest, double scale) {
    const at::Generator generator = at::detail::createCPUGenerator(random());
    for (std::size_t i = 0; i < params.size(); ++i)
      for (std::size_t j = 0; j < params[i].size(); ++j) {
        const Tensor grad = (scale * torch::randn(params[i][j].sizes(), generator)).to(dtype);
        const bool rests = !params[i][j].requires_grad() || (some_rest && draw(3) == 0);
        params[i][j].mutable_grad() = rests ? Tensor() : grad;
        others[i][j].mutable_grad() = rests ? Tensor() : grad.clone();
      }
  }

  template <class F>
  void refused(F&& f) {
    const std::vector<Tensor> before = snapshot();
    EXPECT_ANY_THROW(f());
    expect_unchanged(before);
  }

  void take_step() {
    constexpr double kScales[] = {1, 1, 0.01, 0};
    draw_gradients(draw(3) == 0, kScales[draw(4)]);
    if (!one->is_training()) return refused([&] { one->step(); });
    double squares = 0;
    for (const auto& own : params)
      for (const Tensor& p : own)
        if (p.grad().defined()) squares += p.grad().to(torch::kDouble).square().sum().template item<double>();
    for (std::size_t i = 0; i < params.size(); ++i) {
      const std::optional<double> limit = options(*one, i).max_grad_norm();
      double clip = 1;
      if (limit && std::isfinite(*limit)) clip = std::min(1.0, *limit / (std::sqrt(squares) + 1e-6));
      std::vector<Tensor> grads;
      for (const Tensor& p : params[i]) grads.push_back(p.grad());
      oracle[i].step(grads, clip);
    }
    one->step(), twin->step();
    check_oracle();
    if (dtype == torch::kHalf) resync();
  }

  void check_oracle() {
    const double unit = dtype == torch::kFloat      ? 0x1p-17
                        : dtype == torch::kDouble   ? 0x1p-44
                        : dtype == torch::kBFloat16 ? 0x1p-7
                                                    : 0x1p-9;
    for (std::size_t i = 0; i < params.size(); ++i)
      for (std::size_t j = 0; j < params[i].size(); ++j) {
        const Iterate& it = oracle[i].iterates[j];
        const double size = std::max({1.0, it.x.abs().max().item<double>(), it.z.abs().max().item<double>()});
        const double error = (params[i][j].detach().to(torch::kDouble) - it.y).abs().max().item<double>();
        ASSERT_LE(error, unit * size) << "group " << i << " parameter " << j << " " << dtype;
      }
  }

  // float16 has no low half: the oracle goes on from the y that was stored.
  void resync() {
    for (std::size_t i = 0; i < params.size(); ++i)
      for (std::size_t j = 0; j < params[i].size(); ++j) {
        Iterate& it = oracle[i].iterates[j];
        const double beta = oracle[i].beta;
        it.y = params[i][j].detach().to(torch::kDouble).clone();
        it.x = (it.y - (1 - beta) * it.z) / beta;
      }
  }

  void step_without_numbers() {
    draw_gradients(false, 1);
    if (!one->is_training() || !params[0][0].grad().defined()) return;
    params[0][0].mutable_grad().view({-1})[draw(15)] =
        draw(2) ? std::numeric_limits<double>::infinity() : std::numeric_limits<double>::quiet_NaN();
    const std::vector<Tensor> before = snapshot();
    if (policy == Nonfinite::kRaise) return refused([&] { one->step(); });
    if (policy == Nonfinite::kPropagate) return;
    one->step();
    expect_unchanged(before);
  }

  void copy_through_a_file() {
    const TemporaryFile file;
    std::vector<std::vector<Tensor>> own;
    std::vector<Tensor> all, old;
    for (const auto& group : params) {
      own.emplace_back();
      for (const Tensor& p : group) {
        own.back().push_back(copy(p)), all.push_back(own.back().back()), old.push_back(p);
      }
    }
    one->train(draw(2) == 0);
    Model from(old);
    auto other = make(own);
    if (draw(2)) {
      Model to(all);
      save_state_dict(*one, from, file.path);
      load_state_dict(*other, to, file.path);
    } else {
      const torch::NoGradGuard no_grad;
      for (std::size_t i = 0; i < all.size(); ++i) all[i].copy_(old[i]);
      torch::save(*one, file.path);
      torch::load(*other, file.path);
    }
    one = std::move(other), params = std::move(own);
  }

  void move() {
    const auto i = static_cast<std::size_t>(draw(static_cast<int>(params.size())));
    constexpr double kValues[] = {0.3, 0.7, 0.9, 1.0};
    const double value = kValues[draw(4)];
    const int what = draw(4);
    for (Class* optimizer : {one.get(), twin.get()}) {
      Opts& own = options(*optimizer, i);
      if (what == 0) own.lr(oracle[i].lr = 0.1 * value);
      if (what == 1) own.weight_decay(oracle[i].decay = value);
      if (what == 2) own.max_grad_norm(value < 0.5 ? std::optional<double>() : 4 * value);
      if (what != 3) continue;
      oracle[i].beta = value;
      if constexpr (std::is_same_v<Opts, SGDOptions>)
        own.momentum(value);
      else
        own.betas({value, oracle[i].beta2});
    }
  }

  void move_outside() {
    Opts& own = options(*one, params.size() - 1);
    const double before = own.lr();
    own.lr(draw(2) ? -1 : std::numeric_limits<double>::quiet_NaN());
    draw_gradients(false, 1);
    refused([&] { one->step(); });
    own.lr(before);
  }

  void share_memory() {
    draw_gradients(false, 1);
    Tensor& p = params[0][0];
    if (!one->is_training() || !p.requires_grad()) return;
    const std::vector<Tensor> before = snapshot();
    const Tensor data = p.detach();
    p.set_data(data.slice(0, 0, 1).expand({3, 5}));
    EXPECT_ANY_THROW(one->step());
    p.set_data(data);
    expect_unchanged(before);
  }

  void add_group() {
    if (params.size() == 4) return;
    params.push_back({fresh({4}), fresh({2, 3})});
    others.push_back({copy(params.back()[0]), copy(params.back()[1])});
    one->add_param_group(OptimizerParamGroup(params.back()));
    twin->add_param_group(OptimizerParamGroup(others.back()));
    oracle.push_back(oracle_of(params.size() - 1));
  }

  void freeze() {
    const auto i = static_cast<std::size_t>(draw(static_cast<int>(params.size())));
    const auto j = static_cast<std::size_t>(draw(static_cast<int>(params[i].size())));
    const bool needs = draw(2) == 0;
    for (const Tensor& p : {params[i][j], others[i][j]}) p.set_requires_grad(needs);
  }

  void act() {
    switch (draw(16)) {
      case 0:
        return one->eval();
      case 1:
      case 2:
        return one->train();
      case 3: {
        const std::vector<Tensor> before = snapshot();
        {
          const Averaged averaged(*one);
        }
        return expect_unchanged(before);
      }
      case 4:
        return copy_through_a_file();
      case 5:
      case 6:
        return move();
      case 7:
        return move_outside();
      case 8:
        return add_group();
      case 9:
        return freeze();
      case 10:
        return step_without_numbers();
      case 11:
        return share_memory();
      case 12:
        if (one->is_training()) refused([&] { one->step([]() -> Tensor { throw Stop(); }); });
        return;
      default:
        return take_step();
    }
  }

  void run(int actions) {
    for (int i = 0; i < actions && !testing::Test::HasFailure(); ++i) {
      act();
      if (!one->is_training()) continue;
      for (std::size_t group = 0; group < params.size(); ++group)
        for (std::size_t j = 0; j < params[group].size(); ++j)
          ASSERT_TRUE(same(params[group][j], others[group][j])) << "action " << i;
    }
  }
};

template <class Class, class Opts>
void run_sequences() {
  const std::uint32_t count = is_long() ? 7000 : 100;
  for (std::uint32_t i = 0; i < count; ++i) {
    SCOPED_TRACE("SCHEDULEFREE_FUZZ_SEED=" + std::to_string(first_seed() + i));
    Sequence<Class, Opts>(first_seed() + i).run(25);
    if (testing::Test::HasFailure()) return;
  }
}

TEST(Sequences, HaveTheBitsOfAPlainRunSgd) { run_sequences<SGD, SGDOptions>(); }
TEST(Sequences, HaveTheBitsOfAPlainRunAdamW) { run_sequences<AdamW, AdamWOptions>(); }
TEST(Sequences, HaveTheBitsOfAPlainRunRAdam) { run_sequences<RAdam, RAdamOptions>(); }

// ---- threads -------------------------------------------------------------------------------------------

TEST(Threads, OptimizersInThreadsDoNotMeet) {
  constexpr std::uint32_t kThreads = 4;
  using OfAdamW = Sequence<AdamW, AdamWOptions>;
  std::vector<std::vector<Tensor>> together(kThreads);
  std::vector<std::thread> threads;
  for (std::uint32_t i = 0; i < kThreads; ++i)
    threads.emplace_back([i, &together] {
      OfAdamW sequence(i);
      sequence.run(30);
      together[i] = sequence.snapshot();
    });
  for (std::thread& thread : threads) thread.join();
  for (std::uint32_t i = 0; i < kThreads; ++i) {
    OfAdamW sequence(i);
    sequence.run(30);
    const std::vector<Tensor> alone = sequence.snapshot();
    ASSERT_EQ(alone.size(), together[i].size());
    for (std::size_t j = 0; j < alone.size(); ++j) EXPECT_TRUE(same(alone[j], together[i][j]));
  }
}

// ---- damaged files -----------------------------------------------------------------------------------

std::string contents(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream all;
  all << file.rdbuf();
  return all.str();
}

// The CRC-32 of zip files.
std::uint32_t checksum(const std::string& bytes) {
  std::uint32_t crc = ~0U;
  for (const char byte : bytes) {
    crc ^= static_cast<std::uint8_t>(byte);
    for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320U : 0U);
  }
  return ~crc;
}

// Has a zip file whose entry "data.pkl" was changed in place say the right checksum, so that readers go on.
void mend(std::string& file, std::size_t begin, std::size_t size) {
  const std::uint32_t crc = checksum(file.substr(begin, size));
  for (std::size_t at = file.find("PK\x01\x02"); at != std::string::npos;
       at = file.find("PK\x01\x02", at + 1)) {
    if (at + 46 < file.size() && file.compare(at + 46, 64, "") > 0 &&
        file.substr(at + 46, 64).find("data.pkl") != std::string::npos) {
      std::memcpy(&file[at + 16], &crc, sizeof(crc));
      return;
    }
  }
}

TEST(Files, DamageIsRefusedOrChangesValuesOnly) {
  torch::manual_seed(0);
  const std::vector<Tensor> params = {torch::randn({4, 3}).set_requires_grad(true),
                                      torch::randn({5}).to(torch::kBFloat16).set_requires_grad(true)};
  Model model(params);
  AdamW optimizer({params}, AdamWOptions(0.1).inner_momentum(0.5));
  optimizer.train();
  for (int i = 0; i < 3; ++i) {
    for (const Tensor& p : params) p.mutable_grad() = torch::randn(p.sizes()).to(p.scalar_type());
    optimizer.step();
  }
  const TemporaryFile file;
  save_state_dict(optimizer, model, file.path);
  const std::string whole = contents(file.path);
  const std::size_t name = whole.find("data.pkl");
  ASSERT_NE(name, std::string::npos);
  const std::size_t begin = whole.find("\x80\x02", name), end = whole.find("PK\x03\x04", begin);
  ASSERT_LT(begin, end);
  std::size_t last = end;
  while (last > begin && whole[last - 1] != '.') --last;  // behind it is padding
  rusage usage;
  getrusage(RUSAGE_SELF, &usage);
  const long before_kilobytes = usage.ru_maxrss;

  std::mt19937 random(first_seed());
  const auto draw = [&](std::size_t n) { return random() % n; };
  const int count = is_long() ? 200000 : 3000;
  int refused = 0, read = 0;
  for (int i = 0; i < count; ++i) {
    SCOPED_TRACE("damage " + std::to_string(i));
    std::string damaged = whole;
    const bool of_the_pickle = draw(4) != 0;
    for (std::size_t n = 1 + draw(3); n > 0; --n) {
      const std::size_t at = of_the_pickle ? begin + draw(last - begin) : draw(damaged.size());
      switch (draw(4)) {
        case 0:
          damaged[at] = static_cast<char>(random());
          break;
        case 1:
          damaged[at] = static_cast<char>(damaged[at] ^ (1 << draw(8)));
          break;
        case 2:  // an opcode of the pickle in another's place
          damaged[at] = ".(N\x88\x89JKM\x8aGX}su]ae)\x85\x86\x87tqrhjcQRb"[draw(30)];
          break;
        default:
          if (of_the_pickle)
            damaged[at] = whole[begin + draw(last - begin)];
          else
            damaged.resize(at + 1), n = 1;
      }
    }
    if (of_the_pickle) mend(damaged, begin, last - begin);
    std::ofstream(file.path, std::ios::binary) << damaged;
    std::vector<Tensor> own = {torch::ones({4, 3}).set_requires_grad(true),
                               torch::ones({5}, torch::kBFloat16).set_requires_grad(true)};
    Model to(own);
    AdamW other({own}, AdamWOptions(0.1).inner_momentum(0.5));
    try {
      load_state_dict(other, to, file.path);
      other.train(!other.is_training());
      ++read;
    } catch (const c10::Error&) {
      ++refused;
      if (!other.state().empty()) continue;  // read, and then of the wrong mode
      ASSERT_TRUE(torch::equal(own[0], torch::ones({4, 3})));
      ASSERT_TRUE(torch::equal(own[1], torch::ones({5}, torch::kBFloat16)));
    }
  }
  EXPECT_GT(refused, count / 10);
  EXPECT_GT(read, 0);
  getrusage(RUSAGE_SELF, &usage);
  EXPECT_LT(usage.ru_maxrss - before_kilobytes, 500000) << "kilobytes more than before";
  std::printf("%d damaged files: %d refused, %d read\n", count, refused, read);
}

}  // namespace
}  // namespace schedulefree
