// Clustering without a Gram matrix: products with all centers once, afterwards bounds.
//
// The first iteration multiplies every token with every center. Later ones first ask where a center can have come
// nearer than a token's own: one that was at distance d and has moved by m since is at least d - m away (triangle
// inequality; Elkan, "Using the triangle inequality to accelerate k-means", ICML 2003). Of a ViT's tokens and centers,
// a pair in a hundred is left. There is a bound for every token and center or, where those need too much memory, for
// every token and group of consecutive centers (path "streamed"; Ding et al., "Yinyang k-means", ICML 2015). Where
// bounds leave much of a panel open, products tighten them; what is open then is computed from differences, ties going
// to the lowest center. The result is that of comparing with all centers: bounds leave room for rounding (slack_,
// kExact), and what is not a number rules nothing out.
//
// That lets products be rough: where float32 is computed with, tokens and centers are rounded to 16 bits, each panel
// and each center in a unit of its own. Rounding moves a token by at most an error that is known, so what the products
// say of the rounded ones bounds the distances of the true ones; a token whose nearest center that leaves open is
// settled by differences.
#pragma once

#include "nearest.h"
#include "result.h"

namespace tokenpool {
namespace TP_ISA {

template <class In>
class Direct : protected Result<In> {
 protected:
  using Base = Result<In>;
  using Base::a, Base::n_, Base::k_, Base::padded_, Base::label_, Base::norm_, Base::member_, Base::share_;
  using Base::finite_, Base::start_, Base::medoid_, Base::scale_, Base::mean_, Base::center_, Base::best_,
      Base::changed_;
  using Base::row, Base::pack, Base::panel_norms, Base::squared_norm, Base::squared_difference,
      Base::squared_differences;
  using Base::worth, Base::center_token;
  using typename Base::C;
  using typename Base::I;
  static constexpr int L = kLanes<C>, P = kPanel<C>;
  static constexpr C kExact =
      16 * std::numeric_limits<C>::epsilon();  // room for what is done to products without error
  static constexpr int64_t kCenters = 64,
                           kPanels = 8;  // centers whose products wait; panels that centers are fetched for

  using Base::Base;

  template <class T>
  T* take(int64_t count) {
    return Base::template take<T>(count);
  }

  // What a row's whole numbers are multiples of, and how far rounding to them may have moved it.
  struct Unit {
    C unit, error;
  };
  // The same of a panel's tokens. With e for how far rounding moves a token and its center together, and r for the
  // distance of the rounded ones (so r^2 is norm_ / keep + score), the true distance is at least r - e, and for any
  // keep below 1 (r - e)^2 >= keep r^2 - e^2 (1 / (1 - keep) - 1): a bound without a square root. It is sharp where r =
  // e / (1 - keep).
  struct Rounding : Unit {
    C keep, loss;  // loss: 1 / (1 - keep) - 1
  };

  // What a thread needs while it looks at panels.
  struct Scratch {
    Scratch(const Direct& d)
        : products(kCenters * P),
          packed(d.together_ * P * d.a.features),
          rounded(d.rough_ ? d.together_ * P * d.lanes_ : 0),
          second(d.group_ > 1 ? d.together_ * d.groups_ * P : 0),
          group(d.groups_),
          of_token(P * d.groups_),
          center(d.group_ > 1 ? d.k_ : 0),
          open(d.rough_ ? d.k_ : 0),
          tokens(d.groups_),
          distance(d.k_) {
      std::memset(products, 0,
                  kCenters * P * sizeof(C));  // lanes past the last token are looked at, too, whatever they hold
    }
    int64_t ask_all(int64_t groups) {
      for (int64_t g = 0; g < groups; ++g) group[g] = int32_t(g);
      return groups;
    }
    Buffer<C> products, packed;
    Buffer<int32_t> rounded;           // panels of 16-bit pairs
    Buffer<C> second;                  // [group][panel][P]: the second lowest score of a group
    Buffer<int32_t> group;             // groups to look at
    Buffer<int32_t> of_token, center;  // the groups to look at for each token; one token's candidates
    Buffer<int32_t> open;              // which of those rounding leaves open
    Buffer<uint64_t> tokens;           // for which tokens a group is looked at, one bit each
    Buffer<C> distance;                // how far a token's candidates are, squared
  };

  void take_direct() {
    center_ = take<C>(k_ * a.features);
    drift_ = take<C>(k_);
    group_ = center_group(n_, k_, sizeof(C));
    if (a.path == int(Path::Streamed)) group_ = std::max<int64_t>(group_, 4);
    groups_ = (k_ + group_ - 1) / group_;
    group_of_ = take<int32_t>(k_);
    for (int64_t j = 0; j < k_; ++j) group_of_[j] = int32_t(j / group_);
    bound_ = take<C>(padded_ * groups_);
    travelled_ = take<C>(groups_);
    for (int64_t g = 0; g < groups_; ++g) travelled_[g] = 0;
    held_ = take<I>(padded_);
    together_ =
        std::min(kPanels, std::max<int64_t>(1, ((kRounds<C> ? 2 : 1) << 15) / std::max<int64_t>(P * a.features, 1)));
    slack_ = C(2) * C(a.features + 16) * std::numeric_limits<C>::epsilon();
    rough_ = false;
    if constexpr (kRounds<C>) {
      lanes_ = rounded_lanes(a.features);
      center_rounded_ = take<int32_t>(k_ * lanes_);
      center_unit_ = take<Unit>(k_);
      rounded_norm_ = take<C>(k_);
      rounding_ = take<Rounding>(padded_ / P);
    }
  }

