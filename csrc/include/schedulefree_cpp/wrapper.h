// Any optimizer of libtorch made schedule-free (Defazio et al., "The Road Less Scheduled", arXiv 2405.15682).
//
//   torch::optim::RMSprop base(model->parameters(), torch::optim::RMSpropOptions(2.5e-3));
//   schedulefree::Wrapper optimizer(base, schedulefree::WrapperOptions().weight_decay_at_y(0.1));
//   optimizer.train();
//   ...
//   optimizer.step();
//
// It is the Python class ScheduleFreeWrapper: the same operators, the same checkpoints.
#pragma once

#include <torch/optim/adagrad.h>
#include <torch/optim/adam.h>
#include <torch/optim/adamw.h>
#include <torch/optim/lbfgs.h>
#include <torch/optim/rmsprop.h>
#include <torch/optim/sgd.h>

#include <limits>
#include <memory>
#include <optional>
#include <sstream>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "optim.h"

namespace schedulefree {

/// Makes any optimizer schedule-free: the base optimizer steps z.
///
/// Groups, learning rates and schedulers are the base optimizer's: `torch::optim::StepLR(base, ...)`. While
/// it steps, parameters hold z and the memory of z holds x: nothing is copied but a z that decays at y. Those
/// of 16 bits have stand-ins of float32 then. The base optimizer's momentum is best turned off: beta takes
/// its place.
class Wrapper : public TwoModes {
 public:
  using LossClosure = torch::optim::Optimizer::LossClosure;

  /// `base` must live longer. `options` hold for all groups, also those that the base optimizer is given
  /// later. Throws for a base that is schedule-free itself or has no learning rate, for hyperparameters
  /// outside their domain, and for parameters that cannot be optimized.
  explicit Wrapper(torch::optim::Optimizer& base, WrapperOptions options = {});

  /// The optimizer that steps z.
  torch::optim::Optimizer& base() { return base_; }

  /// What the wrapper adds to a group, to be changed between steps. A change of momentum leaves x as it is.
  WrapperOptions& options(std::size_t group = 0);

  /// Clears the gradients of all parameters.
  void zero_grad(bool set_to_none = true) { base_.zero_grad(set_to_none); }

  /// Has the base optimizer take a step, and returns what the closure returned at first. The closure is
  /// evaluated with gradients enabled; each time that the base optimizer calls it, the parameters are the y
  /// of the z that is tried. Parameters without a gradient rest; a group of such takes no step and counts
  /// none.
  ///
  /// Throws in eval mode. What the base optimizer throws is passed on with the parameters back at y, up to a
  /// rounding if it had called the closure at another z. If it had moved z, z is what it was only where it
  /// decays at y, and y belongs to that z.
  at::Tensor step(LossClosure closure = nullptr);

  /// What torch::save calls. State belongs to parameters by their position.
  void save(torch::serialize::OutputArchive& archive) const;
  /// What torch::load calls. Nothing has changed if it throws.
  void load(torch::serialize::InputArchive& archive);

  /// With the state of the base optimizer, which must be torch's SGD, Adam, AdamW, RMSprop, Adagrad or LBFGS.
  detail::Dict state_dict(const Naming& naming) const override;
  /// Of such a base optimizer, too.
  void load_state_dict(const detail::Dict& state_dict, const Naming& naming) override;

 private:
  struct Group : detail::GroupState {
    WrapperOptions options;
  };

  const detail::Groups& base_groups() const { return base_.param_groups(); }
  detail::ParamState* state_of(const at::Tensor& p) const;
  static void check(const WrapperOptions& options, const torch::optim::OptimizerOptions& of_base,
                    const std::string& where);
  void check_groups() const override;
  template <class F>
  detail::Batch gather(std::size_t group, F&& wanted) const;
  std::vector<detail::Batch> gather_with_state() const override;
  std::vector<detail::Placed> placed() const override;
  void own(std::vector<std::unique_ptr<detail::ParamState>> states);

