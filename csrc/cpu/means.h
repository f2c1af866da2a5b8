// The mean of a cluster's tokens:
//
//   mean_j = x_m + sum over the members i of share_i * (x_i - x_m), scaled       x_m: its first member with a share
//
// In the order of the member list. Writes `out` [D] only.
#pragma once

#include "clusters.h"

namespace tokenpool {
namespace TP_ISA {

// W vectors of a mean: sum over r of share[r] * (x[r] - base), scaled, after what is in out (if `add`).
template <int W, class In, class C>
TP_INLINE void add_members(C scale, const In* const* x, const C* share, int64_t count, const In* base, int64_t d,
                           bool add, C* out) {
  constexpr int L = kLanes<C>;
  const Vec<C> factor = splat(scale);
  Vec<C> sum[W], origin[W];
#pragma GCC unroll 4
  for (int w = 0; w < W; ++w) {
    sum[w] = add ? load(out + d + w * L) : Vec<C>{};
    origin[w] = load_acc(base + d + w * L) * factor;
  }
  for (int64_t r = 0; r < count; ++r) {
    const Vec<C> s = splat(share[r]);
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) sum[w] += s * (load_acc(x[r] + d + w * L) * factor - origin[w]);
  }
#pragma GCC unroll 4
  for (int w = 0; w < W; ++w) store(out + d + w * L, sum[w]);
}

// out = sum of share * (x - base), scaled, over the members m.. < end that have a share; the caller has set out.
template <class In, class C>
inline void add_block(const Tokens<In>& tokens, const Assignment<In>& assigned, int64_t m, int64_t end, const In* base,
                      bool add, C* out) {
  constexpr int L = kLanes<C>, W = 4, kTogether = 16;  // members whose rows stay in the first-level cache
  const int64_t D = tokens.a.features;
  while (m < end) {
    const In* x[kTogether];
    C share[kTogether];
    int64_t count = 0;
    for (; m < end && count < kTogether; ++m) {
      share[count] = assigned.share[m];
      x[count] = tokens.row(assigned.member[m]);
      count += assigned.share[m] != C(0);
    }
    int64_t d = 0;
    for (; d + W * L <= D; d += W * L) add_members<W>(tokens.scale, x, share, count, base, d, add, out);
    for (; d + L <= D; d += L) add_members<1>(tokens.scale, x, share, count, base, d, add, out);
    for (; d < D; ++d) {
      C sum = add ? out[d] : C(0);
      const C origin = C(to_float(base[d])) * tokens.scale;
      for (int64_t r = 0; r < count; ++r) sum += share[r] * (C(to_float(x[r][d])) * tokens.scale - origin);
      out[d] = sum;
    }
    add = true;
  }
}

// The weighted mean of cluster j's tokens, scaled; minus the shift when Centered. It is measured from a member: equal
// tokens give that token to the bit. Many members are added in blocks.
template <bool Centered, class In>
inline void mean_of(const Tokens<In>& tokens, const Assignment<In>& assigned, int64_t j,
                    typename AccOf<In>::Type* out) {
  using C = typename AccOf<In>::Type;
  constexpr int64_t kBlock = 32;
  const int64_t D = tokens.a.features, last = assigned.start[j + 1];
  int64_t m = assigned.start[j];
  while (m + 1 < last && assigned.share[m] == C(0)) ++m;
  const In* const base = tokens.row(assigned.member[m++]);
  const auto origin = [&](int64_t d) {
    return C(to_float(base[d])) * tokens.scale - (Centered ? tokens.mean[d] : C(0));
  };
  if (last - m <= kBlock) {
    if (m == last)
      for (int64_t d = 0; d < D; ++d) out[d] = 0;
    add_block(tokens, assigned, m, last, base, false, out);
    for (int64_t d = 0; d < D; ++d) out[d] += origin(d);
    return;
  }
  Buffer<double> total(D);
  for (int64_t d = 0; d < D; ++d) total[d] = 0;
  for (; m < last; m += kBlock) {
    add_block(tokens, assigned, m, std::min(m + kBlock, last), base, false, out);
    for (int64_t d = 0; d < D; ++d) total[d] += double(out[d]);
  }
  for (int64_t d = 0; d < D; ++d) out[d] = C(total[d] + double(origin(d)));
}

// Distances to a mean that differ by less than this times its squared length may be equal but for its rounding.
template <class C>
constexpr C kTie = 16 * std::numeric_limits<C>::epsilon();

// The member nearest to the mean, in double and without a quotient: of the y, members minus one of them, that of the
// least W ||y||^2 - 2 y . sum of w y; the first on a tie. Exact for small integers. Where no member weighs anything,
// all weigh the same. weighty: only a member of positive weight.
template <class In>
inline int32_t least_sum_member(const Tokens<In>& tokens, const int32_t* member, int64_t count, bool weighty) {
  const int64_t D = tokens.a.features;
  const auto given = [&](int64_t m) { return tokens.weight ? double(tokens.weight[member[m]]) : 1.0; };
  int64_t first = 0;
  while (first < count && !(given(first) > 0)) ++first;
  const bool equal = first == count;
  if (equal) first = 0;
  const In* const base = tokens.row(member[first]);
  const auto y = [&](const In* x, int64_t d) {
    return (double(to_float(x[d])) - double(to_float(base[d]))) * double(tokens.scale);
  };
  Buffer<double> sum(D);
  for (int64_t d = 0; d < D; ++d) sum[d] = 0;
  double total = 0, least = std::numeric_limits<double>::infinity();
  for (int64_t m = first; m < count; ++m) {
    const double weight = equal ? 1 : given(m);
    if (!(weight > 0)) continue;
    const In* const x = tokens.row(member[m]);
    for (int64_t d = 0; d < D; ++d) sum[d] += weight * y(x, d);
    total += weight;
  }
  int32_t nearest = member[first];
  for (int64_t m = 0; m < count; ++m) {
    if (weighty && !(given(m) > 0)) continue;
    const In* const x = tokens.row(member[m]);
    double cost = 0;
    for (int64_t d = 0; d < D; ++d) cost += y(x, d) * (total * y(x, d) - 2 * sum[d]);
    if (cost < least) {
      least = cost;
      nearest = member[m];
    }
  }
  return nearest;
}

}  // namespace TP_ISA
}  // namespace tokenpool
