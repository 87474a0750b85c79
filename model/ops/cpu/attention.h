// Attention over paged KV, part of kernels.h.

constexpr int64_t TILE = 64;        // positions taken at once
constexpr int KEYS = 16;            // of them, those whose scores are
constexpr int64_t MOST_QUERY = 32;  // (token, head) rows that share a KV head and a pass
constexpr int64_t MOST_MIXED = 64 * 256;

#if WIDE || FIXED
#if WIDE
using Register = __m512i;
#define INTRINSIC(name) _mm512_##name
#else
using Register = __m256i;
#define INTRINSIC(name) _mm256_##name
#endif

// Of each four registers, every 16 bytes as a matrix of 4 by 4 values of 32 bits, transposed.
INLINE void transpose_fours(Register (&r)[LANES]) {
  Register t[LANES];
  for (int i = 0; i < LANES / 2; i++) {
    t[2 * i] = INTRINSIC(unpacklo_epi32)(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = INTRINSIC(unpackhi_epi32)(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < LANES / 4; i++) {
    r[4 * i] = INTRINSIC(unpacklo_epi64)(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = INTRINSIC(unpackhi_epi64)(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = INTRINSIC(unpacklo_epi64)(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = INTRINSIC(unpackhi_epi64)(t[4 * i + 1], t[4 * i + 3]);
  }
}
#undef INTRINSIC
#endif

// keys of 16 positions [KEYS, head_dim] → [head_dim / 2, KEYS, 2]
INLINE void transpose_keys(const bf16* const* rows, int64_t head_dim, bf16* to) {
#if WIDE
  for (int64_t span = 0; span < head_dim; span += 32) {
    __m512i r[16], t[16];
    for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(rows[i] + span);
    transpose_fours(r);
    for (int i = 0; i < 4; i++) {
      t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
      t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
      t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
      t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
      _mm512_storeu_si512(to + (span / 2 + i) * 32, _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88));
      _mm512_storeu_si512(to + (span / 2 + i + 8) * 32, _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd));
      _mm512_storeu_si512(to + (span / 2 + i + 4) * 32,
                          _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88));
      _mm512_storeu_si512(to + (span / 2 + i + 12) * 32,
                          _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd));
    }
  }
#elif FIXED
  for (int64_t span = 0; span < head_dim; span += 16)
    for (int part = 0; part < KEYS; part += 8) {
      __m256i r[8];
      for (int i = 0; i < 8; i++)
        r[i] = _mm256_loadu_si256((const __m256i*)(rows[part + i] + span));
      transpose_fours(r);
      for (int i = 0; i < 4; i++) {
        bf16* out = to + (span / 2 + i) * 2 * KEYS + part * 2;
        _mm256_storeu_si256((__m256i*)out, _mm256_permute2x128_si256(r[i], r[i + 4], 0x20));
        _mm256_storeu_si256((__m256i*)(out + 8 * KEYS),
                            _mm256_permute2x128_si256(r[i], r[i + 4], 0x31));
      }
    }
#else
  for (int i = 0; i < KEYS; i++)
    for (int64_t k = 0; k < head_dim; k += 2) memcpy(to + k * KEYS + i * 2, rows[i] + k, 4);
#endif
}

// Queries are bf16 where there is a product of bf16 pairs that is fast, float32 elsewhere.
#if WIDE && !FIXED
using Query = bf16;
#else
using Query = float;
#endif

constexpr int SCORED = WIDE ? 8 : 3;  // rows of queries whose scores stay in registers

template <int COUNT>
INLINE void score_rows(const Query* query, const bf16* keys, int64_t head_dim, float* scores) {
  constexpr int PARTS = KEYS / LANES;
  floats acc[COUNT][PARTS] = {};
  for (int64_t k = 0; k < head_dim; k += 2) {
    ints pairs[PARTS];
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; p++) pairs[p] = held(load_pairs(keys + k * KEYS + p * 2 * LANES));
#pragma GCC unroll 8
    for (int r = 0; r < COUNT; r++) {
#if WIDE && !FIXED
      int32_t pair;
      memcpy(&pair, query + r * head_dim + k, 4);
      acc[r][0] = dot(acc[r][0], pair - ints{}, pairs[0]);
#else
#pragma GCC unroll 4
      for (int p = 0; p < PARTS; p++) {
        acc[r][p] += (floats)(pairs[p] << 16) * query[r * head_dim + k];
        acc[r][p] += (floats)(pairs[p] & (int32_t)0xffff0000) * query[r * head_dim + k + 1];
      }
#endif
    }
  }
  for (int r = 0; r < COUNT; r++)
    for (int p = 0; p < PARTS; p++) store(scores + r * TILE + p * LANES, acc[r][p]);
}

