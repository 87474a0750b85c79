// Matrix multiplication in bf16 with vectors: c [count, 32] = rows [count, inputs] times a panel.
#pragma once

#include "mxfp4.h"
#include "rows.h"

namespace {

template <int COUNT>
INLINE void bf16_rows_times_panel(const bf16* a, int64_t stride, const bf16* panel, int64_t inputs,
                                  float* c, bool accumulate) {
  vec_f32 acc[COUNT][VECTORS] = {};
  if (accumulate)
    for (int r = 0; r < COUNT; r++)
      for (int v = 0; v < VECTORS; v++) acc[r][v] = load(c + r * PANEL + v * LANES);
  for (int64_t k = 0; k < inputs; k += 2) {
    vec_i32 weights[VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; v++)
      weights[v] = keep_in_register(load_i32(panel + k * PANEL + v * 2 * LANES));
    __builtin_prefetch(panel + k * PANEL + 2048);
    __builtin_prefetch(panel + k * PANEL + 2048 + PANEL);
#pragma GCC unroll 12
    for (int r = 0; r < COUNT; r++) {
      int32_t pair;
      memcpy(&pair, a + r * stride + k, 4);
      const vec_i32 pairs = keep_in_register(pair - vec_i32{});
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; v++) acc[r][v] = dot_bf16(acc[r][v], pairs, weights[v]);
    }
  }
  for (int r = 0; r < COUNT; r++)
    for (int v = 0; v < VECTORS; v++) store(c + r * PANEL + v * LANES, acc[r][v]);
}

// The same for any count.
__attribute__((noinline)) static void bf16_block_times_panel(const bf16* a, int64_t stride,
                                                             int64_t count, const bf16* panel,
                                                             int64_t inputs, float* c,
                                                             bool accumulate) {
  const int64_t passes = (count + PASS_ROWS - 1) / PASS_ROWS;
  const int64_t pass_rows = (count + passes - 1) / passes;
  for (int64_t row = 0; row < count; row += pass_rows) {
    with_constant<PASS_ROWS>(std::min(pass_rows, count - row), [&](auto constant) {
      bf16_rows_times_panel<constant.value>(a + row * stride, stride, panel, inputs,
                                            c + row * PANEL, accumulate);
    });
  }
}

// See rows_times_panels in panels.h.
template <int PANELS, typename Finish>
INLINE void bf16_times_panels(const Weight& weight, const int64_t (&panels)[PANELS], const Rows& x,
                              const vec_f32 (&bias)[PANELS][VECTORS], float* scratch,
                              Finish& finish) {
  constexpr int64_t SPAN = 256;  // inputs of a panel that stay in the first-level cache
  alignas(64) bf16 unpacked[SPAN * PANEL];
  const int64_t inputs = weight.inputs, panel_stride = x.count * PANEL;
  const bool single_pass = x.count <= ROW_BLOCK && weight.kind != MXFP4;
  const int64_t step = single_pass ? inputs : x.count <= 4 * ROW_BLOCK ? SPAN / 2 : SPAN;
  for (int p = 0; p < PANELS; p++)
    for (int64_t k = 0; k < inputs; k += step) {
      const int64_t width = std::min(step, inputs - k), at = panels[p] * inputs + k;
      const bf16* panel = weight.kind == MXFP4 ? unpacked : (const bf16*)weight.data + at * PANEL;
      for (int64_t i = 0; weight.kind == MXFP4 && i < width; i += MXFP4_GROUP)
        unpack_mxfp4_group((const uint8_t*)weight.data + (at + i) * PANEL / 2,
                           weight.scales + at + i, unpacked + i * PANEL);
      for (int64_t row = 0; row < x.count; row += ROW_BLOCK)
        bf16_block_times_panel(x.data + row * inputs + k, inputs,
                               std::min(ROW_BLOCK, x.count - row), panel, width,
                               scratch + p * panel_stride + row * PANEL, k > 0);
    }
  for (int64_t r = 0; r < x.count; r++)
    finish_row<PANELS>(r, scratch + r * PANEL, panel_stride, bias, finish);
}

}  // namespace
