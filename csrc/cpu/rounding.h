// Tokens and centers rounded to 16 bits, where float32 is computed with: rough products bound true distances.
//
//   y ~ unit * z, z whole numbers below 2^15, ||y - unit * z|| <= error          z: pairs of features, [lanes] int32
//
// Each panel of tokens and each center has a unit of its own. Writes only itself, Tokens::norm and Centers::norm.
#pragma once

#include "clusters.h"
#include "lengths.h"

namespace tokenpool {
namespace TP_ISA {

template <class C>
constexpr C kExact = 16 * std::numeric_limits<C>::epsilon();  // room for what is done to products without error

// What a row's whole numbers are multiples of, and how far rounding to them may have moved it.
template <class C>
struct Unit {
  C unit, error;
};

// The same of a panel's tokens. With e for how far rounding moves a token and its center together, and r for the
// distance of the rounded ones (so r^2 is Tokens::norm / keep + score), the true distance is at least r - e, and for
// any keep below 1 (r - e)^2 >= keep r^2 - e^2 (1 / (1 - keep) - 1): a bound without a square root. It is sharp where r
// = e / (1 - keep).
template <class C>
struct Rounding : Unit<C> {
  C keep, loss;  // loss: 1 / (1 - keep) - 1
};

template <class In>
struct Rounded {
  using C = typename AccOf<In>::Type;
  static constexpr int L = kLanes<C>, P = kPanel<C>;

  Rounded(Tokens<In>& tokens, Centers<C>& centers) : a(tokens.a), tokens_(tokens), centers_(centers) {}

  void take() {
    Arena& arena = tokens_.arena;
    on = false;
    lanes = rounded_lanes(a.features);
    centers = arena.take<int32_t>(centers_.k * lanes);
    units = arena.take<Unit<C>>(centers_.k);
    norms = arena.take<C>(centers_.k);
    panels = arena.take<Rounding<C>>(tokens_.padded / P);
  }

  // A unit in which vectors of at most this length have whole numbers below 2^15, and how far rounding to them moves a
  // vector: half a unit a feature, and some room for the rounding of the arithmetic.
  Unit<C> unit_of(C longest) const {
    const C unit = std::max(longest, C(1e-13)) / C(32000);
    return {unit, unit * (C(0.51) * std::sqrt(C(a.features)) + C(0.02))};
  }

  // Round the centers, if that can be done: nothing but numbers. Those before `first` are rounded as tokens.
  void round_centers(int64_t first) {
    const int64_t D = a.features;
    on = false;
    if (!tokens_.finite) return;
    for (int64_t j = 0; j < centers_.k; ++j) {
      centers_.norm[j] = squared_norm(centers_.row + j * D, D);
      if (!(centers_.norm[j] <= C(1e30))) return;
    }
    on = true;
    split(a.parallel_for, tokens_.worth(centers_.k * D), centers_.k - first, [&](int64_t begin, int64_t end) {
      for (int64_t j = first + begin; j < first + end; ++j) round_center(j);
    });
  }

  void round_center(int64_t j) {
    const C* const center = centers_.row + j * a.features;
    units[j] = unit_of(std::sqrt(centers_.norm[j]));
    const C unit = units[j].unit;
    norms[j] = round_row<float>(center, C(1), nullptr, C(1) / unit, centers + j * lanes) * unit * unit;
  }

  // Panel p, rounded; Tokens::norm: of the rounded tokens, times keep.
  Rounding<C> round_tokens(int64_t p, int32_t* panel) {
    const In* rows[P];
    const int64_t count = std::min<int64_t>(P, tokens_.n - p * P);
    C longest = 0, total = 0;
    for (int64_t r = 0; r < count; ++r) {
      rows[r] = tokens_.row(p * P + r);
      const C norm = tokens_.squared_difference(rows[r], tokens_.mean);
      longest = std::max(longest, norm);
      total += norm;
    }
    Rounding<C> rounding;
    static_cast<Unit<C>&>(rounding) = unit_of(std::sqrt(longest));
    // Sharp at two thirds of the tokens' distance from the mean (e is twice the error, if the center is as long), about
    // where the nearest centers are that have to be ruled out.
    const C part = std::min(C(3) * rounding.error / (std::sqrt(total / C(count)) + C(1e-30)), C(0.5));
    rounding.keep = C(1) - part;
    rounding.loss = C(1) / part - C(1);
    round_panel<In>(rows, count, a.features, tokens_.scale, tokens_.mean, C(1) / rounding.unit, panel);
    const Vec<C> factor = splat(rounding.keep * rounding.unit * rounding.unit);
    Vec<int32_t> norm[2][TP_VECTORS] = {};  // the sums of even and of odd lanes do not wait for each other
    for (int64_t d = 0; d < lanes; d += 2)
#pragma GCC unroll 4
      for (int v = 0; v < TP_VECTORS; ++v)
#pragma GCC unroll 2
        for (int odd = 0; odd < 2; ++odd) {
          const Vec<int32_t> pair = load(panel + (d + odd) * P + v * L);
          add_product(norm[odd][v], pair, pair);
        }
    for (int v = 0; v < TP_VECTORS; ++v)
      store(tokens_.norm + p * P + v * L, factor * __builtin_convertvector(norm[0][v] + norm[1][v], Vec<C>));
    return rounding;
  }

  Rounding<C> of(int64_t p) const {  // a copy, that stores of other numbers do not change
    if constexpr (kRounds<C>)
      if (on) return panels[p];
    return {};
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
  void products(const int32_t* x, const int32_t* center, int64_t count, int32_t* out) const {
    const int32_t* row[4];
    for (int64_t c = 0; c < 4; ++c) row[c] = centers + center[std::min(c, count - 1)] * lanes;
    Vec<int32_t> sum[4] = {};
    for (int64_t d = 0; d < lanes; d += L) {
      const Vec<int32_t> token = load(x + d);
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) add_product(sum[c], token, load(row[c] + d));
    }
    for (int c = 0; c < 4; ++c) out[c] = lane_sum<int32_t>(sum[c]);
  }

  const ClusterArgs& a;
  Tokens<In>& tokens_;
  Centers<C>& centers_;
  bool on = false;                // the first products are those of rounded tokens and centers
  int64_t lanes = 0;              // of a rounded row: pairs of features
  int32_t* centers = nullptr;     // [k][lanes]
  Unit<C>* units = nullptr;       // [k]
  C* norms = nullptr;             // [k] squared norms of the rounded centers
  Rounding<C>* panels = nullptr;  // [panels]
};

// What the products of a center with a panel's tokens say: their scores, ||center||^2 - 2 <token, center>, and what
// those are at least; with rounded ones, as parts of squared distances times keep.
template <class In, class T>
struct Reading {
  using C = typename AccOf<In>::Type;
  static constexpr bool rounded = !std::is_same<T, C>::value;
  C norm, room, factor, keep;
  Reading(const Rounded<In>& all, const Rounding<C>& mine, const Centers<C>& centers, C slack, int64_t j) {
    if constexpr (rounded) {
      const C error = mine.error + all.units[j].error;
      norm = all.norms[j];
      room = kExact<C> * norm + error * error * mine.loss;
      factor = C(2) * mine.unit * all.units[j].unit;
      keep = mine.keep;
    } else {
      norm = centers.norm[j];
      room = slack * norm;
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

}  // namespace TP_ISA
}  // namespace tokenpool
