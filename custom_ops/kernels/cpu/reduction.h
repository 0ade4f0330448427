// Copyright 2026 The keras_sparse Authors. Licensed under the Apache License, Version 2.0.
//
// What the two filter gradients share: they reduce over all pixels of the batch. The pixels are cut
// into parts, each with sums of its own; a last stage adds the parts in order. Their number is
// fixed by the sizes, so that the result does not depend on the number of threads.

#ifndef KERAS_SPARSE_CUSTOM_OPS_KERNELS_CPU_REDUCTION_H_
#define KERAS_SPARSE_CUSTOM_OPS_KERNELS_CPU_REDUCTION_H_

#include "custom_ops/kernels/conv2d.h"
#include "custom_ops/kernels/cpu/planes.h"

namespace ks {
namespace KS_ISA {

struct Parts {
  int64_t count;
  int64_t size;  // Sums of one part.
};

constexpr int64_t kSumsOfItem = 1024;

// The sums of all parts stay below 64 MB, unless one part alone takes more.
KS_INLINE int64_t MostParts(int64_t size) {
  return Max(1, (int64_t{64} << 20) / (4 * Max(1, size)));
}
KS_INLINE Parts MakeParts(int64_t count, int64_t size) { return {count, size}; }

// A single part goes straight to the result.
KS_INLINE int64_t PartsBytes(const Parts& parts) {
  return parts.count > 1 ? PieceBytes(parts.count * parts.size, 4) : 0;
}
KS_INLINE float* PartSums(const Parts& parts, int64_t part, float* sums, float* result) {
  return parts.count > 1 ? sums + part * parts.size : result;
}
KS_INLINE void PlanPartsStage(const Parts& parts, KsStage* stage) {
  stage->items = parts.count > 1 ? CeilDiv(parts.size, kSumsOfItem) : 0;
  stage->cost = 64 * parts.count;
}

// The last stage: result = part 0 + part 1 + ...
KS_INLINE void AddParts(const Parts& parts, int64_t begin, int64_t end, const float* sums,
                        float* result) {
  const int64_t last = Min(end * kSumsOfItem, parts.size);
  for (int64_t i = begin * kSumsOfItem; i < last; ++i) {
    float sum = sums[i];
    for (int64_t p = 1; p < parts.count; ++p) sum += sums[p * parts.size + i];
    result[i] = sum;
  }
}

}  // namespace KS_ISA
}  // namespace ks

#endif  // KERAS_SPARSE_CUSTOM_OPS_KERNELS_CPU_REDUCTION_H_
