// Calls that a whole warp makes together: shuffles, votes, ldmatrix, mma.sync.
#include <algorithm>

#include "machine.h"

namespace emu {
namespace {

WarpCall& find_call(Thread& t, const char* name, uint32_t mask, int tag) {
  if (!(mask >> t.lane & 1u))
    fail("divergence", "%s: the mask %08x does not have the calling lane %d", name, mask, t.lane);
  for (auto& c : t.warp->calls) {
    if (!c.come || !(c.mask & mask)) continue;
    if (c.mask == mask && c.tag == tag && c.name == name && !(c.come >> t.lane & 1u)) return c;
    if (c.mask == mask && (c.come >> t.lane & 1u)) continue;
    fail("divergence",
         "lane %d calls %s with mask %08x while lanes %08x of its warp wait in %s with mask %08x", t.lane,
         name, mask, c.come, c.name, c.mask);
  }
  for (auto& c : t.warp->calls)
    if (!c.come && c.waiting.empty()) {
      c.name = name, c.mask = mask, c.tag = tag;
      return c;
    }
  t.warp->calls.emplace_back();
  WarpCall& c = t.warp->calls.back();
  c.name = name, c.mask = mask, c.tag = tag;
  return c;
}

uint32_t present(const Thread& t) {
  uint32_t lanes = 0;
  for (int i = 0; i < 32; i++)
    if (t.warp->lanes[i] && t.warp->lanes[i]->wait != Wait::Done) lanes |= 1u << i;
  return lanes;
}

}  // namespace

void warp_collective(const char* name,
                     uint32_t mask,
                     int tag,
                     const void* in,
                     size_t in_bytes,
                     void* out,
                     size_t out_bytes,
                     WarpBody all,
                     bool orders) {
  Thread& t = me();
  t.polled = nullptr;
  if (mask & ~present(t)) {
    uint32_t whole = 0;
    for (int i = 0; i < 32; i++) whole |= uint32_t(t.warp->lanes[i] != nullptr) << i;
    if (mask & whole & ~present(t))
      fail("divergence", "%s waits for lanes %08x of its warp that have ended", name,
           mask & whole & ~present(t));
    if (mask & ~whole)
      fail("divergence", "%s names lanes %08x that the CTA does not have", name, mask & ~whole);
  }
  WarpCall& c = find_call(t, name, mask, tag);
  std::memcpy(c.in[t.lane], in, in_bytes);
  if (orders) publish(c.messages);
  c.come |= 1u << t.lane;
  if (c.come == mask) {
    if (all) all(c);
    if (orders) {
      const View v = c.messages.result();
      c.messages.clear();
      for (int i = 0; i < 32; i++)
        if (mask >> i & 1u) t.warp->lanes[i]->view = join(t.warp->lanes[i]->view, v);
    }
    // each of the others takes its answer now: the call can be used again before it runs
    for (Thread* other : c.waiting)
      if (out_bytes) std::memcpy(const_cast<void*>(other->where), c.out[other->lane], out_bytes);
    wake_all(c.waiting);
    c.come = 0;
    if (out_bytes) std::memcpy(out, c.out[t.lane], out_bytes);
    made_progress();
    return;
  }
  c.waiting.push_back(&t);
  sleep_on(Wait::Warp, name, out);
}

void sync_warp(uint32_t mask) {
  MOLE_ENTER;
  char nothing = 0;
  warp_collective("__syncwarp", mask, 0, &nothing, 0, &nothing, 0, nullptr, true);
}

uint32_t shuffle(uint32_t mask, uint32_t v, int how, int operand) {
  MOLE_ENTER;
  const uint64_t in[2] = {v, uint64_t(operand)};
  uint64_t out[1];
  warp_collective("a shuffle", mask, how, in, sizeof in, out, sizeof out, [](WarpCall& c) {
    for (int l = 0; l < 32; l++) {
      if (!(c.mask >> l & 1u)) continue;
      const int o = int(c.in[l][1]);
      int from = c.tag == 0 ? o & 31 : c.tag == 1 ? l ^ o : c.tag == 2 ? l + o : l - o;
      if (from < 0 || from > 31) from = l;
      if (!(c.mask >> from & 1u))
        fail("divergence", "a shuffle reads lane %d, which its mask %08x does not have", from, c.mask);
      c.out[l][0] = c.in[from][0];
    }
  });
  return uint32_t(out[0]);
}

uint32_t ballot(uint32_t mask, bool predicate) {
  MOLE_ENTER;
  const uint64_t in[1] = {predicate};
  uint64_t out[1];
  warp_collective("a vote", mask, 0, in, sizeof in, out, sizeof out, [](WarpCall& c) {
    uint64_t votes = 0;
    for (int l = 0; l < 32; l++)
      if (c.mask >> l & 1u) votes |= c.in[l][0] << l;
    for (auto& o : c.out) o[0] = votes;
  });
  return uint32_t(out[0]);
}

// one lane of the warp, the same throughout a launch, another under another seed
bool elect_one() {
  MOLE_ENTER;
  const Thread& t = me();
  uint64_t mix = (machine->launch.seed + 1) * 0x9e3779b97f4a7c15ull + t.number / 32 * 0xff51afd7ed558ccdull;
  const int chosen = machine->launch.seed ? int((mix ^ mix >> 29) % 32) : 0;
  char nothing = 0;
  warp_collective("elect_one", 0xffffffffu, 0, &nothing, 0, &nothing, 0, nullptr);
  return t.lane == chosen;
}

// ---- fragments. PTX ISA, "Matrix fragments for mma.m16n8k16", "ldmatrix"

void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, Element type) {
  MOLE_ENTER;
  struct Lane {
    uint16_t a[8], b[4];
    float d[4];
  } lane;
  static_assert(sizeof(Lane) <= 48);
  std::memcpy(lane.a, a, 16), std::memcpy(lane.b, b, 8), std::memcpy(lane.d, d, 16);
  float answer[4];
  warp_collective("mma_m16n8k16", 0xffffffffu, type, &lane, sizeof lane, answer, sizeof answer,
                  [](WarpCall& c) {
                    const auto decode = c.tag == kBf16 ? bf16_to_float : fp16_to_float;
                    double x[16][16], y[16][8];
                    for (int l = 0; l < 32; l++) {
                      Lane v;
                      std::memcpy(&v, c.in[l], sizeof v);
                      const int g = l / 4, q = l % 4;
                      for (int i = 0; i < 8; i++)
                        x[g + (i / 2 % 2) * 8][2 * q + i % 2 + (i / 4) * 8] = decode(v.a[i]);
                      for (int i = 0; i < 4; i++) y[2 * q + i % 2 + (i / 2) * 8][g] = decode(v.b[i]);
                    }
                    for (int l = 0; l < 32; l++) {
                      Lane v;
                      std::memcpy(&v, c.in[l], sizeof v);
                      const int g = l / 4, q = l % 4;
                      for (int i = 0; i < 4; i++) {
                        double s = v.d[i];
                        for (int k = 0; k < 16; k++) s += x[g + (i / 2) * 8][k] * y[k][2 * q + i % 2];
                        v.d[i] = float(s);
                      }
                      std::memcpy(c.out[l], v.d, sizeof v.d);
                    }
                  });
  std::memcpy(d, answer, sizeof answer);
}

