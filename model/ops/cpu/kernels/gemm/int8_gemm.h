// Matrix multiplication of rows of 8-bit integers with weights of 8 or 4 bits (see int8.h).
//
// Sums over 32 inputs are exact; they are scaled and added up in float32, in the inputs' order.
#pragma once

#include "int8.h"
#include "rows.h"

namespace {

// The number of rows that share a pass over a panel: their integer and float32 sums fit the
// registers.
constexpr int INT8_PASS_ROWS = VECTOR_BITS == 512 ? 6 : 2;

// The sums of a row's next 32 inputs before the first product.
template <int BITS>
INLINE vec_i32 begin_sums([[maybe_unused]] int32_t correction) {
#if VECTOR_BITS == 256
  return vec_i32{};
#else
  return vec_i32{} + correction;
#endif
}

// sums + the products of the codes of four inputs, plus their bias, and four integers of a row.
template <int BITS>
INLINE vec_i32 add_products(vec_i32 sums, vec_i32 codes, const int32_t* four) {
#if VECTOR_BITS == 512
  // Each product loads the row's integers from memory: see dot_int16.
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sums) : "v"(codes), "m"(*four));
  return sums;
#elif VECTOR_BITS == 256
  // AVX2 multiplies unsigned with signed bytes to sums of two products in 16 bits. With 4 bits, all
  // 32 inputs are added up in 16 bits; with 8 bits, magnitudes are multiplied, because products
  // would not fit, and the row gets the sign.
  const __m256i row = _mm256_set1_epi32(*four);
  if constexpr (BITS == 4)
    return (vec_i32)_mm256_add_epi16((__m256i)sums, _mm256_maddubs_epi16((__m256i)codes, row));
  const __m256i weights = (__m256i)(codes ^ (int32_t)0x80808080);
  const __m256i pairs =
      _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(row, weights));
  return sums + (vec_i32)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
  const int8_t* row = (const int8_t*)four;
  for (int i = 0; i < 4; i++) sums += (codes >> 8 * i & 255) * row[i];
  return sums;
#endif
}

// The sums of products of the codes without their bias.
template <int BITS>
INLINE vec_i32 end_sums(vec_i32 sums, [[maybe_unused]] int32_t correction) {
#if VECTOR_BITS == 256
  if constexpr (BITS == 4)
    return (vec_i32)_mm256_madd_epi16((__m256i)sums, _mm256_set1_epi16(1)) + correction;
#endif
  return sums;
}

// The codes of four inputs of all outputs, plus their bias.
template <int BITS>
INLINE void load_codes(const uint8_t* from, vec_i32 (&codes)[VECTORS]) {
  if constexpr (BITS == 8) {
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; v++) codes[v] = load_i32(from + v * 4 * LANES);
  } else {
    constexpr int HALF = VECTORS / 2;
#pragma GCC unroll 4
    for (int v = 0; v < HALF; v++) {
      const vec_i32 nibbles = load_i32(from + v * 4 * LANES);
      codes[v] = nibbles & 0x0f0f0f0f;
      codes[HALF + v] = nibbles >> 4 & 0x0f0f0f0f;
    }
  }
}

