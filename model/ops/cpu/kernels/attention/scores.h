// The scores of attention: queries times the keys of a span of positions.
#pragma once

#include "../gemm/amx.h"
#include "../vectors.h"

namespace {

constexpr int64_t SPAN = 64;             // positions that are processed together
constexpr int KEYS = 16;                 // of them, the keys whose scores are computed together
constexpr int64_t BLOCK_ROWS = BF16_DOT ? 32 : 12;  // the most query rows of a pass over a span
constexpr int64_t MAX_HEAD_DIM = 576;

// Query rows of a pass over a span: two AMX tiles, or few enough that their scores and output stay
// in the first-level cache.
INLINE int64_t block_rows() { return use_amx() ? BLOCK_ROWS : 12; }

// Calls `f` with the first row and the number of rows, a compile-time constant, of each of the
// fewest parts of up to MAX rows, which are about equal.
template <int MAX, typename F>
INLINE void for_row_parts(int64_t rows, F f) {
  for (int64_t first = 0, parts = (rows + MAX - 1) / MAX; parts > 0; parts--) {
    const int64_t count = (rows - first + parts - 1) / parts;
    with_constant<MAX>(count, [&](auto constant) { f(first, constant); });
    first += count;
  }
}

#if VECTOR_BITS > 128
#if VECTOR_BITS == 512
using Register = __m512i;
#define INTRINSIC(name) _mm512_##name
#else
using Register = __m256i;
#define INTRINSIC(name) _mm256_##name
#endif

// Transposes, in each four registers, every 16 bytes as a matrix of 4 by 4 values of 32 bits.
template <int COUNT>
INLINE void transpose_fours(Register (&r)[COUNT]) {
  Register t[COUNT];
  for (int i = 0; i < COUNT / 2; i++) {
    t[2 * i] = INTRINSIC(unpacklo_epi32)(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = INTRINSIC(unpackhi_epi32)(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < COUNT / 4; i++) {
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
  for (int64_t d = 0; d < head_dim; d += 8) {
    // Loads, of which there can be more at a time, save half of the shuffles.
    __m512i r[4];
    for (int i = 0; i < 4; i++) {
      const auto part = [&](int row) { return _mm_loadu_si128((const __m128i*)(rows[row] + d)); };
      r[i] = _mm512_maskz_broadcast_i32x4(0x000f, part(i));
      r[i] = _mm512_mask_broadcast_i32x4(r[i], 0x00f0, part(i + 4));
      r[i] = _mm512_mask_broadcast_i32x4(r[i], 0x0f00, part(i + 8));
      r[i] = _mm512_mask_broadcast_i32x4(r[i], 0xf000, part(i + 12));
    }
    transpose_fours(r);
    for (int i = 0; i < 4; i++) _mm512_storeu_si512(to + (d / 2 + i) * 2 * KEYS, r[i]);
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

// COUNT queries times GROUPS groups of 16 transposed keys. Each score is added up in the order of the
// dimensions, whatever the other rows and groups.
template <int COUNT, int GROUPS>
INLINE void score_rows(const Query* query, const bf16* keys, int64_t head_dim, float* scores) {
  constexpr int GROUP_PARTS = KEYS / LANES, PARTS = GROUPS * GROUP_PARTS;
  vec_f32 acc[COUNT][PARTS] = {};
  for (int64_t k = 0; k < head_dim; k += 2) {
    vec_i32 pairs[PARTS];
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; p++)
      pairs[p] = keep_in_register(load_i32(keys + p / GROUP_PARTS * KEYS * head_dim + k * KEYS +
                                           p % GROUP_PARTS * 2 * LANES));
#pragma GCC unroll 8
    for (int r = 0; r < COUNT; r++) {
#if BF16_DOT
      int32_t pair;
      memcpy(&pair, query + r * head_dim + k, 4);
#pragma GCC unroll 4
      for (int p = 0; p < PARTS; p++)
        acc[r][p] = dot_bf16(acc[r][p], pair - vec_i32{}, pairs[p]);
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

// query [rows, head_dim] times `groups` groups of 16 transposed keys [groups, head_dim / 2, 16, 2]
// → scores [rows, SPAN]. With AMX: up to 32 rows, of which memory is read and written to the end of
// the last tile of `tile_rows` rows.
INLINE void score(const Query* query, const bf16* keys, int64_t rows, int64_t groups,
                  int64_t head_dim, float* scores, [[maybe_unused]] int64_t tile_rows,
                  [[maybe_unused]] int64_t& configured_rows) {
#if BF16_DOT
  if (use_amx()) {
    asm volatile("" : : : "memory");
    if (configured_rows != tile_rows) configure_tiles(configured_rows = tile_rows);
    for (int64_t g = 0; g < groups; g++, keys += KEYS * head_dim, scores += KEYS) {
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
    }
    return;
  }
  // The sums of six rows with a span, or with a group of its keys, stay in registers.
  if (groups == SPAN / KEYS)
    return for_row_parts<6>(rows, [&](int64_t first, auto count) {
      score_rows<count.value, SPAN / KEYS>(query + first * head_dim, keys, head_dim,
                                           scores + first * SPAN);
    });
  constexpr int SCORED_ROWS = 6;
#else
  constexpr int SCORED_ROWS = VECTOR_BITS == 512 ? 8 : 3;  // whose scores stay in registers
#endif
  for (int64_t g = 0; g < groups; g++)
    for_row_parts<SCORED_ROWS>(rows, [&](int64_t first, auto count) {
      score_rows<count.value, 1>(query + first * head_dim, keys + g * KEYS * head_dim, head_dim,
                                 scores + first * SPAN + g * KEYS);
    });
}

}  // namespace
