// Schedule-Free optimizers for C++ programs that train with libtorch (Defazio et al., "The Road Less
// Scheduled", arXiv 2405.15682).
//
//   schedulefree::AdamW optimizer(model->parameters(), schedulefree::AdamWOptions(2.5e-3));
//   optimizer.train();  // the parameters are y: where gradients are taken
//   ...
//   optimizer.step();
//   optimizer.eval();  // the parameters are x: the average to evaluate and save
//
// They are the Python classes SGDScheduleFree, AdamWScheduleFree and RAdamScheduleFree: the same operators,
// the same host scalars, the same checkpoints (checkpoint.h), bit for bit. Header-only, since torch::optim is
// no part of torch's stable ABI: compile it with your own libtorch and link libschedulefree_cpp.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/Exception.h>
#include <torch/optim/optimizer.h>
#include <torch/serialize/archive.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <typeinfo>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "build_info.h"
#include "formats.h"
#include "options.h"
#include "schedule.h"
#include "schedulefree_cpp/version.h"

namespace schedulefree {

/// The scalars of a step as the operators take them: `coefs`, float64 on the CPU.
inline at::Tensor coefs(const StepCoefficients& scalars) {
  const at::Tensor result = at::empty({kStepCoefficients}, at::device(at::kCPU).dtype(at::kDouble));
  std::memcpy(result.mutable_data_ptr(), &scalars, sizeof(scalars));
  return result;
}

namespace detail {

// Reports a header of one version compiled against a library of another. The call also keeps the library
// linked: nothing else of it has a name that a program refers to.
inline void require_library() {
  const std::string library = schedulefree_cpp_version();
  TORCH_CHECK(library == SCHEDULEFREE_CPP_VERSION,
              "schedulefree: this program was compiled with the headers of version ",
              SCHEDULEFREE_CPP_VERSION, " but runs with libschedulefree_cpp ", library,
              ". Compile it again, or have the loader find the other library.");
}

// A program without a CUDA parameter never loads the kernels for them.
inline void require_kernels(const at::Tensor& p) {
  if (!p.is_cuda()) return;
  static const char* const reason = schedulefree_cpp_load_cuda();
  TORCH_CHECK(!reason, "schedulefree: a parameter is on ", p.device(),
              ", but the CUDA kernels cannot be loaded: ", reason ? reason : "");
}

template <class Signature>
auto operator_named(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// What a parameter has beside its value.
struct ParamState : torch::optim::OptimizerCloneableParamState<ParamState> {
  explicit ParamState(const at::Tensor& p) : owner(p.getIntrusivePtr()), dtype(p.scalar_type()) {}

  // States are found by a parameter's address, which no other gets while this refers to it.
  c10::weak_intrusive_ptr<c10::TensorImpl> owner;
  at::ScalarType dtype;  // of the parameter that the formats belong to
  at::Tensor z;
  at::Tensor exp_avg_sq;        // relatives of Adam
  at::Tensor exp_avg;           // with inner momentum
  at::Tensor y_lo;              // low half of a 16-bit parameter
  at::Tensor z_lo;              // that of a z in 24 bits
  at::Tensor exp_avg_sq_scale;  // scales of a second moment of 8 bits

  std::vector<std::pair<const char*, at::Tensor*>> tensors() {
    return {{"z", &z},
            {"exp_avg_sq", &exp_avg_sq},
            {"exp_avg", &exp_avg},
            {"y_lo", &y_lo},
            {"z_lo", &z_lo},
            {"exp_avg_sq_scale", &exp_avg_sq_scale}};
  }
};

// What a group has beside its options.
struct GroupState {
  ScheduleState schedule;
  double scheduled_lr = 0;
  double y_beta = 0;           // the beta that built y
  Dict foreign = make_dict();  // entries of a loaded state dict that belong to others, passed on
};

using Groups = std::vector<torch::optim::OptimizerParamGroup>;

// Parameters of a group that one operator call updates, with what belongs to them, position by position.
struct Batch {
  double y_beta = 0;  // built their y
  std::vector<at::Tensor> y, y_lo, grad, z, z_lo, exp_avg_sq, exp_avg_sq_scale, exp_avg;
  std::vector<std::unique_ptr<ParamState>> created;  // of the parameters whose first step this is
};

// A few elements of the parameters in both modes, by which a model that was saved in the other mode than its
// optimizer is recognised.
struct Fingerprint {
  std::vector<std::int64_t> params;  // numbers, counted through all groups
  at::Tensor y, x;                   // float64
};

// A parameter with what a fingerprint asks of it; the state is null before the first step.
struct Placed {
  at::Tensor p;
  const ParamState* state;
  double y_beta;  // built its y
};

inline void* key_of(const at::Tensor& p) { return p.unsafeGetTensorImpl(); }

inline bool has_supported_dtype(const at::Tensor& p) {
  const at::ScalarType dtype = p.scalar_type();
  return dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf;
}

// Adds what some parameters of a batch have and others lack, for which a tensor without elements stands.
inline void push_part(std::vector<at::Tensor>& list, const at::Tensor& part) {
  static const at::Tensor none = at::empty({0});
  list.push_back(part.defined() ? part : none);
}

// Where none of them has it, the list is empty.
inline void drop_absent(std::vector<at::Tensor>& list) {
  if (std::all_of(list.begin(), list.end(), [](const at::Tensor& t) { return t.numel() == 0; })) list.clear();
}

inline std::string in_group(std::size_t index) { return " in parameter group " + std::to_string(index); }

// The kernels write through pointers, which autograd does not see.
inline void written(const std::vector<at::Tensor>& params) {
  for (const at::Tensor& p : params)
    if (!p.is_inference()) p.unsafeGetTensorImpl()->bump_version();
}

// From y to x, or from x to y. There and back with the beta that built y, whatever the options say now:
// evaluation never changes training.
inline void swap(const Batch& batch, bool to_train) {
  if (batch.y.empty()) return;
  using Signature = void(at::TensorList, at::TensorList, at::TensorList, at::TensorList, double);
  static const auto y_to_x = operator_named<Signature>("schedulefree_cpp::y_to_x_");
  static const auto x_to_y = operator_named<Signature>("schedulefree_cpp::x_to_y_");
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  (to_train ? x_to_y : y_to_x).call(batch.y, batch.y_lo, batch.z, batch.z_lo, batch.y_beta);
  written(batch.y);
}

// All of them, or none where one is refused.
inline void swap(const std::vector<Batch>& batches, bool to_train) {
  const at::NoGradGuard no_grad;
  std::size_t done = 0;
  try {
    for (; done < batches.size(); ++done) swap(batches[done], to_train);
  } catch (...) {
    while (done > 0) swap(batches[--done], !to_train);
    throw;
  }
}

// Has parameters at x hold the y of another beta, and settles it.
inline void swap_to_y_of(double beta, Batch& batch) {
  batch.y_beta = beta;
  swap(batch, true);
  for (int round_trip = 0; round_trip < 2; ++round_trip) {  // what 16-bit parameters need to settle
    swap(batch, false);
    swap(batch, true);
  }
}

// Whether one of a group's parameters has a gradient, or no elements.
inline bool takes_part(const std::vector<at::Tensor>& params) {
  return std::any_of(params.begin(), params.end(), [](const at::Tensor& p) {
    return p.grad().defined() || (p.numel() == 0 && p.requires_grad());
  });
}

[[noreturn]] inline void refuse_gradients(const Groups& groups, double norm) {
  std::string which = c10::str("a gradient (the norm of all gradients is ", norm, ")");
  bool found = false;
  for (std::size_t group = 0; group < groups.size() && !found; ++group) {
    const std::vector<at::Tensor>& params = groups[group].params();
    for (std::size_t i = 0; i < params.size() && !found; ++i) {
      const at::Tensor& grad = params[i].grad();
      found = grad.defined() && !at::isfinite(grad).all().item<bool>();
      if (found) which = c10::str("the gradient of params[", i, "]", in_group(group));
    }
  }
  C10_THROW_ERROR(Error, which +
                             " is not finite; nothing was changed. Nonfinite::kSkip leaves out such steps, "
                             "and kPropagate takes them");
}

// Throws for a parameter that cannot be optimized or is in one of the groups before `index`.
inline void check_params(const torch::optim::OptimizerParamGroup& group, const Groups& groups,
                         std::size_t index) {
  const std::string where = in_group(index);
  std::unordered_map<const void*, std::size_t> homes;
  for (std::size_t other = 0; other < index; ++other)
    for (const at::Tensor& p : groups[other].params()) homes.emplace(key_of(p), other);
  for (std::size_t i = 0; i < group.params().size(); ++i) {
    const at::Tensor& p = group.params()[i];
    const std::string which = "Invalid params[" + std::to_string(i) + "]" + where;
    TORCH_CHECK_VALUE(p.defined(), which, ": an undefined tensor");
    TORCH_CHECK_VALUE(p.is_leaf(), which, ": expected a leaf, but got the result of an operation");
    TORCH_CHECK_VALUE(!p.requires_grad() || has_supported_dtype(p), which, ": dtype ", p.scalar_type(),
                      ", expected Float, Double, BFloat16 or Half");
    const auto home = homes.find(key_of(p));
    TORCH_CHECK_VALUE(home == homes.end(), which, ": it is in parameter group ",
                      home == homes.end() ? 0 : home->second, ", too");
  }
}

inline at::Tensor norm_of(const std::vector<at::Tensor>& grads) {
  static const auto op = operator_named<at::Tensor(at::TensorList)>("schedulefree_cpp::grad_norm");
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  return op.call(grads);
}

// Refuses scalars that overflow, such as those of an enormous learning rate.
inline void check_coefs(const at::Tensor& coefs, const std::string& where) {
  const double* const scalars = coefs.const_data_ptr<double>();
  for (std::int64_t i = 0; i < kStepCoefficients; ++i)
    // Clipping by a norm that is not finite makes grad_mul what it would make the gradients.
    TORCH_CHECK_VALUE(std::isfinite(scalars[i]) || std::strcmp(kCoefficientNames[i], "grad_mul") == 0,
                      "Invalid step", where, ": its ", kCoefficientNames[i], " would be ", scalars[i],
                      ", expected a finite number");
}

}  // namespace detail

/// What Optimizer and Wrapper have in common: two modes, and state dicts.
///
/// Not thread-safe, as torch's optimizers are not. Refusals are c10::Error, those of operators
/// std::runtime_error; they change nothing, unless said otherwise.
class TwoModes {
 public:
  /// Puts the parameters at y, where gradients are taken; with `false`, eval(). Idempotent. After eval() they
  /// are what they were before it, bit for bit.
  void train(bool mode = true);

