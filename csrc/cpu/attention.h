// The attention every token receives: column sums of softmax(scale * q k^T), a few rows at a time.
//
// For each image and head: the keys are packed once; for kRows queries the logits of all keys are made in a row buffer,
// turned into probabilities and added to the head's column sum. The largest thing in memory is kRows x N. Many numbers
// are added in blocks, and those in double; heads are summed in order at the end. Where logits may overflow, a head's
// queries and keys are copied as doubles.
#pragma once

#include "gemm.h"
#include "members.h"

namespace tokenpool {
namespace TP_ISA {

// exp of every lane (relative error about 2e-7; nothing below exp(-87)): 2^n * p(r), with x = n ln 2 + r.
TP_INLINE Vec<float> exp_lanes(Vec<float> x) {
  const Vec<float> low = splat(-87.0f);
  const auto overflows = x > splat(88.7f);  // only when a given log-sum-exp is not that of these logits
  x = x < low ? low : overflows ? Vec<float>{} : x;
  const Vec<float> shifted = x * 1.44269504088896f + 12582912.0f;  // rounds to an integer in the low bits
  const Vec<float> n = shifted - 12582912.0f;
  const Vec<float> r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Vec<float> p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Vec<int32_t> exponent = (Vec<int32_t>)shifted << 23;  // the low bits of `shifted` are n
  const Vec<float> result = (Vec<float>)((Vec<int32_t>)p + exponent);
  return overflows ? splat(std::numeric_limits<float>::infinity()) : result;
}

TP_INLINE Vec<double> exp_lanes(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

template <class C>
inline C row_maximum(const C* row, int64_t n) {  // n a multiple of the lanes
  Vec<C> most = load(row);
  for (int64_t i = kLanes<C>; i < n; i += kLanes<C>) {
    const Vec<C> v = load(row + i);
    most = v > most ? v : most;
  }
  C m = most[0];
  for (int i = 1; i < kLanes<C>; ++i) m = most[i] > m ? most[i] : m;
  return m;
}

// The largest magnitude in rows; NaN is above all. As integers, which compare faster.
template <class In>
inline typename AccOf<In>::Type peak(const In* rows, int64_t stride, int64_t count, int64_t width) {
  using C = typename AccOf<In>::Type;
  using I = typename Lane<C>::Int;
  typedef Vec<I> Bits;
  Bits most = {};
  const int64_t whole = width / kLanes<C> * kLanes<C>;
  for (int64_t r = 0; r < count; ++r) {
    const In* row = rows + r * stride;
    for (int64_t i = 0; i < whole; i += kLanes<C>) {
      const Bits v = (Bits)magnitude<C>(load_acc(row + i));
      most = v > most ? v : most;
    }
    if (whole == width) continue;
    C rest[kLanes<C>] = {};
    for (int64_t i = whole; i < width; ++i) rest[i - whole] = to_float(row[i]);
    const Bits v = (Bits)magnitude<C>(load(rest));
    most = v > most ? v : most;
  }
  I m = 0;
  for (int i = 0; i < kLanes<C>; ++i) m = std::max<I>(m, most[i]);
  C largest;
  std::memcpy(&largest, &m, sizeof(C));
  return largest;
}

// May scaled queries, or the head's logits, leave acc's range?
template <class In>
inline bool may_overflow(const AttentionArgs& a, int64_t b, int64_t h) {
  using C = typename AccOf<In>::Type;
  const double scale = std::abs(a.scale);
  if (scale != 0 && !(scale >= 1e-6 && scale <= 1e6)) return true;
  const In* q = static_cast<const In*>(a.q) + b * a.q_strides[0] + h * a.q_strides[1];
  const In* k = static_cast<const In*>(a.k) + b * a.k_strides[0] + h * a.k_strides[1];
  const C left = peak(q, a.q_strides[2], a.queries, a.width) * C(scale);
  const C bound = left * peak(k, a.k_strides[2], a.keys, a.width) * C(a.width);
  return !(bound <= std::numeric_limits<C>::max() / 4);
}

// The head's mean-to-be (the plain sum over queries) to received [N]. Late: the scale is applied when the largest logit
// is taken off. No logit may overflow before.
template <bool Late, class In>
inline void attention_head(const AttentionArgs& a, int64_t b, int64_t h, typename AccOf<In>::Type* received) {
  using C = typename AccOf<In>::Type;
  constexpr int L = kLanes<C>, P = kPanel<C>;
  constexpr int64_t kBlock = 32;
  const int64_t d = a.width, padded = round_up(a.keys, P);
  const In* q = static_cast<const In*>(a.q) + b * a.q_strides[0] + h * a.q_strides[1];
  const In* k = static_cast<const In*>(a.k) + b * a.k_strides[0] + h * a.k_strides[1];
  const C* lse = a.lse ? static_cast<const C*>(a.lse) + (b * a.heads + h) * a.queries : nullptr;
  const C scale = Late ? C(a.scale < 0 ? -1 : 1) : C(a.scale);
  const Vec<C> rest = splat(C(std::abs(a.scale)));
  Buffer<C> packed(padded * d), rows(kRows * d), zero(d), logits(kRows * padded), sum(padded);
  Buffer<double> total(padded);
  int64_t summed = 0;  // queries

  for (int64_t i = 0; i < padded; ++i) sum[i] = 0, total[i] = 0;
  for (int64_t i = 0; i < d; ++i) zero[i] = 0;
  for (int64_t p = 0; p < padded; p += P) {
    const In* row[P];
    const int64_t count = std::min<int64_t>(P, a.keys - p);
    for (int64_t r = 0; r < count; ++r) row[r] = k + (p + r) * a.k_strides[2];
    pack_panel<In, C>(row, count, d, C(1), zero, packed + p * d);
  }

  for (int64_t first = 0; first < a.queries; first += kRows) {
    const int64_t count = std::min<int64_t>(kRows, a.queries - first);
    const C* left[kRows];
    for (int64_t r = 0; r < kRows; ++r) {
      C* out = rows + std::min(r, count - 1) * d;
      if (r < count) {
        widen(q + (first + r) * a.q_strides[2], out, d);
        for (int64_t i = 0; i < d; ++i) out[i] *= scale;
      }
      left[r] = out;
    }
    for (int64_t p = 0; p < padded; p += P) {
      Tile<C> tile;
      multiply<C>(left, 1, packed + p * d, d, tile);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < TP_VECTORS; ++v) store(logits + r * padded + p + v * L, tile.v[r][v]);
    }
    for (int64_t r = 0; r < count; ++r) {
      C* row = logits + r * padded;
      for (int64_t i = a.keys; i < padded; ++i) row[i] = -std::numeric_limits<C>::infinity();
      if (lse) {  // exp(x - lse) directly; logits never exceed their log-sum-exp
        const Vec<C> shift = splat(lse[first + r]);
        for (int64_t i = 0; i < padded; i += L) {
          const Vec<C> x = Late ? load(row + i) * rest : load(row + i);
          store(sum + i, load(sum + i) + exp_lanes(x - shift));
        }
        continue;
      }
      const Vec<C> shift = splat(row_maximum(row, padded));
      double mass = 0;
      for (int64_t i = 0; i < padded;) {
        Vec<C> block = {};
        for (const int64_t end = std::min(i + kBlock * L, padded); i < end; i += L) {
          const Vec<C> below = load(row + i) - shift;
          const Vec<C> e = exp_lanes(Late ? below * rest : below);
          store(row + i, e);
          block += e;
        }
        mass += double(lane_sum<C>(block));
      }
      for (int64_t i = a.keys; i < padded; ++i) row[i] = 0;
      const Vec<C> share = splat(C(1 / mass));
      for (int64_t i = 0; i < padded; i += L) store(sum + i, load(sum + i) + load(row + i) * share);
    }
    summed += count;
    if (summed < kBlock && first + count < a.queries) continue;
    for (int64_t i = 0; i < padded; ++i) total[i] += double(sum[i]), sum[i] = 0;
    summed = 0;
  }
  for (int64_t i = 0; i < a.keys; ++i) received[i] = C(total[i]);
}

// Rows as doubles, times 2^-e where products of them might overflow; returns that e.
template <class In>
inline int widen_far(const In* from, int64_t stride, int64_t rows, int64_t width, double* to) {
  double largest = 0;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < width; ++i) {
      const double v = to[r * width + i] = to_float(from[r * stride + i]);
      largest = std::max(largest, std::abs(v));
    }
  if (!(largest > 1e140 && largest <= std::numeric_limits<double>::max())) return 0;
  const int e = std::ilogb(largest);
  for (int64_t i = 0; i < rows * width; ++i) to[i] = std::ldexp(to[i], -e);
  return e;
}

// A head whose logits may overflow, in double.
template <class In>
inline void attention_far(const AttentionArgs& a, int64_t b, int64_t h, typename AccOf<In>::Type* received) {
  Buffer<double> q(a.queries * a.width), k(a.keys * a.width), lse(a.queries), sum(a.keys);
  const In* from_q = static_cast<const In*>(a.q) + b * a.q_strides[0] + h * a.q_strides[1];
  const In* from_k = static_cast<const In*>(a.k) + b * a.k_strides[0] + h * a.k_strides[1];
  const int shift =
      widen_far(from_q, a.q_strides[2], a.queries, a.width, q) + widen_far(from_k, a.k_strides[2], a.keys, a.width, k);
  const double most = std::numeric_limits<double>::max();
  AttentionArgs far = a;
  far.q = q;
  far.k = k;
  far.q_strides[2] = far.k_strides[2] = a.width;
  far.scale = std::min(std::max(std::ldexp(a.scale, shift), -most), most);
  if (a.lse) {
    const auto* given = static_cast<const typename AccOf<In>::Type*>(a.lse) + (b * a.heads + h) * a.queries;
    std::copy(given, given + a.queries, lse + 0);
    far.lse = lse;
  }
  far.heads = 1;
  attention_head<true, double>(far, 0, 0, sum);
  std::copy(sum + 0, sum + a.keys, received);
}

template <class In>
inline void attention_all(const AttentionArgs& a) {
  using C = typename AccOf<In>::Type;
  C* partial = static_cast<C*>(a.partial);
  hand_out(a.parallel_for, a.threads, a.images * a.heads, [&](int64_t i) {
    const int64_t b = i / a.heads, h = i % a.heads;
    if (may_overflow<In>(a, b, h))
      attention_far<In>(a, b, h, partial + i * a.keys);
    else
      attention_head<false, In>(a, b, h, partial + i * a.keys);
  });
  const double factor = 1 / double(std::max<int64_t>(a.heads * a.queries, 1));
  for (int64_t b = 0; b < a.images; ++b)
    for (int64_t i = 0; i < a.keys; ++i) {
      double sum = 0;
      for (int64_t h = 0; h < a.heads; ++h) sum += double(partial[(b * a.heads + h) * a.keys + i]);
      static_cast<C*>(a.received)[b * a.keys + i] = C(sum * factor);
    }
}

static void attention_received(const AttentionArgs& a) {
  switch (a.dtype) {
    case DType::Float32:
      return attention_all<float>(a);
    case DType::Float64:
      return attention_all<double>(a);
    case DType::BFloat16:
      return attention_all<BF16>(a);
    case DType::Float16:
      return attention_all<FP16>(a);
  }
}

}  // namespace TP_ISA
}  // namespace tokenpool
