// examples/digits.py without Python: the same images, network and training, and so the same table as
// digits.py --seeds 1 prints for the schedule-free optimizers.
//
//     python examples/digits.py --export-csv digits.csv
//     digits digits.csv --epochs 16 --checkpoint digits.pt

#include <schedulefree_cpp/optim.h>
#include <torch/torch.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <map>
#include <sstream>

constexpr int64_t kBatchSize = 64;
constexpr int64_t kWarmupSteps = 16;  // one epoch

struct Split {
  torch::Tensor images, labels;  // images of shape (n, 1, 8, 8) with values in [0, 1]
};

struct Digits {
  Split train, test;
};

// Reads what digits.py --export-csv wrote.
Digits read_digits(const std::string& path) {
  std::ifstream file(path);
  std::string line, split;
  if (!std::getline(file, line)) throw std::runtime_error(path + ": can't be read, or is empty");
  if (line.rfind("split,label,p0,", 0) != 0) throw std::runtime_error(path + ":1: not the header of digits");
  std::vector<int64_t> train, test;  // for each image, its label and 64 pixels
  for (int number = 2; std::getline(file, line); ++number) {
    std::replace(line.begin(), line.end(), ',', ' ');
    std::istringstream fields(line);
    fields >> split;
    const std::vector<int64_t> row{std::istream_iterator<int64_t>(fields), {}};
    if ((split != "train" && split != "test") || !fields.eof() || row.size() != 65)
      throw std::runtime_error(path + ":" + std::to_string(number) + ": not a split, a label and 64 pixels");
    auto& rows = split == "train" ? train : test;
    rows.insert(rows.end(), row.begin(), row.end());
  }
  const auto tensors = [](const std::vector<int64_t>& numbers) {
    const auto rows = torch::tensor(numbers).view({-1, 65});
    return Split{rows.slice(1, 1).reshape({-1, 1, 8, 8}) / 16.0, rows.select(1, 0)};
  };
  return {tensors(train), tensors(test)};
}

torch::nn::Sequential make_model() {
  using namespace torch::nn;
  // Without momentum, the statistics are averages over all batches since they were reset.
  const auto norm = [](int64_t size) { return BatchNorm2d(BatchNorm2dOptions(size).momentum(std::nullopt)); };
  // In braces, layers are made from left to right: seeded, they get the same weights with any compiler.
  return Sequential{Conv2d(Conv2dOptions(1, 16, 3).padding(1).bias(false)),
                    norm(16),
                    ReLU(),
                    Conv2d(Conv2dOptions(16, 32, 3).padding(1).stride(2).bias(false)),
                    norm(32),
                    ReLU(),
                    Conv2d(Conv2dOptions(32, 32, 3).padding(1).stride(2).bias(false)),
                    norm(32),
                    ReLU(),
                    Flatten(),
                    Linear(32 * 2 * 2, 10)};
}

std::unique_ptr<schedulefree::Optimizer> make_optimizer(const std::string& name,
                                                        std::vector<torch::Tensor> parameters) {
  const auto sgd = schedulefree::SGDOptions(0.5).weight_decay(0.01).warmup_steps(kWarmupSteps);
  const auto adamw = schedulefree::AdamWOptions(0.01).weight_decay(0.5).warmup_steps(kWarmupSteps);
  if (name == "sgd") return std::make_unique<schedulefree::SGD>(parameters, sgd);
  return std::make_unique<schedulefree::AdamW>(parameters, adamw);
}

// Moves each image by -1, 0 or 1 pixels down and across, at random.
torch::Tensor shift(const torch::Tensor& images) {
  const auto offset = torch::randint(0, 3, {2, images.size(0), 1}, torch::kLong);
  const auto rows = (offset[0] + torch::arange(8)).unsqueeze(2);
  const auto columns = (offset[1] + torch::arange(8)).unsqueeze(1);
  const auto image = torch::arange(images.size(0)).view({-1, 1, 1});
  return torch::constant_pad_nd(images, {1, 1, 1, 1}).index({image, 0, rows, columns}).unsqueeze(1);
}