  /// Puts the parameters at the average x, which is to be evaluated and saved. Idempotent.
  void eval() { train(false); }

  /// Says where the parameters are, y or x, and moves nothing: for a model that was saved in another mode
  /// than its optimizer.
  void declare_mode(bool train) { train_mode_ = train; }

  /// Whether it is in train mode. A new optimizer is in eval mode, as in Python.
  bool is_training() const { return train_mode_; }

  /// Norm of all gradients in the last step that clipped, or that `nonfinite` had look at them, before
  /// clipping: float64, without dimensions. Undefined before; not finite after a step that was skipped.
  const at::Tensor& grad_norm() const { return grad_norm_; }

  /// How a state dict names parameters: by strings (Python's distributed checkpoints) or positions
  /// (torch.save).
  using Naming = std::function<c10::IValue(const at::Tensor& p, std::int64_t number)>;

  /// The state in Python's layout: {"state": {name: {...}}, "param_groups": [{"params": [name, ...], ...}]}.
  /// Tensors are the optimizer's own, not copies, as far as it has them in this form.
  virtual detail::Dict state_dict(const Naming& naming) const = 0;

  /// Loads such a dict. Parameters are found by name if `naming` and the dict both have names, else by
  /// position. Tensors are copied.
  virtual void load_state_dict(const detail::Dict& state_dict, const Naming& naming) = 0;