  torch::optim::Optimizer& base_;
  WrapperOptions defaults_;
  mutable std::vector<Group> groups_;  // grows with those of the base optimizer
  std::unordered_map<void*, std::unique_ptr<detail::ParamState>> state_;
};

/// Has torch::save write a wrapper with its base optimizer.
inline torch::serialize::OutputArchive& operator<<(torch::serialize::OutputArchive& archive,
                                                   const Wrapper& optimizer) {
  optimizer.save(archive);
  return archive;
}

/// Has torch::load read them.
inline torch::serialize::InputArchive& operator>>(torch::serialize::InputArchive& archive,
                                                  Wrapper& optimizer) {
  optimizer.load(archive);
  return archive;
}

// ---- groups and modes -------------------------------------------------------------------------------

inline Wrapper::Wrapper(torch::optim::Optimizer& base, WrapperOptions options)
    : base_(base), defaults_(std::move(options)) {
  detail::require_library();
  TORCH_CHECK_TYPE(!dynamic_cast<Optimizer*>(&base),
                   "Invalid base: expected an optimizer that is not schedule-free itself");
  check_groups();
  // What the base optimizer keeps for parameters of 16 bits is float32 from here on.
  bool narrow = false;
  for (const torch::optim::OptimizerParamGroup& group : base_groups())
    for (const at::Tensor& p : group.params()) narrow = narrow || p.itemsize() == 2;
  if (narrow && !base_.state().empty()) load_state_dict(state_dict(detail::by_number), detail::by_number);
}

inline void Wrapper::check(const WrapperOptions& options, const torch::optim::OptimizerOptions& of_base,
                           const std::string& where) {
  detail::with_value_error([&] {
    check_hyperparameter("lr", of_base.get_lr(), where);
    check_hyperparameter("momentum", options.momentum(), where);
    check_hyperparameter("weight_decay_at_y", options.weight_decay_at_y(), where);
    check_hyperparameter("r", options.r(), where);
    check_hyperparameter("weight_lr_power", options.weight_lr_power(), where);
    if (options.max_grad_norm()) check_hyperparameter("max_grad_norm", *options.max_grad_norm(), where);
  });
}

// What a user may have changed since the last call, here or in the base optimizer, which may have new groups.
inline void Wrapper::check_groups() const {
  const detail::Groups& groups = base_groups();
  TORCH_CHECK(groups.size() >= groups_.size(), "schedulefree: the base optimizer has ", groups.size(),
              " parameter groups, expected ", groups_.size(), " or more");
  for (std::size_t i = 0; i < groups.size(); ++i) {
    const bool is_new = i == groups_.size();
    const WrapperOptions& options = is_new ? defaults_ : groups_[i].options;
    check(options, groups[i].options(), detail::in_group(i));
    const Nonfinite expected = i == 0 ? options.nonfinite() : groups_[0].options.nonfinite();
    TORCH_CHECK_VALUE(options.nonfinite() == expected, "Invalid nonfinite", detail::in_group(i), ": ",
                      detail::to_value(options.nonfinite()), ", expected ", detail::to_value(expected),
                      " as for the whole optimizer, since the gradients of all groups decide together");
    if (!is_new) continue;
    detail::check_params(groups[i], groups, i);
    Group group;
    group.options = options;
    group.schedule.lr_max = 0;  // as in Python
    group.y_beta = options.momentum();
    groups_.push_back(std::move(group));
  }
}

inline WrapperOptions& Wrapper::options(std::size_t group) {
  check_groups();
  return groups_.at(group).options;
}

inline detail::ParamState* Wrapper::state_of(const at::Tensor& p) const {
  const auto it = state_.find(detail::key_of(p));
  return it == state_.end() ? nullptr : it->second.get();
}

// Those of a group's parameters that are `wanted`. Parameters that have no state get one with the step.
template <class F>
detail::Batch Wrapper::gather(std::size_t group, F&& wanted) const {
  using namespace detail;
  Batch batch;
  batch.y_beta = groups_[group].y_beta;
  const std::vector<at::Tensor>& params = base_groups()[group].params();
  for (std::size_t i = 0; i < params.size(); ++i) {
    const at::Tensor& p = params[i];
    ParamState* state = state_of(p);
    if (!wanted(p, state)) continue;
    TORCH_CHECK(has_supported_dtype(p), "params[", i, "]", in_group(group), " of dtype ", p.scalar_type(),
                " has a gradient: expected none, or dtype Float, Double, BFloat16 or Half");
    if (!state) {
      batch.created.push_back(std::make_unique<ParamState>(p));
      state = batch.created.back().get();
      state->z = like(p, state_dtype(p)).copy_(p);
    }
    TORCH_CHECK(state->z.sizes() == p.sizes(), "params[", i, "]", in_group(group), " has shape ", p.sizes(),
                ", but its state has shape ", state->z.sizes());
    require_kernels(p);
    match(*state, p, {});
    batch.y.push_back(p);
    batch.z.push_back(state->z);
    push_part(batch.y_lo, state->y_lo);
  }
  drop_absent(batch.y_lo);
  return batch;
}

inline std::vector<detail::Batch> Wrapper::gather_with_state() const {
  const at::NoGradGuard no_grad;
  std::vector<detail::Batch> batches;
  for (std::size_t i = 0; i < groups_.size(); ++i)
    batches.push_back(gather(i, [](const at::Tensor&, auto* state) { return state != nullptr; }));
  return batches;
}

// ---- the step ---------------------------------------------------------------------------------------

namespace detail {

// Parameters of a group that take a step, by one call of each operator.
struct Lent {
  Batch batch;
  bool narrow;                     // of 16 bits: the base optimizer gets z under another parameter
  double max_grad_norm;            // infinite where there is none
  at::Tensor coefs, way_back;      // of the step, and of one that averages nothing
  std::vector<at::Tensor> z = {};  // before the step, where it decays
};

// The parameters of a step of the base optimizer: at y, or at z and in its hands.
class Loan {
 public:
  Loan(torch::optim::Optimizer& base, std::vector<Lent> lent) : base_(base), lent_(std::move(lent)) {
    for (const Lent& one : lent_)
      for (std::size_t i = 0; i < one.batch.y.size(); ++i) {
        const at::Tensor& p = one.batch.y[i];
        lent_to_base_.push_back(one.narrow ? one.batch.z[i].detach().set_requires_grad(p.requires_grad())
                                           : p);
        if (one.narrow) stand_ins_.push_back({p, lent_to_base_.back(), one.batch.z[i]});
      }
  }

