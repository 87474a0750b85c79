// The kernels' bodies, included once for each instruction set (WIDE: AVX-512; with BF16, or FIXED:
// linears in integers of 16 bits).
// Vectors are GCC's and of one register: it keeps longer ones in memory.

constexpr int LANES = WIDE ? 16 : FIXED ? 8 : 4;
constexpr int VECTORS = PANEL / LANES;  // of a panel's outputs

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));    // or bf16 in pairs
typedef int16_t halves __attribute__((vector_size(2 * LANES)));  // bf16
typedef float floats_at __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ints_at __attribute__((vector_size(4 * LANES), aligned(1), may_alias));
typedef int16_t halves_at __attribute__((vector_size(2 * LANES), aligned(1), may_alias));

INLINE floats load(const float* at) { return *(const floats_at*)at; }
INLINE void store(float* at, floats value) { *(floats_at*)at = value; }
INLINE ints load_pairs(const void* at) { return *(const ints_at*)at; }
// A loaded vector that stays in its register: GCC would load it again for each use.
INLINE ints held(ints value) {
#if WIDE
  asm("" : "+v"(value));
#endif
  return value;
}

INLINE floats splat(float value) { return value - floats{}; }

INLINE floats widen(const bf16* at) {
#if WIDE
  return (floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)at)), 16);
#elif FIXED
  return (floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)at)), 16);
#else
  typedef uint16_t unsigned_halves __attribute__((vector_size(2 * LANES)));
  const halves narrow = *(const halves_at*)at;
  return (floats)(__builtin_convertvector((unsigned_halves)narrow, ints) << 16);
#endif
}

INLINE float widen_one(bf16 value) {
  uint32_t bits = (uint32_t)value << 16;
  float wide;
  memcpy(&wide, &bits, 4);
  return wide;
}

INLINE bf16 narrow_one(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return (bf16)((bits >> 16) | 0x40);
  return (bf16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // to nearest, ties to even
}

INLINE void narrow(bf16* at, floats value) {
#if WIDE && !FIXED
  *(halves_at*)at = (halves)_mm512_cvtneps_pbh((__m512)value);
#else
  const ints bits = (ints)value;
  const ints even = bits + 0x7fff + ((bits >> 16) & 1);
  const ints quiet = bits | 0x400000;
  const ints is_nan = (bits & 0x7fffffff) > 0x7f800000;
  const ints chosen = ((is_nan & quiet) | (~is_nan & even)) >> 16;
  *(halves_at*)at = __builtin_convertvector(chosen, halves);
#endif
}

INLINE float sum(floats value) {
#if WIDE
  return _mm512_reduce_add_ps((__m512)value);
#elif FIXED
  __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)value),
                           _mm256_extractf128_ps((__m256)value, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return four[0] + four[1];
#else
  float total = 0;
  for (int i = 0; i < LANES; i++) total += value[i];
  return total;
#endif
}

