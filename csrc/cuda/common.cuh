// Conversions, exact scaling and warp/block reductions shared by the kernels.
//
// The kernels compile in two ways: by nvcc, and as plain C++ by the host simulator of the tests, which supplies the
// CUDA vocabulary (threadIdx, barriers, shuffles, half types) through tests/simulator/cuda_sim.h.
#pragma once

#ifdef TOKENPOOL_CUDA_SIM
#include "cuda_sim.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define TOKENPOOL_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

#include <cfloat>
#include <climits>

#include "args.h"

namespace tokenpool {
namespace cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

template <typename T>
struct TypeTraits;

template <>
struct TypeTraits<float> {
  static constexpr DType kType = DType::kFloat32;
  static __device__ float to_float(float v) { return v; }
  static __device__ float from_float(float v) { return v; }
};

template <>
struct TypeTraits<__half> {
  static constexpr DType kType = DType::kFloat16;
  static __device__ float to_float(__half v) { return __half2float(v); }
  static __device__ __half from_float(float v) { return __float2half_rn(v); }
};

template <>
struct TypeTraits<__nv_bfloat16> {
  static constexpr DType kType = DType::kBFloat16;
  static __device__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
  static __device__ __nv_bfloat16 from_float(float v) { return __float2bfloat16_rn(v); }
};

template <typename T>
__device__ inline float to_float(T v) {
  return TypeTraits<T>::to_float(v);
}

template <typename T>
__device__ inline T from_float(float v) {
  return TypeTraits<T>::from_float(v);
}

__device__ inline float infinity() {
  return __uint_as_float(0x7f800000u);
}

// Whether products of tokens whose largest square is this one neither overflow nor underflow, summed over all features.
__device__ inline bool is_safe(float square) {
  return square >= 0x1p-40f && square <= 0x1p80f;
}

// The power of two s for which `largest` * s lies in [1, 2), and its reciprocal; 1 where `largest` is 0 or not finite.
__device__ inline void power_of_two_scale(float largest, float* scale, float* inverse) {
  const unsigned biased = (__float_as_uint(largest) >> 23) & 255u;
  if (!(largest > 0.0f) || biased == 255u) {
    *scale = 1.0f;
    *inverse = 1.0f;
    return;
  }
  const int exponent = biased == 0u ? -126 : static_cast<int>(biased) - 127;
  // 2^-127 is a denormal number: its only bit is the top one of the fraction.
  *scale =
      exponent == 127 ? __uint_as_float(0x00400000u) : __uint_as_float(static_cast<unsigned>(127 - exponent) << 23);
  *inverse = __uint_as_float(static_cast<unsigned>(127 + exponent) << 23);
}

// A center as the sum of two numbers of half type (high + low), which keeps about twice the type's digits.
template <typename T>
struct CenterSplit {
  static constexpr int kParts = 2;
  // What the kernel effectively multiplies with; norms are taken of the same number.
  static __device__ float representable(float c) {
    const float high = to_float(from_float<T>(c));
    return high + to_float(from_float<T>(c - high));
  }
  static __device__ T part(float c, int index) {
    const T high = from_float<T>(c);
    return index == 0 ? high : from_float<T>(c - to_float(high));
  }
};

template <>
struct CenterSplit<float> {
  static constexpr int kParts = 1;
  static __device__ float representable(float c) { return c; }
  static __device__ float part(float c, int) { return c; }
};

// One image of a token tensor.
template <typename T>
struct Image {
  const T* data;
  int64_t stride_token;
  int64_t stride_feature;
  bool vectorised;

  __device__ Image(const Tokens& x, int64_t image)
      : data(static_cast<const T*>(x.data) + image * x.stride_batch),
        stride_token(x.stride_token),
        stride_feature(x.stride_feature),
        vectorised(x.vectorised != 0) {}

  __device__ T raw(int token, int feature) const { return data[token * stride_token + feature * stride_feature]; }
  __device__ float at(int token, int feature) const { return to_float(raw(token, feature)); }
};

// What ImageStats says of the tokens that count in mean and scale.
__device__ inline float light_weight(bool any_positive) {
  return any_positive ? 0.0f : -0.5f;
}

// A feature in the units in which products are formed. mean may be null.
__device__ inline float in_units(float value, float scale, const float* mean, int feature) {
  return value * scale - (mean == nullptr ? 0.0f : mean[feature]);
}

template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T value[4];
};