INLINE void take_queries(const bf16* from, int64_t values, Query* to) {
#if WIDE && !FIXED
  memcpy(to, from, (size_t)values * 2);
#else
  for (int64_t i = 0; i < values; i += LANES) store(to + i, widen(from + i));
#endif
}

// scores [rows, 16 of TILE] of query [rows, head_dim] with 16 transposed keys.
INLINE void score(const Query* query, const bf16* keys, int64_t rows, int64_t head_dim,
                  float* scores, [[maybe_unused]] int64_t& tiles) {
#if WIDE && !FIXED
  if (use_amx) {
    asm volatile("" : : : "memory");
    const int64_t own = std::min<int64_t>(16, rows);
    if (tiles != own) configure_tiles(tiles = own);
    _tile_zero(0);
    _tile_zero(2);
    for (int64_t k = 0; k < head_dim; k += 32) {
      _tile_loadd(6, keys + k * 16, 64);
      _tile_loadd(4, query + k, head_dim * 2);
      _tile_dpbf16ps(0, 4, 6);
      if (rows > 16) {
        _tile_loadd(5, query + 16 * head_dim + k, head_dim * 2);
        _tile_dpbf16ps(2, 5, 6);
      }
    }
    _tile_stored(0, scores, TILE * 4);
    if (rows > 16) _tile_stored(2, scores + 16 * TILE, TILE * 4);
    return;
  }
#endif
  for (int64_t r = 0; r < rows; r += SCORED)
    with_constant<SCORED>(std::min<int64_t>(SCORED, rows - r), [&](auto constant) {
      score_rows<constant.value>(query + r * head_dim, keys, head_dim, scores + r * TILE);
    });
}

#if WIDE
// values of `count` positions [count, head_dim] → [32 or 64 positions / 2, head_dim, 2], what is
// beyond them zeros. Each 32 dimensions stand in the order that `in_order` undoes.
INLINE void interleave_values(const bf16* const* rows, int64_t count, int64_t head_dim, bf16* to) {
  const __m512i zero = _mm512_setzero_si512();
  for (int64_t i = 0; i < (count + 31) / 32 * 32; i += 2, to += 2 * head_dim)
    for (int64_t span = 0; span < head_dim; span += 32) {
      const __m512i even = i < count ? _mm512_loadu_si512(rows[i] + span) : zero;
      const __m512i odd = i + 1 < count ? _mm512_loadu_si512(rows[i + 1] + span) : zero;
      _mm512_storeu_si512(to + span * 2, _mm512_unpacklo_epi16(even, odd));
      _mm512_storeu_si512(to + span * 2 + 32, _mm512_unpackhi_epi16(even, odd));
    }
}

// 32 dimensions as interleave_values leaves them, as they were.
INLINE void in_order(floats& low, floats& high) {
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second =
      _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  const __m512 a = (__m512)low, b = (__m512)high;
  low = (floats)_mm512_permutex2var_ps(a, first, b);
  high = (floats)_mm512_permutex2var_ps(a, second, b);
}

// mixed [rows, head_dim] plus shares bf16 [rows, TILE] times `count` interleaved values.
static void mix_tiles(const bf16* shares, const bf16* values, int64_t rows, int64_t count,
                      int64_t head_dim, float* mixed) {
  asm volatile("" : : : "memory");
  const bool both = rows > 16, more = count > 32;
  const int64_t stride = TILE * 2, across = head_dim * 4;
  _tile_loadd(4, shares, stride);
  if (both) _tile_loadd(5, shares + 16 * TILE, stride);
  if (more) _tile_loadd(1, shares + 32, stride);
  if (more && both) _tile_loadd(3, shares + 16 * TILE + 32, stride);
  for (int64_t d = 0; d < head_dim; d += 16) {
    _tile_loadd(0, mixed + d, across);
    _tile_loadd(6, values + d * 2, across);
    _tile_dpbf16ps(0, 4, 6);
    if (both) {
      _tile_loadd(2, mixed + 16 * head_dim + d, across);
      _tile_dpbf16ps(2, 5, 6);
    }
    if (more) {
      _tile_loadd(7, values + 32 * head_dim + d * 2, across);
      _tile_dpbf16ps(0, 1, 7);
      if (both) _tile_dpbf16ps(2, 3, 7);
    }
    _tile_stored(0, mixed + d, across);
    if (both) _tile_stored(2, mixed + 16 * head_dim + d, across);
  }
}
#endif

