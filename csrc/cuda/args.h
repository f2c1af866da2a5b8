// Plain data passed from the host to the kernels: tokens, images, and what the kernels that cluster whole images
// (paths "resident", "gram", "spread") are told.
#pragma once

#include <cstdint>

#include "sizes.h"

namespace tokenpool {
namespace cuda {

// A (B, N, D) tensor of tokens with any strides, in elements.
struct Tokens {
  const void* data;
  int64_t stride_batch;
  int64_t stride_token;
  int64_t stride_feature;
  int vectorised;  // 1: every row starts on a 16-byte boundary and features are adjacent
};

struct Shape {
  int64_t batch;
  int tokens;    // N
  int features;  // D
  int clusters;  // K: rows of every per-cluster output
};

// What is known about one image before clustering. Scales are exact powers of two.
struct ImageStats {
  float scale;  // max |x| * scale lies in [1, 2)
  float inv_scale;
  float weight_scale;  // max w * weight_scale lies in [1, 2)
  float inv_weight_scale;
  float light;   // tokens of up to this weight do not count in mean and scale: 0, or -0.5 where none weighs more
  int counting;  // tokens that do
  int clusters;  // effective K = min(counts[b], tokens that are not padding)
};

struct StatsPartial {
  float max_abs;        // of tokens of positive weight
  float max_abs_light;  // of tokens of weight 0
  float max_weight;
  int valid;
  int positive;
};

struct StatsArgs {
  Shape shape;
  Tokens x;
  const float* weights;    // (B, N) or null
  const uint8_t* mask;     // (B, N) bool or null
  const int64_t* counts;   // (B,) or null
  StatsPartial* partials;  // (B, stats_chunks(N))
  ImageStats* stats;       // (B,)
  float* mean;             // (B, D) about the mean token, times scale; null: not wanted (half types)
  int use_scale;           // 0: scale stays 1 (float16 cannot overflow a float32 product)
};

// Half types need not know an image before its products are formed: scaling is needed so rarely that they are formed
// without it (kUnscaled), measured, and formed again for the images that need it (kScaledOnly).
enum class GramPass : int { kAll = 0, kUnscaled = 1, kScaledOnly = 2 };

struct GramArgs {
  Shape shape;
  Tokens x;
  const ImageStats* stats;  // not read in kUnscaled
  const float* mean;        // (B, D) or null
  float* gram;              // (B, N, ld)
  int64_t ld;
  GramPass pass;
};

// What every kernel that runs the iterations of whole images is told.
struct IterationArgs {
  Shape shape;
  const float* weights;           // (B, N) or null
  const uint8_t* mask;            // (B, N) bool or null
  const int64_t* init;            // (B, K) token indices, or null
  int64_t init_stride;            // from one image to the next; 0 where all start alike
  const int* first_label;         // (B, N) first assignment (to given centers), or null
  const float* first_cost;        // (B, N); neither init nor first_label: the kernel starts farthest-first
  const ImageStats* first_stats;  // (B,) of that assignment
  int64_t* assignment;            // (B, N)
  int64_t* medoids;               // (B, K); null for K-Means
  int iterations;
  int sort;
  int bucket_warps;
  int parts;  // groups of threads that share the clusters of one assignment
};

// Members of each cluster in the order of the output, for the kernel that makes the means.
struct ListArgs {
  int* order;           // (B, N) tokens bucketed by cluster, ascending inside each
  int* segment_start;   // (B, K)
  int* segment_length;  // (B, K)
  int* arrived;         // (B,) cleared for the means kernel
};

// Stats of images whose products have been formed without scaling.
struct MeasureArgs {
  IterationArgs run;
  Tokens x;
  const int64_t* counts;
  float* gram;  // (B, N, ld)
  int64_t ld;
  ImageStats* stats;  // (B,) written
};

struct IterateArgs {
  IterationArgs run;
  ListArgs lists;
  Tokens x;
  float* gram;  // (B, N, ld)
  int64_t ld;
  const ImageStats* stats;
};

struct ResidentArgs {
  IterationArgs run;
  Tokens x;
  const int64_t* counts;
  void* centers;     // (B, K, D) dtype of x
  float* mass;       // (B, K)
  float* inertia;    // (B,)
  int64_t* nearest;  // (B, K) K-Means: the member nearest to each mean; or null
  int chunk;         // features staged at once
  int use_scale;
};

// About the mean token of every image, without scaling: float32 on the path "spread".
struct TokenMeanArgs {
  IterationArgs run;
  Tokens x;
  float* mean;  // (B, D)
};

struct SpreadGramArgs {
  Shape shape;
  Tokens x;
  const float* mean;  // (B, D), or null (half types)
  float* gram;        // (B, packed_words(N)) lower triangles by rows
  int chunk;          // features staged at once
};

struct SpreadArgs {
  IterationArgs run;
  ListArgs lists;
  Tokens x;
  const int64_t* counts;
  const float* gram;  // (B, packed_words(N))
  float* mean;        // (B, D), overwritten should the image need scaling
  ImageStats* stats;  // (B,) written
  int use_scale;
};

}  // namespace cuda
}  // namespace tokenpool
