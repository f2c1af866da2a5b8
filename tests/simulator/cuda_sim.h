// Enough of CUDA's vocabulary to compile the kernels of csrc/cuda as plain C++ and run them on one CPU thread.
// Test-only. Every CUDA thread of a block is a fiber; blocks run one after the other.
//
// What it checks, beyond the results: every thread reaches the same barriers (a missing one is reported as a
// deadlock), warp operations are called by all 32 lanes, and, because fibers are introduced to the sanitizers as
// separate threads whose only ordering is the barriers, ThreadSanitizer finds races between threads of a block and
// AddressSanitizer finds bad indices into shared memory and tensors. Shared memory starts as garbage in each block.
#pragma once

#undef _FORTIFY_SOURCE  // its longjmp takes another stack for a mistake
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {
void* __tsan_get_current_fiber(void);
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
}
#define SIM_RELEASE(address) __tsan_release(address)
#define SIM_ACQUIRE(address) __tsan_acquire(address)
#else
#define SIM_RELEASE(address) (void)(address)
#define SIM_ACQUIRE(address) (void)(address)
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_sim {

struct Dim {
  unsigned x, y, z;
};

constexpr int kMaxThreads = 1024;
constexpr int kLanes = 32;

// Where fibers wait for each other. Two slots, used in turn, so that a fast fiber's next arrival cannot be mistaken
// for this one by the race detector.
struct Barrier {
  int expected = 0;
  int arrived = 0;
  unsigned generation = 0;
  int combined[2] = {0, 0};  // or / sum of the values the fibers brought
  char slot[2] = {0, 0};
  int waiting[kMaxThreads];
};

struct Copy {
  void* to;
  const void* from;
};

// Where a fiber, or the host, goes on. Only its first entry needs `context`, whose switch costs a system call.
struct Place {
  ucontext_t context;
  jmp_buf jump;
  bool entered = false;
};

struct Fiber {
  std::vector<Copy> copies;  // asynchronous ones that it has not waited for
  Place place;
  std::unique_ptr<char[]> stack;
  void* tsan = nullptr;
};

constexpr size_t kStackBytes = 128 * 1024;
struct WarpState {
  Barrier barrier;
  uint64_t value[kLanes];
  uint32_t a[kLanes][4];
  uint32_t b[kLanes][2];
  uint32_t row[kLanes][4];
};

// All of the simulator's state. One host thread, so plain members do.
struct Machine {
  std::vector<Fiber> fibers;
  std::vector<WarpState> warps;
  Barrier block_barrier;
  std::function<void()> body;
  Place host;
  void* host_tsan = nullptr;
  int threads = 0;
  int current = 0;
  int unfinished = 0;
  int ready[kMaxThreads];  // ring of threads that can run
  int ready_first = 0;
  int ready_count = 0;
  bool reverse = false;  // order in which threads run between barriers
  Dim block_index{0, 0, 0}, block_dim{1, 1, 1}, grid_dim{1, 1, 1};
  std::unique_ptr<unsigned char[]> shared;
  size_t shared_bytes = 0;
  char start_slot = 0, end_slot = 0, fence_slot = 0;
};

inline Machine& machine() {
  static Machine* instance = new Machine;
  return *instance;
}

#define SIM_HIDDEN __attribute__((noinline, no_sanitize("thread")))

SIM_HIDDEN inline Dim thread_index() {
  return Dim{static_cast<unsigned>(machine().current), 0, 0};
}
SIM_HIDDEN inline Dim block_index() {
  return machine().block_index;
}
SIM_HIDDEN inline Dim block_dim() {
  return machine().block_dim;
}
SIM_HIDDEN inline Dim grid_dim() {
  return machine().grid_dim;
}
SIM_HIDDEN inline unsigned char* dynamic_shared() {
  return machine().shared.get();
}

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_sim: %s (block %u, thread %d)\n", what, machine().block_index.x, machine().current);
  std::abort();
}

