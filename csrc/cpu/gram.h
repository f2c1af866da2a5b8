// Clustering with a Gram matrix (gram path): iterations without products of tokens and centers.
//
//   G = Y Y^T [n][n];   c_j = sum_m s_m y_m, so <c_j, y_i> = sum_m s_m G[m][i], and ||c_j||^2 = sum_m s_m <c_j, y_m>
//
// Every center keeps its products with all tokens, a row as long as a row of G (that row itself, where the center is a
// token); only centers whose members changed get a new one. Writes Tokens::norm, Centers::norm, and label and best of
// the assignment.
#pragma once

#include "clusters.h"
#include "lengths.h"
#include "nearest.h"

namespace tokenpool {
namespace TP_ISA {

template <class In>
class GramPath {
  using C = typename AccOf<In>::Type;
  using I = typename Lane<C>::Int;
  static constexpr int L = kLanes<C>, P = kPanel<C>;

 public:
  GramPath(Tokens<In>& tokens, Centers<C>& centers, Assignment<In>& assigned)
      : a(tokens.a), tokens_(tokens), centers_(centers), assigned_(assigned) {}

  void build(int64_t next) {
    pack_tokens();
    const int64_t panels = tokens_.padded / P;
    Ahead ahead;  // the product leaves the memory idle: time to fetch the next image
    const int64_t blocks = (a.features + kDepthBlock - 1) / kDepthBlock;
    tokens_.want(next, panels * (panels + 1) / 2 * (P / kRows) * blocks, ahead);
    row_stride_ =
        tokens_.padded + ((tokens_.padded * int64_t(sizeof(C))) % 1024 == 0 ? L : 0);  // rows not a power of two apart
    gram_ = tokens_.arena.template take<C>(tokens_.padded * row_stride_);
    split(a.parallel_for, tokens_.parallel, panels * (panels + 1) / 2, [&](int64_t begin, int64_t end) {
      gram_tiles(packed_, a.features, tokens_.n, begin, end, gram_, row_stride_, tokens_.parallel ? nullptr : &ahead);
    });
    clear_padding();
    mirror(tokens_.n, gram_, row_stride_);
    for (int64_t i = 0; i < tokens_.padded; ++i) tokens_.norm[i] = i < tokens_.n ? gram_[i * row_stride_ + i] : C(0);
  }

  void start() {
    Arena& arena = tokens_.arena;
    product_ = arena.take<C>(centers_.k * row_stride_);
    row_of_ = arena.take<const C*>(centers_.k);
    if (a.init_centers)
      multiply_centers();
    else
      use_medoids();
  }

  void assign() {
    const bool far =
        centers_.k * row_stride_ * int64_t(sizeof(C)) > 512 << 10;  // products beyond the second-level cache
    split(a.parallel_for, tokens_.worth(tokens_.n * centers_.k), tokens_.padded / P, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * P; i < end * P; i += P) {
        Nearest<C> nearest;
        for (int64_t j = 0; j < centers_.k; ++j) {
          if (far) {
            const C* soon = row_of_[std::min(j + 12, centers_.k - 1)] + i;
            __builtin_prefetch(soon);
            __builtin_prefetch(soon + P - 1);
          }
          nearest.compare(j, centers_.norm[j], row_of_[j] + i);
        }
        nearest.write(assigned_.best + i, assigned_.label + i);
      }
    });
    for (int64_t i = 0; i < tokens_.n; ++i) {  // squared distances; a NaN stays NaN
      const C distance = assigned_.best[i] + tokens_.norm[i];
      assigned_.best[i] = distance < 0 ? C(0) : distance;
    }
  }

  // Can a Gram matrix tell these distances apart? Its entries are as wrong as the norms are large: not where a token is
  // very much nearer to its center than to what was taken off all of them, unless it is that center.
  bool resolved() const {
    constexpr C kRoom = 4096 * std::numeric_limits<C>::epsilon();
    for (int64_t i = 0; i < tokens_.n; ++i)
      if (assigned_.best[i] < kRoom * tokens_.norm[i] && !is_center(i, assigned_.label[i])) return false;
    return true;  // a NaN is beyond any path
  }

  void update() {
    if (a.medoids)
      use_medoids();
    else
      update_means();
  }

  void distances_from(int64_t token, C* apart) const {
    const C* row = gram_ + token * row_stride_;
    const Vec<C> norm = splat(tokens_.norm[token]);
    for (int64_t i = 0; i < tokens_.padded; i += L) {
      const Vec<C> d = load(tokens_.norm + i) + norm - C(2) * load(row + i);
      store(apart + i, d < C(0) ? Vec<C>{} : d);
    }
  }

