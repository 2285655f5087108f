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
#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "build_info.h"
#include "options.h"
#include "schedule.h"
#include "schedulefree_cpp/version.h"

namespace schedulefree {

class Averaged;

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
  explicit ParamState(const at::Tensor& p) : owner(p.getIntrusivePtr()) {}

  // States are found by a parameter's address, which no other gets while this refers to it.
  c10::weak_intrusive_ptr<c10::TensorImpl> owner;
  at::Tensor z;
  at::Tensor exp_avg_sq;                  // relatives of Adam
  at::Tensor exp_avg;                     // with inner momentum
  at::Tensor y_lo;                        // low half of a bfloat16 parameter, int16
  at::Tensor kept_at, kept;               // in checkpoints: see Kept
  std::optional<double> y_beta;           // the beta that built y, where it is not the group's
  std::optional<ScheduleState> counters;  // where parameters count their own steps

  // Calls f(key, tensor) for every tensor.
  template <class Self, class F>
  static void each_tensor(Self& self, F&& f) {
    f("z", self.z);
    f("exp_avg_sq", self.exp_avg_sq);
    f("exp_avg", self.exp_avg);
    f("y_lo", self.y_lo);
    f("y_kept_at", self.kept_at);
    f("y_kept", self.kept);
  }
};

// What a group has beside its options.
struct GroupState {
  ScheduleState schedule;
  double scheduled_lr = 0;
  bool train_mode = false;
  double y_beta = 0;           // the beta that built y
  Dict foreign = make_dict();  // entries of a loaded state dict that belong to others, passed on
};

// What eval() keeps of the parameters that one call took to x, so that the way back is exact.
struct Kept {
  std::vector<void*> params;
  at::Tensor at, value, count;

  // Calls f(param, at, value) for every parameter of which something is kept.
  template <class F>
  void each(F&& f) const {
    const at::Tensor counts = count.cpu();
    std::int64_t begin = 0;
    for (std::size_t i = 0; i < params.size(); ++i) {
      const auto n = counts[static_cast<std::int64_t>(i)].item<std::int64_t>();
      if (n > 0) f(params[i], at.narrow(0, begin, n), value.narrow(0, begin, n));
      begin += n;
    }
  }
};

// Parameters that one operator call updates, with what belongs to them, position by position.
struct Batch {
  std::size_t group = 0;
  std::vector<at::Tensor> y, y_lo, grad, z, exp_avg_sq, exp_avg;
  std::vector<ParamState*> states;
};

// A few elements of the parameters in both modes, by which a model that was saved in the other mode than its
// optimizer is recognised.
struct Fingerprint {
  std::vector<std::int64_t> params;  // numbers, counted through all groups
  at::Tensor y, x;                   // float64
};

// The operators' `grad_norm` for a group.
inline std::optional<at::Tensor> norm_to_clip(const Hyperparameters& h, const at::Tensor& norm) {
  return h.max_grad_norm ? std::make_optional(norm) : std::nullopt;
}

inline void* key_of(const at::Tensor& p) { return p.unsafeGetTensorImpl(); }

inline at::ScalarType state_dtype(const at::Tensor& p) {
  return p.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline bool dtype_supported(const at::Tensor& p) {
  const at::ScalarType t = p.scalar_type();
  return t == at::kFloat || t == at::kDouble || t == at::kBFloat16 || t == at::kHalf;
}

inline std::string in_group(std::size_t index) { return " in parameter group " + std::to_string(index); }

}  // namespace detail

// What the schedule-free optimizers share; not used directly.
//
// Not thread-safe, as torch's are not. Refusals are c10::Error, those of operators std::runtime_error. They
// leave everything as it was, unless said otherwise.
class Optimizer : public torch::optim::Optimizer {
 public:
  // ---- modes ------------------------------------------------------------------------------------------

  // Puts the parameters at y, where gradients are taken; with `false`, eval(). Idempotent. After eval() they
  // are what they were before it, bit for bit.
  void train(bool mode = true);

  // Puts the parameters at the average x, which is to be evaluated and saved. Idempotent.
  void eval() { train(false); }

  // Says where the parameters are, y or x, and moves nothing: for a model that was saved in another mode than
  // its optimizer.
  void declare_mode(bool train);

  // Whether all groups are in train mode. A new optimizer is in eval mode, as in Python.
  bool is_training() const;

