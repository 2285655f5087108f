#include "checks.h"
#include "cuda/launch.cuh"
#include "cuda/ops_cuda.h"

namespace schedulefree {
namespace {

void take_step(const SgdCall& call) {
  for_each_step_batch(call, AdamScalars{},
                      [&](const Batch& batch, const StepSource& source, cudaStream_t stream) {
                        with_parameter_and_gradient(batch, [&](auto y, auto grad) {
                          launch_step<SgdStep<decltype(y), decltype(grad)>>(call.plan, batch, source, stream);
                        });
                      });
}

}  // namespace

void sgd_step_cuda(StableIValue* stack, std::uint64_t, std::uint64_t) {
  take_step(check_sgd_step(stack, Backend::kCuda));
}

void sgd_step_capturable_cuda(StableIValue* stack, std::uint64_t, std::uint64_t) {
  take_step(check_sgd_step_capturable(stack, Backend::kCuda));
}

}  // namespace schedulefree
