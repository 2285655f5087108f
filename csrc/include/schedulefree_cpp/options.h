// Hyperparameters of the schedule-free optimizers, in the manner of torch::optim's options.
//
//   schedulefree::AdamWOptions(2.5e-3).weight_decay(0.1).warmup_steps(1000)
//
// Names, defaults and meanings are those of the Python classes. What a group's options do not mention, the
// group has from the optimizer.
#pragma once

#include <ATen/core/ivalue.h>
#include <c10/util/Exception.h>
#include <torch/optim/optimizer.h>

#include <cmath>
#include <cstdint>
#include <iterator>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "formats.h"
#include "schedule.h"
#include "update_math.h"

namespace schedulefree {

/// What a step does where a gradient is not finite. One choice for all groups.
enum class Nonfinite : std::int64_t {
  kPropagate = 0,  ///< Takes it, as torch does.
  kSkip = 1,       ///< Leaves everything as it was. Measures all gradients, as does kRaise.
  kRaise = 2,      ///< Leaves everything as it was and throws, naming the parameter.
};

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
  Self& name(const T& new_##name) {                        \
    name##_ = {new_##name, true};                          \
    return static_cast<Self&>(*this);                      \
  }                                                        \
  const T& name() const noexcept { return name##_.value; } \
  T& name() noexcept { return name##_.value; }             \
  ::schedulefree::detail::Arg<T> name##_ = {__VA_ARGS__}

using Betas = std::tuple<double, double>;

// All that a step asks of a group's options. The beta that built y is for the optimizer to add.
struct Hyperparameters {
  StepRule rule;
  StepInputs inputs;
  DecayAt decay_at = DecayAt::kY;
  Bits bits;
  std::string rounding;
  Nonfinite nonfinite = Nonfinite::kPropagate;
};

// Calls f(), whose std::invalid_argument becomes c10::ValueError, with `where` at its end.
template <class F>
auto with_value_error(F&& f, const std::string& where = "") {
  try {
    return f();
  } catch (const std::invalid_argument& error) {
    C10_THROW_ERROR(ValueError, error.what() + where);
  }
}

// ---- values as they stand in a state dict -----------------------------------------------------------

inline c10::IValue to_value(double v) { return v; }
inline c10::IValue to_value(bool v) { return v; }
inline c10::IValue to_value(DecayAt v) { return std::string(v == DecayAt::kY ? "y" : "z"); }
inline c10::IValue to_value(std::int64_t v) { return v; }
inline c10::IValue to_value(const std::string& v) { return v; }
inline constexpr const char* kNonfiniteNames[] = {"propagate", "skip", "raise"};
inline c10::IValue to_value(Nonfinite v) { return std::string(kNonfiniteNames[static_cast<std::size_t>(v)]); }
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

inline void from_value(const std::string& name, const c10::IValue& v, std::string& out) {
  if (!v.isString()) refuse_value(name, v, "a string");
  out = v.toStringRef();
}

inline void from_value(const std::string& name, const c10::IValue& v, Nonfinite& out) {
  for (std::size_t i = 0; v.isString() && i < std::size(kNonfiniteNames); ++i)
    if (v.toStringRef() == kNonfiniteNames[i]) {
      out = static_cast<Nonfinite>(i);
      return;
    }
  refuse_value(name, v, "\"propagate\", \"skip\" or \"raise\"");
}

inline void from_value(const std::string& name, const c10::IValue& v, std::optional<double>& out) {
  out.reset();
  if (!v.isNone()) from_value(name, v, out.emplace());
}

// A list or a tuple, which Python users mix.
inline void from_value(const std::string& name, const c10::IValue& v, std::vector<c10::IValue>& out) {
  if (!v.isList() && !v.isTuple()) refuse_value(name, v, "a list");
  const auto elements = v.isList() ? v.toListRef() : c10::ArrayRef<c10::IValue>(v.toTupleRef().elements());
  out.assign(elements.begin(), elements.end());
}

inline void from_value(const std::string& name, const c10::IValue& v, Betas& out) {
  std::vector<c10::IValue> pair;
  from_value(name, v, pair);
  if (pair.size() != 2) refuse_value(name, v, "two numbers");
  from_value(name, pair[0], std::get<0>(out));
  from_value(name, pair[1], std::get<1>(out));
}

// Moves an entry, if there is one, out of a dict.
template <class T>
void take(const Dict& dict, const std::string& key, T& out) {
  const auto it = dict.find(key);
  if (it == dict.end()) return;
  from_value(key, it->value(), out);
  dict.erase(it);
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
    const StepRule& rule = h.rule;
    TORCH_CHECK_VALUE(h.bits.state == 32 || h.bits.state == 24, "Invalid state_bits", where, ": ",
                      h.bits.state, ", expected 32 or 24");
    TORCH_CHECK_VALUE(h.bits.moment == 32 || h.bits.moment == 8, "Invalid exp_avg_sq_bits", where, ": ",
                      h.bits.moment, ", expected 32 or 8");
    TORCH_CHECK_VALUE(h.rounding == "nearest" || h.rounding == "stochastic", "Invalid rounding", where, ": ",
                      h.rounding, ", expected nearest or stochastic");
    with_value_error([&] {
      check_hyperparameter("lr", h.inputs.lr, where);
      check_hyperparameter("weight_decay", h.inputs.weight_decay, where);
      check_hyperparameter(rule.kind == StepKind::kSgd ? "momentum" : "betas[0]", rule.beta_next, where);
      check_numbers(rule, where);
    });
  }

  // Takes from `defaults`, which are of the same type, all that has not been set here.
  virtual void inherit(const Options& defaults) = 0;

  // Adds the hyperparameters to a group's dict, with the keys of the Python class. Those that `schedulefree`
  // does not know stand there only where they, or the `defaults` of the optimizer, are not their class's.
  virtual void to_dict(Dict dict, const Options& defaults) const = 0;

  // Takes over how a group keeps its state, which no dict tells.
  virtual void keep_layout_of(const Options& group) = 0;

  // Moves the hyperparameters out of a group's dict; what it lacks stays. Throws c10::ValueError.
  virtual void take_from(Dict dict) = 0;
};

// Whether a group's dict always holds a hyperparameter, as `schedulefree` does, only where it is set, or
// never, since it tells how an optimizer keeps its state.
enum class Holds { kAlways, kIfSet, kNever };

// Implements them by `Derived::each(f)`, which calls f(key, member, holds) for every hyperparameter, and
// declares those that all optimizers have.
template <class Derived>
struct CommonOptions : Options {
  CommonOptions(double lr, bool set) : lr_{lr, set} {}

  /// Learning rate, >= 0.
  SCHEDULEFREE_ARG(Derived, double, lr, 0);
  /// Decay coefficient, >= 0.
  SCHEDULEFREE_ARG(Derived, double, weight_decay, defaults::weight_decay);
  /// Averaging weights grow as step^r.
  SCHEDULEFREE_ARG(Derived, double, r, defaults::r);
  /// Averaging weights grow as lr_max^weight_lr_power.
  SCHEDULEFREE_ARG(Derived, double, weight_lr_power, defaults::weight_lr_power);
  /// Above 0, the weight c of the new z in the average becomes min(1, c * (1 - beta) * decoupling_c), so that
  /// beta does not set how far x, as an average of y, reaches back (arXiv 2507.09846).
  SCHEDULEFREE_ARG(Derived, double, decoupling_c, defaults::decoupling_c);
  /// Above 0, the weight of the new z in the average is this constant, at most 1: Generalized Primal
  /// Averaging (arXiv 2512.17131).
  SCHEDULEFREE_ARG(Derived, double, averaging_weight, defaults::averaging_weight);
  /// Maximize the objective.
  SCHEDULEFREE_ARG(Derived, bool, maximize, false);
  /// Where decay is evaluated.
  SCHEDULEFREE_ARG(Derived, DecayAt, decay_at, DecayAt::kY);
  /// Clip gradients to this norm within the step, as torch::nn::utils::clip_grad_norm_ over all parameters of
  /// the optimizer would before it, but without writing them. Infinity only measures.
  SCHEDULEFREE_ARG(Derived, std::optional<double>, max_grad_norm, std::nullopt);
  /// 24 keeps a bfloat16 parameter and its z in 24 bits each, of which 16 are significant; 32 keeps all that
  /// float32 has.
  SCHEDULEFREE_ARG(Derived, std::int64_t, state_bits, 32);
  /// How 24 bits are rounded: "nearest", or "stochastic", by numbers that depend on the step and the element
  /// alone.
  SCHEDULEFREE_ARG(Derived, std::string, rounding, "nearest");
  /// What a step does where a gradient is not finite.
  SCHEDULEFREE_ARG(Derived, Nonfinite, nonfinite, Nonfinite::kPropagate);

  std::unique_ptr<torch::optim::OptimizerOptions> clone() const override {
    return std::make_unique<Derived>(self());
  }

  double get_lr() const override { return lr(); }
  void set_lr(const double new_lr) override { lr(new_lr); }

  Hyperparameters hyperparameters() const override {
    Hyperparameters h;
    h.inputs.lr = lr();
    h.inputs.weight_decay = weight_decay();
    h.decay_at = decay_at();
    h.nonfinite = nonfinite();
    h.rule.r = r();
    h.rule.weight_lr_power = weight_lr_power();
    h.rule.decoupling_c = decoupling_c();
    h.rule.averaging_weight = averaging_weight();
    h.rule.maximize = maximize();
    h.rule.clips = max_grad_norm().has_value();
    h.rule.max_grad_norm = max_grad_norm().value_or(0);
    h.bits.state = state_bits();
    h.rounding = rounding();
    h.rule.stochastic = rounding() == "stochastic";
    return h;
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
      if (holds == Holds::kNever) return;
      if (holds == Holds::kAlways || !plain) dict.insert(std::string(key), to_value(value));
    });
  }