  void sum_rows(const int32_t* member, const C* share, int64_t count, C* out) const {
    constexpr int W = 4;  // vectors of columns at a time
    int64_t i = 0;
    for (; i + W * L <= tokens_.padded; i += W * L) {
      Vec<C> sum[W] = {};
      for (int64_t m = 0; m < count; ++m) {
        if (share[m] == C(0)) continue;
        const C* g = gram_ + member[m] * row_stride_ + i;
        const Vec<C> s = splat(share[m]);
#pragma GCC unroll 4
        for (int v = 0; v < W; ++v) sum[v] += s * load(g + v * L);
      }
      for (int v = 0; v < W; ++v) store(out + i + v * L, sum[v]);
    }
    for (; i < tokens_.padded; i += L) {
      Vec<C> sum = {};
      for (int64_t m = 0; m < count; ++m)
        if (share[m] != C(0)) sum += splat(share[m]) * load(gram_ + member[m] * row_stride_ + i);
      store(out + i, sum);
    }
  }

 private:
  bool is_center(int64_t i, int64_t j) const {  // of the first assignment
    if (!a.init_centers && centers_.medoid[j] == i) return true;
    Buffer<C> token(a.features), center(a.features);
    tokens_.centered(i, token);
    if (!a.init_centers) tokens_.centered(centers_.medoid[j], center);
    const C* const of = a.init_centers ? centers_.row + j * a.features : center;
    return std::equal(token + 0, token + a.features, of);
  }

  void pack_tokens() {
    packed_ = tokens_.arena.template take<C>(tokens_.padded * a.features);
    split(a.parallel_for, tokens_.worth(tokens_.n * a.features), tokens_.padded / P, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) tokens_.pack(p * P, packed_ + p * P * a.features);
    });
  }

  void clear_padding() {  // rows and columns past the last token, as far as vectors reach
    const int64_t end = round_up(tokens_.n, L);
    for (int64_t i = round_up(tokens_.n, kRows); i < end; ++i)
      std::memset(gram_ + i * row_stride_, 0, size_t(end) * sizeof(C));
    for (int64_t i = 0; i < tokens_.n; ++i)
      std::memset(gram_ + i * row_stride_ + end, 0, size_t(row_stride_ - end) * sizeof(C));
  }

  void use_medoids() {  // the centers are the tokens medoid[j]
    for (int64_t j = 0; j < centers_.k; ++j) {
      row_of_[j] = gram_ + centers_.medoid[j] * row_stride_;
      centers_.norm[j] = tokens_.norm[centers_.medoid[j]];
    }
  }

  void multiply_centers() {  // given centers have no Gram rows
    const int64_t D = a.features;
    Buffer<int32_t> all(centers_.k);
    for (int64_t j = 0; j < centers_.k; ++j) {
      all[j] = int32_t(j);
      centers_.norm[j] = squared_norm(centers_.row + j * D, D);
      row_of_[j] = product_ + j * row_stride_;
    }
    split(a.parallel_for, tokens_.worth(tokens_.n * centers_.k * D / 8), tokens_.padded / P,
          [&](int64_t begin, int64_t end) {
            Buffer<C*> out(centers_.k);
            for (int64_t p = begin; p < end; ++p) {
              for (int64_t j = 0; j < centers_.k; ++j) out[j] = product_ + j * row_stride_ + p * P;
              multiply_panel<C>(centers_.row, D, all, centers_.k, TP_VECTORS, packed_ + p * P * D, out);
            }
          });
  }

  void update_means() {
    split(a.parallel_for, tokens_.worth(tokens_.n * tokens_.n), centers_.k, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j)
        if (assigned_.changed[j]) mean_products(j);
    });
  }

  // Products of cluster j's mean with all tokens, from the Gram rows of its members; and its squared norm.
  void mean_products(int64_t j) {
    const int32_t* member = assigned_.member + assigned_.start[j];
    const C* share = assigned_.share + assigned_.start[j];
    const int64_t count = assigned_.size(j);
    if (count == 1) {
      row_of_[j] = gram_ + member[0] * row_stride_;
      centers_.norm[j] = tokens_.norm[member[0]];
      return;
    }
    C* out = product_ + j * row_stride_;
    sum_rows(member, share, count, out);
    row_of_[j] = out;
    C norm = 0;
    for (int64_t m = 0; m < count; ++m)
      if (share[m] != C(0)) norm += share[m] * out[member[m]];
    centers_.norm[j] = norm;
  }

  const ClusterArgs& a;
  Tokens<In>& tokens_;
  Centers<C>& centers_;
  Assignment<In>& assigned_;
  int64_t row_stride_ = 0;                 // of products and the Gram matrix
  C *packed_ = nullptr, *gram_ = nullptr;  // [panels][D][P]; [padded][row_stride]
  C* product_ = nullptr;                   // [k][row_stride]
  const C** row_of_ = nullptr;             // where center j's products are
};

}  // namespace TP_ISA
}  // namespace tokenpool
