// Checkpoints of the schedule-free optimizers: Python's files and torch's archives, from one state dict.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/MemoryOverlap.h>
#include <c10/core/InferenceMode.h>
#include <torch/nn/module.h>

#include <cmath>
#include <limits>
#include <numeric>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "optim.h"
#include "pickle.h"

namespace schedulefree {
namespace detail {

// Elements of a fingerprint, as in python/schedulefree_cpp/_core/samples.py.
inline constexpr std::int64_t kSampledParameters = 64;
inline constexpr std::int64_t kSampledElements = 8;

// The distance between those of n things that leaves at most `limit` of them.
inline std::int64_t stride_for(std::int64_t n, std::int64_t limit) {
  return std::max<std::int64_t>(1, (n + limit - 1) / limit);
}

// A few elements, evenly spread.
inline at::Tensor sample(const at::Tensor& t) {
  const at::Tensor flat = t.reshape({-1});
  return flat.slice(0, 0, flat.numel(), stride_for(flat.numel(), kSampledElements));
}

inline bool can_be_sampled(const at::Tensor& p) { return p.numel() > 0 && p.is_contiguous(); }

// ---- reading dicts ----------------------------------------------------------------------------------

inline const c10::IValue* find(const Dict& dict, const std::string& key) {
  const auto it = dict.find(key);
  return it == dict.end() ? nullptr : &it->value();
}

inline Dict dict_at(const Dict& dict, const std::string& key, const char* of) {
  const c10::IValue* const value = find(dict, key);
  TORCH_CHECK_VALUE(value && value->isGenericDict(), "Invalid ", of, ": expected a dict under \"", key, "\"");
  return value->toGenericDict();
}

inline std::vector<c10::IValue> list_at(const Dict& dict, const std::string& key, const char* of) {
  const c10::IValue* const value = find(dict, key);
  TORCH_CHECK_VALUE(value, "Invalid ", of, ": expected a list under \"", key, "\"");
  std::vector<c10::IValue> list;
  from_value(key, *value, list);
  return list;
}

template <class T>
c10::IValue to_list(const std::vector<T>& values) {
  c10::impl::GenericList list(c10::AnyType::get());
  for (const T& value : values) list.push_back(value);
  return list;
}

// Names for dicts that go by position.
inline c10::IValue by_number(const at::Tensor&, std::int64_t number) { return number; }

inline std::string to_text(const c10::IValue& name) {
  return name.isString() ? '"' + name.toStringRef() + '"' : std::to_string(name.toInt());
}

// ---- do parameters and state belong together? -------------------------------------------------------

// Samples of parameters, by their numbers, as they are in train or in eval mode; none if one of them cannot
// be sampled. `trains` tells in which they are.
inline std::optional<at::Tensor> samples(const std::vector<Placed>& params,
                                         const std::vector<std::int64_t>& numbers, bool trains, bool train) {
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> all;
  for (const std::int64_t number : numbers) {
    if (number < 0 || number >= static_cast<std::int64_t>(params.size())) return std::nullopt;
    const auto& [p, state, y_beta] = params[static_cast<std::size_t>(number)];
    if (!can_be_sampled(p)) return std::nullopt;
    const at::Tensor own = sample(p).clone();
    if (train != trains) {
      Batch few;
      few.y_beta = y_beta;
      few.y = {own};
      few.z = {sample(state->z)};
      if (state->y_lo.defined()) few.y_lo = {sample(state->y_lo).clone()};
      if (state->z_lo.defined()) few.z_lo = {sample(state->z_lo)};
      swap(few, train);
    }
    all.push_back(own.to(at::kCPU, at::kDouble));
  }
  return all.empty() ? std::nullopt : std::make_optional(at::cat(all));
}

inline std::optional<Fingerprint> fingerprint(const std::vector<Placed>& params, bool trains) {
  std::vector<std::int64_t> candidates;
  for (std::size_t number = 0; number < params.size(); ++number)
    if (params[number].state && can_be_sampled(params[number].p))
      candidates.push_back(static_cast<std::int64_t>(number));
  if (candidates.empty()) return std::nullopt;
  const auto count = static_cast<std::int64_t>(candidates.size());
  const auto stride = static_cast<std::size_t>(stride_for(count, kSampledParameters));
  Fingerprint print;
  for (std::size_t i = 0; i < candidates.size(); i += stride) print.params.push_back(candidates[i]);
  print.y = *samples(params, print.params, trains, true);
  print.x = *samples(params, print.params, trains, false);
  return print;
}

// Refuses parameters that are at x where the state says y, or the reverse. Parameters that are neither are
// accepted: who replaced them knows why.
inline void check_expected(std::optional<Fingerprint>& expected, const std::vector<Placed>& params,
                           bool trains) {
  const auto now = samples(params, expected->params, trains, trains);
  if (now && now->sizes() == expected->y.sizes()) {
    const auto distance = [&](const at::Tensor& to) { return (*now - to).abs().sum().item<double>(); };
    const double to_y = distance(expected->y), to_x = distance(expected->x);
    const char* const y = "train mode (y)";
    const char* const x = "eval mode (x, the average)";
    TORCH_CHECK(!(trains ? 10 * to_x < to_y : 10 * to_y < to_x), "the parameters are those of ",
                trains ? x : y, ", but the loaded optimizer state says ", trains ? y : x,
                ": the model was saved in one mode and the optimizer in the other. Save both in the same "
                "mode. To use this checkpoint as it is, call optimizer.declare_mode(",
                trains ? "false" : "true", ") first.");
  }
  expected.reset();
}

// ---- state dicts ------------------------------------------------------------------------------------

// Which of a group's `params`, of which `first` is the number of the first, each of a dict's is. By name
// where both sides tell the same names, else by position, as torch goes; but a dict that has nothing but
// names is refused if they are others.
inline std::vector<std::size_t> positions_of(const std::vector<c10::IValue>& keys,
                                             const std::vector<c10::IValue>& names,
                                             const std::vector<at::Tensor>& params, std::int64_t first,
                                             const TwoModes::Naming& naming, const std::string& where) {
  std::unordered_map<std::string, std::size_t> own;
  for (std::size_t j = 0; j < params.size(); ++j) {
    const c10::IValue name = naming(params[j], first + static_cast<std::int64_t>(j));
    if (name.isString()) own.emplace(name.toStringRef(), j);
  }
  const bool named = !own.empty();
  std::vector<std::size_t> positions;
  for (const c10::IValue& name : names) {
    const auto it = own.find(name.isString() ? name.toStringRef() : "");
    if (it == own.end()) break;
    positions.push_back(it->second);
    own.erase(it);
  }
  if (positions.size() == keys.size()) return positions;
  const c10::IValue& unknown = keys[positions.size()];
  TORCH_CHECK_VALUE(!unknown.isString() || !named, "Invalid params", where, " of the state dict: there is ",
                    to_text(unknown), ", which is not the name of another of ours");
  positions.resize(keys.size());
  std::iota(positions.begin(), positions.end(), std::size_t{0});
  return positions;
}

// A dense tensor that has numbers in it, among the dtypes that `fits` accepts.
template <class Fits>
const at::Tensor& tensor_of(const c10::IValue& value, const std::string& name, const char* expected,
                            Fits&& fits) {
  TORCH_CHECK_VALUE(value.isTensor(), "Invalid ", name, ": expected a tensor, got a value of type ",
                    value.tagKind());
  const at::Tensor& t = value.toTensor();
  TORCH_CHECK_VALUE(t.defined() && t.layout() == at::kStrided && !t.is_meta() && fits(t.scalar_type()),
                    "Invalid ", name, ": dtype ", t.scalar_type(), ", layout ", t.layout(), ", device ",
                    t.device(), ", expected ", expected, ", dense");
  return t;
}

inline bool is_float(at::ScalarType dtype) { return at::isFloatingType(dtype); }

// A parameter's state, copied. `what` is such as " of "fc.bias" in parameter group 1".
inline std::unique_ptr<ParamState> read_state(const Dict& dict, const at::Tensor& p,
                                              const std::string& what) {
  auto state = std::make_unique<ParamState>(p);
  for (const auto& [key, t] : state->tensors()) {
    const c10::IValue* const value = find(dict, key);
    if (!value) continue;
    const bool is_low = t == &state->y_lo || t == &state->z_lo, is_moment = t == &state->exp_avg_sq,
               is_scale = t == &state->exp_avg_sq_scale, short_too = t == &state->y_lo;
    const at::Tensor& from =
        tensor_of(*value, key + what, is_low ? "Short or Char" : "a float", [&](at::ScalarType dtype) {
          return is_low ? dtype == at::kChar || (short_too && dtype == at::kShort)
                        : is_float(dtype) || (is_moment && dtype == at::kByte);
        });
    if (is_scale) {
      TORCH_CHECK_VALUE(from.dim() == 1 && from.numel() == scales_for(p), "Invalid ", key, what, ": shape ",
                        from.sizes(), ", expected one dimension of ", scales_for(p));
      *t = from.to(p.device(), at::kFloat, /*non_blocking=*/false, /*copy=*/true);
      const double most = Moment8::scale(Moment8::order(std::numeric_limits<float>::infinity()));
      TORCH_CHECK_VALUE((*t >= 0).logical_and_(*t <= most).all().item<bool>(), "Invalid ", key, what,
                        ": expected values from 0 to ", most);
      continue;
    }
    TORCH_CHECK_VALUE(from.sizes() == p.sizes(), "Invalid ", key, what, ": shape ", from.sizes(),
                      ", expected ", p.sizes());
    // Scales count in the memory of the codes, which follow() turns into that of the parameter.
    *t = like(from.scalar_type() == at::kByte ? from : p, from.scalar_type()).copy_(from);
  }
  const bool has_codes = state->exp_avg_sq.defined() && state->exp_avg_sq.scalar_type() == at::kByte;
  TORCH_CHECK_VALUE(!has_codes || state->exp_avg_sq_scale.defined(), "Invalid state", what,
                    ": it lacks exp_avg_sq_scale, which an exp_avg_sq of dtype Byte needs");
  if (!has_codes) state->exp_avg_sq_scale.reset();
  if (state->z_lo.defined() && state->z.defined() && state->z.scalar_type() != at::kBFloat16)
    state->z_lo.reset();
  return state;
}

// Reads what `Optimizer::state_dict` says of samples. `numbers` are those of our parameters, by the dict's.
inline std::optional<Fingerprint> read_fingerprint(const Dict& ours,
                                                   const std::vector<std::int64_t>& numbers) {
  if (!find(ours, "fingerprint")) return std::nullopt;
  const Dict samples = dict_at(ours, "fingerprint", "state dict");
  Fingerprint print;
  for (const c10::IValue& saved : list_at(samples, "params", "fingerprint")) {
    const bool known =
        saved.isInt() && saved.toInt() >= 0 && saved.toInt() < static_cast<std::int64_t>(numbers.size());
    print.params.push_back(known ? numbers[static_cast<std::size_t>(saved.toInt())] : -1);
  }
  for (const auto& [key, to] : {std::make_pair("y", &print.y), std::make_pair("x", &print.x)}) {
    const c10::IValue* const value = find(samples, key);
    const auto name = std::string(key) + " of the fingerprint in the state dict";
    *to = tensor_of(value ? *value : c10::IValue(), name, "a float", is_float).to(at::kCPU, at::kDouble);
  }
  TORCH_CHECK_VALUE(print.y.dim() == 1 && print.x.sizes() == print.y.sizes() &&
                        print.y.numel() <= kSampledParameters * kSampledElements,
                    "Invalid fingerprint in the state dict: expected two vectors y and x of one length");
  return print;
}

inline void write_fingerprint(const Dict& ours, const std::optional<Fingerprint>& print) {
  if (!print) return;
  const Dict samples = make_dict();
  samples.insert("params", to_list(print->params));
  samples.insert("y", print->y);
  samples.insert("x", print->x);
  ours.insert("fingerprint", samples);
}

inline constexpr const char* kOtherMode =
    " of the state dict: expected that of group 0; call train() or eval() before saving";

// Adds a group's schedule to its dict, and takes it from there: returns the mode. The keys are those of
// Python after `prefix`.
inline void write_schedule(const Dict& dict, const std::string& prefix, const GroupState& group,
                           bool train_mode) {
  dict.insert(prefix + "k", group.schedule.k);
  dict.insert(prefix + "weight_sum", group.schedule.weight_sum);
  dict.insert(prefix + "lr_max", group.schedule.lr_max);
  dict.insert(prefix + "scheduled_lr", group.scheduled_lr);
  dict.insert(prefix + "train_mode", train_mode);
}

inline bool take_schedule(const Dict& rest, const std::string& prefix, const std::string& where,
                          GroupState& group) {
  ScheduleState& schedule = group.schedule;
  take(rest, prefix + "k", schedule.k);
  take(rest, prefix + "weight_sum", schedule.weight_sum);
  take(rest, prefix + "lr_max", schedule.lr_max);
  take(rest, prefix + "scheduled_lr", group.scheduled_lr);
  with_value_error([&, in_dict = where + " of the state dict"] {
    check_hyperparameter("k", static_cast<double>(schedule.k), in_dict);
    check_hyperparameter("weight_sum", schedule.weight_sum, in_dict);
    check_hyperparameter("lr_max", schedule.lr_max, in_dict);
    check_hyperparameter("scheduled_lr", group.scheduled_lr, in_dict);
  });
  bool trains = false;
  take(rest, prefix + "train_mode", trains);
  return trains;
}

// What a dict holds for one of our parameters. `what` is such as " of "fc.bias" in parameter group 1".
struct SavedState {
  at::Tensor p;
  Dict state;
  std::string what;
};

// The parameters of a dict, group by group.
class SavedParams {
 public:
  SavedParams(Dict states, const TwoModes::Naming& naming) : states_(std::move(states)), naming_(naming) {}

