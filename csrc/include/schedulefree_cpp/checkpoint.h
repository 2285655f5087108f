// Checkpoints of the schedule-free optimizers: Python's files and torch's archives, from one state dict.
#pragma once

#include <ATen/MemoryOverlap.h>
#include <torch/nn/module.h>

#include <cmath>
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

// Elements of a fingerprint, as in python/schedulefree_cpp/_modes.py.
inline constexpr std::int64_t kSampledParameters = 64;
inline constexpr std::int64_t kSampledElements = 8;

// The version of the layout that save() writes.
inline constexpr std::int64_t kArchiveFormat = 1;

inline std::int64_t ceil_div(std::int64_t n, std::int64_t d) { return (n + d - 1) / d; }

// A few elements, evenly spread.
inline at::Tensor sample(const at::Tensor& t) {
  const at::Tensor flat = t.reshape({-1});
  return flat.slice(0, 0, flat.numel(), std::max<std::int64_t>(1, ceil_div(flat.numel(), kSampledElements)));
}

inline bool sampled(const at::Tensor& p) { return p.numel() > 0 && p.is_contiguous(); }

inline at::Tensor to_cpu_double(const at::Tensor& t) { return t.to(at::kCPU, at::kDouble); }

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
  TORCH_CHECK_VALUE(value && (value->isList() || value->isTuple()), "Invalid ", of,
                    ": expected a list under \"", key, "\"");
  if (!value->isTuple()) return value->toListRef().vec();
  const auto& elements = value->toTupleRef().elements();
  return std::vector<c10::IValue>(elements.begin(), elements.end());
}

template <class T>
void read(const Dict& dict, const std::string& key, T& out) {
  if (const c10::IValue* const value = find(dict, key)) from_value(key, *value, out);
}

inline std::string to_text(const c10::IValue& name) {
  return name.isString() ? '"' + name.toStringRef() + '"' : std::to_string(name.toInt());
}

// ---- torch's archives -------------------------------------------------------------------------------

// Where a nested archive has this entry, it is a list.
inline constexpr const char* kListSize = "schedulefree_list_size";

// Dicts and lists become nested archives; all else stands under its key.
inline void write_archive(torch::serialize::OutputArchive& archive, const std::string& key,
                          const c10::IValue& value) {
  if (value.isGenericDict()) {
    torch::serialize::OutputArchive nested(archive.compilation_unit());
    for (const auto& entry : value.toGenericDict())
      write_archive(nested,
                    entry.key().isInt() ? std::to_string(entry.key().toInt()) : entry.key().toStringRef(),
                    entry.value());
    archive.write(key, nested);
  } else if (value.isList()) {
    torch::serialize::OutputArchive nested(archive.compilation_unit());
    const auto items = value.toListRef();
    nested.write(kListSize, static_cast<std::int64_t>(items.size()));
    for (std::size_t i = 0; i < items.size(); ++i) write_archive(nested, std::to_string(i), items[i]);
    archive.write(key, nested);
  } else if (value.isTensor()) {
    archive.write(key, value.toTensor(), /*is_buffer=*/true);
  } else {
    archive.write(key, value);
  }
}

// The reverse; keys of dicts become strings.
inline c10::IValue read_archive(torch::serialize::InputArchive& archive) {
  const Dict dict = make_dict();
  for (const std::string& key : archive.keys()) {
    c10::IValue value;
    archive.read(key, value);
    if (value.isModule()) {
      torch::serialize::InputArchive nested;
      archive.read(key, nested);
      value = read_archive(nested);
    }
    dict.insert(key, value);
  }
  const c10::IValue* const size = find(dict, kListSize);
  if (!size) return dict;
  c10::impl::GenericList list(c10::AnyType::get());
  for (std::int64_t i = 0; i < size->toInt(); ++i) list.push_back(dict.at(std::to_string(i)));
  return list;
}

}  // namespace detail

// ---- state dicts ------------------------------------------------------------------------------------

