// What the vector kernels offer, one table per instruction set and element type.
//
// kernels.cpp is compiled once per instruction set and includes no header with inline functions, so that no
// AVX-512 copy of one can end up serving a CPU without it. Everything that touches a tensor is elsewhere.
#pragma once

#include <cstdint>

namespace mole {

enum Element : int { F32, F64, BF16, F16, ELEMENTS };

// "wide" is the type sums are kept in: double for double, else float.
// "operand" is what products read: bfloat16 where the CPU multiplies bfloat16, double for double, else float.

// one product of a [rows,k] with panels [k,cols] made by `pack`; strides in operands
struct Product {
  const void* a;
  int64_t a_row, a_k;
  const void* panels;
  int64_t k;
};

// γ[i,e] = scale[e]·gate[i,e]·token[i,e]·sample[e], all wide; a null pointer counts as 1
struct RowGates {
  const void* scale;  // [E]
  const void* gate;   // strides gate_row, gate_e
  int64_t gate_row, gate_e;
  const void* token;      // [rows,E]
  const void* sample;     // [E]
  const int64_t* starts;  // [E+1]: expert e holds columns starts[e] … starts[e+1]
  int64_t experts;
};

struct Kernels {
  int64_t element_size, operand_size, wide_size;
  int64_t tile_rows;  // a block of rows is best a multiple of this

  // operands that `pack` writes for k × cols, and how many columns begin a new panel
  int64_t (*panel_size)(int64_t k, int64_t cols);
  int64_t panel_cols;
  // panels of element b[p,c] = b[p·b_k + c·b_col]; zeros where a panel has more than cols
  void (*pack)(const void* b, int64_t b_k, int64_t b_col, int64_t k, int64_t cols, void* panels);
  // operand out [rows,k], rows out_row apart = element a[i·a_row + p·a_k]
  void (*to_operand)(
      const void* a, int64_t a_row, int64_t a_k, int64_t rows, int64_t k, void* out, int64_t out_row);
  // left operand of wideᵀ: element (i,p) of the result is in[p,i]; writes to out where a copy is needed,
  // strides come back in p
  void (*transposed)(const void* wide, int64_t wide_row, int64_t k, int64_t rows, void* out, Product* p);

  // wide c [rows,cols] = (or +=) Σ products
  void (*multiply_wide)(const Product* products,
                        int count,
                        int64_t rows,
                        int64_t cols,
                        void* c,
                        int64_t c_row,
                        bool accumulate);
  // element c [rows,cols] = (or +=) bias + Σ products, rounded once; wide bias, padded to whole vectors, or
  // null
  void (*multiply)(const Product* products,
                   int count,
                   int64_t rows,
                   int64_t cols,
                   void* c,
                   int64_t c_row,
                   bool accumulate,
                   const void* bias);
  // wide logits [rows,experts] = (or +=) operand a [rows,k] · operand token_weight [experts,k]ᵀ
  void (*row_dots)(const void* a,
                   int64_t a_row,
                   int64_t rows,
                   int64_t k,
                   const void* token_weight,
                   int64_t token_row,
                   int64_t experts,
                   void* logits,
                   bool accumulate);

  // wide v [rows,experts] = sigmoid(v + bias[e]); bias may be null
  void (*sigmoid)(void* v, int64_t rows, int64_t experts, const void* bias);
  // wide v [rows,experts] = softmax of the k largest of v + bias in each row, 0 elsewhere; of equal ones the
  // first is the larger, and a NaN makes a row of NaN
  void (*softmax)(void* v, int64_t rows, int64_t experts, const void* bias, int64_t k);
  // out [rows,R] = γ ⊙ h + add; wide h, wide add [R] or null; out in operands, or wide
  void (*gate)(const void* h,
               int64_t h_row,
               int64_t rows,
               const RowGates& gates,
               const void* add,
               void* out,
               int64_t out_row,
               bool wide_out);
  // wide sums[r] += Σ_rows h[·,r]
  void (*column_sums)(const void* h, int64_t h_row, int64_t rows, int64_t cols, void* sums);
  // wide d [rows,experts] = Σ_{r in e} v[i,r]·h[i,r]
  void (*expert_dots)(const void* v,
                      int64_t v_row,
                      const void* h,
                      int64_t h_row,
                      int64_t rows,
                      const int64_t* starts,
                      int64_t experts,
                      void* d);
  // element out = wide in, rounded; wide out = element in
  void (*narrow)(const void* in, int64_t in_row, int64_t rows, int64_t cols, void* out, int64_t out_row);
  // element out [cols,rows] = wide inᵀ, rounded
  void (*narrow_turned)(
      const void* in, int64_t in_row, int64_t rows, int64_t cols, void* out, int64_t out_row);
  void (*widen)(const void* in, int64_t in_row, int64_t rows, int64_t cols, void* out, int64_t out_row);
};

const Kernels& kernels(Element type);  // of the best instruction set this CPU has, or of MOLE_INSTRUCTION_SET
const char* instruction_set();         // its name
bool beats_torch(Element type);        // whether these kernels are faster than torch's own product here

}  // namespace mole
