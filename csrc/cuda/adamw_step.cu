#include "checks.h"
#include "cuda/launch.cuh"
#include "cuda/ops_cuda.h"

namespace schedulefree {

void adamw_step_cuda(StableIValue* stack, std::uint64_t, std::uint64_t) {
  const StepCall call = check_adamw_step(stack, Backend::kCuda);
  const bool has_inner = !call.lists.exp_avg.empty();
  for_each_step_batch(call, [&](const Batch& batch, const StepSource& source, cudaStream_t stream) {
    with_parameter_and_gradient(batch, [&](auto y, auto grad) {
      using Y = decltype(y);
      using Grad = decltype(grad);
      if (has_inner) {
        launch_step<AdamwStep<Y, Grad, true>>(call.plan, batch, source, stream);
      } else {
        launch_step<AdamwStep<Y, Grad, false>>(call.plan, batch, source, stream);
      }
    });
  });
}

}  // namespace schedulefree
