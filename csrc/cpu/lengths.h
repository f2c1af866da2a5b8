// Squared lengths of rows [D]: ||x||^2, ||to - center||^2. Each is summed in an order that depends on D alone.
// move_center writes the center.
#pragma once

#include "gemm.h"

namespace tokenpool {
namespace TP_ISA {

// Of the tokens of a panel, summed as products are: a token's norm is its product with itself.
template <class C>
inline void panel_norms(const C* panel, int64_t D, C* norm) {
  constexpr int L = kLanes<C>, P = kPanel<C>;
  Vec<C> sum[TP_VECTORS] = {};
  for (int64_t d0 = 0; d0 < D; d0 += kDepthBlock) {
    Vec<C> block[TP_VECTORS] = {};
    const int64_t end = std::min(d0 + kDepthBlock, D);
    for (int64_t d = d0; d < end; ++d)
#pragma GCC unroll 4
      for (int v = 0; v < TP_VECTORS; ++v) {
        const Vec<C> x = load(panel + d * P + v * L);
        block[v] += x * x;
      }
    for (int v = 0; v < TP_VECTORS; ++v) sum[v] = d0 > 0 ? sum[v] + block[v] : block[v];
  }
  for (int v = 0; v < TP_VECTORS; ++v) store(norm + v * L, sum[v]);
}

template <class C>
inline C squared_norm(const C* x, int64_t D) {
  constexpr int W = 4, L = kLanes<C>;
  Vec<C> sum[W] = {};
  C rest = 0;
  int64_t d = 0;
  for (; d + W * L <= D; d += W * L)
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) sum[w] += load(x + d + w * L) * load(x + d + w * L);
  for (; d + L <= D; d += L) sum[0] += load(x + d) * load(x + d);
  for (; d < D; ++d) rest += x[d] * x[d];
  return lane_sum<C>((sum[0] + sum[1]) + (sum[2] + sum[3])) + rest;
}

// center = to; how far that is away and how long it is, squared: each summed in the order of squared_norm.
template <class C>
inline void move_center(const C* to, C* center, C& way, C& norm, int64_t D) {
  constexpr int W = 4, L = kLanes<C>;
  Vec<C> apart[W] = {}, length[W] = {};
  C apart_rest = 0, length_rest = 0;
  int64_t d = 0;
  const auto add = [&](int w) {
    const Vec<C> there = load(to + d + w * L), difference = there - load(center + d + w * L);
    apart[w] += difference * difference;
    length[w] += there * there;
    store(center + d + w * L, there);
  };
  for (; d + W * L <= D; d += W * L)
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) add(w);
  for (; d + L <= D; d += L) add(0);
  for (; d < D; ++d) {
    const C difference = to[d] - center[d];
    apart_rest += difference * difference;
    length_rest += to[d] * to[d];
    center[d] = to[d];
  }
  way = lane_sum<C>((apart[0] + apart[1]) + (apart[2] + apart[3])) + apart_rest;
  norm = lane_sum<C>((length[0] + length[1]) + (length[2] + length[3])) + length_rest;
}

}  // namespace TP_ISA
}  // namespace tokenpool
