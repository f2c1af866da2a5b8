// The tokens of one image as distances see them:
//
//   y_i = scale * x_i - mean, i < n        x [N][D] of any dtype, mean [D], weight [n] or null; C is acc
//
// Padding is left out, weights are scaled to a safe range, scales are powers of two (measure.h finds them and the
// mean). x is never written. Distances are summed in an order that depends on D alone.
#pragma once

#include "convert.h"
#include "gemm.h"
#include "members.h"

namespace tokenpool {
namespace TP_ISA {

template <class In>
struct Tokens {
  using C = typename AccOf<In>::Type;
  static constexpr int L = kLanes<C>, P = kPanel<C>;

  Tokens(const ClusterArgs& args, bool threads) : a(args), arena(Arena::of_this_thread()), parallel(threads) {}
  Tokens(const Tokens&) = delete;
  ~Tokens() { arena.trim(); }

  void take(int64_t b) {  // image b; what was in the arena is void
    arena.reset();
    image = b;
    x = static_cast<const In*>(a.x) + b * a.x_image_stride;
    valid = ascending = nullptr;
    n = a.tokens;
    if (a.mask) {
      const bool* mask = a.mask + image * a.tokens;
      valid = arena.take<int32_t>(a.tokens);
      n = 0;
      for (int64_t i = 0; i < a.tokens; ++i)
        if (mask[i]) valid[n++] = int32_t(i);
    }
    padded = round_up(std::max<int64_t>(n, 1), P);
    norm = arena.take<C>(padded);
  }

  // Image b, if there is one, is to be fetched in `times` calls of ahead.fetch: where it fits the second-level cache
  // beside this one.
  void want(int64_t b, int64_t times, Ahead& ahead) const {
    constexpr int64_t kFits = 256 << 10;
    const int64_t bytes = a.tokens * a.features * int64_t(sizeof(In));
    if (b < a.images && bytes <= kFits && a.x_token_stride == a.features)
      ahead.want(static_cast<const In*>(a.x) + b * a.x_image_stride, bytes, times);
  }

  // Worth waking the other threads for `operations` element operations?
  bool worth(int64_t operations) const { return parallel && operations > 200000; }

  int64_t token(int64_t i) const { return valid ? valid[i] : i; }
  const In* row(int64_t i) const { return x + token(i) * a.x_token_stride; }

  void prefetch(int64_t i) const {
    const char* from = reinterpret_cast<const char*>(row(i));
    for (int64_t b = 0; b < a.features * int64_t(sizeof(In)); b += 64) __builtin_prefetch(from + b);
  }

  int64_t local_index(int64_t token) const {  // its place among the valid tokens (the next valid one, for padding)
    if (!valid) return token;
    return std::min<int64_t>(std::lower_bound(valid, valid + n, int32_t(token)) - valid, n - 1);
  }

  // If the tokens chosen[0..k) are all different, they stand first from here on, and the others behind them.
  bool bring_forward(const int32_t* chosen, int64_t k) {
    int32_t* const order = arena.take<int32_t>(n);
    int32_t* const place = arena.take<int32_t>(n);
    for (int64_t i = 0; i < n; ++i) place[i] = -1;
    for (int64_t j = 0; j < k; ++j) {
      if (place[chosen[j]] >= 0) return false;
      place[chosen[j]] = int32_t(j);
    }
    int64_t next = k;
    for (int64_t i = 0; i < n; ++i) {
      if (place[i] < 0) place[i] = int32_t(next++);
      order[place[i]] = int32_t(token(i));
    }
    if (weight) {
      C* const moved = arena.take<C>(n);
      for (int64_t i = 0; i < n; ++i) moved[place[i]] = weight[i];
      weight = moved;
    }
    valid = order;
    ascending = place;
    return true;
  }

  void centered(int64_t i, C* out) const {  // y_i
    const In* from = row(i);
    for (int64_t d = 0; d < a.features; ++d) out[d] = C(to_float(from[d])) * scale - mean[d];
  }

  // y_first .. y_(first + P - 1) as a packed panel (gemm.h); zeros past the end.
  void pack(int64_t first, C* panel) const {
    const In* rows[P];
    const int64_t count = std::min<int64_t>(P, n - first);
    for (int64_t r = 0; r < count; ++r) rows[r] = row(first + r);
    pack_panel<In, C>(rows, count, a.features, scale, mean, panel);
  }

  C squared_difference(const In* from, const C* center) const {  // ||from * scale - center||^2
    constexpr int W = 4;
    const int64_t D = a.features;
    const Vec<C> factor = splat(scale);
    Vec<C> sum[W] = {};
    C rest = 0;
    int64_t d = 0;
    for (; d + W * L <= D; d += W * L)
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) {
        const Vec<C> difference = load_acc(from + d + w * L) * factor - load(center + d + w * L);
        sum[w] += difference * difference;
      }
    for (; d + L <= D; d += L) {
      const Vec<C> difference = load_acc(from + d) * factor - load(center + d);
      sum[0] += difference * difference;
    }
    for (; d < D; ++d) {
      const C difference = C(to_float(from[d])) * scale - center[d];
      rest += difference * difference;
    }
    return lane_sum<C>((sum[0] + sum[1]) + (sum[2] + sum[3])) + rest;
  }

  // out[t * M + m] = ||from[t] * scale - mean - center[m]||^2, summed alike for every T and M: equal centers are
  // equally far.
  template <int T, int M>
  TP_INLINE void squared_differences(const In* const (&from)[T], const C* const (&center)[M], C* out) const {
    constexpr int W = 2;
    const int64_t D = a.features;
    const Vec<C> factor = splat(scale);
    Vec<C> sum[T][M][W] = {};
    C rest[T][M] = {};
    int64_t d = 0;
    const auto add = [&](int w) {
      const Vec<C> shift = load(mean + d + w * L);
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
        const Vec<C> token = load_acc(from[t] + d + w * L) * factor - shift;
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
          const Vec<C> difference = token - load(center[m] + d + w * L);
          sum[t][m][w] += difference * difference;
        }
      }
    };
    for (; d + W * L <= D; d += W * L)
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) add(w);
    for (; d + L <= D; d += L) add(0);
    for (; d < D; ++d)
      for (int t = 0; t < T; ++t) {
        const C token = C(to_float(from[t][d])) * scale - mean[d];
        for (int m = 0; m < M; ++m) rest[t][m] += (token - center[m][d]) * (token - center[m][d]);
      }
    for (int t = 0; t < T; ++t)
      for (int m = 0; m < M; ++m) {
        Vec<C> total = sum[t][m][0];
        for (int w = 1; w < W; ++w) total += sum[t][m][w];
        out[t * M + m] = lane_sum<C>(total) + rest[t][m];
      }
  }

  const ClusterArgs& a;
  Arena& arena;
  const bool parallel;                   // this image has all threads
  int64_t image = 0, n = 0, padded = 0;  // which image; its number of valid tokens; that in whole panels
  const In* x = nullptr;
  int32_t* valid = nullptr;       // [n] token indices, or null: all
  int32_t* ascending = nullptr;   // [n] the order sums and ties go by, that of the image, or null: as they stand
  const C* weight = nullptr;      // [n] scaled, or null
  C scale = 1, weight_scale = 1;  // powers of two
  C* mean = nullptr;              // [D] what is taken off all tokens, scaled: about their mean
  C* norm = nullptr;              // [n] ||y_i||^2, set by the path (of rounded tokens: times Rounding::keep)
  bool finite = true;             // all tokens, and their squares
};

}  // namespace TP_ISA
}  // namespace tokenpool
