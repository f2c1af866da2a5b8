// Farthest-first start (Gonzalez 1985): the heaviest token, then again and again the token of largest weight times
// squared distance to the nearest chosen one, the lowest index on a tie. Tokens of zero weight come after all others;
// padding is never chosen.
//
// A token's key is its squared distance to the nearest chosen token, as an integer: for floats >= 0 the order of the
// bits is the order of the numbers, so that a warp finds the largest in two instructions. A distance that is not a
// number counts as 0.
#pragma once

#include "args_streaming.h"
#include "state.cuh"

namespace tokenpool {
namespace cuda {

constexpr int kZeroWeight = -1, kNeverChosen = -2;  // keys below all distances

__device__ inline int key_of(float value) {
  return value > 0.0f ? static_cast<int>(__float_as_uint(value)) : 0;
}

// Before anything is chosen. Padding has weight -1.
__device__ inline int first_key(float weight) {
  return weight > 0.0f ? key_of(infinity()) : weight == 0.0f ? kZeroWeight : kNeverChosen;
}

// What is compared between tokens: weight times distance; marks stay as they are.
__device__ inline int weighted_key(int key, float weight) {
  return key < 0 ? key : key_of(__uint_as_float(static_cast<unsigned>(key)) * weight);
}

struct Pick {
  int key;
  int index;
};

__device__ inline Pick no_pick() {
  return Pick{INT_MIN, INT_MAX};
}

// For tokens visited in ascending order.
__device__ inline void keep_farther(Pick& best, int key, int index) {
  if (key > best.key) best = Pick{key, index};
}

__device__ inline Pick warp_farthest(Pick pick) {
  const int key = __reduce_max_sync(kAllLanes, pick.key);
  return Pick{key, __reduce_min_sync(kAllLanes, pick.key == key ? pick.index : INT_MAX)};
}

// The largest key of the block (the lowest index on a tie), for every thread, with one barrier. `turn` alternates
// between calls: a fast warp then cannot overwrite what a slow one still reads.
__device__ inline Pick block_farthest(Pick pick, BlockScratch& scratch, int turn) {
  pick = warp_farthest(pick);
  if (lane_index() == 0) {
    scratch.key[turn][warp_index()] = pick.key;
    scratch.index[turn][warp_index()] = pick.index;
  }
  __syncthreads();
  pick = no_pick();
  if (lane_index() < warps_in_block()) pick = Pick{scratch.key[turn][lane_index()], scratch.index[turn][lane_index()]};
  return warp_farthest(pick);
}

// s.medoid[j] for all clusters: one pass over a row of G each. Ends with a barrier.
template <typename Gram>
__device__ inline void farthest_from_gram(const Gram& gram, ClusterState& s, const ClusterProblem& p,
                                          BlockScratch& scratch) {
  int* key = s.label;  // of the thread's own tokens
  float* square = s.cost;
  Pick best = no_pick();
#pragma unroll 1
  for (int i = threadIdx.x; i < p.tokens; i += blockDim.x) {
    key[i] = first_key(s.weight[i]);
    square[i] = gram(i, i);
    keep_farther(best, s.weight[i] >= 0.0f ? key_of(s.weight[i]) : kNeverChosen, i);
  }
#pragma unroll 1
  for (int j = 0;; ++j) {
    const int chosen = block_farthest(best, scratch, j & 1).index;
    if (threadIdx.x == 0) s.medoid[j] = chosen;
    if (j + 1 == p.clusters) break;
    const float norm = square[chosen];
    best = no_pick();
#pragma unroll 1
    for (int i = threadIdx.x; i < p.tokens; i += blockDim.x) {
      const int now = i == chosen ? kNeverChosen : min(key[i], key_of(square[i] + norm - 2.0f * gram(chosen, i)));
      key[i] = now;
      keep_farther(best, weighted_key(now, s.weight[i]), i);
    }
  }
  __syncthreads();
}

// The same from the tokens themselves, one launch a step (path "streaming"): a block finds the token chosen by the step
// before among the best of all blocks, then measures its 128 tokens' distances to it. Step K only writes the last
// choice.
template <typename T>
__global__ void __launch_bounds__(256, 2) farthest_kernel(FarthestArgs a) {
  __shared__ BlockScratch scratch;
  const int n = a.shape.tokens, k = a.shape.clusters, features = a.shape.features;
  const int chunks = farthest_chunks(n);
  const int64_t work_items = a.shape.batch * chunks;
  const int* given_key = a.pick_key + (1 - a.step % 2) * work_items;
  const int* given_index = a.pick_index + (1 - a.step % 2) * work_items;
  for (int64_t work = blockIdx.x; work < work_items; work += gridDim.x) {
    const int64_t b = work / chunks;
    const int first = static_cast<int>(work % chunks) * kFarthestTokens;
    const ImageStats stats = a.stats[b];
    int chosen = -1;
    if (a.step > 0) {
      Pick pick = no_pick();
      if (a.step <= stats.clusters)  // the same for the whole block
        for (int c = threadIdx.x; c < chunks; c += blockDim.x)
          keep_farther(pick, given_key[b * chunks + c], given_index[b * chunks + c]);
      pick = block_farthest(pick, scratch, 0);
      chosen = a.step <= stats.clusters ? pick.index : 0;
      if (first == 0 && threadIdx.x == 0) a.chosen[b * k + a.step - 1] = chosen;
    }
    Pick best = no_pick();
    if (a.step < stats.clusters) {
      const Image<T> image(a.x, b);
      for (int i = first + warp_index(); i < min(first + kFarthestTokens, n); i += warps_in_block()) {
        const int64_t token = b * n + i;
        const float weight = is_valid(a.mask, token) ? normal_weight(a.weights, token, stats.weight_scale) : -1.0f;
        int now = first_key(weight);
        if (a.step == 0) {
          keep_farther(best, weight >= 0.0f ? key_of(weight) : kNeverChosen, i);
        } else {
          float distance = 0.0f;
          for (int f = 4 * lane_index(); f < features; f += 4 * kWarp) {
            float v[4], c[4];
            load4(image, i, f, features, v);
            load4(image, chosen, f, features, c);
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const float difference = v[e] * stats.scale - c[e] * stats.scale;
              distance = fmaf(difference, difference, distance);
            }
          }
          distance = warp_sum(distance);
          now = i == chosen ? kNeverChosen : min(a.key[token], key_of(distance));
          keep_farther(best, weighted_key(now, weight), i);
        }
        __syncwarp();
        if (lane_index() == 0) a.key[token] = now;
      }
    }
    best = block_farthest(best, scratch, 1);
    if (threadIdx.x == 0) {
      a.pick_key[a.step % 2 * work_items + work] = best.key;
      a.pick_index[a.step % 2 * work_items + work] = best.index;
    }
    __syncthreads();
  }
}

}  // namespace cuda
}  // namespace tokenpool
