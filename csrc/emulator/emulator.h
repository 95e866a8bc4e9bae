// The host's side of the emulator: memory a kernel may touch, tensor maps, launches, a program's arguments.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "device.h"

namespace emu {

enum class Access { Read, Write, ReadWrite };

// `bytes` of global memory named `name` in reports; `offset` bytes beyond 256-byte alignment
void* allocate(const char* name, size_t bytes, Access access, size_t offset = 0);
void release(void* p);

// an array in global memory; everything outside such arrays is out of bounds for a kernel
template <class T>
class Array {
 public:
  Array(const char* name, size_t count, Access access, size_t offset = 0)
      : p_(static_cast<T*>(allocate(name, count * sizeof(T), access, offset))), count_(count) {}
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  ~Array() { release(p_); }
  T* data() const { return p_; }
  T& operator[](size_t i) const { return p_[i]; }
  size_t size() const { return count_; }

 private:
  T* p_;
  size_t count_;
};

// kernels may only read it
template <class T>
struct Input : Array<T> {
  Input(const char* name, size_t count, size_t offset = 0) : Array<T>(name, count, Access::Read, offset) {}
};

// holds NaN until written; reading what was never written is an error
template <class T>
struct Output : Array<T> {
  Output(const char* name, size_t count, size_t offset = 0) : Array<T>(name, count, Access::Write, offset) {}
};

// read and written, initialised
template <class T>
struct Memory : Array<T> {
  Memory(const char* name, size_t count, T value = T{}, size_t offset = 0)
      : Array<T>(name, count, Access::ReadWrite, offset) {
    for (size_t i = 0; i < count; i++) (*this)[i] = value;
  }
};

// a map over a row-major matrix of 16-bit elements (stride in elements; 0: dense); swizzle_bytes 0, 32, 64,
// 128. Refuses with a message what the driver's cuTensorMapEncodeTiled refuses.
CUtensorMap tensor_map_2d(const void* base,
                          uint64_t rows,
                          uint64_t columns,
                          uint32_t box_rows,
                          uint32_t box_columns,
                          int swizzle_bytes,
                          uint64_t row_stride = 0,
                          int element_bytes = 2);
// sizes and boxes innermost first; strides in bytes of dimensions 1 and 2
CUtensorMap tensor_map_3d(const void* base,
                          const uint64_t (&size)[3],
                          const uint64_t (&stride)[2],
                          const uint32_t (&box)[3],
                          int swizzle_bytes,
                          int element_bytes = 2);

struct Launch {
  dim3 grid, block, cluster;
  size_t smem = 0;
  uint64_t seed = 0;
  unsigned resident = 0;   // CTAs resident at once (whole clusters); 0: the whole grid
  unsigned registers = 0;  // per thread at launch, for the setmaxnreg pool; 0: as many as fit
  uint64_t steps = 0;      // switches between threads before it counts as a livelock; 0: a default
};

// run `kernel` as every thread of the grid; returns when all are done; a broken rule ends the process with
// status 3
void launch(const Launch& launch, void (*call)(const void*), const void* kernel);

template <class F>
void launch(const Launch& l, const F& kernel) {
  launch(l, [](const void* k) { (*static_cast<const F*>(k))(); }, &kernel);
}

// name=value arguments of a program
class Arguments {
 public:
  Arguments(int argc, char** argv);
  int get(const char* name, int fallback) const;
  std::string text(const char* name, const char* fallback) const;
  uint64_t seed() const { return uint64_t(get("seed", 0)); }

 private:
  std::map<std::string, std::string> values_;
};

// small whole or random numbers for inputs, the same on every machine
struct Random {
  uint64_t state;
  explicit Random(uint64_t seed) : state(seed * 0x9e3779b97f4a7c15ull + 0x1234567) {}
  uint32_t next();
  float uniform();  // [-1, 1)
};

}  // namespace emu