INLINE float largest(floats value) {
#if WIDE
  return _mm512_reduce_max_ps((__m512)value);
#elif FIXED
  __m128 four = _mm_max_ps(_mm256_castps256_ps128((__m256)value),
                           _mm256_extractf128_ps((__m256)value, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return std::max(four[0], four[1]);
#else
  float most = value[0];
  for (int i = 1; i < LANES; i++) most = std::max(most, value[i]);
  return most;
#endif
}

// acc + the products of two bf16 pairs a lane.
INLINE floats dot(floats acc, ints a, ints b) {
#if WIDE && !FIXED
  return (floats)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
  const int32_t high = (int32_t)0xffff0000;
  acc += (floats)(a << 16) * (floats)(b << 16);
  acc += (floats)(a & high) * (floats)(b & high);
  return acc;
#endif
}

// e to the power of x: 2^n times a polynomial (Taylor's, of degree 6, on half an octave each side:
// relative error below 2e-7).
INLINE floats exponential(floats x) {
  x = x < -87.0f ? splat(-87.0f) : x;
  x = x > 88.0f ? splat(88.0f) : x;
  const floats scaled = x * 1.44269504088896f;
  const floats shifted = scaled + 12582912.0f;  // 1.5 · 2²³: rounds to an integer
  const ints n = (ints)shifted - 0x4b400000;
  const floats rest = (scaled - (shifted - 12582912.0f)) * 0.693147180559945f;
  floats p = rest * (1.0f / 720) + (1.0f / 120);
  p = p * rest + (1.0f / 24);
  p = p * rest + (1.0f / 6);
  p = p * rest + 0.5f;
  p = p * rest + 1.0f;
  p = p * rest + 1.0f;
  return (floats)((ints)p + (n << 23));
}

INLINE floats activate(floats gate, floats up, Swiglu how) {
  if (!how.clamped) return gate / (1.0f + exponential(-gate)) * up;
  gate = gate > how.limit ? splat(how.limit) : gate;
  up = up > how.limit ? splat(how.limit) : up;
  up = up < -how.limit ? splat(-how.limit) : up;
  return gate / (1.0f + exponential(-how.alpha * gate)) * (up + 1.0f);
}

// ---- Matrix multiplication: c [count, 32] = a [count, inputs] times one panel ----

#if WIDE
constexpr int MOST_ROWS = 12;  // that share one pass over a panel; their sums stay in registers
#else
constexpr int MOST_ROWS = 2;
#endif

template <int COUNT>
INLINE void rows_times_panel(const bf16* a, int64_t stride, const bf16* panel, int64_t inputs,
                             float* c, bool more) {
  floats acc[COUNT][VECTORS] = {};
  if (more)
    for (int r = 0; r < COUNT; r++)
      for (int v = 0; v < VECTORS; v++) acc[r][v] = load(c + r * PANEL + v * LANES);
  for (int64_t k = 0; k < inputs; k += 2) {
    ints weights[VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; v++)
      weights[v] = held(load_pairs(panel + k * PANEL + v * 2 * LANES));
    __builtin_prefetch(panel + k * PANEL + 2048);
    __builtin_prefetch(panel + k * PANEL + 2048 + PANEL);
#pragma GCC unroll 12
    for (int r = 0; r < COUNT; r++) {
      int32_t pair;
      memcpy(&pair, a + r * stride + k, 4);
      const ints both = held(pair - ints{});
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; v++) acc[r][v] = dot(acc[r][v], both, weights[v]);
    }
  }
  for (int r = 0; r < COUNT; r++)
    for (int v = 0; v < VECTORS; v++) store(c + r * PANEL + v * LANES, acc[r][v]);
}

// Calls `f` with `count`, from 1 to MOST, as a constant.
template <int MOST, typename F>
INLINE void with_constant(int64_t count, F f) {
  if constexpr (MOST > 1) {
    if (count < MOST) return with_constant<MOST - 1>(count, f);
  }
  f(std::integral_constant<int, MOST>());
}

__attribute__((noinline)) static void dot_block(const bf16* a, int64_t stride, int64_t count,
                                                const bf16* panel, int64_t inputs, float* c,
                                                bool more) {
  const int64_t passes = (count + MOST_ROWS - 1) / MOST_ROWS;
  const int64_t each = (count + passes - 1) / passes;
  for (int64_t row = 0; row < count; row += each) {
    with_constant<MOST_ROWS>(std::min(each, count - row), [&](auto constant) {
      rows_times_panel<constant.value>(a + row * stride, stride, panel, inputs, c + row * PANEL,
                                       more);
    });
  }
}

#if WIDE
// The sixteen values of FP4 E2M1 as bf16, less the bias of a scale's exponent (127 << 7), twice: a
// look-up takes the low five bits of its index. Zero is 2^-60: next to any other value nil, and its
// exponent has room for a scale to be added.
alignas(64) static const uint16_t FP4[32] = {
    0xe200, 0xff80, 0x0000, 0x0040, 0x0080, 0x00c0, 0x0100, 0x0140,
    0x6200, 0x7f80, 0x8000, 0x8040, 0x8080, 0x80c0, 0x8100, 0x8140,
    0xe200, 0xff80, 0x0000, 0x0040, 0x0080, 0x00c0, 0x0100, 0x0140,
    0x6200, 0x7f80, 0x8000, 0x8040, 0x8080, 0x80c0, 0x8100, 0x8140};
// Of a lane's copy of 16 bytes, those of its four outputs to the high halves of two words each.
#define TO_WORDS(a) 0x80, a, 0x80, a, 0x80, a + 1, 0x80, a + 1, 0x80, a + 2, 0x80, a + 2, 0x80, a + 3, 0x80, a + 3
alignas(64) static const uint8_t SPREAD[64] = {TO_WORDS(0), TO_WORDS(4), TO_WORDS(8), TO_WORDS(12)};
#undef TO_WORDS
#endif

// A panel's 32 inputs from MXFP4 to bf16. Scales are added to the exponents, which stay in bf16's
// range: small scales are raised in pack_mxfp4, large ones refused in packed.py.
// wanted: what will be, fetched with each of the 8 units (or null).
INLINE void unpack_group(const uint8_t* codes, const uint8_t* scales, bf16* to,
                         [[maybe_unused]] const char* wanted = nullptr) {
#if WIDE
  const __m512i table = _mm512_load_si512(FP4);
  const __m512i spread = _mm512_load_si512(SPREAD);
  __m512i shift[2];
  for (int half = 0; half < 2; half++) {
    const __m128i own = _mm_loadu_si128((const __m128i*)(scales + half * 16));
    const __m512i high = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(own), spread);
    shift[half] = _mm512_srli_epi16(high, 1);
  }
#pragma GCC unroll 8
  for (int unit = 0; unit < 8; unit++) {
    if (wanted) __builtin_prefetch(wanted + unit * 64, 0, 2);
    __m512i words = _mm512_loadu_si512(codes + unit * 64);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      const __m512i value = _mm512_permutexvar_epi16(words, table);
      _mm512_storeu_si512(to + (unit * 4 + i) * 32, _mm512_add_epi16(value, shift[i & 1]));
      words = _mm512_srli_epi16(words, 4);
    }
  }
#else
  static const uint16_t magnitudes[8] = {0x0000, 0x3f00, 0x3f80, 0x3fc0,
                                         0x4000, 0x4040, 0x4080, 0x40c0};
  for (int unit = 0; unit < 8; unit++) {
    const uint16_t* words = (const uint16_t*)(codes + unit * 64);
    for (int i = 0; i < 4; i++) {
      bf16* out = to + (unit * 4 + i) * 32;
      for (int lane = 0; lane < 32; lane++) {
        const int code = words[lane] >> (4 * i) & 15;
        const int shift = (int)scales[(i & 1) * 16 + lane / 2] - 127;
        const int value = magnitudes[code & 7] + (code & 7 ? shift * 128 : 0);
        out[lane] = (bf16)(value | (code & 8) << 12);
      }
    }
  }
#endif
}