  // Where the centers are tokens, these are brought forward: products of whole panels of them with each other are made
  // once.
  void take_starts() {
    starts_ = 0;
    if constexpr (kRounds<C>) {
      if (this->parallel_ || !finite_ || group_ > 1 || k_ < 2 * P || !this->bring_forward(medoid_, k_)) return;
      for (int64_t j = 0; j < k_; ++j) medoid_[j] = int32_t(j);
      starts_ = k_ / P;
    }
  }

  // Norms of the centers, summed as those of tokens are: a token that is a center is at distance zero from it.
  void measure_centers() {
    const int64_t D = a.features;
    Buffer<C> panel(P * D), zero(D), norm(P);
    for (int64_t d = 0; d < D; ++d) zero[d] = 0;
    for (int64_t first = 0; first < k_; first += P) {
      const int64_t count = std::min<int64_t>(P, k_ - first);
      const C* rows[P];
      for (int64_t r = 0; r < count; ++r) rows[r] = center_ + (first + r) * D;
      pack_panel<C, C>(rows, count, D, C(1), zero, panel);
      panel_norms(panel, norm);
      for (int64_t r = 0; r < count; ++r) center_norm_[first + r] = norm[r];
    }
  }

  // ------------------------------------------------------------------------------------------------ assignment

  // A unit in which vectors of at most this length have whole numbers below 2^15, and how far rounding to them moves a
  // vector: half a unit a feature, and some room for the rounding of the arithmetic.
  Unit unit_of(C longest) const {
    const C unit = std::max(longest, C(1e-13)) / C(32000);
    return {unit, unit * (C(0.51) * std::sqrt(C(a.features)) + C(0.02))};
  }

  // Round the centers, if that can be done: nothing but numbers.
  void round_centers() {
    const int64_t D = a.features;
    rough_ = false;
    if (!finite_) return;
    for (int64_t j = 0; j < k_; ++j) {
      center_norm_[j] = squared_norm(center_ + j * D);
      if (!(center_norm_[j] <= C(1e30))) return;
    }
    rough_ = true;
    const int64_t first = starts_ * P;  // those before are rounded as tokens
    split(a.parallel_for, worth(k_ * D), k_ - first, [&](int64_t begin, int64_t end) {
      for (int64_t j = first + begin; j < first + end; ++j) round_center(j);
    });
  }

  void round_center(int64_t j) {
    const C* const center = center_ + j * a.features;
    center_unit_[j] = unit_of(std::sqrt(center_norm_[j]));
    const C unit = center_unit_[j].unit;
    rounded_norm_[j] = round_row<float>(center, C(1), nullptr, C(1) / unit, center_rounded_ + j * lanes_) * unit * unit;
  }

  // Panel p, rounded; norm_: of the rounded tokens, times keep.
  Rounding round_tokens(int64_t p, int32_t* panel) {
    const In* rows[P];
    const int64_t count = std::min<int64_t>(P, n_ - p * P);
    C longest = 0, total = 0;
    for (int64_t r = 0; r < count; ++r) {
      rows[r] = row(p * P + r);
      const C norm = squared_difference(rows[r], mean_);
      longest = std::max(longest, norm);
      total += norm;
    }
    Rounding rounding;
    static_cast<Unit&>(rounding) = unit_of(std::sqrt(longest));
    // Sharp at two thirds of the tokens' distance from the mean (e is twice the error, if the center is as long), about
    // where the nearest centers are that have to be ruled out.
    const C part = std::min(C(3) * rounding.error / (std::sqrt(total / C(count)) + C(1e-30)), C(0.5));
    rounding.keep = C(1) - part;
    rounding.loss = C(1) / part - C(1);
    round_panel<In>(rows, count, a.features, scale_, mean_, C(1) / rounding.unit, panel);
    const Vec<C> factor = splat(rounding.keep * rounding.unit * rounding.unit);
    Vec<int32_t> norm[2][TP_VECTORS] = {};  // the sums of even and of odd lanes do not wait for each other
    for (int64_t d = 0; d < lanes_; d += 2)
#pragma GCC unroll 4
      for (int v = 0; v < TP_VECTORS; ++v)
#pragma GCC unroll 2
        for (int odd = 0; odd < 2; ++odd) {
          const Vec<int32_t> pair = load(panel + (d + odd) * P + v * L);
          add_product(norm[odd][v], pair, pair);
        }
    for (int v = 0; v < TP_VECTORS; ++v)
      store(norm_ + p * P + v * L, factor * __builtin_convertvector(norm[0][v] + norm[1][v], Vec<C>));
    return rounding;
  }

