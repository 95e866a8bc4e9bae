#include "clocks.h"

#include <algorithm>

namespace emu {
namespace {

struct Remembered {
  ClockRef a, b, result;
};
constexpr size_t kRemembered = 512;
std::vector<Remembered> remembered(kRemembered);

}  // namespace

ClockRef join(const ClockRef& a, const ClockRef& b) {
  if (!b || a.get() == b.get()) return a;
  if (!a) return b;
  const size_t key =
      (reinterpret_cast<uintptr_t>(a.get()) / 32 * 31 + reinterpret_cast<uintptr_t>(b.get()) / 32) %
      kRemembered;
  Remembered& r = remembered[key];
  if (r.a.get() == a.get() && r.b.get() == b.get()) return r.result;
  const auto &x = a.get()->at, &y = b.get()->at;
  const size_t both = std::min(x.size(), y.size());
  bool a_new = x.size() > both, b_new = y.size() > both;
  for (size_t i = 0; i < both && !(a_new && b_new); i++) {
    a_new |= x[i] > y[i];
    b_new |= y[i] > x[i];
  }
  ClockRef result;
  if (!b_new) {
    result = a;
  } else if (!a_new) {
    result = b;
  } else {
    auto* c = new Clock;
    c->at = x.size() >= y.size() ? x : y;
    const auto& other = x.size() >= y.size() ? y : x;
    for (size_t i = 0; i < other.size(); i++) c->at[i] = std::max(c->at[i], other[i]);
    result = ClockRef(c);
  }
  r = {a, b, result};
  return result;
}

ClockRef with(const ClockRef& a, Epoch e) {
  if (a[e.dim] >= e.clock) return a;
  auto* c = new Clock;
  if (a) c->at = a.get()->at;
  if (c->at.size() <= e.dim) c->at.resize(e.dim + 1);
  c->at[e.dim] = e.clock;
  return ClockRef(c);
}

void forget_joins() { std::fill(remembered.begin(), remembered.end(), Remembered{}); }

void Joiner::add(const ClockRef& c) {
  if (!c) return;
  for (const auto& have : clocks_)
    if (have.get() == c.get()) return;
  clocks_.push_back(c);
}

void Joiner::add(Epoch e) {
  if (e.clock) epochs_.push_back(e);
}

void Joiner::clear() {
  clocks_.clear();
  epochs_.clear();
}

ClockRef Joiner::result() {
  ClockRef all;
  for (const auto& c : clocks_) all = join(all, c);
  bool news = false;
  uint32_t top = 0;
  for (const auto& e : epochs_) {
    news |= all[e.dim] < e.clock;
    top = std::max(top, e.dim);
  }
  if (news) {
    auto* c = new Clock;
    if (all) c->at = all.get()->at;
    if (c->at.size() <= top) c->at.resize(top + 1);
    for (const auto& e : epochs_) c->at[e.dim] = std::max(c->at[e.dim], e.clock);
    all = ClockRef(c);
  }
  clear();
  add(all);
  return all;
}

View join(const View& a, const View& b) {
  return {join(a.seen, b.seen), {join(a.proxied[0], b.proxied[0]), join(a.proxied[1], b.proxied[1])}};
}

void Messages::add(const View& v) {
  seen_.add(v.seen);
  for (int i = 0; i < 2; i++) proxied_[i].add(v.proxied[i]);
}

void Messages::add(const View& v, uint32_t dim, uint32_t own, const uint32_t (&own_proxied)[2]) {
  add(v);
  seen_.add(Epoch{dim, own});
  for (int i = 0; i < 2; i++) proxied_[i].add(Epoch{dim, own_proxied[i]});
}

void Messages::add(Epoch e, bool async_proxy) {
  seen_.add(e);
  if (!async_proxy) return;
  for (auto& p : proxied_) p.add(e);
}

void Messages::clear() {
  seen_.clear();
  for (auto& p : proxied_) p.clear();
}

View Messages::result() { return {seen_.result(), {proxied_[0].result(), proxied_[1].result()}}; }

}  // namespace emu
