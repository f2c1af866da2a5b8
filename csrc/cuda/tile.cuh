// Products of token rows, 32 x 32 a warp: tensor cores (mma.m16n8k16, float32 accumulators) for half types and
// multiply-adds for float32. Each product is summed over the features in ascending order in both, so it depends
// neither on its place in the tile nor on the tile's place in the matrix.
//
// A warp's accumulators acc[mi][ni][e] follow the mma's layout. With g = lane / 4 and t = lane % 4:
//   row = 16 mi + g + 8 (e / 2),   column = 8 ni + 2 t + e % 2.
#pragma once

#include "common.cuh"

namespace tokenpool {
namespace cuda {

typedef float TileAccumulator[2][4][4];

__device__ inline int tile_row(int mi, int e, int lane = lane_index()) {
  return 16 * mi + lane / 4 + 8 * (e / 2);
}
__device__ inline int tile_column(int ni, int e, int lane = lane_index()) {
  return 8 * ni + 2 * (lane % 4) + e % 2;
}

// Row and column of element t of a lower triangle counted by rows.
__device__ inline void triangle_position(int t, int* row, int* column) {
  int r = 0;
#pragma unroll 1
  while (t > r) t -= ++r;
  *row = r;
  *column = t;
}

#ifndef TOKENPOOL_CUDA_SIM
// d (16 x 8) += a (16 x 16, row-major) * b (16 x 8, column-major), for one warp.
__device__ inline void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __nv_bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// threadIdx.x, read anew: what is computed from it is not kept in registers across a loop that computes it again.
__device__ inline unsigned thread_index_anew() {
  unsigned thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// Shared memory as instructions name it, in bytes.
typedef uint32_t SharedAddress;
__device__ inline SharedAddress shared_address(const void* p) {
  return static_cast<SharedAddress>(__cvta_generic_to_shared(p));
}

// Four 8 x 8 matrices from shared memory for one warp: lane l points at row l % 8 of matrix l / 8 (16 bytes, aligned),
// and gets of each matrix the elements 2 (l % 4) and the next of row l / 4, which is what mma wants.
__device__ inline void load_matrices(uint32_t (&d)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(row)
               : "memory");
}

// 16 bytes from global to shared memory, past the registers: all of a thread's copies wait for memory together.
__device__ inline void copy_async(SharedAddress shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}
__device__ inline void copy_async(void* shared, const void* global) {
  copy_async(shared_address(shared), global);
}

__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}
#endif

template <int kRows, int kColumns>
__device__ inline void clear(float (&acc)[kRows][kColumns][4]) {
#pragma unroll
  for (int mi = 0; mi < kRows; ++mi)
#pragma unroll
    for (int ni = 0; ni < kColumns; ++ni)
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[mi][ni][e] = 0.0f;
}

// Where this lane points for load_matrices, so that register e holds what mma wants: of 16 rows on the left (rows g, g
// + 8, g, g + 8; features 2t, 2t, 2t + 8, 2t + 8), or of 16 rows on the right, two steps (0, 1 of rows 0 to 7; 2, 3 of
// the others).
template <typename T>
__device__ inline SharedAddress left_matrices(const T* rows, int stride) {
  const unsigned lane = thread_index_anew() % kWarp;
  return shared_address(rows + lane % 16 * stride + lane / 16 * 8);
}
template <typename T>
__device__ inline SharedAddress right_matrices(const T* rows, int stride) {
  const unsigned lane = thread_index_anew() % kWarp;
  return shared_address(rows + (lane / 16 * 8 + lane % 8) * stride + lane / 8 % 2 * 8);
}

// acc += a b^T over 16 features: fragments of a, and staged rows of b at right_matrices, `row_bytes` apart.
template <typename T, int kRows, int kColumns>
__device__ inline void multiply_fragments(float (&acc)[kRows][kColumns][4], const uint32_t (&a)[kRows][4],
                                          SharedAddress right, int row_bytes) {
  static_assert(kColumns % 2 == 0, "the right side is loaded by 16 rows");
#pragma unroll
  for (int ni = 0; ni < kColumns; ni += 2) {
    uint32_t b[4];
    load_matrices(b, right + 8 * ni * row_bytes);
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      const uint32_t fb[2] = {b[2 * u], b[2 * u + 1]};
#pragma unroll
      for (int mi = 0; mi < kRows; ++mi) mma_16x8x16(acc[mi][ni + u], a[mi], fb, T{});
    }
  }
}

