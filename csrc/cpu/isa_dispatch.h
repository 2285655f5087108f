// The choice among the instruction sets that the CPU kernels are compiled for.
#pragma once

#include <cstdint>

#include "step_args.h"
#include "update_math.h"

namespace schedulefree {

// Elements per unit of work. Ranges that a kernel takes begin at a multiple of it and are no longer.
constexpr std::int64_t kBlock = 512;

// Each updates elements [begin, begin + n), n <= kBlock, of one parameter and its state.
struct KernelTable {
  void (*sgd_step)(const TensorArgs&, std::int64_t begin, std::int64_t n, const StepUpdate&);
  void (*adamw_step)(const TensorArgs&, std::int64_t begin, std::int64_t n, const StepUpdate&);
  void (*swap)(const TensorArgs&, std::int64_t begin, std::int64_t n, const SwapWeight&);
  void (*before_base_step)(const TensorArgs&, std::int64_t begin, std::int64_t n, const BaseStepUpdate&);
  void (*after_base_step)(const TensorArgs&, std::int64_t begin, std::int64_t n, const BaseStepUpdate&);
  // sums = {sum |grad|, sum grad * (z - y)}
  void (*polyak_sums)(const TensorArgs&, std::int64_t begin, std::int64_t n, double* sums);
  // sum grad * grad
  double (*sum_squares)(const TensorArgs&, std::int64_t begin, std::int64_t n);
};

namespace baseline {
const KernelTable& kernel_table();
}
namespace avx2 {
const KernelTable& kernel_table();
}
namespace avx512 {
const KernelTable& kernel_table();
}

struct Isa {
  const char* name;
  const KernelTable& (*kernel_table)();
  bool supported;  // by this processor and its operating system
};

// The best instruction set that this processor supports, or the one that the environment variable
// SCHEDULEFREE_CPU_ISA names (baseline, avx2, avx512). Read once, at the first call.
//
// Throws std::runtime_error when the variable names one that is unknown or not supported here.
const Isa& active_isa();

}  // namespace schedulefree
