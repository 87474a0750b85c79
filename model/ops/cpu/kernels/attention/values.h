// The online softmax of attention and the weighted sum of the values of a span of positions.
#pragma once

#include "../kv_vector.h"
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

#if BF16_DOT
// Values of the first PARTS vectors of a span as bf16, and zeros for the rest.
template <int PARTS>
INLINE void store_bf16_span(bf16* to, const vec_f32 (&values)[PARTS]) {
  for (int p = 0; p < SPAN / LANES; p += 2) {
    const vec_f32 low = p < PARTS ? values[p] : vec_f32{};
    const vec_f32 high = p + 1 < PARTS ? values[p + 1] : vec_f32{};
    store_i32(to + p * LANES, (vec_i32)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
  }
}
#endif

// Not inlined, so that it rounds alike wherever it is used: see merge_rows.
__attribute__((noinline)) static void rescale_row(float by_exponent, int64_t head_dim,
                                                  RunningSoftmax& row, float* output) {
  const vec_f32 factor = power_of_2(broadcast(by_exponent));
  row.sums *= factor;
  for (int64_t i = 0; i < head_dim; i += LANES) store(output + i, load(output + i) * factor);
}

// Rows whose scores of a span become weights.
struct SoftmaxRows {
  float* scores;  // [rows, SPAN]
  bf16* weights;  // likewise
  const ScoreScale& scale;
  const SpanScales* scales;                    // or null
  const int64_t *first_visible, *visible_end;  // positions that each row sees
  int64_t at, head_dim;                        // at: the first position of the span
  RunningSoftmax* softmax;
  float* output;  // [rows, head_dim]
};

// Turns scores of PARTS groups of keys, of which each row sees some (all without MASKED), into
// weights relative to the largest score so far, and rescales the row's sums and output to that. The
// weights replace the scores, or go to `weights` as bf16; they and the scores are multiplied by the
// scales of values and keys, if there are any. PLAIN: there are none, and no cap of scores.
// `end_row(r)` is called after each row.
template <int PARTS, bool MASKED, bool PLAIN, typename F>
__attribute__((noinline)) void softmax_rows(const SoftmaxRows& rows, int64_t count, F end_row) {
  constexpr int VECTORS_USED = PARTS * KEYS / LANES;
  vec_i32 lane;
  for (int i = 0; i < LANES; i++) lane[i] = i;
  const ScoreScale scale = rows.scale;
  const vec_f32 masked = broadcast(-INFINITY);
  for (int64_t r = 0; r < count; r++) {
    float* scores = rows.scores + r * SPAN;
    RunningSoftmax& row = rows.softmax[r];
    vec_f32 score[VECTORS_USED], part_max, sums = {};
#pragma GCC unroll 16
    for (int p = 0; p < VECTORS_USED; p++) {
      score[p] = load(scores + p * LANES);
      if (!PLAIN && rows.scales) score[p] *= load(rows.scales->keys + p * LANES);
      if (!PLAIN && scale.cap) score[p] = cap_softly(score[p] * scale.scale, scale.cap);
      if (MASKED) {
        const vec_i32 position = lane + p * LANES;
        const int32_t from = (int32_t)std::max<int64_t>(0, rows.first_visible[r] - rows.at);
        const int32_t to = (int32_t)std::min(SPAN, rows.visible_end[r] - rows.at);
        score[p] = (position >= from) & (position < to) ? score[p] : masked;
      }
      part_max = p && part_max > score[p] ? part_max : score[p];
    }
    // Rarely is there a larger score; weights then need not wait until lanes are compared. Not with
    // a single vector, whose product GCC would use again below, rounded: not as with several.
    float max = row.max;
    if (VECTORS_USED == 1 || any_larger(part_max * scale.factor, max))
      max = std::max(max, reduce_max(part_max) * scale.factor);
    // If nothing is visible yet, not even a sink, max is -inf, too.
    const float base = max > -INFINITY ? max : 0;
#pragma GCC unroll 16
    for (int p = 0; p < VECTORS_USED; p++) {
      score[p] = power_of_2(score[p] * scale.factor - base);
      sums += score[p];
      if (!PLAIN && rows.scales) score[p] *= load(rows.scales->values + p * LANES);
    }
#if BF16_DOT
    store_bf16_span(rows.weights + r * SPAN, score);
#else
    for (int p = 0; p < VECTORS_USED; p++) store(scores + p * LANES, score[p]);
#endif
    if (max > row.max) {
      if (row.max > -INFINITY)
        rescale_row(row.max - max, rows.head_dim, row, rows.output + r * rows.head_dim);
      row.max = max;
    }
    row.sums += sums;
    end_row(r);
  }
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
INLINE void prepare_values(const bf16* const* rows, int64_t count, int64_t head_dim,
                           const NextSpan&, bf16* to) {
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

// The same of values in int8, but in the order of dimensions.
INLINE void prepare_int8_values(const uint8_t* const* rows, int64_t count, int64_t head_dim,
                                bf16* to) {
  for (int64_t i = 0; i < (count + 31) / 32 * 32; i += 2, to += 2 * head_dim)
    for (int64_t d = 0; d < head_dim; d += LANES) {
      const vec_f32 even = i < count ? load_int8(rows[i] + d) : vec_f32{};
      const vec_f32 odd = i + 1 < count ? load_int8(rows[i + 1] + d) : vec_f32{};
      store_i32(to + d * 2, (vec_i32)((vec_u32)even >> 16 | (vec_u32)odd));
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
#pragma GCC unroll 8
  for (int r = 0; r < COUNT; r++)
#pragma GCC unroll 4
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
#pragma GCC unroll 8
  for (int r = 0; r < COUNT; r++)
#pragma GCC unroll 4
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

#else

// Values of `count` positions [count, head_dim] as float32, in the order of outputs: of each two
// vectors the even dimensions, then the odd ones. Prefetches those of `next`.
INLINE void prepare_values(const bf16* const* rows, int64_t count, int64_t head_dim,
                           const NextSpan& next, float* to) {
  for (int64_t i = 0; i < count; i++, to += head_dim)
    for (int64_t d = 0; d < head_dim; d += 2 * LANES) {
      if (d % 32 == 0) __builtin_prefetch(next.values[i] + d * next.value_bytes, 0, 2);
      const vec_i32 pairs = load_i32(rows[i] + d);
      store(to + d, low_bf16(pairs));
      store(to + d + LANES, high_bf16(pairs));
    }
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

// output [rows, head_dim] += weights [rows, SPAN] times values of `count` positions: prepared ones,
// or, if that is null, those of `value_rows`, which are then converted for every few rows anew while
// the values of `next`, if that is not null, are prefetched. Not inlined: see `score`.
__attribute__((noinline)) static void mix_values(const float* weights, const float* values,
                                                 const bf16* const* value_rows, int64_t rows,
                                                 int64_t count, int64_t head_dim,
                                                 const NextSpan* next, float* output) {
  constexpr int64_t PART = 2 * LANES;  // dimensions
  for_row_parts<MIXED_ROWS>(rows, [&](int64_t first, auto constant) {
    for (int64_t part = 0; part < head_dim; part += PART) {
      const auto add = [&](auto load_value) {
        add_weighted_values<constant.value>(weights + first * SPAN, count, head_dim,
                                            output + first * head_dim + part, load_value);
      };
      const auto load_pairs = [&](int64_t i, vec_f32(&value)[2]) {
        const vec_i32 pairs = load_i32(value_rows[i] + part);
        value[0] = low_bf16(pairs), value[1] = high_bf16(pairs);
      };
      if (values) {
        add([&](int64_t i, vec_f32(&value)[2]) {
          for (int p = 0; p < 2; p++) value[p] = load(values + i * head_dim + part + p * LANES);
        });
      } else if (next && first == 0) {
        // Each part of 32 dimensions prefetches all of them, of as large a part of the positions.
        const uint8_t* const* next_values = next->values + part % 32 * SPAN / 32;
        const int64_t at = (part - part % 32) * next->value_bytes;
        add([&](int64_t i, vec_f32(&value)[2]) {
          __builtin_prefetch(next_values[i * PART / 32] + at, 0, 2);
          load_pairs(i, value);
        });
      } else {
        add(load_pairs);
      }
    }
  });
}

#endif

}  // namespace
