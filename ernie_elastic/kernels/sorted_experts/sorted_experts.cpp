// Forward and backward of SwiGLU experts over pairs sorted by expert, float32, called through ctypes.
//
// Plain C ABI, no dependency but the C++17 standard library: the matrix product (BLAS sgemm_) and the threads
// (GOMP_parallel) are those that torch has loaded, handed in as addresses. A thread takes a tile (some rows of one
// expert) and does everything with it while it lies in its L2 cache: gather, product, SwiGLU, product. So a layer has
// two parallel regions each way instead of one per product, and no expert-sorted copy of the inputs.
// The result does not depend on which thread takes which tile.
//
// Letters: N tokens, K chosen, S = N * K sorted pairs, E experts, H hidden, I width (2I: gate half first).

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-trapping-math")  // else the choice in sigmoid() keeps its loops from being vectorised
#endif

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu_level.h"

namespace {

using Gemm = void (*)(const char*, const char*, const int*, const int*, const int*, const float*, const float*,
                      const int*, const float*, const int*, const float*, float*, const int*);
using OpenMp = void (*)(void (*)(void*), void*, unsigned, unsigned);
Gemm gemm = nullptr;
OpenMp openmp = nullptr;

// Rows of a tile: enough for sgemm's full speed, few enough for all of a tile's matrices to stay in L2.
constexpr int64_t kTileRows = 256;
constexpr int64_t kTilesPerThread = 4;

}  // namespace

// What Python fills in; cpu_impl.py has the same fields in the same order.
struct Call {
  const float *hidden, *gate_up, *down, *weights;        // [N, H], [E, 2I, H], [E, H, I], [N, K]
  int64_t *pair, *counts;                                 // [S] sorted place -> n * K + k; [E] pairs of each expert
  float *kept, *rows, *scratch, *output;                  // [S, 2I] or null, [S, H], per thread, [N, H]
  const float* grad;                                      // [N, H], backward only, as all that follows
  float *gate_up_grad, *down_grad, *weights_grad;         // [E, 2I, H] or null, [E, H, I] or null, [N, K]
  int64_t gate_up_beta, down_beta;                        // 1: add to what is there, 0: write
  int64_t tokens, top_k, experts, hidden_size, width, threads;
};

namespace {

struct Tile {
  int64_t expert, start, stop;
  int64_t part;  // place among the partial weight gradients of experts with several tiles; -1: the first, no partial
};

// Runs work(slot, item) for every item below `items`, each thread with a slot of its own.
template <class Work>
void parallel(int64_t items, int64_t threads, Work work) {
  struct Job {
    Work* work;
    int64_t items;
    std::atomic<int64_t> next{0}, slot{0};
  } job{&work, items};
  auto run = [](void* data) {
    Job& mine = *static_cast<Job*>(data);
    const int64_t slot = mine.slot++;
    for (int64_t item = mine.next++; item < mine.items; item = mine.next++) (*mine.work)(slot, item);
  };
  const unsigned count = static_cast<unsigned>(std::min(items, threads));
  if (count > 1) {
    openmp(run, &job, count, 0);
  } else {
    run(&job);
  }
}

// c [m, n] = beta * c + op(a) op(b), row-major; lda etc. are the row lengths in memory.
void multiply(bool turn_a, bool turn_b, int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b,
              int64_t ldb, int64_t beta, float* c, int64_t ldc) {
  const int m_ = static_cast<int>(m), n_ = static_cast<int>(n), k_ = static_cast<int>(k);
  const int lda_ = static_cast<int>(lda), ldb_ = static_cast<int>(ldb), ldc_ = static_cast<int>(ldc);
  const float one = 1.0f, scale = static_cast<float>(beta);
  // BLAS is column-major: it computes the transpose, with the operands swapped.
  gemm(turn_b ? "T" : "N", turn_a ? "T" : "N", &n_, &m_, &k_, &one, b, &ldb_, a, &lda_, &scale, c, &ldc_);
}

// 1 / (1 + e^-x), vectorisable. t = e^-|x| = 2^n e^r with a polynomial of degree 6 in r, n put into the exponent.
inline float sigmoid(float x) {
  uint32_t unsigned_x;
  std::memcpy(&unsigned_x, &x, 4);
  unsigned_x &= 0x7FFFFFFFu;
  // Clamped to 87 as an integer: a float comparison would make the compiler divide by its constant result as well,
  // which gives denormal numbers, which are slow.
  const uint32_t magnitude = std::min(unsigned_x, 0x42AE0000u);
  float positive;
  std::memcpy(&positive, &magnitude, 4);
  const float shifted = positive * -1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 rounds to the nearest integer
  const float n = shifted - 12582912.0f;
  const float r = (-positive - n * 0.693359375f) - n * -2.12194440e-4f;
  float y = 1.3888889e-3f;
  y = y * r + 8.3333333e-3f;
  y = y * r + 4.1666667e-2f;
  y = y * r + 1.6666667e-1f;
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, 4);
  bits = (bits - 0x4B400000u + 127u) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  const float t = unsigned_x > magnitude ? 0.0f : y * power, large = 1.0f / (1.0f + t);
  return x < 0.0f ? t * large : large;
}

