// The online softmax of attention and the weighted sum of the values of a span of positions.
#pragma once

#include "scores.h"

namespace {

constexpr int MIXED_ROWS = 6;  // rows that share a pass over the values
constexpr float LOG2_E = 1.44269504088896f;

// The running softmax of one row (online softmax: Milakov and Gimelshein, 2018), in powers of 2.
struct RunningSoftmax {
  float max;                 // of the scores so far, times log2(e)
  alignas(64) vec_f32 sums;  // of 2^(score - max), to be added up
};

// How scores become exponents of 2: times `factor`, after they were capped softly at `cap`, if that
// is not 0, when multiplied by `scale`.
struct ScoreScale {
  float factor, scale, cap;
};

// The scales of a span's keys and values in 8 bits.
struct SpanScales {
  alignas(64) float keys[SPAN], values[SPAN];
};

// Not inlined, so that it rounds alike wherever it is used: see merge_rows.
__attribute__((noinline)) static void rescale_row(float by_exponent, int64_t head_dim,
                                                  RunningSoftmax& row, float* output) {
  const vec_f32 factor = power_of_2(broadcast(by_exponent));
  row.sums *= factor;
  for (int64_t i = 0; i < head_dim; i += LANES) store(output + i, load(output + i) * factor);
}

// Turns a row's scores of PARTS vectors of a span, of which positions [from, to) are visible (all
// without MASKED), into weights relative to the largest score so far, and rescales the row's sums
// and output to that. The weights replace the scores, or go to `weights` as bf16 [SPAN]; they and
// the scores are multiplied by the scales of values and keys, if there are any.
template <int PARTS, bool MASKED>
INLINE void softmax_span(float* scores, [[maybe_unused]] bf16* weights, const ScoreScale& scale,
                         const SpanScales* scales, int64_t from, int64_t to, int64_t head_dim,
                         RunningSoftmax& row, float* output) {
  vec_i32 lane;
  for (int i = 0; i < LANES; i++) lane[i] = i;
  const vec_f32 masked = broadcast(-INFINITY);
  vec_f32 score[PARTS], part_max = masked, sums = {};
  for (int p = 0; p < PARTS; p++) {
    score[p] = load(scores + p * LANES);
    if (scales) score[p] *= load(scales->keys + p * LANES);
    if (scale.cap) score[p] = cap_softly(score[p] * scale.scale, scale.cap);
    if (MASKED) {
      const vec_i32 position = lane + p * LANES;
      score[p] = (position >= (int32_t)from) & (position < (int32_t)to) ? score[p] : masked;
    }
    part_max = score[p] > part_max ? score[p] : part_max;
  }
  const float max = std::max(row.max, reduce_max(part_max) * scale.factor);
  // If nothing is visible yet, not even a sink, max is -inf, too.
  const float base = max > -INFINITY ? max : 0;
  for (int p = 0; p < PARTS; p++) {
    score[p] = power_of_2(score[p] * scale.factor - base);
    sums += score[p];
    if (scales) score[p] *= load(scales->values + p * LANES);
  }
#if BF16_DOT
  for (int p = 0; p < SPAN / LANES; p++)
    store_bf16(weights + p * LANES, p < PARTS ? score[p] : vec_f32{});
#else
  for (int p = 0; p < PARTS; p++) store(scores + p * LANES, score[p]);
#endif
  if (max > row.max) {
    if (row.max > -INFINITY) rescale_row(row.max - max, head_dim, row, output);
    row.max = max;
  }
  row.sums += sums;
}

// The softmax and output of a row after some chunks of positions.
struct RowTotal {
  float max, sum;
};

// Adds a chunk's softmax and output [head_dim] to those of the chunks before it. Not inlined: the
// compiler chooses which of two products it adds without rounding, and must choose alike.
__attribute__((noinline)) static void merge_rows(const RowTotal& chunk, const float* chunk_output,
                                                 int64_t head_dim, RowTotal& total, float* output) {
  const float max = std::max(total.max, chunk.max);
  if (max == -INFINITY) return;
  const vec_f32 keep = power_of_2(broadcast(total.max - max));
  const vec_f32 add = power_of_2(broadcast(chunk.max - max));
  total.sum = total.sum * keep[0] + chunk.sum * add[0];
  total.max = max;
  for (int64_t i = 0; i < head_dim; i += LANES)
    store(output + i, load(output + i) * keep + load(chunk_output + i) * add);
}

#if BF16_DOT
// Two positions' values of 32 dimensions as pairs, in an order that `restore_order` undoes.
INLINE void interleave(__m512i even, __m512i odd, vec_i32& low, vec_i32& high) {
  low = (vec_i32)_mm512_unpacklo_epi16(even, odd);
  high = (vec_i32)_mm512_unpackhi_epi16(even, odd);
}

// Values of `count` positions [count, head_dim] → [32 or 64 positions / 2, head_dim, 2], padded
// with zeros.
INLINE void prepare_values(const bf16* const* rows, int64_t count, int64_t head_dim, bf16* to) {
  const __m512i zero = _mm512_setzero_si512();
  for (int64_t i = 0; i < (count + 31) / 32 * 32; i += 2, to += 2 * head_dim)
    for (int64_t d = 0; d < head_dim; d += 32) {
      vec_i32 low, high;
      interleave(i < count ? _mm512_loadu_si512(rows[i] + d) : zero,
                 i + 1 < count ? _mm512_loadu_si512(rows[i + 1] + d) : zero, low, high);
      store_i32(to + d * 2, low);
      store_i32(to + d * 2 + 32, high);
    }
}

INLINE void restore_order(vec_f32& low, vec_f32& high) {
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second =
      _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  const __m512 a = (__m512)low, b = (__m512)high;
  low = (vec_f32)_mm512_permutex2var_ps(a, first, b);
  high = (vec_f32)_mm512_permutex2var_ps(a, second, b);
}

// output [COUNT, PARTS vectors] += weights [COUNT, SPAN] times `pairs` pairs of positions' values,
// which `load_pair(i, value)` loads interleaved.
template <int COUNT, int PARTS, typename LoadPair>
INLINE void add_weighted_pairs(const bf16* weights, int64_t pairs, int64_t head_dim, float* output,
                               LoadPair load_pair) {
  vec_f32 acc[COUNT][PARTS];
  for (int r = 0; r < COUNT; r++)
    for (int p = 0; p < PARTS; p++) acc[r][p] = load(output + r * head_dim + p * LANES);
  for (int64_t i = 0; i < pairs; i++) {
    vec_i32 value[PARTS];
    load_pair(i, value);
#pragma GCC unroll 8
    for (int r = 0; r < COUNT; r++) {
      int32_t pair;
      memcpy(&pair, weights + r * SPAN + 2 * i, 4);
#pragma GCC unroll 4
      for (int p = 0; p < PARTS; p++)
        acc[r][p] = dot_bf16(acc[r][p], pair - vec_i32{}, keep_in_register(value[p]));
    }
  }
  for (int r = 0; r < COUNT; r++)
    for (int p = 0; p < PARTS; p++) store(output + r * head_dim + p * LANES, acc[r][p]);
}

// output [rows, head_dim] += weights [rows, SPAN] times values of `count` positions: interleaved
// ones, or, if that is null, those of `value_rows`. They are then interleaved as they are
// multiplied, for every six rows anew, by units that do not multiply.
INLINE void mix_pairs(const bf16* weights, const bf16* values, const bf16* const* value_rows,
                      int64_t rows, int64_t count, int64_t head_dim, float* output) {
  const auto mix = [&](int64_t first, int64_t part, auto constant, auto parts) {
    const auto add = [&](auto load_pair) {
      add_weighted_pairs<constant.value, parts.value>(
          weights + first * SPAN, (count + 1) / 2, head_dim, output + first * head_dim + part,
          load_pair);
    };
    if (values)
      add([&](int64_t i, vec_i32* value) {
        for (int p = 0; p < parts.value; p++)
          value[p] = load_i32(values + 2 * (i * head_dim + part + p * LANES));
      });
    else
      add([&](int64_t i, vec_i32* value) {
        const bf16 *even = value_rows[2 * i] + part, *odd = value_rows[2 * i + 1] + part;
        for (int p = 0; p < parts.value; p += 2)
          interleave(_mm512_loadu_si512(even + p * LANES), _mm512_loadu_si512(odd + p * LANES),
                     value[p], value[p + 1]);
      });
  };
  for (int64_t part = 0; part < head_dim; part += 64)
    for_row_parts<MIXED_ROWS>(rows, [&](int64_t first, auto constant) {
      if (head_dim - part >= 64)
        mix(first, part, constant, std::integral_constant<int, 4>());
      else
        mix(first, part, constant, std::integral_constant<int, 2>());
    });
}

// output [rows, head_dim] += weights bf16 [rows, SPAN] times `count` interleaved values, by AMX.
INLINE void mix_tiles(const bf16* weights, const bf16* values, int64_t rows, int64_t count,
                      int64_t head_dim, float* output) {
  asm volatile("" : : : "memory");
  const bool two_row_tiles = rows > 16, two_spans = count > 32;
  const int64_t stride = SPAN * 2, output_stride = head_dim * 4;
  _tile_loadd(4, weights, stride);
  if (two_row_tiles) _tile_loadd(5, weights + 16 * SPAN, stride);
  if (two_spans) _tile_loadd(1, weights + 32, stride);
  if (two_spans && two_row_tiles) _tile_loadd(3, weights + 16 * SPAN + 32, stride);
  for (int64_t d = 0; d < head_dim; d += 16) {
    _tile_loadd(0, output + d, output_stride);
    _tile_loadd(6, values + d * 2, output_stride);
    _tile_dpbf16ps(0, 4, 6);
    if (two_row_tiles) {
      _tile_loadd(2, output + 16 * head_dim + d, output_stride);
      _tile_dpbf16ps(2, 5, 6);
    }
    if (two_spans) {
      _tile_loadd(7, values + 32 * head_dim + d * 2, output_stride);
      _tile_dpbf16ps(0, 1, 7);
      if (two_row_tiles) _tile_dpbf16ps(2, 3, 7);
    }
    _tile_stored(0, output + d, output_stride);
    if (two_row_tiles) _tile_stored(2, output + 16 * head_dim + d, output_stride);
  }
}

#else

// Values of `count` positions [count, head_dim] as float32.
INLINE void prepare_values(const bf16* const* rows, int64_t count, int64_t head_dim, float* to) {
  for (int64_t i = 0; i < count; i++, to += head_dim)
    for (int64_t d = 0; d < head_dim; d += LANES) store(to + d, load_bf16(rows[i] + d));
}

// output [COUNT, 2 vectors] += weights [COUNT, SPAN] times values of `count` positions, which
// `load_value(i, value)` loads.
template <int COUNT, typename LoadValue>
INLINE void add_weighted_values(const float* weights, int64_t count, int64_t head_dim,
                                float* output, LoadValue load_value) {
  vec_f32 acc[COUNT][2];
  for (int r = 0; r < COUNT; r++)
    for (int p = 0; p < 2; p++) acc[r][p] = load(output + r * head_dim + p * LANES);
  for (int64_t i = 0; i < count; i++) {
    vec_f32 value[2];
    load_value(i, value);
#pragma GCC unroll 8
    for (int r = 0; r < COUNT; r++) {
      const vec_f32 weight = broadcast(weights[r * SPAN + i]);
      acc[r][0] += weight * value[0];
      acc[r][1] += weight * value[1];
    }
  }
  for (int r = 0; r < COUNT; r++)
    for (int p = 0; p < 2; p++) store(output + r * head_dim + p * LANES, acc[r][p]);
}

// output [rows, head_dim] += weights [rows, SPAN] times values of `count` positions: converted ones,
// or, if that is null, those of `value_rows`, which are then converted for every few rows anew.
INLINE void mix_values(const float* weights, const float* values, const bf16* const* value_rows,
                       int64_t rows, int64_t count, int64_t head_dim, float* output) {
  for (int64_t part = 0; part < head_dim; part += 2 * LANES)
    for_row_parts<MIXED_ROWS>(rows, [&](int64_t first, auto constant) {
      const auto add = [&](auto load_value) {
        add_weighted_values<constant.value>(weights + first * SPAN, count, head_dim,
                                            output + first * head_dim + part, load_value);
      };
      if (values)
        add([&](int64_t i, vec_f32(&value)[2]) {
          for (int p = 0; p < 2; p++) value[p] = load(values + i * head_dim + part + p * LANES);
        });
      else
        add([&](int64_t i, vec_f32(&value)[2]) {
          for (int p = 0; p < 2; p++) value[p] = load_bf16(value_rows[i] + part + p * LANES);
        });
    });
}

#endif

}  // namespace
