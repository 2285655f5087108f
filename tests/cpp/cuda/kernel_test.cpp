// Tables, batches, and the kernels themselves, launched as the operators launch them through a stand-in for
// the driver that runs them on the host. The results must be those of the CPU kernels, bit for bit; every
// tensor is a piece of memory of its own and of its exact size, for AddressSanitizer to see what lies beyond.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <ostream>
#include <random>
#include <string>
#include <vector>

#include "cpu/isa_dispatch.h"
#include "cuda/launch.h"
#include "cuda/multi_tensor.h"
#include "cuda/stand_in.h"
#include "cuda/torch_on_host.h"
#include "schedule.h"
#include "storage.h"

namespace schedulefree {
namespace {

using cuda::Op;
using cuda::TableKind;

// ---- tables ----------------------------------------------------------------------------------------

using TestTable = TensorTable<2, 8>;

void* fake(std::uintptr_t address) { return reinterpret_cast<void*>(address); }

struct Span {
  std::uintptr_t begin;
  std::int64_t elements;
};

// What the pieces of one stream cover, in order, with neighbours joined.
constexpr unsigned kTwo = only(kY) | only(kZ);

template <typename Table>
std::vector<Span> covered(const Table& table, StreamId stream, int element_size) {
  std::vector<Span> spans;
  for (std::uint32_t chunk = 0; chunk < table.chunks; ++chunk) {
    const auto piece = table.template piece<kTwo>(chunk);
    const auto size = static_cast<std::uintptr_t>(element_size);
    const auto begin = reinterpret_cast<std::uintptr_t>(piece.template whole<char>(stream)) +
                       static_cast<std::uintptr_t>(piece.begin) * size;
    const std::int64_t elements = piece.size;
    EXPECT_LE(piece.size, table.chunk_size);
    if (!spans.empty() &&
        spans.back().begin + static_cast<std::uintptr_t>(spans.back().elements) * size == begin) {
      spans.back().elements += elements;
    } else {
      spans.push_back({begin, elements});
    }
  }
  return spans;
}

TEST(Table, PiecesCoverEachTensorOnce) {
  constexpr int kSizes[2] = {4, 2};
  for (const std::int64_t chunk : {kUpdateChunk, std::int64_t{8192}}) {
    for (const std::uintptr_t offset : {0, 1, 2, 3}) {
      const std::vector<std::int64_t> numels = {1, 2, 3, 4, 5, chunk - 1, chunk, chunk + 1, 3 * chunk + 7};
      TestTable table(chunk);
      std::vector<Span> expected;
      std::uintptr_t address = 1 << 20;
      for (const std::int64_t numel : numels) {
        if (expected.size() == 8) {  // the table's capacity
          void* const pointers[2] = {fake(address), fake(address)};
          EXPECT_FALSE(table.append(pointers, kSizes, numel));
          break;
        }
        const std::uintptr_t begin = address + 4 * offset;
        void* const pointers[2] = {fake(begin), fake(begin * 2)};
        ASSERT_TRUE(table.append(pointers, kSizes, numel));
        expected.push_back({begin, numel});
        address += static_cast<std::uintptr_t>(4 * numel + 4096) / 16 * 16;
      }
      const std::vector<Span> first = covered(table, kY, 4), second = covered(table, kZ, 2);
      ASSERT_EQ(first.size(), expected.size());
      for (std::size_t i = 0; i < expected.size(); ++i) {
        EXPECT_EQ(first[i].begin, expected[i].begin);
        EXPECT_EQ(first[i].elements, expected[i].elements);
        EXPECT_EQ(second[i].begin, 2 * expected[i].begin);
        EXPECT_EQ(second[i].elements, expected[i].elements);
      }
    }
  }
}

TEST(Table, TensorsBeyondTwoToThe31) {
  constexpr int kSizes[2] = {2, 4};
  const std::int64_t huge = (std::int64_t{1} << 33) + 5;
  TestTable table(16384);
  void* const small[2] = {fake(1 << 20), fake(1 << 21)};
  void* const large[2] = {fake(std::uintptr_t{1} << 40), fake(std::uintptr_t{1} << 41)};
  ASSERT_TRUE(table.append(small, kSizes, 3));
  ASSERT_TRUE(table.append(large, kSizes, huge));
  ASSERT_TRUE(table.append(small, kSizes, 16385));
  EXPECT_EQ(table.chunks, 1u + (huge / 16384 + 1) + 2u);
  const std::uint32_t last_of_huge = table.chunks - 3;
  const auto piece = table.piece<kTwo>(last_of_huge);
  EXPECT_EQ(table.tensor_of(last_of_huge), 1u);
  EXPECT_EQ(piece.size, 5);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(piece.at<std::uint16_t>(kY, 0)),
            (std::uintptr_t{1} << 40) + 2 * static_cast<std::uintptr_t>(huge - 5));
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(piece.at<float>(kZ, 0)),
            (std::uintptr_t{1} << 41) + 4 * static_cast<std::uintptr_t>(huge - 5));
  EXPECT_EQ(table.tensor_of(last_of_huge + 1), 2u);
  EXPECT_EQ(table.tensor_of(0), 0u);
}

