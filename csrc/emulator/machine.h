// The emulator's inside: threads as fibers, CTAs, clusters, and the one machine that holds them.
#pragma once

#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "clocks.h"
#include "emulator.h"

namespace emu {

struct Cta;
struct Cluster;
struct Thread;

enum class Wait { Run, CtaBarrier, Mbarrier, ClusterBarrier, Warp, Wgmma, Poll, Registers, Done };

struct Mbarrier {
  uint32_t count = 0;
  int64_t pending = 0, bytes = 0;  // arrivals still to come; bytes expected and not yet there
  uint64_t phase = 0;
  uint32_t dim = 0;  // its asynchronous operations, and its initialisation
  Epoch born;
  bool fenced = false;        // its initialisation is known to the asynchronous proxy and the cluster
  unsigned maker = 0;         // the thread that initialised it
  Messages near, far, freed;  // arrivals of this CTA and copies; arrivals of peers; those of freed memory
  View near_done, far_done, freed_done;  // what the last finished phase brought
  std::vector<Thread*> waiting;
  uint64_t in_flight = 0;  // bytes of issued copies that will count here
};

struct NamedBarrier {
  int expected = 0, come = 0, whole = 0;
  Messages messages;
  std::vector<Thread*> waiting;
};

// one collective call of a warp: who has come with what
struct WarpCall {
  const char* name = nullptr;
  uint32_t mask = 0, come = 0;
  int tag = 0;
  uint64_t in[32][6], out[32][6];
  Messages messages;
  std::vector<Thread*> waiting;
};

struct Warp {
  std::deque<WarpCall> calls;  // under way, of disjoint masks
  Thread* lanes[32] = {};
};

struct Product {  // one wgmma
  int n = 0;
  Element type{};
  uint64_t a = 0, b = 0;
  bool a_mn = false, b_mn = false, a_registers = false, accumulate = false;
  int come = 0;
  std::vector<View> views;  // what its threads had seen, each different one once
  float* d[128] = {};
  uint32_t fragment[128][4];
};

struct Warpgroup {
  uint32_t dim = 0, clock0 = 0;                   // product i leaves the mark clock0 + i + 1
  uint64_t executed = 0, issued = 0;              // products executed; those that all 128 threads have issued
  std::deque<std::unique_ptr<Product>> products;  // from index `executed` on
  std::vector<Thread*> waiting;
  Cta* cta = nullptr;
  ClockRef done;
  uint64_t done_until = 0;
  int registers = 0;  // of each of its threads
  int asked = 0, ask_come = 0;
};

struct Copy {  // 16 bytes of cp.async
  unsigned char* dst;
  const unsigned char* src;
  int valid;
};

struct CopyGroup {  // committed together
  std::vector<Copy> copies;
  uint32_t clock = 0;
};

struct BulkGroup {
  int open = 0;  // operations not yet done
  bool read_known = false;
  uint32_t clock = 0;  // how many operations
  Epoch mark[2];       // the last one's: reading, writing
};

struct Range {
  uintptr_t from, to;
  uint64_t until;  // index after the last product that uses it
};

struct Thread {
  unsigned number = 0, index = 0;  // slot in the machine, threadIdx.x
  uint3 id{};
  Cta* cta = nullptr;
  Warp* warp = nullptr;
  Warpgroup* group = nullptr;
  int lane = 0;
  void* stack_pointer = nullptr;
  unsigned char* stack = nullptr;
  void* fake_stack = nullptr;  // AddressSanitizer's
  Wait wait = Wait::Run;
  size_t place = 0;             // in the list of those that can run
  std::string_view what;        // what it waits for, in words
  const void* where = nullptr;  // the object
  const void* pc = nullptr;     // the kernel's call
  uint64_t detail = 0;

  uint32_t dim = 0, start = 0, own = 0, own_proxied[2] = {};
  View view;
  View fence;  // what was seen at the last __threadfence: what a relaxed atomic publishes
  uint32_t fence_own = 0, fence_proxied[2] = {};
  View heard;             // what relaxed loads brought: seen after the next __threadfence
  View freed;             // what mbarrier_wait_freed brought: for the copies it issues alone
  ClockRef fenced_inits;  // barriers initialised and fenced
  std::vector<uint64_t*> unfenced;

  std::vector<Copy> copies;  // cp.async not yet committed
  std::deque<CopyGroup> groups;
  std::shared_ptr<BulkGroup> bulk_open;
  std::deque<std::shared_ptr<BulkGroup>> bulk_groups;

  uint64_t wgmma_next = 0, wgmma_committed = 0;
  std::deque<uint64_t>
      wgmma_groups;              // index after the last product of each committed group not yet waited for
  std::vector<Range> in_flight;  // accumulators
  bool wgmma_fenced = false;
  std::vector<uint64_t> written;  // words of its stack written since the last wgmma fence
  size_t written_from = ~size_t(0), written_to = 0;

