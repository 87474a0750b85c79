// The intrinsics of AVX-512 and AMX that the CPU kernels use, as plain functions: for tests on
// processors without them (emulator.py). Each does what Intel's intrinsics guide specifies.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#define EMULATED static __attribute__((noinline, unused))

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(64)));
};
using Floats = VectorOf<float>::type;
using Ints = VectorOf<int32_t>::type;
using Words = VectorOf<uint16_t>::type;
using Bytes = VectorOf<uint8_t>::type;

EMULATED float widened(uint32_t bf16) {
  const uint32_t bits = bf16 << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

EMULATED __m512i emulated_load(const void* at) {
  __m512i value;
  memcpy(&value, at, 64);
  return value;
}
EMULATED void emulated_store(void* at, __m512i value) { memcpy(at, &value, 64); }

EMULATED __m512i emulated_add_epi16(__m512i a, __m512i b) { return (__m512i)((Words)a + (Words)b); }

EMULATED __m512 emulated_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  Floats value;
  for (int i = 0; i < 16; i++) value[i] = std::fma(((Floats)a)[i], ((Floats)b)[i], ((Floats)c)[i]);
  return (__m512)value;
}

EMULATED __m512i emulated_broadcast(__m128i a) {
  __m512i value;
  for (int i = 0; i < 4; i++) memcpy((char*)&value + 16 * i, &a, 16);
  return value;
}

EMULATED __m512i emulated_mask_broadcast(__m512i other, uint32_t mask, __m128i a) {
  Ints value = (Ints)other, broadcast = (Ints)emulated_broadcast(a);
  for (int i = 0; i < 16; i++)
    if (mask >> i & 1) value[i] = broadcast[i];
  return (__m512i)value;
}
EMULATED __m512i emulated_maskz_broadcast(uint32_t mask, __m128i a) {
  return emulated_mask_broadcast((__m512i)Ints{}, mask, a);
}

EMULATED __m512i emulated_sub_epi16(__m512i a, __m512i b) { return (__m512i)((Words)a - (Words)b); }

EMULATED uint32_t emulated_cmplt_epu16(__m512i a, __m512i b) {
  uint32_t mask = 0;
  for (int i = 0; i < 32; i++) mask |= (uint32_t)(((Words)a)[i] < ((Words)b)[i]) << i;
  return mask;
}
EMULATED uint32_t emulated_testn_epi16(__m512i a, __m512i b) {
  uint32_t mask = 0;
  for (int i = 0; i < 32; i++) mask |= (uint32_t)((((Words)a)[i] & ((Words)b)[i]) == 0) << i;
  return mask;
}
EMULATED __m512i emulated_maskz_mov_epi16(uint32_t mask, __m512i a) {
  Words value;
  for (int i = 0; i < 32; i++) value[i] = mask >> i & 1 ? ((Words)a)[i] : 0;
  return (__m512i)value;
}
EMULATED __m512i emulated_slli_epi16(__m512i a, unsigned count) {
  return (__m512i)((Words)a << (int)count);
}
EMULATED __m512i emulated_maskz_slli_epi16(uint32_t mask, __m512i a, unsigned count) {
  return emulated_maskz_mov_epi16(mask, emulated_slli_epi16(a, count));
}
EMULATED __m512i emulated_ternarylogic(__m512i a, __m512i b, __m512i c, int table) {
  Bytes value = {};
  for (int i = 0; i < 512; i++) {
    const auto bit = [i](__m512i of) { return ((Bytes)of)[i / 8] >> i % 8 & 1; };
    const int index = bit(a) << 2 | bit(b) << 1 | bit(c);
    value[i / 8] = (uint8_t)(value[i / 8] | (table >> index & 1) << i % 8);
  }
  return (__m512i)value;
}

EMULATED uint32_t emulated_cmple_epu16(__m512i a, __m512i b) {
  uint32_t mask = 0;
  for (int i = 0; i < 32; i++) mask |= (uint32_t)(((Words)a)[i] <= ((Words)b)[i]) << i;
  return mask;
}

template <typename T, typename Narrow>
static Ints widen_all(Narrow narrow) {
  T from[16];
  memcpy(from, &narrow, sizeof from);
  Ints value;
  for (int i = 0; i < 16; i++) value[i] = from[i];
  return value;
}
EMULATED __m512i emulated_cvtepu16_epi32(__m256i a) { return (__m512i)widen_all<uint16_t>(a); }
EMULATED __m512i emulated_cvtepu8_epi32(__m128i a) { return (__m512i)widen_all<uint8_t>(a); }
EMULATED __m512i emulated_cvtepi8_epi32(__m128i a) { return (__m512i)widen_all<int8_t>(a); }

