// Vectors of TP_VECTOR_BYTES through the compiler's vector extensions, so one source serves every instruction set.

#define TP_INLINE inline __attribute__((always_inline))

template <class T>
struct Lane;
template <>
struct Lane<float> { using Int = int32_t; };
template <>
struct Lane<double> { using Int = int64_t; };

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
TP_INLINE Vec<T> load(const T* p) { return *reinterpret_cast<const typename VecOf<T>::Loose*>(p); }
template <class T>
TP_INLINE void store(T* p, Vec<T> v) { *reinterpret_cast<typename VecOf<T>::Loose*>(p) = v; }
template <class T>
TP_INLINE Vec<T> splat(T value) { return value - Vec<T>{}; }

// Sum of the lanes, in a fixed order: halves folded together.
template <class T>
TP_INLINE T lane_sum(Vec<T> v) {
  T a[kLanes<T>];
  store(a, v);
  for (int width = kLanes<T> / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) a[i] += a[i + width];
  return a[0];
}

TP_INLINE int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Interleave the low (or high) halves of two vectors: a0 b0 a1 b1 ...
template <bool High, class T, int... I>
TP_INLINE Vec<T> zip(Vec<T> a, Vec<T> b, std::integer_sequence<int, I...>) {
  constexpr int half = sizeof...(I) / 2;
  return __builtin_shufflevector(a, b, ((I / 2) + (High ? half : 0) + (I % 2 ? 2 * half : 0))...);
}

// Transpose a square of kLanes x kLanes held in vectors: log2 rounds of a perfect shuffle of the rows.
template <class T>
TP_INLINE void transpose(Vec<T> (&r)[kLanes<T>]) {
  constexpr int n = kLanes<T>;
  constexpr auto lanes = std::make_integer_sequence<int, n>{};
#pragma GCC unroll 8
  for (int round = 1; round < n; round *= 2) {
    Vec<T> s[n];
#pragma GCC unroll 16
    for (int i = 0; i < n / 2; ++i) {
      s[2 * i] = zip<false, T>(r[i], r[i + n / 2], lanes);
      s[2 * i + 1] = zip<true, T>(r[i], r[i + n / 2], lanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) r[i] = s[i];
  }
}

// Memory aligned to a cache line, not initialised, freed at the end of the scope.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) {
    void* p = nullptr;
    if (posix_memalign(&p, 64, static_cast<size_t>(count > 0 ? count : 1) * sizeof(T) + 64)) throw std::bad_alloc();
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
