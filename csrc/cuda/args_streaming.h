// Plain data passed from the host to the kernels of the path "streaming": one struct a step.
#pragma once

#include <cstdint>

#include "args.h"

namespace tokenpool {
namespace cuda {

// One step of the farthest-first start of the path "streaming".
struct FarthestArgs {
  Shape shape;
  Tokens x;
  const ImageStats* stats;
  const float* weights;
  const uint8_t* mask;
  int* key;         // (B, N) distance to the nearest chosen token, as a sort key
  int* pick_key;    // (2, B, farthest_chunks(N)) best of each block, alternating between steps
  int* pick_index;  // the same
  int64_t* chosen;  // (B, K)
  int step;         // 0 .. K
};

struct GatherArgs {
  Shape shape;
  Tokens x;
  const ImageStats* stats;
  const float* mean;
  const int64_t* init;  // (B, K) indices, or null
  int64_t init_stride;
  const float* init_centers;  // (B, K, D), or null
  void* split;                // (B, K, parts, center_columns) in scaled, centred units
  float* norms;               // (B, K)
  int* medoids;               // (B, K) or null
  int* done;                  // (B,) cleared here
  int* arrived;               // (B,) the same
  const int* only;            // (B,) images to do, or null: all
};

// The first assignment finds out which images products in float32 cannot resolve (distances.cuh). Those are assigned
// again, and from then on, by differences of tokens and centers, from which no mean token is taken off.
enum class AssignPass : int { kFirst = 0, kAgain = 1, kNext = 2 };

struct AssignArgs {
  Shape shape;
  Tokens x;
  const ImageStats* stats;
  float* mean;  // cleared for an unresolved image
  const float* weights;
  const uint8_t* mask;
  const void* split;   // (B, K, parts, center_columns) of the type of x
  const float* norms;  // (B, K)
  const int* medoids;  // (B, K) or null: a medoid belongs to its own cluster
  const int* done;     // (B,)
  int* label;          // (B, N)
  float* cost;         // (B, N)
  int keep_tokens;     // 1: a block's tokens stay in shared memory over all centers
  AssignPass pass;
  int* unresolved;  // (B,) written by kFirst
  float* near_far;  // (B, assign_panels(N), 2) sums of squared distances and squared norms; kFirst
  int* arrived;     // (B,) zeros; kFirst
};

struct BucketArgs {
  Shape shape;
  const int64_t* given;     // (B, N) labels to bucket as they are (pool); null: use label
  const ImageStats* stats;  // null with given
  int* label;               // (B, N)
  float* cost;              // (B, N)
  int* previous;            // (B, N)
  int* done;                // (B,)
  float* loss;              // (B,) of the iteration before
  int* order;               // (B, N)
  int* segment_start;       // (B, K)
  int* segment_length;      // (B, K)
  int* scratch;             // (B, (bucket_warps + 1) * K) when it does not fit shared memory, else null
  int bucket_warps;
  int iteration;
};

struct UpdateArgs {
  Shape shape;
  Tokens x;
  const ImageStats* stats;
  const float* mean;
  const float* weights;
  const int* order;
  const int* segment_start;
  const int* segment_length;
  const int* done;
  void* split;
  float* means;  // (B, K, D) scratch of K-Medoids, else null
  float* norms;
  int* medoids;  // null for K-Means
};

struct FinishArgs {
  Shape shape;
  const ImageStats* stats;
  const int* label;
  const int* order;
  int* segment_start;
  int* segment_length;
  const int* medoid;  // (B, K) or null
  int* scratch;       // (B, 3 * K)
  int* arrived;       // (B,) cleared for the means kernel
  int64_t* assignment;
  int64_t* medoids;  // (B, K) or null
  int sort;
};

}  // namespace cuda
}  // namespace tokenpool