constexpr int MIXED = WIDE ? 4 : 2;  // rows whose values are mixed at once

template <int COUNT, int PARTS>
INLINE void mix_rows(const float* shares, const bf16* const* values, int64_t count, float* out,
                     int64_t stride) {
  floats acc[COUNT][PARTS];
  for (int r = 0; r < COUNT; r++)
    for (int p = 0; p < PARTS; p++) acc[r][p] = load(out + r * stride + p * LANES);
  for (int64_t i = 0; i < count; i++) {
    floats value[PARTS];
#pragma GCC unroll 8
    for (int p = 0; p < PARTS; p++) value[p] = widen(values[i] + p * LANES);
#pragma GCC unroll 4
    for (int r = 0; r < COUNT; r++) {
      const floats share = splat(shares[r * TILE + i]);
#pragma GCC unroll 8
      for (int p = 0; p < PARTS; p++) acc[r][p] += share * value[p];
    }
  }
  for (int r = 0; r < COUNT; r++)
    for (int p = 0; p < PARTS; p++) store(out + r * stride + p * LANES, acc[r][p]);
}

// Turns a row's scores of a tile, of which it may see [from, to), into shares relative to the
// largest score so far, and brings what was summed before to the same measure. They replace the
// scores, or go to `narrowed` as bf16 [TILE].
template <int PARTS>
INLINE void take_shares(float* row, bf16* narrowed, float scale, int64_t from, int64_t to,
                        float& top, float& total, float* mixed, int64_t head_dim) {
  ints lane;
  for (int i = 0; i < LANES; i++) lane[i] = i;
  const floats unseen = splat(-INFINITY);
  floats share[PARTS], most = unseen, sums = {};
  for (int p = 0; p < PARTS; p++) {
    const ints at = lane + p * LANES;
    const floats value = load(row + p * LANES) * scale;
    share[p] = (at >= (int32_t)from) & (at < (int32_t)to) ? value : unseen;
    most = share[p] > most ? share[p] : most;
  }
  const float best = std::max(top, largest(most));
  for (int p = 0; p < PARTS; p++) {
    // If there is nothing to see yet, not even a sink, this compares unseen with unseen.
    share[p] = share[p] == unseen ? splat(0) : exponential(share[p] - best);
    sums += share[p];
  }
  for (int p = 0; p < TILE / LANES; p++) {
    if (narrowed)
      narrow(narrowed + p * LANES, p < PARTS ? share[p] : floats{});
    else if (p < PARTS)
      store(row + p * LANES, share[p]);
  }
  if (best > top && top > -INFINITY) {
    const floats shrink = exponential(splat(top - best));
    total *= shrink[0];
    for (int64_t i = 0; i < head_dim; i += LANES) store(mixed + i, load(mixed + i) * shrink);
  }
  top = best;
  total += sum(sums);
}

// Rows of which a tile has 16, or all if they are fewer.
INLINE int64_t whole_tiles(int64_t rows) {
  return use_amx && rows > 16 ? (rows + 15) / 16 * 16 : rows;
}

// What one thread attends at once: some tokens of a sequence, for KV heads that lie side by side.
struct AttentionItem {
  int64_t sequence, first, last, kv_head, kv_heads;
};

struct AttentionSize {
  int64_t heads, kv_heads, head_dim, block_size, window;
};