// acc += a b^T over `chunk` features, a multiple of 32. a and b are 16 kRows and 8 kColumns staged rows, `stride`
// elements apart in shared memory (a TileAccumulator is 2 x 4). An element's sum is the same whatever the tile's size.
template <typename T, int kRows, int kColumns>
__device__ inline void tile_product(float (&acc)[kRows][kColumns][4], const T* a, const T* b, int stride, int chunk) {
  constexpr int kSteps = 2, kStep = 16 * sizeof(T);
  const int row_bytes = stride * sizeof(T);
  SharedAddress left = left_matrices(a, stride), right = right_matrices(b, stride);
  const SharedAddress end = left + chunk / 16 * kStep;
#pragma unroll 1
  for (; left != end; left += kSteps * kStep, right += kSteps * kStep)
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      uint32_t fa[kRows][4];
#pragma unroll
      for (int mi = 0; mi < kRows; ++mi) load_matrices(fa[mi], left + k * kStep + 16 * mi * row_bytes);
      multiply_fragments<T>(acc, fa, right + k * kStep, row_bytes);
    }
}

template <int kRows, int kColumns>
__device__ inline void tile_product(float (&acc)[kRows][kColumns][4], const float* a, int a_stride, const float* b,
                                    int stride, int chunk) {
  const unsigned lane = thread_index_anew() % kWarp;
  a += lane / 4 * a_stride;
  b += 2 * (lane % 4) * stride;
#pragma unroll 2
  for (int k = 0; k < chunk; ++k) {
    float fa[kRows][2], fb[kColumns][2];
#pragma unroll
    for (int mi = 0; mi < kRows; ++mi)
#pragma unroll
      for (int h = 0; h < 2; ++h) fa[mi][h] = a[(16 * mi + 8 * h) * a_stride + k];
#pragma unroll
    for (int ni = 0; ni < kColumns; ++ni)
#pragma unroll
      for (int e = 0; e < 2; ++e) fb[ni][e] = b[(8 * ni + e) * stride + k];
#pragma unroll
    for (int mi = 0; mi < kRows; ++mi)
#pragma unroll
      for (int ni = 0; ni < kColumns; ++ni)
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[mi][ni][e] = fmaf(fa[mi][e / 2], fb[ni][e % 2], acc[mi][ni][e]);
  }
}

template <int kRows, int kColumns>
__device__ inline void tile_product(float (&acc)[kRows][kColumns][4], const float* a, const float* b, int stride,
                                    int chunk) {
  tile_product(acc, a, stride, b, stride, chunk);
}

// 16 bytes of one row.
template <typename T>
struct alignas(16) RowVector {
  static constexpr int kCount = 16 / sizeof(T);
  T value[kCount];
};

// Features feature .. feature + kCount - 1 of a token; 0 beyond the image.
template <typename T>
__device__ inline RowVector<T> load_vector(const Image<T>& image, int token, int tokens, int feature, int features) {
  constexpr int kCount = RowVector<T>::kCount;
  if (token < tokens && image.vectorised && feature + kCount <= features)
    return *reinterpret_cast<const RowVector<T>*>(image.data + token * image.stride_token + feature);
  RowVector<T> v;
#pragma unroll
  for (int e = 0; e < kCount; ++e)
    v.value[e] = token < tokens && feature + e < features ? image.raw(token, feature + e) : from_float<T>(0.0f);
  return v;
}

