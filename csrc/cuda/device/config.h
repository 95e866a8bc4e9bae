// Which world this is: nvcc (PTX bodies), or the emulator (MOLE_EMULATE: software bodies on a CPU, for
// tests).
//
// Every header of this folder holds one part of the vocabulary that kernels are written in. Each function
// names its section of the PTX ISA and has two bodies of the same meaning: kernels are compiled from the same
// source in both worlds.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef MOLE_EMULATE
#include "../../emulator/device.h"
#define MOLE_DEVICE inline __attribute__((always_inline))
#else
#include <cuda.h>
#include <cuda_runtime.h>
#define MOLE_DEVICE __device__ __forceinline__
#endif

// a function that host and device both call (tile choices, layouts)
#ifdef __CUDACC__
#define MOLE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MOLE_HOST_DEVICE inline
#endif