  // ---- groups and steps -------------------------------------------------------------------------------

  // Adds a group, in the mode that the optimizer is in. What its options do not set, they have from the
  // optimizer's. Throws for options of another optimizer, for hyperparameters outside their domain, and for
  // parameters that cannot be optimized.
  void add_param_group(const torch::optim::OptimizerParamGroup& group);

  // Takes one step and returns what the closure returned; gradients are only read. The closure is evaluated
  // with gradients enabled.
  //
  // Throws in eval mode and for sparse gradients. Should an operator refuse what only it can see in a later
  // group, such as parameters that share memory, earlier ones have taken the step; the next call takes what
  // remains of it.
  at::Tensor step(LossClosure closure = nullptr) override;

  // Norm of all gradients in the last step that clipped, before clipping: float64, without dimensions.
  // Undefined before.
  const at::Tensor& grad_norm() const { return grad_norm_; }

  // ---- checkpoints ------------------------------------------------------------------------------------

  // For torch::save and torch::load. State belongs to parameters by their position.
  void save(torch::serialize::OutputArchive& archive) const override;
  void load(torch::serialize::InputArchive& archive) override;

  // How a state dict names parameters: by strings (Python's distributed checkpoints) or positions
  // (torch.save).
  using Naming = std::function<c10::IValue(const at::Tensor& p, std::int64_t number)>;

  // The state in Python's layout: {"state": {name: {...}}, "param_groups": [{"params": [name, ...], ...}]}.
  // Tensors are the optimizer's own, not copies.
  detail::Dict state_dict(const Naming& naming) const;

  // Loads such a dict. Parameters are found by name if `naming` and the dict both have names, else by
  // position. Tensors are copied.
  void load_state_dict(const detail::Dict& state_dict, const Naming& naming);

 protected:
  Optimizer(const std::vector<torch::optim::OptimizerParamGroup>& groups,
            std::unique_ptr<detail::Options> defaults);

  // ---- what a class says ------------------------------------------------------------------------------

  virtual StepKind kind() const = 0;

  // Updates a batch. The gradients of all groups have the norm `norm`, where a group clips.
  virtual void update(const detail::Batch& batch, const detail::Hyperparameters& h, const ScheduleStep& step,
                      const StepFactors& factors, const at::Tensor& norm) const = 0;

 private:
  friend class Averaged;

  const detail::Options& default_options() const { return static_cast<const detail::Options&>(*defaults_); }
  const char* name() const { return default_options().optimizer(); }

  const detail::Options& options(std::size_t group) const {
    return static_cast<const detail::Options&>(param_groups_[group].options());
  }

  detail::ParamState* state_of(const at::Tensor& p) const {
    const auto it = state_.find(detail::key_of(p));
    return it == state_.end() ? nullptr : static_cast<detail::ParamState*>(it->second.get());
  }

  void check_group(const torch::optim::OptimizerParamGroup& group, std::size_t index) const;
  void check_groups() const;
  void require_train_mode();
  void require_no_open_step(const char* what) const;
  std::vector<bool> modes() const;

  // The swaps.
  void switch_mode(std::size_t group, bool to_train);
  void swap(std::size_t group, bool to_train);
  void swap_batch(detail::Batch& batch, double before, double after, bool to_train);
  std::optional<detail::Kept> take_kept(const detail::Batch& batch);
  void kept_to_states();

  // The step.
  at::Tensor norm_of(const std::vector<detail::Batch>& batches) const;
  StepFactors factors(const detail::Hyperparameters& h, std::int64_t k) const;
  // Whether it keeps exp_avg_sq.
  bool is_adam() const { return kind() != StepKind::kSgd; }
  using Created = std::unordered_map<void*, std::unique_ptr<detail::ParamState>>;
  void take_step();
  void gather_step(std::size_t group, const detail::Hyperparameters& h, std::vector<detail::Batch>& batches,
                   Created& created) const;
  std::vector<detail::Batch> gather_state(std::size_t group) const;
  static detail::Batch& batch_for(std::vector<detail::Batch>& batches, std::size_t group,
                                  const detail::ParamState& state, bool counted);
  void complete(detail::ParamState& state, const at::Tensor& p, const detail::Hyperparameters& h,
                const ScheduleState& of_group) const;
  static void follow(detail::ParamState& state, const at::Tensor& p);
  ScheduleStep advance(std::size_t group, const detail::Hyperparameters& h, const ScheduleState& state,
                       double y_beta) const;

