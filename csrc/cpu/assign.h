// The nearest of given centers for every token:
//
//   label_i = argmin_j ||x_i - c_j||^2, ties to the lowest j       x [N][D], c [K][D], K of any size; writes label [N]
//
// Products of panels of tokens with blocks of centers (gemm.h) give the scores ||c||^2 - 2 <x, c>, both measured from
// the mean center; nothing of size N x K is in memory. Rounding moves a score by less than slack (2 ||c||^2 + ||x||^2):
// where that leaves open which is the lowest, the token is compared with all centers by differences in double. So every
// label is that of exact arithmetic, whatever lies far away; what is not a number is never nearest.
#pragma once

#include "gemm.h"
#include "members.h"
#include "nearest.h"

namespace tokenpool {
namespace TP_ISA {

template <class C>
TP_INLINE Vec<double> load_double(const C* from) {
  typedef C Part __attribute__((vector_size(kLanes<double> * sizeof(C)), aligned(alignof(C)), may_alias));
  return __builtin_convertvector(*reinterpret_cast<const Part*>(from), Vec<double>);
}

// ||x - center||^2 in double, both times scale; cut short, at some larger number, where it exceeds `limit`.
template <class C>
inline double distance_in_double(const C* x, const C* center, int64_t features, double scale, double limit) {
  constexpr int L = kLanes<double>;
  constexpr int64_t kBlock = 16 * L;
  double total = 0;
  for (int64_t d = 0; d < features && !(total > limit);) {
    const int64_t end = std::min(d + kBlock, features);
    Vec<double> sum = {};
    double rest = 0;
    for (; d + L <= end; d += L) {
      const Vec<double> apart = load_double(x + d) * splat(scale) - load_double(center + d) * splat(scale);
      sum += apart * apart;
    }
    for (; d < end; ++d) {
      const double apart = double(x[d]) * scale - double(center[d]) * scale;
      rest += apart * apart;
    }
    total += lane_sum<double>(sum) + rest;
  }
  return total;
}

template <class C>
inline C largest_magnitude(const C* values, int64_t count) {  // of the finite ones
  C largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const C size = std::fabs(values[i]);
    largest = size > largest && size <= std::numeric_limits<C>::max() ? size : largest;
  }
  return largest;
}

template <class In>
class Assigner {
  using C = typename AccOf<In>::Type;
  using I = typename Lane<C>::Int;
  static constexpr int L = kLanes<C>, P = kPanel<C>;
  static constexpr int64_t kCenters = 64, kPanels = 8;  // multiplied at a time

 public:
  Assigner(const AssignArgs& args, int64_t b, bool parallel, Watch& watch)
      : a(args),
        watch_(watch),
        x_(static_cast<const In*>(a.x) + b * a.x_image_stride),
        given_(static_cast<const C*>(a.centers) + b * a.clusters * a.features),
        mask_(a.mask ? a.mask + b * a.tokens : nullptr),
        label_(a.assignment + b * a.tokens),
        parallel_(parallel),
        shift_(a.features),
        center_(a.clusters * a.features),
        norm_(a.clusters),
        lowest_(a.clusters) {}

  void run() {
    prepare_centers();
    constexpr int64_t kTokens = kPanels * P;
    const int64_t pieces = (a.tokens + kTokens - 1) / kTokens;
    split(a.parallel_for, parallel_ && a.tokens * a.clusters * a.features > 1600000, pieces,
          [&](int64_t begin, int64_t end) { assign(begin * kTokens, std::min(end * kTokens, a.tokens)); });
  }

 private:
  struct Found {  // of a panel's tokens: the lowest scores can be, the lowest of all but one center, and that one
    Vec<C> best[TP_VECTORS], second[TP_VECTORS];
    Vec<I> label[TP_VECTORS];
  };

