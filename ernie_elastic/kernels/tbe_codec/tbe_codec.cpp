// Encodes and decodes the stored layouts `dense_plane` (docs/formats.md 2.1) and, but for zstandard, `entropy_coded` (2.3).
// reference.py is the definition.
// Letters: E matrices of n weights, T = ceil(n / 4096) tiles a matrix, P = ceil(n / 8) bytes a plane, F fallbacks.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "ranks.h"
#include "simd.h"

namespace tbe {
namespace {

// Calls body(begin, end, part) on contiguous ranges of 0..items; more than one thread only where each has enough weights.
template <class Body>
void parallel(int64_t items, int64_t weights, int threads, const Body& body) {
  constexpr int64_t kWeightsPerThread = 1 << 19;  // starting a thread costs about what 50,000 weights do
  const int64_t parts = std::max<int64_t>(1, std::min({int64_t(threads), items, weights / kWeightsPerThread}));
  std::vector<std::thread> helpers;
  int64_t started = 1;
  try {
    for (; started < parts; ++started)
      helpers.emplace_back([&, k = started] { body(items * k / parts, items * (k + 1) / parts, k); });
  } catch (const std::system_error&) {  // no more threads to be had: this one does their parts
  }
  body(0, items / parts, 0);
  for (int64_t k = started; k < parts; ++k) body(items * k / parts, items * (k + 1) / parts, k);
  for (auto& helper : helpers) helper.join();
}

struct Tile {
  int64_t matrix, begin, end;  // weights of the matrix
};

Tile tile_of(int64_t index, int64_t count) {
  const int64_t tiles = (count + kTile - 1) / kTile, matrix = index / tiles;
  const int64_t begin = index % tiles * kTile;
  return {matrix, begin, std::min(count, begin + kTile)};
}

// Whole groups of 64 weights by the widest code there is, the rest one weight at a time; returns the fallbacks' end.
uint8_t* encode_tile(Level level, const Group& group, int64_t size, uint8_t first, uint8_t* fallbacks) {
  int64_t done = 0;
#ifdef TBE_X86
  if (level == kAvx512) fallbacks = avx512::encode(group, size / 64 * 64, first, fallbacks), done = size / 64 * 64;
  if (level == kAvx2) fallbacks = avx2::encode(group, size / 32 * 32, first, fallbacks), done = size / 32 * 32;
#endif
  return portable::encode(group, done, size, first, fallbacks);
}

// The same the other way; nullptr when the tile has more fallbacks than `fallbacks..stop`.
const uint8_t* decode_tile(Level level, const Words& words, int64_t size, uint8_t first, const uint8_t* fallbacks,
                           const uint8_t* stop) {
  int64_t done = 0;
#ifdef TBE_X86
  if (level == kAvx512) fallbacks = avx512::decode(words, size / 64 * 64, first, fallbacks, stop), done = size / 64 * 64;
  if (level == kAvx2) fallbacks = avx2::decode(words, size / 32 * 32, first, fallbacks, stop), done = size / 32 * 32;
  if (fallbacks == nullptr) return nullptr;
#endif
  return portable::decode(words, done, size, first, fallbacks, stop);
}

}  // namespace
}  // namespace tbe

