#include "pipeline.h"

#include <algorithm>
#include <limits>

#include "launchers.h"
#include "workspace.h"

namespace tokenpool {
namespace cuda {

namespace {

int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Returns from the enclosing function at the first failing launch.
#define TOKENPOOL_TRY(call)           \
  do {                                \
    const int status_ = (call);       \
    if (status_ != 0) return status_; \
  } while (false)

constexpr int kMeansWarps = 4;

// A product of float16 numbers cannot leave the range of float32.
int use_scale(DType dtype) {
  return dtype == DType::kFloat16 ? 0 : 1;
}

ListArgs lists_of(const Workspace& w) {
  return ListArgs{w.order, w.segment_start, w.segment_length, w.arrived};
}

Launch per_cluster(const Shape& shape, void* stream) {
  return Launch{divide_up(shape.batch * shape.clusters, kMeansWarps), 32 * kMeansWarps, 0, stream};
}

int launch_stats(const ClusterCall& call, const Workspace& w, void* stream) {
  StatsArgs args{call.shape, call.x, call.weights,         call.mask, call.counts, w.partials,
                 w.stats,    w.mean, use_scale(call.dtype)};
  const int64_t groups = w.mean == nullptr ? 1 : std::max(1, (call.shape.features + 31) / 32);
  TOKENPOOL_TRY(
      launch_absmax(call.dtype, args, Launch{call.shape.batch * stats_chunks(call.shape.tokens), 256, 0, stream}));
  return launch_center(call.dtype, args, Launch{call.shape.batch * groups, 256, 0, stream});
}

// only: (B,) which images, or null.
int launch_first_centers(const ClusterCall& call, const Workspace& w, const int* only, void* stream) {
  const int64_t* chosen = call.init != nullptr ? call.init : w.chosen;
  const int64_t stride = call.init != nullptr ? call.init_stride : call.shape.clusters;
  const GatherArgs args{call.shape,
                        call.x,
                        w.stats,
                        w.mean,
                        call.init_centers != nullptr ? nullptr : chosen,
                        stride,
                        call.init_centers,
                        w.split,
                        w.norms,
                        w.medoids,
                        w.done,
                        w.arrived,
                        only};
  return launch_gather(call.dtype, args, per_cluster(call.shape, stream));
}

int launch_nearest(const CudaPlan& plan, const ClusterCall& call, const Workspace& w, AssignPass pass, void* stream) {
  const AssignArgs args{call.shape,        call.x,  w.stats,      w.mean,     call.weights, call.mask,
                        w.split,           w.norms, w.medoids,    w.done,     w.label,      w.cost,
                        plan.assign_keeps, pass,    w.unresolved, w.near_far, w.arrived};
  return launch_assign(call.dtype, args,
                       Launch{call.shape.batch * divide_up(call.shape.tokens, kBlockTile), 256,
                              assign_bytes(call.dtype, call.shape.features, plan.assign_keeps), stream});
}

int launch_results(const ClusterCall& call, const Workspace& w, void* stream) {
  const MeansArgs means{call.shape,      call.x,
                        call.weights,    w.order,
                        w.segment_start, w.segment_length,
                        w.stats,         call.medoids,
                        call.centers,    call.mass,
                        w.inertia_parts, w.arrived,
                        call.inertia,    call.nearest,
                        w.apart,         call.medoids != nullptr ? MeansMode::kMedoid : MeansMode::kMean};
  return launch_means(call.dtype, means, per_cluster(call.shape, stream));
}

// First centers and the assignment to them; both again for the images that products cannot resolve. (Of the paths
// other than "streaming" only where centers are given.)
int launch_first_assignment(const CudaPlan& plan, const ClusterCall& call, const Workspace& w, void* stream) {
  TOKENPOOL_TRY(launch_first_centers(call, w, nullptr, stream));
  TOKENPOOL_TRY(launch_nearest(plan, call, w, AssignPass::kFirst, stream));
  TOKENPOOL_TRY(launch_first_centers(call, w, w.unresolved, stream));
  return launch_nearest(plan, call, w, AssignPass::kAgain, stream);
}

IterationArgs iterations_of(const CudaPlan& plan, const ClusterCall& call, const Workspace& w) {
  const bool given = call.init_centers != nullptr;
  return IterationArgs{call.shape,
                       call.weights,
                       call.mask,
                       call.init,
                       call.init_stride,
                       given ? w.label : nullptr,
                       given ? w.cost : nullptr,
                       w.stats,
                       call.assignment,
                       call.medoids,
                       call.iterations,
                       call.sort,
                       plan.bucket_warps,
                       plan.parts};
}

int run_resident(const CudaPlan& plan, const ClusterCall& call, const Workspace& w, void* stream) {
  if (call.init_centers != nullptr) {
    TOKENPOOL_TRY(launch_stats(call, w, stream));
    TOKENPOOL_TRY(launch_first_assignment(plan, call, w, stream));
  }
  const ResidentArgs args{iterations_of(plan, call, w),
                          call.x,
                          call.counts,
                          call.centers,
                          call.mass,
                          call.inertia,
                          call.nearest,
                          plan.chunk,
                          use_scale(call.dtype)};
  return launch_resident(call.dtype, args, Launch{call.shape.batch, plan.threads, plan.shared_bytes, stream});
}

// The three or four launches that give the bits of run_resident. The first assignment has done with w.mean and w.stats
// when they are written again.
int run_spread(const CudaPlan& plan, const ClusterCall& call, const Workspace& w, void* stream) {
  if (call.init_centers != nullptr) {
    TOKENPOOL_TRY(launch_stats(call, w, stream));
    TOKENPOOL_TRY(launch_first_assignment(plan, call, w, stream));
  }
  if (w.mean != nullptr) {
    const TokenMeanArgs mean{iterations_of(plan, call, w), call.x, w.mean};
    TOKENPOOL_TRY(launch_token_mean(mean, Launch{call.shape.batch * divide_up(call.shape.features, 32), 256,
                                                 sizeof(float) * call.shape.tokens, stream}));
  }
  const SpreadGramArgs gram{call.shape, call.x, w.mean, w.gram, plan.chunk};
  const int64_t panels = divide_up(call.shape.tokens, kTile);
  TOKENPOOL_TRY(launch_spread_gram(call.dtype, gram,
                                   Launch{call.shape.batch * panels * (panels + 1) / 2, 128,
                                          stage_bytes(call.dtype, 2 * kTile, plan.chunk), stream}));
  const SpreadArgs args{iterations_of(plan, call, w), lists_of(w), call.x, call.counts, w.gram, w.mean, w.stats,
                        use_scale(call.dtype)};
  TOKENPOOL_TRY(launch_spread(call.dtype, args, Launch{call.shape.batch, plan.threads, plan.shared_bytes, stream}));
  return launch_results(call, w, stream);
}

int launch_products(const ClusterCall& call, const Workspace& w, GramPass pass, void* stream) {
  const GramArgs gram{call.shape, call.x, w.stats, w.mean, w.gram, w.ld, pass};
  const int64_t panels = divide_up(call.shape.tokens, kBlockTile);
  return launch_gram(call.dtype, gram,
                     Launch{call.shape.batch * panels * (panels + 1) / 2, 256,
                            stage_bytes(call.dtype, 2 * kBlockTile, stage_chunk(call.dtype)), stream});
}

int run_gram(const CudaPlan& plan, const ClusterCall& call, const Workspace& w, void* stream) {
  if (call.init_centers != nullptr || w.mean != nullptr || !use_scale(call.dtype)) {
    TOKENPOOL_TRY(launch_stats(call, w, stream));
    if (call.init_centers != nullptr) TOKENPOOL_TRY(launch_first_assignment(plan, call, w, stream));
    TOKENPOOL_TRY(launch_products(call, w, GramPass::kAll, stream));
  } else {  // bfloat16: a reading of all tokens less
    TOKENPOOL_TRY(launch_products(call, w, GramPass::kUnscaled, stream));
    const MeasureArgs measure{iterations_of(plan, call, w), call.x, call.counts, w.gram, w.ld, w.stats};
    TOKENPOOL_TRY(
        launch_measure(call.dtype, measure, Launch{call.shape.batch, 256, sizeof(float) * call.shape.tokens, stream}));
    TOKENPOOL_TRY(launch_products(call, w, GramPass::kScaledOnly, stream));
  }
  const IterateArgs iterate{iterations_of(plan, call, w), lists_of(w), call.x, w.gram, w.ld, w.stats};
  TOKENPOOL_TRY(launch_iterate(call.dtype, iterate, Launch{call.shape.batch, plan.threads, plan.shared_bytes, stream}));
  return launch_results(call, w, stream);
}

// One launch a step, over all blocks of the device.
int launch_farthest_first(const ClusterCall& call, const Workspace& w, void* stream) {
  const int64_t blocks = call.shape.batch * farthest_chunks(call.shape.tokens);
  for (int step = 0; step <= call.shape.clusters; ++step) {
    const FarthestArgs args{call.shape, call.x,     w.stats,      call.weights, call.mask,
                            w.key,      w.pick_key, w.pick_index, w.chosen,     step};
    TOKENPOOL_TRY(launch_farthest(call.dtype, args, Launch{blocks, 256, 0, stream}));
  }
  return 0;
}

int run_streaming(const CudaPlan& plan, const ClusterCall& call, const Workspace& w, void* stream) {
  TOKENPOOL_TRY(launch_stats(call, w, stream));
  if (w.chosen != nullptr) TOKENPOOL_TRY(launch_farthest_first(call, w, stream));
  TOKENPOOL_TRY(launch_first_assignment(plan, call, w, stream));
  for (int t = 0; t < call.iterations; ++t) {
    if (t > 0) TOKENPOOL_TRY(launch_nearest(plan, call, w, AssignPass::kNext, stream));
    const BucketArgs bucket{call.shape, nullptr, w.stats,         w.label,          w.cost,   w.previous,        w.done,
                            w.loss,     w.order, w.segment_start, w.segment_length, w.bucket, plan.bucket_warps, t};
    TOKENPOOL_TRY(launch_bucket(bucket, Launch{call.shape.batch, plan.threads, plan.shared_bytes, stream}));
    if (call.medoids == nullptr && t + 1 == call.iterations) break;
    const UpdateArgs update{call.shape,       call.x, w.stats, w.mean,  call.weights, w.order,  w.segment_start,
                            w.segment_length, w.done, w.split, w.means, w.norms,      w.medoids};
    TOKENPOOL_TRY(launch_update(call.dtype, update, per_cluster(call.shape, stream)));
  }
  const FinishArgs finish{call.shape, w.stats, w.label,   w.order,         w.segment_start, w.segment_length,
                          w.medoids,  w.rank,  w.arrived, call.assignment, call.medoids,    call.sort};
  TOKENPOOL_TRY(launch_finish(finish, Launch{call.shape.batch, 1024, 0, stream}));
  return launch_results(call, w, stream);
}

// The call restricted to images [first, first + images).
ClusterCall slice(const ClusterCall& call, int64_t first, int64_t images) {
  ClusterCall part = call;
  const int64_t n = call.shape.tokens, k = call.shape.clusters, d = call.shape.features;
  const int64_t size = static_cast<int64_t>(element_size(call.dtype));
  part.shape.batch = images;
  part.x.data = static_cast<const char*>(call.x.data) + first * call.x.stride_batch * size;
  if (call.weights != nullptr) part.weights += first * n;
  if (call.mask != nullptr) part.mask += first * n;
  if (call.counts != nullptr) part.counts += first;
  if (call.init != nullptr) part.init += first * call.init_stride;
  if (call.init_centers != nullptr) part.init_centers += first * k * d;
  part.centers = static_cast<char*>(call.centers) + first * k * d * size;
  part.assignment += first * n;
  part.mass += first * k;
  if (call.medoids != nullptr) part.medoids += first * k;
  if (call.nearest != nullptr) part.nearest += first * k;
  part.inertia += first;
  return part;
}

}  // namespace

int run_clustering(const CudaPlan& plan, const CudaProblem& problem, const ClusterCall& call, void* workspace,
                   void* stream) {
  for (int64_t first = 0; first < call.shape.batch; first += plan.images_per_pass) {
    const int64_t images = std::min(plan.images_per_pass, call.shape.batch - first);
    const ClusterCall part = slice(call, first, images);
    const Workspace w = carve(plan, problem, images, workspace);
    int status = 0;
    switch (plan.path) {
      case CudaPath::kResident:
        status = run_resident(plan, part, w, stream);
        break;
      case CudaPath::kSpread:
        status = run_spread(plan, part, w, stream);
        break;
      case CudaPath::kGram:
        status = run_gram(plan, part, w, stream);
        break;
      case CudaPath::kStreaming:
        status = run_streaming(plan, part, w, stream);
        break;
    }
    if (status != 0) return status;
  }
  return 0;
}

size_t pool_workspace_bytes(const Shape& shape, size_t shared_limit) {
  bool in_global;
  const int warps = bucket_warps_for(shape.clusters, shared_limit, &in_global);
  Carver carver(nullptr);
  carver.take<int>(shape.batch * shape.tokens);
  carver.take<int>(shape.batch * shape.clusters);
  carver.take<int>(shape.batch * shape.clusters);
  if (in_global) carver.take<int>(shape.batch * bucket_words(shape.clusters, warps));
  return carver.used();
}

int run_pool(const PoolCall& call, size_t shared_limit, void* workspace, void* stream) {
  bool in_global;
  const int warps = bucket_warps_for(call.shape.clusters, shared_limit, &in_global);
  Carver carver(workspace);
  BucketArgs bucket{};
  bucket.shape = call.shape;
  bucket.given = call.assignment;
  bucket.order = carver.take<int>(call.shape.batch * call.shape.tokens);
  bucket.segment_start = carver.take<int>(call.shape.batch * call.shape.clusters);
  bucket.segment_length = carver.take<int>(call.shape.batch * call.shape.clusters);
  if (in_global) bucket.scratch = carver.take<int>(call.shape.batch * bucket_words(call.shape.clusters, warps));
  // A short sequence does not fill 32 warps; the result does not depend on how many there are.
  const int used = std::min(warps, std::max(4, (call.shape.tokens + 31) / 32));
  bucket.bucket_warps = used;
  const size_t shared = in_global ? 0 : bucket_bytes(call.shape.clusters, used);
  TOKENPOOL_TRY(launch_bucket(bucket, Launch{call.shape.batch, 32 * used, shared, stream}));
  MeansArgs means{};
  means.shape = call.shape;
  means.x = call.x;
  means.weights = call.weights;
  means.order = bucket.order;
  means.segment_start = bucket.segment_start;
  means.segment_length = bucket.segment_length;
  means.centers = call.centers;
  means.mass = call.mass;
  means.mode = call.mode;
  return launch_means(call.dtype, means, per_cluster(call.shape, stream));
}

int run_pool_backward(DType dtype, PoolBackwardArgs args, int* counts, void* stream) {
  const CountArgs count{args.shape, args.assignment, counts};
  args.counts = counts;
  TOKENPOOL_TRY(launch_count(count, Launch{args.shape.batch, 256, 0, stream}));
  return launch_pool_backward(dtype, args, Launch{divide_up(args.shape.batch * args.shape.tokens, 8), 256, 0, stream});
}

int run_unpool(DType dtype, const UnpoolArgs& args, void* stream) {
  return launch_unpool(dtype, args, Launch{divide_up(args.shape.batch * args.shape.tokens, 8), 256, 0, stream});
}

size_t attention_workspace_bytes(const AttentionArgs& args) {
  Carver carver(nullptr);
  carver.take<float>(args.batch * args.heads * args.keys);
  if (args.lse == nullptr) carver.take<float>(2 * args.batch * args.heads * args.queries);
  return carver.used();
}

int run_attention_received(DType dtype, AttentionArgs args, void* workspace, void* stream) {
  Carver carver(workspace);
  args.parts = carver.take<float>(args.batch * args.heads * args.keys);
  constexpr float kLargest = std::numeric_limits<float>::max();
  args.scale = std::min(std::max(args.scale, -kLargest), kLargest);
  const size_t shared = stage_bytes(dtype, kBlockTile + kAssignClusters, stage_chunk(dtype));
  const int64_t pairs = args.batch * args.heads;
  if (args.lse == nullptr) {
    args.top = carver.take<float>(2 * pairs * args.queries);
    args.logs = args.top + pairs * args.queries;
    TOKENPOOL_TRY(launch_lse(dtype, args, Launch{pairs * divide_up(args.queries, kBlockTile), 256, shared, stream}));
  }
  TOKENPOOL_TRY(
      launch_received(dtype, args, Launch{pairs * divide_up(args.keys, kAssignClusters), 256, shared, stream}));
  return launch_reduce(args, Launch{divide_up(args.batch * args.keys, 256), 256, 0, stream});
}

}  // namespace cuda
}  // namespace tokenpool