  // Takes the names out of a group's dict. Returns the states, without those that are empty.
  std::vector<SavedState> take_params(const Dict& rest, const std::vector<at::Tensor>& params,
                                      const std::string& where) {
    std::vector<c10::IValue> keys;
    take(rest, "params", keys);
    std::vector<c10::IValue> names = keys;
    take(rest, "param_names", names);
    TORCH_CHECK_VALUE(keys.size() == params.size() && names.size() == keys.size(), "Invalid state dict",
                      where, ": ", keys.size(), " parameters with ", names.size(), " names, expected ",
                      params.size());
    const auto first = static_cast<std::int64_t>(numbers_.size());
    const std::vector<std::size_t> positions = positions_of(keys, names, params, first, naming_, where);
    std::vector<SavedState> result;
    for (std::size_t j = 0; j < keys.size(); ++j) {
      TORCH_CHECK_VALUE(keys[j].isInt() || keys[j].isString(), "Invalid params", where,
                        " of the state dict: a value of type ", keys[j].tagKind(),
                        ", expected an integer or a name");
      TORCH_CHECK_VALUE(seen_.insert(to_text(keys[j])).second, "Invalid params", where,
                        " of the state dict: ", to_text(keys[j]), " stands there twice");
      numbers_.push_back(first + static_cast<std::int64_t>(positions[j]));
      const auto entry = states_.find(keys[j]);
      if (entry == states_.end()) continue;
      const std::string what = " of " + to_text(names[j].isString() ? names[j] : keys[j]) + where;
      TORCH_CHECK_VALUE(entry->value().isGenericDict(), "Invalid state", what, ": expected a dict");
      const Dict state = entry->value().toGenericDict();
      if (!state.empty()) result.push_back({params[positions[j]], state, what});
    }
    return result;
  }

