// Rows as integers with scales, which are multiplied with weights of 8 and 4 bits.
//
// 32 to 128 inputs of a row share a scale, which maps the largest magnitude to 127 (ROWS_8) or to
// 32,639 (ROWS_16): an integer is off by at most one half. The integers of ROWS_16 have two terms of
// 8 bits, value = 256 · first + second; beside values that are rounded to bfloat16 they are as good
// as exact. With 8 bits, one large value makes the others of its group inexact. ROTATED_8 spreads
// it: the values of a group are multiplied with a Hadamard matrix, whose rows are orthonormal, as
// the weights were before they were rounded, so that the products are the same.
//
// Rows are stored as [inputs / 32, rows, terms, 32]; each group has a scale and a correction. AVX2
// multiplies ROWS_16 as integers of 16 bits: of four inputs, 0 and 2 are next to each other, then 1
// and 3. It adds two products of 8 bits in 16 bits: with INT8, whose codes plus 128 are up to 255,
// the sum of two neighbours is therefore 128 at most, like each of them. After a rotation this makes
// the steps of a row a fourth larger on average.
// Weights are multiplied as unsigned numbers, which are larger than their codes by a bias of 128 or
// 8: the correction, the sum of the row's integers times the negative bias, is where sums of
// products begin.
//
// A weight is (code + zero) · scale; symmetric weights have no zeros. Zeros are stored divided by
// the negative bias, so that they are multiplied with the correction.
#pragma once

#include "../vectors.h"

