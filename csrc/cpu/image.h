// The tokens of one image as the clustering sees them: without padding, scaled to a safe range, centered, weighted.
#pragma once

#include "convert.h"
#include "gemm.h"
#include "groups.h"

namespace tokenpool {
namespace TP_ISA {

template <class In>
class Image {
 protected:
  using C = typename AccOf<In>::Type;
  using I = typename Lane<C>::Int;
  static constexpr int L = kLanes<C>, P = kPanel<C>;

  explicit Image(const ClusterArgs& args) : a(args), arena_(Arena::of_this_thread()) {}
  ~Image() { arena_.trim(); }

  void take_image(int64_t b) {
    arena_.reset();
    image_ = b;
    x_ = static_cast<const In*>(a.x) + b * a.x_image_stride;
    valid_ = ascending_ = nullptr;
    n_ = a.tokens;
    if (!a.mask) return;
    const bool* mask = a.mask + image_ * a.tokens;
    valid_ = arena_.take<int32_t>(a.tokens);
    n_ = 0;
    for (int64_t i = 0; i < a.tokens; ++i)
      if (mask[i]) valid_[n_++] = int32_t(i);
  }

  // Image b, if there is one, is to be fetched in `times` calls of ahead.fetch: where it fits the second-level cache
  // beside this one.
  void want_image(int64_t b, int64_t times, Ahead& ahead) const {
    constexpr int64_t kFits = 256 << 10;
    const int64_t bytes = a.tokens * a.features * int64_t(sizeof(In));
    if (b < a.images && bytes <= kFits && a.x_token_stride == a.features)
      ahead.want(static_cast<const In*>(a.x) + b * a.x_image_stride, bytes, times);
  }

  int64_t token(int64_t i) const { return valid_ ? valid_[i] : i; }
  const In* row(int64_t i) const { return x_ + token(i) * a.x_token_stride; }

  int64_t local_index(int64_t token) const {  // its place among the valid tokens (the next valid one, for padding)
    if (!valid_) return token;
    return std::min<int64_t>(std::lower_bound(valid_, valid_ + n_, int32_t(token)) - valid_, n_ - 1);
  }

  // sum += rows of this many tokens from the i-th on; most: the largest magnitude seen so far, lane by lane.
  template <int Rows>
  TP_INLINE void add_tokens(int64_t i, C* sum, Vec<C>& most) const {
    const In* x[Rows];
    for (int r = 0; r < Rows; ++r) x[r] = row(i + r);
    int64_t d = 0;
    for (; d + L <= a.features; d += L) {
      Vec<C> total = {};
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        const Vec<C> v = load_acc(x[r] + d);
        total += v;
        most = larger<C>(most, magnitude<C>(v));
      }
      store(sum + d, load(sum + d) + total);
    }
    for (; d < a.features; ++d)
      for (int r = 0; r < Rows; ++r) {
        const C v = C(to_float(x[r][d]));
        sum[d] += v;
        most[0] = std::fabs(v) > most[0] ? std::fabs(v) : most[0];
      }
  }

  // Weights, and the scale and shift of the tokens. Tokens of weight zero have no say in these while others have one.
  void measure() {
    take_weights();
    const int64_t D = a.features;
    mean_ = arena_.take<C>(D);
    const int32_t* heavy = nullptr;  // the tokens of positive weight, or null: all
    int64_t count = n_;
    if (weight_) {
      int32_t* const positive = arena_.take<int32_t>(n_);
      int64_t found = 0;
      for (int64_t i = 0; i < n_; ++i)
        if (weight_[i] > 0) positive[found++] = int32_t(i);
      if (found > 0 && found < n_) heavy = positive, count = found;
    }
    C* __restrict mean = mean_;
    for (int64_t d = 0; d < D; ++d) mean[d] = 0;
    Vec<C> most = {};
    int64_t i = 0;
    if (!heavy)
      for (; i + 4 <= n_; i += 4) add_tokens<4>(i, mean, most);
    for (; i < count; ++i) add_tokens<1>(heavy ? heavy[i] : i, mean, most);
    C largest = 0;
    for (int v = 0; v < L; ++v) largest = most[v] > largest ? most[v] : largest;
    scale_ = safe_scale(largest);
    if (scale_ != C(1)) {  // the sum above may be out of range
      C* scratch = arena_.take<C>(D);
      for (int64_t d = 0; d < D; ++d) mean[d] = 0;
      for (i = 0; i < count; ++i) {
        const C* x = as_acc(row(heavy ? heavy[i] : i), scratch, D);
        for (int64_t d = 0; d < D; ++d) mean[d] += x[d] * scale_;
      }
    }
    C nothing = 0;  // NaN from a token that is not finite
    for (int64_t d = 0; d < D; ++d) {
      mean[d] /= C(count);
      nothing += mean[d] * 0;
    }
    finite_ = nothing == 0;
    if (heavy && finite_) finite_ = all_in_range();
    if (finite_) choose_shift(heavy, count);
  }

