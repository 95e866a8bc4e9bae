// Memory that kernels touch, and the marks on it: who wrote and who read each pair of bytes last, and through
// which proxy.
//
// The rule is happens-before by vector clocks: an access must have seen every conflicting one before it. So a
// race is found whatever the schedule did with it. An asynchronous operation leaves its marks when it is
// issued, under a name of its own that others see only through its barrier or its group; its data moves
// later.
#include <sys/mman.h>

#include <algorithm>

#include "machine.h"

extern "C" char __executable_start, _end;

namespace emu {
namespace {

enum : uint8_t { kWritten = 1, kAsync = 2, kAtomic = 4, kBarrier = 8, kMany = 16 };

struct Cell {
  uint32_t write_dim, write_clock, read_dim, read_clock;
  uint32_t write_pc;  // from the image's start
  uint8_t flags;
  uint16_t era;
};

constexpr size_t kGranule = 2;

struct Region {
  uintptr_t from, to;
  std::string name;
  Access access;
  Cell* cells;
  void* memory;
};

struct Reader {
  Epoch epoch;
};

std::vector<Region> regions;  // sorted
size_t last_region = 0;
unsigned char* smem_arena = nullptr;
Cell* smem_cells = nullptr;
size_t smem_slots = 0;
uint16_t era = 1;
std::unordered_map<const Cell*, std::vector<Reader>> readers;

void* reserve(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) fail("host", "no address space for %zu bytes", bytes);
  return p;
}

Region* region_of(uintptr_t p) {
  if (last_region < regions.size() && p >= regions[last_region].from && p < regions[last_region].to)
    return &regions[last_region];
  auto i = std::upper_bound(regions.begin(), regions.end(), p,
                            [](uintptr_t v, const Region& r) { return v < r.from; });
  if (i == regions.begin() || p >= (--i)->to) return nullptr;
  last_region = size_t(i - regions.begin());
  return &*i;
}

uint32_t pc_offset(const void* pc) { return uint32_t(static_cast<const char*>(pc) - &__executable_start); }

// a thread takes the dimension of one that is done (a CTA in another's place): what that one did is ordered
// only where it was told
bool ordered(const Actor& who, uint32_t dim, uint32_t clock) {
  return (dim == who.dim && clock >= who.start) || who.view->seen[dim] >= clock ||
         (who.also && who.also->seen[dim] >= clock);
}

bool reaches_async(const Actor& who, uint32_t dim, uint32_t clock, int space) {
  return dim == who.dim ? who.own_proxied[space] >= clock : who.view->proxied[space][dim] >= clock;
}

[[noreturn]] void race(const char* mine,
                       const char* other,
                       uint32_t dim,
                       uint32_t pc,
                       const void* p,
                       const char* what,
                       const void* my_pc) {
  const std::string there = pc ? " at " + line_of(&__executable_start + pc) : std::string();
  fail("race", "%s of %s by %s%s%s\n  is not ordered with an earlier %s by %s%s", mine, name_of(p).c_str(),
       what, my_pc ? " at " : "", my_pc ? line_of(my_pc).c_str() : "", other, describe_actor(dim).c_str(),
       there.c_str());
}

void read_cell(const Actor& who, Cell& c) {
  if (c.flags & kMany) {
    for (auto& r : readers[&c])
      if (r.epoch.dim == who.epoch.dim) {
        r.epoch.clock = who.epoch.clock;
        return;
      }
    readers[&c].push_back({who.epoch});
  } else if (!c.read_clock || c.read_dim == who.epoch.dim || ordered(who, c.read_dim, c.read_clock)) {
    c.read_dim = who.epoch.dim, c.read_clock = who.epoch.clock;
  } else {
    c.flags |= kMany;
    readers[&c] = {{Epoch{c.read_dim, c.read_clock}}, {who.epoch}};
  }
}

void check_readers(const Actor& who, Cell& c, const void* p, const char* what, const void* pc) {
  if (c.flags & kMany) {
    auto found = readers.find(&c);
    for (auto& r : found->second)
      if (!ordered(who, r.epoch.dim, r.epoch.clock)) race("a write", "read", r.epoch.dim, 0, p, what, pc);
    readers.erase(found);
    c.flags &= uint8_t(~kMany);
  } else if (c.read_clock && !ordered(who, c.read_dim, c.read_clock)) {
    race("a write", "read", c.read_dim, 0, p, what, pc);
  }
  c.read_clock = 0;
}

void check_writer(
    const Actor& who, const Cell& c, const void* p, Kind kind, int space, const char* what, const void* pc) {
  const bool both_atomic = kind >= Kind::Atomic && (c.flags & kAtomic);
  if (!both_atomic && !ordered(who, c.write_dim, c.write_clock))
    race(kind == Kind::Read || kind == Kind::AtomicRead ? "a read" : "a write",
         (c.flags & kAtomic) ? "atomic write" : "write", c.write_dim, c.write_pc, p, what, pc);
  if (who.proxy == Proxy::Async && !(c.flags & kAsync) &&
      !reaches_async(who, c.write_dim, c.write_clock, space))
    fail("proxy",
         "%s touches %s%s%s,\n  last written by an ordinary store of %s at %s, with no fence_proxy_async in "
         "between",
         what, name_of(p).c_str(), pc ? " at " : "", pc ? line_of(pc).c_str() : "",
         describe_actor(c.write_dim).c_str(), line_of(&__executable_start + c.write_pc).c_str());
}

void touch_cells(const Actor& who,
                 const Region* region,
                 Cell* cells,
                 const unsigned char* p,
                 size_t bytes,
                 Kind kind,
                 int space,
                 const char* what,
                 const void* pc) {
  const size_t n = (bytes + kGranule - 1) / kGranule;
  for (size_t i = 0; i < n; i++) {
    Cell& c = cells[i];
    const unsigned char* at = p + i * kGranule;
    if (c.era != era) {
      c.flags &= kWritten | kBarrier;
      c.write_clock = c.read_clock = 0;
      c.era = era;
    }
    if (c.flags & kBarrier)
      fail("mbarrier", "%s touches the 8 bytes of an mbarrier at %s%s%s", what, name_of(at).c_str(),
           pc ? " at " : "", pc ? line_of(pc).c_str() : "");
    if (c.write_clock) check_writer(who, c, at, kind, space, what, pc);
    if (kind == Kind::Read || kind == Kind::AtomicRead) {
      const bool initialised = (c.flags & kWritten) || (region && region->access != Access::Write);
      if (!initialised && who.proxy == Proxy::Generic)
        fail("uninitialised", "%s reads %s, which nobody wrote%s%s", what, name_of(at).c_str(),
             pc ? ", at " : "", pc ? line_of(pc).c_str() : "");
      if (kind == Kind::Read) read_cell(who, c);
      continue;
    }
    if (kind == Kind::Atomic && region && region->access == Access::Write && !(c.flags & kWritten))
      fail("uninitialised", "%s updates %s, which nobody wrote%s%s", what, name_of(at).c_str(),
           pc ? ", at " : "", pc ? line_of(pc).c_str() : "");
    check_readers(who, c, at, what, pc);
    c.write_dim = who.epoch.dim, c.write_clock = who.epoch.clock, c.write_pc = pc ? pc_offset(pc) : 0;
    c.flags =
        uint8_t(kWritten | (who.proxy == Proxy::Async ? kAsync : 0) | (kind == Kind::Atomic ? kAtomic : 0));
  }
}

}  // namespace

