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

// Where the next span's keys and values are. As many of them as a span has positions are prefetched
// while it is computed, evenly: processors drop prefetches that come faster than memory answers.
struct NextSpan {
  const uint8_t *keys[SPAN], *values[SPAN];
  int64_t value_bytes;  // of one value
};

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

// Queries and prepared values stay bf16 where there is a fast product of bf16 pairs, and become
// float32 elsewhere; keys are always bf16.
#if BF16_DOT
using Operand = bf16;
#else
using Operand = float;
#endif

#if VECTOR_BITS == 512
// 16 bytes of 16 rows, for `transpose_fours`. Loads, of which there can be more at a time, save half
// of the shuffles.
template <typename F>
INLINE void load_fours(__m512i (&r)[4], F address) {
  const auto part = [&](int row) { return _mm_loadu_si128((const __m128i*)address(row)); };
  for (int i = 0; i < 4; i++) {
    r[i] = _mm512_maskz_broadcast_i32x4(0x000f, part(i));
    r[i] = _mm512_mask_broadcast_i32x4(r[i], 0x00f0, part(i + 4));
    r[i] = _mm512_mask_broadcast_i32x4(r[i], 0x0f00, part(i + 8));
    r[i] = _mm512_mask_broadcast_i32x4(r[i], 0xf000, part(i + 12));
  }
}
#endif

// Keys of 16 positions [KEYS, head_dim] → transposed [head_dim / 2, KEYS, 2]
INLINE void transpose_keys(const bf16* const* rows, int64_t head_dim, bf16* to) {
#if VECTOR_BITS == 512
  for (int64_t d = 0; d < head_dim; d += 8) {
    __m512i r[4];
    load_fours(r, [&](int row) { return rows[row] + d; });
    transpose_fours(r);
    for (int i = 0; i < 4; i++) store_i32(to + (d + 2 * i) * KEYS, (vec_i32)r[i]);
  }
#elif VECTOR_BITS == 256
  for (int64_t d = 0; d < head_dim; d += 16)
    for (int part = 0; part < KEYS; part += 8) {
      __m256i r[8];
      for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_si256((const __m256i*)(rows[part + i] + d));
      transpose_fours(r);
      for (int i = 0; i < 4; i++) {
        bf16* out = to + (d + 2 * i) * KEYS + 2 * part;
        store_i32(out, (vec_i32)_mm256_permute2x128_si256(r[i], r[i + 4], 0x20));
        store_i32(out + 8 * KEYS, (vec_i32)_mm256_permute2x128_si256(r[i], r[i + 4], 0x31));
      }
    }
#else
  for (int i = 0; i < KEYS; i++)
    for (int64_t k = 0; k < head_dim; k++) to[(k / 2 * KEYS + i) * 2 + k % 2] = rows[i][k];
#endif
}

#if BF16_DOT
// Keys of 16 positions in int8 → transposed, as multiples of 2²⁴: steps in the highest bits of an
// integer become the high half of a float32 without a shift to the right.
INLINE void transpose_int8_keys(const uint8_t* const* rows, int64_t head_dim, bf16* to) {
  const int32_t highest = (int32_t)0xff000000;
  const auto to_float = [](vec_i32 v) { return (vec_u32) __builtin_convertvector(v, vec_f32); };
  for (int64_t d = 0; d < head_dim; d += 16) {
    __m512i r[4];
    load_fours(r, [&](int row) { return rows[row] + d; });
    transpose_fours(r);
    for (int i = 0; i < 4; i++, to += 4 * KEYS) {  // four dimensions
      const vec_i32 v = (vec_i32)r[i];
      store_i32(to, (vec_i32)(to_float(v << 24) >> 16 | to_float((v << 16) & highest)));
      store_i32(to + 2 * KEYS,
                (vec_i32)(to_float((v << 8) & highest) >> 16 | to_float(v & highest)));
    }
  }
}
#endif

INLINE void load_queries(const bf16* from, int64_t count, Operand* to) {
#if BF16_DOT
  memcpy(to, from, (size_t)count * 2);
#else
  for (int64_t i = 0; i < count; i += LANES) store(to + i, load_bf16(from + i));
#endif
}

#if BF16_DOT

