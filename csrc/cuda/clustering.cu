// Launchers of the paths "gram" and "streaming". One file, because most of its compile time is the headers.
#include "assign.cuh"
#include "bucket.cuh"
#include "gram.cuh"
#include "iterate.cuh"
#include "means.cuh"
#include "stats.cuh"
#include "launch.cuh"

namespace tokenpool {
namespace cuda {

int launch_absmax(DType dtype, const StatsArgs& args, const Launch& launch) {
  TOKENPOOL_LAUNCH_TYPED(absmax_kernel, dtype, args, launch);
}

int launch_center(DType dtype, const StatsArgs& args, const Launch& launch) {
  TOKENPOOL_LAUNCH_TYPED(center_kernel, dtype, args, launch);
}

int launch_gram(DType dtype, const GramArgs& args, const Launch& launch) {
  TOKENPOOL_LAUNCH_TYPED(gram_kernel, dtype, args, launch);
}

int launch_measure(DType dtype, const MeasureArgs& args, const Launch& launch) {
  TOKENPOOL_LAUNCH_TYPED(measure_kernel, dtype, args, launch);
}

int launch_iterate(DType dtype, const IterateArgs& args, const Launch& launch) {
  TOKENPOOL_LAUNCH_TYPED(iterate_kernel, dtype, args, launch);
}

int launch_farthest(DType dtype, const FarthestArgs& args, const Launch& launch) {
  TOKENPOOL_LAUNCH_TYPED(farthest_kernel, dtype, args, launch);
}

int launch_gather(DType dtype, const GatherArgs& args, const Launch& launch) {
  TOKENPOOL_LAUNCH_TYPED(gather_kernel, dtype, args, launch);
}

int launch_assign(DType dtype, const AssignArgs& args, const Launch& launch) {
  TOKENPOOL_LAUNCH_TYPED(assign_kernel, dtype, args, launch);
}

int launch_bucket(const BucketArgs& args, const Launch& launch) {
  return launch_kernel(bucket_kernel, args, launch);
}

int launch_update(DType dtype, const UpdateArgs& args, const Launch& launch) {
  TOKENPOOL_LAUNCH_TYPED(update_kernel, dtype, args, launch);
}

int launch_finish(const FinishArgs& args, const Launch& launch) {
  return launch_kernel(finish_kernel, args, launch);
}

int launch_means(DType dtype, const MeansArgs& args, const Launch& launch) {
  TOKENPOOL_LAUNCH_TYPED(means_kernel, dtype, args, launch);
}

}  // namespace cuda
}  // namespace tokenpool
