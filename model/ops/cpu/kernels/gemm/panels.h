// Rows times a weight's panels, in the number format that the unit multiplies.
#pragma once

#include "../scratch.h"
#include "int8/gemm.h"
#include "rows.h"
#if INT16_GEMM
#include "int16_gemm.h"
#else
#include "amx.h"
#include "bf16.h"
#include "int8/amx.h"
#endif

namespace {

// Memory for `count` rows in the form in which they are multiplied with this weight.
INLINE Rows allocate_rows(const Weight& weight, int index, int64_t count) {
  const int64_t inputs = weight.inputs;
  if (is_int8(weight)) {
    // With many rows, the blocks of a tile's rows are in different sets of the first-level cache.
    const int64_t stride = use_amx() && count > 32 ? (count + 31) / 64 * 64 + 32 : count;
    const int64_t scales = stride * (inputs / row_group(weight));
    const int64_t integers = stride * inputs * row_terms(weight);
    return {(const bf16*)shared_scratch<int8_t>(index, integers), count, false,
            shared_scratch<float>(index, scales + stride), stride,
            shared_scratch<int32_t>(index, scales)};
  }
#if INT16_GEMM
  const int64_t scales = count * scale_count(inputs);
  return {shared_scratch<bf16>(index, scales * INT16_GROUP), count, false,
          shared_scratch<float>(index, scales), count, nullptr};
#else
  // 512 values more, which may be read beyond the last row: see tile_rows.
  return {shared_scratch<bf16>(index, count * inputs + 512), count, use_amx(), nullptr, count, nullptr};
#endif
}

// Whether the rows that are multiplied with this weight are integers.
INLINE bool takes_integers(const Weight& weight) { return INT16_GEMM || is_int8(weight); }

// The rows x [rows, inputs] of a linear: x itself, or memory for its integers (see prepare_rows).
INLINE Rows rows_of(const Weight& weight, const bf16* x, int64_t rows) {
  if (takes_integers(weight)) return allocate_rows(weight, 0, rows);
  return {x, rows, false, nullptr, rows, nullptr};
}

// Fills row r of `rows`, which are integers, from x [inputs].
INLINE void quantize_row_of(const Weight& weight, const bf16* x, const Rows& rows, int64_t r) {
  if (is_int8(weight))
    return quantize_row_int8(weight, x,
                             (int8_t*)rows.data + r * row_block(weight, rows.stride) * row_terms(weight),
                             (float*)rows.scales + r, (int32_t*)rows.corrections + r, rows.stride);
#if INT16_GEMM
  quantize_row(x, weight.inputs, (int16_t*)rows.data + r * INT16_GROUP, (float*)rows.scales + r,
               rows.stride);
#endif
}

// Fills row r of `rows`, which are memory of allocate_rows, from x [inputs].
INLINE void take_row(const Weight& weight, const bf16* x, const Rows& rows, int64_t r) {
  const int64_t inputs = weight.inputs;
  if (takes_integers(weight)) return quantize_row_of(weight, x, rows, r);
  if (!rows.arranged) {
    memcpy((bf16*)rows.data + r * inputs, x, (size_t)inputs * 2);
    return;
  }
  for (int64_t k = 0; k < inputs; k += 32)
    memcpy((bf16*)rows.data + arranged_offset(r, rows.count, inputs, k), x + k, 64);
}

// Fills `rows` from x [rows.count, inputs] if they are integers.
INLINE void prepare_rows(const Weight& weight, const bf16* x, const Rows& rows, int threads) {
  if (!takes_integers(weight)) return;
  if (rows.count * weight.inputs < 1 << 14) threads = 1;
  divide(threads, rows.count, std::max<int64_t>(1, rows.count / (4 * threads)),
         [=, at = &weight](int64_t first, int64_t last) {
           for (int64_t r = first; r < last; r++)
             quantize_row_of(*at, x + r * at->inputs, rows, r);
         });
}

// At most `max_count` rows from `first` on, to be multiplied with this weight.
INLINE Rows slice_rows(const Weight& weight, const Rows& x, int64_t first, int64_t max_count) {
  const int64_t count = std::min(max_count, x.count - first);
  if (x.corrections)
    return {(const bf16*)((const int8_t*)x.data + first * row_block(weight, x.stride) * row_terms(weight)),
            count, false, x.scales + first, x.stride, x.corrections + first};
#if INT16_GEMM
  return {x.data + first * INT16_GROUP, count, false, x.scales + first, x.stride, nullptr};
#else
  return {x.data + first * weight.inputs, count, x.arranged, nullptr, count, nullptr};
#endif
}

// The number of float32 values that rows_times_panels needs as scratch.
INLINE int64_t scratch_size(const Weight& weight, int64_t rows, int64_t panels) {
#if BF16_DOT
  if (is_int8(weight) && on_tiles(weight, rows)) return integer_tiles_scratch(weight, panels);
#endif
  if (!use_amx() || is_int8(weight)) return panels * rows * PANEL;
  const int64_t unpacked =
      weight.kind == MXFP4 ? std::max(weight.inputs, 4 * MXFP4_GROUP) * PANEL / 2 : 0;
  return panels * (ROW_BLOCK * PANEL + unpacked);
}

// x [rows, inputs] times one panel, or two whose sums are used together, plus their biases; calls
// finish(r, sums [PANELS, 32]) for each row in turn. A row's products are added up in the same
// order whatever the number of rows: a result does not depend on the batch.
// next_panel: the one that this thread probably multiplies next.
template <int PANELS, typename Finish>
INLINE void rows_times_panels(const Weight& weight, const int64_t (&panels)[PANELS], const Rows& x,
                              float* scratch, [[maybe_unused]] Carried& carried,
                              [[maybe_unused]] int64_t next_panel, Finish finish) {
  vec_f32 bias[PANELS][VECTORS];
  for (int p = 0; p < PANELS; p++) load_bias(weight, panels[p], bias[p]);
#if BF16_DOT
  if (is_int8(weight) && on_tiles(weight, x.stride))
    return integer_tiles_times_panels<PANELS>(weight, panels, x, bias, scratch, carried.tiles,
                                              finish);
  if (use_amx() && !is_int8(weight))
    return tiles_times_panels<PANELS>(weight, panels, x, bias, scratch, carried.tiles, finish);
#endif
  if (is_int8(weight))
    return int8_times_panels<PANELS>(weight, panels, x, bias, scratch, finish);
#if INT16_GEMM
  int16_times_panels<PANELS>(weight, panels, x, bias, scratch, finish);
#else
#if BF16_DOT
  if (weight.compressed.data && x.count <= COMPRESSED_ROWS)
    return compressed_times_panels<PANELS>(weight, panels, next_panel, x, bias, scratch,
                                           carried.expanded, finish);
#endif
  bf16_times_panels<PANELS>(weight, panels, next_panel, x, bias, scratch, finish);
#endif
}

INLINE void release_tiles([[maybe_unused]] int64_t configuration) {
#if BF16_DOT
  if (configuration) _tile_release();
#endif
}

INLINE void store_value(bf16* to, float value) { *to = to_bf16(value); }
INLINE void store_value(float* to, float value) { *to = value; }

// Writes a panel's `count` outputs of a row, at most all of them.
template <typename T>
INLINE void write_row(const vec_f32 (&sums)[VECTORS], T* out, int64_t count) {
  if (count >= PANEL) {
    for (int v = 0; v < VECTORS; v++) store_values(out + v * LANES, sums[v]);
  } else {
    for (int64_t i = 0; i < count; i++) store_value(out + i, sums[i / LANES][i % LANES]);
  }
}

// The number of `rows` to multiply at a time: they stay in a core's second-level cache together
// with a panel, and the last part is not much smaller than the others.
INLINE int64_t rows_at_once(const Weight& weight, int64_t rows) {
  // Bytes. Processors with AMX have 2 MiB a core, those with BF16 alone (Zen 4, Zen 5) 1 MiB, which
  // the weights that are used and fetched share.
  const int64_t cache = BF16_DOT && !use_amx() ? 5 << 17 : 3 << 19;
  const int64_t row_bytes = weight.inputs * (is_int8(weight) ? row_terms(weight) : 2);
  const int64_t fitting = cache / row_bytes / ROW_BLOCK * ROW_BLOCK;
  const int64_t limit = std::max(ROW_BLOCK, fitting);
  rows = std::max<int64_t>(1, rows);  // the head has no rows in a step that samples no token
  const int64_t parts = (rows + limit - 1) / limit;
  return ((rows + parts - 1) / parts + ROW_BLOCK - 1) / ROW_BLOCK * ROW_BLOCK;
}

}  // namespace
