// A clustering with few images (path "spread"): what "resident" does in one block, spread over the device in three
// launches. The Gram matrix of one image is made by many blocks, one for each 32 x 32 tile of its lower triangle; one
// block of up to 1024 threads iterates; the means are made by one warp per cluster (means.cuh).
//
// The same bits as "resident": each element of G is the same sum over the features in the same order, and everything
// else is the same functions. float32 adds a launch before, for the mean token.
#pragma once

#include "cluster.cuh"
#include "measure.cuh"
#include "tile.cuh"

namespace tokenpool {
namespace cuda {

constexpr int kSpreadThreads = 128;

// One block (256 threads) per (image, 32 features). Tokens are float32.
__global__ void __launch_bounds__(256, 2) token_mean_kernel(TokenMeanArgs a) {
  TOKENPOOL_DYNAMIC_SHARED(memory);
  __shared__ BlockScratch scratch;
  __shared__ FeaturePart parts[kMeanWarps * kWarp];
  float* weight = reinterpret_cast<float*>(memory);
  const int n = a.run.shape.tokens, features = a.run.shape.features;
  const int groups = (features + kWarp - 1) / kWarp;
  const int64_t work_items = a.run.shape.batch * groups;
  for (int64_t work = blockIdx.x; work < work_items; work += gridDim.x) {
    const int64_t b = work / groups;
    const int f = static_cast<int>(work % groups) * kWarp + lane_index();
    const Image<float> image(a.x, b);
    const ImageStats stats = measure_image(a.run, nullptr, b, weight, scratch);
    const float mean = mean_of_tokens(
        n, stats.counting, parts, [&](int i) { return weight[i] > stats.light; },
        [&](int i) { return f < features ? image.at(i, f) : 0.0f; });
    if (warp_index() == 0 && f < features) a.mean[b * features + f] = mean;
    __syncthreads();
  }
}

// Products of 32 x 32 tokens of the image by the block's first four warps, 16 x 16 each, into the packed triangle.
// staged: 64 rows. kInFlight: see stage_rows; 0 copies rows as they are (copy_rows). Ends with a barrier.
template <int kInFlight, typename T>
__device__ inline void spread_tile(float* gram, const Image<T>& image, T* staged, int row_tile, int column_tile,
                                   int tokens, int features, int chunk, float scale, const float* mean) {
  const int stride = stage_stride(TypeTraits<T>::kType, chunk);
  const int row0 = row_tile * kTile, column0 = column_tile * kTile;
  const unsigned warp = thread_index_anew() / kWarp;
  const int row = 16 * (warp / 2), column = 16 * (warp % 2);
  T* other = row_tile == column_tile ? staged : staged + kTile * stride;
  const bool multiplies = warp_index() < 4;
  float acc[1][2][4];
  clear(acc);
#pragma unroll 1
  for (int k0 = 0; k0 < features; k0 += chunk) {
    const auto stage = [&](T* dst, int first) {
      if constexpr (kInFlight == 0)
        copy_rows(dst, image, first, kTile, tokens, k0, chunk, features);
      else
        stage_rows<kInFlight>(dst, image, first, kTile, tokens, k0, chunk, features, scale, mean);
    };
    stage(staged, row0);
    if (other != staged) stage(other, column0);
    __syncthreads();
    const int width = min(chunk, round_up(features - k0, 32));  // zeros beyond it change no sum
    if (multiplies) tile_product(acc, staged + row * stride, other + column * stride, stride, width);
    __syncthreads();
  }
  if (multiplies) store_tile(gram, acc, row0 + row, column0 + column, tokens);
}

// One block per (image, tile of the lower triangle).
template <typename T>
__global__ void __launch_bounds__(kSpreadThreads, 4) spread_gram_kernel(SpreadGramArgs a) {
  TOKENPOOL_DYNAMIC_SHARED(memory);
  const int n = a.shape.tokens, features = a.shape.features;
  const int blocks = (n + kTile - 1) / kTile, tiles = blocks * (blocks + 1) / 2;
  const int words = static_cast<int>(packed_words(n)), used = n * (n + 1) / 2;
  const int64_t work_items = a.shape.batch * tiles;
  for (int64_t work = blockIdx.x; work < work_items; work += gridDim.x) {
    const int64_t b = work / tiles;
    const int tile = static_cast<int>(work % tiles);
    int row, column;
    triangle_position(tile, &row, &column);
    float* gram = a.gram + b * words;
    const float* mean = a.mean == nullptr ? nullptr : a.mean + b * features;
    constexpr int kInFlight = TypeTraits<T>::kType == DType::kFloat32 ? 4 : 0;  // half types have no mean here
    spread_tile<kInFlight>(gram, Image<T>(a.x, b), reinterpret_cast<T*>(memory), row, column, n, features, a.chunk,
                           1.0f, mean);
    if (tile == 0 && used + static_cast<int>(threadIdx.x) < words) gram[used + threadIdx.x] = 0.0f;
  }
}

// Words [0, words) to shared memory.
__device__ inline void load_triangle(float* dst, const float* src, int words) {
#pragma unroll 1
  for (int p = 4 * threadIdx.x; p < words; p += 4 * blockDim.x) copy_async(dst + p, src + p);
  wait_for_copies();
}

// The Gram matrix again, scaled, by this block alone: rare, so it is short rather than fast. Ends with a barrier.
template <typename T>
__device__ inline void rebuild_gram(float* gram, const Image<T>& image, void* memory, const float* weight, int tokens,
                                    int features, const ImageStats& stats, float* mean) {
  if (mean != nullptr)
    for (int f0 = 0; f0 < features; f0 += kWarp) {
      const int f = f0 + lane_index();
      const float value = mean_of_tokens(
          tokens, stats.counting, static_cast<FeaturePart*>(memory), [&](int i) { return weight[i] > stats.light; },
          [&](int i) { return f < features ? image.at(i, f) * stats.scale : 0.0f; });
      if (warp_index() == 0 && f < features) mean[f] = value;
      __syncthreads();
    }
#pragma unroll 1
  for (int row = 0; row * kTile < tokens; ++row)
#pragma unroll 1
    for (int column = 0; column <= row; ++column)
      spread_tile<1>(gram, image, static_cast<T*>(memory), row, column, tokens, features,
                     stage_chunk(TypeTraits<T>::kType), stats.scale, mean);
  __syncthreads();
}

// One block per image: all iterations.
template <typename T>
__global__ void __launch_bounds__(1024, 1) spread_kernel(SpreadArgs a) {
  TOKENPOOL_DYNAMIC_SHARED(memory);
  __shared__ BlockScratch scratch;
  const int n = a.run.shape.tokens, k = a.run.shape.clusters, features = a.run.shape.features;
  const int words = static_cast<int>(packed_words(n));
  const PackedGram gram = {reinterpret_cast<float*>(memory)};
  float* weight = gram.g + words;
  void* rest = weight + round_up(n, 4);
  ClusterState s(weight, rest, n, k);
  for (int64_t b = blockIdx.x; b < a.run.shape.batch; b += gridDim.x) {
    const Image<T> image(a.x, b);
    load_triangle(gram.g, a.gram + b * words, words);
    ImageStats stats = measure_image(a.run, a.counts, b, weight, scratch);
    if (a.use_scale && must_scale(gram, image, weight, n, features, stats, scratch))
      rebuild_gram(gram.g, image, rest, weight, n, features, stats,
                   a.mean == nullptr ? nullptr : a.mean + b * features);
    if (threadIdx.x == 0) a.stats[b] = stats;
    __syncthreads();
    while (!cluster_from_gram<1, true>(gram, s, problem_of(a.run, b, a.stats[b]), scratch))
      fill_with_distances(gram, Image<T>(a.x, b), n, a.run.shape.features, a.stats[b].scale);
    write_assignment(a.run, b, s);
    write_lists(a.run, a.lists, b, a.stats[b].clusters, s);
    __syncthreads();
  }
}

}  // namespace cuda
}  // namespace tokenpool
