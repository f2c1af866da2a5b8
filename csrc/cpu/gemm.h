// Packed panels of tokens and the register tile: products of kRows rows with kPanel tokens.
//
// A panel holds kPanel tokens feature by feature: panel[d * kPanel + lane]. It serves as the right operand (vectors of
// tokens) and, one lane at a time, as the left one. Every product is summed in the same order wherever its tile lies,
// so results depend neither on the batch nor on the number of threads.
#pragma once

#include "convert.h"

namespace tokenpool {
namespace TP_ISA {

template <class C>
struct Tile {
  Vec<C> v[kRows][TP_VECTORS];
};

TP_INLINE void add_product(Vec<float>& sum, Vec<float> a, Vec<float> b) {
  sum += a * b;
}
TP_INLINE void add_product(Vec<double>& sum, Vec<double> a, Vec<double> b) {
  sum += a * b;
}

// Tokens rounded to 16 bits: a lane holds two features, and one instruction adds up both products, without error. That
// is 1.6 times as fast as floats (Zen 3), from half the memory. Elsewhere than on x86-64 there is no such instruction:
// no rounding.
#if defined(__x86_64__)
template <class C>
constexpr bool kRounds = std::is_same<C, float>::value;
TP_INLINE void add_product(Vec<int32_t>& sum, Vec<int32_t> a, Vec<int32_t> b) {
#if TP_VECTOR_BYTES == 64
  sum = (Vec<int32_t>)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif TP_VECTOR_BYTES == 32
  sum += (Vec<int32_t>)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
  sum += (Vec<int32_t>)_mm_madd_epi16((__m128i)a, (__m128i)b);
#endif
}
#else
template <class C>
constexpr bool kRounds = false;
TP_INLINE void add_product(Vec<int32_t>& sum, Vec<int32_t> a, Vec<int32_t> b) {  // so that all compiles
  sum += (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
}
#endif

// tile[r][:] = sum over d < depth of left[r][d * left_step] * panel[d][:], for the first V vectors of the panel
template <class C, int V = TP_VECTORS>
TP_INLINE void multiply(const C* const (&left)[kRows], int64_t left_step, const C* panel, int64_t depth,
                        Tile<C>& tile) {
  Vec<C> acc[kRows][V] = {};
  for (int64_t d = 0; d < depth; ++d) {
    Vec<C> b[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) b[v] = load(panel + d * kPanel<C> + v * kLanes<C>);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec<C> a = splat(left[r][d * left_step]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) add_product(acc[r][v], a, b[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) tile.v[r][v] = acc[r][v];
}

// kLanes rows of any dtype -> one vector column of a panel; rows from `rows` on are zero.
template <bool All, class In, class C>
TP_INLINE void pack_rows(const In* const* row, int rows, int64_t features, C scale, const C* mean, C* panel) {
  constexpr int L = kLanes<C>;
  const Vec<C> factor = splat(scale);
  int64_t d = 0;
  for (; d + L <= features; d += L) {
    const Vec<C> shift = load(mean + d);
    Vec<C> r[L];
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) r[i] = All || i < rows ? load_acc(row[i] + d) * factor - shift : Vec<C>{};
    transpose<C>(r);
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) store(panel + (d + i) * kPanel<C>, r[i]);
  }
  for (; d < features; ++d)
    for (int i = 0; i < L; ++i)
      panel[d * kPanel<C> + i] = All || i < rows ? C(to_float(row[i][d])) * scale - mean[d] : C(0);
}

// Rows of any dtype -> panel [features][kPanel] of acc: element (d, lane) = row[lane][d] * scale - mean[d], and zero
// from lane `rows` on.
template <class In, class C>
inline void pack_panel(const In* const (&row)[kPanel<C>], int64_t rows, int64_t features, C scale, const C* mean,
                       C* panel) {
  constexpr int L = kLanes<C>;
  for (int g = 0; g < kPanel<C>; g += L) {
    if (rows >= g + L)
      pack_rows<true>(row + g, L, features, scale, mean, panel + g);
    else
      pack_rows<false>(row + g, std::max(int(rows) - g, 0), features, scale, mean, panel + g);
  }
}

// A row times `fine`, rounded to whole numbers: those of features low and high share a lane. |row * fine| < 2^15.
TP_INLINE Vec<int32_t> round_pair(Vec<float> low, Vec<float> high, Vec<float> fine) {
  const Vec<float> magic =
      splat(12582912.0f);  // 1.5 * 2^23: whatever is added to it is rounded, and stands in its low bits
  typedef Vec<uint32_t> Bits;
  return (Vec<int32_t>)(((Bits)(low * fine + magic) & 0xffff) | ((Bits)(high * fine + magic) << 16));
}

// As many lanes as `features` fill when rounded: whole vectors.
constexpr int64_t rounded_lanes(int64_t features) {
  return (features + 2 * kLanes<float> - 1) / (2 * kLanes<float>)*kLanes<float>;
}

// Rows of any dtype -> panel of pairs [rounded_lanes][kPanel] of (row * scale - mean) * fine; zero from row `rows` on.
template <class In>
inline void round_panel(const In* const* row, int64_t rows, int64_t features, float scale, const float* mean,
                        float fine, int32_t* panel) {
  constexpr int L = kLanes<float>;
  const Vec<float> factor = splat(scale), finer = splat(fine);
  for (int g = 0; g < kPanel<float>; g += L)
    for (int64_t d = 0; d < features; d += 2 * L) {
      Vec<float> r[L];
      if (d + 2 * L <= features && rows >= g + L) {
        const Vec<float> low = load(mean + d), high = load(mean + d + L);
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) {
          const In* x = row[g + i] + d;
          r[i] = (Vec<float>)round_pair(load_acc(x) * factor - low, load_acc(x + L) * factor - high, finer);
        }
      } else {
        for (int i = 0; i < L; ++i) {
          float x[2 * L] = {};
          for (int64_t e = d; g + i < rows && e < std::min(d + 2 * L, features); ++e)
            x[e - d] = to_float(row[g + i][e]) * scale - mean[e];
          r[i] = (Vec<float>)round_pair(load(x), load(x + L), finer);
        }
      }
      transpose<float>(r);
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) store(panel + (d / 2 + i) * kPanel<int32_t> + g, (Vec<int32_t>)r[i]);
    }
}

constexpr int64_t kDepthBlock = 128;  // features a pass: two panels' blocks stay in the first-level cache
constexpr int64_t kRoundedBlock =
    512;  // lanes a pass of rounded ones, where every pass more costs more than the cache gains

// Products of kRows rows with a panel over `depth` features, stored or added to what `out` holds.
template <class C, int V>
TP_INLINE void product_strip(const C* const (&rows)[kRows], int64_t row_step, const C* panel, int64_t depth, bool add,
                             C* const (&out)[kRows]) {
  Tile<C> acc;
  multiply<C, V>(rows, row_step, panel, depth, acc);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      C* at = out[r] + v * kLanes<C>;
      store(at, add ? load(at) + acc.v[r][v] : acc.v[r][v]);
    }
}

