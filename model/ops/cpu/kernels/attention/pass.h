// The computation of one item of attention.
#pragma once

#include "../scratch.h"
#include "item.h"
#include "tiles.h"
#include "values.h"

namespace {

// Sums of chunks, to be merged: totals [rows] and outputs [rows, head_dim].
struct Sums {
  RowTotal* totals;
  float* outputs;
};

// Before any chunk, only a sink has a part in the softmax.
INLINE RowTotal first_total(const AttentionInput& input, int64_t head) {
  if (!input.sinks) return {-INFINITY, 0};
  return {to_float(input.sinks[head]) * LOG2_E, 1};
}

// Divides a row's output [head_dim] by the sum of its weights.
// Outputs are in another order than dimensions: without BF16_DOT the even ones of each two vectors
// are before the odd ones, with it in that of `restore_order`, unless `has_order`.
INLINE void finish_row(const RowTotal& total, const float* output, int64_t head_dim,
                       [[maybe_unused]] bool has_order, bf16* out) {
  const float factor = total.sum > 0 ? 1 / total.sum : 0;
#if BF16_DOT
  for (int64_t d = 0; d < head_dim; d += 32) {
    vec_f32 value[VECTORS];
    for (int v = 0; v < VECTORS; v++) value[v] = load(output + d + v * LANES) * factor;
    if (!has_order) restore_order(value[0], value[1]);
    for (int v = 0; v < VECTORS; v++) store_bf16(out + d + v * LANES, value[v]);
  }
#else
  for (int64_t d = 0; d < head_dim; d += 2 * LANES) {
    const vec_u32 even = (vec_u32)round_to_bf16(load(output + d) * factor);
    const vec_i32 odd = round_to_bf16(load(output + d + LANES) * factor);
    store_i32(out + d, (vec_i32)(even >> 16) | (odd & (int32_t)0xffff0000));
  }
#endif
}

class ItemPass {
 public:
  ItemPass(const AttentionInput& attention, const Item& an_item, int64_t& tile_configuration)
      : input(attention), item(an_item), configuration(tile_configuration),
        head_dim(attention.head_dim), row_count(an_item.kv_heads * an_item.rows),
        scale{(attention.cap ? 1 : attention.scale) * LOG2_E, attention.scale, attention.cap} {
    take_memory();
    for_rows(input, item, [&](int64_t i, int64_t token, int64_t head) {
      load_queries(input.query + (token * input.heads + head) * head_dim, head_dim,
                   queries + i * head_dim);
    });
    int64_t row = 0;
    for (int64_t m = 0; m < item.count; m++) {
      const Member& member = item.members[m];
      for (int64_t token = member.first; token < member.last; token++)
        for (int64_t g = 0; g < input.group(); g++, row++) {
          visible_end[row] = member.end - member.last + token + 1;
          first_visible[row] = input.window ? visible_end[row] - input.window : 0;
        }
    }
  }

  // partials: where the sums of an item with a single chunk go.
  void run(const Sums& partials) {
    const bool is_partial = item.partial >= 0;
    const auto start_chunk = [&] {
      memset(output, 0, (size_t)((row_count + 16) * head_dim) * 4);
      for (int64_t i = 0; i < row_count; i++) softmax[i] = RunningSoftmax{-INFINITY, vec_f32{}};
    };
    start_chunk();
    if (!is_partial) {
      memset(total_output, 0, (size_t)(row_count * head_dim) * 4);
      for_rows(input, item,
               [&](int64_t i, int64_t, int64_t head) { totals[i] = first_total(input, head); });
    }
    const auto end_chunk = [&] {
      for (int64_t i = 0; i < row_count; i++)
        merge_rows(total_of(softmax[i]), output + i * head_dim, head_dim, totals[i],
                   total_output + i * head_dim);
    };
    int64_t offsets[2][SPAN];  // of this unit's positions and of the next unit's
    int64_t current = 0;
    Unit unit = find_unit(item, item.from, 0);
    int64_t count = find_offsets(input, item, unit, offsets[0]);
    while (unit.at < item.to) {
      const Unit next = find_unit(item, unit.at, unit.last);
      const int64_t next_count = find_offsets(input, item, next, offsets[1 - current]);
      attend_unit(unit, offsets[current], count, offsets[1 - current], next_count);
      if (next.at / CHUNK > unit.at / CHUNK && next.at < item.to) end_chunk(), start_chunk();
      unit = next, count = next_count, current = 1 - current;
    }
    if (is_partial) {
      memcpy(partials.outputs + item.partial * head_dim, output,
             (size_t)(row_count * head_dim) * 4);
      for (int64_t i = 0; i < row_count; i++)
        partials.totals[item.partial + i] = total_of(softmax[i]);
      return;
    }
    end_chunk();
    for_rows(input, item, [&](int64_t i, int64_t token, int64_t head) {
      finish_row(totals[i], total_output + i * head_dim, head_dim, input.form == KV_INT8,
                 input.out + (token * input.heads + head) * head_dim);
    });
  }