  void take_from(Dict dict) override {
    Derived::each([&](const char* key, auto member, Holds holds) {
      auto value = (self().*member).value;
      take(dict, key, value);  // out of the dict in any case
      if (holds != Holds::kNever) (self().*member).value = value;
    });
  }

  void keep_layout_of(const Options& group) override {
    const auto& from = static_cast<const Derived&>(group);
    Derived::each([&](const char*, auto member, Holds holds) {
      if (holds == Holds::kNever) (self().*member).value = (from.*member).value;
    });
  }

  template <class F>
  static void each_common(F&& f) {
    f("lr", &Derived::lr_, Holds::kAlways);
    f("weight_decay", &Derived::weight_decay_, Holds::kAlways);
    f("r", &Derived::r_, Holds::kAlways);
    f("weight_lr_power", &Derived::weight_lr_power_, Holds::kAlways);
    f("decoupling_c", &Derived::decoupling_c_, Holds::kIfSet);
    f("averaging_weight", &Derived::averaging_weight_, Holds::kIfSet);
    f("maximize", &Derived::maximize_, Holds::kIfSet);
    f("decay_at", &Derived::decay_at_, Holds::kIfSet);
    f("max_grad_norm", &Derived::max_grad_norm_, Holds::kIfSet);
    f("state_bits", &Derived::state_bits_, Holds::kNever);
    f("rounding", &Derived::rounding_, Holds::kIfSet);
    f("nonfinite", &Derived::nonfinite_, Holds::kIfSet);
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

  /// Interpolation weight of y = beta * x + (1 - beta) * z, in (0, 1], and decay rate of the mean squared
  /// gradient, in [0, 1).
  SCHEDULEFREE_ARG(Derived, betas_t, betas, {defaults::beta, defaults::beta2});
  /// Added to the root of the mean squared gradient, >= 0.
  SCHEDULEFREE_ARG(Derived, double, eps, defaults::eps);
  /// 8 keeps the mean squared gradient in 8 bits and a scale for 128 elements; 32 keeps it whole.
  SCHEDULEFREE_ARG(Derived, std::int64_t, exp_avg_sq_bits, 32);

  Hyperparameters hyperparameters() const override {
    Hyperparameters h = CommonOptions<Derived>::hyperparameters();
    std::tie(h.rule.beta_next, h.rule.adam.beta2) = betas();
    h.rule.adam.eps = eps();
    h.bits.moment = exp_avg_sq_bits();
    return h;
  }

  template <class F>
  static void each_common(F&& f) {
    CommonOptions<Derived>::each_common(f);
    f("betas", &Derived::betas_, Holds::kAlways);
    f("eps", &Derived::eps_, Holds::kAlways);
    f("exp_avg_sq_bits", &Derived::exp_avg_sq_bits_, Holds::kNever);
  }
};

}  // namespace detail

