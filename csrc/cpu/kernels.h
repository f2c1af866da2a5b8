// One copy of all CPU kernels, for the instruction set that the including file names.
// No include guard: each kernels_<isa>.cpp includes it once, into a namespace of its own.
namespace tokenpool {
namespace TP_ISA {
#include "vec.h"
#include "convert.h"
#include "gemm.h"
#include "groups.h"
#include "image.h"
#include "result.h"
#include "direct.h"
#include "cluster.h"
#include "assign.h"
#include "pool.h"
#include "attention.h"
}  // namespace TP_ISA

#define TP_NAME_(isa) kernels_##isa
#define TP_NAME(isa) TP_NAME_(isa)
#define TP_STRING_(isa) #isa
#define TP_STRING(isa) TP_STRING_(isa)
extern const Kernels TP_NAME(TP_ISA);
const Kernels TP_NAME(TP_ISA) = {
    TP_STRING(TP_ISA),          TP_ISA::cluster, TP_ISA::assign, TP_ISA::pool, TP_ISA::pool_backward, TP_ISA::unpool,
    TP_ISA::attention_received,
};
}  // namespace tokenpool