#if WIDE
struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_a_row[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0 to 3 hold sums, 4 and 5 rows of a, 6 and 7 the panel's two halves.
INLINE void configure_tiles(int64_t rows) {
  TileConfig config;
  for (int tile = 0; tile < 8; tile++) {
    config.bytes_a_row[tile] = 64;
    config.rows[tile] = tile < 6 ? (uint8_t)rows : 16;
  }
  asm volatile("" : : "r"(&config) : "memory");  // the intrinsic does not say that it reads it
  _tile_loadconfig(&config);
}

// Up to 16 rows as the tiles load them: `stride` values from row to row, `step` from 32 inputs to
// the next.
struct TileRows {
  const bf16* data;
  int64_t stride, step;
};

// c [32, 32], or [16, 32] if there is no second: two tiles' rows times a panel, whose next 32
// inputs `next_panel` gives. From `wanted` on, `lines` cache lines are fetched with each 32 inputs:
// all at once would be more than a core can wait for, and loads that follow would wait. Intel's
// intrinsics do not say what memory they load: a barrier keeps stores before them.
template <bool TWO, typename NextPanel>
INLINE void multiply_tiles(const TileRows& first, const TileRows& second, int64_t inputs, float* c,
                           const char* wanted, int64_t lines, NextPanel next_panel) {
  alignas(64) char nowhere[16 * 64];
  const bf16 *a = first.data, *b = second.data;
  const int64_t a_stride = first.stride * 2, b_stride = second.stride * 2;
  _tile_zero(0);
  _tile_zero(1);
  if (TWO) _tile_zero(2);
  if (TWO) _tile_zero(3);
  for (int64_t k = 0; k < inputs; k += 32) {
    const bf16* panel = next_panel();
    for (int64_t line = 0; line < lines; line++, wanted += 64) __builtin_prefetch(wanted, 0, 2);
    asm volatile("" : : : "memory");
    _tile_loadd(6, panel, 128);
    _tile_loadd(4, a, a_stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, panel + 32, 128);
    _tile_dpbf16ps(1, 4, 7);
    a += first.step;
    if (TWO) {
      _tile_loadd(5, b, b_stride);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
      b += second.step;
    }
    // A store now and then: the first after a while without any takes a thousand cycles.
    if (k / 32 % 4 == 3) _tile_stored(6, nowhere, 64);
  }
  _tile_stored(0, c, 128);
  _tile_stored(1, c + 16, 128);
  if (TWO) _tile_stored(2, c + 16 * PANEL, 128);
  if (TWO) _tile_stored(3, c + 16 * PANEL + 16, 128);
}

// The same for a panel of MXFP4, unpacked a group ahead: `kept` inputs of it stay, one after the
// other.
template <bool TWO>
INLINE void multiply_mxfp4(const TileRows& first, const TileRows& second, int64_t inputs, float* c,
                           const uint8_t* codes, const uint8_t* scales, bf16* unpacked,
                           int64_t kept) {
  constexpr int64_t AHEAD = 256;  // inputs; measured
  const uint8_t* end = codes + inputs * PANEL / 2;
  bf16 *own = unpacked, *next = unpacked, *last = unpacked + kept * PANEL;
  const auto unpack = [&] {
    if (codes == end) return;
    unpack_group(codes, scales, next, (const char*)codes + AHEAD * PANEL / 2);
    codes += GROUP * PANEL / 2;
    scales += GROUP;
    next += GROUP * PANEL;
    if (next == last) next = unpacked;
  };
  unpack();
  multiply_tiles<TWO>(first, second, inputs, c, nullptr, 0, [&] {
    unpack();
    const bf16* panel = own;
    own += GROUP * PANEL;
    if (own == last) own = unpacked;
    return panel;
  });
}

// For one block of rows, which uses an input's part once: as little is kept as the first-level
// cache holds. Called, not inlined, so that there are registers enough (2 to 5% at up to 16
// tokens); many blocks lose more by calls, whose returns wait for the tiles' stores.
template <bool TWO>
__attribute__((noinline)) static void multiply_few_by_mxfp4(
    const TileRows first, const TileRows second, int64_t inputs, float* c, const uint8_t* codes,
    const uint8_t* scales, bf16* unpacked) {
  multiply_mxfp4<TWO>(first, second, inputs, c, codes, scales, unpacked, 4 * GROUP);
}
#endif

// Memory of a thread's own, kept from call to call.
template <typename T>
INLINE T* scratch_for(int64_t values) {
  static thread_local std::vector<T> scratch;
  if ((int64_t)scratch.size() < values + 64) scratch.resize((size_t)values + 64);
  return (T*)(((uintptr_t)scratch.data() + 63) & ~(uintptr_t)63);
}

// Rows that are multiplied: [count, inputs], one after the other or as `arranged_at` says. With
// scales they are integers, and some of `all` rows: see gemm_int16.h.
struct Rows {
  const bf16* data;
  int64_t count;
  bool arranged;
  const float* scales;
  int64_t all;
};

// Where row r of `count` has its inputs from k on (a multiple of 32) when they are arranged for the
// tiles: by 16 rows, in each the rows' next 32 inputs one after the other.
INLINE int64_t arranged_at(int64_t r, int64_t count, int64_t inputs, int64_t k) {
  const int64_t first = r / 16 * 16;
  return first * inputs + k * std::min<int64_t>(16, count - first) + r % 16 * 32;
}

#if WIDE
// Sixteen rows from `first` on, of which those beyond the last are whatever lies there: what is
// arranged runs on behind them; otherwise the last 16 rows are taken, some of them again.
INLINE TileRows tile_of(const Rows& x, int64_t first, int64_t inputs) {
  const int64_t own = std::min<int64_t>(16, x.count - first);
  if (x.arranged) return {x.data + first * inputs, 32, 32 * own};
  return {x.data + std::max<int64_t>(0, std::min(first, x.count - 16)) * inputs, inputs, 32};
}
#endif

// The biases of a panel's outputs, or zeros.
INLINE void bias_of(const Weight& weight, int64_t index, floats (&bias)[VECTORS]) {
  float values[PANEL] = {};
  const int64_t first = index * PANEL, own = std::min(PANEL, weight.outputs - first);
  for (int64_t i = 0; weight.bias && i < own; i++) values[i] = widen_one(weight.bias[first + i]);
  for (int v = 0; v < VECTORS; v++) bias[v] = load(values + v * LANES);
}

// Calls finish(r, sums) for a row's sums of each panel's outputs. c: the row's place in those of
// the first panel, `apart` values from that in the next.
template <int PANELS, typename Finish>
INLINE void finish_row(int64_t r, const float* c, int64_t apart,
                       const floats (&bias)[PANELS][VECTORS], Finish& finish) {
  floats sums[PANELS][VECTORS];
  for (int p = 0; p < PANELS; p++)
    for (int v = 0; v < VECTORS; v++) sums[p][v] = load(c + p * apart + v * LANES) + bias[p][v];
  finish(r, sums);
}

#if WIDE
// rows_times_panels on tiles, 32 rows at a time. The first of them fetches the panel a little ahead
// and unpacks MXFP4 for all.
template <int PANELS, typename Finish>
INLINE void tiles_times_panels(const Weight& weight, const int64_t (&index)[PANELS], const Rows& x,
                               const floats (&bias)[PANELS][VECTORS], float* scratch,
                               int64_t& tiles, Finish& finish) {
  constexpr int64_t BLOCK = ROWS * PANEL, AHEAD = 32;  // inputs; measured
  const int64_t inputs = weight.inputs, rows = std::min<int64_t>(16, x.count);
  if (tiles != rows) configure_tiles(tiles = rows);
  const int64_t panel_bytes = inputs * PANEL * (weight.mxfp4 ? 1 : 4) / 2;
  for (int64_t row = 0; row < x.count; row += ROWS) {
    const TileRows first = tile_of(x, row, inputs);
    const TileRows second = row + 16 < x.count ? tile_of(x, row + 16, inputs) : TileRows{};
    for (int p = 0; p < PANELS; p++) {
      const char* data = (const char*)weight.data + index[p] * panel_bytes;
      float* c = scratch + p * BLOCK;
      bf16* unpacked = (bf16*)(scratch + PANELS * BLOCK) + p * inputs * PANEL;
      const auto multiply = [&](auto two) {
        if (weight.mxfp4 && row == 0) {
          const uint8_t *codes = (const uint8_t*)data, *scales = weight.scales + index[p] * inputs;
          if (x.count > ROWS)
            multiply_mxfp4<two.value>(first, second, inputs, c, codes, scales, unpacked, inputs);
          else
            multiply_few_by_mxfp4<two.value>(first, second, inputs, c, codes, scales, unpacked);
          return;
        }
        const bf16* panel = weight.mxfp4 ? unpacked : (const bf16*)data;
        // Not a constant to the compiler, whose loop for one fetches too fast: 5 to 10% slower.
        int64_t lines = row ? 0 : 32;
        asm("" : "+r"(lines));
        multiply_tiles<two.value>(first, second, inputs, c, data + AHEAD * PANEL * 2, lines, [&] {
          panel += 32 * PANEL;
          return panel - 32 * PANEL;
        });
      };
      if (row + 16 < x.count)
        multiply(std::true_type());
      else
        multiply(std::false_type());
    }
    // Where the second tile's rows are the last sixteen, some were in the first: see tile_of.
    const int64_t end = std::min(x.count, row + ROWS);
    const int64_t over = x.arranged || x.count <= 16 ? 0 : -x.count & 15;
    const int64_t partial = x.count - (16 - over);
    for (int64_t r = row; r < end; r++) {
      const int64_t place = r - row + (over && r >= partial ? over : 0);
      finish_row<PANELS>(r, scratch + place * PANEL, BLOCK, bias, finish);
    }
  }
}
#endif

// Inputs that are taken at once without tiles: a panel's part of them stays in the first-level
// cache for all rows.
constexpr int64_t SPAN = 256;

#if FIXED
#include "gemm_int16.h"
#endif

// Memory of the calling thread's own for values that all threads use, one `which` beside another.
template <typename T>
INLINE T* shared_scratch(int which, int64_t values) {
  static thread_local std::vector<T> scratch[3];
  std::vector<T>& own = scratch[which];
  if ((int64_t)own.size() < values) own.resize((size_t)values);
  return own.data();
}

// Room for `count` rows in the form in which they are multiplied.
INLINE Rows room_for(int which, int64_t count, int64_t inputs) {
#if FIXED
  const int64_t scales = count * scales_for(inputs);
  return {shared_scratch<bf16>(which, scales * SHARED), count, false,
          shared_scratch<float>(which, scales), count};
#else
  // 512 values more, which are read beyond the last rows of an expert: see tile_of.
  return {shared_scratch<bf16>(which, count * inputs + 512), count, use_amx, nullptr, count};
#endif
}

// At most `most` rows from `first` on.
INLINE Rows rows_from(const Rows& x, int64_t first, int64_t most,
                      [[maybe_unused]] int64_t inputs) {
  const int64_t count = std::min(most, x.count - first);
#if FIXED
  return {x.data + first * SHARED, count, false, x.scales + first, x.all};
#else
  return {x.data + first * inputs, count, x.arranged, nullptr, count};
#endif
}

#if FIXED
// Called by all threads of a parallel region: x [rows.count, inputs] becomes integers.
INLINE void fix_rows(const bf16* x, const Rows& rows, int64_t inputs) {
#pragma omp for schedule(static)
  for (int64_t r = 0; r < rows.count; r++)
    fix_row(x + r * inputs, inputs, (fixed*)rows.data + r * SHARED, (float*)rows.scales + r,
            rows.all);
}
#endif

// Values of `scratch` that rows_times_panels needs for `rows` rows.
INLINE int64_t scratch_values(const Weight& weight, int64_t rows, int64_t panels) {
  if (!use_amx) return panels * rows * PANEL;
  const int64_t unpacked = weight.mxfp4 ? std::max(weight.inputs, 4 * GROUP) * PANEL / 2 : 0;
  return panels * (ROWS * PANEL + unpacked);
}

// x [rows, inputs] times one panel, or two whose sums belong together, plus their biases; `finish`
// is called for each row in turn, as finish_row says. A row's products are added up in the same
// order whatever the number of rows: a result does not depend on the batch.
template <int PANELS, typename Finish>
INLINE void rows_times_panels(const Weight& weight, const int64_t (&index)[PANELS], const Rows& x,
                              float* scratch, [[maybe_unused]] int64_t& tiles, Finish finish) {
  floats bias[PANELS][VECTORS];
  for (int p = 0; p < PANELS; p++) bias_of(weight, index[p], bias[p]);
#if FIXED
  return fixed_times_panels<PANELS>(weight, index, x, bias, scratch, finish);
#elif WIDE
  if (use_amx) return tiles_times_panels<PANELS>(weight, index, x, bias, scratch, tiles, finish);
#endif
  alignas(64) bf16 unpacked[SPAN * PANEL];
  const int64_t inputs = weight.inputs, apart = x.count * PANEL;
  const bool once = x.count <= ROWS && !weight.mxfp4;  // each input's part is used once
  const int64_t step = once ? inputs : x.count <= 4 * ROWS ? SPAN / 2 : SPAN;
  for (int p = 0; p < PANELS; p++)
    for (int64_t k = 0; k < inputs; k += step) {
      const int64_t width = std::min(step, inputs - k), at = index[p] * inputs + k;
      const bf16* panel = weight.mxfp4 ? unpacked : (const bf16*)weight.data + at * PANEL;
      for (int64_t i = 0; weight.mxfp4 && i < width; i += GROUP)
        unpack_group((const uint8_t*)weight.data + (at + i) * PANEL / 2, weight.scales + at + i,
                     unpacked + i * PANEL);
      for (int64_t row = 0; row < x.count; row += ROWS)
        dot_block(x.data + row * inputs + k, inputs, std::min(ROWS, x.count - row), panel, width,
                  scratch + p * apart + row * PANEL, k > 0);
    }
  for (int64_t r = 0; r < x.count; r++)
    finish_row<PANELS>(r, scratch + r * PANEL, apart, bias, finish);
}

INLINE void release_tiles([[maybe_unused]] int64_t tiles) {
#if WIDE
  if (tiles) _tile_release();
#endif
}

// A panel's `own` outputs of a row, or all of it.
INLINE void write_row(const floats (&sums)[VECTORS], bf16* out, int64_t own) {
  if (own >= PANEL) {
    for (int v = 0; v < VECTORS; v++) narrow(out + v * LANES, sums[v]);
  } else {
    for (int64_t i = 0; i < own; i++) out[i] = narrow_one(sums[i / LANES][i % LANES]);
  }
}

constexpr int64_t CACHE = 3 << 19;  // bytes, of the 2 MiB a core that processors with tiles have

// Of `rows`, those that are taken at once: they stay in a core's second-level cache beside a panel,
// and no part is much smaller than the others.
INLINE int64_t rows_at_once(int64_t rows, int64_t inputs) {
  const int64_t most = std::max<int64_t>(ROWS, (CACHE / (2 * inputs)) / ROWS * ROWS);
  rows = std::max<int64_t>(1, rows);  // a step in which no prompt ends has none for the head
  const int64_t parts = (rows + most - 1) / most;
  return ((rows + parts - 1) / parts + ROWS - 1) / ROWS * ROWS;
}

static void linear(const Weight& weight, const bf16* x, int64_t rows, bf16* out, int threads) {
  const int64_t inputs = weight.inputs, outputs = weight.outputs;
  const int64_t panels = (outputs + PANEL - 1) / PANEL;
  const int64_t most = rows_at_once(rows, inputs), spans = (rows + most - 1) / most;
  const int64_t items = panels * spans, chunk = std::max<int64_t>(1, items / (8 * threads));
  if (rows * outputs * inputs < 1 << 17) threads = 1;
  const Rows all = FIXED ? room_for(0, rows, inputs) : Rows{x, rows, false, nullptr, rows};
#pragma omp parallel num_threads(threads)
  {
#if FIXED
    fix_rows(x, all, inputs);
#endif
    float* scratch = scratch_for<float>(scratch_values(weight, most, 1));
    int64_t tiles = 0;
#pragma omp for schedule(dynamic, chunk) nowait
    for (int64_t item = 0; item < items; item++) {
      const int64_t index = item % panels, first = item / panels * most;
      const int64_t own = outputs - index * PANEL;
      bf16* to = out + first * outputs + index * PANEL;
      rows_times_panels<1>(
          weight, {index}, rows_from(all, first, most, inputs), scratch, tiles,
          [&](int64_t r, const floats(&sums)[1][VECTORS]) {
            write_row(sums[0], to + r * outputs, own);
          });
    }
    release_tiles(tiles);
  }
}

// One panel of gates and the panel of what they gate, for rows x [count, inputs]: out [count,
// outputs / 2], arranged as x is. The first half of the outputs are gates.
static void gated_block(const Weight& weight, int64_t index, const Rows& x, Swiglu how, bf16* out,
                        float* scratch, int64_t& tiles) {
  const int64_t size = weight.outputs / 2;
  rows_times_panels<2>(
      weight, {index, index + size / PANEL}, x, scratch, tiles,
      [&](int64_t r, const floats(&sums)[2][VECTORS]) {
        bf16* to = x.arranged ? out + arranged_at(r, x.count, size, index * PANEL)
                              : out + r * size + index * PANEL;
        for (int v = 0; v < VECTORS; v++)
          narrow(to + v * LANES, activate(sums[0][v], sums[1][v], how));
      });
}

static void gated_linear(const Weight& weight, const bf16* x, int64_t rows, Swiglu how, bf16* out,
                         int threads) {
  const int64_t inputs = weight.inputs, panels = weight.outputs / 2 / PANEL;
  const int64_t most = rows_at_once(rows, inputs), items = panels * ((rows + most - 1) / most);
  const int64_t chunk = std::max<int64_t>(1, items / (8 * threads));
  if (rows * weight.outputs * inputs < 1 << 17) threads = 1;
  const Rows all = FIXED ? room_for(0, rows, inputs) : Rows{x, rows, false, nullptr, rows};
#pragma omp parallel num_threads(threads)
  {
#if FIXED
    fix_rows(x, all, inputs);
#endif
    float* scratch = scratch_for<float>(scratch_values(weight, most, 2));
    int64_t tiles = 0;
#pragma omp for schedule(dynamic, chunk) nowait
    for (int64_t item = 0; item < items; item++) {
      const int64_t first = item / panels * most;
      gated_block(weight, item % panels, rows_from(all, first, most, inputs), how,
                  out + first * weight.outputs / 2, scratch, tiles);
    }
    release_tiles(tiles);
  }
}

// ---- Packing ----

static void pack(bf16* to, [[maybe_unused]] uint8_t* exponents, int64_t inputs, int64_t first,
                 int64_t count, const bf16* from, int64_t row_stride, int64_t column_stride,
                 int threads) {
#if FIXED
  return pack_fixed((fixed*)to, exponents, inputs, first, count, from, row_stride, column_stride,
                    threads);
#endif
  const int64_t begin = first / PANEL, end = (first + count + PANEL - 1) / PANEL;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t panel = begin; panel < end; panel++) {
    const int64_t low = std::max(first, panel * PANEL);
    const int64_t high = std::min(first + count, (panel + 1) * PANEL);
    bf16* mine = to + panel * PANEL * inputs;
    // In spans of inputs that fit the first-level cache, whichever way the source runs.
    for (int64_t span = 0; span < inputs; span += 128) {
      const int64_t stop = std::min(inputs, span + 128);
      if (column_stride == 1) {
        for (int64_t n = low; n < high; n++) {
          const bf16* row = from + (n - first) * row_stride;
          bf16* out = mine + (n - panel * PANEL) * 2;
          for (int64_t k = span; k < stop; k += 2) memcpy(out + k * PANEL, row + k, 4);
        }
      } else {
        for (int64_t k = span; k < stop; k++) {
          const bf16* column = from + k * column_stride;
          bf16* out = mine + (k & ~1) * PANEL + (k & 1);
          for (int64_t n = low; n < high; n++)
            out[(n - panel * PANEL) * 2] = column[(n - first) * row_stride];
        }
      }
    }
  }
}

