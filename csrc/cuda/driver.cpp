#include "cuda/driver.h"

#include <dlfcn.h>
#include <glob.h>
#include <link.h>

#include <atomic>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

namespace schedulefree::cuda {
namespace {

std::atomic<const Driver*> driver_in_use{nullptr};
std::atomic<const Nvrtc*> nvrtc_in_use{nullptr};

// Fills a table. Returns the name of a function that is missing, or null.
template <typename... Parameters>
bool find(void* library, Function<Parameters...>& function) {
  function.address = reinterpret_cast<int (*)(Parameters...)>(dlsym(library, function.name));
  return function.address != nullptr;
}

const Driver& load_driver() {
  static const Driver found = [] {
    void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr)
      throw std::runtime_error(std::string("there is no CUDA driver here: ") + dlerror());
    Driver table;
#define SCHEDULEFREE_FIND(name, ...) \
  if (!find(library, table.name)) throw std::runtime_error("the CUDA driver is too old: it lacks " #name);
    SCHEDULEFREE_DRIVER(SCHEDULEFREE_FIND)
#undef SCHEDULEFREE_FIND
    table.cuInit(0);
    return table;
  }();
  return found;
}

std::string folder_of(const std::string& path) {
  const std::size_t slash = path.rfind('/');
  return slash == std::string::npos ? "." : path.substr(0, slash);
}

std::vector<std::string> files_like(const std::string& pattern) {
  std::vector<std::string> files;
  glob_t found{};
  if (glob(pattern.c_str(), 0, nullptr, &found) == 0)
    files.assign(found.gl_pathv, found.gl_pathv + found.gl_pathc);
  globfree(&found);
  return files;
}

// Where NVRTC may be, best first.
std::vector<std::string> nvrtc_candidates() {
  if (const char* const chosen = std::getenv("SCHEDULEFREE_CPP_NVRTC")) return {chosen};
  std::vector<std::string> candidates, folders;
  if (void* const torch = dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_LAZY)) {
    link_map* map = nullptr;
    if (dlinfo(torch, RTLD_DI_LINKMAP, &map) == 0) folders.push_back(folder_of(map->l_name));
    dlclose(torch);
  }
  // Brings the NVRTC that torch was built with, wherever it lies; but not without a driver.
  for (const std::string& folder : folders) candidates.push_back(folder + "/libcaffe2_nvrtc.so");
  Dl_info self{};
  if (dladdr(reinterpret_cast<const void*>(&folder_of), &self) != 0 && self.dli_fname != nullptr)
    folders.push_back(folder_of(self.dli_fname));
  for (const std::string& folder : folders) {
    // torch/lib and schedulefree_cpp beside nvidia in site-packages
    for (const char* const packages : {"/../../nvidia", "/../nvidia"}) {
      for (std::string& file : files_like(folder + packages + "/*/lib/libnvrtc.so.[0-9]*"))
        candidates.push_back(std::move(file));
    }
  }
  candidates.insert(candidates.end(), {"libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"});
  return candidates;
}

const Nvrtc& load_nvrtc() {
  static const Nvrtc found = [] {
    std::string tried;
    for (const std::string& path : nvrtc_candidates()) {
      // NVRTC loads these by their name alone, which the loader knows once they are there.
      for (const std::string& builtins : files_like(folder_of(path) + "/libnvrtc-builtins.so.[0-9]*"))
        dlopen(builtins.c_str(), RTLD_NOW | RTLD_LOCAL);
      Nvrtc table;
      void* const library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
      bool complete = library != nullptr;
      std::string reason = complete ? path + " lacks functions of NVRTC" : dlerror();
#define SCHEDULEFREE_FIND(name, ...) complete = complete && find(library, table.name);
      SCHEDULEFREE_NVRTC(SCHEDULEFREE_FIND)
#undef SCHEDULEFREE_FIND
      if (complete) {
        table.path = path;
        return table;
      }
      tried += (tried.empty() ? "" : "; ") + reason;
    }
    throw std::runtime_error(
        "NVRTC was not found. Install it (pip install nvidia-cuda-nvrtc), or name the library in "
        "SCHEDULEFREE_CPP_NVRTC. Tried: " +
        tried);
  }();
  return found;
}

}  // namespace

void fail(const char* function, int result) {
  std::string text = "error " + std::to_string(result);
  if (std::string(function).rfind("cu", 0) == 0) {
    const char* name = nullptr;
    const char* meaning = nullptr;
    const Driver& table = driver();
    if (table.cuGetErrorName.address(result, &name) == 0 && name != nullptr) text = name;
    if (table.cuGetErrorString.address(result, &meaning) == 0 && meaning != nullptr)
      text += std::string(": ") + meaning;
  }
  throw std::runtime_error(std::string("schedulefree_cpp: ") + function + " failed: " + text);
}

const Driver& driver() {
  const Driver* const in_use = driver_in_use.load(std::memory_order_acquire);
  return in_use != nullptr ? *in_use : load_driver();
}

const Nvrtc& nvrtc() {
  const Nvrtc* const in_use = nvrtc_in_use.load(std::memory_order_acquire);
  return in_use != nullptr ? *in_use : load_nvrtc();
}

void replace_driver(const Driver* driver) { driver_in_use.store(driver, std::memory_order_release); }
void replace_nvrtc(const Nvrtc* nvrtc) { nvrtc_in_use.store(nvrtc, std::memory_order_release); }

int driver_version() {
  int version = 0;
  driver().cuDriverGetVersion(&version);
  return version;
}

int nvrtc_version() {
  int major = 0, minor = 0;
  nvrtc().nvrtcVersion(&major, &minor);
  return 1000 * major + 10 * minor;
}

std::string dotted(int version) {
  return std::to_string(version / 1000) + '.' + std::to_string(version % 1000 / 10);
}

const Device& device(int index) {
  constexpr int kMajor = 75, kMinor = 76;  // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
  static std::mutex mutex;
  static std::map<std::pair<const Driver*, int>, std::unique_ptr<Device>> devices;
  const Driver& table = driver();
  const std::lock_guard<std::mutex> lock(mutex);
  std::unique_ptr<Device>& known = devices[{&table, index}];
  if (known) return *known;
  int ordinal = 0, major = 0, minor = 0;
  char name[256] = "";
  table.cuDeviceGet(&ordinal, index);
  table.cuDeviceGetName(name, sizeof(name), ordinal);
  table.cuDeviceGetAttribute(&major, kMajor, ordinal);
  table.cuDeviceGetAttribute(&minor, kMinor, ordinal);
  auto made = std::make_unique<Device>();
  made->index = index;
  made->name = name;
  made->architecture = "sm_" + std::to_string(10 * major + minor);
  table.cuDevicePrimaryCtxRetain(&made->context, ordinal);
  known = std::move(made);
  return *known;
}

}  // namespace schedulefree::cuda