namespace {

struct Row {
  uint16_t v[8];
};

}  // namespace

void ldmatrix(uint32_t* r, int matrices, const void* row, bool transposed) {
  MOLE_ENTER;
  Thread& t = me();
  Row mine{};
  if (t.lane < 8 * matrices) {
    check_smem(*t.cta, row, 16, 16, "ldmatrix");
    touch(thread_actor(t), row, 16, Kind::Read, "ldmatrix", t.pc);
    std::memcpy(&mine, row, 16);
  }
  uint32_t answer[4];
  warp_collective("ldmatrix", 0xffffffffu, matrices * 2 + transposed, &mine, sizeof mine, answer,
                  sizeof answer, [](WarpCall& c) {
                    for (int l = 0; l < 32; l++) {
                      uint16_t v[8] = {};
                      for (int m = 0; m < c.tag / 2; m++)
                        for (int i = 0; i < 2; i++) {
                          const int line = c.tag % 2 ? l % 4 * 2 + i : l / 4,
                                    element = c.tag % 2 ? l / 4 : l % 4 * 2 + i;
                          Row source;
                          std::memcpy(&source, c.in[m * 8 + line], sizeof source);
                          v[m * 2 + i] = source.v[element];
                        }
                      std::memcpy(c.out[l], v, sizeof v);
                    }
                  });
  std::memcpy(r, answer, size_t(matrices) * 4);
}

void stmatrix(void* row, const uint32_t* r, int matrices, bool transposed) {
  MOLE_ENTER;
  Thread& t = me();
  uint32_t mine[4] = {};
  std::memcpy(mine, r, size_t(matrices) * 4);
  Row answer;
  warp_collective("stmatrix", 0xffffffffu, matrices * 2 + transposed, mine, sizeof mine, &answer,
                  sizeof answer, [](WarpCall& c) {
                    for (int to = 0; to < 8 * (c.tag / 2); to++) {
                      Row line;
                      for (int e = 0; e < 8; e++) {
                        const int held_row = c.tag % 2 ? e : to % 8, held_column = c.tag % 2 ? to % 8 : e;
                        uint16_t v[8];
                        std::memcpy(v, c.in[held_row * 4 + held_column / 2], sizeof v);
                        line.v[e] = v[to / 8 * 2 + held_column % 2];
                      }
                      std::memcpy(c.out[to], &line, sizeof line);
                    }
                  });
  if (t.lane >= 8 * matrices) return;
  check_smem(*t.cta, row, 16, 16, "stmatrix");
  touch(thread_actor(t), row, 16, Kind::Write, "stmatrix", t.pc);
  std::memcpy(row, &answer, 16);
}

}  // namespace emu
