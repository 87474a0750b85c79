// The decoder's operations on a CPU, in bfloat16 and MXFP4: plain C functions, called by native.py.
//
// The bodies are in kernels.h and are compiled, on x86, once for AVX2 and once for AVX-512 with
// VNNI, both with linears in fixed point, and once for AVX-512 with BF16; AMX is used within the
// latter where there is one. On other architectures once, with the compiler's vectors.
// OpenMP comes from the runtime that torch has loaded: this library is not linked to one.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define INLINE static inline __attribute__((always_inline))

using bf16 = uint16_t;

// A weight [outputs, inputs]: panels of 32 outputs; within a panel the values of two inputs stand
// side by side, for all outputs: bf16 [panels, inputs / 2, 32, 2].
// MXFP4, by panel and group of 32 inputs: 512 bytes of codes, in 8 units of 32 16-bit words. The
// nibbles of a word, from the low one, belong to four vectors of bf16: two pairs of inputs, each
// for outputs 0 to 15 and 16 to 31. Scales: uint8 [panels, groups, 32].
// In fixed point (gemm_int16.h) 16-bit integers take the place of bf16, with scales uint8 [panels,
// inputs / 64, 32].
struct Weight {
  const void* data;
  const uint8_t* scales;  // or null
  const bf16* bias;       // [outputs] or null
  int64_t outputs, inputs, mxfp4;
};

constexpr int64_t PANEL = 32;  // outputs
constexpr int64_t GROUP = 32;  // inputs that share a scale in MXFP4
constexpr int64_t ROWS = 32;   // rows of a block

struct Swiglu {
  bool clamped;
  float limit, alpha;
};

static bool use_amx = false;

#if defined(__x86_64__)
#define WIDE 0
#define FIXED 1
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2")
namespace narrow {
#include "kernels.h"
}
#pragma GCC pop_options
#undef WIDE
#undef FIXED
#define WIDE 1
#define FIXED 0
#pragma GCC push_options
#pragma GCC target( \
    "avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16")
namespace wide {
#include "kernels.h"
}
#pragma GCC pop_options
#undef FIXED
#define FIXED 1
#pragma GCC push_options
#pragma GCC target( \
    "avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,amx-tile,amx-bf16")
namespace integers {
#include "kernels.h"
}
#pragma GCC pop_options
#else
#define WIDE 0
#define FIXED 0
namespace narrow {
#include "kernels.h"
}
#endif

// Which of the kernels run, as calls.py numbers them: 1 the narrow ones, 2 fixed point, 3 AVX-512
// with BF16, 4 with AMX too.
static int level = 1;

extern "C" int getp_has_level(int wanted) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  unsigned a, b, c, d;
  const bool wide = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                    __builtin_cpu_supports("avx512dq");
  const bool bfloat = __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 5));
  switch (wanted) {
    case 1: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case 2: return wide && __builtin_cpu_supports("avx512vnni");
    case 3: return wide && bfloat;
  }
  if (!wide || !bfloat || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
  if (!(d & (1u << 22)) || !(d & (1u << 24))) return 0;
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
  return wanted == 1;
#endif
}

// The fastest that this processor has, or 0.
extern "C" int getp_best_level() {
#if defined(__x86_64__)
  // Without AMX, Intel's processors multiply integers up to four times as fast as bf16; AMD's do
  // both at the same rate.
  if (!getp_has_level(4) && getp_has_level(2) && __builtin_cpu_is("intel")) return 2;
#endif
  for (int best = 4; best > 0; best--)
    if (getp_has_level(best)) return best;
  return 0;
}

extern "C" int getp_level() { return level; }

// Whether linears are in fixed point.
extern "C" int getp_fixed_point() {
#if defined(__x86_64__)
  return level == 1 || level == 2;
#else
  return 0;
#endif
}

extern "C" void getp_use_level(int wanted) {
  level = wanted;
  use_amx = wanted == 4;
}

#if defined(__x86_64__)
#define CALL(function, ...)                           \
  (level >= 3   ? wide::function(__VA_ARGS__)         \
   : level == 2 ? integers::function(__VA_ARGS__)     \
                : narrow::function(__VA_ARGS__))
#else
#define CALL(function, ...) narrow::function(__VA_ARGS__)
#endif

