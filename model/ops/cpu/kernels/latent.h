// Latent attention before and after attention itself: see model/latent_attention.py.
#pragma once

#include "gemm/linear.h"
#include "token_ops.h"

namespace {

constexpr int64_t HEAD_ROWS = 64;  // rows of a head that are copied and multiplied at a time

// Rows of values of each head: those of a token's head are next to each other.
template <typename T>
struct HeadRows {
  T* data;
  int64_t row_stride, head_stride;

  T* at(int64_t row, int64_t head) const { return data + row * row_stride + head * head_stride; }
};

// x [rows, heads, inputs] times a weight [outputs, inputs] of each head → out [rows, heads, outputs]
void head_linear(const Weight* weights, int64_t heads, const bf16* x, int64_t rows,
                 int64_t x_row_stride, int64_t x_head_stride, bf16* out, int64_t out_row_stride,
                 int64_t out_head_stride, int threads) {
  const HeadRows<const bf16> from{x, x_row_stride, x_head_stride};
  const HeadRows<bf16> to{out, out_row_stride, out_head_stride};
  const int64_t inputs = weights->inputs, outputs = weights->outputs;
  const int64_t spans = (rows + HEAD_ROWS - 1) / HEAD_ROWS;
  if (heads * rows * inputs * outputs < PARALLEL_PRODUCTS) threads = 1;
  divide(threads, heads * spans, 1, [=](int64_t first, int64_t last) {
    bf16* copied = thread_scratch<bf16>(HEAD_ROWS * (inputs + outputs));
    bf16* results = copied + HEAD_ROWS * inputs;
    for (int64_t item = first; item < last; item++) {
      const int64_t head = item / spans, row = item % spans * HEAD_ROWS;
      const int64_t count = std::min(HEAD_ROWS, rows - row);
      for (int64_t r = 0; r < count; r++)
        memcpy(copied + r * inputs, from.at(row + r, head), (size_t)inputs * 2);
      multiply(weights + head, copied, count, results, 1, [](vec_f32 sums) { return sums; });
      for (int64_t r = 0; r < count; r++)
        memcpy(to.at(row + r, head), results + r * outputs, (size_t)outputs * 2);
    }
  });
}

// query [tokens, heads, plain + rotary]: its last values, rotated → the last values of out [tokens,
// heads, rank + rotary]. latent [tokens, rank + rotary]: its first values, normalized, and its last
// ones, rotated → their slots of kv [slots, rank + rotary]. cos_sin: see rotate_and_write.
void write_latents(const bf16* query, const bf16* latent, const float* norm, float eps,
                   const float* cos_sin, const int64_t* slot_mapping, int64_t tokens,
                   int64_t heads, int64_t plain, int64_t rank, int64_t rotary, bf16* kv, bf16* out,
                   int threads) {
  if (tokens * heads * rotary < 1 << 13) threads = 1;
  divide(threads, tokens, rows_per_piece(tokens, threads), [=](int64_t first, int64_t last) {
    for (int64_t token = first; token < last; token++) {
      const float *cos = cos_sin + token * rotary, *sin = cos + rotary / 2;
      const bf16* from = latent + token * (rank + rotary);
      bf16* to = kv + slot_mapping[token] * (rank + rotary);
      const float factor = norm_factor(sum_of_squares(from, rank), rank, eps);
      for (int64_t i = 0; i < rank; i += LANES)
        store_bf16(to + i, load_bf16(from + i) * factor * load(norm + i));
      rotate_head(from + rank, nullptr, 1, cos, sin, rotary, rotary, to + rank);
      for (int64_t row = token * heads; row < (token + 1) * heads; row++)
        rotate_head(query + row * (plain + rotary) + plain, nullptr, 1, cos, sin, rotary, rotary,
                    out + row * (rank + rotary) + rank);
    }
  });
}

}  // namespace