  void prepare_centers() {
    const int64_t D = a.features, K = a.clusters;
    scale_ = safe_scale(largest_magnitude(given_, K * D));
    for (int64_t d = 0; d < D; ++d) shift_[d] = 0;
    const C most = std::numeric_limits<C>::max();
    for (int64_t j = 0; j < K; ++j) {
      const C* center = given_ + j * D;
      for (int64_t d = 0; d < D; ++d) shift_[d] += std::fabs(center[d]) <= most ? center[d] * scale_ : C(0);
    }
    for (int64_t d = 0; d < D; ++d) shift_[d] /= C(K);
    slack_ = C(std::min(D, kDepthBlock) + D / kDepthBlock + 16) * std::numeric_limits<C>::epsilon();
    split(a.parallel_for, parallel_ && K * D > 200000, K, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) {
        C* center = center_ + j * D;
        for (int64_t d = 0; d < D; ++d) center[d] = given_[j * D + d] * scale_ - shift_[d];
        norm_[j] = squared_length(center);
        lowest_[j] = norm_[j] * (C(1) - C(2) * slack_);
      }
    });
  }

  C squared_length(const C* row) const {
    C total = 0;
    for (int64_t d = 0; d < a.features;) {
      const int64_t end = std::min(d + kDepthBlock, a.features);
      Vec<C> sum = {};
      C rest = 0;
      for (; d + L <= end; d += L) sum += load(row + d) * load(row + d);
      for (; d < end; ++d) rest += row[d] * row[d];
      total += lane_sum<C>(sum) + rest;
    }
    return total;
  }

  void assign(int64_t first, int64_t last) const {
    const int64_t D = a.features;
    Buffer<C> packed(kPanels * P * D), products(kCenters * P), scratch(D);
    Buffer<Found> found(kPanels);
    C* out[kCenters];
    for (int64_t c = 0; c < kCenters; ++c) out[c] = products + c * P;
    int32_t token[kPanels * P];
    while (first < last) {
      watch_.look();
      int64_t count = 0;
      for (; first < last && count < kPanels * P; ++first) {
        if (mask_ && !mask_[first])
          label_[first] = -1;
        else
          token[count++] = int32_t(first);
      }
      const int64_t panels = (count + P - 1) / P;
      for (int64_t q = 0; q < panels; ++q) {
        pack(token + q * P, std::min<int64_t>(P, count - q * P), packed + q * P * D);
        for (int v = 0; v < TP_VECTORS; ++v) {
          found[q].best[v] = found[q].second[v] = splat(std::numeric_limits<C>::infinity());
          found[q].label[v] = Vec<I>{};
        }
      }
      for (int64_t j = 0; j < a.clusters; j += kCenters) {
        const int64_t block = std::min(kCenters, a.clusters - j);
        for (int64_t q = 0; q < panels; ++q) {
          const int64_t vectors = (std::min<int64_t>(P, count - q * P) + L - 1) / L;
          multiply_panel<C>(center_ + j * D, D, nullptr, block, vectors, packed + q * P * D, out);
          compare(j, block, products, vectors, found[q]);
        }
      }
      for (int64_t q = 0; q < panels; ++q)
        finish(token + q * P, std::min<int64_t>(P, count - q * P), packed + q * P * D, found[q], scratch);
    }
  }

  void pack(const int32_t* token, int64_t count, C* panel) const {
    const In* rows[P];
    for (int64_t r = 0; r < count; ++r) rows[r] = x_ + token[r] * a.x_token_stride;
    pack_panel<In, C>(rows, count, a.features, scale_, shift_, panel);
  }

  TP_INLINE void compare(int64_t first, int64_t count, const C* products, int64_t vectors, Found& found) const {
    for (int v = 0; v < vectors; ++v) {
      Vec<C> best = found.best[v], second = found.second[v];
      Vec<I> label = found.label[v];
      for (int64_t c = 0; c < count; ++c) {
        const Vec<C> low = splat(lowest_[first + c]) - C(2) * load(products + c * P + v * L);
        const auto lower = low < best;
        const Vec<C> other = lower ? best : low;
        second = other < second ? other : second;
        best = lower ? low : best;
        label = lower ? splat(I(first + c)) : label;
      }
      found.best[v] = best;
      found.second[v] = second;
      found.label[v] = label;
    }
  }

  void finish(const int32_t* token, int64_t count, const C* panel, const Found& found, C* scratch) const {
    for (int v = 0; v * L < count; ++v) {
      Vec<C> norm = {};
      for (int64_t d0 = 0; d0 < a.features; d0 += kDepthBlock) {
        Vec<C> block = {};
        for (int64_t d = d0; d < std::min(d0 + kDepthBlock, a.features); ++d)
          block += load(panel + d * P + v * L) * load(panel + d * P + v * L);
        norm += block;
      }
      for (int r = 0; r < L && v * L + r < count; ++r) {
        const int64_t i = token[v * L + r], j = found.label[v][r];
        const C room = slack_ * (C(4) * norm_[j] + C(2) * norm[r]);
        label_[i] = found.second[v][r] > found.best[v][r] + room ? j : nearest_in_double(i, j, scratch);
      }
    }
  }

  // likely: a center that is nearest or nearly so.
  int64_t nearest_in_double(int64_t i, int64_t likely, C* scratch) const {
    const int64_t D = a.features, K = a.clusters;
    const C* x = as_acc(x_ + i * a.x_token_stride, scratch, D);
    double scale = 1;  // by how far that one is: whatever is farther may overflow
    if (std::is_same<C, double>::value) {
      double apart = 0;
      for (int64_t d = 0; d < D; ++d) apart = std::max(apart, std::fabs(0.5 * x[d] - 0.5 * given_[likely * D + d]));
      scale = safe_scale<double>(apart);
    }
    const auto distance = [&](int64_t j, double limit) {
      return distance_in_double(x, given_ + j * D, D, scale, limit);
    };
    int64_t nearest = likely;
    double least = distance(likely, std::numeric_limits<double>::infinity());
    if (!(least == least)) {
      nearest = K;
      least = std::numeric_limits<double>::infinity();
    }
    for (int64_t j = 0; j < K; ++j) {
      const double found = distance(j, least);
      if (found < least || (found == least && j < nearest)) {
        least = found;
        nearest = j;
      }
    }
    return nearest < K ? nearest : 0;
  }

  const AssignArgs& a;
  Watch& watch_;
  const In* x_;
  const C* given_;  // [K][D] as they came
  const bool* mask_;
  int64_t* label_;
  const bool parallel_;
  C scale_ = 1, slack_ = 0;   // scale: a power of two
  Buffer<C> shift_, center_;  // [D] the mean center, scaled; [K][D] scaled, from there
  Buffer<C> norm_, lowest_;   // [K] their squared lengths, and those less what rounding may have added
};

template <class In>
inline void assign_all(const AssignArgs& a) {
  const bool over_images = a.images >= a.threads && a.threads > 1;
  Watch watch;
  hand_out(a.parallel_for, over_images ? a.threads : 1, a.images,
           [&](int64_t b) { Assigner<In>(a, b, !over_images && a.threads > 1, watch).run(); });
}

static void assign(const AssignArgs& a) {
  switch (a.dtype) {
    case DType::Float32:
      return assign_all<float>(a);
    case DType::Float64:
      return assign_all<double>(a);
    case DType::BFloat16:
      return assign_all<BF16>(a);
    case DType::Float16:
      return assign_all<FP16>(a);
  }
}

}  // namespace TP_ISA
}  // namespace tokenpool
