// Causal attention over a paged KV cache.
#pragma once

#include "../gemm/panels.h"
#include "pass.h"

namespace {

constexpr int64_t MAX_OUTPUT = 1 << 14;  // values that one thread accumulates at a time

// The most query rows of a KV head that are computed together, without sequences that share pages:
// at least those of one token.
INLINE int64_t max_rows(int64_t head_dim) {
  const int64_t most = BF16_DOT ? 256 : 128;
  return std::max(MAX_GROUP, std::min(most, most * MAX_OUTPUT / 256 / head_dim));
}

// Up to this many rows, a sequence is decoding, or nearly: it reads pages together with others. A
// prompt has enough rows to read them for itself.
constexpr int64_t FEW_ROWS = 64;

// Members [first, last) of the batch, which are computed together for every KV head.
struct MemberRange {
  int64_t first, last;
};

// How a batch is divided. The results do not depend on it.
struct Division {
  std::vector<Member> members;
  std::vector<MemberRange> pieces;
  std::vector<Item> items;
  std::vector<Item> split;   // those of which each chunk is an item, to be merged
  int64_t partial_rows = 0;  // of their chunks
};

// The number of leading blocks that two sequences have in common.
INLINE int64_t common_blocks(const AttentionInput& input, int64_t a, int64_t b) {
  const int32_t* blocks = input.block_table(a);
  const int64_t count = std::min(input.block_count(a), input.block_count(b));
  return std::mismatch(blocks, blocks + count, input.block_table(b)).first - blocks;
}

// Orders sequences such that those with the same leading blocks are next to each other.
INLINE void sort_by_blocks(const AttentionInput& input, std::vector<int64_t>& sequences) {
  std::sort(sequences.begin(), sequences.end(), [&](int64_t a, int64_t b) {
    const int64_t common = common_blocks(input, a, b);
    const int64_t count_a = input.block_count(a), count_b = input.block_count(b);
    if (common < std::min(count_a, count_b))
      return input.block_table(a)[common] < input.block_table(b)[common];
    return count_a != count_b ? count_a < count_b : a < b;
  });
}

// Adds the pieces of a prompt, each of `tokens_at_once`. The last tokens, which see the most
// positions, come first, so that threads end together.
INLINE void divide_prompt(const AttentionInput& input, int64_t s, int64_t tokens_at_once,
                          Division& division) {
  for (int64_t last = input.query_len(s); last > 0; last -= tokens_at_once) {
    const int64_t first = (int64_t)division.members.size();
    division.members.emplace_back(input, s, std::max<int64_t>(0, last - tokens_at_once), last);
    division.pieces.push_back({first, first + 1});
  }
}

// Adds the pieces of sequences with few rows: those that share at least a span of visible positions
// are together, up to about `rows_at_once` rows.
INLINE void divide_sharing(const AttentionInput& input, std::vector<int64_t>& sequences,
                           int64_t rows_at_once, Division& division) {
  if (sequences.size() > 1) sort_by_blocks(input, sequences);
  std::vector<Member>& members = division.members;
  for (size_t i = 0; i < sequences.size();) {
    const int64_t first = (int64_t)members.size();
    int64_t rows = 0;
    do {
      Member member(input, sequences[i], 0, input.query_len(sequences[i]));
      if (rows) {
        const Member& previous = members.back();
        member.shared =
            common_blocks(input, previous.sequence, member.sequence) * input.block_size;
        if (member.shared < std::max(previous.begin(), member.begin()) + SPAN) break;
      }
      rows += member.last * input.group();
      members.push_back(member);
    } while (++i < sequences.size());
    const int64_t count = (int64_t)members.size() - first;
    const int64_t pieces = std::min(count, (rows + rows_at_once - 1) / rows_at_once);
    for (int64_t p = 0; p < pieces; p++) {
      const MemberRange piece{first + count * p / pieces, first + count * (p + 1) / pieces};
      Member* member = &members[(size_t)piece.first];
      member->shared = 0;
      for (; member + 1 < members.data() + piece.last; member++)
        member[1].row = member->row + member->last * input.group();
      division.pieces.push_back(piece);
    }
  }
}

// Divides the batch into pieces, of which `parallel` keep all threads busy.
INLINE void divide_batch(const AttentionInput& input, int64_t parallel, Division& division) {
  static thread_local std::vector<int64_t> sharing;
  sharing.clear();
  int64_t prompt_rows = 0, sharing_rows = 0;
  for (int64_t s = 0; s < input.sequences; s++) {
    const int64_t rows = input.query_len(s) * input.group();
    const bool is_prompt = rows > FEW_ROWS;
    (is_prompt ? prompt_rows : sharing_rows) += rows;
    if (!is_prompt && rows) sharing.push_back(s);
  }
  // At least 32 rows, for which it pays to load keys and values.
  const auto rows_at_once = [&](int64_t rows) {
    return std::min(max_rows(input.head_dim), std::max<int64_t>(32, rows / parallel));
  };
  for (int64_t s = 0; s < input.sequences; s++)
    if (input.query_len(s) * input.group() > FEW_ROWS)
      divide_prompt(input, s, rows_at_once(prompt_rows) / input.group(), division);
  divide_sharing(input, sharing, rows_at_once(sharing_rows), division);
}

// Makes items of the pieces. Neighbouring KV heads are read together, and a long context by one
// thread, as long as there are items for every thread.
INLINE void make_items(const AttentionInput& input, int threads, Division& division) {
  const auto [members, pieces] = std::pair(division.members.data(), &division.pieces);
  const int64_t enough = 4 * threads, count = (int64_t)pieces->size();
  const bool split = count * input.kv_heads < enough;
  for (const MemberRange& piece : *pieces) {
    Item item{members + piece.first, piece.last - piece.first, 0, 0, 0, INT64_MAX, 0, -1};
    for (int64_t m = 0; m < item.count; m++) {
      const Member& member = item.members[m];
      item.rows += (member.last - member.first) * input.group();
      item.from = std::min(item.from, member.begin());
      item.to = std::max(item.to, member.end);
    }
    const int64_t first_chunk = item.from / CHUNK, last_chunk = (item.to - 1) / CHUNK;
    const bool is_split = split && item.rows <= FEW_ROWS && last_chunk > first_chunk;
    const int64_t chunks = is_split ? last_chunk - first_chunk + 1 : 1;
    int64_t heads_at_once = input.kv_heads;
    while (heads_at_once > 1 && (heads_at_once * item.rows * input.head_dim > MAX_OUTPUT ||
                                 count * chunks * input.kv_heads / heads_at_once < enough))
      heads_at_once /= 2;
    for (item.kv_head = 0; item.kv_head < input.kv_heads; item.kv_head += heads_at_once) {
      item.kv_heads = std::min(heads_at_once, input.kv_heads - item.kv_head);
      if (!is_split) {
        division.items.push_back(item);
        continue;
      }
      Item part = item;
      item.partial = division.partial_rows;
      division.split.push_back(item);
      for (int64_t chunk = first_chunk; chunk <= last_chunk; chunk++) {
        part.from = std::max(item.from, chunk * CHUNK);
        part.to = std::min(item.to, (chunk + 1) * CHUNK);
        part.partial = division.partial_rows;
        division.items.push_back(part);
        division.partial_rows += part.rows * part.kv_heads;
      }
    }
  }
}

// Merges the chunks of a split item.
INLINE void merge_chunks(const AttentionInput& input, const Item& item, const Sums& partials) {
  const int64_t head_dim = input.head_dim, rows = item.rows * item.kv_heads;
  const int64_t chunks = (item.to - 1) / CHUNK - item.from / CHUNK + 1;
  for_rows(input, item, [&](int64_t i, int64_t token, int64_t head) {
    alignas(64) float output[MAX_HEAD_DIM] = {};
    RowTotal total = first_total(input, head);
    for (int64_t c = 0, row = item.partial + i; c < chunks; c++, row += rows)
      merge_rows(partials.totals[row], partials.outputs + row * head_dim, head_dim, total, output);
    finish_row(total, output, head_dim, input.form == KV_INT8,
               input.out + (token * input.heads + head) * head_dim);
  });
}

// query [tokens, heads, head_dim] → out, over the sequences' blocks in the cache: keys and values
// [blocks, block_size, stored_heads] vectors each, of a form in kv_vector.h, blocks `block_stride`
// bytes apart, values `value_offset` bytes behind keys: 0 if they are the same. stored_heads is
// kv_heads, or 1 if groups of the heads, of which there are kv_heads, read the same.
// block_tables [sequences, block_table_stride], cu_seqlens_q [sequences + 1], context_lens
// [sequences], sinks [heads] or null; scale: the factor of the scores; cap: their soft limit, 0 for
// none; window: the positions that a token attends to, 0 for all.
// Blocks with which several sequences begin are read together (Juravsky et al., Hydragen, 2024).
void attention(const bf16* query, const uint8_t* kv, int64_t form, int64_t value_offset,
               const int32_t* block_tables, int64_t block_table_stride,
               const int32_t* cu_seqlens_q, const int32_t* context_lens, const bf16* sinks,
               int64_t sequences, int64_t heads, int64_t kv_heads, int64_t stored_heads,
               int64_t head_dim, int64_t block_size, int64_t block_stride, float scale, float cap,
               int64_t window, bf16* out, int threads) {
  const AttentionInput input{query, out, kv, form, value_offset, block_tables, block_table_stride,
                             cu_seqlens_q, context_lens, sinks, sequences, heads, kv_heads,
                             stored_heads, head_dim, block_size, block_stride, scale, cap, window};
  static thread_local Division division;
  division.members.clear();
  division.pieces.clear();
  division.items.clear();
  division.split.clear();
  division.partial_rows = 0;
  divide_batch(input, std::max<int64_t>(1, 4 * threads / kv_heads), division);
  make_items(input, threads, division);
  int64_t products = 0;
  for (const Member& member : division.members)
    products += (member.last - member.first) * (member.end - member.low);
  if (products * heads * head_dim < 1 << 16) threads = 1;
  const Sums partials{shared_scratch<RowTotal>(0, division.partial_rows),
                      shared_scratch<float>(0, division.partial_rows * head_dim)};
  const Item *items = division.items.data(), *split = division.split.data();
  const int64_t count = (int64_t)division.items.size(), splits = (int64_t)division.split.size();
  divide(threads, count, 1, [=](int64_t first, int64_t last) {
    int64_t configuration = 0;
    for (int64_t i = first; i < last; i++) {
      ItemPass pass(input, items[i], configuration);
      pass.run(partials);
    }
    release_tiles(configuration);
  });
  divide(threads, splits, 1, [=](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++) merge_chunks(input, split[i], partials);
  });
}

}  // namespace
