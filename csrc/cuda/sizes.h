// Element types, tiles and shared-memory sizes that the planner, the pipeline and the kernels must agree on.
// No CUDA and no torch headers, here and in the three args headers: the host simulator includes them too.
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