/// Hyperparameters of schedulefree::SGD.
struct SGDOptions : detail::CommonOptions<SGDOptions> {
  /// Defaults, which give way to those of the optimizer where they stand in a group.
  SGDOptions() : CommonOptions(defaults::sgd_lr, false) {}
  /// With the learning rate set.
  SGDOptions(double lr) : CommonOptions(lr, true) {}

  /// Interpolation weight beta of y = beta * x + (1 - beta) * z, in (0, 1].
  SCHEDULEFREE_ARG(SGDOptions, double, momentum, defaults::beta);
  /// Steps of linear learning-rate warmup, >= 0, which need not be an integer.
  SCHEDULEFREE_ARG(SGDOptions, double, warmup_steps, defaults::warmup_steps);

  detail::Hyperparameters hyperparameters() const override {
    detail::Hyperparameters h = CommonOptions::hyperparameters();
    h.rule.kind = StepKind::kSgd;
    h.rule.beta_next = momentum();
    h.rule.warmup_steps = warmup_steps();
    return h;
  }

  const char* optimizer() const override { return "SGD"; }

  template <class F>
  static void each(F&& f) {
    each_common(f);
    f("momentum", &SGDOptions::momentum_, detail::Holds::kAlways);
    f("warmup_steps", &SGDOptions::warmup_steps_, detail::Holds::kAlways);
  }
};

