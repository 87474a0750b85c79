// Linears in fixed point, part of kernels.h for processors that multiply 16-bit integers faster
// than bf16: those with AVX2 alone, where a pair of bf16 is two products in float32 and two
// conversions, and Intel's with VNNI but without AMX, which start VPDPWSSD twice a cycle and
// VDPBF16PS once in two.
//
// 64 inputs of a row, and of an output's weights, share a scale: a power of two such that the norm
// of the 64 integers lies from 2^14 to 2^15. Two such norms multiply to less than 2^31: sums within
// a group fit 32 bits and are exact; groups are added up in float32 in their order. An integer is
// at most half of one off. Of 64 values of one size, each is then some 2^12, with an error of 2^-13,
// where bf16 rounds by up to 2^-9; beside a value a hundred times as large, it is some 2^-9, too.
//
// Rows lie as [inputs / 64, rows, 64], their scales as [inputs / 64, rows]: a row is a constant
// distance from the next, which the instructions that multiply it hold themselves.

using fixed = int16_t;

constexpr int64_t SHARED = 64;  // inputs that share a scale

INLINE int64_t scales_for(int64_t inputs) { return (inputs + SHARED - 1) / SHARED; }

#if WIDE
INLINE ints nearest(floats value) { return (ints)_mm512_cvtps_epi32((__m512)value); }
INLINE int32_t largest(ints value) { return _mm512_reduce_max_epi32((__m512i)value); }
INLINE ints widen_bytes(const uint8_t* at) {
  return (ints)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)at));
}
#else
INLINE ints nearest(floats value) { return (ints)_mm256_cvtps_epi32((__m256)value); }
INLINE int32_t largest(ints value) {
  __m128i four = _mm_max_epi32(_mm256_castsi256_si128((__m256i)value),
                               _mm256_extracti128_si256((__m256i)value, 1));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return std::max(_mm_cvtsi128_si32(four), _mm_extract_epi32(four, 1));
}
INLINE ints widen_bytes(const uint8_t* at) {
  return (ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)at));
}
#endif

INLINE floats power_of_two(ints exponent) { return (floats)(exponent << 23); }  // biased

// From the largest magnitude of 64 values: what makes them about 1, so that squares stay in range.
INLINE ints exponent_of(floats largest) {
  ints own = (ints)largest >> 23;
  own = own > 24 ? own : ints{} + 24;
  return own < 252 ? own : ints{} + 252;
}
INLINE floats unit_for(ints exponent) { return power_of_two(253 - exponent); }

// The exponent (biased) of their scale, given the sum of the squares of the values times unit_for;
// 255 where one is no number.
INLINE ints scale_for(floats largest, ints exponent, floats squares) {
  const ints half = (((ints)squares >> 23) - 125) >> 1;  // the norm is less than 2^half
  const ints scale = exponent - 14 + (half > 0 ? half : ints{});
  return (ints)largest >= 0x7f800000 ? ints{} + 255 : scale;
}

INLINE floats to_integers(ints scale) { return power_of_two(254 - scale); }

INLINE floats magnitude(floats value) { return (floats)((ints)value & 0x7fffffff); }

// One row [inputs], and a scale for each 64; these are `stride` rows apart.
INLINE void fix_row(const bf16* from, int64_t inputs, fixed* to, float* scales, int64_t stride) {
  for (int64_t k = 0; k < inputs; k += SHARED, to += stride * SHARED, scales += stride) {
    const int64_t vectors = std::min(SHARED, inputs - k) / LANES;
    floats value[SHARED / LANES], squares = {};
    ints most = {};
    for (int64_t i = 0; i < vectors; i++) {
      value[i] = widen(from + k + i * LANES);
      const ints bits = (ints)magnitude(value[i]);
      most = bits > most ? bits : most;
    }
    const floats all = (floats)(ints{} + largest(most));
    const ints exponent = exponent_of(all);
    const floats unit = unit_for(exponent);
    for (int64_t i = 0; i < vectors; i++) squares += value[i] * unit * (value[i] * unit);
    const ints scale = scale_for(all, exponent, splat(sum(squares)));
    *scales = scale[0] == 255 ? NAN : power_of_two(scale)[0];
    const floats factor = to_integers(scale);
    for (int64_t i = 0; i < vectors; i++)
      *(halves_at*)(to + i * LANES) = __builtin_convertvector(nearest(value[i] * factor), halves);
  }
}