SIM_HIDDEN inline void swap_to(Place* from, Place* to, void* to_tsan, Fiber* to_fiber) {
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(to_tsan, 1);  // 1: no ordering between the two
#else
  (void)to_tsan;
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  static const void* host_bottom = nullptr;
  static size_t host_size = 0;
  const void* bottom = to_fiber ? static_cast<const void*>(to_fiber->stack.get()) : host_bottom;
  const size_t size = to_fiber ? kStackBytes : host_size;
  __sanitizer_start_switch_fiber(&fake, bottom, size);
  swapcontext(&from->context, &to->context);
  const void* old_bottom;
  size_t old_size;
  __sanitizer_finish_switch_fiber(fake, &old_bottom, &old_size);
  if (host_bottom == nullptr) {
    host_bottom = old_bottom;
    host_size = old_size;
  }
#elif defined(__SANITIZE_THREAD__)
  (void)to_fiber;
  swapcontext(&from->context, &to->context);
#else
  (void)to_fiber;
  from->entered = true;
  if (_setjmp(from->jump) != 0) return;
  if (to->entered) _longjmp(to->jump, 1);
  setcontext(&to->context);
#endif
}

SIM_HIDDEN inline void make_ready(int thread) {
  Machine& m = machine();
  m.ready[(m.ready_first + m.ready_count++) % kMaxThreads] = thread;
}

// Leaves this fiber for the next one that can run, or for the host when all have finished.
SIM_HIDDEN inline void run_next() {
  Machine& m = machine();
  const int self = m.current;
  if (m.unfinished == 0) return swap_to(&m.fibers[self].place, &m.host, m.host_tsan, nullptr);
  if (m.ready_count == 0) fail("deadlock: some threads wait at a barrier that others never reach");
  const int next = m.ready[m.ready_first];
  m.ready_first = (m.ready_first + 1) % kMaxThreads;
  --m.ready_count;
  m.current = next;
  swap_to(&m.fibers[self].place, &m.fibers[next].place, m.fibers[next].tsan, &m.fibers[next]);
}

enum class Combine { kOr, kSum };

SIM_HIDDEN inline int arrive(Barrier& barrier, int value, Combine combine) {
  Machine& m = machine();
  const unsigned parity = barrier.generation % 2;
  int& total = barrier.combined[parity];
  total = combine == Combine::kOr ? (total | (value != 0)) : total + value;
  SIM_RELEASE(&barrier.slot[parity]);
  if (barrier.arrived + 1 == barrier.expected) {
    for (int i = 0; i < barrier.arrived; ++i) make_ready(barrier.waiting[m.reverse ? barrier.arrived - 1 - i : i]);
    barrier.arrived = 0;
    barrier.combined[1 - parity] = 0;
    ++barrier.generation;
  } else {
    barrier.waiting[barrier.arrived++] = m.current;
    run_next();
  }
  SIM_ACQUIRE(&barrier.slot[parity]);
  return total;
}

SIM_HIDDEN inline WarpState& my_warp() {
  return machine().warps[machine().current / kLanes];
}
SIM_HIDDEN inline int my_lane() {
  return machine().current % kLanes;
}

inline void warp_barrier(unsigned mask) {
  if (mask != 0xffffffffu) fail("a warp operation without all 32 lanes");
  arrive(my_warp().barrier, 0, Combine::kOr);
}

// Every lane publishes `value`; `pick(values)` runs when all are there.
template <typename Pick>
inline auto exchange(unsigned mask, uint64_t value, Pick pick) {
  WarpState& warp = my_warp();
  warp.value[my_lane()] = value;
  warp_barrier(mask);
  auto result = pick(warp.value);
  warp_barrier(mask);
  return result;
}

