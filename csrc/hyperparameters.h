// Names, defaults and domains of the numbers of a parameter group, for both facades. Plain C++ without torch.
#pragma once

#include <cmath>
#include <cstring>
#include <sstream>
#include <stdexcept>
#include <string>

namespace schedulefree {

// The numbers that a parameter group holds for its schedule, beside lr, weight_decay and the beta of y:
//
//   X(name, name in messages, member of StepRule, default, domain)
//
// Defaults, domains, the checks of a step and of the C++ options, and what Python reads of a group all come
// from this list.
// clang-format off
#define SCHEDULEFREE_COMMON_NUMBERS(X)                                            \
  X(warmup_steps, "warmup_steps", warmup_steps, 0, kNonNegative)                  \
  X(r, "r", r, 0, kFinite)                                                        \
  X(weight_lr_power, "weight_lr_power", weight_lr_power, 2, kFinite)              \
  X(decoupling_c, "decoupling_c", decoupling_c, 0, kNonNegative)                  \
  X(averaging_weight, "averaging_weight", averaging_weight, 0, kFraction)

// Those that only the relatives of Adam have.
#define SCHEDULEFREE_ADAM_NUMBERS(X)                                              \
  X(beta2, "betas[1]", adam.beta2, 0.999, kDecayRate)                             \
  X(eps, "eps", adam.eps, 1e-8, kNonNegative)                                     \
  X(inner_momentum, "inner_momentum", adam.inner_momentum, 0, kDecayRate)

#define SCHEDULEFREE_NUMBERS(X) SCHEDULEFREE_COMMON_NUMBERS(X) SCHEDULEFREE_ADAM_NUMBERS(X)

// Other numbers with a default; `beta` is SGD's momentum and the first of Adam's betas.
#define SCHEDULEFREE_OTHER_DEFAULTS(X) X(sgd_lr, 1.0) X(adam_lr, 0.0025) X(beta, 0.9) X(weight_decay, 0)
// clang-format on

namespace defaults {
#define SCHEDULEFREE_DEFAULT(name, value) inline constexpr double name = value;
#define SCHEDULEFREE_NUMBER(name, key, member, value, domain) SCHEDULEFREE_DEFAULT(name, value)
SCHEDULEFREE_OTHER_DEFAULTS(SCHEDULEFREE_DEFAULT)
SCHEDULEFREE_NUMBERS(SCHEDULEFREE_NUMBER)
#undef SCHEDULEFREE_NUMBER
#undef SCHEDULEFREE_DEFAULT
}  // namespace defaults

// The values that a hyperparameter may take.
struct Domain {
  bool (*holds)(double);
  const char* text;  // completes "expected ..."
};

inline constexpr Domain kNonNegative{[](double v) { return std::isfinite(v) && v >= 0; },
                                     "a finite value >= 0"};
inline constexpr Domain kFinite{[](double v) { return std::isfinite(v); }, "a finite value"};
inline constexpr Domain kPositive{[](double v) { return v > 0; }, "a value > 0, or none"};
inline constexpr Domain kFraction{[](double v) { return v >= 0 && v <= 1; }, "a value in [0, 1]"};
inline constexpr Domain kDecayRate{[](double v) { return v >= 0 && v < 1; }, "a value in [0, 1)"};
inline constexpr Domain kOpenInterval{[](double v) { return v > 0 && v < 1; }, "a value in (0, 1)"};
inline constexpr Domain kInterpolation{
    [](double v) { return v > 0 && v <= 1; },
    "a value in (0, 1]: at 0 the parameters would carry nothing of the average"};

inline constexpr Domain kSteps{[](double v) { return v >= 0 && v < 9e15 && v == std::floor(v); },
                               "a number of steps, 0 or more"};
inline constexpr Domain kTotal{[](double v) { return std::isfinite(v) && v >= 0; }, "a finite number >= 0"};
inline constexpr Domain kFromMinusOne{[](double v) { return std::isfinite(v) && v >= -1; },
                                      "a finite number >= -1"};

struct NamedDomain {
  const char* name;
  Domain domain;
};

inline constexpr NamedDomain kDomains[] = {
    {"lr", kNonNegative},
    {"weight_decay", kNonNegative},
    {"momentum", kInterpolation},
    {"beta", kInterpolation},
    {"betas[0]", kInterpolation},
    {"max_grad_norm", kPositive},
#define SCHEDULEFREE_DOMAIN(name, key, member, value, domain) {key, domain},
    SCHEDULEFREE_NUMBERS(SCHEDULEFREE_DOMAIN)
#undef SCHEDULEFREE_DOMAIN
    // The wrapper's.
    {"weight_decay_at_y", kNonNegative},
    // ScheduleFree+'s.
    {"c_warmup", kNonNegative},
    {"sf_beta1_anneal_steps", kNonNegative},
    {"polyak_beta", kDecayRate},
    {"sf_beta1", kOpenInterval},
    {"sf_beta1_max", kOpenInterval},
    // What a group holds of its schedule.
    {"k", kSteps},
    {"weight_sum", kTotal},
    {"lr_max", kFromMinusOne},
    {"scheduled_lr", kTotal},
};

inline const Domain& domain_of(const char* name) {
  for (const NamedDomain& known : kDomains)
    if (std::strcmp(known.name, name) == 0) return known.domain;
  throw std::logic_error(std::string("no domain is declared for ") + name);
}

inline bool in_domain(const char* name, double value) { return domain_of(name).holds(value); }

// Throws std::invalid_argument naming a hyperparameter, its value and its domain, where it is outside.
// `where` is such as " in parameter group 1".
inline void check_hyperparameter(const char* name, double value, const std::string& where = "") {
  const Domain& domain = domain_of(name);
  if (domain.holds(value)) return;
  std::ostringstream message;
  message << "Invalid " << name << where << ": " << value << ", expected " << domain.text;
  throw std::invalid_argument(message.str());
}

// Checks the numbers of a StepRule, all of them but beta.
template <class Rule>
void check_numbers(const Rule& rule, const std::string& where = "") {
#define SCHEDULEFREE_CHECK(name, key, member, value, domain) \
  if (!domain.holds(rule.member)) check_hyperparameter(key, rule.member, where);
  SCHEDULEFREE_NUMBERS(SCHEDULEFREE_CHECK)
#undef SCHEDULEFREE_CHECK
  if (rule.clips) check_hyperparameter("max_grad_norm", rule.max_grad_norm, where);
}

}  // namespace schedulefree
