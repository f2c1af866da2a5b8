// A whole clustering in one launch (path "resident"): one block of 256 threads per image builds the lower triangle of
// the Gram matrix in shared memory, runs all iterations on it, and reads the tokens once more for the means.
//
// Shared memory: packed triangle (2 N (N + 1) bytes) + weights + the larger of the staged tokens and the iteration
// state. The triangle is half of G, so two images fit an SM of an H100 up to N = 196 or so, and one up to N = 300:
// while one block multiplies, the other iterates. Global bytes: tokens read once for each pass of 16 warp tiles
// (from L2 after the first), once for the means, and the outputs.
#pragma once

#include "cluster.cuh"
#include "measure.cuh"
#include "sums.cuh"
#include "tile.cuh"

namespace tokenpool {
namespace cuda {

constexpr int kResidentThreads = 256;
constexpr int kTilesPerWarp = 2;

// Staged float32 tokens are centred in place: about the mean of each feature, subtracted everywhere. chunk is 32.
__device__ inline void center_chunk(float* staged, int stride, const float* weight, int tokens, const ImageStats& stats,
                                    FeaturePart* parts) {
  const int lane = lane_index();
  const float mean = mean_of_tokens(
      tokens, stats.counting, parts, [&](int i) { return weight[i] > stats.light; },
      [&](int i) { return staged[i * stride + lane]; });
#pragma unroll 1
  for (int i = warp_index(); i < tokens; i += kResidentThreads / kWarp) staged[i * stride + lane] -= mean;
  __syncthreads();
}

// The lower triangle of (scale X) (scale X)^T, centred for float32, into `gram`. Ends with a barrier.
template <typename T>
__device__ inline void build_gram(float* gram, const Image<T>& image, T* staged, const float* weight, int tokens,
                                  int features, int chunk, const ImageStats& stats) {
  constexpr DType kType = TypeTraits<T>::kType;
  const int stride = stage_stride(kType, chunk);
  const int blocks = (tokens + kTile - 1) / kTile, padded = blocks * kTile;
  const int tiles = blocks * (blocks + 1) / 2;
  FeaturePart* parts = reinterpret_cast<FeaturePart*>(staged + padded * stride);
  for (int first = 0; first < tiles; first += kTilesPerWarp * (kResidentThreads / kWarp)) {
    TileAccumulator acc[kTilesPerWarp];
    int row[kTilesPerWarp], column[kTilesPerWarp];
    bool active[kTilesPerWarp];
#pragma unroll
    for (int h = 0; h < kTilesPerWarp; ++h) {
      const int tile = first + kTilesPerWarp * warp_index() + h;
      active[h] = tile < tiles;
      triangle_position(active[h] ? tile : 0, &row[h], &column[h]);
      clear(acc[h]);
    }
    for (int k0 = 0; k0 < features; k0 += chunk) {
      if (stats.scale == 1.0f)
        copy_rows(staged, image, 0, padded, tokens, k0, chunk, features);
      else
        stage_rows<1>(staged, image, 0, padded, tokens, k0, chunk, features, stats.scale, nullptr);
      __syncthreads();
      if constexpr (kType == DType::kFloat32)
        center_chunk(reinterpret_cast<float*>(staged), stride, weight, tokens, stats, parts);
#pragma unroll
      for (int h = 0; h < kTilesPerWarp; ++h)
        if (active[h])
          tile_product(acc[h], staged + row[h] * kTile * stride, staged + column[h] * kTile * stride, stride, chunk);
      __syncthreads();
    }
#pragma unroll
    for (int h = 0; h < kTilesPerWarp; ++h)
      if (active[h]) store_tile(gram, acc[h], row[h] * kTile, column[h] * kTile, tokens);
  }
  __syncthreads();
}

template <typename T>
__global__ void __launch_bounds__(kResidentThreads, 2) resident_kernel(ResidentArgs a) {
  TOKENPOOL_DYNAMIC_SHARED(memory);
  __shared__ BlockScratch scratch;
  __shared__ ImageStats stats;  // here, because the products need the registers
  const int n = a.run.shape.tokens, k = a.run.shape.clusters, features = a.run.shape.features;
  const PackedGram gram = {reinterpret_cast<float*>(memory)};
  float* weight = gram.g + packed_words(n);
  void* rest = weight + round_up(n, 4);
  ClusterState s(weight, rest, n, k);
  for (int64_t b = blockIdx.x; b < a.run.shape.batch; b += gridDim.x) {
    const Image<T> image(a.x, b);
    ImageStats measured = measure_image(a.run, a.counts, b, weight, scratch);
    if (threadIdx.x == 0) stats = measured;
    for (bool again = true; again;) {
      build_gram(gram.g, image, static_cast<T*>(rest), weight, n, features, a.chunk, measured);
      again = a.use_scale && measured.scale == 1.0f && must_scale(gram, image, weight, n, features, measured, scratch);
    }
    if (threadIdx.x == 0) {
      stats.scale = measured.scale;
      stats.inv_scale = measured.inv_scale;
    }
    __syncthreads();
    const ClusterProblem p = problem_of(a.run, b, stats);
    while (!cluster_from_gram<1, false>(gram, s, p, scratch))
      fill_with_distances(gram, image, n, features, stats.scale);
    write_assignment(a.run, b, s);

    const float* weights = a.run.weights == nullptr ? nullptr : a.run.weights + b * n;
    const MeansMode mode = p.with_medoids ? MeansMode::kMedoid : MeansMode::kMean;
    for (int j = warp_index(); j < k; j += warps_in_block()) {
      const bool used = j < p.clusters;
      const int row = used ? s.rank[j] : j;
      T* out = static_cast<T*>(a.centers) + (b * k + row) * features;
      float error = 0.0f, mass = 0.0f;
      int chosen = -1;
      if (used) {
        const int* members = s.order + s.start[j];
        const Shares shares(weights, members, s.start[j + 1] - s.start[j]);
        mass = shares.mass;
        float* apart = p.with_medoids ? nullptr : s.cost;
        error = emit_center(image, members, shares, mode, p.with_medoids ? s.medoid[j] : 0, &stats, weights, features,
                            apart, out);
        if (apart != nullptr) chosen = nearest_member(members, shares, features, apart);
      } else {
#pragma unroll 1
        for (int f = lane_index(); f < features; f += kWarp) out[f] = from_float<T>(0.0f);
      }
      if (lane_index() == 0) {
        a.mass[b * k + row] = mass;
        if (a.nearest != nullptr) a.nearest[b * k + row] = chosen;
        if (a.run.medoids != nullptr) a.run.medoids[b * k + row] = used ? s.medoid[j] : -1;
        s.part[row] = error;
      }
    }
    __syncthreads();
    if (warp_index() == 0) {
      const float sum = sum_by_warp(k, [&](int j) { return s.part[j]; });
      if (lane_index() == 0) a.inertia[b] = unscale_inertia(sum, stats.inv_scale, stats.inv_weight_scale);
    }
    __syncthreads();
  }
}

}  // namespace cuda
}  // namespace tokenpool