// Weights as in `pack`, with their scales' exponents uint8 [panels, inputs / 64, 32].
static void pack_fixed(fixed* to, uint8_t* exponents, int64_t inputs, int64_t first, int64_t count,
                       const bf16* from, int64_t row_stride, int64_t column_stride, int threads) {
  const int64_t begin = first / PANEL, end = (first + count + PANEL - 1) / PANEL;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t panel = begin; panel < end; panel++) {
    const int64_t low = std::max(first, panel * PANEL) - panel * PANEL;
    const int64_t high = std::min(first + count, (panel + 1) * PANEL) - panel * PANEL;
    const bf16* source = from + (panel * PANEL - first) * row_stride;
    alignas(64) bf16 stage[SHARED * PANEL] = {};
    for (int64_t k = 0; k < inputs; k += SHARED) {
      const int64_t width = std::min(SHARED, inputs - k);
      if (column_stride == 1) {
        for (int64_t o = low; o < high; o++)
          for (int64_t i = 0; i < width; i++) stage[i * PANEL + o] = source[o * row_stride + k + i];
      } else {
        for (int64_t i = 0; i < width; i++)
          for (int64_t o = low; o < high; o++)
            stage[i * PANEL + o] = source[o * row_stride + (k + i) * column_stride];
      }
      for (int64_t part = 0; part < PANEL; part += LANES) {
        const bf16* column = stage + part;
        ints most = {};
        for (int64_t i = 0; i < width; i++) {
          const ints bits = (ints)magnitude(widen(column + i * PANEL));
          most = bits > most ? bits : most;
        }
        const ints exponent = exponent_of((floats)most);
        const floats unit = unit_for(exponent);
        floats squares = {};
        for (int64_t i = 0; i < width; i++) {
          const floats value = widen(column + i * PANEL) * unit;
          squares += value * value;
        }
        const ints scale = scale_for((floats)most, exponent, squares);
        const floats factor = to_integers(scale);
        // The outputs of others, which are packed at another time, keep what they have.
        const int64_t own = std::max(part, low), stop = std::min(part + LANES, high);
        uint8_t* own_exponents = exponents + (panel * scales_for(inputs) + k / SHARED) * PANEL;
        for (int64_t o = own; o < stop; o++) own_exponents[o] = (uint8_t)scale[o - part];
        fixed* out = to + (panel * inputs + k) * PANEL + part * 2;
        for (int64_t i = 0; i < width; i += 2, out += 2 * PANEL) {
          const floats even = widen(column + i * PANEL), odd = widen(column + (i + 1) * PANEL);
          const ints pairs = (nearest(even * factor) & 0xffff) | nearest(odd * factor) << 16;
          if (stop - own == LANES)
            *(ints_at*)out = pairs;
          else
            for (int64_t o = own; o < stop; o++) ((int32_t*)out)[o - part] = pairs[o - part];
        }
      }
    }
  }
}

// The scales of a panel's next 64 inputs, or its last 32. Two groups of 32 come to the larger of
// theirs: exactly, unless these are over eight octaves apart; then the smaller values are nil.
struct SharedScales {
  alignas(32) uint8_t exponents[PANEL];   // of the integers' scales
  alignas(32) uint8_t octaves[2][PANEL];  // by which each group is less

  __attribute__((always_inline)) SharedScales(const uint8_t* scales, int64_t groups) {
    const __m256i first = _mm256_loadu_si256((const __m256i*)scales);
    const __m256i second =
        groups > 1 ? _mm256_loadu_si256((const __m256i*)(scales + GROUP)) : first;
    const __m256i most = _mm256_max_epu8(first, second);
    _mm256_store_si256((__m256i*)exponents, _mm256_sub_epi8(most, _mm256_set1_epi8(9)));
    _mm256_store_si256((__m256i*)octaves[0], _mm256_sub_epi8(most, first));
    _mm256_store_si256((__m256i*)octaves[1], _mm256_sub_epi8(most, second));
  }
};

// decode<I>: of 16-bit words as a unit of MXFP4 has them, the I-th nibbles' values of FP4 E2M1,
// times 2^UNIT.
#if WIDE
constexpr int UNIT = 9;  // with room for eight octaves less

// Twice: a look-up takes the low five bits of its index.
alignas(64) static const int16_t FP4_FIXED[32] = {
    0, 256, 512, 768, 1024, 1536, 2048, 3072, 0, -256, -512, -768, -1024, -1536, -2048, -3072,
    0, 256, 512, 768, 1024, 1536, 2048, 3072, 0, -256, -512, -768, -1024, -1536, -2048, -3072};

