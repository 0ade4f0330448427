// Copyright 2026 The keras_sparse Authors. Licensed under the Apache License, Version 2.0.
//
// Checks arguments and chooses routines. Compiled without instruction-set flags.

#include <stdlib.h>
#include <string.h>

#include "custom_ops/kernels/conv2d.h"
#include "custom_ops/kernels/cpu/routines.h"

namespace {

// Every routine, best instruction set first.
#define KS_ROUTINE(operation, name) \
  {operation, #name, KS_ISA_NAME, KS_ISA_NAMESPACE::name##Plan, KS_ISA_NAMESPACE::name##Run},
const KsRoutine kRoutines[] = {
#ifdef KS_HAVE_AVX512
#define KS_ISA_NAME "avx512"
#define KS_ISA_NAMESPACE ks::avx512
#include "custom_ops/kernels/cpu/routines.inc"
#undef KS_ISA_NAME
#undef KS_ISA_NAMESPACE
#endif
#ifdef KS_HAVE_AVX2
#define KS_ISA_NAME "avx2"
#define KS_ISA_NAMESPACE ks::avx2
#include "custom_ops/kernels/cpu/routines.inc"
#undef KS_ISA_NAME
#undef KS_ISA_NAMESPACE
#endif
#define KS_ISA_NAME "baseline"
#define KS_ISA_NAMESPACE ks::baseline
#include "custom_ops/kernels/cpu/routines.inc"
#undef KS_ISA_NAME
#undef KS_ISA_NAMESPACE
#undef KS_ROUTINE
#define KS_ROUTINE(operation, name) \
  {operation, "Reference", "reference", ks::reference::Plan, ks::reference::Run},
#include "custom_ops/kernels/cpu/routines.inc"
#undef KS_ROUTINE
};
constexpr int kNumRoutines = sizeof(kRoutines) / sizeof(kRoutines[0]);

bool CpuHas(const char* isa) {
#if defined(KS_HAVE_AVX512) || defined(KS_HAVE_AVX2)
  __builtin_cpu_init();
#endif
#ifdef KS_HAVE_AVX512
  if (strcmp(isa, "avx512") == 0) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  }
#endif
#ifdef KS_HAVE_AVX2
  if (strcmp(isa, "avx2") == 0) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  }
#endif
  return strcmp(isa, "baseline") == 0 || strcmp(isa, "reference") == 0;
}

// The first routine this CPU can run; all that follow it run as well.
int FirstAvailable() {
  int i = 0;
  while (!CpuHas(kRoutines[i].isa)) ++i;
  return i;
}

// The first routine in use: KERAS_SPARSE_ISA may only name a lower instruction set, since a higher
// one would fault. An unknown name is ignored.
int FirstUsed() {
  const int first = FirstAvailable();
  const char* forced = getenv("KERAS_SPARSE_ISA");
  if (forced == nullptr) return first;
  for (int i = first; i < kNumRoutines; ++i) {
    if (strcmp(kRoutines[i].isa, forced) == 0) return i;
  }
  return first;
}

const int first_available = FirstAvailable();
const int first_used = FirstUsed();

bool IsConnection(KsOperation operation) { return operation < KS_THINNED_CONV2D; }

// Whether the product of non-negative factors is at most `limit`.
bool ProductFits(const int64_t* factors, int count, int64_t limit) {
  int64_t product = 1;
  for (int i = 0; i < count; ++i) {
    if (factors[i] == 0) return true;
  }
  for (int i = 0; i < count; ++i) {
    if (__builtin_mul_overflow(product, factors[i], &product) || product > limit) return false;
  }
  return true;
}