EMULATED __m512i emulated_cvtps_epi32(__m512 a) {
  Ints value;
  for (int i = 0; i < 16; i++) {
    const float one = ((Floats)a)[i];
    value[i] = std::fabs(one) < 2147483648.0f ? (int)std::nearbyint(one) : INT32_MIN;
  }
  return (__m512i)value;
}

typedef int16_t Halves __attribute__((vector_size(32)));
EMULATED Halves emulated_cvtneps_pbh(__m512 a) {
  Halves value;
  for (int i = 0; i < 16; i++) {
    const float one = ((Floats)a)[i];
    uint32_t bits;
    memcpy(&bits, &one, 4);
    if ((bits & 0x7fffffff) > 0x7f800000)
      bits |= 0x400000;
    else if (!(bits & 0x7f800000))
      bits &= 0x80000000;  // denormals become zeros
    else
      bits += 0x7fff + (bits >> 16 & 1);
    value[i] = (int16_t)(bits >> 16);
  }
  return value;
}
EMULATED __m512i emulated_cvtne2ps_pbh(__m512 high, __m512 low) {
  const Halves halves[2] = {emulated_cvtneps_pbh(low), emulated_cvtneps_pbh(high)};
  __m512i value;
  memcpy(&value, halves, 64);
  return value;
}

// sums + the products of two pairs of bf16, or of 16-bit integers, in each lane.
template <typename A, typename B>
static __m512 emulated_dpbf16_ps(__m512 sums, A a, B b) {
  Floats value = (Floats)sums;
  for (int i = 0; i < 16; i++) {
    const uint32_t x = (uint32_t)((Ints)a)[i], y = (uint32_t)((Ints)b)[i];
    value[i] += widened(x >> 16) * widened(y >> 16);
    value[i] += widened(x & 0xffff) * widened(y & 0xffff);
  }
  return (__m512)value;
}
static inline Ints emulated_vpdpwssd(Ints sums, Ints weights, const int32_t* pair) {
  for (int i = 0; i < 16; i++) {
    sums[i] += (int16_t)weights[i] * (int16_t)*pair;
    sums[i] += (weights[i] >> 16) * (*pair >> 16);
  }
  return sums;
}

EMULATED __m512i emulated_maskz_srav_epi16(uint32_t mask, __m512i a, __m512i count) {
  Words value;
  for (int i = 0; i < 32; i++) {
    const int shift = std::min<int>(15, ((Words)count)[i]);
    value[i] = mask >> i & 1 ? (uint16_t)((int16_t)((Words)a)[i] >> shift) : 0;
  }
  return (__m512i)value;
}

EMULATED __m512 emulated_permutex2var_ps(__m512 a, __m512i index, __m512 b) {
  Floats value;
  for (int i = 0; i < 16; i++) {
    const int from = ((Ints)index)[i] & 31;
    value[i] = from < 16 ? ((Floats)a)[from] : ((Floats)b)[from - 16];
  }
  return (__m512)value;
}

EMULATED __m512i emulated_permutexvar_epi16(__m512i index, __m512i a) {
  Words value;
  for (int i = 0; i < 32; i++) value[i] = ((Words)a)[((Words)index)[i] & 31];
  return (__m512i)value;
}

EMULATED __m512 emulated_cvtph_ps(__m256i a) {
  uint16_t halves[16];
  memcpy(halves, &a, 32);
  Floats value;
  for (int i = 0; i < 16; i++) {  // the exponent's bias is 112 less than float32's
    const uint32_t bits = (halves[i] & 0x8000u) << 16 | (halves[i] & 0x7fffu) << 13;
    memcpy(&value[i], &bits, 4);
    value[i] *= 0x1p112f;
  }
  return (__m512)value;
}

// sums plus the products of four unsigned bytes of each 32 bits with the four signed ones at `four`.
template <typename T>
EMULATED T emulated_vpdpbusd(T sums, T codes, const int32_t* four) {
  int8_t row[4];
  memcpy(row, four, 4);
  for (int i = 0; i < 16; i++) {
    uint8_t bytes[4];
    const int32_t lane = ((Ints)codes)[i];
    memcpy(bytes, &lane, 4);
    for (int k = 0; k < 4; k++) sums[i] += bytes[k] * row[k];
  }
  return sums;
}

EMULATED float emulated_reduce_add_ps(__m512 a) {
  float sums[16];
  memcpy(sums, &a, 64);
  for (int count = 8; count; count /= 2)
    for (int i = 0; i < count; i++) sums[i] += sums[i + count];
  return sums[0];
}
EMULATED float emulated_reduce_max_ps(__m512 a) {
  float most = ((Floats)a)[0];
  for (int i = 1; i < 16; i++) most = std::max(most, ((Floats)a)[i]);
  return most;
}

EMULATED uint32_t emulated_cmplt_ps(__m512 a, __m512 b) {
  uint32_t mask = 0;
  for (int i = 0; i < 16; i++) mask |= (uint32_t)(((Floats)a)[i] < ((Floats)b)[i]) << i;
  return mask;
}