TEST(Table, RefusesMoreChunksThanALaunchHas) {
  constexpr int kSizes[2] = {2, 2};
  TestTable table(2048);
  void* const pointers[2] = {fake(1 << 20), fake(1 << 21)};
  const std::int64_t most = std::int64_t{kMaxChunks} * 2048;
  EXPECT_FALSE(table.append(pointers, kSizes, most + 1));
  EXPECT_EQ(table.tensors, 0u);
  EXPECT_TRUE(table.append(pointers, kSizes, most));
  EXPECT_EQ(table.chunks, kMaxChunks);
  EXPECT_FALSE(table.append(pointers, kSizes, 1));
  EXPECT_EQ(table.tensor_of(kMaxChunks - 1), 0u);
}

TEST(Table, SearchFindsEachOfManyTensors) {
  static TensorTable<1, 3000> table(2048);
  constexpr int kSizes[1] = {4};
  std::vector<std::uint32_t> owner;
  std::mt19937 random(1);
  for (std::uint32_t t = 0; t < 3000; ++t) {
    const std::int64_t numel = 1 + static_cast<std::int64_t>(random() % 9000);
    void* const pointers[1] = {fake(16 * (t + 1))};
    ASSERT_TRUE(table.append(pointers, kSizes, numel));
    owner.resize(table.chunks, t);
  }
  for (std::uint32_t chunk = 0; chunk < table.chunks; ++chunk)
    ASSERT_EQ(table.tensor_of(chunk), owner[chunk]);
}

TEST(Table, TellsWhichStreamsHaveAlignedVectors) {
  constexpr int kSizes[2] = {4, 2};
  TestTable table(2048);
  const auto aligned = [&](std::uintptr_t first, std::uintptr_t second) {
    void* const pointers[2] = {fake(4096 + 4 * first), fake(4096 + 2 * second)};
    EXPECT_TRUE(table.append(pointers, kSizes, 100));
    const auto piece = table.piece<kTwo>(table.chunks - 1);
    return std::string(piece.aligned(kY) ? "y" : "n") + (piece.aligned(kZ) ? "y" : "n");
  };
  EXPECT_EQ(aligned(0, 0), "yy");
  EXPECT_EQ(aligned(4, 4), "yy");
  EXPECT_EQ(aligned(1, 1), "nn");
  EXPECT_EQ(aligned(0, 1), "yn");
  EXPECT_EQ(aligned(2, 4), "ny");
}

template <int streams>
void expect_full() {
  for (const bool large : {true, false}) {
    const std::size_t limit = large ? kLargeArguments : kSmallArguments;
    const std::size_t size = large ? sizeof(LargeTable<streams>) : sizeof(SmallTable<streams>);
    EXPECT_LE(size + kScalarArguments, limit);
    EXPECT_GT(size + kScalarArguments + 128, limit);
  }
  EXPECT_LE(sizeof(StridedTensor<streams>) + kScalarArguments, kSmallArguments);
}

TEST(Table, FillsTheArgumentsButNoMore) {
  expect_full<1>();
  expect_full<2>();
  expect_full<4>();
  expect_full<8>();
}

