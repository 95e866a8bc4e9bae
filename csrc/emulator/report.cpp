// Words for what went wrong: who, where, what, and who waits for what.
#include <algorithm>
#include <unistd.h>

#include <cstdarg>
#include <cstdlib>
#include <map>

#include "machine.h"

namespace emu {

std::string describe(const Thread& t) {
  char s[160];
  const Cta& c = *t.cta;
  std::snprintf(s, sizeof s, "thread %u (warp %u, lane %d) of CTA (%u,%u,%u)%s", t.index, t.index / 32,
                t.lane, c.id.x, c.id.y, c.id.z,
                machine->cluster_ctas > 1 ? (", rank " + std::to_string(c.rank)).c_str() : "");
  return s;
}

std::string describe_actor(uint32_t dim) {
  if (dim < machine->threads.size()) return describe(*machine->threads[dim]);
  return machine->dim_name[dim - machine->threads.size()];
}

// file:line of a place in the program (linked at a fixed address), by addr2line where it is installed
std::string line_of(const void* pc) {
  if (!pc) return "?";
  char path[1024] = {}, command[1400], out[1024] = {};
  if (readlink("/proc/self/exe", path, sizeof path - 1) <= 0) return "?";
  std::snprintf(command, sizeof command, "addr2line -i -e '%s' 0x%zx 2>/dev/null", path,
                reinterpret_cast<size_t>(pc) - 1);
  FILE* f = popen(command, "r");
  std::string best = "?";
  while (f && std::fgets(out, sizeof out, f)) {
    std::string line = out;
    line = line.substr(0, line.find_first_of(" \n"));
    if (line.rfind("??", 0) == 0) continue;
    line = line.substr(line.rfind('/') + 1);
    const bool ours =
        line.rfind("device.h", 0) == 0 || std::string(out).find("/cuda/device/") != std::string::npos;
    if (best == "?" || !ours) best = line;
    if (!ours) break;
  }
  if (f) pclose(f);
  return best;
}

namespace {

const char* word(Wait w) {
  switch (w) {
    case Wait::Run:
      return "can run";
    case Wait::CtaBarrier:
      return "waits at a CTA barrier";
    case Wait::Mbarrier:
      return "waits for an mbarrier";
    case Wait::ClusterBarrier:
      return "waits at the cluster barrier";
    case Wait::Warp:
      return "waits for its warp";
    case Wait::Wgmma:
      return "waits for its warpgroup's wgmma";
    case Wait::Poll:
      return "polls";
    case Wait::Registers:
      return "waits for registers";
    case Wait::Done:
      return "is done";
  }
  return "";
}

std::string waits_for(const Thread& t) {
  std::string s = word(t.wait);
  if (!t.what.empty() && t.wait != Wait::Run && t.wait != Wait::Done) s += ": " + std::string(t.what);
  if (t.where && (t.wait == Wait::Mbarrier || t.wait == Wait::Poll)) s += " at " + name_of(t.where);
  if (t.wait == Wait::Mbarrier) s += ", parity " + std::to_string(t.detail);
  if (t.wait == Wait::CtaBarrier) s += " " + std::to_string(t.detail);
  return s;
}

void dump_cta(const Cta& cta) {
  std::fprintf(stderr, "  CTA (%u,%u,%u), rank %u%s\n", cta.id.x, cta.id.y, cta.id.z, cta.rank,
               cta.gone ? ": done" : "");
  if (cta.gone) return;
  for (size_t i = 0; i < cta.threads.size();) {
    size_t j = i + 1;
    const std::string s = waits_for(*cta.threads[i]);
    while (j < cta.threads.size() && waits_for(*cta.threads[j]) == s) j++;
    std::fprintf(stderr, "    threads %zu…%zu: %s, from %s\n", i, j - 1, s.c_str(),
                 line_of(cta.threads[i]->pc).c_str());
    i = j;
  }
  std::map<const void*, const Mbarrier*> sorted;
  for (const auto& [p, b] : cta.mbarriers) sorted[p] = &b;
  for (const auto& [p, b] : sorted)
    std::fprintf(stderr,
                 "    mbarrier at +%td: phase %llu, %lld of %u arrivals still to come, %lld bytes expected "
                 "and not there\n",
                 static_cast<const unsigned char*>(p) - cta.smem, static_cast<unsigned long long>(b->phase),
                 static_cast<long long>(b->pending), b->count, static_cast<long long>(b->bytes));
  for (int i = 0; i < 16; i++)
    if (const auto& b = cta.barriers[i]; b.come)
      std::fprintf(stderr, "    barrier %d: %d of %d threads have come\n", i, b.come, b.expected);
}

}  // namespace

void dump() {
  std::fprintf(stderr, "  %zu asynchronous operations under way; seed %llu\n", machine->operations.size(),
               static_cast<unsigned long long>(machine->launch.seed));
  int shown = 0;
  for (const auto& cta : machine->ctas)
    if (cta && shown++ < 8) dump_cta(*cta);
  if (shown > 8) std::fprintf(stderr, "  … and %d more CTAs\n", shown - 8);
}

void fail(const char* kind, const char* format, ...) {
  if (machine) machine->inside = true;
  std::fflush(stdout);
  std::fprintf(stderr, "emulator: [%s] ", kind);
  va_list args;
  va_start(args, format);
  std::vfprintf(stderr, format, args);
  va_end(args);
  std::fprintf(stderr, "\n");
  if (machine && machine->current) {
    const Thread& t = *machine->current;
    std::fprintf(stderr, "  in %s, last seen at %s, seed %llu\n", describe(t).c_str(), line_of(t.pc).c_str(),
                 static_cast<unsigned long long>(machine->launch.seed));
  }
  if (std::string(kind) == "deadlock" || std::string(kind) == "livelock") dump();
  std::fflush(stderr);
  std::_Exit(3);
}

void trap() { fail("trap", "the kernel called trap()"); }

}  // namespace emu
