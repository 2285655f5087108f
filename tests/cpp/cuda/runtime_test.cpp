// From a checked plan to the driver: what is compiled, proved, kept and launched, and what becomes of every
// error on the way. The driver and NVRTC are stand-ins (stand_in.h).
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "build_info.h"
#include "cpu/isa_dispatch.h"
#include "cuda/disk_cache.h"
#include "cuda/kernels.h"
#include "cuda/kernels_on_host.h"
#include "cuda/launch.h"
#include "cuda/multi_tensor.h"
#include "cuda/proof.h"
#include "cuda/stand_in.h"
#include "cuda/torch_on_host.h"

namespace schedulefree::cuda {
namespace {

namespace fs = std::filesystem;
using stand_in::machine;

std::vector<std::string>& logged() {
  static std::vector<std::string> lines;
  return lines;
}

// A folder for compiled kernels, and nothing else in the environment.
class Runtime : public testing::Test {
 protected:
  void SetUp() override {
    std::string name = fs::temp_directory_path() / "schedulefree_cache_XXXXXX";
    root_ = mkdtemp(name.data());
    folder_ = root_ / "kernels";
    setenv("SCHEDULEFREE_CPP_CACHE", folder_.c_str(), 1);
    stand_in::begin();
  }
  void TearDown() override {
    EXPECT_TRUE(machine().memory.empty()) << "memory of the driver was not freed";
    EXPECT_TRUE(machine().streams.empty()) << "a stream of the driver was not destroyed";
    fs::permissions(root_, fs::perms::owner_all);
    fs::remove_all(root_);
  }

  int calls(const char* function) const { return machine().calls[function]; }

  // The files of the cache that end so.
  std::vector<fs::path> files(const std::string& ending) const {
    std::vector<fs::path> found;
    if (!fs::exists(folder_)) return found;
    for (const auto& entry : fs::directory_iterator(folder_)) {
      const std::string name = entry.path().string();
      if (name.size() > ending.size() &&
          name.compare(name.size() - ending.size(), ending.size(), ending) == 0)
        found.push_back(entry.path());
    }
    return found;
  }

  fs::path root_, folder_;
};

// Parameters of float32 for a step of AdamW, each stream a piece of memory of its own.
struct Parameters {
  std::vector<std::vector<float>> memory;
  StepPlan plan;