// codes [count, inputs / 2] and scales [count, inputs / 32], each `row_step` rows from the next.
static void pack_mxfp4(uint8_t* to, uint8_t* to_scales, int64_t inputs, int64_t first,
                       int64_t count, const uint8_t* codes, const uint8_t* scales,
                       int64_t row_step, int threads) {
  const int64_t begin = first / PANEL, end = (first + count + PANEL - 1) / PANEL;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t panel = begin; panel < end; panel++) {
    const int64_t low = std::max(first, panel * PANEL);
    const int64_t high = std::min(first + count, (panel + 1) * PANEL);
    // Outputs o and o + 16 share a 32-bit place: four nibbles each, of the four inputs of a unit.
    uint32_t keep[16];
    const uint8_t* rows[PANEL];
    for (int64_t o = 0; o < PANEL; o++) {
      const int64_t n = panel * PANEL + o;
      rows[o] = n < low || n >= high ? nullptr : codes + (n - first) * row_step * inputs / 2;
    }
    for (int o = 0; o < 16; o++)
      keep[o] = (rows[o] ? 0 : 0x0f0f0f0f) | (rows[o + 16] ? 0 : 0xf0f0f0f0);
    for (int64_t group = 0; group < inputs / GROUP; group++) {
      uint16_t bytes[8][PANEL] = {};  // a unit's two bytes of each output
      for (int64_t o = 0; o < PANEL; o++) {
        if (!rows[o]) continue;
        uint16_t own[8];
        memcpy(own, rows[o] + group * 16, 16);
        for (int unit = 0; unit < 8; unit++) bytes[unit][o] = own[unit];
        const int64_t n = panel * PANEL + o - first;
        // Smaller ones would leave bf16's exponents; below 2^-60 they scale to nil.
        to_scales[panel * inputs + group * GROUP + o] =
            std::max<uint8_t>(scales[n * row_step * inputs / GROUP + group], 64);
      }
      uint32_t* words = (uint32_t*)(to + panel * PANEL * inputs / 2 + group * 512);
      for (int unit = 0; unit < 8; unit++, words += 16)
        for (int o = 0; o < 16; o++) {
          const uint32_t a = bytes[unit][o], b = bytes[unit][o + 16];
          const uint32_t low_half = (a & 0x0f0f) | (a >> 4 & 0x0f0f) << 16;
          const uint32_t high_half = (b & 0x0f0f) | (b >> 4 & 0x0f0f) << 16;
          words[o] = (words[o] & keep[o]) | low_half | high_half << 4;
        }
    }
  }
}