void* allocate(const char* name, size_t bytes, Access access, size_t offset) {
  Region r;
  const size_t room = bytes + offset;
#if defined(__SANITIZE_ADDRESS__)
  if (posix_memalign(&r.memory, 256, std::max<size_t>(room, 1)) != 0)
    fail("host", "no memory for %zu bytes", room);
#else
  r.memory = static_cast<unsigned char*>(reserve(room + (2 << 16))) + (1 << 16);
#endif
  r.from = reinterpret_cast<uintptr_t>(r.memory) + offset;
  r.to = r.from + bytes;
  r.name = name;
  r.access = access;
  r.cells =
      access == Access::Read ? nullptr : static_cast<Cell*>(reserve((bytes / kGranule + 8) * sizeof(Cell)));
  if (access == Access::Write && bytes < (size_t(1) << 28))
    std::memset(reinterpret_cast<void*>(r.from), 0xff, bytes);
  regions.insert(std::upper_bound(regions.begin(), regions.end(), r.from,
                                  [](uintptr_t v, const Region& o) { return v < o.from; }),
                 r);
  return reinterpret_cast<void*>(r.from);
}

void release(void* p) {
  for (size_t i = 0; i < regions.size(); i++) {
    Region& r = regions[i];
    if (r.from != reinterpret_cast<uintptr_t>(p)) continue;
    if (r.cells) munmap(r.cells, ((r.to - r.from) / kGranule + 8) * sizeof(Cell));
#if defined(__SANITIZE_ADDRESS__)
    free(r.memory);
#else
    munmap(static_cast<unsigned char*>(r.memory) - (1 << 16),
           r.to - reinterpret_cast<uintptr_t>(r.memory) + (2 << 16));
#endif
    regions.erase(regions.begin() + long(i));
    return;
  }
}

// a launch begins: earlier marks are history, what was written stays written
void new_era(size_t slots) {
  if (++era == 0) era = 1;
  readers.clear();
  if (slots > smem_slots) {
    smem_arena = static_cast<unsigned char*>(reserve(slots * kSmemStride));
    smem_cells = static_cast<Cell*>(reserve(slots * (kSmemStride / kGranule) * sizeof(Cell)));
    smem_slots = slots;
  }
}