static void attend(const bf16* query, bf16* out, const AttentionItem& item, int64_t before,
                   const AttentionSize& size, const bf16* kv, int64_t kv_half,
                   const int32_t* table, const bf16* sinks, int64_t& tiles) {
  const int64_t head_dim = size.head_dim, group = size.heads / size.kv_heads;
  const int64_t rows = (item.last - item.first) * group;  // of one KV head, by token
  const int64_t end = before + item.last, window = size.window;
  // A multiple of TILE, so that sums are added up in the same order in any chunk.
  const int64_t low = window ? std::max<int64_t>(0, before + item.first + 1 - window) : 0;
  const int64_t begin = low / TILE * TILE;
  const int64_t stride = size.kv_heads * head_dim;
  const float scale = 1.0f / std::sqrt((float)head_dim);
  alignas(64) bf16 keys[KEYS * 256];
  alignas(64) float scores[MOST_QUERY * TILE];
  alignas(64) float mixed[MOST_MIXED];
  alignas(64) bf16 shares[MOST_QUERY * TILE];
  [[maybe_unused]] alignas(64) bf16 values[TILE * 256];
  float top[MOST_MIXED / 32], total[MOST_MIXED / 32];
  alignas(64) Query queries[MOST_QUERY * 256];
  const bf16 *key_rows[TILE], *value_rows[TILE], *part_rows[TILE];
  int64_t offsets[2][TILE];  // of this tile's positions and of the next one's, in a cache
  const auto find = [&](int64_t from, int64_t* to) {
    const int64_t first = std::max(from, low);
    int64_t block = first / size.block_size, within = first % size.block_size;
    for (int64_t i = first - from; i < std::min(TILE, end - from); i++) {
      to[i] = (table[block] * size.block_size + within) * stride + item.kv_head * head_dim;
      if (++within == size.block_size) within = 0, block++;
    }
    // What no row sees is not read: its place is taken by the first position that one does.
    for (int64_t i = 0; i < first - from; i++) to[i] = to[first - from];
  };
  find(begin, offsets[0]);
  int64_t ends[MOST_QUERY];
  for (int64_t r = 0; r < rows; r++) ends[r] = before + item.first + r / group + 1;
  for (int64_t i = 0; i < rows * item.kv_heads; i++) {
    const int64_t head = (item.kv_head + i / rows) * group + i % rows % group;
    top[i] = sinks ? widen_one(sinks[head]) : -INFINITY;
    total[i] = sinks ? 1 : 0;
  }
  const int64_t room = whole_tiles(rows) * head_dim;
  memset(mixed, 0, (size_t)(item.kv_heads * room) * 4);
  for (int64_t at = begin; at < end; at += TILE) {
    const int64_t count = std::min(TILE, end - at), padded = (count + KEYS - 1) / KEYS * KEYS;
    const int64_t *here = offsets[(at - begin) / TILE % 2], ahead = std::min(TILE, end - at - TILE);
    int64_t* next = offsets[((at - begin) / TILE + 1) % 2];
    find(at + TILE, next);
    for (int64_t i = 0; i < count; i++) {
      key_rows[i] = kv + here[i];
      value_rows[i] = key_rows[i] + kv_half;
    }
    for (int64_t i = count; i < padded; i++) key_rows[i] = key_rows[0];
    for (int64_t own = 0; own < item.kv_heads; own++) {
      const int64_t head = (item.kv_head + own) * group;
      for (int64_t token = item.first; token < item.last; token++)
        take_queries(query + (token * size.heads + head) * head_dim, group * head_dim,
                     queries + (token - item.first) * group * head_dim);
      for (int64_t i = 0; i < count; i += KEYS) {
        // The pages lie anywhere, which no hardware foresees: values wanted soon, keys later.
        for (int64_t j = i; j < std::min(count, i + KEYS); j++)
          for (int64_t d = 0; d < head_dim; d += 32) __builtin_prefetch(value_rows[j] + d);
        for (int64_t j = i; j < std::min(ahead, i + KEYS); j++)
          for (int64_t d = 0; d < head_dim; d += 32)
            __builtin_prefetch(kv + next[j] + own * head_dim + d, 0, 2);
        transpose_keys(key_rows + i, head_dim, keys);
        score(queries, keys, rows, head_dim, scores + i, tiles);
      }
      float* own_mixed = mixed + own * room;
      for (int64_t r = 0; r < rows; r++) {
        with_constant<TILE / KEYS>(padded / KEYS, [&](auto parts) {
          take_shares<parts.value * KEYS / LANES>(scores + r * TILE, use_amx ? shares + r * TILE : nullptr, scale,
                                   window ? ends[r] - window - at : 0, ends[r] - at,
                                   top[own * rows + r], total[own * rows + r],
                                   own_mixed + r * head_dim, head_dim);
        });
#if WIDE
        if (use_amx && r % 8 == 7) _tile_stored(6, values, 64);  // keeps the tiles awake
#endif
      }
#if WIDE
      if (use_amx) {
        interleave_values(value_rows, count, head_dim, values);
        mix_tiles(shares, values, rows, count, head_dim, own_mixed);
      }
#endif
      for (int64_t part = 0; part < head_dim && !use_amx; part += 32) {
        const bool wide = WIDE && head_dim - part >= 64;
        for (int64_t i = 0; i < count; i++) part_rows[i] = value_rows[i] + part;
        for (int64_t r = 0; r < rows; r += MIXED)
          with_constant<MIXED>(std::min<int64_t>(MIXED, rows - r), [&](auto constant) {
            float* to = own_mixed + r * head_dim + part;
            if (wide)
              mix_rows<constant.value, 64 / LANES>(scores + r * TILE, part_rows, count, to,
                                                   head_dim);
            else
              mix_rows<constant.value, 32 / LANES>(scores + r * TILE, part_rows, count, to,
                                                   head_dim);
          });
        if (wide) part += 32;
      }
      for (int64_t i = 0; i < padded; i++) key_rows[i] += head_dim;
      for (int64_t i = 0; i < count; i++) value_rows[i] += head_dim;
    }
  }
  for (int64_t i = 0; i < rows * item.kv_heads; i++) {
    const int64_t r = i % rows, head = (item.kv_head + i / rows) * group + r % group;
    bf16* to = out + ((item.first + r / group) * size.heads + head) * head_dim;
    const float factor = total[i] > 0 ? 1 / total[i] : 0;
    const float* from = mixed + i / rows * room + r * head_dim;
    for (int64_t d = 0; d < head_dim; d += 32) {
      floats value[VECTORS];
      for (int v = 0; v < VECTORS; v++) value[v] = load(from + d + v * LANES) * factor;
#if WIDE
      if (use_amx) in_order(value[0], value[1]);
#endif
      for (int v = 0; v < VECTORS; v++) narrow(to + d + v * LANES, value[v]);
    }
  }
}

