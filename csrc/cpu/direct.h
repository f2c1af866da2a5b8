// Clustering without a Gram matrix (direct path): products with all centers once, afterwards bounds.
//
//   label_i = argmin_j ||y_i - c_j||^2       tokens y [n][D], centers c [k][D]
//
// The first iteration multiplies every token with every center. Later ones first ask where a center can have come
// nearer than a token's own: one that was at distance d and has moved by m since is at least d - m away (triangle
// inequality; Elkan, "Using the triangle inequality to accelerate k-means", ICML 2003). Of a ViT's tokens and centers,
// a pair in a hundred is left. There is a bound for every token and center or, where those need too much memory, for
// every token and group of consecutive centers (path "grouped"; Ding et al., "Yinyang k-means", ICML 2015). Where
// bounds leave much of a panel open, products tighten them; what is open then is computed from differences, ties going
// to the lowest center. The result is that of comparing with all centers: bounds leave room for rounding (slack,
// kExact), and what is not a number rules nothing out.
//
// That lets products be rough: where float32 is computed with, tokens and centers are rounded to 16 bits, each panel
// and each center in a unit of its own. Rounding moves a token by at most an error that is known, so what the products
// say of the rounded ones bounds the distances of the true ones; a token whose nearest center that leaves open is
// decided by differences.
//
// Writes Tokens::norm, Centers, and label and best of the assignment; where starting tokens are brought to the front,
// also the order of the tokens.
#pragma once

#include "candidates.h"
#include "means.h"

namespace tokenpool {
namespace TP_ISA {

template <class In>
class DirectPath {
  using C = typename AccOf<In>::Type;
  using I = typename Lane<C>::Int;
  static constexpr int P = kPanel<C>;

 public:
  DirectPath(Tokens<In>& tokens, Centers<C>& centers, Assignment<In>& assigned)
      : a(tokens.a),
        tokens_(tokens),
        centers_(centers),
        assigned_(assigned),
        bounds_(tokens, assigned),
        rounded_(tokens, centers),
        products_(tokens, centers, assigned, bounds_, rounded_),
        candidates_(tokens, centers, assigned, bounds_, rounded_) {}

  void start() {  // from Centers::row where centers are given, else from the tokens Centers::medoid
    drift_ = tokens_.arena.template take<C>(centers_.k);
    bounds_.take(centers_.k);
    if constexpr (kRounds<C>) rounded_.take();
    starts_ = 0;
    if (a.init_centers) return;
    take_starts();
    for (int64_t j = 0; j < centers_.k; ++j) tokens_.centered(centers_.medoid[j], centers_.row + j * a.features);
  }

  void assign(int64_t iteration, int64_t next) {
    if (iteration == 0)
      assign_first(next);
    else
      assign_bounded(assigned_.previous);
  }

  // All tokens against all centers. Meanwhile the image `next`, if there is one, is fetched.
  void assign_first(int64_t next) {
    if constexpr (kRounds<C>) rounded_.round_centers(starts_ * P);
    if (!rounded_.on) measure_centers();
    Ahead ahead;
    const int64_t together = products_.together();
    if (!rounded_.on) starts_ = 0;
    const int64_t blocks = rounded_.on ? (rounded_.lanes + kRoundedBlock - 1) / kRoundedBlock
                                       : (a.features + kDepthBlock - 1) / kDepthBlock;
    const int64_t strips = (centers_.k + kRows - 1) / kRows, once = starts_ * (starts_ - 1) / 2 * (P / kRows);
    tokens_.want(next, (tokens_.padded / P * strips - once) * blocks, ahead);
    split(a.parallel_for, tokens_.worth(tokens_.n * centers_.k * a.features / 8), tokens_.padded / P,
          [&](int64_t begin, int64_t end) {
            Scratch<In> s = products_.scratch();
            if constexpr (kRounds<C>)
              if (starts_) {
                products_.nearest_of_starts(starts_, s, &ahead);
                for (int64_t p = 0; p < starts_; ++p) decide(p, assigned_.label, false, s);
              }
            for (int64_t p = begin + starts_; p < end; p += together) {  // on one thread where there are starts
              s.ask_all(bounds_.groups);
              const int64_t panels = std::min(together, end - p);
              for (int64_t q = 0; q < panels; ++q) {
                if constexpr (kRounds<C>)
                  if (rounded_.on) {
                    rounded_.panels[p + q] = rounded_.round_tokens(p + q, s.rounded + q * P * rounded_.lanes);
                    continue;
                  }
                C* packed = s.packed + q * P * a.features;
                tokens_.pack((p + q) * P, packed);
                panel_norms<C>(packed, a.features, tokens_.norm + (p + q) * P);
              }
              Ahead* const fetched = tokens_.parallel ? nullptr : &ahead;
              if (!rounded_.on) {
                products_.template nearest_of_all<C>(p, panels, s, fetched);
                continue;
              }
              if constexpr (kRounds<C>) products_.template nearest_of_all<int32_t>(p, panels, s, fetched);
              for (int64_t q = 0; q < panels; ++q) decide(p + q, assigned_.label, false, s);
            }
          });
  }

