// What `mole-kernels doctor` asks of CUDA: devices, their attributes, and torch's current stream. Kernels
// come beside this file.
#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <vector>

// weak: with a torch that has no CUDA the library still loads, and this is null
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device,
                                                                                   void** stream);

namespace mole {
namespace {

// 0 where there is no driver or no GPU: that is an answer, not an error
int64_t device_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

// compute capability ×10, multiprocessors, shared memory per block (opt-in), shared memory per
// multiprocessor, registers per multiprocessor, L2 bytes
std::vector<int64_t> device_attributes(int64_t device) {
  STD_TORCH_CHECK(device >= 0 && device < device_count(), "mole_cuda: there is no device ", device);
  const auto get = [&](cudaDeviceAttr attribute) {
    int value = 0;
    STD_TORCH_CHECK(cudaDeviceGetAttribute(&value, attribute, int(device)) == cudaSuccess,
                    "mole_cuda: cudaDeviceGetAttribute failed");
    return int64_t(value);
  };
  return {get(cudaDevAttrComputeCapabilityMajor) * 10 + get(cudaDevAttrComputeCapabilityMinor),
          get(cudaDevAttrMultiProcessorCount),
          get(cudaDevAttrMaxSharedMemoryPerBlockOptin),
          get(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
          get(cudaDevAttrMaxRegistersPerMultiprocessor),
          get(cudaDevAttrL2CacheSize)};
}

int64_t runtime_version() {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
}

bool torch_has_cuda() { return aoti_torch_get_current_cuda_stream != nullptr; }

}  // namespace
}  // namespace mole

STABLE_TORCH_LIBRARY(mole_cuda, m) {
  m.def("device_count() -> int");
  m.def("device_attributes(int device) -> int[]");
  m.def("runtime_version() -> int");
  m.def("torch_has_cuda() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(mole_cuda, CompositeExplicitAutograd, m) {
  m.impl("device_count", TORCH_BOX(&mole::device_count));
  m.impl("device_attributes", TORCH_BOX(&mole::device_attributes));
  m.impl("runtime_version", TORCH_BOX(&mole::runtime_version));
  m.impl("torch_has_cuda", TORCH_BOX(&mole::torch_has_cuda));
}
