// Linears in fixed point, part of kernels.h for AVX-512 with VNNI but without AMX: such processors
// multiply 16-bit integers up to four times as fast as bf16 (Intel's VPDPWSSD starts twice a cycle,
// VDPBF16PS once in two).
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
    const int64_t vectors = std::min(SHARED, inputs - k) / 16;
    floats value[4], squares = {};
    ints most = {};
    for (int64_t i = 0; i < vectors; i++) {
      value[i] = widen(from + k + i * 16);
      const ints bits = (ints)magnitude(value[i]);
      most = bits > most ? bits : most;
    }
    const floats largest = (floats)(ints{} + _mm512_reduce_max_epi32((__m512i)most));
    const ints exponent = exponent_of(largest);
    const floats unit = unit_for(exponent);
    for (int64_t i = 0; i < vectors; i++) squares += value[i] * unit * (value[i] * unit);
    const ints scale = scale_for(largest, exponent, splat(sum(squares)));
    *scales = scale[0] == 255 ? NAN : power_of_two(scale)[0];
    const floats factor = to_integers(scale);
    for (int64_t i = 0; i < vectors; i++)
      _mm256_storeu_si256((__m256i*)(to + i * 16),
                          _mm512_cvtepi32_epi16(_mm512_cvtps_epi32((__m512)(value[i] * factor))));
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
    const uint32_t own = (uint32_t)((1ull << high) - (1ull << low));
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
      for (int half = 0; half < 2; half++) {
        const bf16* column = stage + half * 16;
        const __mmask16 lanes = (__mmask16)(own >> (16 * half));
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
        _mm512_mask_cvtepi32_storeu_epi8(
            exponents + (panel * scales_for(inputs) + k / SHARED) * PANEL + half * 16, lanes,
            (__m512i)scale);
        fixed* out = to + (panel * inputs + k) * PANEL + half * 32;
        for (int64_t i = 0; i < width; i += 2, out += 2 * PANEL) {
          const floats even = widen(column + i * PANEL), odd = widen(column + (i + 1) * PANEL);
          const ints pair = ((ints)_mm512_cvtps_epi32((__m512)(even * factor)) & 0xffff) |
                            (ints)_mm512_cvtps_epi32((__m512)(odd * factor)) << 16;
          _mm512_mask_storeu_epi32(out, lanes, (__m512i)pair);
        }
      }
    }
  }
}

// FP4 E2M1 times 2^9, twice: a look-up takes the low five bits of its index.
alignas(64) static const int16_t FP4_FIXED[32] = {
    0, 256, 512, 768, 1024, 1536, 2048, 3072, 0, -256, -512, -768, -1024, -1536, -2048, -3072,
    0, 256, 512, 768, 1024, 1536, 2048, 3072, 0, -256, -512, -768, -1024, -1536, -2048, -3072};

// The scales of a panel's next 64 inputs, or its last 32. Two groups of 32 come to the larger of
// theirs: exactly, unless these are over eight octaves apart; then the smaller values are nil.
struct SharedScales {
  __m256i exponents;  // of the integers' scales, for 32 outputs
  __m256i octaves[2];  // by which each group is less

  __attribute__((always_inline)) SharedScales(const uint8_t* scales, int64_t groups) {
    const __m256i first = _mm256_loadu_si256((const __m256i*)scales);
    const __m256i second =
        groups > 1 ? _mm256_loadu_si256((const __m256i*)(scales + GROUP)) : first;
    const __m256i most = _mm256_max_epu8(first, second);
    exponents = _mm256_sub_epi8(most, _mm256_set1_epi8(9));
    octaves[0] = _mm256_sub_epi8(most, first);
    octaves[1] = _mm256_sub_epi8(most, second);
  }

  __attribute__((always_inline)) __m128i octaves_of(int64_t group, int half) const {
    return _mm_loadu_si128((const __m128i*)&octaves[group] + half);
  }
};

// A panel's next `width` inputs (a multiple of 32) from MXFP4 to integers and their exponents.
INLINE void unpack_fixed(const uint8_t* codes, const uint8_t* scales, int64_t width, fixed* to,
                         uint8_t* exponents) {
  const __m512i table = _mm512_load_si512(FP4_FIXED);
  const __m512i spread = _mm512_load_si512(SPREAD);
  for (int64_t k = 0; k < width; k += SHARED, scales += 2 * GROUP, exponents += PANEL) {
    const int64_t groups = std::min(SHARED, width - k) / GROUP;
    const SharedScales shared(scales, groups);
    _mm256_storeu_si256((__m256i*)exponents, shared.exponents);
    for (int64_t group = 0; group < groups; group++) {
      __m512i shift[2];
      __mmask32 kept[2];
      for (int half = 0; half < 2; half++) {
        const __m512i bytes = _mm512_broadcast_i32x4(shared.octaves_of(group, half));
        shift[half] = _mm512_srli_epi16(_mm512_shuffle_epi8(bytes, spread), 8);
        kept[half] = _mm512_cmple_epu16_mask(shift[half], _mm512_set1_epi16(8));
      }
#pragma GCC unroll 8
      for (int unit = 0; unit < 8; unit++, codes += 64) {
        __m512i words = _mm512_loadu_si512(codes);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++, to += 32) {
          const __m512i value = _mm512_permutexvar_epi16(words, table);
          _mm512_store_si512(to, _mm512_maskz_srav_epi16(kept[i & 1], value, shift[i & 1]));
          words = _mm512_srli_epi16(words, 4);
        }
      }
    }
  }
}

