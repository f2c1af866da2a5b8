// Vectors of TP_VECTOR_BYTES through the compiler's vector extensions, so one source serves every instruction set.
#pragma once

#include "headers.h"

#ifndef TP_ISA  // kernels_<isa>.cpp names one; else it is any processor: 16-byte vectors (SSE2 on x86-64, NEON on
                // arm64)
#define TP_ISA baseline
#define TP_VECTOR_BYTES 16
#define TP_ROWS 2     // rows of the register tile
#define TP_VECTORS 3  // its columns, in vectors
#endif

namespace tokenpool {
namespace TP_ISA {

#define TP_INLINE inline __attribute__((always_inline))

template <class T>
struct Lane;
template <>
struct Lane<float> {
  using Int = int32_t;
};
template <>
struct Lane<double> {
  using Int = int64_t;
};

template <class T>
struct VecOf {
  typedef T Type __attribute__((vector_size(TP_VECTOR_BYTES)));
  typedef T Loose __attribute__((vector_size(TP_VECTOR_BYTES), aligned(alignof(T)), may_alias));  // any address
};
template <class T>
using Vec = typename VecOf<T>::Type;

template <class T>
constexpr int kLanes = TP_VECTOR_BYTES / sizeof(T);
constexpr int kRows = TP_ROWS;
template <class T>
constexpr int kPanel = TP_VECTORS * kLanes<T>;  // tokens in a packed panel

template <class T>
TP_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VecOf<T>::Loose*>(p);
}
template <class T>
TP_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename VecOf<T>::Loose*>(p) = v;
}

// A store that leaves the caches alone, to an aligned address; others see it after finish_past_caches().
TP_INLINE void store_past_caches(float* p, Vec<float> v) {
#if defined(__x86_64__) && TP_VECTOR_BYTES == 64
  _mm512_stream_ps(p, (__m512)v);
#elif defined(__x86_64__) && TP_VECTOR_BYTES == 32
  _mm256_stream_ps(p, (__m256)v);
#elif defined(__x86_64__) && TP_VECTOR_BYTES == 16
  _mm_stream_ps(p, (__m128)v);
#else
  store(p, v);
#endif
}
inline void finish_past_caches() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

template <class T>
TP_INLINE Vec<T> splat(T value) {
  return value - Vec<T>{};
}

// Sum of the lanes, in a fixed order: halves folded together.
template <class V, int... I>
TP_INLINE auto fold(V v, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(v, v, I...) + __builtin_shufflevector(v, v, (I + int(sizeof...(I)))...);
}
template <class T, class V>
TP_INLINE T lane_sum(V v) {
  constexpr int n = sizeof(V) / sizeof(T);
  if constexpr (n == 2)
    return v[0] + v[1];
  else
    return lane_sum<T>(fold(v, std::make_integer_sequence<int, n / 2>{}));
}

template <class T>
TP_INLINE Vec<T> root(Vec<T> v) {  // one instruction, since the build says -fno-math-errno
  for (int i = 0; i < kLanes<T>; ++i) v[i] = std::sqrt(v[i]);
  return v;
}

// Which lanes of `a` are larger than those of `b`: as bits where the processor compares into bits, else as lanes of
// ones.
#if defined(__x86_64__) && TP_VECTOR_BYTES == 64
TP_INLINE uint32_t larger_lanes(Vec<float> a, Vec<float> b) {
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ);
}
TP_INLINE uint32_t larger_lanes(Vec<double> a, Vec<double> b) {
  return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_GT_OQ);
}
TP_INLINE uint32_t lane_bits(uint32_t bits) {
  return bits;
}  // as larger_lanes gave them
#else
template <class V>
TP_INLINE auto larger_lanes(V a, V b) {
  return a > b;
}

// What larger_lanes gave as bits, the first lane's the lowest.
template <class V>
TP_INLINE uint32_t lane_bits(V v) {
  constexpr bool single = sizeof(v[0]) == 4;
#if defined(__x86_64__) && TP_VECTOR_BYTES == 32
  if constexpr (single)
    return uint32_t(_mm256_movemask_ps((__m256)v));
  else
    return uint32_t(_mm256_movemask_pd((__m256d)v));
#elif defined(__x86_64__) && TP_VECTOR_BYTES == 16
  if constexpr (single)
    return uint32_t(_mm_movemask_ps((__m128)v));
  else
    return uint32_t(_mm_movemask_pd((__m128d)v));
#else
  uint32_t bits = 0;
  for (int i = 0; i < TP_VECTOR_BYTES / (single ? 4 : 8); ++i) bits |= uint32_t(v[i] < 0) << i;
  return bits;
#endif
}
#endif

TP_INLINE int64_t round_up(int64_t n, int64_t unit) {
  return (n + unit - 1) / unit * unit;
}

// Larger of two, lane by lane: a NaN in `b` is passed over.
template <class T>
TP_INLINE Vec<T> larger(Vec<T> a, Vec<T> b) {
#if defined(__x86_64__) && TP_VECTOR_BYTES == 64
  // The compiler would make two instructions of it. (GCC 12 warns of its own header where that is asked without a
  // mask.)
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm512_maskz_max_ps(0xffff, (__m512)b, (__m512)a);
  else
    return (Vec<T>)_mm512_maskz_max_pd(0xff, (__m512d)b, (__m512d)a);
#else
  return b > a ? b : a;
#endif
}
template <class T>
TP_INLINE Vec<T> magnitude(Vec<T> v) {
  typedef Vec<typename Lane<T>::Int> Bits;
  return (Vec<T>)((Bits)v & ~((Bits)splat(T(-0.0))));
}

