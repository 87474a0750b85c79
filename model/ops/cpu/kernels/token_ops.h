// Operations on each token by itself: embeddings, scaling, RMSNorm, rotary with the KV write, sums.
#pragma once

#include "kv_vector.h"
#include "scratch.h"

namespace {

// Rows of a table of any dtype, `row_bytes` each → out [count, row_bytes]
void gather(const uint8_t* table, int64_t row_bytes, const int64_t* ids, int64_t count,
            uint8_t* out) {
  for (int64_t i = 0; i < count; i++)
    memcpy(out + i * row_bytes, table + ids[i] * row_bytes, (size_t)row_bytes);
}

// Rows of a table [rows, size] that starts with token `first`, times a factor → out [count, size].
// Tokens that are not in the table get zeros.
void embed(const bf16* table, int64_t rows, int64_t size, int64_t first, const int64_t* ids,
           int64_t count, float factor, float* out) {
  for (int64_t i = 0; i < count; i++) {
    const int64_t row = ids[i] - first;
    float* to = out + i * size;
    if (row < 0 || row >= rows) {
      std::fill(to, to + size, 0.0f);
      continue;
    }
    const bf16* from = table + row * size;
    const int64_t whole = size / LANES * LANES;
    for (int64_t k = 0; k < whole; k += LANES) store(to + k, load_bf16(from + k) * factor);
    for (int64_t k = whole; k < size; k++) to[k] = to_float(from[k]) * factor;
  }
}

constexpr int64_t VECTORS_PER_PIECE = 512;  // of operations on each value by itself

// x [count] · factor → out, rounded once
void scale(const bf16* x, float factor, int64_t count, bf16* out, int threads) {
  const int64_t whole = count / LANES * LANES;
  if (count < 1 << 14) threads = 1;
  divide(threads, whole / LANES, VECTORS_PER_PIECE, [=](int64_t first, int64_t last) {
    for (int64_t i = first * LANES; i < last * LANES; i += LANES)
      store_bf16(out + i, load_bf16(x + i) * factor);
  });
  for (int64_t i = whole; i < count; i++) out[i] = to_bf16(to_float(x[i]) * factor);
}

template <typename T>
INLINE float sum_of_squares(const T* x, int64_t size) {
  vec_f32 squares = {};
  for (int64_t i = 0; i < size; i += LANES) {
    const vec_f32 value = load_values(x + i);
    squares += value * value;
  }
  return reduce_add(squares);
}

// Rows of a piece, for operations on each row by itself.
INLINE int64_t rows_per_piece(int64_t rows, int threads) {
  return std::max<int64_t>(1, rows / (4 * threads));
}

// RMSNorm of x [rows, size], without a residual stream → out
void rms_norm(const bf16* x, const float* weight, int64_t rows, int64_t size, float eps, bf16* out,
              int threads) {
  if (rows * size < 1 << 14) threads = 1;
  divide(threads, rows, rows_per_piece(rows, threads), [=](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
      const bf16* from = x + row * size;
      const float factor = 1.0f / std::sqrt(sum_of_squares(from, size) / (float)size + eps);
      for (int64_t i = 0; i < size; i += LANES)
        store_bf16(out + row * size + i, load_bf16(from + i) * factor * load(weight + i));
    }
  });
}

// Caps x [count] softly, in place.
void softcap(float* x, float cap, int64_t count, int threads) {
  if (count < 1 << 14) threads = 1;
  const int64_t whole = count / LANES * LANES;
  divide(threads, whole / LANES, VECTORS_PER_PIECE, [=](int64_t first, int64_t last) {
    for (int64_t i = first * LANES; i < last * LANES; i += LANES)
      store(x + i, cap_softly(load(x + i), cap));
  });
  for (int64_t i = whole; i < count; i++) x[i] = cap_softly(broadcast(x[i]), cap)[0];
}

