// Linear layers: out = x times a weight, with or without a gated activation.
#pragma once

#include "panels.h"

namespace {

// With fewer multiplications than this, a single thread is faster than starting a team.
constexpr int64_t PARALLEL_PRODUCTS = 1 << 17;

// x [rows, inputs] → out [rows, outputs] of bf16 or float; transform(sums [32]) before the result
// is stored.
template <typename T, typename Transform>
INLINE void multiply(const Weight* weight, const bf16* x, int64_t rows, T* out, int threads,
                     Transform transform) {
  const int64_t inputs = weight->inputs, outputs = weight->outputs;
  const int64_t panels = (outputs + PANEL - 1) / PANEL;
  const int64_t span = rows_at_once(rows, inputs), spans = (rows + span - 1) / span;
  const int64_t items = panels * spans, chunk = std::max<int64_t>(1, items / (8 * threads));
  if (rows * outputs * inputs < PARALLEL_PRODUCTS) threads = 1;
  const Rows all = rows_of(x, rows, inputs);
#pragma omp parallel num_threads(threads)
  {
    prepare_rows(x, all, inputs);
    float* scratch = thread_scratch<float>(scratch_size(*weight, span, 1));
    int64_t configured_rows = 0;
#pragma omp for schedule(dynamic, chunk) nowait
    for (int64_t item = 0; item < items; item++) {
      const int64_t panel = item % panels, first = item / panels * span;
      const int64_t count = outputs - panel * PANEL;
      T* to = out + first * outputs + panel * PANEL;
      rows_times_panels<1>(*weight, {panel}, slice_rows(all, first, span, inputs), scratch,
                           configured_rows, [&](int64_t r, const vec_f32(&sums)[1][VECTORS]) {
                             vec_f32 results[VECTORS];
                             for (int v = 0; v < VECTORS; v++) results[v] = transform(sums[0][v]);
                             write_row(results, to + r * outputs, count);
                           });
    }
    release_tiles(configured_rows);
  }
}

// x [rows, inputs] → out [rows, outputs]
void linear(const Weight* weight, const bf16* x, int64_t rows, bf16* out, int threads) {
  multiply(weight, x, rows, out, threads, [](vec_f32 sums) { return sums; });
}

// x [rows, inputs] → out [rows, outputs] · scale
void logits(const Weight* weight, const bf16* x, int64_t rows, float scale, float* out,
            int threads) {
  multiply(weight, x, rows, out, threads, [scale](vec_f32 sums) { return sums * scale; });
}

// A panel of gates and the panel of values that they gate, for rows x [count, inputs]: out [count,
// outputs / 2], arranged as x is. The first half of the outputs are gates.
void gated_block(const Weight& weight, int64_t panel, const Rows& x, Activation activation, bf16* out,
                 float* scratch, int64_t& configured_rows) {
  const int64_t size = weight.outputs / 2;
  rows_times_panels<2>(weight, {panel, panel + size / PANEL}, x, scratch, configured_rows,
                       [&](int64_t r, const vec_f32(&sums)[2][VECTORS]) {
                         bf16* to = x.arranged
                                        ? out + arranged_offset(r, x.count, size, panel * PANEL)
                                        : out + r * size + panel * PANEL;
                         for (int v = 0; v < VECTORS; v++)
                           store_bf16(to + v * LANES, activate(sums[0][v], sums[1][v], activation));
                       });
}

// x [rows, inputs] → out [rows, outputs / 2]
void gated_linear(const Weight* weight, const bf16* x, int64_t rows, int64_t kind, float limit,
                  float alpha, bf16* out, int threads) {
  const Activation activation{kind, limit, alpha};
  const int64_t inputs = weight->inputs, panels = weight->outputs / 2 / PANEL;
  const int64_t span = rows_at_once(rows, inputs), items = panels * ((rows + span - 1) / span);
  const int64_t chunk = std::max<int64_t>(1, items / (8 * threads));
  if (rows * weight->outputs * inputs < PARALLEL_PRODUCTS) threads = 1;
  const Rows all = rows_of(x, rows, inputs);
#pragma omp parallel num_threads(threads)
  {
    prepare_rows(x, all, inputs);
    float* scratch = thread_scratch<float>(scratch_size(*weight, span, 2));
    int64_t configured_rows = 0;
#pragma omp for schedule(dynamic, chunk) nowait
    for (int64_t item = 0; item < items; item++) {
      const int64_t first = item / panels * span;
      gated_block(*weight, item % panels, slice_rows(all, first, span, inputs), activation,
                  out + first * weight->outputs / 2, scratch, configured_rows);
    }
    release_tiles(configured_rows);
  }
}

}  // namespace
