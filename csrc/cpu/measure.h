// What is taken off all tokens of an image, and what they and their weights are multiplied by:
//
//   y_i = scale * x_i - mean       mean: about the weighted tokens' mean; scale, weight_scale: powers of two, mostly 1
//
// so that no square overflows or vanishes, and distances keep their digits. Writes scale, mean, finite, weight and
// weight_scale of its Tokens.
#pragma once

#include "tokens.h"

namespace tokenpool {
namespace TP_ISA {

template <class In>
class Measure {
  using C = typename AccOf<In>::Type;
  static constexpr int L = kLanes<C>;

 public:
  explicit Measure(Tokens<In>& tokens) : a(tokens.a), arena_(tokens.arena), tokens_(tokens) {}

  // Weights, and the scale and shift of the tokens. Tokens of weight zero have no say in these while others have one.
  void run() {
    take_weights();
    const int64_t D = a.features;
    tokens_.mean = arena_.take<C>(D);
    const int32_t* heavy = nullptr;  // the tokens of positive weight, or null: all
    int64_t count = tokens_.n;
    if (tokens_.weight) {
      int32_t* const positive = arena_.take<int32_t>(tokens_.n);
      int64_t found = 0;
      for (int64_t i = 0; i < tokens_.n; ++i)
        if (tokens_.weight[i] > 0) positive[found++] = int32_t(i);
      if (found > 0 && found < tokens_.n) heavy = positive, count = found;
    }
    C* __restrict mean = tokens_.mean;
    for (int64_t d = 0; d < D; ++d) mean[d] = 0;
    Vec<C> most = {};
    int64_t i = 0;
    if (!heavy)
      for (; i + 4 <= tokens_.n; i += 4) add_tokens<4>(i, mean, most);
    for (; i < count; ++i) add_tokens<1>(heavy ? heavy[i] : i, mean, most);
    C largest = 0;
    for (int v = 0; v < L; ++v) largest = most[v] > largest ? most[v] : largest;
    tokens_.scale = safe_scale(largest);
    if (tokens_.scale != C(1)) {  // the sum above may be out of range
      C* scratch = arena_.take<C>(D);
      for (int64_t d = 0; d < D; ++d) mean[d] = 0;
      for (i = 0; i < count; ++i) {
        const C* x = as_acc(tokens_.row(heavy ? heavy[i] : i), scratch, D);
        for (int64_t d = 0; d < D; ++d) mean[d] += x[d] * tokens_.scale;
      }
    }
    C nothing = 0;  // NaN from a token that is not finite
    for (int64_t d = 0; d < D; ++d) {
      mean[d] /= C(count);
      nothing += mean[d] * 0;
    }
    tokens_.finite = nothing == 0;
    if (heavy && tokens_.finite) tokens_.finite = all_in_range();
    if (tokens_.finite) choose_shift(heavy, count);
  }

 private:
  void take_weights() {
    tokens_.weight = nullptr;
    tokens_.weight_scale = 1;
    if (!a.weights) return;
    const C* given = static_cast<const C*>(a.weights) + tokens_.image * a.tokens;
    C* weight = arena_.take<C>(tokens_.n);
    C heaviest = 0;
    for (int64_t i = 0; i < tokens_.n; ++i)
      heaviest = given[tokens_.token(i)] > heaviest ? given[tokens_.token(i)] : heaviest;
    tokens_.weight_scale =
        safe_scale(heaviest, std::is_same<C, float>::value ? 20 : 200);  // times a distance it must fit, too
    for (int64_t i = 0; i < tokens_.n; ++i) weight[i] = given[tokens_.token(i)] * tokens_.weight_scale;
    tokens_.weight = weight;
  }

  // sum += rows of this many tokens from the i-th on; most: the largest magnitude seen so far, lane by lane.
  template <int Rows>
  TP_INLINE void add_tokens(int64_t i, C* sum, Vec<C>& most) const {
    const In* x[Rows];
    for (int r = 0; r < Rows; ++r) x[r] = tokens_.row(i + r);
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

  // Are the squares of all tokens finite, those of weight zero included?
  bool all_in_range() const {
    const C limit = std::ldexp(C(1), std::is_same<C, float>::value ? 56 : 480);
    for (int64_t i = 0; i < tokens_.n; ++i) {
      const In* x = tokens_.row(i);
      for (int64_t d = 0; d < a.features; ++d)
        if (!(std::fabs(C(to_float(x[d])) * tokens_.scale) < limit)) return false;
    }
    return true;
  }

  // The largest difference of two tokens in one feature; of a token and the mean.
  C apart(const In* x, const In* y) const {
    C most = 0;
    for (int64_t d = 0; d < a.features; ++d) {
      const C v = std::fabs(C(to_float(x[d])) - C(to_float(y[d]))) * tokens_.scale;
      most = v > most ? v : most;
    }
    return most;
  }

  C from_mean(const In* x) const {
    C most = 0;
    for (int64_t d = 0; d < a.features; ++d) {
      const C v = std::fabs(C(to_float(x[d])) * tokens_.scale - tokens_.mean[d]);
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
      x[s] = tokens_.row(heavy ? heavy[i] : i);
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
          for (int64_t d = 0; d < a.features; ++d) tokens_.mean[d] = C(to_float(x[best][d])) * tokens_.scale;
          keep_digits(x, samples);
          return;
        }
      }
    }
    const C unit = std::ldexp(C(1), std::ilogb(largest) - 3);
    const C magic = unit * C(std::is_same<C, float>::value ? 3LL << 22 : 3LL << 51), limit = magic / 8;
    for (int64_t d = 0; d < a.features; ++d) {
      const C rounded = (tokens_.mean[d] + magic) - magic;  // to a multiple of unit
      tokens_.mean[d] = std::fabs(tokens_.mean[d]) < limit ? rounded : tokens_.mean[d];
    }
    keep_digits(x, samples);
  }

  // Nothing is taken off a feature in which one of the sample is much nearer to 0: it would lose its digits, and others
  // gain none.
  void keep_digits(const In* const* x, int samples) {
    for (int64_t d = 0; d < a.features; ++d) {
      if (tokens_.mean[d] == C(0)) continue;
      C nearest = std::numeric_limits<C>::max();
      for (int s = 0; s < samples; ++s) nearest = std::min(nearest, std::fabs(C(to_float(x[s][d]))));
      if (nearest * tokens_.scale * 64 < std::fabs(tokens_.mean[d])) tokens_.mean[d] = 0;
    }
  }

  static C lower_median(const C* values, int count) {
    C sorted[8];
    std::copy(values, values + count, sorted);
    std::sort(sorted, sorted + count);
    return sorted[(count - 1) / 2];
  }

  const ClusterArgs& a;
  Arena& arena_;
  Tokens<In>& tokens_;
};

}  // namespace TP_ISA
}  // namespace tokenpool
