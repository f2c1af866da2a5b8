#include "bucket.cuh"
#include "launch.cuh"

namespace tokenpool {
namespace cuda {

int launch_bucket(const BucketArgs& args, const Launch& launch) { return launch_kernel(bucket_kernel, args, launch); }

int launch_finish(const FinishArgs& args, const Launch& launch) { return launch_kernel(finish_kernel, args, launch); }

}  // namespace cuda
}  // namespace tokenpool
