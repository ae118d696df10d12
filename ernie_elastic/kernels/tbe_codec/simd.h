// Groups of weights between BF16 words and the fields of `dense_plane`: portable, AVX2 and AVX-512 code, the same bytes.
#pragma once
#include <cstdint>
#include <cstring>

#include "cpu_level.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define TBE_X86
#include <immintrin.h>
#define TBE_AVX2 __attribute__((target("avx2,bmi,bmi2,popcnt")))
#define TBE_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,bmi,bmi2,popcnt")))
#endif

namespace tbe {

constexpr int64_t kTile = 4096;
constexpr int kWindow = 7;
enum Level { kPortable, kAvx2, kAvx512 };

struct Group {  // what `encode` reads and writes
  const uint16_t* words;
  uint8_t *low, *planes[3];
};

struct Words {  // what `decode` reads and writes
  const uint8_t *low, *planes[3];
  uint16_t* words;
};

inline Level supported_level() {
#ifdef TBE_X86
  static const Level best = [] {
    if (ERNIE_ELASTIC_CPU_CAP < CPU_AVX2) return kPortable;
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("bmi2")) return kPortable;
    if (ERNIE_ELASTIC_CPU_CAP < CPU_AVX512) return kAvx2;
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi2");
    return wide ? kAvx512 : kAvx2;
  }();
  return best;
#else
  return kPortable;
#endif
}

// counts [256] += exponents of the words. Four tables, so that equal neighbours do not wait for each other.
inline void count_exponents(const uint16_t* words, int64_t size, int64_t* counts) {
  constexpr int64_t kBlock = int64_t(1) << 30;  // a 32-bit counter holds it
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    const int64_t end = begin + kBlock < size ? begin + kBlock : size;
    uint32_t table[4][256] = {};
    int64_t i = begin;
    for (; i + 4 <= end; i += 4) {
      uint64_t four;
      std::memcpy(&four, words + i, 8);
      ++table[0][four >> 7 & 0xFF];
      ++table[1][four >> 23 & 0xFF];
      ++table[2][four >> 39 & 0xFF];
      ++table[3][four >> 55 & 0xFF];
    }
    for (; i < end; ++i) ++table[0][words[i] >> 7 & 0xFF];
    for (int k = 0; k < 256; ++k) counts[k] += int64_t(table[0][k]) + table[1][k] + table[2][k] + table[3][k];
  }
}

namespace portable {

// Weights from..to, `from` a multiple of 8; unused bits of the last plane byte become 0.
inline uint8_t* encode(const Group& g, int64_t from, int64_t to, uint8_t first, uint8_t* fallbacks) {
  for (int64_t i = from; i < to; i += 8) {
    uint8_t bits[3] = {};
    for (int64_t k = i; k < to && k < i + 8; ++k) {
      const uint16_t word = g.words[k];
      const uint8_t exponent = uint8_t(word >> 7);
      uint8_t code = uint8_t(exponent - first + 1);
      if (code - 1u >= unsigned(kWindow)) code = 0, *fallbacks++ = exponent;
      g.low[k] = uint8_t((word >> 8 & 0x80) | (word & 0x7F));
      for (int b = 0; b < 3; ++b) bits[b] = uint8_t(bits[b] | (code >> b & 1) << (k - i));
    }
    for (int b = 0; b < 3; ++b) g.planes[b][i / 8] = bits[b];
  }
  return fallbacks;
}

inline const uint8_t* decode(const Words& w, int64_t from, int64_t to, uint8_t first, const uint8_t* fallbacks,
                             const uint8_t* stop) {
  for (int64_t i = from; i < to; ++i) {
    uint8_t code = 0;
    for (int b = 0; b < 3; ++b) code = uint8_t(code | (w.planes[b][i / 8] >> (i % 8) & 1) << b);
    if (code == 0 && fallbacks == stop) return nullptr;
    const uint8_t exponent = code ? uint8_t(first + code - 1) : *fallbacks++;
    w.words[i] = uint16_t((w.low[i] & 0x80) << 8 | exponent << 7 | (w.low[i] & 0x7F));
  }
  return fallbacks;
}

}  // namespace portable