 private:
  const AttentionInput& input;
  const Item& item;
  int64_t& configuration;
  const int64_t head_dim, row_count;
  const ScoreScale scale;
  // Rows of each KV head, in memory of the thread. Tiles of queries and output reach beyond them.
  Operand* queries;                      // [KV heads, rows, head_dim]
  float *output, *total_output;          // likewise; of this chunk and before it; see finish_row
  RunningSoftmax* softmax;               // of this chunk
  RowTotal* totals;                      // of the chunks before it
  int64_t *first_visible, *visible_end;  // positions; alike for all KV heads
  alignas(64) bf16 keys[SPAN * MAX_HEAD_DIM];
  alignas(64) Operand values[SPAN * MAX_HEAD_DIM];
  alignas(64) bf16 unpacked_keys[SPAN * MAX_HEAD_DIM], unpacked_values[SPAN * MAX_HEAD_DIM];
  SpanScales scales;  // of what was unpacked

  static RowTotal total_of(const RunningSoftmax& row) { return {row.max, reduce_add(row.sums)}; }

  void take_memory() {
    const int64_t size = row_count * head_dim, tiled = size + 16 * head_dim;
    const int64_t row_bytes = sizeof *softmax + sizeof *totals + 2 * sizeof *visible_end;
    char* at = thread_scratch<char>((2 * tiled + size) * 4 + row_count * row_bytes + 7 * 64);
    const auto take = [&](auto*& memory, int64_t count) {
      memory = (std::remove_reference_t<decltype(memory)>)at;
      at += (count * (int64_t)sizeof *memory + 63) / 64 * 64;
    };
    take(queries, tiled);
    take(output, tiled);
    take(total_output, size);
    take(softmax, row_count);
    take(totals, row_count);
    take(first_visible, item.rows);
    take(visible_end, item.rows);
  }