// ---- Norm, rotary, router ----

static void add_rms_norm(const bf16* x, const bf16* delta, const bf16* weight, int64_t rows,
                         int64_t size, float eps, bf16* out_sum, bf16* normed, int threads) {
  if (rows * size < 1 << 14) threads = 1;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < rows; row++) {
    const bf16* from = x + row * size;
    if (delta) {
      bf16* to = out_sum + row * size;
      for (int64_t i = 0; i < size; i += LANES)
        narrow(to + i, widen(from + i) + widen(delta + row * size + i));
      from = to;
    }
    floats squares = {};
    for (int64_t i = 0; i < size; i += LANES) {
      const floats value = widen(from + i);
      squares += value * value;
    }
    const float factor = 1.0f / std::sqrt(sum(squares) / (float)size + eps);
    for (int64_t i = 0; i < size; i += LANES)
      narrow(normed + row * size + i, widen(from + i) * factor * widen(weight + i));
  }
}

INLINE void rotate_head(const bf16* from, const bf16* norm, float eps, const float* cos,
                        const float* sin, int64_t head_dim, bf16* to) {
  float factor = 1;
  if (norm) {
    floats squares = {};
    for (int64_t i = 0; i < head_dim; i += LANES) {
      const floats value = widen(from + i);
      squares += value * value;
    }
    factor = 1.0f / std::sqrt(sum(squares) / (float)head_dim + eps);
  }
  const int64_t half = head_dim / 2;
  for (int64_t i = 0; i < half; i += LANES) {
    floats first = widen(from + i), second = widen(from + half + i);
    if (norm) {
      first = first * factor * widen(norm + i);
      second = second * factor * widen(norm + half + i);
    }
    narrow(to + i, first * load(cos + i) - second * load(sin + i));
    narrow(to + half + i, second * load(cos + i) + first * load(sin + i));
  }
}