/// Hyperparameters of schedulefree::AdamW.
struct AdamWOptions : detail::AdamFamilyOptions<AdamWOptions> {
  /// Defaults, which give way to those of the optimizer where they stand in a group.
  AdamWOptions() : AdamFamilyOptions(defaults::adam_lr, false) {}
  /// With the learning rate set.
  AdamWOptions(double lr) : AdamFamilyOptions(lr, true) {}

  /// Steps of linear learning-rate warmup, >= 0, which need not be an integer.
  SCHEDULEFREE_ARG(AdamWOptions, double, warmup_steps, defaults::warmup_steps);
  /// Decay rate of a running mean that replaces the gradient in the update, in [0, 1); at 0 none is kept.
  SCHEDULEFREE_ARG(AdamWOptions, double, inner_momentum, defaults::inner_momentum);

  detail::Hyperparameters hyperparameters() const override {
    detail::Hyperparameters h = AdamFamilyOptions::hyperparameters();
    h.rule.kind = StepKind::kAdamW;
    h.rule.warmup_steps = warmup_steps();
    h.rule.adam.inner_momentum = inner_momentum();
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

/// Hyperparameters of schedulefree::RAdam, which needs no warmup.
struct RAdamOptions : detail::AdamFamilyOptions<RAdamOptions> {
  /// Defaults, which give way to those of the optimizer where they stand in a group.
  RAdamOptions() : AdamFamilyOptions(defaults::adam_lr, false) {}
  /// With the learning rate set.
  RAdamOptions(double lr) : AdamFamilyOptions(lr, true) {}

  /// Take no step while the variance of the gradient cannot be estimated; otherwise take SGD steps then.
  SCHEDULEFREE_ARG(RAdamOptions, bool, silent_sgd_phase, true);

  detail::Hyperparameters hyperparameters() const override {
    detail::Hyperparameters h = AdamFamilyOptions::hyperparameters();
    h.rule.kind = StepKind::kRAdam;
    h.rule.adam.silent_sgd_phase = silent_sgd_phase();
    return h;
  }

  const char* optimizer() const override { return "RAdam"; }

  template <class F>
  static void each(F&& f) {
    each_common(f);
    f("silent_sgd_phase", &RAdamOptions::silent_sgd_phase_, detail::Holds::kAlways);
  }
};

/// Hyperparameters of schedulefree::Wrapper, beside those of its base optimizer.
struct WrapperOptions {
  /// Interpolation weight beta of y = beta * x + (1 - beta) * z, in (0, 1].
  SCHEDULEFREE_ARG(WrapperOptions, double, momentum, defaults::beta);
  /// Decay coefficient, evaluated at y, >= 0. The base optimizer's own decay is evaluated at z.
  SCHEDULEFREE_ARG(WrapperOptions, double, weight_decay_at_y, defaults::weight_decay);
  /// Averaging weights grow as step^r.
  SCHEDULEFREE_ARG(WrapperOptions, double, r, defaults::r);
  /// Averaging weights grow as lr_max^weight_lr_power.
  SCHEDULEFREE_ARG(WrapperOptions, double, weight_lr_power, defaults::weight_lr_power);
  /// Clip gradients to this norm, in place, as torch::nn::utils::clip_grad_norm_ over all parameters does.
  /// Infinity only measures.
  SCHEDULEFREE_ARG(WrapperOptions, std::optional<double>, max_grad_norm, std::nullopt);
  /// What a step does where a gradient is not finite. Of a closure that the base optimizer calls several
  /// times, the first call decides.
  SCHEDULEFREE_ARG(WrapperOptions, Nonfinite, nonfinite, Nonfinite::kPropagate);

  template <class F>
  static void each(F&& f) {
    f("sf_momentum", &WrapperOptions::momentum_);
    f("sf_weight_decay_at_y", &WrapperOptions::weight_decay_at_y_);
    f("sf_weight_lr_power", &WrapperOptions::weight_lr_power_);
    f("sf_r", &WrapperOptions::r_);
    f("sf_max_grad_norm", &WrapperOptions::max_grad_norm_);
    f("sf_nonfinite", &WrapperOptions::nonfinite_);
  }
};

#undef SCHEDULEFREE_ARG

}  // namespace schedulefree