  Rounding rounding_of(int64_t p) const {  // a copy, that stores of other numbers do not change
    if constexpr (kRounds<C>)
      if (rough_) return rounding_[p];
    return {};
  }

  // All tokens against all centers. Meanwhile the image `next`, if there is one, is fetched.
  void assign_first(int64_t next) {
    if constexpr (kRounds<C>) round_centers();
    if (!rough_) measure_centers();
    Ahead ahead;
    if (!rough_) starts_ = 0;
    const int64_t blocks =
        rough_ ? (lanes_ + kRoundedBlock - 1) / kRoundedBlock : (a.features + kDepthBlock - 1) / kDepthBlock;
    const int64_t strips = (k_ + kRows - 1) / kRows, once = starts_ * (starts_ - 1) / 2 * (P / kRows);
    this->want_image(next, (padded_ / P * strips - once) * blocks, ahead);
    split(a.parallel_for, worth(n_ * k_ * a.features / 8), padded_ / P, [&](int64_t begin, int64_t end) {
      Scratch s(*this);
      if constexpr (kRounds<C>)
        if (starts_) nearest_of_starts(s, &ahead);
      for (int64_t p = begin + starts_; p < end; p += together_) {  // on one thread where there are starts
        s.ask_all(groups_);
        const int64_t panels = std::min(together_, end - p);
        for (int64_t q = 0; q < panels; ++q) {
          if constexpr (kRounds<C>)
            if (rough_) {
              rounding_[p + q] = round_tokens(p + q, s.rounded + q * P * lanes_);
              continue;
            }
          C* packed = s.packed + q * P * a.features;
          pack((p + q) * P, packed);
          panel_norms(packed, norm_ + (p + q) * P);
        }
        Ahead* const fetched = this->parallel_ ? nullptr : &ahead;
        if (!rough_) {
          nearest_of_all<C>(p, panels, s, fetched);
          continue;
        }
        if constexpr (kRounds<C>) nearest_of_all<int32_t>(p, panels, s, fetched);
        for (int64_t q = 0; q < panels; ++q) settle(p + q, label_, false, s);
      }
    });
  }

  // After the first assignment of rounded tokens best_ is no more than a bound: the true distances, where those are
  // wanted.
  void measure_distances() {
    split(a.parallel_for, worth(n_ * a.features), n_, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) measure_own(i, label_[i]);
    });
  }

  // Tokens against those centers that bounds do not rule out. own: the cluster each token is in; best_: its distance
  // there.
  void assign_bounded(const I* own) {
    split(a.parallel_for, worth(n_ * k_), padded_ / P, [&](int64_t begin, int64_t end) {
      Scratch s(*this);
      for (int64_t p = begin; p < end; ++p) {
        std::memcpy(label_ + p * P, own + p * P, P * sizeof(I));
        settle(p, own, true, s);
      }
    });
  }

  void measure_own(int64_t i, I own) {
    const In* const tokens[1] = {row(i)};
    const C* const centers[1] = {center_ + own * a.features};
    this->squared_differences(tokens, centers, best_ + i);
  }

