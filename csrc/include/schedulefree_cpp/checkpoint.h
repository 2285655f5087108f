// Checkpoints of the schedule-free optimizers: Python's files and torch's archives, from one state dict.
#pragma once

#include <torch/nn/module.h>

#include <cmath>
#include <string>
#include <type_traits>
#include <unordered_map>
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

// ---- reading dicts
// -----------------------------------------------------------------------------------------

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

// ---- torch's archives
// --------------------------------------------------------------------------------------

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
    nested.write("size", static_cast<std::int64_t>(items.size()));
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
  const c10::IValue* const size = find(dict, "size");
  if (!size) return dict;
  c10::impl::GenericList list(c10::AnyType::get());
  for (std::int64_t i = 0; i < size->toInt(); ++i) list.push_back(dict.at(std::to_string(i)));
  return list;
}

}  // namespace detail

// ---- state dicts
// -------------------------------------------------------------------------------------------

inline detail::Dict Optimizer::state_dict(const Naming& naming) const {
  require_no_open_step("state_dict()");
  check_groups();
  using namespace detail;
  // What eval() keeps, parameter by parameter.
  std::unordered_map<const void*, std::pair<at::Tensor, at::Tensor>> kept_of;
  for (const Kept& kept : kept_) {
    std::int64_t begin = 0;
    const at::Tensor count = kept.count.cpu();
    for (std::size_t i = 0; i < kept.params.size(); ++i) {
      const auto n = count[static_cast<std::int64_t>(i)].item<std::int64_t>();
      if (n > 0) kept_of[kept.params[i]] = {kept.at.narrow(0, begin, n), kept.value.narrow(0, begin, n)};
      begin += n;
    }
  }

  const Dict states = make_dict();
  c10::impl::GenericList groups(c10::AnyType::get());
  std::int64_t number = 0;
  for (std::size_t i = 0; i < groups_.size(); ++i) {
    const Dict dict = make_dict();
    for (const auto& entry : groups_[i].foreign) dict.insert(entry.key(), entry.value());
    options(i).to_dict(dict);
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

inline void Optimizer::load_state_dict(const detail::Dict& state_dict, const Naming& naming) {
  check_groups();
  using namespace detail;
  constexpr const char* kWhat = "state dict";
  const Dict states = dict_at(state_dict, "state", kWhat);
  const std::vector<c10::IValue> saved_groups = list_at(state_dict, "param_groups", kWhat);
  TORCH_CHECK_VALUE(saved_groups.size() == groups_.size(), "Invalid state dict: ", saved_groups.size(),
                    " parameter groups, expected ", groups_.size());

  std::vector<GroupState> groups(groups_.size());
  std::vector<std::unique_ptr<Options>> options;
  Created loaded;
  std::vector<std::int64_t> numbers;  // of our parameters, in the order of the dict
  std::int64_t first = 0;
  for (std::size_t i = 0; i < groups_.size(); ++i) {
    const std::string where = in_group(i);
    TORCH_CHECK_VALUE(saved_groups[i].isGenericDict(), "Invalid state dict", where, ": expected a dict");
    const Dict saved = saved_groups[i].toGenericDict();

    // The options and the schedule.
    auto own = std::unique_ptr<Options>(static_cast<Options*>(defaults_->clone().release()));
    for (const char* key : {"lr", own->beta_key()})
      TORCH_CHECK_VALUE(find(saved, key), "Invalid state dict", where, ": it lacks ", key,
                        ", so it is not of ", name());
    own->from_dict(saved);
    own->check(where + " of the state dict");
    GroupState& group = groups[i];
    read(saved, "k", group.schedule.k);
    read(saved, "weight_sum", group.schedule.weight_sum);
    read(saved, "lr_max", group.schedule.lr_max);
    read(saved, "scheduled_lr", group.scheduled_lr);
    read(saved, "train_mode", group.train_mode);
    group.y_beta = own->hyperparameters().beta;
    read(saved, "y_beta", group.y_beta);
    static const std::unordered_set<std::string> ours = {"k",          "weight_sum", "lr_max", "scheduled_lr",
                                                         "train_mode", "y_beta",     "params", "param_names"};
    for (const auto& entry : saved) {
      const std::string key = entry.key().isString() ? entry.key().toStringRef() : "";
      if (!key.empty() && ours.count(key) == 0 && !own->has_key(key))
        group.foreign.insert(key, entry.value());
    }
    options.push_back(std::move(own));

    // Which of our parameters each of the dict's is.
    const std::vector<at::Tensor>& params = param_groups_[i].params();
    const std::vector<c10::IValue> keys = list_at(saved, "params", kWhat);
    TORCH_CHECK_VALUE(keys.size() == params.size(), "Invalid state dict", where, ": ", keys.size(),
                      " parameters, expected ", params.size());
    const std::vector<c10::IValue> names =
        find(saved, "param_names") ? list_at(saved, "param_names", kWhat) : keys;
    TORCH_CHECK_VALUE(names.size() == keys.size(), "Invalid state dict", where, ": ", names.size(),
                      " param_names for ", keys.size(), " params");
    std::unordered_map<std::string, std::size_t> by_name;
    for (std::size_t j = 0; j < params.size(); ++j) {
      const c10::IValue own_name = naming(params[j], first + static_cast<std::int64_t>(j));
      if (own_name.isString() && names[j].isString()) by_name.emplace(own_name.toStringRef(), j);
    }
    for (std::size_t j = 0; j < keys.size(); ++j) {
      std::size_t position = j;
      if (!by_name.empty()) {
        const auto it = names[j].isString() ? by_name.find(names[j].toStringRef()) : by_name.end();
        TORCH_CHECK_VALUE(it != by_name.end(), "Invalid state dict", where, ": it has a parameter ",
                          to_text(names[j]), ", which this optimizer has not");
        position = it->second;
      }
      numbers.push_back(first + static_cast<std::int64_t>(position));
      const at::Tensor& p = params[position];
      const auto it = states.find(keys[j]);
      const auto text =
          it == states.end() && keys[j].isInt() ? states.find(std::to_string(keys[j].toInt())) : it;
      if (text == states.end()) continue;

      // Its state.
      TORCH_CHECK_VALUE(text->value().isGenericDict(), "Invalid state of ", to_text(names[j]), where,
                        ": expected a dict");
      const Dict entries = text->value().toGenericDict();
      auto state = std::make_unique<ParamState>(p);
      ParamState::each_tensor(*state, [&](const std::string& key, at::Tensor& t) {
        const c10::IValue* const value = find(entries, key);
        if (!value) return;
        TORCH_CHECK_VALUE(value->isTensor(), "Invalid ", key, " of ", to_text(names[j]), where,
                          ": expected a tensor");
        const at::Tensor& from = value->toTensor();
        const bool kept = key == "y_kept_at" || key == "y_kept";
        if (kept) {
          t = from.to(p.device(), key == "y_kept" ? at::kDouble : at::kLong, false, /*copy=*/true);
          return;
        }
        TORCH_CHECK_VALUE(from.sizes() == p.sizes(), "Invalid ", key, " of ", to_text(names[j]), where,
                          ": shape ", from.sizes(), ", expected ", p.sizes());
        const at::ScalarType dtype = key == "y_lo" ? at::kShort : state_dtype(p);
        t = at::empty_like(p, p.options().dtype(dtype).requires_grad(false));
        const at::NoGradGuard no_grad;
        t.copy_(from);
      });
      if (!state->z.defined()) continue;
      TORCH_CHECK_VALUE(!is_adam() || state->exp_avg_sq.defined(), "Invalid state of ", to_text(names[j]),
                        where, ": it lacks exp_avg_sq, so it is not of ", name());
      TORCH_CHECK_VALUE(state->kept.defined() == state->kept_at.defined() &&
                            (!state->kept.defined() || state->kept.sizes() == state->kept_at.sizes()),
                        "Invalid state of ", to_text(names[j]), where,
                        ": y_kept and y_kept_at do not belong together");
      if (p.scalar_type() != at::kBFloat16) state->y_lo.reset();
      if (find(entries, "y_beta")) read(entries, "y_beta", state->y_beta.emplace());
      if (find(entries, "k")) {
        ScheduleState& counters = state->counters.emplace();
        read(entries, "k", counters.k);
        read(entries, "weight_sum", counters.weight_sum);
        read(entries, "lr_max", counters.lr_max);
      }
      loaded.emplace_back(state_key_of(p), std::move(state));
    }
    first += static_cast<std::int64_t>(params.size());
  }

  std::optional<Fingerprint> expected;
  if (const c10::IValue* const ours = find(state_dict, "schedulefree_cpp"); ours && ours->isGenericDict()) {
    const Dict samples = dict_at(ours->toGenericDict(), "fingerprint", "state dict's \"schedulefree_cpp\"");
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
  for (std::size_t i = 0; i < groups_.size(); ++i) param_groups_[i].set_options(std::move(options[i]));
  groups_ = std::move(groups);
  state_.clear();
  for (auto& [key, state] : loaded) state_[key] = std::move(state);
  kept_.clear();
  stepped_.clear();
  open_.clear();
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

// ---- do parameters and state belong together?
// --------------------------------------------------------------

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
    TORCH_CHECK(
        !wrong, "the parameters are those of ", says_train ? "eval mode (x, the average)" : "train mode (y)",
        ", but the loaded optimizer state says ",
        says_train ? "train mode (y)" : "eval mode (x, the average)",
        ": the model was saved in one mode and the optimizer in the other. Save both in the same mode.");
  }
  expected_.reset();
}

// ---- files that Python shares
// ------------------------------------------------------------------------------

namespace detail {

// Contiguous, on the CPU and without a share in larger storage.
inline at::Tensor for_file(const at::Tensor& t) {
  const at::Tensor own = t.detach().cpu().contiguous();
  return own.storage().nbytes() == own.nbytes() ? own : own.clone();
}

inline c10::IValue for_file(const c10::IValue& value) {
  if (value.isTensor()) return for_file(value.toTensor());
  if (value.isGenericDict()) {
    const Dict dict = make_dict();
    for (const auto& entry : value.toGenericDict()) dict.insert(entry.key(), for_file(entry.value()));
    return dict;
  }
  if (value.isList()) {
    c10::impl::GenericList list(c10::AnyType::get());
    for (const c10::IValue& item : value.toListRef()) list.push_back(for_file(item));
    return list;
  }
  return value;
}

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
  for (const auto& [name, tensor] : named_tensors(model)) tensors.insert(name, for_file(tensor));
  checkpoint.insert("model", tensors);
  checkpoint.insert("optimizer", for_file(c10::IValue(optimizer.state_dict(names_of(model)))));
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

  std::vector<std::pair<at::Tensor, at::Tensor>> copies;
  if (!alone && find(checkpoint, "model")) {
    const Dict saved = dict_at(checkpoint, "model", "checkpoint");
    const auto own = named_tensors(model);
    for (const auto& [name, tensor] : own) {
      const c10::IValue* const from = find(saved, name);
      TORCH_CHECK_VALUE(from && from->isTensor(), "Invalid checkpoint ", path, ": the model lacks \"", name,
                        "\"");
      TORCH_CHECK_VALUE(from->toTensor().sizes() == tensor.sizes(), "Invalid checkpoint ", path, ": \"", name,
                        "\" of the model has shape ", from->toTensor().sizes(), ", expected ",
                        tensor.sizes());
      copies.emplace_back(tensor, from->toTensor());
    }
    for (const auto& entry : saved) {
      const auto same = [&](const auto& item) { return c10::IValue(item.first) == entry.key(); };
      TORCH_CHECK_VALUE(std::any_of(own.begin(), own.end(), same), "Invalid checkpoint ", path,
                        ": the model has ", to_text(entry.key()), ", which this one has not");
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
