#include "cuda/kernels.h"

#include <atomic>
#include <chrono>
#include <cstdio>
#include <map>
#include <mutex>
#include <optional>
#include <tuple>

#include "cuda/disk_cache.h"
#include "cuda/proof.h"

namespace schedulefree::cuda {
namespace {

using Clock = std::chrono::steady_clock;

std::atomic<void (*)(const char*)> log_line{nullptr};
std::atomic<bool> has_logged{false};

// While it lives, what this thread does neither fails for, nor ends, a capture of another stream.
class RelaxedCapture {
 public:
  RelaxedCapture() { driver().cuThreadExchangeStreamCaptureMode(&mode_); }
  ~RelaxedCapture() { driver().cuThreadExchangeStreamCaptureMode.address(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  int mode_ = 2;  // CU_STREAM_CAPTURE_MODE_RELAXED
};

struct Module {
  Handle module = nullptr, function = nullptr;
};

// Nothing where the driver does not take the code, as that of a damaged file.
std::optional<Module> loaded(const Binary& binary) {
  Module result;
  if (driver().cuModuleLoadData.address(&result.module, binary.code.data()) != 0) return std::nullopt;
  if (driver().cuModuleGetFunction.address(&result.function, result.module, binary.entry.c_str()) == 0)
    return result;
  driver().cuModuleUnload.address(result.module);
  return std::nullopt;
}

double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

struct Kernel {
  Handle function = nullptr;
  std::string refusal;  // why it must not be used
};

// `line` receives what may be logged.
Kernel prepare(const Device& device, const KernelId& id, std::string& line) {
  const InContext context(device);
  const RelaxedCapture relaxed;
  const std::string name = id.name(), identity = identity_of(name, device.architecture);
  const std::string gpu = device.name + ", driver " + dotted(driver_version());

  std::optional<Binary> binary = read_cached(identity);
  std::optional<Module> module = binary ? loaded(*binary) : std::nullopt;
  const bool fresh = !module;
  if (fresh) {
    const Clock::time_point begin = Clock::now();
    binary = compile(name, device.architecture);
    char text[64];
    std::snprintf(text, sizeof(text), " in %.2f s", seconds_since(begin));
    line = "compiled the CUDA kernel " + name + " for " + device.architecture + text +
           "; this is done once for each kernel";
    module = loaded(*binary);
    if (!module)
      throw std::runtime_error("schedulefree_cpp: the driver does not load the kernel " + identity);
  }

  if (fresh || !has_proof(identity, *binary, gpu)) {
    const std::string difference = prove(id, module->function);
    if (!difference.empty()) {
      driver().cuModuleUnload.address(module->module);
      return {nullptr,
              "schedulefree_cpp: the CUDA kernel " + name + " is refused: on " + device.text() +
                  ", as NVRTC " + dotted(nvrtc_version()) + " compiled it and with driver " +
                  dotted(driver_version()) + ", it does not give the bits of the CPU kernel (" + difference +
                  "). Nothing has been changed. Another NVRTC can be named in SCHEDULEFREE_CPP_NVRTC; "
                  "please report this."};
    }
    if (fresh) write_cached(identity, *binary);
    write_proof(identity, *binary, gpu);
  }
  if (fresh && cache_problem().empty()) line += "; kept in " + cache_folder();
  return {module->function, ""};
}

}  // namespace

Handle kernel_on(const Device& device, const KernelId& id, Handle stream) {
  using Key = std::tuple<const Driver*, int, KernelId>;
  static std::mutex mutex;
  static std::map<Key, Kernel> kernels;
  std::string line;
  Kernel kernel;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    const Key key{&driver(), device.index, id};
    const auto known = kernels.find(key);
    if (known != kernels.end()) {
      kernel = known->second;
    } else {
      int capturing = 0;
      {
        const InContext context(device);
        driver().cuStreamIsCapturing(stream, &capturing);
      }
      if (capturing != 0) {
        throw std::runtime_error(
            "schedulefree_cpp: the CUDA kernel " + id.name() +
            " is not loaded yet, and cannot be while a CUDA graph is captured. Take one step "
            "(and eval() and train(), if they are captured) before the capture.");
      }
      kernel = kernels[key] = prepare(device, id, line);
    }
  }
  // Without the lock: whoever logs may wait for a thread that launches.
  void (*const log)(const char*) = log_line.load();
  if (!line.empty() && log != nullptr && !has_logged.exchange(true)) log(line.c_str());
  if (!kernel.refusal.empty()) throw std::runtime_error(kernel.refusal);
  return kernel.function;
}

bool compile_ahead(const KernelId& id, const std::string& architecture) {
  const std::string name = id.name(), identity = identity_of(name, architecture);
  if (read_cached(identity)) return false;
  write_cached(identity, compile(name, architecture));
  return true;
}

TableKind largest_table() {
  const bool large = nvrtc_version() >= kLargeArgumentsVersion && driver_version() >= kLargeArgumentsVersion;
  return large ? TableKind::kLarge : TableKind::kSmall;
}

void set_log(void (*log)(const char*)) { log_line.store(log); }

}  // namespace schedulefree::cuda