inline detail::Dict Optimizer::state_dict(const Naming& naming) const {
  require_no_open_step("state_dict()");
  check_groups();
  using namespace detail;
  // What eval() keeps, parameter by parameter.
  std::unordered_map<void*, std::pair<at::Tensor, at::Tensor>> kept_of;
  for (const Kept& kept : kept_)
    kept.each([&](void* p, const at::Tensor& at, const at::Tensor& value) { kept_of[p] = {at, value}; });

  const Dict states = make_dict();
  c10::impl::GenericList groups(c10::AnyType::get());
  std::int64_t number = 0;
  for (std::size_t i = 0; i < groups_.size(); ++i) {
    const Dict dict = make_dict();
    for (const auto& entry : groups_[i].foreign) dict.insert(entry.key(), entry.value());
    options(i).to_dict(dict, default_options());
    dict.insert("k", groups_[i].schedule.k);
    dict.insert("weight_sum", groups_[i].schedule.weight_sum);
    dict.insert("lr_max", groups_[i].schedule.lr_max);
    dict.insert("scheduled_lr", groups_[i].scheduled_lr);
    dict.insert("train_mode", groups_[i].train_mode);
    if (groups_[i].y_beta != options(i).hyperparameters().beta) dict.insert("y_beta", groups_[i].y_beta);
    c10::impl::GenericList names(c10::AnyType::get());
    for (const at::Tensor& p : param_groups_[i].params()) {
      const c10::IValue name = naming(p, number++);
      names.push_back(name);
      const ParamState* const state = state_of(p);
      if (!state) continue;
      const Dict own = make_dict();
      ParamState::each_tensor(*state, [&](const char* key, const at::Tensor& t) {
        if (t.defined()) own.insert(std::string(key), t);
      });
      if (const auto it = kept_of.find(key_of(p)); it != kept_of.end()) {
        own.insert_or_assign("y_kept_at", it->second.first);
        own.insert_or_assign("y_kept", it->second.second);
      }
      if (state->y_beta) own.insert("y_beta", *state->y_beta);
      if (state->counters) {
        own.insert("k", state->counters->k);
        own.insert("weight_sum", state->counters->weight_sum);
        own.insert("lr_max", state->counters->lr_max);
      }
      states.insert(name, own);
    }
    dict.insert("params", names);
    groups.push_back(dict);
  }

  const Dict result = make_dict();
  result.insert("state", states);
  result.insert("param_groups", groups);
  if (const auto print = expected_ ? expected_ : fingerprint()) {
    c10::impl::GenericList params(c10::AnyType::get());
    for (const std::int64_t p : print->params) params.push_back(p);
    const Dict samples = make_dict(), ours = make_dict();
    samples.insert("params", params);
    samples.insert("y", print->y);
    samples.insert("x", print->x);
    ours.insert("fingerprint", samples);
    result.insert("schedulefree_cpp", ours);
  }
  return result;
}

