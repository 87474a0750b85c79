// bf16 as 16-bit integers with scales, for processors that multiply such integers faster than bf16.
// With AVX2 only, the product of two pairs of bf16 takes two float32 products and two conversions.
// Intel's processors with VNNI but without AMX start two VPDPWSSD per cycle, but only one VDPBF16PS
// per two cycles.
//
// 64 inputs of a row, or of an output's weights, share a scale: the power of two that brings the
// norm of the 64 integers to between 2^14 and 2^15. The product of two such norms is below 2^31, so
// that sums within a group are exact in 32 bits; groups are added up in float32, in their order. An
// integer is off by at most one half. If 64 values are of equal size, each is about 2^12 and its
// error 2^-13, while bf16 rounds by up to 2^-9; a value next to one that is a hundred times as
// large also has an error of about 2^-9.
//
// Rows are stored as [inputs / 64, rows, 64] and their scales as [inputs / 64, rows]: the distance
// between rows is then a constant, which becomes part of the instructions that multiply them.
#pragma once

#include "../vectors.h"

#if INT16_GEMM

namespace {

INLINE int64_t scale_count(int64_t inputs) { return (inputs + INT16_GROUP - 1) / INT16_GROUP; }

#if VECTOR_BITS == 512
INLINE vec_i32 round_to_int(vec_f32 value) { return (vec_i32)_mm512_cvtps_epi32((__m512)value); }
INLINE int32_t reduce_max(vec_i32 value) { return _mm512_reduce_max_epi32((__m512i)value); }
INLINE vec_i32 load_u8(const uint8_t* from) {
  return (vec_i32)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));
}
#else
INLINE vec_i32 round_to_int(vec_f32 value) { return (vec_i32)_mm256_cvtps_epi32((__m256)value); }
INLINE int32_t reduce_max(vec_i32 value) {
  __m128i four = _mm_max_epi32(_mm256_castsi256_si128((__m256i)value),
                               _mm256_extracti128_si256((__m256i)value, 1));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return std::max(_mm_cvtsi128_si32(four), _mm_extract_epi32(four, 1));
}
INLINE vec_i32 load_u8(const uint8_t* from) {
  return (vec_i32)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from));
}
#endif

// Exponents are biased by 127, as in float32.
INLINE vec_f32 power_of_two(vec_i32 exponent) { return (vec_f32)(exponent << 23); }

// The exponent of the largest magnitude of 64 values. Times inverse_power(exponent), the values are
// at most about 1, so that their squares stay in range.
INLINE vec_i32 max_exponent(vec_f32 max) {
  vec_i32 exponent = (vec_i32)max >> 23;
  exponent = exponent > 24 ? exponent : vec_i32{} + 24;
  return exponent < 252 ? exponent : vec_i32{} + 252;
}
INLINE vec_f32 inverse_power(vec_i32 exponent) { return power_of_two(253 - exponent); }

// The exponent of the scale of 64 values, from the sum of the squares of the values times
// inverse_power; 255 if one of them is not finite.
INLINE vec_i32 scale_exponent(vec_f32 max, vec_i32 exponent, vec_f32 squares) {
  const vec_i32 log2_norm = (((vec_i32)squares >> 23) - 125) >> 1;  // the norm is less than 2^this
  const vec_i32 scale = exponent - 14 + (log2_norm > 0 ? log2_norm : vec_i32{});
  return (vec_i32)max >= 0x7f800000 ? vec_i32{} + 255 : scale;
}

// The factor that turns values into integers of a scale.
INLINE vec_f32 quantizing_factor(vec_i32 scale) { return power_of_two(254 - scale); }

INLINE vec_f32 magnitude(vec_f32 value) { return (vec_f32)((vec_i32)value & 0x7fffffff); }

