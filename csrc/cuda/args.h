// Plain data passed from the host to the kernels, and the shared-memory sizes both sides must agree on.
// No CUDA and no torch headers: the planner, the pipeline, the kernels and the host simulator all include it.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#define TOKENPOOL_BOTH __host__ __device__
#else
#define TOKENPOOL_BOTH
#endif

namespace tokenpool {
namespace cuda {

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

inline size_t element_size(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : 2;
}

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
  const float* lse;  // (B, H, Nq)
  float* lse_out;    // (B, H, Nq) written by the row pass
  float* parts;      // (B, H, N) written by the column pass
  float* received;   // (B, N)
};

constexpr int kStatsChunk = 64;       // tokens a block of the absmax kernel reads
constexpr int kFarthestTokens = 128;  // tokens a block of the farthest kernel measures
constexpr int kTile = 32;             // a warp computes 32 x 32 products at a time
constexpr int kBlockTile = 128;       // rows and columns of a block's tile in the Gram kernel
constexpr int kAssignClusters = 64;   // clusters a block of the assign kernel compares at a time

TOKENPOOL_BOTH constexpr int round_up(int value, int multiple) {
  return (value + multiple - 1) / multiple * multiple;
}
TOKENPOOL_BOTH constexpr int stats_chunks(int tokens) {
  return (tokens + kStatsChunk - 1) / kStatsChunk;
}
TOKENPOOL_BOTH constexpr int assign_panels(int tokens) {
  return (tokens + kBlockTile - 1) / kBlockTile;
}
TOKENPOOL_BOTH constexpr int farthest_chunks(int tokens) {
  return (tokens + kFarthestTokens - 1) / kFarthestTokens;
}

// Staged rows are padded by 16 bytes: neighbouring rows then start 4 banks apart.
TOKENPOOL_BOTH constexpr int stage_chunk(DType dtype) {
  return dtype == DType::kFloat32 ? 32 : 64;
}
TOKENPOOL_BOTH constexpr int stage_stride(DType dtype, int chunk) {
  return chunk + (dtype == DType::kFloat32 ? 4 : 8);
}
inline size_t stage_bytes(DType dtype, int rows, int chunk) {
  return static_cast<size_t>(rows) * stage_stride(dtype, chunk) * element_size(dtype);
}

// Centers as `assign` reads them: rows of one part (float32) or two (high and low halves), each filled up with zeros to
// whole chunks, so that every 16-byte copy is aligned and whole.
TOKENPOOL_BOTH constexpr int center_parts(DType dtype) {
  return dtype == DType::kFloat32 ? 1 : 2;
}
TOKENPOOL_BOTH constexpr int center_columns(DType dtype, int features) {
  return features < 1 ? stage_chunk(dtype) : round_up(features, stage_chunk(dtype));
}

// Shared memory of `assign`: chunks of centers twice (one multiplies while the next arrives), and the tokens, whole
// (keep) or in chunks beside the centers.
inline size_t assign_bytes(DType dtype, int features, bool keep) {
  const int chunk = stage_chunk(dtype);
  const size_t centers = 2 * stage_bytes(dtype, center_parts(dtype) * kAssignClusters, chunk);
  return centers + (keep ? stage_bytes(dtype, kBlockTile, center_columns(dtype, features))
                         : 2 * stage_bytes(dtype, kBlockTile, chunk));
}

// Words (4 bytes) of ClusterState::base: counters of the sort by cluster, and candidates of an assignment, in turn.
TOKENPOOL_BOTH inline size_t base_words(int tokens, int clusters, int bucket_warps, int parts) {
  const size_t counters = static_cast<size_t>(bucket_warps) * round_up(clusters + 1, 4);
  const size_t candidates = parts > 1 ? 2 * static_cast<size_t>(parts) * tokens : 0;
  return counters > candidates ? counters : candidates;
}

// Words of the state that one block keeps while it clusters one image from its Gram matrix.
TOKENPOOL_BOTH inline size_t state_words(int tokens, int clusters, int bucket_warps, int parts) {
  const size_t n = round_up(tokens, 4), k = round_up(clusters + 1, 4);
  return 11 * n + 5 * k + base_words(tokens, clusters, bucket_warps, parts);
}

TOKENPOOL_BOTH inline size_t packed_words(int tokens) {
  return (static_cast<size_t>(tokens) * (tokens + 1) / 2 + 3) / 4 * 4;
}

}  // namespace cuda
}  // namespace tokenpool
