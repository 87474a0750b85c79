// Matrix multiplication of rows of integers with weights of 8 or 4 bits (see int8.h) with AMX.
//
// Results equal those of gemm.h: sums of a group are exact, and scaled in the same order.
#pragma once

#include "../amx.h"
#include "int8.h"

#if BF16_DOT

namespace {

constexpr int64_t BLOCK_SUMS = ROW_BLOCK * PANEL;

// The codes of a panel's next `inputs`, plus their bias, from 4 bits to 8.
INLINE void unpack_codes(const uint8_t* codes, int64_t inputs, uint8_t* to) {
#pragma GCC unroll 4
  for (int64_t i = 0; i < inputs; i += 4, codes += 2 * PANEL, to += 4 * PANEL) {
    const vec_i32 nibbles = load_i32(codes);
    store_i32(to, nibbles & 0x0f0f0f0f);
    store_i32(to + 64, nibbles >> 4 & 0x0f0f0f0f);
  }
}

// The scales of a group of a panel's inputs and of rows.
struct GroupScales {
  const uint16_t *scales, *zeros;  // zeros: or null
  const float *rows, *starts;      // starts: the corrections of whole rows
  const int32_t* corrections;
};

// c [count, 32] = or += the products of a group, from sums [terms, 32, 32]. IS_FIRST, IS_LAST: of a
// panel's groups.
template <int TERMS, Scaling SCALING, bool IS_FIRST, bool IS_LAST>
INLINE void add_tile_sums(const int32_t* sums, const GroupScales& by, int64_t count, float* c) {
  vec_f32 scale[VECTORS], zero[VECTORS];
  for (int v = 0; v < VECTORS; v++) {
    scale[v] = load_f16(by.scales + v * LANES);
    zero[v] = SCALING == GROUPS_WITH_ZEROS ? load_f16(by.zeros + v * LANES) : vec_f32{};
  }
#pragma GCC unroll 4
  for (int64_t r = 0; r < count; r++)
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; v++) {
      const int64_t at = r * PANEL + v * LANES;
      vec_i32 total = load_i32(sums + at);
      if (TERMS == 2) total = (total << 8) + load_i32(sums + BLOCK_SUMS + at);
      if (SCALING != OUTPUTS) total += by.corrections[r];
      vec_f32 acc = {};
      if (!IS_FIRST) acc = load(c + at);
      if (IS_FIRST && SCALING == OUTPUTS) acc = broadcast(by.starts[r]);
      acc = add_group<SCALING>(acc, total, scale[v], zero[v], by.rows[r], by.corrections[r]);
      if (IS_LAST && SCALING == OUTPUTS) acc *= scale[v];
      store(c + at, acc);
    }
}

// A panel of integers, and where its codes of 4 bits are unpacked: `kept` inputs, then again from
// the start.
struct CodesPanel {
  const uint8_t* codes;
  const uint16_t *scales, *zeros;
  uint8_t* unpacked;
  int64_t kept;
  bool is_unpacked;
  int64_t lines;  // of the cache to prefetch with each block of inputs
};

