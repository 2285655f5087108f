#include "build_info.h"

#include <dlfcn.h>
#include <unistd.h>

#include <string>

#include "cpu/isa_dispatch.h"

namespace {

std::string load_cuda() {
  Dl_info self{};
  // The address of an exported function may be that of another library.
  if (dladdr(reinterpret_cast<const void*>(&load_cuda), &self) == 0 || !self.dli_fname)
    return "the loader does not tell where libschedulefree_cpp.so lies";
  const std::string own = self.dli_fname;
  const std::size_t slash = own.rfind('/');
  const std::string path =
      (slash == std::string::npos ? "" : own.substr(0, slash + 1)) + "libschedulefree_cpp_cuda.so";
  // Its registrations stay for the life of the process, so the handle is never closed.
  if (dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) return "";
  const std::string error = dlerror();
  const std::string built = schedulefree_cpp_cuda_build();
  const bool missing = access(path.c_str(), F_OK) != 0 && built.rfind("not built", 0) == 0;
  return missing ? "the CUDA kernels were " + built : error;
}

}  // namespace

extern "C" {

const char* schedulefree_cpp_version() { return SCHEDULEFREE_VERSION; }

const char* schedulefree_cpp_compiler() { return SCHEDULEFREE_COMPILER; }

const char* schedulefree_cpp_min_torch() { return SCHEDULEFREE_MIN_TORCH; }

const char* schedulefree_cpp_cpu_isa() { return schedulefree::active_isa().name; }

const char* schedulefree_cpp_cuda_build() { return SCHEDULEFREE_CUDA_BUILD; }

const char* schedulefree_cpp_load_cuda() {
  static const std::string reason = load_cuda();
  return reason.empty() ? nullptr : reason.c_str();
}

}  // extern "C"
