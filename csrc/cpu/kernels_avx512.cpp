// The CPU kernels for processors with AVX-512 and its 16-bit dot products (VNNI). Standard headers come first: what
// they define keeps the baseline.
#include "headers.h"
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")
#endif
#define TP_ISA avx512
#define TP_VECTOR_BYTES 64
#define TP_ROWS 8     // rows of the register tile
#define TP_VECTORS 2  // its columns, in vectors
#define TP_F16C 1
#include "kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
