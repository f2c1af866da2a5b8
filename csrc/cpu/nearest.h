// The nearest centers of a panel's kPanel tokens so far, by score: ||center||^2 - 2 <token, center>. Writes only
// itself.
#pragma once

#include "gemm.h"

namespace tokenpool {
namespace TP_ISA {

template <class C>
struct Nearest {
  using I = typename Lane<C>::Int;
  static constexpr int L = kLanes<C>;
  Vec<C> best[TP_VECTORS];
  Vec<I> label[TP_VECTORS];

  TP_INLINE Nearest() {
    for (int v = 0; v < TP_VECTORS; ++v) {
      best[v] = splat(std::numeric_limits<C>::infinity());
      label[v] = Vec<I>{};
    }
  }
  TP_INLINE void take(int v, int64_t j, Vec<C> score) {  // center j; of equal scores the first stays
    const Vec<I> index = splat(I(j));
    const auto nearer = score < best[v];
    best[v] = nearer ? score : best[v];
    label[v] = nearer ? index : label[v];
  }
  TP_INLINE void compare(int64_t j, C center_norm, const C* products) {
    const Vec<C> norm = splat(center_norm);
#pragma GCC unroll 4
    for (int v = 0; v < TP_VECTORS; ++v) take(v, j, norm - C(2) * load(products + v * L));
  }
  TP_INLINE void write(C* best_out, I* label_out) const {
    for (int v = 0; v < TP_VECTORS; ++v) {
      store(best_out + v * L, best[v]);
      store(label_out + v * L, label[v]);
    }
  }
};

}  // namespace TP_ISA
}  // namespace tokenpool
