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

#include <sstream>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "optim.h"

namespace schedulefree {
namespace detail {

// Parameters of a group that take a step, by one call of each operator.
struct LentBatch {
  Batch batch;
  bool narrow;                            // of 16 bits: the base optimizer gets their z itself, in float32
  double weight_decay, max_grad_norm;     // the latter infinite where none is set
  at::Tensor coefs, of_no_step;           // the latter are those of the way back
  std::vector<at::Tensor> z, own, grads;  // before the step: z where it decays, memory where lent, gradients
};

}  // namespace detail

/// Makes any optimizer schedule-free: the base optimizer steps z.
///
/// Groups, learning rates and schedulers are the base optimizer's: `torch::optim::StepLR(base, ...)`. While
/// it steps, parameters hold z, and the memory of z holds x, so nothing is copied but a z that decays at y.
/// Its momentum is best turned off: beta takes its place. A parameter of 16 bits is lent its z in float32.
///
/// Not thread-safe, as torch's optimizers are not. Refusals are c10::Error, those of operators
/// std::runtime_error; they change nothing, unless said otherwise.
class Wrapper {
 public:
  using LossClosure = torch::optim::Optimizer::LossClosure;
  using Naming = Optimizer::Naming;

  /// `base` must live longer. `options` hold for all groups, also those that the base optimizer is given
  /// later. Throws for a base that is schedule-free itself or has no learning rate, for hyperparameters
  /// outside their domain, and for parameters that cannot be optimized.
  explicit Wrapper(torch::optim::Optimizer& base, WrapperOptions options = {});

  /// Puts the parameters at y, where gradients are taken; with `false`, eval(). Idempotent. After eval() they
  /// are what they were before it, bit for bit.
  void train(bool mode = true);

  /// Puts the parameters at the average x, which is to be evaluated and saved. Idempotent.
  void eval() { train(false); }

  /// Says where the parameters are, y or x, and moves nothing: for a model that was saved in another mode
  /// than its optimizer.
  void declare_mode(bool train) { train_mode_ = train; }

  /// Whether it is in train mode. A new wrapper is in eval mode, as in Python.
  bool is_training() const { return train_mode_; }

  /// The optimizer that steps z.
  torch::optim::Optimizer& base() { return base_; }

  /// What the wrapper adds to a group, to be changed between steps. A change of momentum leaves x as it is.
  WrapperOptions& options(std::size_t group = 0);

  /// Clears the gradients of all parameters.
  void zero_grad(bool set_to_none = true) { base_.zero_grad(set_to_none); }

  /// Has the base optimizer take a step, and returns what the closure returned at first. Gradients are only
  /// read. The closure is evaluated with gradients enabled; each time that the base optimizer calls it, the
  /// parameters are the y of the z that is tried. Parameters without a gradient rest; a group of such takes
  /// no step and counts none.
  ///
  /// Throws in eval mode. Passes on what the base optimizer throws, with the parameters at y: of the z that
  /// was, or, without weight_decay_at_y, of that to which the base optimizer had come.
  at::Tensor step(LossClosure closure = nullptr);

  /// Norm of all gradients in the last step that clipped, or that `nonfinite` had look at them, before
  /// clipping: float64, without dimensions. Undefined before; not finite after a step that was skipped.
  const at::Tensor& grad_norm() const { return grad_norm_; }

  /// What torch::save calls. State belongs to parameters by their position.
  void save(torch::serialize::OutputArchive& archive) const;
  /// What torch::load calls. Nothing has changed if it throws.
  void load(torch::serialize::InputArchive& archive);

  /// The state of the base optimizer with the wrapper's, in Python's layout and under Python's names. Throws
  /// for base optimizers other than torch's SGD, Adam, AdamW, RMSprop, Adagrad and LBFGS.
  detail::Dict state_dict(const Naming& naming) const;

  /// Loads such a dict. Parameters are found by name if `naming` and the dict both have names, else by
  /// position. Tensors are copied.
  void load_state_dict(const detail::Dict& state_dict, const Naming& naming);

 private:
  struct Group : detail::GroupState {
    WrapperOptions options;
  };
  using LentBatches = std::vector<detail::LentBatch>;

  const detail::Groups& base_groups() const { return base_.param_groups(); }
  detail::ParamState* state_of(const at::Tensor& p) const;
  static void check(const WrapperOptions& options, const torch::optim::OptimizerOptions& of_base,
                    const std::string& where);
  void check_groups() const;
  void check_expected();
  template <class F>
  detail::Batch gather(std::size_t group, F&& wanted) const;
  std::vector<detail::Placed> placed() const;

