// The three products of the operator over [B,T] rows, in blocks that stay in cache and run in parallel:
// shrink (rows times a thin matrix, kept wide), expand (thin rows times a matrix, added to elements),
// reduce (a thin matrix of rows, transposed, times rows).
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "cpu/kernels.h"

namespace mole {

constexpr int64_t kBlockRows = 96;  // a block of x and its h stay in L2
constexpr int64_t kBlockK = 640;    // so does a block of k of x, beside one panel
constexpr int64_t kPanelBytes =
    576 << 10;  // packed columns that are reused by all rows of a block: part of L2
constexpr int64_t kReduceRows = 256;
constexpr int64_t kFewRows = 64;  // below, packing the base's weight costs too much

// elements [B,T,cols] anywhere in memory; byte addresses from strides in elements
struct Rows {
  const char* data;
  int64_t size, sample, row, col;
  const void* at(int64_t b, int64_t t, int64_t c = 0) const {
    return data + (b * sample + t * row + c * col) * size;
  }
};

// S matrices, element (p,c) of set s at s·set + p·k + c·col
struct Sets {
  const char* data;
  int64_t size, set, k, col;
  const void* at(int64_t s, int64_t p, int64_t c) const { return data + (s * set + p * k + c * col) * size; }
};

// memory of one thread that is kept for its next call, one buffer for each use
class Scratch {
 public:
  enum Use { PANELS, LEFT, GATED, WIDE, USES };

  static char* get(Use use, int64_t bytes) {
    static thread_local Buffer buffers[USES];
    Buffer& buffer = buffers[use];
    if (buffer.bytes < bytes) {
      buffer.memory.reset(static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)));
      buffer.bytes = buffer.memory ? bytes : 0;
      if (!buffer.memory) throw std::bad_alloc();
    }
    return buffer.memory.get();
  }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  struct Buffer {
    std::unique_ptr<char, Free> memory;
    int64_t bytes = 0;
  };
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// samples that take the same set, in the batch's order; set −1 is none
struct Group {
  int64_t set;
  const int64_t* samples;
  int64_t count;
};

// which sample takes which set: those of one set together, those without one first
class Groups {
 public:
  explicit Groups(const std::vector<int64_t>& set_of) : order_(set_of.size()) {
    const int64_t B = int64_t(set_of.size());
    for (int64_t b = 0; b < B; ++b) order_[b] = b;
    std::stable_sort(order_.begin(), order_.end(),
                     [&](int64_t a, int64_t b) { return set_of[a] < set_of[b]; });
    for (int64_t from = 0, to = 0; from < B; from = to) {
      while (to < B && set_of[order_[to]] == set_of[order_[from]]) ++to;
      list_.push_back({set_of[order_[from]], order_.data() + from, to - from});
    }
  }
  Groups(const Groups&) = delete;

  const Group* begin() const { return list_.data(); }
  const Group* end() const { return list_.data() + list_.size(); }
  // samples without a set
  int64_t none() const { return list_.empty() || list_[0].set >= 0 ? 0 : list_[0].count; }
  Group all() const { return {0, order_.data(), int64_t(order_.size())}; }
  Group taken() const { return {0, order_.data() + none(), int64_t(order_.size()) - none()}; }
  int64_t smallest() const {
    int64_t least = int64_t(order_.size());
    for (const Group& g : list_) least = g.set < 0 ? least : std::min(least, g.count);
    return least;
  }

 private:
  std::vector<int64_t> order_;
  std::vector<Group> list_;
};

// how the rows of a sample are cut, the same for all: no block straddles two samples, and the smallest group
// has some for every thread
struct Blocks {
  int64_t T, rows, per_sample;

  Blocks(const Kernels& k, int64_t smallest, int64_t T) : T(T) {
    const int64_t share = ceil_div(smallest * T, torch::stable::get_num_threads());
    const int64_t wanted =
        std::max<int64_t>(1, ceil_div(T, std::min(kBlockRows, std::max<int64_t>(share, 1))));
    rows = std::max<int64_t>(1, round_up(ceil_div(T, wanted), k.tile_rows));
    per_sample = ceil_div(T, rows);
  }

  // f(b, t, rows) for every block of the group's samples
  template <class F>
  void each(const Group& g, const F& f) const {
    torch::stable::parallel_for(0, g.count * per_sample, 1, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) {
        const int64_t t = i % per_sample * rows;
        f(g.samples[i / per_sample], t, std::min(rows, T - t));
      }
    });
  }
};