// c [COUNT, 32] = the rows of x from `row` on times a panel.
template <int COUNT, int BITS, bool ZEROS>
INLINE void int8_rows_times_panel(const Rows& x, int64_t row, const Weight& weight, int64_t panel,
                                  float* c) {
  constexpr int64_t PREFETCH = 4096;  // bytes of codes; measured
  const int64_t inputs = weight.inputs, stride = x.stride;
  const auto* codes = (const uint8_t*)weight.data + panel * PANEL * inputs * BITS / 8;
  const int64_t first_scale = panel * PANEL * (inputs / weight.group);
  const auto* scales = (const uint16_t*)weight.scales + first_scale;
  const uint16_t* zeros = ZEROS ? weight.zeros + first_scale : nullptr;
  const int8_t* integers = (const int8_t*)x.data + row * INT8_GROUP;
  const float* row_scales = x.scales + row;
  const int32_t* corrections = x.corrections + row;
  int64_t scale_end = weight.group;
  vec_f32 acc[COUNT][VECTORS] = {};
  for (int64_t k = 0; k < inputs; k += INT8_GROUP) {
    if (k == scale_end) {
      scales += PANEL;
      if (ZEROS) zeros += PANEL;
      scale_end += weight.group;
    }
    vec_i32 sums[COUNT][VECTORS];
#pragma GCC unroll 6
    for (int r = 0; r < COUNT; r++)
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; v++) sums[r][v] = begin_sums<BITS>(corrections[r]);
#pragma GCC unroll 8
    for (int i = 0; i < INT8_GROUP; i += 4, codes += 4 * PANEL * BITS / 8) {
      vec_i32 unit[VECTORS];
      load_codes<BITS>(codes, unit);
      __builtin_prefetch(codes + PREFETCH);
      if (BITS == 8) __builtin_prefetch(codes + PREFETCH + 64);
#pragma GCC unroll 6
      for (int r = 0; r < COUNT; r++) {
        const auto* four = (const int32_t*)(integers + r * INT8_GROUP + i);
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) sums[r][v] = add_products<BITS>(sums[r][v], unit[v], four);
      }
    }
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; v++) {
      const vec_f32 scale = load_f16(scales + v * LANES);
      [[maybe_unused]] vec_f32 zero = {};
      if (ZEROS) zero = load_f16(zeros + v * LANES);
#pragma GCC unroll 6
      for (int r = 0; r < COUNT; r++) {
        vec_f32 sum =
            __builtin_convertvector(end_sums<BITS>(sums[r][v], corrections[r]), vec_f32);
        if (ZEROS) sum += zero * (float)corrections[r];
        acc[r][v] += sum * (scale * row_scales[r]);
      }
    }
    integers += stride * INT8_GROUP;
    row_scales += stride;
    corrections += stride;
  }
#pragma GCC unroll 6
  for (int r = 0; r < COUNT; r++)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; v++) store(c + r * PANEL + v * LANES, acc[r][v]);
}

// The same for all rows of x.
template <int BITS, bool ZEROS>
__attribute__((noinline)) static void int8_times_panel(const Rows& x, const Weight& weight,
                                                       int64_t panel, float* c) {
  const int64_t passes = (x.count + INT8_PASS_ROWS - 1) / INT8_PASS_ROWS;
  for (int64_t pass = 0; pass < passes; pass++) {
    // Of nearly equal sizes: a small last pass would take as long as a large one.
    const int64_t row = x.count * pass / passes, end = x.count * (pass + 1) / passes;
    with_constant<INT8_PASS_ROWS>(end - row, [&](auto count) {
      int8_rows_times_panel<count.value, BITS, ZEROS>(x, row, weight, panel, c + row * PANEL);
    });
  }
}

// See rows_times_panels in panels.h.
template <int PANELS, typename Finish>
INLINE void int8_times_panels(const Weight& weight, const int64_t (&panels)[PANELS], const Rows& x,
                              const vec_f32 (&bias)[PANELS][VECTORS], float* scratch,
                              Finish& finish) {
  const int64_t panel_stride = x.count * PANEL;
  for (int p = 0; p < PANELS; p++) {
    float* c = scratch + p * panel_stride;
    if (weight.kind == INT8)
      weight.zeros ? int8_times_panel<8, true>(x, weight, panels[p], c)
                   : int8_times_panel<8, false>(x, weight, panels[p], c);
    else
      weight.zeros ? int8_times_panel<4, true>(x, weight, panels[p], c)
                   : int8_times_panel<4, false>(x, weight, panels[p], c);
  }
  for (int64_t r = 0; r < x.count; r++)
    finish_row<PANELS>(r, scratch + r * PANEL, panel_stride, bias, finish);
}

}  // namespace
