#include "cuda/proof.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "cpu/isa_dispatch.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/multi_tensor.h"
#include "cuda/updates.cuh"
#include "storage.h"

namespace schedulefree::cuda {
namespace {

using Bytes = std::vector<unsigned char>;

// ---- a trial ---------------------------------------------------------------------------------------

// What a kernel reads and writes, in one piece of memory: on the host, and at the same offsets on the device.
class Arena {
 public:
  // Adds `count` elements and returns where they begin, `shift` bytes beyond a multiple of 256; behind them
  // lies what must not change. Of `numbers` all NaNs are one, and doubles may differ by `tolerance` of
  // themselves.
  std::size_t add(const char* name, std::size_t count, std::size_t size, bool numbers, std::size_t shift = 0,
                  double tolerance = 0) {
    const std::size_t begin = bytes.size() + shift;
    bytes.resize((begin + count * size + 64 + 255) / 256 * 256, 0xA5);
    regions_.push_back({name, begin, count, size, numbers, tolerance});
    return begin;
  }

  // The first difference in words; empty where there is none.
  std::string difference(Bytes expected, const Bytes& got) const {
    for (const Region& region : regions_) {
      for (std::size_t i = 0; i < region.count; ++i) {
        const std::size_t at = region.begin + i * region.size;
        unsigned char* const wanted = &expected[at];
        if (std::memcmp(wanted, &got[at], region.size) == 0) continue;
        const double a = number(region, wanted), b = number(region, &got[at]);
        const bool same = region.numbers && ((std::isnan(a) && std::isnan(b)) ||
                                             std::fabs(a - b) <= region.tolerance * std::fabs(a));
        if (!same) {
          return "element " + std::to_string(i) + " of " + region.name + ", of " +
                 std::to_string(region.count) + ": expected 0x" + hex(wanted, region.size) + ", got 0x" +
                 hex(&got[at], region.size);
        }
        std::memcpy(wanted, &got[at], region.size);
      }
    }
    return expected == got ? "" : "memory beside a tensor was written";
  }

  Bytes bytes;

 private:
  struct Region {
    const char* name;
    std::size_t begin, count, size;
    bool numbers;
    double tolerance;
  };

  static double number(const Region& region, const unsigned char* bytes) {
    double wide = 0;
    float single = 0;
    std::uint16_t half = 0;
    if (region.size == 8) return std::memcpy(&wide, bytes, 8), wide;
    if (region.size == 4) return std::memcpy(&single, bytes, 4), single;
    std::memcpy(&half, bytes, 2);  // bfloat16 has but one NaN
    return fp16_to_float(half);
  }

  static std::string hex(const unsigned char* bytes, std::size_t size) {
    std::string text(2 * size, '0');
    for (std::size_t i = 0; i < size; ++i)
      std::snprintf(&text[2 * i], 3, "%02x", static_cast<unsigned>(bytes[size - 1 - i]));
    return text;
  }