// The largest of `count` values, and the first place of it; NaN and any place if one of them is NaN.
INLINE float find_largest(const float* x, int64_t count, int64_t& place) {
  constexpr int64_t BLOCK = 1024;  // values; those of the largest stay in the cache
  vec_i32 is_nan = {};
  float largest = -INFINITY;
  int64_t block = 0;
  for (int64_t first = 0; first < count; first += BLOCK) {
    const int64_t size = std::min(BLOCK, count - first), whole = size / (4 * LANES) * (4 * LANES);
    vec_f32 max[4];
    for (vec_f32& each : max) each = broadcast(-INFINITY);
    for (int64_t i = 0; i < whole; i += 4 * LANES)
      for (int v = 0; v < 4; v++) {
        const vec_f32 value = load(x + first + i + v * LANES);
        max[v] = value > max[v] ? value : max[v];
        is_nan |= value != value;
      }
    float block_max = -INFINITY;
    for (const vec_f32& each : max) block_max = std::max(block_max, reduce_max(each));
    for (int64_t i = first + whole; i < first + size; i++) {
      block_max = std::max(block_max, x[i]);
      is_nan |= vec_i32{} - (x[i] != x[i]);
    }
    if (block_max > largest) largest = block_max, block = first;
  }
  place = std::find(x + block, x + std::min(count, block + BLOCK) - 1, largest) - x;
  for (int i = 0; i < LANES; i++)
    if (is_nan[i]) largest = NAN;
  return largest;
}

// x [rows, size] → the largest value of each row and its place; of equal ones the first
void argmax(const float* x, int64_t rows, int64_t size, float* largest, int64_t* places,
            int threads) {
  if (rows * size < 1 << 18) threads = 1;
  divide(threads, rows, 1, [=](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++)
      largest[row] = find_largest(x + row * size, size, places[row]);
  });
}

// x and delta [rows, size] → their sum and its RMSNorm; without a delta, the RMSNorm of x. Without
// a weight the sum takes the place of its norm.
void add_rms_norm(const float* x, const bf16* delta, const float* weight, int64_t rows,
                  int64_t size, float eps, float* sum, bf16* normed, int threads) {
  if (rows * size < 1 << 14) threads = 1;
  divide(threads, rows, rows_per_piece(rows, threads), [=](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
      const float* from = x + row * size;
      if (delta) {
        float* to = sum + row * size;
        for (int64_t i = 0; i < size; i += LANES)
          store(to + i, load(from + i) + load_bf16(delta + row * size + i));
        from = to;
      }
      if (!weight) {
        for (int64_t i = 0; i < size; i += LANES)
          store_bf16(normed + row * size + i, load(from + i));
        continue;
      }
      const float factor = 1.0f / std::sqrt(sum_of_squares(from, size) / (float)size + eps);
      for (int64_t i = 0; i < size; i += LANES)
        store_bf16(normed + row * size + i, load(from + i) * factor * load(weight + i));
    }
  });
}

// (x + delta) · factor, all [count], but for `factor`, a single value → out
void scaled_sum(const float* x, const bf16* delta, const float* factor, int64_t count, float* out,
                int threads) {
  const int64_t whole = count / LANES * LANES;
  if (count < 1 << 14) threads = 1;
  divide(threads, whole / LANES, VECTORS_PER_PIECE, [=](int64_t first, int64_t last) {
    for (int64_t i = first * LANES; i < last * LANES; i += LANES)
      store(out + i, (load(x + i) + load_bf16(delta + i)) * *factor);
  });
  for (int64_t i = whole; i < count; i++) out[i] = (x[i] + to_float(delta[i])) * *factor;
}

// The activation of gates [rows, size] times as many ups, whose rows are `gate_stride` and
// `up_stride` values apart → out [rows, size]
void gated(const bf16* gate, int64_t gate_stride, const bf16* up, int64_t up_stride, int64_t rows,
           int64_t size, int64_t kind, float limit, float alpha, bf16* out, int threads) {
  const Activation by{kind, limit, alpha};
  if (rows * size < 1 << 13) threads = 1;
  divide(threads, rows, rows_per_piece(rows, threads), [=](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
      const bf16 *gates = gate + row * gate_stride, *ups = up + row * up_stride;
      for (int64_t i = 0; i < size; i += LANES)
        store_bf16(out + row * size + i, activate(load_bf16(gates + i), load_bf16(ups + i), by));
    }
  });
}

