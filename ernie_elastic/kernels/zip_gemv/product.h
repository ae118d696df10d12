// Decoding of any range, and products of packed or plain rows with rows of x: what chooses the instruction set.
#pragma once

#include <vector>

#include "amx.h"
#include "avx2.h"
#include "avx512.h"
#include "layout.h"
#include "threads.h"

namespace zip {

// Fallbacks among the weights [i, end).
inline int64_t count_fallbacks(const Matrix& m, int64_t i, int64_t end) {
  int64_t found = 0;
#ifdef ZIP_X86
  const Level level = supported_level(m.level);
  if (level != kPortable) {
    for (const int64_t aligned = std::min(end, (i + 7) / 8 * 8); i < aligned; ++i) found += m.code(i) == 0;
    const int64_t groups = whole_groups(m, level, i, end);
    found += level >= kAvx512 ? avx512::count_fallbacks(m, i, groups) : avx2::count_fallbacks(m, i, groups);
    i += groups * kGroup;
  }
#endif
  for (; i < end; ++i) found += m.code(i) == 0;
  return found;
}

// Where the fallbacks of the weights from i on begin.
inline const uint8_t* fallbacks_from(const Matrix& m, int64_t i) {
  const int64_t tile = i / kTile;
  return m.fallbacks + m.offsets[tile] + count_fallbacks(m, tile * kTile, i);
}

// The weights [i, end) to `out`; `place` is where their fallbacks begin and moves on.
template <class Word>
void decode(const Matrix& m, int64_t i, int64_t end, const uint8_t*& place, Word* out) {
  const auto scalar = [&] { *out++ = Word(Word(m.word(i++, place)) << (sizeof(Word) == 4 ? 16 : 0)); };
#ifdef ZIP_X86
  const Level level = supported_level(m.level);
  if (level != kPortable) {
    for (const int64_t aligned = std::min(end, (i + 7) / 8 * 8); i < aligned;) scalar();
    for (int64_t groups = whole_groups(m, level, i, end); groups > 0;) {
      const int64_t now = level >= kAvx512 ? groups : std::min(groups, kChunk / kGroup);
      if (level >= kAvx512) avx512::decode(m, i, now, place, out);
      else avx2::decode(m, i, now, place, out);
      i += now * kGroup, out += now * kGroup, groups -= now;
    }
  }
#endif
  while (i < end) scalar();
}

constexpr int64_t kTilesFrom = 2;  // rows of x from which on AMX is used

// Whether rows are decoded in the registers that multiply them: rows of whole groups.
inline bool is_fused(const Matrix& m) {
  return supported_level(m.level) >= kAvx512 && m.columns % kGroup == 0;
}

// Orders of the columns of x that kernels want.
enum Order { kPlainOrder, kAvx2Order, kAvx512Order, kFusedOrder };

inline Order order_of(Level level, bool fused) {
  return fused ? kFusedOrder : level >= kAvx512 ? kAvx512Order : level == kAvx2 ? kAvx2Order : kPlainOrder;
}

// The column that stands at place k (0..63) of a group in that order.
inline int64_t column_in(Order order, int64_t k) {
#ifdef ZIP_X86
  if (order == kFusedOrder) return avx512::fused_column(k);
  if (order == kAvx512Order) return avx512::word_column(k);
  if (order == kAvx2Order) return avx2::word_column(k);
#endif
  (void)order;
  return k;
}

inline int64_t padded(int64_t columns) { return (columns + kSums - 1) / kSums * kSums; }

// Puts rows of x into an order; what they are written to is padded with zeros already.
struct Permutation {
  int64_t from[kSums], to[kSums];