static void rotate_and_write(const bf16* qkv, const float* cos_sin, bf16* kv, int64_t kv_half,
                             const int64_t* slots, const bf16* q_norm, const bf16* k_norm,
                             float eps, int64_t tokens, int64_t heads, int64_t kv_heads,
                             int64_t head_dim, bf16* query, int threads) {
  if (tokens * heads * head_dim < 1 << 13) threads = 1;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t token = 0; token < tokens; token++) {
    const bf16* from = qkv + token * (heads + 2 * kv_heads) * head_dim;
    const float *cos = cos_sin + token * head_dim, *sin = cos + head_dim / 2;
    for (int64_t head = 0; head < heads; head++, from += head_dim)
      rotate_head(from, q_norm, eps, cos, sin, head_dim,
                  query + (token * heads + head) * head_dim);
    bf16* to = kv + slots[token] * kv_heads * head_dim;
    for (int64_t head = 0; head < kv_heads; head++, from += head_dim)
      rotate_head(from, k_norm, eps, cos, sin, head_dim, to + head * head_dim);
    memcpy(to + kv_half, from, (size_t)(kv_heads * head_dim) * 2);
  }
}

static void route_row(const bf16* logits, int64_t experts, int64_t top_k, bool after,
                      bool normalize, float* values, int64_t* chosen, float* weights) {
  float top = -INFINITY, total = 0;
  for (int64_t e = 0; e < experts; e++) {
    values[e] = widen_one(logits[e]);
    top = std::max(top, values[e]);
  }
  if (!after)
    for (int64_t e = 0; e < experts; e++) total += std::exp(values[e] - top);
  float kept = 0;
  for (int64_t k = 0; k < top_k; k++) {
    const int64_t best = std::max_element(values, values + experts) - values;
    chosen[k] = best;
    weights[k] = std::exp(values[best] - top);
    kept += weights[k];
    values[best] = -INFINITY;
  }
  const float divisor = after || normalize ? kept : total;
  for (int64_t k = 0; k < top_k; k++) weights[k] /= divisor;
}