  // From y to z, which decays the first time. Clips by the norm of all gradients.
  void to_z(bool first, double norm) {
    std::size_t done = 0;
    try {
      for (; done < lent_.size(); ++done)
        before(lent_[done], first ? lent_[done].coefs : lent_[done].way_back);
    } catch (...) {
      undo(done);
      throw;
    }
    clip(norm);
    for (const auto& [p, q, z] : stand_ins_)
      q.mutable_grad() = p.grad().defined() ? p.grad().to(q.scalar_type()) : at::Tensor();
    replace(/*by_stand_ins=*/true);
  }

  // From z to the y of what the base optimizer has made of it: of the next x, or of that which was.
  void to_y(bool next) {
    replace(/*by_stand_ins=*/false);
    for (const Lent& one : lent_) after(one, next ? one.coefs : one.way_back);
  }

  // From z to the y that was.
  void undo() {
    replace(/*by_stand_ins=*/false);
    undo(lent_.size());
  }

  std::vector<at::Tensor> grads() const {
    std::vector<at::Tensor> grads;
    for (const Lent& one : lent_)
      for (const at::Tensor& p : one.batch.y)
        if (p.grad().defined()) grads.push_back(p.grad());
    return grads;
  }

  // By which a write of the base optimizer to parameters or gradients is noticed.
  std::vector<std::pair<const void*, std::uint32_t>> versions() const {
    std::vector<std::pair<const void*, std::uint32_t>> versions;
    for (const at::Tensor& p : lent_to_base_)
      for (const at::Tensor& t : {p, p.grad()})
        versions.emplace_back(key_of(t), t.defined() && !t.is_inference() ? t._version() : 0);
    return versions;
  }

