// The pairs that bounds leave open, one by one, from differences:
//
//   best_i = min(best_i, min over candidates j of ||y_i - c_j||^2), ties to the lowest center
//
// Rounded ones are asked first: what they rule out is not computed. Writes label, best and the bounds of these pairs.
#pragma once

#include "products.h"

namespace tokenpool {
namespace TP_ISA {

template <class In>
class Candidates {
  using C = typename AccOf<In>::Type;
  using I = typename Lane<C>::Int;
  static constexpr int L = kLanes<C>, P = kPanel<C>;

 public:
  Candidates(const Tokens<In>& tokens, const Centers<C>& centers, Assignment<In>& assigned, Bounds<In>& bounds,
             const Rounded<In>& rounded)
      : a(tokens.a), tokens_(tokens), centers_(centers), assigned_(assigned), bounds_(bounds), rounded_(rounded) {}

  // Candidates one by one.
  void compute(int64_t p, int64_t count, const I* own, Scratch<In>& s) {
    int64_t found[P] = {};  // groups to look at for each token: s.of_token[r * bounds_.groups ..]
    for (int64_t f = 0; f < count; ++f)
      for (uint64_t tokens = s.tokens[f]; tokens; tokens &= tokens - 1) {
        const int r = __builtin_ctzll(tokens);
        if (assigned_.best[p * P + r] == 0 && s.group[f] * bounds_.group_size > own[p * P + r])
          continue;  // zero loses to lower centers only
        s.of_token[r * bounds_.groups + found[r]++] = s.group[f];
      }
    for (int64_t r = 0; r < P; ++r) {
      if (!found[r]) continue;
      const int32_t* group = s.of_token + r * bounds_.groups;
      const int64_t i = p * P + r;
      int64_t next = r + 1;
      while (next < P && !found[next]) ++next;
      if (next < P) tokens_.prefetch(p * P + next);
      const int32_t* center = group;
      int64_t candidates = found[r];
      if (bounds_.group_size > 1) {
        candidates = 0;
        for (int64_t f = 0; f < found[r]; ++f)
          for (int64_t j = group[f] * bounds_.group_size; j < std::min((group[f] + 1) * bounds_.group_size, centers_.k);
               ++j)
            s.center[candidates++] = int32_t(j);
        center = s.center;
      }
      const C before = assigned_.best[i];
      const bool known = before == before;  // else its own center is among the candidates, as all are
      measure_candidates(p, i, known ? before : std::numeric_limits<C>::infinity(), center, candidates, s);
      C best = known ? before : std::numeric_limits<C>::infinity();
      I label = known ? own[i] : I(0);
      for (int64_t c = 0; c < candidates; ++c) {
        const C distance = s.distance[c];
        if (distance < best || (distance == best && center[c] < label)) {
          best = distance;
          label = center[c];
        }
      }
      int64_t c = 0;
      bool was = false;  // the group it was in is among these
      for (int64_t f = 0; f < found[r]; ++f) {
        const int64_t g = group[f], last = std::min((g + 1) * bounds_.group_size, centers_.k);
        C least = std::numeric_limits<C>::infinity();
        for (int64_t j = g * bounds_.group_size; j < last; ++j, ++c)
          if (I(j) != label && s.distance[c] < least) least = s.distance[c];
        bounds_.at(p, g)[r] = bounds_.of_distance(least, g, tokens_.norm[i]);
        was |= g == bounds_.group_of[own[i]];
      }
      if (label != own[i] && !was) bounds_.leave(p, r, own[i], before);
      assigned_.label[i] = bounds_.held[i] = label;
      assigned_.best[i] = known || best < std::numeric_limits<C>::infinity() ? best : before;
    }
  }

 private:
  // s.distance: a token's squared distances from centers; for those surely farther than `best`, something between best
  // and that.
  void measure_candidates(int64_t p, int64_t i, C best, const int32_t* center, int64_t count, Scratch<In>& s) const {
    if constexpr (kRounds<C>) {
      constexpr int64_t kFew = 3;  // candidates that are not worth rounding the token first
      if (rounded_.on && count > kFew && best < std::numeric_limits<C>::infinity()) {
        const Rounding<C>& mine = rounded_.panels[p];
        const C norm =
            rounded_.template round_row<In>(tokens_.row(i), tokens_.scale, tokens_.mean, C(1) / mine.unit, s.rounded) *
            mine.unit * mine.unit;
        int64_t open = 0;
        for (int64_t c = 0; c < count; c += 4) {
          int32_t products[4];
          rounded_.products(s.rounded, center + c, std::min<int64_t>(4, count - c), products);
          for (int64_t e = c; e < std::min(c + 4, count); ++e) {
            const int32_t j = center[e];
            const Unit<C>& other = rounded_.units[j];
            const C squared = norm + rounded_.norms[j] - C(2) * mine.unit * other.unit * C(products[e - c]);
            const C far = std::sqrt(std::max(squared - kExact<C> * (norm + rounded_.norms[j]), C(0))) -
                          (mine.error + other.error);
            s.distance[e] = far > 0 ? far * far : C(0);
            if (!(s.distance[e] > best * (C(1) + bounds_.slack))) s.open[open++] = int32_t(e);
          }
        }
        for (int64_t c = 0; c < open; ++c) distances(tokens_.row(i), center + s.open[c], 1, s.distance + s.open[c]);
        return;
      }
    }
    distances(tokens_.row(i), center, count, s.distance);
  }

  // Squared distances of one token (as it was given) from centers.
  void distances(const In* x, const int32_t* center, int64_t count, C* out) const {
    const int64_t D = a.features;
    const In* const tokens[1] = {x};
    int64_t c = 0;
    for (; c + 4 <= count; c += 4) {
      const C* const centers[4] = {centers_.row + center[c] * D, centers_.row + center[c + 1] * D,
                                   centers_.row + center[c + 2] * D, centers_.row + center[c + 3] * D};
      tokens_.squared_differences(tokens, centers, out + c);
    }
    for (; c < count; ++c) {
      const C* const centers[1] = {centers_.row + center[c] * D};
      tokens_.squared_differences(tokens, centers, out + c);
    }
  }

  const ClusterArgs& a;
  const Tokens<In>& tokens_;
  const Centers<C>& centers_;
  Assignment<In>& assigned_;
  Bounds<In>& bounds_;
  const Rounded<In>& rounded_;
};

}  // namespace TP_ISA
}  // namespace tokenpool