// The norms of the query or key heads of a layer, if any: float32 weights [head_dim], or with `whole`
// [heads, head_dim], where one norm covers all heads. `last`: the rotation comes before it.
struct HeadNorms {
  const float* weights;  // or null
  bool whole, last;
  float eps;
};

INLINE float norm_factor(float squares, int64_t size, float eps) {
  return 1.0f / std::sqrt(squares / (float)size + eps);
}

// Rotates the first rotary_dim values of one head [head_dim], whose halves are the two coordinates.
// Every value is multiplied by `factor` and its weight before that, if there are weights.
template <typename T>
INLINE void rotate_head(const bf16* from, const float* weights, float factor, const float* cos,
                        const float* sin, int64_t head_dim, int64_t rotary_dim, T* to) {
  const int64_t half = rotary_dim / 2;
  for (int64_t i = 0; i < half; i += LANES) {
    vec_f32 first = load_bf16(from + i), second = load_bf16(from + half + i);
    if (weights) {
      first = first * factor * load(weights + i);
      second = second * factor * load(weights + half + i);
    }
    store_values(to + i, first * load(cos + i) - second * load(sin + i));
    store_values(to + half + i, second * load(cos + i) + first * load(sin + i));
  }
  for (int64_t i = rotary_dim; i < head_dim; i += LANES) {
    vec_f32 value = load_bf16(from + i);
    if (weights) value = value * factor * load(weights + i);
    store_values(to + i, value);
  }
}

// x [count] · factor, times the weights if there are any, in place.
template <typename T>
INLINE void multiply_in_place(T* x, const float* weights, float factor, int64_t count) {
  for (int64_t i = 0; i < count; i += LANES) {
    vec_f32 value = load_values(x + i) * factor;
    if (weights) value *= load(weights + i);
    store_values(x + i, value);
  }
}

// Norms and rotation of `heads` heads of a token: from, to [heads, head_dim].
template <typename T>
INLINE void rotate_heads(const bf16* from, int64_t heads, const HeadNorms& norms, const float* cos,
                         const float* sin, int64_t head_dim, int64_t rotary_dim, T* to) {
  const int64_t count = norms.whole ? heads : 1, groups = heads / count, size = count * head_dim;
  const bool is_first = norms.weights && !norms.last;
  for (int64_t group = 0; group < groups; group++, from += size, to += size) {
    float factor = 1;
    if (is_first) factor = norm_factor(sum_of_squares(from, size), size, norms.eps);
    for (int64_t head = 0; head < count; head++) {
      const float* weights = is_first ? norms.weights + head * head_dim : nullptr;
      rotate_head(from + head * head_dim, weights, factor, cos, sin, head_dim, rotary_dim,
                  to + head * head_dim);
    }
    if (norms.weights && norms.last) {
      factor = norm_factor(sum_of_squares(to, size), size, norms.eps);
      multiply_in_place(to, norms.weights, factor, size);
    }
  }
}

// Values of heads [kv_heads, head_dim] → `to`, normalized without weights if `norms` is set.
template <typename T>
INLINE void norm_values(const bf16* from, int64_t kv_heads, int64_t head_dim, bool norms, float eps,
                        T* to) {
  for (int64_t head = 0; head < kv_heads; head++, from += head_dim, to += head_dim) {
    const float squares = norms ? sum_of_squares(from, head_dim) : 0;
    const float factor = norms ? norm_factor(squares, head_dim, eps) : 1;
    for (int64_t i = 0; i < head_dim; i += LANES)
      store_values(to + i, load_bf16(from + i) * factor);
  }
}

// The arguments of `rotate_and_write` for a slot of the cache.
struct KvSlot {
  const bf16 *key, *value;  // [kv_heads, head_dim] each
  const HeadNorms& norms;   // of keys
  bool norms_values;
  const float *cos, *sin;
  int64_t kv_heads, head_dim, rotary_dim;