  void take_weights() {
    weight_ = nullptr;
    weight_scale_ = 1;
    if (!a.weights) return;
    const C* given = static_cast<const C*>(a.weights) + image_ * a.tokens;
    C* weight = arena_.take<C>(n_);
    C heaviest = 0;
    for (int64_t i = 0; i < n_; ++i) heaviest = given[token(i)] > heaviest ? given[token(i)] : heaviest;
    weight_scale_ =
        safe_scale(heaviest, std::is_same<C, float>::value ? 20 : 200);  // times a distance it must fit, too
    for (int64_t i = 0; i < n_; ++i) weight[i] = given[token(i)] * weight_scale_;
    weight_ = weight;
  }

  // Are the squares of all tokens finite, those of weight zero included?
  bool all_in_range() const {
    const C limit = std::ldexp(C(1), std::is_same<C, float>::value ? 56 : 480);
    for (int64_t i = 0; i < n_; ++i) {
      const In* x = row(i);
      for (int64_t d = 0; d < a.features; ++d)
        if (!(std::fabs(C(to_float(x[d])) * scale_) < limit)) return false;
    }
    return true;
  }

  // The largest difference of two tokens in one feature; of a token and the mean.
  C apart(const In* x, const In* y) const {
    C most = 0;
    for (int64_t d = 0; d < a.features; ++d) {
      const C v = std::fabs(C(to_float(x[d])) - C(to_float(y[d]))) * scale_;
      most = v > most ? v : most;
    }
    return most;
  }
  C from_mean(const In* x) const {
    C most = 0;
    for (int64_t d = 0; d < a.features; ++d) {
      const C v = std::fabs(C(to_float(x[d])) * scale_ - mean_[d]);
      most = v > most ? v : most;
    }
    return most;
  }

  // Distances do not depend on what is taken off all tokens; their rounding does. It is the mean token, rounded to an
  // eighth or sixteenth of the power of two below the largest deviation in a sample: small integers stay integers of
  // few bits, and ties between them ties. Where a few far tokens pull the mean away from most, a token of the sample.
  void choose_shift(const int32_t* heavy, int64_t count) {
    constexpr int kSample = 8;
    const int samples = int(std::min<int64_t>(kSample, count));
    const In* x[kSample];
    C deviation[kSample], step[kSample], largest = 0;
    for (int s = 0; s < samples; ++s) {
      const int64_t i = samples > 1 ? s * (count - 1) / (samples - 1) : 0;
      x[s] = row(heavy ? heavy[i] : i);
      deviation[s] = from_mean(x[s]);
      largest = std::max(largest, deviation[s]);
      if (s > 0) step[s - 1] = apart(x[s - 1], x[s]);
    }
    if (!(largest > 0)) return;
    if (samples > 3) {
      const C typical = lower_median(deviation, samples);
      if (lower_median(step, samples - 1) * 64 < typical) {
        int best = 0;
        C least = std::numeric_limits<C>::infinity();
        for (int s = 0; s < samples; ++s) {
          C way[kSample];
          for (int t = 0, w = 0; t < samples; ++t)
            if (t != s) way[w++] = apart(x[s], x[t]);
          const C middle = lower_median(way, samples - 1);
          if (middle < least) least = middle, best = s;
        }
        if (least * 64 < typical) {
          for (int64_t d = 0; d < a.features; ++d) mean_[d] = C(to_float(x[best][d])) * scale_;
          return;
        }
      }
    }
    const C unit = std::ldexp(C(1), std::ilogb(largest) - 3);
    const C magic = unit * C(std::is_same<C, float>::value ? 3LL << 22 : 3LL << 51), limit = magic / 8;
    for (int64_t d = 0; d < a.features; ++d) {
      const C rounded = (mean_[d] + magic) - magic;  // to a multiple of unit
      mean_[d] = std::fabs(mean_[d]) < limit ? rounded : mean_[d];
    }
  }

  static C lower_median(const C* values, int count) {
    C sorted[8];
    std::copy(values, values + count, sorted);
    std::sort(sorted, sorted + count);
    return sorted[(count - 1) / 2];
  }

