// Matrix multiplication of rows of integers with weights of 8 or 4 bits (see int8.h).
//
// Sums over the inputs that share a row's scale are exact; they are scaled and added up in float32,
// in the inputs' order.
#pragma once

#include "int8.h"
#include "../int16_gemm.h"
#include "../rows.h"

namespace {

// A tile is the sums of some rows and some vectors of a panel, which fit the registers: of all
// vectors, or with AVX2 and more than two rows of two, whose codes of 4 bits are in the same bytes.
constexpr int max_tile_rows(int terms) {
  if (VECTOR_BITS == 512) return terms == 2 ? 4 : 6;
  if (AVX_VNNI && terms == 1) return 6;
  return VECTOR_BITS == 256 && terms == 1 ? 4 : 2;
}
constexpr int tile_vectors(int rows) { return VECTOR_BITS == 256 && rows > 2 ? 2 : VECTORS; }

// The integer sums of a row of so many terms.
constexpr int sum_count(int terms) { return VECTOR_BITS == 256 ? 1 : terms; }

#if VECTOR_BITS == 256
// sums += the products of unsigned and signed integers of 8 bits, whose sums are added up in 32 bits
// or (below) in 16. Inline assembly: see dot_int16.
INLINE void add_wide_products(vec_i32& sums, vec_i32 weights, int32_t four) {
  const vec_i32 row = vec_i32{} + four;
#if AVX_VNNI
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(weights), "x"(row));
#else
  const vec_i32 ones = vec_i32{} + 0x10001;
  vec_i32 products;
  asm("vpmaddubsw %3, %2, %1\n\tvpmaddwd %4, %1, %1\n\tvpaddd %1, %0, %0"
      : "+x"(sums), "=&x"(products)
      : "x"(weights), "x"(row), "x"(ones));
#endif
}
INLINE void add_short_products(vec_i32& sums, vec_i32 weights, int32_t four) {
  const vec_i32 row = vec_i32{} + four;
  vec_i32 products;
  asm("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0"
      : "+x"(sums), "=&x"(products)
      : "x"(weights), "x"(row));
}
#else
// sums + the products of the codes of four inputs, plus their bias, and four integers of a row.
INLINE vec_i32 add_products(vec_i32 sums, vec_i32 codes, const int32_t* four) {
#if VECTOR_BITS == 512
  // Each product loads the row's integers from memory: see dot_int16.
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sums) : "v"(codes), "m"(*four));
#else
  const int8_t* row = (const int8_t*)four;
  for (int i = 0; i < 4; i++) sums += (codes >> 8 * i & 255) * row[i];
#endif
  return sums;
}
#endif

// sums += the products of the codes of four inputs, plus their bias, and of inputs i to i + 3 of a
// row's block.
template <int TERMS, int BITS>
INLINE void add_row_products(vec_i32 (&sums)[sum_count(TERMS)], vec_i32 codes,
                             const int8_t* block, int i) {
#if VECTOR_BITS == 256
  const auto* integers = (const int32_t*)(block + TERMS * i);
  if constexpr (TERMS == 2) {
    sums[0] = dot_int16(sums[0], codes & 0x00ff00ff, integers);
    const __m256i odd = _mm256_srli_epi16((__m256i)codes, 8);
    sums[0] = dot_int16(sums[0], (vec_i32)odd, integers + 1);
  } else if constexpr (sums_are_short(TERMS, BITS)) {
    add_short_products(sums[0], codes, integers[0]);
  } else {
    add_wide_products(sums[0], codes, integers[0]);
  }
#else
#pragma GCC unroll 2
  for (int t = 0; t < TERMS; t++)
    sums[t] = add_products(sums[t], codes, (const int32_t*)(block + t * INT8_BLOCK + i));
#endif
}

// The integer sums of a row before the first product, and the total after the last: products of the
// codes without their bias.
template <int TERMS, int BITS>
INLINE void begin_sums(vec_i32 (&sums)[sum_count(TERMS)], [[maybe_unused]] int32_t correction) {
  for (vec_i32& each : sums) each = vec_i32{};
  if (!sums_are_short(TERMS, BITS)) sums[sum_count(TERMS) - 1] += correction;
}
template <int TERMS, int BITS>
INLINE vec_i32 end_sums(const vec_i32 (&sums)[sum_count(TERMS)],
                        [[maybe_unused]] int32_t correction) {
#if VECTOR_BITS == 256
  if constexpr (sums_are_short(TERMS, BITS))
    return (vec_i32)_mm256_madd_epi16((__m256i)sums[0], _mm256_set1_epi16(1)) + correction;
#endif
  if constexpr (sum_count(TERMS) == 2) return (sums[0] << 8) + sums[1];
  return sums[0];
}

// The codes of four inputs, plus their bias, of the outputs in vector v.
template <int BITS>
INLINE vec_i32 load_codes(const uint8_t* from, int v) {
  if constexpr (BITS == 8) return keep_in_register(load_i32(from + v * 4 * LANES));
  constexpr int HALF = VECTORS / 2;
  const vec_i32 nibbles = load_i32(from + v % HALF * 4 * LANES);
  return (v < HALF ? nibbles : nibbles >> 4) & 0x0f0f0f0f;
}

