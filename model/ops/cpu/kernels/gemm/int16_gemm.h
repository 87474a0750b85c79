// Matrix multiplication in 16-bit integers with scales (see int16.h).
#pragma once

#include "int16.h"
#include "int16_mxfp4.h"
#include "rows.h"

#if INT16_GEMM

namespace {

// acc + the products of weights and the pair of integers.
INLINE vec_i32 dot_int16(vec_i32 acc, vec_i32 weights, const int32_t* pair) {
#if VECTOR_BITS == 512
  // Each product loads its pair from memory: twice as fast as sharing a pair in a register, which
  // is what compilers generate from intrinsics.
  asm("vpdpwssd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(weights), "m"(*pair));
#elif AVX_VNNI
  const vec_i32 pairs = vec_i32{} + *pair;
  asm("%{vex%} vpdpwssd %2, %1, %0" : "+x"(acc) : "x"(weights), "x"(pairs));
#else
  // Inline assembly: GCC would reorder the sums of intrinsics and keep all products on the stack.
  const vec_i32 pairs = vec_i32{} + *pair;
  vec_i32 product;
  asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0"
      : "+x"(acc), "=&x"(product)
      : "x"(weights), "x"(pairs));
#endif
  return acc;
}

// acc [COUNT, 32] += integer sums over up to 64 inputs, times their scales.
template <int COUNT>
INLINE void add_scaled(vec_f32 (&acc)[COUNT][VECTORS], const vec_i32 (&sums)[COUNT][VECTORS],
                       const uint8_t* exponents, const float* row_scales) {
#pragma GCC unroll 4
  for (int v = 0; v < VECTORS; v++) {
    const vec_f32 factor = power_of_two(load_u8(exponents + v * LANES));
#pragma GCC unroll 12
    for (int r = 0; r < COUNT; r++)
      acc[r][v] += __builtin_convertvector(sums[r][v], vec_f32) * (factor * row_scales[r]);
  }
}

// c [COUNT, 32] += rows, which are some of `stride` rows, times a panel's next `inputs`, a multiple
// of 32. Meanwhile the memory at `prefetch` is fetched, `step` bytes (at most 128) with each two
// inputs.
template <int COUNT, bool PREFETCH>
INLINE void int16_rows_times_panel(const int16_t* rows, const float* row_scales, int64_t stride,
                                   const int16_t* panel, const uint8_t* exponents, int64_t inputs,
                                   const char* prefetch, int64_t step, float* c) {
  for (; inputs > 0; inputs -= INT16_GROUP) {
    vec_i32 acc[COUNT][VECTORS] = {};
    const int16_t *a = rows, *end = a + std::min(INT16_GROUP, inputs);
    for (; a < end; a += 2, panel += 2 * PANEL) {
      vec_i32 weights[VECTORS];
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) weights[v] = load_i32(panel + v * 2 * LANES);
      if (PREFETCH) {
        __builtin_prefetch(prefetch);
        __builtin_prefetch(prefetch + 64);
        prefetch += step;
      }
#pragma GCC unroll 12
      for (int r = 0; r < COUNT; r++) {
        const auto* pair = (const int32_t*)(a + r * INT16_GROUP);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) acc[r][v] = dot_int16(acc[r][v], weights[v], pair);
      }
    }
    vec_f32 sums[COUNT][VECTORS];
#pragma GCC unroll 12
    for (int r = 0; r < COUNT; r++)
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) sums[r][v] = load(c + r * PANEL + v * LANES);
    add_scaled<COUNT>(sums, acc, exponents, row_scales);
#pragma GCC unroll 12
    for (int r = 0; r < COUNT; r++)
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) store(c + r * PANEL + v * LANES, sums[r][v]);
    rows += stride * INT16_GROUP;
    row_scales += stride;
    exponents += PANEL;
  }
}

// The same for any count. The first two passes over the panel prefetch half of `bytes` each.
__attribute__((noinline)) static void int16_block_times_panel(
    const int16_t* rows, const float* row_scales, int64_t stride, int64_t count,
    const int16_t* panel, const uint8_t* exponents, int64_t inputs, const char* prefetch,
    int64_t bytes, float* c) {
  const int64_t passes = (count + PASS_ROWS - 1) / PASS_ROWS;
  const int64_t pass_rows = (count + passes - 1) / passes;
  const int64_t prefetching = std::min<int64_t>(2, passes);
  const int64_t step = 2 * bytes / (inputs * prefetching);
  for (int64_t pass = 0; pass < passes; pass++) {
    const int64_t row = pass * pass_rows;
    const auto multiply = [&](auto with_prefetch) {
      with_constant<PASS_ROWS>(std::min(pass_rows, count - row), [&](auto constant) {
        int16_rows_times_panel<constant.value, with_prefetch.value>(
            rows + row * INT16_GROUP, row_scales + row, stride, panel, exponents, inputs, prefetch,
            step, c + row * PANEL);
      });
    };
    if (pass < prefetching)
      multiply(std::true_type());
    else
      multiply(std::false_type());
    prefetch += step * inputs / 2;
  }
}