// What is left of each value when it is rounded: 0 as the last argument rounds to nearest, 1 down.
EMULATED __m512 emulated_reduce_ps(__m512 a, int rounding) {
  if (rounding != 0 && rounding != 1) abort();
  Floats value = (Floats)a;
  for (int i = 0; i < 16; i++) {
    const float whole = rounding ? std::floor(value[i]) : std::nearbyint(value[i]);
    value[i] = std::isinf(value[i]) ? 0 : value[i] - whole;
  }
  return (__m512)value;
}
EMULATED __m512 emulated_scalef_ps(__m512 a, __m512 b) {
  Floats value;
  for (int i = 0; i < 16; i++) {
    const float exponent = ((Floats)b)[i];
    value[i] = std::isnan(exponent) ? exponent : ((Floats)a)[i] * std::exp2(std::floor(exponent));
  }
  return (__m512)value;
}

EMULATED int32_t emulated_reduce_max_epi32(__m512i a) {
  int32_t most = ((Ints)a)[0];
  for (int i = 1; i < 16; i++) most = std::max(most, ((Ints)a)[i]);
  return most;
}

EMULATED __m512i emulated_set1_epi16(int16_t one) { return (__m512i)(Words{} + (uint16_t)one); }
#define emulated_setr_epi32(...) ((__m512i)(Ints{__VA_ARGS__}))
EMULATED __m512i emulated_setzero() { return (__m512i)Ints{}; }

EMULATED __m512i emulated_shuffle_epi8(__m512i a, __m512i index) {
  Bytes value;
  for (int i = 0; i < 64; i++) {
    const uint8_t from = ((Bytes)index)[i];
    value[i] = from & 0x80 ? 0 : ((Bytes)a)[i / 16 * 16 + (from & 15)];
  }
  return (__m512i)value;
}

EMULATED __m512i emulated_slli_epi32(__m512i a, int count) { return (__m512i)((Ints)a << count); }
EMULATED __m512i emulated_srli_epi16(__m512i a, int count) { return (__m512i)((Words)a >> count); }

// Interleaves the low, or high, halves of each 16 bytes of a and b.
template <typename T, bool HIGH>
static __m512i unpacked(__m512i a, __m512i b) {
  constexpr int EACH = 16 / sizeof(T);
  typename VectorOf<T>::type x, y, value;
  memcpy(&x, &a, 64);
  memcpy(&y, &b, 64);
  for (int i = 0; i < 64 / (int)sizeof(T); i++) {
    const int from = i / EACH * EACH + (HIGH ? EACH / 2 : 0) + i % EACH / 2;
    value[i] = i % 2 ? y[from] : x[from];
  }
  return (__m512i)value;
}

// Tiles. Using them unconfigured or with shapes that do not match aborts the process.
struct Tiles {
  bool configured;
  uint8_t rows[8], data[8][16][64];
  uint16_t bytes[8];
};
static thread_local Tiles tiles;

EMULATED void emulated_loadconfig(const void* at) {
  memset(&tiles, 0, sizeof tiles);
  memcpy(tiles.bytes, (const char*)at + 16, 16);
  memcpy(tiles.rows, (const char*)at + 48, 8);
  tiles.configured = true;
}
EMULATED void emulated_release() { tiles.configured = false; }

EMULATED void emulated_loadd(int tile, const void* from, int64_t stride) {
  if (!tiles.configured) abort();
  memset(tiles.data[tile], 0, sizeof tiles.data[tile]);
  for (int row = 0; row < tiles.rows[tile]; row++)
    memcpy(tiles.data[tile][row], (const char*)from + row * stride, tiles.bytes[tile]);
}
EMULATED void emulated_stored(int tile, void* to, int64_t stride) {
  if (!tiles.configured) abort();
  for (int row = 0; row < tiles.rows[tile]; row++)
    memcpy((char*)to + row * stride, tiles.data[tile][row], tiles.bytes[tile]);
}
EMULATED void emulated_zero(int tile) { memset(tiles.data[tile], 0, sizeof tiles.data[tile]); }

EMULATED void emulated_dpbf16ps(int sums, int a, int b) {
  if (!tiles.configured || tiles.rows[b] * 4 != tiles.bytes[a] ||
      tiles.rows[sums] != tiles.rows[a] || tiles.bytes[sums] != tiles.bytes[b])
    abort();
  for (int row = 0; row < tiles.rows[sums]; row++) {
    float value[16];
    memcpy(value, tiles.data[sums][row], 64);
    for (int k = 0; k < tiles.rows[b]; k++) {
      uint16_t x[2], y[32];
      memcpy(x, tiles.data[a][row] + 4 * k, 4);
      memcpy(y, tiles.data[b][k], 64);
      for (int i = 0; i < 16; i++)
        value[i] += widened(x[0]) * widened(y[2 * i]) + widened(x[1]) * widened(y[2 * i + 1]);
    }
    memcpy(tiles.data[sums][row], value, 64);
  }
}