  // Throws for a state of no parameter.
  void check() const {
    for (const auto& entry : states_)
      TORCH_CHECK_VALUE(seen_.count(to_text(entry.key())) > 0, "Invalid state dict: it has a state of ",
                        to_text(entry.key()), ", which none of its parameter groups has");
  }

  // The numbers of our parameters, in the order of the dict.
  const std::vector<std::int64_t>& numbers() const { return numbers_; }

 private:
  Dict states_;
  const TwoModes::Naming& naming_;
  std::vector<std::int64_t> numbers_;
  std::unordered_set<std::string> seen_;
};

}  // namespace detail

inline std::vector<detail::Placed> Optimizer::placed() const {
  std::vector<detail::Placed> params;
  for (std::size_t i = 0; i < groups_.size(); ++i)
    for (const at::Tensor& p : param_groups_[i].params())
      params.push_back({p, state_of(p), groups_[i].y_beta});
  return params;
}

inline void TwoModes::check_expected() {
  if (expected_) detail::check_expected(expected_, placed(), train_mode_);
}

inline detail::Dict Optimizer::state_dict(const Naming& naming) const {
  check_groups();
  using namespace detail;
  const Dict states = make_dict();
  std::vector<Dict> groups;
  std::vector<double> y_beta;
  std::int64_t number = 0;
  for (std::size_t i = 0; i < groups_.size(); ++i) {
    const Dict dict = groups_[i].foreign.copy();
    options(i).to_dict(dict, default_options());
    write_schedule(dict, "", groups_[i], train_mode_);
    std::vector<c10::IValue> names;
    for (const at::Tensor& p : param_groups_[i].params()) {
      names.push_back(naming(p, number++));
      ParamState* const state = state_of(p);
      if (!state) continue;
      // A parameter that has become another is for a step to refuse.
      if (state->z.sizes() == p.sizes()) follow(*state, p, options(i).hyperparameters().bits);
      const Dict own = make_dict();
      for (const auto& [key, t] : state->tensors())
        if (t->defined()) own.insert(std::string(key), *t);
      states.insert(names.back(), own);
    }
    dict.insert("params", to_list(names));
    groups.push_back(dict);
    y_beta.push_back(groups_[i].y_beta);
  }

  // What `schedulefree` has no key for.
  const Dict ours = make_dict();
  ours.insert("y_beta", to_list(y_beta));
  write_fingerprint(ours, expected_ ? expected_ : fingerprint(placed(), train_mode_));
  const Dict result = make_dict();
  result.insert("state", states);
  result.insert("param_groups", to_list(groups));
  result.insert("schedulefree_cpp", ours);
  return result;
}

inline void Optimizer::load_state_dict(const detail::Dict& state_dict, const Naming& naming) {
  check_groups();
  using namespace detail;
  const at::NoGradGuard no_grad;
  constexpr const char* kWhat = "state dict";
  SavedParams saved(dict_at(state_dict, "state", kWhat), naming);
  const std::vector<c10::IValue> saved_groups = list_at(state_dict, "param_groups", kWhat);
  TORCH_CHECK_VALUE(saved_groups.size() == groups_.size(), "Invalid state dict: ", saved_groups.size(),
                    " parameter groups, expected ", groups_.size());

  const Dict ours =
      find(state_dict, "schedulefree_cpp") ? dict_at(state_dict, "schedulefree_cpp", kWhat) : make_dict();
  std::vector<c10::IValue> y_beta(groups_.size());
  if (find(ours, "y_beta")) y_beta = list_at(ours, "y_beta", kWhat);
  TORCH_CHECK_VALUE(y_beta.size() == groups_.size(), "Invalid y_beta in the state dict: ", y_beta.size(),
                    " values, expected one for each of ", groups_.size(), " parameter groups");

  std::vector<GroupState> groups(groups_.size());
  bool train_mode = false;
  std::vector<std::unique_ptr<torch::optim::OptimizerOptions>> all_options;
  std::vector<std::unique_ptr<ParamState>> loaded;
  for (std::size_t i = 0; i < groups_.size(); ++i) {
    const std::string where = in_group(i);
    TORCH_CHECK_VALUE(saved_groups[i].isGenericDict(), "Invalid state dict", where, ": expected a dict");
    const Dict rest = saved_groups[i].toGenericDict().copy();  // what is read is taken out

    for (const char* key : {"lr", is_adam() ? "betas" : "momentum", "k", "weight_sum", "lr_max"})
      TORCH_CHECK_VALUE(find(rest, key), "Invalid state dict", where, ": it lacks ", key,
                        ", so it is not of ", name());
    all_options.push_back(defaults_->clone());
    auto& own = static_cast<Options&>(*all_options.back());
    own.keep_layout_of(options(i));
    own.take_from(rest);
    own.check(where + " of the state dict");
    const Hyperparameters h = own.hyperparameters();
    const StepRule& rule = h.rule;

    GroupState& group = groups[i];
    const bool trains = take_schedule(rest, "", where, group);
    TORCH_CHECK_VALUE(i == 0 || trains == train_mode, "Invalid train_mode", where, kOtherMode);
    train_mode = trains;
    group.y_beta = rule.beta_next;
    if (!y_beta[i].isNone()) from_value("y_beta", y_beta[i], group.y_beta);
    with_value_error([&] { check_hyperparameter("beta", group.y_beta, " that built y" + where); });

    const std::vector<SavedState> of_params = saved.take_params(rest, param_groups_[i].params(), where);
    group.foreign = rest;
    for (const auto& [p, state_of_p, what] : of_params) {
      std::unique_ptr<ParamState> state = read_state(state_of_p, p, what);
      const char* const lacks = !state->z.defined()                                         ? "z"
                                : is_adam() && !state->exp_avg_sq.defined()                 ? "exp_avg_sq"
                                : rule.adam.inner_momentum > 0 && !state->exp_avg.defined() ? "exp_avg"
                                                                                            : nullptr;
      TORCH_CHECK_VALUE(!lacks, "Invalid state", what, ": it lacks ", lacks, ", so it is not of ", name());
      follow(*state, p, h.bits);
      loaded.push_back(std::move(state));
    }
  }
  saved.check();
  std::optional<Fingerprint> expected = read_fingerprint(ours, saved.numbers());

  // Nothing has been changed up to here.
  for (std::size_t i = 0; i < groups_.size(); ++i) param_groups_[i].set_options(std::move(all_options[i]));
  groups_ = std::move(groups);
  train_mode_ = train_mode;
  state_.clear();
  for (std::unique_ptr<ParamState>& state : loaded) add_state(std::move(state));
  expected_ = std::move(expected);
}

// ---- torch's archives -------------------------------------------------------------------------------

namespace detail {

inline void save(torch::serialize::OutputArchive& archive, const std::string& name, const Dict& state_dict) {
  archive.write("optimizer", name);
  archive.write("state_dict", c10::IValue(state_dict));
}

inline Dict load(torch::serialize::InputArchive& archive, const std::string& name) {
  c10::IValue saved_name, dict;
  TORCH_CHECK_VALUE(archive.try_read("optimizer", saved_name) && archive.try_read("state_dict", dict),
                    "Invalid archive: it was not saved by a schedulefree optimizer");
  TORCH_CHECK_VALUE(saved_name.isString() && saved_name.toStringRef() == name,
                    "Invalid archive: it was saved by schedulefree::", saved_name,
                    ", expected schedulefree::", name);
  return dict.toGenericDict();
}

}  // namespace detail

inline void Optimizer::save(torch::serialize::OutputArchive& archive) const {
  detail::save(archive, name(), state_dict(detail::by_number));
}

inline void Optimizer::load(torch::serialize::InputArchive& archive) {
  load_state_dict(detail::load(archive, name()), detail::by_number);
}

// ---- files that Python shares -----------------------------------------------------------------------

namespace detail {

inline std::vector<std::pair<std::string, at::Tensor>> named_tensors(const torch::nn::Module& model) {
  std::vector<std::pair<std::string, at::Tensor>> tensors;
  for (const auto& item : model.named_parameters()) tensors.emplace_back(item.key(), item.value());
  for (const auto& item : model.named_buffers()) tensors.emplace_back(item.key(), item.value());
  return tensors;
}

inline TwoModes::Naming names_of(const torch::nn::Module& model) {
  std::unordered_map<const void*, std::string> names;
  for (const auto& item : model.named_parameters()) names.emplace(key_of(item.value()), item.key());
  return [names = std::move(names)](const at::Tensor& p, std::int64_t number) -> c10::IValue {
    const auto it = names.find(key_of(p));
    TORCH_CHECK_VALUE(it != names.end(), "Invalid model: it has no parameter that is number ", number,
                      " of the optimizer");
    return it->second;
  };
}

// Whether a file's tensor can be one of the model's: a weight of its kind, or a buffer, whose integers
// torch::nn::Module::to() makes floats.
inline bool can_become(const at::Tensor& from, const at::Tensor& to, bool is_parameter) {
  return from.is_complex() == to.is_complex() &&
         (!is_parameter || from.is_floating_point() == to.is_floating_point());
}

// Whether copy_() from a tensor of its shape and dtype will succeed.
inline bool can_be_written(const at::Tensor& t) {
  if (t.layout() != at::kStrided || t.is_meta()) return false;
  if (t.is_inference() && !c10::InferenceMode::is_enabled()) return false;
  const std::size_t needed =
      at::detail::computeStorageNbytes(t.sizes(), t.strides(), t.itemsize(), t.storage_offset());
  return at::has_internal_overlap(t) != at::MemOverlap::Yes && needed <= t.storage().nbytes();
}

// The module itself, or that of one of torch's module holders or of a pointer.
template <class Model>
auto& module_of(Model& model) {
  if constexpr (std::is_base_of_v<torch::nn::Module, Model>)
    return model;
  else
    return *model;
}

}  // namespace detail

/// Writes model and optimizer to a file that Python reads:
///
///     checkpoint = torch.load(path, weights_only=True)
///     model.load_state_dict(checkpoint["model"])
///     optimizer.load_state_dict(checkpoint["optimizer"])
///
/// "model" holds parameters and buffers as they are in the optimizer's present mode, "optimizer" its state,
/// keyed by the names of the model's parameters. Either mode resumes exactly, in either language. The model
/// must have all parameters of the optimizer. A file that exists is replaced only when the new one is
/// complete and on disk, so a crash leaves the one or the other.
template <class Model>
void save_state_dict(const TwoModes& optimizer, const Model& model, const std::string& path) {
  using namespace detail;
  const Dict tensors = make_dict(), checkpoint = make_dict();
  for (const auto& [name, tensor] : named_tensors(module_of(model)))
    tensors.insert(name, for_file(tensor, name));
  checkpoint.insert("model", tensors);
  checkpoint.insert("optimizer",
                    for_file(c10::IValue(optimizer.state_dict(names_of(module_of(model)))), "state"));
  write_pickle(path, checkpoint);
}

/// Reads what save_state_dict() wrote, or Python's
///
///     torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
///
/// or a file of an optimizer's state dict alone, which leaves the model as it is. State belongs to parameters
/// by name where the file has names (Python's optimizers have them if they were given
/// model.named_parameters()), by position otherwise. Nothing has changed if it throws.
template <class Model>
void load_state_dict(TwoModes& optimizer, Model& model, const std::string& path) {
  using namespace detail;
  const c10::IValue value = PickleReader::read(path);
  TORCH_CHECK_VALUE(value.isGenericDict(), "Invalid checkpoint ", path, ": expected a dict");
  const Dict checkpoint = value.toGenericDict();
  const bool alone = find(checkpoint, "param_groups") != nullptr;

  std::vector<std::pair<at::Tensor, at::Tensor>> copies;
  if (!alone) {
    const Dict saved = dict_at(checkpoint, "model", "checkpoint");
    std::unordered_set<std::string> own;
    const std::size_t parameters = module_of(model).named_parameters().size();  // which come first
    for (const auto& [name, tensor] : named_tensors(module_of(model))) {
      own.insert(name);
      const c10::IValue* const value = find(saved, name);
      TORCH_CHECK_VALUE(value && value->isTensor(), "Invalid checkpoint ", path, ": the model lacks \"", name,
                        "\"");
      const at::Tensor& from = value->toTensor();
      TORCH_CHECK_VALUE(from.sizes() == tensor.sizes(), "Invalid checkpoint ", path, ": \"", name,
                        "\" of the model has shape ", from.sizes(), ", expected ", tensor.sizes());
      TORCH_CHECK_VALUE(can_become(from, tensor, own.size() <= parameters), "Invalid checkpoint ", path,
                        ": \"", name, "\" of the model has dtype ", from.scalar_type(), ", expected ",
                        tensor.scalar_type(), " or one of its kind");
      TORCH_CHECK_VALUE(can_be_written(tensor), "Invalid model: \"", name, "\" cannot be written to");
      copies.emplace_back(tensor, from.to(tensor.scalar_type()));
    }
    for (const auto& entry : saved) {
      TORCH_CHECK_VALUE(entry.key().isString() && own.count(entry.key().toStringRef()) > 0,
                        "Invalid checkpoint ", path, ": the model has ", to_text(entry.key()),
                        ", which this one has not");
    }
  }
  optimizer.load_state_dict(alone ? checkpoint : dict_at(checkpoint, "optimizer", "checkpoint"),
                            names_of(module_of(model)));
  const at::NoGradGuard no_grad;
  for (auto& [to, from] : copies) to.copy_(from);
}

}  // namespace schedulefree
