// Matrix multiplication in bf16 with vectors: c [count, 32] = rows [count, inputs] times a panel.
#pragma once

#include "mxfp4.h"
#include "rows.h"

namespace {

// c [COUNT, 32] = rows times a panel's next `inputs`, added to c if `accumulate`. With each STEP
// inputs, from k on, `step` bytes at `next` (at most LINES cache lines) are fetched into the
// second-level cache, and expand(k) is called.
template <int COUNT, int64_t STEP, int64_t LINES, typename Expand>
INLINE void bf16_rows_times_panel(const bf16* a, int64_t stride, const bf16* panel, int64_t inputs,
                                  const char* next, int64_t step, float* c, bool accumulate,
                                  Expand expand) {
  vec_f32 acc[COUNT][VECTORS];
#pragma GCC unroll 12
  for (int r = 0; r < COUNT; r++)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; v++)
      acc[r][v] = accumulate ? load(c + r * PANEL + v * LANES) : vec_f32{};
  for (int64_t first = 0; first < inputs; first += STEP) {
    for (int64_t line = 0; line < LINES; line++) __builtin_prefetch(next + 64 * line, 0, 2);
    next += step;
    expand(first);
#pragma GCC unroll 2
    for (int64_t k = first; k < first + STEP; k += 2) {
      vec_i32 weights[VECTORS];
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; v++)
        weights[v] = keep_in_register(load_i32(panel + k * PANEL + v * 2 * LANES));
#pragma GCC unroll 12
      for (int r = 0; r < COUNT; r++) {
        int32_t pair;
        memcpy(&pair, a + r * stride + k, 4);
        const vec_i32 pairs = keep_in_register(pair - vec_i32{});
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) acc[r][v] = dot_bf16(acc[r][v], pairs, weights[v]);
      }
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < COUNT; r++)
#pragma GCC unroll 8
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
      bf16_rows_times_panel<constant.value, 2, 2>(a + row * stride, stride, panel, inputs, next,
                                                  step, c + row * PANEL, accumulate,
                                                  [](int64_t) {});
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

#if BF16_DOT
// c [count, 32] of at most COMPRESSED_ROWS rows = rows times an expanded span, added to c if
// `accumulate`. Meanwhile `ahead` is expanded to `to`, and memory at `next` is fetched.
__attribute__((noinline)) static void compressed_block_times_panel(
    const bf16* a, int64_t stride, int64_t count, const bf16* panel, int64_t inputs,
    const char* next, float* c, bool accumulate, const CompressedSpan& ahead, bf16* to) {
  const CompressedSpan span = ahead;
  const int64_t expanded = std::min(inputs, span.inputs);
  with_constant<COMPRESSED_ROWS>(count, [&](auto constant) {
    constexpr int64_t STEP = CompressedSpan::STEP;
    constexpr int64_t BYTES = STEP * COMPRESSED_INPUT_BYTES;
    bf16_rows_times_panel<constant.value, STEP, BYTES / 64>(a, stride, panel, inputs, next, BYTES, c,
                                                            accumulate, [&](int64_t k) {
                                                              if (k < expanded) span.expand(k, to);
                                                            });
  });
  span.complete(expanded, to);
}

// As bf16_times_panels, with the compressed copy of a weight, for at most COMPRESSED_ROWS rows.
// While they are multiplied by a span of inputs, the next span is expanded, at last that of the
// next panel.
template <int PANELS, typename Finish>
INLINE void compressed_times_panels(const Weight& weight, const int64_t (&panels)[PANELS],
                                    int64_t next_panel, const Rows& x,
                                    const vec_f32 (&bias)[PANELS][VECTORS], float* scratch,
                                    ExpandedSpans& expanded, Finish& finish) {
  constexpr int64_t FETCHED = 2;  // spans after the one that is multiplied; measured
  const int64_t inputs = weight.inputs, panel_stride = x.count * PANEL;
  const int64_t per_panel = (inputs + EXPANDED_INPUTS - 1) / EXPANDED_INPUTS;
  const int64_t step = ((inputs + per_panel - 1) / per_panel + 31) / 32 * 32;
  const int64_t next_in_turn = std::min(next_panel, (weight.outputs - 1) / PANEL);
  const auto panel_of = [&](int64_t i) {
    return i / per_panel < PANELS ? panels[i / per_panel] : next_in_turn;
  };
  CompressedSpan span(weight, panels[0], 0, step);
  if (expanded.from != span.from) span.complete(0, expanded.values[expanded.index]);
  for (int64_t i = 0; i < PANELS * per_panel; i++, expanded.index = 1 - expanded.index) {
    const int64_t k = i % per_panel * step, fetched = i + FETCHED;
    const CompressedSpan ahead(weight, panel_of(i + 1), (i + 1) % per_panel * step, step);
    compressed_block_times_panel(
        x.data + k, inputs, x.count, expanded.values[expanded.index], span.inputs,
        compressed_inputs(weight, panel_of(fetched), fetched % per_panel * step),
        scratch + i / per_panel * panel_stride, k > 0, ahead, expanded.values[1 - expanded.index]);
    span = ahead;
  }
  expanded.from = span.from;
  for (int64_t r = 0; r < x.count; r++)
    finish_row<PANELS>(r, scratch + r * PANEL, panel_stride, bias, finish);
}
#endif

}  // namespace
