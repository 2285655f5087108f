#include "cuda/stand_in.h"

#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <set>
#include <stdexcept>
#include <vector>

namespace schedulefree::stand_in {
namespace {

using cuda::Address;
using cuda::Driver;
using cuda::Handle;
using cuda::Nvrtc;

constexpr int kInvalidImage = 200, kInvalidContext = 201, kInvalidHandle = 400, kNotFound = 500,
              kUnsupported = 900;
constexpr int kCompilation = 6, kInjected = 719;
constexpr char kImage[] = "host kernel ";

std::recursive_mutex mutex;
Machine the_machine;

struct Context {
  int device;
};
Context contexts[8] = {{0}, {1}, {2}, {3}, {4}, {5}, {6}, {7}};
thread_local std::vector<Context*> current;
thread_local int capture_mode = 0;  // CU_STREAM_CAPTURE_MODE_GLOBAL

struct Module {
  Context* context;
  std::string name;
  RunKernel run;
};
std::set<Module*>& loaded = *new std::set<Module*>;  // the library keeps kernels to the end of the process
struct Program {
  std::string name, log;
};

// Counts a call, and returns an error where it is to fail or a capture forbids it.
int enter(const char* name, bool disturbs = false) {
  Machine& m = the_machine;
  const int call = ++m.calls[name];
  if (m.failing == name && call == m.failing_call) return m.last_code = kInjected;
  const bool relaxed = capture_mode == 2;
  return disturbs && !relaxed && (m.capturing || m.others_capture) ? kUnsupported : 0;
}

#define ENTER(...)                                         \
  const std::lock_guard<std::recursive_mutex> lock(mutex); \
  if (const int error = enter(__VA_ARGS__)) return error

Driver make_driver() {
  Driver d;
  d.cuInit.address = [](unsigned) { return 0; };
  d.cuDriverGetVersion.address = [](int* version) {
    ENTER("cuDriverGetVersion");
    return *version = the_machine.driver_version, 0;
  };
  d.cuDeviceGetCount.address = [](int* count) {
    ENTER("cuDeviceGetCount");
    return *count = the_machine.gpus, 0;
  };
  d.cuDeviceGet.address = [](int* device, int index) {
    ENTER("cuDeviceGet");
    return *device = index, index < the_machine.gpus ? 0 : 101;
  };
  d.cuDeviceGetName.address = [](char* name, int size, int) {
    ENTER("cuDeviceGetName");
    std::strncpy(name, "Stand-in GPU", static_cast<std::size_t>(size));
    return 0;
  };
  d.cuDeviceGetAttribute.address = [](int* value, int attribute, int) {
    ENTER("cuDeviceGetAttribute");
    return *value = attribute == 75 ? 9 : 0, 0;
  };
  d.cuDevicePrimaryCtxRetain.address = [](Handle* context, int device) {
    ENTER("cuDevicePrimaryCtxRetain");
    return *context = &contexts[device], 0;
  };
  d.cuCtxPushCurrent_v2.address = [](Handle context) {
    ENTER("cuCtxPushCurrent_v2");
    return current.push_back(static_cast<Context*>(context)), 0;
  };
  d.cuCtxPopCurrent_v2.address = [](Handle* context) {
    if (current.empty()) return kInvalidContext;
    *context = current.back();
    return current.pop_back(), 0;
  };
  d.cuModuleLoadData.address = [](Handle* module, const void* image) {
    ENTER("cuModuleLoadData", true);
    if (current.empty()) return kInvalidContext;
    const std::string text = static_cast<const char*>(image);
    if (text.rfind(kImage, 0) != 0) return kInvalidImage;
    const std::string name = text.substr(std::strlen(kImage));
    const RunKernel run = the_machine.find_kernel(name.c_str());
    if (run == nullptr) return kInvalidImage;
    ++the_machine.modules;
    return *module = *loaded.insert(new Module{current.back(), name, run}).first, 0;
  };
  d.cuModuleUnload.address = [](Handle module) {
    ENTER("cuModuleUnload");
    --the_machine.modules;
    loaded.erase(static_cast<Module*>(module));
    return delete static_cast<Module*>(module), 0;
  };
  d.cuModuleGetFunction.address = [](Handle* function, Handle module, const char* name) {
    ENTER("cuModuleGetFunction");
    return *function = module, static_cast<Module*>(module)->name == name ? 0 : kNotFound;
  };
  d.cuLaunchKernel.address = [](Handle function, unsigned blocks, unsigned, unsigned, unsigned, unsigned,
                                unsigned, unsigned, Handle, void** arguments, void**) {
    ENTER("cuLaunchKernel");
    const auto* const module = static_cast<const Module*>(function);
    if (current.empty() || current.back() != module->context) return kInvalidContext;
    if (blocks == 0) return 1;
    return module->run(blocks, arguments), 0;
  };
  d.cuMemAlloc_v2.address = [](Address* memory, std::size_t bytes) {
    ENTER("cuMemAlloc_v2", true);
    if (current.empty()) return kInvalidContext;
    *memory = reinterpret_cast<Address>(std::malloc(bytes));
    return the_machine.memory[*memory] = current.back()->device, 0;
  };
  d.cuMemFree_v2.address = [](Address memory) {
    const std::lock_guard<std::recursive_mutex> lock(mutex);
    if (the_machine.memory.erase(memory) == 0) return kInvalidHandle;
    return std::free(reinterpret_cast<void*>(memory)), 0;
  };
  d.cuMemcpyAsync.address = [](Address to, Address from, std::size_t bytes, Handle) {
    ENTER("cuMemcpyAsync");
    std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes);
    return 0;
  };
  d.cuMemcpyHtoDAsync_v2.address = [](Address to, const void* from, std::size_t bytes, Handle) {
    ENTER("cuMemcpyHtoDAsync_v2");
    std::memcpy(reinterpret_cast<void*>(to), from, bytes);
    return 0;
  };
  d.cuMemcpyDtoHAsync_v2.address = [](void* to, Address from, std::size_t bytes, Handle) {
    ENTER("cuMemcpyDtoHAsync_v2");
    std::memcpy(to, reinterpret_cast<const void*>(from), bytes);
    return 0;
  };
  d.cuStreamCreate.address = [](Handle* stream, unsigned) {
    ENTER("cuStreamCreate");
    the_machine.streams.insert(*stream = std::malloc(1));
    return 0;
  };
  d.cuStreamDestroy_v2.address = [](Handle stream) {
    const std::lock_guard<std::recursive_mutex> lock(mutex);
    if (the_machine.streams.erase(stream) == 0) return kInvalidHandle;
    return std::free(stream), 0;
  };
  d.cuStreamSynchronize.address = [](Handle) {
    ENTER("cuStreamSynchronize", true);
    return 0;
  };
  d.cuStreamIsCapturing.address = [](Handle, int* capturing) {
    ENTER("cuStreamIsCapturing");
    return *capturing = the_machine.capturing ? 1 : 0, 0;
  };
  d.cuThreadExchangeStreamCaptureMode.address = [](int* mode) {
    ENTER("cuThreadExchangeStreamCaptureMode");
    std::swap(*mode, capture_mode);
    return 0;
  };
  d.cuGetErrorName.address = [](int, const char** name) { return *name = "CUDA_ERROR_STAND_IN", 0; };
  d.cuGetErrorString.address = [](int, const char** text) { return *text = "an error of the stand-in", 0; };
  return d;
}

Nvrtc make_nvrtc() {
  Nvrtc n;
  n.path = "stand-in";
  n.nvrtcVersion.address = [](int* major, int* minor) {
    ENTER("nvrtcVersion");
    *major = the_machine.nvrtc_major;
    return *minor = the_machine.nvrtc_minor, 0;
  };
  n.nvrtcCreateProgram.address = [](Handle* program, const char*, const char*, int, const char* const*,
                                    const char* const*) {
    ENTER("nvrtcCreateProgram");
    return *program = new Program, 0;
  };
  n.nvrtcDestroyProgram.address = [](Handle* program) { return delete static_cast<Program*>(*program), 0; };
  n.nvrtcAddNameExpression.address = [](Handle program, const char* name) {
    ENTER("nvrtcAddNameExpression");
    return static_cast<Program*>(program)->name = name, 0;
  };
  n.nvrtcCompileProgram.address = [](Handle program, int, const char* const*) {
    ENTER("nvrtcCompileProgram");
    auto* const self = static_cast<Program*>(program);
    if (the_machine.find_kernel(self->name.c_str()) != nullptr) return 0;
    self->log = "no kernel of this name was compiled for the host";
    return kCompilation;
  };
  n.nvrtcGetProgramLogSize.address = [](Handle program, std::size_t* size) {
    ENTER("nvrtcGetProgramLogSize");
    return *size = static_cast<Program*>(program)->log.size() + 1, 0;
  };
  n.nvrtcGetProgramLog.address = [](Handle program, char* log) {
    ENTER("nvrtcGetProgramLog");
    std::strcpy(log, static_cast<Program*>(program)->log.c_str());
    return 0;
  };
  n.nvrtcGetLoweredName.address = [](Handle program, const char*, const char** name) {
    ENTER("nvrtcGetLoweredName");
    return *name = static_cast<Program*>(program)->name.c_str(), 0;
  };
  n.nvrtcGetCUBINSize.address = [](Handle program, std::size_t* size) {
    ENTER("nvrtcGetCUBINSize");
    return *size = std::strlen(kImage) + static_cast<Program*>(program)->name.size(), 0;
  };
  n.nvrtcGetCUBIN.address = [](Handle program, char* code) {
    ENTER("nvrtcGetCUBIN");
    const std::string image = kImage + static_cast<Program*>(program)->name;
    std::memcpy(code, image.data(), image.size());
    return 0;
  };
  return n;
}

FindKernel load(const std::string& name) {
  Dl_info self{};
  dladdr(reinterpret_cast<const void*>(&make_nvrtc), &self);
  std::string folder = self.dli_fname;
  folder.resize(folder.rfind('/') + 1);
  void* const library = dlopen((folder + "lib" + name + "_on_host.so").c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw std::runtime_error(dlerror());
  return reinterpret_cast<FindKernel>(dlsym(library, "find_kernel"));
}

}  // namespace

Machine& machine() { return the_machine; }

void begin(const std::string& kernels) {
  static std::deque<Driver> drivers;  // kept: caches go by their addresses
  static const Nvrtc nvrtc = make_nvrtc();
  the_machine = Machine{};
  the_machine.find_kernel = load(kernels);
  cuda::replace_driver(&drivers.emplace_back(make_driver()));
  cuda::replace_nvrtc(&nvrtc);
}

}  // namespace schedulefree::stand_in