TEST(Batches, OneForEachDeviceAndCombinationOfDtypes) {
  StepPlan plan;
  const std::int64_t strides[1] = {2};
  const auto add = [&](std::int32_t device, DType y, DType grad, bool low, bool gaps, std::int64_t numel,
                       DType low_dtype = DType::kInt16) {
    static int memory = 0;
    TensorArgs t;
    t.device = device;
    t.numel = numel;
    t.y.dtype = y;
    t.grad.dtype = grad;
    if (low) t.y_lo.data = &memory;
    t.y_lo.dtype = low_dtype;
    t.grad.data = t.exp_avg_sq.data = &memory;
    if (gaps) t.grad.strides = strides;
    plan.tensors.push_back(t);
  };
  add(1, DType::kFloat32, DType::kFloat32, false, false, 5);                 // 0
  add(0, DType::kFloat32, DType::kFloat32, false, false, 5);                 // 1
  add(0, DType::kBFloat16, DType::kBFloat16, true, false, 5);                // 2
  add(0, DType::kFloat32, DType::kFloat32, false, false, 0);                 // no elements
  add(0, DType::kFloat32, DType::kFloat32, false, true, 5);                  // 4
  add(0, DType::kFloat32, DType::kBFloat16, false, false, 5);                // 5
  add(0, DType::kFloat32, DType::kFloat32, false, false, 5);                 // 6
  add(0, DType::kBFloat16, DType::kBFloat16, true, false, 5, DType::kInt8);  // 7
  add(1, DType::kFloat32, DType::kFloat32, false, false, 5);                 // 8
  std::vector<std::vector<std::size_t>> tensors;
  std::vector<std::int32_t> devices;
  for (const cuda::Batch& batch : cuda::batches_of(plan, Op::kAdamwStep, TableKind::kLarge)) {
    tensors.push_back(batch.tensors);
    devices.push_back(batch.device);
  }
  EXPECT_EQ(devices, (std::vector<std::int32_t>{0, 0, 0, 0, 0, 1}));
  EXPECT_EQ(tensors, (std::vector<std::vector<std::size_t>>{{1, 6}, {2}, {4}, {5}, {7}, {0, 8}}));
}

TEST(Batches, RefusesTooManyDimensions) {
  StepPlan plan;
  plan.tensors.emplace_back();
  plan.tensors[0].numel = 1;
  plan.tensors[0].ndim = kMaxDims + 1;
  EXPECT_THROW(cuda::batches_of(plan, Op::kAdamwStep, TableKind::kLarge), std::runtime_error);
}

// ---- kernels ---------------------------------------------------------------------------------------

// A tensor's stream in memory of its own, of its exact size.
struct Memory {
  std::vector<unsigned char> bytes;
  int element_size = 4;
  std::int64_t offset = 0;  // of the first element

  unsigned char* begin() { return bytes.data() + offset * element_size; }
};

struct Layout {
  std::int64_t numel = 0;
  std::vector<std::int64_t> offsets = std::vector<std::int64_t>(8, 0);  // elements before the first
  bool gaps = false;  // as 2 x numel / 2, some streams with gaps
};

struct Kinds {
  DType y = DType::kFloat32, grad = DType::kFloat32, y_lo = DType::kInt16;
  bool inner = false, moment8 = false;

  bool low() const { return y == DType::kBFloat16 || y == DType::kFloat16; }
  bool of_24_bits() const { return low() && y_lo == DType::kInt8; }
  DType state() const { return y == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }
};

// As tests are named.
void PrintTo(const Kinds& kinds, std::ostream* out) {
  static constexpr const char* kNames[] = {"float32", "float64", "bfloat16", "float16"};
  *out << kNames[static_cast<int>(kinds.y)] << '_' << kNames[static_cast<int>(kinds.grad)]
       << (kinds.of_24_bits() ? "_24" : "") << (kinds.inner ? "_inner" : "") << (kinds.moment8 ? "_8" : "");
}

int size_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 8;
    case DType::kFloat32:
      return 4;
    case DType::kInt8:
    case DType::kUInt8:
      return 1;
    default:
      return 2;
  }
}

// One parameter with all its streams.
class Parameters {
 public:
  enum Streams { kY, kYLow, kGrad, kZ, kZLow, kV, kScale, kM, kStreams };

