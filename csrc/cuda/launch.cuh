// How the .cu files launch a kernel.
#pragma once

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <utility>

#include "launchers.h"

namespace tokenpool {
namespace cuda {

// An error of a call that is answered here must not come back from the next launch's cudaGetLastError().
inline cudaError_t forget(cudaError_t status) {
  if (status != cudaSuccess) (void)cudaGetLastError();
  return status;
}

// Lets a kernel have so much dynamic shared memory on the current device. What it once had stays allowed: another host
// thread may be about to launch it with that.
inline cudaError_t allow_shared(const void* kernel, size_t bytes) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, size_t> allowed;
  int device = 0;
  const cudaError_t found = forget(cudaGetDevice(&device));
  if (found != cudaSuccess) return found;
  const std::lock_guard<std::mutex> lock(mutex);
  size_t& most = allowed[{kernel, device}];
  if (bytes <= most) return cudaSuccess;
  const cudaError_t status =
      forget(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
  if (status != cudaSuccess) return status;
  most = bytes;
  // Several blocks of this kernel want all of a multiprocessor's shared memory. Only a hint: without it they still run.
  forget(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
  return cudaSuccess;
}

// Kernels loop over the work that does not fit the grid, so the cap changes no result.
template <typename Args>
int launch_kernel(void (*kernel)(Args), const Args& args, const Launch& launch) {
  if (launch.blocks <= 0) return 0;
  if (launch.shared_bytes > 40 * 1024) {  // with its static shared memory a kernel has 48 KB without asking
    const cudaError_t status = allow_shared(reinterpret_cast<const void*>(kernel), launch.shared_bytes);
    if (status != cudaSuccess) return status;
  }
  const unsigned grid = launch.blocks > INT32_MAX ? INT32_MAX : static_cast<unsigned>(launch.blocks);
  kernel<<<grid, launch.threads, launch.shared_bytes, static_cast<cudaStream_t>(launch.stream)>>>(args);
  return cudaGetLastError();
}

}  // namespace cuda
}  // namespace tokenpool

// Calls launch_kernel with the instantiation of `kernel` for `dtype`.
#define TOKENPOOL_LAUNCH_TYPED(kernel, dtype, args, launch)        \
  do {                                                             \
    switch (dtype) {                                               \
      case DType::kFloat32:                                        \
        return launch_kernel(kernel<float>, args, launch);         \
      case DType::kFloat16:                                        \
        return launch_kernel(kernel<__half>, args, launch);        \
      case DType::kBFloat16:                                       \
        return launch_kernel(kernel<__nv_bfloat16>, args, launch); \
    }                                                              \
    return cudaErrorInvalidValue;                                  \
  } while (false)