  std::vector<Lent>& lent() { return lent_; }

 private:
  // Scales gradients in place where their group has a norm that all together must not exceed.
  void clip(double norm) {
    for (const Lent& one : lent_) {
      const double factor = clip_factor(norm, one.max_grad_norm);
      if (factor >= 1) continue;
      for (const at::Tensor& p : one.batch.y)
        if (p.grad().defined()) p.grad().mul_(factor);
    }
  }

  static void before(const Lent& one, const at::Tensor& coefs) {
    using Signature = void(at::TensorList, at::TensorList, at::TensorList, const at::Tensor&, double, bool);
    static const auto op = operator_named<Signature>("schedulefree_cpp::before_base_step_");
    const at::AutoDispatchBelowADInplaceOrView no_autograd;
    op.call(one.batch.y, one.batch.y_lo, one.batch.z, coefs, one.batch.y_beta, !one.narrow);
    written(one.batch.y);
  }

  static void after(const Lent& one, const at::Tensor& coefs) {
    using Signature = void(at::TensorList, at::TensorList, at::TensorList, const at::Tensor&, bool);
    static const auto op = operator_named<Signature>("schedulefree_cpp::after_base_step_");
    const at::AutoDispatchBelowADInplaceOrView no_autograd;
    op.call(one.batch.y, one.batch.y_lo, one.batch.z, coefs, !one.narrow);
    written(one.batch.y);
  }

  void undo(std::size_t count) {
    while (count-- > 0) {
      const Lent& one = lent_[count];
      for (std::size_t i = 0; i < one.z.size(); ++i)
        (one.narrow ? one.batch.z : one.batch.y)[i].copy_(one.z[i]);
      after(one, one.way_back);
    }
  }

  // In the base optimizer's groups and state. (A parameter of 16 bits that became one of 32 itself would lose
  // the hooks that wait for its gradient.)
  void replace(bool by_stand_ins) {
    std::unordered_map<const void*, at::Tensor> others;
    for (const auto& [p, q, z] : stand_ins_) {
      if (!by_stand_ins && q.data_ptr() != z.data_ptr()) z.copy_(q);  // the base has given it another memory
      others.emplace(key_of(by_stand_ins ? p : q), by_stand_ins ? q : p);
    }
    if (others.empty()) return;
    auto& states = base_.state();
    for (torch::optim::OptimizerParamGroup& group : base_.param_groups())
      for (at::Tensor& p : group.params()) {
        const auto other = others.find(key_of(p));
        if (other == others.end()) continue;
        const auto state = states.find(key_of(p));
        p = other->second;
        if (state == states.end()) continue;
        auto moved = std::move(state->second);
        states.erase(state);
        states[key_of(p)] = std::move(moved);
      }
  }

  // For a parameter of 16 bits: q, which is in the memory of its z.
  struct StandIn {
    at::Tensor p, q, z;
  };