namespace detail {

// Throws c10::ValueError for what a schedule cannot reach. `where` is such as " in parameter group 1".
inline void read_schedule(const Dict& dict, const std::string& where, ScheduleState& schedule) {
  read(dict, "k", schedule.k);
  read(dict, "weight_sum", schedule.weight_sum);
  read(dict, "lr_max", schedule.lr_max);
  TORCH_CHECK_VALUE(schedule.k >= 0 && schedule.k < std::int64_t{1} << 53, "Invalid k", where, ": ",
                    schedule.k, ", expected a count of steps");
  TORCH_CHECK_VALUE(std::isfinite(schedule.weight_sum) && schedule.weight_sum >= 0, "Invalid weight_sum",
                    where, ": ", schedule.weight_sum, ", expected a finite value >= 0");
  TORCH_CHECK_VALUE(std::isfinite(schedule.lr_max), "Invalid lr_max", where, ": ", schedule.lr_max,
                    ", expected a finite value");
}

inline void read_y_beta(const Dict& dict, const std::string& where, double& y_beta) {
  read(dict, "y_beta", y_beta);
  TORCH_CHECK_VALUE(y_beta > 0 && y_beta <= 1, "Invalid y_beta", where, ": ", y_beta,
                    ", expected a value in (0, 1]");
}

// Which of our parameters each of a dict's is. By name where both sides tell the same names, else by
// position, as torch goes; but a dict that has nothing but names is refused if they are others.
inline std::vector<std::size_t> positions_of(const std::vector<c10::IValue>& keys,
                                             const std::vector<c10::IValue>& names,
                                             const std::vector<c10::IValue>& own_names,
                                             const std::string& where) {
  std::unordered_map<std::string, std::size_t> own;
  for (std::size_t j = 0; j < own_names.size(); ++j)
    if (own_names[j].isString()) own.emplace(own_names[j].toStringRef(), j);
  std::vector<std::size_t> positions;
  std::unordered_set<std::size_t> found;
  for (std::size_t j = 0; j < keys.size(); ++j) {
    TORCH_CHECK_VALUE(keys[j].isInt() || keys[j].isString(), "Invalid params", where,
                      " of the state dict: a value of type ", keys[j].tagKind(),
                      ", expected an integer or a name");
    const auto it = names[j].isString() ? own.find(names[j].toStringRef()) : own.end();
    if (it != own.end() && found.insert(it->second).second) positions.push_back(it->second);
    TORCH_CHECK_VALUE(!keys[j].isString() || own.empty() || positions.size() == j + 1, "Invalid params",
                      where, " of the state dict: there is ", to_text(keys[j]),
                      ", which is not the name of another of ours");
  }
  if (positions.size() == keys.size()) return positions;
  positions.resize(keys.size());
  std::iota(positions.begin(), positions.end(), std::size_t{0});
  return positions;
}

// A parameter's state, copied; null if the dict has none. `what` is such as " of "fc.bias" in parameter group
// 1".
inline std::unique_ptr<ParamState> read_state(const Dict& dict, const at::Tensor& p,
                                              const std::string& what) {
  auto state = std::make_unique<ParamState>(p);
  ParamState::each_tensor(*state, [&](const std::string& key, at::Tensor& t) {
    const c10::IValue* const value = find(dict, key);
    if (!value) return;
    TORCH_CHECK_VALUE(value->isTensor(), "Invalid ", key, what, ": expected a tensor");
    const at::Tensor& from = value->toTensor();
    const bool integers = key == "y_lo" || key == "y_kept_at";
    TORCH_CHECK_VALUE(integers ? at::isIntegralType(from.scalar_type(), false) : from.is_floating_point(),
                      "Invalid ", key, what, ": dtype ", from.scalar_type());
    if (key == "y_kept_at" || key == "y_kept") {
      t = from.to(p.device(), integers ? at::kLong : at::kDouble, /*non_blocking=*/false, /*copy=*/true);
      return;
    }
    TORCH_CHECK_VALUE(from.sizes() == p.sizes(), "Invalid ", key, what, ": shape ", from.sizes(),
                      ", expected ", p.sizes());
    t = at::empty_like(p, p.options().dtype(integers ? at::kShort : state_dtype(p)).requires_grad(false));
    t.copy_(from);
  });
  if (!state->z.defined()) return nullptr;
  TORCH_CHECK_VALUE(state->kept.defined() == state->kept_at.defined() &&
                        (!state->kept.defined() || state->kept.sizes() == state->kept_at.sizes()),
                    "Invalid state", what, ": y_kept and y_kept_at do not belong together");
  if (find(dict, "y_beta")) read_y_beta(dict, what, state->y_beta.emplace());
  if (find(dict, "k")) read_schedule(dict, what, state->counters.emplace());
  return state;
}

}  // namespace detail