  const void* polled = nullptr;  // its last atomic load, and the flag's version then
  uint64_t polled_version = 0;
};

struct Cta {
  unsigned slot = 0, rank = 0;
  uint3 id{};
  Cluster* cluster = nullptr;
  unsigned char* smem = nullptr;
  std::vector<Thread*> threads;
  std::vector<Warp> warps;
  std::vector<Warpgroup> groups;
  NamedBarrier barriers[16];
  std::unordered_map<const void*, Mbarrier> mbarriers;
  unsigned done = 0;
  bool gone = false;
  Messages exits;
  std::unordered_map<uint32_t, std::pair<uint32_t, const char*>>
      visits;  // what peers and copies did to its shared memory: until when
  int registers_free = 0;
};

struct Cluster {
  std::vector<Cta*> ctas;
  unsigned arrived = 0, total = 0;
  uint64_t phase = 0;
  std::vector<uint64_t> arrived_phase;  // per thread, which phases it arrived in
  Messages messages;
  View done;
  std::vector<Thread*> waiting;
};

struct Flag {  // an atomic in global memory
  View view;
  uint64_t version = 0;
  std::vector<Thread*> waiting;
};

struct Machine {
  Launch launch;
  void (*call)(const void*) = nullptr;
  const void* kernel = nullptr;
  Thread* current = nullptr;
  bool inside = true;  // in the emulator's own code: the hooks look away
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Thread*> runnable;
  std::vector<std::unique_ptr<Cluster>> clusters;
  std::vector<std::unique_ptr<Cta>> ctas;
  std::vector<std::function<void()>> operations;  // asynchronous, each may end at any moment
  std::vector<Warpgroup*> products;               // warpgroups with products to execute
  std::vector<Thread*> polling;
  std::vector<unsigned> finished;  // places of clusters that are done
  std::unordered_map<const void*, Flag> flags;
  std::unordered_map<const void*, uint32_t> actors;
  std::vector<uint32_t> dim_clock;  // of asynchronous actors
  std::vector<std::string> dim_name;
  uint64_t progress = 0, steps = 0, random = 1;
  unsigned policy = 0, eagerness = 0;
  void* stack_pointer = nullptr;
  unsigned threads_per_cta = 0, cluster_ctas = 0, live = 0;
};

extern Machine* machine;

// in the emulator's own code from here to the end of the block
struct Inside {
  Inside() { machine->inside = true; }
  ~Inside() { machine->inside = false; }
};

// first line of every software body
#define MOLE_ENTER \
  Inside inside_;  \
  machine->current->pc = __builtin_return_address(0)

inline Thread& me() { return *machine->current; }
uint32_t random_below(uint32_t n);

[[noreturn]] void fail(const char* kind, const char* format, ...) __attribute__((format(printf, 2, 3)));
std::string describe(const Thread& t);
std::string describe_actor(uint32_t dim);
std::string line_of(const void* pc);
void dump();

// fibers
void start_fiber(Thread& t);
void switch_to(Thread& t);
void switch_back();
void free_stacks();
constexpr size_t kStack = 1 << 17;

// scheduling
void sleep_on(Wait wait, std::string_view what, const void* where, uint64_t detail = 0);
void wake(Thread* t);
void wake_all(std::vector<Thread*>& waiting);
void maybe_yield();
void made_progress();
void add_operation(std::function<void()> op);
bool run_an_operation();
uint32_t actor_for(const void* key, const char* name, bool place = false);
uint32_t tick(uint32_t dim);
uint32_t clock_of(uint32_t dim);
void thread_exits(Thread& t);

// clocks of the current thread
void publish(Messages& to);
void learn(const View& v);

// memory
constexpr size_t kSmemStride = 1 << 18, kSmemBase = 1024, kSmemMost = 232448;
enum class Proxy { Generic, Async };
enum class Kind { Read, Write, Atomic, AtomicRead };
struct Actor {
  const View* view;
  const View* also;  // seen too, by asynchronous copies; or null
  uint32_t dim;      // whose epochs are its own; ~0: nobody's
  uint32_t start, own_proxied[2];
  Epoch epoch;  // the mark it leaves
  Proxy proxy;
};
Actor thread_actor(const Thread& t);
Actor async_actor(const Thread& issuer, Epoch mark);
void touch(const Actor& who, const void* p, size_t bytes, Kind kind, const char* what, const void* pc);
unsigned char* new_smem(unsigned slot, size_t bytes);
void mark_barrier(const void* p, bool is);
Cta* cta_of(const void* p);
bool in_smem(const Cta& cta, const void* p, size_t bytes);
void check_smem(const Cta& cta, const void* p, size_t bytes, size_t alignment, const char* what);
std::string name_of(const void* p);
unsigned char* resolve(uint32_t cluster_address, size_t bytes, Cta** cta, const char* what);
void visit(Cta& cta, Epoch mark, const char* what);

// mbarriers
Mbarrier& barrier_at(const void* bar, const char* what);
void complete_bytes(const void* bar, uint32_t bytes, Epoch mark, bool async_proxy);
void arrive_for_copies(const void* bar, Epoch mark);
void barrier_for_copy(const void* bar, uint64_t bytes, const char* what);

// warps: deposits `in`, waits for all lanes of `mask`, lets the last of them compute `out` for all
using WarpBody = void (*)(WarpCall&);
void warp_collective(const char* name,
                     uint32_t mask,
                     int tag,
                     const void* in,
                     size_t in_bytes,
                     void* out,
                     size_t out_bytes,
                     WarpBody all,
                     bool orders = false);
bool execute_product(size_t i);

}  // namespace emu