 protected:
  ~TwoModes() = default;

  // Throws for what a user has changed to something impossible since the last call.
  virtual void check_groups() const = 0;
  virtual std::vector<detail::Batch> gather_with_state() const = 0;
  virtual std::vector<detail::Placed> placed() const = 0;

  // Do parameters and state belong together?
  void check_expected();
  void require_train_mode();

  bool train_mode_ = false;
  std::optional<detail::Fingerprint> expected_;  // of a loaded state, until the parameters are first used
  at::Tensor grad_norm_;
};

/// What the schedule-free optimizers share; not used directly.
class Optimizer : public torch::optim::Optimizer, public TwoModes {
 public:
  // ---- groups and steps -------------------------------------------------------------------------------

  /// Adds a group, in the mode that the optimizer is in. What its options do not set, they have from the
  /// optimizer's. Throws for options of another optimizer, for hyperparameters outside their domain, and for
  /// parameters that cannot be optimized or are in another group. A frozen parameter may be of any dtype; one
  /// that stands twice in the group is kept once, with a warning.
  void add_param_group(const torch::optim::OptimizerParamGroup& group);

  /// Takes one step and returns what the closure returned; gradients are only read. The closure is evaluated
  /// with gradients enabled.
  ///
  /// A group none of whose parameters has a gradient takes no step and counts none. Parameters without
  /// elements that require gradients count as having one, so that the ranks of a sharded run agree.
  ///
  /// Throws in eval mode and for sparse gradients. Should an operator refuse a group for what only it can
  /// see, such as parameters that share memory, earlier groups have taken the step, as in torch::optim; the
  /// refused group and its schedule are unchanged.
  at::Tensor step(LossClosure closure = nullptr) override;

