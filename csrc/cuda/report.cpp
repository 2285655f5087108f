// What build_info.h tells of CUDA.
#include <map>
#include <set>
#include <stdexcept>
#include <string>

#include "build_info.h"
#include "cuda/disk_cache.h"
#include "cuda/kernels.h"

namespace schedulefree::cuda {
namespace {

int gpu_count() {
  int count = 0;
  driver().cuDeviceGetCount(&count);
  return count;
}

// What `call` returns, or the reason for which it throws.
template <typename Call>
std::string or_reason(const Call& call) {
  try {
    return call();
  } catch (const std::runtime_error& error) {
    return std::string("none: ") + error.what();
  }
}

std::string report() {
  std::string lines;
  const auto add = [&](const std::string& name, const std::string& value) {
    lines += name + '\t' + value + '\n';
  };
  add("CUDA driver", or_reason([] { return dotted(driver_version()); }));
  add("CUDA GPUs", or_reason([] {
        std::string names;
        for (int i = 0; i < gpu_count(); ++i) names += (i ? "; " : "") + device(i).text();
        return names.empty() ? std::string("none") : names;
      }));
  add("NVRTC", or_reason([] { return dotted(nvrtc_version()) + ", " + nvrtc().path; }));
  const std::string problem = cache_problem();
  add("kernel cache", problem.empty() ? cache_folder() : cache_folder() + " is not used: " + problem);
  std::map<std::string, int> kernels;  // by all of their identity but their names
  std::map<std::string, int> proofs;   // by GPU and driver
  for (const CachedKernel& kernel : cached_kernels()) {
    ++kernels[kernel.identity.substr(0, kernel.identity.find(": "))];
    for (const std::string& gpu : kernel.proofs) ++proofs[gpu];
  }
  for (const auto& [what, count] : kernels) add("kernels compiled", std::to_string(count) + " for " + what);
  for (const auto& [gpu, count] : proofs) add("kernels proved", std::to_string(count) + " on " + gpu);
  return lines;
}

void compile_kernels(const std::string& architecture, void (*progress)(const char*)) {
  std::set<std::string> targets;
  if (!architecture.empty()) targets.insert(architecture);
  for (int i = 0; architecture.empty() && i < gpu_count(); ++i) targets.insert(device(i).architecture);
  if (targets.empty())
    throw std::runtime_error("schedulefree_cpp: this machine has no GPU; name an architecture");
  const std::string problem = cache_problem();
  if (!problem.empty())
    throw std::runtime_error("schedulefree_cpp: " + cache_folder() + " cannot be used: " + problem);
  for (const std::string& target : targets) {
    for (const KernelId& id : common_kernels()) {
      const bool fresh = compile_ahead(id, target);
      progress((target + (fresh ? " compiled " : " was there: ") + id.name()).c_str());
    }
  }
}

}  // namespace
}  // namespace schedulefree::cuda

extern "C" {

const char* schedulefree_cpp_cuda_report() {
  static thread_local std::string text;
  text = schedulefree::cuda::report();
  return text.c_str();
}

const char* schedulefree_cpp_compile_kernels(const char* architecture, void (*progress)(const char*)) {
  static thread_local std::string reason;
  try {
    schedulefree::cuda::compile_kernels(architecture, progress);
    return nullptr;
  } catch (const std::runtime_error& error) {
    reason = error.what();
    return reason.c_str();
  }
}

void schedulefree_cpp_set_log(void (*log)(const char*)) { schedulefree::cuda::set_log(log); }

}  // extern "C"