template <int I>
INLINE ints decode(ints words) {
  const __m512i index = _mm512_srli_epi16((__m512i)words, 4 * I);
  return (ints)_mm512_permutexvar_epi16(index, _mm512_load_si512(FP4_FIXED));
}

// Brings values of the outputs whose octaves these are to a common scale.
struct Lowered {
  __m512i shift;
  __mmask32 kept;

  __attribute__((always_inline)) Lowered(const uint8_t* octaves) {
    const __m512i bytes = _mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)octaves));
    shift = _mm512_srli_epi16(_mm512_shuffle_epi8(bytes, _mm512_load_si512(SPREAD)), 8);
    kept = _mm512_cmple_epu16_mask(shift, _mm512_set1_epi16(8));
  }

  __attribute__((always_inline)) ints operator()(ints values) const {
    return (ints)_mm512_maskz_srav_epi16(kept, (__m512i)values, shift);
  }
};
#else
constexpr int UNIT = 10;

// The high bytes of values whose low bytes are nil.
alignas(32) static const int8_t FP4_FIXED[32] = {
    0, 2, 4, 6, 8, 12, 16, 24, 0, -2, -4, -6, -8, -12, -16, -24,
    0, 2, 4, 6, 8, 12, 16, 24, 0, -2, -4, -6, -8, -12, -16, -24};

template <int I>
INLINE ints decode(ints words) {
  ints index = words;
  if (I < 2) index = (ints)_mm256_slli_epi16((__m256i)words, 8 - 4 * I);
  if (I == 3) index = (ints)_mm256_srli_epi16((__m256i)words, 4);
  index &= 0x0f000f00;
  return (ints)_mm256_shuffle_epi8(*(const __m256i*)FP4_FIXED, (__m256i)index);
}

struct Lowered {
  __m256i factor;

  __attribute__((always_inline)) Lowered(const uint8_t* octaves) {
    const ints shift = widen_bytes(octaves);
    const ints power = ((ints{} + (1 << 14)) >> shift) & (shift <= 8);
    factor = (__m256i)(power | power << 16);
  }

  __attribute__((always_inline)) ints operator()(ints values) const {
    return (ints)_mm256_mulhrs_epi16((__m256i)values, factor);  // (values · factor) >> 15
  }
};
#endif

// A panel's next `width` inputs (a multiple of 32) from MXFP4 to integers and their exponents.
INLINE void unpack_fixed(const uint8_t* codes, const uint8_t* scales, int64_t width, fixed* to,
                         uint8_t* exponents) {
  constexpr int HALF = VECTORS / 2;  // vectors of 16 outputs
  for (int64_t k = 0; k < width; k += SHARED, scales += 2 * GROUP, exponents += PANEL) {
    const int64_t groups = std::min(SHARED, width - k) / GROUP;
    const SharedScales shared(scales, groups);
    memcpy(exponents, shared.exponents, PANEL);
    for (int64_t group = 0; group < groups; group++)
      for (int part = 0; part < HALF; part++) {
        const uint8_t* octaves = shared.octaves[group] + part * LANES;
        const Lowered low(octaves), high(octaves + 16);
        const uint8_t* words = codes + group * 512 + part * 4 * LANES;
        fixed* out = to + group * GROUP * PANEL + part * 2 * LANES;
#pragma GCC unroll 4
        for (int unit = 0; unit < 8; unit++, words += 64, out += 4 * PANEL) {
          const ints four = load_pairs(words);
          *(ints_at*)out = low(decode<0>(four));
          *(ints_at*)(out + PANEL) = high(decode<1>(four));
          *(ints_at*)(out + 2 * PANEL) = low(decode<2>(four));
          *(ints_at*)(out + 3 * PANEL) = high(decode<3>(four));
        }
      }
    codes += groups * 512;
    to += groups * GROUP * PANEL;
  }
}

// acc + the products of weights and the pair of integers.
INLINE ints dot_pairs(ints acc, ints weights, const int32_t* pair) {
#if WIDE
  // Each product loads its pair: twice as fast as sharing one that is in a register, which is what
  // compilers make of intrinsics.
  asm("vpdpwssd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(weights), "m"(*pair));
#else
  // Not intrinsics, whose sums GCC would take in another order, with all products on the stack.
  const ints both = ints{} + *pair;
  ints product;
  asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0"
      : "+x"(acc), "=&x"(product)
      : "x"(weights), "x"(both));
#endif
  return acc;
}