// active = weight * silu(gate) * up for one row.
FOR_EVERY_CPU void swiglu_row(const float* __restrict fused, int64_t width, float weight, float* __restrict active) {
  const float *gate = fused, *up = fused + width;
  for (int64_t i = 0; i < width; ++i) active[i] = gate[i] * sigmoid(gate[i]) * up[i] * weight;
}

// One row back: active (weighted) and the gradient of the fused pre-activations; returns the weight's gradient.
FOR_EVERY_CPU float swiglu_row_backward(const float* __restrict fused, const float* __restrict active_grad,
                                        int64_t width, float weight, float* __restrict active,
                                        float* __restrict fused_grad) {
  const float *gate = fused, *up = fused + width;
  float *gate_grad = fused_grad, *up_grad = fused_grad + width;
  for (int64_t i = 0; i < width; ++i) {
    const float slope = sigmoid(gate[i]), silu = gate[i] * slope, grad = active_grad[i] * weight;
    active[i] = silu * up[i];
    up_grad[i] = grad * silu;
    gate_grad[i] = grad * up[i] * slope * (1.0f + gate[i] - silu);
  }
  float sums[16] = {};
  int64_t i = 0;
  for (; i + 16 <= width; i += 16)
    for (int64_t j = 0; j < 16; ++j) sums[j] += active[i + j] * active_grad[i + j];
  float total = 0.0f;
  for (; i < width; ++i) total += active[i] * active_grad[i];
  for (float sum : sums) total += sum;
  for (int64_t j = 0; j < width; ++j) active[j] *= weight;
  return total;
}

FOR_EVERY_CPU void add_row(float* __restrict to, const float* __restrict from, int64_t size) {
  for (int64_t i = 0; i < size; ++i) to[i] += from[i];
}

// Tiles of whole experts where they are small; `parts` receives the number of partial weight gradients.
std::vector<Tile> make_tiles(const Call& c, int64_t limit, int64_t& parts) {
  std::vector<Tile> tiles;
  int64_t start = 0;
  parts = 0;
  for (int64_t e = 0; e < c.experts; ++e) {
    const int64_t count = c.counts[e], pieces = (count + limit - 1) / limit;
    for (int64_t piece = 0; piece < pieces; ++piece)
      tiles.push_back({e, start + count * piece / pieces, start + count * (piece + 1) / pieces,
                       piece ? parts++ : -1});
    start += count;
  }
  return tiles;
}

void gather(const Call& c, const float* from, const Tile& tile, float* to) {
  for (int64_t s = tile.start; s < tile.stop; ++s, to += c.hidden_size)
    std::memcpy(to, from + c.pair[s] / c.top_k * c.hidden_size, c.hidden_size * sizeof(float));
}

// output[n] = sum of the K rows of token n.
void reduce(const Call& c) {
  const int64_t pairs = c.tokens * c.top_k, h = c.hidden_size, chunk = 64;
  std::unique_ptr<int64_t[]> place(new int64_t[pairs]);
  for (int64_t s = 0; s < pairs; ++s) place[c.pair[s]] = s;
  parallel((c.tokens + chunk - 1) / chunk, c.threads, [&](int64_t, int64_t item) {
    for (int64_t n = item * chunk; n < std::min(c.tokens, (item + 1) * chunk); ++n) {
      std::memcpy(c.output + n * h, c.rows + place[n * c.top_k] * h, h * sizeof(float));
      for (int64_t k = 1; k < c.top_k; ++k) add_row(c.output + n * h, c.rows + place[n * c.top_k + k] * h, h);
    }
  });
}

// One tile of a backward: rows [R, H] of the hidden gradient, and its share of the projections' gradients.
void backward_tile(const Call& c, const Tile& tile, float* buffer, float* gate_up_to, int64_t gate_up_beta,
                   float* down_to, int64_t down_beta) {
  const int64_t h = c.hidden_size, w = c.width, r = kTileRows;
  float *input = buffer, *grad = input + r * h, *active_grad = grad + r * h;
  float *active = active_grad + r * w, *fused_grad = active + r * w;
  const float *gate_up = c.gate_up + tile.expert * 2 * w * h, *down = c.down + tile.expert * h * w;
  for (int64_t start = tile.start; start < tile.stop; start += r) {
    const Tile part{tile.expert, start, std::min(tile.stop, start + r), -1};
    const int64_t rows = part.stop - part.start;
    gather(c, c.grad, part, grad);
    multiply(false, false, rows, w, h, grad, h, down, w, 0, active_grad, w);
    for (int64_t s = 0; s < rows; ++s) {
      const int64_t pair = c.pair[start + s];
      c.weights_grad[pair] =
          swiglu_row_backward(c.kept + (start + s) * 2 * w, active_grad + s * w, w, c.weights[pair], active + s * w,
                              fused_grad + s * 2 * w);
    }
    if (down_to) multiply(true, false, h, w, rows, grad, h, active, w, down_beta, down_to, w);
    if (gate_up_to) {
      gather(c, c.hidden, part, input);
      multiply(true, false, 2 * w, h, rows, fused_grad, 2 * w, input, h, gate_up_beta, gate_up_to, h);
    }
    multiply(false, false, rows, h, 2 * w, fused_grad, 2 * w, gate_up, h, 0, c.rows + start * h, h);
    gate_up_beta = down_beta = 1;
  }
}

}  // namespace

