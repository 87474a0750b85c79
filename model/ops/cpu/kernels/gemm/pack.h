// Weights of a checkpoint → the layout of the kernels (see Weight in types.h).
#pragma once

#include "../vectors.h"
#if INT16_GEMM
#include "int16.h"
#endif

namespace {

// Rows [first, first + count) of a weight, from bf16 of any strides; exponents only for integers.
void pack(bf16* to, [[maybe_unused]] uint8_t* exponents, int64_t inputs, int64_t first,
          int64_t count, const bf16* from, int64_t row_stride, int64_t column_stride,
          int threads) {
#if INT16_GEMM
  pack_int16((int16_t*)to, exponents, inputs, first, count, from, row_stride, column_stride,
             threads);
#else
  const int64_t begin = first / PANEL, end = (first + count + PANEL - 1) / PANEL;
  divide(threads, end - begin, 1, [=](int64_t first_panel, int64_t last_panel) {
    for (int64_t panel = begin + first_panel; panel < begin + last_panel; panel++) {
      const int64_t low = std::max(first, panel * PANEL);
      const int64_t high = std::min(first + count, (panel + 1) * PANEL);
      bf16* panel_data = to + panel * PANEL * inputs;
      // In spans of inputs that fit the first-level cache, for either order of the source.
      for (int64_t span = 0; span < inputs; span += 128) {
        const int64_t span_end = std::min(inputs, span + 128);
        if (column_stride == 1) {
          for (int64_t n = low; n < high; n++) {
            const bf16* row = from + (n - first) * row_stride;
            bf16* out = panel_data + (n - panel * PANEL) * 2;
            for (int64_t k = span; k < span_end; k += 2) memcpy(out + k * PANEL, row + k, 4);
          }
        } else {
          for (int64_t k = span; k < span_end; k++) {
            const bf16* column = from + k * column_stride;
            bf16* out = panel_data + (k & ~1) * PANEL + (k & 1);
            for (int64_t n = low; n < high; n++)
              out[(n - panel * PANEL) * 2] = column[(n - first) * row_stride];
          }
        }
      }
    }
  });
#endif
}

// Rows [first, first + count) of a weight, from MXFP4 codes [count, inputs / 2] and scales [count,
// inputs / 32], in both of which the rows are `row_step` rows apart.
void pack_mxfp4(uint8_t* to, uint8_t* to_scales, int64_t inputs, int64_t first, int64_t count,
                const uint8_t* codes, const uint8_t* scales, int64_t row_step, int threads) {
  const int64_t begin = first / PANEL, end = (first + count + PANEL - 1) / PANEL;
  divide(threads, end - begin, 1, [=](int64_t first_panel, int64_t last_panel) {
    for (int64_t panel = begin + first_panel; panel < begin + last_panel; panel++) {
      const int64_t low = std::max(first, panel * PANEL);
      const int64_t high = std::min(first + count, (panel + 1) * PANEL);
      // Outputs o and o + 16 share a 32-bit word: four nibbles each, of a unit's four inputs.
      // `keep` masks the nibbles of outputs that are not packed now.
      uint32_t keep[16];
      const uint8_t* rows[PANEL];
      for (int64_t o = 0; o < PANEL; o++) {
        const int64_t n = panel * PANEL + o;
        rows[o] = n < low || n >= high ? nullptr : codes + (n - first) * row_step * inputs / 2;
      }
      for (int o = 0; o < 16; o++)
        keep[o] = (rows[o] ? 0 : 0x0f0f0f0f) | (rows[o + 16] ? 0 : 0xf0f0f0f0);
      for (int64_t group = 0; group < inputs / MXFP4_GROUP; group++) {
        uint16_t bytes[8][PANEL] = {};  // a unit's two bytes of each output
        for (int64_t o = 0; o < PANEL; o++) {
          if (!rows[o]) continue;
          uint16_t row_bytes[8];
          memcpy(row_bytes, rows[o] + group * 16, 16);
          for (int unit = 0; unit < 8; unit++) bytes[unit][o] = row_bytes[unit];
          const int64_t n = panel * PANEL + o - first;
          // Smaller scales would take values out of bf16's exponents. Below 2^-60 they scale to
          // zero.
          to_scales[panel * inputs + group * MXFP4_GROUP + o] =
              std::max<uint8_t>(scales[n * row_step * inputs / MXFP4_GROUP + group], 64);
        }
        uint32_t* words = (uint32_t*)(to + panel * PANEL * inputs / 2 + group * 512);
        for (int unit = 0; unit < 8; unit++, words += 16)
          for (int o = 0; o < 16; o++) {
            const uint32_t a = bytes[unit][o], b = bytes[unit][o + 16];
            const uint32_t low_half = (a & 0x0f0f) | (a >> 4 & 0x0f0f) << 16;
            const uint32_t high_half = (b & 0x0f0f) | (b >> 4 & 0x0f0f) << 16;
            words[o] = (words[o] & keep[o]) | low_half | high_half << 4;
          }
      }
    }
  });
}

}  // namespace