  template <typename T>
  void compute(T* keys, T* values) const {
    rotate_heads(key, kv_heads, norms, cos, sin, head_dim, rotary_dim, keys);
    norm_values(value, kv_heads, head_dim, norms_values, norms.eps, values);
  }
};

// Keys and values of a token → their places in the cache.
INLINE void write_slot(const KvSlot& slot, int64_t form, uint8_t* keys, uint8_t* values) {
  if (form == KV_BF16) return slot.compute((bf16*)keys, (bf16*)values);
  const int64_t size = slot.kv_heads * slot.head_dim, bytes = kv_vector_bytes(form, slot.head_dim);
  float* computed = thread_scratch<float>(2 * size);
  slot.compute(computed, computed + size);
  for (int64_t i = 0; i < size; i += slot.head_dim, keys += bytes, values += bytes) {
    write_vector(computed + i, slot.head_dim, form, keys);
    write_vector(computed + size + i, slot.head_dim, form, values);
  }
}

// qkv [tokens, heads + 2 · kv_heads, head_dim] → query [tokens, heads, head_dim], and keys and
// values into their slots of the cache: blocks of `block_size` slots are `block_stride` bytes apart,
// values are `value_offset` bytes behind keys; form: see kv_vector.h. values_are_keys: there are no
// values in qkv, [tokens, heads + kv_heads, head_dim], but those before the norms and the rotation
// of keys.
// cos_sin [tokens, rotary_dim], cos in the first half. q_norm, k_norm: see HeadNorms. query_scale
// [tokens] or null: multiplies rotated queries.
void rotate_and_write(const bf16* qkv, const float* cos_sin, uint8_t* kv, int64_t form,
                      int64_t value_offset, int64_t block_size, int64_t block_stride,
                      const int64_t* slot_mapping,
                      const float* q_norm, const float* k_norm, bool whole_norms, bool norms_last,
                      bool norms_values, bool values_are_keys, float eps, const float* query_scale,
                      int64_t tokens, int64_t heads, int64_t kv_heads, int64_t head_dim,
                      int64_t rotary_dim, bf16* query, int threads) {
  const int64_t width = heads + (values_are_keys ? 1 : 2) * kv_heads;
  const HeadNorms q_norms{q_norm, whole_norms, norms_last, eps};
  const HeadNorms k_norms{k_norm, whole_norms, norms_last, eps};
  if (tokens * heads * head_dim < 1 << 13) threads = 1;
  divide(threads, tokens, rows_per_piece(tokens, threads), [=](int64_t first, int64_t last) {
    for (int64_t token = first; token < last; token++) {
      const bf16* from = qkv + token * width * head_dim;
      const float *cos = cos_sin + token * rotary_dim, *sin = cos + rotary_dim / 2;
      bf16* to = query + token * heads * head_dim;
      rotate_heads(from, heads, q_norms, cos, sin, head_dim, rotary_dim, to);
      if (query_scale) multiply_in_place(to, nullptr, query_scale[token], heads * head_dim);
      from += heads * head_dim;
      if (!kv_heads) continue;
      const int64_t slot = slot_mapping[token], block = slot / block_size;
      uint8_t* keys = kv + block * block_stride +
                      (slot - block * block_size) * kv_heads * kv_vector_bytes(form, head_dim);
      const bf16* values = values_are_keys ? from : from + kv_heads * head_dim;
      write_slot({from, values, k_norms, norms_values, cos, sin, kv_heads, head_dim, rotary_dim},
                 form, keys, keys + value_offset);
    }
  });
}

// x + y · sigmoid(gate) [rows, size], or x + y without a gate [rows] → out
void add_gated(const bf16* x, const bf16* y, const bf16* gate, int64_t rows, int64_t size,
               bf16* out, int threads) {
  if (rows * size < 1 << 14) threads = 1;
  divide(threads, rows, rows_per_piece(rows, threads), [=](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
      const float factor = gate ? 1.0f / (1.0f + std::exp(-to_float(gate[row]))) : 1.0f;
      for (int64_t i = row * size; i < (row + 1) * size; i += LANES)
        store_bf16(out + i, load_bf16(x + i) + load_bf16(y + i) * factor);
    }
  });
}

}  // namespace
