// The ladder's steps in the emulator, held to float64: step=1…4 m=150 n=136 k=200 r=40 groups=2 seed=3
#include <cmath>
#include <cstdio>

#include "../../csrc/emulator/emulator.h"
//
#include "../../csrc/cuda/ladder/step3_epilogue.h"

using namespace mole;
using namespace mole::sm90;

namespace {

// half a unit of v's last place in bf16
double half_step(double v) {
  int exponent;
  std::frexp(v, &exponent);
  return std::ldexp(1.0, exponent - 9);
}

CUtensorMap map3(const emu::Array<bf16>& a,
                 uint64_t columns,
                 uint64_t rows,
                 uint32_t box_columns,
                 uint32_t box_rows,
                 int swizzle) {
  return emu::tensor_map_3d(a.data(), {columns, rows, 1}, {columns * 2, rows * columns * 2},
                            {box_columns, box_rows, 1}, swizzle);
}

template <int GROUPS>
int test(const emu::Arguments& args) {
  constexpr int BM = 64 * GROUPS, BN = 64;
  const int step = args.get("step", 1), M = args.get("m", 150), N = args.get("n", 136),
            K = args.get("k", 200);
  const int R = step == 4 ? args.get("r", 40) : 0;
  const emu::Input<bf16> x("x", size_t(M) * K), w("w", size_t(N) * K), bias("bias", N),
      z("z", size_t(M) * R + 8), up("up", size_t(N) * R + 8);
  const emu::Output<bf16> y("y", size_t(M) * N);
  emu::Random random(args.seed());
  for (const auto* a : {&x, &w, &bias, &z, &up})
    for (size_t i = 0; i < a->size(); ++i) (*a)[i] = from_float<bf16>(random.uniform());
  Params p{};
  p.N = N, p.K = K, p.R = R, p.span = M, p.stages = 3;
  p.row_tiles = (M + BM - 1) / BM, p.column_tiles = (N + BN - 1) / BN;
  p.h = y.data(), p.bias = step >= 3 ? bias.data() : nullptr;
  Maps maps{};
  maps.x = map3(x, K, M, 64, BM, 128), maps.w = map3(w, K, N, 64, BN, 128),
  maps.y = map3(y, N, M, 32, 64, 64);
  if (R) maps.down = map3(z, R, M, 64, BM, 128), maps.up = map3(up, R, N, 64, BN, 128);
  emu::Launch launch;
  const int tiles = p.row_tiles * p.column_tiles;
  launch.grid = dim3(step == 1   ? tiles
                     : tiles < 3 ? tiles
                                 : 3),
  launch.block = dim3(128 * (GROUPS + 1)), launch.seed = args.seed();
  launch.smem = size_t(3 * (BM + BN) * 128 + BM * BN * 2 + 256), launch.registers = GROUPS == 1 ? 240 : 168;
  emu::launch(launch, [&] {
    if (step == 1)
      ladder::plain<bf16, GROUPS, BN>(maps, p);
    else if (step == 2)
      ladder::persistent<bf16, GROUPS, BN>(maps, p);
    else
      ladder::epilogue<bf16, GROUPS, BN>(maps, p);
  });
  double worst = 0, square = 0;
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) {
      double sum = step >= 3 ? to_float(bias[n]) : 0.0;
      for (int k = 0; k < K; ++k)
        sum += double(to_float(x[size_t(m) * K + k])) * to_float(w[size_t(n) * K + k]);
      for (int r = 0; r < R; ++r)
        sum += double(to_float(z[size_t(m) * R + r])) * to_float(up[size_t(n) * R + r]);
      const double error = std::fabs(to_float(y[size_t(m) * N + n]) - sum);
      worst = std::isnan(error) ? INFINITY : std::max(worst, error - half_step(sum));
      square += sum * sum;
    }
  worst /= std::sqrt(square / (double(M) * N));
  std::printf("excess of y %.2e\n", worst);
  return worst <= 1e-6 ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  const emu::Arguments args(argc, argv);
  return args.get("groups", 1) == 1 ? test<1>(args) : test<2>(args);
}
