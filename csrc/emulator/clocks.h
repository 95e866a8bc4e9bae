// Vector clocks: who has seen what of whom. One dimension for each thread and for each asynchronous actor.
//
// Threads in step share one clock (a counted reference), and joins of the same two are remembered, so that a
// barrier of 384 threads costs a few joins instead of 384.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace emu {

struct Epoch {
  uint32_t dim = 0, clock = 0;  // clock 0: never
};

struct Clock {
  int references = 0;
  std::vector<uint32_t> at;
};

class ClockRef {
 public:
  ClockRef() = default;
  explicit ClockRef(Clock* c) : c_(c) { hold(); }
  ClockRef(const ClockRef& o) : c_(o.c_) { hold(); }
  ClockRef(ClockRef&& o) noexcept : c_(std::exchange(o.c_, nullptr)) {}
  ClockRef& operator=(ClockRef o) noexcept {
    std::swap(c_, o.c_);
    return *this;
  }
  ~ClockRef() {
    if (c_ && --c_->references == 0) delete c_;
  }
  uint32_t operator[](uint32_t dim) const { return c_ && dim < c_->at.size() ? c_->at[dim] : 0; }
  const Clock* get() const { return c_; }
  explicit operator bool() const { return c_ != nullptr; }

 private:
  void hold() {
    if (c_) c_->references++;
  }
  Clock* c_ = nullptr;
};

// the least clock that has seen both; one of the two themselves where it already has
ClockRef join(const ClockRef& a, const ClockRef& b);
ClockRef with(const ClockRef& a, Epoch e);
void forget_joins();

// a clock in the making: clocks and single epochs, joined when asked for
class Joiner {
 public:
  void add(const ClockRef& c);
  void add(Epoch e);
  void clear();
  ClockRef result();

 private:
  std::vector<ClockRef> clocks_;
  std::vector<Epoch> epochs_;
};

// what a thread, or a message to it, has seen: everything, and what of it the asynchronous proxy sees too
// (shared, global)
struct View {
  ClockRef seen, proxied[2];
};

View join(const View& a, const View& b);

class Messages {
 public:
  void add(const View& v);
  void add(const View& v, uint32_t dim, uint32_t own, const uint32_t (&own_proxied)[2]);
  void add(Epoch e,
           bool async_proxy);  // an asynchronous operation's end, seen by the generic proxy or by both
  void clear();
  View result();

 private:
  Joiner seen_, proxied_[2];
};

}  // namespace emu
