// The loss of two heads that differ in type. It takes nvcc as long as all of loss.cu: a file of its own, so that both
// compile at once.
#include "loss.cuh"

namespace cotuning::cuda {

void launch_mixed_loss(const LossProblem& problem, const LossPlan& plan, void* stream) {
  launch_loss_kernel<void>(problem, plan, stream);
}

}  // namespace cotuning::cuda
