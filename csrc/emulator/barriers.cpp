// mbarriers, CTA barriers, the cluster's barrier, register budgets.
#include "machine.h"

namespace emu {
namespace {

void finish_phase(Mbarrier& b, const void* bar) {
  if (b.pending || b.bytes) {
    if (!b.pending && b.bytes < 0 && !b.in_flight)
      fail("transactions", "the mbarrier at %s saw %lld bytes more than it was told to expect in phase %llu",
           name_of(bar).c_str(), static_cast<long long>(-b.bytes), static_cast<unsigned long long>(b.phase));
    return;
  }
  b.phase++;
  b.pending = b.count;
  b.near_done = b.near.result(), b.far_done = b.far.result(), b.freed_done = b.freed.result();
  wake_all(b.waiting);
}

void check_bytes(const Mbarrier& b, const void* bar) {
  if (b.bytes >= (1 << 20) || b.bytes <= -(1 << 20))
    fail("transactions", "the mbarrier at %s expects %lld bytes: the count goes to 2^20-1",
         name_of(bar).c_str(), static_cast<long long>(b.bytes));
}

// what an arrival publishes: to whoever waits in its CTA, in the cluster, or for freed memory alone
enum class To { Near, Far, Freed };

void arrive(const void* bar, uint32_t count, int64_t bytes, To to) {
  Mbarrier& b = barrier_at(bar, to == To::Near ? "mbarrier_arrive" : "mbarrier_arrive_remote");
  if (b.pending < int64_t(count))
    fail("mbarrier",
         "an arrival too many at the mbarrier at %s: all %u of phase %llu have come, %lld bytes are still "
         "missing",
         name_of(bar).c_str(), b.count, static_cast<unsigned long long>(b.phase),
         static_cast<long long>(b.bytes));
  b.bytes += bytes;
  check_bytes(b, bar);
  b.pending -= count;
  publish(to == To::Far ? b.far : to == To::Freed ? b.freed : b.near);
  made_progress();
  finish_phase(b, bar);
}

const uint64_t* remote(uint64_t* bar, uint32_t rank, const char* what) {
  Cta* cta = nullptr;
  const auto* p = reinterpret_cast<const uint64_t*>(resolve(cluster_map(bar, rank), 8, &cta, what));
  visit(*cta, Epoch{me().dim, me().own}, what);
  return p;
}

}  // namespace

Mbarrier& barrier_at(const void* bar, const char* what) {
  Cta* cta = cta_of(bar);
  if (!cta || !in_smem(*cta, bar, 8))
    fail("bounds", "%s: there is no shared memory at %s", what, name_of(bar).c_str());
  if (reinterpret_cast<uintptr_t>(bar) % 8)
    fail("alignment", "%s: the mbarrier at %s is not 8-byte aligned", what, name_of(bar).c_str());
  auto i = cta->mbarriers.find(bar);
  if (i == cta->mbarriers.end())
    fail("mbarrier", "%s: %s is no initialised mbarrier", what, name_of(bar).c_str());
  Mbarrier& b = i->second;
  const Thread& t = me();
  if (b.maker != t.number && t.view.seen[b.born.dim] < b.born.clock)
    fail("race", "%s: the initialisation of the mbarrier at %s is not ordered before its use by %s", what,
         name_of(bar).c_str(), describe(t).c_str());
  if (cta != t.cta && !b.fenced)
    fail("proxy", "%s: the mbarrier at %s was initialised without fence_mbarrier_init", what,
         name_of(bar).c_str());
  return b;
}

void mbarrier_init(uint64_t* bar, uint32_t count) {
  MOLE_ENTER;
  Thread& t = me();
  check_smem(*t.cta, bar, 8, 8, "mbarrier_init");
  if (count == 0 || count >= (1u << 20))
    fail("mbarrier", "mbarrier_init: a count of %u at %s: expected 1…2^20-1", count, name_of(bar).c_str());
  if (t.cta->mbarriers.count(bar))
    fail("mbarrier", "mbarrier_init: %s is an mbarrier already (mbarrier_invalidate first)",
         name_of(bar).c_str());
  touch(thread_actor(t), bar, 8, Kind::Write, "mbarrier_init", t.pc);
  mark_barrier(bar, true);
  Mbarrier& b = t.cta->mbarriers[bar];
  b.count = count, b.pending = count, b.maker = t.number;
  b.dim = actor_for(bar, "an asynchronous copy counted at the mbarrier at ", true);
  b.born = {b.dim, tick(b.dim)};
  t.view.seen = with(t.view.seen, b.born);
  t.unfenced.push_back(bar);
}

void mbarrier_invalidate(uint64_t* bar) {
  MOLE_ENTER;
  Thread& t = me();
  const Mbarrier& b = barrier_at(bar, "mbarrier_invalidate");
  if (!b.waiting.empty() || b.in_flight)
    fail("mbarrier", "mbarrier_invalidate: %s is in use", name_of(bar).c_str());
  t.cta->mbarriers.erase(bar);
  mark_barrier(bar, false);
}

void fence_mbarrier_init() {
  MOLE_ENTER;
  Thread& t = me();
  for (auto* bar : t.unfenced) {
    Mbarrier& b = barrier_at(bar, "fence_mbarrier_init");
    b.fenced = true;
    t.fenced_inits = with(t.fenced_inits, b.born);
  }
  t.unfenced.clear();
}

void mbarrier_arrive(uint64_t* bar, uint32_t count) {
  MOLE_ENTER;
  if (cta_of(bar) != me().cta) fail("bounds", "mbarrier_arrive: %s is not this CTA's", name_of(bar).c_str());
  arrive(bar, count, 0, To::Near);
  maybe_yield();
}

void mbarrier_expect_tx(uint64_t* bar, uint32_t bytes) {
  MOLE_ENTER;
  Mbarrier& b = barrier_at(bar, "mbarrier_expect_tx");
  if (!b.pending)
    fail("mbarrier", "mbarrier_expect_tx at %s after all arrivals of phase %llu", name_of(bar).c_str(),
         static_cast<unsigned long long>(b.phase));
  b.bytes += bytes;
  check_bytes(b, bar);
}

void mbarrier_arrive_expect_tx(uint64_t* bar, uint32_t bytes) {
  MOLE_ENTER;
  if (cta_of(bar) != me().cta)
    fail("bounds", "mbarrier_arrive_expect_tx: %s is not this CTA's", name_of(bar).c_str());
  arrive(bar, 1, bytes, To::Near);
  maybe_yield();
}

void mbarrier_arrive_remote(uint64_t* bar, uint32_t rank) {
  MOLE_ENTER;
  const auto* there = remote(bar, rank, "mbarrier_arrive_remote");
  arrive(there, 1, 0, cta_of(there) != me().cta ? To::Far : To::Near);
  maybe_yield();
}

void mbarrier_arrive_freed(uint64_t* bar, uint32_t rank) {
  MOLE_ENTER;
  const auto* there = remote(bar, rank, "mbarrier_arrive_freed");
  // without a scope that reaches the peer, even where the peer is this CTA itself: one word, one meaning
  arrive(there, 1, 0, To::Freed);
  maybe_yield();
}

void mbarrier_arrive_expect_tx_remote(uint64_t* bar, uint32_t rank, uint32_t bytes) {
  MOLE_ENTER;
  const auto* there = remote(bar, rank, "mbarrier_arrive_expect_tx_remote");
  arrive(there, 1, bytes, cta_of(there) != me().cta ? To::Far : To::Near);
  maybe_yield();
}

bool mbarrier_try_wait(uint64_t* bar, uint32_t parity, Scope scope) {
  MOLE_ENTER;
  Thread& t = me();
  if (cta_of(bar) != t.cta)
    fail("bounds", "a wait at the mbarrier at %s, which is not this CTA's", name_of(bar).c_str());
  if (parity > 1)
    fail("mbarrier", "a wait for parity %u at %s: expected 0 or 1", parity, name_of(bar).c_str());
  for (int tries = 0; tries < 2; tries++) {
    Mbarrier& b = barrier_at(bar, "mbarrier_try_wait");
    if ((b.phase & 1) != parity) {
      learn(b.near_done);
      if (scope == kClusterScope) learn(b.far_done);
      if (scope == kFreed) t.freed = join(join(t.freed, b.far_done), b.freed_done);
      return true;
    }
    if (tries == 0) {
      b.waiting.push_back(&t);
      sleep_on(Wait::Mbarrier, "mbarrier_try_wait", bar, parity);
    }
  }
  return false;
}

void mbarrier_wait(uint64_t* bar, uint32_t parity, Scope scope) {
  const void* pc = __builtin_return_address(0);
  do {
    machine->current->pc = pc;
  } while (!mbarrier_try_wait(bar, parity, scope));
}

// bytes of an asynchronous copy have come; what TMA wrote, both proxies see, what st.async wrote, the generic
// one
void complete_bytes(const void* bar, uint32_t bytes, Epoch mark, bool async_proxy) {
  Cta* cta = cta_of(bar);
  auto i = cta->mbarriers.find(bar);
  if (i == cta->mbarriers.end())
    fail("mbarrier", "an asynchronous copy ends at %s, which is no mbarrier any more", name_of(bar).c_str());
  Mbarrier& b = i->second;
  b.in_flight -= bytes;
  b.bytes -= bytes;
  b.near.add(mark, async_proxy);
  made_progress();
  finish_phase(b, bar);
}

// the arrival that follows a thread's cp.async copies
void arrive_for_copies(const void* bar, Epoch mark) {
  Cta* cta = cta_of(bar);
  auto i = cta->mbarriers.find(bar);
  if (i == cta->mbarriers.end() || !i->second.pending)
    fail("mbarrier", "an arrival too many at %s, after cp.async copies", name_of(bar).c_str());
  i->second.pending--;
  i->second.near.add(mark, false);
  made_progress();
  finish_phase(i->second, bar);
}

// a copy that will count `bytes` at `bar` is issued
void barrier_for_copy(const void* bar, uint64_t bytes, const char* what) {
  Mbarrier& b = barrier_at(bar, what);
  if (!b.fenced)
    fail("proxy", "%s: the mbarrier at %s was initialised without fence_mbarrier_init", what,
         name_of(bar).c_str());
  b.in_flight += bytes;
}

// ---- CTA barriers

void come_to_barrier(int id, int threads, bool wait, const char* name) {
  Thread& t = me();
  Cta& cta = *t.cta;
  if (id < 0 || id > 15) fail("barrier", "%s %d: expected 0…15", name, id);
  if (threads <= 0 || threads % 32 || threads > int(cta.threads.size() + 31) / 32 * 32)
    fail("barrier", "%s %d for %d threads: expected a multiple of 32 up to the CTA's %zu", name, id, threads,
         cta.threads.size());
  NamedBarrier& b = cta.barriers[id];
  if (b.come && b.expected != threads)
    fail("barrier", "%s %d for %d threads, while others are there for %d", name, id, threads, b.expected);
  b.expected = threads;
  publish(b.messages);
  made_progress();
  const int all = std::min(threads, int(cta.threads.size()));
  if (++b.come < all) {
    if (!wait) return;
    b.waiting.push_back(&t);
    return sleep_on(Wait::CtaBarrier, name, &b, uint64_t(id));
  }
  const View v = b.messages.result();
  b.messages.clear();
  b.come = 0;
  for (Thread* other : b.waiting) other->view = join(other->view, v);
  if (wait) t.view = join(t.view, v);
  wake_all(b.waiting);
}

void sync_threads() {
  MOLE_ENTER;
  const Cta& cta = *me().cta;
  if (cta.done) fail("divergence", "__syncthreads after %u threads of the CTA have ended", cta.done);
  come_to_barrier(0, int(cta.threads.size() + 31) / 32 * 32, true, "__syncthreads");
}

void named_barrier_sync(int id, int threads) {
  MOLE_ENTER;
  come_to_barrier(id, threads, true, "named_barrier_sync");
}

void named_barrier_arrive(int id, int threads) {
  MOLE_ENTER;
  come_to_barrier(id, threads, false, "named_barrier_arrive");
}

// ---- clusters

uint32_t cluster_rank() {
  MOLE_ENTER;
  return me().cta->rank;
}

uint32_t cluster_size() {
  MOLE_ENTER;
  return machine->cluster_ctas;
}

static size_t place_in_cluster(const Thread& t) { return t.cta->rank * t.cta->threads.size() + t.index; }

void cluster_arrive(Order order) {
  MOLE_ENTER;
  Thread& t = me();
  Cluster& c = *t.cta->cluster;
  uint64_t& mine = c.arrived_phase[place_in_cluster(t)];
  if (mine > c.phase)
    fail("divergence", "%s arrives twice at the cluster barrier without a wait", describe(t).c_str());
  mine = c.phase + 1;
  if (order == kRelease)
    publish(c.messages);
  else
    c.messages.add(View{t.fenced_inits, {}});
  made_progress();
  if (++c.arrived < c.total) return maybe_yield();
  c.done = c.messages.result();
  c.arrived = 0;
  c.phase++;
  wake_all(c.waiting);
}

void cluster_wait() {
  MOLE_ENTER;
  Thread& t = me();
  Cluster& c = *t.cta->cluster;
  const uint64_t mine = c.arrived_phase[place_in_cluster(t)];
  if (!mine)
    fail("divergence", "%s waits at the cluster barrier without having arrived", describe(t).c_str());
  while (c.phase < mine) {
    c.waiting.push_back(&t);
    sleep_on(Wait::ClusterBarrier, "cluster_wait", &c);
  }
  learn(c.done);
}

// ---- registers

void set_registers(int n, bool increase) {
  MOLE_ENTER;
  Thread& t = me();
  Warpgroup& g = *t.group;
  if (g.ask_come && g.asked != n)
    fail("divergence", "setmaxnreg %d while other threads of the warpgroup ask for %d", n, g.asked);
  g.asked = n;
  if (!g.ask_come && (increase ? n < g.registers : n > g.registers))
    fail("registers", "setmaxnreg.%s to %d of a warpgroup that has %d", increase ? "inc" : "dec", n,
         g.registers);
  // counted once for the warpgroup, when its first thread comes; the last one to come opens it for the next
  // call
  const int size =
      int(std::min<size_t>(128, t.cta->threads.size() - size_t(&g - t.cta->groups.data()) * 128));
  if (g.ask_come == 0) {
    const int need = (n - g.registers) * 128;
    while (need > t.cta->registers_free && g.registers != n) {
      machine->polling.push_back(&t);
      sleep_on(Wait::Registers, "setmaxnreg", nullptr);
    }
    if (g.registers != n) t.cta->registers_free -= (n - g.registers) * 128, g.registers = n;
  }
  if (++g.ask_come == size) g.ask_come = 0;
  made_progress();
}

void griddep_wait() { MOLE_ENTER; }
void griddep_launch_dependents() { MOLE_ENTER; }

}  // namespace emu