// acc [COUNT, 32] += the sums of 64 inputs (or 32), in integers, times their scales.
template <int COUNT>
INLINE void add_scaled(floats (&acc)[COUNT][VECTORS], const ints (&sums)[COUNT][VECTORS],
                       const uint8_t* exponents, const float* scales) {
#pragma GCC unroll 4
  for (int v = 0; v < VECTORS; v++) {
    const floats factor = power_of_two(widen_bytes(exponents + v * LANES));
#pragma GCC unroll 12
    for (int r = 0; r < COUNT; r++)
      acc[r][v] += __builtin_convertvector(sums[r][v], floats) * (factor * scales[r]);
  }
}

// c [COUNT, 32] += rows, which are some of `all`, times a panel's next `inputs`, a multiple of 32.
// Meanwhile what is `wanted` next is fetched, `step` bytes (at most 128) with each two inputs.
template <int COUNT, bool FETCH>
INLINE void fixed_times_panel(const fixed* rows, const float* scales, int64_t all,
                              const fixed* panel, const uint8_t* exponents, int64_t inputs,
                              const char* wanted, int64_t step, float* c) {
  for (; inputs > 0; inputs -= SHARED) {
    ints acc[COUNT][VECTORS] = {};
    const fixed *a = rows, *end = a + std::min(SHARED, inputs);
    for (; a < end; a += 2, panel += 2 * PANEL) {
      ints weights[VECTORS];
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) weights[v] = load_pairs(panel + v * 2 * LANES);
      if (FETCH) {
        __builtin_prefetch(wanted);
        __builtin_prefetch(wanted + 64);
        wanted += step;
      }
#pragma GCC unroll 12
      for (int r = 0; r < COUNT; r++) {
        const auto* pair = (const int32_t*)(a + r * SHARED);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) acc[r][v] = dot_pairs(acc[r][v], weights[v], pair);
      }
    }
    floats sums[COUNT][VECTORS];
#pragma GCC unroll 12
    for (int r = 0; r < COUNT; r++)
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) sums[r][v] = load(c + r * PANEL + v * LANES);
    add_scaled<COUNT>(sums, acc, exponents, scales);
#pragma GCC unroll 12
    for (int r = 0; r < COUNT; r++)
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) store(c + r * PANEL + v * LANES, sums[r][v]);
    rows += all * SHARED;
    scales += all;
    exponents += PANEL;
  }
}

// The same for any count. The first two passes over the panel share in fetching `bytes`.
__attribute__((noinline)) static void fixed_block(const fixed* rows, const float* scales,
                                                  int64_t all, int64_t count, const fixed* panel,
                                                  const uint8_t* exponents, int64_t inputs,
                                                  const char* wanted, int64_t bytes, float* c) {
  const int64_t passes = (count + MOST_ROWS - 1) / MOST_ROWS;
  const int64_t each = (count + passes - 1) / passes;
  const int64_t fetching = std::min<int64_t>(2, passes), step = 2 * bytes / (inputs * fetching);
  for (int64_t pass = 0; pass < passes; pass++) {
    const int64_t row = pass * each;
    const auto multiply = [&](auto fetch) {
      with_constant<MOST_ROWS>(std::min(each, count - row), [&](auto constant) {
        fixed_times_panel<constant.value, fetch.value>(rows + row * SHARED, scales + row, all,
                                                       panel, exponents, inputs, wanted, step,
                                                       c + row * PANEL);
      });
    };
    if (pass < fetching)
      multiply(std::true_type());
    else
      multiply(std::false_type());
    wanted += step * inputs / 2;
  }
}

constexpr int64_t AHEAD = 4096;  // bytes of codes that are fetched early; measured