  explicit Permutation(Order order) {
    for (int64_t k = 0; k < kSums; ++k) from[k] = column_in(order, k), to[from[k]] = k;
  }
  void apply(const float* x, int64_t columns, float* out) const {
    int64_t base = 0;
    for (; base + kSums <= columns; base += kSums)
      for (int64_t k = 0; k < kSums; ++k) out[base + k] = x[base + from[k]];
    for (int64_t c = base; c < columns; ++c) out[base + to[c - base]] = x[c];
  }
  int64_t place(int64_t c) const { return c / kSums * kSums + to[c % kSums]; }
};

// A part of a row of words times `rows`.
inline void dot_words(Level level, const Part& part, const Rows& rows) {
#ifdef ZIP_X86
  if (level >= kAvx512) {
    switch (rows.tile) {
      case 1: return avx512::dot_words<1, 1>(part, rows);
      case 2: return avx512::dot_words<1, 2>(part, rows);
      case 3: return avx512::dot_words<1, 3>(part, rows);
      default: return avx512::dot_words<1, 4>(part, rows);
    }
  }
  if (level == kAvx2) {
    for (int t = 0; t < rows.tile; t += 2) {
      const Rows two{rows.x + t, rows.y + t, std::min(2, rows.tile - t), rows.first};
      Part of = part;
      of.sums += t * kSums;
      if (two.tile == 2) avx2::dot_words<2>(of, two);
      else avx2::dot_words<1>(of, two);
    }
    return;
  }
#endif
  (void)level;
  dot_portable(part, rows);
}

// Calls one(Rows) for tiles of at most kMaxTile of the `number` rows of x at x[t] and y[t].
template <class One>
void for_tiles(int64_t number, const float* const* x, float* const* y, int64_t first, One one) {
  for (int64_t t = 0; t < number; t += kMaxTile)
    one(Rows{x + t, y + t, int(std::min<int64_t>(kMaxTile, number - t)), first}, t);
}

#ifdef ZIP_X86
// One row; `place` moves on to the next row's fallbacks.
inline void dot_fused(const Matrix& m, int64_t row, const uint8_t*& place, const Rows& rows) {
  const uint8_t* places[1] = {place};
  switch (rows.tile) {
    case 1: avx512::dot_fused<1, 1>(m, row, places, rows); break;
    case 2: avx512::dot_fused<1, 2>(m, row, places, rows); break;
    case 3: avx512::dot_fused<1, 3>(m, row, places, rows); break;
    default: avx512::dot_fused<1, 4>(m, row, places, rows); break;
  }
  place = places[0];
}

// Rows begin..end by fused decoding, kPackedRows at once for a single row of x.
inline void multiply_fused(const Matrix& w, int64_t row, int64_t end, int64_t number, const uint8_t* place,
                           const float* const* x, float* const* y) {
  const int64_t first = row;
  for (; number == 1 && row + kPackedRows <= end; row += kPackedRows) {
    const uint8_t* places[kPackedRows] = {place};
    for (int r = 1; r < kPackedRows; ++r) {
      const int64_t i = (row + r) * w.columns;
      places[r] = i % kTile == 0 ? w.fallbacks + w.offsets[i / kTile]
                                 : places[r - 1] + count_fallbacks(w, i - w.columns, i);
    }
    avx512::dot_fused<kPackedRows, 1>(w, row, places, Rows{x, y, 1, first});
    place = places[kPackedRows - 1];
  }
  for (; row < end; ++row) {
    const uint8_t* next = place;
    for_tiles(number, x, y, first, [&](const Rows& rows, int64_t) {
      next = place;
      dot_fused(w, row, next, rows);
    });
    place = next;
  }
}
#endif

// Rows begin..end of w times `number` rows of x (in order_of's order): y[t][r - begin].
inline void multiply_rows(const Matrix& w, int64_t begin, int64_t end, int64_t number, const float* const* x,
                          float* const* y) {
  if (begin >= end) return;
  const Level level = supported_level(w.level);
  const uint8_t* place = fallbacks_from(w, begin * w.columns);
#ifdef ZIP_X86
  if (is_fused(w)) return multiply_fused(w, begin, end, number, place, x, y);
#endif
  alignas(64) uint16_t words[kChunk];  // a part of a row, or a few short rows
  std::vector<float> sums(size_t(number * kSums));
  const int64_t band = std::max<int64_t>(1, kChunk / w.columns);
  for (int64_t row = begin; row < end; row += band) {
    const int64_t rows_now = std::min(band, end - row);
    for (int64_t c = 0; c < w.columns; c += kChunk) {
      const int64_t stop = std::min(w.columns, c + kChunk), first = row * w.columns + c;
      decode(w, first, first + (stop - c) + (rows_now - 1) * w.columns, place, words);
      for (int64_t r = 0; r < rows_now; ++r)
        for_tiles(number, x, y, begin, [&](const Rows& rows, int64_t t) {
          const uint16_t* own = words + r * w.columns;
          dot_words(level, Part{own, c, stop, w.columns, row + r, sums.data() + t * kSums}, rows);
        });
    }
  }
}

constexpr int64_t kLineBlock = 256;  // bytes that read_lines takes at once

// Reads `count` blocks and returns the sum of their 64-bit words.
inline uint64_t read_lines(const uint8_t* data, int64_t count) {
#ifdef ZIP_X86
  if (supported_level(kAvx512) >= kAvx512) return avx512::read_lines(data, count);
#endif
  uint64_t words[kLineBlock / 8], sum = 0;
  for (; count > 0; --count, data += kLineBlock) {
    std::memcpy(words, data, kLineBlock);
    for (const uint64_t word : words) sum += word;
  }
  return sum;
}

// Whether `number` rows of x go through the tiles of AMX: one row is as fast without.
inline bool uses_tiles(Level level, int64_t columns, int64_t number) {
  return level == kAmx && columns % kGroup == 0 && number >= kTilesFrom;
}

#ifdef ZIP_HAS_AMX
// y [number, rows] by tiles, in blocks of x that share decoded weights. of(begin): the weights from that row on.
template <class SourceOf>
void multiply_by_tiles(SourceOf of, int64_t rows, int64_t columns, const float* x, int64_t number, int threads,
                       float* y) {
  const int64_t parts = amx::Activations::is_narrow(x, number * columns) ? 1 : 3;
  const int64_t limit = amx::Activations::limit(parts);
  for (int64_t t = 0; t < number; t += limit) {
    amx::Activations block(x + t * columns, std::min(limit, number - t), columns, parts);
    parallel(rows, rows * columns, threads, [&](int64_t begin, int64_t end) {
      std::vector<float*> out;
      for (int64_t k = 0; k < block.number; ++k) out.push_back(y + (t + k) * rows + begin);
      auto source = of(begin);
      amx::multiply_rows(source, end - begin, block, out.data());
    });
  }
}
#endif

}  // namespace zip