  // Tokens against those centers that bounds do not rule out. own: the cluster each token is in; best: its distance
  // there.
  void assign_bounded(const I* own) {
    split(a.parallel_for, tokens_.worth(tokens_.n * centers_.k), tokens_.padded / P, [&](int64_t begin, int64_t end) {
      Scratch<In> s = products_.scratch();
      for (int64_t p = begin; p < end; ++p) {
        std::memcpy(assigned_.label + p * P, own + p * P, P * sizeof(I));
        decide(p, own, true, s);
      }
    });
  }

  // After the first assignment: is best no more than a bound?
  bool rough() const { return rounded_.on; }

  // The true distances, where those are wanted.
  void measure_distances() {
    split(a.parallel_for, tokens_.worth(tokens_.n * a.features), tokens_.n, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) measure_own(i, assigned_.label[i]);
    });
  }

  // Centers of clusters whose members changed, how far they moved, and how far their members are.
  void update(bool first) {
    const int64_t D = a.features;
    const bool from_tokens = first && tokens_.ascending;  // center j is still token j
    split(a.parallel_for, tokens_.worth(2 * tokens_.n * D), centers_.k, [&](int64_t begin, int64_t end) {
      Buffer<C> to(D);
      for (int64_t j = begin; j < end; ++j) {
        drift_[j] = 0;
        if (!assigned_.changed[j]) continue;
        const int64_t first_member = assigned_.start[j], last = assigned_.start[j + 1];
        const bool alone = last - first_member == 1;
        if (from_tokens && alone && assigned_.member[first_member] == j && assigned_.share[first_member] == C(1)) {
          assigned_.best[j] = 0;
          continue;
        }
        if (a.medoids)
          tokens_.centered(centers_.medoid[j], to);
        else
          mean_of<true>(tokens_, assigned_, j, to);
        C* const center = centers_.row + j * D;
        C way;
        move_center<C>(to, center, way, centers_.norm[j], D);
        drift_[j] = std::sqrt(way) * (C(1) + bounds_.slack);
        if constexpr (kRounds<C>)
          if (rounded_.on) rounded_.round_center(j);
        if (alone) {
          const int32_t i = assigned_.member[first_member];
          assigned_.best[i] = tokens_.norm[i] * 0;  // NaN stays NaN
          continue;
        }
        int64_t m = first_member;
        for (; m + 2 <= last; m += 2) measure_members<2>(m, center);
        if (m < last) measure_members<1>(m, center);
      }
    });
    bounds_.move(drift_);
  }

 private:
  // Where the centers are tokens, these are brought forward: products of whole panels of them with each other are made
  // once.
  void take_starts() {
    if constexpr (kRounds<C>) {
      if (tokens_.parallel || !tokens_.finite || bounds_.group_size > 1 || centers_.k < 2 * P ||
          !tokens_.bring_forward(centers_.medoid, centers_.k))
        return;
      for (int64_t j = 0; j < centers_.k; ++j) centers_.medoid[j] = int32_t(j);
      starts_ = centers_.k / P;
    }
  }

