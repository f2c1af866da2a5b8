// The clusters of one image: their centers, and which tokens are in which.
//
//   label [n] in 0..k-1, best [n] = ||y_i - c_label(i)||^2; member lists, shares w_i / W_j        (y: tokens.h)
//
// Writes only itself.
#pragma once

#include "tokens.h"

namespace tokenpool {
namespace TP_ISA {

template <class C>
struct Centers {
  void take(Arena& arena, int64_t count, int64_t most) {
    k = count;
    norm = arena.take<C>(most);
    medoid = arena.take<int32_t>(most);
  }

  int64_t k = 0;
  C* row = nullptr;           // [k][D] scaled, less the mean; the gram path has them only where they are given
  C* norm = nullptr;          // [k] squared
  int32_t* medoid = nullptr;  // [k] the tokens the centers start from; K-Medoids: the centers
};

template <class In>
struct Assignment {
  using C = typename AccOf<In>::Type;
  using I = typename Lane<C>::Int;

  void take(Arena& arena, int64_t padded, int64_t most) {
    label = arena.take<I>(padded);
    previous = arena.take<I>(padded);
    best = arena.take<C>(padded);
    member = arena.take<int32_t>(padded);
    share = arena.take<C>(padded);
    start = arena.take<int32_t>(most + 1);
    count = arena.take<int32_t>(most + 1);
    total = arena.take<C>(most);
    changed = arena.take<uint8_t>(most);
    settled = false;
  }

  bool any_empty(int64_t n, int64_t k) {
    std::memset(count, 0, size_t(k) * sizeof(int32_t));
    for (int64_t i = 0; i < n; ++i) ++count[label[i]];
    return std::find(count, count + k, 0) != count + k;
  }

  void mark_changes(int64_t n, int64_t k, bool all) {
    std::memset(changed, all, size_t(k));
    if (all) return;
    for (int64_t i = 0; i < n; ++i)
      if (label[i] != previous[i]) changed[label[i]] = changed[previous[i]] = 1;
  }

  void group_members(const Tokens<In>& tokens, int64_t k) {
    group(label, tokens.n, k, start, member, tokens.ascending);
    for (int64_t j = 0; j < k; ++j) total[j] = shares(member + start[j], size(j), tokens.weight, share + start[j]);
  }

  int64_t size(int64_t j) const { return start[j + 1] - start[j]; }

  // Weighted squared distances of the tokens to their centers. (After a first assignment of rounded tokens some are
  // only bounds.)
  double loss(const Tokens<In>& tokens) const {
    const C* const weight = tokens.weight;
    double sum = 0;
    for (int64_t i = 0; i < tokens.n; ++i)
      if (!weight || weight[i] > 0) sum += double(weight ? weight[i] : C(1)) * double(best[i]);
    return sum;
  }

  I *label = nullptr, *previous = nullptr;  // [n] clusters; those of the last iteration
  C* best = nullptr;                        // [n] squared distance to its center, or an upper bound (direct.h)
  uint8_t* changed = nullptr;               // [k] members differ from those the center was last made of
  int32_t *member = nullptr, *start = nullptr, *count = nullptr;  // [n] by cluster; [k + 1]; [k] scratch
  C *share = nullptr, *total = nullptr;                           // [n] by place in member; [k] summed weights
  // Centers::row and best are right for clusters that did not change since (never with a NaN in Tokens::mean).
  bool settled = false;
};

}  // namespace TP_ISA
}  // namespace tokenpool
