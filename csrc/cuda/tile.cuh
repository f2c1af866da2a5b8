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

__device__ inline int tile_row(int mi, int e) { return 16 * mi + lane_index() / 4 + 8 * (e / 2); }
__device__ inline int tile_column(int ni, int e) { return 8 * ni + 2 * (lane_index() % 4) + e % 2; }

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
  asm(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __nv_bfloat16) {
  asm(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

__device__ inline void clear(TileAccumulator& acc) {
#pragma unroll
  for (int mi = 0; mi < 2; ++mi)
#pragma unroll
    for (int ni = 0; ni < 4; ++ni)
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[mi][ni][e] = 0.0f;
}

// acc += a b^T over `chunk` features. a and b are 32 staged rows each, `stride` elements apart in shared memory.
template <typename T>
__device__ inline void tile_product(TileAccumulator& acc, const T* a, const T* b, int stride, int chunk) {
  const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll 1
  for (int k = 0; k < chunk; k += 16) {
    uint32_t fa[2][4], fb[4][2];
#pragma unroll
    for (int mi = 0; mi < 2; ++mi)
#pragma unroll
      for (int e = 0; e < 4; ++e)  // registers: rows g, g+8, g, g+8; features 2t, 2t, 2t+8, 2t+8
        fa[mi][e] = *reinterpret_cast<const uint32_t*>(a + (16 * mi + g + 8 * (e % 2)) * stride + k + 2 * t + 8 * (e / 2));
#pragma unroll
    for (int ni = 0; ni < 4; ++ni)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        fb[ni][e] = *reinterpret_cast<const uint32_t*>(b + (8 * ni + g) * stride + k + 2 * t + 8 * e);
#pragma unroll
    for (int mi = 0; mi < 2; ++mi)
#pragma unroll
      for (int ni = 0; ni < 4; ++ni) mma_16x8x16(acc[mi][ni], fa[mi], fb[ni], T{});
  }
}

template <>
__device__ inline void tile_product<float>(TileAccumulator& acc, const float* a, const float* b, int stride, int chunk) {
#pragma unroll 2
  for (int k = 0; k < chunk; ++k) {
    float fa[2][2], fb[4][2];
#pragma unroll
    for (int mi = 0; mi < 2; ++mi)
#pragma unroll
      for (int h = 0; h < 2; ++h) fa[mi][h] = a[tile_row(mi, 2 * h) * stride + k];
#pragma unroll
    for (int ni = 0; ni < 4; ++ni)
#pragma unroll
      for (int e = 0; e < 2; ++e) fb[ni][e] = b[tile_column(ni, e) * stride + k];
#pragma unroll
    for (int mi = 0; mi < 2; ++mi)
#pragma unroll
      for (int ni = 0; ni < 4; ++ni)
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[mi][ni][e] = fmaf(fa[mi][e / 2], fb[ni][e % 2], acc[mi][ni][e]);
  }
}

// Copies features [k0, k0 + chunk) of tokens [first, first + rows) to shared memory, as x * scale - mean (mean may be
// null). Rows and features beyond the image become 0. The block's threads share the work; the caller synchronises.
template <typename T>
__device__ inline void stage_rows(T* dst, const Image<T>& image, int first, int rows, int tokens, int k0, int chunk,
                                  int features, float scale, const float* mean) {
  constexpr int kVector = 16 / sizeof(T);
  const int stride = stage_stride(TypeTraits<T>::kType, chunk);
  struct alignas(16) Vector {
    T value[kVector];
  };
  const int vectors = chunk / kVector;
#pragma unroll 1
  for (int p = threadIdx.x; p < rows * vectors; p += blockDim.x) {
    const int row = p / vectors, column = p % vectors * kVector;
    const int token = first + row, feature = k0 + column;
    Vector v;
    if (token < tokens && image.vectorised && feature + kVector <= features) {
      v = *reinterpret_cast<const Vector*>(image.data + token * image.stride_token + feature);
    } else {
#pragma unroll
      for (int e = 0; e < kVector; ++e)
        v.value[e] = token < tokens && feature + e < features ? image.raw(token, feature + e) : from_float<T>(0.0f);
    }
    if (token < tokens && (scale != 1.0f || mean != nullptr)) {
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        const float m = mean != nullptr && feature + e < features ? mean[feature + e] : 0.0f;
        v.value[e] = from_float<T>(to_float(v.value[e]) * scale - m);
      }
    }
    *reinterpret_cast<Vector*>(dst + row * stride + column) = v;
  }
}

}  // namespace cuda
}  // namespace tokenpool
