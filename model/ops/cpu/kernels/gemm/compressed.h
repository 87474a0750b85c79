// Compressed bf16 weights: the same values in 12 bits, if in each panel nearly all exponents are
// among fifteen in a row. Of trained and random weights' values about one in 10,000 is an exception.
#pragma once

#include "../vectors.h"

namespace {

constexpr int COMPRESSED_ROWS = 8;        // with more, the weights as bf16 are faster
constexpr int64_t EXPANDED_INPUTS = 128;  // of a span: two expanded ones stay in the first level
constexpr int64_t COMPRESSED_INPUT_BYTES = PANEL * 3 / 2;  // of a panel

#if BF16_DOT
INLINE int exponent_of(bf16 value) { return value >> 7 & 255; }

// The base whose window holds most of a sample of the values; of several, the highest.
INLINE int best_base(const bf16* values, int64_t size) {
  uint32_t counts[256] = {};
  for (int64_t i = 0; i < size; i += i % 64 == 63 ? 7 * 64 + 1 : 1) counts[exponent_of(values[i])]++;
  uint32_t inside = 0, most = 0;
  int best = 240;
  for (int exponent = 241; exponent <= 255; exponent++) inside += counts[exponent];
  for (int base = 240; base >= 0; base--) {
    if (inside > most) {
      most = inside;
      best = base;
    }
    inside += base > 0 ? counts[base] : 0;
    inside -= counts[base + 15];
  }
  return best;
}

// weights [panels] as bf16 → for each panel, the base of its exponents and the number of exceptions.
void choose_exponents(const bf16* weights, int64_t inputs, int64_t panels, uint8_t* bases,
                      uint32_t* counts, int threads) {
  const int64_t size = inputs * PANEL;
  divide(threads, panels, 1, [=](int64_t first, int64_t last) {
    for (int64_t panel = first; panel < last; panel++) {
      const bf16* values = weights + panel * size;
      const int base = best_base(values, size);
      uint32_t count = 0;
      for (int64_t row = 0; row < size; row += 2 * PANEL) {
        uint16_t missing = 0;
        for (int64_t i = row; i < row + 2 * PANEL; i++) {
          const uint16_t exponent = values[i] & 0x7f80;
          missing = (uint16_t)(missing + ((exponent != 0) & (exponent <= base << 7)) +
                               (exponent > (base + 15) << 7));
        }
        count += missing;
      }
      bases[panel] = (uint8_t)base;
      counts[panel] = count;
    }
  });
}

#define SWAPPED(i) i + 1, i, i + 3, i + 2, i + 5, i + 4, i + 7, i + 6
#define SWAPPED_16 SWAPPED(0), SWAPPED(8)
alignas(64) const uint8_t SWAP[64] = {SWAPPED_16, SWAPPED_16, SWAPPED_16, SWAPPED_16};
#undef SWAPPED_16
#undef SWAPPED

// The bytes of each 16-bit word in the other order.
INLINE __m512i swap_bytes(__m512i words) {
  return _mm512_shuffle_epi8(words, _mm512_load_si512(SWAP));
}

// Four inputs of a panel as bf16 → compressed ones at `to`, and exceptions at `next`. An exponent is
// stored as 1 to 15 if it is base + 1 to base + 15, and as 0 if it is 0: of zeros and subnormals.
INLINE void compress_inputs(const bf16* values, int64_t place, int base, uint8_t* to,
                            Exception*& next) {
  __m512i codes = _mm512_setzero_si512();
  for (int pair = 0; pair < 2; pair++) {
    __m512i rest[2];
    for (int v = 0; v < 2; v++) {
      const int64_t first = (2 * pair + v) * PANEL;
      const __m512i value = _mm512_loadu_si512(values + first);
      const __m512i exponent = _mm512_srli_epi16(value, 7) & _mm512_set1_epi16(255);
      const __m512i code = _mm512_sub_epi16(exponent, _mm512_set1_epi16((int16_t)base));
      const __mmask32 is_zero = _mm512_testn_epi16_mask(exponent, exponent);
      const __mmask32 in_window = _mm512_cmplt_epu16_mask(
          _mm512_sub_epi16(code, _mm512_set1_epi16(1)), _mm512_set1_epi16(15));
      for (uint32_t missing = ~(is_zero | in_window); missing; missing &= missing - 1) {
        const int64_t i = first + __builtin_ctz(missing);
        *next++ = {(uint32_t)(place + i), values[i]};
      }
      rest[v] = _mm512_maskz_mov_epi16(is_zero | in_window,
                                       value & _mm512_set1_epi16((int16_t)0x807f));
      const __m512i kept = _mm512_maskz_mov_epi16(in_window & ~is_zero, code);
      codes = codes | _mm512_slli_epi16(kept, 4 * (2 * (unsigned)pair + v));
    }
    _mm512_storeu_si512(to + 64 * pair, rest[0] | swap_bytes(rest[1]));
  }
  _mm512_storeu_si512(to + 128, codes);
}

// weights [panels] as bf16 → compressed ones (see CompressedWeight); bases and ends are those of
// choose_exponents.
void compress(const bf16* weights, int64_t inputs, int64_t panels, const uint8_t* bases,
              const uint32_t* ends, uint8_t* to, Exception* exceptions, int threads) {
  divide(threads, panels, 1, [=](int64_t first, int64_t last) {
    for (int64_t panel = first; panel < last; panel++) {
      Exception* next = exceptions + ends[panel];
      for (int64_t k = 0; k < inputs; k += 4)
        compress_inputs(weights + (panel * inputs + k) * PANEL, k * PANEL, bases[panel],
                        to + (panel * inputs + k) * COMPRESSED_INPUT_BYTES, next);
    }
  });
}

alignas(64) const uint16_t CODES[32] = {0, 1, 2,  3,  4,  5,  6,  7, 8, 9, 10, 11, 12, 13, 14, 15,
                                        0, 1, 2,  3,  4,  5,  6,  7, 8, 9, 10, 11, 12, 13, 14, 15};

// The data of a panel's inputs from `first` on.
INLINE const char* compressed_inputs(const Weight& weight, int64_t panel, int64_t first) {
  return (const char*)weight.compressed.data + (panel * weight.inputs + first) * COMPRESSED_INPUT_BYTES;
}

// A span of a panel's inputs.
class CompressedSpan {
 public:
  static constexpr int64_t STEP = 4;  // inputs that are expanded at once

