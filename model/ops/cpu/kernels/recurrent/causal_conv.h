// The causal convolution of recurrent layers, the norm and the gates of their outputs.
#pragma once

#include "sequences.h"

namespace {

constexpr int64_t MAX_CONV = 8;            // tokens of a convolution; native.py has the same number
constexpr int64_t CONV_CHANNELS = 512;     // of a piece
constexpr int64_t VALUES_PER_PIECE = 4096;

// The convolution of channels [begin, end) of one sequence; see causal_conv.
template <typename T>
void conv_sequence(const T* x, int64_t stride, const float* weight, int64_t channels,
                   int64_t kernel, T* state, bool is_new, int64_t tokens, int64_t begin,
                   int64_t end, T* out) {
  const int64_t before = kernel - 1;
  for (int64_t token = 0; token < tokens; token++) {
    const T* inputs[MAX_CONV];
    int64_t first = 0;  // the first input that exists
    for (int64_t j = 0; j < kernel; j++) {
      const int64_t at = token - before + j;
      inputs[j] = at >= 0 ? x + at * stride : state + (at + before) * channels;
      if (at < 0 && is_new) first = j + 1;
    }
    for (int64_t c = begin; c < end; c += LANES) {
      vec_f32 sum = {};
      for (int64_t j = first; j < kernel; j++)
        sum = multiply_add(load_values(inputs[j] + c), load(weight + j * channels + c), sum);
      store_values(out + token * channels + c, sum * sigmoid(sum));
    }
  }
  for (int64_t j = 0; j < before; j++) {
    const int64_t at = tokens - before + j;
    T* to = state + j * channels + begin;
    const size_t size = (size_t)(end - begin) * sizeof(T);
    if (at >= 0)
      memcpy(to, x + at * stride + begin, size);
    else if (is_new)
      memset(to, 0, size);
    else
      memmove(to, state + (at + before) * channels + begin, size);
  }
}

template <typename T>
void conv_all(const T* x, int64_t stride, const float* weight, int64_t channels, int64_t kernel,
              T* states, Sequences sequences, T* out, int threads) {
  const int64_t blocks = (channels + CONV_CHANNELS - 1) / CONV_CHANNELS;
  divide(threads, sequences.count * blocks, 1, [=](int64_t from, int64_t to) {
    for (int64_t item = from; item < to; item++) {
      const int64_t i = item / blocks, begin = item % blocks * CONV_CHANNELS;
      const int64_t first = sequences.first(i);
      if (!sequences.tokens(i)) continue;
      conv_sequence(x + first * stride, stride, weight, channels, kernel,
                    states + sequences.rows[i] * (kernel - 1) * channels, sequences.is_new(i),
                    sequences.tokens(i), begin, std::min(begin + CONV_CHANNELS, channels),
                    out + first * channels);
    }
  });
}

// x [tokens, stride], of which the first `channels` values count, weight [kernel, channels] →
// out [tokens, channels], the SiLU of the convolution. states [rows, kernel - 1, channels] have the
// inputs before a sequence's tokens, and get its last ones. x, states and out are bf16 or float.
void causal_conv(const void* x, int64_t stride, const float* weight, int64_t channels,
                 int64_t kernel, void* states, const int64_t* rows, const int32_t* starts,
                 const int32_t* context_lens, int64_t count, bool is_float, int64_t tokens,
                 void* out, int threads) {
  const Sequences sequences{rows, starts, context_lens, count};
  if (tokens * channels < 1 << 14) threads = 1;
  if (is_float)
    conv_all((const float*)x, stride, weight, channels, kernel, (float*)states, sequences,
             (float*)out, threads);
  else
    conv_all((const bf16*)x, stride, weight, channels, kernel, (bf16*)states, sequences,
             (bf16*)out, threads);
}

template <typename T>
void gated_norm_rows(const T* x, const T* gate, int64_t stride, const float* weight, int64_t tokens,
                     int64_t heads, int64_t size, float eps, T* out, int threads) {
  divide(threads, tokens, rows_per_piece(tokens, threads), [=](int64_t first, int64_t last) {
    for (int64_t head = first * heads; head < last * heads; head++) {
      const T* from = x + head * size;
      const T* by = gate + head / heads * stride + head % heads * size;
      const float factor = norm_factor(sum_of_squares(from, size), size, eps);
      for (int64_t i = 0; i < size; i += LANES) {
        const vec_f32 z = load_values(by + i), value = load_values(from + i) * factor;
        store_values(out + head * size + i, value * load(weight + i) * (z * sigmoid(z)));
      }
    }
  });
}

// x [tokens, heads, size], gate [tokens, stride] → RMSNorm of each head times SiLU of the gate.
void gated_norm(const void* x, const void* gate, int64_t stride, const float* weight,
                int64_t tokens, int64_t heads, int64_t size, float eps, bool is_float, void* out,
                int threads) {
  if (tokens * heads * size < 1 << 13) threads = 1;
  if (is_float)
    gated_norm_rows((const float*)x, (const float*)gate, stride, weight, tokens, heads, size, eps,
                    (float*)out, threads);
  else
    gated_norm_rows((const bf16*)x, (const bf16*)gate, stride, weight, tokens, heads, size, eps,
                    (bf16*)out, threads);
}

// x · sigmoid(gate), of `count` values, a multiple of 16
void output_gate(const bf16* x, const bf16* gate, int64_t count, bf16* out, int threads) {
  if (count < 1 << 13) threads = 1;
  divide(threads, count / LANES, VALUES_PER_PIECE / LANES, [=](int64_t first, int64_t last) {
    for (int64_t i = first * LANES; i < last * LANES; i += LANES)
      store_bf16(out + i, load_bf16(x + i) * sigmoid(load_bf16(gate + i)));
  });
}

}  // namespace
