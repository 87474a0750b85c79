// Causal attention over a paged KV cache.
#pragma once

#include "attention_span.h"
#include "gemm/panels.h"

namespace {

constexpr int64_t MAX_OUTPUT = 64 * MAX_HEAD_DIM;  // values that one thread accumulates at a time

// Rows of the AMX tiles that hold `rows`: multiples of 16, or fewer than 16.
INLINE int64_t padded_rows(int64_t rows) {
  return use_amx() && rows > 16 ? (rows + 15) / 16 * 16 : rows;
}

// What one thread computes at a time: tokens [first, last) of a sequence, for KV heads that are
// next to each other.
struct AttentionItem {
  int64_t sequence, first, last, kv_head, kv_heads;
};

// The cache: keys and values [blocks, block_size, kv_heads, head_dim] each, values `value_offset`
// elements behind keys.
struct PagedCache {
  const bf16* keys;
  int64_t value_offset, block_size, kv_heads, head_dim;
};

// Offsets in the cache of the positions from `from` on, up to SPAN and before `end`. Positions
// before `low`, which no row attends to, are not read: they get the offset of the first that is.
INLINE void find_offsets(const PagedCache& cache, const int32_t* block_table, int64_t kv_head,
                         int64_t from, int64_t low, int64_t end, int64_t* offsets) {
  // Copies, because the compiler must assume that the stores to `offsets` change the cache.
  const int64_t block_size = cache.block_size, stride = cache.kv_heads * cache.head_dim;
  const int64_t head_offset = kv_head * cache.head_dim, first = std::max(from, low);
  int64_t block = first / block_size, within = first % block_size;
  for (int64_t i = first - from; i < std::min(SPAN, end - from); i++) {
    offsets[i] = (block_table[block] * block_size + within) * stride + head_offset;
    if (++within == block_size) within = 0, block++;
  }
  for (int64_t i = 0; i < first - from; i++) offsets[i] = offsets[first - from];
}

// One item of one sequence. query and out [tokens, heads, head_dim] and block_table begin at the
// sequence, of which `num_computed` tokens precede the query.
void attend(const bf16* query, bf16* out, const AttentionItem& item, int64_t num_computed,
            int64_t heads, float scale, float cap, int64_t window, const PagedCache& cache,
            const int32_t* block_table, const bf16* sinks, int64_t& configured_rows) {
  const bf16* kv = cache.keys;
  const int64_t head_dim = cache.head_dim, group = heads / cache.kv_heads;
  const int64_t value_offset = cache.value_offset;
  const int64_t rows = (item.last - item.first) * group;  // of one KV head, ordered by token
  const int64_t end = num_computed + item.last;
  const int64_t low = window ? std::max<int64_t>(0, num_computed + item.first + 1 - window) : 0;
  // A multiple of SPAN, so that sums are added up in the same order however a prompt is chunked.
  const int64_t begin = low / SPAN * SPAN;
  alignas(64) bf16 keys[KEYS * MAX_HEAD_DIM];
  alignas(64) float scores[MAX_QUERY_ROWS * SPAN];
  alignas(64) float output[MAX_OUTPUT];  // [KV heads, padded_rows, head_dim]
  [[maybe_unused]] alignas(64) bf16 weights[MAX_QUERY_ROWS * SPAN];
  [[maybe_unused]] alignas(64) bf16 values[SPAN * MAX_HEAD_DIM];
  RowSoftmax softmax[MAX_OUTPUT / 32];  // [KV heads, rows]
  alignas(64) Query queries[MAX_QUERY_ROWS * MAX_HEAD_DIM];
  const bf16 *key_rows[SPAN], *value_rows[SPAN];
  int64_t offsets[2][SPAN];  // of this span's positions and of the next span's
  find_offsets(cache, block_table, item.kv_head, begin, low, end, offsets[0]);
  int64_t visible_end[MAX_QUERY_ROWS];  // of each row
  for (int64_t r = 0; r < rows; r++) visible_end[r] = num_computed + item.first + r / group + 1;
  for (int64_t i = 0; i < rows * item.kv_heads; i++) {
    const int64_t head = (item.kv_head + i / rows) * group + i % rows % group;
    softmax[i].max = sinks ? to_float(sinks[head]) : -INFINITY;
    softmax[i].sum = sinks ? 1 : 0;
  }
  const int64_t output_size = padded_rows(rows) * head_dim;
  memset(output, 0, (size_t)(item.kv_heads * output_size) * 4);
  for (int64_t at = begin; at < end; at += SPAN) {
    const int64_t count = std::min(SPAN, end - at), padded = (count + KEYS - 1) / KEYS * KEYS;
    const int64_t* current = offsets[(at - begin) / SPAN % 2];
    const int64_t next_count = std::min(SPAN, end - at - SPAN);
    int64_t* next = offsets[((at - begin) / SPAN + 1) % 2];
    find_offsets(cache, block_table, item.kv_head, at + SPAN, low, end, next);
    for (int64_t i = 0; i < count; i++) {
      key_rows[i] = kv + current[i];
      value_rows[i] = key_rows[i] + value_offset;
    }
    for (int64_t i = count; i < padded; i++) key_rows[i] = key_rows[0];
    for (int64_t h = 0; h < item.kv_heads; h++) {
      const int64_t head = (item.kv_head + h) * group;
      for (int64_t token = item.first; token < item.last; token++)
        load_queries(query + (token * heads + head) * head_dim, group * head_dim,
                     queries + (token - item.first) * group * head_dim);
      for (int64_t i = 0; i < count; i += KEYS) {
        // Pages may be anywhere, which no hardware prefetcher predicts. Values are needed soon, the
        // next keys later.
        for (int64_t j = i; j < std::min(count, i + KEYS); j++)
          for (int64_t d = 0; d < head_dim; d += 32) __builtin_prefetch(value_rows[j] + d);
        for (int64_t j = i; j < std::min(next_count, i + KEYS); j++)
          for (int64_t d = 0; d < head_dim; d += 32)
            __builtin_prefetch(kv + next[j] + h * head_dim + d, 0, 2);
        transpose_keys(key_rows + i, head_dim, keys);
        score(queries, keys, rows, head_dim, scores + i, configured_rows);
      }
      float* head_output = output + h * output_size;
      for (int64_t r = 0; r < rows; r++) {
        with_constant<SPAN / KEYS>(padded / KEYS, [&](auto parts) {
          softmax_span<parts.value * KEYS / LANES>(
              scores + r * SPAN, use_amx() ? weights + r * SPAN : nullptr, scale, cap,
              window ? visible_end[r] - window - at : 0, visible_end[r] - at,
              softmax[h * rows + r], head_output + r * head_dim, head_dim);
        });
#if BF16_DOT
        if (use_amx() && r % 8 == 7) _tile_stored(6, values, 64);  // idle tiles become slow
#endif
      }
#if BF16_DOT
      if (use_amx()) {
        interleave_values(value_rows, count, head_dim, values);
        mix_tiles(weights, values, rows, count, head_dim, head_output);
      }
#endif
      if (!use_amx()) mix_values(scores, value_rows, rows, count, head_dim, head_output);
      for (int64_t i = 0; i < padded; i++) key_rows[i] += head_dim;
      for (int64_t i = 0; i < count; i++) value_rows[i] += head_dim;
    }
  }
  for (int64_t i = 0; i < rows * item.kv_heads; i++) {
    const int64_t r = i % rows, head = (item.kv_head + i / rows) * group + r % group;
    bf16* to = out + ((item.first + r / group) * heads + head) * head_dim;
    const float factor = softmax[i].sum > 0 ? 1 / softmax[i].sum : 0;
    const float* from = output + i / rows * output_size + r * head_dim;
    for (int64_t d = 0; d < head_dim; d += 32) {
      vec_f32 value[VECTORS];
      for (int v = 0; v < VECTORS; v++) value[v] = load(from + d + v * LANES) * factor;
#if BF16_DOT
      if (use_amx()) restore_order(value[0], value[1]);
#endif
      for (int v = 0; v < VECTORS; v++) store_bf16(to + d + v * LANES, value[v]);
    }
  }
}

// query [tokens, heads, head_dim] → out, over the sequences' blocks in the cache.
// block_tables [sequences, block_table_stride], cu_seqlens_q [sequences + 1], context_lens
// [sequences], sinks [heads] or null; scale: the factor of the scores; cap: their soft limit, 0 for
// none; window: the positions that a token attends to, 0 for all.
void attention(const bf16* query, const bf16* kv, int64_t value_offset,
               const int32_t* block_tables, int64_t block_table_stride,
               const int32_t* cu_seqlens_q, const int32_t* context_lens, const bf16* sinks,
               int64_t sequences, int64_t heads, int64_t kv_heads, int64_t head_dim,
               int64_t block_size, float scale, float cap, int64_t window, bf16* out, int threads) {
  const PagedCache cache{kv, value_offset, block_size, kv_heads, head_dim};
  const int64_t group = heads / kv_heads;
  const int64_t tokens_at_once = std::max<int64_t>(1, MAX_QUERY_ROWS / group);
  static thread_local std::vector<AttentionItem> item_list;
  item_list.clear();
  // Neighbouring heads are read together, as long as there are items for every thread.
  int64_t heads_at_once =
      std::min(kv_heads, MAX_OUTPUT / (head_dim * padded_rows(group * tokens_at_once)));
  while (heads_at_once > 1 && sequences * kv_heads / heads_at_once < 4 * threads)
    heads_at_once /= 2;
  int64_t products = 0;
  for (int64_t s = 0; s < sequences; s++) {
    const int64_t count = cu_seqlens_q[s + 1] - cu_seqlens_q[s];
    const int64_t context = context_lens[s];
    products += count * std::min<int64_t>(context, window ? window + count : context);
    for (int64_t first = 0; first < count; first += tokens_at_once)
      for (int64_t head = 0; head < kv_heads; head += heads_at_once)
        item_list.push_back({s, first, std::min(count, first + tokens_at_once), head,
                             std::min(heads_at_once, kv_heads - head)});
  }
  if (products * heads * head_dim < 1 << 16) threads = 1;
  const AttentionItem* items = item_list.data();
  const int64_t count = (int64_t)item_list.size();
  divide(threads, count, 1, [=](int64_t first_item, int64_t last_item) {
    int64_t configured_rows = 0;
    for (int64_t i = first_item; i < last_item; i++) {
      const int64_t s = items[i].sequence, offset = (int64_t)cu_seqlens_q[s] * heads * head_dim;
      const int64_t num_computed = context_lens[s] - (cu_seqlens_q[s + 1] - cu_seqlens_q[s]);
      attend(query + offset, out + offset, items[i], num_computed, heads, scale, cap, window,
             cache, block_tables + s * block_table_stride, sinks, configured_rows);
    }
    release_tiles(configured_rows);
  });
}

}  // namespace
