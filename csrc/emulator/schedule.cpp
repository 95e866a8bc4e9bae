// Launches, the seeded scheduler, and what it says when nobody can go on.
#include <algorithm>
#include <cstdarg>
#include <cstdlib>

#include "machine.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emu {

Machine* machine = nullptr;
void new_era(size_t slots);

namespace {

uint64_t next_random() {
  uint64_t& x = machine->random;
  x ^= x << 13;
  x ^= x >> 7;
  x ^= x << 17;
  return x;
}

void prepare_thread(Cta& cta, unsigned i) {
  Machine& m = *machine;
  const unsigned number = cta.slot * m.threads_per_cta + i;
  auto& slot = m.threads[number];
  auto fresh = std::make_unique<Thread>();
  Thread& t = *fresh;
  if (slot) t.stack = slot->stack, t.own = slot->own;
  t.number = t.dim = number, t.index = i, t.cta = &cta;
  t.id = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
  t.start = ++t.own;
  t.lane = int(i % 32), t.warp = &cta.warps[i / 32], t.group = &cta.groups[i / 128];
  t.warp->lanes[t.lane] = &t;
  t.written.assign(kStack / 4 / 64 + 1, 0);
  slot = std::move(fresh);
  cta.threads.push_back(&t);
  start_fiber(t);
  wake(&t);
}

// CTA `rank` of a cluster begins in `slot`
void start_cta(Cluster& cluster, unsigned slot, unsigned rank, uint3 id) {
  Machine& m = *machine;
  auto fresh = std::make_unique<Cta>();
  Cta& cta = *fresh;
  cta.slot = slot, cta.rank = rank, cta.cluster = &cluster, cta.id = id;
  cta.smem = new_smem(slot, m.launch.smem);
  cta.warps = std::vector<Warp>((m.threads_per_cta + 31) / 32);
  cta.groups = std::vector<Warpgroup>((m.threads_per_cta + 127) / 128);
  const int each =
      m.launch.registers ? int(m.launch.registers) : std::min<int>(65536 / m.threads_per_cta, 256) / 8 * 8;
  for (auto& g : cta.groups) g.registers = each, g.cta = &cta;
  m.ctas[slot] = std::move(fresh);
  cluster.ctas.push_back(&cta);
  for (unsigned i = 0; i < m.threads_per_cta; i++) prepare_thread(cta, i);
}

void start_cluster(unsigned place, uint64_t index) {
  Machine& m = *machine;
  const dim3 c = m.launch.cluster, g = gridDim;
  const uint64_t gx = g.x / c.x, gy = g.y / c.y;
  const unsigned x = unsigned(index % gx) * c.x, y = unsigned(index / gx % gy) * c.y,
                 z = unsigned(index / gx / gy) * c.z;
  m.clusters[place] = std::make_unique<Cluster>();
  Cluster& cluster = *m.clusters[place];
  cluster.total = m.cluster_ctas * m.threads_per_cta;
  cluster.arrived_phase.assign(cluster.total, 0);
  for (unsigned r = 0; r < m.cluster_ctas; r++)
    start_cta(cluster, place * m.cluster_ctas + r, r, {x + r % c.x, y + r / c.x % c.y, z + r / (c.x * c.y)});
  m.live++;
}

Thread* pick() {
  Machine& m = *machine;
  auto& r = m.runnable;
  // the last to wake first (but not for ever), in turn, or at random
  size_t i = random_below(uint32_t(r.size()));
  if (m.policy == 1 && m.steps % 16) i = r.size() - 1;
  if (m.policy == 2) i = m.steps % r.size();
  Thread* t = r[i];
  r[i] = r.back();
  r.pop_back();
  return t;
}

bool operation_first() {
  Machine& m = *machine;
  if (m.operations.empty() && m.products.empty()) return false;
  return m.runnable.empty() || m.eagerness == 2 || (m.eagerness == 0 && random_below(4) == 0);
}

uint64_t next_cluster = 0, cluster_count = 0;
std::vector<uint64_t> order;

void finish_cta(Cta& cta) {
  Machine& m = *machine;
  for (auto& [p, b] : cta.mbarriers)
    if (b.in_flight)
      fail("exit", "CTA (%u,%u,%u) is done while %llu bytes are still on their way to its mbarrier at %s",
           cta.id.x, cta.id.y, cta.id.z, static_cast<unsigned long long>(b.in_flight), name_of(p).c_str());
  const View end = cta.exits.result();
  for (auto& [dim, visit] : cta.visits)
    if (end.seen[dim] < visit.first)
      fail("exit", "CTA (%u,%u,%u) may be gone before %s by %s is done: its end is not ordered after it",
           cta.id.x, cta.id.y, cta.id.z, visit.second, describe_actor(dim).c_str());
  cta.gone = true;
  for (Cta* c : cta.cluster->ctas)
    if (!c->gone) return;
  m.finished.push_back(cta.slot / m.cluster_ctas);
}

// the next clusters take the places of those that are done (here, on the scheduler's own stack)
void replace_finished() {
  Machine& m = *machine;
  for (const unsigned place : m.finished) {
    m.live--;
    if (next_cluster < cluster_count) start_cluster(place, order[next_cluster++]);
  }
  m.finished.clear();
}

void run() {
  Machine& m = *machine;
  const uint64_t limit = m.launch.steps ? m.launch.steps : uint64_t(100'000'000);
  uint64_t heard = 0;
  while (m.live) {
    if (!m.finished.empty()) {
      replace_finished();
      continue;
    }
    if (m.progress != heard) {
      heard = m.progress;
      wake_all(m.polling);
    }
    if (operation_first() && run_an_operation()) continue;
    if (m.runnable.empty()) {
      if (m.progress != heard) continue;
      fail("deadlock", "no thread can go on and no copy is under way");
    }
    if (++m.steps > limit)
      fail("livelock", "%llu switches between threads and no end", static_cast<unsigned long long>(limit));
    switch_to(*pick());
  }
}

void check_launch(const Launch& l) {
  const uint64_t threads = uint64_t(l.block.x) * l.block.y * l.block.z,
                 ctas = uint64_t(l.cluster.x) * l.cluster.y * l.cluster.z;
  if (threads == 0 || threads > 1024)
    fail("launch", "%llu threads in a CTA: expected 1…1024", static_cast<unsigned long long>(threads));
  if (l.smem > kSmemMost)
    fail("launch", "%zu bytes of shared memory: a CTA has at most %zu", l.smem, kSmemMost);
  if (ctas == 0 || ctas > 8)
    fail("launch", "a cluster of %llu CTAs: expected 1…8", static_cast<unsigned long long>(ctas));
  if (l.grid.x % l.cluster.x || l.grid.y % l.cluster.y || l.grid.z % l.cluster.z)
    fail("launch", "the grid is not a multiple of the cluster");
  if (l.registers * threads > 65536)
    fail("launch", "%u registers for each of %llu threads", l.registers,
         static_cast<unsigned long long>(threads));
}

}  // namespace