// c [32, 32], or [16, 32] without TWO: the rows of two tiles from `first` and `second` on, or of the
// first, times a panel. While the tiles of a group are multiplied, the sums of the group before it
// are scaled. sums: scratch of 2 · TERMS · 32 · 32.
template <bool TWO, int TERMS, int BITS, Scaling SCALING>
INLINE void multiply_integer_tiles(const Weight& weight, const CodesPanel& panel, const Rows& x,
                                   int64_t first, int64_t second, float* c, int32_t* sums) {
  constexpr int64_t PREFETCH = 4096;  // bytes
  const int64_t group = row_group(weight), block = TILE_INPUTS, row_bytes = TERMS * block;
  const int64_t groups = weight.inputs / group, step = x.stride * row_bytes;
  const int64_t block_bytes = block * PANEL * BITS / 8, count = std::min<int64_t>(16, x.count);
  const int8_t* rows = (const int8_t*)x.data;
  const uint8_t* codes = panel.codes;
  int64_t unpacked = 0;
  const auto add = [&](int64_t g) {
    const int64_t scale = g * group / weight.group * PANEL;
    const auto add_tile = [&](auto is_first, auto is_last, int64_t tile, int64_t row) {
      const int64_t at = g * x.stride + row, starts = groups * x.stride + row;
      const GroupScales by{panel.scales + scale,
                           SCALING == GROUPS_WITH_ZEROS ? panel.zeros + scale : nullptr,
                           x.scales + at, x.scales + starts, x.corrections + at};
      add_tile_sums<TERMS, SCALING, is_first.value, is_last.value>(
          sums + (g & 1) * TERMS * BLOCK_SUMS + tile * BLOCK_SUMS / 2, by, count,
          c + tile * BLOCK_SUMS / 2);
    };
    const auto add_tiles = [&](auto is_first, auto is_last) {
      add_tile(is_first, is_last, 0, first);
      if (TWO) add_tile(is_first, is_last, 1, second);
    };
    const auto add_first = [&](auto is_first) {
      if (SCALING == OUTPUTS && g == groups - 1)
        add_tiles(is_first, std::true_type());
      else
        add_tiles(is_first, std::false_type());
    };
    if (g)
      add_first(std::false_type());
    else
      add_first(std::true_type());
  };
  for (int64_t g = 0; g < groups; g++) {
    const uint8_t* group_codes = codes;
    const int64_t group_unpacked = unpacked;
    for (int term = 0; term < TERMS; term++) {
      codes = group_codes;
      unpacked = group_unpacked;
      const int8_t* block_rows = rows + term * block;
      _tile_zero(0);
      _tile_zero(1);
      if (TWO) _tile_zero(2);
      if (TWO) _tile_zero(3);
      for (int64_t k = 0; k < group; k += block, codes += block_bytes, block_rows += step) {
        const uint8_t* weights = codes;
        if (BITS == 4) {
          uint8_t* to = panel.unpacked + unpacked * PANEL;
          if (term == 0 && !panel.is_unpacked) unpack_codes(codes, block, to);
          weights = to;
          unpacked = unpacked + block == panel.kept ? 0 : unpacked + block;
        }
        for (int64_t line = 0; term == 0 && line < panel.lines; line++)
          __builtin_prefetch(codes + PREFETCH + line * 64, 0, 2);
        asm volatile("" : : : "memory");
        _tile_loadd(6, weights, 128);
        _tile_loadd(4, block_rows + first * row_bytes, row_bytes);
        _tile_dpbsud(0, 4, 6);
        _tile_loadd(7, weights + 64, 128);
        _tile_dpbsud(1, 4, 7);
        if (TWO) {
          _tile_loadd(5, block_rows + second * row_bytes, row_bytes);
          _tile_dpbsud(2, 5, 6);
          _tile_dpbsud(3, 5, 7);
        }
      }
      int32_t* to = sums + ((g & 1) * TERMS + term) * BLOCK_SUMS;
      _tile_stored(0, to, 128);
      _tile_stored(1, to + 16, 128);
      if (TWO) _tile_stored(2, to + BLOCK_SUMS / 2, 128);
      if (TWO) _tile_stored(3, to + BLOCK_SUMS / 2 + 16, 128);
    }
    rows += group / block * step;
    if (g) add(g - 1);
  }
  add(groups - 1);
}

template <int TERMS, int BITS, Scaling SCALING>
__attribute__((noinline)) static void multiply_integer_block(const Weight& weight,
                                                             const CodesPanel& panel, const Rows& x,
                                                             int64_t row, float* c, int32_t* sums) {
  // The last 16 rows, even if some of them are before `row`.
  const int64_t last = std::max<int64_t>(0, x.count - 16), first = std::min(row, last);
  if (row + 16 < x.count)
    multiply_integer_tiles<true, TERMS, BITS, SCALING>(weight, panel, x, first,
                                                       std::min(row + 16, last), c, sums);
  else
    multiply_integer_tiles<false, TERMS, BITS, SCALING>(weight, panel, x, first, 0, c, sums);
}

// sums [32, 32], or [16, 32] without TWO: the rows of two tiles from `first` and `second` on, or of
// the first, that have one scale each, times a panel of 8-bit codes. With each block of inputs,
// `lines` cache lines are prefetched.
template <bool TWO>
INLINE void multiply_whole_rows(const Weight& weight, const uint8_t* codes, int64_t lines,
                                const Rows& x, int64_t first, int64_t second, int32_t* sums) {
  constexpr int64_t PREFETCH = 4096;  // bytes
  const int64_t block = TILE_INPUTS, step = x.stride * block;
  const int8_t *a = (const int8_t*)x.data + first * block, *end = a + weight.inputs * x.stride;
  const int64_t distance = (second - first) * block;
  _tile_zero(0);
  _tile_zero(1);
  if (TWO) _tile_zero(2);
  if (TWO) _tile_zero(3);
  for (; a < end; a += step, codes += block * PANEL) {
    for (int64_t line = 0; line < lines; line++)
      __builtin_prefetch(codes + PREFETCH + line * 64, 0, 2);
    asm volatile("" : : : "memory");
    _tile_loadd(6, codes, 128);
    _tile_loadd(4, a, block);
    _tile_dpbsud(0, 4, 6);
    _tile_loadd(7, codes + 64, 128);
    _tile_dpbsud(1, 4, 7);
    if (TWO) {
      _tile_loadd(5, a + distance, block);
      _tile_dpbsud(2, 5, 6);
      _tile_dpbsud(3, 5, 7);
    }
  }
  _tile_stored(0, sums, 128);
  _tile_stored(1, sums + 16, 128);
  if (TWO) _tile_stored(2, sums + BLOCK_SUMS / 2, 128);
  if (TWO) _tile_stored(3, sums + BLOCK_SUMS / 2 + 16, 128);
}

