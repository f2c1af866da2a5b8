// Plain data passed from the host to the kernels of means, pooling, its backward and attention received.
#pragma once

#include <cstdint>

#include "args.h"

namespace tokenpool {
namespace cuda {

enum class MeansMode : int { kMean = 0, kMedoid = 1, kSum = 2 };

struct MeansArgs {
  Shape shape;
  Tokens x;
  const float* weights;  // (B, N) or null
  const int* order;
  const int* segment_start;
  const int* segment_length;
  const ImageStats* stats;  // null: no inertia
  const int64_t* medoids;   // (B, K) in kMedoid mode
  void* centers;            // (B, K, D)
  float* mass;              // (B, K) or null
  float* inertia_parts;     // (B, K) or null, scaled units
  int* arrived;             // (B,) zeros; with inertia_parts
  float* inertia;           // (B,) written by the last cluster of each image; with inertia_parts
  int64_t* nearest;         // (B, K) the member nearest to each mean; or null
  float* apart;             // (B, N) squared distances from the means, in scaled units; with nearest
  MeansMode mode;
};

struct UnpoolArgs {
  Shape shape;
  Tokens centers;             // (B, K, D), strided
  const int64_t* assignment;  // (B, N)
  void* output;               // (B, N, D)
};

struct CountArgs {
  Shape shape;
  const int64_t* assignment;  // (B, N)
  int* counts;                // (B, K), zeroed by the kernel's block
};

struct PoolBackwardArgs {
  Shape shape;
  Tokens x;                   // (B, N, D)
  Tokens grad_centers;        // (B, K, D)
  Tokens centers;             // (B, K, D)
  const int64_t* assignment;  // (B, N)
  const float* weights;       // (B, N) or null
  const float* mass;          // (B, K)
  const int* counts;          // (B, K)
  void* grad_x;               // (B, N, D) dtype of x
  float* grad_weights;        // (B, N)
};

// q is (B, H, Nq, d) and k is (B, H, N, d); batch and head strides are separate.
struct AttentionArgs {
  int64_t batch;
  int heads;
  int queries;
  int keys;
  int features;
  Tokens q;  // stride_batch is the image's stride
  Tokens k;
  int64_t q_stride_head;
  int64_t k_stride_head;
  float scale;
  const float* lse;  // (B, H, Nq) from the caller, or null: then the row pass writes `top` and `logs`
  float* top;        // (B, H, Nq) the product whose logit is a query's largest
  float* logs;       // (B, H, Nq) logarithm of the sum of exp(logit - largest logit)
  float* parts;      // (B, H, N) written by the column pass
  float* received;   // (B, N)
};

}  // namespace cuda
}  // namespace tokenpool
