// Torch's devices, streams and errors, as CUDA code needs them.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include <cstdint>

namespace schedulefree {

// Throws std::runtime_error, in torch's words, for what the CUDA runtime returned.
inline void check_cuda(cudaError_t error) { STD_CUDA_CHECK(error); }

// A device that work goes to, on the stream that is torch's current one there. While it lives, the device is
// the current one.
class OnDevice {
 public:
  explicit OnDevice(std::int32_t device) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_create_cuda_guard(device, &guard_));
    try {
      // This library's runtime is not the one that torch's guard has told.
      check_cuda(cudaSetDevice(device));
      void* stream = nullptr;
      TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
      stream_ = static_cast<cudaStream_t>(stream);
    } catch (...) {
      aoti_torch_delete_cuda_guard(guard_);
      throw;
    }
  }
  ~OnDevice() { aoti_torch_delete_cuda_guard(guard_); }

  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  cudaStream_t stream() const { return stream_; }

  // Waits for all work of the stream. Not allowed while it is captured.
  void synchronize() const { check_cuda(cudaStreamSynchronize(stream_)); }

 private:
  CUDAGuardHandle guard_ = nullptr;
  cudaStream_t stream_ = nullptr;
};

}  // namespace schedulefree