unsigned char* new_smem(unsigned slot, size_t bytes) {
  unsigned char* base = smem_arena + slot * kSmemStride + kSmemBase;
  std::memset(base, 0xff, bytes);
  Cell* cells = smem_cells + (base - smem_arena) / kGranule;
  for (size_t i = 0; i < bytes / kGranule + 1; i++) {
    if (cells[i].flags & kMany) readers.erase(&cells[i]);
    cells[i] = Cell{};
  }
  return base;
}

void mark_barrier(const void* p, bool is) {
  Cell* cells = smem_cells + (static_cast<const unsigned char*>(p) - smem_arena) / kGranule;
  for (int i = 0; i < 4; i++)
    cells[i].flags = is ? kBarrier : 0, cells[i].era = era, cells[i].write_clock = cells[i].read_clock = 0;
}

Actor thread_actor(const Thread& t) {
  return {&t.view,       nullptr, t.dim, t.start, {t.own_proxied[0], t.own_proxied[1]}, Epoch{t.dim, t.own},
          Proxy::Generic};
}

Actor async_actor(const Thread& issuer, Epoch mark) {
  return {
      &issuer.view, &issuer.freed, issuer.dim, issuer.start, {issuer.own_proxied[0], issuer.own_proxied[1]},
      mark,         Proxy::Async};
}

Cta* cta_of(const void* p) {
  const auto* c = static_cast<const unsigned char*>(p);
  if (!smem_arena || c < smem_arena || c >= smem_arena + smem_slots * kSmemStride) return nullptr;
  const size_t slot = size_t(c - smem_arena) / kSmemStride;
  return slot < machine->ctas.size() ? machine->ctas[slot].get() : nullptr;
}

bool in_smem(const Cta& cta, const void* p, size_t bytes) {
  const auto* c = static_cast<const unsigned char*>(p);
  return c >= cta.smem && c + bytes <= cta.smem + machine->launch.smem;
}

std::string name_of(const void* p) {
  const auto* c = static_cast<const unsigned char*>(p);
  if (Cta* cta = cta_of(p)) {
    const bool own = machine->current && machine->current->cta == cta;
    return "shared memory +" + std::to_string(c - cta->smem) +
           (own ? "" : " of CTA rank " + std::to_string(cta->rank));
  }
  if (Region* r = region_of(reinterpret_cast<uintptr_t>(p)))
    return r->name + " +" + std::to_string(reinterpret_cast<uintptr_t>(p) - r->from) + " bytes";
  for (const auto& r : regions) {
    const auto a = reinterpret_cast<uintptr_t>(p);
    if (a >= r.to && a < r.to + (1 << 16))
      return std::to_string(a - r.to) + " bytes past the end of " + r.name;
    if (a < r.from && a + (1 << 16) > r.from) return std::to_string(r.from - a) + " bytes before " + r.name;
  }
  return "an address that is no memory of the kernel";
}

void check_smem(const Cta& cta, const void* p, size_t bytes, size_t alignment, const char* what) {
  if (!in_smem(cta, p, bytes))
    fail("bounds", "%s: %zu bytes at %s are outside shared memory (%zu bytes of dynamic shared memory)", what,
         bytes, name_of(p).c_str(), machine->launch.smem);
  const size_t address = size_t(static_cast<const unsigned char*>(p) - cta.smem) + kSmemBase;
  if (address % alignment)
    fail("alignment", "%s: %s is not a multiple of %zu", what, name_of(p).c_str(), alignment);
}

void touch(const Actor& who, const void* p, size_t bytes, Kind kind, const char* what, const void* pc) {
  if (!bytes) return;
  const auto* c = static_cast<const unsigned char*>(p);
  if (Cta* cta = cta_of(p)) {
    if (!in_smem(*cta, p, bytes))
      fail("bounds", "%s touches %s, outside its %zu bytes%s%s", what, name_of(p).c_str(),
           machine->launch.smem, pc ? ", at " : "", pc ? line_of(pc).c_str() : "");
    touch_cells(who, nullptr, smem_cells + (c - smem_arena) / kGranule, c, bytes, kind, 0, what, pc);
    return;
  }
  Region* r = region_of(reinterpret_cast<uintptr_t>(p));
  if (!r || reinterpret_cast<uintptr_t>(p) + bytes > r->to)
    fail("bounds", "%s touches %zu bytes at %s, %s%s%s", what, bytes, name_of(p).c_str(),
         r ? "over its end" : "out of bounds", pc ? ", at " : "", pc ? line_of(pc).c_str() : "");
  if (r->access == Access::Read) {
    if (kind != Kind::Read && kind != Kind::AtomicRead)
      fail("bounds", "%s writes %s, which is read-only%s%s", what, name_of(p).c_str(), pc ? ", at " : "",
           pc ? line_of(pc).c_str() : "");
    return;
  }
  touch_cells(who, r, r->cells + (reinterpret_cast<uintptr_t>(p) - r->from) / kGranule, c, bytes, kind, 1,
              what, pc);
}

}  // namespace emu
