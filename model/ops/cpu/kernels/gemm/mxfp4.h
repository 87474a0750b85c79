// MXFP4 weights (OCP Microscaling Formats, v1.0): 4-bit codes, 32 of which share an exponent.
#pragma once

#include "../vectors.h"

namespace {

#if VECTOR_BITS == 512
// The sixteen values of FP4 E2M1 as bf16, less the bias of a scale's exponent (127 << 7); twice,
// because a table lookup uses the low five bits of its index. Zero is 2^-60: negligible next to any
// other value, and its exponent has room for a scale to be added.
alignas(64) const uint16_t FP4_BF16[32] = {
    0xe200, 0xff80, 0x0000, 0x0040, 0x0080, 0x00c0, 0x0100, 0x0140,
    0x6200, 0x7f80, 0x8000, 0x8040, 0x8080, 0x80c0, 0x8100, 0x8140,
    0xe200, 0xff80, 0x0000, 0x0040, 0x0080, 0x00c0, 0x0100, 0x0140,
    0x6200, 0x7f80, 0x8000, 0x8040, 0x8080, 0x80c0, 0x8100, 0x8140};
// A shuffle within each 16 bytes, all of which are equal: each byte of a lane's four outputs goes
// to the high half of two words.
#define TO_WORDS(a) \
  0x80, a, 0x80, a, 0x80, a + 1, 0x80, a + 1, 0x80, a + 2, 0x80, a + 2, 0x80, a + 3, 0x80, a + 3
alignas(64) const uint8_t SPREAD[64] = {TO_WORDS(0), TO_WORDS(4), TO_WORDS(8), TO_WORDS(12)};
#undef TO_WORDS
#endif

// Unpacks a panel's next 32 inputs from MXFP4 to bf16. Scales are added to the exponents, which
// stay in the range of bf16: pack_mxfp4 raises small scales, packed.py refuses large ones.
// prefetch: memory to prefetch, one cache line for each of the 8 units, or null.
INLINE void unpack_mxfp4_group(const uint8_t* codes, const uint8_t* scales, bf16* to,
                               [[maybe_unused]] const char* prefetch = nullptr) {
#if VECTOR_BITS == 512
  const __m512i table = _mm512_load_si512(FP4_BF16);
  const __m512i spread = _mm512_load_si512(SPREAD);
  __m512i exponents[2];  // of outputs 0 to 15, and of 16 to 31
  for (int i = 0; i < 2; i++) {
    const __m128i bytes = _mm_loadu_si128((const __m128i*)(scales + i * 16));
    const __m512i high = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(bytes), spread);
    exponents[i] = _mm512_srli_epi16(high, 1);
  }
#pragma GCC unroll 8
  for (int unit = 0; unit < 8; unit++) {
    if (prefetch) __builtin_prefetch(prefetch + unit * 64, 0, 2);
    __m512i words = _mm512_loadu_si512(codes + unit * 64);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      const __m512i value = _mm512_permutexvar_epi16(words, table);
      _mm512_storeu_si512(to + (unit * 4 + i) * 32, _mm512_add_epi16(value, exponents[i & 1]));
      words = _mm512_srli_epi16(words, 4);
    }
  }
#else
  static const uint16_t magnitudes[8] = {0x0000, 0x3f00, 0x3f80, 0x3fc0,
                                         0x4000, 0x4040, 0x4080, 0x40c0};
  for (int unit = 0; unit < 8; unit++) {
    const uint16_t* words = (const uint16_t*)(codes + unit * 64);
    for (int i = 0; i < 4; i++) {
      bf16* out = to + (unit * 4 + i) * 32;
      for (int lane = 0; lane < 32; lane++) {
        const int code = words[lane] >> (4 * i) & 15;
        const int shift = (int)scales[(i & 1) * 16 + lane / 2] - 127;
        const int value = magnitudes[code & 7] + (code & 7 ? shift * 128 : 0);
        out[lane] = (bf16)(value | (code & 8) << 12);
      }
    }
  }
#endif
}

}  // namespace