  std::vector<Region> regions_;
};

// Has the CPU change a copy of the arena by `expect(base)`, and the GPU one by `run(base, stream)`; compares.
template <typename Expect, typename Run>
std::string trial(const Arena& arena, const Expect& expect, const Run& run) {
  struct Stage {
    Handle stream = nullptr;
    Address memory = 0;
    ~Stage() {
      if (memory != 0) driver().cuMemFree_v2.address(memory);
      if (stream != nullptr) driver().cuStreamDestroy_v2.address(stream);
    }
  } stage;
  constexpr unsigned kNonBlocking = 1;  // CU_STREAM_NON_BLOCKING
  Bytes expected = arena.bytes, got(arena.bytes.size());
  expect(expected.data());
  driver().cuStreamCreate(&stage.stream, kNonBlocking);
  driver().cuMemAlloc_v2(&stage.memory, got.size());
  driver().cuMemcpyHtoDAsync_v2(stage.memory, arena.bytes.data(), got.size(), stage.stream);
  run(reinterpret_cast<unsigned char*>(stage.memory), stage.stream);
  driver().cuMemcpyDtoHAsync_v2(got.data(), stage.memory, got.size(), stage.stream);
  driver().cuStreamSynchronize(stage.stream);
  return arena.difference(std::move(expected), got);
}

// The first difference that `attempt` finds for one of some values.
template <typename Values, typename Attempt>
std::string first_difference(const Values& values, const Attempt& attempt) {
  std::string difference;
  for (const auto& value : values) {
    if (difference.empty()) difference = attempt(value);
  }
  return difference;
}

// ---- tensors ---------------------------------------------------------------------------------------

struct Shape {
  std::int64_t numel;
  unsigned shifted;                          // the streams that begin one element late, by their places
  std::vector<std::int64_t> sizes, strides;  // of y, the gradient and the second moment, where they have gaps
};

// Ends of every length modulo a vector and a block, also where one stream or all are not aligned; or gaps.
std::vector<Shape> shapes_for(const KernelId& id) {
  if (id.table == TableKind::kStrided)
    return {{10, 0, {2, 5}, {8, 1}},
            {1, 0, {1}, {7}},
            {2103, 0, {3, 701}, {1, 3}},
            {2100, 0, {2, 3, 350}, {2200, 2, 6}}};
  std::vector<Shape> shapes;
  for (const std::int64_t numel :
       {0, 1, 2, 3, 4, 5, 6, 7, 127, 128, 129, 1021, 1022, 1023, 1024, 1025, 0, 1026, 1027, 2048, 3075})
    shapes.push_back({numel, 0, {}, {}});
  for (unsigned place = 0; place < kStreamIds; ++place) shapes.push_back({1030, 1u << place, {}, {}});
  for (const std::int64_t numel : {1, 3, 5, 1029}) shapes.push_back({numel, ~0u, {}, {}});
  if (id.is_sum()) shapes.push_back({2 * kSumChunk + 5, 0, {}, {}});
  return shapes;
}

// Parameters with all that belongs to them, as `id` reads or writes them.
class Model : public Arena {
 public:
  explicit Model(const KernelId& id) : id_(id), streams_(streams_of(id)), shapes_(shapes_for(id)) {
    for (const Shape& shape : shapes_) {
      for (std::size_t s = 0; s < streams_.size(); ++s) {
        const StreamInfo& info = streams_[s];
        std::int64_t count = shape.numel;
        if (is_scale(info)) count = ceil_div(count, Moment8::kBlock);
        if (has_gaps(shape, info)) {
          count = 1;
          for (std::size_t d = 0; d < shape.sizes.size(); ++d)
            count += (shape.sizes[d] - 1) * shape.strides[d];
        }
        const auto size = static_cast<std::size_t>(size_of(info.dtype));
        const bool shifts = !is_scale(info) && (shape.shifted >> s & 1),
                   numbers = size >= 4 || info.dtype == DType::kFloat16;
        offsets_.push_back(add(info.name, static_cast<std::size_t>(count), size, numbers, shifts ? size : 0));
        for (std::int64_t e = 0; e < count; ++e)
          put(info, &bytes[offsets_.back() + static_cast<std::size_t>(e) * size]);
      }
    }
  }

  // The tensors where `base` is the address of the arena.
  StepPlan plan(unsigned char* base) const {
    StepPlan plan;
    std::size_t next = 0;
    for (const Shape& shape : shapes_) {
      TensorArgs t;
      t.numel = shape.numel;
      t.sizes = shape.sizes.data();
      t.ndim = static_cast<std::int64_t>(shape.sizes.size());
      for (const StreamInfo& info : streams_)
        t.*info.stream = {base + offsets_[next++], has_gaps(shape, info) ? shape.strides.data() : nullptr,
                          info.dtype};
      plan.tensors.push_back(t);
    }
    return plan;
  }

  // All that have elements.
  Batch batch() const {
    Batch batch{0, id_, {}};
    for (std::size_t i = 0; i < shapes_.size(); ++i) {
      if (shapes_[i].numel > 0) batch.tensors.push_back(i);
    }
    return batch;
  }

 private:
  static bool is_scale(const StreamInfo& info) { return info.stream == &TensorArgs::exp_avg_sq_scale; }
  static bool has_gaps(const Shape& shape, const StreamInfo& info) {
    return !shape.strides.empty() && (info.stream == &TensorArgs::y || info.stream == &TensorArgs::grad ||
                                      info.stream == &TensorArgs::exp_avg_sq);
  }