extern "C" {

void getp_pack(bf16* to, uint8_t* exponents, int64_t inputs, int64_t first, int64_t count,
               const bf16* from, int64_t row_stride, int64_t column_stride, int threads) {
  CALL(pack, to, exponents, inputs, first, count, from, row_stride, column_stride, threads);
}

void getp_pack_mxfp4(uint8_t* to, uint8_t* to_scales, int64_t inputs, int64_t first, int64_t count,
                     const uint8_t* codes, const uint8_t* scales, int64_t row_step, int threads) {
  CALL(pack_mxfp4, to, to_scales, inputs, first, count, codes, scales, row_step, threads);
}

void getp_linear(const Weight* weight, const bf16* x, int64_t rows, bf16* out, int threads) {
  CALL(linear, *weight, x, rows, out, threads);
}

void getp_add_rms_norm(const bf16* x, const bf16* delta, const bf16* weight, int64_t rows,
                       int64_t size, float eps, bf16* sum, bf16* normed, int threads) {
  CALL(add_rms_norm, x, delta, weight, rows, size, eps, sum, normed, threads);
}

void getp_rotate_and_write(const bf16* qkv, const float* cos_sin, bf16* kv, int64_t kv_half,
                           const int64_t* slots, const bf16* q_norm, const bf16* k_norm, float eps,
                           int64_t tokens, int64_t heads, int64_t kv_heads, int64_t head_dim,
                           bf16* query, int threads) {
  CALL(rotate_and_write, qkv, cos_sin, kv, kv_half, slots, q_norm, k_norm, eps, tokens, heads,
       kv_heads, head_dim, query, threads);
}

void getp_attention(const bf16* query, const bf16* kv, int64_t kv_half, const int32_t* table,
                    int64_t width, const int32_t* starts, const int32_t* seen, const bf16* sinks,
                    int64_t sequences, int64_t heads, int64_t kv_heads, int64_t head_dim,
                    int64_t block_size, int64_t window, bf16* out, int threads) {
  CALL(attention, query, kv, kv_half, table, width, starts, seen, sinks, sequences, heads, kv_heads,
       head_dim, block_size, window, out, threads);
}

void getp_gated_linear(const Weight* weight, const bf16* x, int64_t rows, int clamped, float limit,
                       float alpha, bf16* out, int threads) {
  CALL(gated_linear, *weight, x, rows, Swiglu{clamped != 0, limit, alpha}, out, threads);
}

void getp_route(const bf16* logits, int64_t rows, int64_t experts, int64_t top_k, int after,
                int normalize, int64_t* chosen, float* weights, int threads) {
  CALL(route, logits, rows, experts, top_k, after != 0, normalize != 0, chosen, weights, threads);
}

void getp_experts(const Weight* ups, const Weight* downs, int64_t count, const bf16* x,
                  int64_t tokens, const int64_t* chosen, const float* weights, int64_t top_k,
                  int clamped, float limit, float alpha, bf16* out, int threads) {
  CALL(experts, ups, downs, count, x, tokens, chosen, weights, top_k,
       Swiglu{clamped != 0, limit, alpha}, out, threads);
}

void getp_gather(const uint8_t* table, int64_t bytes, const int64_t* ids, int64_t count,
                 uint8_t* out) {
  for (int64_t i = 0; i < count; i++)
    memcpy(out + i * bytes, table + ids[i] * bytes, (size_t)bytes);
}

// A recorded call: the number of an operation, in the order of calls.py, and its arguments.
struct Call {
  int64_t op, arguments[16];
};

}

// Calls one of the functions above with arguments of its own types.
template <typename... T, size_t... I>
static void apply(void (*function)(T...), const int64_t* a, std::index_sequence<I...>) {
  const auto as = [](auto* type, int64_t bits) {
    using Type = std::remove_pointer_t<decltype(type)>;
    if constexpr (std::is_same_v<Type, float>) {
      const int32_t low = (int32_t)bits;
      float value;
      memcpy(&value, &low, 4);
      return value;
    } else {
      return (Type)bits;
    }
  };
  function(as((T*)nullptr, a[I])...);
}

template <typename... T>
static void apply(void (*function)(T...), const int64_t* arguments) {
  static_assert(sizeof...(T) <= 16);
  apply(function, arguments, std::index_sequence_for<T...>());
}

extern "C" void getp_replay(const Call* calls, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    const int64_t* a = calls[i].arguments;
    switch (calls[i].op) {
      case 0: apply(getp_linear, a); break;
      case 1: apply(getp_gated_linear, a); break;
      case 2: apply(getp_gather, a); break;
      case 3: apply(getp_add_rms_norm, a); break;
      case 4: apply(getp_rotate_and_write, a); break;
      case 5: apply(getp_attention, a); break;
      case 6: apply(getp_route, a); break;
      case 7: apply(getp_experts, a); break;
    }
  }
}