  // ---- checkpoints ------------------------------------------------------------------------------------

  /// What torch::save calls. State belongs to parameters by their position.
  void save(torch::serialize::OutputArchive& archive) const override;
  /// What torch::load calls. Nothing has changed if it throws.
  void load(torch::serialize::InputArchive& archive) override;

  detail::Dict state_dict(const Naming& naming) const override;
  void load_state_dict(const detail::Dict& state_dict, const Naming& naming) override;

 protected:
  Optimizer(const std::vector<torch::optim::OptimizerParamGroup>& groups,
            std::unique_ptr<detail::Options> defaults);

 private:
  const detail::Options& default_options() const { return static_cast<const detail::Options&>(*defaults_); }
  const char* name() const { return default_options().optimizer(); }

  const detail::Options& options(std::size_t group) const {
    return static_cast<const detail::Options&>(param_groups_[group].options());
  }

  detail::ParamState* state_of(const at::Tensor& p) const {
    const auto it = state_.find(detail::key_of(p));
    return it == state_.end() ? nullptr : static_cast<detail::ParamState*>(it->second.get());
  }

  // Whether it keeps exp_avg_sq.
  bool is_adam() const { return default_options().hyperparameters().rule.kind != StepKind::kSgd; }

  void add_state(std::unique_ptr<detail::ParamState> state) {
    void* const key = state->owner._unsafe_get_target();
    state_[key] = std::move(state);
  }

  void check_type(const torch::optim::OptimizerOptions& own, std::size_t index) const;
  void check_groups() const override;

  enum class Which { kWithGradient, kWithState, kResting };
  detail::Batch gather(std::size_t group, Which which) const;
  static void follow(detail::ParamState& state, const at::Tensor& p, const detail::Bits& bits);
  void take_step();
  void update(detail::Batch& batch, const at::Tensor& coefs, DecayAt decay_at);

  std::vector<detail::Batch> gather_with_state() const override;
  std::vector<detail::Placed> placed() const override;

  std::vector<detail::GroupState> groups_;
};

namespace detail {

/// An optimizer, by its options.
template <class OwnOptions>
class OptimizerOf : public Optimizer {
 public:
  /// Begins in eval mode. `defaults` hold for what the options of a group do not mention. Throws if there are
  /// no groups, or no parameters where they stand alone; a group may be empty.
  explicit OptimizerOf(const std::vector<torch::optim::OptimizerParamGroup>& groups, OwnOptions defaults = {})
      : Optimizer(groups, std::make_unique<OwnOptions>(std::move(defaults))) {}
  /// The same, with one group.
  explicit OptimizerOf(std::vector<at::Tensor> params, OwnOptions defaults = {})
      : OptimizerOf(one_group(std::move(params)), std::move(defaults)) {}

 private:
  static std::vector<torch::optim::OptimizerParamGroup> one_group(std::vector<at::Tensor> params) {
    if (params.empty()) return {};
    return {torch::optim::OptimizerParamGroup(std::move(params))};
  }
};

}  // namespace detail

/// Schedule-Free SGD.
using SGD = detail::OptimizerOf<SGDOptions>;
/// Schedule-Free AdamW.
using AdamW = detail::OptimizerOf<AdamWOptions>;
/// Schedule-Free RAdam, with the warmup of Liu et al., arXiv 1908.03265, algorithm 2.
using RAdam = detail::OptimizerOf<RAdamOptions>;

/// The parameters are x while this lives, and bit for bit what they were after.
///
///     { const schedulefree::Averaged averaged(optimizer); validate(model); }
class Averaged {
 public:
  /// `optimizer` must live longer.
  explicit Averaged(TwoModes& optimizer) : optimizer_(optimizer), was_training_(optimizer.is_training()) {
    optimizer_.eval();
  }

