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
// and 3.
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
// 2 for rows of 16 bits. AVX2 multiplies INT8 with such rows in any case: its products of two rows of
// 8 bits would not fit 16 bits, and what this takes is slower.
INLINE int64_t row_terms(const Weight& weight) {
  return weight.rows == ROWS_16 || (VECTOR_BITS == 256 && weight.kind == INT8) ? 2 : 1;
}

// The inputs of a row that share a scale; they share the weights' scales too. Integer sums over 128
// inputs fit 32 bits; those of AVX2 with rows of 8 bits fit 16 bits over 32 inputs.
constexpr int64_t MAX_ROW_GROUP = 128;
INLINE int64_t row_group(const Weight& weight) {
  int64_t group = VECTOR_BITS == 256 && row_terms(weight) == 1 ? 32 : MAX_ROW_GROUP;
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

// The same for the values within vectors.
INLINE void hadamard(vec_f32* values, int count) {
  for (int step = 1; step < LANES; step *= 2) {
    vec_i32 partner;
    vec_f32 sign;
    for (int lane = 0; lane < LANES; lane++) {
      partner[lane] = lane ^ step;
      sign[lane] = lane & step ? -1.0f : 1.0f;
    }
    for (int i = 0; i < count; i++)
      values[i] = __builtin_shuffle(values[i], partner) + values[i] * sign;
  }
  hadamard_across(values, count);
}

// One row [inputs] → integers, scales and corrections, for this weight. The row is one of `stride`.
INLINE void quantize_row_int8(const Weight& weight, const bf16* from, int8_t* to, float* scales,
                              int32_t* corrections, int64_t stride) {
  constexpr int BLOCK_PARTS = INT8_BLOCK / LANES;
  const int64_t group = row_group(weight), terms = row_terms(weight);
  const int parts = (int)group / LANES;
  const float largest = terms == 2 ? 32639 : 127;
  const float norm = weight.rows == ROTATED_8 ? 1 / std::sqrt((float)group) : 1;
  for (int64_t k = 0; k < weight.inputs; k += group) {
    vec_f32 value[MAX_ROW_GROUP / LANES], sums = {};
    vec_i32 max_bits = {}, infinite = {};
    for (int i = 0; i < parts; i++) value[i] = load_bf16(from + k + i * LANES) * norm;
    if (weight.rows == ROTATED_8) hadamard(value, parts);
    for (int i = 0; i < parts; i++) {
      const vec_i32 bits = (vec_i32)value[i] & 0x7fffffff;
      max_bits = bits > max_bits ? bits : max_bits;
      infinite |= bits >= 0x7f800000;
    }
    const bool is_finite = reduce_add((vec_f32)(infinite & 0x3f800000)) == 0;
    const float max = is_finite ? reduce_max((vec_f32)max_bits) : 0;
    const float factor = max > 0x1p-100f ? largest / max : 0;  // smaller values become 0
    for (int i = 0; i < parts; i++) {
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
    to += stride * terms * group;
    scales += stride;
    corrections += stride;
  }
}

}  // namespace