  // Of sums multiples of 1/8, which no order of additions rounds. Else numbers of as many bits as some format
  // has, between two of which lies what has to be rounded either way; and what a kernel may go wrong with.
  double value() {
    if (id_.is_sum()) return static_cast<double>(static_cast<int>(random_() % 257) - 128) / 8;
    constexpr double kSpecial[] = {0.0, -0.0, 1e-40, -1e-44, 1e38, 6e4, -65519.0, HUGE_VAL, -HUGE_VAL, NAN};
    constexpr int kBits[] = {0, 7, 8, 10, 15, 16, 23, 31};
    const unsigned choice = random_() % 64;
    if (choice < std::size(kSpecial)) return kSpecial[choice];
    const int bits = kBits[random_() % std::size(kBits)];
    const double absolute = std::ldexp(static_cast<double>(random_() >> (31 - bits) | 1u << bits), -bits);
    return std::ldexp(choice % 2 ? absolute : -absolute,
                      choice % 3 == 0 ? static_cast<int>(random_() % 24) - 20 : 0);
  }

  // An element of a stream; low halves and codes are any, but of sums 0.
  void put(const StreamInfo& info, unsigned char* where) {
    const bool square = info.stream == &TensorArgs::exp_avg_sq;
    const double x = square ? std::fabs(value()) : value();
    auto single = static_cast<float>(x);
    if (is_scale(info)) single = Moment8::scale(Moment8::order(std::fabs(single)));
    const auto any = static_cast<std::uint16_t>(id_.is_sum() ? 0 : random_());
    const std::uint16_t half = info.dtype == DType::kBFloat16  ? float_to_bf16(single)
                               : info.dtype == DType::kFloat16 ? float_to_fp16(single)
                                                               : any;
    const int size = size_of(info.dtype);
    const void* const from = size == 8   ? static_cast<const void*>(&x)
                             : size == 4 ? static_cast<const void*>(&single)
                                         : &half;
    std::memcpy(where, from, static_cast<std::size_t>(size));
  }

