// Linears in fixed point, part of kernels.h for AVX-512 with VNNI but without AMX: such processors
// multiply 16-bit integers up to four times as fast as bf16 (Intel's VPDPWSSD starts twice a cycle,
// VDPBF16PS once in two).
//
// 64 inputs of a row, and of an output's weights, share a scale that is a power of two: rows become
// integers of 13 bits and a sign, weights of 12. What is smaller than the largest of its 64 by up
// to five (four) octaves keeps all bits of bf16; an error is at most 2^-14 (2^-13) of the largest,
// which bf16 itself rounds by up to 2^-9. 64 products fit 32 bits (64 · 8191 · 4095 < 2^31): sums
// within a group are exact, and groups are added up in float32 in their order.
//
// Rows lie as [inputs / 64, rows, 64], their scales as [inputs / 64, rows]: a row is a constant
// distance from the next, which the instructions that multiply it hold themselves.

using fixed = int16_t;

constexpr int64_t SHARED = 64;  // inputs that share a scale

INLINE int64_t scales_for(int64_t inputs) { return (inputs + SHARED - 1) / SHARED; }

INLINE floats power_of_two(ints exponent) { return (floats)(exponent << 23); }  // biased

// bits: what the largest value takes. Returns what brings values of such a `largest` to it, and in
// `exponent` (biased) what brings them back: 255, which is no number, for those that are none.
INLINE floats to_integers(floats largest, int32_t bits, ints& exponent) {
  const ints own = (ints)largest >> 23 & 255, least = ints{} + (bits + 1);
  exponent = own == 255 ? own : (own > least ? own : least) - (bits - 1);
  return power_of_two(254 - exponent);
}

INLINE floats magnitude(floats value) { return (floats)((ints)value & 0x7fffffff); }