inline void Optimizer::load_state_dict(const detail::Dict& state_dict, const Naming& naming) {
  check_groups();
  using namespace detail;
  const at::NoGradGuard no_grad;
  constexpr const char* kWhat = "state dict";
  const Dict states = dict_at(state_dict, "state", kWhat);
  const std::vector<c10::IValue> saved_groups = list_at(state_dict, "param_groups", kWhat);
  TORCH_CHECK_VALUE(saved_groups.size() == groups_.size(), "Invalid state dict: ", saved_groups.size(),
                    " parameter groups, expected ", groups_.size());

  std::vector<GroupState> groups(groups_.size());
  std::vector<std::unique_ptr<torch::optim::OptimizerOptions>> all_options;
  Created loaded;
  std::vector<std::int64_t> numbers;  // of our parameters, in the order of the dict
  std::int64_t first = 0;
  for (std::size_t i = 0; i < groups_.size(); ++i) {
    const std::string where = in_group(i);
    TORCH_CHECK_VALUE(saved_groups[i].isGenericDict(), "Invalid state dict", where, ": expected a dict");
    const Dict saved = saved_groups[i].toGenericDict();

    all_options.push_back(defaults_->clone());
    auto& own = static_cast<Options&>(*all_options.back());
    for (const char* key : {"lr", own.beta_key()})
      TORCH_CHECK_VALUE(find(saved, key), "Invalid state dict", where, ": it lacks ", key,
                        ", so it is not of ", name());
    own.from_dict(saved);
    own.check(where + " of the state dict");
    const Hyperparameters h = own.hyperparameters();

    GroupState& group = groups[i];
    read_schedule(saved, where, group.schedule);
    read(saved, "scheduled_lr", group.scheduled_lr);
    read(saved, "train_mode", group.train_mode);
    group.y_beta = h.beta;
    read_y_beta(saved, where, group.y_beta);
    static const std::unordered_set<std::string> ours = {"k",          "weight_sum", "lr_max", "scheduled_lr",
                                                         "train_mode", "y_beta",     "params", "param_names"};
    for (const auto& entry : saved) {
      if (!entry.key().isString()) continue;
      const std::string& key = entry.key().toStringRef();
      if (ours.count(key) == 0 && !own.has_key(key)) group.foreign.insert(key, entry.value());
    }

    const std::vector<at::Tensor>& params = param_groups_[i].params();
    const std::vector<c10::IValue> keys = list_at(saved, "params", kWhat);
    const std::vector<c10::IValue> names =
        find(saved, "param_names") ? list_at(saved, "param_names", kWhat) : keys;
    TORCH_CHECK_VALUE(keys.size() == params.size() && names.size() == keys.size(), "Invalid state dict",
                      where, ": ", keys.size(), " parameters with ", names.size(), " names, expected ",
                      params.size());
    std::vector<c10::IValue> own_names;
    for (std::size_t j = 0; j < params.size(); ++j)
      own_names.push_back(naming(params[j], first + static_cast<std::int64_t>(j)));
    const std::vector<std::size_t> positions = positions_of(keys, names, own_names, where);
    for (std::size_t j = 0; j < keys.size(); ++j) {
      numbers.push_back(first + static_cast<std::int64_t>(positions[j]));
      const at::Tensor& p = params[positions[j]];
      auto entry = states.find(keys[j]);
      // An archive has strings for keys.
      if (entry == states.end() && keys[j].isInt()) entry = states.find(std::to_string(keys[j].toInt()));
      if (entry == states.end()) continue;
      const std::string what = " of " + to_text(names[j].isString() ? names[j] : keys[j]) + where;
      TORCH_CHECK_VALUE(entry->value().isGenericDict(), "Invalid state", what, ": expected a dict");
      std::unique_ptr<ParamState> state = read_state(entry->value().toGenericDict(), p, what);
      if (!state) continue;
      TORCH_CHECK_VALUE(!is_adam() || state->exp_avg_sq.defined(), "Invalid state", what,
                        ": it lacks exp_avg_sq, so it is not of ", name());
      complete(*state, p, h, group.schedule);
      loaded[key_of(p)] = std::move(state);
    }
    first += static_cast<std::int64_t>(params.size());
  }

  std::optional<Fingerprint> expected;
  const c10::IValue* const ours = find(state_dict, "schedulefree_cpp");
  if (ours && ours->isGenericDict() && find(ours->toGenericDict(), "fingerprint")) {
    const Dict samples = dict_at(ours->toGenericDict(), "fingerprint", kWhat);
    Fingerprint& print = expected.emplace();
    for (const c10::IValue& saved : list_at(samples, "params", "fingerprint")) {
      const bool known = saved.isInt() && saved.toInt() >= 0 && saved.toInt() < first;
      print.params.push_back(known ? numbers[static_cast<std::size_t>(saved.toInt())] : -1);
    }
    const c10::IValue *y = find(samples, "y"), *x = find(samples, "x");
    TORCH_CHECK_VALUE(y && y->isTensor() && x && x->isTensor(), "Invalid fingerprint in the state dict");
    print.y = to_cpu_double(y->toTensor());
    print.x = to_cpu_double(x->toTensor());
  }

  // Nothing has been changed up to here.
  for (std::size_t i = 0; i < groups_.size(); ++i) param_groups_[i].set_options(std::move(all_options[i]));
  groups_ = std::move(groups);
  state_.clear();
  for (auto& [key, state] : loaded) state_[key] = std::move(state);
  kept_.clear();
  stepped_.clear();
  open_.clear();
  norm_.reset();
  expected_ = std::move(expected);
}

