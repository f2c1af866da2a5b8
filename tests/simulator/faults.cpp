// Kernels that are wrong on purpose: the simulator and the sanitizers must say so. Argument: race, deadlock, bounds,
// divergent; "fine" runs a right one.
#include <cstdio>
#include <string>

#include "cuda_sim.h"

namespace {

struct Args {
  int* out;
  int fault;  // 0 fine, 1 race, 2 deadlock, 3 bounds, 4 divergent warp operation
};

void kernel(Args a) {
  TOKENPOOL_DYNAMIC_SHARED(memory);
  int* shared = reinterpret_cast<int*>(memory);
  const int t = static_cast<int>(threadIdx.x);
  shared[a.fault == 3 ? t + 32 : t] = t;
  if (a.fault != 1) __syncthreads();
  const int other = shared[(t + 32) % 64];
  if (a.fault == 2 && t == 5) return;
  __syncthreads();
  int lanes = 1;
  if (a.fault != 4 || t % 32 < 16) lanes = __popc(__match_any_sync(0xffffffffu, 0));
  __syncthreads();
  a.out[t] = other + lanes;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "fine";
  const int fault = what == "race" ? 1 : what == "deadlock" ? 2 : what == "bounds" ? 3 : what == "divergent" ? 4 : 0;
  int out[64] = {};
  cuda_sim::launch(kernel, Args{out, fault}, 1, 64, 64 * sizeof(int));
  bool right = true;
  for (int t = 0; t < 64; ++t) right = right && out[t] == (t + 32) % 64 + 32;
  std::printf("%s\n", right ? "right" : "wrong");
  return 0;
}
