// G = X X^T for a batch of images, float32, both triangles written.
//
// Grid: one block per (image, 128 x 128 tile of the lower triangle). Eight warps, 4 x 2, each a 32 x 64 part of the
// tile; a part above the diagonal or beyond the image is left out, and every product is written to both its places.
// Tokens are staged in shared memory `stage_chunk` features at a time. Bytes: every tile reads 256 token rows (from L2
// after the first touch) and writes 2 * 64 KB.
#pragma once

#include "measure.cuh"
#include "tile.cuh"

namespace tokenpool {
namespace cuda {

constexpr int kWarpColumns = 64;

template <typename T>
__global__ void __launch_bounds__(256, 2) gram_kernel(GramArgs a) {
  TOKENPOOL_DYNAMIC_SHARED(memory);
  constexpr DType kType = TypeTraits<T>::kType;
  constexpr int kParts = kType == DType::kFloat32 ? 2 : 1;  // multiplied one after the other, to spare registers
  constexpr int kPart = kWarpColumns / kParts;
  const int chunk = stage_chunk(kType), stride = stage_stride(kType, chunk);
  T* rows = reinterpret_cast<T*>(memory);
  T* columns = rows + kBlockTile * stride;
  const int n = a.shape.tokens, features = a.shape.features;
  const int panels = (n + kBlockTile - 1) / kBlockTile;
  const int tiles = panels * (panels + 1) / 2;
  const int64_t work_items = a.shape.batch * tiles;
  for (int64_t work = blockIdx.x; work < work_items; work += gridDim.x) {
    const int64_t b = work / tiles;
    int panel_row, panel_column;
    triangle_position(static_cast<int>(work % tiles), &panel_row, &panel_column);
    const int row0 = panel_row * kBlockTile, column0 = panel_column * kBlockTile;
    const Image<T> image(a.x, b);
    const float scale = a.pass == GramPass::kUnscaled ? 1.0f : a.stats[b].scale;
    if (a.pass == GramPass::kScaledOnly && scale == 1.0f) continue;
    const float* mean = a.mean == nullptr ? nullptr : a.mean + b * features;
    const int warp_row = warp_index() / 2 * kTile, warp_column = warp_index() % 2 * kWarpColumns;
    const int first_row = row0 + warp_row, first_column = column0 + warp_column;
    const bool multiplies = first_row < n && first_column < n && first_column < first_row + kTile;
    float acc[kParts][kTile / 16][kPart / 8][4];
#pragma unroll
    for (int h = 0; h < kParts; ++h) clear(acc[h]);
    const T* other = row0 == column0 ? rows : columns;
    for (int k0 = 0; k0 < features; k0 += chunk) {
      if (scale == 1.0f && mean == nullptr) {
        begin_rows(rows, stride, image, row0, kBlockTile, n, k0, chunk, features);
        if (row0 != column0) begin_rows(columns, stride, image, column0, kBlockTile, n, k0, chunk, features);
        wait_for_copies();
      } else {
        stage_rows(rows, image, row0, kBlockTile, n, k0, chunk, features, scale, mean);
        if (row0 != column0) stage_rows(columns, image, column0, kBlockTile, n, k0, chunk, features, scale, mean);
      }
      __syncthreads();
      if (multiplies)
#pragma unroll
        for (int h = 0; h < kParts; ++h)
          tile_product(acc[h], rows + warp_row * stride, other + (warp_column + h * kPart) * stride, stride, chunk);
      __syncthreads();
    }
    if (!multiplies) continue;
    float* g = a.gram + b * n * a.ld;
#pragma unroll
    for (int h = 0; h < kParts; ++h)
#pragma unroll
      for (int mi = 0; mi < kTile / 16; ++mi)
#pragma unroll
        for (int ni = 0; ni < kPart / 8; ++ni)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int i = first_row + tile_row(mi, e), l = first_column + h * kPart + tile_column(ni, e);
            if (i < n && l <= i) g[i * a.ld + l] = g[l * a.ld + i] = acc[h][mi][ni][e];
          }
  }
}

// One block per image: what is to be known about it, from the diagonal of its products where that says enough.
template <typename T>
__global__ void __launch_bounds__(256, 2) measure_kernel(MeasureArgs a) {
  TOKENPOOL_DYNAMIC_SHARED(memory);
  __shared__ BlockScratch scratch;
  const int n = a.run.shape.tokens;
  float* weight = reinterpret_cast<float*>(memory);
  for (int64_t b = blockIdx.x; b < a.run.shape.batch; b += gridDim.x) {
    const FullGram gram = {a.gram + b * n * a.ld, static_cast<int>(a.ld)};
    ImageStats stats = measure_image(a.run, a.counts, b, weight, scratch);
    must_scale(gram, Image<T>(a.x, b), weight, n, a.run.shape.features, stats, scratch);
    if (threadIdx.x == 0) a.stats[b] = stats;
    __syncthreads();
  }
}

}  // namespace cuda
}  // namespace tokenpool
