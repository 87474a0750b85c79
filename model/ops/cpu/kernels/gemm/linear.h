// Linear layers: out = x times a weight, with or without a gated activation.
#pragma once

#include "panels.h"

namespace {

// With fewer multiplications than this, a single thread is faster than starting a team.
constexpr int64_t PARALLEL_PRODUCTS = 1 << 17;

// Items of a piece: enough for several pieces a thread, and few enough that a piece takes some tens
// of microseconds. An item is a number of panels of `inputs`, times `rows`.
INLINE int64_t items_per_piece(int64_t items, int64_t inputs, int64_t panels, int64_t rows,
                               int threads) {
  const int64_t cost = panels * inputs * PANEL * 2 * (1 + rows / 16);
  return std::max<int64_t>(1, std::min(items / (8 * threads), (1 << 18) / cost));
}

// The item that a thread probably computes after one of a piece of `size` items: the next one, or
// after the last of the piece, where threads take turns, the first of the thread's next piece.
INLINE int64_t next_item(const Piece& piece, int64_t item, int64_t size, int threads) {
  return item + 1 < piece.last ? item + 1 : item + 1 + (threads - 1) * size;
}

// Where the results of a piece's items are written: 32 outputs of each row. If another thread can
// take the piece over, that is memory of the thread until the piece is committed.
template <typename T>
class Results {
 public:
  // out [rows, outputs]; an item is a panel and at most `span` rows; buffer [items of the piece,
  // span, 32]: that memory, or null.
  Results(T* out, int64_t outputs, int64_t panels, int64_t span, T* buffer)
      : out(out), outputs(outputs), panels(panels), span(span), buffer(buffer) {}

  // The place of row r of the i-th item of the piece that begins with item `first`.
  T* at(int64_t first, int64_t i, int64_t r) const {
    return buffer ? buffer + (i * span + r) * PANEL : place(first + i, r);
  }
  // The number of values that may be written there.
  int64_t writable(int64_t item) const {
    return buffer ? PANEL : outputs - item % panels * PANEL;
  }

  // Copies what is in the buffer to `out`, for `rows` rows in all.
  void write(const Piece& piece, int64_t rows) const {
    for (int64_t item = piece.first; buffer && item < piece.last; item++) {
      const int64_t count = std::min(PANEL, outputs - item % panels * PANEL);
      const int64_t item_rows = std::min(span, rows - item / panels * span);
      for (int64_t r = 0; r < item_rows; r++)
        memcpy(place(item, r), at(piece.first, item - piece.first, r), (size_t)count * sizeof(T));
    }
  }

 private:
  T* place(int64_t item, int64_t r) const {
    return out + (item / panels * span + r) * outputs + item % panels * PANEL;
  }

  T* out;
  int64_t outputs, panels, span;
  T* buffer;
};

// x [rows, inputs] → out [rows, outputs] of bf16 or float; transform(sums [32]) before the result
// is stored.
template <typename T, typename Transform>
INLINE void multiply(const Weight* weight, const bf16* x, int64_t rows, T* out, int threads,
                     Transform transform) {
  const int64_t inputs = weight->inputs, outputs = weight->outputs;
  const int64_t panels = (outputs + PANEL - 1) / PANEL;
  const int64_t span = rows_at_once(*weight, rows), spans = (rows + span - 1) / span;
  if (rows * outputs * inputs < PARALLEL_PRODUCTS) threads = 1;
  const int64_t items = panels * spans;
  const int64_t size = items_per_piece(items, inputs, 1, std::min(rows, span), threads);
  const Rows all = rows_of(*weight, x, rows);
  prepare_rows(*weight, x, all, threads);
  const bool buffered = threads > 1 && in_sequence();
  divide_last(threads, items, size, [=](Piece& piece) {
    const int64_t scratch_floats = scratch_size(*weight, span, 1);
    float* scratch = thread_scratch<float>(scratch_floats + size * span * PANEL);
    T* buffer = buffered ? (T*)(scratch + scratch_floats) : nullptr;
    const Results<T> results(out, outputs, panels, span, buffer);
    Carried carried;
    for (int64_t item = piece.first; item < piece.last; item++) {
      const int64_t first = item / panels * span, count = results.writable(item);
      rows_times_panels<1>(*weight, {item % panels}, slice_rows(*weight, all, first, span), scratch,
                           carried, next_item(piece, item, size, threads) % panels,
                           [&](int64_t r, const vec_f32(&sums)[1][VECTORS]) {
                             vec_f32 row[VECTORS];
                             for (int v = 0; v < VECTORS; v++) row[v] = transform(sums[0][v]);
                             write_row(row, results.at(piece.first, item - piece.first, r), count);
                           });
    }
    release_tiles(carried.tiles);
    if (piece.commit()) results.write(piece, rows);
  });
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

// A panel of gates and the panel of values that they gate, for rows x [count, inputs]: 32 values of
// each row r are written to place(r). The first half of the outputs are gates. next_panel: the panel
// of gates that this thread probably multiplies next.
template <typename Place>
INLINE void gated_block(const Weight& weight, int64_t panel, int64_t next_panel, const Rows& x,
                        Activation activation, float* scratch, Carried& carried,
                        Place place) {
  rows_times_panels<2>(weight, {panel, panel + weight.outputs / 2 / PANEL}, x, scratch,
                       carried, next_panel,
                       [&](int64_t r, const vec_f32(&sums)[2][VECTORS]) {
                         bf16* to = place(r);
                         for (int v = 0; v < VECTORS; v++)
                           store_bf16(to + v * LANES, activate(sums[0][v], sums[1][v], activation));
                       });
}

// x [rows, inputs] → out [rows, outputs / 2]
void gated_linear(const Weight* weight, const bf16* x, int64_t rows, int64_t kind, float limit,
                  float alpha, bf16* out, int threads) {
  const Activation activation{kind, limit, alpha};
  const int64_t inputs = weight->inputs, outputs = weight->outputs / 2, panels = outputs / PANEL;
  const int64_t span = rows_at_once(*weight, rows), items = panels * ((rows + span - 1) / span);
  if (rows * weight->outputs * inputs < PARALLEL_PRODUCTS) threads = 1;
  const int64_t size = items_per_piece(items, inputs, 2, std::min(rows, span), threads);
  const Rows all = rows_of(*weight, x, rows);
  prepare_rows(*weight, x, all, threads);
  const bool buffered = threads > 1 && in_sequence();
  divide_last(threads, items, size, [=](Piece& piece) {
    const int64_t scratch_floats = scratch_size(*weight, span, 2);
    float* scratch = thread_scratch<float>(scratch_floats + size * span * PANEL);
    bf16* buffer = buffered ? (bf16*)(scratch + scratch_floats) : nullptr;
    const Results<bf16> results(out, outputs, panels, span, buffer);
    Carried carried;
    for (int64_t item = piece.first; item < piece.last; item++) {
      const Rows block = slice_rows(*weight, all, item / panels * span, span);
      gated_block(*weight, item % panels, next_item(piece, item, size, threads) % panels, block,
                  activation, scratch, carried, [&](int64_t r) {
                    return results.at(piece.first, item - piece.first, r);
                  });
    }
    release_tiles(carried.tiles);
    if (piece.commit()) results.write(piece, rows);
  });
}

}  // namespace
