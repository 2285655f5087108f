#include "cpu/isa_dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

namespace schedulefree {
namespace {

// Best first.
const std::vector<Isa>& compiled_isas() {
  static const std::vector<Isa> isas = {
#if defined(SCHEDULEFREE_X86_KERNELS)
      {"avx512", &avx512::kernel_table,
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("fma")},
      {"avx2", &avx2::kernel_table, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
      {"baseline", &baseline::kernel_table, true},
  };
  return isas;
}

const Isa& choose() {
  const char* const variable = std::getenv("SCHEDULEFREE_CPU_ISA");
  const std::string wanted = variable ? variable : "";
  std::string available;
  for (const Isa& isa : compiled_isas()) {
    if (!isa.supported) continue;
    if (wanted.empty() || wanted == isa.name) return isa;
    available += (available.empty() ? "" : ", ") + std::string(isa.name);
  }
  throw std::runtime_error("SCHEDULEFREE_CPU_ISA: expected one of " + available +
                           " on this processor, got '" + wanted + "'");
}

}  // namespace

const Isa& active_isa() {
  static const Isa& isa = choose();
  return isa;
}

}  // namespace schedulefree