static void route(const bf16* logits, int64_t rows, int64_t experts, int64_t top_k, bool after,
                  bool normalize, int64_t* chosen, float* weights, int threads) {
  if (rows * experts < 1 << 11) threads = 1;
#pragma omp parallel num_threads(threads)
  {
    float* values = scratch_for<float>(experts);
#pragma omp for schedule(static) nowait
    for (int64_t row = 0; row < rows; row++)
      route_row(logits + row * experts, experts, top_k, after, normalize, values,
                chosen + row * top_k, weights + row * top_k);
  }
}

#include "attention.h"

// ---- Experts ----

// Pairs (token, rank) in order of their expert.
struct Grouped {
  std::vector<int64_t> starts, pairs;
};

static const Grouped& group_pairs(const int64_t* chosen, int64_t pairs, int64_t experts) {
  static thread_local Grouped grouped;
  grouped.starts.assign((size_t)experts + 1, 0);
  grouped.pairs.resize((size_t)pairs);
  for (int64_t i = 0; i < pairs; i++) grouped.starts[(size_t)chosen[i] + 1]++;
  for (int64_t e = 0; e < experts; e++) grouped.starts[(size_t)e + 1] += grouped.starts[(size_t)e];
  static thread_local std::vector<int64_t> next;
  next = grouped.starts;
  for (int64_t i = 0; i < pairs; i++) grouped.pairs[(size_t)next[(size_t)chosen[i]]++] = i;
  return grouped;
}

