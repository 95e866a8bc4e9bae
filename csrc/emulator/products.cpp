// wgmma: what 128 threads issue is executed as one product, later, in order.
#include "machine.h"

namespace emu {
namespace {

struct Pieces {
  int count = 0;
  unsigned char* at[128 + 512];  // a: 64 rows, b: 256
};

struct Layout {
  uint32_t start, leading, stride, swizzle;  // bytes
};

Layout read_descriptor(uint64_t d) {
  static const uint32_t widths[4] = {0, 128, 64, 32};
  const Layout l{uint32_t(d & 0x3fff) << 4, uint32_t(d >> 16 & 0x3fff) << 4, uint32_t(d >> 32 & 0x3fff) << 4,
                 widths[d >> 62]};
  if (d >> 49 & 7)
    fail("descriptor", "a wgmma descriptor with base offset %u: expected 0", unsigned(d >> 49 & 7));
  if (l.swizzle && (l.start >> 7 & (l.swizzle / 16 - 1)))
    fail("descriptor",
         "a wgmma operand at shared address %u does not begin where its %u-byte swizzle pattern does (a "
         "multiple of %u)",
         l.start, l.swizzle, 8 * l.swizzle);
  return l;
}

// addresses of the 16-byte pieces of an operand of `rows` rows (M or N) and 16 columns (K). K-major: piece
// 2·row + k/8, eight of K. MN-major: piece k·rows/8 + row/8, eight rows. PTX ISA, "Strides", "Shared memory
// matrix layout"
void find_pieces(
    const Cta& cta, uint64_t descriptor, int rows, bool mn_major, Pieces& out, const char* which) {
  const Layout l = read_descriptor(descriptor);
  const auto put = [&](uint32_t address) {
    if (l.swizzle) address ^= (address >> 7 & (l.swizzle / 16 - 1)) << 4;
    unsigned char* p = cta.smem + (int64_t(address) - int64_t(kSmemBase));
    if (!in_smem(cta, p, 16))
      fail("bounds", "wgmma reads operand %s at +%d, outside shared memory (%zu bytes)", which,
           int(address) - int(kSmemBase), machine->launch.smem);
    out.at[out.count++] = p;
  };
  if (!mn_major) {
    for (uint32_t r = 0; r < uint32_t(rows); r++)
      for (uint32_t h = 0; h < 2; h++)
        put(l.start + r / 8 * l.stride +
            (l.swizzle ? r % 8 * l.swizzle + h * 16 : r % 8 * 16 + h * l.leading));
    return;
  }
  const uint32_t wide = l.swizzle / 16;
  for (uint32_t k = 0; k < 16; k++)
    for (uint32_t c = 0; c < uint32_t(rows) / 8; c++)
      put(l.swizzle ? l.start + c % wide * 16 + c / wide * l.leading + k % 8 * l.swizzle + k / 8 * l.stride
                    : l.start + c * l.stride + k % 8 * 16 + k / 8 * l.leading);
}

float decode(Element type, uint16_t v) { return type == kBf16 ? bf16_to_float(v) : fp16_to_float(v); }

// operand -> x[k][row]
void gather(const Pieces& pieces, int rows, bool mn_major, Element type, double (*x)[256]) {
  for (int i = 0; i < pieces.count; i++) {
    uint16_t v[8];
    std::memcpy(v, pieces.at[i], 16);
    for (int e = 0; e < 8; e++) {
      const int row = mn_major ? i % (rows / 8) * 8 + e : i / 2,
                k = mn_major ? i / (rows / 8) : i % 2 * 8 + e;
      x[k][row] = decode(type, v[e]);
    }
  }
}

void gather_registers(const Product& p, double (*x)[256]) {
  for (int t = 0; t < 128; t++) {
    uint16_t v[8];
    std::memcpy(v, p.fragment[t], 16);
    const int g = t % 32 / 4, q = t % 4;
    for (int i = 0; i < 8; i++)
      x[2 * q + i % 2 + i / 4 * 8][t / 32 * 16 + g + i / 2 % 2 * 8] = decode(p.type, v[i]);
  }
}

size_t index_of(const Warpgroup& g, const Cta& cta) { return size_t(&g - cta.groups.data()); }

void name_actor(Warpgroup& g, const Cta& cta) {
  if (g.clock0 || g.issued) return;
  g.dim = actor_for(cta.smem + 1 + 2 * index_of(g, cta), "a wgmma");
  g.clock0 = clock_of(g.dim);
}

// all 128 threads have come: the operands are being read from now on
void issue(Warpgroup& g, const Cta& cta, Product& p) {
  name_actor(g, cta);
  const Epoch mark{g.dim, tick(g.dim)};
  g.issued++;
  Pieces pieces;
  if (!p.a_registers) find_pieces(cta, p.a, 64, p.a_mn, pieces, "a");
  find_pieces(cta, p.b, p.n, p.b_mn, pieces, "b");
  for (const View& v : p.views) {
    const Actor who{&v, nullptr, ~0u, 0, {0, 0}, mark, Proxy::Async};
    for (int i = 0; i < pieces.count; i++) touch(who, pieces.at[i], 16, Kind::Read, "wgmma", me().pc);
  }
  machine->products.push_back(&g);
}

bool same(const Product& p,
          int n,
          Element type,
          uint64_t a,
          bool a_mn,
          bool a_registers,
          uint64_t b,
          bool b_mn,
          bool accumulate) {
  return p.n == n && p.type == type && p.a == a && p.a_mn == a_mn && p.a_registers == a_registers &&
         p.b == b && p.b_mn == b_mn && p.accumulate == accumulate;
}

bool was_written(const Thread& t, const void* p, size_t bytes) {
  const size_t from = (reinterpret_cast<uintptr_t>(p) - reinterpret_cast<uintptr_t>(t.stack)) / 4;
  if (from >= kStack / 4) return false;
  for (size_t i = from; i < from + bytes / 4; i++)
    if (t.written[i / 64] >> (i % 64) & 1) return true;
  return false;
}

void use_accumulators(Thread& t, const float* d, int n) {
  const auto from = reinterpret_cast<uintptr_t>(d), to = from + size_t(n) * 2;
  if (!t.wgmma_fenced) fail("wgmma", "%s: its first wgmma comes without a wgmma_fence", describe(t).c_str());
  if (was_written(t, d, size_t(n) * 2))
    fail("wgmma", "%s wrote accumulators after the last wgmma_fence", describe(t).c_str());
  for (auto& r : t.in_flight)
    if (r.from == from && r.to == to) {
      r.until = t.wgmma_next;
      return;
    }
  for (auto& r : t.in_flight)
    if (from < r.to && to > r.from)
      fail("wgmma", "%s uses part of the accumulators of another shape's wgmma in flight",
           describe(t).c_str());
  t.in_flight.push_back({from, to, t.wgmma_next});
}

}  // namespace

void wgmma_fence() {
  MOLE_ENTER;
  Thread& t = me();
  t.wgmma_fenced = true;
  for (size_t i = t.written_from; i < t.written_to; i++) t.written[i] = 0;
  t.written_from = ~size_t(0), t.written_to = 0;
}

void wgmma(float* d,
           int n,
           Element type,
           uint64_t a,
           bool a_mn,
           const uint32_t* a_registers,
           uint64_t b,
           bool b_mn,
           bool accumulate) {
  MOLE_ENTER;
  Thread& t = me();
  Warpgroup& g = *t.group;
  const size_t first = index_of(g, *t.cta) * 128;
  if (t.cta->threads.size() < first + 128)
    fail("divergence", "wgmma in a warpgroup of %zu threads", t.cta->threads.size() - first);
  const uint64_t i = t.wgmma_next++ - g.executed;
  if (i == g.products.size()) {
    g.products.push_back(std::make_unique<Product>());
    Product& p = *g.products.back();
    p.n = n, p.type = type, p.a = a, p.a_mn = a_mn, p.a_registers = a_registers != nullptr, p.b = b,
    p.b_mn = b_mn, p.accumulate = accumulate;
  }
  Product& p = *g.products[i];
  if (!same(p, n, type, a, a_mn, a_registers != nullptr, b, b_mn, accumulate))
    fail("divergence",
         "%s issues a wgmma (n=%d, descriptors %llx, %llx) that differs from its warpgroup's (n=%d, %llx, "
         "%llx)",
         describe(t).c_str(), n, static_cast<unsigned long long>(a), static_cast<unsigned long long>(b), p.n,
         static_cast<unsigned long long>(p.a), static_cast<unsigned long long>(p.b));
  use_accumulators(t, d, n);
  p.d[t.index - first] = d;
  if (a_registers) {
    if (was_written(t, a_registers, 16))
      fail("wgmma", "%s wrote a fragment of operand a after the last wgmma_fence", describe(t).c_str());
    std::memcpy(p.fragment[t.index - first], a_registers, 16);
  }
  bool known = false;
  for (const View& v : p.views)
    known |= v.seen.get() == t.view.seen.get() && v.proxied[0].get() == t.view.proxied[0].get();
  if (!known) p.views.push_back(t.view);
  if (++p.come == 128) issue(g, *t.cta, p);
}

// the oldest issued product of the i-th entry: d += a b
bool execute_product(size_t i) {
  Machine& m = *machine;
  Warpgroup& g = *m.products[i];
  m.products[i] = m.products.back();
  m.products.pop_back();
  const std::unique_ptr<Product> p = std::move(g.products.front());
  g.products.pop_front();
  g.executed++;
  static double a[16][256], b[16][256], c[256];
  const Cta& cta = *g.cta;
  Pieces pa, pb;
  if (p->a_registers) {
    gather_registers(*p, a);
  } else {
    find_pieces(cta, p->a, 64, p->a_mn, pa, "a");
    gather(pa, 64, p->a_mn, p->type, a);
  }
  find_pieces(cta, p->b, p->n, p->b_mn, pb, "b");
  gather(pb, p->n, p->b_mn, p->type, b);
  for (int row = 0; row < 64; row++) {
    for (int j = 0; j < p->n; j++) c[j] = 0;
    for (int k = 0; k < 16; k++)
      for (int j = 0; j < p->n; j++) c[j] += a[k][row] * b[k][j];
    const int warp = row / 16, half = row % 16 / 8, lane = row % 8 * 4;
    for (int j = 0; j < p->n; j++) {
      float& d = p->d[warp * 32 + lane + j % 8 / 2][j / 8 * 4 + half * 2 + j % 2];
      d = float((p->accumulate ? double(d) : 0.0) + c[j]);
    }
  }
  wake_all(g.waiting);
  made_progress();
  return true;
}

void wgmma_commit() {
  MOLE_ENTER;
  me().wgmma_groups.push_back(me().wgmma_next);
}

void wgmma_wait(int most) {
  MOLE_ENTER;
  Thread& t = me();
  Warpgroup& g = *t.group;
  uint64_t until = 0;
  while (t.wgmma_groups.size() > size_t(most)) {
    until = t.wgmma_groups.front();
    t.wgmma_groups.pop_front();
  }
  while (g.executed < until) {
    g.waiting.push_back(&t);
    sleep_on(Wait::Wgmma, "wgmma_wait", &g);
  }
  if (!until) return;
  if (g.done_until != until)
    g.done = with(ClockRef(), Epoch{g.dim, g.clock0 + uint32_t(until)}), g.done_until = until;
  t.view.seen = join(t.view.seen, g.done);
  std::erase_if(t.in_flight, [&](const Range& r) { return r.until <= until; });
}

}  // namespace emu
