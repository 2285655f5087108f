// The CUDA operators: checked call -> launches on torch's streams.
#include <dlfcn.h>
#include <torch/csrc/stable/library.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "build_info.h"
#include "checks.h"
#include "cuda/launch.h"
#include "stable_compat.h"

namespace schedulefree::cuda {
namespace {

using StreamOf = AOTITorchError (*)(std::int32_t device, void** stream);

// Null where the torch of this process has no CUDA: only such a torch has the function.
StreamOf stream_function() {
  void* const torch = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
  return torch == nullptr ? nullptr
                          : reinterpret_cast<StreamOf>(dlsym(torch, "aoti_torch_get_current_cuda_stream"));
}

class LiveTorch : public Torch {
 public:
  Handle stream(int device) override {
    static const StreamOf stream_of = stream_function();
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(stream_of(device, &stream));
    return stream;
  }
  void* allocate(int device, std::size_t bytes) override {
    memory_.push_back(new_bytes_on(device, bytes));
    return memory_.back().data_ptr();
  }

 private:
  static torch::stable::Tensor new_bytes_on(int device, std::size_t bytes) {
    return torch::stable::empty(
        {static_cast<std::int64_t>(bytes)}, ScalarType::Byte, std::nullopt,
        torch::stable::Device(DeviceType::CUDA, static_cast<torch::stable::DeviceIndex>(device)));
  }

  std::vector<torch::stable::Tensor> memory_;
};

// The device of the scalars that only a kernel can read; -1 where the host has read them.
int home_of(const StepCall& call) {
  return call.device_coefs != nullptr ? call.coefs_tensor.get_device_index() : -1;
}

template <Op op, auto check>
void step_cuda(StableIValue* stack, std::uint64_t, std::uint64_t) {
  const StepCall call = check(stack, Backend::kCuda);
  LiveTorch torch;
  launch_step(call.plan, op, call.decay_at, call.coefs, call.device_coefs, home_of(call), torch);
}

template <Op op, auto check>
void base_step_cuda(StableIValue* stack, std::uint64_t, std::uint64_t) {
  const BaseStepCall call = check(stack, Backend::kCuda);
  LiveTorch torch;
  launch_base_step(call.plan, op, call.exchange, call.to_x, call.coefs, call.device_coefs, home_of(call),
                   torch);
}

template <auto check>
void swap_cuda(StableIValue* stack, std::uint64_t, std::uint64_t) {
  const SwapCall call = check(stack, Backend::kCuda);
  LiveTorch torch;
  launch_swap(call.plan, call.swap, torch);
}

void schedule_step_cuda(StableIValue* stack, std::uint64_t, std::uint64_t) {
  const ScheduleCall call = check_schedule_step(stack, Backend::kCuda);
  LiveTorch torch;
  launch_schedule(call.args, call.tensors.front().get_device_index(), torch);
}

template <Op op, auto check>
void sums_cuda(StableIValue* stack, std::uint64_t, std::uint64_t) {
  const ReductionCall call = check(stack, Backend::kCuda);
  const auto device = static_cast<torch::stable::DeviceIndex>(call.plan.tensors.front().device);
  const torch::stable::Device home(DeviceType::CUDA, device);
  const torch::stable::Tensor result = op == Op::kPolyakSums
                                           ? torch::stable::empty({2}, ScalarType::Double, std::nullopt, home)
                                           : torch::stable::empty({}, ScalarType::Double, std::nullopt, home);
  LiveTorch torch;
  launch_sums(call.plan, op, static_cast<double*>(result.data_ptr()), torch);
  stack[0] = torch::stable::detail::from(result);
}

void register_operators(torch::stable::detail::StableLibrary& m) {
  m.impl("sgd_step_", &step_cuda<Op::kSgdStep, check_sgd_step>);
  m.impl("adamw_step_", &step_cuda<Op::kAdamwStep, check_adamw_step>);
  m.impl("schedule_step_", &schedule_step_cuda);
  m.impl("y_to_x_", &swap_cuda<check_y_to_x>);
  m.impl("x_to_y_", &swap_cuda<check_x_to_y>);
  m.impl("before_base_step_", &base_step_cuda<Op::kBeforeBaseStep, check_before_base_step>);
  m.impl("after_base_step_", &base_step_cuda<Op::kAfterBaseStep, check_after_base_step>);
  m.impl("polyak_sums", &sums_cuda<Op::kPolyakSums, check_polyak_sums>);
  m.impl("grad_norm", &sums_cuda<Op::kGradNorm, check_grad_norm>);
}

// Empty where the operators are registered, else why they are not.
std::string register_once() {
  using torch::stable::detail::StableLibrary;
  if (stream_function() == nullptr) return "this torch was built without CUDA";
  try {
    nvrtc();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  static const torch::stable::detail::StableTorchLibraryInit registered(
      StableLibrary::Kind::IMPL, &register_operators, "schedulefree_cpp", "CUDA", __FILE__, __LINE__);
  return "";
}

}  // namespace
}  // namespace schedulefree::cuda

extern "C" const char* schedulefree_cpp_load_cuda() {
  static const std::string reason = schedulefree::cuda::register_once();
  return reason.empty() ? nullptr : reason.c_str();
}