// What one thread does at a time: a panel (or a pair of them) of one expert, for a span of rows.
struct ExpertItem {
  int64_t expert, panel, first, last;
};

static const std::vector<ExpertItem>& expert_items(const Grouped& grouped, int64_t experts,
                                                   int64_t panels, int64_t most) {
  static thread_local std::vector<ExpertItem> items;
  items.clear();
  for (int64_t e = 0; e < experts; e++)
    for (int64_t first = grouped.starts[(size_t)e]; first < grouped.starts[(size_t)e + 1];
         first += most)
      for (int64_t panel = 0; panel < panels; panel++)
        items.push_back({e, panel, first, std::min(grouped.starts[(size_t)e + 1], first + most)});
  return items;
}

// One expert's rows of x in the order of its pairs, in the form in which they are multiplied.
static void gather_rows(const bf16* x, int64_t inputs, const int64_t* pairs, int64_t top_k,
                        const Rows& to) {
  for (int64_t r = 0; r < to.count; r++) {
    const bf16* from = x + pairs[r] / top_k * inputs;
#if FIXED
    fix_row(from, inputs, (fixed*)to.data + r * SHARED, (float*)to.scales + r, to.all);
#else
    if (!to.arranged) {
      memcpy((bf16*)to.data + r * inputs, from, (size_t)inputs * 2);
      continue;
    }
    for (int64_t k = 0; k < inputs; k += 32)
      memcpy((bf16*)to.data + arranged_at(r, to.count, inputs, k), from + k, 64);
#endif
  }
}

// x [tokens, inputs] → out [tokens, outputs]: each token's chosen experts [tokens, top_k] times
// their weights, added in the experts' order, so that a sum does not depend on who else is there.
static void experts(const Weight* ups, const Weight* downs, int64_t count, const bf16* x,
                    int64_t tokens, const int64_t* chosen, const float* weights, int64_t top_k,
                    Swiglu how, bf16* out, int threads) {
  const int64_t pairs = tokens * top_k, inputs = ups->inputs, size = ups->outputs / 2;
  const Grouped& grouped = group_pairs(chosen, pairs, count);
  const auto& items = expert_items(grouped, count, size / PANEL, rows_at_once(pairs, inputs));
  const int64_t total = (int64_t)items.size(), chunk = std::max<int64_t>(1, total / (16 * threads));
  const Rows gathered = room_for(0, pairs, inputs), inner_rows = room_for(1, pairs, size);
  // What comes from the gates: in its place at once, or bf16 on the way to integers.
  bf16* inner = FIXED ? shared_scratch<bf16>(2, pairs * size) : (bf16*)inner_rows.data;
  // Panels that share a pass over the rows, in a core's cache with their sums.
  const int64_t outputs = downs->outputs, panels = (outputs + PANEL - 1) / PANEL;
  const int64_t side_by_side = std::clamp<int64_t>(panels / (2 * threads), 1, 8);
  const int64_t most = std::max(rows_at_once(pairs, inputs), rows_at_once(pairs, size));
  const int64_t room =
      std::max(scratch_values(*ups, most, 2), scratch_values(*downs, most, 1));
#pragma omp parallel num_threads(threads)
  {
    float* scratch = scratch_for<float>(room + side_by_side * tokens * PANEL);
    int64_t tiles = 0;
#pragma omp for schedule(dynamic, 1)
    for (int64_t e = 0; e < count; e++) {
      const int64_t start = grouped.starts[(size_t)e], own = grouped.starts[(size_t)e + 1] - start;
      gather_rows(x, inputs, grouped.pairs.data() + start, top_k,
                  rows_from(gathered, start, own, inputs));
    }
#pragma omp for schedule(dynamic, chunk)
    for (int64_t i = 0; i < total; i++) {
      const ExpertItem item = items[(size_t)i];
      gated_block(ups[item.expert], item.panel,
                  rows_from(gathered, item.first, item.last - item.first, inputs), how,
                  inner + item.first * size, scratch, tiles);
    }
#if FIXED
    fix_rows(inner, inner_rows, size);
#endif
    float* sums = scratch + room;
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t begin = 0; begin < panels; begin += side_by_side) {
      const int64_t end = std::min(panels, begin + side_by_side);
      memset(sums, 0, (size_t)((end - begin) * tokens * PANEL) * 4);
      for (int64_t e = 0; e < count; e++) {
        const int64_t stop = grouped.starts[(size_t)e + 1];
        for (int64_t first = grouped.starts[(size_t)e]; first < stop; first += most) {
          const Rows rows = rows_from(inner_rows, first, std::min(most, stop - first), size);
          for (int64_t panel = begin; panel < end; panel++) {
            float* sum = sums + (panel - begin) * tokens * PANEL;
            rows_times_panels<1>(downs[e], {panel}, rows, scratch, tiles,
                                 [&](int64_t r, const floats(&own)[1][VECTORS]) {
                                   const int64_t pair = grouped.pairs[(size_t)(first + r)];
                                   float* to = sum + pair / top_k * PANEL;
                                   for (int v = 0; v < VECTORS; v++, to += LANES)
                                     store(to, load(to) + own[0][v] * weights[pair]);
                                 });
          }
        }
      }
      for (int64_t panel = begin; panel < end; panel++)
        for (int64_t token = 0; token < tokens; token++) {
          const float* sum = sums + ((panel - begin) * tokens + token) * PANEL;
          floats own[VECTORS];
          for (int v = 0; v < VECTORS; v++) own[v] = load(sum + v * LANES);
          write_row(own, out + token * outputs + panel * PANEL, outputs - panel * PANEL);
        }
    }
    release_tiles(tiles);
  }
}
