#include "checks.h"
#include "cuda/launch.cuh"
#include "cuda/ops_cuda.h"

namespace schedulefree {

namespace {

template <typename V, typename Y, typename Grad>
void launch(const StepCall& call, const Batch& batch, const StepSource& source, cudaStream_t stream) {
  if (call.lists.exp_avg.empty()) {
    launch_step<AdamwStep<Y, Grad, V, false>>(call.plan, batch, source, stream);
  } else {
    launch_step<AdamwStep<Y, Grad, V, true>>(call.plan, batch, source, stream);
  }
}

}  // namespace

void adamw_step_cuda(StableIValue* stack, std::uint64_t, std::uint64_t) {
  const StepCall call = check_adamw_step(stack, Backend::kCuda);
  for_each_step_batch(call, [&](const Batch& batch, const StepSource& source, cudaStream_t stream) {
    with_parameter_and_gradient(batch, [&](auto y, auto grad) {
      using Y = decltype(y);
      using Grad = decltype(grad);
      if constexpr (sizeof(typename Y::Real) == 4) {
        if (batch.moment8) return launch<Moment8, Y, Grad>(call, batch, source, stream);
      }
      launch<WholeMoment<typename Y::Real>, Y, Grad>(call, batch, source, stream);
    });
  });
}

}  // namespace schedulefree
