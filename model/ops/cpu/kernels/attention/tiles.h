// The products of attention with AMX, in steps.
#pragma once

#include "scores.h"

#if BF16_DOT

namespace {

// Up to 32 rows of scores, and then of outputs, at a time. A softmax takes a step now and then: tiles
// work while it computes, and idle tiles become slow. Memory of rows is read and written to the end
// of the last tile. Sums do not depend on when steps are taken.
class TileSteps {
 public:
  explicit TileSteps(int64_t dim) : head_dim(dim) {}

  // query [rows, head_dim] times `groups` groups of 16 transposed keys → scores [rows, SPAN]
  void start_scores(const bf16* query, const bf16* keys, int64_t rows, int64_t groups,
                    float* scores) {
    to_score = {query, keys, rows, groups, scores};
  }

  // output [rows, head_dim] += weights [rows, SPAN] times `count` interleaved values
  void start_values(const bf16* weights, const bf16* values, int64_t rows, int64_t count,
                    float* output) {
    to_add = {weights, values, rows, count, output};
    next_dim = 0;
  }

  // The next step, if there is one. Not inlined: it would be in every softmax.
  __attribute__((noinline)) bool step() {
    asm volatile("" : : : "memory");  // the intrinsics do not say which memory they read
    if (next_dim < head_dim)
      add_values();
    else if (to_score.groups)
      compute_scores();
    else
      return false;
    return true;
  }

  void finish() {
    while (step()) continue;
  }

  void step_or_store() {
    alignas(64) char discarded[16 * 64];
    if (!step()) _tile_stored(6, discarded, 64);
  }

 private:
  struct Scores {
    const bf16 *query, *keys;
    int64_t rows, groups;
    float* scores;
  };
  struct Values {
    const bf16 *weights, *values;
    int64_t rows, count;
    float* output;
  };
  const int64_t head_dim;
  Scores to_score{};
  Values to_add{};
  int64_t next_dim = INT64_MAX;  // of the output

  // Two groups of keys, or the last one.
  void compute_scores() {
    Scores& s = to_score;
    const bool two_row_tiles = s.rows > 16, two_groups = s.groups > 1;
    const int64_t group = KEYS * head_dim, stride = head_dim * 2;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < head_dim; k += 32) {
      _tile_loadd(6, s.keys + k * 16, 64);
      _tile_loadd(4, s.query + k, stride);
      _tile_dpbf16ps(0, 4, 6);
      if (two_row_tiles) {
        _tile_loadd(5, s.query + 16 * head_dim + k, stride);
        _tile_dpbf16ps(2, 5, 6);
      }
      if (!two_groups) continue;
      _tile_loadd(7, s.keys + group + k * 16, 64);
      _tile_dpbf16ps(1, 4, 7);
      if (two_row_tiles) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, s.scores, SPAN * 4);
    if (two_row_tiles) _tile_stored(2, s.scores + 16 * SPAN, SPAN * 4);
    if (two_groups) {
      _tile_stored(1, s.scores + KEYS, SPAN * 4);
      if (two_row_tiles) _tile_stored(3, s.scores + KEYS + 16 * SPAN, SPAN * 4);
    }
    const int64_t done = two_groups ? 2 : 1;
    s.groups -= done, s.keys += done * group, s.scores += done * KEYS;
  }

  // Sixteen dimensions.
  void add_values() {
    const Values& v = to_add;
    const bool two_row_tiles = v.rows > 16, two_spans = v.count > 32;
    const int64_t stride = SPAN * 2, output_stride = head_dim * 4;
    float* output = v.output + next_dim;
    const bf16* values = v.values + next_dim * 2;
    if (next_dim == 0) {
      _tile_loadd(4, v.weights, stride);
      if (two_row_tiles) _tile_loadd(5, v.weights + 16 * SPAN, stride);
      if (two_spans) _tile_loadd(1, v.weights + 32, stride);
      if (two_spans && two_row_tiles) _tile_loadd(3, v.weights + 16 * SPAN + 32, stride);
    }
    _tile_loadd(0, output, output_stride);
    _tile_loadd(6, values, output_stride);
    _tile_dpbf16ps(0, 4, 6);
    if (two_row_tiles) {
      _tile_loadd(2, output + 16 * head_dim, output_stride);
      _tile_dpbf16ps(2, 5, 6);
    }
    if (two_spans) {
      _tile_loadd(7, values + 32 * head_dim, output_stride);
      _tile_dpbf16ps(0, 1, 7);
      if (two_row_tiles) _tile_dpbf16ps(2, 3, 7);
    }
    _tile_stored(0, output, output_stride);
    if (two_row_tiles) _tile_stored(2, output + 16 * head_dim, output_stride);
    next_dim += 16;
  }
};

}  // namespace

#endif
