// Which kernel a call needs: all that the host knows of it and that is compiled into the kernel.
#pragma once

#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "schedule_math.h"
#include "step_args.h"

namespace schedulefree::cuda {

enum class Op : std::uint8_t {
  kSgdStep,
  kAdamwStep,
  kSwap,
  kBeforeBaseStep,
  kAfterBaseStep,
  kPolyakSums,
  kGradNorm,
  kTotal,
  kResolve,
  kSchedule
};

// The formats of storage.h.
enum class Format : std::uint8_t { kFloat32, kFloat64, kFp16, kBf16, kSplitFp16, kSplitBf16, kSplit24 };

// How tensors reach a kernel (multi_tensor.h).
enum class TableKind : std::uint8_t { kLarge, kSmall, kStrided };

struct KernelId {
  Op op = Op::kSgdStep;
  Format y = Format::kFloat32;     // of a sum over gradients alone: unused; of kResolve: its arithmetic
  Format grad = Format::kFloat32;  // of steps and sums
  bool moment8 = false, inner = false;
  TableKind table = TableKind::kLarge;
  // Of steps, and of what surrounds those of a base optimizer. `captured`: their scalars are on the device.
  DecayAt decay_at = DecayAt::kNowhere;
  bool at_random = false, captured = false;
  bool exchange = false;  // of kBeforeBaseStep and kAfterBaseStep
  // Of kTotal.
  int sums = 1;
  bool root = false;
  StepKind kind = StepKind::kSgd;  // of kSchedule

  // The C++ expression that names it in kernels.cuh.
  std::string name() const;

  bool is_step() const { return op == Op::kSgdStep || op == Op::kAdamwStep; }
  bool is_sum() const { return op == Op::kPolyakSums || op == Op::kGradNorm; }
  bool wide() const { return y == Format::kFloat64; }

  friend bool operator<(const KernelId& l, const KernelId& r) { return l.key() < r.key(); }
  friend bool operator==(const KernelId& l, const KernelId& r) { return l.key() == r.key(); }

 private:
  std::tuple<Op, Format, Format, bool, bool, TableKind, DecayAt, bool, bool, bool, int, bool, StepKind> key()
      const {
    return {op, y, grad, moment8, inner, table, decay_at, at_random, captured, exchange, sums, root, kind};
  }
};

// One stream of the tensors that a kernel reads or writes.
struct StreamInfo {
  const char* name;
  Stream TensorArgs::* stream;
  DType dtype;
};
int size_of(DType dtype);

// The streams of a kernel with a table, in the order of StreamId.
std::vector<StreamInfo> streams_of(const KernelId& id);

// The part of a kernel's identity that a parameter decides: formats, moments, and whether it has gaps.
KernelId kernel_for(Op op, const TensorArgs& tensor);

// The kernels that training may need whose gradients have the dtype of their parameters and whose tensors
// have no gaps.
std::vector<KernelId> common_kernels();

}  // namespace schedulefree::cuda
