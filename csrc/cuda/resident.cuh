// A whole clustering in one launch (path "resident"): one block of 256 threads per image builds the lower triangle of
// the Gram matrix in shared memory, runs all iterations on it, and reads the tokens once more for the means.
//
// Shared memory: packed triangle (2 N (N + 1) bytes) + weights + the larger of the staged tokens and the iteration
// state. The triangle is half of G, so two images fit an SM of an H100 up to N = 196 or so, and one up to N = 300:
// while one block multiplies, the other iterates. Global bytes: tokens read once for each pass of 16 warp tiles
// (from L2 after the first), once for the means, and the outputs.
//
// The product is formed without scaling first. Only if its diagonal leaves the safe range [2^-40, 2^80] is it redone
// with the image scaled by a power of two; scaling by powers of two changes no rounding, so the rule is invisible.
#pragma once

#include "cluster.cuh"
#include "sums.cuh"
#include "tile.cuh"

namespace tokenpool {
namespace cuda {

constexpr int kResidentThreads = 256;
constexpr int kTilesPerWarp = 2;

// Staged float32 tokens are centred in place: mean over the valid tokens of each feature, subtracted everywhere.
// sums: 8 x 32 words. chunk is 32.
__device__ inline void center_chunk(float* staged, int stride, const float* weight, int tokens, int valid, float* sums) {
  const int lane = lane_index(), warp = warp_index();
  float sum = 0.0f;
#pragma unroll 1
  for (int i = warp; i < tokens; i += kResidentThreads / kWarp)
    if (weight[i] >= 0.0f) sum += staged[i * stride + lane];
  sums[warp * kWarp + lane] = sum;
  __syncthreads();
  sum = 0.0f;
#pragma unroll 1
  for (int w = 0; w < kResidentThreads / kWarp; ++w) sum += sums[w * kWarp + lane];
  const float mean = sum / static_cast<float>(max(1, valid));
#pragma unroll 1
  for (int i = warp; i < tokens; i += kResidentThreads / kWarp) staged[i * stride + lane] -= mean;
  __syncthreads();
}

// The lower triangle of (scale X) (scale X)^T, centred for float32, into `gram`. Ends with a barrier.
template <typename T>
__device__ inline void build_gram(float* gram, const Image<T>& image, T* staged, const float* weight, int tokens,
                                  int features, int chunk, int valid, float scale) {
  constexpr DType kType = TypeTraits<T>::kType;
  const int stride = stage_stride(kType, chunk);
  const int blocks = (tokens + kTile - 1) / kTile, padded = blocks * kTile;
  const int tiles = blocks * (blocks + 1) / 2;
  float* sums = reinterpret_cast<float*>(staged + padded * stride);
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
      stage_rows(staged, image, 0, padded, tokens, k0, chunk, features, scale, nullptr);
      __syncthreads();
      if constexpr (kType == DType::kFloat32)
        center_chunk(reinterpret_cast<float*>(staged), stride, weight, tokens, valid, sums);
#pragma unroll
      for (int h = 0; h < kTilesPerWarp; ++h)
        if (active[h])
          tile_product(acc[h], staged + row[h] * kTile * stride, staged + column[h] * kTile * stride, stride, chunk);
      __syncthreads();
    }
#pragma unroll
    for (int h = 0; h < kTilesPerWarp; ++h)
#pragma unroll
      for (int mi = 0; mi < 2; ++mi)
#pragma unroll
        for (int ni = 0; ni < 4; ++ni)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int i = row[h] * kTile + tile_row(mi, e), l = column[h] * kTile + tile_column(ni, e);
            if (active[h] && i < tokens && l <= i) gram[PackedGram::offset(i) + l] = acc[h][mi][ni][e];
          }
  }
  __syncthreads();
}

