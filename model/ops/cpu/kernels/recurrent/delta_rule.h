// The gated delta rule of recurrent layers: see model/ops/recurrent.py.
//
// Token by token, also for a prompt: on vector units the chunked form needs no fewer operations,
// and the results of a token do not depend on the chunk that it is in. A part of a state's columns
// stays in the first cache for a tile of tokens; one pass over its rows updates them for a token and
// multiplies them by key and query of the next one.
#pragma once

#include "sequences.h"

namespace {

constexpr int64_t RULE_TILE = 16;     // tokens whose queries and keys are prepared at once
constexpr int64_t RULE_COLUMNS = 32;  // of a state, which are in the first cache together

struct DeltaRule {
  const float *decay_log, *bias;  // of the gates, [value heads]
  float* states;                  // [rows, value heads, key_dim, value_dim]
  int64_t key_heads, value_heads, key_dim, value_dim;

  int64_t channels() const { return 2 * key_heads * key_dim + value_heads * value_dim; }
};

// Tokens of one value head, with queries and keys divided by their lengths.
template <typename T>
struct Tile {
  const float *queries, *keys;  // [tokens, key_dim]
  const float *decays, *betas, *products;  // [tokens]; products of query and key
  const T* values;                         // of the first column, `stride` apart
  int64_t stride, tokens;
  T* out;  // `out_stride` apart
  int64_t out_stride;
};

// Replaces a part of a row of a state; returns its new values.
INLINE vec_f32 update(float* row, vec_f32 decay, vec_f32 key, vec_f32 change) {
  const vec_f32 value = multiply_add(key, change, load(row) * decay);
  store(row, value);
  return value;
}

// The rule over a tile, for N vectors of columns of a state, whose rows are `stride` apart.
template <int N, typename T>
void run_tile(const Tile<T>& tile, int64_t key_dim, float* state, int64_t stride) {
  vec_f32 memory[N] = {}, read[N] = {}, change[N];  // products of the state with key and query
  for (int64_t i = 0; i < key_dim; i++) {
    const vec_f32 key = broadcast(tile.keys[i]), query = broadcast(tile.queries[i]);
    for (int n = 0; n < N; n++) {
      const vec_f32 row = load(state + i * stride + n * LANES);
      memory[n] = multiply_add(row, key, memory[n]);
      read[n] = multiply_add(row, query, read[n]);
    }
  }
  for (int64_t token = 0; token < tile.tokens; token++) {
    const vec_f32 decay = broadcast(tile.decays[token]);
    for (int n = 0; n < N; n++) {
      const vec_f32 value = load_values(tile.values + token * tile.stride + n * LANES);
      change[n] = tile.betas[token] * multiply_add(-decay, memory[n], value);
      const vec_f32 old = decay * read[n];
      store_values(tile.out + token * tile.out_stride + n * LANES,
                   multiply_add(broadcast(tile.products[token]), change[n], old));
      memory[n] = read[n] = vec_f32{};
    }
    const float* keys = tile.keys + token * key_dim;
    if (token + 1 == tile.tokens) {
      for (int64_t i = 0; i < key_dim; i++)
        for (int n = 0; n < N; n++)
          update(state + i * stride + n * LANES, decay, broadcast(keys[i]), change[n]);
      return;
    }
    const float *next_keys = keys + key_dim, *next_queries = tile.queries + (token + 1) * key_dim;
    for (int64_t i = 0; i < key_dim; i++) {
      const vec_f32 key = broadcast(keys[i]);
      const vec_f32 next_key = broadcast(next_keys[i]), next_query = broadcast(next_queries[i]);
      for (int n = 0; n < N; n++) {
        const vec_f32 row = update(state + i * stride + n * LANES, decay, key, change[n]);
        memory[n] = multiply_add(row, next_key, memory[n]);
        read[n] = multiply_add(row, next_query, read[n]);
      }
    }
  }
}

template <typename T>
INLINE float divide_by_length(const T* from, int64_t size, float scale, float* to) {
  const float factor = scale / std::sqrt(sum_of_squares(from, size) + 1e-6f);
  for (int64_t i = 0; i < size; i += LANES) store(to + i, load_values(from + i) * factor);
  return factor;
}

INLINE float dot(const float* a, const float* b, int64_t size) {
  vec_f32 sum = {};
  for (int64_t i = 0; i < size; i += LANES) sum = multiply_add(load(a + i), load(b + i), sum);
  return reduce_add(sum);
}

// The gates of a value head for one token, whose inputs are b and a.
INLINE float decay_of(const DeltaRule& rule, int64_t head, float a) {
  const float x = a + rule.bias[head];
  const float softplus = x > 20.0f ? x : std::log1p(std::exp(x));
  return std::exp(-std::exp(rule.decay_log[head]) * softplus);
}

// The rule for columns [begin, end) of one value head of a sequence.
template <typename T>
void run_head(const DeltaRule& rule, const T* mixed, const T* gates, int64_t tokens, bool is_new,
              int64_t head, int64_t begin, int64_t end, float* state, T* out) {
  const int64_t size = rule.key_dim, columns = end - begin, width = rule.value_dim;
  const int64_t key_head = head / (rule.value_heads / rule.key_heads);
  float* scratch = thread_scratch<float>(RULE_TILE * (2 * size + 3) + size * columns);
  float *queries = scratch, *keys = queries + RULE_TILE * size;
  float* local = keys + RULE_TILE * size;  // blocks [key_dim, RULE_COLUMNS]
  float *decays = local + size * columns, *betas = decays + RULE_TILE;
  float* products = betas + RULE_TILE;
  // A single token reads its state once, so it is not worth copying.
  const bool is_local = tokens > 1;
  if (is_new && !is_local)
    for (int64_t i = 0; i < size; i++) memset(state + i * width + begin, 0, columns * 4);
  if (is_local)
    for (int64_t c = 0; c < columns; c += RULE_COLUMNS)
      for (int64_t i = 0; i < size; i++) {
        float* to = local + c * size + i * RULE_COLUMNS;
        if (is_new)
          memset(to, 0, RULE_COLUMNS * 4);
        else
          memcpy(to, state + i * width + begin + c, RULE_COLUMNS * 4);
      }
  const int64_t channels = rule.channels(), first_key = rule.key_heads * size;
  for (int64_t first = 0; first < tokens; first += RULE_TILE) {
    const int64_t count = std::min(RULE_TILE, tokens - first);
    for (int64_t t = 0; t < count; t++) {
      const T* from = mixed + (first + t) * channels + key_head * size;
      const T* gate = gates + (first + t) * 2 * rule.value_heads + head;
      divide_by_length(from, size, 1.0f / std::sqrt((float)size), queries + t * size);
      divide_by_length(from + first_key, size, 1.0f, keys + t * size);
      products[t] = dot(queries + t * size, keys + t * size, size);
      decays[t] = decay_of(rule, head, load_value(gate + rule.value_heads));
      betas[t] = 1.0f / (1.0f + std::exp(-load_value(gate)));
    }
    const int64_t value = 2 * first_key + head * width + begin;
    Tile<T> tile{queries, keys, decays, betas, products, mixed + first * channels + value, channels,
                 count, out + (first * rule.value_heads + head) * width + begin,
                 rule.value_heads * width};
    for (int64_t c = 0; c < columns;) {
      int64_t done = RULE_COLUMNS;
      if (is_local) {
        run_tile<RULE_COLUMNS / LANES>(tile, size, local + c * size, RULE_COLUMNS);
#if VECTOR_BITS == 512
      } else if (c + 128 <= columns) {
        done = 128;
        run_tile<128 / LANES>(tile, size, state + begin + c, width);
#endif
      } else {
        run_tile<RULE_COLUMNS / LANES>(tile, size, state + begin + c, width);
      }
      tile.values += done;
      tile.out += done;
      c += done;
    }
  }
  if (is_local)
    for (int64_t c = 0; c < columns; c += RULE_COLUMNS)
      for (int64_t i = 0; i < size; i++)
        memcpy(state + i * width + begin + c, local + c * size + i * RULE_COLUMNS,
               RULE_COLUMNS * 4);
}

template <typename T>
void run_rule(DeltaRule rule, const T* mixed, const T* gates, Sequences sequences, T* out,
              int threads) {
  // Columns are independent of each other: they are divided where there are few heads.
  const int64_t heads = sequences.count * rule.value_heads, blocks = rule.value_dim / RULE_COLUMNS;
  const int64_t parts = heads >= 4 * threads ? 1 : blocks;
  const int64_t columns = rule.value_dim / parts;
  divide(threads, heads * parts, 1, [=](int64_t from, int64_t to) {
    for (int64_t item = from; item < to; item++) {
      const int64_t i = item / (rule.value_heads * parts);
      const int64_t head = item / parts % rule.value_heads, begin = item % parts * columns;
      const int64_t first = sequences.first(i), state = rule.key_dim * rule.value_dim;
      if (!sequences.tokens(i)) continue;
      run_head(rule, mixed + first * rule.channels(), gates + first * 2 * rule.value_heads,
               sequences.tokens(i), sequences.is_new(i), head, begin, begin + columns,
               rule.states + (sequences.rows[i] * rule.value_heads + head) * state,
               out + first * rule.value_heads * rule.value_dim);
    }
  });
}

// mixed [tokens, channels]: queries, keys and values; gates [tokens, 2 · value_heads]: b, then a →
// out [tokens, value_heads, value_dim]; all bf16 or float. states are replaced.
void delta_rule(const void* mixed, const void* gates, const float* decay_log, const float* bias,
                float* states, int64_t key_heads, int64_t value_heads, int64_t key_dim,
                int64_t value_dim, const int64_t* rows, const int32_t* starts,
                const int32_t* context_lens, int64_t count, bool is_float, void* out, int threads) {
  const DeltaRule rule{decay_log, bias, states, key_heads, value_heads, key_dim, value_dim};
  const Sequences sequences{rows, starts, context_lens, count};
  if (is_float)
    run_rule(rule, (const float*)mixed, (const float*)gates, sequences, (float*)out, threads);
  else
    run_rule(rule, (const bf16*)mixed, (const bf16*)gates, sequences, (bf16*)out, threads);
}

}  // namespace
