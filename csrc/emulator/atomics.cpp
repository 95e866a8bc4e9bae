// Flags and counters between CTAs, fences, plain shared addresses, a peer's shared memory.
#include "machine.h"

namespace emu {
namespace {

Flag& flag_at(const void* p, Kind kind, const char* what) {
  Thread& t = me();
  if (reinterpret_cast<uintptr_t>(p) % 4)
    fail("alignment", "%s at %s, whose address is not a multiple of 4", what, name_of(p).c_str());
  touch(thread_actor(t), p, 4, kind, what, t.pc);
  return machine->flags[p];
}

// what a store of this order tells whoever acquires it
View told(Order order) {
  Thread& t = me();
  Messages m;
  if (order == kRelease || order == kAcqRel) {
    publish(m);
  } else if (t.fence_own) {
    m.add(t.fence, t.dim, t.fence_own, t.fence_proxied);
  }
  return m.result();
}

void hear(const Flag& f, Order order) {
  Thread& t = me();
  if (order == kAcquire || order == kAcqRel)
    learn(f.view);
  else
    t.heard = join(t.heard, f.view);
}

void changed(Flag& f) {
  f.version++;
  wake_all(f.waiting);
  made_progress();
  maybe_yield();
}

template <class T, class Change>
T update(T* p, Order order, const char* what, Change change) {
  Flag& f = flag_at(p, Kind::Atomic, what);
  const T old = *p;
  *p = change(old);
  hear(f, order);
  f.view = join(f.view, told(order));
  changed(f);
  return old;
}

}  // namespace

uint32_t atomic_load(const uint32_t* p, Order order) {
  MOLE_ENTER;
  Thread& t = me();
  Flag* f = &flag_at(p, Kind::AtomicRead, "an atomic load");
  if (t.polled == p && t.polled_version == f->version) {
    f->waiting.push_back(&t);
    sleep_on(Wait::Poll, "the same flag, unchanged", p);
    f = &flag_at(p, Kind::AtomicRead, "an atomic load");
  }
  t.polled = p, t.polled_version = f->version;
  hear(*f, order);
  return *p;
}

void atomic_store(uint32_t* p, uint32_t v, Order order) {
  MOLE_ENTER;
  Flag& f = flag_at(p, Kind::Atomic, "an atomic store");
  *p = v;
  f.view = told(order);
  changed(f);
}

uint32_t atomic_add(uint32_t* p, uint32_t v, Order order) {
  MOLE_ENTER;
  return update(p, order, "an atomic add", [v](uint32_t old) { return old + v; });
}

float atomic_add(float* p, float v, Order order) {
  MOLE_ENTER;
  return update(p, order, "an atomic add", [v](float old) { return old + v; });
}

uint32_t atomic_cas(uint32_t* p, uint32_t expected, uint32_t desired, Order order) {
  MOLE_ENTER;
  return update(p, order, "an atomic compare and swap",
                [=](uint32_t old) { return old == expected ? desired : old; });
}

void thread_fence() {
  MOLE_ENTER;
  Thread& t = me();
  t.view = join(t.view, t.heard);
  t.fence = t.view, t.fence_own = t.own;
  for (int i = 0; i < 2; i++) t.fence_proxied[i] = t.own_proxied[i];
  t.own++;
}

void fence_proxy_async(int spaces) {
  MOLE_ENTER;
  Thread& t = me();
  for (int i = 0; i < 2; i++)
    if (spaces >> i & 1) t.view.proxied[i] = t.view.seen, t.own_proxied[i] = t.own;
  t.own++;
  if (!(spaces & kShared)) return;
  for (auto* bar : t.unfenced)
    if (auto i = t.cta->mbarriers.find(bar); i != t.cta->mbarriers.end()) i->second.fenced = true;
}

uint4 load16(const void* p) {
  MOLE_ENTER;
  Thread& t = me();
  if (reinterpret_cast<uintptr_t>(p) % 16)
    fail("alignment", "load16_readonly at %s, whose address is not a multiple of 16", name_of(p).c_str());
  touch(thread_actor(t), p, 16, Kind::Read, "load16_readonly", t.pc);
  uint4 v;
  std::memcpy(&v, p, 16);
  return v;
}

// ---- shared memory, here and at the peers

unsigned char* dynamic_smem() { return machine->current->cta->smem; }

uint32_t smem_address(const void* p) {
  MOLE_ENTER;
  const Cta& cta = *me().cta;
  const ptrdiff_t offset = static_cast<const unsigned char*>(p) - cta.smem;
  if (offset < 0 || size_t(offset) > machine->launch.smem)
    fail("bounds", "the shared address of %s, which is not this CTA's shared memory", name_of(p).c_str());
  return uint32_t(size_t(offset) + kSmemBase);
}

// the shared::cluster window: the CTA's rank above 24 bits of address, as a number that is never a valid
// local address
uint32_t cluster_map(const void* p, uint32_t rank) {
  const bool was = std::exchange(machine->inside, true);
  if (rank >= machine->cluster_ctas)
    fail("bounds", "cluster_map to rank %u of a cluster of %u", rank, machine->cluster_ctas);
  const Cta& cta = *me().cta;
  const ptrdiff_t offset = static_cast<const unsigned char*>(p) - cta.smem;
  if (offset < 0 || size_t(offset) > machine->launch.smem)
    fail("bounds", "cluster_map of %s, which is not this CTA's shared memory", name_of(p).c_str());
  machine->inside = was;
  return (rank + 1) << 24 | uint32_t(size_t(offset) + kSmemBase);
}

unsigned char* resolve(uint32_t address, size_t bytes, Cta** cta, const char* what) {
  Thread& t = me();
  const uint32_t window = address >> 24, offset = address & 0xffffffu;
  if (window > machine->cluster_ctas)
    fail("bounds", "%s: %08x is no address of the cluster's shared memory", what, address);
  *cta = window ? t.cta->cluster->ctas[window - 1] : t.cta;
  if (offset < kSmemBase || offset - kSmemBase + bytes > machine->launch.smem)
    fail("bounds", "%s: %zu bytes at +%d of rank %u are outside shared memory (%zu bytes)", what, bytes,
         int(offset) - int(kSmemBase), (*cta)->rank, machine->launch.smem);
  if ((*cta)->gone) fail("exit", "%s: CTA rank %u has ended", what, (*cta)->rank);
  return (*cta)->smem + (offset - kSmemBase);
}

// remember what is done to a CTA's shared memory from outside its threads: its end must come after that
void visit(Cta& cta, Epoch mark, const char* what) {
  if (cta.gone) fail("exit", "%s: CTA rank %u has ended", what, cta.rank);
  if (mark.dim >= machine->threads.size() || machine->threads[mark.dim]->cta != &cta)
    cta.visits[mark.dim] = {mark.clock, what};
}

static unsigned char* peer(uint32_t address, int bytes, Kind kind, const char* what) {
  Thread& t = me();
  Cta* cta = nullptr;
  unsigned char* p = resolve(address, size_t(bytes), &cta, what);
  if (address % unsigned(bytes)) fail("alignment", "%s of %d bytes at %s", what, bytes, name_of(p).c_str());
  visit(*cta, Epoch{t.dim, t.own}, what);
  touch(thread_actor(t), p, size_t(bytes), kind, what, t.pc);
  return p;
}

void st_cluster(uint32_t address, const void* v, int bytes) {
  MOLE_ENTER;
  std::memcpy(peer(address, bytes, Kind::Write, "st_cluster"), v, size_t(bytes));
}

void ld_cluster(uint32_t address, void* v, int bytes) {
  MOLE_ENTER;
  std::memcpy(v, peer(address, bytes, Kind::Read, "ld_cluster"), size_t(bytes));
}

void st_async(uint32_t address, const void* v, int bytes, uint32_t bar) {
  MOLE_ENTER;
  const Thread& t = me();
  Cta *cta = nullptr, *bar_cta = nullptr;
  unsigned char* p = resolve(address, size_t(bytes), &cta, "st_async");
  const unsigned char* b = resolve(bar, 8, &bar_cta, "st_async");
  if (address % unsigned(bytes)) fail("alignment", "st_async of %d bytes at %s", bytes, name_of(p).c_str());
  if (cta != bar_cta)
    fail("mbarrier", "st_async: its destination is in CTA rank %u, its mbarrier in rank %u", cta->rank,
         bar_cta->rank);
  barrier_for_copy(b, uint64_t(bytes), "st_async");
  // not the barrier's own actor: what TMA wrote is known to both proxies, what this writes is not
  const uint32_t dim = actor_for(b + 4, "a st.async counted in the mbarrier that has ", true);
  const Epoch mark{dim, tick(dim)};
  visit(*cta, mark, "st_async");
  Actor who = async_actor(t, mark);
  who.proxy = Proxy::Generic;
  touch(who, p, size_t(bytes), Kind::Write, "st_async", t.pc);
  uint4 value{};
  std::memcpy(&value, v, size_t(bytes));
  std::memset(p, 0xff, size_t(bytes));
  add_operation([=] {
    std::memcpy(p, &value, size_t(bytes));
    complete_bytes(b, uint32_t(bytes), mark, false);
  });
}

}  // namespace emu