inline void Optimizer::save(torch::serialize::OutputArchive& archive) const {
  archive.write("schedulefree_format", detail::kArchiveFormat);
  archive.write("optimizer", std::string(name()));
  const detail::Dict dict = state_dict([](const at::Tensor&, std::int64_t number) { return number; });
  for (const auto& entry : dict) detail::write_archive(archive, entry.key().toStringRef(), entry.value());
}

inline void Optimizer::load(torch::serialize::InputArchive& archive) {
  c10::IValue format, saved_name;
  TORCH_CHECK_VALUE(archive.try_read("schedulefree_format", format) && format.isInt(),
                    "Invalid archive: it was not saved by a schedulefree optimizer");
  TORCH_CHECK_VALUE(format.toInt() <= detail::kArchiveFormat, "Invalid archive: its format is ",
                    format.toInt(), ", expected at most ", detail::kArchiveFormat,
                    ": it was saved by a newer schedulefree_cpp");
  archive.read("optimizer", saved_name);
  TORCH_CHECK_VALUE(saved_name.isString() && saved_name.toStringRef() == name(),
                    "Invalid archive: it was saved by schedulefree::", saved_name,
                    ", expected schedulefree::", name());
  load_state_dict(detail::read_archive(archive).toGenericDict(),
                  [](const at::Tensor&, std::int64_t number) { return number; });
}

// ---- do parameters and state belong together? -------------------------------------------------------

// Elements of a parameter as they would be in the other mode.
inline at::Tensor Optimizer::counterpart(std::size_t group, const at::Tensor& p,
                                         const detail::ParamState& state) const {
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  const auto part = [&](const at::Tensor& t) {
    return detail::sample(t).to(p.device(), t.scalar_type()).clone();
  };
  const at::Tensor y = part(p);
  std::vector<at::Tensor> y_lo;
  if (state.y_lo.defined() && p.scalar_type() == at::kBFloat16) y_lo.push_back(part(state.y_lo));
  detail::swap_plainly({y}, y_lo, {part(state.z).to(detail::state_dtype(p))},
                       state.y_beta.value_or(groups_[group].y_beta), !groups_[group].train_mode);
  return y;
}

