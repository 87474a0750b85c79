// Matrix multiplication in bf16 with AMX: tiles of 16 rows by 64 bytes.
#pragma once

#include "mxfp4.h"
#include "rows.h"

#if BF16_DOT

namespace {

// The memory that LDTILECFG reads: Intel 64 and IA-32 Architectures SDM, volume 1, chapter 18.
struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0 to 3 hold sums, 4 and 5 rows of a with `bytes` each, 6 and 7 the two halves of a panel.
// configuration: the last one of this thread, 0 for none.
INLINE void configure_tiles(int64_t rows, int64_t bytes, int64_t& configuration) {
  if (configuration == (rows << 8 | bytes)) return;
  configuration = rows << 8 | bytes;
  TileConfig config;
  for (int tile = 0; tile < 8; tile++) {
    config.row_bytes[tile] = tile == 4 || tile == 5 ? (uint16_t)bytes : 64;
    config.rows[tile] = (uint8_t)(tile < 6 ? rows : bytes / 4);
  }
  asm volatile("" : : "r"(&config) : "memory");  // the intrinsic does not say that it reads it
  _tile_loadconfig(&config);
}

// Up to 16 rows in the form that tiles load: `stride` values from a row to the next, `step` from 32
// inputs to the next 32.
struct TileRows {
  const bf16* data;
  int64_t stride, step;
};

// Sixteen rows from `first` on. Arranged rows may be followed by others, which the tile then
// contains too; of other rows, the last 16 are taken, even if some of them are before `first`.
INLINE TileRows tile_rows(const Rows& x, int64_t first, int64_t inputs) {
  const int64_t count = std::min<int64_t>(16, x.count - first);
  if (x.arranged) return {x.data + first * inputs, 32, 32 * count};
  return {x.data + std::max<int64_t>(0, std::min(first, x.count - 16)) * inputs, inputs, 32};
}

// Where row r is among those of two tiles from `first` on. A tile of the last sixteen rows repeats
// some of the one before it.
INLINE int64_t tile_place(const Rows& x, int64_t r, int64_t first) {
  const int64_t repeated = x.arranged || x.count <= 16 ? 0 : -x.count & 15;
  const int64_t partial = x.count - (16 - repeated);
  return r - first + (repeated && r >= partial ? repeated : 0);
}

// c [32, 32], or [16, 32] without TWO: the rows of two tiles, or of the first, times a panel, whose
// next 32 inputs `next_panel` returns. With each 32 inputs, `lines` cache lines from `prefetch` on
// are fetched: all at once would exceed the requests that a core can have open, and delay the loads
// that follow. Intel's intrinsics do not say which memory they load: a barrier keeps earlier stores
// before them.
template <bool TWO, typename NextPanel>
INLINE void multiply_tiles(const TileRows& first, const TileRows& second, int64_t inputs, float* c,
                           const char* prefetch, int64_t lines, NextPanel next_panel) {
  alignas(64) char discarded[16 * 64];
  const bf16 *a = first.data, *b = second.data;
  const int64_t a_stride = first.stride * 2, b_stride = second.stride * 2;
  _tile_zero(0);
  _tile_zero(1);
  if (TWO) _tile_zero(2);
  if (TWO) _tile_zero(3);
  for (int64_t k = 0; k < inputs; k += 32) {
    const bf16* panel = next_panel();
    for (int64_t line = 0; line < lines; line++, prefetch += 64)
      __builtin_prefetch(prefetch, 0, 2);
    asm volatile("" : : : "memory");
    _tile_loadd(6, panel, 128);
    _tile_loadd(4, a, a_stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, panel + 32, 128);
    _tile_dpbf16ps(1, 4, 7);
    a += first.step;
    if (TWO) {
      _tile_loadd(5, b, b_stride);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
      b += second.step;
    }
    // A store from time to time: after a pause, the first store takes a thousand cycles.
    if (k / 32 % 4 == 3) _tile_stored(6, discarded, 64);
  }
  _tile_stored(0, c, 128);
  _tile_stored(1, c + 16, 128);
  if (TWO) _tile_stored(2, c + 16 * PANEL, 128);
  if (TWO) _tile_stored(3, c + 16 * PANEL + 16, 128);
}

// The same for a panel of MXFP4, each group of which is unpacked while the one before it is
// multiplied. `unpacked` holds `kept` inputs and is then reused from its start.
template <bool TWO>
INLINE void multiply_mxfp4(const TileRows& first, const TileRows& second, int64_t inputs, float* c,
                           const uint8_t* codes, const uint8_t* scales, bf16* unpacked,
                           int64_t kept) {
  constexpr int64_t PREFETCH = 256;  // inputs; measured
  const uint8_t* end = codes + inputs * PANEL / 2;
  bf16 *current = unpacked, *next = unpacked, *last = unpacked + kept * PANEL;
  const auto unpack = [&] {
    if (codes == end) return;
    unpack_mxfp4_group(codes, scales, next, (const char*)codes + PREFETCH * PANEL / 2);
    codes += MXFP4_GROUP * PANEL / 2;
    scales += MXFP4_GROUP;
    next += MXFP4_GROUP * PANEL;
    if (next == last) next = unpacked;
  };
  unpack();
  multiply_tiles<TWO>(first, second, inputs, c, nullptr, 0, [&] {
    unpack();
    const bf16* panel = current;
    current += MXFP4_GROUP * PANEL;
    if (current == last) current = unpacked;
    return panel;
  });
}

// For a single block of rows, which uses each unpacked group once: keeps few groups, so that they
// stay in the first-level cache. Not inlined, so that there are enough registers (2 to 5% faster
// for up to 16 tokens). With many blocks a call costs more: its return waits for tile stores.
template <bool TWO>
__attribute__((noinline)) static void multiply_few_by_mxfp4(
    const TileRows first, const TileRows second, int64_t inputs, float* c, const uint8_t* codes,
    const uint8_t* scales, bf16* unpacked) {
  multiply_mxfp4<TWO>(first, second, inputs, c, codes, scales, unpacked, 4 * MXFP4_GROUP);
}

// See rows_times_panels in panels.h; 32 rows at a time. The first of them prefetch the panel and
// unpack MXFP4 for all.
template <int PANELS, typename Finish>
INLINE void tiles_times_panels(const Weight& weight, const int64_t (&panels)[PANELS], const Rows& x,
                               const vec_f32 (&bias)[PANELS][VECTORS], float* scratch,
                               int64_t& configuration, Finish& finish) {
  constexpr int64_t BLOCK = ROW_BLOCK * PANEL, PREFETCH = 32;  // inputs; measured
  const int64_t inputs = weight.inputs, rows = std::min<int64_t>(16, x.count);
  configure_tiles(rows, 64, configuration);
  const int64_t panel_bytes = inputs * PANEL * (weight.kind == MXFP4 ? 1 : 4) / 2;
  for (int64_t row = 0; row < x.count; row += ROW_BLOCK) {
    const TileRows first = tile_rows(x, row, inputs);
    const TileRows second = row + 16 < x.count ? tile_rows(x, row + 16, inputs) : TileRows{};
    for (int p = 0; p < PANELS; p++) {
      const char* data = (const char*)weight.data + panels[p] * panel_bytes;
      float* c = scratch + p * BLOCK;
      bf16* unpacked = (bf16*)(scratch + PANELS * BLOCK) + p * inputs * PANEL;
      const auto multiply = [&](auto two) {
        if (weight.kind == MXFP4 && row == 0) {
          const uint8_t *codes = (const uint8_t*)data, *scales = weight.scales + panels[p] * inputs;
          if (x.count > ROW_BLOCK)
            multiply_mxfp4<two.value>(first, second, inputs, c, codes, scales, unpacked, inputs);
          else
            multiply_few_by_mxfp4<two.value>(first, second, inputs, c, codes, scales, unpacked);
          return;
        }
        const bf16* panel = weight.kind == MXFP4 ? unpacked : (const bf16*)data;
        // Hidden from the compiler: its loop for a constant prefetches too fast (5 to 10% slower).
        int64_t lines = row ? 0 : 32;
        asm("" : "+r"(lines));
        multiply_tiles<two.value>(first, second, inputs, c, data + PREFETCH * PANEL * 2, lines,
                                  [&] {
                                    panel += 32 * PANEL;
                                    return panel - 32 * PANEL;
                                  });
      };
      if (row + 16 < x.count)
        multiply(std::true_type());
      else
        multiply(std::false_type());
    }
    const int64_t end = std::min(x.count, row + ROW_BLOCK);
    for (int64_t r = row; r < end; r++)
      finish_row<PANELS>(r, scratch + tile_place(x, r, row) * PANEL, BLOCK, bias, finish);
  }
}

}  // namespace

#endif
