// What one thread computes of attention at a time: query rows over spans of positions. Rows of
// several sequences share what they read of common blocks.
#pragma once

#include "../kv_vector.h"
#include "scores.h"

namespace {

// Positions whose softmax and output are summed up apart from those of other chunks, so that
// threads can share a long context. Always the same positions, so that results do not depend on it.
constexpr int64_t CHUNK = 1024;
constexpr int64_t MAX_GROUP = 32;  // query heads of a KV head; native.py has the same number

// The arguments of `attention`.
struct AttentionInput {
  const bf16* query;
  bf16* out;
  const uint8_t* keys;   // [blocks, block_size, stored_heads] vectors, blocks `block_stride` apart
  int64_t form;          // of vectors: see kv_vector.h
  int64_t value_offset;  // of the values, behind the keys
  const int32_t* block_tables;
  int64_t block_table_stride;
  const int32_t *cu_seqlens_q, *context_lens;
  const bf16* sinks;
  int64_t sequences, heads, kv_heads, stored_heads, head_dim, block_size, block_stride;
  float scale, cap;
  int64_t window;

  int64_t group() const { return heads / kv_heads; }  // query heads of a KV head
  int64_t vector_bytes() const { return kv_vector_bytes(form, head_dim); }
  int64_t head_stride() const { return stored_heads == kv_heads ? vector_bytes() : 0; }
  int64_t query_len(int64_t s) const { return cu_seqlens_q[s + 1] - cu_seqlens_q[s]; }
  const int32_t* block_table(int64_t s) const { return block_tables + s * block_table_stride; }
  int64_t block_count(int64_t s) const { return (context_lens[s] + block_size - 1) / block_size; }
};

// Query tokens [first, last) of a sequence. They attend to positions [low, end).
struct Member {
  int64_t sequence, first, last, low, end;
  int64_t row = 0;     // the first of its query rows among those of an item's KV head
  int64_t shared = 0;  // positions that are in the same blocks as those of the member before it

  Member(const AttentionInput& input, int64_t s, int64_t first_token, int64_t last_token)
      : sequence(s), first(first_token), last(last_token) {
    const int64_t num_computed = input.context_lens[s] - input.query_len(s);
    low = input.window ? std::max<int64_t>(0, num_computed + first + 1 - input.window) : 0;
    end = num_computed + last;
  }
  // The first position of a span. A multiple of SPAN, so that sums are added up in the same order
  // however a prompt is chunked.
  int64_t begin() const { return low / SPAN * SPAN; }
};

// Members for KV heads next to each other, over the positions [from, to) of spans.
struct Item {
  const Member* members;
  int64_t count, rows;  // members; query rows of one KV head, ordered by member and token
  int64_t kv_head, kv_heads, from, to;
  int64_t partial;  // the place of a single chunk's sums among those of all, or -1: see Sums
};

// Calls `f(i, token, head)` for all rows of an item, where i counts through KV heads and rows.
template <typename F>
INLINE void for_rows(const AttentionInput& input, const Item& item, F f) {
  for (int64_t h = item.kv_head, i = 0; h < item.kv_head + item.kv_heads; h++)
    for (int64_t m = 0; m < item.count; m++) {
      const Member& member = item.members[m];
      const int64_t first_token = input.cu_seqlens_q[member.sequence];
      for (int64_t token = member.first; token < member.last; token++)
        for (int64_t g = 0; g < input.group(); g++, i++)
          f(i, first_token + token, h * input.group() + g);
    }
}

// A span from position `at` on for members [first, last), which read the same blocks.
struct Unit {
  int64_t at, first, last;
};

// The first unit from `member` at position `at` on; its position is `item.to` if there is none.
INLINE Unit find_unit(const Item& item, int64_t at, int64_t member) {
  const auto attends = [&](int64_t m) {
    return item.members[m].begin() <= at && at < item.members[m].end;
  };
  for (; at < item.to; at += SPAN, member = 0)
    for (; member < item.count; member++) {
      if (!attends(member)) continue;
      int64_t last = member + 1;
      while (last < item.count && item.members[last].shared >= at + SPAN && attends(last)) last++;
      return {at, member, last};
    }
  return {item.to, 0, 0};
}

// Finds the offsets in the cache, in bytes, of a unit's positions and returns their number.
// Positions that no row attends to are not read: they get the offset of the first that is.
INLINE int64_t find_offsets(const AttentionInput& input, const Item& item, const Unit& unit,
                            int64_t* offsets) {
  if (unit.at >= item.to) return 0;
  int64_t low = INT64_MAX, end = 0;
  for (int64_t m = unit.first; m < unit.last; m++) {
    low = std::min(low, item.members[m].low);
    end = std::max(end, item.members[m].end);
  }
  const int64_t first = std::max(unit.at, low), count = std::min(SPAN, end - unit.at);
  const int64_t stride = input.stored_heads * input.vector_bytes(), block_size = input.block_size;
  const int32_t* block_table = input.block_table(item.members[unit.first].sequence);
  for (int64_t i = first - unit.at; i < count;) {
    const int64_t block = (unit.at + i) / block_size, within = unit.at + i - block * block_size;
    const int64_t last = std::min(count, i + block_size - within);
    int64_t offset = block_table[block] * input.block_stride + within * stride +
                     item.kv_head * input.head_stride();
    for (; i < last; i++, offset += stride) offsets[i] = offset;
  }
  for (int64_t i = 0; i < first - unit.at; i++) offsets[i] = offsets[first - unit.at];
  return count;
}

}  // namespace
