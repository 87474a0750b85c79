// Vectors of the KV cache, each a token's key or value of one head: see model/ops/kv_values.py.
#pragma once

#include "vectors.h"

namespace {

// KV_INT8: steps of a scale, which is behind them as float32. KV_E4M3 has no scale.
enum : int64_t { KV_BF16, KV_INT8, KV_E4M3 };  // native.py has the same numbers

typedef uint8_t vec_u8 __attribute__((vector_size(LANES)));
typedef uint8_t vec_u8_unaligned __attribute__((vector_size(LANES), aligned(1), may_alias));

INLINE int64_t kv_vector_bytes(int64_t form, int64_t size) {
  return form == KV_BF16 ? 2 * size : form == KV_INT8 ? size + 4 : size;
}

INLINE void store_low_bytes(uint8_t* to, vec_i32 values) {
  *(vec_u8_unaligned*)to = __builtin_convertvector(values, vec_u8);
}

INLINE void write_int8(const float* from, int64_t size, uint8_t* to) {
  vec_f32 largest = {};
  vec_i32 is_nan = {};
  for (int64_t i = 0; i < size; i += LANES) {
    const vec_f32 value = load(from + i), magnitude = (vec_f32)((vec_i32)value & 0x7fffffff);
    largest = magnitude > largest ? magnitude : largest;
    is_nan |= value != value;
  }
  float scale = reduce_max(largest) / 127;
  for (int i = 0; i < LANES; i++)
    if (is_nan[i]) scale = NAN;
  const vec_f32 step = broadcast(scale > 0 ? scale : 1);
  for (int64_t i = 0; i < size; i += LANES)  // 1.5 · 2²³ rounds to an integer
    store_low_bytes(to + i, (vec_i32)(load(from + i) / step + 12582912.0f));
  memcpy(to + size, &scale, 4);
}

// Rounds to nearest, ties to even, at most 448; NaN stays NaN.
INLINE vec_i32 to_e4m3(vec_f32 value) {
  vec_f32 magnitude = (vec_f32)((vec_i32)value & 0x7fffffff);
  magnitude = magnitude > 448.0f ? broadcast(448.0f) : magnitude;
  const vec_i32 bits = (vec_i32)magnitude, sign = ((vec_i32)value >> 24) & 0x80;
  const vec_i32 normal = ((bits + 0x7ffff + ((bits >> 20) & 1)) >> 20) - (120 << 3);
  // Multiples of 2⁻⁹, to which the sum with 2¹⁴ rounds.
  const vec_i32 subnormal = (vec_i32)(magnitude + 16384.0f) - 0x46800000;
  const vec_i32 code = magnitude < 0x1p-6f ? subnormal : normal;
  return (magnitude == magnitude ? code : code | 0x7f) | sign;
}

// Values [size] → a vector of the cache
INLINE void write_vector(const float* from, int64_t size, int64_t form, uint8_t* to) {
  if (form == KV_INT8) return write_int8(from, size, to);
  for (int64_t i = 0; i < size; i += LANES) {
    if (form == KV_E4M3)
      store_low_bytes(to + i, to_e4m3(load(from + i)));
    else
      store_bf16((bf16*)to + i, load(from + i));
  }
}

// Values that bf16 holds exactly → bf16
INLINE void store_exact_bf16(bf16* to, vec_f32 value) {
#if BF16_DOT
  store_bf16(to, value);
#else
  *(vec_i16_unaligned*)to = __builtin_convertvector((vec_i32)value >> 16, vec_i16);
#endif
}

INLINE vec_f32 load_int8(const uint8_t* from) {
#if VECTOR_BITS == 512
  const __m512i values = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from));
#elif VECTOR_BITS == 256
  const __m256i values = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from));
#else
  typedef int8_t vec_i8 __attribute__((vector_size(LANES)));
  const vec_i32 values =
      __builtin_convertvector((vec_i8)(*(const vec_u8_unaligned*)from), vec_i32);
#endif
  return __builtin_convertvector((vec_i32)values, vec_f32);
}

// e4m3 as multiples of 256. The bits of one, further to the left, are those of a float16, whose
// exponent has a bias that is 8 larger.
INLINE vec_f32 load_e4m3(const uint8_t* from) {
#if VECTOR_BITS == 512
  const __m256i words = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)from));
  const __m256i mask = _mm256_set1_epi16((int16_t)0xbfff);
  return (vec_f32)_mm512_cvtph_ps(_mm256_and_si256(_mm256_slli_epi16(words, 7), mask));
#elif VECTOR_BITS == 256
  const __m128i words = _mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i*)from));
  const __m128i mask = _mm_set1_epi16((int16_t)0xbfff);
  return (vec_f32)_mm256_cvtph_ps(_mm_and_si128(_mm_slli_epi16(words, 7), mask));
#else
  const vec_i32 code = __builtin_convertvector(*(const vec_u8_unaligned*)from, vec_i32);
  const vec_i32 magnitude = code & 0x7f;
  const vec_f32 subnormal = __builtin_convertvector(magnitude, vec_f32) * 0x1p-17f;
  const vec_f32 normal = (vec_f32)((magnitude << 20) + (112 << 23));
  const vec_f32 value = magnitude < 8 ? subnormal : normal;
  return (vec_f32)((vec_i32)value | (code & 0x80) << 24);
#endif
}

INLINE bool has_e4m3_nan(const uint8_t* from, int64_t size) {
  typedef uint8_t bytes __attribute__((vector_size(32)));
  typedef uint8_t unaligned_bytes __attribute__((vector_size(32), aligned(1), may_alias));
  typedef uint64_t words __attribute__((vector_size(32)));
  bytes found = {};
  for (int64_t i = 0; i < size; i += 32)
    found |= (bytes)((*(const unaligned_bytes*)(from + i) | 0x80) == 0xff);
  return ((words)found)[0] | ((words)found)[1] | ((words)found)[2] | ((words)found)[3];
}

// A vector of the cache with 8 bits → its values [size], a multiple of 32, in units of its scale,
// which it returns. Bf16 holds them exactly. A vector with a NaN has the scale NaN.
INLINE float unpack_vector(const uint8_t* from, int64_t size, int64_t form, bf16* to) {
  if (form == KV_INT8) {
    for (int64_t i = 0; i < size; i += LANES) store_exact_bf16(to + i, load_int8(from + i));
    float scale;
    memcpy(&scale, from + size, 4);
    return scale;
  }
  for (int64_t i = 0; i < size; i += LANES) store_exact_bf16(to + i, load_e4m3(from + i));
  return has_e4m3_nan(from, size) ? NAN : 256.0f;
}

}  // namespace