// COUNT queries times GROUPS groups of 16 transposed keys. Each score is added up in the order of the
// dimensions, whatever the other rows and groups.
template <int COUNT, int GROUPS>
INLINE void score_rows(const Operand* query, const bf16* keys, int64_t head_dim, float* scores) {
  vec_f32 acc[COUNT][GROUPS];
#pragma GCC unroll 8
  for (int r = 0; r < COUNT; r++)
#pragma GCC unroll 4
    for (int g = 0; g < GROUPS; g++) acc[r][g] = vec_f32{};
  for (int64_t k = 0; k < head_dim; k += 2) {
    vec_i32 pairs[GROUPS];
#pragma GCC unroll 4
    for (int g = 0; g < GROUPS; g++)
      pairs[g] = keep_in_register(load_i32(keys + (g * head_dim + k) * KEYS));
#pragma GCC unroll 8
    for (int r = 0; r < COUNT; r++) {
      int32_t pair;
      memcpy(&pair, query + r * head_dim + k, 4);
#pragma GCC unroll 4
      for (int g = 0; g < GROUPS; g++) acc[r][g] = dot_bf16(acc[r][g], pair - vec_i32{}, pairs[g]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < COUNT; r++)
#pragma GCC unroll 4
    for (int g = 0; g < GROUPS; g++) store(scores + r * SPAN + g * LANES, acc[r][g]);
}

#else

// The same for one group. PREFETCHES: the KEYS vectors of `next_keys`, meanwhile.
template <int COUNT, bool PREFETCHES>
INLINE void score_rows(const Operand* query, const bf16* keys, int64_t head_dim,
                       const uint8_t* const* next_keys, int64_t value_bytes, float* scores) {
  constexpr int PARTS = KEYS / LANES;
  vec_f32 acc[COUNT][PARTS] = {};
  const auto multiply = [&](int64_t k, const vec_f32(&key)[PARTS]) {
#pragma GCC unroll 12
    for (int r = 0; r < COUNT; r++) {
      const vec_f32 value = broadcast(query[r * head_dim + k]);
#pragma GCC unroll 4
      for (int p = 0; p < PARTS; p++) acc[r][p] += value * key[p];
    }
  };
  const auto multiply_pairs = [&](int64_t k) {
    vec_f32 even[PARTS], odd[PARTS];
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; p++) {
      const vec_i32 pairs = load_i32(keys + k * KEYS + 2 * p * LANES);
      even[p] = low_bf16(pairs), odd[p] = high_bf16(pairs);
    }
    multiply(k, even);
    multiply(k + 1, odd);
  };
  if (PREFETCHES) {
    // 32 values, a cache line of bf16, with every two dimensions: KEYS vectors with all of them.
    for (int64_t i = 0, k = 0; i < KEYS; i++)
      for (int64_t at = 0; at < head_dim; at += 32, k += 2) {
        __builtin_prefetch(next_keys[i] + at * value_bytes, 0, 2);
        multiply_pairs(k);
      }
  } else {
    for (int64_t k = 0; k < head_dim; k += 2) multiply_pairs(k);
  }
  for (int r = 0; r < COUNT; r++)
    for (int p = 0; p < PARTS; p++) store(scores + r * SPAN + p * LANES, acc[r][p]);
}

#endif

// query [rows, head_dim] times `groups` groups of 16 transposed keys → scores [rows, SPAN]
// next: what to prefetch, or null. Not inlined: the compiler would have too few registers for it.
__attribute__((noinline)) static void score(const Operand* query, const bf16* keys, int64_t rows,
                                            int64_t groups, int64_t head_dim,
                                            [[maybe_unused]] const NextSpan* next, float* scores) {
#if BF16_DOT
  // The sums of six rows with a span, or with a group of its keys, stay in registers.
  if (groups == SPAN / KEYS)
    return for_row_parts<6>(rows, [&](int64_t first, auto count) {
      score_rows<count.value, SPAN / KEYS>(query + first * head_dim, keys, head_dim,
                                           scores + first * SPAN);
    });
  for (int64_t g = 0; g < groups; g++)
    for_row_parts<6>(rows, [&](int64_t first, auto count) {
      score_rows<count.value, 1>(query + first * head_dim, keys + g * KEYS * head_dim, head_dim,
                                 scores + first * SPAN + g * KEYS);
    });
#else
  // Rows whose scores stay in registers beside the keys.
  constexpr int SCORED_ROWS = VECTOR_BITS == 512 ? 12 : VECTOR_BITS == 256 ? 4 : 2;
  for (int64_t g = 0; g < groups; g++)
    for_row_parts<SCORED_ROWS>(rows, [&](int64_t first, auto count) {
      const auto score_part = [&](auto prefetches, const uint8_t* const* next_keys, int64_t bytes) {
        score_rows<count.value, prefetches.value>(query + first * head_dim,
                                                  keys + g * KEYS * head_dim, head_dim, next_keys,
                                                  bytes, scores + first * SPAN + g * KEYS);
      };
      if (next && first == 0)
        score_part(std::true_type(), next->keys + g * KEYS, next->value_bytes);
      else
        score_part(std::false_type(), nullptr, 0);
    });
#endif
}

}  // namespace
