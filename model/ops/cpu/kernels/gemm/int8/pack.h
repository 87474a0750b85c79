// Weights of 8 and 4 bits: from float32 to codes and scales, and codes in the kernels' layout.
#pragma once

#include "../../scratch.h"
#include "int8.h"

namespace {

// Rounded to the 11 bits of float16; larger and smaller exponents stay.
INLINE vec_f32 round_to_f16(vec_f32 value) {
  const vec_i32 bits = (vec_i32)value;
  return (vec_f32)((bits + 0xfff + (bits >> 13 & 1)) & (int32_t)0xffffe000);
}

INLINE vec_f32 inverse(vec_f32 value) { return value != 0.0f ? 1.0f / value : vec_f32{}; }

INLINE vec_f32 clamp_codes(vec_f32 codes, float low, float high) {
  codes = codes < low ? broadcast(low) : codes;
  return codes > high ? broadcast(high) : codes;
}

INLINE vec_f32 to_codes(vec_f32 value, vec_f32 factor, vec_f32 shift, float low, float high) {
  const vec_i32 rounded = round_small(value * factor + shift);
  return clamp_codes(__builtin_convertvector(rounded, vec_f32), low, high);
}

// The scales of groups for codes from -127 to 127, one group in each lane of values [size, LANES]:
// those with the least squared error of some that map the largest magnitude to about 127.
INLINE vec_f32 find_scales_int8(const vec_f32* values, int64_t size, vec_f32 largest) {
  constexpr int STEPS = 24;  // of a quarter
  vec_f32 best = broadcast(INFINITY), best_scale = {};
  for (int step = 0; step < STEPS; step++) {
    const vec_f32 scale = round_to_f16(largest * (1 / (127.49f - 0.25f * step)));
    const vec_f32 factor = inverse(scale);
    vec_f32 error = {};
    for (int64_t i = 0; i < size; i++) {
      const vec_f32 rest = values[i] - to_codes(values[i], factor, vec_f32{}, -127, 127) * scale;
      error += rest * rest;
    }
    best_scale = error < best ? scale : best_scale;
    best = error < best ? error : best;
  }
  return best_scale;
}

// Scales and offsets of groups for codes from 0 to 15: those with the least squared error of some.
// A candidate divides the range of the values into 15 steps or fewer; its scale and offset are then
// the best for the codes that this gives.
INLINE void find_scales_int4(const vec_f32* values, int64_t size, vec_f32 low, vec_f32 high,
                             vec_f32& scale, vec_f32& offset) {
  constexpr int STEPS = 16;  // of a fifth
  const float count = (float)size;
  scale = (high - low) * (1.0f / 15), offset = low;
  vec_f32 best = broadcast(INFINITY);
  vec_f32 sum = {};
  for (int64_t i = 0; i < size; i++) sum += values[i];
  for (int step = 0; step < STEPS; step++) {
    // With more than 15 steps, values at the ends are clamped.
    const vec_f32 factor = (15 + 0.2f * (step - 4)) * inverse(high - low), shift = -low * factor;
    vec_f32 codes_sum = {}, squares = {}, products = {};
    for (int64_t i = 0; i < size; i++) {
      const vec_f32 codes = to_codes(values[i], factor, shift, 0, 15);
      codes_sum += codes, squares += codes * codes, products += values[i] * codes;
    }
    // Linear regression of the values on their codes.
    const vec_f32 divisor = inverse(count * squares - codes_sum * codes_sum);
    const vec_f32 slope = (count * products - sum * codes_sum) * divisor;
    const vec_f32 start = (squares * sum - codes_sum * products) * divisor;
    vec_f32 error = divisor != 0.0f ? vec_f32{} : broadcast(INFINITY);  // of different codes
    for (int64_t i = 0; i < size; i++) {
      const vec_f32 rest =
          values[i] - (to_codes(values[i], factor, shift, 0, 15) * slope + start);
      error += rest * rest;
    }
    scale = error < best ? slope : scale;
    offset = error < best ? start : offset;
    best = error < best ? error : best;
  }
}

// The scales and, of 4 bits, offsets of groups, one in each lane of values [size, LANES].
INLINE void find_scales(const vec_f32* values, int64_t size, int64_t bits, vec_f32& scale,
                        vec_f32& offset) {
  vec_f32 low = values[0], high = values[0];
  for (int64_t i = 1; i < size; i++) {
    low = values[i] < low ? values[i] : low;
    high = values[i] > high ? values[i] : high;
  }
  const vec_f32 largest = -low > high ? -low : high;
  if (bits == 8) {
    scale = find_scales_int8(values, size, largest);
    return;
  }
  // With nearly equal values, offsets would be large multiples of scales.
  const vec_i32 narrow = (high - low) * 64 < largest;
  low = narrow & (low > 0) ? vec_f32{} : low;
  high = narrow & (high < 0) ? vec_f32{} : high;
  find_scales_int4(values, size, low, high, scale, offset);
  scale = round_to_f16(scale);
  const vec_f32 zero = round_to_f16((offset * inverse(scale) + 8.0f) * -0.125f);
  offset = (zero * -8.0f - 8.0f) * scale;
}

// from [rows, inputs] → codes [rows, inputs], scales and, of 4 bits, offsets [rows, groups]: a value
// is code · scale + offset. A group has `size` inputs. Scales are not finite where a value is not.
// Scales and stored zeros (see int8.h) are exact as float16.
void quantize_weight(const float* from, int64_t bits, int64_t size, int64_t rows, int64_t inputs,
                     int8_t* codes, float* scales, float* offsets, int threads) {
  const int64_t groups = rows * inputs / size;
  const float lowest = bits == 8 ? -127 : 0, highest = bits == 8 ? 127 : 15;
  divide(threads, (groups + LANES - 1) / LANES, 256, [=](int64_t begin, int64_t end) {
    for (int64_t first = begin * LANES; first < std::min(groups, end * LANES); first += LANES) {
      const int64_t count = std::min<int64_t>(LANES, groups - first);
      vec_f32 *values = (vec_f32*)thread_scratch<float>(size * LANES), poison = {}, scale, offset = {};
      memset(values, 0, (size_t)size * sizeof *values);
      for (int64_t lane = 0; lane < count; lane++)
        for (int64_t i = 0; i < size; i++) values[i][lane] = from[(first + lane) * size + i];
      for (int64_t i = 0; i < size; i++) poison += values[i] - values[i];  // NaN if not finite
      find_scales(values, size, bits, scale, offset);
      const vec_f32 factor = inverse(scale), shift = -offset * factor;
      for (int64_t i = 0; i < size; i++) {
        const vec_i32 code = __builtin_convertvector(
            to_codes(values[i], factor, shift, lowest, highest), vec_i32);
        for (int64_t lane = 0; lane < count; lane++)
          codes[(first + lane) * size + i] = (int8_t)code[lane];
      }
      for (int64_t lane = 0; lane < count; lane++) {
        scales[first + lane] = scale[lane] + poison[lane];
        if (bits == 4) offsets[first + lane] = offset[lane];
      }
    }
  });
}

// Rows [first, first + count) of a weight of this kind, from codes [count, inputs], of 4 bits from 0
// to 15, and scales and zeros or null [count, groups], all contiguous and as they are stored.
void pack_int8(uint8_t* to, uint16_t* to_scales, uint16_t* to_zeros, int64_t kind, int64_t inputs,
               int64_t groups, int64_t first, int64_t count, const int8_t* codes,
               const uint16_t* scales, const uint16_t* zeros, int threads) {
  const int64_t begin = first / PANEL, end = (first + count + PANEL - 1) / PANEL;
  const int64_t panel_bytes = PANEL * inputs / (kind == INT8 ? 1 : 2);
  divide(threads, end - begin, 1, [=](int64_t first_panel, int64_t last_panel) {
    for (int64_t panel = begin + first_panel; panel < begin + last_panel; panel++) {
      const int64_t low = std::max(first, panel * PANEL);
      const int64_t high = std::min(first + count, (panel + 1) * PANEL);
      for (int64_t n = low; n < high; n++) {
        const int64_t output = n - panel * PANEL;
        const int8_t* row = codes + (n - first) * inputs;
        uint8_t* out = to + panel * panel_bytes;
        for (int64_t k = 0; k < inputs; k++) {
          if (kind == INT8) {
            out[k / 4 * 4 * PANEL + output * 4 + k % 4] = (uint8_t)(row[k] + 128);
            continue;
          }
          uint8_t& byte = out[k / 4 * 2 * PANEL + output % 16 * 4 + k % 4];
          byte = (uint8_t)(output < 16 ? (byte & 0xf0) | row[k] : (byte & 0x0f) | row[k] << 4);
        }
        for (int64_t group = 0; group < groups; group++) {
          const int64_t at = (panel * groups + group) * PANEL + output;
          to_scales[at] = scales[(n - first) * groups + group];
          if (zeros) to_zeros[at] = zeros[(n - first) * groups + group];
        }
      }
    }
  });
}

}  // namespace