  void add(std::int64_t numel, int device = 0) {
    TensorArgs t;
    t.numel = numel;
    t.device = device;
    for (Stream* const stream : {&t.y, &t.grad, &t.z, &t.exp_avg_sq}) {
      memory.emplace_back(static_cast<std::size_t>(numel), 0.25f + static_cast<float>(memory.size() % 7));
      stream->data = memory.back().data();
    }
    plan.tensors.push_back(t);
  }
};

StepCoefficients coefs() {
  StepCoefficients c;
  c.take = c.grad_mul = c.denom_scale = 1;
  c.lr = 0.01;
  c.w = 0.1;
  c.a = -0.001;
  c.weight_decay = 0.1;
  c.beta2 = 0.99;
  c.denom_eps = 1e-8;
  c.beta = 0.9;
  return c;
}

void step(Parameters& parameters, const double* device_coefs = nullptr, int home = 0) {
  stand_in::TorchOnHost torch;
  launch_step(parameters.plan, Op::kAdamwStep, DecayAt::kY,
              device_coefs != nullptr ? StepCoefficients{} : coefs(), device_coefs, home, torch);
}

// What the CPU makes of the same parameters.
std::vector<std::vector<float>> stepped_by_cpu(const Parameters& parameters) {
  Parameters copy;
  for (const TensorArgs& t : parameters.plan.tensors) copy.add(t.numel);
  const StepUpdate update(coefs(), DecayAt::kY);
  for (const TensorArgs& t : copy.plan.tensors) {
    for (std::int64_t begin = 0; begin < t.numel; begin += kBlock)
      baseline::kernel_table().adamw_step(t, begin, std::min(kBlock, t.numel - begin), update);
  }
  return copy.memory;
}

std::string error_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

KernelId adamw(bool captured = false) {
  KernelId id;
  id.op = Op::kAdamwStep;
  id.decay_at = DecayAt::kY;
  id.captured = captured;
  return id;
}

// ---- names -----------------------------------------------------------------------------------------

TEST_F(Runtime, TheHostAsksForKernelsByTheNamesOfTheirTypes) {
  // Those of the host library are made of the types; the library's own come from KernelId.
  int found = 0;
  for (const KernelId& id : common_kernels()) found += machine().find_kernel(id.name().c_str()) != nullptr;
  EXPECT_GE(found, 40);
}

// ---- compiled once, proved, kept --------------------------------------------------------------------

TEST_F(Runtime, CompilesAndProvesAKernelOnceAndKeepsIt) {
  Parameters parameters;
  parameters.add(1025);
  parameters.add(3);
  const auto expected = stepped_by_cpu(parameters);
  step(parameters);
  EXPECT_EQ(parameters.memory, expected);
  EXPECT_EQ(calls("nvrtcCompileProgram"), 1);
  EXPECT_EQ(files(".kernel").size(), 1u);
  EXPECT_EQ(files(".proof").size(), 1u);
  const int launches = calls("cuLaunchKernel"), allocations = calls("cuMemAlloc_v2");
  EXPECT_GT(allocations, 0) << "a proof has memory of its own";
  step(parameters);
  EXPECT_EQ(calls("nvrtcCompileProgram"), 1);
  EXPECT_EQ(calls("cuLaunchKernel"), launches + 1);
  EXPECT_EQ(calls("cuMemAlloc_v2"), allocations);
  EXPECT_EQ(calls("cuStreamSynchronize"), allocations) << "one for every trial, none for a step";
}

TEST_F(Runtime, AnotherProcessReadsWhatWasKept) {
  kernel_on(device(0), adamw(), nullptr);
  stand_in::begin();  // knows no kernels
  kernel_on(device(0), adamw(), nullptr);
  EXPECT_EQ(calls("nvrtcCompileProgram"), 0);
  EXPECT_EQ(calls("cuMemAlloc_v2"), 0) << "it was proved on such a GPU with such a driver";
}

TEST_F(Runtime, ProvesAgainWithAnotherDriver) {
  kernel_on(device(0), adamw(), nullptr);
  stand_in::begin();
  machine().driver_version = 13010;
  kernel_on(device(0), adamw(), nullptr);
  EXPECT_EQ(calls("nvrtcCompileProgram"), 0);
  EXPECT_GT(calls("cuMemAlloc_v2"), 0);
  EXPECT_EQ(files(".proof").size(), 2u);
}

TEST_F(Runtime, CompilesAgainWithAnotherNvrtc) {
  kernel_on(device(0), adamw(), nullptr);
  stand_in::begin();
  machine().nvrtc_minor = 3;
  kernel_on(device(0), adamw(), nullptr);
  EXPECT_EQ(calls("nvrtcCompileProgram"), 1);
  EXPECT_EQ(files(".kernel").size(), 2u);
}

TEST_F(Runtime, WhatWasCompiledAheadIsProvedWhenItIsUsed) {
  EXPECT_TRUE(compile_ahead(adamw(), "sm_90"));
  EXPECT_FALSE(compile_ahead(adamw(), "sm_90"));
  EXPECT_EQ(calls("cuMemAlloc_v2"), 0);
  EXPECT_TRUE(files(".proof").empty());
  kernel_on(device(0), adamw(), nullptr);
  EXPECT_EQ(calls("nvrtcCompileProgram"), 1);
  EXPECT_GT(calls("cuMemAlloc_v2"), 0);
  EXPECT_EQ(files(".proof").size(), 1u);
}

TEST_F(Runtime, LogsTheFirstCompilation) {
  set_log([](const char* line) { logged().emplace_back(line); });
  kernel_on(device(0), adamw(), nullptr);
  kernel_on(device(0), adamw(true), nullptr);
  set_log(nullptr);
  ASSERT_EQ(logged().size(), 1u);
  EXPECT_NE(logged()[0].find(adamw().name()), std::string::npos) << logged()[0];
  EXPECT_NE(logged()[0].find(folder_.string()), std::string::npos) << logged()[0];
}

TEST_F(Runtime, ReportNamesGpusCacheAndProofs) {
  kernel_on(device(1), adamw(), nullptr);
  const std::string report = schedulefree_cpp_cuda_report();
  for (const char* const part :
       {"CUDA driver\t13.0\n", "Stand-in GPU (cuda:1, sm_90)", "NVRTC\t13.0, stand-in\n",
        "kernels compiled\t1 for sm_90, NVRTC 13.0, sources ",
        "kernels proved\t1 on Stand-in GPU, driver 13.0\n"})
    EXPECT_NE(report.find(part), std::string::npos) << part << " in\n" << report;
  EXPECT_NE(report.find("kernel cache\t" + folder_.string() + '\n'), std::string::npos) << report;
}

// ---- the disk ----------------------------------------------------------------------------------------

TEST_F(Runtime, EveryDamageToAFileIsFoundAndTheKernelCompiledAgain) {
  kernel_on(device(0), adamw(), nullptr);
  const fs::path file = files(".kernel").at(0);
  std::ifstream in(file, std::ios::binary);
  const std::string whole((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  const auto after = [&](const std::string& bytes) {
    std::ofstream(file, std::ios::binary | std::ios::trunc) << bytes;
    stand_in::begin();
    kernel_on(device(0), adamw(), nullptr);
    return calls("nvrtcCompileProgram");
  };
  EXPECT_EQ(after(whole), 0);
  for (std::size_t at = 0; at < whole.size(); at += 23) {
    std::string flipped = whole;
    flipped[at] = static_cast<char>(flipped[at] ^ 0x10);
    EXPECT_EQ(after(flipped), 1) << "byte " << at;
  }
  for (const std::size_t size : {std::size_t{0}, std::size_t{10}, whole.size() / 2, whole.size() - 1})
    EXPECT_EQ(after(whole.substr(0, size)), 1) << size << " bytes";
  EXPECT_EQ(after(whole + "x"), 1);
}

TEST_F(Runtime, AProofOfOtherCodeDoesNotCount) {
  kernel_on(device(0), adamw(), nullptr);
  std::ofstream(files(".proof").at(0), std::ios::trunc) << "0123456789abcdef\nStand-in GPU, driver 13.0\n";
  stand_in::begin();
  kernel_on(device(0), adamw(), nullptr);
  EXPECT_GT(calls("cuMemAlloc_v2"), 0);
}

TEST_F(Runtime, WhatOthersMayWriteIsNotRead) {
  kernel_on(device(0), adamw(), nullptr);
  const auto compiles = [&] {
    stand_in::begin();
    kernel_on(device(0), adamw(), nullptr);
    return calls("nvrtcCompileProgram");
  };
  fs::permissions(files(".kernel").at(0), fs::perms::others_write, fs::perm_options::add);
  EXPECT_EQ(compiles(), 1);  // and writes its own in that place
  EXPECT_EQ(compiles(), 0);
  fs::permissions(folder_, fs::perms::group_write, fs::perm_options::add);
  EXPECT_EQ(compiles(), 1);
  EXPECT_EQ(compiles(), 1);
  EXPECT_NE(cache_problem().find("others may write"), std::string::npos);
  EXPECT_NE(std::string(schedulefree_cpp_cuda_report()).find("is not used: others may write it"),
            std::string::npos);
  fs::permissions(folder_, fs::perms::owner_all);
  const fs::path file = files(".kernel").at(0), elsewhere = root_ / "elsewhere";
  fs::rename(file, elsewhere);
  fs::create_symlink(elsewhere, file);
  EXPECT_EQ(compiles(), 1) << "links are not followed";
}

TEST_F(Runtime, WhatAnotherUserOwnsIsNotRead) {
  if (geteuid() != 0) GTEST_SKIP() << "only root can give a file away";
  kernel_on(device(0), adamw(), nullptr);
  const auto compiles = [&] {
    stand_in::begin();
    kernel_on(device(0), adamw(), nullptr);
    return calls("nvrtcCompileProgram");
  };
  ASSERT_EQ(chown(files(".kernel").at(0).c_str(), 12345, 12345), 0);
  EXPECT_EQ(compiles(), 1);
  ASSERT_EQ(chown(folder_.c_str(), 12345, 12345), 0);
  EXPECT_EQ(compiles(), 1);
  EXPECT_EQ(compiles(), 1);
  EXPECT_NE(cache_problem().find("another user"), std::string::npos);
}

TEST_F(Runtime, AFolderThatCannotBeWrittenCostsNothingElse) {
  const auto works = [&] {
    stand_in::begin();
    Parameters parameters;
    parameters.add(100);
    const auto expected = stepped_by_cpu(parameters);
    step(parameters);
    EXPECT_EQ(parameters.memory, expected);
  };
  std::ofstream(root_ / "file") << "no folder";
  setenv("SCHEDULEFREE_CPP_CACHE", (root_ / "file" / "kernels").c_str(), 1);
  works();
  setenv("SCHEDULEFREE_CPP_CACHE", (root_ / "file").c_str(), 1);
  works();
  EXPECT_EQ(cache_problem(), "it is no folder");
  setenv("SCHEDULEFREE_CPP_CACHE", "/dev/full/kernels", 1);
  works();
  setenv("SCHEDULEFREE_CPP_CACHE", "/proc/kernels", 1);  // where nobody can make a folder
  works();
}

TEST_F(Runtime, AFullDiskLeavesNothingBehind) {
  rlimit limit{};
  getrlimit(RLIMIT_FSIZE, &limit);
  const pid_t child = fork();
  if (child == 0) {
    signal(SIGXFSZ, SIG_IGN);
    const rlimit small = {20, limit.rlim_max};
    setrlimit(RLIMIT_FSIZE, &small);  // a write beyond it fails as that on a full disk does
    const Handle kernel = kernel_on(device(0), adamw(), nullptr);
    _exit(kernel != nullptr ? 0 : 1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  EXPECT_EQ(status, 0);
  EXPECT_TRUE(fs::is_empty(folder_));
}

TEST_F(Runtime, ProcessesMayShareAFolder) {
  std::vector<pid_t> children;
  for (int i = 0; i < 3; ++i) {
    children.push_back(fork());
    if (children.back() == 0) {
      for (int turn = 0; turn < 8; ++turn) {
        std::error_code gone;
        if (turn % 3 == 2) fs::remove_all(folder_, gone);
        stand_in::begin();
        kernel_on(device(0), adamw(), nullptr);
      }
      _exit(0);
    }
  }
  for (const pid_t child : children) {
    int status = 0;
    waitpid(child, &status, 0);
    EXPECT_EQ(status, 0);
  }
}

TEST_F(Runtime, TheFolderIsFoundByTheEnvironment) {
  EXPECT_EQ(cache_folder(), folder_.string());
  unsetenv("SCHEDULEFREE_CPP_CACHE");
  setenv("XDG_CACHE_HOME", "/xdg", 1);
  setenv("HOME", "/home/someone", 1);
  EXPECT_EQ(cache_folder(), "/xdg/schedulefree_cpp");
  unsetenv("XDG_CACHE_HOME");
  EXPECT_EQ(cache_folder(), "/home/someone/.cache/schedulefree_cpp");
  unsetenv("HOME");
  EXPECT_NE(cache_folder().find("/.cache/schedulefree_cpp"), std::string::npos);
}

// ---- launches ----------------------------------------------------------------------------------------

TEST_F(Runtime, TablesThatOverflowBecomeSeveralLaunches) {
  for (const int driver : {12000, 12010, 13000}) {
    stand_in::begin();
    machine().driver_version = driver;
    Parameters parameters;
    for (int i = 0; i < 1500; ++i) parameters.add(1 + i % 9);
    const auto expected = stepped_by_cpu(parameters);
    kernel_on(
        device(0),
        [&] {
          KernelId id = adamw();
          id.table = largest_table();
          return id;
        }(),
        nullptr);
    const int before = calls("cuLaunchKernel");
    step(parameters);
    EXPECT_EQ(parameters.memory, expected);
    const int capacity = driver < 12010 ? capacity_of(4, kSmallArguments) : capacity_of(4, kLargeArguments);
    EXPECT_EQ(calls("cuLaunchKernel") - before, (1500 + capacity - 1) / capacity);
  }
}

TEST_F(Runtime, AnOldNvrtcHasSmallTables) {
  machine().nvrtc_major = 12;
  EXPECT_EQ(largest_table(), TableKind::kSmall);
  machine().nvrtc_minor = 1;
  EXPECT_EQ(largest_table(), TableKind::kLarge);
}

TEST_F(Runtime, TensorsOfTwoDevicesRunInTheContextOfEach) {
  Parameters parameters;
  parameters.add(1030, 1);
  parameters.add(5, 0);
  parameters.add(0, 1);
  parameters.add(7, 1);
  const auto expected = stepped_by_cpu(parameters);
  step(parameters);
  EXPECT_EQ(parameters.memory, expected);
  double on_device[kStepCoefficients];
  store_coefficients(coefs(), on_device);
  Parameters captured;
  captured.add(1030, 1);
  captured.add(5, 0);
  captured.add(0, 1);
  captured.add(7, 1);
  step(captured, on_device, 1);  // copied to the other device
  EXPECT_EQ(captured.memory, expected);
  EXPECT_EQ(calls("cuMemcpyAsync"), 1);
}

TEST_F(Runtime, SumsOverTwoDevicesMeetOnTheFirst) {
  Parameters parameters;
  parameters.add(20000, 1);
  parameters.add(3, 0);
  double squares = 0;
  for (TensorArgs& t : parameters.plan.tensors) {
    t.exp_avg_sq = {};
    for (std::int64_t i = 0; i < t.numel; ++i) {
      const double g = static_cast<const float*>(t.grad.data)[i];
      squares += g * g;
    }
  }
  stand_in::TorchOnHost torch;
  double norm = 0;
  launch_sums(parameters.plan, Op::kGradNorm, &norm, torch);
  EXPECT_DOUBLE_EQ(norm, std::sqrt(squares));
}

TEST_F(Runtime, ThreadsThatLaunchAtOnceShareAKernel) {
  std::vector<std::thread> threads;
  std::vector<Parameters> parameters(8);
  std::vector<std::vector<std::vector<float>>> expected;
  for (Parameters& p : parameters) {
    p.add(500);
    expected.push_back(stepped_by_cpu(p));
  }
  for (Parameters& p : parameters) threads.emplace_back([&p] { step(p); });
  for (std::thread& thread : threads) thread.join();
  for (std::size_t i = 0; i < parameters.size(); ++i) EXPECT_EQ(parameters[i].memory, expected[i]);
  EXPECT_EQ(calls("nvrtcCompileProgram"), 1);
}

// ---- captures ----------------------------------------------------------------------------------------

TEST_F(Runtime, NothingIsLoadedIntoACapture) {
  Parameters parameters;
  parameters.add(100);
  const auto before = parameters.memory;
  machine().capturing = true;
  const std::string error = error_of([&] { step(parameters); });
  EXPECT_NE(error.find("Take one step"), std::string::npos) << error;
  EXPECT_NE(error.find(adamw().name()), std::string::npos) << error;
  EXPECT_EQ(parameters.memory, before);
  EXPECT_EQ(calls("nvrtcCompileProgram"), 0);
  machine().capturing = false;
  step(parameters);
  machine().capturing = true;
  step(parameters);  // launches only: whatever else is forbidden fails
  machine().capturing = false;
}

TEST_F(Runtime, APreparedStepOfTheDeviceIsCaptured) {
  double on_device[kStepCoefficients];
  store_coefficients(coefs(), on_device);
  Parameters parameters;
  parameters.add(100);
  const auto expected = stepped_by_cpu(parameters);
  Parameters warm;
  warm.add(10);
  step(warm, on_device);
  machine().capturing = true;
  step(parameters, on_device);
  machine().capturing = false;
  EXPECT_EQ(parameters.memory, expected);
}

TEST_F(Runtime, ACaptureOfAnotherStreamIsNotDisturbed) {
  machine().others_capture = true;  // in which allocating, loading and waiting fail
  kernel_on(device(0), adamw(), nullptr);
}

// ---- errors ------------------------------------------------------------------------------------------

TEST_F(Runtime, EveryErrorOfDriverAndNvrtcIsToldAndLeavesNothing) {
  double on_device[kStepCoefficients];
  store_coefficients(coefs(), on_device);
  const auto attempt = [&](Parameters& parameters) {
    step(parameters);
    step(parameters, on_device);
  };
  std::map<std::string, int> functions;
  {
    Parameters parameters;
    parameters.add(10);
    attempt(parameters);
    functions = machine().calls;
  }
  for (const auto& [function, count] : functions) {
    for (const int call : std::set<int>{1, 2, count}) {
      fs::remove_all(folder_);
      stand_in::begin();
      machine().failing = function;
      machine().failing_call = call;
      Parameters parameters;
      parameters.add(10);
      const std::string error = error_of([&] { attempt(parameters); });
      if (machine().last_code == 0) continue;
      // Restoring a thread's mode is the end of a scope, where nothing can be thrown.
      const bool survives = function == "cuThreadExchangeStreamCaptureMode" && call % 2 == 0;
      EXPECT_TRUE(survives || error.find("schedulefree_cpp") != std::string::npos)
          << function << ' ' << call << ": " << error;
      EXPECT_TRUE(machine().memory.empty() && machine().streams.empty()) << function << ' ' << call;
      if (call != 1) continue;
      machine().failing.clear();
      Parameters again;
      again.add(10);
      EXPECT_EQ(error_of([&] { attempt(again); }), "") << "after " << function << ' ' << call;
    }
  }
}

TEST_F(Runtime, ACompilerThatRefusesIsQuoted) {
  KernelId id = adamw();
  id.grad = Format::kBf16;
  id.y = Format::kFloat64;  // no such kernel
  const std::string error = error_of([&] { kernel_on(device(0), id, nullptr); });
  EXPECT_NE(error.find("NVRTC 13.0 (stand-in) cannot compile " + id.name() + " for sm_90"), std::string::npos)
      << error;
  EXPECT_NE(error.find("no kernel of this name"), std::string::npos) << error;
}

TEST(Environment, WithoutADriverOrNvrtcTheReasonIsTold) {
  replace_driver(nullptr);
  replace_nvrtc(nullptr);
  setenv("SCHEDULEFREE_CPP_NVRTC", "/nowhere/libnvrtc.so", 1);
  const std::string error = error_of([] { nvrtc(); });
  EXPECT_NE(error.find("pip install nvidia-cuda-nvrtc"), std::string::npos) << error;
  EXPECT_NE(error.find("/nowhere/libnvrtc.so"), std::string::npos) << error;
  if (access("/usr/lib/x86_64-linux-gnu/libcuda.so.1", F_OK) == 0) GTEST_SKIP() << "there is a driver";
  EXPECT_NE(error_of([] { driver(); }).find("there is no CUDA driver here"), std::string::npos);
}

// ---- proofs ------------------------------------------------------------------------------------------

struct Fault {
  const char* kernels;
  Op op;
  Format y, grad;
  bool moment8;
};

class Faults : public Runtime, public testing::WithParamInterface<Fault> {};

TEST_P(Faults, IsRefusedBeforeAnythingIsWritten) {
  stand_in::begin(GetParam().kernels);
  KernelId id;
  id.op = GetParam().op;
  id.y = GetParam().y;
  id.grad = GetParam().grad;
  id.moment8 = GetParam().moment8;
  if (id.is_step()) id.decay_at = DecayAt::kY;
  for (int turn = 0; turn < 2; ++turn) {
    const std::string error = error_of([&] { kernel_on(device(1), id, nullptr); });
    for (const std::string& part :
         {id.name() + " is refused", std::string("Stand-in GPU (cuda:1, sm_90)"), std::string("NVRTC 13.0"),
          std::string("driver 13.0"), std::string("Nothing has been changed")})
      EXPECT_NE(error.find(part), std::string::npos) << part << " in: " << error;
  }
  EXPECT_EQ(calls("nvrtcCompileProgram"), 1) << "it is not tried again";
  EXPECT_TRUE(files(".kernel").empty() && files(".proof").empty());
  EXPECT_EQ(machine().modules, 0);
}

TEST_P(Faults, IsNoneOfTheSourcesAsTheyAre) {
  KernelId id;
  id.op = GetParam().op;
  id.y = GetParam().y;
  id.grad = GetParam().grad;
  id.moment8 = GetParam().moment8;
  if (id.is_step()) id.decay_at = DecayAt::kY;
  EXPECT_EQ(error_of([&] { kernel_on(device(1), id, nullptr); }), "");
}

INSTANTIATE_TEST_SUITE_P(
    All, Faults,
    testing::Values(Fault{"fault_tail", Op::kAdamwStep, Format::kFloat32, Format::kFloat32, false},
                    Fault{"fault_settle", Op::kAdamwStep, Format::kFloat32, Format::kFloat32, false},
                    Fault{"fault_fma", Op::kSwap, Format::kFloat32, Format::kFloat32, false},
                    Fault{"fault_low", Op::kSgdStep, Format::kSplitBf16, Format::kBf16, false},
                    Fault{"fault_weight", Op::kAfterBaseStep, Format::kFloat32, Format::kFloat32, false},
                    Fault{"fault_barrier", Op::kGradNorm, Format::kFloat32, Format::kFloat32, false}),
    [](const testing::TestParamInfo<Fault>& info) { return std::string(info.param.kernels); });

TEST_F(Runtime, AStepWithARefusedKernelChangesNothing) {
  stand_in::begin("fault_tail");
  Parameters parameters;
  parameters.add(100);
  const auto before = parameters.memory;
  EXPECT_NE(error_of([&] { step(parameters); }).find("is refused"), std::string::npos);
  EXPECT_EQ(parameters.memory, before);
}

}  // namespace
}  // namespace schedulefree::cuda
