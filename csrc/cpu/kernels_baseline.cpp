// The CPU kernels for any processor: 16-byte vectors (SSE2 on x86-64, NEON on arm64).
#include "headers.h"
#define TP_ISA baseline
#define TP_VECTOR_BYTES 16
#define TP_ROWS 2     // rows of the register tile
#define TP_VECTORS 3  // its columns, in vectors
#include "kernels.h"