// Sums of signed bytes of rows times unsigned ones.
EMULATED void emulated_dpbsud(int sums, int a, int b) {
  if (!tiles.configured || tiles.rows[b] * 4 != tiles.bytes[a] ||
      tiles.rows[sums] != tiles.rows[a] || tiles.bytes[sums] != tiles.bytes[b])
    abort();
  for (int row = 0; row < tiles.rows[sums]; row++) {
    int32_t value[16];
    memcpy(value, tiles.data[sums][row], 64);
    for (int k = 0; k < tiles.rows[b]; k++)
      for (int i = 0; i < 64; i++)
        value[i / 4] += (int8_t)tiles.data[a][row][4 * k + i % 4] * tiles.data[b][k][i];
    memcpy(tiles.data[sums][row], value, 64);
  }
}

#undef _mm512_cmplt_ps_mask
#undef _mm512_maskz_slli_epi16
#undef _mm512_reduce_ps
#undef _mm512_slli_epi16
#undef _mm512_ternarylogic_epi32
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#undef _tile_dpbsud
#define _mm512_fmadd_ps emulated_fmadd_ps
#define _mm512_add_epi16 emulated_add_epi16
#define _mm512_broadcast_i32x4 emulated_broadcast
#define _mm512_cmple_epu16_mask emulated_cmple_epu16
#define _mm512_cmplt_epu16_mask emulated_cmplt_epu16
#define _mm512_cmplt_ps_mask emulated_cmplt_ps
#define _mm512_cvtepu16_epi32 emulated_cvtepu16_epi32
#define _mm512_cvtepu8_epi32 emulated_cvtepu8_epi32
#define _mm512_cvtepi8_epi32 emulated_cvtepi8_epi32
#define _mm512_cvtne2ps_pbh emulated_cvtne2ps_pbh
#define _mm512_cvtneps_pbh emulated_cvtneps_pbh
#define _mm512_cvtph_ps emulated_cvtph_ps
#define _mm512_cvtps_epi32 emulated_cvtps_epi32
#define _mm512_dpbf16_ps emulated_dpbf16_ps
#define _mm512_load_si512 emulated_load
#define _mm512_loadu_si512 emulated_load
#define _mm512_maskz_mov_epi16 emulated_maskz_mov_epi16
#define _mm512_maskz_slli_epi16 emulated_maskz_slli_epi16
#define _mm512_maskz_srav_epi16 emulated_maskz_srav_epi16
#define _mm512_mask_broadcast_i32x4 emulated_mask_broadcast
#define _mm512_maskz_broadcast_i32x4 emulated_maskz_broadcast
#define _mm512_permutex2var_ps emulated_permutex2var_ps
#define _mm512_permutexvar_epi16 emulated_permutexvar_epi16
#define _mm512_reduce_add_ps emulated_reduce_add_ps
#define _mm512_reduce_max_ps emulated_reduce_max_ps
#define _mm512_reduce_max_epi32 emulated_reduce_max_epi32
#define _mm512_reduce_ps emulated_reduce_ps
#define _mm512_set1_epi16 emulated_set1_epi16
#define _mm512_setr_epi32 emulated_setr_epi32
#define _mm512_setzero_si512 emulated_setzero
#define _mm512_shuffle_epi8 emulated_shuffle_epi8
#define _mm512_scalef_ps emulated_scalef_ps
#define _mm512_slli_epi16 emulated_slli_epi16
#define _mm512_slli_epi32 emulated_slli_epi32
#define _mm512_srli_epi16 emulated_srli_epi16
#define _mm512_storeu_si512 emulated_store
#define _mm512_sub_epi16 emulated_sub_epi16
#define _mm512_ternarylogic_epi32 emulated_ternarylogic
#define _mm512_testn_epi16_mask emulated_testn_epi16
#define _mm512_unpackhi_epi16 unpacked<uint16_t, true>
#define _mm512_unpacklo_epi16 unpacked<uint16_t, false>
#define _mm512_unpackhi_epi32 unpacked<uint32_t, true>
#define _mm512_unpacklo_epi32 unpacked<uint32_t, false>
#define _mm512_unpackhi_epi64 unpacked<uint64_t, true>
#define _mm512_unpacklo_epi64 unpacked<uint64_t, false>
#define _tile_loadconfig emulated_loadconfig
#define _tile_release emulated_release
#define _tile_loadd emulated_loadd
#define _tile_stored emulated_stored
#define _tile_zero emulated_zero
#define _tile_dpbf16ps emulated_dpbf16ps
#define _tile_dpbsud emulated_dpbsud
