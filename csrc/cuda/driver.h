// The CUDA driver and NVRTC, as functions that are found when they are needed: a build needs no CUDA headers,
// and the library loads where there is neither. Plain C++ without torch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace schedulefree::cuda {

using Handle = void*;  // CUcontext, CUmodule, CUfunction, CUstream, nvrtcProgram
using Address = unsigned long long;

constexpr int kLargeArgumentsVersion = 12010;  // drivers and NVRTCs before it take 4 KB of arguments

// Throws std::runtime_error for what a function of the driver or of NVRTC has returned.
[[noreturn]] void fail(const char* function, int result);

// One function; throws where it returns an error.
template <typename... Parameters>
struct Function {
  int (*address)(Parameters...) = nullptr;
  const char* name = nullptr;

  void operator()(Parameters... parameters) const {
    const int result = address(parameters...);
    if (result != 0) fail(name, result);
  }
};

// What follows has the parameters of cuda.h and nvrtc.h, whose handles are pointers and whose results int.
// clang-format off
#define SCHEDULEFREE_DRIVER(X)                                                                          \
  X(cuInit, unsigned)                                                                                   \
  X(cuDriverGetVersion, int*)                                                                           \
  X(cuDeviceGetCount, int*)                                                                             \
  X(cuDeviceGet, int*, int)                                                                             \
  X(cuDeviceGetName, char*, int, int)                                                                   \
  X(cuDeviceGetAttribute, int*, int, int)                                                               \
  X(cuDevicePrimaryCtxRetain, Handle*, int)                                                             \
  X(cuCtxPushCurrent_v2, Handle)                                                                        \
  X(cuCtxPopCurrent_v2, Handle*)                                                                        \
  X(cuModuleLoadData, Handle*, const void*)                                                             \
  X(cuModuleUnload, Handle)                                                                             \
  X(cuModuleGetFunction, Handle*, Handle, const char*)                                                  \
  X(cuLaunchKernel, Handle, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, Handle, \
    void**, void**)                                                                                     \
  X(cuMemAlloc_v2, Address*, std::size_t)                                                               \
  X(cuMemFree_v2, Address)                                                                              \
  X(cuMemcpyAsync, Address, Address, std::size_t, Handle)                                               \
  X(cuMemcpyHtoDAsync_v2, Address, const void*, std::size_t, Handle)                                    \
  X(cuMemcpyDtoHAsync_v2, void*, Address, std::size_t, Handle)                                          \
  X(cuStreamCreate, Handle*, unsigned)                                                                  \
  X(cuStreamDestroy_v2, Handle)                                                                         \
  X(cuStreamSynchronize, Handle)                                                                        \
  X(cuStreamIsCapturing, Handle, int*)                                                                  \
  X(cuThreadExchangeStreamCaptureMode, int*)                                                            \
  X(cuGetErrorName, int, const char**)                                                                  \
  X(cuGetErrorString, int, const char**)

#define SCHEDULEFREE_NVRTC(X)                                                                           \
  X(nvrtcVersion, int*, int*)                                                                           \
  X(nvrtcCreateProgram, Handle*, const char*, const char*, int, const char* const*, const char* const*) \
  X(nvrtcDestroyProgram, Handle*)                                                                       \
  X(nvrtcAddNameExpression, Handle, const char*)                                                        \
  X(nvrtcCompileProgram, Handle, int, const char* const*)                                               \
  X(nvrtcGetProgramLogSize, Handle, std::size_t*)                                                       \
  X(nvrtcGetProgramLog, Handle, char*)                                                                  \
  X(nvrtcGetLoweredName, Handle, const char*, const char**)                                             \
  X(nvrtcGetCUBINSize, Handle, std::size_t*)                                                            \
  X(nvrtcGetCUBIN, Handle, char*)
// clang-format on

#define SCHEDULEFREE_FUNCTION(name, ...) Function<__VA_ARGS__> name{nullptr, #name};
struct Driver {
  SCHEDULEFREE_DRIVER(SCHEDULEFREE_FUNCTION)
};
struct Nvrtc {
  SCHEDULEFREE_NVRTC(SCHEDULEFREE_FUNCTION)
  std::string path;
};
#undef SCHEDULEFREE_FUNCTION

// The functions, looked up at the first call.
//
// Throws std::runtime_error with the reason where there is no driver, or no NVRTC; that of NVRTC names the
// places that were searched: $SCHEDULEFREE_CPP_NVRTC, torch's own, pip's nvidia-cuda-nvrtc, the loader's.
const Driver& driver();
const Nvrtc& nvrtc();

// Takes these functions in place of what is found, for tests; null gives the found ones back.
void replace_driver(const Driver* driver);
void replace_nvrtc(const Nvrtc* nvrtc);

// Of the driver and of NVRTC: 1000 * major + 10 * minor.
int driver_version();
int nvrtc_version();

// "13.0" of 13000.
std::string dotted(int version);

// A GPU, by its number in torch. Its primary context is that of torch, retained for the life of the process.
struct Device {
  int index = 0;
  std::string name;
  std::string architecture;  // "sm_90"
  Handle context = nullptr;

  std::string text() const { return name + " (cuda:" + std::to_string(index) + ", " + architecture + ')'; }
};
const Device& device(int index);

// Makes the context of a device current while it lives.
class InContext {
 public:
  explicit InContext(const Device& device) { driver().cuCtxPushCurrent_v2(device.context); }
  ~InContext() {
    Handle ours;
    driver().cuCtxPopCurrent_v2.address(&ours);
  }
  InContext(const InContext&) = delete;
  InContext& operator=(const InContext&) = delete;
};

}  // namespace schedulefree::cuda
