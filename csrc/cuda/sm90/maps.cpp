// Tensor maps: encoded by the driver, kept by what they say. A map holds addresses and sizes, never contents,
// so that it is right for as long as it is asked for by the same key.
#include <array>
#include <cstring>
#include <mutex>
#include <unordered_map>

#include "launch.h"

namespace mole::sm90 {
namespace {

using Encode = CUresult (*)(CUtensorMap*,
                            CUtensorMapDataType,
                            cuuint32_t,
                            void*,
                            const cuuint64_t*,
                            const cuuint64_t*,
                            const cuuint32_t*,
                            const cuuint32_t*,
                            CUtensorMapInterleave,
                            CUtensorMapSwizzle,
                            CUtensorMapL2promotion,
                            CUtensorMapFloatOOBfill);

// from the driver that is there, so that the library does not need libcuda to load
Encode encode() {
  static const Encode found = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t failed =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &result);
    return failed == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(entry)
                                                                          : nullptr;
  }();
  return found;
}

using Key = std::array<uint64_t, 10>;
struct Hash {
  size_t operator()(const Key& key) const {
    uint64_t h = 1469598103934665603ull;
    for (uint64_t part : key) h = (h ^ part) * 1099511628211ull, h ^= h >> 29;
    return size_t(h);
  }
};

// a layer has six maps and a UNet 722 layers; activations come and go, so the cache is emptied when it is
// full
constexpr size_t MOST_MAPS = 1 << 15;
std::mutex guard;
std::unordered_map<Key, CUtensorMap, Hash> kept;

}  // namespace

bool tensor_map(CUtensorMap& out,
                const Operand& o,
                const uint32_t (&box)[3],
                CUtensorMapSwizzle swizzle,
                bool bf16,
                std::string& error) {
  const Key key{reinterpret_cast<uint64_t>(o.at),
                uint64_t(o.size[0]),
                uint64_t(o.size[1]),
                uint64_t(o.size[2]),
                uint64_t(o.stride[0]),
                uint64_t(o.stride[1]),
                box[0],
                box[1],
                box[2],
                uint64_t(swizzle) * 2 + bf16};
  const std::lock_guard<std::mutex> lock(guard);
  if (const auto found = kept.find(key); found != kept.end()) {
    out = found->second;
    return true;
  }
  if (!encode()) {
    error = "the driver has no cuTensorMapEncodeTiled (CUDA 12 or later)";
    return false;
  }
  const cuuint64_t sizes[3] = {cuuint64_t(o.size[0]), cuuint64_t(o.size[1]), cuuint64_t(o.size[2])};
  const cuuint64_t strides[2] = {cuuint64_t(o.stride[0]) * 2, cuuint64_t(o.stride[1]) * 2};
  const cuuint32_t ones[3] = {1, 1, 1};
  const CUresult failed =
      encode()(&out, bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 3,
               const_cast<void*>(o.at), sizes, strides, box, ones, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (failed != CUDA_SUCCESS) {
    error = "cuTensorMapEncodeTiled says " + std::to_string(int(failed)) + " for a tensor of " +
            std::to_string(o.size[2]) + "×" + std::to_string(o.size[1]) + "×" + std::to_string(o.size[0]) +
            " with a box of " + std::to_string(box[1]) + "×" + std::to_string(box[0]);
    return false;
  }
  if (kept.size() >= MOST_MAPS) kept.clear();
  kept.emplace(key, out);
  return true;
}

std::string layout_refusal(const char* name, const Operand& o) {
  const std::string at = std::string(name) + " ";
  if (reinterpret_cast<uint64_t>(o.at) % 16) return at + "does not begin at a multiple of 16 bytes (TMA)";
  for (int d = 0; d < 2; ++d) {
    if (o.size[d + 1] == 1) continue;
    if (o.stride[d] % 8)
      return at + "has a stride of " + std::to_string(o.stride[d]) + " elements, no multiple of 8 (TMA)";
    if (o.stride[d] < o.size[0]) return at + "has rows that overlap (TMA)";
    if (o.stride[d] >= int64_t(1) << 38) return at + "has a stride beyond TMA's reach";
  }
  for (int d = 0; d < 3; ++d)
    if (o.size[d] < 1 || o.size[d] > int64_t(1) << 31) return at + "has a size beyond TMA's reach";
  return "";
}

}  // namespace mole::sm90
