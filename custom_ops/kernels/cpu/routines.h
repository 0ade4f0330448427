// Copyright 2026 The keras_sparse Authors. Licensed under the Apache License, Version 2.0.
//
// Declares every routine of routines.inc for every instruction set, and the reference routines.

#ifndef KERAS_SPARSE_CUSTOM_OPS_KERNELS_CPU_ROUTINES_H_
#define KERAS_SPARSE_CUSTOM_OPS_KERNELS_CPU_ROUTINES_H_

#include "custom_ops/kernels/conv2d.h"

#define KS_ROUTINE(operation, name)                                                              \
  int name##Plan(const KsArguments* arguments, KsPlan* plan);                                    \
  void name##Run(const KsArguments* arguments, const KsPlan* plan, int32_t stage, int64_t begin, \
                 int64_t end, const KsMemory* memory);

namespace ks {
namespace avx512 {
#include "custom_ops/kernels/cpu/routines.inc"
}  // namespace avx512
namespace avx2 {
#include "custom_ops/kernels/cpu/routines.inc"
}  // namespace avx2
namespace baseline {
#include "custom_ops/kernels/cpu/routines.inc"
}  // namespace baseline

// Scalar loops in the order of the formula; one for all operations.
namespace reference {
int Plan(const KsArguments* arguments, KsPlan* plan);
void Run(const KsArguments* arguments, const KsPlan* plan, int32_t stage, int64_t begin,
         int64_t end, const KsMemory* memory);
}  // namespace reference
}  // namespace ks

#undef KS_ROUTINE

#endif  // KERAS_SPARSE_CUSTOM_OPS_KERNELS_CPU_ROUTINES_H_