  // A span of positions, at `offsets` in the cache, for its members' rows of all KV heads. The next
  // unit's keys and values are prefetched: pages may be anywhere, which no processor predicts.
  void attend_unit(const Unit& unit, const int64_t* offsets, int64_t count,
                   const int64_t* next_offsets, int64_t next_count) {
    const uint8_t *stored_keys[SPAN], *stored_values[SPAN];
    const bf16* value_rows[SPAN];
    const int64_t groups = (count + KEYS - 1) / KEYS;
    const int64_t value_bytes = input.form == KV_BF16 ? 2 : 1;
    const Member& last_member = item.members[unit.last - 1];
    int64_t first = item.members[unit.first].row;
    int64_t last = last_member.row + (last_member.last - last_member.first) * input.group();
    while (first < last && visible_end[first] <= unit.at) first++;
    while (first < last && first_visible[last - 1] >= unit.at + count) last--;
    for (int64_t h = 0; h < item.kv_heads; h++) {
      const int64_t head = h * input.head_stride();
      for (int64_t i = 0; i < groups * KEYS; i++) {
        stored_keys[i] = input.keys + offsets[i < count ? i : 0] + head;
        stored_values[i] = stored_keys[i] + input.value_offset;
      }
      NextSpan next;
#if !BF16_DOT
      next.value_bytes = value_bytes;
      // Beyond its positions: a vector that has been read, so that loops need no limit.
      for (int64_t i = 0; i < SPAN; i++) {
        next.keys[i] = i < next_count ? input.keys + next_offsets[i] + head : stored_keys[0];
        next.values[i] = next.keys[i] + input.value_offset;
      }
#endif
      for (int64_t g = 0; g < (BF16_DOT ? SPAN / KEYS : groups); g++) {
#if BF16_DOT
        for (int64_t i = g * KEYS; i < std::min(next_count, (g + 1) * KEYS); i++)
          for (int64_t d = head; d < head + value_bytes * head_dim; d += 64) {
            __builtin_prefetch(input.keys + next_offsets[i] + d, 0, 2);
            __builtin_prefetch(input.keys + input.value_offset + next_offsets[i] + d, 0, 2);
          }
#endif
        if (g < groups) load_keys(stored_keys, g * KEYS);
      }
      // Not for a single pass over the values.
      const bool prepares = use_amx() || last - first > block_rows();
      const Operand* prepared = load_values(stored_values, count, prepares, next, value_rows);
      const int64_t tile_rows = std::min<int64_t>(16, last - first);
      attend_rows({h, first, last, tile_rows, unit.at, count, prepared, value_rows, &next});
    }
  }

  // Whether int8 becomes bf16 while keys are transposed and values interleaved.
  bool converts_int8() const { return BF16_DOT && input.form == KV_INT8; }

  // Transposes a group of keys from position `first` of the span on.
  void load_keys(const uint8_t* const* stored, int64_t first) {
    bf16* to = keys + first * head_dim;
#if BF16_DOT
    if (converts_int8()) {
      for (int64_t i = first; i < first + KEYS; i++)
        scales.keys[i] = int8_scale(stored[i], head_dim) * 0x1p-24f;
      return transpose_int8_keys(stored + first, head_dim, to);
    }
#endif
    const bf16* rows[SPAN];
    unpack(stored, first, KEYS, unpacked_keys, rows, scales.keys);
    transpose_keys(rows + first, head_dim, to);
  }

  // Values of a span → prepared if they must be, or else null and `rows`
  const Operand* load_values(const uint8_t* const* stored, int64_t count, bool prepares,
                             const NextSpan& next, const bf16** rows) {
    std::fill(scales.values + count, scales.values + SPAN, 0.0f);
#if BF16_DOT
    if (converts_int8()) {
      for (int64_t i = 0; i < count; i++) scales.values[i] = int8_scale(stored[i], head_dim);
      prepare_int8_values(stored, count, head_dim, values);
      return values;
    }
#endif
    unpack(stored, 0, count, unpacked_values, rows, scales.values);
    if (count % 2) rows[count] = rows[0];  // with a weight of 0
    if (!prepares) return nullptr;
    prepare_values(rows, count, head_dim, next, values);
    return values;
  }

  // The vectors `stored` from `first` on as bf16: where they are, or unpacked, with their scales.
  void unpack(const uint8_t* const* stored, int64_t first, int64_t count, bf16* unpacked,
              const bf16** rows, float* vector_scales) {
    for (int64_t i = first; i < first + count; i++) {
      if (input.form == KV_BF16) {
        rows[i] = (const bf16*)stored[i];
        continue;
      }
      bf16* to = unpacked + i * head_dim;
      vector_scales[i] = unpack_vector(stored[i], head_dim, input.form, to);
      rows[i] = to;
    }
  }

  // Rows [first, last) of a KV head, and the `count` positions from `at` on that they attend to.
  struct RowSpan {
    int64_t head, first, last, tile_rows, at, count;
    const Operand* prepared;  // values, or null
    const bf16* const* value_rows;
    const NextSpan* next;
  };

