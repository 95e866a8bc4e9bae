// Which copy of the kernels runs here: the best instruction set that both the CPU and this build have.
#include "cpu/kernels.h"

namespace mole {

namespace base {
const Kernels& table(Element);
}
#if MOLE_HAS_AVX2
namespace avx2 {
const Kernels& table(Element);
}
namespace avx512 {
const Kernels& table(Element);
}
namespace avx512bf16 {
const Kernels& table(Element);
}
#endif

namespace {

struct Choice {
  const char* name;
  const Kernels& (*table)(Element);
};

Choice choose() {
#if MOLE_HAS_AVX2
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  if (v4 && __builtin_cpu_supports("avx512bf16")) return {"avx512bf16", avx512bf16::table};
  if (v4) return {"avx512", avx512::table};
  if (v3) return {"avx2", avx2::table};
#endif
  return {"base", base::table};
}

const Choice& choice() {
  static const Choice chosen = choose();
  return chosen;
}

}  // namespace

const Kernels& kernels(Element type) { return choice().table(type); }
const char* instruction_set() { return choice().name; }

}  // namespace mole