  Parameters(const Kinds& kinds, const Layout& layout, std::mt19937& random)
      : kinds_(kinds), layout_(layout) {
    for (int s = 0; s < kStreams; ++s) {
      Memory& memory = streams_[s];
      memory.element_size = size_of(dtype(s));
      memory.offset = s == kScale ? 0 : layout.offsets[static_cast<std::size_t>(s)];
      std::int64_t elements = layout.numel + memory.offset;
      if (s == kScale) elements = ceil_div(layout.numel, Moment8::kBlock);
      if (layout.gaps && (s == kY || s == kV)) elements += 3;  // between two rows
      memory.bytes.resize(static_cast<std::size_t>(elements * memory.element_size));
      memory.bytes.shrink_to_fit();
      fill(memory, dtype(s), s == kV || s == kScale, random);
      if (s == kScale) {
        auto* const scales = reinterpret_cast<float*>(memory.bytes.data());
        for (std::size_t i = 0; i < memory.bytes.size() / sizeof(float); ++i)
          scales[i] = Moment8::scale(Moment8::order(scales[i]));
      }
    }
    if (layout.gaps) {
      sizes_ = {2, layout.numel / 2};
      wide_ = {layout.numel / 2 + 3, 1};  // rows apart
      transposed_ = {1, 2};
    }
  }

  TensorArgs args() {
    TensorArgs t;
    t.numel = layout_.numel;
    t.device = 0;
    Stream* const streams[kStreams] = {
        &t.y, &t.y_lo, &t.grad, &t.z, &t.z_lo, &t.exp_avg_sq, &t.exp_avg_sq_scale, &t.exp_avg};
    const bool has[kStreams] = {true, kinds_.low(),   true,        true, kinds_.of_24_bits(),
                                true, kinds_.moment8, kinds_.inner};
    for (int s = 0; s < kStreams; ++s) {
      if (!has[s]) continue;
      streams[s]->data = streams_[s].begin();
      streams[s]->dtype = dtype(s);
    }
    if (layout_.gaps) {
      t.sizes = sizes_.data();
      t.ndim = 2;
      t.y.strides = wide_.data();
      t.grad.strides = transposed_.data();
      t.exp_avg_sq.strides = wide_.data();
    }
    return t;
  }

  // Every byte, also those between the elements; but all NaNs are one.
  bool operator==(const Parameters& other) const {
    for (int s = 0; s < kStreams; ++s) {
      const auto& l = streams_[s].bytes;
      const auto& r = other.streams_[s].bytes;
      const bool same = streams_[s].element_size == 8            ? same_numbers<double>(l, r)
                        : streams_[s].element_size == 4          ? same_numbers<float>(l, r)
                        : s == kY && kinds_.y == DType::kFloat16 ? same_numbers<Fp16>(l, r)
                                                                 : same_numbers<std::uint8_t>(l, r);
      if (!same) return false;
    }
    return true;
  }

 private:
  struct Fp16 {
    std::uint16_t bits;
  };
  static bool is_nan(double x) { return std::isnan(x); }
  static bool is_nan(float x) { return std::isnan(x); }
  static bool is_nan(Fp16 x) { return std::isnan(fp16_to_float(x.bits)); }
  static bool is_nan(std::uint8_t) { return false; }  // bfloat16 has but one NaN, integers have none

  DType dtype(int stream) const {
    const DType dtypes[kStreams] = {kinds_.y,        kinds_.y_lo,
                                    kinds_.grad,     kinds_.of_24_bits() ? DType::kBFloat16 : kinds_.state(),
                                    DType::kInt8,    kinds_.moment8 ? DType::kUInt8 : kinds_.state(),
                                    DType::kFloat32, kinds_.state()};
    return dtypes[stream];
  }

  template <typename T>
  static bool same_numbers(const std::vector<unsigned char>& l, const std::vector<unsigned char>& r) {
    for (std::size_t at = 0; at < l.size(); at += sizeof(T)) {
      T a, b;
      std::memcpy(&a, l.data() + at, sizeof(a));
      std::memcpy(&b, r.data() + at, sizeof(b));
      if (std::memcmp(&a, &b, sizeof(a)) != 0 && !(is_nan(a) && is_nan(b))) return false;
    }
    return true;
  }