  // A panel's tokens against those centers that bounds do not rule out. known: best_ holds distances, not upper bounds
  // of them (as it does after rounded products, when bounds are as tight as such products make them).
  void settle(int64_t p, const I* own, bool known, Scratch& s) {
    const Panel panel = take_up(p, own);
    int64_t count = s.ask_all(groups_), pairs = 0;
    find(p, panel, s, count, pairs);
    if constexpr (kRounds<C>)
      if (rough_ && known && !single_costs_less(pairs * group_, count * group_)) {
        round_tokens(p, s.rounded);  // to the same numbers as the first time
        tighten<int32_t>(p, count, own, s);
        find(p, panel, s, count, pairs);
      }
    if (!single_costs_less(pairs * group_, count * group_)) {
      pack(p * P, s.packed);
      tighten<C>(p, count, own, s);
      find(p, panel, s, count, pairs);
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
    compute(p, count, own, s);
  }

  // So many pairs one by one, or a whole panel against so many centers? Prices in hundredths of a nanosecond, measured.
  bool single_costs_less(int64_t pairs, int64_t centers) const {
    const int64_t D = a.features, single = 9 * D + 2500, together = 2 * D + 100, pack = 60 * D;
    return pairs * single < P * (centers * together + pack);
  }

  C* bounds(int64_t panel, int64_t group) const { return bound_ + (panel * groups_ + group) * P; }

  // A token's bound for a group whose nearest center (of those that are not its own) is at this squared distance.
  C bound(C squared, int64_t group, C norm) const {
    const C far = std::sqrt(squared) + travelled_[group];
    return far * far - norm;
  }

  struct Panel {
    // With room for rounding: twice the distance to the own center, and its square less the squared norm.
    Vec<C> twice[TP_VECTORS], least[TP_VECTORS];
    uint64_t live;  // tokens, not padding
  };

  // A panel's tokens where they are now: bounds of those that were moved by other than their distance are void.
  Panel take_up(int64_t p, const I* own) {
    const int64_t first = p * P, live = std::min<int64_t>(P, n_ - first);
    C norm[P], reach[P];
    for (int64_t r = 0; r < P; ++r) {
      const int64_t i = first + r;
      norm[r] = r < live ? norm_[i] * (C(1) - slack_) : C(0);
      reach[r] = r < live ? best_[i] : C(0);
      if (r >= live || own[i] == held_[i]) continue;
      bounds(p, group_of_[held_[i]])[r] = -std::numeric_limits<C>::infinity();
      held_[i] = own[i];
    }
    Panel panel;
    for (int v = 0; v < TP_VECTORS; ++v) {
      const Vec<C> far = root<C>(load(reach + v * L)) * (C(1) + slack_);
      panel.twice[v] = C(2) * far;
      panel.least[v] = far * far - load(norm + v * L);
    }
    panel.live = live == 64 ? ~uint64_t(0) : (uint64_t(1) << live) - 1;
    return panel;
  }

  // Of the groups s.group[0..count) those that may hold a center nearer than a token's own, and for which tokens
  // (s.tokens).
  void find(int64_t p, const Panel& panel, Scratch& s, int64_t& count, int64_t& pairs) const {
    constexpr uint32_t kAll = (uint64_t(1) << L) - 1;
    const int64_t asked = count;
    count = pairs = 0;
    for (int64_t f = 0; f < asked; ++f) {
      const int32_t g = s.group[f];
      const C* at = bounds(p, g);
      const Vec<C> travelled = splat(travelled_[g] * (C(1) + slack_));
      decltype(larger_lanes(Vec<C>{}, Vec<C>{})) farther[TP_VECTORS], all;
#pragma GCC unroll 4
      for (int v = 0; v < TP_VECTORS; ++v) {
        // norm + bound > (reach + travelled)^2. A NaN rules nothing out; nor does equality: lengths of zero leave no
        // room.
        farther[v] = larger_lanes(load(at + v * L), panel.least[v] + travelled * (panel.twice[v] + travelled));
        all = v == 0 ? farther[v] : all & farther[v];
      }
      if (lane_bits(all) == kAll) continue;
      uint64_t tokens = 0;
#pragma GCC unroll 4
      for (int v = 0; v < TP_VECTORS; ++v) tokens |= uint64_t(lane_bits(farther[v]) ^ kAll) << (v * L);
      tokens &= panel.live;
      if (!tokens) continue;
      s.group[count] = g;
      s.tokens[count++] = tokens;
      pairs += __builtin_popcountll(tokens);
    }
  }

  // Candidates one by one.
  void compute(int64_t p, int64_t count, const I* own, Scratch& s) {
    int64_t found[P] = {};  // groups to look at for each token: s.of_token[r * groups_ ..]
    for (int64_t f = 0; f < count; ++f)
      for (uint64_t tokens = s.tokens[f]; tokens; tokens &= tokens - 1) {
        const int r = __builtin_ctzll(tokens);
        if (best_[p * P + r] == 0 && s.group[f] * group_ > own[p * P + r])
          continue;  // zero loses to lower centers only
        s.of_token[r * groups_ + found[r]++] = s.group[f];
      }
    for (int64_t r = 0; r < P; ++r) {
      if (!found[r]) continue;
      const int32_t* group = s.of_token + r * groups_;
      const int64_t i = p * P + r;
      int64_t next = r + 1;
      while (next < P && !found[next]) ++next;
      if (next < P) prefetch_row(p * P + next);
      const int32_t* center = group;
      int64_t candidates = found[r];
      if (group_ > 1) {
        candidates = 0;
        for (int64_t f = 0; f < found[r]; ++f)
          for (int64_t j = group[f] * group_; j < std::min((group[f] + 1) * group_, k_); ++j)
            s.center[candidates++] = int32_t(j);
        center = s.center;
      }
      const C before = best_[i];
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
        const int64_t g = group[f], last = std::min((g + 1) * group_, k_);
        C least = std::numeric_limits<C>::infinity();
        for (int64_t j = g * group_; j < last; ++j, ++c)
          if (I(j) != label && s.distance[c] < least) least = s.distance[c];
        bounds(p, g)[r] = bound(least, g, norm_[i]);
        was |= g == group_of_[own[i]];
      }
      if (label != own[i] && !was) leave(p, r, own[i], before);
      label_[i] = held_[i] = label;
      best_[i] = known || best < std::numeric_limits<C>::infinity() ? best : before;
    }
  }

  void prefetch_row(int64_t i) const {
    const char* from = reinterpret_cast<const char*>(row(i));
    for (int64_t b = 0; b < a.features * int64_t(sizeof(In)); b += 64) __builtin_prefetch(from + b);
  }

