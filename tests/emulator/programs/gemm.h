// Checks a product against float64, for the programs of this folder.
#pragma once

#include <cmath>
#include <cstdio>

#include "csrc/cuda/device/types.h"
#include "csrc/emulator/emulator.h"

// relative Frobenius error of c [m,n] against x [m,k] w [n,k]ᵀ
inline double product_error(const mole::bf16* x, const mole::bf16* w, const float* c, int m, int n, int k) {
  double wrong = 0, all = 0;
  for (int i = 0; i < m; i++)
    for (int j = 0; j < n; j++) {
      double s = 0;
      for (int e = 0; e < k; e++)
        s += double(mole::to_float(x[size_t(i) * k + e])) * double(mole::to_float(w[size_t(j) * k + e]));
      const double d = double(c[size_t(i) * n + j]) - s;
      wrong += d * d, all += s * s;
    }
  return std::sqrt(wrong / all);
}

template <class T>
void fill(const emu::Array<T>& a, uint64_t seed) {
  emu::Random random(seed);
  for (size_t i = 0; i < a.size(); i++) a[i] = mole::from_float<T>(random.uniform());
}

inline int verdict(double error, double most = 1e-6) {
  std::printf("relative error %.3e\n", error);
  return error <= most ? 0 : 1;
}
