// Files that the C++ optimizers read: damaged and hostile ones are refused, quickly and in little memory.
#include <caffe2/serialize/inline_container.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <torch/torch.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <regex>

#include "schedulefree_cpp/optim.h"
#include "throws.h"

namespace schedulefree {
namespace {

using torch::Tensor;
using torch::optim::OptimizerParamGroup;
using Records = std::map<std::string, std::string>;

struct TemporaryFile {
  std::string path = testing::TempDir() + "schedulefree_files_" + std::to_string(getpid()) + "_" +
                     testing::UnitTest::GetInstance()->current_test_info()->name() + ".pt";
  ~TemporaryFile() { std::remove(path.c_str()); }

  std::string contents() const {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
  }
  void write(const std::string& bytes) const { std::ofstream(path, std::ios::binary) << bytes; }
  void write(const Records& records, bool compress = false) const {
    caffe2::serialize::PyTorchStreamWriter writer(path);
    for (const auto& [name, content] : records)
      writer.writeRecord(name, content.data(), content.size(), compress);
    writer.writeEndOfFile();
  }
  c10::IValue read() const { return detail::PickleReader::read(path); }
  c10::IValue read(const std::string& pickle) const {
    write(Records{{"data.pkl", pickle}});
    return read();
  }
};

// Of the processor, whatever else it does.
double seconds() { return static_cast<double>(std::clock()) / CLOCKS_PER_SEC; }

long peak_kilobytes() {
  rusage usage;
  getrusage(RUSAGE_SELF, &usage);
  return usage.ru_maxrss;
}

std::string bytes(std::initializer_list<int> values) {
  std::string result;
  for (const int value : values) result.push_back(static_cast<char>(value));
  return result;
}

std::string number(std::uint32_t value) { return std::string(reinterpret_cast<const char*>(&value), 4); }

std::string repeated(const std::string& what, int times) {
  std::string result;
  for (int i = 0; i < times; ++i) result += what;
  return result;
}

const std::string kBegin = bytes({0x80, 2});

// ---- pickles -----------------------------------------------------------------------------------------

TEST(Pickles, HostileOnesAreRefusedAtOnceAndInLittleMemory) {
  const TemporaryFile file;
  const std::string tuple1 = bytes({0x85}), tuple2 = bytes({0x86});
  std::string shared = kBegin + ")q" + bytes({0});
  for (int i = 0; i < 60; ++i) {
    const std::string get = "h" + bytes({i});
    shared += get + get + tuple2 + "q" + bytes({i + 1});
  }
  std::string shared_lists = kBegin + "]q" + bytes({0});
  for (int i = 0; i < 60; ++i) shared_lists += "](" + repeated("h" + bytes({i}), 2) + "eq" + bytes({i + 1});
  std::string downwards = kBegin + "]";  // each list gets its own when it has a place already
  for (std::uint32_t i = 0; i < 100'000; ++i) downwards += "]r" + number(i) + "aj" + number(i);
  const std::string key = "X" + number(1) + "k";
  std::string colliding = kBegin + "}(";  // integers for all of which c10's dicts want one slot
  const std::uint64_t factor = 11400714819323198485u;
  std::uint64_t inverse = factor;
  for (int i = 0; i < 6; ++i) inverse *= 2 - factor * inverse;
  for (std::uint64_t i = 1; i < 64; ++i) {
    const std::uint64_t integer = i * inverse;
    colliding += bytes({0x8a, 8}) + std::string(reinterpret_cast<const char*>(&integer), 8) + "N";
  }
  const std::map<std::string, std::pair<std::string, std::string>> cases = {
      {"colliding keys", {colliding + "u.", "a dict has keys whose hashes collide"}},
      {"shared tuples", {shared + ".", "shared too often"}},
      {"shared lists", {shared_lists + ".", "shared too often"}},
      {"nested tuples", {kBegin + ")" + repeated(tuple1, 200'000) + ".", "nested too deeply"}},
      {"nested lists", {kBegin + repeated("]", 200'000) + repeated("a", 199'999) + ".", "nested too deeply"}},
      {"nested dicts",
       {kBegin + "}" + repeated(key + "}", 50'000) + repeated("s", 50'000) + ".", "nested too deeply"}},
      {"lists nested downwards", {downwards + ".", "part of itself, or changed"}},
      {"a list in itself",
       {kBegin + "]q" + bytes({0}) + "h" + bytes({0}) + "a.", "part of itself, or changed"}},
      {"a dict in itself",
       {kBegin + "}q" + bytes({0}) + key + "h" + bytes({0}) + "s.", "part of itself, or changed"}},
      {"a list in a tuple in the list",
       {kBegin + "]q" + bytes({0}) + "h" + bytes({0}) + tuple1 + "a.", "part of itself, or changed"}},
      {"two lists in each other",
       {kBegin + "]q" + bytes({0}) + "]q" + bytes({1}) + "h" + bytes({0}) + "aa.",
        "part of itself, or changed"}},
  };
  for (const auto& [name, pickle_and_message] : cases) {
    SCOPED_TRACE(name);
    file.write(Records{{"data.pkl", pickle_and_message.first}});
    const double begin = seconds();
    const long before = peak_kilobytes();
    EXPECT_TRUE(throws([&] { file.read(); }, pickle_and_message.second));
    EXPECT_LT(seconds() - begin, 1);
    EXPECT_LT(peak_kilobytes() - before, 200'000);
  }
}

TEST(Pickles, ARefusedOneLeaksNothing) {
  const TemporaryFile file;
  // Two lists in each other, one of which has much in it.
  const std::string much = "]q" + bytes({0}) + "(" + repeated("}", 10'000) + "e";
  file.write(Records{{"data.pkl", kBegin + much + "]h" + bytes({0}) + "aal."}});
  const auto refuse = [&] { EXPECT_THROW(file.read(), c10::Error); };
  for (int i = 0; i < 20; ++i) refuse();
#ifndef __SANITIZE_ADDRESS__  // which keeps what is freed, and tells itself what is not
  const long before = peak_kilobytes();
  for (int i = 0; i < 100; ++i) refuse();
  EXPECT_LT(peak_kilobytes() - before, 20'000);
#endif
}

TEST(Pickles, PlainOnesMayShareAndNestAsPythonDoes) {
  const TemporaryFile file;
  const std::string tuple2 = bytes({0x86}), get = "h" + bytes({0});
  const std::string pair = "K" + bytes({1}) + "K" + bytes({2}) + tuple2 + "q" + bytes({0});
  const c10::IValue shared = file.read(kBegin + "](" + pair + repeated(get, 50) + "e.");
  ASSERT_EQ(shared.toListRef().size(), 51U);
  EXPECT_EQ(shared.toListRef()[50].toTupleRef().elements()[1].toInt(), 2);
  EXPECT_TRUE(file.read(kBegin + repeated("]", 90) + repeated("a", 89) + ".").isList());
  for (const std::uint32_t factor : {1, 2, 1000, 1 << 16, 999'983}) {
    std::string integers = kBegin + "}(";
    for (std::uint32_t i = 0; i < 2000; ++i) integers += "J" + number(i * factor) + "N";
    EXPECT_GE(file.read(integers + "u.").toGenericDict().size(), 1U) << factor;
  }
}

TEST(Pickles, IntegersOfAnyLengthKeepTheirSign) {
  const TemporaryFile file;
  const auto read = [&](std::initializer_list<int> of) {
    return file.read(kBegin + bytes(of) + ".").toInt();
  };
  EXPECT_EQ(read({0x8a, 0}), 0);
  EXPECT_EQ(read({0x8a, 1, 0xfd}), -3);
  EXPECT_EQ(read({0x8a, 1, 0x7f}), 127);
  EXPECT_EQ(read({0x8a, 2, 0xff, 0}), 255);
  EXPECT_EQ(read({0x8a, 5, 0, 0, 0, 0, 0xfe}), -(std::int64_t{1} << 33));
  EXPECT_EQ(read({0x8a, 8, 0, 0, 0, 0, 0, 0, 0, 0x80}), std::numeric_limits<std::int64_t>::min());
  EXPECT_EQ(read({'J', 0xfe, 0xff, 0xff, 0xff}), -2);
  EXPECT_TRUE(throws([&] { read({0x8a, 9, 0, 0, 0, 0, 0, 0, 0, 0, 1}); }, "more than 64 bits"));
}

TEST(Pickles, SizesOfTensorsAreRefusedWhereNoTensorHasThem) {
  const TemporaryFile file;
  detail::write_pickle(file.path, at::ones({3, 5}));
  Records records;
  {
    caffe2::serialize::PyTorchStreamReader reader(file.path);
    for (const std::string name : {"data.pkl", "data/0"}) {
      const auto [data, size] = reader.getRecord(name);
      records[name] = std::string(static_cast<const char*>(data.get()), size);
    }
  }
  const std::string pickle = records.at("data.pkl"), sizes = bytes({'K', 3, 'K', 5}),
                    strides = bytes({'K', 5, 'K', 1});
  const auto with = [&](std::string old, const std::string& now, const std::string& second) {
    std::string changed = pickle;
    for (const auto& [from, to] : {std::make_pair(old, now), std::make_pair(strides, second)}) {
      const std::size_t at = changed.rfind(from);
      EXPECT_NE(at, std::string::npos);
      changed.replace(at, from.size(), to);
    }
    records.at("data.pkl") = changed;
    file.write(records);
    return file.read();
  };
  EXPECT_TRUE(torch::equal(with(sizes, sizes, strides).toTensor(), at::ones({3, 5})));
  const std::string negative = bytes({'J', 0xfd, 0xff, 0xff, 0xff}), long_negative = bytes({0x8a, 1, 0xfd});
  for (const std::string& minus_three : {negative, long_negative}) {
    EXPECT_TRUE(throws([&] { with(sizes, minus_three + bytes({'K', 5}), strides); }, "no integers >= 0"));
    EXPECT_TRUE(throws([&] { with(sizes, sizes, minus_three + bytes({'K', 1})); }, "no integers >= 0"));
  }
  // More elements than can be counted, all of them one.
  const std::string huge = bytes({0x8a, 8, 0, 0, 0, 0, 0, 0, 0, 0x40}), zeros = bytes({'K', 0, 'K', 0});
  EXPECT_TRUE(throws([&] { with(sizes, huge + huge, zeros); }, "overflow"));
  EXPECT_TRUE(throws([&] { with(sizes, huge + huge, strides); }, "overflow"));
  EXPECT_TRUE(throws([&] { with(sizes, sizes, huge + huge); }, "overflow|beyond its storage"));
}

// ---- archives ----------------------------------------------------------------------------------------

TEST(Archives, EveryEntryIsChecked) {
  const TemporaryFile file;
  detail::Dict dict = detail::make_dict();
  dict.insert("one", torch::randn({100}));
  dict.insert("other", torch::arange(3));
  detail::write_pickle(file.path, dict);
  const std::string whole = file.contents();
  caffe2::serialize::PyTorchStreamReader reader(file.path);
  const std::vector<std::string> names = reader.getAllRecords();
  ASSERT_GE(names.size(), 5U);
  for (const std::string& name : names) {
    const std::size_t begin = reader.getRecordOffset(name), size = std::get<1>(reader.getRecord(name));
    for (const std::size_t at : {std::size_t{0}, size / 2, size - 1})
      for (const int bit : {0, 3, 7}) {
        std::string damaged = whole;
        damaged[begin + at] = static_cast<char>(damaged[begin + at] ^ 1 << bit);
        file.write(damaged);
        EXPECT_TRUE(throws([&] { file.read(); }, "entry .*" + name + " is damaged: .*checksum")) << name;
      }
  }
  file.write(whole);
  EXPECT_TRUE(torch::equal(file.read().toGenericDict().at("other").toTensor(), torch::arange(3)));
}

TEST(Archives, AnyPartOfOneIsRefused) {
  const TemporaryFile file;
  detail::write_pickle(file.path, torch::randn({50}));
  const std::string whole = file.contents();
  for (std::size_t size = 0; size < whole.size(); ++size) {
    file.write(whole.substr(0, size));
    EXPECT_THROW(file.read(), c10::Error) << size;
  }
  file.write(whole + "behind it");
  EXPECT_TRUE(file.read().isTensor());
  EXPECT_TRUE(throws([&] { detail::PickleReader::read(testing::TempDir()); }, "there is no such file"));
}

TEST(Archives, NothingIsInflatedAndNothingReadTwice) {
  const TemporaryFile file;
  detail::write_pickle(file.path, torch::ones({1 << 20}));
  Records records;
  {
    caffe2::serialize::PyTorchStreamReader reader(file.path);
    for (const std::string name : {"data.pkl", "data/0"}) {
      const auto [data, size] = reader.getRecord(name);
      records[name] = std::string(static_cast<const char*>(data.get()), size);
    }
  }
  file.write(records, /*compress=*/true);
  EXPECT_LT(std::filesystem::file_size(file.path), 100'000U);
  EXPECT_TRUE(throws([&] { file.read(); }, "entry .*data.* is compressed or encrypted"));

  // Entries that all have the contents of one.
  for (int i = 1; i < 100; ++i) records["data/" + std::to_string(i)] = "";
  file.write(records);
  std::string bomb = file.contents();
  std::string of_contents;
  for (std::size_t at = bomb.find("PK\1\2"); at != std::string::npos; at = bomb.find("PK\1\2", at + 1)) {
    const std::string name = bomb.substr(at + 46, static_cast<std::uint8_t>(bomb[at + 28]));
    if (name.find("/data/") == std::string::npos) continue;
    if (of_contents.empty())
      of_contents = bomb.substr(at, 46);
    else
      for (const std::size_t field : {16, 20, 24, 42}) bomb.replace(at + field, 4, of_contents, field, 4);
  }
  file.write(bomb);
  EXPECT_TRUE(throws([&] { file.read(); }, "its entries are larger than the file"));
}

TEST(Archives, AVersionThatNoTorchWritesIsRefused) {
  const TemporaryFile file;
  detail::write_pickle(file.path, torch::ones(3));
  const std::string whole = file.contents();
  for (const char* const version : {"0\n", "x\n", "99"}) {
    std::string changed = whole;
    const std::size_t begin = caffe2::serialize::PyTorchStreamReader(file.path).getRecordOffset("version");
    changed.replace(begin, 2, version);
    const std::uint32_t crc = detail::crc32(version, 2);
    const std::size_t entry = changed.rfind("/version");
    std::memcpy(&changed[changed.rfind("PK\1\2", entry) + 16], &crc, 4);
    file.write(changed);
    EXPECT_TRUE(throws([&] { file.read(); }, "a version that is not known")) << version;
    file.write(whole);
  }
}

// ---- checkpoints -------------------------------------------------------------------------------------

struct Net : torch::nn::Module {
  explicit Net(const Tensor& flags = torch::tensor({true, false})) {
    linear = register_module("linear", torch::nn::Linear(4, 3));
    norm = register_module("norm", torch::nn::BatchNorm1d(3));
    register_buffer("flags", flags);
  }
  torch::nn::Linear linear{nullptr};
  torch::nn::BatchNorm1d norm{nullptr};
};

void take_steps(Optimizer& optimizer, int steps, std::uint64_t seed = 0) {
  torch::Generator generator = at::detail::createCPUGenerator(seed);
  for (int i = 0; i < steps; ++i) {
    for (auto& group : optimizer.param_groups())
      for (Tensor& p : group.params())
        p.mutable_grad() = torch::randn(p.sizes(), generator).to(p.scalar_type());
    optimizer.step();
  }
}

// Everything that a load may change.
std::vector<Tensor> everything(const Optimizer& optimizer, const torch::nn::Module& model) {
  std::vector<Tensor> all;
  for (const auto& [name, tensor] : detail::named_tensors(model))
    if (!tensor.is_meta()) all.push_back(tensor.detach().clone());
  for (const auto& item : optimizer.state())
    for (const auto& [key, t] : static_cast<detail::ParamState&>(*item.second).tensors())
      if (t->defined()) all.push_back(t->clone());
  const detail::Dict dict = optimizer.state_dict(detail::by_number);
  for (const c10::IValue& group : dict.at("param_groups").toListRef())
    for (const char* const key : {"k", "weight_sum", "lr_max", "lr"})
      all.push_back(torch::full({}, group.toGenericDict().at(key).toScalar().toDouble(), torch::kDouble));
  return all;
}

TEST(Checkpoints, ALoadChangesBothOrNeither) {
  const TemporaryFile file;
  const auto dtype_of = [](torch::Dtype dtype) { return [dtype](const Tensor& t) { return t.to(dtype); }; };
  struct Case {
    const char* name;
    std::function<Tensor(const Tensor&)> change;
    const char* message;
  };
  const std::vector<Case> cases = {
      {"linear.weight", dtype_of(torch::kComplexFloat),
       "\"linear.weight\" .*dtype ComplexFloat, expected Float"},
      {"norm.bias", dtype_of(torch::kInt), "\"norm.bias\" .*dtype Int, expected Float or one of its kind"},
      {"norm.bias", dtype_of(torch::kBool), "\"norm.bias\" .*dtype Bool"},
      {"flags", dtype_of(torch::kComplexFloat), "\"flags\" .*dtype ComplexFloat, expected Bool"},
      {"norm.bias", [](const Tensor& t) { return t.unsqueeze(0); }, "\"norm.bias\" of the model has shape"},
  };
  const auto refused = [&](Net& model, AdamW& optimizer, const std::string& message) {
    const std::vector<Tensor> before = everything(optimizer, model);
    EXPECT_TRUE(throws([&] { load_state_dict(optimizer, model, file.path); }, message));
    const std::vector<Tensor> now = everything(optimizer, model);
    ASSERT_EQ(now.size(), before.size());
    for (std::size_t i = 0; i < now.size(); ++i) EXPECT_TRUE(torch::equal(now[i], before[i])) << message;
  };
  const auto trained = [](Net& model, int steps) {
    auto optimizer = std::make_unique<AdamW>(model.parameters(), AdamWOptions(0.1 * steps));
    optimizer->train();
    take_steps(*optimizer, steps, static_cast<std::uint64_t>(steps));
    return optimizer;
  };
  Net saved, model;
  const auto saver = trained(saved, 3), optimizer = trained(model, 2);
  save_state_dict(*saver, saved, file.path);
  for (const auto& [name, change, message] : cases) {
    const detail::Dict dict = file.read().toGenericDict(), tensors = dict.at("model").toGenericDict();
    tensors.insert_or_assign(name, change(tensors.at(name).toTensor()));
    detail::write_pickle(file.path, detail::for_file(c10::IValue(dict), "file"));
    refused(model, *optimizer, message);
    save_state_dict(*saver, saved, file.path);
  }
  {
    const detail::Dict dict = file.read().toGenericDict();
    dict.at("optimizer")
        .toGenericDict()
        .at("param_groups")
        .toListRef()[0]
        .toGenericDict()
        .insert_or_assign("lr", -1.0);
    detail::write_pickle(file.path, detail::for_file(c10::IValue(dict), "file"));
    refused(model, *optimizer, "Invalid lr in parameter group 0 of the state dict: -1");
    save_state_dict(*saver, saved, file.path);
  }
  // Models whose last tensors cannot be written to.
  Net meta(torch::empty(2, torch::TensorOptions(torch::kBool).device(torch::kMeta))),
      sparse(torch::tensor({true, false}).to_sparse()), expanded(torch::ones(1, torch::kBool).expand(2)),
      small;
  small.norm->running_var.storage().unsafeGetStorageImpl()->set_nbytes(4);
  std::unique_ptr<Net> of_inference;
  {
    const c10::InferenceMode inference;
    of_inference = std::make_unique<Net>();
  }
  for (Net* const spoilt : {&meta, &sparse, &expanded, &small}) {
    const auto its = trained(*spoilt, 2);
    const Tensor weight = spoilt->linear->weight.detach().clone();
    EXPECT_TRUE(throws([&] { load_state_dict(*its, *spoilt, file.path); }, "\" cannot be written to"));
    EXPECT_TRUE(torch::equal(spoilt->linear->weight, weight));
    EXPECT_EQ(its->param_groups()[0].options().get_lr(), 0.2);
  }
  AdamW of_nothing(std::vector<torch::optim::OptimizerParamGroup>{
      torch::optim::OptimizerParamGroup(std::vector<Tensor>{})});
  EXPECT_TRUE(throws([&] { load_state_dict(of_nothing, *of_inference, file.path); }, "cannot be written to"));
  load_state_dict(*optimizer, model, file.path);
  EXPECT_TRUE(torch::equal(model.linear->weight, saved.linear->weight));
}

TEST(Checkpoints, AModelThatWasCastLoads) {
  const TemporaryFile file;
  Net model, other;
  other.to(torch::kDouble);
  AdamW optimizer(model.parameters()), loaded(other.parameters());
  save_state_dict(optimizer, model, file.path);
  load_state_dict(loaded, other, file.path);
  EXPECT_TRUE(torch::equal(other.linear->weight, model.linear->weight.to(torch::kDouble)));
  save_state_dict(loaded, other, file.path);
  load_state_dict(optimizer, model, file.path);
}

struct Many : torch::nn::Module {
  explicit Many(int count) {
    for (int i = 0; i < count; ++i)
      register_parameter("p" + std::to_string(i), torch::randn({static_cast<int64_t>(1 + i % 40)}));
  }
};

TEST(Checkpoints, ManyParametersResumeAndTheirModeIsKnown) {
  for (const int count : {64, 65, 200}) {
    const TemporaryFile file, crossed;
    Many model(count), other(count), third(count);
    AdamW optimizer(model.parameters(), AdamWOptions(0.1)), loaded(other.parameters()),
        mixed(third.parameters());
    optimizer.train();
    take_steps(optimizer, 5);
    save_state_dict(optimizer, model, file.path);
    const detail::Dict dict = file.read().toGenericDict();
    const auto print =
        dict.at("optimizer").toGenericDict().at("schedulefree_cpp").toGenericDict().at("fingerprint");
    const auto sampled = print.toGenericDict().at("params").toListRef();
    EXPECT_LE(sampled.size(), 64U);
    EXPECT_GE(sampled.size(), 32U);
    EXPECT_GE(sampled.back().toInt(), count - 7);  // of all of them
    load_state_dict(loaded, other, file.path);
    take_steps(optimizer, 3, 1);
    take_steps(loaded, 3, 1);
    for (const auto& item : model.named_parameters())
      ASSERT_TRUE(torch::equal(item.value(), other.named_parameters()[item.key()])) << item.key();

    load_state_dict(mixed, third, file.path);
    mixed.eval();
    const detail::Dict at_x = dict.at("model").toGenericDict();
    for (const auto& item : third.named_parameters())
      at_x.insert_or_assign(item.key(), item.value().detach());
    detail::write_pickle(file.path, detail::for_file(c10::IValue(dict), "file"));
    Many fourth(count);
    AdamW refused(fourth.parameters());
    load_state_dict(refused, fourth, file.path);
    EXPECT_TRUE(
        throws([&] { refused.eval(); }, "those of eval mode .*but the loaded optimizer state says train"));
  }
}

TEST(Checkpoints, AViewTakesNoMoreOfAFileThanItsElements) {
  const TemporaryFile file;
  struct Views : torch::nn::Module {
    Views() {
      register_buffer("view", torch::randn({1'000'000}).slice(0, 10, 12));
      register_parameter("row", torch::randn({1000, 1000})[3].detach());
    }
  } model;
  SGD optimizer(model.parameters());
  save_state_dict(optimizer, model, file.path);
  EXPECT_LT(std::filesystem::file_size(file.path), 20'000U);
}

TEST(Checkpoints, CodesOf8BitsLoadIntoOtherStrides) {
  const TemporaryFile file;
  const auto make = [](torch::MemoryFormat format) {
    torch::nn::Conv2d model(torch::nn::Conv2dOptions(64, 64, 3).bias(false));
    model->weight.set_data(model->weight.detach().contiguous(format));
    return model;
  };
  const AdamWOptions options = AdamWOptions(1e-3).exp_avg_sq_bits(8);
  for (const bool to_channels_last : {true, false}) {
    auto from = make(to_channels_last ? torch::MemoryFormat::Contiguous : torch::MemoryFormat::ChannelsLast);
    auto to = make(to_channels_last ? torch::MemoryFormat::ChannelsLast : torch::MemoryFormat::Contiguous);
    AdamW saved(from->parameters(), options), loaded(to->parameters(), options);
    saved.train();
    const Tensor scale = torch::pow(10.0, torch::linspace(-2, 1, 64)).view({1, 64, 1, 1});
    for (int i = 0; i < 3; ++i) {
      from->weight.mutable_grad() = torch::ones({64, 64, 3, 3}) * scale;
      saved.step();
    }
    save_state_dict(saved, from, file.path);
    load_state_dict(loaded, to, file.path);
    const auto moment = [](const AdamW& optimizer) {
      const auto& state = static_cast<const detail::ParamState&>(*optimizer.state().begin()->second);
      return detail::decode_8(state.exp_avg_sq, state.exp_avg_sq_scale).contiguous();
    };
    EXPECT_LT((moment(saved) / moment(loaded)).log().abs().max().item<double>(), 0.5);
  }
}

}  // namespace
}  // namespace schedulefree
