// What the operations of recurrent layers share: the sequences of a step, and values of two dtypes.
#pragma once

#include "../gemm/panels.h"
#include "../token_ops.h"

namespace {

// The sequences of a step: their tokens are starts[i] to starts[i + 1], and their states are in
// row rows[i]. A sequence whose context consists of its new tokens begins without a state.
struct Sequences {
  const int64_t* rows;
  const int32_t *starts, *context_lens;
  int64_t count;

  int64_t first(int64_t i) const { return starts[i]; }
  int64_t tokens(int64_t i) const { return starts[i + 1] - starts[i]; }
  bool is_new(int64_t i) const { return tokens(i) == context_lens[i]; }
};

INLINE float load_value(const bf16* from) { return to_float(*from); }
INLINE float load_value(const float* from) { return *from; }

INLINE vec_f32 sigmoid(vec_f32 x) { return 1.0f / (1.0f + exponential(-x)); }

// a · b + c, rounded once wherever it is compiled: results must not depend on how a sequence is cut.
INLINE vec_f32 multiply_add(vec_f32 a, vec_f32 b, vec_f32 c) {
#if VECTOR_BITS == 512
  return (vec_f32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif VECTOR_BITS == 256
  return (vec_f32)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  vec_f32 result;
  for (int i = 0; i < LANES; i++) result[i] = std::fma(a[i], b[i], c[i]);
  return result;
#endif
}

}  // namespace