// The same for the first `vectors` vectors of the panel.
template <class C>
TP_INLINE void product_strip(const C* const (&rows)[kRows], int64_t row_step, const C* panel, int64_t depth, bool add,
                             C* const (&out)[kRows], int64_t vectors) {
  static_assert(TP_VECTORS <= 3, "strips of 1, 2 and TP_VECTORS vectors");
  if (vectors >= TP_VECTORS)
    product_strip<C, TP_VECTORS>(rows, row_step, panel, depth, add, out);
  else if (vectors == 2)
    product_strip<C, 2>(rows, row_step, panel, depth, add, out);
  else
    product_strip<C, 1>(rows, row_step, panel, depth, add, out);
}

// Memory that will be wanted soon, fetched into the cache a few lines at a time while something else is computed.
class Ahead {
 public:
  void want(const void* from, int64_t bytes, int64_t times) {  // in so many calls of fetch
    at_ = static_cast<const char*>(from);
    lines_ = bytes / 64 + 1;
    each_ = lines_ / std::max<int64_t>(times, 1) + 1;
  }
  TP_INLINE void fetch() {
    for (int64_t i = 0; i < each_ && lines_ > 0; ++i, --lines_, at_ += 64) __builtin_prefetch(at_, 0, 2);
  }

 private:
  const char* at_ = nullptr;
  int64_t lines_ = 0, each_ = 0;
};

