// What a call returns of one image, from its clusters:
//
//   centers_j = mean_j / scale (K-Medoids: x_medoid), mass_j = W_j, inertia = sum_i w_i ||x_i - centers_label(i)||^2
//
// assignment [N] (-1: padding), mass [K], medoids [K], centers [K][D], inertia; zeros and -1 from cluster k on. Writes
// the outputs that ClusterArgs names, and Centers::medoid.
#pragma once

#include "means.h"

namespace tokenpool {
namespace TP_ISA {

template <class In>
class Result {
  using C = typename AccOf<In>::Type;
  using I = typename Lane<C>::Int;

 public:
  Result(const Tokens<In>& tokens, Centers<C>& centers, const Assignment<In>& assigned)
      : a(tokens.a), tokens_(tokens), centers_(centers), assigned_(assigned) {}

  void write() {
    const int64_t K = a.clusters, D = a.features;
    int64_t* assignment = a.assignment + tokens_.image * a.tokens;
    C* mass = static_cast<C*>(a.mass) + tokens_.image * K;
    In* centers = static_cast<In*>(a.centers) + tokens_.image * K * D;
    int64_t* medoids = a.medoid_index + tokens_.image * K;
    const C most = std::numeric_limits<C>::max();

    int32_t* place = assigned_.count;  // cluster j is returned as place[j]
    for (int64_t j = 0; j < centers_.k; ++j) place[j] = int32_t(j);
    if (a.sort && centers_.k > 0) order_by_first_token(place);
    if (centers_.k == 0 || tokens_.n < a.tokens)
      for (int64_t i = 0; i < a.tokens; ++i) assignment[i] = -1;
    for (int64_t i = 0; i < (centers_.k > 0 ? tokens_.n : 0); ++i)
      assignment[tokens_.token(i)] = place[assigned_.label[i]];
    for (int64_t j = centers_.k; j < K; ++j) {
      mass[j] = 0;
      std::fill(centers + j * D, centers + (j + 1) * D, In{});
      medoids[j] = -1;
    }
    double* const error = tokens_.arena.template take<double>(K);
    split(a.parallel_for, tokens_.worth(2 * tokens_.n * D), centers_.k, [&](int64_t begin, int64_t end) {
      Buffer<C> mean(D);
      for (int64_t j = begin; j < end; ++j) {
        const int64_t out = place[j];
        mass[out] = std::min(assigned_.total[j] / tokens_.weight_scale, most);
        error[j] = write_center(j, mean, centers + out * D);
        medoids[out] = tokens_.token(centers_.medoid[j]);
      }
    });
    double inertia = 0;
    for (int64_t j = 0; j < centers_.k; ++j) inertia += error[j];
    inertia =
        centers_.k > 0 ? std::ldexp(inertia, -2 * std::ilogb(tokens_.scale) - std::ilogb(tokens_.weight_scale)) : 0;
    static_cast<C*>(a.inertia)[tokens_.image] = inertia > double(most) ? most : C(inertia);
  }

 private:
  // Center j as it is returned -> the weighted squared distances of its members to it; K-Means: its medoid, the member
  // nearest to it, the lowest on a tie (of two that differ the heavier one: there rounding would break every tie).
  double write_center(int64_t j, C* mean, In* out) {
    const int64_t D = a.features, first = assigned_.member[assigned_.start[j]];
    const bool alone = assigned_.size(j) == 1, settled = assigned_.settled && !assigned_.changed[j];
    if (alone || a.medoids) {
      if (!a.medoids) centers_.medoid[j] = int32_t(first);
      const In* x = tokens_.row(centers_.medoid[j]);
      std::copy(x, x + D, out);
      if (alone) {  // a NaN of the token or its weight stays NaN
        const C weight = tokens_.weight ? tokens_.weight[first] : C(1);
        return weight == C(0) ? 0 : double(tokens_.norm[first]) * double(weight) * 0;
      }
      for (int64_t d = 0; d < D; ++d) mean[d] = C(to_float(x[d])) * tokens_.scale;
    } else {
      if (!settled || equal(j) || !unshift(centers_.row + j * D, mean)) mean_of<false>(tokens_, assigned_, j, mean);
      narrow(mean, C(1) / tokens_.scale, out, D);
      if (tokens_.scale != C(1)) keep_finite(mean, out, D);
    }
    double error = 0;
    int32_t nearest = int32_t(first);
    C least = std::numeric_limits<C>::infinity(), second = least, most = 0;
    for (int64_t m = assigned_.start[j]; m < assigned_.start[j + 1]; ++m) {
      const int32_t i = assigned_.member[m];
      const C weight = tokens_.weight ? tokens_.weight[i] : C(1);
      if (weight == C(0) && a.medoids) continue;
      const C distance = settled ? assigned_.best[i] : tokens_.squared_difference(tokens_.row(i), mean);
      if (weight != C(0)) error += double(weight) * double(distance);
      nearest = distance < least ? i : nearest;
      second = distance < least ? least : std::min(second, distance);
      least = distance < least ? distance : least;
      most = distance > most ? distance : most;
    }
    if (a.medoids) return error;
    if (assigned_.size(j) == 2 && most > 0) {
      const int32_t other = assigned_.member[assigned_.start[j] + 1];
      nearest = tokens_.weight && tokens_.weight[other] > tokens_.weight[first] ? other : int32_t(first);
    } else if (most > 0 && second - least <= kTie<C> * (least + squared_norm(mean, D))) {
      nearest = least_sum_member(tokens_, assigned_.member + assigned_.start[j], assigned_.size(j), false);
    }
    centers_.medoid[j] = nearest;
    return error;
  }

  // Are all members that count where the center of this settled cluster is? Adding the shift would round them.
  bool equal(int64_t j) const {
    for (int64_t m = assigned_.start[j]; m < assigned_.start[j + 1]; ++m)
      if (assigned_.share[m] != C(0) && !(assigned_.best[assigned_.member[m]] == C(0))) return false;
    return true;
  }

  // mean = center + shift, where that loses little: the shift is not much longer than the mean.
  bool unshift(const C* center, C* mean) const {
    C longest = 0, shift = 0;
    for (int64_t d = 0; d < a.features; ++d) {
      mean[d] = center[d] + tokens_.mean[d];
      longest = std::max(longest, std::fabs(mean[d]));
      shift = std::max(shift, std::fabs(tokens_.mean[d]));
    }
    return shift <= 4 * longest;
  }

  void order_by_first_token(int32_t* place) {
    int64_t next = 0;
    for (int64_t j = 0; j < centers_.k; ++j) place[j] = -1;
    for (int64_t m = 0; m < tokens_.n; ++m) {
      const I j = assigned_.label[tokens_.ascending ? tokens_.ascending[m] : m];
      if (place[j] < 0) place[j] = int32_t(next++);
    }
  }

  const ClusterArgs& a;
  const Tokens<In>& tokens_;
  Centers<C>& centers_;
  const Assignment<In>& assigned_;
};

}  // namespace TP_ISA
}  // namespace tokenpool
