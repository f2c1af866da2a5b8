// One function per kernel: pick the instantiation, opt in to the shared memory, launch on the stream.
// Implemented by the .cu files, and by the host simulator of the tests. 0 means success, else a cudaError_t.
#pragma once

#include "args_pool.h"
#include "args_streaming.h"

namespace tokenpool {
namespace cuda {

struct Launch {
  int64_t blocks;  // wanted; the launcher caps it at the grid limit, the kernels loop over the rest
  int threads;
  size_t shared_bytes;  // dynamic
  void* stream;         // cudaStream_t
};

int launch_absmax(DType dtype, const StatsArgs& args, const Launch& launch);
int launch_center(DType dtype, const StatsArgs& args, const Launch& launch);
int launch_gram(DType dtype, const GramArgs& args, const Launch& launch);
int launch_measure(DType dtype, const MeasureArgs& args, const Launch& launch);
int launch_iterate(DType dtype, const IterateArgs& args, const Launch& launch);
int launch_resident(DType dtype, const ResidentArgs& args, const Launch& launch);
int launch_token_mean(const TokenMeanArgs& args, const Launch& launch);
int launch_spread_gram(DType dtype, const SpreadGramArgs& args, const Launch& launch);
int launch_spread(DType dtype, const SpreadArgs& args, const Launch& launch);
int launch_farthest(DType dtype, const FarthestArgs& args, const Launch& launch);
int launch_gather(DType dtype, const GatherArgs& args, const Launch& launch);
int launch_assign(DType dtype, const AssignArgs& args, const Launch& launch);
int launch_bucket(const BucketArgs& args, const Launch& launch);
int launch_update(DType dtype, const UpdateArgs& args, const Launch& launch);
int launch_finish(const FinishArgs& args, const Launch& launch);
int launch_means(DType dtype, const MeansArgs& args, const Launch& launch);
int launch_unpool(DType dtype, const UnpoolArgs& args, const Launch& launch);
int launch_count(const CountArgs& args, const Launch& launch);
int launch_pool_backward(DType dtype, const PoolBackwardArgs& args, const Launch& launch);
int launch_lse(DType dtype, const AttentionArgs& args, const Launch& launch);
int launch_received(DType dtype, const AttentionArgs& args, const Launch& launch);
int launch_reduce(const AttentionArgs& args, const Launch& launch);

}  // namespace cuda
}  // namespace tokenpool