extern "C" {

int experts_abi() { return 1; }

int experts_level() { return clone_level(); }

void experts_use(void* sgemm, void* gomp_parallel) {
  gemm = reinterpret_cast<Gemm>(sgemm);
  openmp = reinterpret_cast<OpenMp>(gomp_parallel);
}

// Floats of scratch that a thread needs.
int64_t experts_scratch(int64_t hidden_size, int64_t width) { return kTileRows * (2 * hidden_size + 4 * width); }

// Fills pair and counts from ids [S]: a stable counting sort. Returns -1 when an id is out of range.
int experts_sort(const int64_t* ids, int64_t pairs, int64_t experts, int64_t* pair, int64_t* counts) {
  std::fill(counts, counts + experts, 0);
  for (int64_t p = 0; p < pairs; ++p) {
    if (ids[p] < 0 || ids[p] >= experts) return -1;
    ++counts[ids[p]];
  }
  std::vector<int64_t> next(experts, 0);
  for (int64_t e = 1; e < experts; ++e) next[e] = next[e - 1] + counts[e - 1];
  for (int64_t p = 0; p < pairs; ++p) pair[next[ids[p]]++] = p;
  return 0;
}

void experts_forward(const Call* call) {
  const Call& c = *call;
  const int64_t h = c.hidden_size, w = c.width, size = experts_scratch(h, w);
  int64_t parts;
  const std::vector<Tile> tiles = make_tiles(c, kTileRows, parts);
  parallel(static_cast<int64_t>(tiles.size()), c.threads, [&](int64_t slot, int64_t item) {
    const Tile& tile = tiles[item];
    const int64_t rows = tile.stop - tile.start;
    float *input = c.scratch + slot * size, *active = input + kTileRows * h;
    float* fused = c.kept ? c.kept + tile.start * 2 * w : active + kTileRows * w;
    gather(c, c.hidden, tile, input);
    multiply(false, true, rows, 2 * w, h, input, h, c.gate_up + tile.expert * 2 * w * h, h, 0, fused, 2 * w);
    for (int64_t s = 0; s < rows; ++s)
      swiglu_row(fused + s * 2 * w, w, c.weights[c.pair[tile.start + s]], active + s * w);
    multiply(false, true, rows, h, w, active, w, c.down + tile.expert * h * w, w, 0, c.rows + tile.start * h, h);
  });
  reduce(c);
}

void experts_backward(const Call* call) {
  const Call& c = *call;
  const int64_t h = c.hidden_size, w = c.width, size = experts_scratch(h, w), pairs = c.tokens * c.top_k;
  int64_t parts;
  const std::vector<Tile> tiles = make_tiles(c, std::max(kTileRows, pairs / (kTilesPerThread * c.threads)), parts);
  std::unique_ptr<float[]> partial(new float[parts * 3 * w * h]);
  parallel(static_cast<int64_t>(tiles.size()), c.threads, [&](int64_t slot, int64_t item) {
    const Tile& tile = tiles[item];
    const bool first = tile.part < 0;
    float* part = partial.get() + (first ? 0 : tile.part * 3 * w * h);
    float* up_to = first ? c.gate_up_grad + tile.expert * 2 * w * h : part;
    float* down_to = first ? c.down_grad + tile.expert * h * w : part + 2 * w * h;
    backward_tile(c, tile, c.scratch + slot * size, c.gate_up_grad ? up_to : nullptr, first ? c.gate_up_beta : 0,
                  c.down_grad ? down_to : nullptr, first ? c.down_beta : 0);
  });
  // Partial gradients of split experts, in order; zeros for experts without a pair.
  std::vector<std::vector<int64_t>> of_expert(c.experts);
  for (const Tile& tile : tiles)
    if (tile.part >= 0) of_expert[tile.expert].push_back(tile.part);
  parallel(c.experts, c.threads, [&](int64_t, int64_t e) {
    float *up = c.gate_up_grad ? c.gate_up_grad + e * 2 * w * h : nullptr;
    float *down = c.down_grad ? c.down_grad + e * w * h : nullptr;
    if (!c.counts[e] && up && !c.gate_up_beta) std::memset(up, 0, 2 * w * h * sizeof(float));
    if (!c.counts[e] && down && !c.down_beta) std::memset(down, 0, w * h * sizeof(float));
    for (int64_t part : of_expert[e]) {
      if (up) add_row(up, partial.get() + part * 3 * w * h, 2 * w * h);
      if (down) add_row(down, partial.get() + (part * 3 + 2) * w * h, w * h);
    }
  });
  reduce(c);
}

}  // extern "C"