template <typename T>
inline uint64_t to_bits(T v) {
  static_assert(sizeof(T) <= 8, "shuffles move at most 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &v, sizeof(T));
  return bits;
}

template <typename T>
inline T from_bits(uint64_t bits) {
  T v;
  std::memcpy(&v, &bits, sizeof(T));
  return v;
}

SIM_HIDDEN inline void fiber_main() {
  Machine& m = machine();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  for (;;) {
    SIM_ACQUIRE(&m.start_slot);
    m.body();
    SIM_RELEASE(&m.end_slot);
    if (!m.fibers[m.current].copies.empty()) fail("a thread left the kernel without waiting for its copies");
    if (m.block_barrier.arrived != 0) fail("a thread left the kernel while others wait at __syncthreads");
    --m.unfinished;
    run_next();
  }
}

// Runs body() once per thread of one block.
SIM_HIDDEN inline void run_block(int threads, size_t shared_bytes) {
  Machine& m = machine();
#if defined(__SANITIZE_THREAD__)
  if (m.host_tsan == nullptr) m.host_tsan = __tsan_get_current_fiber();
#endif
  if (threads % kLanes != 0) fail("threads per block must be a multiple of 32");
  while (static_cast<int>(m.fibers.size()) < threads) {
    m.fibers.reserve(kMaxThreads);  // contexts must not move
    m.fibers.emplace_back();
    Fiber& f = m.fibers.back();
    f.stack.reset(new char[kStackBytes]);
    ucontext_t& context = f.place.context;
    getcontext(&context);
    context.uc_stack.ss_sp = f.stack.get();
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, reinterpret_cast<void (*)()>(&fiber_main), 0);
#if defined(__SANITIZE_THREAD__)
    f.tsan = __tsan_create_fiber(0);
#endif
  }
  m.shared_bytes = shared_bytes;
  m.shared.reset(new unsigned char[shared_bytes + 1]);
  std::memset(m.shared.get(), 0xff, shared_bytes);  // NaN, -1
  m.threads = threads;
  m.unfinished = threads;
  m.block_barrier.expected = threads;
  m.warps.resize(kMaxThreads / kLanes);
  for (WarpState& w : m.warps) w.barrier.expected = kLanes;
  m.ready_first = m.ready_count = 0;
  for (int t = 1; t < threads; ++t) make_ready(m.reverse ? threads - 1 - t : t);
  m.current = m.reverse ? threads - 1 : 0;
  SIM_RELEASE(&m.start_slot);
  swap_to(&m.host, &m.fibers[m.current].place, m.fibers[m.current].tsan, &m.fibers[m.current]);
  SIM_ACQUIRE(&m.end_slot);
}

// A whole launch; body() is one thread. Blocks run in ascending order, or descending with `reverse`.
inline int launch(std::function<void()> body, int64_t blocks, int threads, size_t shared_bytes) {
  Machine& m = machine();
  // A short grid also exercises the kernels' loops over the work that does not fit it.
  const int64_t grid = std::min<int64_t>(blocks, 3);
  if (grid <= 0) return 0;
  m.body = std::move(body);
  m.block_dim = Dim{static_cast<unsigned>(threads), 1, 1};
  m.grid_dim = Dim{static_cast<unsigned>(grid), 1, 1};
  for (int64_t i = 0; i < grid; ++i) {
    m.block_index = Dim{static_cast<unsigned>(m.reverse ? grid - 1 - i : i), 0, 0};
    run_block(threads, shared_bytes);
  }
  m.body = nullptr;
  return 0;
}

template <typename Args>
int launch(void (*kernel)(Args), const Args& args, int64_t blocks, int threads, size_t shared_bytes) {
  return launch([kernel, args] { kernel(args); }, blocks, threads, shared_bytes);
}

}  // namespace cuda_sim

#define __global__ inline
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)
#define TOKENPOOL_DYNAMIC_SHARED(name) unsigned char* name = ::cuda_sim::dynamic_shared()

#define threadIdx (::cuda_sim::thread_index())
#define blockIdx (::cuda_sim::block_index())
#define blockDim (::cuda_sim::block_dim())
#define gridDim (::cuda_sim::grid_dim())