extern "C" {

int tbe_abi() { return 2; }

int tbe_level() { return tbe::supported_level(); }

// counts int64 [E, 256] += the exponents of words [E, n].
void tbe_count(const uint16_t* words, int64_t matrices, int64_t count, int threads, int64_t* counts) {
  if (count == 0) return;
  const int64_t tiles = (count + tbe::kTile - 1) / tbe::kTile;
  tbe::parallel(matrices * tiles, matrices * count, threads, [&](int64_t begin, int64_t end, int64_t) {
    while (begin < end) {
      const int64_t matrix = begin / tiles, stop = std::min(end, (matrix + 1) * tiles);
      const int64_t from = begin % tiles * tbe::kTile, to = std::min(count, (stop - matrix * tiles) * tbe::kTile);
      int64_t own[256] = {};
      tbe::count_exponents(words + matrix * count + from, to - from, own);
      for (int k = 0; k < 256; ++k)
        if (own[k]) __atomic_fetch_add(counts + matrix * 256 + k, own[k], __ATOMIC_RELAXED);
      begin = stop;
    }
  });
}

// words [E, n] with windows first [E] to per_tile int64 [E, T], low [E, n], planes [E, 3, P] and fallbacks [total].
// Returns 0, -1 when the words hold another number of fallbacks than `total`, or -2 when memory ran out.
int tbe_encode(const uint16_t* words, int64_t matrices, int64_t count, const uint8_t* first, int64_t level, int threads,
               int64_t* per_tile, uint8_t* low, uint8_t* planes, uint8_t* fallbacks, int64_t total) {
  if (count == 0) return total == 0 ? 0 : -1;
  const int64_t tiles = matrices * ((count + tbe::kTile - 1) / tbe::kTile), plane = (count + 7) / 8;
  const tbe::Level chosen = tbe::Level(std::min<int64_t>(level, tbe::supported_level()));
  std::vector<std::vector<uint8_t>> found(size_t(std::max(1, threads)));
  std::atomic<bool> memory{true};
  tbe::parallel(tiles, matrices * count, threads, [&](int64_t begin, int64_t end, int64_t part) {
    try {
      std::vector<uint8_t>& own = found[size_t(part)];
      own.reserve(size_t((end - begin) * tbe::kTile / 16));
      uint8_t buffer[tbe::kTile + 64];
      for (int64_t k = begin; k < end && memory; ++k) {
        const tbe::Tile tile = tbe::tile_of(k, count);
        const int64_t at = tile.matrix * count + tile.begin, bits = tile.matrix * 3 * plane + tile.begin / 8;
        const tbe::Group group{words + at, low + at, {planes + bits, planes + bits + plane, planes + bits + 2 * plane}};
        const uint8_t* stop = tbe::encode_tile(chosen, group, tile.end - tile.begin, first[tile.matrix], buffer);
        per_tile[k] = stop - buffer;
        own.insert(own.end(), static_cast<const uint8_t*>(buffer), stop);
      }
    } catch (const std::bad_alloc&) {  // must not leave a thread
      memory = false;
    }
  });
  if (!memory) return -2;
  int64_t sum = 0;
  for (const auto& own : found) sum += int64_t(own.size());
  if (sum != total) return -1;
  for (const auto& own : found) fallbacks = std::copy(own.begin(), own.end(), fallbacks);
  return 0;
}

// The way back. ends int64 [E, T]: fallbacks up to the end of each tile, not decreasing, the last one is `total`.
// Returns 0, or -1 when the fallbacks disagree with the planes or lie inside their window.
int tbe_decode(const int64_t* ends, const uint8_t* low, const uint8_t* planes, const uint8_t* first,
               const uint8_t* fallbacks, int64_t total, int64_t matrices, int64_t count, int64_t level, int threads,
               uint16_t* words) {
  if (count == 0) return total == 0 ? 0 : -1;
  const int64_t tiles = matrices * ((count + tbe::kTile - 1) / tbe::kTile), plane = (count + 7) / 8;
  const tbe::Level chosen = tbe::Level(std::min<int64_t>(level, tbe::supported_level()));
  std::atomic<bool> good{true};
  tbe::parallel(tiles, matrices * count, threads, [&](int64_t begin, int64_t end, int64_t) {
    for (int64_t k = begin; k < end && good; ++k) {
      const tbe::Tile tile = tbe::tile_of(k, count);
      const int64_t from = k ? ends[k - 1] : 0, to = ends[k];
      if (from < 0 || to < from || to > total) return good.store(false);
      const int64_t at = tile.matrix * count + tile.begin, bits = tile.matrix * 3 * plane + tile.begin / 8;
      const tbe::Words out{low + at, {planes + bits, planes + bits + plane, planes + bits + 2 * plane}, words + at};
      const uint8_t low_end = first[tile.matrix], *stop = fallbacks + to;
      if (tbe::decode_tile(chosen, out, tile.end - tile.begin, low_end, fallbacks + from, stop) != stop)
        return good.store(false);
      for (int64_t i = from; i < to; ++i)
        if (uint8_t(fallbacks[i] - low_end) < tbe::kWindow) return good.store(false);
    }
  });
  return good ? 0 : -1;
}

// One frame of `entropy_coded`: ranks.h. Both run on the caller's thread: frames are what threads share.
int64_t tbe_encode_ranks(const uint16_t* words, int64_t count, const uint8_t* table, uint8_t* low, uint8_t* pairs,
                         uint8_t* escapes) {
  return tbe::encode_ranks(words, count, table, low, pairs, escapes);
}

int tbe_decode_ranks(const uint8_t* pairs, const uint8_t* low, int64_t count, const uint8_t* table,
                     const uint8_t* escapes, int64_t number, uint16_t* words) {
  return tbe::decode_ranks(pairs, low, count, table, escapes, number, words) ? 0 : -1;
}

}  // extern "C"