// c [COUNT, 32] = rows, which are some of `all`, times a panel of MXFP4, unpacked to registers: for
// so few rows, storing it takes longer than using it. Bit for bit what unpack_fixed would give.
template <int COUNT>
INLINE void few_times_mxfp4(const fixed* rows, const float* row_scales, int64_t all,
                            const uint8_t* codes, const uint8_t* scales, int64_t inputs, float* c) {
  constexpr int HALF = VECTORS / 2;  // vectors of 16 outputs
  floats acc[COUNT][VECTORS] = {};
  for (; inputs > 0; inputs -= SHARED, scales += 2 * GROUP) {
    const int64_t groups = std::min(SHARED, inputs) / GROUP;
    const SharedScales shared(scales, groups);
    ints sums[COUNT][VECTORS] = {};
    __builtin_prefetch(scales + AHEAD / 8);
    for (int64_t group = 0; group < groups; group++) {
      const fixed* a = rows + group * GROUP;
      ints own[COUNT][VECTORS] = {};
#pragma GCC unroll 8
      for (int unit = 0; unit < 8; unit++, codes += 64, a += 4) {
        __builtin_prefetch(codes + AHEAD);
#pragma GCC unroll 2
        for (int part = 0; part < HALF; part++) {
          const ints four = load_pairs(codes + part * 4 * LANES);
          const auto multiply = [&](auto constant) {
            constexpr int i = constant.value, v = i % 2 * HALF;
            const ints value = decode<i>(four);
#pragma GCC unroll 12
            for (int r = 0; r < COUNT; r++)
              own[r][v + part] = dot_pairs(own[r][v + part], value,
                                           (const int32_t*)(a + r * SHARED + i / 2 * 2));
          };
          multiply(std::integral_constant<int, 0>());
          multiply(std::integral_constant<int, 1>());
          multiply(std::integral_constant<int, 2>());
          multiply(std::integral_constant<int, 3>());
        }
      }
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) {
        const ints shift = widen_bytes(shared.octaves[group] + v * LANES);
#pragma GCC unroll 12
        for (int r = 0; r < COUNT; r++)
          sums[r][v] += (own[r][v] >> (shift + (UNIT - 9))) & (shift <= 8);
      }
    }
    add_scaled<COUNT>(acc, sums, shared.exponents, row_scales);
    rows += all * SHARED;
    row_scales += all;
  }
#pragma GCC unroll 12
  for (int r = 0; r < COUNT; r++)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) store(c + r * PANEL + v * LANES, acc[r][v]);
}

__attribute__((noinline)) static void few_by_mxfp4(const Rows& x, const uint8_t* codes,
                                                   const uint8_t* scales, int64_t inputs,
                                                   float* c) {
  with_constant<MOST_ROWS>(x.count, [&](auto count) {
    few_times_mxfp4<count.value>((const fixed*)x.data, x.scales, x.all, codes, scales, inputs, c);
  });
}

// rows_times_panels in fixed point.
template <int PANELS, typename Finish>
INLINE void fixed_times_panels(const Weight& weight, const int64_t (&index)[PANELS], const Rows& x,
                               const floats (&bias)[PANELS][VECTORS], float* scratch,
                               Finish& finish) {
  constexpr int64_t STEP = 128;  // inputs; of them and the next ones, all is in the nearest cache
  alignas(64) fixed unpacked[STEP * PANEL];
  uint8_t unpacked_exponents[STEP / SHARED * PANEL];
  const int64_t inputs = weight.inputs, sums = x.count * PANEL;
  const bool few = weight.mxfp4 && x.count <= MOST_ROWS;
  memset(scratch, 0, (size_t)(PANELS * sums) * 4);
  for (int p = 0; p < PANELS; p++) {
    if (few) {
      const int64_t at = index[p] * inputs;
      few_by_mxfp4(x, (const uint8_t*)weight.data + at * PANEL / 2, weight.scales + at, inputs,
                   scratch + p * sums);
      continue;
    }
    for (int64_t k = 0; k < inputs; k += STEP) {
      const int64_t width = std::min(STEP, inputs - k), at = index[p] * inputs + k;
      const int64_t bytes = width * PANEL * (weight.mxfp4 ? 1 : 4) / 2;
      const char* data = (const char*)weight.data + at * PANEL * (weight.mxfp4 ? 1 : 4) / 2;
      const fixed* panel = (const fixed*)data;
      const uint8_t* exponents =
          weight.scales + (index[p] * scales_for(inputs) + k / SHARED) * PANEL;
      if (weight.mxfp4) {
        unpack_fixed((const uint8_t*)data, weight.scales + at, width, unpacked,
                     unpacked_exponents);
        panel = unpacked;
        exponents = unpacked_exponents;
      }
      fixed_block((const fixed*)x.data + k * x.all, x.scales + k / SHARED * x.all, x.all, x.count,
                  panel, exponents, width, data + bytes, bytes, scratch + p * sums);
    }
  }
  for (int64_t r = 0; r < x.count; r++)
    finish_row<PANELS>(r, scratch + r * PANEL, sums, bias, finish);
}