inline std::optional<detail::Fingerprint> Optimizer::fingerprint() const {
  const at::NoGradGuard no_grad;
  struct Home {
    std::int64_t number;
    std::size_t group;
    const at::Tensor* p;
    const detail::ParamState* state;
  };
  std::vector<Home> homes;
  std::int64_t number = 0;
  for (std::size_t i = 0; i < groups_.size(); ++i) {
    for (const at::Tensor& p : param_groups_[i].params()) {
      const detail::ParamState* const state = state_of(p);
      if (state && detail::sampled(p)) homes.push_back({number, i, &p, state});
      ++number;
    }
  }
  if (homes.empty()) return std::nullopt;
  detail::Fingerprint print;
  std::vector<at::Tensor> y, x;
  const auto count = static_cast<std::int64_t>(homes.size());
  const auto stride = static_cast<std::size_t>(
      std::max<std::int64_t>(1, detail::ceil_div(count, detail::kSampledParameters)));
  for (std::size_t i = 0; i < homes.size(); i += stride) {
    const Home& home = homes[i];
    const at::Tensor now = detail::to_cpu_double(detail::sample(*home.p));
    const at::Tensor other = detail::to_cpu_double(counterpart(home.group, *home.p, *home.state));
    const bool train = groups_[home.group].train_mode;
    print.params.push_back(home.number);
    y.push_back(train ? now : other);
    x.push_back(train ? other : now);
  }
  print.y = at::cat(y);
  print.x = at::cat(x);
  return print;
}

// Refuses parameters that are at x where the state says y, or the reverse. Parameters that are neither are
// accepted: who replaced them knows why.
inline void Optimizer::check_expected() {
  if (!expected_) return;
  const at::NoGradGuard no_grad;
  std::vector<std::pair<const at::Tensor*, bool>> params;
  for (std::size_t i = 0; i < groups_.size(); ++i)
    for (const at::Tensor& p : param_groups_[i].params()) params.emplace_back(&p, groups_[i].train_mode);
  std::vector<at::Tensor> now, in_train;
  bool known = !expected_->params.empty();
  for (const std::int64_t number : expected_->params) {
    known = known && number >= 0 && number < static_cast<std::int64_t>(params.size());
    if (!known) break;
    const auto& [p, train] = params[static_cast<std::size_t>(number)];
    known = detail::sampled(*p);
    if (!known) break;
    now.push_back(detail::to_cpu_double(detail::sample(*p)));
    in_train.push_back(at::full_like(now.back(), train ? 1 : 0, at::TensorOptions(at::kBool)));
  }
  if (known && at::cat(now).sizes() == expected_->y.sizes() && expected_->y.sizes() == expected_->x.sizes()) {
    const at::Tensor train = at::cat(in_train), here = at::cat(now);
    const at::Tensor own = at::where(train, expected_->y, expected_->x);
    const at::Tensor other = at::where(train, expected_->x, expected_->y);
    const bool wrong =
        10 * (here - other).abs().sum().item<double>() < (here - own).abs().sum().item<double>();
    const bool says_train = train[0].item<bool>();
    TORCH_CHECK(!wrong, "the parameters are those of ",
                says_train ? "eval mode (x, the average)" : "train mode (y)",
                ", but the loaded optimizer state says ",
                says_train ? "train mode (y)" : "eval mode (x, the average)",
                ": the model was saved in one mode and the optimizer in the other. Save both in the same "
                "mode. To use "
                "this checkpoint as it is, call optimizer.declare_mode(",
                says_train ? "false" : "true", ") first.");
  }
  expected_.reset();
}

// ---- files that Python shares -----------------------------------------------------------------------

namespace detail {

inline std::vector<std::pair<std::string, at::Tensor>> named_tensors(const torch::nn::Module& model) {
  std::vector<std::pair<std::string, at::Tensor>> tensors;
  for (const auto& item : model.named_parameters()) tensors.emplace_back(item.key(), item.value());
  for (const auto& item : model.named_buffers()) tensors.emplace_back(item.key(), item.value());
  return tensors;
}

inline Optimizer::Naming names_of(const torch::nn::Module& model) {
  std::unordered_map<const void*, std::string> names;
  for (const auto& item : model.named_parameters()) names.emplace(key_of(item.value()), item.key());
  return [names = std::move(names)](const at::Tensor& p, std::int64_t number) -> c10::IValue {
    const auto it = names.find(key_of(p));
    TORCH_CHECK_VALUE(it != names.end(), "Invalid model: it has no parameter that is number ", number,
                      " of the optimizer");
    return it->second;
  };
}

template <class Model>
using IfHolder = std::enable_if_t<!std::is_base_of_v<torch::nn::Module, Model>>;

}  // namespace detail