  // Do parameters and state belong together?
  std::optional<detail::Fingerprint> fingerprint() const;
  at::Tensor counterpart(std::size_t group, const at::Tensor& p, const detail::ParamState& state) const;
  void check_expected();

  std::vector<detail::GroupState> groups_;
  std::vector<detail::Kept> kept_;
  std::optional<detail::Fingerprint> expected_;  // of a loaded state, until the parameters are first used
  // Of a step that an operator has refused halfway.
  std::unordered_set<const void*> stepped_;
  std::vector<ScheduleStep> open_;
  at::Tensor norm_, grad_norm_;  // of the step that is being taken, and of the last
};

// Schedule-Free SGD.
class SGD : public Optimizer {
 public:
  explicit SGD(const std::vector<torch::optim::OptimizerParamGroup>& groups, SGDOptions defaults = {})
      : Optimizer(groups, std::make_unique<SGDOptions>(std::move(defaults))) {}
  explicit SGD(std::vector<at::Tensor> params, SGDOptions defaults = {})
      : SGD({torch::optim::OptimizerParamGroup(std::move(params))}, std::move(defaults)) {}

 private:
  StepKind kind() const override { return StepKind::kSgd; }

  void update(const detail::Batch& batch, const detail::Hyperparameters& h, const ScheduleStep& step,
              const StepFactors&, const at::Tensor& norm) const override {
    using Lists = at::TensorList;
    using Signature = void(Lists, Lists, Lists, Lists, double, double, double, double, std::int64_t, double,
                           const std::optional<at::Tensor>&, std::optional<double>);
    static const auto sgd_step = detail::operator_named<Signature>("schedulefree_cpp::sgd_step_");
    sgd_step.call(batch.y, batch.y_lo, batch.grad, batch.z, step.lr, step.w, step.a, h.weight_decay,
                  static_cast<std::int64_t>(h.decay_at), h.maximize ? -1 : 1, detail::norm_to_clip(h, norm),
                  h.max_grad_norm);
  }
};

namespace detail {

// The relatives of Adam, which differ in scalars.
class AdamFamily : public Optimizer {
 protected:
  using Optimizer::Optimizer;

 private:
  void update(const Batch& batch, const Hyperparameters& h, const ScheduleStep& step,
              const StepFactors& factors, const at::Tensor& norm) const override {
    using Lists = at::TensorList;
    using Signature =
        void(Lists, Lists, Lists, Lists, Lists, Lists, double, double, double, double, double, double, double,
             double, std::int64_t, double, const std::optional<at::Tensor>&, std::optional<double>);
    static const auto adamw_step = operator_named<Signature>("schedulefree_cpp::adamw_step_");
    adamw_step.call(batch.y, batch.y_lo, batch.grad, batch.z, batch.exp_avg_sq, batch.exp_avg, step.lr,
                    step.w, step.a, h.beta2, factors.denom_scale, factors.denom_eps, h.inner_momentum,
                    h.weight_decay, static_cast<std::int64_t>(h.decay_at), h.maximize ? -1 : 1,
                    norm_to_clip(h, norm), h.max_grad_norm);
  }
};

}  // namespace detail

// Schedule-Free AdamW.
class AdamW : public detail::AdamFamily {
 public:
  explicit AdamW(const std::vector<torch::optim::OptimizerParamGroup>& groups, AdamWOptions defaults = {})
      : AdamFamily(groups, std::make_unique<AdamWOptions>(std::move(defaults))) {}
  explicit AdamW(std::vector<at::Tensor> params, AdamWOptions defaults = {})
      : AdamW({torch::optim::OptimizerParamGroup(std::move(params))}, std::move(defaults)) {}

 private:
  StepKind kind() const override { return StepKind::kAdamW; }
};

// Schedule-Free RAdam (with the warmup of Liu et al., arXiv 1908.03265, algorithm 2).
class RAdam : public detail::AdamFamily {
 public:
  explicit RAdam(const std::vector<torch::optim::OptimizerParamGroup>& groups, RAdamOptions defaults = {})
      : AdamFamily(groups, std::make_unique<RAdamOptions>(std::move(defaults))) {}
  explicit RAdam(std::vector<at::Tensor> params, RAdamOptions defaults = {})
      : RAdam({torch::optim::OptimizerParamGroup(std::move(params))}, std::move(defaults)) {}

