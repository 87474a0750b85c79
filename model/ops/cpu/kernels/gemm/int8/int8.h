// Rows as integers with scales, which are multiplied with weights of 8 and 4 bits.
//
// 32 to 128 inputs of a row share a scale, which maps the largest magnitude to 127 (ROWS_8) or to
// 32,639 (ROWS_16): an integer is off by at most one half. The integers of ROWS_16 have two terms of
// 8 bits, value = 256 · first + second; beside values that are rounded to bfloat16 they are as good
// as exact. With 8 bits, one large value makes the others of its group inexact. ROTATED_8 spreads
// it: the values of a group are multiplied with an orthogonal matrix (see rotation.h), as the
// weights were before they were rounded, so that the products are the same. With AVX-512 and
// AVX-VNNI groups then have up to 512 inputs.
//
// Rows are stored as [inputs / 32, rows, terms, 32], with 64 in place of 32 for AMX's tiles; each
// group has a scale and a correction. AVX2
// multiplies ROWS_16 as integers of 16 bits: of four inputs, 0 and 2 are next to each other, then 1
// and 3. Without AVX-VNNI it adds two products of 8 bits in 16 bits: with INT8, whose codes plus 128 are up to 255,
// the sum of two neighbours is therefore 128 at most, like each of them. After a rotation this makes
// the steps of a row a fourth larger on average.
// Weights are multiplied as unsigned numbers, which are larger than their codes by a bias of 128 or
// 8: the correction, the sum of the row's integers times the negative bias, is where sums of
// products begin.
//
// A weight is (code + zero) · scale; symmetric weights have no zeros. Zeros are stored divided by
// the negative bias, so that they are multiplied with the correction. Weights without zeros whose
// scales belong to all inputs are scaled after the last product; the correction is then that of the
// whole row in float32, with which the sum begins.
#pragma once

#include "../../scratch.h"
#include "rotation.h"
#include "../rows.h"

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
  return VECTOR_BITS == 256 && !AVX_VNNI && terms == 1 && bits == 4;
}
INLINE bool limits_neighbours(const Weight& weight) {
  return VECTOR_BITS == 256 && !AVX_VNNI && weight.kind == INT8 && row_terms(weight) == 1;
}

// What a weight's sums are multiplied with: scales of groups, without and with zeros, or of outputs.
enum Scaling { GROUPS, GROUPS_WITH_ZEROS, OUTPUTS };
INLINE Scaling scaling_of(const Weight& weight) {
  if (weight.zeros) return GROUPS_WITH_ZEROS;
  return weight.group == weight.inputs ? OUTPUTS : GROUPS;
}

// Calls `f` with a weight's terms, bits and scaling as compile-time constants.
template <typename F>
INLINE void with_form(const Weight& weight, F f) {
  const auto with_scaling = [&](auto terms, auto bits) {
    switch (scaling_of(weight)) {
      case GROUPS: return f(terms, bits, std::integral_constant<Scaling, GROUPS>());
      case OUTPUTS: return f(terms, bits, std::integral_constant<Scaling, OUTPUTS>());
      case GROUPS_WITH_ZEROS:
        return f(terms, bits, std::integral_constant<Scaling, GROUPS_WITH_ZEROS>());
    }
  };
  with_constant<2>(row_terms(weight), [&](auto terms) {
    if (weight.kind == INT4)
      with_scaling(terms, std::integral_constant<int, 4>());
    else
      with_scaling(terms, std::integral_constant<int, 8>());
  });
}

// The inputs of a row that share a scale; they share the weights' scales too. Integer sums over 128
// inputs fit 32 bits; those of AVX2 with codes of 4 and rows of 8 bits fit 16 bits over 32 inputs.
INLINE int64_t row_group(const Weight& weight) {
  if (weight.rows == ROTATED_8) return rotated_group(weight.group);
  if (sums_are_short(row_terms(weight), weight.kind == INT4 ? 4 : 8)) return 32;
  return common_group(weight.group);
}

// Whether rows, `stride` in all, are multiplied on AMX's tiles. They are slower with few rows, and
// where groups of 32 inputs fill half of a tile and are scaled one by one.
INLINE bool on_tiles(const Weight& weight, int64_t stride) {
  return use_amx() && stride > 8 && row_group(weight) % TILE_INPUTS == 0;
}