// acc + the products of weights and the pair of integers. Each product loads its pair: twice as fast
// as sharing one that is in a register, which is what compilers make of intrinsics.
INLINE ints dot_pairs(ints acc, ints weights, const int32_t* pair) {
  asm("vpdpwssd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(weights), "m"(*pair));
  return acc;
}

// acc [COUNT, 32] += the sums of 64 inputs (or 32), in integers, times their scales.
template <int COUNT>
INLINE void add_scaled(floats (&acc)[COUNT][2], const ints (&sums)[COUNT][2], __m256i exponents,
                       const float* scales) {
#pragma GCC unroll 2
  for (int half = 0; half < 2; half++) {
    const __m128i own = half ? _mm256_extracti128_si256(exponents, 1)
                             : _mm256_castsi256_si128(exponents);
    const floats factor = power_of_two((ints)_mm512_cvtepu8_epi32(own));
#pragma GCC unroll 12
    for (int r = 0; r < COUNT; r++)
      acc[r][half] += (floats)_mm512_cvtepi32_ps((__m512i)sums[r][half]) * (factor * scales[r]);
  }
}

// c [COUNT, 32] += rows, which are some of `all`, times a panel's next `inputs`, a multiple of 32.
// Meanwhile what is `wanted` next is fetched, `step` bytes (at most 128) with each two inputs.
template <int COUNT>
INLINE void fixed_times_panel(const fixed* rows, const float* scales, int64_t all,
                              const fixed* panel, const uint8_t* exponents, int64_t inputs,
                              const char* wanted, int64_t step, float* c) {
  for (; inputs > 0; inputs -= SHARED) {
    ints acc[COUNT][2] = {};
    const fixed *a = rows, *end = a + std::min(SHARED, inputs);
    for (; a < end; a += 2, panel += 2 * PANEL, wanted += step) {
      ints low = load_pairs(panel), high = load_pairs(panel + PANEL);
      hold(low);
      hold(high);
      __builtin_prefetch(wanted);
      __builtin_prefetch(wanted + 64);
#pragma GCC unroll 12
      for (int r = 0; r < COUNT; r++) {
        const auto* pair = (const int32_t*)(a + r * SHARED);
        acc[r][0] = dot_pairs(acc[r][0], low, pair);
        acc[r][1] = dot_pairs(acc[r][1], high, pair);
      }
    }
    floats sums[COUNT][2];
#pragma GCC unroll 12
    for (int r = 0; r < COUNT; r++) {
      sums[r][0] = load(c + r * PANEL);
      sums[r][1] = load(c + r * PANEL + 16);
    }
    add_scaled<COUNT>(sums, acc, _mm256_loadu_si256((const __m256i*)exponents), scales);
#pragma GCC unroll 12
    for (int r = 0; r < COUNT; r++) {
      store(c + r * PANEL, sums[r][0]);
      store(c + r * PANEL + 16, sums[r][1]);
    }
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
    const bool fetches = pass < fetching;
    with_constant<MOST_ROWS>(std::min(each, count - row), [&](auto constant) {
      fixed_times_panel<constant.value>(rows + row * SHARED, scales + row, all, panel, exponents,
                                        inputs, fetches ? wanted : (const char*)panel,
                                        fetches ? step : 0, c + row * PANEL);
    });
    wanted += step * inputs / 2;
  }
}

constexpr int64_t AHEAD = 4096;  // bytes of codes that are fetched early; measured

// c [COUNT, 32] = rows, which are some of `all`, times a panel of MXFP4, unpacked to registers: for
// so few rows, storing it takes longer than using it. Bit for bit what unpack_fixed would give.
template <int COUNT>
INLINE void few_times_mxfp4(const fixed* rows, const float* row_scales, int64_t all,
                            const uint8_t* codes, const uint8_t* scales, int64_t inputs, float* c) {
  const __m512i table = _mm512_load_si512(FP4_FIXED);
  floats acc[COUNT][2] = {};
  for (; inputs > 0; inputs -= SHARED, scales += 2 * GROUP) {
    const int64_t groups = std::min(SHARED, inputs) / GROUP;
    const SharedScales shared(scales, groups);
    ints sums[COUNT][2] = {};
    __builtin_prefetch(scales + AHEAD / 8);
    for (int64_t group = 0; group < groups; group++) {
      const fixed* a = rows + group * GROUP;
      ints own[COUNT][2] = {};
#pragma GCC unroll 8
      for (int unit = 0; unit < 8; unit++, codes += 64) {
        __builtin_prefetch(codes + AHEAD);
        __m512i words = _mm512_loadu_si512(codes);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
          const ints value = (ints)_mm512_permutexvar_epi16(words, table);
#pragma GCC unroll 12
          for (int r = 0; r < COUNT; r++)
            own[r][i & 1] = dot_pairs(own[r][i & 1], value,
                                      (const int32_t*)(a + r * SHARED + unit * 4 + i / 2 * 2));
          words = _mm512_srli_epi16(words, 4);
        }
      }
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) {
        const __m512i shift = _mm512_cvtepu8_epi32(shared.octaves_of(group, half));
        const __mmask16 kept = _mm512_cmple_epu32_mask(shift, _mm512_set1_epi32(8));
#pragma GCC unroll 12
        for (int r = 0; r < COUNT; r++)
          sums[r][half] += (ints)_mm512_maskz_srav_epi32(kept, (__m512i)own[r][half], shift);
      }
    }
    add_scaled<COUNT>(acc, sums, shared.exponents, row_scales);
    rows += all * SHARED;
    row_scales += all;
  }
#pragma GCC unroll 12
  for (int r = 0; r < COUNT; r++) {
    store(c + r * PANEL, acc[r][0]);
    store(c + r * PANEL + 16, acc[r][1]);
  }
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
                               const floats (&bias)[PANELS][2], float* scratch, Finish& finish) {
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
