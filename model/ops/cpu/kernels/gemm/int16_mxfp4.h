// MXFP4 weights as 16-bit integers: FP4's values are integers times a power of two.
#pragma once

#include "int16.h"
#include "mxfp4.h"

#if INT16_GEMM

namespace {

// The common scales of a panel's next 64 inputs (or last 32), which MXFP4 stores as two groups of
// 32: the larger of the two scales. That is exact unless they are more than eight octaves apart;
// then the smaller values become zero.
struct CommonScales {
  alignas(32) uint8_t exponents[PANEL];  // of the integers' scales
  alignas(32) uint8_t octaves[2][PANEL];  // by which the scale of each group is smaller

  __attribute__((always_inline)) CommonScales(const uint8_t* scales, int64_t groups) {
    const __m256i first = _mm256_loadu_si256((const __m256i*)scales);
    const __m256i second =
        groups > 1 ? _mm256_loadu_si256((const __m256i*)(scales + MXFP4_GROUP)) : first;
    const __m256i larger = _mm256_max_epu8(first, second);
    _mm256_store_si256((__m256i*)exponents, _mm256_sub_epi8(larger, _mm256_set1_epi8(9)));
    _mm256_store_si256((__m256i*)octaves[0], _mm256_sub_epi8(larger, first));
    _mm256_store_si256((__m256i*)octaves[1], _mm256_sub_epi8(larger, second));
  }
};

// decode_fp4<I>: the values of the I-th nibbles of 16-bit words (see Weight), times 2^FP4_SHIFT.
//
// RescaleGroup: divides decoded values by 2^octaves, for the outputs whose octaves are given, and
// brings them to 2^9 times their value in the common scale.
#if VECTOR_BITS == 512
constexpr int FP4_SHIFT = 9;  // with room for eight octaves below

// Stored twice, because a table lookup uses the low five bits of its index.
alignas(64) const int16_t FP4_INT16[32] = {
    0, 256, 512, 768, 1024, 1536, 2048, 3072, 0, -256, -512, -768, -1024, -1536, -2048, -3072,
    0, 256, 512, 768, 1024, 1536, 2048, 3072, 0, -256, -512, -768, -1024, -1536, -2048, -3072};

template <int I>
INLINE vec_i32 decode_fp4(vec_i32 words) {
  const __m512i index = _mm512_srli_epi16((__m512i)words, 4 * I);
  return (vec_i32)_mm512_permutexvar_epi16(index, _mm512_load_si512(FP4_INT16));
}

struct RescaleGroup {
  __m512i shift;
  __mmask32 nonzero;

  __attribute__((always_inline)) RescaleGroup(const uint8_t* octaves) {
    const __m512i bytes = _mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)octaves));
    shift = _mm512_srli_epi16(_mm512_shuffle_epi8(bytes, _mm512_load_si512(SPREAD)), 8);
    nonzero = _mm512_cmple_epu16_mask(shift, _mm512_set1_epi16(8));
  }

  __attribute__((always_inline)) vec_i32 operator()(vec_i32 values) const {
    return (vec_i32)_mm512_maskz_srav_epi16(nonzero, (__m512i)values, shift);
  }
};
#else
constexpr int FP4_SHIFT = 10;

// The high bytes of values whose low bytes are zero.
alignas(32) const int8_t FP4_INT16[32] = {
    0, 2, 4, 6, 8, 12, 16, 24, 0, -2, -4, -6, -8, -12, -16, -24,
    0, 2, 4, 6, 8, 12, 16, 24, 0, -2, -4, -6, -8, -12, -16, -24};

template <int I>
INLINE vec_i32 decode_fp4(vec_i32 words) {
  vec_i32 index = words;
  if (I < 2) index = (vec_i32)_mm256_slli_epi16((__m256i)words, 8 - 4 * I);
  if (I == 3) index = (vec_i32)_mm256_srli_epi16((__m256i)words, 4);
  index &= 0x0f000f00;
  return (vec_i32)_mm256_shuffle_epi8(*(const __m256i*)FP4_INT16, (__m256i)index);
}

struct RescaleGroup {
  __m256i factor;

  __attribute__((always_inline)) RescaleGroup(const uint8_t* octaves) {
    const vec_i32 shift = load_u8(octaves);
    const vec_i32 power = ((vec_i32{} + (1 << 14)) >> shift) & (shift <= 8);
    factor = (__m256i)(power | power << 16);
  }

  __attribute__((always_inline)) vec_i32 operator()(vec_i32 values) const {
    return (vec_i32)_mm256_mulhrs_epi16((__m256i)values, factor);  // (values · factor) >> 15
  }
};
#endif

// Unpacks a panel's next `width` inputs, a multiple of 32, to integers and their exponents.
INLINE void unpack_mxfp4_to_int16(const uint8_t* codes, const uint8_t* scales, int64_t width,
                                  int16_t* to, uint8_t* exponents) {
  constexpr int HALF = VECTORS / 2;  // vectors of 16 outputs
  for (int64_t k = 0; k < width; k += INT16_GROUP, scales += 2 * MXFP4_GROUP, exponents += PANEL) {
    const int64_t groups = std::min(INT16_GROUP, width - k) / MXFP4_GROUP;
    const CommonScales common(scales, groups);
    memcpy(exponents, common.exponents, PANEL);
    for (int64_t group = 0; group < groups; group++)
      for (int part = 0; part < HALF; part++) {
        const uint8_t* octaves = common.octaves[group] + part * LANES;
        const RescaleGroup low(octaves), high(octaves + 16);
        const uint8_t* words = codes + group * 512 + part * 4 * LANES;
        int16_t* out = to + group * MXFP4_GROUP * PANEL + part * 2 * LANES;
#pragma GCC unroll 4
        for (int unit = 0; unit < 8; unit++, words += 64, out += 4 * PANEL) {
          const vec_i32 nibbles = load_i32(words);
          store_i32(out, low(decode_fp4<0>(nibbles)));
          store_i32(out + PANEL, high(decode_fp4<1>(nibbles)));
          store_i32(out + 2 * PANEL, low(decode_fp4<2>(nibbles)));
          store_i32(out + 3 * PANEL, high(decode_fp4<3>(nibbles)));
        }
      }
    codes += groups * 512;
    to += groups * MXFP4_GROUP * PANEL;
  }
}

}  // namespace

#endif
