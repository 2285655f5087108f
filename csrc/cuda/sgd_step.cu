#include "checks.h"
#include "cuda/launch.cuh"
#include "cuda/ops_cuda.h"

namespace schedulefree {

void sgd_step_cuda(StableIValue* stack, std::uint64_t, std::uint64_t) {
  const StepCall call = check_sgd_step(stack, Backend::kCuda);
  for_each_step_batch(call, [&](const Batch& batch, const StepSource& source, cudaStream_t stream) {
    with_parameter_and_gradient(batch, [&](auto y, auto grad) {
      launch_step<SgdStep<decltype(y), decltype(grad)>>(call.plan, batch, source, stream);
    });
  });
}

}  // namespace schedulefree
