// Hyperparameters of the schedule-free optimizers, in the manner of torch::optim's options.
//
//   schedulefree::AdamWOptions(2.5e-3).weight_decay(0.1).warmup_steps(1000)
//
// Names, defaults and meanings are those of the Python classes. A parameter group's own options say what
// differs there; what they do not mention, it has from the optimizer.
#pragma once

#include <ATen/core/ivalue.h>
#include <c10/util/Exception.h>
#include <torch/optim/optimizer.h>

#include <cmath>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <tuple>

namespace schedulefree {

// Where weight decay is evaluated.
enum class DecayAt : std::int64_t { kY = 0, kZ = 1 };

namespace detail {

// A value in a state dict: a number, a string, a tensor, or a tuple, list or dict of values.
using Dict = c10::impl::GenericDict;
inline Dict make_dict() { return Dict(c10::AnyType::get(), c10::AnyType::get()); }

// One hyperparameter.
template <class T>
struct Arg {
  T value;
  bool set = false;  // by its setter, and not merely equal to the default
};

// Declares a hyperparameter and its default, with the accessors of torch's TORCH_ARG. The setter returns
// `Self`.
#define SCHEDULEFREE_ARG(Self, T, name, ...)               \
 public:                                                   \
  Self& name(const T& new_##name) {                        \
    name##_ = {new_##name, true};                          \
    return static_cast<Self&>(*this);                      \
  }                                                        \
  const T& name() const noexcept { return name##_.value; } \
  T& name() noexcept { return name##_.value; }             \
                                                           \
 protected:                                                \
  ::schedulefree::detail::Arg<T> name##_ = {__VA_ARGS__}

using Betas = std::tuple<double, double>;

// All that a step asks of a group's options. Each class of options fills in what it has.
struct Hyperparameters {
  double lr = 0, beta = 0, weight_decay = 0, r = 0, weight_lr_power = 0;
  std::int64_t warmup_steps = 0;
  double beta2 = 0, eps = 0, inner_momentum = 0;  // relatives of Adam
  bool silent_sgd_phase = false;                  // RAdam
  bool maximize = false, per_parameter_steps = false;
  DecayAt decay_at = DecayAt::kY;
  std::optional<double> max_grad_norm;
};

// ---- values as they stand in a state dict -----------------------------------------------------------

inline c10::IValue to_value(double v) { return v; }
inline c10::IValue to_value(std::int64_t v) { return v; }
inline c10::IValue to_value(bool v) { return v; }
inline c10::IValue to_value(DecayAt v) { return std::string(v == DecayAt::kY ? "y" : "z"); }
inline c10::IValue to_value(const std::optional<double>& v) { return v ? c10::IValue(*v) : c10::IValue(); }
inline c10::IValue to_value(const Betas& v) {
  return c10::ivalue::Tuple::create(std::get<0>(v), std::get<1>(v));
}

[[noreturn]] inline void refuse_value(const std::string& name, const c10::IValue& v, const char* expected) {
  C10_THROW_ERROR(ValueError, c10::str("Invalid ", name, " in the state dict: a value of type ", v.tagKind(),
                                       ", expected ", expected));
}

// Python tells neither 1 from 1.0 nor a number from a tensor that holds one.
inline void from_value(const std::string& name, const c10::IValue& v, double& out) {
  if (v.isTensor() && v.toTensor().numel() == 1 && !v.toTensor().is_complex())
    out = v.toTensor().item<double>();
  else if (v.isDouble() || v.isInt())
    out = v.isDouble() ? v.toDouble() : static_cast<double>(v.toInt());
  else
    refuse_value(name, v, "a number");
}

inline void from_value(const std::string& name, const c10::IValue& v, std::int64_t& out) {
  double number = 0;
  if (v.isInt()) {
    out = v.toInt();
    return;
  }
  from_value(name, v, number);
  if (!(std::abs(number) < 9e15) || number != std::floor(number)) refuse_value(name, v, "an integer");
  out = static_cast<std::int64_t>(number);
}

inline void from_value(const std::string& name, const c10::IValue& v, bool& out) {
  if (!v.isBool()) refuse_value(name, v, "a bool");
  out = v.toBool();
}

inline void from_value(const std::string& name, const c10::IValue& v, DecayAt& out) {
  if (!v.isString() || (v.toStringRef() != "y" && v.toStringRef() != "z"))
    refuse_value(name, v, "\"y\" or \"z\"");
  out = v.toStringRef() == "y" ? DecayAt::kY : DecayAt::kZ;
}

inline void from_value(const std::string& name, const c10::IValue& v, std::optional<double>& out) {
  out.reset();
  if (!v.isNone()) from_value(name, v, out.emplace());
}

inline void from_value(const std::string& name, const c10::IValue& v, Betas& out) {
  const bool tuple = v.isTuple() && v.toTupleRef().elements().size() == 2;
  const bool list = v.isList() && v.toListRef().size() == 2;
  if (!tuple && !list) refuse_value(name, v, "two numbers");
  const c10::IValue first = tuple ? v.toTupleRef().elements()[0] : v.toListRef()[0];
  const c10::IValue second = tuple ? v.toTupleRef().elements()[1] : v.toListRef()[1];
  from_value(name, first, std::get<0>(out));
  from_value(name, second, std::get<1>(out));
}

// ---- the classes of options -------------------------------------------------------------------------

// What the optimizer needs of any of them.
struct Options : torch::optim::OptimizerOptions {
  virtual Hyperparameters hyperparameters() const = 0;

  // The class they belong to.
  virtual const char* optimizer() const = 0;

  // Throws c10::ValueError, naming the hyperparameter, its value and its domain, for one outside it.
  // `where` is such as " in parameter group 1".
  void check(const std::string& where) const {
    const Hyperparameters h = hyperparameters();
    const auto require = [&](bool ok, const char* name, double value, const char* domain) {
      TORCH_CHECK_VALUE(ok, "Invalid ", name, where, ": ", value, ", expected ", domain);
    };
    const auto non_negative = [&](const char* name, double value) {
      require(std::isfinite(value) && value >= 0, name, value, "a finite value >= 0");
    };
    non_negative("lr", h.lr);
    non_negative("weight_decay", h.weight_decay);
    non_negative("eps", h.eps);
    require(h.warmup_steps >= 0, "warmup_steps", static_cast<double>(h.warmup_steps), "an integer >= 0");
    require(std::isfinite(h.r), "r", h.r, "a finite value");
    require(std::isfinite(h.weight_lr_power), "weight_lr_power", h.weight_lr_power, "a finite value");
    require(h.beta > 0 && h.beta <= 1, beta_name(), h.beta,
            "a value in (0, 1]: at 0 the parameters would carry nothing of the average");
    require(h.beta2 >= 0 && h.beta2 < 1, "betas[1]", h.beta2, "a value in [0, 1)");
    require(h.inner_momentum >= 0 && h.inner_momentum < 1, "inner_momentum", h.inner_momentum,
            "a value in [0, 1)");
    if (h.max_grad_norm)
      require(*h.max_grad_norm > 0, "max_grad_norm", *h.max_grad_norm, "a value > 0, or none");
    TORCH_CHECK_VALUE(h.decay_at == DecayAt::kY || h.decay_at == DecayAt::kZ, "Invalid decay_at", where, ": ",
                      static_cast<std::int64_t>(h.decay_at), ", expected DecayAt::kY or DecayAt::kZ");
  }

  // Whether `other` belongs to the same optimizer.
  virtual bool same_type(const torch::optim::OptimizerOptions& other) const = 0;

  // Takes from `defaults`, which are of the same type, all that has not been set here.
  virtual void inherit(const Options& defaults) = 0;

  // Adds the hyperparameters to a group's dict, with the keys of the Python class. Those that `schedulefree`
  // does not know stand there only where they, or the `defaults` of the optimizer, are not their class's.
  virtual void to_dict(Dict dict, const Options& defaults) const = 0;

  // Reads the hyperparameters from a group's dict; what it lacks stays. Throws c10::ValueError.
  virtual void from_dict(const Dict& dict) = 0;

  virtual bool has_key(const std::string& key) const = 0;

  // What the interpolation weight is called in messages, and the key that holds it.
  virtual const char* beta_name() const = 0;
  virtual const char* beta_key() const = 0;
};

// Whether a group's dict always holds a hyperparameter, as `schedulefree` does, or only where it is set.
enum class Holds { kAlways, kIfSet };

// Implements them by `Derived::each(f)`, which calls f(key, member, holds) for every hyperparameter, and
// declares those that all optimizers have.
template <class Derived>
struct CommonOptions : Options {
  CommonOptions(double lr, bool set) : lr_{lr, set} {}

  // Learning rate, >= 0.
  SCHEDULEFREE_ARG(Derived, double, lr, 0);
  // Decay coefficient, >= 0.
  SCHEDULEFREE_ARG(Derived, double, weight_decay, 0);
  // Averaging weights grow as step^r.
  SCHEDULEFREE_ARG(Derived, double, r, 0);
  // Averaging weights grow as lr_max^weight_lr_power.
  SCHEDULEFREE_ARG(Derived, double, weight_lr_power, 2);
  // Maximize the objective.
  SCHEDULEFREE_ARG(Derived, bool, maximize, false);
  // Where decay is evaluated.
  SCHEDULEFREE_ARG(Derived, DecayAt, decay_at, DecayAt::kY);
  // Count steps for every parameter on its own, from its first gradient on. Otherwise one that is unfrozen or
  // added late starts with the count of its group, and with a step too large.
  SCHEDULEFREE_ARG(Derived, bool, per_parameter_steps, false);
  // Clip gradients to this norm within the step, as torch::nn::utils::clip_grad_norm_ over all parameters of
  // the optimizer would before it, but without writing them. Infinity only measures.
  SCHEDULEFREE_ARG(Derived, std::optional<double>, max_grad_norm, std::nullopt);

 public:
  std::unique_ptr<torch::optim::OptimizerOptions> clone() const override {
    return std::make_unique<Derived>(self());
  }

  double get_lr() const override { return lr(); }
  void set_lr(const double new_lr) override { lr(new_lr); }

  Hyperparameters hyperparameters() const override {
    Hyperparameters h;
    h.lr = lr();
    h.weight_decay = weight_decay();
    h.r = r();
    h.weight_lr_power = weight_lr_power();
    h.maximize = maximize();
    h.decay_at = decay_at();
    h.per_parameter_steps = per_parameter_steps();
    h.max_grad_norm = max_grad_norm();
    return h;
  }

  bool same_type(const torch::optim::OptimizerOptions& other) const override {
    return dynamic_cast<const Derived*>(&other) != nullptr;
  }

  void inherit(const Options& defaults) override {
    const Derived initial;
    const auto& from = static_cast<const Derived&>(defaults);
    Derived::each([&](const char*, auto member, Holds) {
      auto& own = self().*member;
      if (!own.set && own.value == (initial.*member).value) own.value = (from.*member).value;
    });
  }

  void to_dict(Dict dict, const Options& defaults) const override {
    const Derived initial;
    const auto& of_optimizer = static_cast<const Derived&>(defaults);
    Derived::each([&](const char* key, auto member, Holds holds) {
      const auto& value = (self().*member).value;
      const bool plain = value == (initial.*member).value && value == (of_optimizer.*member).value;
      if (holds == Holds::kAlways || !plain) dict.insert(std::string(key), to_value(value));
    });
  }

  void from_dict(const Dict& dict) override {
    Derived::each([&](const char* key, auto member, Holds) {
      const auto it = dict.find(std::string(key));
      if (it != dict.end()) from_value(key, it->value(), (self().*member).value);
    });
  }

  bool has_key(const std::string& key) const override {
    bool found = false;
    Derived::each([&](const char* own, auto, Holds) { found = found || key == own; });
    return found;
  }

 protected:
  template <class F>
  static void each_common(F&& f) {
    f("lr", &Derived::lr_, Holds::kAlways);
    f("weight_decay", &Derived::weight_decay_, Holds::kAlways);
    f("r", &Derived::r_, Holds::kAlways);
    f("weight_lr_power", &Derived::weight_lr_power_, Holds::kAlways);
    f("maximize", &Derived::maximize_, Holds::kIfSet);
    f("decay_at", &Derived::decay_at_, Holds::kIfSet);
    f("per_parameter_steps", &Derived::per_parameter_steps_, Holds::kIfSet);
    f("max_grad_norm", &Derived::max_grad_norm_, Holds::kIfSet);
  }

 private:
  Derived& self() { return static_cast<Derived&>(*this); }
  const Derived& self() const { return static_cast<const Derived&>(*this); }
};

// What the relatives of Adam have beside them.
template <class Derived>
struct AdamFamilyOptions : CommonOptions<Derived> {
  using betas_t = Betas;

  using CommonOptions<Derived>::CommonOptions;

  // Interpolation weight of y = beta * x + (1 - beta) * z, in (0, 1], and decay rate of the mean squared
  // gradient, in [0, 1).
  SCHEDULEFREE_ARG(Derived, betas_t, betas, {0.9, 0.999});
  // Added to the root of the mean squared gradient, >= 0.
  SCHEDULEFREE_ARG(Derived, double, eps, 1e-8);

 public:
  Hyperparameters hyperparameters() const override {
    Hyperparameters h = CommonOptions<Derived>::hyperparameters();
    std::tie(h.beta, h.beta2) = betas();
    h.eps = eps();
    return h;
  }

  const char* beta_name() const override { return "betas[0]"; }
  const char* beta_key() const override { return "betas"; }

 protected:
  template <class F>
  static void each_common(F&& f) {
    CommonOptions<Derived>::each_common(f);
    f("betas", &Derived::betas_, Holds::kAlways);
    f("eps", &Derived::eps_, Holds::kAlways);
  }
};

}  // namespace detail

// Of schedulefree::SGD.
struct SGDOptions : detail::CommonOptions<SGDOptions> {
  SGDOptions() : CommonOptions(1.0, false) {}
  SGDOptions(double lr) : CommonOptions(lr, true) {}

  // Interpolation weight beta of y = beta * x + (1 - beta) * z, in (0, 1].
  SCHEDULEFREE_ARG(SGDOptions, double, momentum, 0.9);
  // Steps of linear learning-rate warmup, >= 0.
  SCHEDULEFREE_ARG(SGDOptions, std::int64_t, warmup_steps, 0);

 public:
  detail::Hyperparameters hyperparameters() const override {
    detail::Hyperparameters h = CommonOptions::hyperparameters();
    h.beta = momentum();
    h.warmup_steps = warmup_steps();
    return h;
  }

  const char* beta_name() const override { return "momentum"; }
  const char* beta_key() const override { return "momentum"; }

  const char* optimizer() const override { return "SGD"; }

  template <class F>
  static void each(F&& f) {
    each_common(f);
    f("momentum", &SGDOptions::momentum_, detail::Holds::kAlways);
    f("warmup_steps", &SGDOptions::warmup_steps_, detail::Holds::kAlways);
  }
};

// Of schedulefree::AdamW.
struct AdamWOptions : detail::AdamFamilyOptions<AdamWOptions> {
  AdamWOptions() : AdamFamilyOptions(0.0025, false) {}
  AdamWOptions(double lr) : AdamFamilyOptions(lr, true) {}

  // Steps of linear learning-rate warmup, >= 0.
  SCHEDULEFREE_ARG(AdamWOptions, std::int64_t, warmup_steps, 0);
  // Decay rate of a running mean that replaces the gradient in the update, in [0, 1); at 0 none is kept.
  SCHEDULEFREE_ARG(AdamWOptions, double, inner_momentum, 0);

 public:
  detail::Hyperparameters hyperparameters() const override {
    detail::Hyperparameters h = AdamFamilyOptions::hyperparameters();
    h.warmup_steps = warmup_steps();
    h.inner_momentum = inner_momentum();
    return h;
  }

  const char* optimizer() const override { return "AdamW"; }

  template <class F>
  static void each(F&& f) {
    each_common(f);
    f("warmup_steps", &AdamWOptions::warmup_steps_, detail::Holds::kAlways);
    f("inner_momentum", &AdamWOptions::inner_momentum_, detail::Holds::kIfSet);
  }
};

// Of schedulefree::RAdam, which needs no warmup.
struct RAdamOptions : detail::AdamFamilyOptions<RAdamOptions> {
  RAdamOptions() : AdamFamilyOptions(0.0025, false) {}
  RAdamOptions(double lr) : AdamFamilyOptions(lr, true) {}

  // Take no step while the variance of the gradient cannot be estimated; otherwise take SGD steps then.
  SCHEDULEFREE_ARG(RAdamOptions, bool, silent_sgd_phase, true);

 public:
  detail::Hyperparameters hyperparameters() const override {
    detail::Hyperparameters h = AdamFamilyOptions::hyperparameters();
    h.silent_sgd_phase = silent_sgd_phase();
    return h;
  }

  const char* optimizer() const override { return "RAdam"; }

  template <class F>
  static void each(F&& f) {
    each_common(f);
    f("silent_sgd_phase", &RAdamOptions::silent_sgd_phase_, detail::Holds::kAlways);
  }
};

#undef SCHEDULEFREE_ARG

}  // namespace schedulefree