  // A token leaves a cluster whose center is at this squared distance.
  void leave(int64_t p, int64_t r, I cluster, C squared) {
    const int64_t g = group_of_[cluster];
    C& old = bounds(p, g)[r];
    old = std::min(old, bound(squared, g, norm_[p * P + r]));
  }

  // s.distance: a token's squared distances from centers; for those surely farther than `best`, something between best
  // and that.
  void measure_candidates(int64_t p, int64_t i, C best, const int32_t* center, int64_t count, Scratch& s) const {
    if constexpr (kRounds<C>) {
      constexpr int64_t kFew = 3;  // candidates that are not worth rounding the token first
      if (rough_ && count > kFew && best < std::numeric_limits<C>::infinity()) {
        const Rounding& mine = rounding_[p];
        const C norm = round_row<In>(row(i), scale_, mean_, C(1) / mine.unit, s.rounded) * mine.unit * mine.unit;
        int64_t open = 0;
        for (int64_t c = 0; c < count; c += 4) {
          int32_t products[4];
          rounded_products(s.rounded, center + c, std::min<int64_t>(4, count - c), products);
          for (int64_t e = c; e < std::min(c + 4, count); ++e) {
            const int32_t j = center[e];
            const Unit& other = center_unit_[j];
            const C squared = norm + rounded_norm_[j] - C(2) * mine.unit * other.unit * C(products[e - c]);
            const C far =
                std::sqrt(std::max(squared - kExact * (norm + rounded_norm_[j]), C(0))) - (mine.error + other.error);
            s.distance[e] = far > 0 ? far * far : C(0);
            if (!(s.distance[e] > best * (C(1) + slack_))) s.open[open++] = int32_t(e);
          }
        }
        for (int64_t c = 0; c < open; ++c) distances(row(i), center + s.open[c], 1, s.distance + s.open[c]);
        return;
      }
    }
    distances(row(i), center, count, s.distance);
  }

  // One row, rounded: row * scale - mean (or without mean), times fine. Returns its squared norm.
  template <class Row>
  C round_row(const Row* x, C scale, const C* mean, C fine, int32_t* out) const {
    const int64_t D = a.features;
    Vec<int32_t> norm = {};
    const auto put = [&](int64_t d, Vec<C> low, Vec<C> high) {
      const Vec<int32_t> pair = round_pair(low, high, splat(fine));
      store(out + d / 2, pair);
      add_product(norm, pair, pair);
    };
    int64_t d = 0;
    for (; d + 2 * L <= D; d += 2 * L) {
      const Vec<C> low = load_acc(x + d) * splat(scale), high = load_acc(x + d + L) * splat(scale);
      if (mean)
        put(d, low - load(mean + d), high - load(mean + d + L));
      else
        put(d, low, high);
    }
    if (d < D) {
      C rest[2 * L] = {};
      for (int64_t e = d; e < D; ++e) rest[e - d] = C(to_float(x[e])) * scale - (mean ? mean[e] : C(0));
      put(d, load(rest), load(rest + L));
    }
    C squared = 0;
    for (int v = 0; v < L; ++v) squared += C(norm[v]);
    return squared;
  }

