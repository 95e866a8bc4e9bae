// torch.ops.mole_cpu.*: private operators; torch.ops.mole.* (mole_kernels/ops) are the public ones.
#include <string>

#include "cpu/call.h"

namespace mole {
namespace {

std::string instruction_set_name() { return instruction_set(); }

}  // namespace
}  // namespace mole

STABLE_TORCH_LIBRARY(mole_cpu, m) {
  m.def(
      "forward(Tensor x, Tensor weight, Tensor? bias, Tensor down, Tensor up, Tensor scale, int[] ranks, "
      "Tensor? gate, Tensor? phi, "
      "Tensor? phi_bias, Tensor? pool, Tensor? pool_bias, bool save, Tensor? assignment=None, int top_k=0) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  // need: bit i asks for the i-th of dx, ddown, dup, dscale, dgate, dphi, dphi_bias, dpool, dpool_bias
  m.def(
      "backward(Tensor dy, Tensor x, Tensor weight, Tensor down, Tensor up, Tensor scale, int[] ranks, "
      "Tensor? gate, Tensor? phi, "
      "Tensor? pool, Tensor h, Tensor token_gate, Tensor sample_gate, int need, Tensor? assignment=None, int "
      "top_k=0) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("instruction_set() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(mole_cpu, CPU, m) {
  m.impl("forward", TORCH_BOX(&mole::forward));
  m.impl("backward", TORCH_BOX(&mole::backward));
}

STABLE_TORCH_LIBRARY_IMPL(mole_cpu, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&mole::instruction_set_name));
}