 private:
  StepKind kind() const override { return StepKind::kRAdam; }
};

// The parameters are x while this lives, and bit for bit what they were after.
//
//   { const schedulefree::Averaged averaged(optimizer); validate(model); }
class Averaged {
 public:
  // `optimizer` must live longer.
  explicit Averaged(Optimizer& optimizer) : optimizer_(optimizer), modes_(optimizer.modes()) {
    optimizer_.eval();
  }

  // Should the way back fail, the optimizer stays in eval mode, where its step() throws.
  ~Averaged() {
    try {
      restore();
    } catch (const c10::Error& error) {
      TORCH_WARN("schedulefree::Averaged could not bring the parameters back: ",
                 error.what_without_backtrace());
    } catch (const std::exception& error) {
      TORCH_WARN("schedulefree::Averaged could not bring the parameters back: ", error.what());
    }
  }

  Averaged(const Averaged&) = delete;
  Averaged& operator=(const Averaged&) = delete;

 private:
  void restore() {
    optimizer_.check_groups();
    for (std::size_t i = 0; i < optimizer_.groups_.size(); ++i) {
      // A group that has been added inside goes the way of the first.
      const bool was = modes_.empty() ? false : modes_[i < modes_.size() ? i : 0];
      if (was && !optimizer_.groups_[i].train_mode) optimizer_.switch_mode(i, true);
    }
  }

  Optimizer& optimizer_;
  std::vector<bool> modes_;
};

// ---- groups -----------------------------------------------------------------------------------------

inline Optimizer::Optimizer(const std::vector<torch::optim::OptimizerParamGroup>& groups,
                            std::unique_ptr<detail::Options> defaults)
    : torch::optim::Optimizer(std::vector<torch::optim::OptimizerParamGroup>{}, std::move(defaults)) {
  detail::require_library();
  default_options().check("");
  for (const torch::optim::OptimizerParamGroup& group : groups) add_param_group(group);
}

inline void Optimizer::check_group(const torch::optim::OptimizerParamGroup& group, std::size_t index) const {
  const std::string where = detail::in_group(index);
  if (group.has_options()) {
    TORCH_CHECK_TYPE(default_options().same_type(group.options()), "Invalid options", where,
                     ": expected schedulefree::", name(), "Options, but got those of another optimizer");
  }
  std::unordered_set<const void*> added;
  for (std::size_t i = 0; i < group.params().size(); ++i) {
    const at::Tensor& p = group.params()[i];
    const std::string which = "Invalid params[" + std::to_string(i) + "]" + where;
    TORCH_CHECK_VALUE(p.defined(), which, ": an undefined tensor");
    TORCH_CHECK_VALUE(p.is_leaf(), which, ": expected a leaf, but got the result of an operation");
    TORCH_CHECK_VALUE(detail::dtype_supported(p), which, ": dtype ", p.scalar_type(),
                      ", expected Float, Double, BFloat16 or Half");
    TORCH_CHECK_VALUE(added.insert(detail::key_of(p)).second, which,
                      ": it stands there more than once; tied weights are to be passed once");
  }
  for (std::size_t other = 0; other < index; ++other)
    for (const at::Tensor& p : param_groups_[other].params())
      TORCH_CHECK_VALUE(added.count(detail::key_of(p)) == 0, "Invalid params", where,
                        ": one of them is already", detail::in_group(other));
}

inline void Optimizer::add_param_group(const torch::optim::OptimizerParamGroup& group) {
  const std::size_t index = param_groups_.size();
  TORCH_CHECK(index == groups_.size(),
              "schedulefree: parameter groups were changed behind the optimizer's back");
  check_group(group, index);
  std::unique_ptr<torch::optim::OptimizerOptions> own =
      group.has_options() ? group.options().clone() : defaults_->clone();
  auto& options = static_cast<detail::Options&>(*own);
  if (group.has_options()) options.inherit(default_options());
  options.check(detail::in_group(index));

  detail::GroupState state;
  state.train_mode = index > 0 && groups_[0].train_mode;
  state.y_beta = options.hyperparameters().beta;
  // The base class drops the options of groups that are not of its own optimizers.
  torch::optim::Optimizer::add_param_group(torch::optim::OptimizerParamGroup(group.params()));
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
    TORCH_CHECK_TYPE(
        param_groups_[i].has_options() && default_options().same_type(param_groups_[i].options()),
        "Invalid options", detail::in_group(i), ": expected schedulefree::", name(),
        "Options, but got those of another optimizer");
    options(i).check(detail::in_group(i));
  }
}