namespace {

typedef int8_t vec_i8 __attribute__((vector_size(LANES)));
typedef int8_t vec_i8_unaligned __attribute__((vector_size(LANES), aligned(1), may_alias));

// Scales of weights are stored times this as float16, so that small ones keep their bits.
constexpr float STORED_SCALE = 1 << 12;

INLINE bool is_int8(const Weight& weight) { return weight.kind >= INT8; }
constexpr int32_t code_bias(int64_t kind) { return kind == INT8 ? 128 : 8; }
// The terms of 8 bits of a row's integers.
INLINE int64_t row_terms(const Weight& weight) { return weight.rows == ROWS_16 ? 2 : 1; }
// Whether sums of products are kept in 16 bits, and whether two neighbours have to fit them.
constexpr bool sums_are_short(int64_t terms, int64_t bits) {
  return VECTOR_BITS == 256 && terms == 1 && bits == 4;
}
INLINE bool limits_neighbours(const Weight& weight) {
  return VECTOR_BITS == 256 && weight.kind == INT8 && row_terms(weight) == 1;
}

// The inputs of a row that share a scale; they share the weights' scales too. Integer sums over 128
// inputs fit 32 bits; those of AVX2 with codes of 4 and rows of 8 bits fit 16 bits over 32 inputs.
constexpr int64_t MAX_ROW_GROUP = 128;
INLINE int64_t row_group(const Weight& weight) {
  const int64_t bits = weight.kind == INT4 ? 4 : 8;
  int64_t group = sums_are_short(row_terms(weight), bits) ? 32 : MAX_ROW_GROUP;
  while (weight.group % group) group /= 2;
  return group;
}

// To the nearest integer, ties to even, for values below 2^22.
INLINE vec_i32 round_small(vec_f32 value) {
  return (vec_i32)(value + 12582912.0f) - 0x4b400000;  // 1.5 · 2^23
}

INLINE vec_f32 load_f16(const uint16_t* from) {
#if VECTOR_BITS == 512
  return (vec_f32)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#elif VECTOR_BITS == 256
  return (vec_f32)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
#else
  // The exponent's bias is 112 less than float32's; there are no infinities.
  const vec_i32 bits = __builtin_convertvector(*(const vec_i16_unaligned*)from, vec_i32);
  const vec_f32 magnitude = (vec_f32)((bits & 0x7fff) << 13) * 0x1p112f;
  return (vec_f32)((vec_i32)magnitude | (bits & 0x8000) << 16);
#endif
}

// Multiplies `count` vectors with the Hadamard matrix of their size, a power of two, in place. Its
// entries are 1 and -1; the rows are orthonormal after a division by the root of the size.
template <typename V>
INLINE void hadamard_across(V* values, int count) {
  for (int step = 1; step < count; step *= 2)
    for (int i = 0; i < count; i++) {
      if (i & step) continue;
      const V a = values[i], b = values[i + step];
      values[i] = a + b, values[i + step] = a - b;
    }
}

// `values`, each of whose lanes is exchanged with the one that is STEP further or before.
template <int STEP>
INLINE vec_f32 exchanged(vec_f32 values) {
  vec_i32 partner;
#pragma GCC unroll 16
  for (int lane = 0; lane < LANES; lane++) partner[lane] = lane ^ STEP;
  return __builtin_shuffle(values, partner);
}

// The same for the values within vectors.
template <int COUNT, int STEP = 1>
INLINE void hadamard(vec_f32 (&values)[COUNT]) {
  if constexpr (STEP < LANES) {
    vec_f32 sign;
#pragma GCC unroll 16
    for (int lane = 0; lane < LANES; lane++) sign[lane] = lane & STEP ? -1.0f : 1.0f;
#pragma GCC unroll 32
    for (int i = 0; i < COUNT; i++) values[i] = exchanged<STEP>(values[i]) + values[i] * sign;
    hadamard<COUNT, 2 * STEP>(values);
  } else {
#pragma GCC unroll 32
    for (int pair = 0; pair < COUNT / 2; pair++) {
      constexpr int DISTANCE = STEP / LANES;
      if constexpr (DISTANCE < COUNT) {
        const int i = pair / DISTANCE * 2 * DISTANCE + pair % DISTANCE;
        const vec_f32 a = values[i], b = values[i + DISTANCE];
        values[i] = a + b, values[i + DISTANCE] = a - b;
      }
    }
    if constexpr (STEP / LANES < COUNT) hadamard<COUNT, 2 * STEP>(values);
  }
}

// One row [inputs] → integers, scales and corrections, for this weight. The row is one of `stride`.
template <int GROUP>
__attribute__((noinline)) static void quantize_row_groups(const Weight& weight, const bf16* from,
                                                          int8_t* to, float* scales,
                                                          int32_t* corrections, int64_t stride) {
  constexpr int BLOCK_PARTS = INT8_BLOCK / LANES, PARTS = GROUP / LANES;
  const int64_t terms = row_terms(weight);
  const float largest = terms == 2 ? 32639 : 127;
  const float norm = weight.rows == ROTATED_8 ? 1 / std::sqrt((float)GROUP) : 1;
  for (int64_t k = 0; k < weight.inputs; k += GROUP) {
    vec_f32 value[PARTS], sums = {};
    vec_i32 max_bits = {}, infinite = {};
#pragma GCC unroll 32
    for (int i = 0; i < PARTS; i++) value[i] = load_bf16(from + k + i * LANES) * norm;
    if (weight.rows == ROTATED_8) hadamard(value);
#pragma GCC unroll 32
    for (int i = 0; i < PARTS; i++) {
      const vec_i32 bits = (vec_i32)value[i] & 0x7fffffff;
      max_bits = bits > max_bits ? bits : max_bits;
      infinite |= bits >= 0x7f800000;
      if (limits_neighbours(weight)) {
        const vec_i32 both = (vec_i32)(value[i] + exchanged<1>(value[i])) & 0x7fffffff;
        max_bits = both > max_bits ? both : max_bits;
      }
    }
    const bool is_finite = reduce_add((vec_f32)(infinite & 0x3f800000)) == 0;
    const float max = is_finite ? reduce_max((vec_f32)max_bits) : 0;
    const float factor = max > 0x1p-100f ? largest / max : 0;  // smaller values become 0
#pragma GCC unroll 32
    for (int i = 0; i < PARTS; i++) {
      const vec_i32 codes = is_finite ? round_small(value[i] * factor) : vec_i32{};
      int8_t* out = to + i / BLOCK_PARTS * stride * terms * INT8_BLOCK + i % BLOCK_PARTS * LANES;
      if (terms == 1) {
        *(vec_i8_unaligned*)out = __builtin_convertvector(codes, vec_i8);
        sums += __builtin_convertvector(codes, vec_f32);
        continue;
      }
      sums += __builtin_convertvector(codes, vec_f32);
#if VECTOR_BITS == 256
      const vec_i16 pairs = __builtin_convertvector(codes, vec_i16);
      *(vec_i16_unaligned*)(to + i / BLOCK_PARTS * stride * terms * INT8_BLOCK +
                            i % BLOCK_PARTS * 2 * LANES) =
          __builtin_shuffle(pairs, vec_i16{0, 2, 1, 3, 4, 6, 5, 7});
#else
      const vec_i32 first = (codes + 128) >> 8, second = codes - (first << 8);
      *(vec_i8_unaligned*)out = __builtin_convertvector(first, vec_i8);
      *(vec_i8_unaligned*)(out + INT8_BLOCK) = __builtin_convertvector(second, vec_i8);
#endif
    }
    *scales = is_finite ? max / (largest * STORED_SCALE) : NAN;
    *corrections = -code_bias(weight.kind) * (int32_t)reduce_add(sums);
    to += stride * terms * GROUP;
    scales += stride;
    corrections += stride;
  }
}

INLINE void quantize_row_int8(const Weight& weight, const bf16* from, int8_t* to, float* scales,
                              int32_t* corrections, int64_t stride) {
  static_assert(MAX_ROW_GROUP == 128);
  const int64_t group = row_group(weight);
  const auto quantize = group == 128  ? quantize_row_groups<128>
                        : group == 64 ? quantize_row_groups<64>
                                      : quantize_row_groups<32>;
  quantize(weight, from, to, scales, corrections, stride);
}

}  // namespace