// A tile of c [COUNT, 32] = the rows of x from `row` on times a panel.
template <int COUNT, int TERMS, int BITS, Scaling SCALING>
INLINE void int8_rows_times_tile(const Rows& x, int64_t row, const Weight& weight, int64_t panel,
                                 int tile, float* c) {
  constexpr int64_t PREFETCH = 4096;  // bytes of codes; measured
  constexpr int64_t ROW = TERMS * INT8_BLOCK;
  constexpr int TILE_VECTORS = tile_vectors(COUNT), TILES = VECTORS / TILE_VECTORS;
  const int64_t inputs = weight.inputs, stride = x.stride, group = row_group(weight);
  const auto* codes = (const uint8_t*)weight.data + panel * PANEL * inputs * BITS / 8;
  const int64_t first_scale = panel * PANEL * (inputs / weight.group);
  const auto* scales = (const uint16_t*)weight.scales + first_scale;
  const uint16_t* zeros = SCALING == GROUPS_WITH_ZEROS ? weight.zeros + first_scale : nullptr;
  const int8_t* integers = (const int8_t*)x.data + row * ROW;
  const float* row_scales = x.scales + row;
  const int32_t* corrections = x.corrections + row;
  int64_t scale_end = weight.group;
  vec_f32 acc[COUNT][TILE_VECTORS] = {};
  if (SCALING == OUTPUTS)
    for (int r = 0; r < COUNT; r++)
      for (vec_f32& each : acc[r]) each = broadcast(row_scales[inputs / group * stride + r]);
  for (int64_t k = 0; k < inputs;) {
    if (k == scale_end) {
      scales += PANEL;
      if (zeros) zeros += PANEL;
      scale_end += weight.group;
    }
    vec_i32 sums[COUNT][TILE_VECTORS][sum_count(TERMS)];
#pragma GCC unroll 6
    for (int r = 0; r < COUNT; r++)
#pragma GCC unroll 8
      for (int i = 0; i < TILE_VECTORS; i++) begin_sums<TERMS, BITS>(sums[r][i], SCALING == OUTPUTS ? 0 : corrections[r]);
    for (const int64_t end = k + group; k < end; k += INT8_BLOCK, integers += stride * ROW)
#pragma GCC unroll 8
      for (int i = 0; i < INT8_BLOCK; i += 4, codes += 4 * PANEL * BITS / 8) {
        __builtin_prefetch(codes + PREFETCH);
        if (BITS == 8) __builtin_prefetch(codes + PREFETCH + 64);
#pragma GCC unroll 8
        for (int v = 0; v < TILE_VECTORS; v++) {
          const vec_i32 unit = load_codes<BITS>(codes, tile + v * TILES);
#pragma GCC unroll 6
          for (int r = 0; r < COUNT; r++)
            add_row_products<TERMS, BITS>(sums[r][v], unit, integers + r * ROW, i);
        }
      }
#pragma GCC unroll 8
    for (int v = 0; v < TILE_VECTORS; v++) {
      const int64_t output = (tile + v * TILES) * LANES;
      const vec_f32 scale = load_f16(scales + output);
      const vec_f32 zero = zeros ? load_f16(zeros + output) : vec_f32{};
#pragma GCC unroll 6
      for (int r = 0; r < COUNT; r++) {
        const vec_i32 total =
            end_sums<TERMS, BITS>(sums[r][v], SCALING == OUTPUTS ? 0 : corrections[r]);
        acc[r][v] = add_group<SCALING>(acc[r][v], total, scale, zero, row_scales[r],
                                        corrections[r]);
      }
    }
    row_scales += stride;
    corrections += stride;
  }
#pragma GCC unroll 8
  for (int v = 0; v < TILE_VECTORS; v++) {
    const int64_t output = (tile + v * TILES) * LANES;
    const vec_f32 scale = SCALING == OUTPUTS ? load_f16(scales + output) : broadcast(1);
#pragma GCC unroll 6
    for (int r = 0; r < COUNT; r++) store(c + r * PANEL + output, acc[r][v] * scale);
  }
}

// All tiles of all rows of x.
template <int TERMS, int BITS, Scaling SCALING>
__attribute__((noinline)) static void int8_times_panel(const Rows& x, const Weight& weight,
                                                       int64_t panel, float* c) {
  constexpr int TILE_ROWS = max_tile_rows(TERMS);
  const int64_t passes = (x.count + TILE_ROWS - 1) / TILE_ROWS;
  for (int64_t pass = 0; pass < passes; pass++) {
    // Of nearly equal sizes: a small last pass would take as long as a large one.
    const int64_t row = x.count * pass / passes, end = x.count * (pass + 1) / passes;
    with_constant<TILE_ROWS>(end - row, [&](auto count) {
      for (int tile = 0; tile < VECTORS / tile_vectors(count.value); tile++)
        int8_rows_times_tile<count.value, TERMS, BITS, SCALING>(x, row, weight, panel, tile,
                                                                c + row * PANEL);
    });
  }
}

// See rows_times_panels in panels.h.
template <int PANELS, typename Finish>
INLINE void int8_times_panels(const Weight& weight, const int64_t (&panels)[PANELS], const Rows& x,
                              const vec_f32 (&bias)[PANELS][VECTORS], float* scratch,
                              Finish& finish) {
  const int64_t panel_stride = x.count * PANEL;
  with_form(weight, [&](auto terms, auto bits, auto scaling) {
    for (int p = 0; p < PANELS; p++)
      int8_times_panel<terms.value, bits.value, scaling.value>(x, weight, panels[p],
                                                               scratch + p * panel_stride);
  });
  for (int64_t r = 0; r < x.count; r++)
    finish_row<PANELS>(r, scratch + r * PANEL, panel_stride, bias, finish);
}

}  // namespace