// Products of the centers which[0..count) (null: the first `count`), rows of this length, with so many vectors of a
// panel: out[i] gets those of the i-th.
template <class T>
TP_INLINE void multiply_panel(const T* centers, int64_t length, const int32_t* which, int64_t count, int64_t vectors,
                              const T* panel, T* const* out, Ahead* ahead = nullptr) {
  constexpr int64_t kBlock = std::is_same<T, int32_t>::value ? kRoundedBlock : kDepthBlock;
  T nowhere[kRows][kPanel<T>];  // products of rows that there are not
  for (int64_t d0 = 0; d0 == 0 || d0 < length; d0 += kBlock)
    for (int64_t i = 0; i < count; i += kRows) {
      const T* rows[kRows];
      T* to[kRows];
      for (int r = 0; r < kRows; ++r) {
        const int64_t row = std::min(i + r, count - 1);
        rows[r] = centers + (which ? which[row] : row) * length + d0;
        to[r] = i + r < count ? out[i + r] : nowhere[r];
      }
      if (ahead) ahead->fetch();
      product_strip<T>(rows, 1, panel + d0 * kPanel<T>, std::min(kBlock, length - d0), d0 > 0, to, vectors);
    }
}

// The Gram matrix of n packed tokens, tiles first..last of the lower triangle (column panel by column panel). On the
// diagonal only the vectors that reach below it, at the end only rows of tokens.
// gram: [panels * kPanel][stride]
template <class C>
inline void gram_tiles(const C* packed, int64_t features, int64_t n, int64_t first, int64_t last, C* gram,
                       int64_t stride, Ahead* ahead = nullptr) {
  constexpr int P = kPanel<C>;
  const int64_t panels = (n + P - 1) / P;
  for (int64_t d0 = 0; d0 == 0 || d0 < features; d0 += kDepthBlock) {
    const int64_t depth = std::min(kDepthBlock, features - d0);
    int64_t column = 0, tile = 0;
    while (tile + (panels - column) <= first) tile += panels - column++;
    int64_t row = column + (first - tile);
    for (int64_t t = first; t < last; ++t) {
      const C* right = packed + (column * features + d0) * P;
      const C* left = packed + (row * features + d0) * P;
      for (int g = 0; g < P && row * P + g < n; g += kRows) {
        const C* rows[kRows];
        C* out[kRows];
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          rows[r] = left + g + r;
          out[r] = gram + (row * P + g + r) * stride + column * P;
        }
        if (ahead) ahead->fetch();
        const int vectors = row == column ? (g + kRows - 1) / kLanes<C> + 1 : TP_VECTORS;
        product_strip<C>(rows, P, right, depth, d0 > 0, out, vectors);
      }
      if (++row == panels) row = ++column;
    }
  }
}

// Copy the lower triangle above the diagonal.
template <class C>
inline void mirror(int64_t n, C* gram, int64_t stride) {
  constexpr int L = kLanes<C>;
  for (int64_t row = 0; row < n; row += L)
    for (int64_t column = 0; column < row; column += L)
      transpose_square(gram + row * stride + column, stride, gram + column * stride + row, stride);
}

}  // namespace TP_ISA
}  // namespace tokenpool