  void attend_rows(const RowSpan& span) {
#if BF16_DOT
    if (use_amx()) return attend_tiles(span);
#endif
    alignas(64) float scores[BLOCK_ROWS * SPAN];
    alignas(64) bf16 weights[BLOCK_ROWS * SPAN];
    const int64_t groups = (span.count + KEYS - 1) / KEYS;
    for (int64_t row = span.first; row < span.last; row += block_rows()) {
      const int64_t rows = std::min(block_rows(), span.last - row);
      const int64_t i = (span.head * item.rows + row) * head_dim;
      const NextSpan* next = row == span.first ? span.next : nullptr;
      score(queries + i, keys, rows, groups, head_dim, next, scores);
      compute_weights(span, row, rows, scores, weights, [](int64_t) {});
#if BF16_DOT
      mix_pairs(weights, span.prepared, span.value_rows, rows, span.count, head_dim, output + i);
#else
      mix_values(scores, span.prepared, span.value_rows, rows, span.count, head_dim, next,
                 output + i);
#endif
    }
  }

#if BF16_DOT
  // While a block of rows has its softmax, the values of the block before it are added, and the
  // scores of the next one computed.
  void attend_tiles(const RowSpan& span) {
    alignas(64) float scores[2][BLOCK_ROWS * SPAN];
    alignas(64) bf16 weights[2][BLOCK_ROWS * SPAN];
    const int64_t groups = (span.count + KEYS - 1) / KEYS;
    const auto rows_from = [&](int64_t row) { return std::min(BLOCK_ROWS, span.last - row); };
    const auto place = [&](int64_t row) { return (span.head * item.rows + row) * head_dim; };
    configure_tiles(span.tile_rows, 64, configuration);
    TileSteps steps(head_dim);
    steps.start_scores(queries + place(span.first), keys, rows_from(span.first), groups, scores[0]);
    steps.finish();
    for (int64_t row = span.first, b = 0; row < span.last; row += BLOCK_ROWS, b = 1 - b) {
      const int64_t rows = rows_from(row), next = row + BLOCK_ROWS;
      if (next < span.last)
        steps.start_scores(queries + place(next), keys, rows_from(next), groups, scores[1 - b]);
      compute_weights(span, row, rows, scores[b], weights[b], [&](int64_t r) {
        if (r % 8 == 7 && !steps.step()) keep_tiles_awake(configuration);
      });
      steps.finish();
      // Tiles may reach into other rows, to which they must add nothing.
      const int64_t padded = (rows + span.tile_rows - 1) / span.tile_rows * span.tile_rows;
      memset(weights[b] + rows * SPAN, 0, (size_t)((padded - rows) * SPAN) * 2);
      steps.start_values(weights[b], span.prepared, rows, span.count, output + place(row));
    }
    steps.finish();
  }
#endif

  // The softmax of `rows` rows from `row` on.
  template <typename F>
  void compute_weights(const RowSpan& span, int64_t row, int64_t rows, float* scores, bf16* weights,
                       F end_row) {
    const int64_t groups = (span.count + KEYS - 1) / KEYS, i = span.head * item.rows + row;
    const auto sees_all = [&](int64_t r) {
      return first_visible[row + r] <= span.at && visible_end[row + r] >= span.at + SPAN;
    };
    const bool is_plain = !scale.cap && input.form == KV_BF16;
    for (int64_t r = 0, last; r < rows; r = last) {
      last = r + 1;
      const SoftmaxRows part{scores + r * SPAN, weights + r * SPAN, scale,
                             input.form == KV_BF16 ? nullptr : &scales,
                             first_visible + row + r, visible_end + row + r, span.at, head_dim,
                             softmax + i + r, output + (i + r) * head_dim};
      if (sees_all(r)) {
        while (last < rows && sees_all(last)) last++;
        if (is_plain)
          softmax_rows<SPAN / KEYS, false, true>(part, last - r, end_row);
        else
          softmax_rows<SPAN / KEYS, false, false>(part, last - r, end_row);
      } else {
        while (last < rows && !sees_all(last)) last++;
        with_constant<SPAN / KEYS>(groups, [&](auto parts) {
          if (is_plain)
            softmax_rows<parts.value, true, true>(part, last - r, end_row);
          else
            softmax_rows<parts.value, true, false>(part, last - r, end_row);
        });
      }
    }
  }
};

}  // namespace