template <typename T>
__global__ void __launch_bounds__(kResidentThreads, 2) resident_kernel(ResidentArgs a) {
  TOKENPOOL_DYNAMIC_SHARED(memory);
  __shared__ BlockScratch scratch;
  const int n = a.shape.tokens, k = a.shape.clusters, features = a.shape.features;
  float* gram = reinterpret_cast<float*>(memory);
  float* weight = gram + packed_words(n);
  void* rest = weight + round_up(n, 4);
  ClusterState s(weight, rest, n, k);
  for (int64_t b = blockIdx.x; b < a.shape.batch; b += gridDim.x) {
    const Image<T> image(a.x, b);
    float heaviest = 0.0f;
    int valid = 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < n; i += blockDim.x)
      if (is_valid(a.mask, b * n + i)) {
        heaviest = fmaxf(heaviest, a.weights == nullptr ? 1.0f : a.weights[b * n + i]);
        ++valid;
      }
    ImageStats stats;
    heaviest = block_max(heaviest, scratch);
    stats.valid = block_sum(valid, scratch);
    power_of_two_scale(heaviest, &stats.weight_scale, &stats.inv_weight_scale);
    stats.scale = stats.inv_scale = 1.0f;
    stats.clusters = min(k, stats.valid);
    if (a.counts != nullptr) stats.clusters = static_cast<int>(max(int64_t{0}, min(a.counts[b], int64_t{stats.clusters})));
#pragma unroll 1
    for (int i = threadIdx.x; i < n; i += blockDim.x)
      weight[i] = is_valid(a.mask, b * n + i) ? normal_weight(a.weights, b * n + i, stats.weight_scale) : -1.0f;
    __syncthreads();

    T* staged = static_cast<T*>(rest);
    for (bool again = true; again;) {
      build_gram(gram, image, staged, weight, n, features, a.chunk, stats.valid, stats.scale);
      again = false;
      if (!a.use_scale || stats.scale != 1.0f) break;
      float largest = 0.0f;
#pragma unroll 1
      for (int i = threadIdx.x; i < n; i += blockDim.x) {
        const float square = gram[PackedGram::offset(i) + i];
        if (weight[i] >= 0.0f) largest = fmaxf(largest, square == square ? square : infinity());
      }
      largest = block_max(largest, scratch);
      if (largest >= 0x1p-40f && largest <= 0x1p80f) break;
      float absolute = 0.0f;
#pragma unroll 1
      for (int i = warp_index(); i < n; i += warps_in_block())
#pragma unroll 1
        for (int f = lane_index(); f < features && weight[i] >= 0.0f; f += kWarp)
          absolute = fmaxf(absolute, fabsf(image.at(i, f)));
      power_of_two_scale(block_max(absolute, scratch), &stats.scale, &stats.inv_scale);
      again = stats.scale != 1.0f;  // the same for the whole block
      __syncthreads();
    }

    ClusterProblem p;
    p.tokens = n;
    p.clusters = stats.clusters;
    p.iterations = a.iterations;
    p.bucket_warps = a.bucket_warps;
    p.with_medoids = a.medoids != nullptr;
    p.sort = a.sort != 0;
    p.init = a.init == nullptr ? nullptr : a.init + b * k;
    p.first_label = a.init == nullptr ? a.first_label + b * n : nullptr;
    p.first_cost = a.init == nullptr ? a.first_cost + b * n : nullptr;
    const PackedGram packed = {gram};
    cluster_from_gram<1>(packed, s, p, scratch);

#pragma unroll 1
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
      const int j = s.label[i];
      a.assignment[b * n + i] = j < 0 ? -1 : s.rank[j];
    }
    const float* weights = a.weights == nullptr ? nullptr : a.weights + b * n;
    const MeansMode mode = p.with_medoids ? MeansMode::kMedoid : MeansMode::kMean;
    for (int j = warp_index(); j < k; j += warps_in_block()) {
      const bool used = j < p.clusters;
      const int64_t row = b * k + (used ? s.rank[j] : j);
      T* out = static_cast<T*>(a.centers) + row * features;
      float error = 0.0f, mass = 0.0f;
      if (used) {
        const int* members = s.order + s.start[j];
        const Shares shares(weights, members, s.start[j + 1] - s.start[j]);
        mass = shares.mass;
        error = emit_center(image, members, shares, mode, p.with_medoids ? s.medoid[j] : 0, &stats, weights, features, out);
      } else {
#pragma unroll 1
        for (int f = lane_index(); f < features; f += kWarp) out[f] = from_float<T>(0.0f);
      }
      if (lane_index() == 0) {
        a.mass[row] = mass;
        if (a.medoids != nullptr) a.medoids[row] = used ? s.medoid[j] : -1;
        s.norm[j] = error;
      }
    }
    __syncthreads();
    if (warp_index() == 0) {
      float sum = 0.0f;
      for (int j = lane_index(); j < k; j += kWarp) sum += s.norm[j];
      sum = warp_sum(sum);
      if (lane_index() == 0) a.inertia[b] = unscale_inertia(sum, stats.inv_scale, stats.inv_weight_scale);
    }
    __syncthreads();
  }
}

}  // namespace cuda
}  // namespace tokenpool