  static void fill(Memory& memory, DType dtype, bool positive, std::mt19937& random) {
    std::normal_distribution<double> normal;
    const double special[] = {0.0, -0.0, 1e-40, -1e-44, 1e38, INFINITY, -INFINITY, NAN, 6e4, 1e-7};
    unsigned char* const bytes = memory.bytes.data();
    const auto elements = static_cast<std::int64_t>(memory.bytes.size()) / memory.element_size;
    for (std::int64_t i = 0; i < elements; ++i) {
      double x = random() % 16 == 0 ? special[random() % 10] : normal(random);
      if (positive) x = std::fabs(x);
      const auto as_float = static_cast<float>(x);
      const auto low = static_cast<std::int16_t>(random());  // its first byte where 8 bits are wanted
      const std::uint16_t half = dtype == DType::kFloat16 ? float_to_fp16(as_float) : float_to_bf16(as_float);
      const void* const from = dtype == DType::kFloat64   ? static_cast<const void*>(&x)
                               : dtype == DType::kFloat32 ? static_cast<const void*>(&as_float)
                               : size_of(dtype) == 1 || dtype == DType::kInt16
                                   ? static_cast<const void*>(&low)
                                   : static_cast<const void*>(&half);
      std::memcpy(bytes + i * memory.element_size, from, static_cast<std::size_t>(memory.element_size));
    }
  }

  Kinds kinds_;
  Layout layout_;
  Memory streams_[kStreams];
  std::vector<std::int64_t> sizes_, wide_, transposed_;
};

// Several parameters and a plan over them; copies have memory of their own.
struct Model {
  std::vector<Parameters> parameters;

  StepPlan plan() {
    StepPlan plan;
    for (Parameters& p : parameters) plan.tensors.push_back(p.args());
    return plan;
  }
  // Without gradients and moments.
  StepPlan plan_of_y_and_z() {
    StepPlan result = plan();
    for (TensorArgs& t : result.tensors) t.grad = t.exp_avg_sq = t.exp_avg = t.exp_avg_sq_scale = {};
    return result;
  }
};

Model model_of(const Kinds& kinds, unsigned seed) {
  std::mt19937 random(seed);
  Model model;
  const auto add = [&](std::int64_t numel, std::vector<std::int64_t> offsets, bool gaps = false) {
    Layout layout;
    layout.numel = numel;
    layout.offsets = std::move(offsets);
    layout.gaps = gaps;
    model.parameters.emplace_back(kinds, layout, random);
  };
  const std::vector<std::int64_t> none(8, 0);
  for (const std::int64_t numel : {0, 1, 2, 3, 4, 5, 7, 1023, 1024, 1025, 2047, 2048, 2049, 5000})
    add(numel, none);
  for (const std::int64_t offset : {1, 2, 3}) {
    for (const std::int64_t numel : {1, 2, 3, 4, 2051}) {
      add(numel, std::vector<std::int64_t>(8, offset));
      add(numel, {offset, 1, 0, 2, 3, 1, 0, offset});
      add(numel, {0, 0, offset, 0, 0, 0, 0, 0});
    }
  }
  for (const std::int64_t numel : {2, 10, 3000}) add(numel, none, true);
  return model;
}

template <typename Kernel>
void on_cpu(const StepPlan& plan, const Kernel& kernel) {
  for (const TensorArgs& t : plan.tensors) {
    for (std::int64_t begin = 0; begin < t.numel; begin += kBlock)
      kernel(t, begin, std::min(kBlock, t.numel - begin));
  }
}

const KernelTable& cpu() { return baseline::kernel_table(); }

StepCoefficients coefs_of(const Kinds& kinds) {
  StepCoefficients coefs;
  coefs.take = 1;
  coefs.lr = 0.01;
  coefs.w = 0.3;
  coefs.a = -0.002;
  coefs.weight_decay = 0.1;
  coefs.grad_mul = 0.7;
  coefs.beta2 = 0.99;
  coefs.denom_scale = 1.3;
  coefs.denom_eps = 1e-8;
  coefs.inner_momentum = kinds.inner ? 0.8 : 0.0;
  coefs.beta = 0.9;
  coefs.k = 41;
  return coefs;
}

void expect_same(const Model& got, const Model& expected) {
  for (std::size_t i = 0; i < expected.parameters.size(); ++i)
    ASSERT_TRUE(got.parameters[i] == expected.parameters[i]) << "parameter " << i;
}