  // Centered, scaled tokens [first, first + P) as a packed panel; zeros past the end.
  void pack(int64_t first, C* panel) const {
    const In* rows[P];
    const int64_t count = std::min<int64_t>(P, n_ - first);
    for (int64_t r = 0; r < count; ++r) rows[r] = row(first + r);
    pack_panel<In, C>(rows, count, a.features, scale_, mean_, panel);
  }

  void panel_norms(const C* panel,
                   C* norm) const {  // summed as products are: a token's norm is its product with itself
    Vec<C> sum[TP_VECTORS] = {};
    for (int64_t d0 = 0; d0 < a.features; d0 += kDepthBlock) {
      Vec<C> block[TP_VECTORS] = {};
      const int64_t end = std::min(d0 + kDepthBlock, a.features);
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

  C squared_norm(const C* x) const {
    constexpr int W = 4;
    const int64_t D = a.features;
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
  void move_center(const C* to, C* center, C& way, C& norm) const {
    constexpr int W = 4;
    const int64_t D = a.features;
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

  // If the tokens chosen[0..k) are all different, they stand first from here on, and the others behind them.
  bool bring_forward(const int32_t* chosen, int64_t k) {
    int32_t* const order = arena_.take<int32_t>(n_);
    int32_t* const place = arena_.take<int32_t>(n_);
    for (int64_t i = 0; i < n_; ++i) place[i] = -1;
    for (int64_t j = 0; j < k; ++j) {
      if (place[chosen[j]] >= 0) return false;
      place[chosen[j]] = int32_t(j);
    }
    int64_t next = k;
    for (int64_t i = 0; i < n_; ++i) {
      if (place[i] < 0) place[i] = int32_t(next++);
      order[place[i]] = int32_t(token(i));
    }
    if (weight_) {
      C* const weight = arena_.take<C>(n_);
      for (int64_t i = 0; i < n_; ++i) weight[place[i]] = weight_[i];
      weight_ = weight;
    }
    valid_ = order;
    ascending_ = place;
    return true;
  }

  // The i-th token as distances see it: x * scale - mean.
  void center_token(int64_t i, C* out) const {
    const In* x = row(i);
    for (int64_t d = 0; d < a.features; ++d) out[d] = C(to_float(x[d])) * scale_ - mean_[d];
  }

  C squared_difference(const In* x, const C* center) const {  // ||x * scale - center||^2
    constexpr int W = 4;
    const int64_t D = a.features;
    const Vec<C> scale = splat(scale_);
    Vec<C> sum[W] = {};
    C rest = 0;
    int64_t d = 0;
    for (; d + W * L <= D; d += W * L)
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) {
        const Vec<C> difference = load_acc(x + d + w * L) * scale - load(center + d + w * L);
        sum[w] += difference * difference;
      }
    for (; d + L <= D; d += L) {
      const Vec<C> difference = load_acc(x + d) * scale - load(center + d);
      sum[0] += difference * difference;
    }
    for (; d < D; ++d) {
      const C difference = C(to_float(x[d])) * scale_ - center[d];
      rest += difference * difference;
    }
    return lane_sum<C>((sum[0] + sum[1]) + (sum[2] + sum[3])) + rest;
  }

  // out[t * M + m] = ||x[t] * scale - mean - center[m]||^2, summed alike for every T and M: equal centers are equally
  // far.
  template <int T, int M>
  TP_INLINE void squared_differences(const In* const (&x)[T], const C* const (&center)[M], C* out) const {
    constexpr int W = 2;
    const int64_t D = a.features;
    const Vec<C> scale = splat(scale_);
    Vec<C> sum[T][M][W] = {};
    C rest[T][M] = {};
    int64_t d = 0;
    const auto add = [&](int w) {
      const Vec<C> mean = load(mean_ + d + w * L);
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
        const Vec<C> token = load_acc(x[t] + d + w * L) * scale - mean;
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
        const C token = C(to_float(x[t][d])) * scale_ - mean_[d];
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
  Arena& arena_;
  int64_t image_ = 0, n_ = 0;  // which image; its number of valid tokens
  const In* x_ = nullptr;
  int32_t* valid_ = nullptr;        // [n] token indices, or null: all
  int32_t* ascending_ = nullptr;    // [n] the order sums and ties go by, that of the image, or null: as they stand
  const C* weight_ = nullptr;       // [n] scaled, or null
  C scale_ = 1, weight_scale_ = 1;  // powers of two
  C* mean_ = nullptr;               // [D] what is taken off all tokens, scaled: about their mean
  bool finite_ = true;              // all tokens, and their squares
};

}  // namespace TP_ISA
}  // namespace tokenpool