uint32_t random_below(uint32_t n) { return uint32_t((next_random() >> 20) % n); }

void sleep_on(Wait wait, std::string_view what, const void* where, uint64_t detail) {
  Thread& t = me();
  t.wait = wait, t.what = what, t.where = where, t.detail = detail;
  // whoever waits for something else in between is not spinning on a flag
  if (wait != Wait::Poll) t.polled = nullptr;
  switch_back();
}

void wake(Thread* t) {
  t->wait = Wait::Run;
  machine->runnable.push_back(t);
}

void wake_all(std::vector<Thread*>& waiting) {
  for (Thread* t : waiting) wake(t);
  waiting.clear();
}

// let others run now and then where order should not matter
void maybe_yield() {
  if (random_below(4)) return;
  wake(machine->current);
  switch_back();
}

void made_progress() { machine->progress++; }

void nanosleep() {
  Inside inside;
  wake(machine->current);
  switch_back();
}

void add_operation(std::function<void()> op) { machine->operations.push_back(std::move(op)); }

bool run_an_operation() {
  Machine& m = *machine;
  const uint32_t n = uint32_t(m.operations.size() + m.products.size());
  if (!n) return false;
  const uint32_t i = random_below(n);
  if (i < m.operations.size()) {
    auto op = std::move(m.operations[i]);
    m.operations[i] = std::move(m.operations.back());
    m.operations.pop_back();
    op();
    made_progress();
    return true;
  }
  return execute_product(i - m.operations.size());
}