// columns [col, col + cols) of k [from, from + count) of set s, packed by all threads
inline void pack_panels(const Kernels& k,
                        const Sets& w,
                        int64_t s,
                        int64_t from,
                        int64_t count,
                        int64_t col,
                        int64_t cols,
                        char* out) {
  const int64_t panel = k.panel_size(count, k.panel_cols) * k.operand_size;
  const int64_t grain = std::max<int64_t>(1, 65536 / (count * k.panel_cols + 1));
  torch::stable::parallel_for(0, ceil_div(cols, k.panel_cols), grain, [&](int64_t a, int64_t b) {
    for (int64_t i = a; i < b; ++i) {
      const int64_t c = i * k.panel_cols;
      k.pack(w.at(s, from, col + c), w.k, w.col, count, std::min(k.panel_cols, cols - c), out + i * panel);
    }
  });
}

// the operands of rows × k of x: x itself where it has them in order, else a copy
inline Product left_operand(
    const Kernels& k, const Rows& x, int64_t b, int64_t t, int64_t rows, int64_t from, int64_t count) {
  if (k.element_size == k.operand_size && x.col == 1) return {x.at(b, t, from), x.row, 1, nullptr, count};
  char* copy = Scratch::get(Scratch::LEFT, rows * count * k.operand_size);
  k.to_operand(x.at(b, t, from), x.row, x.col, rows, count, copy, count);
  return {copy, count, 1, nullptr, count};
}

// wide out [B,T,cols] = x [B,T,K] · w[s] [K,cols], zeros where a sample has no set;
// `also(b, t, rows, left, from, last)` sees each block while x and out are hot
template <class Also>
void shrink(const Kernels& k,
            const Groups& groups,
            const Blocks& blocks,
            const Rows& x,
            int64_t K,
            const Sets& w,
            int64_t cols,
            char* out,
            const Also& also) {
  const int64_t parts = std::max<int64_t>(1, ceil_div(K, kBlockK)),
                step = round_up(std::max<int64_t>(ceil_div(K, parts), 1), 2);
  char* panels = Scratch::get(Scratch::PANELS, k.panel_size(step, cols) * k.operand_size);
  for (const Group& g : groups)
    for (int64_t from = 0; from < std::max<int64_t>(K, 1); from += step) {
      const int64_t count = std::min(step, K - from);
      if (g.set >= 0) pack_panels(k, w, g.set, from, count, 0, cols, panels);
      blocks.each(g, [&](int64_t b, int64_t t, int64_t rows) {
        Product p = left_operand(k, x, b, t, rows, from, count);
        p.panels = panels;
        char* line = out + (b * blocks.T + t) * cols * k.wide_size;
        if (g.set >= 0)
          k.multiply_wide(&p, 1, rows, cols, line, cols, from > 0);
        else if (from == 0)
          std::fill(line, line + rows * cols * k.wide_size, char(0));
        also(b, t, rows, p, from, from + count >= K);
      });
    }
}

// element y [B,T,N] = (or +=) bias + Σ_i left_i · w_i[s], summed in registers and rounded once; the first
// `base` of the products are those of every sample, the others of samples with a set. A matrix that all sets
// share is packed once. `fill(b, t, rows, products)` makes the left operands of a block; wide bias, padded to
// whole panels, or null
template <int parts, class Fill>
void expand(const Kernels& k,
            const Groups& groups,
            const Blocks& blocks,
            int64_t N,
            const Sets (&w)[parts],
            const int64_t (&depth)[parts],
            int base,
            int count,
            char* y,
            bool accumulate,
            const char* bias,
            const Fill& fill) {
  int64_t column = 0;
  for (int i = 0; i < count; ++i)
    column += k.panel_size(depth[i], k.panel_cols) / k.panel_cols * k.operand_size;
  const int64_t wide =
      std::max<int64_t>(1, kPanelBytes / std::max<int64_t>(column, 1) / k.panel_cols) * k.panel_cols;
  for (int64_t col = 0; col < N; col += wide) {
    const int64_t cols = std::min(wide, N - col);
    int64_t bytes = 0, begin[parts];
    for (int i = 0; i < count; ++i)
      begin[i] = bytes, bytes += round_up(k.panel_size(depth[i], cols) * k.operand_size, 64);
    char* panels = Scratch::get(Scratch::PANELS, bytes);
    for (int i = 0; i < count; ++i)
      if (w[i].set == 0) pack_panels(k, w[i], 0, 0, depth[i], col, cols, panels + begin[i]);
    for (const Group& g : groups) {
      const int products_here = g.set < 0 ? base : count;
      if (products_here == 0) continue;
      for (int i = 0; i < products_here; ++i)
        if (w[i].set != 0) pack_panels(k, w[i], g.set, 0, depth[i], col, cols, panels + begin[i]);
      blocks.each(g, [&](int64_t b, int64_t t, int64_t rows) {
        Product products[parts];
        fill(b, t, rows, products);
        for (int i = 0; i < products_here; ++i) products[i].panels = panels + begin[i];
        char* out = y + ((b * blocks.T + t) * N + col) * k.element_size;
        k.multiply(products, products_here, rows, cols, out, N, accumulate,
                   bias ? bias + col * k.wide_size : nullptr);
      });
    }
  }
}