// c [COUNT, 32] = rows, which are some of `stride` rows, times a panel of MXFP4, unpacked into
// registers: for so few rows, storing unpacked weights takes longer than using them. Bit for bit
// the same as with unpack_mxfp4_to_int16.
template <int COUNT>
INLINE void few_rows_times_mxfp4(const int16_t* rows, const float* row_scales, int64_t stride,
                                 const uint8_t* codes, const uint8_t* scales, int64_t inputs,
                                 float* c) {
  constexpr int HALF = VECTORS / 2;         // vectors of 16 outputs
  constexpr int64_t PREFETCH_BYTES = 4096;  // of codes; measured
  vec_f32 acc[COUNT][VECTORS] = {};
  for (; inputs > 0; inputs -= INT16_GROUP, scales += 2 * MXFP4_GROUP) {
    const int64_t groups = std::min(INT16_GROUP, inputs) / MXFP4_GROUP;
    const CommonScales common(scales, groups);
    vec_i32 sums[COUNT][VECTORS] = {};
    __builtin_prefetch(scales + PREFETCH_BYTES / 8);
    for (int64_t group = 0; group < groups; group++) {
      const int16_t* a = rows + group * MXFP4_GROUP;
      vec_i32 group_sums[COUNT][VECTORS] = {};
#pragma GCC unroll 8
      for (int unit = 0; unit < 8; unit++, codes += 64, a += 4) {
        __builtin_prefetch(codes + PREFETCH_BYTES);
#pragma GCC unroll 2
        for (int part = 0; part < HALF; part++) {
          const vec_i32 nibbles = load_i32(codes + part * 4 * LANES);
          const auto multiply = [&](auto constant) {
            constexpr int i = constant.value, v = i % 2 * HALF;
            const vec_i32 value = decode_fp4<i>(nibbles);
#pragma GCC unroll 12
            for (int r = 0; r < COUNT; r++)
              group_sums[r][v + part] =
                  dot_int16(group_sums[r][v + part], value,
                            (const int32_t*)(a + r * INT16_GROUP + i / 2 * 2));
          };
          multiply(std::integral_constant<int, 0>());
          multiply(std::integral_constant<int, 1>());
          multiply(std::integral_constant<int, 2>());
          multiply(std::integral_constant<int, 3>());
        }
      }
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) {
        const vec_i32 shift = load_u8(common.octaves[group] + v * LANES);
#pragma GCC unroll 12
        for (int r = 0; r < COUNT; r++)
          sums[r][v] += (group_sums[r][v] >> (shift + (FP4_SHIFT - 9))) & (shift <= 8);
      }
    }
    add_scaled<COUNT>(acc, sums, common.exponents, row_scales);
    rows += stride * INT16_GROUP;
    row_scales += stride;
  }
#pragma GCC unroll 12
  for (int r = 0; r < COUNT; r++)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) store(c + r * PANEL + v * LANES, acc[r][v]);
}

__attribute__((noinline)) static void few_rows_by_mxfp4(const Rows& x, const uint8_t* codes,
                                                        const uint8_t* scales, int64_t inputs,
                                                        float* c) {
  with_constant<PASS_ROWS>(x.count, [&](auto count) {
    few_rows_times_mxfp4<count.value>((const int16_t*)x.data, x.scales, x.stride, codes, scales,
                                      inputs, c);
  });
}

// See rows_times_panels in panels.h.
template <int PANELS, typename Finish>
INLINE void int16_times_panels(const Weight& weight, const int64_t (&panels)[PANELS], const Rows& x,
                               const vec_f32 (&bias)[PANELS][VECTORS], float* scratch,
                               Finish& finish) {
  constexpr int64_t STEP = 128;  // inputs; these and the next ones fit the first-level cache
  alignas(64) int16_t unpacked[STEP * PANEL];
  uint8_t unpacked_exponents[STEP / INT16_GROUP * PANEL];
  const int64_t inputs = weight.inputs, panel_stride = x.count * PANEL;
  const bool few = weight.kind == MXFP4 && x.count <= PASS_ROWS;
  memset(scratch, 0, (size_t)(PANELS * panel_stride) * 4);
  for (int p = 0; p < PANELS; p++) {
    if (few) {
      const int64_t at = panels[p] * inputs;
      few_rows_by_mxfp4(x, (const uint8_t*)weight.data + at * PANEL / 2, weight.scales + at, inputs,
                        scratch + p * panel_stride);
      continue;
    }
    for (int64_t k = 0; k < inputs; k += STEP) {
      const int64_t width = std::min(STEP, inputs - k), at = panels[p] * inputs + k;
      const int64_t bytes = width * PANEL * (weight.kind == MXFP4 ? 1 : 4) / 2;
      const char* data = (const char*)weight.data + at * PANEL * (weight.kind == MXFP4 ? 1 : 4) / 2;
      const int16_t* panel = (const int16_t*)data;
      const uint8_t* exponents =
          weight.scales + (panels[p] * scale_count(inputs) + k / INT16_GROUP) * PANEL;
      if (weight.kind == MXFP4) {
        unpack_mxfp4_to_int16((const uint8_t*)data, weight.scales + at, width, unpacked,
                              unpacked_exponents);
        panel = unpacked;
        exponents = unpacked_exponents;
      }
      int16_block_times_panel((const int16_t*)x.data + k * x.stride,
                              x.scales + k / INT16_GROUP * x.stride, x.stride, x.count, panel,
                              exponents, width, data + bytes, bytes, scratch + p * panel_stride);
    }
  }
  for (int64_t r = 0; r < x.count; r++)
    finish_row<PANELS>(r, scratch + r * PANEL, panel_stride, bias, finish);
}

}  // namespace

#endif
