// The rotation of rows and weights before they are rounded to 8 bits, which spreads large values.
//
// A power of two of values is multiplied with the Hadamard matrix, whose rows are orthonormal. Of
// other groups, each block of the largest power of two that divides their size is, and then the
// values at the same place of different blocks: those of the first and those of the last blocks,
// the largest power of two of each.
#pragma once

#include "../../vectors.h"

namespace {

// The largest size of groups that share a scale, of those that are not a row.
constexpr int64_t MAX_ROW_GROUP = 128;
constexpr int64_t common_group(int64_t weight_group) {
  int64_t group = MAX_ROW_GROUP;
  while (weight_group % group) group /= 2;
  return group;
}

// The neighbouring inputs that are rotated together and share a row's scale, of those that share a
// weight's. The fewer there are, the more exact rows are, and the more sums have to be scaled. AVX2
// alone, whose rows have fewer steps (see int8.h), needs small groups.
constexpr bool LONG_ROTATIONS = VECTOR_BITS == 512 || AVX_VNNI;
constexpr int64_t rotated_group(int64_t weight_group) {
  if (!LONG_ROTATIONS || weight_group % 64)
    return std::min<int64_t>(64, common_group(weight_group));
  int64_t parts = (weight_group + 511) / 512;
  while (weight_group / 64 % parts) parts++;
  return weight_group / parts;
}

// `values`, each of whose lanes is exchanged with the one that is STEP further or before.
template <int STEP>
INLINE vec_f32 exchanged(vec_f32 values) {
  vec_i32 partner;
#pragma GCC unroll 16
  for (int lane = 0; lane < LANES; lane++) partner[lane] = lane ^ STEP;
  return __builtin_shuffle(values, partner);
}

// Multiplies the values of some vectors with the Hadamard matrix of their number, a power of two, in
// place. Its entries are 1 and -1; the rows are orthonormal after a division by the number's root.
template <int COUNT, int STEP = 1>
INLINE void hadamard(vec_f32 (&values)[COUNT]) {
  if constexpr (STEP < LANES) {
    vec_f32 sign;
#pragma GCC unroll 16
    for (int lane = 0; lane < LANES; lane++) sign[lane] = lane & STEP ? -1.0f : 1.0f;
#pragma GCC unroll 32
    for (int i = 0; i < COUNT; i++) values[i] = exchanged<STEP>(values[i]) + values[i] * sign;
    hadamard<COUNT, 2 * STEP>(values);
  } else {
#pragma GCC unroll 32
    for (int pair = 0; pair < COUNT / 2; pair++) {
      constexpr int DISTANCE = STEP / LANES;
      if constexpr (DISTANCE < COUNT) {
        const int i = pair / DISTANCE * 2 * DISTANCE + pair % DISTANCE;
        const vec_f32 a = values[i], b = values[i + DISTANCE];
        values[i] = a + b, values[i + DISTANCE] = a - b;
      }
    }
    if constexpr (STEP / LANES < COUNT) hadamard<COUNT, 2 * STEP>(values);
  }
}

// The same for `values` with COUNT vectors that are `step` values apart, for all of `size` values.
template <int COUNT>
INLINE void hadamard_across(float* values, int64_t size, int64_t step) {
  const float norm = 1 / std::sqrt((float)COUNT);
  for (int64_t first = 0; first < size; first += COUNT * step)
    for (int64_t i = first; i < first + step; i += LANES) {
      vec_f32 part[COUNT];
#pragma GCC unroll 16
      for (int j = 0; j < COUNT; j++) part[j] = load(values + i + j * step) * norm;
#pragma GCC unroll 4
      for (int distance = 1; distance < COUNT; distance *= 2)
#pragma GCC unroll 8
        for (int pair = 0; pair < COUNT / 2; pair++) {
          const int j = pair / distance * 2 * distance + pair % distance;
          const vec_f32 a = part[j], b = part[j + distance];
          part[j] = a + b, part[j + distance] = a - b;
        }
#pragma GCC unroll 16
      for (int j = 0; j < COUNT; j++) store(values + i + j * step, part[j]);
    }
}

// The same for `count` vectors, a power of two.
INLINE void hadamard_across(float* values, int64_t size, int64_t step, int64_t count) {
  for (; count >= 8; count /= 8, step *= 8) hadamard_across<8>(values, size, step);
  if (count == 4) hadamard_across<4>(values, size, step);
  if (count == 2) hadamard_across<2>(values, size, step);
}

template <int COUNT>
INLINE void hadamard_within(float* values, int64_t size) {
  const float norm = 1 / std::sqrt((float)(COUNT * LANES));
  for (int64_t first = 0; first < size; first += COUNT * LANES) {
    vec_f32 part[COUNT];
#pragma GCC unroll 32
    for (int i = 0; i < COUNT; i++) part[i] = load(values + first + i * LANES) * norm;
    hadamard(part);
#pragma GCC unroll 32
    for (int i = 0; i < COUNT; i++) store(values + first + i * LANES, part[i]);
  }
}

// Rotates a group of `size` values, a multiple of 32.
__attribute__((noinline)) static void rotate_group(float* values, int64_t size) {
  const int64_t block = size & -size, within = std::min(MAX_ROW_GROUP, block);
  if (within == 128)
    hadamard_within<128 / LANES>(values, size);
  else if (within == 64)
    hadamard_within<64 / LANES>(values, size);
  else
    hadamard_within<32 / LANES>(values, size);
  hadamard_across(values, size, within, block / within);
  const int64_t blocks = size / block;
  int64_t count = 1;
  while (2 * count <= blocks) count *= 2;
  if (count == 1) return;
  hadamard_across(values, count * block, block, count);
  hadamard_across(values + (blocks - count) * block, count * block, block, count);
}

// Rotates each group of `size` values that share a weight's scale, in place.
void rotate(float* values, int64_t size, int64_t groups, int threads) {
  const int64_t part = rotated_group(size);
  divide(threads, groups, std::max<int64_t>(1, (1 << 14) / size), [=](int64_t first, int64_t last) {
    for (int64_t i = first * size; i < last * size; i += part) rotate_group(values + i, part);
  });
}

}  // namespace