inline void __syncthreads() {
  cuda_sim::arrive(cuda_sim::machine().block_barrier, 0, cuda_sim::Combine::kOr);
}
inline int __syncthreads_or(int v) {
  return cuda_sim::arrive(cuda_sim::machine().block_barrier, v, cuda_sim::Combine::kOr);
}
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  cuda_sim::warp_barrier(mask);
}

template <typename T>
inline T __shfl_sync(unsigned mask, T v, int lane) {
  return cuda_sim::from_bits<T>(
      cuda_sim::exchange(mask, cuda_sim::to_bits(v), [&](const uint64_t* all) { return all[lane & 31]; }));
}
template <typename T>
inline T __shfl_xor_sync(unsigned mask, T v, int offset) {
  return __shfl_sync(mask, v, cuda_sim::my_lane() ^ offset);
}
template <typename T>
inline T __shfl_up_sync(unsigned mask, T v, int offset) {
  const int lane = cuda_sim::my_lane();
  return __shfl_sync(mask, v, lane >= offset ? lane - offset : lane);
}
template <typename T>
inline unsigned __match_any_sync(unsigned mask, T v) {
  const uint64_t mine = cuda_sim::to_bits(v);
  return cuda_sim::exchange(mask, mine, [&](const uint64_t* all) {
    unsigned peers = 0;
    for (int l = 0; l < 32; ++l) peers |= static_cast<unsigned>(all[l] == mine) << l;
    return peers;
  });
}
inline int __reduce_max_sync(unsigned mask, int v) {
  return cuda_sim::exchange(mask, cuda_sim::to_bits(v), [](const uint64_t* all) {
    int best = cuda_sim::from_bits<int>(all[0]);
    for (int l = 1; l < 32; ++l) best = std::max(best, cuda_sim::from_bits<int>(all[l]));
    return best;
  });
}
inline int __reduce_min_sync(unsigned mask, int v) {
  return cuda_sim::exchange(mask, cuda_sim::to_bits(v), [](const uint64_t* all) {
    int best = cuda_sim::from_bits<int>(all[0]);
    for (int l = 1; l < 32; ++l) best = std::min(best, cuda_sim::from_bits<int>(all[l]));
    return best;
  });
}
inline int __popc(unsigned v) {
  return __builtin_popcount(v);
}

// What a thread wrote before its fence is seen by a thread whose fence comes later.
inline void __threadfence() {
  SIM_RELEASE(&cuda_sim::machine().fence_slot);
  SIM_ACQUIRE(&cuda_sim::machine().fence_slot);
}
template <typename T>
inline T __ldcg(const T* p) {
  return *p;
}

