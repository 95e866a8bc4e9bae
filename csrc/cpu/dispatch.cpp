// Which copy of the kernels runs here: the best instruction set that both the CPU and this build have.
#include "cpu/kernels.h"

#include <cstdlib>
#include <cstring>

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

// every instruction set that this CPU has, the best first
int available(Choice (&list)[4]) {
  int n = 0;
#if MOLE_HAS_AVX2
  __builtin_cpu_init();
  const bool v3 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (v4 && __builtin_cpu_supports("avx512bf16")) list[n++] = {"avx512bf16", avx512bf16::table};
  if (v4) list[n++] = {"avx512", avx512::table};
  if (v3) list[n++] = {"avx2", avx2::table};
#endif
  list[n++] = {"base", base::table};
  return n;
}

// the best, or the one that MOLE_INSTRUCTION_SET names where this CPU has it (the tests run them all)
const Choice& choice() {
  static const Choice chosen = [] {
    Choice list[4];
    const int n = available(list);
    // NOLINTNEXTLINE(concurrency-mt-unsafe): once in a process, under the lock of a static; nobody here
    // writes the environment
    const char* wanted = std::getenv("MOLE_INSTRUCTION_SET");
    for (int i = 0; wanted && i < n; ++i)
      if (std::strcmp(list[i].name, wanted) == 0) return list[i];
    return list[0];
  }();
  return chosen;
}

}  // namespace

const Kernels& kernels(Element type) { return choice().table(type); }
const char* instruction_set() { return choice().name; }

// Measured on Zen 4 only, against MKL 2024.2 (which runs its AVX2 kernel there: 93 of 118 GF) and oneDNN 3.12
// (200 of 235 GF): see docs/kernels/cpu.md. Elsewhere torch's own product makes the base.
bool beats_torch(Element type) {
#if MOLE_HAS_AVX2
  static const bool amd = (__builtin_cpu_init(), __builtin_cpu_is("amd"));
  const bool bf16 = std::strcmp(choice().name, "avx512bf16") == 0,
             wide = bf16 || std::strcmp(choice().name, "avx512") == 0;
  return amd && ((type == F32 && wide) || (type == BF16 && bf16));
#else
  return false;
#endif
}

}  // namespace mole
