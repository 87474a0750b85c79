// Vectors of the instruction set that the including unit chose.
//
// The unit defines VECTOR_BITS (512: AVX-512, 256: AVX2, 128: portable) and INT16_GEMM (whether
// linears multiply 16-bit integers). The vector types are GCC's, each of one register: GCC keeps
// longer ones in memory, and arrays of vectors too, unless every loop over them is unrolled.
#pragma once

#include "types.h"

#if !defined(VECTOR_BITS) || !defined(INT16_GEMM)
#error "include this from a unit that chose an instruction set"
#endif
// Whether there is an instruction for products of bf16 pairs; such processors may also have AMX.
#define BF16_DOT (VECTOR_BITS == 512 && !INT16_GEMM)
#ifndef AVX_VNNI
#define AVX_VNNI 0  // with VECTOR_BITS 256: whether VPDPBUSD and VPDPWSSD are there
#endif

namespace {

constexpr int LANES = VECTOR_BITS / 32;  // 32-bit values of a vector
constexpr int VECTORS = PANEL / LANES;   // vectors of a panel's outputs

typedef float vec_f32 __attribute__((vector_size(4 * LANES)));
typedef int32_t vec_i32 __attribute__((vector_size(4 * LANES)));  // or pairs of bf16 or int16
typedef uint32_t vec_u32 __attribute__((vector_size(4 * LANES)));
typedef int16_t vec_i16 __attribute__((vector_size(2 * LANES)));  // or bf16
typedef float vec_f32_unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t vec_i32_unaligned __attribute__((vector_size(4 * LANES), aligned(1), may_alias));
typedef int16_t vec_i16_unaligned __attribute__((vector_size(2 * LANES), aligned(1), may_alias));

INLINE vec_f32 load(const float* from) { return *(const vec_f32_unaligned*)from; }
INLINE void store(float* to, vec_f32 value) { *(vec_f32_unaligned*)to = value; }
INLINE vec_i32 load_i32(const void* from) { return *(const vec_i32_unaligned*)from; }
INLINE void store_i32(void* to, vec_i32 value) { *(vec_i32_unaligned*)to = value; }

// Keeps a loaded vector in a register; GCC would otherwise reload it for each use.
INLINE vec_i32 keep_in_register(vec_i32 value) {
#if VECTOR_BITS == 512
  asm("" : "+v"(value));
#endif
  return value;
}

INLINE vec_f32 broadcast(float value) { return value - vec_f32{}; }

INLINE vec_f32 load_bf16(const bf16* from) {
#if VECTOR_BITS == 512
  const __m256i values = _mm256_loadu_si256((const __m256i*)from);
  return (vec_f32)_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16);
#elif VECTOR_BITS == 256
  const __m128i values = _mm_loadu_si128((const __m128i*)from);
  return (vec_f32)_mm256_slli_epi32(_mm256_cvtepu16_epi32(values), 16);
#else
  typedef uint16_t vec_u16 __attribute__((vector_size(2 * LANES)));
  const vec_i16 values = *(const vec_i16_unaligned*)from;
  return (vec_f32)(__builtin_convertvector((vec_u16)values, vec_i32) << 16);
#endif
}

// The low and the high halves of pairs of bf16, as float32
INLINE vec_f32 low_bf16(vec_i32 pairs) { return (vec_f32)(pairs << 16); }
INLINE vec_f32 high_bf16(vec_i32 pairs) { return (vec_f32)(pairs & (int32_t)0xffff0000); }

INLINE float to_float(bf16 value) {
  uint32_t bits = (uint32_t)value << 16;
  float result;
  memcpy(&result, &bits, 4);
  return result;
}

INLINE bf16 to_bf16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return (bf16)((bits >> 16) | 0x40);
  return (bf16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // to nearest, ties to even
}

// Bf16 in the high halves: rounds to nearest, ties to even. The low halves are undefined.
INLINE vec_i32 round_to_bf16(vec_f32 value) {
  const vec_i32 bits = (vec_i32)value;
  const vec_i32 even = bits + 0x7fff + ((bits >> 16) & 1);
  const vec_i32 quiet = bits | 0x400000;
  const vec_i32 is_nan = (bits & 0x7fffffff) > 0x7f800000;
  return (is_nan & quiet) | (~is_nan & even);
}

INLINE void store_bf16(bf16* to, vec_f32 value) {
#if BF16_DOT
  *(vec_i16_unaligned*)to = (vec_i16)_mm512_cvtneps_pbh((__m512)value);
#else
  *(vec_i16_unaligned*)to = __builtin_convertvector(round_to_bf16(value) >> 16, vec_i16);
#endif
}

INLINE vec_f32 load_values(const bf16* from) { return load_bf16(from); }
INLINE vec_f32 load_values(const float* from) { return load(from); }
INLINE void store_values(bf16* to, vec_f32 values) { store_bf16(to, values); }
INLINE void store_values(float* to, vec_f32 values) { store(to, values); }

INLINE float reduce_add(vec_f32 value) {
#if VECTOR_BITS == 512
  return _mm512_reduce_add_ps((__m512)value);
#elif VECTOR_BITS == 256
  __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)value),
                           _mm256_extractf128_ps((__m256)value, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return four[0] + four[1];
#else
  float sum = 0;
  for (int i = 0; i < LANES; i++) sum += value[i];
  return sum;
#endif
}

