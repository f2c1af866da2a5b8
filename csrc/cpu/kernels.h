// One copy of all CPU kernels, for the instruction set that the including file names, in a namespace of its own.
#pragma once

#include "assign.h"
#include "attention.h"
#include "cluster.h"
#include "pool.h"

namespace tokenpool {

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