// One row [inputs], and a scale for each 64; these are `stride` rows apart.
INLINE void fix_row(const bf16* from, int64_t inputs, fixed* to, float* scales, int64_t stride) {
  for (int64_t k = 0; k < inputs; k += SHARED, to += stride * SHARED, scales += stride) {
    const int64_t vectors = std::min(SHARED, inputs - k) / 16;
    floats value[4], most = {};
    for (int64_t i = 0; i < vectors; i++) {
      value[i] = widen(from + k + i * 16);
      // Unsigned, so that what is no number is the largest.
      most = (floats)_mm512_max_epu32((__m512i)most, (__m512i)magnitude(value[i]));
    }
    const int32_t bits = (int32_t)_mm512_reduce_max_epu32((__m512i)most);
    ints exponent;
    const floats factor = to_integers((floats)(ints{} + bits), 13, exponent);
    *scales = exponent[0] == 255 ? NAN : power_of_two(exponent)[0];
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
        __m512i most = _mm512_setzero_si512();
        for (int64_t i = 0; i < width; i++)
          most = _mm512_max_epu32(most, (__m512i)magnitude(widen(column + i * PANEL)));
        ints exponent;
        const floats factor = to_integers((floats)most, 12, exponent);
        _mm512_mask_cvtepi32_storeu_epi8(
            exponents + (panel * scales_for(inputs) + k / SHARED) * PANEL + half * 16, lanes,
            (__m512i)exponent);
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

// A panel's next `width` inputs (a multiple of 32) from MXFP4 to integers and their exponents. Two
// groups of 32 come to the larger of their scales: exact unless these are nine octaves apart.
INLINE void unpack_fixed(const uint8_t* codes, const uint8_t* scales, int64_t width, fixed* to,
                         uint8_t* exponents) {
  constexpr int64_t AHEAD = 2048;  // bytes of codes that are fetched early
  const __m512i table = _mm512_load_si512(FP4_FIXED);
  const __m512i spread = _mm512_load_si512(SPREAD);
  for (int64_t k = 0; k < width; k += SHARED, scales += 2 * GROUP, exponents += PANEL) {
    const int64_t groups = std::min(SHARED, width - k) / GROUP;
    const __m256i own = _mm256_loadu_si256((const __m256i*)scales);
    const __m256i other =
        groups > 1 ? _mm256_loadu_si256((const __m256i*)(scales + GROUP)) : own;
    const __m256i most = _mm256_max_epu8(own, other);
    _mm256_storeu_si256((__m256i*)exponents, _mm256_sub_epi8(most, _mm256_set1_epi8(9)));
    for (int64_t group = 0; group < groups; group++) {
      const __m256i less = _mm256_sub_epi8(most, group ? other : own);
      __m512i shift[2];
      for (int half = 0; half < 2; half++) {
        const __m128i part = half ? _mm256_extracti128_si256(less, 1) : _mm256_castsi256_si128(less);
        const __m512i high = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(part), spread);
        shift[half] = _mm512_srli_epi16(high, 8);
      }
#pragma GCC unroll 8
      for (int unit = 0; unit < 8; unit++, codes += 64) {
        __builtin_prefetch(codes + AHEAD);
        __m512i words = _mm512_loadu_si512(codes);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++, to += 32) {
          const __m512i value = _mm512_permutexvar_epi16(words, table);
          _mm512_store_si512(to, _mm512_srav_epi16(value, shift[i & 1]));
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

// c [COUNT, 32] += rows, which are some of `all`, times a panel's next `inputs`, a multiple of 32.
// The panel is fetched `ahead` integers early.
template <int COUNT>
INLINE void fixed_times_panel(const fixed* rows, const float* scales, int64_t all,
                              const fixed* panel, const uint8_t* exponents, int64_t inputs,
                              int64_t ahead, float* c) {
  for (; inputs > 0; inputs -= SHARED) {
    ints acc[COUNT][2] = {};
    const fixed *a = rows, *end = a + std::min(SHARED, inputs);
    for (; a < end; a += 2, panel += 2 * PANEL) {
      ints low = load_pairs(panel), high = load_pairs(panel + PANEL);
      hold(low);
      hold(high);
      __builtin_prefetch(panel + ahead);
      __builtin_prefetch(panel + ahead + PANEL);
#pragma GCC unroll 12
      for (int r = 0; r < COUNT; r++) {
        const auto* pair = (const int32_t*)(a + r * SHARED);
        acc[r][0] = dot_pairs(acc[r][0], low, pair);
        acc[r][1] = dot_pairs(acc[r][1], high, pair);
      }
    }
    floats factor[2];
    for (int half = 0; half < 2; half++) {
      const __m128i bytes = _mm_loadu_si128((const __m128i*)(exponents + half * 16));
      factor[half] = power_of_two((ints)_mm512_cvtepu8_epi32(bytes));
    }
#pragma GCC unroll 12
    for (int r = 0; r < COUNT; r++) {
      float* to = c + r * PANEL;
      const floats low = (floats)_mm512_cvtepi32_ps((__m512i)acc[r][0]);
      const floats high = (floats)_mm512_cvtepi32_ps((__m512i)acc[r][1]);
      store(to, load(to) + low * (factor[0] * scales[r]));
      store(to + 16, load(to + 16) + high * (factor[1] * scales[r]));
    }
    rows += all * SHARED;
    scales += all;
    exponents += PANEL;
  }
}

// The same for any count, of which the first rows fetch the panel.
__attribute__((noinline)) static void fixed_block(const fixed* rows, const float* scales,
                                                  int64_t all, int64_t count, const fixed* panel,
                                                  const uint8_t* exponents, int64_t inputs,
                                                  int64_t ahead, float* c) {
  const int64_t passes = (count + MOST_ROWS - 1) / MOST_ROWS;
  const int64_t each = (count + passes - 1) / passes;
  for (int64_t row = 0; row < count; row += each, ahead = 0)
    with_constant<MOST_ROWS>(std::min(each, count - row), [&](auto constant) {
      fixed_times_panel<constant.value>(rows + row * SHARED, scales + row, all, panel, exponents,
                                        inputs, ahead, c + row * PANEL);
    });
}

// rows_times_panels in fixed point.
template <int PANELS, typename Finish>
INLINE void fixed_times_panels(const Weight& weight, const int64_t (&index)[PANELS], const Rows& x,
                               const floats (&bias)[PANELS][2], float* scratch, Finish& finish) {
  alignas(64) fixed unpacked[SPAN * PANEL];
  uint8_t unpacked_exponents[SPAN / SHARED * PANEL];
  const int64_t inputs = weight.inputs, sums = x.count * PANEL;
  const bool once = x.count <= ROWS && !weight.mxfp4;  // each input's part is used once
  const int64_t step = once ? inputs : SPAN;
  memset(scratch, 0, (size_t)(PANELS * sums) * 4);
  for (int p = 0; p < PANELS; p++)
    for (int64_t k = 0; k < inputs; k += step) {
      const int64_t width = std::min(step, inputs - k), at = index[p] * inputs + k;
      const fixed* panel = (const fixed*)weight.data + at * PANEL;
      const uint8_t* exponents =
          weight.scales + (index[p] * scales_for(inputs) + k / SHARED) * PANEL;
      if (weight.mxfp4) {
        unpack_fixed((const uint8_t*)weight.data + at * PANEL / 2, weight.scales + at, width,
                     unpacked, unpacked_exponents);
        panel = unpacked;
        exponents = unpacked_exponents;
      }
      fixed_block((const fixed*)x.data + k * x.all, x.scales + k / SHARED * x.all, x.all, x.count,
                  panel, exponents, width, weight.mxfp4 ? 0 : 2048, scratch + p * sums);
    }
  for (int64_t r = 0; r < x.count; r++)
    finish_row<PANELS>(r, scratch + r * PANEL, sums, bias, finish);
}
