// What the compiler's -fsanitize=thread calls at every ordinary load and store of the kernel. The program is
// compiled with that instrumentation and linked with these functions in the place of ThreadSanitizer's
// runtime: it knows no proxies, no CTAs and no asynchronous copies, and this one does.
#include <pthread.h>

#include "machine.h"

extern "C" char __executable_start, _end;

namespace emu {
namespace {

struct HostStack {
  uintptr_t from = 0, to = 0;
  HostStack() {
    pthread_attr_t a;
    void* base;
    size_t size;
    if (pthread_getattr_np(pthread_self(), &a) != 0) return;
    pthread_attr_getstack(&a, &base, &size);
    from = reinterpret_cast<uintptr_t>(base), to = from + size;
    pthread_attr_destroy(&a);
  }
};
const HostStack host_stack;

const char* verb(bool write, size_t bytes) {
  static const char* names[2][6] = {{"a load of 1 byte", "a load of 2 bytes", "a load of 4 bytes",
                                     "a load of 8 bytes", "a load of 16 bytes", "a load"},
                                    {"a store of 1 byte", "a store of 2 bytes", "a store of 4 bytes",
                                     "a store of 8 bytes", "a store of 16 bytes", "a store"}};
  const int i = bytes == 1 ? 0 : bytes == 2 ? 1 : bytes == 4 ? 2 : bytes == 8 ? 3 : bytes == 16 ? 4 : 5;
  return names[write][i];
}

// registers live on the fiber's stack: accumulators in flight are not to be touched, and a written register
// needs wgmma_fence
void own_stack(Thread& t, uintptr_t at, size_t bytes, bool write, const void* pc) {
  for (const auto& r : t.in_flight)
    if (at < r.to && at + bytes > r.from)
      fail("wgmma", "%s %s an accumulator of a wgmma in flight (before wgmma_wait), at %s",
           describe(t).c_str(), write ? "writes" : "reads", line_of(pc).c_str());
  if (!write) return;
  const size_t from = (at - reinterpret_cast<uintptr_t>(t.stack)) / 4,
               to = (at + bytes - 1 - reinterpret_cast<uintptr_t>(t.stack)) / 4;
  for (size_t i = from; i <= to; i++) t.written[i / 64] |= uint64_t(1) << (i % 64);
  t.written_from = std::min(t.written_from, from / 64), t.written_to = std::max(t.written_to, to / 64 + 1);
}

void access_slow(const void* p, size_t bytes, bool write, bool aligned, const void* pc) {
  Inside inside;
  Thread& t = me();
  t.pc = pc;
  const auto at = reinterpret_cast<uintptr_t>(p);
  if (Cta* cta = cta_of(p)) {
    if (cta != t.cta)
      fail("bounds", "%s reaches %s by an ordinary pointer, at %s", describe(t).c_str(), name_of(p).c_str(),
           line_of(pc).c_str());
  } else if (at >= reinterpret_cast<uintptr_t>(&__executable_start) &&
             at < reinterpret_cast<uintptr_t>(&_end)) {
    if (write) fail("bounds", "%s writes a static variable, at %s", describe(t).c_str(), line_of(pc).c_str());
    return;
  } else if (at >= host_stack.from && at < host_stack.to) {
    if (write)
      fail("bounds", "%s writes a variable of the host, at %s", describe(t).c_str(), line_of(pc).c_str());
    return;
  }
  if (aligned && bytes <= 16 && at % bytes)
    fail("alignment", "%s at %s, whose address is not a multiple of %zu, at %s", verb(write, bytes),
         name_of(p).c_str(), bytes, line_of(pc).c_str());
  touch(thread_actor(t), p, bytes, write ? Kind::Write : Kind::Read, verb(write, bytes), pc);
}

inline void access(const void* p, size_t bytes, bool write, bool aligned, const void* pc) {
  if (!machine || machine->inside) return;
  Thread& t = *machine->current;
  const auto at = reinterpret_cast<uintptr_t>(p), low = reinterpret_cast<uintptr_t>(t.stack);
  if (at - low < kStack) {
    if (write || !t.in_flight.empty()) own_stack(t, at, bytes, write, pc);
    return;
  }
  access_slow(p, bytes, write, aligned, pc);
}

}  // namespace
}  // namespace emu

// what -fsanitize=alignment,bounds calls: a reference to a vector that is not aligned as its type, an index
// beyond a register array
struct Place {
  const char* file;
  uint32_t line, column;
};

static const char* base_name(const char* path) {
  const char* slash = std::strrchr(path, '/');
  return slash ? slash + 1 : path;
}

extern "C" {
void __ubsan_handle_type_mismatch_v1_abort(const Place* at, const void* p) {
  if (emu::machine && emu::machine->current)
    emu::fail("alignment", "a reference to %s, which is not aligned as its type wants, at %s:%u",
              emu::name_of(p).c_str(), base_name(at->file), at->line);
  emu::fail("alignment", "a reference that is not aligned as its type wants, at %s:%u", base_name(at->file),
            at->line);
}
void __ubsan_handle_out_of_bounds_abort(const Place* at, unsigned long index) {
  emu::fail("bounds", "index %ld is outside its array, at %s:%u", long(index), base_name(at->file), at->line);
}
}

#define MOLE_HOOK(bytes)                                                                                \
  void __tsan_read##bytes(void* p) { emu::access(p, bytes, false, true, __builtin_return_address(0)); } \
  void __tsan_write##bytes(void* p) { emu::access(p, bytes, true, true, __builtin_return_address(0)); } \
  void __tsan_unaligned_read##bytes(void* p) {                                                          \
    emu::access(p, bytes, false, false, __builtin_return_address(0));                                   \
  }                                                                                                     \
  void __tsan_unaligned_write##bytes(void* p) {                                                         \
    emu::access(p, bytes, true, false, __builtin_return_address(0));                                    \
  }                                                                                                     \
  void __tsan_volatile_read##bytes(void* p) {                                                           \
    emu::access(p, bytes, false, true, __builtin_return_address(0));                                    \
  }                                                                                                     \
  void __tsan_volatile_write##bytes(void* p) {                                                          \
    emu::access(p, bytes, true, true, __builtin_return_address(0));                                     \
  }                                                                                                     \
  void __tsan_unaligned_volatile_read##bytes(void* p) {                                                 \
    emu::access(p, bytes, false, false, __builtin_return_address(0));                                   \
  }                                                                                                     \
  void __tsan_unaligned_volatile_write##bytes(void* p) {                                                \
    emu::access(p, bytes, true, false, __builtin_return_address(0));                                    \
  }

extern "C" {
MOLE_HOOK(1)
MOLE_HOOK(2)
MOLE_HOOK(4)
MOLE_HOOK(8)
MOLE_HOOK(16)
void __tsan_read_range(void* p, unsigned long n) {
  emu::access(p, n, false, false, __builtin_return_address(0));
}
void __tsan_write_range(void* p, unsigned long n) {
  emu::access(p, n, true, false, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
