// What Python asks of _ops.so outside the ops, in plain C for ctypes (tokenpool_ext/native.py): what was built, what
// would be done, values in memory, and signals. No exception leaves: ctypes knows none.
#include <cstdio>
#include <exception>
#include <new>

#include "cpu/api.h"
#include "cpu/interrupt.h"
#include "paths.h"
#include "planner.h"
#include "planner_cuda.h"
#include "values.h"

static_assert(int(tokenpool::DType::BFloat16) == int(tokenpool::cuda::DType::kBFloat16), "one number for a dtype");

namespace {
// Functions of Python's stable ABI, in the order in which native.py hands them over: this library is linked with none.
struct Python {
  int (*is_initialized)();
  int (*ensure)();
  void (*release)(int);
  int (*check_signals)();
  void (*fetch)(void**, void**, void**);
  void (*restore)(void*, void*, void*);
};
Python python{};
void *raised_type, *raised_value, *raised_traceback;  // what a signal's handler raised inside a call

bool signalled() {
  if (!python.is_initialized()) return false;
  const int state = python.ensure();
  const bool stop = python.check_signals() != 0;
  if (stop) python.fetch(&raised_type, &raised_value, &raised_traceback);
  python.release(state);
  return stop;
}

void write(char* text, int text_bytes, const std::string& from) {
  std::snprintf(text, static_cast<size_t>(text_bytes), "%s", from.c_str());
}
}  // namespace

extern "C" {

void tokenpool_hear_signals(void* const* functions) {
  std::memcpy(&python, functions, sizeof python);
  tokenpool::interrupt_check = signalled;
}

// Raises, once, the exception for which a call stopped, if there is one.
void tokenpool_raise_interruption() {
  void* const type = std::exchange(raised_type, nullptr);
  if (type) python.restore(type, raised_value, raised_traceback);
}

const char* tokenpool_compiler() {
  return __VERSION__;
}

// The name of the instruction set that the CPU kernels use here; 0 where `text` is why there is none.
int tokenpool_cpu_isa(char* text, int text_bytes) {
  try {
    write(text, text_bytes, tokenpool::kernels().name);
    return 1;
  } catch (const std::exception& error) {
    write(text, text_bytes, error.what());
    return 0;
  }
}

// Is one of the float32 or float64 numbers at this address below 0?
bool tokenpool_any_negative(uintptr_t values, int64_t count, int bytes) {
  return bytes == 8 ? tokenpool::any_negative<double>(values, count) : tokenpool::any_negative<float>(values, count);
}

// The least and the largest of the int64 at this address, written to found[0] and found[1].
void tokenpool_extremes(uintptr_t values, int64_t count, int64_t* found) {
  const auto [least, largest] = tokenpool::extremes(values, count);
  found[0] = least;
  found[1] = largest;
}

void tokenpool_fill_strided(uintptr_t indices, int64_t images, int64_t tokens, int64_t clusters) {
  tokenpool::fill_strided(indices, images, tokens, clusters);
}

// 0: no memory.
int tokenpool_fill_largest(uintptr_t indices, uintptr_t scores, int64_t images, int64_t tokens, int64_t clusters) {
  try {
    tokenpool::fill_largest(indices, scores, images, tokens, clusters);
    return 1;
  } catch (const std::bad_alloc&) {
    return 0;
  }
}

// The names of the paths of a backend, in order, a space after each.
void tokenpool_paths(int of_cuda, char* text, int text_bytes) {
  std::string all;
  const auto add = [&all](const auto& names) {
    for (const char* name : names) all += std::string(name) + ' ';
  };
  of_cuda ? add(tokenpool::cuda::kCudaPaths) : add(tokenpool::kCpuPaths);
  write(text, text_bytes, all);
}

// problem: tokens, clusters, features, iterations, acc_bytes, centers_given, farthest, medoids, force_path
// plan:    path, flops, workspace_bytes, gram_ns, direct_ns
// text:    the reason
void tokenpool_plan_cpu(const int64_t* problem, double* plan, char* text, int text_bytes) {
  tokenpool::CpuProblem p;
  p.tokens = problem[0];
  p.clusters = problem[1];
  p.features = problem[2];
  p.iterations = problem[3];
  p.acc_bytes = static_cast<int>(problem[4]);
  p.centers_given = problem[5] != 0;
  p.farthest = problem[6] != 0;
  p.medoids = problem[7] != 0;
  p.force_path = static_cast<int>(problem[8]);
  const tokenpool::CpuPlan found = tokenpool::plan_cpu(p);
  using tokenpool::CpuPath;
  plan[0] = int(found.gram ? CpuPath::kGram : found.center_group == 1 ? CpuPath::kDirect : CpuPath::kGrouped);
  plan[1] = found.flops;
  plan[2] = found.workspace_bytes;
  plan[3] = found.gram_ns;
  plan[4] = found.direct_ns;
  write(text, text_bytes, tokenpool::reason(p, found));
}

}  // extern "C"
