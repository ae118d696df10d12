// Frames of weights between BF16 words and pairs of 4-bit exponent ranks (the `entropy_coded` layout), without zstandard.
#pragma once
#include <cstdint>
#include <cstring>

namespace tbe {

constexpr int kRanks = 15;
constexpr uint8_t kEscape = 15;

// words [count] to low [count], pairs [ceil(count / 2)] and the escapes, of which there is room for `count`; their number.
inline int64_t encode_ranks(const uint16_t* words, int64_t count, const uint8_t* table, uint8_t* low, uint8_t* pairs,
                            uint8_t* escapes) {
  uint8_t rank_of[256];
  std::memset(rank_of, kEscape, sizeof rank_of);
  for (int k = 0; k < kRanks; ++k) rank_of[table[k]] = uint8_t(k);
  for (int64_t i = 0; i < count; ++i) low[i] = uint8_t((words[i] >> 8 & 0x80) | (words[i] & 0x7F));
  uint8_t* const begin = escapes;
  for (int64_t i = 0; i < count; i += 2) {
    const uint8_t first = uint8_t(words[i] >> 7), second = uint8_t(i + 1 < count ? words[i + 1] >> 7 : table[0]);
    const uint8_t a = rank_of[first], b = rank_of[second];
    pairs[i / 2] = uint8_t(a | b << 4);
    // Written always and kept when it counts: cheaper than a branch, and never beyond the words that were read.
    *escapes = first, escapes += a == kEscape;
    if (b == kEscape) *escapes++ = second;
  }
  return escapes - begin;
}

// The way back. False when the ranks ask for another number of escapes than `number`.
inline bool decode_ranks(const uint8_t* pairs, const uint8_t* low, int64_t count, const uint8_t* table,
                         const uint8_t* escapes, int64_t number, uint16_t* words) {
  uint32_t of_pair[256];
  for (int k = 0; k < 256; ++k) {
    const uint32_t a = k & 15, b = k >> 4;
    of_pair[k] = (a == kEscape ? 0u : table[a] << 7) | (b == kEscape ? 0u : uint32_t(table[b]) << 23);
  }
  const uint8_t* const stop = escapes + number;
  const int64_t whole = count / 2 * 2;
  for (int64_t i = 0; i < whole; i += 2) {
    const uint8_t pair = pairs[i / 2];
    const uint32_t x = low[i] | uint32_t(low[i + 1]) << 16;
    uint32_t two = of_pair[pair] | (x & 0x7F007Fu) | (x & 0x800080u) << 8;
    if ((pair & 15) == kEscape) {
      if (escapes == stop) return false;
      two |= uint32_t(*escapes++) << 7;
    }
    if (pair >> 4 == kEscape) {
      if (escapes == stop) return false;
      two |= uint32_t(*escapes++) << 23;
    }
    std::memcpy(words + i, &two, 4);
  }
  if (whole < count) {
    const uint8_t rank = pairs[whole / 2] & 15;
    if (rank == kEscape && escapes == stop) return false;
    const uint8_t exponent = rank == kEscape ? *escapes++ : table[rank];
    words[whole] = uint16_t((low[whole] & 0x80) << 8 | exponent << 7 | (low[whole] & 0x7F));
  }
  return escapes == stop;
}

}  // namespace tbe