// One row [inputs] → integers, and a scale for each 64. The row is one of `stride` rows.
INLINE void quantize_row(const bf16* from, int64_t inputs, int16_t* to, float* scales,
                         int64_t stride) {
  for (int64_t k = 0; k < inputs; k += INT16_GROUP, to += stride * INT16_GROUP, scales += stride) {
    const int64_t vectors = std::min(INT16_GROUP, inputs - k) / LANES;
    vec_f32 value[INT16_GROUP / LANES], squares = {};
    vec_i32 max_bits = {};
    for (int64_t i = 0; i < vectors; i++) {
      value[i] = load_bf16(from + k + i * LANES);
      const vec_i32 bits = (vec_i32)magnitude(value[i]);
      max_bits = bits > max_bits ? bits : max_bits;
    }
    const vec_f32 max = (vec_f32)(vec_i32{} + reduce_max(max_bits));
    const vec_i32 exponent = max_exponent(max);
    const vec_f32 inverse = inverse_power(exponent);
    for (int64_t i = 0; i < vectors; i++) squares += value[i] * inverse * (value[i] * inverse);
    const vec_i32 scale = scale_exponent(max, exponent, broadcast(reduce_add(squares)));
    *scales = scale[0] == 255 ? NAN : power_of_two(scale)[0];
    const vec_f32 factor = quantizing_factor(scale);
    for (int64_t i = 0; i < vectors; i++)
      *(vec_i16_unaligned*)(to + i * LANES) =
          __builtin_convertvector(round_to_int(value[i] * factor), vec_i16);
  }
}

// Quantizes up to 64 inputs (`width`) of LANES outputs, which are columns of `stage` [64, 32]. Only
// outputs [first, last) are written: the others of the panel are packed at another time.
INLINE void quantize_columns(const bf16* stage, int64_t width, int64_t first, int64_t last,
                             int16_t* to, uint8_t* exponents) {
  vec_i32 max_bits = {};
  for (int64_t i = 0; i < width; i++) {
    const vec_i32 bits = (vec_i32)magnitude(load_bf16(stage + i * PANEL));
    max_bits = bits > max_bits ? bits : max_bits;
  }
  const vec_i32 exponent = max_exponent((vec_f32)max_bits);
  const vec_f32 inverse = inverse_power(exponent);
  vec_f32 squares = {};
  for (int64_t i = 0; i < width; i++) {
    const vec_f32 value = load_bf16(stage + i * PANEL) * inverse;
    squares += value * value;
  }
  const vec_i32 scale = scale_exponent((vec_f32)max_bits, exponent, squares);
  const vec_f32 factor = quantizing_factor(scale);
  for (int64_t o = first; o < last; o++) exponents[o] = (uint8_t)scale[o];
  for (int64_t i = 0; i < width; i += 2, to += 2 * PANEL) {
    const vec_f32 even = load_bf16(stage + i * PANEL), odd = load_bf16(stage + (i + 1) * PANEL);
    const vec_i32 pairs =
        (round_to_int(even * factor) & 0xffff) | round_to_int(odd * factor) << 16;
    if (last - first == LANES)
      store_i32(to, pairs);
    else
      for (int64_t o = first; o < last; o++) ((int32_t*)to)[o] = pairs[o];
  }
}

// Weights as in `pack` (pack.h), with the exponents of their scales: uint8 [panels, inputs / 64,
// 32].
void pack_int16(int16_t* to, uint8_t* exponents, int64_t inputs, int64_t first, int64_t count,
                const bf16* from, int64_t row_stride, int64_t column_stride, int threads) {
  const int64_t begin = first / PANEL, end = (first + count + PANEL - 1) / PANEL;
  divide(threads, end - begin, 1, [=](int64_t first_panel, int64_t last_panel) {
    for (int64_t panel = begin + first_panel; panel < begin + last_panel; panel++) {
      const int64_t low = std::max(first, panel * PANEL) - panel * PANEL;
      const int64_t high = std::min(first + count, (panel + 1) * PANEL) - panel * PANEL;
      const bf16* source = from + (panel * PANEL - first) * row_stride;
      alignas(64) bf16 stage[INT16_GROUP * PANEL] = {};
      for (int64_t k = 0; k < inputs; k += INT16_GROUP) {
        const int64_t width = std::min(INT16_GROUP, inputs - k);
        if (column_stride == 1) {
          for (int64_t o = low; o < high; o++)
            for (int64_t i = 0; i < width; i++)
              stage[i * PANEL + o] = source[o * row_stride + k + i];
        } else {
          for (int64_t i = 0; i < width; i++)
            for (int64_t o = low; o < high; o++)
              stage[i * PANEL + o] = source[o * row_stride + (k + i) * column_stride];
        }
        const int64_t group = panel * scale_count(inputs) + k / INT16_GROUP;
        for (int64_t o = 0; o < PANEL; o += LANES)
          quantize_columns(stage + o, width, std::max(o, low) - o, std::min(o + LANES, high) - o,
                           to + (panel * inputs + k) * PANEL + o * 2,
                           exponents + group * PANEL + o);
      }
    }
  });
}

}  // namespace

#endif
