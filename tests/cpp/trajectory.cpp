// Takes the steps that a file from tests/test_cpp.py describes:
//
//     trajectory CASE OUT [CHECKPOINT]
//
// CASE holds the class, parameters, groups and gradients; OUT becomes the checkpoint after the last step.
// Training starts from CHECKPOINT if there is one.
#include <torch/torch.h>

#include <cstdio>

#include "schedulefree_cpp/optim.h"

using schedulefree::detail::Dict;

namespace {

struct Model : torch::nn::Module {
  explicit Model(const Dict& params) {
    for (const auto& entry : params) register_parameter(entry.key().toStringRef(), entry.value().toTensor());
  }
};

template <class Class, class Options>
std::unique_ptr<schedulefree::Optimizer> make(Model& model, const c10::List<c10::IValue>& groups) {
  auto params = model.named_parameters();
  std::vector<torch::optim::OptimizerParamGroup> made;
  for (const c10::IValue& value : groups) {
    const Dict group = value.toGenericDict();
    auto options = std::make_unique<Options>();
    options->take_from(group.copy());
    std::vector<torch::Tensor> own;
    for (const c10::IValue& name : group.at("names").toListRef()) own.push_back(params[name.toStringRef()]);
    made.emplace_back(own, std::move(options));
  }
  return std::make_unique<Class>(made);
}

void run(const std::string& in, const std::string& out, const char* checkpoint) {
  const Dict test = schedulefree::detail::PickleReader::read(in).toGenericDict();
  Model model(test.at("params").toGenericDict());
  const auto groups = test.at("groups").toList();
  const std::string name = test.at("optimizer").toStringRef();
  std::unique_ptr<schedulefree::Optimizer> optimizer;
  if (name == "SGD") optimizer = make<schedulefree::SGD, schedulefree::SGDOptions>(model, groups);
  if (name == "AdamW") optimizer = make<schedulefree::AdamW, schedulefree::AdamWOptions>(model, groups);
  if (name == "RAdam") optimizer = make<schedulefree::RAdam, schedulefree::RAdamOptions>(model, groups);
  if (checkpoint) schedulefree::load_state_dict(*optimizer, model, checkpoint);

  optimizer->train();
  auto params = model.named_parameters();
  for (const c10::IValue& step : test.at("steps").toListRef()) {
    const Dict now = step.toGenericDict();
    optimizer->zero_grad();
    for (const auto& entry : now.at("grads").toGenericDict())
      params[entry.key().toStringRef()].mutable_grad() = entry.value().toTensor();
    for (auto& group : optimizer->param_groups()) {
      group.options().set_lr(group.options().get_lr() * now.at("lr").toDouble());
      static_cast<schedulefree::detail::Options&>(group.options())
          .take_from(now.at("change").toGenericDict().copy());
    }
    optimizer->step();
    if (now.at("eval").toBool()) {
      optimizer->eval();
      optimizer->train();
    }
  }
  optimizer->train(test.at("train_mode").toBool());
  schedulefree::save_state_dict(*optimizer, model, out);
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc < 3) throw std::invalid_argument("expected CASE OUT [CHECKPOINT]");
  run(argv[1], argv[2], argc > 3 ? argv[3] : nullptr);
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
