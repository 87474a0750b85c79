// Types and constants that all units share, and every system header.
//
// Each unit (units/avx2.cpp, ...) includes this file before it chooses an instruction set with
// `#pragma GCC target`: templates of the standard library are then compiled for any processor. The
// linker keeps only one of the units' copies. All code of this library that is compiled for an
// instruction set is in an anonymous namespace, so that units never share it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "threads/team.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

using bf16 = uint16_t;

constexpr int64_t PANEL = 32;        // outputs of a weight that are stored together
constexpr int64_t MXFP4_GROUP = 32;  // inputs that share a scale in MXFP4
constexpr int64_t INT16_GROUP = 64;  // inputs that share a scale as 16-bit integers
constexpr int64_t INT8_BLOCK = 32;   // inputs of a row that are stored together as integers
constexpr int64_t TILE_INPUTS = 64;  // the same of rows on tiles of AMX
constexpr int64_t ROW_BLOCK = 32;    // rows that are multiplied by a panel in one pass

// A weight [outputs, inputs], stored as panels of 32 outputs. Python fills it in: see packed.py.
//
// bf16: [panels, inputs / 2, 32, 2]. The values of two inputs are next to each other, for all
// outputs of the panel.
// Integers (gemm/int16.h): int16 in the same layout, scales uint8 [panels, inputs / 64, 32].
// INT8: codes plus 128 as bytes [panels, inputs / 4, 32, 4]. INT4: codes plus 8 [panels, inputs / 4,
// 16, 4]: a byte holds that of outputs 0 to 15 in its low nibble and that of the output 16 further
// in its high one. Scales float16 [panels, inputs / group, 32] and, as float16 in the same order,
// zeros or null: see int8.h.
// MXFP4: for each panel and group of 32 inputs, 512 bytes of codes in 8 units of 32 16-bit words.
// The nibbles of a word, from the lowest, belong to four vectors of bf16: two pairs of inputs, each
// for outputs 0 to 15 and 16 to 31. Scales: uint8 [panels, groups, 32].
enum : int64_t { DENSE, MXFP4, INT8, INT4 };  // packed.py has the same numbers
//
// Rows that are multiplied with INT8 and INT4 (see int8.h): ROWS_8 have 8 bits, ROTATED_8 have them
// after a rotation that the weights also had, ROWS_16 have 16.
enum : int64_t { ROWS_8, ROTATED_8, ROWS_16 };  // packed.py has the same numbers

// A bf16 weight may have a copy in 12 bits (gemm/compressed.h): for each panel and 4 inputs, 64
// bytes of signs and mantissas for each pair of inputs, then 64 bytes of exponents less the panel's
// base. Values whose exponents do not fit are 0 there and in a list, with their place in the panel.
struct Exception {
  uint32_t place, value;  // place: in the panel as bf16
};

struct CompressedWeight {
  const uint8_t* data;          // or null
  const uint8_t* bases;         // [panels]
  const Exception* exceptions;  // in the order of panels and places
  const uint32_t* ends;         // [panels + 1]; panel p has those from ends[p] to ends[p + 1]
};

struct Weight {
  const void* data;
  const uint8_t* scales;  // or null
  const uint16_t* zeros;  // or null
  const bf16* bias;       // [outputs] or null
  int64_t outputs, inputs;
  int64_t kind, group;  // group: inputs that share a scale of INT8 and INT4
  int64_t rows;         // of INT8 and INT4: the form of the rows
  CompressedWeight compressed;
};

// The gated activation of an MLP. limit and alpha only count for CLAMPED_SWIGLU (gpt-oss).
enum : int64_t { SWIGLU, CLAMPED_SWIGLU, GELU_TANH, RELU };  // native.py has the same numbers
struct Activation {
  int64_t kind;
  float limit, alpha;
};

// Whether the kernels for AVX-512 with BF16 multiply with AMX. Set by dispatch.cpp.
extern HIDDEN bool amx_enabled;
