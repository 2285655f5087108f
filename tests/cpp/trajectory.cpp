// Takes the steps that a file from tests/cpp/test_cpp.py describes:
//
//     trajectory CASE OUT [CHECKPOINT]
//
// CASE holds the class, parameters, groups and gradients; OUT becomes the checkpoint after the last step.
// Training starts from CHECKPOINT if there is one.
#include <torch/torch.h>

#include <cstdio>

#include "schedulefree_cpp/wrapper.h"

using schedulefree::detail::Dict;

namespace {

struct Model : torch::nn::Module {
  explicit Model(const Dict& params) {
    for (const auto& entry : params) register_parameter(entry.key().toStringRef(), entry.value().toTensor());
  }
};

// The groups of the case, with options that `read` takes from their dicts.
template <class Options, class F>
std::vector<torch::optim::OptimizerParamGroup> make_groups(Model& model, const Dict& test, F&& read) {
  auto params = model.named_parameters();
  std::vector<torch::optim::OptimizerParamGroup> groups;
  for (const c10::IValue& value : test.at("groups").toListRef()) {
    const Dict group = value.toGenericDict();
    auto options = std::make_unique<Options>();
    read(*options, group.copy());
    std::vector<torch::Tensor> own;
    for (const c10::IValue& name : group.at("names").toListRef()) own.push_back(params[name.toStringRef()]);
    groups.emplace_back(own, std::move(options));
  }
  return groups;
}

// `change` has a group take what a step's dict says. Groups are those of `base`.
template <class AnyOptimizer, class F>
void train(AnyOptimizer& optimizer, torch::optim::Optimizer& base, Model& model, const Dict& test,
           const std::string& out, const char* checkpoint, F&& change) {
  if (checkpoint) schedulefree::load_state_dict(optimizer, model, checkpoint);
  optimizer.train();
  auto params = model.named_parameters();
  for (const c10::IValue& step : test.at("steps").toListRef()) {
    const Dict now = step.toGenericDict();
    optimizer.zero_grad();
    for (const auto& entry : now.at("grads").toGenericDict())
      params[entry.key().toStringRef()].mutable_grad() = entry.value().toTensor();
    for (std::size_t i = 0; i < base.param_groups().size(); ++i) {
      torch::optim::OptimizerOptions& options = base.param_groups()[i].options();
      options.set_lr(options.get_lr() * now.at("lr").toDouble());
      change(i, now.at("change").toGenericDict().copy());
    }
    optimizer.step();
    if (now.at("eval").toBool()) {
      optimizer.eval();
      optimizer.train();
    }
  }
  optimizer.train(test.at("train_mode").toBool());
  schedulefree::save_state_dict(optimizer, model, out);
}

template <class Options>
void run_fused(Model& model, const Dict& test, const std::string& out, const char* checkpoint) {
  const auto groups = make_groups<Options>(
      model, test, [](Options& options, const Dict& group) { options.take_from(group); });
  schedulefree::detail::OptimizerOf<Options> optimizer(groups);
  train(optimizer, optimizer, model, test, out, checkpoint, [&](std::size_t i, const Dict& change) {
    static_cast<Options&>(optimizer.param_groups()[i].options()).take_from(change);
  });
}

void run_wrapper(Model& model, const Dict& test, const std::string& out, const char* checkpoint) {
  using Options = torch::optim::RMSpropOptions;
  torch::optim::RMSprop base(make_groups<Options>(model, test, [](Options& options, const Dict& group) {
    options.set_lr(group.at("lr").toDouble());
    options.alpha(group.at("alpha").toDouble()).weight_decay(group.at("weight_decay").toDouble());
    options.momentum(group.at("momentum").toDouble()).centered(group.at("centered").toBool());
  }));
  schedulefree::Wrapper wrapper(base);
  const auto change = [&](std::size_t i, const Dict& entries) {
    schedulefree::WrapperOptions::each([&](const char* key, auto member) {
      schedulefree::detail::take(entries, key, (wrapper.options(i).*member).value);
    });
  };
  const auto groups = test.at("groups").toListRef();
  for (std::size_t i = 0; i < groups.size(); ++i) change(i, groups[i].toGenericDict().copy());
  train(wrapper, base, model, test, out, checkpoint, change);
}

void run(const std::string& in, const std::string& out, const char* checkpoint) {
  const Dict test = schedulefree::detail::PickleReader::read(in).toGenericDict();
  Model model(test.at("params").toGenericDict());
  const std::string name = test.at("optimizer").toStringRef();
  if (name == "SGD") run_fused<schedulefree::SGDOptions>(model, test, out, checkpoint);
  if (name == "AdamW") run_fused<schedulefree::AdamWOptions>(model, test, out, checkpoint);
  if (name == "RAdam") run_fused<schedulefree::RAdamOptions>(model, test, out, checkpoint);
  if (name == "Wrapper") run_wrapper(model, test, out, checkpoint);
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc < 3) throw std::invalid_argument("expected CASE OUT [CHECKPOINT]");
  run(argv[1], argv[2], argc > 3 ? argv[3] : nullptr);
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