  torch::optim::Optimizer& base_;
  std::vector<Lent> lent_;
  std::vector<at::Tensor> lent_to_base_;
  std::vector<StandIn> stand_ins_;
};

}  // namespace detail

inline at::Tensor Wrapper::step(LossClosure closure) {
  using namespace detail;
  const auto call_closure = [&] {
    const at::AutoGradMode enabled(true);
    return closure();
  };
  require_train_mode();
  at::Tensor loss;
  if (closure) {
    loss = call_closure();
    require_train_mode();  // the closure may do anything
  }

  const at::NoGradGuard no_grad;
  // First everything that can be refused here, for all groups; then everything that changes.
  struct Plan {
    Group* group;
    bool counts;  // else it moves to another beta only
    ScheduleStep step;
    Batch resting;
  };
  std::vector<Plan> plans;
  std::vector<Lent> all_lent;
  bool measures = false;
  for (std::size_t i = 0; i < groups_.size(); ++i) {
    Group& group = groups_[i];
    const WrapperOptions& options = group.options;
    Plan plan{&group, takes_part(base_groups()[i].params()), {}, {}};
    StepRule rule;
    rule.beta = rule.beta_next = options.momentum();
    rule.r = options.r();
    rule.weight_lr_power = options.weight_lr_power();
    const double lr = base_groups()[i].options().get_lr(), decay = options.weight_decay_at_y();
    const auto next = [&] { return schedule_step(group.schedule, group.scheduled_lr, rule, {lr, decay}); };
    plan.step = with_value_error(next, in_group(i));
    measures = measures || options.max_grad_norm() || options.nonfinite() != Nonfinite::kPropagate;
    StepCoefficients back;
    back.take = 1;
    back.beta = group.y_beta;
    const at::Tensor scalars = coefs(plan.step.coefs), way_back = coefs(back);
    check_coefs(scalars, in_group(i));
    for (const bool narrow : {false, true}) {
      const auto wanted = [&](const at::Tensor& p, auto*) {
        return p.grad().defined() && narrow == (p.itemsize() == 2);
      };
      const double infinite = std::numeric_limits<double>::infinity();
      Lent lent{gather(i, wanted), narrow, options.max_grad_norm().value_or(infinite), scalars, way_back};
      if (lent.batch.y.empty()) continue;
      for (std::size_t k = 0; decay != 0 && k < lent.batch.z.size(); ++k)
        lent.z.push_back(lent.batch.z[k].clone());
      all_lent.push_back(std::move(lent));
    }
    if (group.y_beta != options.momentum())  // parameters that rest take the beta of those that step
      plan.resting = gather(i, [](const at::Tensor& p, auto* state) { return state && !p.grad().defined(); });
    plans.push_back(std::move(plan));
  }
  Loan loan(base_, std::move(all_lent));
  const auto measure = [&] {
    if (!measures) return 0.0;
    grad_norm_ = norm_of(loan.grads());
    return grad_norm_.item<double>();
  };
  const double norm = measure();
  const Nonfinite nonfinite = groups_.empty() ? Nonfinite::kPropagate : groups_[0].options.nonfinite();
  if (!std::isfinite(norm) && nonfinite != Nonfinite::kPropagate) {
    if (nonfinite == Nonfinite::kRaise) refuse_gradients(base_groups(), norm);
    return loss;
  }

  loan.to_z(/*first=*/true, norm);
  LossClosure at_y;
  // A base optimizer that has moved or cleared something before its first call needs another.
  bool known = true;
  if (closure)
    at_y = [&, versions = loan.versions()] {
      if (std::exchange(known, false) && loan.versions() == versions) return loss;
      const at::NoGradGuard no_grad;
      loan.to_y(/*next=*/false);
      at::Tensor now;
      double norm_now = 0;
      try {
        now = call_closure();
        norm_now = measure();
      } catch (...) {
        train();  // whatever the closure did
        loan.to_z(/*first=*/false, 0);
        throw;
      }
      train();
      loan.to_z(/*first=*/false, norm_now);
      return now;
    };
  try {
    base_.step(at_y);
  } catch (...) {
    loan.undo();
    throw;
  }
  loan.to_y(/*next=*/true);
  for (Lent& lent : loan.lent()) own(std::move(lent.batch.created));
  for (Plan& plan : plans) {
    Group& group = *plan.group;
    swap(plan.resting, false);
    swap_to_y_of(group.options.momentum(), plan.resting);
    group.y_beta = group.options.momentum();
    if (!plan.counts) continue;
    group.schedule = plan.step.next;
    group.scheduled_lr = plan.step.scheduled_lr;
  }
  return loss;
}

inline void Wrapper::own(std::vector<std::unique_ptr<detail::ParamState>> states) {
  for (std::unique_ptr<detail::ParamState>& state : states) {
    void* const key = state->owner._unsafe_get_target();
    state_[key] = std::move(state);
  }
}

// ---- checkpoints ------------------------------------------------------------------------------------

inline std::vector<detail::Placed> Wrapper::placed() const {
  std::vector<detail::Placed> params;
  for (std::size_t i = 0; i < groups_.size(); ++i)
    for (const at::Tensor& p : base_groups()[i].params())
      params.push_back({p, state_of(p), groups_[i].y_beta});
  return params;
}

namespace detail {

// A state without steps, of the kind that one of torch's optimizers keeps.
inline std::unique_ptr<torch::optim::OptimizerParamState> new_state(const torch::optim::Optimizer& base) {
  namespace optim = torch::optim;
  if (dynamic_cast<const optim::SGD*>(&base)) return std::make_unique<optim::SGDParamState>();
  if (dynamic_cast<const optim::Adam*>(&base)) return std::make_unique<optim::AdamParamState>();
  if (dynamic_cast<const optim::AdamW*>(&base)) return std::make_unique<optim::AdamWParamState>();
  if (dynamic_cast<const optim::RMSprop*>(&base)) return std::make_unique<optim::RMSpropParamState>();
  if (dynamic_cast<const optim::Adagrad*>(&base)) return std::make_unique<optim::AdagradParamState>();
  if (dynamic_cast<const optim::LBFGS*>(&base)) return std::make_unique<optim::LBFGSParamState>();
  C10_THROW_ERROR(TypeError, c10::str("Invalid base: the state of ", c10::demangle(typeid(base).name()),
                                      " cannot be saved or loaded, expected torch's SGD, Adam, AdamW, "
                                      "RMSprop, Adagrad or LBFGS"));
}

inline torch::serialize::InputArchive read_back(torch::serialize::OutputArchive& archive) {
  std::stringstream bytes;
  archive.save_to(bytes);
  torch::serialize::InputArchive read;
  read.load_from(bytes);
  return read;
}

// The entries of a base optimizer's state or options. torch's archives have the names of Python.
template <class T>
Dict entries_of(const T& item) {
  torch::serialize::OutputArchive archive;
  const auto copy = item.clone();
  // What LBFGS computes anew in each step; torch cannot write it before it is full.
  if constexpr (std::is_same_v<T, torch::optim::OptimizerParamState>)
    if (auto* const lbfgs = dynamic_cast<torch::optim::LBFGSParamState*>(copy.get()))
      lbfgs->al(std::optional<std::vector<at::Tensor>>());
  copy->serialize(archive);
  torch::serialize::InputArchive written = read_back(archive);
  const Dict entries = make_dict();
  for (const std::string& key : written.keys()) {
    c10::IValue value;
    written.read(key, value);
    entries.insert(key, value);
  }
  return entries;
}

// Gives them to a state or to options.
template <class T>
void read_entries(T& item, const Dict& entries) {
  torch::serialize::OutputArchive archive;
  for (const auto& entry : entries) archive.write(entry.key().toStringRef(), entry.value());
  torch::serialize::InputArchive written = read_back(archive);
  item.serialize(written);
}

// A value of a state dict in the type that an archive has for it.
inline c10::IValue in_type_of(const c10::IValue& own, const std::string& key, const c10::IValue& v) {
  const auto as = [&](auto out) -> c10::IValue {
    from_value(key, v, out);
    return to_value(out);
  };
  if (v.isNone()) return v;
  if (own.isDouble()) return as(double{});
  if (own.isInt()) return as(std::int64_t{});
  if (own.isBool()) return as(bool{});
  if (own.isTuple()) return as(Betas{});
  return v;
}

// The base optimizer's entries of a parameter's state, in the types of its archive: with those of a `fresh`
// state that are not saved.
inline Dict base_state(const Dict& saved, const Dict& fresh, const at::Tensor& p, bool shaped,
                       const std::string& what) {
  const Dict result = fresh.copy();
  const auto in_place = [&](const std::string& key, const c10::IValue& value) {
    const at::Tensor t = value.isTensor() ? tensor_of(value, key + what, "numbers", [](auto) { return true; })
                         : value.isInt()  ? at::scalar_tensor(value.toInt())  // LBFGS's H_diag at first
                                          : tensor_of(value, key + what, "numbers", is_float);
    TORCH_CHECK_VALUE(!shaped || t.sizes() == p.sizes(), "Invalid ", key, what, ": shape ", t.sizes(),
                      ", expected ", p.sizes());
    return t.to(p.device(), t.is_floating_point() ? state_dtype(p) : t.scalar_type());
  };
  for (const auto& entry : saved) {
    const std::string& key = entry.key().toStringRef();
    const c10::IValue& value = entry.value();
    const c10::IValue* const own = find(fresh, key);
    if (value.isNone() || key == "al") continue;
    if (own && !own->isList()) {
      result.insert_or_assign(key, in_type_of(*own, key, value));
    } else if (value.isList()) {
      c10::List<at::Tensor> list;
      for (const c10::IValue& item : value.toListRef()) list.push_back(in_place(key, item));
      result.insert_or_assign(key, list);
    } else {
      result.insert_or_assign(key, in_place(key, value));
    }
  }
  return result;
}

}  // namespace detail

inline detail::Dict Wrapper::state_dict(const Naming& naming) const {
  using namespace detail;
  check_groups();
  new_state(base_);
  const Dict states = make_dict();
  std::vector<Dict> groups;
  std::int64_t number = 0;
  for (std::size_t i = 0; i < groups_.size(); ++i) {
    const Group& group = groups_[i];
    const Dict dict = group.foreign.copy();
    for (const auto& entry : entries_of(base_groups()[i].options()))
      dict.insert_or_assign(entry.key(), entry.value());
    WrapperOptions::each([&](const char* key, auto member) {
      dict.insert_or_assign(std::string(key), to_value((group.options.*member).value));
    });
    write_schedule(dict, "sf_", group, train_mode_);
    dict.insert("sf_momentum_of_y", group.y_beta);
    std::vector<c10::IValue> names;
    for (const at::Tensor& p : base_groups()[i].params()) {
      names.push_back(naming(p, number++));
      const auto of_base = base_.state().find(key_of(p));
      const Dict own = of_base == base_.state().end() ? make_dict() : entries_of(*of_base->second);
      // Python's optimizers count steps in tensors.
      const c10::IValue* const step = find(own, "step");
      if (step && step->isInt()) own.insert_or_assign("step", at::scalar_tensor(step->toInt(), at::kFloat));
      if (ParamState* const state = state_of(p)) {
        if (state->z.sizes() == p.sizes()) match(*state, p, {});
        own.insert("sf_z", state->z);
        if (state->y_lo.defined()) own.insert("sf_y_lo", state->y_lo);
      }
      if (!own.empty()) states.insert(names.back(), own);
    }
    dict.insert("params", to_list(names));
    groups.push_back(dict);
  }
  const Dict ours = make_dict(), result = make_dict();
  write_fingerprint(ours, expected_ ? expected_ : fingerprint(placed(), train_mode_));
  result.insert("state", states);
  result.insert("param_groups", to_list(groups));
  result.insert("schedulefree_cpp", ours);
  return result;
}

inline void Wrapper::load_state_dict(const detail::Dict& state_dict, const Naming& naming) {
  using namespace detail;
  check_groups();
  const at::NoGradGuard no_grad;
  constexpr const char* kWhat = "state dict";
  const Dict fresh = entries_of(*new_state(base_));
  const bool is_lbfgs = dynamic_cast<const torch::optim::LBFGS*>(&base_) != nullptr;
  SavedParams saved(dict_at(state_dict, "state", kWhat), naming);
  const std::vector<c10::IValue> saved_groups = list_at(state_dict, "param_groups", kWhat);
  TORCH_CHECK_VALUE(saved_groups.size() == groups_.size(), "Invalid state dict: ", saved_groups.size(),
                    " parameter groups, expected ", groups_.size());

  std::vector<Group> groups(groups_.size());
  std::vector<std::unique_ptr<torch::optim::OptimizerOptions>> all_options;
  std::vector<std::unique_ptr<ParamState>> loaded;
  std::vector<std::pair<void*, std::unique_ptr<torch::optim::OptimizerParamState>>> of_base;
  bool train_mode = false;
  for (std::size_t i = 0; i < groups_.size(); ++i) {
    const std::string where = in_group(i);
    TORCH_CHECK_VALUE(saved_groups[i].isGenericDict(), "Invalid state dict", where, ": expected a dict");
    const Dict rest = saved_groups[i].toGenericDict().copy();  // what is read is taken out
    Group& group = groups[i];
    group.options = groups_[i].options;
    all_options.push_back(base_groups()[i].options().clone());
    torch::optim::OptimizerOptions& options = *all_options.back();
    const Dict entries = entries_of(options);
    for (const char* key : {"sf_momentum", "sf_k", "sf_weight_sum", "sf_lr_max"})
      TORCH_CHECK_VALUE(find(rest, key), "Invalid state dict", where, ": it lacks ", key,
                        ", so it is not of a wrapper");
    for (const auto& entry : entries_of(options)) {
      const std::string& key = entry.key().toStringRef();
      const auto value = rest.find(key);
      TORCH_CHECK_VALUE(value != rest.end(), "Invalid state dict", where, ": it lacks ", key,
                        ", so it is not of this base optimizer");
      entries.insert_or_assign(key, in_type_of(entry.value(), key, value->value()));
      rest.erase(value);
    }
    read_entries(options, entries);
    const c10::IValue* const maximize = find(rest, "maximize");
    TORCH_CHECK_VALUE(!maximize || !maximize->isBool() || !maximize->toBool(), "Invalid maximize", where,
                      " of the state dict: true, expected false, since libtorch's optimizers minimize");
    WrapperOptions::each(
        [&](const char* key, auto member) { take(rest, key, (group.options.*member).value); });
    check(group.options, options, where + " of the state dict");
    const bool trains = take_schedule(rest, "sf_", where, group);
    TORCH_CHECK_VALUE(i == 0 || trains == train_mode, "Invalid sf_train_mode", where, kOtherMode);
    train_mode = trains;
    group.y_beta = group.options.momentum();
    take(rest, "sf_momentum_of_y", group.y_beta);
    with_value_error([&] { check_hyperparameter("beta", group.y_beta, " that built y" + where); });

    const std::vector<SavedState> states = saved.take_params(rest, base_groups()[i].params(), where);
    group.foreign = rest;
    for (const auto& [p, entries, what] : states) {
      const Dict own = make_dict(), others = entries.copy();
      for (const char* key : {"z", "y_lo"}) {
        const auto value = others.find(std::string("sf_") + key);
        if (value == others.end()) continue;
        own.insert(key, value->value());
        others.erase(value);
      }
      if (!own.empty()) {
        loaded.push_back(read_state(own, p, what));
        TORCH_CHECK_VALUE(loaded.back()->z.defined(), "Invalid state", what, ": it lacks sf_z");
        require_kernels(p);
        match(*loaded.back(), p, {});
      }
      if (others.empty()) continue;
      of_base.emplace_back(key_of(p), new_state(base_));
      read_entries(*of_base.back().second, base_state(others, fresh, p, !is_lbfgs, what));
    }
  }
  saved.check();
  const Dict ours =
      find(state_dict, "schedulefree_cpp") ? dict_at(state_dict, "schedulefree_cpp", kWhat) : make_dict();
  std::optional<Fingerprint> expected = read_fingerprint(ours, saved.numbers());

  // Nothing has been changed up to here.
  for (std::size_t i = 0; i < groups_.size(); ++i)
    base_.param_groups()[i].set_options(std::move(all_options[i]));
  base_.state().clear();
  for (auto& [key, state] : of_base) base_.state()[key] = std::move(state);
  groups_ = std::move(groups);
  train_mode_ = train_mode;
  state_.clear();
  own(std::move(loaded));
  expected_ = std::move(expected);
}

inline void Wrapper::save(torch::serialize::OutputArchive& archive) const {
  detail::save(archive, "Wrapper", state_dict(detail::by_number));
}

inline void Wrapper::load(torch::serialize::InputArchive& archive) {
  load_state_dict(detail::load(archive, "Wrapper"), detail::by_number);
}

}  // namespace schedulefree
