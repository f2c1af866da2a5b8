// The clusters of one image as lists of their tokens, the means of those, and what a call returns.
#pragma once

#include "groups.h"
#include "image.h"

namespace tokenpool {
namespace TP_ISA {

template <class In>
class Result : protected Image<In> {
 protected:
  using Base = Image<In>;
  using Base::a, Base::image_, Base::n_, Base::weight_, Base::scale_, Base::weight_scale_, Base::mean_;
  using Base::token, Base::row, Base::squared_difference;
  using typename Base::C;
  using typename Base::I;
  static constexpr int L = kLanes<C>, P = kPanel<C>;

  Result(const ClusterArgs& args, bool parallel) : Base(args), parallel_(parallel) {}

  template <class T>
  T* take(int64_t count) {
    return this->arena_.template take<T>(count);
  }

  // Worth waking the other threads for `operations` element operations?
  bool worth(int64_t operations) const { return parallel_ && operations > 200000; }

  void take_buffers() {
    padded_ = round_up(std::max<int64_t>(n_, 1), P);
    label_ = take<I>(padded_);
    norm_ = take<C>(padded_);
    member_ = take<int32_t>(padded_);
    share_ = take<C>(padded_);
    start_ = take<int32_t>(a.clusters + 1);
    count_ = take<int32_t>(a.clusters + 1);
    medoid_ = take<int32_t>(a.clusters);
    total_ = take<C>(a.clusters);
    error_ = take<double>(a.clusters);
  }

  void group_members() {
    group(label_, n_, k_, start_, member_, this->ascending_);
    for (int64_t j = 0; j < k_; ++j)
      total_[j] = shares(member_ + start_[j], start_[j + 1] - start_[j], weight_, share_ + start_[j]);
  }