  /// Should the way back fail, the optimizer stays in eval mode, where its step() throws.
  ~Averaged() {
    try {
      optimizer_.train(was_training_);
    } catch (const std::exception& error) {
      const auto* const of_torch = dynamic_cast<const c10::Error*>(&error);
      TORCH_WARN("schedulefree::Averaged could not bring the parameters back: ",
                 of_torch ? of_torch->what_without_backtrace() : error.what());
    }
  }

  Averaged(const Averaged&) = delete;
  Averaged& operator=(const Averaged&) = delete;

 private:
  TwoModes& optimizer_;
  bool was_training_;
};

// ---- groups -----------------------------------------------------------------------------------------

inline Optimizer::Optimizer(const std::vector<torch::optim::OptimizerParamGroup>& groups,
                            std::unique_ptr<detail::Options> defaults)
    : torch::optim::Optimizer(std::vector<torch::optim::OptimizerParamGroup>{}, std::move(defaults)) {
  detail::require_library();
  default_options().check("");
  TORCH_CHECK_VALUE(!groups.empty(), "optimizer got an empty parameter list");
  for (const torch::optim::OptimizerParamGroup& group : groups) add_param_group(group);
}

inline void Optimizer::check_type(const torch::optim::OptimizerOptions& own, std::size_t index) const {
  const detail::Options& expected = default_options();
  TORCH_CHECK_TYPE(typeid(own) == typeid(expected), "Invalid options", detail::in_group(index),
                   ": expected schedulefree::", name(), "Options, but got those of another optimizer");
}

inline void Optimizer::add_param_group(const torch::optim::OptimizerParamGroup& group) {
  const std::size_t index = param_groups_.size();
  check_groups();
  std::unique_ptr<torch::optim::OptimizerOptions> own =
      group.has_options() ? group.options().clone() : defaults_->clone();
  check_type(*own, index);
  detail::check_params(group, param_groups_, index);
  auto& options = static_cast<detail::Options&>(*own);
  if (group.has_options()) options.inherit(default_options());
  options.check(detail::in_group(index));

  detail::GroupState state;
  state.y_beta = options.hyperparameters().rule.beta_next;
  std::vector<at::Tensor> params;
  std::unordered_set<const void*> added;
  for (const at::Tensor& p : group.params())
    if (added.insert(detail::key_of(p)).second) params.push_back(p);
  if (params.size() < group.params().size())
    TORCH_WARN("schedulefree: a parameter stands more than once in parameter group ", index,
               ": it takes one step per iteration");
  // The base class drops the options of groups that are not of its own optimizers.
  torch::optim::Optimizer::add_param_group(torch::optim::OptimizerParamGroup(std::move(params)));
  param_groups_.back().set_options(std::move(own));
  groups_.push_back(std::move(state));
}

// What a user may have changed since the last call: anything that param_groups() gives access to.
inline void Optimizer::check_groups() const {
  TORCH_CHECK(param_groups_.size() == groups_.size(), "schedulefree: the optimizer has ",
              param_groups_.size(), " parameter groups, expected ", groups_.size(),
              ". Groups are added by add_param_group() of schedulefree::", name(),
              "; that of torch::optim::Optimizer would drop their options.");
  for (std::size_t i = 0; i < param_groups_.size(); ++i) {
    check_type(param_groups_[i].options(), i);
    options(i).check(detail::in_group(i));
  }
}

// ---- modes ------------------------------------------------------------------------------------------

inline void TwoModes::train(bool mode) {
  check_groups();
  check_expected();
  if (train_mode_ == mode) return;
  detail::swap(gather_with_state(), mode);
  train_mode_ = mode;
}

inline void TwoModes::require_train_mode() {
  check_groups();
  check_expected();
  TORCH_CHECK(
      train_mode_,
      "step() was called in eval mode, where the parameters are the average x. Call optimizer.train() "
      "before training and optimizer.eval() before evaluating or saving.");
}

inline std::vector<detail::Batch> Optimizer::gather_with_state() const {
  const at::NoGradGuard no_grad;
  std::vector<detail::Batch> batches;
  for (std::size_t i = 0; i < groups_.size(); ++i) batches.push_back(gather(i, Which::kWithState));
  return batches;
}

// ---- the step ---------------------------------------------------------------------------------------

inline at::Tensor Optimizer::step(LossClosure closure) {
  require_train_mode();
  at::Tensor loss;
  if (closure) {
    const at::AutoGradMode enabled(true);
    loss = closure();
    require_train_mode();  // the closure may do anything
  }
  take_step();
  return loss;
}

inline void Optimizer::take_step() {
  using namespace detail;
  const at::NoGradGuard no_grad;
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  struct Plan {
    std::size_t group;
    bool counts;  // else it moves to another beta only
    Hyperparameters h;
    Batch stepping, resting;
    ScheduleStep step;
    at::Tensor coefs;
  };
  // First everything that can be refused here, for all groups; then everything that changes.
  std::vector<Plan> plans;
  std::vector<at::Tensor> grads;
  bool measures = false;
  const Nonfinite nonfinite =
      groups_.empty() ? Nonfinite::kPropagate : options(0).hyperparameters().nonfinite;
  for (std::size_t i = 0; i < groups_.size(); ++i) {
    Plan plan{i,
              takes_part(param_groups_[i].params()),
              options(i).hyperparameters(),
              gather(i, Which::kWithGradient),
              {},
              {},
              {}};
    Hyperparameters& h = plan.h;
    TORCH_CHECK_VALUE(h.nonfinite == nonfinite, "Invalid nonfinite", in_group(i), ": ", to_value(h.nonfinite),
                      ", expected ", to_value(nonfinite),
                      " as for the whole optimizer, since the gradients of all groups decide together");
    measures = measures || h.rule.clips || h.nonfinite != Nonfinite::kPropagate;
    h.rule.beta = groups_[i].y_beta;
    if (!plan.counts && h.rule.beta == h.rule.beta_next) continue;
    // Parameters that rest take the beta of those that step.
    if (h.rule.beta != h.rule.beta_next) plan.resting = gather(i, Which::kResting);
    grads.insert(grads.end(), plan.stepping.grad.begin(), plan.stepping.grad.end());
    plans.push_back(std::move(plan));
  }
  const at::Tensor norm = measures ? norm_of(grads) : at::Tensor();
  const double norm_on_host = measures ? norm.item<double>() : 0;
  if (!std::isfinite(norm_on_host) && nonfinite != Nonfinite::kPropagate) {
    if (nonfinite == Nonfinite::kRaise) refuse_gradients(param_groups_, norm_on_host);
    grad_norm_ = norm;
    return;
  }
  for (Plan& plan : plans) {
    if (!plan.counts) continue;
    const GroupState& group = groups_[plan.group];
    plan.h.inputs.grad_norm = norm_on_host;
    const auto next = [&] {
      return schedule_step(group.schedule, group.scheduled_lr, plan.h.rule, plan.h.inputs);
    };
    plan.step = with_value_error(next, in_group(plan.group));
    plan.coefs = coefs(plan.step.coefs);
    check_coefs(plan.coefs, in_group(plan.group));
  }

  for (Plan& plan : plans) {
    GroupState& group = groups_[plan.group];
    swap(plan.resting, false);
    try {
      update(plan.stepping, plan.coefs, plan.h.decay_at);
    } catch (...) {
      swap(plan.resting, true);
      throw;
    }
    group.y_beta = plan.h.rule.beta_next;
    swap_to_y_of(group.y_beta, plan.resting);
    if (!plan.counts) continue;
    group.schedule = plan.step.next;
    group.scheduled_lr = plan.step.scheduled_lr;
  }
  if (measures) grad_norm_ = norm;
}

inline void Optimizer::update(detail::Batch& batch, const at::Tensor& coefs, DecayAt decay_at) {
  if (batch.y.empty()) return;
  using Lists = at::TensorList;
  using Sgd = void(Lists, Lists, Lists, Lists, const at::Tensor&, Lists, std::int64_t);
  using Adam = void(Lists, Lists, Lists, Lists, Lists, Lists, const at::Tensor&, Lists, Lists, std::int64_t);
  static const auto sgd_step = detail::operator_named<Sgd>("schedulefree_cpp::sgd_step_");
  static const auto adamw_step = detail::operator_named<Adam>("schedulefree_cpp::adamw_step_");
  const auto at = static_cast<std::int64_t>(decay_at);
  if (is_adam())
    adamw_step.call(batch.y, batch.y_lo, batch.grad, batch.z, batch.exp_avg_sq, batch.exp_avg, coefs,
                    batch.z_lo, batch.exp_avg_sq_scale, at);
  else
    sgd_step.call(batch.y, batch.y_lo, batch.grad, batch.z, coefs, batch.z_lo, at);
  detail::written(batch.y);
  for (std::unique_ptr<detail::ParamState>& state : batch.created) add_state(std::move(state));
}

// Those of a group's parameters that `which` says. Parameters that have no state get one with the step.
inline detail::Batch Optimizer::gather(std::size_t group, Which which) const {
  const detail::Hyperparameters h = options(group).hyperparameters();
  const double inner_momentum = h.rule.adam.inner_momentum;
  const bool adam = is_adam(), steps = which == Which::kWithGradient;
  const std::vector<at::Tensor>& params = param_groups_[group].params();
  detail::Batch batch;
  batch.y_beta = groups_[group].y_beta;
  for (std::size_t i = 0; i < params.size(); ++i) {
    const at::Tensor& p = params[i];
    const at::Tensor& grad = p.grad();
    detail::ParamState* state = state_of(p);
    TORCH_CHECK(!steps || !grad.defined() || detail::has_supported_dtype(p), "params[", i, "]",
                detail::in_group(group), " of dtype ", p.scalar_type(),
                " has a gradient: expected none, or dtype Float, Double, BFloat16 or Half");
    if (steps ? !grad.defined() : !state || (which == Which::kResting && grad.defined())) continue;
    if (!state) {
      batch.created.push_back(std::make_unique<detail::ParamState>(p));
      state = batch.created.back().get();
      state->z = at::empty_like(p, p.options().dtype(detail::state_dtype(p)).requires_grad(false)).copy_(p);
      if (adam) state->exp_avg_sq = at::zeros_like(state->z);
      if (inner_momentum > 0) state->exp_avg = at::zeros_like(state->z);
    }
    TORCH_CHECK(state->z.sizes() == p.sizes(), "params[", i, "]", detail::in_group(group), " has shape ",
                p.sizes(), ", but its state has shape ", state->z.sizes());
    follow(*state, p, h.bits);
    batch.y.push_back(p);
    batch.z.push_back(state->z);
    detail::push_part(batch.y_lo, state->y_lo);
    detail::push_part(batch.z_lo, state->z_lo);
    if (!steps) continue;
    TORCH_CHECK(grad.layout() == at::kStrided, "params[", i, "]", detail::in_group(group),
                " has a gradient of layout ", grad.layout(),
                ": schedule-free optimizers take dense gradients only");
    TORCH_CHECK(grad.sizes() == p.sizes() && grad.device() == p.device(), "params[", i, "]",
                detail::in_group(group), " of shape ", p.sizes(), " on ", p.device(),
                " has a gradient of shape ", grad.sizes(), " on ", grad.device());
    TORCH_CHECK(
        inner_momentum == 0 || state->exp_avg.defined(), "the state of params[", i, "]",
        detail::in_group(group),
        " lacks exp_avg, which inner_momentum needs: set it before the first step, or load a checkpoint that "
        "was made with it");
    batch.grad.push_back(grad);
    if (adam) batch.exp_avg_sq.push_back(state->exp_avg_sq);
    if (adam) detail::push_part(batch.exp_avg_sq_scale, state->exp_avg_sq_scale);
    if (inner_momentum > 0) batch.exp_avg.push_back(state->exp_avg);
  }
  for (auto* part : {&batch.y_lo, &batch.z_lo, &batch.exp_avg_sq_scale}) detail::drop_absent(*part);
  return batch;
}

// Takes the state to the parameter's device, where kernels are needed, and to the formats that belong to the
// parameter.
inline void Optimizer::follow(detail::ParamState& state, const at::Tensor& p, const detail::Bits& bits) {
  detail::require_kernels(p);
  detail::match(state, p, bits);
}

}  // namespace schedulefree

#include "checkpoint.h"