inline void Optimizer::require_no_open_step(const char* what) const {
  TORCH_CHECK(
      stepped_.empty(), what,
      " was called after a step() that was refused halfway: some parameters have taken the step and others "
      "have not. Call step() first.");
}

// ---- modes ------------------------------------------------------------------------------------------

inline bool Optimizer::is_training() const {
  return std::all_of(groups_.begin(), groups_.end(), [](const auto& group) { return group.train_mode; });
}

inline std::vector<bool> Optimizer::modes() const {
  std::vector<bool> modes;
  for (const detail::GroupState& group : groups_) modes.push_back(group.train_mode);
  return modes;
}

inline void Optimizer::train(bool mode) {
  check_groups();
  check_expected();
  std::vector<std::size_t> switched;
  try {
    for (std::size_t i = 0; i < groups_.size(); ++i) {
      if (groups_[i].train_mode == mode) continue;
      switch_mode(i, mode);
      switched.push_back(i);
    }
  } catch (...) {
    for (const std::size_t i : switched) switch_mode(i, !mode);
    throw;
  }
}

inline void Optimizer::declare_mode(bool train) {
  require_no_open_step("declare_mode()");
  for (detail::GroupState& group : groups_) group.train_mode = train;
}

inline void Optimizer::switch_mode(std::size_t group, bool to_train) {
  require_no_open_step("train() or eval()");
  swap(group, to_train);
  groups_[group].train_mode = to_train;
}

inline void Optimizer::swap(std::size_t group, bool to_train) {
  const at::NoGradGuard no_grad;
  const double built = groups_[group].y_beta;
  const double beta = to_train ? options(group).hyperparameters().beta : built;
  std::vector<detail::Batch> batches = gather_state(group);
  const auto swap_one = [&](detail::Batch& batch, bool forward) {
    const std::optional<double>& own = batch.states[0]->y_beta;
    const double before = own.value_or(built), after = own.value_or(beta);
    swap_batch(batch, forward ? before : after, forward ? after : before, to_train == forward);
  };
  std::size_t done = 0;
  try {
    for (; done < batches.size(); ++done) swap_one(batches[done], true);
  } catch (...) {
    while (done > 0) swap_one(batches[--done], false);
    throw;
  }
  groups_[group].y_beta = beta;
}

namespace detail {

// The kernels write through pointers, which autograd does not see.
inline void written(const std::vector<at::Tensor>& tensors) {
  for (const at::Tensor& t : tensors)
    if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
}

// Without keeping or restoring anything.
inline void swap_plainly(const std::vector<at::Tensor>& y, const std::vector<at::Tensor>& y_lo,
                         const std::vector<at::Tensor>& z, double beta, bool to_train) {
  using Signature = void(at::TensorList, at::TensorList, at::TensorList, double);
  static const auto y_to_x = operator_named<Signature>("schedulefree_cpp::y_to_x_");
  static const auto x_to_y = operator_named<Signature>("schedulefree_cpp::x_to_y_");
  (to_train ? x_to_y : y_to_x).call(y, y_lo, z, beta);
}

}  // namespace detail

inline void Optimizer::swap_batch(detail::Batch& batch, double before, double after, bool to_train) {
  using Lists = at::TensorList;
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  if (!to_train) {
    using Signature = std::tuple<at::Tensor, at::Tensor, at::Tensor>(Lists, Lists, Lists, double);
    static const auto y_to_x_keep = detail::operator_named<Signature>("schedulefree_cpp::y_to_x_keep_");
    detail::Kept kept;
    std::tie(kept.at, kept.value, kept.count) = y_to_x_keep.call(batch.y, batch.y_lo, batch.z, before);
    for (const at::Tensor& p : batch.y) kept.params.push_back(detail::key_of(p));
    kept_.erase(std::remove_if(kept_.begin(), kept_.end(),
                               [&](const detail::Kept& old) { return old.params[0] == kept.params[0]; }),
                kept_.end());
    if (kept.at.numel() > 0) kept_.push_back(std::move(kept));
  } else {
    const std::optional<detail::Kept> kept = take_kept(batch);
    try {
      if (kept && before == after) {
        using T = const at::Tensor&;
        using Signature = void(Lists, Lists, Lists, T, T, T, double);
        static const auto restore = detail::operator_named<Signature>("schedulefree_cpp::x_to_y_restore_");
        restore.call(batch.y, batch.y_lo, batch.z, kept->at, kept->value, kept->count, after);
      } else {
        detail::swap_plainly(batch.y, batch.y_lo, batch.z, after, true);
      }
    } catch (...) {
      if (kept) kept_.push_back(*kept);
      throw;
    }
  }
  detail::written(batch.y);
  detail::written(batch.y_lo);
}