static void attention(const bf16* query, const bf16* kv, int64_t kv_half, const int32_t* table,
                      int64_t width, const int32_t* starts, const int32_t* seen,
                      const bf16* sinks, int64_t sequences, int64_t heads, int64_t kv_heads,
                      int64_t head_dim, int64_t block_size, int64_t window, bf16* out,
                      int threads) {
  const AttentionSize size{heads, kv_heads, head_dim, block_size, window};
  const int64_t group = heads / kv_heads, tokens = std::max<int64_t>(1, MOST_QUERY / group);
  static thread_local std::vector<AttentionItem> items;
  items.clear();
  // Heads that lie side by side are read together, as long as there is work for every thread.
  int64_t span = std::min(kv_heads, MOST_MIXED / (head_dim * whole_tiles(group * tokens)));
  while (span > 1 && sequences * kv_heads / span < 4 * threads) span /= 2;
  int64_t work = 0;
  for (int64_t s = 0; s < sequences; s++) {
    const int64_t count = starts[s + 1] - starts[s];
    work += count * std::min<int64_t>(seen[s], window ? window + count : seen[s]);
    for (int64_t first = 0; first < count; first += tokens)
      for (int64_t head = 0; head < kv_heads; head += span)
        items.push_back({s, first, std::min(count, first + tokens), head,
                         std::min(span, kv_heads - head)});
  }
  if (work * heads * head_dim < 1 << 16) threads = 1;
  const AttentionItem* all = items.data();
  const int64_t count = (int64_t)items.size();
#pragma omp parallel num_threads(threads)
  {
    int64_t tiles = 0;
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t i = 0; i < count; i++) {
      const int64_t s = all[i].sequence, offset = (int64_t)starts[s] * heads * head_dim;
      attend(query + offset, out + offset, all[i], seen[s] - (starts[s + 1] - starts[s]), size, kv,
             kv_half, table + s * width, sinks, tiles);
    }
    release_tiles(tiles);
  }
}
