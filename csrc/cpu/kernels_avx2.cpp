// The CPU kernels for processors with AVX2. Standard headers come first: what they define keeps the baseline.
#include "headers.h"
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define TP_ISA avx2
#define TP_VECTOR_BYTES 32
#define TP_ROWS 4     // rows of the register tile
#define TP_VECTORS 3  // its columns, in vectors
#define TP_F16C 1
#include "kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
