// 16-bit floating point numbers, rounded to nearest even, and a small generator of inputs.
#include "emulator.h"

namespace emu {

float bf16_to_float(uint16_t v) { return __uint_as_float(uint32_t(v) << 16); }

uint16_t float_to_bf16(float f) {
  uint32_t x = __float_as_uint(f);
  if ((x & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  x += 0x7fffu + ((x >> 16) & 1u);
  return uint16_t(x >> 16);
}

float fp16_to_float(uint16_t v) {
  const uint32_t sign = uint32_t(v & 0x8000u) << 16, exponent = (v >> 10) & 31u, fraction = v & 0x3ffu;
  if (exponent == 0) {
    const float f = float(fraction) * 0x1p-24f;
    return sign ? -f : f;
  }
  return __uint_as_float(sign | (exponent == 31 ? 0x7f800000u : (exponent + 112u) << 23) | fraction << 13);
}

uint16_t float_to_fp16(float f) {
  const uint32_t x = __float_as_uint(f), magnitude = x & 0x7fffffffu;
  const auto sign = uint16_t((x >> 16) & 0x8000u);
  if (magnitude > 0x7f800000u) return 0x7fff;
  if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u);
  if (magnitude < 0x38800000u) return uint16_t(sign | uint16_t(std::nearbyint(std::fabs(f) * 0x1p24f)));
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return uint16_t(sign | ((rounded - 0x38000000u) >> 13));
}

uint32_t Random::next() {
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  uint64_t x = state ^ (state >> 33);
  x *= 0xff51afd7ed558ccdull;
  return uint32_t(x >> 32);
}

float Random::uniform() { return float(next() >> 8) * 0x1p-23f - 1.0f; }

Arguments::Arguments(int argc, char** argv) {
  for (int i = 1; i < argc; i++) {
    const std::string a = argv[i];
    const size_t eq = a.find('=');
    if (eq == std::string::npos) {
      std::fprintf(stderr, "expected name=value, got %s\n", argv[i]);
      std::exit(2);
    }
    values_[a.substr(0, eq)] = a.substr(eq + 1);
  }
}

int Arguments::get(const char* name, int fallback) const {
  const auto i = values_.find(name);
  return i == values_.end() ? fallback : std::atoi(i->second.c_str());
}

std::string Arguments::text(const char* name, const char* fallback) const {
  const auto i = values_.find(name);
  return i == values_.end() ? fallback : i->second;
}

}  // namespace emu