INLINE float reduce_max(vec_f32 value) {
#if VECTOR_BITS == 512
  return _mm512_reduce_max_ps((__m512)value);
#elif VECTOR_BITS == 256
  __m128 four = _mm_max_ps(_mm256_castps256_ps128((__m256)value),
                           _mm256_extractf128_ps((__m256)value, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return std::max(four[0], four[1]);
#else
  float max = value[0];
  for (int i = 1; i < LANES; i++) max = std::max(max, value[i]);
  return max;
#endif
}

INLINE bool any_larger(vec_f32 value, float limit) {
#if VECTOR_BITS == 512
  return _mm512_cmplt_ps_mask((__m512)broadcast(limit), (__m512)value) != 0;
#elif VECTOR_BITS == 256
  return _mm256_movemask_ps((__m256)(value > limit)) != 0;
#else
  return reduce_max(value) > limit;
#endif
}

// acc + the products of two pairs of bf16 in each lane.
INLINE vec_f32 dot_bf16(vec_f32 acc, vec_i32 a, vec_i32 b) {
#if BF16_DOT
  return (vec_f32)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
  acc += low_bf16(a) * low_bf16(b);
  acc += high_bf16(a) * high_bf16(b);
  return acc;
#endif
}

// e^x = 2^n times a polynomial on half an octave to each side, with a relative error below 2e-7 for
// small x. With AVX-512 a minimax polynomial of degree 5 for 2^x, else e^x's Taylor series of degree
// 6 and arguments within float32's range.
INLINE vec_f32 exponential(vec_f32 x) {
#if VECTOR_BITS == 512
  const vec_f32 scaled = x * 1.44269504088896f;
  const vec_f32 rest = (vec_f32)_mm512_reduce_ps((__m512)scaled, 0);  // scaled less its nearest n
  vec_f32 p = rest * 0.0013264727f + 0.009671513f;
  p = p * rest + 0.055507336f;
  p = p * rest + 0.24022242f;
  p = p * rest + 0.693147f;
  p = p * rest + 1.0f;
  return (vec_f32)_mm512_scalef_ps((__m512)p, (__m512)(scaled - rest));
#else
  x = x < -87.0f ? broadcast(-87.0f) : x;
  x = x > 88.0f ? broadcast(88.0f) : x;
  const vec_f32 scaled = x * 1.44269504088896f;
  const vec_f32 shifted = scaled + 12582912.0f;  // 1.5 · 2²³: rounds to an integer
  const vec_i32 n = (vec_i32)shifted - 0x4b400000;
  const vec_f32 rest = (scaled - (shifted - 12582912.0f)) * 0.693147180559945f;
  vec_f32 p = rest * (1.0f / 720) + (1.0f / 120);
  p = p * rest + (1.0f / 24);
  p = p * rest + (1.0f / 6);
  p = p * rest + 0.5f;
  p = p * rest + 1.0f;
  p = p * rest + 1.0f;
  return (vec_f32)((vec_i32)p + (n << 23));
#endif
}

// 2^x for x up to about 0: 2^⌊x⌋ times a polynomial with a relative error below 3e-6. 2^0 is 1 and
// 2^-inf is 0, exactly.
INLINE vec_f32 power_of_2(vec_f32 x) {
#if VECTOR_BITS == 512
  const vec_f32 rest = (vec_f32)_mm512_reduce_ps((__m512)x, 1);  // x - ⌊x⌋
#else
  const vec_f32 clamped = x < -126.0f ? broadcast(-126.0f) : x;
  const vec_f32 shifted = clamped - 0.5f + 12582912.0f;  // 1.5 · 2²³: rounds to an integer
  const vec_f32 rest = clamped - (shifted - 12582912.0f);
#endif
  vec_f32 p = rest * 0.0134266857f + 0.0522424728f;
  p = p * rest + 0.241280213f;
  p = p * rest + 0.693044841f;
  p = p * rest + 1.0f;
#if VECTOR_BITS == 512
  return (vec_f32)_mm512_scalef_ps((__m512)p, (__m512)x);  // p · 2^⌊x⌋
#else
  const vec_f32 power = (vec_f32)((vec_i32)p + (((vec_i32)shifted - 0x4b400000) << 23));
  return x < -126.0f ? vec_f32{} : power;
#endif
}

INLINE vec_f32 activate(vec_f32 gate, vec_f32 up, Activation by) {
  if (by.kind == SWIGLU) return gate / (1.0f + exponential(-gate)) * up;
  if (by.kind == GELU_TANH) {
    // (1 + tanh(y)) / 2 = 1 / (1 + e^-2y), with 2y = 2 · √(2 / π) · (x + 0.044715 · x³)
    const vec_f32 twice = 1.59576912160573f * (gate + 0.044715f * gate * gate * gate);
    return gate / (1.0f + exponential(-twice)) * up;
  }
  if (by.kind == RELU) return (gate > 0.0f ? gate : vec_f32{}) * up;
  gate = gate > by.limit ? broadcast(by.limit) : gate;
  up = up > by.limit ? broadcast(by.limit) : up;
  up = up < -by.limit ? broadcast(-by.limit) : up;
  return gate / (1.0f + exponential(-by.alpha * gate)) * (up + 1.0f);
}

// cap · tanh(x / cap) = cap · (1 - 2 / (e^(2x / cap) + 1))
INLINE vec_f32 cap_softly(vec_f32 x, float cap) {
  return cap * (1.0f - 2.0f / (exponential(x * (2.0f / cap)) + 1.0f));
}

// Calls `f` with `count`, which is from 1 to MAX, as a compile-time constant.
template <int MAX, typename F>
INLINE void with_constant(int64_t count, F f) {
  if constexpr (MAX > 1) {
    if (count < MAX) return with_constant<MAX - 1>(count, f);
  }
  f(std::integral_constant<int, MAX>());
}

}  // namespace
