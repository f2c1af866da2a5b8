// The farthest-first start: k tokens, each far from those before.
//
//   m_1 = argmax_i w_i,   m_j = argmax_i w_i * min over l < j of ||x_i - x_m(l)||^2       chosen [k], distance [padded]
//
// Ties go to the lowest index; one that rounding breaks may fall differently on the two paths. Writes chosen and
// distance only.
#pragma once

#include "tokens.h"

namespace tokenpool {
namespace TP_ISA {

// distance = min(distance, apart); the index of the largest, times its weight.
template <class C>
inline int64_t nearer_and_farthest(int64_t padded, const C* apart, const C* weight, C* distance) {
  using I = typename Lane<C>::Int;
  constexpr int L = kLanes<C>;
  Vec<C> most = splat(C(-3));
  Vec<I> where = {}, index;
  for (int v = 0; v < L; ++v) index[v] = I(v);
  for (int64_t i = 0; i < padded; i += L) {
    const Vec<C> old = load(distance + i), found = load(apart + i);
    const Vec<C> now = found < old ? found : old;
    store(distance + i, now);
    const Vec<C> cost = weight ? now * load(weight + i) : now;
    const auto larger = cost > most;
    most = larger ? cost : most;
    where = larger ? index : where;
    index += I(L);
  }
  int64_t best = where[0];
  C value = most[0];
  for (int v = 1; v < L; ++v)
    if (most[v] > value || (most[v] == value && where[v] < best)) {
      value = most[v];
      best = where[v];
    }
  return best;
}

// apart_i = ||x_i - x_token||^2, scaled
template <class In, class C>
inline void distances_from(const Tokens<In>& tokens, int64_t token, C* apart) {
  const int64_t D = tokens.a.features;
  Buffer<C> center(D);
  const In* chosen = tokens.row(token);
  for (int64_t d = 0; d < D; ++d) center[d] = C(to_float(chosen[d])) * tokens.scale;
  split(tokens.a.parallel_for, tokens.worth(tokens.n * D), tokens.padded, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      apart[i] = i < tokens.n ? tokens.squared_difference(tokens.row(i), center) : C(0);
  });
}

// apart_from(token, out [padded]): squared distances from a token. Tokens of zero weight come after all others.
template <class In, class C, class F>
inline void farthest_first(const Tokens<In>& tokens, int64_t k, C* distance, int32_t* chosen, Watch& watch,
                           const F& apart_from) {
  // distance: to the nearest chosen token; -1: zero weight, -2: chosen or padding
  for (int64_t i = 0; i < tokens.padded; ++i) {
    const C unchosen =
        !tokens.weight || tokens.weight[i < tokens.n ? i : 0] > 0 ? std::numeric_limits<C>::infinity() : C(-1);
    distance[i] = i < tokens.n ? unchosen : C(-2);
  }
  int64_t next = 0;
  for (int64_t i = 1; tokens.weight && i < tokens.n; ++i)
    if (tokens.weight[i] > tokens.weight[next]) next = i;
  C* apart = tokens.arena.template take<C>(tokens.padded);  // squared distances from the token chosen last
  C* weight = nullptr;                                      // padded
  if (tokens.weight) {
    weight = tokens.arena.template take<C>(tokens.padded);
    for (int64_t i = 0; i < tokens.padded; ++i)
      weight[i] = i < tokens.n && tokens.weight[i] > 0 ? tokens.weight[i] : C(1);
  }
  for (int64_t j = 0;; ++j) {
    chosen[j] = int32_t(next);
    distance[next] = -2;
    if (j + 1 == k) return;
    watch.look();
    apart_from(next, apart);
    next = nearer_and_farthest(tokens.padded, apart, weight, distance);
  }
}

}  // namespace TP_ISA
}  // namespace tokenpool