// Launches a step over a copy of `start`, with scalars of the host or of the device.
Model stepped(const Model& start, Op op, DecayAt decay_at, const StepCoefficients& coefs, bool captured) {
  stand_in::TorchOnHost torch;
  Model model = start;
  double on_device[kStepCoefficients];
  store_coefficients(coefs, on_device);
  cuda::launch_step(model.plan(), op, decay_at, captured ? StepCoefficients{} : coefs,
                    captured ? on_device : nullptr, 0, torch);
  return model;
}

// The same on the CPU.
Model expected_step(const Model& start, Op op, DecayAt decay_at, const StepCoefficients& coefs) {
  Model model = start;
  const StepUpdate update(coefs, decay_at);
  on_cpu(model.plan(), [&](const TensorArgs& t, std::int64_t begin, std::int64_t n) {
    op == Op::kSgdStep ? cpu().sgd_step(t, begin, n, update) : cpu().adamw_step(t, begin, n, update);
  });
  return model;
}

constexpr DType k32 = DType::kFloat32, k64 = DType::kFloat64, kBf = DType::kBFloat16, kFp = DType::kFloat16;
constexpr DType k16 = DType::kInt16, k8 = DType::kInt8;

class Kernels : public testing::Test {
 protected:
  void SetUp() override {
    setenv("SCHEDULEFREE_CPP_CACHE", "/dev/null/nowhere", 1);  // keeps nothing
    stand_in::begin();
  }
};
class SgdKinds : public Kernels, public testing::WithParamInterface<Kinds> {};
class AdamwKinds : public Kernels, public testing::WithParamInterface<Kinds> {};
class SwapKinds : public Kernels, public testing::WithParamInterface<Kinds> {};
class BaseKinds : public Kernels, public testing::WithParamInterface<Kinds> {};
class SumKinds : public Kernels, public testing::WithParamInterface<Kinds> {};

void expect_steps_of_the_cpu(const Kinds& kinds, Op op) {
  const Model start = model_of(kinds, 1);
  StepCoefficients coefs = coefs_of(kinds);
  const Model expected = expected_step(start, op, DecayAt::kY, coefs);
  for (const bool captured : {false, true})
    expect_same(stepped(start, op, DecayAt::kY, coefs, captured), expected);
  coefs.stochastic = 1;  // to no effect where a parameter has not 24 bits
  coefs.weight_decay = 0;
  expect_same(stepped(start, op, DecayAt::kY, coefs, true), expected_step(start, op, DecayAt::kY, coefs));
  if (kinds.of_24_bits()) {
    Model dense = start;
    dense.parameters.erase(dense.parameters.end() - 3, dense.parameters.end());
    coefs.weight_decay = 0.1;
    expect_same(stepped(dense, op, DecayAt::kY, coefs, false), expected_step(dense, op, DecayAt::kY, coefs));
  }
}

TEST_P(SgdKinds, StepIsTheCpus) { expect_steps_of_the_cpu(GetParam(), Op::kSgdStep); }
INSTANTIATE_TEST_SUITE_P(All, SgdKinds,
                         testing::Values(Kinds{k32, k32}, Kinds{k64, k64}, Kinds{kBf, kBf}, Kinds{kFp, kFp},
                                         Kinds{kBf, kBf, k8}));

TEST_P(AdamwKinds, StepIsTheCpus) { expect_steps_of_the_cpu(GetParam(), Op::kAdamwStep); }
INSTANTIATE_TEST_SUITE_P(All, AdamwKinds,
                         testing::Values(Kinds{k32, k32}, Kinds{k32, kFp, k16, true},
                                         Kinds{k64, k64, k16, true}, Kinds{kBf, k32, k16, true},
                                         Kinds{kFp, kFp}, Kinds{k32, k32, k16, false, true},
                                         Kinds{kBf, kBf, k16, false, true}, Kinds{kBf, kBf, k8, false, true},
                                         Kinds{kBf, k32, k8, true, true}));

