// Packing: BF16 words to the run-time layout, on all threads.
#pragma once

#include <array>
#include <vector>

#include "avx2.h"
#include "avx512.h"
#include "layout.h"
#include "threads.h"

namespace zip {

using Histogram = std::array<int64_t, 256>;

// Exponents among words [begin, end), added to `found`.
inline void count_exponents(const uint16_t* words, int64_t begin, int64_t end, Histogram& found) {
  // Four tables, since neighbours often have the same exponent and an increment waits for the last one of its entry.
  std::vector<uint32_t> tables(4 * 256);
  constexpr int64_t kPart = int64_t(1) << 30;  // words that cannot overflow 32 bits
  for (int64_t i = begin; i < end;) {
    const int64_t stop = std::min(end, i + kPart);
    for (; i + 4 <= stop; i += 4) {
      uint64_t four;
      std::memcpy(&four, words + i, 8);
      for (int k = 0; k < 4; ++k) ++tables[size_t(256 * k) + ((four >> (16 * k + 7)) & 255)];
    }
    for (; i < stop; ++i) ++tables[(words[i] >> 7) & 255];
    for (size_t e = 0; e < 4 * 256; ++e) found[e % 256] += tables[e], tables[e] = 0;
  }
}

// What packing needs to know and where it writes.
struct Packer {
  const uint16_t* words;
  const uint8_t* code;  // exponent -> code, 0 for fallbacks
  uint8_t* low;
  uint8_t* codes;

  // Weights [i, end), i a multiple of 8; fallbacks go to `place`, which moves on.
  void scalar(int64_t i, int64_t end, uint8_t*& place) const {
    for (; i < end; i += 8) {
      uint32_t bits = 0;
      for (int64_t k = 0; k < 8 && i + k < end; ++k) {
        const uint16_t word = words[i + k];
        const uint8_t exponent = uint8_t(word >> 7), c = code[exponent];
        low[i + k] = uint8_t((word >> 8 & 0x80) | (word & 0x7F));
        if (c == 0) *place++ = exponent;
        bits |= uint32_t(c) << 3 * k;
      }
      for (int k = 0; k < 3; ++k) codes[i / 8 * 3 + k] = uint8_t(bits >> 8 * k);
    }
  }

#ifdef ZIP_X86
  // Whole groups [i, end), by AVX-512.
  ZIP_AVX512 void wide(int64_t i, int64_t end, uint8_t*& place) const {
    __m512i table[4], gather, mantissas = _mm512_set1_epi8(0x7F);
    alignas(64) uint8_t picked[64];
    for (int k = 0; k < 64; ++k) picked[k] = uint8_t(k < 24 ? k / 3 * 8 + k % 3 : 0);
    gather = _mm512_load_si512(picked);
    for (int k = 0; k < 4; ++k) table[k] = _mm512_loadu_si512(code + 64 * k);
    const __m512i pairs = _mm512_set1_epi16(0x0801);      // c0 + 8 c1
    const __m512i quads = _mm512_set1_epi32(0x00400001);  // + 64 (c2 + 8 c3)
    for (; i < end; i += kGroup) {
      _mm_prefetch(reinterpret_cast<const char*>(words + i) + kWordsAhead, _MM_HINT_T1);
      _mm_prefetch(reinterpret_cast<const char*>(words + i) + kWordsAhead + 64, _MM_HINT_T1);
      const __m512i a = _mm512_loadu_si512(words + i), b = _mm512_loadu_si512(words + i + 32);
      const __m512i exponent = narrow(_mm512_srli_epi16(a, 7), _mm512_srli_epi16(b, 7));
      const __m512i least = narrow(a, b);
      const __m512i most = narrow(_mm512_srli_epi16(a, 8), _mm512_srli_epi16(b, 8));
      _mm512_storeu_si512(low + i, _mm512_ternarylogic_epi64(mantissas, least, most, 0xCA));
      const __m512i lower = _mm512_permutex2var_epi8(table[0], exponent, table[1]);
      const __m512i upper = _mm512_permutex2var_epi8(table[2], exponent, table[3]);
      const __m512i c = _mm512_mask_mov_epi8(lower, _mm512_movepi8_mask(exponent), upper);
      const uint64_t missing = _mm512_testn_epi8_mask(c, c);
      const int64_t number = _mm_popcnt_u64(missing);
      // Not a byte more than there are: what follows is another thread's.
      _mm512_mask_storeu_epi8(place, number == 64 ? ~0ull : (1ull << number) - 1,
                              _mm512_maskz_compress_epi8(missing, exponent));
      place += number;
      const __m512i twelve = _mm512_madd_epi16(_mm512_maddubs_epi16(pairs, c), quads);  // 12 bits a 32-bit lane
      const __m512i all = _mm512_or_si512(twelve, _mm512_srli_epi64(twelve, 20));       // 24 bits a 64-bit lane
      _mm256_mask_storeu_epi8(codes + i / 8 * 3, 0xFFFFFFu,
                              _mm512_castsi512_si256(_mm512_permutexvar_epi8(gather, all)));
    }
  }

  // The low bytes of two vectors of 16-bit lanes in order.
  ZIP_AVX512_INLINE static __m512i narrow(__m512i a, __m512i b) {
    return _mm512_inserti64x4(_mm512_zextsi256_si512(_mm512_cvtepi16_epi8(a)), _mm512_cvtepi16_epi8(b), 1);
  }
#endif

  // The tiles [begin, end) of `count` weights; their fallbacks begin at `place`, fallback number `before`.
  void tiles(Level level, int64_t begin, int64_t end, int64_t count, int64_t before, uint8_t* place,
             int64_t* offsets) const {
    const uint8_t* const start = place;
    for (int64_t tile = begin; tile < end; ++tile) {
      int64_t i = tile * kTile;
      const int64_t stop = std::min(count, i + kTile);
      offsets[tile] = before + (place - start);
#ifdef ZIP_X86
      if (level >= kAvx512) {
        const int64_t whole = i + (stop - i) / kGroup * kGroup;
        wide(i, whole, place);
        i = whole;
      }
#endif
      (void)level;
      scalar(i, stop, place);
    }
  }
};

}  // namespace zip