KsStatus CheckSizes(const KsArguments& a) {
  const KsGeometry& g = a.geometry;
  const int64_t none_negative[] = {g.batch,      g.in_height, g.in_width,     g.in_channels,
                                   g.out_height, g.out_width, g.out_channels, g.pad_top,
                                   g.pad_left,   a.kept};
  for (int64_t size : none_negative) {
    if (size < 0) return KS_BAD_SIZE;
  }
  const int64_t all_positive[] = {g.kernel_height, g.kernel_width,    g.stride_height,
                                  g.stride_width,  g.dilation_height, g.dilation_width};
  for (int64_t size : all_positive) {
    if (size < 1) return KS_BAD_SIZE;
    if (size > INT32_MAX) return KS_TOO_LARGE;
  }
  if (a.pool < 0 ||
      (a.pool > 1 && (a.operation != KS_CONNECTION_CONV2D || a.residual != nullptr))) {
    return KS_BAD_SIZE;
  }
  // Positions along an axis stay below 2^40, tensors below 2^60 elements: products of a few of
  // them with small constants then fit 64 bits.
  constexpr int64_t kMaxPosition = int64_t{1} << 40;
  constexpr int64_t kMaxElements = int64_t{1} << 60;
  const int64_t input[] = {g.batch, g.in_height, g.in_width, g.in_channels};
  const int64_t output[] = {g.batch, g.out_height, g.out_width, g.out_channels};
  for (int i = 0; i < 4; ++i) {
    if (input[i] > kMaxPosition || output[i] > kMaxPosition) return KS_TOO_LARGE;
  }
  if (g.in_channels > INT32_MAX || g.out_channels > INT32_MAX || a.kept > INT32_MAX) {
    return KS_TOO_LARGE;
  }
  if (g.pad_top > kMaxPosition || g.pad_left > kMaxPosition) return KS_TOO_LARGE;
  const int64_t filter[] = {a.kept, IsConnection(a.operation) ? g.kernel_height : g.out_channels,
                            IsConnection(a.operation) ? g.kernel_width : 1};
  const int64_t high_reach[] = {g.kernel_height, g.dilation_height};
  const int64_t wide_reach[] = {g.kernel_width, g.dilation_width};
  const int64_t high_steps[] = {g.out_height, g.stride_height};
  const int64_t wide_steps[] = {g.out_width, g.stride_width};
  const int64_t rows[] = {g.kernel_height, g.kernel_width, g.in_channels};
  if (!ProductFits(input, 4, kMaxElements) || !ProductFits(output, 4, kMaxElements) ||
      !ProductFits(filter, 3, kMaxElements) || !ProductFits(high_reach, 2, kMaxPosition) ||
      !ProductFits(wide_reach, 2, kMaxPosition) || !ProductFits(high_steps, 2, kMaxPosition) ||
      !ProductFits(wide_steps, 2, kMaxPosition)) {
    return KS_TOO_LARGE;
  }
  // Rows of the lowered matrix are named by 32-bit indices.
  if (!IsConnection(a.operation) && !ProductFits(rows, 3, INT32_MAX)) return KS_TOO_LARGE;
  return KS_OK;
}

KsStatus CheckTable(const KsArguments& a, int64_t* position) {
  const int64_t rows = a.geometry.out_channels;
  for (int64_t o = 0; o <= rows; ++o) {
    const int64_t value = a.row_splits[o];
    const bool good = value >= (o == 0 ? 0 : a.row_splits[o - 1]) && value <= a.kept &&
                      (o != 0 || value == 0) && (o != rows || value == a.kept);
    if (!good) {
      *position = o;
      return KS_BAD_ROW_SPLITS;
    }
  }
  for (int64_t o = 0; o < rows; ++o) {
    int64_t previous = -1;
    for (int64_t c = a.row_splits[o]; c < a.row_splits[o + 1]; ++c) {
      const int64_t channel = a.input_channels[c];
      if (channel <= previous || channel >= a.geometry.in_channels) {
        *position = c;
        return KS_BAD_INPUT_CHANNELS;
      }
      previous = channel;
    }
  }
  return KS_OK;
}

KsStatus CheckIndices(const KsArguments& a, int64_t* position) {
  const KsGeometry& g = a.geometry;
  const int64_t rows = g.kernel_height * g.kernel_width * g.in_channels;
  int64_t previous = -1;
  for (int64_t k = 0; k < a.kept; ++k) {
    const int64_t index = a.indices[k];
    if (index <= previous || index >= rows) {
      *position = k;
      return KS_BAD_INDICES;
    }
    previous = index;
  }
  return KS_OK;
}

}  // namespace

extern "C" {

KsStatus ks_check_arguments(const KsArguments* arguments, int64_t* position) {
  *position = -1;
  const KsStatus status = CheckSizes(*arguments);
  if (status != KS_OK) return status;
  return IsConnection(arguments->operation) ? CheckTable(*arguments, position)
                                            : CheckIndices(*arguments, position);
}

const KsRoutine* ks_select(const KsArguments* arguments, KsPlan* plan) {
  for (int i = first_used; i < kNumRoutines; ++i) {
    // A routine of a lower instruction set is no substitute: what the best one declines, all do.
    if (strcmp(kRoutines[i].isa, kRoutines[first_used].isa) != 0 &&
        kRoutines[i].plan != ks::reference::Plan) {
      continue;
    }
    if (kRoutines[i].operation == arguments->operation && kRoutines[i].plan(arguments, plan)) {
      return &kRoutines[i];
    }
  }
  return nullptr;  // Not reached: the reference takes everything.
}

int32_t ks_num_routines(void) { return kNumRoutines - first_available; }

const KsRoutine* ks_routine(int32_t i) { return &kRoutines[first_available + i]; }

const char* ks_isa(void) { return kRoutines[first_used].isa; }

}  // extern "C"
