// The steps of attention over a span of 64 positions: scores, softmax, weighted sum of the values.
#pragma once

#include "gemm/amx.h"
#include "vectors.h"

namespace {

constexpr int64_t SPAN = 64;             // positions that are processed together
constexpr int KEYS = 16;                 // of them, the keys whose scores are computed together
constexpr int64_t MAX_QUERY_ROWS = 32;   // (token, head) rows that share a KV head and a pass
constexpr int64_t MAX_HEAD_DIM = 256;

#if VECTOR_BITS > 128
#if VECTOR_BITS == 512
using Register = __m512i;
#define INTRINSIC(name) _mm512_##name
#else
using Register = __m256i;
#define INTRINSIC(name) _mm256_##name
#endif

// Transposes, in each four registers, every 16 bytes as a matrix of 4 by 4 values of 32 bits.
INLINE void transpose_fours(Register (&r)[LANES]) {
  Register t[LANES];
  for (int i = 0; i < LANES / 2; i++) {
    t[2 * i] = INTRINSIC(unpacklo_epi32)(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = INTRINSIC(unpackhi_epi32)(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < LANES / 4; i++) {
    r[4 * i] = INTRINSIC(unpacklo_epi64)(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = INTRINSIC(unpackhi_epi64)(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = INTRINSIC(unpacklo_epi64)(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = INTRINSIC(unpackhi_epi64)(t[4 * i + 1], t[4 * i + 3]);
  }
}
#undef INTRINSIC
#endif

// Keys of 16 positions [KEYS, head_dim] → [head_dim / 2, KEYS, 2]
INLINE void transpose_keys(const bf16* const* rows, int64_t head_dim, bf16* to) {
#if VECTOR_BITS == 512
  for (int64_t d = 0; d < head_dim; d += 32) {
    __m512i r[16], t[16];
    for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(rows[i] + d);
    transpose_fours(r);
    for (int i = 0; i < 4; i++) {
      t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
      t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
      t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
      t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
      _mm512_storeu_si512(to + (d / 2 + i) * 32, _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88));
      _mm512_storeu_si512(to + (d / 2 + i + 8) * 32, _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd));
      _mm512_storeu_si512(to + (d / 2 + i + 4) * 32,
                          _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88));
      _mm512_storeu_si512(to + (d / 2 + i + 12) * 32,
                          _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd));
    }
  }
#elif VECTOR_BITS == 256
  for (int64_t d = 0; d < head_dim; d += 16)
    for (int part = 0; part < KEYS; part += 8) {
      __m256i r[8];
      for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_si256((const __m256i*)(rows[part + i] + d));
      transpose_fours(r);
      for (int i = 0; i < 4; i++) {
        bf16* out = to + (d / 2 + i) * 2 * KEYS + part * 2;
        _mm256_storeu_si256((__m256i*)out, _mm256_permute2x128_si256(r[i], r[i + 4], 0x20));
        _mm256_storeu_si256((__m256i*)(out + 8 * KEYS),
                            _mm256_permute2x128_si256(r[i], r[i + 4], 0x31));
      }
    }
#else
  for (int i = 0; i < KEYS; i++)
    for (int64_t k = 0; k < head_dim; k += 2) memcpy(to + k * KEYS + i * 2, rows[i] + k, 4);
#endif
}

// Queries stay bf16 where there is a fast product of bf16 pairs, and become float32 elsewhere.
#if BF16_DOT
using Query = bf16;
#else
using Query = float;
#endif

INLINE void load_queries(const bf16* from, int64_t count, Query* to) {
#if BF16_DOT
  memcpy(to, from, (size_t)count * 2);
#else
  for (int64_t i = 0; i < count; i += LANES) store(to + i, load_bf16(from + i));
#endif
}

template <int COUNT>
INLINE void score_rows(const Query* query, const bf16* keys, int64_t head_dim, float* scores) {
  constexpr int PARTS = KEYS / LANES;
  vec_f32 acc[COUNT][PARTS] = {};
  for (int64_t k = 0; k < head_dim; k += 2) {
    vec_i32 pairs[PARTS];
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; p++)
      pairs[p] = keep_in_register(load_i32(keys + k * KEYS + p * 2 * LANES));
#pragma GCC unroll 8
    for (int r = 0; r < COUNT; r++) {
#if BF16_DOT
      int32_t pair;
      memcpy(&pair, query + r * head_dim + k, 4);
      acc[r][0] = dot_bf16(acc[r][0], pair - vec_i32{}, pairs[0]);
#else
#pragma GCC unroll 4
      for (int p = 0; p < PARTS; p++) {
        acc[r][p] += (vec_f32)(pairs[p] << 16) * query[r * head_dim + k];
        acc[r][p] += (vec_f32)(pairs[p] & (int32_t)0xffff0000) * query[r * head_dim + k + 1];
      }
#endif
    }
  }
  for (int r = 0; r < COUNT; r++)
    for (int p = 0; p < PARTS; p++) store(scores + r * SPAN + p * LANES, acc[r][p]);
}

// query [rows, head_dim] times 16 transposed keys → 16 columns of scores [rows, SPAN]
INLINE void score(const Query* query, const bf16* keys, int64_t rows, int64_t head_dim,
                  float* scores, [[maybe_unused]] int64_t& configured_rows) {
#if BF16_DOT
  if (use_amx()) {
    asm volatile("" : : : "memory");
    const int64_t tile_rows = std::min<int64_t>(16, rows);
    if (configured_rows != tile_rows) configure_tiles(configured_rows = tile_rows);
    _tile_zero(0);
    _tile_zero(2);
    for (int64_t k = 0; k < head_dim; k += 32) {
      _tile_loadd(6, keys + k * 16, 64);
      _tile_loadd(4, query + k, head_dim * 2);
      _tile_dpbf16ps(0, 4, 6);
      if (rows > 16) {
        _tile_loadd(5, query + 16 * head_dim + k, head_dim * 2);
        _tile_dpbf16ps(2, 5, 6);
      }
    }
    _tile_stored(0, scores, SPAN * 4);
    if (rows > 16) _tile_stored(2, scores + 16 * SPAN, SPAN * 4);
    return;
  }
#endif
  constexpr int SCORED_ROWS = VECTOR_BITS == 512 ? 8 : 3;  // whose scores stay in registers
  for (int64_t r = 0; r < rows; r += SCORED_ROWS)
    with_constant<SCORED_ROWS>(std::min<int64_t>(SCORED_ROWS, rows - r), [&](auto constant) {
      score_rows<constant.value>(query + r * head_dim, keys, head_dim, scores + r * SPAN);
    });
}

// The running softmax of one row (online softmax: Milakov and Gimelshein, 2018).
struct RowSoftmax {
  float max, sum;  // of the scores so far, and of e^(score - max)
};

// Turns a row's scores of a span, of which positions [from, to) are visible, into weights relative
// to the largest score so far, and rescales the row's sums and output to that. The weights replace
// the scores, or go to `weights` as bf16 [SPAN]. cap: of the scores, softly; 0: none.
template <int PARTS>
INLINE void softmax_span(float* scores, bf16* weights, float scale, float cap, int64_t from,
                         int64_t to, RowSoftmax& row, float* output, int64_t head_dim) {
  vec_i32 lane;
  for (int i = 0; i < LANES; i++) lane[i] = i;
  const vec_f32 masked = broadcast(-INFINITY);
  vec_f32 weight[PARTS], part_max = masked, sums = {};
  for (int p = 0; p < PARTS; p++) {
    const vec_i32 position = lane + p * LANES;
    vec_f32 value = load(scores + p * LANES) * scale;
    if (cap) value = cap_softly(value, cap);
    weight[p] = (position >= (int32_t)from) & (position < (int32_t)to) ? value : masked;
    part_max = weight[p] > part_max ? weight[p] : part_max;
  }
  const float new_max = std::max(row.max, reduce_max(part_max));
  for (int p = 0; p < PARTS; p++) {
    // If nothing is visible yet, not even a sink, new_max is -inf, too.
    weight[p] = weight[p] == masked ? broadcast(0) : exponential(weight[p] - new_max);
    sums += weight[p];
  }
  for (int p = 0; p < SPAN / LANES; p++) {
    if (weights)
      store_bf16(weights + p * LANES, p < PARTS ? weight[p] : vec_f32{});
    else if (p < PARTS)
      store(scores + p * LANES, weight[p]);
  }
  if (new_max > row.max && row.max > -INFINITY) {
    const vec_f32 rescale = exponential(broadcast(row.max - new_max));
    row.sum *= rescale[0];
    for (int64_t i = 0; i < head_dim; i += LANES) store(output + i, load(output + i) * rescale);
  }
  row.max = new_max;
  row.sum += reduce_add(sums);
}

// output [COUNT, PARTS vectors] += weights [COUNT, SPAN] times values [count]
template <int COUNT, int PARTS>
INLINE void add_weighted_values(const float* weights, const bf16* const* values, int64_t count,
                                float* output, int64_t stride) {
  vec_f32 acc[COUNT][PARTS];
  for (int r = 0; r < COUNT; r++)
    for (int p = 0; p < PARTS; p++) acc[r][p] = load(output + r * stride + p * LANES);
  for (int64_t i = 0; i < count; i++) {
    vec_f32 value[PARTS];
#pragma GCC unroll 8
    for (int p = 0; p < PARTS; p++) value[p] = load_bf16(values[i] + p * LANES);
#pragma GCC unroll 4
    for (int r = 0; r < COUNT; r++) {
      const vec_f32 weight = broadcast(weights[r * SPAN + i]);
#pragma GCC unroll 8
      for (int p = 0; p < PARTS; p++) acc[r][p] += weight * value[p];
    }
  }
  for (int r = 0; r < COUNT; r++)
    for (int p = 0; p < PARTS; p++) store(output + r * stride + p * LANES, acc[r][p]);
}

// output [rows, head_dim] += weights [rows, SPAN] times values of `count` positions, by vectors.
INLINE void mix_values(const float* weights, const bf16* const* values, int64_t rows, int64_t count,
                       int64_t head_dim, float* output) {
  constexpr int MIXED_ROWS = VECTOR_BITS == 512 ? 4 : 2;  // that share a pass over the values
  const bf16* part_values[SPAN];
  for (int64_t part = 0; part < head_dim; part += 32) {
    const bool wide = VECTOR_BITS == 512 && head_dim - part >= 64;  // 64 dimensions, not 32
    for (int64_t i = 0; i < count; i++) part_values[i] = values[i] + part;
    for (int64_t r = 0; r < rows; r += MIXED_ROWS)
      with_constant<MIXED_ROWS>(std::min<int64_t>(MIXED_ROWS, rows - r), [&](auto constant) {
        float* to = output + r * head_dim + part;
        if (wide)
          add_weighted_values<constant.value, 64 / LANES>(weights + r * SPAN, part_values, count,
                                                          to, head_dim);
        else
          add_weighted_values<constant.value, 32 / LANES>(weights + r * SPAN, part_values, count,
                                                          to, head_dim);
      });
    if (wide) part += 32;
  }
}

#if BF16_DOT
// Values of `count` positions [count, head_dim] → [32 or 64 positions / 2, head_dim, 2], padded
// with zeros. Each 32 dimensions are in an order that `restore_order` undoes.
INLINE void interleave_values(const bf16* const* rows, int64_t count, int64_t head_dim, bf16* to) {
  const __m512i zero = _mm512_setzero_si512();
  for (int64_t i = 0; i < (count + 31) / 32 * 32; i += 2, to += 2 * head_dim)
    for (int64_t d = 0; d < head_dim; d += 32) {
      const __m512i even = i < count ? _mm512_loadu_si512(rows[i] + d) : zero;
      const __m512i odd = i + 1 < count ? _mm512_loadu_si512(rows[i + 1] + d) : zero;
      _mm512_storeu_si512(to + d * 2, _mm512_unpacklo_epi16(even, odd));
      _mm512_storeu_si512(to + d * 2 + 32, _mm512_unpackhi_epi16(even, odd));
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

// output [rows, head_dim] += weights bf16 [rows, SPAN] times `count` interleaved values, by AMX.
void mix_tiles(const bf16* weights, const bf16* values, int64_t rows, int64_t count,
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
#endif

}  // namespace