// Writes model and optimizer to a file that Python reads:
//
//   checkpoint = torch.load(path, weights_only=True)
//   model.load_state_dict(checkpoint["model"])
//   optimizer.load_state_dict(checkpoint["optimizer"])
//
// "model" holds parameters and buffers as they are in the optimizer's present mode, "optimizer" its state,
// keyed by the names of the model's parameters. Either mode resumes exactly, in either language. The model
// must have all parameters of the optimizer. A file that exists is replaced only when the new one is
// complete.
inline void save_state_dict(const Optimizer& optimizer, const torch::nn::Module& model,
                            const std::string& path) {
  using namespace detail;
  const Dict tensors = make_dict(), checkpoint = make_dict();
  for (const auto& [name, tensor] : named_tensors(model)) tensors.insert(name, for_file(tensor, name));
  checkpoint.insert("model", tensors);
  checkpoint.insert("optimizer", for_file(c10::IValue(optimizer.state_dict(names_of(model))), "state"));
  write_pickle(path, checkpoint);
}

// Reads what save_state_dict() wrote, or Python's
//
//   torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
//
// or a file of an optimizer's state dict alone, which leaves the model as it is. State belongs to parameters
// by name where the file has names (Python's optimizers have them if they were given
// model.named_parameters()), by position otherwise. Nothing has changed if it throws.
inline void load_state_dict(Optimizer& optimizer, torch::nn::Module& model, const std::string& path) {
  using namespace detail;
  const c10::IValue value = PickleReader::read(path);
  TORCH_CHECK_VALUE(value.isGenericDict(), "Invalid checkpoint ", path, ": expected a dict");
  const Dict checkpoint = value.toGenericDict();
  const bool alone = find(checkpoint, "param_groups") != nullptr;

  TORCH_CHECK_VALUE(alone || find(checkpoint, "model"), "Invalid checkpoint ", path,
                    ": expected \"model\" beside ", "\"optimizer\"");

  std::vector<std::pair<at::Tensor, at::Tensor>> copies;
  if (!alone) {
    const Dict saved = dict_at(checkpoint, "model", "checkpoint");
    std::unordered_set<std::string> own;
    for (const auto& [name, tensor] : named_tensors(model)) {
      own.insert(name);
      const c10::IValue* const from = find(saved, name);
      TORCH_CHECK_VALUE(from && from->isTensor(), "Invalid checkpoint ", path, ": the model lacks \"", name,
                        "\"");
      TORCH_CHECK_VALUE(from->toTensor().sizes() == tensor.sizes(), "Invalid checkpoint ", path, ": \"", name,
                        "\" of the model has shape ", from->toTensor().sizes(), ", expected ",
                        tensor.sizes());
      TORCH_CHECK_VALUE(
          tensor.layout() == at::kStrided && at::has_internal_overlap(tensor) != at::MemOverlap::Yes,
          "Invalid model: \"", name, "\" cannot be written to");
      copies.emplace_back(tensor, from->toTensor());
    }
    for (const auto& entry : saved) {
      TORCH_CHECK_VALUE(entry.key().isString() && own.count(entry.key().toStringRef()) > 0,
                        "Invalid checkpoint ", path, ": the model has ", to_text(entry.key()),
                        ", which this one has not");
    }
  }
  optimizer.load_state_dict(alone ? checkpoint : dict_at(checkpoint, "optimizer", "checkpoint"),
                            names_of(model));
  const at::NoGradGuard no_grad;
  for (auto& [to, from] : copies) to.copy_(from);
}

// The same for torch's module holders and for shared pointers.
template <class Holder, class = detail::IfHolder<Holder>>
void save_state_dict(const Optimizer& optimizer, const Holder& model, const std::string& path) {
  save_state_dict(optimizer, static_cast<const torch::nn::Module&>(*model), path);
}

template <class Holder, class = detail::IfHolder<Holder>>
void load_state_dict(Optimizer& optimizer, Holder& model, const std::string& path) {
  load_state_dict(optimizer, static_cast<torch::nn::Module&>(*model), path);
}

}  // namespace schedulefree