  CompressedSpan(const Weight& weight, int64_t panel, int64_t first, int64_t count)
      : from(compressed_inputs(weight, panel, first)),
        inputs(std::min(count, weight.inputs - first)),
        first_place((uint32_t)(first * PANEL)),
        exceptions(weight.compressed.exceptions + weight.compressed.ends[panel]),
        end(weight.compressed.exceptions + weight.compressed.ends[panel + 1]) {
    const __m512i codes = _mm512_load_si512(CODES);
    const __m512i base = _mm512_set1_epi16(weight.compressed.bases[panel]);
    // A lookup uses five bits of an index, the highest of which belongs to the next code.
    exponents = _mm512_maskz_slli_epi16(0xfffefffe, _mm512_add_epi16(codes, base), 7);
    __builtin_prefetch(end + 32);
    __builtin_prefetch(weight.compressed.ends + panel + 32);
  }

  // Expands STEP inputs from the span's input k on to their place in `to`.
  __attribute__((always_inline)) void expand(int64_t k, bf16* to) const {
    constexpr int SELECT = 0xca;  // where the mask is set the second operand, else the third
    const __m512i mask = _mm512_set1_epi16(0x7f80);
    const char* data = from + k * COMPRESSED_INPUT_BYTES;
    __m512i codes = _mm512_loadu_si512(data + 128);
#pragma GCC unroll 2
    for (int pair = 0; pair < 2; pair++) {
      __m512i rest = _mm512_loadu_si512(data + pair * 64);
#pragma GCC unroll 2
      for (int v = 0; v < 2; v++) {
        const __m512i exponent = _mm512_permutexvar_epi16(codes, exponents);
        _mm512_storeu_si512(to + k * PANEL + (pair * 2 + v) * PANEL,
                            _mm512_ternarylogic_epi32(mask, exponent, rest, SELECT));
        codes = _mm512_srli_epi16(codes, 4);
        rest = swap_bytes(rest);
      }
    }
  }

  // Expands the inputs from k on, and writes the exceptions of the span.
  void complete(int64_t k, bf16* to) const {
    for (; k < inputs; k += STEP) expand(k, to);
    const uint32_t end_place = first_place + (uint32_t)(inputs * PANEL);
    const Exception* each = std::lower_bound(
        exceptions, end, first_place,
        [](const Exception& one, uint32_t place) { return one.place < place; });
    for (; each < end && each->place < end_place; each++)
      to[each->place - first_place] = (bf16)each->value;
  }

  const char* from;
  int64_t inputs;

 private:
  uint32_t first_place;
  const Exception *exceptions, *end;
  __m512i exponents;
};

// A thread's two expanded spans: one that is multiplied, and the next one.
struct ExpandedSpans {
  // 2 KiB apart modulo 4 KiB: a load would otherwise wait for the store to the other span.
  alignas(64) bf16 values[2][EXPANDED_INPUTS * PANEL + 1024];
  const char* from = nullptr;  // the data of the span that was expanded last, and its place
  int64_t index = 0;
};
#endif

}  // namespace