  torch::optim::Optimizer& base_;
  WrapperOptions defaults_;
  mutable std::vector<Group> groups_;  // grows with those of the base optimizer
  std::unordered_map<void*, std::unique_ptr<detail::ParamState>> state_;
  bool train_mode_ = false;
  std::optional<detail::Fingerprint> expected_;  // of a loaded state, until the parameters are first used
  at::Tensor grad_norm_;
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

inline void Wrapper::train(bool mode) {
  check_groups();
  check_expected();
  if (train_mode_ == mode) return;
  const at::NoGradGuard no_grad;
  std::vector<detail::Batch> batches;
  for (std::size_t i = 0; i < groups_.size(); ++i)
    batches.push_back(gather(i, [](const at::Tensor&, auto* state) { return state != nullptr; }));
  detail::swap(batches, mode);
  train_mode_ = mode;
}

// ---- the step ---------------------------------------------------------------------------------------

namespace detail {

// The parameters of a step of the base optimizer: at y, or at z and lent to it.
class Loan {
 public:
  explicit Loan(std::vector<LentBatch> batches) : batches_(std::move(batches)) {}
  Loan(const Loan&) = delete;

  // From y to z. Decays z the first time, and clips by the norm of all gradients.
  void to_z(bool first, double norm) {
    std::size_t done = 0;
    try {
      for (; done < batches_.size(); ++done) {
        LentBatch& lent = batches_[done];
        if (first && lent.weight_decay != 0)
          for (const at::Tensor& z : lent.batch.z) lent.z.push_back(z.clone());
        before(lent, first ? lent.coefs : lent.of_no_step);
      }
      for (LentBatch& lent : batches_) lend(lent, clip_factor(norm, lent.max_grad_norm));
    } catch (...) {
      undo(done);
      throw;
    }
  }

  // From z to the y between this z and x.
  void to_y() {
    for (LentBatch& lent : batches_) {
      take_back(lent);
      after(lent, lent.of_no_step);
    }
  }

  // From z to the y of before the step.
  void undo() { undo(batches_.size()); }

  // From the next z to the next y.
  void finish() {
    for (LentBatch& lent : batches_) {
      take_back(lent);
      after(lent, lent.coefs);
    }
  }

  // All gradients, as they are.
  std::vector<at::Tensor> grads() const {
    std::vector<at::Tensor> grads;
    for (const LentBatch& lent : batches_)
      for (const at::Tensor& p : lent.batch.y)
        if (p.grad().defined()) grads.push_back(p.grad());
    return grads;
  }

  // By which a write to parameters or gradients is noticed.
  std::vector<std::pair<const void*, std::uint32_t>> versions() const {
    std::vector<std::pair<const void*, std::uint32_t>> all;
    for (const LentBatch& lent : batches_)
      for (const at::Tensor& p : lent.batch.y)
        for (const at::Tensor& t : {p, p.grad()})
          all.emplace_back(key_of(t), t.defined() && !t.is_inference() ? t._version() : 0);
    return all;
  }

  std::vector<LentBatch>& batches() { return batches_; }

 private:
  static void before(LentBatch& lent, const at::Tensor& coefs) {
    using Signature = void(at::TensorList, at::TensorList, at::TensorList, const at::Tensor&, double, bool);
    static const auto op = operator_named<Signature>("schedulefree_cpp::before_base_step_");
    const at::AutoDispatchBelowADInplaceOrView no_autograd;
    const Batch& batch = lent.batch;
    op.call(batch.y, batch.y_lo, batch.z, coefs, batch.y_beta, !lent.narrow);
    written(batch.y);
  }

  static void after(LentBatch& lent, const at::Tensor& coefs) {
    using Signature = void(at::TensorList, at::TensorList, at::TensorList, const at::Tensor&, bool);
    static const auto op = operator_named<Signature>("schedulefree_cpp::after_base_step_");
    const at::AutoDispatchBelowADInplaceOrView no_autograd;
    const Batch& batch = lent.batch;
    op.call(batch.y, batch.y_lo, batch.z, coefs, !lent.narrow);
    written(batch.y);
  }