  KernelId id_;
  std::vector<StreamInfo> streams_;
  std::vector<Shape> shapes_;
  std::vector<std::size_t> offsets_;
  std::mt19937 random_{1};
};

// Runs a CPU kernel over all blocks of all tensors.
template <typename Kernel>
void on_cpu(const StepPlan& plan, const Kernel& kernel) {
  for (const TensorArgs& t : plan.tensors) {
    for (std::int64_t begin = 0; begin < t.numel; begin += kBlock)
      kernel(t, begin, std::min(kBlock, t.numel - begin));
  }
}

// ---- kernels ---------------------------------------------------------------------------------------

// Scalars that all differ; of two sets.
StepCoefficients coefficients(const KernelId& id, bool other) {
  StepCoefficients c;
  c.take = 1;
  c.lr = other ? 0.5 : 0.0123;
  c.w = other ? 0.75 : 0.3;
  c.a = other ? -0.11 : -0.0021;
  c.weight_decay = id.decay_at == DecayAt::kNowhere ? 0 : other ? 0.037 : 0.1;
  c.grad_mul = other ? -1.9 : 0.7;
  c.beta2 = other ? 0.9 : 0.99;
  c.denom_scale = other ? 0.6 : 1.3;
  c.denom_eps = other ? 1e-3 : 1e-8;
  c.inner_momentum = !id.inner ? 0 : other ? 0.35 : 0.8;
  c.beta = other ? 0.62 : 0.9;
  c.stochastic = id.at_random ? 1 : 0;
  c.k = other ? 100003 : 41;
  return c;
}

// Its bytes are compared, of which none may be padding.
static_assert(sizeof(ResolvedStep<float>) == 12 * sizeof(float) + sizeof(SettleScalars) + 2 * 4 + 8);

template <typename Real>
void put_resolved(const StepCoefficients& coefs, unsigned char* where) {
  const ResolvedStep<Real> resolved = {StepScalars<Real>(coefs), coefs.take != 0};
  std::memcpy(where, &resolved, sizeof(resolved));
}

// Has `cpu(tensor, begin, n)` change the tensors, and the kernel with `argument_at(base)` behind its table.
template <typename Cpu, typename ArgumentAt>
std::string update_trial(const Model& model, Handle function, const Cpu& cpu, const ArgumentAt& argument_at) {
  return trial(
      model, [&](unsigned char* base) { on_cpu(model.plan(base), cpu); },
      [&](unsigned char* base, Handle stream) {
        const Argument argument = argument_at(base);
        for_each_table(model.plan(base), model.batch(), kUpdateChunk,
                       [&](const void* table, std::uint32_t chunks) {
                         launch(function, chunks, kThreads, stream, table, &argument);
                       });
      });
}

// A trial for each set of scalars, whose CPU form is `cpu(coefs, tensor, begin, n)` and which the kernel
// takes as `argument_of(coefs, where they are resolved)`.
template <typename Cpu, typename ArgumentOf>
std::string prove_with(const std::vector<StepCoefficients>& sets, const KernelId& id, Handle function,
                       const Cpu& cpu, const ArgumentOf& argument_of) {
  Model model(id);
  const std::size_t resolved_at = model.add("the scalars", sizeof(ResolvedStep<double>), 1, false);
  return first_difference(sets, [&](const StepCoefficients& coefs) {
    id.wide() ? put_resolved<double>(coefs, &model.bytes[resolved_at])
              : put_resolved<float>(coefs, &model.bytes[resolved_at]);
    return update_trial(
        model, function,
        [&](const TensorArgs& t, std::int64_t begin, std::int64_t n) {
          if (coefs.take != 0) cpu(coefs, t, begin, n);
        },
        [&](unsigned char* base) { return argument_of(coefs, base + resolved_at); });
  });
}

std::string prove_step(const KernelId& id, Handle function) {
  std::vector<StepCoefficients> sets = {coefficients(id, false), coefficients(id, true),
                                        coefficients(id, false)};
  if (id.captured) {
    sets[1].weight_decay = 0;
    sets[1].stochastic = 1;
    sets[2].take = 0;
  } else {  // half way between y and z, where ties are
    sets[2].w = sets[2].beta = 0.5;
    sets[2].a = sets[2].lr = 0;
  }
  const KernelTable& table = active_isa().kernel_table();
  const auto kernel = id.op == Op::kSgdStep ? table.sgd_step : table.adamw_step;
  return prove_with(
      sets, id, function,
      [&](const StepCoefficients& coefs, const TensorArgs& t, std::int64_t begin, std::int64_t n) {
        kernel(t, begin, n, StepUpdate(coefs, id.decay_at));
      },
      [&](const StepCoefficients& coefs, const void* resolved) {
        return id.captured ? captured_scalars(resolved) : known_scalars(id, coefs);
      });
}

std::string prove_base_step(const KernelId& id, Handle function) {
  std::vector<StepCoefficients> sets = {coefficients(id, false), coefficients(id, true),
                                        coefficients(id, false)};
  sets[0].weight_decay = 0.1;
  sets[1].w = id.captured ? 0.75 : 0;
  sets[2].w = 1;
  sets[2].beta = 0.5;
  if (id.captured) sets[2].take = 0;
  const KernelTable& table = active_isa().kernel_table();
  const auto kernel = id.op == Op::kBeforeBaseStep ? table.before_base_step : table.after_base_step;
  const auto to_x = [](const StepCoefficients& coefs) { return y_to_x_weight(coefs.beta); };
  return prove_with(
      sets, id, function,
      [&](const StepCoefficients& coefs, const TensorArgs& t, std::int64_t begin, std::int64_t n) {
        kernel(t, begin, n, {StepUpdate(coefs, DecayAt::kY), to_x(coefs), id.exchange});
      },
      [&](const StepCoefficients& coefs, const void* resolved) {
        return base_step_scalars(id, coefs, resolved, to_x(coefs));
      });
}

std::string prove_swap(const KernelId& id, Handle function) {
  const Model model(id);
  const SwapWeight weights[] = {y_to_x_weight(0.9), x_to_y_weight(0.9), x_to_y_weight(0.5)};
  return first_difference(weights, [&](const SwapWeight& weight) {
    return update_trial(
        model, function,
        [&](const TensorArgs& t, std::int64_t begin, std::int64_t n) {
          active_isa().kernel_table().swap(t, begin, n, weight);
        },
        [&](unsigned char*) { return swap_weight(weight); });
  });
}

std::string prove_sum(const KernelId& id, Handle function) {
  Model model(id);
  const auto sums = static_cast<std::size_t>(id.op == Op::kPolyakSums ? 2 : 1);
  std::size_t chunks = 0;
  for (const TensorArgs& t : model.plan(model.bytes.data()).tensors)
    chunks += static_cast<std::size_t>(ceil_div(t.numel, kSumChunk));
  const std::size_t totals_at = model.add("sums", chunks * sums, sizeof(double), true);
  return trial(
      model,
      [&](unsigned char* base) {
        auto* totals = reinterpret_cast<double*>(base + totals_at);
        std::fill_n(totals, chunks * sums, 0.0);
        for (const TensorArgs& t : model.plan(base).tensors) {
          for (std::int64_t begin = 0; begin < t.numel; begin += kBlock) {
            double own[2] = {};
            const std::int64_t n = std::min(kBlock, t.numel - begin);
            if (sums == 2) active_isa().kernel_table().polyak_sums(t, begin, n, own);
            if (sums == 1) own[0] = active_isa().kernel_table().sum_squares(t, begin, n);
            double* const chunk = totals + static_cast<std::size_t>(begin / kSumChunk) * sums;
            for (std::size_t s = 0; s < sums; ++s) chunk[s] += own[s];
          }
          totals += static_cast<std::size_t>(ceil_div(t.numel, kSumChunk)) * sums;
        }
      },
      [&](unsigned char* base, Handle stream) {
        auto* totals = reinterpret_cast<double*>(base + totals_at);
        for_each_table(model.plan(base), model.batch(), kSumChunk,
                       [&](const void* table, std::uint32_t count) {
                         launch(function, count, kThreads, stream, table, &totals);
                         totals += count * sums;
                       });
      });
}

std::string prove_total(const KernelId& id, Handle function) {
  const auto sums = static_cast<std::size_t>(id.sums);
  constexpr std::int64_t kCounts[] = {0, 1, 2, 1023, 1024, 3001};
  return first_difference(kCounts, [&](std::int64_t count) {
    Arena arena;
    const std::size_t result_at = arena.add("the total", sums, sizeof(double), true);
    const std::size_t totals_at =
        arena.add("totals", static_cast<std::size_t>(count) * sums, sizeof(double), true);
    auto* const totals = reinterpret_cast<double*>(&arena.bytes[totals_at]);
    double expected[2] = {};
    for (std::size_t i = 0; i < static_cast<std::size_t>(count) * sums; ++i)
      expected[i % sums] += totals[i] = static_cast<double>(i * 37 % 1000) / 8;
    if (id.root) expected[0] = std::sqrt(expected[0]);
    return trial(
        arena, [&](unsigned char* base) { std::memcpy(base + result_at, expected, sums * sizeof(double)); },
        [&](unsigned char* base, Handle stream) {
          unsigned char* const from = base + totals_at;
          unsigned char* const to = base + result_at;
          launch(function, 1, kTotalThreads, stream, &from, &count, &to);
        });
  });
}

template <typename Real>
std::string prove_resolve(const KernelId& id, Handle function) {
  KernelId step = id;
  step.inner = true;
  step.decay_at = DecayAt::kY;
  constexpr bool kSets[] = {false, true};
  return first_difference(kSets, [&](bool other) {
    StepCoefficients coefs = coefficients(step, other);
    coefs.stochastic = other;
    coefs.take = !other;
    Arena arena;
    const std::size_t coefs_at = arena.add("coefs", kStepCoefficients, sizeof(double), true);
    store_coefficients(coefs, reinterpret_cast<double*>(&arena.bytes[coefs_at]));
    const std::size_t resolved_at = arena.add("the scalars", sizeof(ResolvedStep<Real>), 1, false);
    const auto put = [&](unsigned char* base) { put_resolved<Real>(coefs, base + resolved_at); };
    return trial(arena, put, [&](unsigned char* base, Handle stream) {
      unsigned char* const from = base + coefs_at;
      unsigned char* const to = base + resolved_at;
      launch(function, 1, 1, stream, &from, &to);
    });
  });
}

// To a few roundings: pow, log and expm1 of a device may round otherwise than the host's.
std::string prove_schedule(const KernelId& id, Handle function) {
  constexpr double kTolerance = 1e-13;
  constexpr std::int64_t kSteps[] = {0, 3, 1000, -1};  // -1: a step that is skipped
  return first_difference(kSteps, [&](std::int64_t k) {
    Arena arena;
    const std::size_t coefs_at = arena.add("coefs", kStepCoefficients, 8, true, 0, kTolerance);
    const std::size_t state_at = arena.add("the schedule", 3, 8, true, 0, kTolerance);
    const std::size_t k_at = arena.add("k", 1, 8, false), inputs_at = arena.add("inputs", 3, 8, true);
    const auto args_at = [&](unsigned char* base) {
      auto* const state = reinterpret_cast<double*>(base + state_at);
      auto* const inputs = reinterpret_cast<double*>(base + inputs_at);
      ScheduleArgs args;
      args.coefs = reinterpret_cast<double*>(base + coefs_at);
      args.k = reinterpret_cast<std::int64_t*>(base + k_at);
      args.weight_sum = state;
      args.lr_max = state + 1;
      args.scheduled_lr = state + 2;
      args.lr = {inputs, true, false};
      args.found_inf = {inputs + 1, true, false};
      args.grad_norm = {inputs + 2, false, false};
      args.rule.kind = id.kind;
      args.rule.adam = {0.99, 1e-8, 0.3, k != 3};
      args.rule.beta = args.rule.beta_next = 0.93;
      args.rule.warmup_steps = 10;
      args.rule.r = 0.5;
      args.rule.weight_lr_power = 1.5;
      args.rule.decoupling_c = k == 1000 ? 3 : 0;
      args.rule.averaging_weight = k == 3 ? 0.01 : 0;
      args.rule.stochastic = args.rule.maximize = args.rule.clips = true;
      args.rule.max_grad_norm = 2;
      return args;
    };
    const ScheduleArgs host = args_at(arena.bytes.data());
    const double inputs[] = {0.0123, k < 0 ? 1.0 : 0.0};
    const float grad_norm = 37.5f;
    std::memcpy(&arena.bytes[inputs_at], inputs, sizeof(inputs));
    std::memcpy(&arena.bytes[inputs_at + sizeof(inputs)], &grad_norm, sizeof(grad_norm));
    *host.k = std::max<std::int64_t>(k, 0);
    *host.weight_sum = 0.7;
    *host.lr_max = k == 0 ? -1 : 0.01;
    *host.scheduled_lr = 0.004;
    const StepInputs known = {0, 0.05, 0, 4, 0};  // weight decay and the gradients' scale come from the host
    return trial(
        arena,
        [&](unsigned char* base) {
          const ScheduleArgs args = args_at(base);
          StepInputs all = args.inputs();
          all.weight_decay = known.weight_decay;
          all.grad_scale = known.grad_scale;
          args.store(detail::schedule_step_unchecked(args.state(), *args.scheduled_lr, args.rule, all));
        },
        [&](unsigned char* base, Handle stream) {
          const ScheduleArgs args = args_at(base);
          launch(function, 1, 1, stream, &args, &known);
        });
  });
}

}  // namespace

std::string prove(const KernelId& id, Handle function) {
  switch (id.op) {
    case Op::kSgdStep:
    case Op::kAdamwStep:
      return prove_step(id, function);
    case Op::kSwap:
      return prove_swap(id, function);
    case Op::kBeforeBaseStep:
    case Op::kAfterBaseStep:
      return prove_base_step(id, function);
    case Op::kPolyakSums:
    case Op::kGradNorm:
      return prove_sum(id, function);
    case Op::kTotal:
      return prove_total(id, function);
    case Op::kResolve:
      return id.wide() ? prove_resolve<double>(id, function) : prove_resolve<float>(id, function);
    case Op::kSchedule:
      return prove_schedule(id, function);
  }
  return "";
}

}  // namespace schedulefree::cuda
