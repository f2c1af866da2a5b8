// Lower bounds of the distances from tokens to groups of centers: they rule out nearly all pairs.
//
//   ||y_i||^2 + bound_ig < (reach + travelled_g)^2, or no center of group g is nearer to token i than `reach`
//
// where travelled_g sums, over iterations, the longest way one of the group's centers moved (triangle inequality). A
// token's own center is left out. Bounds leave room for rounding (slack), and what is not a number rules nothing out.
// bound [panels][groups][P]. Writes only itself.
#pragma once

#include "clusters.h"

namespace tokenpool {
namespace TP_ISA {

template <class In>
struct Bounds {
  using C = typename AccOf<In>::Type;
  using I = typename Lane<C>::Int;
  static constexpr int L = kLanes<C>, P = kPanel<C>;

  Bounds(const Tokens<In>& tokens, const Assignment<In>& assigned) : tokens_(tokens), assigned_(assigned) {}

  void take(int64_t centers) {
    Arena& arena = tokens_.arena;
    const ClusterArgs& a = tokens_.a;
    k = centers;
    group_size = center_group(tokens_.n, k, sizeof(C), a.path);
    groups = (k + group_size - 1) / group_size;
    group_of = arena.take<int32_t>(k);
    for (int64_t j = 0; j < k; ++j) group_of[j] = int32_t(j / group_size);
    bound = arena.take<C>(tokens_.padded * groups);
    travelled = arena.take<C>(groups);
    for (int64_t g = 0; g < groups; ++g) travelled[g] = 0;
    held = arena.take<I>(tokens_.padded);
    slack = C(2) * C(a.features + 16) * std::numeric_limits<C>::epsilon();
  }

  C* at(int64_t panel, int64_t group) const { return bound + (panel * groups + group) * P; }

  // A token's bound for a group whose nearest center (of those that are not its own) is at this squared distance.
  C of_distance(C squared, int64_t group, C norm) const {
    const C far = std::sqrt(squared) + travelled[group];
    return far * far - norm;
  }

  struct Panel {
    // With room for rounding: twice the distance to the own center, and its square less the squared norm.
    Vec<C> twice[TP_VECTORS], least[TP_VECTORS];
    uint64_t live;  // tokens, not padding
  };

  // A panel's tokens where they are now: bounds of those that were moved by other than their distance are void.
  Panel take_up(int64_t p, const I* own) {
    const int64_t first = p * P, live = std::min<int64_t>(P, tokens_.n - first);
    C norm[P], reach[P];
    for (int64_t r = 0; r < P; ++r) {
      const int64_t i = first + r;
      norm[r] = r < live ? tokens_.norm[i] * (C(1) - slack) : C(0);
      reach[r] = r < live ? assigned_.best[i] : C(0);
      if (r >= live || own[i] == held[i]) continue;
      at(p, group_of[held[i]])[r] = -std::numeric_limits<C>::infinity();
      held[i] = own[i];
    }
    Panel panel;
    for (int v = 0; v < TP_VECTORS; ++v) {
      const Vec<C> far = root<C>(load(reach + v * L)) * (C(1) + slack);
      panel.twice[v] = C(2) * far;
      panel.least[v] = far * far - load(norm + v * L);
    }
    panel.live = live == 64 ? ~uint64_t(0) : (uint64_t(1) << live) - 1;
    return panel;
  }

  // Of the groups group[0..count) those that may hold a center nearer than a token's own, and for which tokens
  // (tokens_of).
  void find(int64_t p, const Panel& panel, int32_t* group, uint64_t* tokens_of, int64_t& count, int64_t& pairs) const {
    constexpr uint32_t kAll = (uint64_t(1) << L) - 1;
    const int64_t asked = count;
    count = pairs = 0;
    for (int64_t f = 0; f < asked; ++f) {
      const int32_t g = group[f];
      const C* lowest = at(p, g);
      const Vec<C> way = splat(travelled[g] * (C(1) + slack));
      decltype(larger_lanes(Vec<C>{}, Vec<C>{})) farther[TP_VECTORS], all;
#pragma GCC unroll 4
      for (int v = 0; v < TP_VECTORS; ++v) {
        // norm + bound > (reach + travelled)^2. A NaN rules nothing out; nor does equality: lengths of zero leave no
        // room.
        farther[v] = larger_lanes(load(lowest + v * L), panel.least[v] + way * (panel.twice[v] + way));
        all = v == 0 ? farther[v] : all & farther[v];
      }
      if (lane_bits(all) == kAll) continue;
      uint64_t tokens = 0;
#pragma GCC unroll 4
      for (int v = 0; v < TP_VECTORS; ++v) tokens |= uint64_t(lane_bits(farther[v]) ^ kAll) << (v * L);
      tokens &= panel.live;
      if (!tokens) continue;
      group[count] = g;
      tokens_of[count++] = tokens;
      pairs += __builtin_popcountll(tokens);
    }
  }

  // A token leaves a cluster whose center is at this squared distance.
  void leave(int64_t p, int64_t r, I cluster, C squared) {
    const int64_t g = group_of[cluster];
    C& old = at(p, g)[r];
    old = std::min(old, of_distance(squared, g, tokens_.norm[p * P + r]));
  }

  // The centers have moved, center j by drift[j].
  void move(const C* drift) {
    C widest = 0;
    for (int64_t i = 0; i < tokens_.n; ++i) widest = std::max(widest, tokens_.norm[i]);
    // Only a given center can come from farther (or from where nothing can be computed).
    const C far = 16 * std::sqrt(widest);
    for (int64_t g = 0; g < groups; ++g) {
      C most = 0;
      bool usable = true;
      for (int64_t j = g * group_size; j < std::min((g + 1) * group_size, k); ++j) {
        usable = usable && drift[j] <= far;
        most = std::max(most, drift[j]);
      }
      if (!usable)
        forget(g);
      else if (most > 0)
        travelled[g] = (travelled[g] + most) * (C(1) + std::numeric_limits<C>::epsilon());
    }
  }

  void forget(int64_t g) {  // beside such a way the bounds of group g mean nothing: they are made anew
    travelled[g] = 0;
    for (int64_t p = 0; p < tokens_.padded / P; ++p)
      for (int64_t r = 0; r < P; ++r) at(p, g)[r] = -std::numeric_limits<C>::infinity();
  }

  const Tokens<In>& tokens_;
  const Assignment<In>& assigned_;
  int64_t k = 0, group_size = 1, groups = 0;  // centers; consecutive ones that share a bound; how many groups
  int32_t* group_of = nullptr;                // [k]
  // [panels][groups][P] the norm of the token plus this is a lower bound of (distance + travelled)^2, where the
  // distance is that of the group's nearest center other than the token's own when it was last computed, and travelled
  // what the group had then: so a center is nearer than `reach` only if it is below (reach + what the group has
  // travelled by now)^2.
  C* bound = nullptr;
  C* travelled = nullptr;  // [groups] the sum over iterations of the longest way one of its centers moved
  I* held = nullptr;       // [n] the cluster whose center a token's bounds leave out
  C slack = 0;             // relative room for rounding
};

}  // namespace TP_ISA
}  // namespace tokenpool