// See rows_times_panels in panels.h: for rows that have one scale each, 32 at a time. The first of
// them prefetch the panel.
template <int PANELS, typename Finish>
INLINE void whole_rows_times_panels(const Weight& weight, const int64_t (&panels)[PANELS],
                                    const Rows& x, const vec_f32 (&bias)[PANELS][VECTORS],
                                    int32_t* sums, Finish& finish) {
  const int64_t last = std::max<int64_t>(0, x.count - 16);
  vec_f32 scale[PANELS][VECTORS];
  for (int p = 0; p < PANELS; p++)
    for (int v = 0; v < VECTORS; v++)
      scale[p][v] = load_f16((const uint16_t*)weight.scales + panels[p] * PANEL + v * LANES);
  for (int64_t row = 0; row < x.count; row += ROW_BLOCK) {
    const int64_t first = std::min(row, last), second = std::min(row + 16, last);
    for (int p = 0; p < PANELS; p++) {
      const auto* codes = (const uint8_t*)weight.data + panels[p] * weight.inputs * PANEL;
      int32_t* to = sums + p * BLOCK_SUMS;
      const int64_t lines = row ? 0 : TILE_INPUTS * PANEL / 64;
      if (row + 16 < x.count)
        multiply_whole_rows<true>(weight, codes, lines, x, first, second, to);
      else
        multiply_whole_rows<false>(weight, codes, lines, x, first, second, to);
    }
    const int64_t end = std::min(x.count, row + ROW_BLOCK);
    for (int64_t r = row; r < end; r++) {
      const float row_scale = x.scales[r], start = x.scales[x.stride + r];
      const int32_t* from = sums + tile_place(x, r, row) * PANEL;
      vec_f32 products[PANELS][VECTORS];
      for (int p = 0; p < PANELS; p++)
        for (int v = 0; v < VECTORS; v++) {
          const vec_i32 sum = load_i32(from + p * BLOCK_SUMS + v * LANES);
          const vec_f32 scaled = start + __builtin_convertvector(sum, vec_f32) * row_scale;
          products[p][v] = scaled * scale[p][v] + bias[p][v];
        }
      finish(r, products);
    }
  }
}

// The float32 values that integer_tiles_times_panels needs as scratch.
INLINE int64_t integer_tiles_scratch(const Weight& weight, int64_t panels) {
  const int64_t unpacked = weight.kind == INT4 ? weight.inputs : 0;
  return panels * (BLOCK_SUMS + unpacked * PANEL / 4) + 2 * row_terms(weight) * BLOCK_SUMS;
}

// See rows_times_panels in panels.h; 32 rows at a time. The first of them prefetch the panel and
// unpack its codes for all.
template <int PANELS, typename Finish>
INLINE void integer_tiles_times_panels(const Weight& weight, const int64_t (&panels)[PANELS],
                                       const Rows& x, const vec_f32 (&bias)[PANELS][VECTORS],
                                       float* scratch, int64_t& configuration, Finish& finish) {
  const int64_t inputs = weight.inputs, rows = std::min<int64_t>(16, x.count);
  configure_tiles(rows, TILE_INPUTS, configuration);
  if (row_group(weight) == inputs && weight.kind == INT8 && weight.rows == ROTATED_8)
    return whole_rows_times_panels<PANELS>(weight, panels, x, bias, (int32_t*)scratch, finish);
  int32_t* sums = (int32_t*)(scratch + PANELS * BLOCK_SUMS);
  uint8_t* unpacked = (uint8_t*)(sums + 2 * row_terms(weight) * BLOCK_SUMS);
  const int64_t panel_bytes = inputs * PANEL * (weight.kind == INT4 ? 1 : 2) / 2;
  const int64_t panel_scales = inputs / weight.group * PANEL;
  for (int64_t row = 0; row < x.count; row += ROW_BLOCK) {
    for (int p = 0; p < PANELS; p++) {
      const int64_t kept = x.count > ROW_BLOCK ? inputs : std::min(inputs, 2 * row_group(weight));
      const CodesPanel panel{
          (const uint8_t*)weight.data + panels[p] * panel_bytes,
          (const uint16_t*)weight.scales + panels[p] * panel_scales,
          weight.zeros ? weight.zeros + panels[p] * panel_scales : nullptr,
          unpacked + p * inputs * PANEL,
          kept,
          row > 0,
          row ? 0 : panel_bytes / 64 * TILE_INPUTS / inputs};
      with_form(weight, [&](auto terms, auto bits, auto scaling) {
        multiply_integer_block<terms.value, bits.value, scaling.value>(
            weight, panel, x, row, scratch + p * BLOCK_SUMS, sums);
      });
    }
    const int64_t end = std::min(x.count, row + ROW_BLOCK);
    for (int64_t r = row; r < end; r++)
      finish_row<PANELS>(r, scratch + tile_place(x, r, row) * PANEL, BLOCK_SUMS, bias, finish);
  }
}

}  // namespace

#endif