  // Gives the base optimizer gradients that are clipped and of the dtype of z, and z itself for memory that
  // has too few bits.
  static void lend(LentBatch& lent, double clip) {
    for (std::size_t i = 0; i < lent.batch.y.size(); ++i) {
      at::Tensor& p = lent.batch.y[i];
      const at::Tensor grad = p.grad();
      lent.grads.push_back(grad);
      if (lent.narrow) {
        lent.own.push_back(p.variable_data());
        p.set_data(lent.batch.z[i]);
      }
      if (!grad.defined() || !(lent.narrow || clip != 1)) continue;
      const at::Tensor wide = grad.to(p.scalar_type());
      p.mutable_grad() = clip == 1 ? wide : wide * clip;
    }
  }

  static void take_back(LentBatch& lent) {
    for (std::size_t i = 0; i < lent.grads.size(); ++i) {
      at::Tensor& p = lent.batch.y[i];
      if (lent.narrow) p.set_data(lent.own[i]);
      if (p.grad().defined()) p.mutable_grad() = lent.grads[i];
    }
    lent.own.clear();
    lent.grads.clear();
  }

  void undo(std::size_t count) {
    for (std::size_t k = count; k-- > 0;) {
      LentBatch& lent = batches_[k];
      take_back(lent);
      for (std::size_t i = 0; i < lent.z.size(); ++i)
        (lent.narrow ? lent.batch.z : lent.batch.y)[i].copy_(lent.z[i]);
      after(lent, lent.of_no_step);
    }
  }

