// The CUDA kernels' tables, and every thread of the kernels themselves, run on the host: what a thread does
// is compiled for host and device alike. The results must be those of the CPU kernels, bit for bit.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "cpu/isa_dispatch.h"
#include "cuda/step_kernel.h"
#include "cuda/tables.h"

namespace schedulefree {
namespace {

// ---- tables ----------------------------------------------------------------------------------------

using SmallTable = TensorTable<2, 8>;

void* fake(std::uintptr_t address) { return reinterpret_cast<void*>(address); }

struct Span {
  std::uintptr_t begin;
  std::int64_t elements;
};

// What the pieces of one stream cover, in order, with neighbours joined.
template <typename Table>
std::vector<Span> covered(const Table& table, int stream, const int (&element_sizes)[2]) {
  std::vector<Span> spans;
  for (std::uint32_t chunk = 0; chunk < table.chunks; ++chunk) {
    const auto piece = table.piece(chunk, element_sizes);
    const auto size = static_cast<std::uintptr_t>(element_sizes[stream]);
    const auto begin = reinterpret_cast<std::uintptr_t>(piece.data[stream]);
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
      SmallTable table;
      table.clear(chunk);
      std::vector<Span> expected;
      std::uintptr_t address = 1 << 20;
      for (const std::int64_t numel : numels) {
        if (expected.size() == 8) {  // the table's capacity
          void* const pointers[2] = {fake(address), fake(address)};
          EXPECT_FALSE(table.append(pointers, kSizes, numel));
          break;
        }
        void* const none[2] = {fake(address), fake(address)};
        EXPECT_TRUE(table.append(none, kSizes, 0));  // takes no place
        const std::uintptr_t begin = address + 4 * offset;
        void* const pointers[2] = {fake(begin), fake(begin * 2)};
        ASSERT_TRUE(table.append(pointers, kSizes, numel));
        expected.push_back({begin, numel});
        address += static_cast<std::uintptr_t>(4 * numel + 4096) / 16 * 16;
      }
      const std::vector<Span> first = covered(table, 0, kSizes), second = covered(table, 1, kSizes);
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
  SmallTable table;
  table.clear(16384);
  void* const small[2] = {fake(1 << 20), fake(1 << 21)};
  void* const large[2] = {fake(std::uintptr_t{1} << 40), fake(std::uintptr_t{1} << 41)};
  ASSERT_TRUE(table.append(small, kSizes, 3));
  ASSERT_TRUE(table.append(large, kSizes, huge));
  ASSERT_TRUE(table.append(small, kSizes, 16385));
  EXPECT_EQ(table.chunks, 1u + (huge / 16384 + 1) + 2u);
  const std::uint32_t last_of_huge = table.chunks - 3;
  const auto piece = table.piece(last_of_huge, kSizes);
  EXPECT_EQ(table.tensor_of(last_of_huge), 1u);
  EXPECT_EQ(piece.size, 5);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(piece.data[0]),
            (std::uintptr_t{1} << 40) + 2 * static_cast<std::uintptr_t>(huge - 5));
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(piece.data[1]),
            (std::uintptr_t{1} << 41) + 4 * static_cast<std::uintptr_t>(huge - 5));
  EXPECT_EQ(table.tensor_of(last_of_huge + 1), 2u);
  EXPECT_EQ(table.tensor_of(0), 0u);
}

TEST(Table, RefusesMoreChunksThanALaunchHas) {
  constexpr int kSizes[2] = {2, 2};
  SmallTable table;
  table.clear(2048);
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
  static TensorTable<1, 3000> table;
  constexpr int kSizes[1] = {4};
  table.clear(2048);
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
  SmallTable table;
  table.clear(2048);
  const auto aligned = [&](std::uintptr_t first, std::uintptr_t second) {
    void* const pointers[2] = {fake(4096 + 4 * first), fake(4096 + 2 * second)};
    EXPECT_TRUE(table.append(pointers, kSizes, 100));
    const auto piece = table.piece(table.chunks - 1, kSizes);
    return std::string(piece.aligned(0) ? "y" : "n") + (piece.aligned(1) ? "y" : "n");
  };
  EXPECT_EQ(aligned(0, 0), "yy");
  EXPECT_EQ(aligned(4, 4), "yy");
  EXPECT_EQ(aligned(1, 1), "nn");
  EXPECT_EQ(aligned(0, 1), "yn");
  EXPECT_EQ(aligned(2, 4), "ny");
}

TEST(Table, LeavesAStreamOfTheWholeTensorUncut) {
  constexpr int kSizes[2] = {4, kWholeTensor};
  SmallTable table;
  table.clear(1024);
  void* const pointers[2] = {fake(4096), fake(4100)};
  ASSERT_TRUE(table.append(pointers, kSizes, 3000));
  const auto piece = table.piece(2, kSizes);
  EXPECT_EQ(piece.begin, 2048);
  EXPECT_EQ(piece.size, 952);
  EXPECT_EQ(piece.whole(1), fake(4100));
}

TEST(Table, FillsTheArgumentsButNoMore) {
  using Op = AdamwStep<Float32, Float32, WholeMoment<float>, false>;
  for (const bool large : {true, false}) {
    const std::size_t limit = large ? kLargeArguments : kSmallArguments;
    const std::size_t size =
        large ? sizeof(TableOf<Op, kLargeArguments>) : sizeof(TableOf<Op, kSmallArguments>);
    EXPECT_LE(size + kScalarArguments, limit);
    EXPECT_GT(size + kScalarArguments + 128, limit);
  }
  EXPECT_LE(sizeof(StridedTensor<kMaxStreams>) + kScalarArguments, kSmallArguments);
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
  for (const Batch& batch : batches_of(plan)) {
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
  EXPECT_THROW(batches_of(plan), std::runtime_error);
}

// ---- kernels ---------------------------------------------------------------------------------------

struct alignas(64) Line {
  char bytes[64];
};

// A tensor's streams in memory of their own.
struct Memory {
  std::vector<Line> lines;
  int element_size = 4;
  std::int64_t offset = 0;  // of the first element

  char* begin() { return reinterpret_cast<char*>(lines.data()) + offset * element_size; }
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
      const std::int64_t elements = 3 * layout.numel + memory.offset + 64;
      memory.lines.resize(static_cast<std::size_t>(elements * memory.element_size / 64 + 2));
      fill(memory, dtype(s), s == kV || s == kScale, random);
      if (s == kScale) {
        auto* const scales = reinterpret_cast<float*>(memory.lines.data());
        for (std::size_t i = 0; i < memory.lines.size() * 64 / sizeof(float); ++i)
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

  // Every byte, also those around the elements; but all NaNs are one.
  bool operator==(const Parameters& other) const {
    for (int s = 0; s < kStreams; ++s) {
      const auto& l = streams_[s].lines;
      const auto& r = other.streams_[s].lines;
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
  static bool same_numbers(const std::vector<Line>& l, const std::vector<Line>& r) {
    for (std::size_t at = 0; at < l.size() * sizeof(Line); at += sizeof(T)) {
      T a, b;
      std::memcpy(&a, reinterpret_cast<const char*>(l.data()) + at, sizeof(a));
      std::memcpy(&b, reinterpret_cast<const char*>(r.data()) + at, sizeof(b));
      if (std::memcmp(&a, &b, sizeof(a)) != 0 && !(is_nan(a) && is_nan(b))) return false;
    }
    return true;
  }

  static void fill(Memory& memory, DType dtype, bool positive, std::mt19937& random) {
    std::normal_distribution<double> normal;
    const double special[] = {0.0, -0.0, 1e-40, -1e-44, 1e38, INFINITY, -INFINITY, NAN, 6e4, 1e-7};
    char* const bytes = reinterpret_cast<char*>(memory.lines.data());
    const auto elements = static_cast<std::int64_t>(memory.lines.size()) * 64 / memory.element_size;
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
};

const std::vector<Kinds>& all_kinds() {
  constexpr DType k32 = DType::kFloat32, k64 = DType::kFloat64, kBf = DType::kBFloat16, kFp = DType::kFloat16;
  constexpr DType k16 = DType::kInt16, k8 = DType::kInt8;
  static const std::vector<Kinds> kinds = {
      {k32, k32},
      {k32, kBf},
      {k32, kFp, k16, true},
      {k64, k64},
      {k64, k64, k16, true},
      {kBf, kBf},
      {kBf, k32, k16, true},
      {kBf, kFp, k16, true},
      {kFp, kFp},
      {kFp, k32, k16, true},
      {k32, k32, k16, true},
      {kBf, kBf, k8},
      {kBf, k32, k8, true},
      {k32, k32, k16, false, true},
      {k32, kBf, k16, true, true},
      {kBf, kBf, k16, false, true},
      {kFp, kFp, k16, false, true},
      {kBf, kBf, k8, false, true},
      {kBf, k32, k8, true, true},
  };
  return kinds;
}

Model model_of(const Kinds& kinds, unsigned seed) {
  std::mt19937 random(seed);
  Model model;
  for (const std::int64_t numel : {0, 1, 2, 3, 4, 5, 7, 1023, 1024, 1025, 2047, 2048, 2049, 5000})
    model.parameters.emplace_back(kinds, Layout{numel}, random);
  for (const std::int64_t offset : {1, 2, 3}) {
    const std::vector<std::int64_t> same(8, offset);
    for (const std::int64_t numel : {1, 2, 3, 4, 2051}) {
      model.parameters.emplace_back(kinds, Layout{numel, same}, random);
      model.parameters.emplace_back(kinds, Layout{numel, {offset, 1, 0, 2, 3, 1, 0, offset}}, random);
      model.parameters.emplace_back(kinds, Layout{numel, {0, 0, offset, 0, 0, 0, 0, 0}}, random);
    }
  }
  for (const std::int64_t numel : {2, 10, 3000}) {
    Layout layout{numel};
    layout.gaps = true;
    model.parameters.emplace_back(kinds, layout, random);
  }
  return model;
}

template <typename Kernel>
void on_cpu(const StepPlan& plan, const Kernel& kernel) {
  for (const TensorArgs& t : plan.tensors) {
    for (std::int64_t begin = 0; begin < t.numel; begin += kBlock)
      kernel(t, begin, std::min(kBlock, t.numel - begin));
  }
}

// Calls `run(table, chunk)` for every block of the launches that a plan of one kind takes.
template <typename Op, std::size_t arguments, typename Run>
void for_each_block(const StepPlan& plan, std::int64_t chunk_size, const Run& run) {
  for (const Batch& batch : batches_of(plan)) {
    const auto visit = [&](const auto& table) {
      for (std::uint32_t chunk = 0; chunk < table.chunks; ++chunk) run(table, chunk);
    };
    if (batch.dense) {
      visit_dense<Op, arguments>(plan, batch, chunk_size, visit);
    } else {
      visit_strided<Op>(plan, batch, chunk_size, visit);
    }
  }
}

template <typename Op, typename Table>
typename Table::Piece piece_of(const Table& table, std::uint32_t chunk) {
  int element_sizes[Op::kStreams];
  Op::element_sizes(element_sizes);
  return table.piece(chunk, element_sizes);
}

// Runs the threads of a warp up to where they need each other, then to the end.
template <typename Op, std::size_t arguments = kSmallArguments>
void update(const StepPlan& plan, const typename Op::Args& args) {
  constexpr int kWarp = 32;
  for_each_block<Op, arguments>(plan, kUpdateChunk, [&](const auto& table, std::uint32_t chunk) {
    const auto piece = piece_of<Op>(table, chunk);
    for (int warp = 0; warp < kThreads; warp += kWarp) {
      Share<Op, kVector> shares[kWarp];
      std::uint32_t largest = 0;
      for (int lane = 0; lane < kWarp; ++lane) {
        shares[lane].load(piece, warp + lane);
        largest = larger(largest, shares[lane].update(piece, args));
      }
      for (Share<Op, kVector>& share : shares) share.store(piece, largest, args);
    }
  });
}

template <typename Call>
void with_storage(const Kinds& kinds, const Call& call) {
  const auto with_gradient = [&](auto y) {
    if constexpr (sizeof(typename decltype(y)::Real) == 8) {
      call(y, Float64{});
    } else if (kinds.grad == DType::kFloat32) {
      call(y, Float32{});
    } else {
      call(y, Half{});
    }
  };
  if (kinds.y == DType::kFloat32) {
    with_gradient(Float32{});
  } else if (kinds.y == DType::kFloat64) {
    with_gradient(Float64{});
  } else if (kinds.y == DType::kFloat16) {
    with_gradient(SplitFp16{});
  } else if (kinds.of_24_bits()) {
    with_gradient(Split24{});
  } else {
    with_gradient(SplitBf16{});
  }
}

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

constexpr DecayAt kDecayAt[] = {DecayAt::kNowhere, DecayAt::kY, DecayAt::kZ};

class EveryKind : public testing::TestWithParam<std::size_t> {
 protected:
  const Kinds& kinds() const { return all_kinds()[GetParam()]; }
  bool grad_fp16() const { return kinds().grad == DType::kFloat16; }

  // The scalars of a step as a kernel has them: read by the host, or by the kernel from `device_coefs`.
  template <typename Args>
  Args resolved(const StepCoefficients& coefs, DecayAt decay_at, const double* device_coefs) const {
    StepSource source;
    if (device_coefs == nullptr) source.coefs = coefs;
    source.device_coefs = device_coefs;
    source.decay_at = decay_at;
    source.grad_fp16 = grad_fp16();
    Args args;
    EXPECT_TRUE(resolve(source, args));
    return args;
  }

  void expect_same(const Model& got, const Model& expected) const {
    for (std::size_t i = 0; i < expected.parameters.size(); ++i)
      ASSERT_TRUE(got.parameters[i] == expected.parameters[i]) << "parameter " << i;
  }
};

TEST_P(EveryKind, SgdStepEqualsTheCpu) {
  const StepCoefficients coefs = coefs_of(kinds());
  const double* const on_device = reinterpret_cast<const double*>(&coefs);
  for (const DecayAt decay_at : kDecayAt) {
    const Model start = model_of(kinds(), 1);
    Model expected = start;
    on_cpu(expected.plan(), [&](const TensorArgs& t, std::int64_t begin, std::int64_t n) {
      baseline::kernel_table().sgd_step(t, begin, n, step_scalars(coefs, decay_at));
    });
    for (const double* const device_coefs : {static_cast<const double*>(nullptr), on_device}) {
      Model got = start;
      with_storage(kinds(), [&](auto y, auto grad) {
        using Op = SgdStep<decltype(y), decltype(grad)>;
        update<Op>(got.plan(), resolved<typename Op::Args>(coefs, decay_at, device_coefs));
      });
      expect_same(got, expected);
    }
  }
}

TEST_P(EveryKind, AdamwStepEqualsTheCpu) {
  StepCoefficients coefs = coefs_of(kinds());
  const double* const on_device = reinterpret_cast<const double*>(&coefs);
  for (const DecayAt decay_at : kDecayAt) {
    coefs.stochastic = decay_at == DecayAt::kZ ? 1 : 0;
    const Model start = model_of(kinds(), 2);
    Model expected = start;
    on_cpu(expected.plan(), [&](const TensorArgs& t, std::int64_t begin, std::int64_t n) {
      baseline::kernel_table().adamw_step(t, begin, n, step_scalars(coefs, decay_at), adam_scalars(coefs));
    });
    const auto run = [&](auto moment, auto y, auto grad, auto inner) {
      using Op = AdamwStep<decltype(y), decltype(grad), decltype(moment), decltype(inner)::value>;
      Model from_host = start, from_device = start;
      update<Op>(from_host.plan(), resolved<typename Op::Args>(coefs, decay_at, nullptr));
      update<Op, kLargeArguments>(from_device.plan(),
                                  resolved<typename Op::Args>(coefs, decay_at, on_device));
      expect_same(from_host, expected);
      expect_same(from_device, expected);
    };
    with_storage(kinds(), [&](auto y, auto grad) {
      using Real = typename decltype(y)::Real;
      const auto with_inner = [&](auto moment) {
        kinds().inner ? run(moment, y, grad, std::true_type{}) : run(moment, y, grad, std::false_type{});
      };
      if constexpr (sizeof(Real) == 4) {
        if (kinds().moment8) return with_inner(Moment8{});
      }
      with_inner(WholeMoment<Real>{});
    });
  }
}

TEST_P(EveryKind, SwapEqualsTheCpu) {
  for (const SwapScalars swap : {SwapScalars{0.1, 1e-18}, {0.75}, {-0.1 / 0.9, -3e-18}}) {
    Model expected = model_of(kinds(), 3), got = expected;
    on_cpu(expected.plan(), [&](const TensorArgs& t, std::int64_t begin, std::int64_t n) {
      baseline::kernel_table().swap(t, begin, n, swap);
    });
    with_storage(kinds(), [&](auto y, auto) {
      using Op = Swap<decltype(y)>;
      update<Op>(got.plan(), swap);
    });
    expect_same(got, expected);
  }
}

// The sums of all blocks, as one.
template <typename Op, typename Args>
typename Op::Total sum(const StepPlan& plan, const Args& args) {
  typename Op::Total total = {};
  for_each_block<Op, kSmallArguments>(plan, 2048, [&](const auto& table, std::uint32_t chunk) {
    for (std::int32_t thread = 0; thread < kThreads; ++thread)
      total.add(sum_piece<Op>(args, piece_of<Op>(table, chunk), thread));
  });
  return total;
}

void expect_close(double got, double expected) {
  if (std::isfinite(expected)) {
    EXPECT_NEAR(got, expected, 1e-12 * std::fabs(expected));
  } else {
    EXPECT_EQ(std::isnan(got), std::isnan(expected));
  }
}

TEST_P(EveryKind, SumsAreTheCpus) {
  Model model = model_of(kinds(), 5);
  const StepPlan plan = model.plan();
  const SumArgs args{grad_fp16()};
  with_storage(kinds(), [&](auto y, auto grad) {
    // Tensor by tensor, since the sum over all is not finite.
    for (const TensorArgs& t : plan.tensors) {
      StepPlan one;
      one.tensors.push_back(t);
      double squares = 0, absolute = 0, inner = 0;
      on_cpu(one, [&](const TensorArgs& tensor, std::int64_t begin, std::int64_t n) {
        double sums[2];
        squares += baseline::kernel_table().sum_squares(tensor, begin, n);
        baseline::kernel_table().polyak_sums(tensor, begin, n, sums);
        absolute += sums[0];
        inner += sums[1];
      });
      expect_close(sum<SumOfSquares<decltype(grad)>>(one, args).at[0], squares);
      const auto polyak = sum<PolyakSums<decltype(y), decltype(grad)>>(one, args);
      expect_close(polyak.at[0], absolute);
      if (std::isfinite(inner)) {
        EXPECT_NEAR(polyak.at[1], inner, 1e-12 * (1 + absolute * 1e3)) << t.numel;
      }
    }
  });
}

INSTANTIATE_TEST_SUITE_P(Kinds, EveryKind, testing::Range<std::size_t>(0, all_kinds().size()));

TEST(Source, CoefficientsOnTheDeviceTakeTheirPlace) {
  StepCoefficients coefs = coefs_of({});
  StepSource source;
  source.decay_at = DecayAt::kZ;
  source.device_coefs = reinterpret_cast<const double*>(&coefs);
  StepArgs<double> args;
  ASSERT_TRUE(resolve(source, args));
  EXPECT_EQ(args.step.minus_lr, -0.01);
  EXPECT_EQ(args.step.w.from_p, 0.3);
  EXPECT_EQ(args.step.grad_mul, 0.7);
  EXPECT_EQ(args.step.settle.to_y.weight, 1 - 0.9);
  EXPECT_EQ(args.adam.denom_scale, 1.3);
  EXPECT_EQ(args.decay_at, DecayAt::kZ);
  coefs.weight_decay = 0;
  ASSERT_TRUE(resolve(source, args));
  EXPECT_EQ(args.decay_at, DecayAt::kNowhere);
  coefs.take = 0;
  EXPECT_FALSE(resolve(source, args));
}

}  // namespace
}  // namespace schedulefree
