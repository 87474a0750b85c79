// Latent attention before and after attention itself: see model/layers/latent_attention.py.
#pragma once

#include "gemm/linear.h"
#include "token_ops.h"

namespace {

// x [rows, heads, inputs] times a weight [outputs, inputs] of each head → out [rows, heads, outputs].
// Rows are *_row_stride and heads *_head_stride elements apart; outputs: a multiple of a panel's.
void head_linear(const Weight* weights, int64_t heads, const bf16* x, int64_t rows,
                 int64_t x_row_stride, int64_t x_head_stride, bf16* out, int64_t out_row_stride,
                 int64_t out_head_stride, int threads) {
  const int64_t inputs = weights->inputs, panels = weights->outputs / PANEL;
  const int64_t span = rows_at_once(*weights, rows), spans = (rows + span - 1) / span;
  if (heads * rows * inputs * weights->outputs < PARALLEL_PRODUCTS) threads = 1;
  const Rows gathered = allocate_rows(*weights, 0, heads * rows);
  divide(threads, heads, 1, [=](int64_t head, int64_t last) {
    for (; head < last; head++) {
      const Rows of_head = slice_rows(*weights, gathered, head * rows, rows);
      for (int64_t r = 0; r < rows; r++)
        take_row(*weights, x + r * x_row_stride + head * x_head_stride, of_head, r);
    }
  });
  const int64_t items = heads * spans * panels;
  const int64_t size = items_per_piece(items, inputs, 1, std::min(rows, span), threads);
  divide(threads, items, size, [=](int64_t first_item, int64_t last_item) {
    float* scratch = thread_scratch<float>(scratch_size(*weights, span, 1));
    Carried carried;
    for (int64_t item = first_item; item < last_item; item++) {
      const int64_t panel = item % panels, head = item / panels / spans;
      const int64_t first = item / panels % spans * span, count = std::min(span, rows - first);
      bf16* to = out + first * out_row_stride + head * out_head_stride + panel * PANEL;
      rows_times_panels<1>(weights[head], {panel},
                           slice_rows(*weights, gathered, head * rows + first, count), scratch,
                           carried, (panel + 1) % panels,
                           [&](int64_t r, const vec_f32(&sums)[1][VECTORS]) {
                             write_row(sums[0], to + r * out_row_stride, PANEL);
                           });
    }
    release_tiles(carried.tiles);
  });
}

// query [tokens, heads, plain + rotary]: its last values, rotated → the last values of out [tokens,
// heads, rank + rotary]. latent [tokens, rank + rotary]: its first values, normalized, and its last
// ones, rotated → their slots of the cache: blocks of `block_size` slots are `block_stride` bytes
// apart; form: see kv_vector.h. cos_sin: see rotate_and_write.
void write_latents(const bf16* query, const bf16* latent, const float* norm, float eps,
                   const float* cos_sin, uint8_t* kv, int64_t form, int64_t block_size,
                   int64_t block_stride,
                   const int64_t* slot_mapping, int64_t tokens, int64_t heads, int64_t plain,
                   int64_t rank, int64_t rotary, bf16* out, int threads) {
  if (tokens * heads * rotary < 1 << 13) threads = 1;
  divide(threads, tokens, rows_per_piece(tokens, threads), [=](int64_t first, int64_t last) {
    for (int64_t token = first; token < last; token++) {
      const float *cos = cos_sin + token * rotary, *sin = cos + rotary / 2;
      const bf16* from = latent + token * (rank + rotary);
      const int64_t slot = slot_mapping[token], block = slot / block_size;
      uint8_t* to = kv + block * block_stride +
                    (slot - block * block_size) * kv_vector_bytes(form, rank + rotary);
      const float factor = norm_factor(sum_of_squares(from, rank), rank, eps);
      const auto compute = [&](auto* values) {
        for (int64_t i = 0; i < rank; i += LANES)
          store_values(values + i, load_bf16(from + i) * factor * load(norm + i));
        rotate_head(from + rank, nullptr, 1, cos, sin, rotary, rotary, values + rank);
      };
      if (form == KV_BF16) {
        compute((bf16*)to);
      } else {
        float* values = thread_scratch<float>(rank + rotary);
        compute(values);
        write_vector(values, rank + rotary, form, to);
      }
      for (int64_t row = token * heads; row < (token + 1) * heads; row++)
        rotate_head(query + row * (plain + rotary) + plain, nullptr, 1, cos, sin, rotary, rotary,
                    out + row * (rank + rotary) + rank);
    }
  });
}

}  // namespace