// Copies features [k0, k0 + chunk) of tokens [first, first + rows) to shared memory, as x * scale - mean (mean may be
// null). Rows and features beyond the image become 0. The block's threads share the work; the caller synchronises.
// chunk is a power of two. kInFlight: loads of a thread that wait for memory together.
template <int kInFlight = 2, typename T>
__device__ inline void stage_rows(T* dst, const Image<T>& image, int first, int rows, int tokens, int k0, int chunk,
                                  int features, float scale, const float* mean) {
  constexpr int kVector = RowVector<T>::kCount;
  const int stride = stage_stride(TypeTraits<T>::kType, chunk);
  const int last = chunk / kVector - 1, shift = __popc(last), total = rows << shift;
#pragma unroll 1
  for (int p0 = thread_index_anew(); p0 < total; p0 += kInFlight * blockDim.x) {
    RowVector<T> v[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const int p = p0 + u * blockDim.x;
      if (p < total) v[u] = load_vector(image, first + (p >> shift), tokens, k0 + (p & last) * kVector, features);
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const int p = p0 + u * blockDim.x;
      if (p >= total) break;
      const int row = p >> shift, column = (p & last) * kVector;
      if (first + row < tokens && (scale != 1.0f || mean != nullptr)) {
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
          const float m = mean != nullptr && k0 + column + e < features ? mean[k0 + column + e] : 0.0f;
          v[u].value[e] = from_float<T>(to_float(v[u].value[e]) * scale - m);
        }
      }
      *reinterpret_cast<RowVector<T>*>(dst + row * stride + column) = v[u];
    }
  }
}

// Begins to copy the same rows as they are, `stride` elements apart: a thread waits for its copies later, all at once.
// The block has a power of two threads, at least as many as 16-byte vectors in a row of the chunk: a thread keeps its
// column.
template <typename T>
__device__ inline void begin_rows(T* dst, int stride, const Image<T>& image, int first, int rows, int tokens, int k0,
                                  int chunk, int features) {
  constexpr int kVector = RowVector<T>::kCount;
  const int last = chunk / kVector - 1, shift = __popc(last), step = blockDim.x >> shift;
  const int thread = static_cast<int>(thread_index_anew());
  const int column = (thread & last) * kVector, present = min(rows, tokens - first);
  int row = thread >> shift;
  if (image.vectorised && k0 + column + kVector <= features) {
    SharedAddress to = shared_address(dst + row * stride + column);
    const T* from = image.data + (first + row) * image.stride_token + k0 + column;
#pragma unroll 1
    for (; row < present; row += step, to += step * stride * sizeof(T), from += step * image.stride_token)
      copy_async(to, from);
  }
#pragma unroll 1
  for (; row < rows; row += step)
    *reinterpret_cast<RowVector<T>*>(dst + row * stride + column) =
        row < present && k0 + column < features ? load_vector(image, first + row, tokens, k0 + column, features)
                                                : RowVector<T>{};
}

// Makes of them, once they are there, x * scale - mean: each thread what it copied itself, so that no barrier is
// needed.
template <typename T>
__device__ inline void scale_rows(T* dst, int stride, int first, int rows, int tokens, int k0, int chunk, int features,
                                  float scale, const float* mean) {
  constexpr int kVector = RowVector<T>::kCount;
  const int last = chunk / kVector - 1, shift = __popc(last);
#pragma unroll 1
  for (int p = threadIdx.x; p < rows << shift; p += blockDim.x) {
    if (first + (p >> shift) >= tokens) break;  // rows beyond the image stay 0
    const int column = (p & last) * kVector;
    RowVector<T>& v = *reinterpret_cast<RowVector<T>*>(dst + (p >> shift) * stride + column);
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      const float m = mean != nullptr && k0 + column + e < features ? mean[k0 + column + e] : 0.0f;
      v.value[e] = from_float<T>(to_float(v.value[e]) * scale - m);
    }
  }
}

// The same as stage_rows for scale 1 and no mean: nothing to compute on the way, so that a thread waits for memory
// once.
template <typename T>
__device__ inline void copy_rows(T* dst, const Image<T>& image, int first, int rows, int tokens, int k0, int chunk,
                                 int features) {
  begin_rows(dst, stage_stride(TypeTraits<T>::kType, chunk), image, first, rows, tokens, k0, chunk, features);
  wait_for_copies();
}

}  // namespace cuda
}  // namespace tokenpool