// What the swap to x has kept for these parameters; it is then kept no more.
inline std::optional<detail::Kept> Optimizer::take_kept(const detail::Batch& batch) {
  detail::Kept kept;
  for (const at::Tensor& p : batch.y) kept.params.push_back(detail::key_of(p));
  for (auto it = kept_.begin(); it != kept_.end(); ++it) {
    if (it->params == kept.params) {
      kept = std::move(*it);
      kept_.erase(it);
      return kept;
    }
  }
  // They were loaded, or other parameters have come between.
  kept_to_states();
  std::vector<at::Tensor> at, value;
  std::vector<std::int64_t> count;
  for (detail::ParamState* state : batch.states) {
    count.push_back(state->kept.defined() ? state->kept.numel() : 0);
    if (!state->kept.defined()) continue;
    at.push_back(std::exchange(state->kept_at, {}));
    value.push_back(std::exchange(state->kept, {}));
  }
  if (at.empty()) return std::nullopt;
  kept.at = at::cat(at);
  kept.value = at::cat(value);
  kept.count = at::tensor(count, at::TensorOptions(at::kLong)).to(kept.at.device());
  return kept;
}

inline void Optimizer::kept_to_states() {
  for (const detail::Kept& kept : kept_) {
    kept.each([&](void* p, const at::Tensor& at, const at::Tensor& value) {
      const auto it = state_.find(p);
      if (it == state_.end()) return;
      auto& state = static_cast<detail::ParamState&>(*it->second);
      state.kept_at = at.clone();
      state.kept = value.clone();
    });
  }
  kept_.clear();
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

inline void Optimizer::require_train_mode() {
  check_groups();
  check_expected();
  for (std::size_t i = 0; i < groups_.size(); ++i) {
    TORCH_CHECK(groups_[i].train_mode, "step() was called while parameter group ", i,
                " is in eval mode, where the parameters are the average x. "
                "Call optimizer.train() before training and optimizer.eval() before evaluating or saving.");
  }
}

inline void Optimizer::take_step() {
  const at::NoGradGuard no_grad;
  // First everything that can be refused here, for all groups; then everything that changes.
  std::vector<detail::Hyperparameters> hyperparameters;
  std::vector<detail::Batch> batches;
  Created created;
  for (std::size_t i = 0; i < groups_.size(); ++i) {
    hyperparameters.push_back(options(i).hyperparameters());
    gather_step(i, hyperparameters[i], batches, created);
  }
  const bool clips = std::any_of(hyperparameters.begin(), hyperparameters.end(),
                                 [](const auto& h) { return h.max_grad_norm.has_value(); });
  if (stepped_.empty()) norm_ = clips ? norm_of(batches) : at::Tensor();
  TORCH_CHECK(!clips || norm_.defined(),
              "max_grad_norm was set after some parameters had taken this iteration's step: call "
              "optimizer.step() without it first");
  std::vector<ScheduleStep> schedules = open_;
  for (std::size_t i = schedules.size(); i < groups_.size(); ++i)
    schedules.push_back(advance(i, hyperparameters[i], groups_[i].schedule, groups_[i].y_beta));

  struct Plan {
    ScheduleStep step;
    StepFactors factors;
  };
  std::vector<Plan> plans;
  for (const detail::Batch& batch : batches) {
    const detail::Hyperparameters& h = hyperparameters[batch.group];
    const detail::GroupState& group = groups_[batch.group];
    const detail::ParamState& own = *batch.states[0];
    const ScheduleState& counters = h.per_parameter_steps ? own.counters.value() : group.schedule;
    const bool of_group = !h.per_parameter_steps && !own.y_beta;
    plans.push_back({of_group ? schedules[batch.group]
                              : advance(batch.group, h, counters, own.y_beta.value_or(group.y_beta)),
                     factors(h, counters.k)});
  }

  std::unordered_set<const detail::ParamState*> fresh;
  for (auto& [key, state] : created) {
    fresh.insert(state.get());
    state_[key] = std::move(state);
  }
  std::size_t done = 0;
  try {
    const at::AutoDispatchBelowADInplaceOrView no_autograd;
    for (; done < batches.size(); ++done) {
      detail::Batch& batch = batches[done];
      const detail::Hyperparameters& h = hyperparameters[batch.group];
      update(batch, h, plans[done].step, plans[done].factors, norm_);
      for (const auto* list : {&batch.y, &batch.y_lo, &batch.z, &batch.exp_avg_sq, &batch.exp_avg})
        detail::written(*list);
      for (detail::ParamState* state : batch.states) {
        state->y_beta.reset();
        if (h.per_parameter_steps) state->counters = plans[done].step.next;
      }
      if (batches.size() > 1)
        for (const at::Tensor& p : batch.y) stepped_.insert(detail::key_of(p));
    }
  } catch (...) {
    for (; done < batches.size(); ++done)
      for (std::size_t i = 0; i < batches[done].states.size(); ++i)
        if (fresh.erase(batches[done].states[i]) > 0) state_.erase(detail::key_of(batches[done].y[i]));
    if (!stepped_.empty()) open_ = std::move(schedules);
    throw;
  }

  for (std::size_t i = 0; i < groups_.size(); ++i) {
    // Parameters that took no step remember the beta of their y, where the group's has moved.
    const double before = std::exchange(groups_[i].y_beta, hyperparameters[i].beta);
    if (before != groups_[i].y_beta) {
      for (const at::Tensor& p : param_groups_[i].params()) {
        detail::ParamState* const state = state_of(p);
        const bool rested = !p.grad().defined() && stepped_.count(detail::key_of(p)) == 0;
        if (rested && state && !state->y_beta) state->y_beta = before;
      }
    }
    groups_[i].scheduled_lr = schedules[i].lr;
    groups_[i].schedule = schedules[i].next;
  }
  if (norm_.defined()) grad_norm_ = norm_;
  stepped_.clear();
  open_.clear();
}

inline at::Tensor Optimizer::norm_of(const std::vector<detail::Batch>& batches) const {
  std::vector<at::Tensor> grads;
  for (const detail::Batch& batch : batches) grads.insert(grads.end(), batch.grad.begin(), batch.grad.end());
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  static const auto norm = detail::operator_named<at::Tensor(at::TensorList)>("schedulefree_cpp::grad_norm");
  return norm.call(grads);
}

inline StepFactors Optimizer::factors(const detail::Hyperparameters& h, std::int64_t k) const {
  return step_factors(kind(), k, {h.beta2, h.eps, h.inner_momentum, h.silent_sgd_phase});
}

inline ScheduleStep Optimizer::advance(std::size_t group, const detail::Hyperparameters& h,
                                       const ScheduleState& state, double y_beta) const {
  ScheduleOptions o;
  o.lr = h.lr;
  o.lr_factor = factors(h, state.k).lr_factor;
  o.warmup_steps = h.warmup_steps;
  o.r = h.r;
  o.weight_lr_power = h.weight_lr_power;
  o.beta = y_beta;
  o.beta_next = h.beta;
  try {
    return schedulefree::advance(state, o);
  } catch (const std::invalid_argument& error) {
    C10_THROW_ERROR(ValueError, error.what() + detail::in_group(group));
  }
}

// The batch of parameters that agree with this one in what a call has but once: in their counters, too, where
// those are `counted`.
inline detail::Batch& Optimizer::batch_for(std::vector<detail::Batch>& batches, std::size_t group,
                                           const detail::ParamState& state, bool counted) {
  const auto scalars = [counted](const detail::ParamState& s) {
    const ScheduleState counters = counted ? s.counters.value() : ScheduleState{};
    return std::make_tuple(s.y_lo.defined(), s.y_beta, counters.k, counters.weight_sum, counters.lr_max);
  };
  for (auto batch = batches.rbegin(); batch != batches.rend() && batch->group == group; ++batch)
    if (scalars(*batch->states[0]) == scalars(state)) return *batch;
  batches.emplace_back();
  batches.back().group = group;
  return batches.back();
}

inline void Optimizer::gather_step(std::size_t group, const detail::Hyperparameters& h,
                                   std::vector<detail::Batch>& batches, Created& created) const {
  const std::vector<at::Tensor>& params = param_groups_[group].params();
  for (std::size_t i = 0; i < params.size(); ++i) {
    const at::Tensor& p = params[i];
    const at::Tensor& grad = p.grad();
    if (!grad.defined() || stepped_.count(detail::key_of(p)) > 0) continue;
    TORCH_CHECK(grad.layout() == at::kStrided, "params[", i, "]", detail::in_group(group),
                " has a gradient of layout ", grad.layout(),
                ": schedule-free optimizers take dense gradients only");
    detail::require_kernels(p);
    detail::ParamState* state = state_of(p);
    if (!state) {
      // A parameter that stands in the list twice has one state; the operator refuses it.
      std::unique_ptr<detail::ParamState>& made = created[detail::key_of(p)];
      if (!made) made = std::make_unique<detail::ParamState>(p);
      state = made.get();
    }
    TORCH_CHECK(
        !state->z.defined() || h.inner_momentum == 0 || state->exp_avg.defined(), "the state of params[", i,
        "]", detail::in_group(group),
        " lacks exp_avg, which inner_momentum needs: set it before the first step, or load a checkpoint that "
        "was made with it");
    complete(*state, p, h, groups_[group].schedule);
    detail::Batch& batch = batch_for(batches, group, *state, h.per_parameter_steps);
    batch.y.push_back(p);
    batch.grad.push_back(grad);
    batch.z.push_back(state->z);
    if (state->y_lo.defined()) batch.y_lo.push_back(state->y_lo);
    if (is_adam()) batch.exp_avg_sq.push_back(state->exp_avg_sq);
    if (h.inner_momentum > 0) batch.exp_avg.push_back(state->exp_avg);
    batch.states.push_back(state);
  }
}

// Those parameters that have taken a step.
inline std::vector<detail::Batch> Optimizer::gather_state(std::size_t group) const {
  std::vector<detail::Batch> batches;
  for (const at::Tensor& p : param_groups_[group].params()) {
    detail::ParamState* const state = state_of(p);
    if (!state) continue;
    detail::require_kernels(p);
    follow(*state, p);
    detail::Batch& batch = batch_for(batches, group, *state, false);
    batch.y.push_back(p);
    batch.z.push_back(state->z);
    if (state->y_lo.defined()) batch.y_lo.push_back(state->y_lo);
    batch.states.push_back(state);
  }
  return batches;
}

// Adds what a parameter's state lacks; all of it before the first step.
inline void Optimizer::complete(detail::ParamState& state, const at::Tensor& p,
                                const detail::Hyperparameters& h, const ScheduleState& of_group) const {
  const bool begins = !state.z.defined();
  if (begins) {
    state.z = at::empty_like(p, p.options().dtype(detail::state_dtype(p)).requires_grad(false));
    state.z.copy_(p);
  } else {
    follow(state, p);
  }
  if (is_adam() && !state.exp_avg_sq.defined()) state.exp_avg_sq = at::zeros_like(state.z);
  if (h.inner_momentum > 0 && !state.exp_avg.defined()) state.exp_avg = at::zeros_like(state.z);
  // With these 16 bits more, y keeps the precision of float32.
  if (p.scalar_type() == at::kBFloat16 && !state.y_lo.defined())
    state.y_lo = at::zeros_like(p, p.options().dtype(at::kShort).requires_grad(false));
  if (h.per_parameter_steps && !state.counters) state.counters = begins ? ScheduleState{} : of_group;
}

// Takes the state to the parameter's device and to the dtypes that belong to the parameter's.
inline void Optimizer::follow(detail::ParamState& state, const at::Tensor& p) {
  const at::ScalarType dtype = detail::state_dtype(p);
  for (at::Tensor* t : {&state.z, &state.exp_avg_sq, &state.exp_avg})
    if (t->defined()) *t = t->to(p.device(), dtype);
  // The parameter is what its user sees.
  if (p.scalar_type() != at::kBFloat16) state.y_lo.reset();
  for (at::Tensor* t : {&state.y_lo, &state.kept_at, &state.kept})
    if (t->defined()) *t = t->to(p.device());
}

}  // namespace schedulefree

#include "checkpoint.h"