// Features f .. f+3 of one token, 0 beyond D. f is a multiple of 4.
template <typename T>
__device__ inline void load4(const Image<T>& image, int token, int f, int features, float (&v)[4]) {
  if (image.vectorised && f + 4 <= features) {
    const Four<T> four = *reinterpret_cast<const Four<T>*>(image.data + token * image.stride_token + f);
#pragma unroll
    for (int e = 0; e < 4; ++e) v[e] = to_float(four.value[e]);
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e) v[e] = f + e < features ? image.at(token, f + e) : 0.0f;
  }
}

// The same for f, f + 128, ..., by a warp whose lanes own four features each: all loads are on their way before any is
// used.
template <int kChunks, typename T>
__device__ inline void load_chunks(const Image<T>& image, int token, int f, int features, float (&v)[kChunks][4]) {
  if (image.vectorised && features % 4 == 0) {
    Four<T> four[kChunks] = {};
    const T* row = image.data + token * image.stride_token + f;
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
      if (f + 4 * kWarp * c < features) four[c] = *reinterpret_cast<const Four<T>*>(row + 4 * kWarp * c);
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
#pragma unroll
      for (int e = 0; e < 4; ++e) v[c][e] = to_float(four[c].value[e]);
  } else {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) load4(image, token, f + 4 * kWarp * c, features, v[c]);
  }
}

// Sum over the warp in a fixed tree; every lane gets it.
__device__ inline float warp_sum(float v) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(kAllLanes, v, offset);
  return v;
}

__device__ inline float warp_max(float v) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) v = fmaxf(v, __shfl_xor_sync(kAllLanes, v, offset));
  return v;
}

__device__ inline int warp_sum(int v) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(kAllLanes, v, offset);
  return v;
}

// Kahan's sum: an error of a few units in the last place, whatever the number of terms.
struct Sum {
  float value = 0.0f, carry = 0.0f;
  __device__ void add(float term) {
    const float corrected = term - carry, next = value + corrected;
    carry = (next - value) - corrected;
    value = next;
  }
};

struct Candidate {
  float value;
  int index;
};

// The larger value; the lower index on a tie. index INT_MAX means none.
__device__ inline Candidate larger(Candidate a, Candidate b) {
  const bool second = b.value > a.value || (b.value == a.value && b.index < a.index);
  return second ? b : a;
}

// The smaller value; the lower index on a tie.
__device__ inline Candidate smaller(Candidate a, Candidate b) {
  const bool second = b.value < a.value || (b.value == a.value && b.index < a.index);
  return second ? b : a;
}

__device__ inline Candidate shuffle_xor(Candidate c, int offset) {
  Candidate other;
  other.value = __shfl_xor_sync(kAllLanes, c.value, offset);
  other.index = __shfl_xor_sync(kAllLanes, c.index, offset);
  return other;
}

// The list of members (or medoids) that an assignment reads: those of centers that moved, then the others.
struct Tally {
  int moved;
  int all;
  int open;  // tokens that must be compared with the others, too
};

// Room for one value per warp of a block (at most 32 warps), and the block's tally.
struct BlockScratch {
  Tally tally;
  int resolved;
  float loss[2];  // of this iteration and the one before, in turn
  Candidate candidate[kWarp];
  int key[2][kWarp];
  int index[2][kWarp];
};

__device__ inline int warp_index() {
  return static_cast<int>(threadIdx.x) / kWarp;
}
__device__ inline int lane_index() {
  return static_cast<int>(threadIdx.x) % kWarp;
}
__device__ inline int warps_in_block() {
  return static_cast<int>(blockDim.x) / kWarp;
}

// Largest candidate of the block, for every thread. All threads must call it.
__device__ inline Candidate block_larger(Candidate c, BlockScratch& scratch) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) c = larger(c, shuffle_xor(c, offset));
  __syncthreads();
  if (lane_index() == 0) scratch.candidate[warp_index()] = c;
  __syncthreads();
  c = scratch.candidate[0];
  for (int w = 1; w < warps_in_block(); ++w) c = larger(c, scratch.candidate[w]);
  return c;
}

__device__ inline float block_max(float v, BlockScratch& scratch) {
  v = warp_max(v);
  __syncthreads();
  if (lane_index() == 0) scratch.candidate[warp_index()].value = v;
  __syncthreads();
  v = scratch.candidate[0].value;
  for (int w = 1; w < warps_in_block(); ++w) v = fmaxf(v, scratch.candidate[w].value);
  return v;
}

