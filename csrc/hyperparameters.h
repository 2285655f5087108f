// The domains and defaults of hyperparameters, for both facades. Plain C++ without torch.
#pragma once

#include <cmath>
#include <cstring>
#include <sstream>
#include <stdexcept>
#include <string>

namespace schedulefree {

// What hyperparameters are unless they are set; `beta` is SGD's momentum and the first of Adam's betas.
// clang-format off
#define SCHEDULEFREE_DEFAULTS(X)                                                                   \
  X(sgd_lr, 1.0) X(adam_lr, 0.0025) X(beta, 0.9) X(beta2, 0.999) X(eps, 1e-8) X(inner_momentum, 0) \
  X(weight_decay, 0) X(warmup_steps, 0) X(r, 0) X(weight_lr_power, 2) X(decoupling_c, 0) \
  X(averaging_weight, 0)
// clang-format on

namespace defaults {
#define SCHEDULEFREE_DEFAULT(name, value) inline constexpr double name = value;
SCHEDULEFREE_DEFAULTS(SCHEDULEFREE_DEFAULT)
#undef SCHEDULEFREE_DEFAULT
}  // namespace defaults

// The values that a hyperparameter may take.
struct Domain {
  const char* name;
  bool (*holds)(double);
  const char* text;  // completes "expected ..."
};

namespace detail {

inline bool non_negative(double v) { return std::isfinite(v) && v >= 0; }
inline bool finite(double v) { return std::isfinite(v); }
inline bool positive(double v) { return v > 0; }
inline bool interpolation(double v) { return v > 0 && v <= 1; }
inline bool decay_rate(double v) { return v >= 0 && v < 1; }
inline bool fraction(double v) { return v >= 0 && v <= 1; }
inline bool open_interval(double v) { return v > 0 && v < 1; }

inline constexpr char kNonNegative[] = "a finite value >= 0";
inline constexpr char kInterpolation[] =
    "a value in (0, 1]: at 0 the parameters would carry nothing of the average";
inline constexpr char kDecayRate[] = "a value in [0, 1)";

}  // namespace detail

inline constexpr Domain kDomains[] = {
    {"lr", &detail::non_negative, detail::kNonNegative},
    {"weight_decay", &detail::non_negative, detail::kNonNegative},
    {"weight_decay_at_y", &detail::non_negative, detail::kNonNegative},
    {"eps", &detail::non_negative, detail::kNonNegative},
    {"warmup_steps", &detail::non_negative, detail::kNonNegative},
    {"c_warmup", &detail::non_negative, detail::kNonNegative},
    {"sf_beta1_anneal_steps", &detail::non_negative, detail::kNonNegative},
    {"r", &detail::finite, "a finite value"},
    {"weight_lr_power", &detail::finite, "a finite value"},
    {"decoupling_c", &detail::non_negative, detail::kNonNegative},
    {"averaging_weight", &detail::fraction, "a value in [0, 1]"},
    {"momentum", &detail::interpolation, detail::kInterpolation},
    {"sf_momentum", &detail::interpolation, detail::kInterpolation},
    {"beta", &detail::interpolation, detail::kInterpolation},
    {"betas[0]", &detail::interpolation, detail::kInterpolation},
    {"betas[1]", &detail::decay_rate, detail::kDecayRate},
    {"inner_momentum", &detail::decay_rate, detail::kDecayRate},
    {"polyak_beta", &detail::decay_rate, detail::kDecayRate},
    {"sf_beta1", &detail::open_interval, "a value in (0, 1)"},
    {"sf_beta1_max", &detail::open_interval, "a value in (0, 1)"},
    {"max_grad_norm", &detail::positive, "a value > 0, or none"},
};

// Throws std::invalid_argument naming a hyperparameter, its value and its domain, where it is outside.
// `where` is such as " in parameter group 1".
inline void check_hyperparameter(const char* name, double value, const std::string& where = "") {
  for (const Domain& domain : kDomains) {
    if (std::strcmp(domain.name, name) != 0) continue;
    if (domain.holds(value)) return;
    std::ostringstream message;
    message << "Invalid " << name << where << ": " << value << ", expected " << domain.text;
    throw std::invalid_argument(message.str());
  }
  throw std::logic_error(std::string("no domain is declared for ") + name);
}

}  // namespace schedulefree