  // W vectors of a mean: sum over r of share[r] * (x[r] - base), scaled, after what is in out (if `add`).
  template <int W>
  TP_INLINE void add_members(const In* const* x, const C* share, int64_t count, const In* base, int64_t d, bool add,
                             C* out) const {
    const Vec<C> scale = splat(scale_);
    Vec<C> sum[W], origin[W];
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) {
      sum[w] = add ? load(out + d + w * L) : Vec<C>{};
      origin[w] = load_acc(base + d + w * L) * scale;
    }
    for (int64_t r = 0; r < count; ++r) {
      const Vec<C> s = splat(share[r]);
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) sum[w] += s * (load_acc(x[r] + d + w * L) * scale - origin[w]);
    }
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) store(out + d + w * L, sum[w]);
  }

  // out = sum of share * (x - base), scaled, over the members m.. < end that have a share; the caller has set out.
  void add_block(int64_t m, int64_t end, const In* base, bool add, C* out) const {
    constexpr int W = 4, kTogether = 16;  // members whose rows stay in the first-level cache
    const int64_t D = a.features;
    while (m < end) {
      const In* x[kTogether];
      C share[kTogether];
      int64_t count = 0;
      for (; m < end && count < kTogether; ++m) {
        share[count] = share_[m];
        x[count] = row(member_[m]);
        count += share_[m] != C(0);
      }
      int64_t d = 0;
      for (; d + W * L <= D; d += W * L) add_members<W>(x, share, count, base, d, add, out);
      for (; d + L <= D; d += L) add_members<1>(x, share, count, base, d, add, out);
      for (; d < D; ++d) {
        C sum = add ? out[d] : C(0);
        const C origin = C(to_float(base[d])) * scale_;
        for (int64_t r = 0; r < count; ++r) sum += share[r] * (C(to_float(x[r][d])) * scale_ - origin);
        out[d] = sum;
      }
      add = true;
    }
  }

  // The weighted mean of cluster j's tokens, scaled; minus the shift when Centered. It is measured from a member: equal
  // tokens give that token to the bit. Many members are added in blocks.
  template <bool Centered>
  void mean_row(int64_t j, C* out) const {
    constexpr int64_t kBlock = 256;
    const int64_t D = a.features, last = start_[j + 1];
    int64_t m = start_[j];
    while (m + 1 < last && share_[m] == C(0)) ++m;
    const In* const base = row(member_[m++]);
    const auto origin = [&](int64_t d) { return C(to_float(base[d])) * scale_ - (Centered ? mean_[d] : C(0)); };
    if (last - m <= kBlock) {
      if (m == last)
        for (int64_t d = 0; d < D; ++d) out[d] = 0;
      add_block(m, last, base, false, out);
      for (int64_t d = 0; d < D; ++d) out[d] += origin(d);
      return;
    }
    Buffer<double> total(D);
    for (int64_t d = 0; d < D; ++d) total[d] = 0;
    for (; m < last; m += kBlock) {
      add_block(m, std::min(m + kBlock, last), base, false, out);
      for (int64_t d = 0; d < D; ++d) total[d] += double(out[d]);
    }
    for (int64_t d = 0; d < D; ++d) out[d] = C(total[d] + double(origin(d)));
  }

  void finish() {
    const int64_t K = a.clusters, D = a.features;
    int64_t* assignment = a.assignment + image_ * a.tokens;
    C* mass = static_cast<C*>(a.mass) + image_ * K;
    In* centers = static_cast<In*>(a.centers) + image_ * K * D;
    int64_t* medoids = a.medoid_index + image_ * K;
    const C most = std::numeric_limits<C>::max();

    int32_t* place = count_;  // cluster j is returned as place[j]
    for (int64_t j = 0; j < k_; ++j) place[j] = int32_t(j);
    if (a.sort && k_ > 0) order_by_first_token(place);
    if (k_ == 0 || n_ < a.tokens)
      for (int64_t i = 0; i < a.tokens; ++i) assignment[i] = -1;
    for (int64_t i = 0; i < (k_ > 0 ? n_ : 0); ++i) assignment[token(i)] = place[label_[i]];
    for (int64_t j = k_; j < K; ++j) {
      mass[j] = 0;
      std::fill(centers + j * D, centers + (j + 1) * D, In{});
      medoids[j] = -1;
    }
    split(a.parallel_for, worth(2 * n_ * D), k_, [&](int64_t begin, int64_t end) {
      Buffer<C> mean(D);
      for (int64_t j = begin; j < end; ++j) {
        const int64_t out = place[j];
        mass[out] = std::min(total_[j] / weight_scale_, most);
        error_[j] = write_center(j, mean, centers + out * D);
        medoids[out] = token(medoid_[j]);
      }
    });
    double inertia = 0;
    for (int64_t j = 0; j < k_; ++j) inertia += error_[j];
    inertia = k_ > 0 ? std::ldexp(inertia, -2 * std::ilogb(scale_) - std::ilogb(weight_scale_)) : 0;
    static_cast<C*>(a.inertia)[image_] = inertia > double(most) ? most : C(inertia);
  }

  // Center j as it is returned -> the weighted squared distances of its members to it; K-Means: its medoid, the member
  // nearest to it, the lowest on a tie (of two that differ the heavier one: there rounding would break every tie).
  double write_center(int64_t j, C* mean, In* out) {
    const int64_t D = a.features, first = member_[start_[j]];
    const bool alone = start_[j + 1] - start_[j] == 1, settled = settled_ && !changed_[j];
    if (alone || a.medoids) {
      if (!a.medoids) medoid_[j] = int32_t(first);
      const In* x = row(medoid_[j]);
      std::copy(x, x + D, out);
      if (alone) {  // a NaN of the token or its weight stays NaN
        const C weight = weight_ ? weight_[first] : C(1);
        return weight == C(0) ? 0 : double(norm_[first]) * double(weight) * 0;
      }
      for (int64_t d = 0; d < D; ++d) mean[d] = C(to_float(x[d])) * scale_;
    } else {
      if (!settled || !unshift(center_ + j * D, mean)) mean_row<false>(j, mean);
      narrow(mean, C(1) / scale_, out, D);
      if (scale_ != C(1)) keep_finite(mean, out, D);
    }
    double error = 0;
    int32_t nearest = int32_t(first);
    C least = std::numeric_limits<C>::infinity(), most = 0;
    for (int64_t m = start_[j]; m < start_[j + 1]; ++m) {
      const int32_t i = member_[m];
      const C weight = weight_ ? weight_[i] : C(1);
      if (weight == C(0) && a.medoids) continue;
      const C distance = settled ? best_[i] : squared_difference(row(i), mean);
      if (weight != C(0)) error += double(weight) * double(distance);
      nearest = distance < least ? i : nearest;
      least = distance < least ? distance : least;
      most = distance > most ? distance : most;
    }
    if (a.medoids) return error;
    if (start_[j + 1] - start_[j] == 2 && most > 0) {
      const int32_t second = member_[start_[j] + 1];
      nearest = weight_ && weight_[second] > weight_[first] ? second : int32_t(first);
    }
    medoid_[j] = nearest;
    return error;
  }

  // mean = center + shift, where that loses nothing: the shift is not much longer than the mean.
  bool unshift(const C* center, C* mean) const {
    C longest = 0, shift = 0;
    for (int64_t d = 0; d < a.features; ++d) {
      mean[d] = center[d] + mean_[d];
      longest = std::max(longest, std::fabs(mean[d]));
      shift = std::max(shift, std::fabs(mean_[d]));
    }
    return shift <= 4 * longest;
  }

  void order_by_first_token(int32_t* place) {
    int64_t next = 0;
    for (int64_t j = 0; j < k_; ++j) place[j] = -1;
    for (int64_t m = 0; m < n_; ++m) {
      const I j = label_[this->ascending_ ? this->ascending_[m] : m];
      if (place[j] < 0) place[j] = int32_t(next++);
    }
  }

  const bool parallel_;
  int64_t k_ = 0, padded_ = 0;
  I* label_ = nullptr;   // [n]
  C* norm_ = nullptr;    // [n] squared norms of the tokens, scaled and centered (rounded ones: times Rounding::keep)
  C* center_ = nullptr;  // [k][D] scaled, centered
  C* best_ = nullptr;    // [n] squared distance to its center, or an upper bound of it (direct.h: assign_first)
  uint8_t* changed_ = nullptr;  // [k] members differ from those the center was last made of
  bool settled_ =
      false;  // center_ and best_ are right for clusters that did not change since (never with a NaN in mean_)
  int32_t *member_ = nullptr, *start_ = nullptr, *count_ = nullptr, *medoid_ = nullptr;
  C *share_ = nullptr, *total_ = nullptr;  // [n] by place in member_; [k] summed weights
  double* error_ = nullptr;                // [k]
};

}  // namespace TP_ISA
}  // namespace tokenpool