#ifdef TBE_X86
namespace avx2 {

TBE_AVX2 inline uint8_t* encode(const Group& g, int64_t size, uint8_t first, uint8_t* fallbacks) {
  const __m256i byte = _mm256_set1_epi16(0xFF), sign = _mm256_set1_epi16(0x80), mantissa = _mm256_set1_epi16(0x7F);
  const __m256i before = _mm256_set1_epi8(char(first - 1)), last = _mm256_set1_epi8(kWindow - 1);
  const __m256i one = _mm256_set1_epi8(1);
  for (int64_t i = 0; i < size; i += 32) {
    const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(g.words + i));
    const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(g.words + i + 16));
    // Packing works in halves of 128 bits; the permutation puts the four quarters in order.
    const __m256i exponent = _mm256_permute4x64_epi64(
        _mm256_packus_epi16(_mm256_and_si256(_mm256_srli_epi16(a, 7), byte),
                            _mm256_and_si256(_mm256_srli_epi16(b, 7), byte)), 0xD8);
    const __m256i la = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(a, 8), sign), _mm256_and_si256(a, mantissa));
    const __m256i lb = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(b, 8), sign), _mm256_and_si256(b, mantissa));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(g.low + i),
                        _mm256_permute4x64_epi64(_mm256_packus_epi16(la, lb), 0xD8));
    const __m256i code = _mm256_sub_epi8(exponent, before), from_zero = _mm256_sub_epi8(code, one);
    const __m256i in = _mm256_cmpeq_epi8(_mm256_min_epu8(from_zero, last), from_zero);
    const __m256i kept = _mm256_and_si256(code, in);
    for (int k = 0; k < 3; ++k) {
      const uint32_t bits = uint32_t(_mm256_movemask_epi8(_mm256_slli_epi16(kept, 7 - k)));
      std::memcpy(g.planes[k] + i / 8, &bits, 4);
    }
    for (uint32_t missing = ~uint32_t(_mm256_movemask_epi8(in)); missing; missing &= missing - 1)
      *fallbacks++ = uint8_t(g.words[i + __builtin_ctz(missing)] >> 7);
  }
  return fallbacks;
}

// 0xFF in byte k where bit k of `bits` is set.
TBE_AVX2 inline __m256i spread(uint32_t bits) {
  const __m256i place = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1,  //
                                         2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
  const __m256i bit = _mm256_set1_epi64x(int64_t(0x8040201008040201ull));
  const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(int(bits)), place);
  return _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit), bit);
}

TBE_AVX2 inline const uint8_t* decode(const Words& w, int64_t size, uint8_t first, const uint8_t* fallbacks,
                                      const uint8_t* stop) {
  const __m256i before = _mm256_set1_epi8(char(first - 1));
  const __m256i sign = _mm256_set1_epi16(0x80), mantissa = _mm256_set1_epi16(0x7F);
  for (int64_t i = 0; i < size; i += 32) {
    uint32_t bits[3];
    __m256i exponent = before;
    for (int k = 0; k < 3; ++k) {
      std::memcpy(bits + k, w.planes[k] + i / 8, 4);
      exponent = _mm256_add_epi8(exponent, _mm256_and_si256(spread(bits[k]), _mm256_set1_epi8(char(1 << k))));
    }
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w.low + i));
    for (int half = 0; half < 2; ++half) {
      const __m128i low8 = half ? _mm256_extracti128_si256(low, 1) : _mm256_castsi256_si128(low);
      const __m128i high8 = half ? _mm256_extracti128_si256(exponent, 1) : _mm256_castsi256_si128(exponent);
      const __m256i l = _mm256_cvtepu8_epi16(low8), e = _mm256_slli_epi16(_mm256_cvtepu8_epi16(high8), 7);
      const __m256i signs = _mm256_slli_epi16(_mm256_and_si256(l, sign), 8);
      const __m256i word = _mm256_or_si256(_mm256_or_si256(signs, e), _mm256_and_si256(l, mantissa));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(w.words + i + 16 * half), word);
    }
    uint32_t missing = ~(bits[0] | bits[1] | bits[2]);
    if (__builtin_popcount(missing) > stop - fallbacks) return nullptr;
    for (; missing; missing &= missing - 1) {
      uint16_t& word = w.words[i + __builtin_ctz(missing)];
      word = uint16_t((word & 0x807F) | *fallbacks++ << 7);
    }
  }
  return fallbacks;
}

}  // namespace avx2

