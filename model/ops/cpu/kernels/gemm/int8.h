// Integers of 8 bits with scales: the rows that are multiplied with weights of 8 and 4 bits.
//
// 32 inputs of a row share a scale, which maps the largest magnitude to 127: an integer is off by at
// most one half. Rows are stored as [inputs / 32, rows, 32]; each 32 inputs have a scale and a
// correction. Weights are multiplied as unsigned numbers, which are larger than their codes by a
// bias of 128 or 8: the correction, the sum of the row's integers times the negative bias, is where
// sums of products begin.
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

// One row [inputs] → integers, scales and corrections. The row is one of `stride` rows.
INLINE void quantize_row_int8(const bf16* from, int64_t inputs, int32_t bias, int8_t* to,
                              float* scales, int32_t* corrections, int64_t stride) {
  constexpr int PARTS = INT8_GROUP / LANES;
  for (int64_t k = 0; k < inputs; k += INT8_GROUP) {
    vec_f32 value[PARTS], sums = {};
    vec_i32 max_bits = {}, infinite = {};
    for (int i = 0; i < PARTS; i++) {
      value[i] = load_bf16(from + k + i * LANES);
      const vec_i32 bits = (vec_i32)value[i] & 0x7fffffff;
      max_bits = bits > max_bits ? bits : max_bits;
      infinite |= bits >= 0x7f800000;
    }
    const bool is_finite = reduce_add((vec_f32)(infinite & 0x3f800000)) == 0;
    const float max = is_finite ? reduce_max((vec_f32)max_bits) : 0;
    const float factor = max > 0x1p-100f ? 127 / max : 0;  // smaller values become 0
    for (int i = 0; i < PARTS; i++) {
      const vec_i32 codes = is_finite ? round_small(value[i] * factor) : vec_i32{};
      sums += __builtin_convertvector(codes, vec_f32);
      *(vec_i8_unaligned*)(to + i * LANES) = __builtin_convertvector(codes, vec_i8);
    }
    *scales = is_finite ? max / (127 * STORED_SCALE) : NAN;
    *corrections = -bias * (int32_t)reduce_add(sums);
    to += stride * INT8_GROUP;
    scales += stride;
    corrections += stride;
  }
}

}  // namespace
