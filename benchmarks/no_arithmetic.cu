// The ceiling for the CUDA steps: kernels that move the same memory and compute nothing worth naming.
//
// Contract, for every function here: each stream holds n elements of 32 bits, aligned to 16 bytes, and
// streams do not overlap. The work is put on `stream` of the current device, and the function returns the
// cudaError_t of the launch. The contents are taken as bits, and calling a function a second time gives
// them back: any number of calls costs the same, with no NaN and no subnormal among them.
#include <cuda_runtime.h>

#include <cstdint>

namespace schedulefree {
namespace {

using std::int64_t;
using std::uint32_t;

constexpr int kThreads = 256;
constexpr int kBlocksPerProcessor = 4;

__device__ __forceinline__ void mix(uint4& into, const uint4& g) {
  into.x ^= g.x;
  into.y ^= g.y;
  into.z ^= g.z;
  into.w ^= g.w;
}

__device__ __forceinline__ void mix(uint32_t& into, const uint32_t& g) { into ^= g; }

// Stream 0 is only read; the others are read and written.
template <typename T, int kStreams>
struct Streams {
  T* at[kStreams];
};

// All loads stand before all stores: the compiler must assume that these may reach what others read.
template <int kPlaces, typename T, int kStreams>
__device__ __forceinline__ void mix_at(const Streams<T, kStreams>& streams, int64_t i, int64_t stride) {
  T values[kPlaces][kStreams];
#pragma unroll
  for (int place = 0; place < kPlaces; ++place)
#pragma unroll
    for (int k = 0; k < kStreams; ++k) values[place][k] = streams.at[k][i + place * stride];
#pragma unroll
  for (int place = 0; place < kPlaces; ++place)
#pragma unroll
    for (int k = 1; k < kStreams; ++k) {
      mix(values[place][k], values[place][0]);
      streams.at[k][i + place * stride] = values[place][k];
    }
}

template <int kStreams>
__global__ void __launch_bounds__(kThreads) ceiling_kernel(Streams<uint32_t, kStreams> streams, int64_t n) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t vectors = n / 4;
  Streams<uint4, kStreams> wide;
#pragma unroll
  for (int k = 0; k < kStreams; ++k) wide.at[k] = reinterpret_cast<uint4*>(streams.at[k]);
  int64_t i = first;
  for (; i + stride < vectors; i += 2 * stride) mix_at<2>(wide, i, stride);
  if (i < vectors) mix_at<1>(wide, i, stride);
  if (4 * vectors + first < n) mix_at<1>(streams, 4 * vectors + first, stride);
}

template <int kStreams>
int launch(int64_t n, const Streams<uint32_t, kStreams>& streams, void* stream) {
  if (n == 0) return cudaSuccess;
  int device = 0;
  int processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  const int64_t needed = (n / 4 + kThreads) / kThreads;
  const int64_t resident = static_cast<int64_t>(processors) * kBlocksPerProcessor;
  const auto blocks = static_cast<unsigned>(needed < resident ? needed : resident);
  ceiling_kernel<kStreams><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(streams, n);
  return cudaGetLastError();
}

}  // namespace
}  // namespace schedulefree

#define EXPORT extern "C" __attribute__((visibility("default")))

// 4 reads, 3 writes.
EXPORT int schedulefree_ceiling_adamw_cuda(std::int64_t n, std::uint32_t* y, std::uint32_t* grad,
                                           std::uint32_t* z, std::uint32_t* v, void* stream) {
  return schedulefree::launch<4>(n, {{grad, y, z, v}}, stream);
}

// 3 reads, 2 writes.
EXPORT int schedulefree_ceiling_sgd_cuda(std::int64_t n, std::uint32_t* y, std::uint32_t* grad,
                                         std::uint32_t* z, void* stream) {
  return schedulefree::launch<3>(n, {{grad, y, z}}, stream);
}

// 2 reads, 1 write.
EXPORT int schedulefree_ceiling_swap_cuda(std::int64_t n, std::uint32_t* y, std::uint32_t* z, void* stream) {
  return schedulefree::launch<2>(n, {{z, y}}, stream);
}