inline int atomicAdd(int* p, int v) {
  return __atomic_fetch_add(p, v, __ATOMIC_RELAXED);
}
inline int atomicMin(int* p, int v) {
  int old = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (v < old && !__atomic_compare_exchange_n(p, &old, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}

inline unsigned __float_as_uint(float v) {
  return static_cast<unsigned>(cuda_sim::to_bits(v));
}
inline float __uint_as_float(unsigned v) {
  return cuda_sim::from_bits<float>(v);
}

using std::max;
using std::min;

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 v) {
  return __uint_as_float(static_cast<unsigned>(v.bits) << 16);
}
inline __nv_bfloat16 __float2bfloat16_rn(float v) {
  const unsigned u = __float_as_uint(v);
  if (v != v) return {static_cast<uint16_t>(0x7fff)};
  return {static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}

inline float __half2float(__half v) {
  const int exponent = (v.bits >> 10) & 31, fraction = v.bits & 1023;
  float magnitude;
  if (exponent == 31)
    magnitude = fraction ? NAN : INFINITY;
  else
    magnitude = exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                              : std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
  return v.bits & 0x8000 ? -magnitude : magnitude;
}
inline __half __float2half_rn(float v) {
  const uint16_t sign = static_cast<uint16_t>((__float_as_uint(v) >> 16) & 0x8000u);
  const float m = std::fabs(v);
  if (v != v) return {static_cast<uint16_t>(0x7fff)};
  if (m >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  int exponent;
  std::frexp(m, &exponent);  // m in [2^(exponent-1), 2^exponent)
  const int unit = std::max(exponent - 11, -24);
  const int steps = static_cast<int>(std::nearbyint(std::ldexp(m, -unit)));  // ties to even
  // A number below 2^-14 has `steps` as its bits; above, the leading one is implied.
  const int biased = unit + 24;
  return {static_cast<uint16_t>(sign | (m == 0.0f ? 0 : (biased << 10) + steps))};
}

namespace cuda_sim {

inline float widen(uint16_t bits, __half) {
  return __half2float(__half{bits});
}
inline float widen(uint16_t bits, __nv_bfloat16) {
  return __bfloat162float(__nv_bfloat16{bits});
}

}  // namespace cuda_sim

// An asynchronous copy happens when its thread waits for it, and no earlier; until then nobody may count on what was
// there.
inline void copy_async(void* shared, const void* global) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16)
    cuda_sim::fail("a misaligned 16-byte copy");
  cuda_sim::Machine& m = cuda_sim::machine();
  std::memset(shared, 0xff, 16);
  m.fibers[m.current].copies.push_back({shared, global});
}

inline void wait_for_copies() {
  cuda_sim::Machine& m = cuda_sim::machine();
  for (const cuda_sim::Copy& copy : m.fibers[m.current].copies) std::memcpy(copy.to, copy.from, 16);
  m.fibers[m.current].copies.clear();
}

inline unsigned thread_index_anew() {
  return threadIdx.x;
}

typedef unsigned char* SharedAddress;
inline SharedAddress shared_address(const void* p) {
  return static_cast<unsigned char*>(const_cast<void*>(p));
}

// Rows of four 8 x 8 matrices, one address a lane; every lane gets two elements of each.
inline void load_matrices(uint32_t (&d)[4], const unsigned char* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) cuda_sim::fail("a misaligned row of a matrix");
  cuda_sim::WarpState& warp = cuda_sim::my_warp();
  const int lane = cuda_sim::my_lane();
  std::memcpy(warp.row[lane], row, 16);
  cuda_sim::warp_barrier(0xffffffffu);
  for (int m = 0; m < 4; ++m) d[m] = warp.row[8 * m + lane / 4][lane % 4];
  cuda_sim::warp_barrier(0xffffffffu);
}

// The tensor-core step, from the register layout of PTX's mma.m16n8k16: products exact, summed in feature order.
template <typename T>
inline void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], T type) {
  cuda_sim::WarpState& warp = cuda_sim::my_warp();
  const int lane = cuda_sim::my_lane();
  for (int e = 0; e < 4; ++e) warp.a[lane][e] = a[e];
  for (int e = 0; e < 2; ++e) warp.b[lane][e] = b[e];
  cuda_sim::warp_barrier(0xffffffffu);
  for (int e = 0; e < 4; ++e) {
    const int row = lane / 4 + 8 * (e / 2), column = 2 * (lane % 4) + e % 2;
    double sum = d[e];
    for (int k = 0; k < 16; ++k) {
      const int pair = k % 8 / 2, upper = k / 8, side = 16 * (k % 2);
      const uint32_t wa = warp.a[4 * (row % 8) + pair][row / 8 + 2 * upper];
      const uint32_t wb = warp.b[4 * column + pair][upper];
      sum += static_cast<double>(cuda_sim::widen(static_cast<uint16_t>(wa >> side), type)) *
             static_cast<double>(cuda_sim::widen(static_cast<uint16_t>(wb >> side), type));
    }
    d[e] = static_cast<float>(sum);
  }
  cuda_sim::warp_barrier(0xffffffffu);
}