TEST_F(Kernels, DecayAtEitherPointAndNowhere) {
  Model start = model_of(Kinds{k32, k32}, 2);
  start.parameters.erase(start.parameters.end() - 3, start.parameters.end());  // those with gaps
  for (const DecayAt decay_at : {DecayAt::kY, DecayAt::kZ}) {
    for (const double weight_decay : {0.0, 0.2}) {
      StepCoefficients coefs = coefs_of({});
      coefs.weight_decay = weight_decay;
      const Model expected = expected_step(start, Op::kAdamwStep, decay_at, coefs);
      for (const bool captured : {false, true})
        expect_same(stepped(start, Op::kAdamwStep, decay_at, coefs, captured), expected);
    }
  }
}

TEST_F(Kernels, StepThatIsSkippedChangesNothing) {
  const Model start = model_of(Kinds{k32, k32}, 3);
  StepCoefficients coefs = coefs_of({});
  coefs.take = 0;
  for (const bool captured : {false, true})
    expect_same(stepped(start, Op::kAdamwStep, DecayAt::kY, coefs, captured), start);
}

TEST_P(SwapKinds, SwapIsTheCpus) {
  const Model start = model_of(GetParam(), 4);
  for (const SwapWeight& weight : {y_to_x_weight(0.9), x_to_y_weight(0.9), SwapWeight{0.75}}) {
    Model expected = start, got = start;
    on_cpu(expected.plan_of_y_and_z(),
           [&](const TensorArgs& t, std::int64_t begin, std::int64_t n) { cpu().swap(t, begin, n, weight); });
    stand_in::TorchOnHost torch;
    cuda::launch_swap(got.plan_of_y_and_z(), weight, torch);
    expect_same(got, expected);
  }
}
INSTANTIATE_TEST_SUITE_P(All, SwapKinds,
                         testing::Values(Kinds{k32, k32}, Kinds{k64, k64}, Kinds{kBf, kBf}, Kinds{kFp, kFp},
                                         Kinds{kBf, kBf, k8}));

// The operators around a base optimizer's step, by the CPU and by launches with scalars of the host and of
// the device.
TEST_P(BaseKinds, WhatSurroundsABaseStepIsTheCpus) {
  const Kinds kinds = GetParam();
  const Model start = model_of(kinds, 7);
  const SwapWeight to_x = y_to_x_weight(0.8);
  for (const bool exchange : {false, true}) {
    if (exchange ? kinds.low() : kinds.y == k64) continue;  // of float32 both forms are here
    for (const Op op : {Op::kBeforeBaseStep, Op::kAfterBaseStep}) {
      for (const double w : {0.0, 0.3, 1.0}) {
        StepCoefficients coefs = coefs_of(kinds);
        coefs.w = w;
        if (w == 1) coefs.weight_decay = 0;
        Model expected = start;
        const BaseStepUpdate update{StepUpdate(coefs, DecayAt::kY), to_x, exchange};
        on_cpu(expected.plan_of_y_and_z(), [&](const TensorArgs& t, std::int64_t begin, std::int64_t n) {
          op == Op::kBeforeBaseStep ? cpu().before_base_step(t, begin, n, update)
                                    : cpu().after_base_step(t, begin, n, update);
        });
        for (const bool captured : {false, true}) {
          for (const double take : {1.0, 0.0}) {
            coefs.take = take;
            double on_device[kStepCoefficients];
            store_coefficients(coefs, on_device);
            Model got = start;
            stand_in::TorchOnHost torch;
            cuda::launch_base_step(got.plan_of_y_and_z(), op, exchange, to_x,
                                   captured ? StepCoefficients{} : coefs, captured ? on_device : nullptr, 0,
                                   torch);
            expect_same(got, take == 0 ? start : expected);
          }
        }
      }
    }
  }
}
INSTANTIATE_TEST_SUITE_P(All, BaseKinds,
                         testing::Values(Kinds{k32, k32}, Kinds{k64, k64}, Kinds{kBf, kBf}, Kinds{kFp, kFp}));

void expect_close(double got, double expected, double scale) {
  if (std::isfinite(expected)) {
    EXPECT_NEAR(got, expected, 1e-12 * (std::fabs(expected) + scale));
  } else {
    EXPECT_EQ(std::isnan(got), std::isnan(expected));
  }
}

