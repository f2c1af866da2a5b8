// The launchers of csrc/cuda on the simulator, and a plain C interface to the same pipeline the CUDA library runs.
#define TOKENPOOL_CUDA_SIM 1

#include "cuda_sim.h"

#include "../../csrc/cuda/assign.cuh"
#include "../../csrc/cuda/attention.cuh"
#include "../../csrc/cuda/bucket.cuh"
#include "../../csrc/cuda/gram.cuh"
#include "../../csrc/cuda/iterate.cuh"
#include "../../csrc/cuda/launchers.h"
#include "../../csrc/cuda/means.cuh"
#include "../../csrc/cuda/pipeline.h"
#include "../../csrc/cuda/pool_ops.cuh"
#include "../../csrc/cuda/resident.cuh"
#include "../../csrc/cuda/spread.cuh"
#include "../../csrc/cuda/stats.cuh"
#include "../../csrc/cuda/workspace.h"

namespace tokenpool {
namespace cuda {

namespace {

template <typename Args>
int simulate(void (*kernel)(Args), const Args& args, const Launch& launch) {
  return cuda_sim::launch(kernel, args, launch.blocks, launch.threads, launch.shared_bytes);
}

}  // namespace

#define SIM_TYPED(name, Args)                                              \
  int launch_##name(DType dtype, const Args& args, const Launch& launch) { \
    switch (dtype) {                                                       \
      case DType::kFloat32:                                                \
        return simulate(name##_kernel<float>, args, launch);               \
      case DType::kFloat16:                                                \
        return simulate(name##_kernel<__half>, args, launch);              \
      case DType::kBFloat16:                                               \
        return simulate(name##_kernel<__nv_bfloat16>, args, launch);       \
    }                                                                      \
    return 1;                                                              \
  }
#define SIM_PLAIN(name, Args)                                 \
  int launch_##name(const Args& args, const Launch& launch) { \
    return simulate(name##_kernel, args, launch);             \
  }

SIM_TYPED(absmax, StatsArgs)
SIM_TYPED(center, StatsArgs)
SIM_TYPED(gram, GramArgs)
SIM_TYPED(measure, MeasureArgs)
SIM_TYPED(iterate, IterateArgs)
SIM_TYPED(resident, ResidentArgs)
SIM_PLAIN(token_mean, TokenMeanArgs)
SIM_TYPED(spread_gram, SpreadGramArgs)
SIM_TYPED(spread, SpreadArgs)
SIM_TYPED(farthest, FarthestArgs)
SIM_TYPED(gather, GatherArgs)
SIM_TYPED(assign, AssignArgs)
SIM_PLAIN(bucket, BucketArgs)
SIM_TYPED(update, UpdateArgs)
SIM_PLAIN(finish, FinishArgs)
SIM_TYPED(means, MeansArgs)
SIM_PLAIN(count, CountArgs)
SIM_TYPED(pool_backward, PoolBackwardArgs)
SIM_TYPED(lse, AttentionArgs)
SIM_TYPED(received, AttentionArgs)
SIM_PLAIN(reduce, AttentionArgs)

int launch_unpool(DType dtype, const UnpoolArgs& args, const Launch& launch) {
  return element_size(dtype) == 2 ? simulate(unpool_kernel<uint16_t>, args, launch)
                                  : simulate(unpool_kernel<uint32_t>, args, launch);
}

namespace {

// A workspace full of NaN: what is read before it is written shows.
std::unique_ptr<unsigned char[]> garbage(size_t bytes) {
  std::unique_ptr<unsigned char[]> memory(new unsigned char[bytes + 1]);
  std::memset(memory.get(), 0xff, bytes);
  return memory;
}

Tokens tokens_of(const void* data, const int64_t* strides) {
  return Tokens{data, strides[0], strides[1], strides[2], static_cast<int>(strides[3])};
}

template <typename T>
const T* as(const void* p) {
  return static_cast<const T*>(p);
}
template <typename T>
T* out(const void* p) {
  return static_cast<T*>(const_cast<void*>(p));
}

}  // namespace
}  // namespace cuda
}  // namespace tokenpool

using namespace tokenpool::cuda;

extern "C" {

// Order in which blocks, and threads between barriers, run.
void sim_set_reverse(int reverse) {
  cuda_sim::machine().reverse = reverse != 0;
}

// numbers: B, N, D, K, dtype, x strides (3), vectorised, iterations, sort, with_medoids, major, minor, shared_limit,
// force_path, images_per_pass (0: the planner's), sm_count, init_stride. Returns the path taken, or -1.
int sim_cluster(const int64_t* n, const void* const* p) {
  CudaProblem problem;
  problem.batch = n[0];
  problem.tokens = static_cast<int>(n[1]);
  problem.features = static_cast<int>(n[2]);
  problem.clusters = static_cast<int>(n[3]);
  problem.dtype = static_cast<DType>(n[4]);
  problem.iterations = static_cast<int>(n[9]);
  problem.with_medoids = n[11] != 0;
  problem.per_image_k = p[3] != nullptr;
  problem.init_is_centers = p[5] != nullptr;
  problem.farthest = p[4] == nullptr && p[5] == nullptr;
  problem.major = static_cast<int>(n[12]);
  problem.minor = static_cast<int>(n[13]);
  problem.shared_limit = static_cast<size_t>(n[14]);
  problem.force_path = static_cast<int>(n[15]);
  problem.sm_count = static_cast<int>(n[17]);
  CudaPlan plan = plan_cuda(problem);
  if (n[16] > 0) plan.images_per_pass = n[16];
  ClusterCall call{};
  call.shape = Shape{n[0], problem.tokens, problem.features, problem.clusters};
  call.dtype = problem.dtype;
  call.x = tokens_of(p[0], n + 5);
  call.weights = as<float>(p[1]);
  call.mask = as<uint8_t>(p[2]);
  call.counts = as<int64_t>(p[3]);
  call.init = as<int64_t>(p[4]);
  call.init_stride = n[18];
  call.init_centers = as<float>(p[5]);
  call.iterations = problem.iterations;
  call.sort = static_cast<int>(n[10]);
  call.centers = out<void>(p[6]);
  call.assignment = out<int64_t>(p[7]);
  call.mass = out<float>(p[8]);
  call.medoids = problem.with_medoids ? out<int64_t>(p[9]) : nullptr;
  call.nearest = problem.with_medoids ? nullptr : out<int64_t>(p[9]);
  call.inertia = out<float>(p[10]);
  const auto memory = garbage(workspace_bytes(plan, problem, plan.images_per_pass));
  return run_clustering(plan, problem, call, memory.get(), nullptr) == 0 ? static_cast<int>(plan.path) : -1;
}

// numbers: B, N, D, K, dtype, x strides (3), vectorised, mode, shared_limit.
int sim_pool(const int64_t* n, const void* const* p) {
  PoolCall call{};
  call.shape = Shape{n[0], static_cast<int>(n[1]), static_cast<int>(n[2]), static_cast<int>(n[3])};
  call.dtype = static_cast<DType>(n[4]);
  call.x = tokens_of(p[0], n + 5);
  call.assignment = as<int64_t>(p[1]);
  call.weights = as<float>(p[2]);
  call.mode = static_cast<MeansMode>(n[9]);
  call.centers = out<void>(p[3]);
  call.mass = out<float>(p[4]);
  const size_t limit = static_cast<size_t>(n[10]);
  const auto memory = garbage(pool_workspace_bytes(call.shape, limit));
  return run_pool(call, limit, memory.get(), nullptr);
}

// numbers: B, N, D, K, dtype, strides and vectorised (4 each) of x, grad_centers, centers.
int sim_pool_backward(const int64_t* n, const void* const* p) {
  PoolBackwardArgs args{};
  args.shape = Shape{n[0], static_cast<int>(n[1]), static_cast<int>(n[2]), static_cast<int>(n[3])};
  args.x = tokens_of(p[0], n + 5);
  args.grad_centers = tokens_of(p[1], n + 9);
  args.centers = tokens_of(p[2], n + 13);
  args.assignment = as<int64_t>(p[3]);
  args.weights = as<float>(p[4]);
  args.mass = as<float>(p[5]);
  args.grad_x = out<void>(p[6]);
  args.grad_weights = out<float>(p[7]);
  const auto memory = garbage(sizeof(int) * static_cast<size_t>(n[0] * n[3]));
  return run_pool_backward(static_cast<DType>(n[4]), args, reinterpret_cast<int*>(memory.get()), nullptr);
}

// numbers: B, N, D, K, dtype, centers strides (3), vectorised.
int sim_unpool(const int64_t* n, const void* const* p) {
  UnpoolArgs args{};
  args.shape = Shape{n[0], static_cast<int>(n[1]), static_cast<int>(n[2]), static_cast<int>(n[3])};
  args.centers = tokens_of(p[0], n + 5);
  args.assignment = as<int64_t>(p[1]);
  args.output = out<void>(p[2]);
  return run_unpool(static_cast<DType>(n[4]), args, nullptr);
}

// numbers: B, H, Nq, N, d, dtype, q strides (image, token, feature), vectorised, q head stride, the same five of k.
int sim_attention_received(const int64_t* n, float scale, const void* const* p) {
  AttentionArgs args{};
  args.batch = n[0];
  args.heads = static_cast<int>(n[1]);
  args.queries = static_cast<int>(n[2]);
  args.keys = static_cast<int>(n[3]);
  args.features = static_cast<int>(n[4]);
  args.q = tokens_of(p[0], n + 6);
  args.q_stride_head = n[10];
  args.k = tokens_of(p[1], n + 11);
  args.k_stride_head = n[15];
  args.scale = scale;
  args.lse = as<float>(p[2]);
  args.received = out<float>(p[3]);
  const auto memory = garbage(attention_workspace_bytes(args));
  return run_attention_received(static_cast<DType>(n[5]), args, memory.get(), nullptr);
}
}