// element y [B,T,N] = bias + x · w + Σ_i left_i · w_i[s]: the base and the thin products in one pass over y.
// `fill` makes the left operands from products[1] on; w[0] and depth[0] are w and K
template <int parts, class Fill>
void fused(const Kernels& k,
           const Groups& groups,
           const Blocks& blocks,
           const Rows& x,
           int64_t N,
           const Sets (&w)[parts],
           const int64_t (&depth)[parts],
           int count,
           char* y,
           const char* bias,
           const Fill& fill) {
  // wide sums may rest in y between two blocks of k; others stay in registers for all of it
  const int64_t K = depth[0],
                step = k.element_size == k.wide_size ? round_up(ceil_div(K, ceil_div(K, kBlockK)), 2) : K;
  for (int64_t from = 0; from < K; from += step) {
    const bool last = from + step >= K;
    Sets some[parts];
    int64_t deep[parts];
    for (int i = 0; i < count; ++i) some[i] = w[i], deep[i] = depth[i];
    some[0].data = static_cast<const char*>(w[0].at(0, from, 0)), deep[0] = std::min(step, K - from);
    expand(k, groups, blocks, N, some, deep, 1, last ? count : 1, y, from > 0, from > 0 ? nullptr : bias,
           [&](int64_t b, int64_t t, int64_t rows, Product* p) {
             p[0] = left_operand(k, x, b, t, rows, from, deep[0]);
             if (last) fill(b, t, rows, p);
           });
  }
}

// wide out [L,cols] = Σ_{b,t} left[b,t,·]ᵀ right[b,t,·] over the group's samples; every thread owns columns
// of out, so the order of the sum is that of the rows whatever the number of threads. `left(b, t, rows)` ->
// wide rows [rows,L]
template <class Left>
void reduce(const Kernels& k,
            const Group& g,
            int64_t T,
            int64_t L,
            const Left& left,
            const Rows& right,
            int64_t cols,
            char* out) {
  const int64_t fit = kPanelBytes / (kReduceRows * k.operand_size),
                threads = torch::stable::get_num_threads();
  const int64_t chunk = round_up(std::min(fit, ceil_div(cols, threads)), k.panel_cols);
  std::fill(out, out + L * cols * k.wide_size, char(0));
  if (L == 0 || cols == 0) return;
  torch::stable::parallel_for(0, ceil_div(cols, chunk), 1, [&](int64_t from, int64_t to) {
    char* panels = Scratch::get(Scratch::PANELS, k.panel_size(kReduceRows, chunk) * k.operand_size);
    char* copy = Scratch::get(Scratch::LEFT, (kReduceRows + 1) * L * k.operand_size);
    for (int64_t i = from; i < to; ++i)
      for (int64_t s = 0; s < g.count; ++s)
        for (int64_t b = g.samples[s], t = 0; t < T; t += kReduceRows) {
          const int64_t rows = std::min(kReduceRows, T - t), col = i * chunk, n = std::min(chunk, cols - col);
          Product p;
          k.transposed(left(b, t, rows), L, rows, L, copy, &p);
          k.pack(right.at(b, t, col), right.row, right.col, rows, n, panels);
          p.panels = panels;
          k.multiply_wide(&p, 1, L, n, out + col * k.wide_size, cols, true);
        }
  });
}

}  // namespace mole