TEST_P(SumKinds, SumsAreTheCpus) {
  Model model = model_of(GetParam(), 5);
  // Tensor by tensor, since the sum over all is not finite.
  for (Parameters& parameter : model.parameters) {
    StepPlan plan;
    plan.tensors.push_back(parameter.args());
    TensorArgs& t = plan.tensors[0];
    t.exp_avg_sq = t.exp_avg = t.exp_avg_sq_scale = {};
    double absolute = 0, inner = 0;
    on_cpu(plan, [&](const TensorArgs& tensor, std::int64_t begin, std::int64_t n) {
      double sums[2];
      cpu().polyak_sums(tensor, begin, n, sums);
      absolute += sums[0];
      inner += sums[1];
    });
    stand_in::TorchOnHost torch;
    double got[2];
    cuda::launch_sums(plan, Op::kPolyakSums, got, torch);
    expect_close(got[0], absolute, 0);
    if (std::isfinite(inner)) expect_close(got[1], inner, absolute * 1e3);
  }
}
INSTANTIATE_TEST_SUITE_P(All, SumKinds,
                         testing::Values(Kinds{k32, kBf}, Kinds{k64, k64}, Kinds{kBf, k32, k8},
                                         Kinds{kFp, kFp}));

TEST_F(Kernels, NormIsTheCpus) {
  for (const DType dtype : {k32, k64, kBf, kFp}) {
    const int size = dtype == k64 ? 8 : dtype == k32 ? 4 : 2;
    std::vector<std::vector<unsigned char>> memory;
    StepPlan plan;
    double squares = 0;
    std::mt19937 random(6);
    for (const std::int64_t numel : {0, 1, 5, 8191, 8192, 8193, 30001}) {
      memory.emplace_back(static_cast<std::size_t>(numel * size));
      for (std::int64_t i = 0; i < numel; ++i) {
        const double x = std::normal_distribution<double>()(random);
        const auto single = static_cast<float>(x);
        const std::uint16_t half = dtype == kFp ? float_to_fp16(single) : float_to_bf16(single);
        unsigned char* const at = memory.back().data() + i * size;
        std::memcpy(at,
                    size == 8   ? static_cast<const void*>(&x)
                    : size == 4 ? static_cast<const void*>(&single)
                                : &half,
                    static_cast<std::size_t>(size));
      }
      TensorArgs t;
      t.numel = numel;
      t.device = 0;
      t.grad = {memory.back().data(), nullptr, dtype};
      plan.tensors.push_back(t);
    }
    on_cpu(plan, [&](const TensorArgs& t, std::int64_t begin, std::int64_t n) {
      squares += cpu().sum_squares(t, begin, n);
    });
    stand_in::TorchOnHost torch;
    double norm = 0;
    cuda::launch_sums(plan, Op::kGradNorm, &norm, torch);
    EXPECT_NEAR(norm, std::sqrt(squares), 1e-12 * norm);
    plan.tensors.resize(1);  // that without elements
    cuda::launch_sums(plan, Op::kGradNorm, &norm, torch);
    EXPECT_EQ(norm, 0);
  }
}

TEST_F(Kernels, ScheduleIsTheHosts) {
  for (int kind = 0; kind < kStepKinds; ++kind) {
    double coefs[kStepCoefficients] = {}, weight_sum = 0.3, lr_max = 0.01, scheduled_lr = 0, lr = 0.02,
           decay = 0.1;
    std::int64_t k = 12;
    ScheduleArgs args;
    args.coefs = coefs;
    args.k = &k;
    args.weight_sum = &weight_sum;
    args.lr_max = &lr_max;
    args.scheduled_lr = &scheduled_lr;
    args.lr = {&lr, true, false};
    args.weight_decay = {&decay, true, true};
    args.rule.kind = static_cast<StepKind>(kind);
    args.rule.adam = {0.99, 1e-8, 0, true};
    const ScheduleStep expected = schedule_step(args.state(), 0, args.rule, args.inputs());
    stand_in::TorchOnHost torch;
    cuda::launch_schedule(args, 0, torch);
    EXPECT_EQ(k, 13);
    EXPECT_EQ(weight_sum, expected.next.weight_sum);
    EXPECT_EQ(scheduled_lr, expected.scheduled_lr);
    double wanted[kStepCoefficients];
    store_coefficients(expected.coefs, wanted);
    for (std::int64_t i = 0; i < kStepCoefficients; ++i)
      EXPECT_EQ(coefs[i], wanted[i]) << kCoefficientNames[i];
  }
}

}  // namespace
}  // namespace schedulefree
