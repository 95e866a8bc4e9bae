// Asynchronous copies: cp.async, tensor tiles and runs of bytes by TMA. Data moves when the scheduler says
// so.
#include <memory>

#include "machine.h"

namespace emu {
namespace {

constexpr uint32_t kMagic = 0x7e45044au;

const CUtensorMap& check_map(const CUtensorMap* map, int rank, const char* what) {
  if (map->magic != kMagic) fail("tma", "%s: this is no tensor map", what);
  if (int(map->rank) != rank)
    fail("tma", "%s: a tensor map of %u dimensions used as one of %d", what, map->rank, rank);
  return *map;
}

uint32_t box_bytes(const CUtensorMap& m) {
  uint32_t n = m.element_bytes;
  for (uint32_t i = 0; i < m.rank; i++) n *= m.box[i];
  return n;
}

// one row of a box in global memory: where it starts, and which of its bytes exist
struct Run {
  unsigned char* start;
  uint32_t skip, bytes;
};

Run run_of(const CUtensorMap& m, int x, int64_t y, int64_t z) {
  const bool outside =
      y < 0 || y >= int64_t(m.rank > 1 ? m.size[1] : 1) || z < 0 || z >= int64_t(m.rank > 2 ? m.size[2] : 1);
  const int64_t from = std::max<int64_t>(x, 0),
                to = std::min<int64_t>(int64_t(x) + m.box[0], int64_t(m.size[0]));
  if (outside || from >= to) return {nullptr, 0, 0};
  unsigned char* row =
      m.base + (m.rank > 1 ? uint64_t(y) * m.stride[1] : 0) + (m.rank > 2 ? uint64_t(z) * m.stride[2] : 0);
  return {row + uint64_t(from) * m.element_bytes, uint32_t(from - x) * m.element_bytes,
          uint32_t(to - from) * m.element_bytes};
}

// for each row of the box at (x, y, z): its index in the box, and its run in global memory
template <class F>
void for_rows(const CUtensorMap& m, int x, int y, int z, F f) {
  const uint32_t rows = m.rank > 1 ? m.box[1] : 1, planes = m.rank > 2 ? m.box[2] : 1;
  for (uint32_t p = 0; p < planes; p++)
    for (uint32_t r = 0; r < rows; r++) f(p * rows + r, run_of(m, x, int64_t(y) + r, int64_t(z) + p));
}

// 16 bytes number `piece` of the tile at `tile`, swizzled by address bits. PTX ISA, "Swizzling Modes"
unsigned char* piece_at(unsigned char* tile, uint32_t address, uint32_t piece, uint32_t swizzle) {
  const uint32_t plain = address + piece * 16;
  const uint32_t at = swizzle ? plain ^ (((plain >> 7) & (swizzle / 16 - 1)) << 4) : plain;
  return tile + int32_t(at - address);
}

void check_tile(const Cta& cta, const void* p, const CUtensorMap& m, const char* what) {
  check_smem(cta, p, box_bytes(m), m.swizzle_bytes ? 8 * m.swizzle_bytes : 128, what);
}

uint32_t local_address(const Cta& cta, const void* p) {
  return uint32_t(size_t(static_cast<const unsigned char*>(p) - cta.smem) + kSmemBase);
}

void load_into(Cta& cta, unsigned char* dst, const CUtensorMap m, unsigned char* bar, int x, int y, int z) {
  const Thread& t = me();
  const uint32_t bytes = box_bytes(m);
  check_tile(cta, dst, m, "tma_load");
  barrier_for_copy(bar, bytes, "tma_load");
  const uint32_t dim = barrier_at(bar, "tma_load").dim;
  const Epoch mark{dim, tick(dim)};
  visit(cta, mark, "tma_load");
  const Actor who = async_actor(t, mark);
  touch(who, dst, bytes, Kind::Write, "tma_load", t.pc);
  for_rows(m, x, y, z,
           [&](uint32_t, Run run) { touch(who, run.start, run.bytes, Kind::Read, "tma_load", t.pc); });
  std::memset(dst, 0xff, bytes);
  add_operation([=, address = local_address(cta, dst)] {
    const uint32_t row_bytes = m.box[0] * m.element_bytes;
    std::vector<unsigned char> row(row_bytes);
    for_rows(m, x, y, z, [&](uint32_t r, Run run) {
      std::fill(row.begin(), row.end(), static_cast<unsigned char>(0));
      if (run.bytes) std::memcpy(row.data() + run.skip, run.start, run.bytes);
      for (uint32_t c = 0; c < row_bytes / 16; c++)
        std::memcpy(piece_at(dst, address, r * (row_bytes / 16) + c, m.swizzle_bytes), row.data() + c * 16,
                    16);
    });
    complete_bytes(bar, bytes, mark, true);
  });
}

const char* bad_map(const void* base,
                    int rank,
                    const uint64_t* size,
                    const uint64_t* stride,
                    const uint32_t* box,
                    int swizzle,
                    int element) {
  if (reinterpret_cast<uintptr_t>(base) % 16) return "its address is not a multiple of 16";
  if (swizzle != 0 && swizzle != 32 && swizzle != 64 && swizzle != 128)
    return "its swizzle is none of 0, 32, 64, 128 bytes";
  for (int i = 0; i < rank; i++) {
    if (size[i] == 0 || size[i] > (uint64_t(1) << 32)) return "a size is not in 1…2^32";
    if (box[i] == 0 || box[i] > 256) return "a box side is not in 1…256";
  }
  for (int i = 1; i < rank; i++)
    if (stride[i] % 16 || stride[i] >= (uint64_t(1) << 40))
      return "a stride is not a multiple of 16 bytes below 2^40";
  if (box[0] * uint32_t(element) % 16) return "its box's rows are not a multiple of 16 bytes";
  if (swizzle && int(box[0]) * element > swizzle) return "its box's rows are wider than the swizzle";
  return nullptr;
}

CUtensorMap make_map(const void* base,
                     int rank,
                     const uint64_t* size,
                     const uint64_t* stride,
                     const uint32_t* box,
                     int swizzle,
                     int element) {
  if (const char* why = bad_map(base, rank, size, stride, box, swizzle, element))
    fail("tma", "a tensor map is refused: %s", why);
  CUtensorMap m{};
  m.base = const_cast<unsigned char*>(static_cast<const unsigned char*>(base));
  for (int i = 0; i < rank; i++) m.size[i] = size[i], m.stride[i] = stride[i], m.box[i] = box[i];
  m.rank = uint32_t(rank), m.element_bytes = uint32_t(element), m.swizzle_bytes = uint32_t(swizzle),
  m.magic = kMagic;
  return m;
}

Epoch bulk_mark(const Thread& t, int which) {
  const uint32_t dim = actor_for(reinterpret_cast<const void*>(uintptr_t(t.number) * 4 + 1 + unsigned(which)),
                                 which ? "a bulk store's write" : "a bulk store's reading of shared memory");
  return {dim, tick(dim)};
}

// issue an operation of the thread's open bulk group
void add_bulk(Thread& t, std::function<void()> op) {
  if (!t.bulk_open) t.bulk_open = std::make_shared<BulkGroup>();
  t.bulk_open->open++;
  t.bulk_open->clock++;
  add_operation([op = std::move(op), group = t.bulk_open] {
    op();
    group->open--;
  });
}

void wait_for(Thread& t, const BulkGroup& g) {
  while (g.open) {
    machine->polling.push_back(&t);
    sleep_on(Wait::Poll, "bulk_wait", nullptr);
  }
}

}  // namespace

CUtensorMap tensor_map_2d(const void* base,
                          uint64_t rows,
                          uint64_t columns,
                          uint32_t box_rows,
                          uint32_t box_columns,
                          int swizzle_bytes,
                          uint64_t row_stride,
                          int element_bytes) {
  const uint64_t size[2] = {columns, rows},
                 stride[2] = {uint64_t(element_bytes),
                              (row_stride ? row_stride : columns) * uint64_t(element_bytes)};
  const uint32_t box[2] = {box_columns, box_rows};
  return make_map(base, 2, size, stride, box, swizzle_bytes, element_bytes);
}

CUtensorMap tensor_map_3d(const void* base,
                          const uint64_t (&size)[3],
                          const uint64_t (&stride)[2],
                          const uint32_t (&box)[3],
                          int swizzle_bytes,
                          int element_bytes) {
  const uint64_t strides[3] = {uint64_t(element_bytes), stride[0], stride[1]};
  return make_map(base, 3, size, strides, box, swizzle_bytes, element_bytes);
}

void tma_prefetch(const CUtensorMap* map) {
  MOLE_ENTER;
  if (map->magic != kMagic) fail("tma", "tma_prefetch: this is no tensor map");
}

void tma_load(
    void* dst, const CUtensorMap* map, uint64_t* bar, int rank, int x, int y, int z, uint16_t ctas) {
  MOLE_ENTER;
  Thread& t = me();
  const CUtensorMap& m = check_map(map, rank, "tma_load");
  if (!ctas) {
    if (cta_of(bar) != t.cta || cta_of(dst) != t.cta)
      fail("bounds", "tma_load into memory or an mbarrier that is not this CTA's");
    load_into(*t.cta, static_cast<unsigned char*>(dst), m, reinterpret_cast<unsigned char*>(bar), x, y, z);
    return maybe_yield();
  }
  if (ctas >> machine->cluster_ctas)
    fail("bounds", "tma_load_multicast to CTAs %04x of a cluster of %u", ctas, machine->cluster_ctas);
  for (uint32_t r = 0; r < machine->cluster_ctas; r++) {
    if (!(ctas >> r & 1)) continue;
    Cta* cta = nullptr;
    unsigned char* to = resolve(cluster_map(dst, r), 1, &cta, "tma_load_multicast");
    load_into(*cta, to, m, resolve(cluster_map(bar, r), 8, &cta, "tma_load_multicast"), x, y, z);
  }
  maybe_yield();
}

void tma_store(const CUtensorMap* map, const void* src, int rank, int x, int y, int z) {
  MOLE_ENTER;
  Thread& t = me();
  const CUtensorMap m = check_map(map, rank, "tma_store");
  check_tile(*t.cta, src, m, "tma_store");
  const Actor reader = async_actor(t, bulk_mark(t, 0)), writer = async_actor(t, bulk_mark(t, 1));
  const auto* tile = static_cast<const unsigned char*>(src);
  const uint32_t address = local_address(*t.cta, src), row_bytes = m.box[0] * m.element_bytes;
  touch(reader, src, box_bytes(m), Kind::Read, "tma_store", t.pc);
  for_rows(m, x, y, z,
           [&](uint32_t, Run run) { touch(writer, run.start, run.bytes, Kind::Write, "tma_store", t.pc); });
  add_bulk(t, [=] {
    std::vector<unsigned char> row(row_bytes);
    for_rows(m, x, y, z, [&](uint32_t r, Run run) {
      for (uint32_t c = 0; c < row_bytes / 16; c++)
        std::memcpy(
            row.data() + c * 16,
            piece_at(const_cast<unsigned char*>(tile), address, r * (row_bytes / 16) + c, m.swizzle_bytes),
            16);
      if (run.bytes) std::memcpy(run.start, row.data() + run.skip, run.bytes);
    });
  });
  maybe_yield();
}

// ---- runs of bytes

static void check_run(const void* p, uint32_t bytes, const char* what) {
  if (bytes % 16 || reinterpret_cast<uintptr_t>(p) % 16)
    fail("alignment", "%s: %u bytes at %s: both must be multiples of 16", what, bytes, name_of(p).c_str());
}

void bulk_load(void* dst, const void* src, uint32_t bytes, uint64_t* bar) {
  MOLE_ENTER;
  Thread& t = me();
  check_smem(*t.cta, dst, bytes, 16, "bulk_load");
  check_run(src, bytes, "bulk_load");
  barrier_for_copy(bar, bytes, "bulk_load");
  const uint32_t dim = barrier_at(bar, "bulk_load").dim;
  const Epoch mark{dim, tick(dim)};
  visit(*t.cta, mark, "bulk_load");
  const Actor who = async_actor(t, mark);
  touch(who, dst, bytes, Kind::Write, "bulk_load", t.pc);
  touch(who, src, bytes, Kind::Read, "bulk_load", t.pc);
  std::memset(dst, 0xff, bytes);
  add_operation([=] {
    std::memcpy(dst, src, bytes);
    complete_bytes(bar, bytes, mark, true);
  });
  maybe_yield();
}

void bulk_store(void* dst, const void* src, uint32_t bytes) {
  MOLE_ENTER;
  Thread& t = me();
  check_smem(*t.cta, src, bytes, 16, "bulk_store");
  check_run(dst, bytes, "bulk_store");
  touch(async_actor(t, bulk_mark(t, 0)), src, bytes, Kind::Read, "bulk_store", t.pc);
  touch(async_actor(t, bulk_mark(t, 1)), dst, bytes, Kind::Write, "bulk_store", t.pc);
  add_bulk(t, [=] { std::memcpy(dst, src, bytes); });
  maybe_yield();
}

void bulk_copy_cluster(uint32_t dst, const void* src, uint32_t bytes, uint32_t bar) {
  MOLE_ENTER;
  Thread& t = me();
  Cta *cta = nullptr, *bar_cta = nullptr;
  unsigned char* to = resolve(dst, bytes, &cta, "bulk_copy_cluster");
  const unsigned char* b = resolve(bar, 8, &bar_cta, "bulk_copy_cluster");
  check_smem(*t.cta, src, bytes, 16, "bulk_copy_cluster");
  check_run(to, bytes, "bulk_copy_cluster");
  if (cta != bar_cta)
    fail("mbarrier", "bulk_copy_cluster: its destination is in CTA rank %u, its mbarrier in rank %u",
         cta->rank, bar_cta->rank);
  barrier_for_copy(b, bytes, "bulk_copy_cluster");
  const uint32_t dim = barrier_at(b, "bulk_copy_cluster").dim;
  const Epoch mark{dim, tick(dim)};
  visit(*cta, mark, "bulk_copy_cluster");
  visit(*t.cta, mark, "bulk_copy_cluster");
  const Actor who = async_actor(t, mark);
  touch(who, src, bytes, Kind::Read, "bulk_copy_cluster", t.pc);
  touch(who, to, bytes, Kind::Write, "bulk_copy_cluster", t.pc);
  std::memset(to, 0xff, bytes);
  add_operation([=] {
    std::memcpy(to, src, bytes);
    complete_bytes(b, bytes, mark, true);
  });
  maybe_yield();
}

void bulk_commit() {
  MOLE_ENTER;
  Thread& t = me();
  auto group = t.bulk_open ? std::move(t.bulk_open) : std::make_shared<BulkGroup>();
  t.bulk_open.reset();
  for (int which = 0; which < 2; which++) {
    const auto i =
        machine->actors.find(reinterpret_cast<const void*>(uintptr_t(t.number) * 4 + 1 + unsigned(which)));
    if (i != machine->actors.end()) group->mark[which] = {i->second, clock_of(i->second)};
  }
  t.bulk_groups.push_back(std::move(group));
}

void bulk_wait(int most, bool read) {
  MOLE_ENTER;
  Thread& t = me();
  const auto learn_mark = [&](Epoch e) {
    if (!e.clock) return;
    t.view.seen = with(t.view.seen, e);
    for (auto& p : t.view.proxied) p = with(p, e);
  };
  for (size_t i = 0; i + size_t(most) < t.bulk_groups.size(); i++) {
    wait_for(t, *t.bulk_groups[i]);
    t.bulk_groups[i]->read_known = true;
    learn_mark(t.bulk_groups[i]->mark[0]);
    if (!read) learn_mark(t.bulk_groups[i]->mark[1]);
  }
  while (!read && t.bulk_groups.size() > size_t(most)) t.bulk_groups.pop_front();
}

// ---- cp.async: ordinary accesses that another thread, as it were, makes later

static uint32_t copy_actor(const Thread& t) {
  return actor_for(reinterpret_cast<const void*>(uintptr_t(t.number) * 4 + 3), "a cp.async");
}

static void land(const std::vector<Copy>& copies) {
  for (const Copy& c : copies) {
    unsigned char v[16] = {};
    if (c.valid) std::memcpy(v, c.src, size_t(c.valid));
    std::memcpy(c.dst, v, 16);
  }
}

void cp_async_16(void* dst, const void* src, int valid) {
  MOLE_ENTER;
  Thread& t = me();
  check_smem(*t.cta, dst, 16, 16, "cp_async_16");
  if (valid < 0 || valid > 16) fail("bounds", "cp_async_16: %d bytes", valid);
  if (valid && reinterpret_cast<uintptr_t>(src) % 16)
    fail("alignment", "cp_async_16 from %s, whose address is not a multiple of 16", name_of(src).c_str());
  const uint32_t dim = copy_actor(t);
  Actor who = async_actor(t, Epoch{dim, tick(dim)});
  who.proxy = Proxy::Generic;
  touch(who, dst, 16, Kind::Write, "cp_async_16", t.pc);
  if (valid) touch(who, src, size_t(valid), Kind::Read, "cp_async_16", t.pc);
  std::memset(dst, 0xff, 16);
  t.copies.push_back({static_cast<unsigned char*>(dst), static_cast<const unsigned char*>(src), valid});
}

void cp_async_commit() {
  MOLE_ENTER;
  Thread& t = me();
  t.groups.push_back({std::exchange(t.copies, {}), clock_of(copy_actor(t))});
}

void cp_async_wait(int most) {
  MOLE_ENTER;
  Thread& t = me();
  while (t.groups.size() > size_t(most)) {
    land(t.groups.front().copies);
    if (t.groups.front().clock) t.view.seen = with(t.view.seen, Epoch{copy_actor(t), t.groups.front().clock});
    t.groups.pop_front();
  }
}

void mbarrier_arrive_after_cp_async(uint64_t* bar) {
  MOLE_ENTER;
  Thread& t = me();
  if (cta_of(bar) != t.cta)
    fail("bounds", "mbarrier_arrive_after_cp_async: %s is not this CTA's", name_of(bar).c_str());
  barrier_at(bar, "mbarrier_arrive_after_cp_async");
  auto all = std::make_shared<std::vector<Copy>>(std::move(t.copies));
  for (auto& g : t.groups) all->insert(all->end(), g.copies.begin(), g.copies.end());
  t.copies.clear(), t.groups.clear();
  const uint32_t dim = copy_actor(t);
  add_operation([all, bar, mark = Epoch{dim, clock_of(dim)}] {
    land(*all);
    arrive_for_copies(bar, mark);
  });
}

}  // namespace emu