  // Products of a rounded token with up to four rounded centers.
  void rounded_products(const int32_t* x, const int32_t* center, int64_t count, int32_t* out) const {
    const int32_t* row[4];
    for (int64_t c = 0; c < 4; ++c) row[c] = center_rounded_ + center[std::min(c, count - 1)] * lanes_;
    Vec<int32_t> sum[4] = {};
    for (int64_t d = 0; d < lanes_; d += L) {
      const Vec<int32_t> token = load(x + d);
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) add_product(sum[c], token, load(row[c] + d));
    }
    for (int c = 0; c < 4; ++c) out[c] = lane_sum<int32_t>(sum[c]);
  }

  // Squared distances of one token (as it was given) from centers.
  void distances(const In* x, const int32_t* center, int64_t count, C* out) const {
    const int64_t D = a.features;
    const In* const tokens[1] = {x};
    int64_t c = 0;
    for (; c + 4 <= count; c += 4) {
      const C* const centers[4] = {center_ + center[c] * D, center_ + center[c + 1] * D, center_ + center[c + 2] * D,
                                   center_ + center[c + 3] * D};
      this->squared_differences(tokens, centers, out + c);
    }
    for (; c < count; ++c) {
      const C* const centers[1] = {center_ + center[c] * D};
      this->squared_differences(tokens, centers, out + c);
    }
  }

  // The products of the packed panels p .. p + panels - 1 with the centers of the groups s.group[0..count), in
  // ascending order: use(panel, how many centers, which, places of their groups, products). T: C, or int32_t for
  // rounded ones.
  template <class T, class F>
  TP_INLINE void each_center(int64_t p, int64_t panels, int64_t count, Scratch& s, Ahead* ahead, const F& use) {
    int32_t center[kCenters], place[kCenters];
    T* out[kCenters];  // one after another
    for (int64_t j = 0; j < kCenters; ++j) out[j] = reinterpret_cast<T*>(static_cast<C*>(s.products)) + j * P;
    for (int64_t f = 0, inside = 0; f < count;) {
      int64_t block = 0;
      for (; block < kCenters && f < count; ++block) {
        center[block] = int32_t(s.group[f] * group_ + inside);
        place[block] = int32_t(f);
        if (++inside == group_ || center[block] + 1 == k_) {
          inside = 0;
          ++f;
        }
      }
      for (int64_t q = 0; q < panels; ++q) {
        const int64_t vectors = (std::min<int64_t>(P, n_ - (p + q) * P) + L - 1) / L;  // none past the last token
        if constexpr (std::is_same<T, C>::value)
          multiply_panel<T>(center_, a.features, center, block, vectors, s.packed + q * P * a.features, out, ahead);
        else
          multiply_panel<T>(center_rounded_, lanes_, center, block, vectors, s.rounded + q * P * lanes_, out, ahead);
        use(q, block, center, place, out[0]);
      }
    }
  }

  // What the products of a center with a panel's tokens say: their scores, ||center||^2 - 2 <token, center>, and what
  // those are at least; with rounded ones, as parts of squared distances times keep.
  template <class T>
  struct Reading {
    static constexpr bool rounded = !std::is_same<T, C>::value;
    C norm, room, factor, keep;
    Reading(const Direct& d, const Rounding& mine, int64_t j) {
      if constexpr (rounded) {
        const C error = mine.error + d.center_unit_[j].error;
        norm = d.rounded_norm_[j];
        room = kExact * norm + error * error * mine.loss;
        factor = C(2) * mine.unit * d.center_unit_[j].unit;
        keep = mine.keep;
      } else {
        norm = d.center_norm_[j];
        room = d.slack_ * norm;
        factor = 2;
        keep = 1;
      }
    }
    TP_INLINE Vec<C> score(const T* products) const {
      if constexpr (rounded)
        return splat(norm) - splat(factor) * __builtin_convertvector(load(products), Vec<C>);
      else
        return splat(norm) - C(2) * load(products);
    }
    template <class V>
    TP_INLINE V least(V score) const {
      return (rounded ? score * keep : score) - room;
    }
  };

  // Panel p against centers first .. first + count - 1, each of which has a bound of its own.
  template <class T>
  TP_INLINE void compare(int64_t p, int64_t first, int64_t count, const T* products, Nearest<C>& nearest) {
    const Rounding rounding = rounding_of(p);
    Nearest<C> found = nearest;
    C* lowest = bounds(p, first);
    for (int64_t j = first; j < first + count; ++j, products += P, lowest += P) {
      const Reading<T> reading(*this, rounding, j);
#pragma GCC unroll 4
      for (int v = 0; v < TP_VECTORS; ++v) {
        const Vec<C> score = reading.score(products + v * L);
        found.take(v, j, score);
        store(lowest + v * L, reading.least(score));
      }
    }
    nearest = found;
  }

  // Packed panels p.. against all centers: the nearest ones, and bounds for the others.
  template <class T>
  void nearest_of_all(int64_t p, int64_t panels, Scratch& s, Ahead* ahead) {
    const Vec<C> infinity = splat(std::numeric_limits<C>::infinity());
    Nearest<C> nearest[kPanels];
    each_center<T>(p, panels, groups_, s, ahead,
                   [&](int64_t q, int64_t block, const int32_t* center, const int32_t* place, const T* products) {
                     if (group_ == 1) return compare<T>(p + q, center[0], block, products, nearest[q]);
                     const Rounding rounding = rounding_of(p + q);
                     Nearest<C> found = nearest[q];
                     for (int64_t c = 0; c < block; ++c, products += P) {
                       const Reading<T> reading(*this, rounding, center[c]);
                       const bool fresh = center[c] % group_ == 0;
                       C* lowest = bounds(p + q, place[c]);
                       C* second = s.second + (place[c] * together_ + q) * P;
#pragma GCC unroll 4
                       for (int v = 0; v < TP_VECTORS; ++v) {
                         const Vec<C> score = reading.score(products + v * L), low = reading.least(score);
                         found.take(v, center[c], score);
                         const Vec<C> m1 = fresh ? infinity : load(lowest + v * L),
                                      m2 = fresh ? infinity : load(second + v * L);
                         const auto lower = low < m1;
                         const Vec<C> higher = lower ? m1 : low;
                         store(lowest + v * L, lower ? low : m1);
                         store(second + v * L, higher < m2 ? higher : m2);
                       }
                     }
                     nearest[q] = found;
                   });
    for (int64_t q = 0; q < panels; ++q) take_nearest<T>(p + q, nearest[q], s.second + q * P);
  }

  // A panel has been compared with all centers. second: [group][together_][P], the second lowest of each group.
  template <class T>
  void take_nearest(int64_t p, const Nearest<C>& nearest, const C* second) {
    nearest.write(best_ + p * P, label_ + p * P);
    for (int r = 0; r < P && p * P + r < n_; ++r) {
      const int64_t i = p * P + r, j = label_[i], g = group_of_[j];
      C& lowest = bounds(p, g)[r];  // of all but its own center: that is not always the one of the lowest bound
      if (group_ == 1)
        lowest = std::numeric_limits<C>::infinity();
      else if (!(lowest < Reading<T>(*this, rounding_of(p), j).least(best_[i])))
        lowest = second[g * together_ * P + r];
      held_[i] = label_[i];
      if constexpr (Reading<T>::rounded) {
        const Rounding& mine = rounding_[p];
        const C norm = norm_[i] / mine.keep, squared = norm + best_[i] + kExact * (norm + rounded_norm_[j]);
        const C far = std::sqrt(std::max(squared, C(0))) + mine.error + center_unit_[j].error;
        best_[i] = far * far;
      } else {
        const C distance = best_[i] + norm_[i];
        best_[i] = distance < 0 ? C(0) : distance;
      }
    }
  }

  // Panels of starting tokens against all centers, most of which are these tokens. One panel after another is
  // multiplied with the centers up to its own last, and with those that fill no panel; what lies before it, transposed,
  // are the products of earlier panels with its tokens as centers.
  void nearest_of_starts(Scratch& s, Ahead* ahead) {
    constexpr int64_t kBlock = 2 * P;  // centers
    const int64_t whole = starts_ * P;
    Nearest<C>* const nearest = take<Nearest<C>>(starts_);
    for (int64_t p = 0; p < starts_; ++p) nearest[p] = Nearest<C>();
    Buffer<int32_t> products(kBlock * P), turned(P * P);
    int32_t which[kBlock];
    int32_t* out[kBlock];
    for (int64_t c = 0; c < kBlock; ++c) out[c] = products + c * P;
    for (int64_t p = 0; p < starts_; ++p) {
      const int64_t first = p * P, after = first + P;
      rounding_[p] = round_tokens(p, s.rounded);
      for (int64_t d = 0; d < lanes_; d += L)
        for (int64_t r = 0; r < P; r += L)
          transpose_square(s.rounded + d * P + r, P, center_rounded_ + (first + r) * lanes_ + d, lanes_);
      for (int64_t j = first; j < after; ++j) {
        center_unit_[j] = rounding_[p];
        rounded_norm_[j] = norm_[j] / rounding_[p].keep;
      }
      for (int64_t j = 0; j < k_; j = j == after ? whole : j) {
        const int64_t count = std::min(kBlock, (j < after ? after : k_) - j);
        for (int64_t c = 0; c < count; ++c) which[c] = int32_t(j + c);
        multiply_panel<int32_t>(center_rounded_, lanes_, which, count, TP_VECTORS, s.rounded, out, ahead);
        compare<int32_t>(p, j, count, products, nearest[p]);
        for (int64_t q = j / P; q < p && q * P < j + count; ++q) {
          for (int64_t c = 0; c < P; c += L)
            for (int64_t r = 0; r < P; r += L)
              transpose_square(products + (q * P - j + c) * P + r, P, turned + r * P + c, P);
          compare<int32_t>(q, first, P, turned, nearest[q]);
        }
        j += count;
      }
    }
    for (int64_t p = 0; p < starts_; ++p) {
      take_nearest<int32_t>(p, nearest[p], nullptr);
      settle(p, label_, false, s);
    }
  }

  // Packed (or rounded) panel p against the groups s.group[0..count): bounds as tight as rounding allows.
  template <class T>
  void tighten(int64_t p, int64_t count, const I* own, Scratch& s) {
    const Vec<C> infinity = splat(std::numeric_limits<C>::infinity());
    each_center<T>(p, 1, count, s, nullptr,
                   [&](int64_t, int64_t block, const int32_t* center, const int32_t* place, const T* products) {
                     const Rounding rounding = rounding_of(p);
                     for (int64_t c = 0; c < block; ++c, products += P) {
                       const Reading<T> reading(*this, rounding, center[c]);
                       const Vec<I> index = splat(I(center[c]));
                       const bool fresh = center[c] % group_ == 0;
                       C* lowest = bounds(p, s.group[place[c]]);
#pragma GCC unroll 4
                       for (int v = 0; v < TP_VECTORS; ++v) {
                         const Vec<C> low = reading.least(reading.score(products + v * L));
                         const Vec<C> other = index == load(own + p * P + v * L) ? infinity : low;
                         const Vec<C> least = fresh ? infinity : load(lowest + v * L);
                         store(lowest + v * L, least < other ? least : other);
                       }
                     }
                   });
    C norm[P];  // norm_ may be that of rounded tokens
    if constexpr (Reading<T>::rounded)
      std::memcpy(norm, norm_ + p * P, sizeof norm);
    else
      panel_norms(s.packed, norm);
    for (int64_t f = 0; f < count; ++f) {
      C* at = bounds(p, s.group[f]);
      const Vec<C> travelled = splat(travelled_[s.group[f]]);
      for (int v = 0; v < P; v += L) {
        const Vec<C> squared = load(norm + v) * (C(1) - slack_) + load(at + v);
        const Vec<C> far = root<C>(squared < C(0) ? Vec<C>{} : squared) + travelled;
        store(at + v, far * far - load(norm_ + p * P + v));
      }
    }
  }

  // ---------------------------------------------------------------------------------------------------- update

  // Centers of clusters whose members changed, how far they moved, and how far their members are.
  void update_direct(bool first) {
    const int64_t D = a.features;
    const bool from_tokens = first && this->ascending_;  // center j is still token j
    split(a.parallel_for, worth(2 * n_ * D), k_, [&](int64_t begin, int64_t end) {
      Buffer<C> to(D);
      for (int64_t j = begin; j < end; ++j) {
        drift_[j] = 0;
        if (!changed_[j]) continue;
        const int64_t first_member = start_[j], last = start_[j + 1];
        const bool alone = last - first_member == 1;
        if (from_tokens && alone && member_[first_member] == j && share_[first_member] == C(1)) {
          best_[j] = 0;
          continue;
        }
        if (a.medoids)
          center_token(medoid_[j], to);
        else
          this->template mean_row<true>(j, to);
        C* const center = center_ + j * D;
        C way;
        this->move_center(to, center, way, center_norm_[j]);
        drift_[j] = std::sqrt(way) * (C(1) + slack_);
        if constexpr (kRounds<C>)
          if (rough_) round_center(j);
        if (alone) {
          best_[member_[first_member]] = norm_[member_[first_member]] * 0;  // NaN stays NaN
          continue;
        }
        int64_t m = first_member;
        for (; m + 2 <= last; m += 2) measure_members<2>(m, center);
        if (m < last) measure_members<1>(m, center);
      }
    });
    C widest = 0;
    for (int64_t i = 0; i < n_; ++i) widest = std::max(widest, norm_[i]);
    const C far =
        16 * std::sqrt(widest);  // only a given center can come from so far (or from where nothing can be computed)
    for (int64_t g = 0; g < groups_; ++g) {
      C most = 0;
      bool usable = true;
      for (int64_t j = g * group_; j < std::min((g + 1) * group_, k_); ++j) {
        usable = usable && drift_[j] <= far;
        most = std::max(most, drift_[j]);
      }
      if (!usable)
        forget(g);
      else if (most > 0)
        travelled_[g] = (travelled_[g] + most) * (C(1) + std::numeric_limits<C>::epsilon());
    }
  }

  // How far the members m .. m + T - 1 are from their center.
  template <int T>
  TP_INLINE void measure_members(int64_t m, const C* center) {
    const In* tokens[T];
    for (int t = 0; t < T; ++t) {
      tokens[t] = row(member_[m + t]);
      if (m + T + t < n_) prefetch_row(member_[m + T + t]);
    }
    const C* const centers[1] = {center};
    C squared[T];
    this->squared_differences(tokens, centers, squared);
    for (int t = 0; t < T; ++t) best_[member_[m + t]] = squared[t];
  }

  void forget(int64_t g) {  // beside such a way the bounds of group g mean nothing: they are made anew
    travelled_[g] = 0;
    for (int64_t p = 0; p < padded_ / P; ++p)
      for (int64_t r = 0; r < P; ++r) bounds(p, g)[r] = -std::numeric_limits<C>::infinity();
  }

  C* center_norm_ = nullptr;        // [k] squared norms
  int64_t group_ = 1, groups_ = 0;  // consecutive centers that share a bound; how many groups
  int32_t* group_of_ = nullptr;     // [k]
  // [panels][groups][P] the norm of the token plus this is a lower bound of (distance + travelled)^2, where the
  // distance is that of the group's nearest center other than the token's own when it was last computed, and travelled
  // what the group had then: so a center is nearer than `reach` only if it is below (reach + what the group has
  // travelled by now)^2.
  C* bound_ = nullptr;
  C* travelled_ = nullptr;             // [groups] the sum over iterations of the longest way one of its centers moved
  C* drift_ = nullptr;                 // [k] how far a center moved in the last update
  I* held_ = nullptr;                  // [n] the cluster whose center a token's bounds leave out
  C slack_ = 0;                        // relative room for rounding
  bool rough_ = false;                 // the first products are those of rounded tokens and centers
  int64_t lanes_ = 0;                  // lanes of a rounded row: pairs of features
  int32_t* center_rounded_ = nullptr;  // [k][lanes]
  Unit* center_unit_ = nullptr;        // [k]
  C* rounded_norm_ = nullptr;          // [k] squared norms of the rounded centers
  Rounding* rounding_ = nullptr;       // [panels]
  int64_t starts_ = 0;                 // panels of starting tokens whose products with each other are made once
  int64_t together_ = 1;               // panels multiplied at a time
};

}  // namespace TP_ISA
}  // namespace tokenpool