  // Norms of the centers, summed as those of tokens are: a token that is a center is at distance zero from it.
  void measure_centers() {
    const int64_t D = a.features;
    Buffer<C> panel(P * D), zero(D), norm(P);
    for (int64_t d = 0; d < D; ++d) zero[d] = 0;
    for (int64_t first = 0; first < centers_.k; first += P) {
      const int64_t count = std::min<int64_t>(P, centers_.k - first);
      const C* rows[P];
      for (int64_t r = 0; r < count; ++r) rows[r] = centers_.row + (first + r) * D;
      pack_panel<C, C>(rows, count, D, C(1), zero, panel);
      panel_norms<C>(panel, D, norm);
      for (int64_t r = 0; r < count; ++r) centers_.norm[first + r] = norm[r];
    }
  }

  // A panel's tokens against those centers that bounds do not rule out. known: best holds distances, not upper
  // bounds of them (as it does after rounded products, when bounds are as tight as such products make them).
  void decide(int64_t p, const I* own, bool known, Scratch<In>& s) {
    const auto panel = bounds_.take_up(p, own);
    int64_t count = s.ask_all(bounds_.groups), pairs = 0;
    bounds_.find(p, panel, s.group, s.tokens, count, pairs);
    if constexpr (kRounds<C>)
      if (rounded_.on && known && !single_costs_less(pairs * bounds_.group_size, count * bounds_.group_size)) {
        rounded_.round_tokens(p, s.rounded);  // to the same numbers as the first time
        products_.template tighten<int32_t>(p, count, own, s);
        bounds_.find(p, panel, s.group, s.tokens, count, pairs);
      }
    if (!single_costs_less(pairs * bounds_.group_size, count * bounds_.group_size)) {
      tokens_.pack(p * P, s.packed);
      products_.template tighten<C>(p, count, own, s);
      bounds_.find(p, panel, s.group, s.tokens, count, pairs);
    }
    if (count == 0) return;
    if (!known) {
      uint64_t tokens = 0;
      for (int64_t f = 0; f < count; ++f) tokens |= s.tokens[f];
      for (; tokens; tokens &= tokens - 1) {
        const int64_t i = p * P + __builtin_ctzll(tokens);
        measure_own(i, own[i]);
      }
    }
    candidates_.compute(p, count, own, s);
  }

  // So many pairs one by one, or a whole panel against so many centers? Prices in hundredths of a nanosecond, measured.
  bool single_costs_less(int64_t pairs, int64_t centers) const {
    const int64_t D = a.features, single = 9 * D + 2500, together = 2 * D + 100, pack = 60 * D;
    return pairs * single < P * (centers * together + pack);
  }

  void measure_own(int64_t i, I own) {
    const In* const tokens[1] = {tokens_.row(i)};
    const C* const centers[1] = {centers_.row + own * a.features};
    tokens_.squared_differences(tokens, centers, assigned_.best + i);
  }

  // How far the members m .. m + T - 1 are from their center.
  template <int T>
  TP_INLINE void measure_members(int64_t m, const C* center) {
    const In* tokens[T];
    for (int t = 0; t < T; ++t) {
      tokens[t] = tokens_.row(assigned_.member[m + t]);
      if (m + T + t < tokens_.n) tokens_.prefetch(assigned_.member[m + T + t]);
    }
    const C* const centers[1] = {center};
    C squared[T];
    tokens_.squared_differences(tokens, centers, squared);
    for (int t = 0; t < T; ++t) assigned_.best[assigned_.member[m + t]] = squared[t];
  }

  const ClusterArgs& a;
  Tokens<In>& tokens_;
  Centers<C>& centers_;
  Assignment<In>& assigned_;
  Bounds<In> bounds_;
  Rounded<In> rounded_;
  Products<In> products_;
  Candidates<In> candidates_;
  C* drift_ = nullptr;  // [k] how far a center moved in the last update
  int64_t starts_ = 0;  // panels of starting tokens whose products with each other are made once
};

}  // namespace TP_ISA
}  // namespace tokenpool