// the dimension of an asynchronous actor, the same whenever the same key is asked for
uint32_t actor_for(const void* key, const char* name, bool place) {
  Machine& m = *machine;
  auto [i, fresh] = m.actors.try_emplace(key, 0);
  if (fresh) {
    i->second = uint32_t(m.threads.size() + m.dim_clock.size());
    m.dim_clock.push_back(0);
    m.dim_name.push_back(place ? name + name_of(key) : std::string(name));
  }
  return i->second;
}

uint32_t tick(uint32_t dim) { return ++machine->dim_clock[dim - machine->threads.size()]; }

uint32_t clock_of(uint32_t dim) { return machine->dim_clock[dim - machine->threads.size()]; }

void publish(Messages& to) {
  Thread& t = me();
  to.add(t.view, t.dim, t.own, t.own_proxied);
  t.own++;
}

void learn(const View& v) {
  Thread& t = me();
  t.view = join(t.view, v);
}

void thread_exits(Thread& t) {
  t.wait = Wait::Done;
  if (!t.in_flight.empty()) fail("exit", "%s ends with a wgmma in flight", describe(t).c_str());
  if (!t.copies.empty() || !t.groups.empty())
    fail("exit", "%s ends with cp.async copies it did not wait for", describe(t).c_str());
  if (t.bulk_open && t.bulk_open->clock)
    fail("exit", "%s ends with bulk stores it did not commit", describe(t).c_str());
  for (auto& g : t.bulk_groups)
    if (!g->read_known)
      fail("exit", "%s ends with bulk stores it did not wait for (bulk_wait_read)", describe(t).c_str());
  Cta& cta = *t.cta;
  publish(cta.exits);
  made_progress();
  if (++cta.done == cta.threads.size()) finish_cta(cta);
}

void launch(const Launch& l, void (*call)(const void*), const void* kernel) {
  Machine m;
  machine = &m;
  m.launch = l, m.call = call, m.kernel = kernel;
  check_launch(l);
  if (!l.grid.x || !l.grid.y || !l.grid.z) return void(machine = nullptr);
  m.random = l.seed * 0x9e3779b97f4a7c15ull + 0x2545f4914f6cdd1dull;
  for (int i = 0; i < 8; i++) next_random();
  m.policy = unsigned(l.seed % 4), m.eagerness = unsigned(l.seed / 4 % 3);
  blockDim = l.block, gridDim = l.grid;
  m.threads_per_cta = l.block.x * l.block.y * l.block.z;
  m.cluster_ctas = l.cluster.x * l.cluster.y * l.cluster.z;
  cluster_count = uint64_t(l.grid.x) * l.grid.y * l.grid.z / m.cluster_ctas;
  uint64_t places = l.resident ? std::max(1u, l.resident / m.cluster_ctas) : cluster_count;
  places = std::min(places, cluster_count);
  new_era(places * m.cluster_ctas);
  m.clusters.resize(places);
  m.ctas.resize(places * m.cluster_ctas);
  m.threads.resize(places * m.cluster_ctas * m.threads_per_cta);
  order.resize(cluster_count);
  for (uint64_t i = 0; i < cluster_count; i++) order[i] = i;
  if (l.seed % 2)
    for (uint64_t i = cluster_count - 1; i > 0; i--)
      std::swap(order[i], order[random_below(uint32_t(i + 1))]);
  next_cluster = 0;
  for (uint64_t p = 0; p < places; p++) start_cluster(unsigned(p), order[next_cluster++]);
  run();
  free_stacks();
  forget_joins();
  machine = nullptr;
}

}  // namespace emu
