// The ways to compute a clustering. The names are what TOKENPOOL_EXT_CPU_PATH and TOKENPOOL_EXT_CUDA_PATH take and what
// tokenpool_ext.explain() says; this is their only place. Plain C++17, no torch.
#pragma once

namespace tokenpool {

enum class CpuPath : int { kGram, kDirect, kGrouped };  // grouped: direct, several centers to a bound
constexpr const char* kCpuPaths[] = {"gram", "direct", "grouped"};

namespace cuda {
enum class CudaPath : int { kResident, kGram, kStreaming, kSpread };
constexpr const char* kCudaPaths[] = {"resident", "gram", "streaming", "spread"};
}  // namespace cuda

}  // namespace tokenpool
