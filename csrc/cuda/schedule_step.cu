#include <cuda_runtime.h>

#include "checks.h"
#include "cuda/ops_cuda.h"
#include "cuda/stream.h"
#include "schedule.h"

namespace schedulefree {
namespace {

// A number that is read on the device, or was read on the host.
struct Number {
  ScalarInput on_device;  // absent where `value` counts
  double value;

  Number(const ScalarInput& input, double absent)
      : on_device(input.on_cpu ? ScalarInput{} : input),
        value(input.on_cpu ? value_or(input, absent) : absent) {}

  __device__ double read() const { return value_or(on_device, value); }
};

struct Inputs {
  Number lr, weight_decay, grad_norm, grad_scale, found_inf;
};

__global__ void schedule_step_kernel(const __grid_constant__ ScheduleArgs args,
                                     const __grid_constant__ Inputs inputs) {
  const StepInputs now = {inputs.lr.read(), inputs.weight_decay.read(), inputs.grad_norm.read(),
                          inputs.grad_scale.read(), inputs.found_inf.read()};
  const ScheduleStep step = detail::schedule_step_unchecked({*args.k, *args.weight_sum, *args.lr_max},
                                                            *args.scheduled_lr, args.rule, now);
  memcpy(args.coefs, &step.coefs, sizeof(step.coefs));
  *args.k = step.next.k;
  *args.weight_sum = step.next.weight_sum;
  *args.lr_max = step.next.lr_max;
  *args.scheduled_lr = step.scheduled_lr;
}

}  // namespace

void schedule_step_cuda(StableIValue* stack, std::uint64_t, std::uint64_t) {
  const ScheduleCall call = check_schedule_step(stack, Backend::kCuda);
  const ScheduleArgs& args = call.args;
  const OnDevice device(call.tensors.front().get_device_index());
  const Inputs inputs = {Number(args.lr, 0), Number(args.weight_decay, 0), Number(args.grad_norm, 0),
                         Number(args.grad_scale, 1), Number(args.found_inf, 0)};
  schedule_step_kernel<<<1, 1, 0, device.stream()>>>(args, inputs);
  check_cuda(cudaGetLastError());
}

}  // namespace schedulefree