namespace avx512 {

TBE_AVX512 inline uint8_t* encode(const Group& g, int64_t size, uint8_t first, uint8_t* fallbacks) {
  const __m512i mantissa = _mm512_set1_epi16(0x7F), from = _mm512_set1_epi8(char(first)), one = _mm512_set1_epi8(1);
  for (int64_t i = 0; i < size; i += 64) {
    const __m512i a = _mm512_loadu_si512(g.words + i), b = _mm512_loadu_si512(g.words + i + 32);
    const __m512i exponent =
        _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi16_epi8(_mm512_srli_epi16(a, 7))),
                           _mm512_cvtepi16_epi8(_mm512_srli_epi16(b, 7)), 1);
    // 0xCA: where the mask is 1 the word, else the word shifted by 8; the conversion drops the upper byte.
    const __m512i la = _mm512_ternarylogic_epi32(mantissa, a, _mm512_srli_epi16(a, 8), 0xCA);
    const __m512i lb = _mm512_ternarylogic_epi32(mantissa, b, _mm512_srli_epi16(b, 8), 0xCA);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(g.low + i), _mm512_cvtepi16_epi8(la));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(g.low + i + 32), _mm512_cvtepi16_epi8(lb));
    const __m512i from_zero = _mm512_sub_epi8(exponent, from);
    const __mmask64 in = _mm512_cmplt_epu8_mask(from_zero, _mm512_set1_epi8(kWindow));
    const __m512i code = _mm512_add_epi8(from_zero, one);
    for (int k = 0; k < 3; ++k) {
      const uint64_t bits = _mm512_mask_test_epi8_mask(in, code, _mm512_set1_epi8(char(1 << k)));
      std::memcpy(g.planes[k] + i / 8, &bits, 8);
    }
    _mm512_storeu_si512(fallbacks, _mm512_maskz_compress_epi8(~in, exponent));
    fallbacks += __builtin_popcountll(~in);
  }
  return fallbacks;
}

TBE_AVX512 inline const uint8_t* decode(const Words& w, int64_t size, uint8_t first, const uint8_t* fallbacks,
                                        const uint8_t* stop) {
  const __m512i before = _mm512_set1_epi8(char(first - 1)), mantissa = _mm512_set1_epi16(0x7F);
  const __m512i one = _mm512_set1_epi8(1), two = _mm512_set1_epi8(2), four = _mm512_set1_epi8(4);
  for (int64_t i = 0; i < size; i += 64) {
    uint64_t bits[3];
    for (int k = 0; k < 3; ++k) std::memcpy(bits + k, w.planes[k] + i / 8, 8);
    __m512i exponent = _mm512_mask_add_epi8(before, bits[0], before, one);
    exponent = _mm512_mask_add_epi8(exponent, bits[1], exponent, two);
    exponent = _mm512_mask_add_epi8(exponent, bits[2], exponent, four);
    const uint64_t missing = ~(bits[0] | bits[1] | bits[2]);
    const int64_t number = __builtin_popcountll(missing);
    if (number > stop - fallbacks) return nullptr;
    // A masked load touches no byte beyond the list.
    const __m512i stored = _mm512_maskz_loadu_epi8(number == 64 ? ~0ull : (1ull << number) - 1, fallbacks);
    exponent = _mm512_mask_expand_epi8(exponent, missing, stored);
    fallbacks += number;
    const __m512i low = _mm512_loadu_si512(w.low + i);
    for (int half = 0; half < 2; ++half) {
      const __m256i low8 = half ? _mm512_extracti64x4_epi64(low, 1) : _mm512_castsi512_si256(low);
      const __m256i high8 = half ? _mm512_extracti64x4_epi64(exponent, 1) : _mm512_castsi512_si256(exponent);
      const __m512i l = _mm512_cvtepu8_epi16(low8), e = _mm512_slli_epi16(_mm512_cvtepu8_epi16(high8), 7);
      const __m512i signs = _mm512_slli_epi16(_mm512_andnot_si512(mantissa, l), 8);
      // 0xF8: a or (b and c)
      const __m512i word = _mm512_or_si512(_mm512_ternarylogic_epi32(e, l, mantissa, 0xF8), signs);
      _mm512_storeu_si512(w.words + i + 32 * half, word);
    }
  }
  return fallbacks;
}

}  // namespace avx512
#endif  // TBE_X86

}  // namespace tbe