  std::vector<LentBatch> batches_;
};

}  // namespace detail

inline at::Tensor Wrapper::step(LossClosure closure) {
  using namespace detail;
  const auto call_closure = [&] {
    const at::AutoGradMode enabled(true);
    return closure();
  };
  const auto check_mode = [&] {
    check_groups();
    check_expected();
    require_train_mode(train_mode_);
  };
  check_mode();
  at::Tensor loss;
  if (closure) {
    loss = call_closure();
    check_mode();  // the closure may do anything
  }

  const at::NoGradGuard no_grad;
  // First everything that can be refused here, for all groups; then everything that changes.
  struct Plan {
    Group* group;
    StepRule rule;
    StepInputs inputs;
    ScheduleStep step;
    Batch resting;
  };
  std::vector<Plan> plans;
  LentBatches batches;
  bool measures = false;
  for (std::size_t i = 0; i < groups_.size(); ++i) {
    if (!takes_part(base_groups()[i].params())) continue;
    const WrapperOptions& options = groups_[i].options;
    Plan plan{&groups_[i], {}, {}, {}, {}};
    StepRule& rule = plan.rule;
    rule.beta = rule.beta_next = options.momentum();
    rule.r = options.r();
    rule.weight_lr_power = options.weight_lr_power();
    plan.inputs.lr = base_groups()[i].options().get_lr();
    plan.inputs.weight_decay = options.weight_decay_at_y();
    measures = measures || options.max_grad_norm() || options.nonfinite() != Nonfinite::kPropagate;
    plan.step = with_value_error(
        [&] { return schedule_step(plan.group->schedule, plan.group->scheduled_lr, rule, plan.inputs); },
        in_group(i));
    StepCoefficients back;
    back.take = 1;
    back.beta = plan.group->y_beta;
    const at::Tensor scalars = coefs(plan.step.coefs), of_no_step = coefs(back);
    check_coefs(scalars, in_group(i));
    for (const bool narrow : {false, true}) {
      Batch batch = gather(
          i, [&](const at::Tensor& p, auto*) { return p.grad().defined() && narrow == (p.itemsize() == 2); });
      if (batch.y.empty()) continue;
      const double most = options.max_grad_norm().value_or(std::numeric_limits<double>::infinity());
      batches.push_back({std::move(batch),
                         narrow,
                         plan.inputs.weight_decay * plan.inputs.lr,
                         most,
                         scalars,
                         of_no_step,
                         {},
                         {},
                         {}});
    }
    if (plan.group->y_beta != rule.beta_next)  // parameters that rest take the beta of those that step
      plan.resting = gather(i, [](const at::Tensor& p, auto* state) { return state && !p.grad().defined(); });
    plans.push_back(std::move(plan));
  }
  Loan loan(std::move(batches));
  const auto norm = [&] { return measures ? norm_of(loan.grads()) : at::zeros({}, at::kDouble); };
  const at::Tensor first_norm = norm();
  const double norm_on_host = first_norm.item<double>();
  if (measures) {
    const Nonfinite nonfinite = groups_[0].options.nonfinite();
    const bool refuses = nonfinite != Nonfinite::kPropagate && !std::isfinite(norm_on_host);
    if (refuses && nonfinite == Nonfinite::kRaise) refuse_gradients(base_groups(), norm_on_host);
    grad_norm_ = first_norm;
    if (refuses) return loss;
  }

  loan.to_z(/*first=*/true, norm_on_host);
  LossClosure at_y;
  bool known = true;  // the base optimizer's first call, unless it has moved or cleared something before
  if (closure)
    at_y = [&, versions = loan.versions()] {
      if (std::exchange(known, false) && loan.versions() == versions) return loss;
      const at::NoGradGuard no_grad;
      loan.to_y();
      const auto to_z = [&] {
        train();  // whatever the closure did
        loan.to_z(/*first=*/false, norm().item<double>());
      };
      at::Tensor now;
      try {
        now = call_closure();
      } catch (...) {
        to_z();
        throw;
      }
      to_z();
      return now;
    };
  try {
    base_.step(at_y);
  } catch (...) {
    loan.undo();
    throw;
  }
  loan.finish();
  for (LentBatch& lent : loan.batches())
    for (std::unique_ptr<ParamState>& state : lent.batch.created) {
      void* const key = state->owner._unsafe_get_target();
      state_[key] = std::move(state);
    }
  for (Plan& plan : plans) {
    swap(plan.resting, false);
    swap_to_y_of(plan.rule.beta_next, plan.resting);
    plan.group->y_beta = plan.rule.beta_next;
    plan.group->schedule = plan.step.next;
    plan.group->scheduled_lr = plan.step.scheduled_lr;
  }
  return loss;
}

// ---- checkpoints ------------------------------------------------------------------------------------

inline std::vector<detail::Placed> Wrapper::placed() const {
  std::vector<detail::Placed> params;
  for (std::size_t i = 0; i < groups_.size(); ++i)
    for (const at::Tensor& p : base_groups()[i].params())
      params.push_back({p, state_of(p), groups_[i].y_beta});
  return params;
}

inline void Wrapper::check_expected() {
  if (expected_) detail::check_expected(expected_, placed(), train_mode_);
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

inline Dict to_dict(torch::serialize::InputArchive& archive) {
  const Dict entries = make_dict();
  for (const std::string& key : archive.keys()) {
    c10::IValue value;
    archive.read(key, value);
    entries.insert(key, value);
  }
  return entries;
}

inline void write(torch::serialize::OutputArchive& archive, const Dict& entries) {
  for (const auto& entry : entries) archive.write(entry.key().toStringRef(), entry.value());
}

// What an archive holds, read back from memory.
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
  torch::serialize::OutputArchive written;
  if constexpr (std::is_same_v<T, torch::optim::OptimizerParamState>) {
    const auto copy = item.clone();
    // What LBFGS computes anew in each step; torch cannot write it before it is full.
    if (auto* const lbfgs = dynamic_cast<torch::optim::LBFGSParamState*>(copy.get()))
      lbfgs->al(std::optional<std::vector<at::Tensor>>());
    copy->serialize(written);
  } else {
    item.serialize(written);
  }
  torch::serialize::InputArchive archive = read_back(written);
  return to_dict(archive);
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

  // What the base optimizer loads, in the form of torch::optim::serialize.
  using Archive = torch::serialize::OutputArchive;
  Archive of_base, base_states(of_base.compilation_unit()), of_groups(of_base.compilation_unit());
  of_base.write("pytorch_version", c10::IValue("1.5.0"));
  of_groups.write("param_groups/size", at::scalar_tensor(static_cast<std::int64_t>(groups_.size())));
  const auto address = [](const at::Tensor& p) {
    return std::to_string(reinterpret_cast<std::size_t>(key_of(p)));
  };

  std::vector<Group> groups(groups_.size());
  std::vector<std::unique_ptr<ParamState>> loaded;
  bool train_mode = false;
  for (std::size_t i = 0; i < groups_.size(); ++i) {
    const std::string where = in_group(i);
    TORCH_CHECK_VALUE(saved_groups[i].isGenericDict(), "Invalid state dict", where, ": expected a dict");
    const Dict rest = saved_groups[i].toGenericDict().copy();  // what is read is taken out
    Group& group = groups[i];
    group.options = groups_[i].options;
    for (const char* key : {"sf_momentum", "sf_k", "sf_weight_sum", "sf_lr_max"})
      TORCH_CHECK_VALUE(find(rest, key), "Invalid state dict", where, ": it lacks ", key,
                        ", so it is not of a wrapper");
    WrapperOptions::each(
        [&](const char* key, auto member) { take(rest, key, (group.options.*member).value); });
    const bool trains = take_schedule(rest, "sf_", where, group);
    TORCH_CHECK_VALUE(i == 0 || trains == train_mode, "Invalid sf_train_mode", where, kOtherMode);
    train_mode = trains;
    group.y_beta = group.options.momentum();
    take(rest, "sf_momentum_of_y", group.y_beta);
    with_value_error([&] { check_hyperparameter("beta", group.y_beta, " that built y" + where); });

    Archive of_group(of_base.compilation_unit()), options(of_base.compilation_unit());
    const Dict entries = entries_of(base_groups()[i].options());
    for (const auto& entry : entries) {
      const std::string& key = entry.key().toStringRef();
      const c10::IValue* const value = find(rest, key);
      TORCH_CHECK_VALUE(value, "Invalid state dict", where, ": it lacks ", key,
                        ", so it is not of this base optimizer");
      entries.insert_or_assign(key, in_type_of(entry.value(), key, *value));
      rest.erase(rest.find(key));
    }
    write(options, entries);
    of_group.write("options", options);
    const auto own = base_groups()[i].options().clone();
    torch::serialize::InputArchive read = read_back(options);
    own->serialize(read);
    check(group.options, *own, where + " of the state dict");
    const c10::IValue* const maximize = find(rest, "maximize");
    TORCH_CHECK_VALUE(!maximize || maximize->isNone() || (maximize->isBool() && !maximize->toBool()),
                      "Invalid maximize", where,
                      " of the state dict: expected false, for the optimizers of "
                      "libtorch minimize");

    const std::vector<at::Tensor>& params = base_groups()[i].params();
    of_group.write("params/size", at::scalar_tensor(static_cast<std::int64_t>(params.size())));
    for (std::size_t j = 0; j < params.size(); ++j)
      of_group.write("params/" + std::to_string(j), c10::IValue(address(params[j])));
    of_groups.write("param_groups/" + std::to_string(i), of_group);
    const std::vector<SavedState> of_params = saved.take_params(rest, params, where);
    group.foreign = rest;
    for (const auto& [p, entries, what] : of_params) {
      const Dict own = make_dict(), others = entries.copy();
      for (const char* key : {"z", "y_lo"})
        if (const c10::IValue* const value = find(others, std::string("sf_") + key)) {
          own.insert(key, *value);
          others.erase(others.find(std::string("sf_") + key));
        }
      if (!own.empty()) {
        std::unique_ptr<ParamState> state = read_state(own, p, what);
        TORCH_CHECK_VALUE(state->z.defined(), "Invalid state", what, ": it lacks sf_z");
        require_kernels(p);
        match(*state, p, {});
        loaded.push_back(std::move(state));
      }
      if (others.empty()) continue;
      Archive one(of_base.compilation_unit());
      write(one, base_state(others, fresh, p, !is_lbfgs, what));
      base_states.write(address(p), one);
    }
  }
  saved.check();
  const Dict ours =
      find(state_dict, "schedulefree_cpp") ? dict_at(state_dict, "schedulefree_cpp", kWhat) : make_dict();
  std::optional<Fingerprint> expected = read_fingerprint(ours, saved.numbers());
  of_base.write("state", base_states);
  of_base.write("param_groups", of_groups);
  torch::serialize::InputArchive archive = read_back(of_base);

  // Nothing has been changed up to here.
  auto before = std::move(base_.state());
  base_.state().clear();
  try {
    base_.load(archive);
  } catch (...) {
    base_.state() = std::move(before);
    throw;
  }
  groups_ = std::move(groups);
  train_mode_ = train_mode;
  state_.clear();
  for (std::unique_ptr<ParamState>& state : loaded) {
    void* const key = state->owner._unsafe_get_target();
    state_[key] = std::move(state);
  }
  expected_ = std::move(expected);
}

inline void Wrapper::save(torch::serialize::OutputArchive& archive) const {
  detail::save(archive, "Wrapper", state_dict(detail::by_number));
}

inline void Wrapper::load(torch::serialize::InputArchive& archive) {
  load_state_dict(detail::load(archive, "Wrapper"), detail::by_number);
}

}  // namespace schedulefree
