// torch.ops.mole_cpu.*: private operators; torch.ops.mole.* (mole_kernels/ops) are the public ones.
#include <string>

#include "cpu/call.h"

namespace mole {
namespace {

std::string instruction_set_name() { return instruction_set(); }

}  // namespace
}  // namespace mole

STABLE_TORCH_LIBRARY(mole_cpu, m) {
  // the operands of a call, in the order of FIELDS in mole_kernels/operands.py
#define MOLE_CALL                                                                                       \
  "Tensor x, Tensor weight, Tensor? bias, Tensor down, Tensor up, Tensor scale, int[] ranks, "          \
  "Tensor? assignment, Tensor? gate, Tensor? token_weight, Tensor? token_bias, Tensor? sample_weight, " \
  "Tensor? sample_bias, int top_k, bool save"
  m.def("forward(" MOLE_CALL ") -> (Tensor y, Tensor h, Tensor token_gate, Tensor sample_gate)");
  // need: bit i asks for the i-th gradient
  m.def(
      "backward(Tensor dy, " MOLE_CALL
      ", Tensor h, Tensor token_gate, Tensor sample_gate, int need) -> (Tensor dx, Tensor ddown, Tensor dup, "
      "Tensor dscale, Tensor dgate, Tensor dtoken_weight, Tensor dtoken_bias, Tensor dsample_weight, "
      "Tensor dsample_bias)");
#undef MOLE_CALL
  m.def("instruction_set() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(mole_cpu, CPU, m) {
  m.impl("forward", TORCH_BOX(&mole::forward));
  m.impl("backward", TORCH_BOX(&mole::backward));
}

STABLE_TORCH_LIBRARY_IMPL(mole_cpu, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&mole::instruction_set_name));
}