// Lanes of `a` and `b` interleaved inside every 16 bytes, `Group` lanes at a time: of their low or their high halves.
template <int Group, bool High, class T, int... I>
TP_INLINE Vec<T> zip(Vec<T> a, Vec<T> b, std::integer_sequence<int, I...>) {
  constexpr int n = sizeof...(I), E = 16 / sizeof(T);
  return __builtin_shufflevector(a, b,
                                 (I / E * E + (I % E / Group / 2 + (High ? E / Group / 2 : 0)) * Group + I % Group +
                                  (I % E / Group % 2 ? n : 0))...);
}

// Every second run of `Step` 16-byte pieces exchanged between `a` and `b`: the first (or second) half of that exchange.
template <int Step, bool Second, class T, int... I>
TP_INLINE Vec<T> exchange(Vec<T> a, Vec<T> b, std::integer_sequence<int, I...>) {
  constexpr int n = sizeof...(I), S = Step * (16 / int(sizeof(T)));
  return __builtin_shufflevector(a, b, (I / S % 2 ? (Second ? I : I - S) + n : (Second ? I + S : I))...);
}

template <int Step, class T>
TP_INLINE void exchange_pieces(Vec<T> (&r)[kLanes<T>]) {
  constexpr int n = kLanes<T>, S = Step * (16 / int(sizeof(T)));
  constexpr auto lanes = std::make_integer_sequence<int, n>{};
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) {
    if (i / S % 2) continue;
    const Vec<T> a = r[i], b = r[i + S];
    r[i] = exchange<Step, false, T>(a, b, lanes);
    r[i + S] = exchange<Step, true, T>(a, b, lanes);
  }
}

// Transpose a square of kLanes x kLanes held in vectors: first inside the 16-byte pieces, then the pieces.
template <class T>
TP_INLINE void transpose(Vec<T> (&r)[kLanes<T>]) {
  constexpr int n = kLanes<T>, E = 16 / sizeof(T);
  constexpr auto lanes = std::make_integer_sequence<int, n>{};
#pragma GCC unroll 8
  for (int q = 0; q < n; q += E) {
    if constexpr (E == 2) {
      const Vec<T> a = r[q], b = r[q + 1];
      r[q] = zip<1, false, T>(a, b, lanes);
      r[q + 1] = zip<1, true, T>(a, b, lanes);
    } else {
      const Vec<T> a = zip<1, false, T>(r[q], r[q + 1], lanes), b = zip<1, true, T>(r[q], r[q + 1], lanes);
      const Vec<T> c = zip<1, false, T>(r[q + 2], r[q + 3], lanes), d = zip<1, true, T>(r[q + 2], r[q + 3], lanes);
      r[q] = zip<2, false, T>(a, c, lanes);
      r[q + 1] = zip<2, true, T>(a, c, lanes);
      r[q + 2] = zip<2, false, T>(b, d, lanes);
      r[q + 3] = zip<2, true, T>(b, d, lanes);
    }
  }
  if constexpr (n / E >= 2) exchange_pieces<1, T>(r);
  if constexpr (n / E >= 4) exchange_pieces<2, T>(r);
}

// The same from memory to memory: rows of kLanes, so far apart.
template <class T>
TP_INLINE void transpose_square(const T* from, int64_t from_stride, T* to, int64_t to_stride) {
  Vec<T> r[kLanes<T>];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<T>; ++i) r[i] = load(from + i * from_stride);
  transpose<T>(r);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<T>; ++i) store(to + i * to_stride, r[i]);
}

// Memory aligned to a cache line, not initialised, freed at the end of the scope.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) {
    void* p = nullptr;
    const size_t bytes = static_cast<size_t>(count > 0 ? count : 1) * sizeof(T) + 64;
    if (posix_memalign(&p, 64, bytes))
      throw std::runtime_error("tokenpool_ext: can't allocate memory: you tried to allocate " + std::to_string(bytes) +
                               " bytes");
    data_ = static_cast<T*>(p);
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator T*() const { return data_; }

 private:
  T* data_;
};

// Run f(begin, end) over [0, count): on the thread pool, or here.
template <class F>
inline void split(ParallelFor parallel_for, bool parallel, int64_t count, const F& f) {
  if (!parallel || count <= 1) {
    if (count > 0) f(int64_t(0), count);
    return;
  }
  parallel_for(
      count, [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

// f(i) for every i below count, handed to the threads one by one: they need not take equally long, nor are all cores
// equally fast.
template <class F>
inline void hand_out(ParallelFor parallel_for, int64_t threads, int64_t count, const F& f) {
  std::atomic<int64_t> next{0};
  split(parallel_for, threads > 1, std::min(threads, count), [&](int64_t, int64_t) {
    for (int64_t i; (i = next++) < count;) f(i);
  });
}

}  // namespace TP_ISA
}  // namespace tokenpool
