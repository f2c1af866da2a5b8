// How the .cu files launch a kernel.
#pragma once

#include <cuda_runtime.h>

#include "launchers.h"

namespace tokenpool {
namespace cuda {

// Kernels loop over the work that does not fit the grid, so the cap changes no result.
template <typename Args>
int launch_kernel(void (*kernel)(Args), const Args& args, const Launch& launch) {
  if (launch.blocks <= 0) return 0;
  if (launch.shared_bytes > 48 * 1024) {
    const cudaError_t status = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                    cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                    static_cast<int>(launch.shared_bytes));
    if (status != cudaSuccess) return status;
  }
  const unsigned grid = launch.blocks > INT32_MAX ? INT32_MAX : static_cast<unsigned>(launch.blocks);
  kernel<<<grid, launch.threads, launch.shared_bytes, static_cast<cudaStream_t>(launch.stream)>>>(args);
  return cudaGetLastError();
}

}  // namespace cuda
}  // namespace tokenpool

// Calls launch_kernel with the instantiation of `kernel` for `dtype`.
#define TOKENPOOL_LAUNCH_TYPED(kernel, dtype, args, launch)                          \
  do {                                                                               \
    switch (dtype) {                                                                 \
      case DType::kFloat32:                                                          \
        return launch_kernel(kernel<float>, args, launch);                           \
      case DType::kFloat16:                                                          \
        return launch_kernel(kernel<__half>, args, launch);                          \
      case DType::kBFloat16:                                                         \
        return launch_kernel(kernel<__nv_bfloat16>, args, launch);                   \
    }                                                                                \
    return cudaErrorInvalidValue;                                                    \
  } while (false)