void train_epoch(torch::nn::Sequential model, schedulefree::Optimizer& optimizer, const Split& data) {
  model->train();
  optimizer.train();  // the parameters become y, where gradients are taken
  const int64_t steps = data.images.size(0) / kBatchSize;
  const auto order = torch::randperm(data.images.size(0)).slice(0, 0, steps * kBatchSize);
  for (const auto& batch : order.view({steps, kBatchSize}).unbind()) {
    const auto outputs = model->forward(shift(data.images.index({batch})));
    const auto loss = torch::nn::functional::cross_entropy(outputs, data.labels.index({batch}));
    optimizer.zero_grad();
    loss.backward();
    optimizer.step();
  }
}

// Returns the accuracy on the test images, in percent.
double evaluate(torch::nn::Sequential model, schedulefree::Optimizer& optimizer, const Digits& data) {
  torch::NoGradGuard no_grad;
  schedulefree::Averaged averaged(optimizer);  // in this scope, the parameters are x: the average to be used
  // Batch normalization gathered its statistics at y; they have to be those of x.
  for (const auto& module : model->modules())
    if (auto* norm = module->as<torch::nn::BatchNorm2d>()) norm->reset_running_stats();
  model->train();
  model->forward(data.train.images);
  model->eval();
  const auto correct = model->forward(data.test.images).argmax(1) == data.test.labels;
  return 100 * correct.to(torch::kDouble).mean().item<double>();
}

// Trains one network and returns its test accuracy. Unless `checkpoint` is empty, it is saved there halfway,
// and a new network and optimizer go on from what the file holds, with the same result.
double train(const std::string& name, long epochs, const std::string& checkpoint, const Digits& data) {
  torch::manual_seed(0);
  auto model = make_model();
  auto optimizer = make_optimizer(name, model->parameters());
  double accuracy = 0;
  for (long epoch = 1; epoch <= epochs; ++epoch) {
    train_epoch(model, *optimizer, data.train);
    accuracy = evaluate(model, *optimizer, data);
    if (!checkpoint.empty() && epoch == (epochs + 1) / 2) {
      optimizer->eval();  // so that the file holds x
      schedulefree::save_state_dict(*optimizer, *model, checkpoint);
      auto generator = at::detail::getDefaultCPUGenerator();
      const auto random_state = generator.get_state();
      model = make_model();  // draws random numbers
      optimizer = make_optimizer(name, model->parameters());
      schedulefree::load_state_dict(*optimizer, *model, checkpoint);
      generator.set_state(random_state);
    }
  }
  return accuracy;
}

int main(int argc, char** argv) try {
  std::map<std::string, std::string> options{
      {"--optimizer", "all"}, {"--epochs", "16"}, {"--checkpoint", ""}};
  bool valid = argc % 2 == 0;  // the program, the file, and pairs
  for (int i = 2; i + 1 < argc; i += 2) {
    valid = valid && options.count(argv[i]) == 1;
    options[argv[i]] = argv[i + 1];
  }
  char* rest = nullptr;
  const long epochs = std::strtol(options["--epochs"].c_str(), &rest, 10);
  const std::string chosen = options["--optimizer"];
  if (!valid || *rest != '\0' || epochs < 1 || (chosen != "all" && chosen != "sgd" && chosen != "adamw")) {
    std::fputs("usage: digits digits.csv [--optimizer all|sgd|adamw] [--epochs N] [--checkpoint PATH]\n",
               stderr);
    return 2;
  }
  torch::set_num_threads(1);  // such small tensors gain little from more
  const Digits data = read_digits(argv[1]);
  std::printf("%-18s%8s%16s%10s\n", "optimizer", "epochs", "test accuracy", "seconds");
  for (const std::string name : {"sgd", "adamw"}) {
    if (chosen != "all" && chosen != name) continue;
    const auto start = std::chrono::steady_clock::now();
    const double accuracy = train(name, epochs, options["--checkpoint"], data);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    const char* label = name == "sgd" ? "SGDScheduleFree" : "AdamWScheduleFree";
    std::printf("%-18s%8ld%14.2f %%%10.1f\n", label, epochs, accuracy, seconds.count());
  }
} catch (const c10::Error& error) {
  std::fprintf(stderr, "digits: %s\n", error.what_without_backtrace());
  return 1;
} catch (const std::exception& error) {
  std::fprintf(stderr, "digits: %s\n", error.what());
  return 1;
}
