// Means of an assignment, their backward, and the way back to tokens.
#pragma once

#include "convert.h"
#include "members.h"

namespace tokenpool {
namespace TP_ISA {

// An output of more bytes than this is written past the caches: a line that is not read first costs half.
constexpr int64_t kPastCaches = 4 << 20;

inline void copy_past_caches(void* out, const void* row, int64_t bytes) {
  if (reinterpret_cast<uintptr_t>(out) % TP_VECTOR_BYTES || bytes % TP_VECTOR_BYTES) {
    if (bytes > 0) std::memcpy(out, row, size_t(bytes));
    return;
  }
  float* to = static_cast<float*>(out);
  const char* from = static_cast<const char*>(row);  // of any dtype, at any address
  for (int64_t i = 0; i < bytes / 4; i += kLanes<float>) {
    Vec<float> v;
    std::memcpy(&v, from + 4 * i, sizeof v);
    store_past_caches(to + i, v);
  }
}

// Rows of all tokens: zeros for those without a cluster, the others by f(begin, end, token, count, past_caches):
// token[begin..end] are to be written, and count[j] are the members of cluster j. A large output is written cluster
// after cluster: each is read once.
template <class F>
inline void write_rows(const PoolArgs& a, const int64_t* label, void* out, int64_t bytes, bool parallel, const F& f) {
  const int64_t N = a.tokens, K = a.clusters;
  const bool past_caches = a.images * N * bytes > kPastCaches;
  Buffer<int32_t> count(K + 1), token(N);
  int64_t members = 0;
  if (past_caches) {
    group(label, N, K, count, token);  // begins of the lists, so far
    members = count[K];
    for (int64_t j = 0; j < K; ++j) count[j] = count[j + 1] - count[j];
  } else {
    std::memset(static_cast<void*>(count), 0, size_t(K) * sizeof(int32_t));
    for (int64_t i = 0; i < N; ++i) {
      if (label[i] < 0 || label[i] >= K) continue;
      ++count[label[i]];
      token[members++] = int32_t(i);
    }
  }
  if (members < N && bytes > 0)
    for (int64_t i = 0; i < N; ++i)
      if (label[i] < 0 || label[i] >= K) std::memset(static_cast<char*>(out) + i * bytes, 0, size_t(bytes));
  split(a.parallel_for, parallel && N * bytes > 800000, members, [&](int64_t begin, int64_t end) {
    f(begin, end, token, count, past_caches);
    if (past_caches) finish_past_caches();
  });
}

// sum = sum over the members of share * (x - base), times `scale`; without a base the plain sum of x. Many members are
// added in blocks.
template <class In, class C>
inline void add_tokens_of(const PoolArgs& a, const In* x, const int32_t* member, int64_t count, const C* share,
                          const C* base, C scale, C* row_buffer, C* sum) {
  constexpr int64_t kBlock = 32;
  const int64_t D = a.features;
  Buffer<double> total(count > kBlock ? D : 0);
  for (int64_t d = 0; d < (count > kBlock ? D : 0); ++d) total[d] = 0;
  for (int64_t d = 0; d < D; ++d) sum[d] = 0;
  for (int64_t m = 0; m < count; ++m) {
    if (!base || share[m] != C(0)) {
      const C* row = as_acc(x + member[m] * a.x_token_stride, row_buffer, D);
      if (!base)
        for (int64_t d = 0; d < D; ++d) sum[d] += row[d];
      else if (scale == C(1))
        for (int64_t d = 0; d < D; ++d) sum[d] += share[m] * (row[d] - base[d]);
      else
        for (int64_t d = 0; d < D; ++d) sum[d] += share[m] * (row[d] * scale - base[d] * scale);
    }
    if (count > kBlock && ((m + 1) % kBlock == 0 || m + 1 == count))
      for (int64_t d = 0; d < D; ++d) {
        total[d] += double(sum[d]);
        sum[d] = m + 1 == count ? C(total[d]) : C(0);
      }
  }
}

// Weighted mean (or plain sum) of the tokens of each cluster. A mean is measured from the first token with a share:
// equal tokens give that token to the bit.
template <class In>
inline void pool_image(const PoolArgs& a, int64_t b, bool parallel) {
  using C = typename AccOf<In>::Type;
  const int64_t N = a.tokens, D = a.features, K = a.clusters;
  const int64_t* label = a.assignment + b * N;
  const C* weight = a.weights ? static_cast<const C*>(a.weights) + b * N : nullptr;
  const In* x = static_cast<const In*>(a.x) + b * a.x_image_stride;
  In* centers = static_cast<In*>(a.centers) + b * K * D;
  C* mass = a.mass ? static_cast<C*>(a.mass) + b * K : nullptr;
  Buffer<int32_t> start(K + 1), member(N);
  Buffer<C> share(N);
  group(label, N, K, start, member);
  split(a.parallel_for, parallel && N * D > 200000, K, [&](int64_t begin, int64_t end) {
    Buffer<C> mean(D), base(D), scratch(D);
    for (int64_t j = begin; j < end; ++j) {
      const int64_t count = start[j + 1] - start[j];
      const int32_t* const members = member + start[j];
      const C* const shares_of = share + start[j];
      const C total = shares<C>(members, count, weight, share + start[j]);
      if (mass) mass[j] = total;
      In* const out = centers + j * D;
      if (a.plain_sum || count == 0) {
        add_tokens_of<In, C>(a, x, members, count, shares_of, nullptr, C(1), scratch, mean);
        narrow(mean, C(1), out, D);
        continue;
      }
      int64_t first = 0;
      while (first + 1 < count && shares_of[first] == C(0)) ++first;
      widen(x + members[first] * a.x_token_stride, static_cast<C*>(base), D);
      const auto add = [&](C scale) {  // the others: that one is at no distance, even where it is infinite
        const int64_t from = first + 1;
        add_tokens_of<In, C>(a, x, members + from, count - from, shares_of + from, base, scale, scratch, mean);
      };
      add(C(1));
      bool finite = true;
      for (int64_t d = 0; d < D; ++d) {
        mean[d] += base[d];
        finite = finite && std::fabs(mean[d]) <= std::numeric_limits<C>::max();
      }
      if (!finite) {  // the difference of two large numbers, or tokens that are not finite themselves
        add(C(0.25));
        for (int64_t d = 0; d < D; ++d) mean[d] += base[d] * C(0.25);
      }
      narrow(mean, finite ? C(1) : C(4), out, D);
      if (!finite) keep_finite(static_cast<const C*>(mean), out, D);
    }
  });
}

// grad_x_i = w_i/W * g[a_i] (1/count where W = 0); grad_w_i = (x_i - c_{a_i}) . g[a_i] / W (0 where W = 0).
template <class In>
inline void pool_backward_image(const PoolArgs& a, int64_t b, bool parallel) {
  using C = typename AccOf<In>::Type;
  constexpr int L = kLanes<C>;
  const int64_t N = a.tokens, D = a.features, K = a.clusters;
  const int64_t* label = a.assignment + b * N;
  const C* weight = a.weights ? static_cast<const C*>(a.weights) + b * N : nullptr;
  const C* mass = static_cast<const C*>(a.mass) + b * K;
  const In* x = static_cast<const In*>(a.x) + b * a.x_image_stride;
  const In* centers = static_cast<const In*>(a.centers) + b * a.centers_image_stride;
  const In* grad = static_cast<const In*>(a.grad_centers) + b * a.grad_image_stride;
  In* grad_x = static_cast<In*>(a.grad_x) + b * N * D;
  C* grad_weights = a.grad_weights ? static_cast<C*>(a.grad_weights) + b * N : nullptr;
  if (grad_weights) std::fill(grad_weights, grad_weights + N, C(0));
  const int64_t bytes = D * int64_t(sizeof(In));
  write_rows(a, label, grad_x, bytes, parallel,
             [&](int64_t begin, int64_t end, const int32_t* token, const int32_t* count, bool past_caches) {
               Buffer<C> x_row(D), center_row(D), grad_row(D);
               Buffer<In> scratch(D);
               const C* g = nullptr;
               int64_t last = -1;
               for (int64_t m = begin; m < end; ++m) {
                 const int64_t i = token[m], j = label[i];
                 const C total = mass[j];
                 In* row = past_caches ? scratch : grad_x + i * D;
                 if (j != last) g = as_acc(grad + j * a.grad_row_stride, static_cast<C*>(grad_row), D);
                 if (j != last || weight || !past_caches)
                   narrow(g, total > 0 ? (weight ? weight[i] : C(1)) / total : C(1) / C(count[j]), row, D);
                 if (past_caches) copy_past_caches(grad_x + i * D, row, bytes);
                 last = j;
                 if (!grad_weights) continue;
                 const C* v = as_acc(x + i * a.x_token_stride, static_cast<C*>(x_row), D);
                 const C* c = as_acc(centers + j * a.centers_row_stride, static_cast<C*>(center_row), D);
                 Vec<C> sum = {};
                 C rest = 0;
                 int64_t d = 0;
                 for (; d + L <= D; d += L) sum += (load(v + d) - load(c + d)) * load(g + d);
                 for (; d < D; ++d) rest += (v[d] - c[d]) * g[d];
                 grad_weights[i] = total > 0 ? (lane_sum<C>(sum) + rest) / total : C(0);
               }
             });
}

// out_i = centers[a_i], zeros where there is none. Moves bytes only.
inline void unpool_image(const PoolArgs& a, int64_t element, int64_t b, bool parallel) {
  const int64_t bytes = a.features * element;
  const int64_t* label = a.assignment + b * a.tokens;
  const char* centers = static_cast<const char*>(a.centers) + b * a.centers_image_stride * element;
  char* out = static_cast<char*>(a.grad_x) + b * a.tokens * bytes;
  write_rows(a, label, out, bytes, parallel,
             [&](int64_t begin, int64_t end, const int32_t* token, const int32_t*, bool past_caches) {
               for (int64_t m = begin; m < end; ++m) {
                 const int64_t i = token[m];
                 const char* row = centers + label[i] * a.centers_row_stride * element;
                 if (past_caches)
                   copy_past_caches(out + i * bytes, row, bytes);
                 else if (bytes > 0)
                   std::memcpy(out + i * bytes, row, size_t(bytes));
               }
             });
}

template <class F>
inline void each_image(const PoolArgs& a, const F& f) {
  const bool over_images = a.images >= a.threads && a.threads > 1;
  hand_out(a.parallel_for, over_images ? a.threads : 1, a.images,
           [&](int64_t b) { f(b, !over_images && a.threads > 1); });
}

static void pool(const PoolArgs& a) {
  each_image(a, [&](int64_t b, bool parallel) {
    switch (a.dtype) {
      case DType::Float32:
        return pool_image<float>(a, b, parallel);
      case DType::Float64:
        return pool_image<double>(a, b, parallel);
      case DType::BFloat16:
        return pool_image<BF16>(a, b, parallel);
      case DType::Float16:
        return pool_image<FP16>(a, b, parallel);
    }
  });
}

static void pool_backward(const PoolArgs& a) {
  each_image(a, [&](int64_t b, bool parallel) {
    switch (a.dtype) {
      case DType::Float32:
        return pool_backward_image<float>(a, b, parallel);
      case DType::Float64:
        return pool_backward_image<double>(a, b, parallel);
      case DType::BFloat16:
        return pool_backward_image<BF16>(a, b, parallel);
      case DType::Float16:
        return pool_backward_image<FP16>(a, b, parallel);
    }
  });
}

static void unpool(const PoolArgs& a) {
  const int64_t element = a.dtype == DType::Float64 ? 8 : a.dtype == DType::Float32 ? 4 : 2;
  each_image(a, [&](int64_t b, bool parallel) { unpool_image(a, element, b, parallel); });
}

}  // namespace TP_ISA
}  // namespace tokenpool