// The inputs of a row that are stored together.
INLINE int64_t row_block(const Weight& weight, int64_t stride) {
  return on_tiles(weight, stride) ? TILE_INPUTS : INT8_BLOCK;
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

// acc + the products of a group, from their integer sums, which do not include the correction if
// outputs are scaled.
template <Scaling SCALING>
INLINE vec_f32 add_group(vec_f32 acc, vec_i32 sums, vec_f32 scale, [[maybe_unused]] vec_f32 zero,
                          float row_scale, [[maybe_unused]] int32_t correction) {
  vec_f32 values = __builtin_convertvector(sums, vec_f32);
  if (SCALING == OUTPUTS) return acc + values * row_scale;
  if (SCALING == GROUPS_WITH_ZEROS) values += zero * (float)correction;
  return acc + values * (scale * row_scale);
}

// One row [inputs] → integers, scales and corrections, for this weight; one more scale is the
// correction of the whole row, in float32. The row is one of `stride`.
template <int GROUP>
__attribute__((noinline)) static void quantize_row_groups(const Weight& weight, const bf16* from,
                                                          int8_t* to, float* scales,
                                                          int32_t* corrections, int64_t stride) {
  constexpr int PARTS = GROUP / LANES;
  const int64_t terms = row_terms(weight), block = row_block(weight, stride), parts = block / LANES;
  const float largest = terms == 2 ? 32639 : 127;
  const float norm = weight.rows == ROTATED_8 ? 1 / std::sqrt((float)GROUP) : 1;
  float row_correction = 0;
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
      int8_t* out = to + i / parts * stride * terms * block + i % parts * LANES;
      if (terms == 1) {
        *(vec_i8_unaligned*)out = __builtin_convertvector(codes, vec_i8);
        sums += __builtin_convertvector(codes, vec_f32);
        continue;
      }
      sums += __builtin_convertvector(codes, vec_f32);
#if VECTOR_BITS == 256
      const vec_i16 pairs = __builtin_convertvector(codes, vec_i16);
      *(vec_i16_unaligned*)(to + i / parts * stride * terms * block + i % parts * 2 * LANES) =
          __builtin_shuffle(pairs, vec_i16{0, 2, 1, 3, 4, 6, 5, 7});
#else
      const vec_i32 first = (codes + 128) >> 8, second = codes - (first << 8);
      *(vec_i8_unaligned*)out = __builtin_convertvector(first, vec_i8);
      *(vec_i8_unaligned*)(out + block) = __builtin_convertvector(second, vec_i8);
#endif
    }
    *scales = is_finite ? max / (largest * STORED_SCALE) : NAN;
    *corrections = -code_bias(weight.kind) * (int32_t)reduce_add(sums);
    row_correction += *scales * (float)*corrections;
    to += stride * terms * GROUP;
    scales += stride;
    corrections += stride;
  }
  *scales = row_correction;
}

// The same for ROTATED_8 and groups of any size.
__attribute__((noinline)) static void quantize_rotated_row(const Weight& weight, const bf16* from,
                                                           int8_t* to, float* scales,
                                                           int32_t* corrections, int64_t stride) {
  constexpr float LARGEST = 127.49f;  // is rounded to 127
  const int64_t group = row_group(weight), block = row_block(weight, stride);
  float *values = thread_scratch<float>(group), row_correction = 0;
  for (int64_t first = 0; first < weight.inputs; first += group) {
    for (int64_t i = 0; i < group; i += LANES) store(values + i, load_bf16(from + first + i));
    rotate_group(values, group);
    vec_i32 max_bits = {};
    for (int64_t i = 0; i < group; i += LANES) {
      const vec_i32 bits = (vec_i32)load(values + i) & 0x7fffffff;
      max_bits = bits > max_bits ? bits : max_bits;
    }
    // Bits of infinity and of NaN are larger than those of any number.
    int32_t max_of_bits = 0;
    for (int lane = 0; lane < LANES; lane++) max_of_bits = std::max(max_of_bits, max_bits[lane]);
    const bool is_finite = max_of_bits < 0x7f800000;
    float max;
    memcpy(&max, &max_of_bits, 4);
    const float factor = is_finite && max > 0x1p-100f ? LARGEST / max : 0;
    vec_i32 sums = {};
    for (int64_t k = 0; k < group; k += block, to += stride * block)
      for (int64_t i = 0; i < block; i += LANES) {
        const vec_i32 codes = is_finite ? round_small(load(values + k + i) * factor) : vec_i32{};
        *(vec_i8_unaligned*)(to + i) = __builtin_convertvector(codes, vec_i8);
        sums += codes;
      }
    const int32_t sum = (int32_t)reduce_add(__builtin_convertvector(sums, vec_f32));  // exact
    *scales = is_finite ? max / (LARGEST * STORED_SCALE) : NAN;
    *corrections = -code_bias(weight.kind) * sum;
    row_correction += *scales * (float)*corrections;
    scales += stride;
    corrections += stride;
  }
  *scales = row_correction;
}

INLINE void quantize_row_int8(const Weight& weight, const bf16* from, int8_t* to, float* scales,
                              int32_t* corrections, int64_t stride) {
  if (LONG_ROTATIONS && weight.rows == ROTATED_8)
    return quantize_rotated_row(weight, from, to, scales, corrections, stride);
  const int64_t group = row_group(weight);
  const auto quantize = group == 128  ? quantize_row_groups<128>
                        : group == 64 ? quantize_row_groups<64>
                                      : quantize_row_groups<32>;
  quantize(weight, from, to, scales, corrections, stride);
}

}  // namespace
