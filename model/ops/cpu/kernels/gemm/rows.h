// Rows that are multiplied with a weight's panels, and the handling of the sums.
#pragma once

#include "compressed.h"

namespace {

// The number of rows that share a pass over a panel: their sums fit the registers.
constexpr int PASS_ROWS = VECTOR_BITS == 512 ? 12 : 2;

// Rows [count, inputs] of bf16, contiguous or arranged for AMX (see arranged_offset), or of int16 or
// int8, with their scales, as part of `stride` rows (see int16.h and int8.h).
struct Rows {
  const bf16* data;
  int64_t count;
  bool arranged;
  const float* scales;  // null for bf16
  int64_t stride;
  const int32_t* corrections;  // null but for int8
};

// What a thread keeps from one call of rows_times_panels to the next, of one piece of work.
struct Carried {
  int64_t tiles = 0;  // the configuration of its tiles, or 0: see amx.h
#if BF16_DOT
  ExpandedSpans expanded;
#endif
};

// Whether rows are multiplied with AMX.
INLINE bool use_amx() {
#if BF16_DOT
  return amx_enabled;
#else
  return false;
#endif
}

// Offset of row r's inputs from k on, where k is a multiple of 32, among `count` rows arranged for
// AMX: in blocks of 16 rows, in which the next 32 inputs of all rows are stored together.
INLINE int64_t arranged_offset(int64_t r, int64_t count, int64_t inputs, int64_t k) {
  const int64_t first = r / 16 * 16;
  return first * inputs + k * std::min<int64_t>(16, count - first) + r % 16 * 32;
}

// The biases of a panel's outputs, or zeros.
INLINE void load_bias(const Weight& weight, int64_t panel, vec_f32 (&bias)[VECTORS]) {
  float values[PANEL] = {};
  const int64_t first = panel * PANEL, count = std::min(PANEL, weight.outputs - first);
  for (int64_t i = 0; weight.bias && i < count; i++) values[i] = to_float(weight.bias[first + i]);
  for (int v = 0; v < VECTORS; v++) bias[v] = load(values + v * LANES);
}

// Adds the bias to row r's sums and calls finish(r, sums) with those of each panel. c is the row's
// place in the sums of the first panel; those of the next panel are `panel_stride` values further.
template <int PANELS, typename Finish>
INLINE void finish_row(int64_t r, const float* c, int64_t panel_stride,
                       const vec_f32 (&bias)[PANELS][VECTORS], Finish& finish) {
  vec_f32 sums[PANELS][VECTORS];
  for (int p = 0; p < PANELS; p++)
    for (int v = 0; v < VECTORS; v++)
      sums[p][v] = load(c + p * panel_stride + v * LANES) + bias[p][v];
  finish(r, sums);
}

}  // namespace
