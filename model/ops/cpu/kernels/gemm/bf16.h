// Matrix multiplication in bf16 with vectors: c [count, 32] = rows [count, inputs] times a panel.
#pragma once

#include "mxfp4.h"
#include "rows.h"

namespace {

// c [COUNT, 32] = rows times a panel's next `inputs`, added to c if `accumulate`. Meanwhile the
// memory at `next` is fetched into the second-level cache, `step` bytes (at most 128) with each two
// inputs.
template <int COUNT>
INLINE void bf16_rows_times_panel(const bf16* a, int64_t stride, const bf16* panel, int64_t inputs,
                                  const char* next, int64_t step, float* c, bool accumulate) {
  vec_f32 acc[COUNT][VECTORS] = {};
  if (accumulate)
    for (int r = 0; r < COUNT; r++)
      for (int v = 0; v < VECTORS; v++) acc[r][v] = load(c + r * PANEL + v * LANES);
  for (int64_t k = 0; k < inputs; k += 2) {
    vec_i32 weights[VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; v++)
      weights[v] = keep_in_register(load_i32(panel + k * PANEL + v * 2 * LANES));
    __builtin_prefetch(next, 0, 2);
    __builtin_prefetch(next + 64, 0, 2);
    next += step;
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

// The same for any count. The passes over the panel share the fetching of `bytes` at `next`.
__attribute__((noinline)) static void bf16_block_times_panel(
    const bf16* a, int64_t stride, int64_t count, const bf16* panel, int64_t inputs,
    const char* next, int64_t bytes, float* c, bool accumulate) {
  const int64_t passes = (count + PASS_ROWS - 1) / PASS_ROWS;
  const int64_t pass_rows = (count + passes - 1) / passes;
  const int64_t step = (2 * bytes / inputs + passes - 1) / passes;
  for (int64_t row = 0; row < count; row += pass_rows, next += step * inputs / 2) {
    with_constant<PASS_ROWS>(std::min(pass_rows, count - row), [&](auto constant) {
      bf16_rows_times_panel<constant.value>(a + row * stride, stride, panel, inputs, next, step,
                                            c + row * PANEL, accumulate);
    });
  }
}

// See rows_times_panels in panels.h. While the rows are multiplied by a span of inputs, the next
// span's weights are fetched, across all passes: the first pass would otherwise wait for them. With
// a single pass, which memory limits, weights are fetched only AHEAD bytes before they are used.
template <int PANELS, typename Finish>
INLINE void bf16_times_panels(const Weight& weight, const int64_t (&panels)[PANELS],
                              int64_t next_panel, const Rows& x,
                              const vec_f32 (&bias)[PANELS][VECTORS], float* scratch,
                              Finish& finish) {
  constexpr int64_t SPAN = 1024;          // inputs; two spans and the rows fit the second level
  constexpr int64_t UNPACKED_SPAN = 256;  // inputs; an unpacked span stays in the first level
  constexpr int64_t AHEAD = 6144;         // measured
  alignas(64) bf16 unpacked[UNPACKED_SPAN * PANEL];
  const int64_t inputs = weight.inputs, panel_stride = x.count * PANEL;
  const bool is_mxfp4 = weight.kind == MXFP4;
  const int64_t input_bytes = PANEL * (is_mxfp4 ? 1 : 4) / 2;
  const int64_t span = is_mxfp4 ? UNPACKED_SPAN : SPAN, spans = (inputs + span - 1) / span;
  const int64_t step = ((inputs + spans - 1) / spans + 31) / 32 * 32;
  for (int p = 0; p < PANELS; p++)
    for (int64_t k = 0; k < inputs; k += step) {
      const int64_t width = std::min(step, inputs - k), at = panels[p] * inputs + k;
      const char* data = (const char*)weight.data + at * input_bytes;
      const bf16* panel = is_mxfp4 ? unpacked : (const bf16*)data;
      for (int64_t i = 0; is_mxfp4 && i < width; i += MXFP4_GROUP)
        unpack_mxfp4_group((const uint8_t*)data + i * PANEL / 2, weight.scales + at + i,
                           unpacked + i * PANEL);
      const char* next = data + AHEAD;
      if (x.count > PASS_ROWS) {
        const int64_t next_in_turn = p + 1 < PANELS ? panels[p + 1] : next_panel;
        next = k + step < inputs ? data + width * input_bytes
                                 : (const char*)weight.data + next_in_turn * inputs * input_bytes;
      }
      bf16_block_times_panel(x.data + k, inputs, x.count, panel, width, next, width * input_bytes,
                             scratch + p * panel_stride, k > 0);
    }
  for (int64_t r = 0; r < x.count; r++)
    finish_row<PANELS>(r, scratch + r * PANEL, panel_stride, bias, finish);
}

}  // namespace
