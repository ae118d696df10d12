// A layer of experts in one parallel region: only the routed ones are read.
#pragma once

#include <cmath>
#include <vector>

#include "product.h"

namespace zip {

// Experts whose matrices lie below each other: expert e has rows [2 * width * e, ...) of gate_up, gate half first, and
// rows [hidden * e, ...) of down.
struct Experts {
  static constexpr int64_t kRows = 64;  // rows of a task: whole groups of the next product's columns

  const Matrix &gate_up, &down;
  int64_t hidden, width, top_k;

  // One routed expert: the pairs (token * top_k + slot) that chose it, and the rows that its products read and write.
  struct Routed {
    int64_t expert;
    std::vector<int64_t> pairs;
    std::vector<const float*> x, inner;
  };

  // Rows j..stop of the gate and of the up half, and from them columns j..stop of the inner activations.
  void gate_and_up(const Routed& r, int64_t j, int64_t stop, const Permutation& order, int64_t stride,
                   const Lines& inner) const {
    const int64_t count = int64_t(r.pairs.size()), rows = stop - j, first = r.expert * 2 * width + j;
    std::vector<float> results(size_t(2 * count * rows));
    std::vector<float*> gate, up;
    for (int64_t i = 0; i < count; ++i) {
      gate.push_back(results.data() + i * rows);
      up.push_back(results.data() + (count + i) * rows);
    }
    multiply_rows(gate_up, first, first + rows, count, r.x.data(), gate.data());
    multiply_rows(gate_up, first + width, first + width + rows, count, r.x.data(), up.data());
    for (int64_t i = 0; i < count; ++i) {
      float* out = inner.at(r.pairs[size_t(i)] * stride);
      for (int64_t k = 0; k < rows; ++k) {
        const float g = gate[size_t(i)][k];
        out[order.place(j + k)] = g / (1.0f + std::exp(-g)) * up[size_t(i)][k];
      }
    }
  }

  // Adds columns j..stop of weight * expert(x) to y, expert by expert in increasing order.
  void combine(const std::vector<Routed>& routed, int64_t j, int64_t stop, const float* weights, float* y) const {
    std::vector<float> results;
    for (const Routed& r : routed) {
      const int64_t count = int64_t(r.pairs.size()), rows = stop - j;
      results.resize(size_t(count * rows));
      std::vector<float*> out;
      for (int64_t i = 0; i < count; ++i) out.push_back(results.data() + i * rows);
      multiply_rows(down, r.expert * hidden + j, r.expert * hidden + stop, count, r.inner.data(), out.data());
      for (int64_t i = 0; i < count; ++i) {
        const float weight = weights[r.pairs[size_t(i)]];
        float* target = y + r.pairs[size_t(i)] / top_k * hidden + j;
        for (int64_t k = 0; k < rows; ++k) target[k] += weight * out[size_t(i)][k];
      }
    }
  }

  // x [number, hidden] and weights [number, top_k] to y [number, hidden], which holds zeros.
  void run(std::vector<Routed>& routed, const float* x, int64_t number, const float* weights, int threads,
           float* y) const {
    const int64_t x_stride = padded(hidden), stride = padded(width);
    const Permutation x_order(order_of(supported_level(gate_up.level), is_fused(gate_up)));
    const Permutation order(order_of(supported_level(down.level), is_fused(down)));
    const Lines ready(number * x_stride), inner(number * top_k * stride);
    for (int64_t t = 0; t < number; ++t) x_order.apply(x + t * hidden, hidden, ready.at(t * x_stride));
    for (Routed& r : routed)
      for (const int64_t pair : r.pairs) {
        r.x.push_back(ready.at(pair / top_k * x_stride));
        r.inner.push_back(inner.at(pair * stride));
      }
    const int64_t blocks = (width + kRows - 1) / kRows, first = int64_t(routed.size()) * blocks;
    const int64_t total = first + (hidden + kRows - 1) / kRows;
    const int64_t worth = int64_t(routed.size()) * 3 * hidden * width / kWeightsPerThread;
    std::atomic<int64_t> next{0}, finished{0};
    on_threads(std::min<int64_t>({int64_t(threads), total, std::max<int64_t>(1, worth)}), [&] {
      for (int64_t task = next++; task < total; task = next++) {
        if (task < first) {
          const int64_t j = task % blocks * kRows;
          gate_and_up(routed[size_t(task / blocks)], j, std::min(width, j + kRows), order, stride, inner);
          ++finished;
          continue;
        }
        while (finished.load() < first) std::this_thread::yield();  // for what other threads are still at
        const int64_t j = (task - first) * kRows;
        combine(routed, j, std::min(hidden, j + kRows), weights, y);
      }
    });
  }
};

}  // namespace zip