__device__ inline int block_sum(int v, BlockScratch& scratch) {
  v = warp_sum(v);
  __syncthreads();
  if (lane_index() == 0) scratch.candidate[warp_index()].index = v;
  __syncthreads();
  v = 0;
  for (int w = 0; w < warps_in_block(); ++w) v += scratch.candidate[w].index;
  return v;
}

// Sum of floats: warps in ascending order, so the result depends on the block's size but on nothing else.
__device__ inline float block_sum(float v, BlockScratch& scratch) {
  v = warp_sum(v);
  __syncthreads();
  if (lane_index() == 0) scratch.candidate[warp_index()].value = v;
  __syncthreads();
  v = 0.0f;
  for (int w = 0; w < warps_in_block(); ++w) v += scratch.candidate[w].value;
  return v;
}

// Sum of value(i) over [0, count) by one warp, the same for any number of threads in the block; every lane gets it.
template <typename Value>
__device__ inline float sum_by_warp(int count, Value value) {
  Sum sum;
#pragma unroll 1
  for (int i = lane_index(); i < count; i += kWarp) sum.add(value(i));
  return warp_sum(sum.value);
}

constexpr int kMeanWarps = 8;

// What one warp's tokens say about a feature, as differences from the first token that counts.
struct FeaturePart {
  float sum;
  float spread;  // the largest
};

// `mean` to a multiple of an eighth of the power of two below `spread`: what is taken off all tokens then keeps small
// integers, and ties between them, exact.
__device__ inline float on_coarse_grid(float mean, float spread) {
  float scale, unit;
  power_of_two_scale(spread, &scale, &unit);
  const float steps = mean * scale * 8.0f;
  return spread > 0.0f && fabsf(steps) < 0x1p22f ? rintf(steps) * (unit * 0.125f) : mean;
}

// About the mean of value(i) over the tokens with counts(i), `counting` of them, for each lane's feature: warp w of the
// first eight adds tokens w, w + 8, .., then the warps are added in order. parts: kMeanWarps x 32. The block calls it;
// one barrier inside.
template <typename Counts, typename Value>
__device__ inline float mean_of_tokens(int tokens, int counting, FeaturePart* parts, Counts counts, Value value) {
  if (counting == 0) return 0.0f;  // the same for the whole block
  int first = 0;
#pragma unroll 1
  while (first + 1 < tokens && !counts(first)) ++first;
  const float shift = value(first);
  if (warp_index() < kMeanWarps) {
    FeaturePart part = {0.0f, 0.0f};
#pragma unroll 4
    for (int i = warp_index(); i < tokens; i += kMeanWarps)
      if (counts(i)) {
        const float difference = value(i) - shift;
        part.sum += difference;
        part.spread = fmaxf(part.spread, fabsf(difference));
      }
    parts[warp_index() * kWarp + lane_index()] = part;
  }
  __syncthreads();
  FeaturePart all = {0.0f, 0.0f};
#pragma unroll 1
  for (int w = 0; w < kMeanWarps; ++w) {
    const FeaturePart part = parts[w * kWarp + lane_index()];
    all.sum += part.sum;
    all.spread = fmaxf(all.spread, part.spread);
  }
  return on_coarse_grid(shift + all.sum / static_cast<float>(counting), all.spread);
}

// Counts one more arrival at *arrived; true for the last of `expected`, which then sees what the others wrote before
// (through __ldcg). For one lane of a warp.
__device__ inline bool is_last_to_arrive(int* arrived, int expected) {
  __threadfence();
  const bool last = atomicAdd(arrived, 1) == expected - 1;
  __threadfence();
  return last;
}

// A sum of squares in scaled units back in the units of the input, never infinite for a finite sum.
__device__ inline float unscale_inertia(float sum, float inv_scale, float inv_weight_scale) {
  const double value =
      static_cast<double>(sum) * inv_scale * static_cast<double>(inv_scale) * static_cast<double>(inv_weight_scale);
  return value > FLT_MAX ? FLT_MAX : static_cast<float>(value);
}

__device__ inline bool is_valid(const uint8_t* mask, int64_t index) {
  return mask == nullptr || mask[index] != 0;
}

// The weight of a valid token in normalised units; NaN counts as 0.
__device__ inline float normal_weight(const float* weights, int64_t index, float weight_scale) {
  const float w = weights == nullptr ? 1.0f : weights[index] * weight_scale;
  return w > 0.0f ? w : 0.0f;
}

}  // namespace cuda
}  // namespace tokenpool
