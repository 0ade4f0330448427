// Copyright 2026 The keras_sparse Authors. Licensed under the Apache License, Version 2.0.
//
// The transposed connection table, by which the gradient with respect to the input is a convolution
// of out_backprop: for every input channel its output channels, and the filter in that order.

#ifndef KERAS_SPARSE_CUSTOM_OPS_KERNELS_CPU_TRANSPOSED_TABLE_H_
#define KERAS_SPARSE_CUSTOM_OPS_KERNELS_CPU_TRANSPOSED_TABLE_H_

#include "custom_ops/kernels/conv2d.h"
#include "custom_ops/kernels/cpu/planes.h"

namespace ks {
namespace KS_ISA {

struct TransposedTable {
  int32_t* row_splits;  // [in_channels + 1]
  int32_t* channels;    // [kept]: output channels
  int32_t* from;        // [kept]: the connection of the caller's table
  float* filter;        // [kept, taps], the taps in the order of the routine
};

KS_INLINE int64_t TransposedTableBytes(const KsArguments& arguments) {
  const KsGeometry& geometry = arguments.geometry;
  return PieceBytes(geometry.in_channels + 2, 4) + 2 * PieceBytes(arguments.kept, 4);
}
KS_INLINE int64_t TransposedFilterBytes(const KsArguments& arguments) {
  const KsGeometry& geometry = arguments.geometry;
  return PieceBytes(arguments.kept * geometry.kernel_height * geometry.kernel_width, 4);
}

KS_INLINE TransposedTable PlaceTransposedTable(const KsArguments& arguments, Arena* arena,
                                               void* filter) {
  const KsGeometry& geometry = arguments.geometry;
  TransposedTable table;
  table.row_splits = arena->Take<int32_t>(geometry.in_channels + 2);
  table.channels = arena->Take<int32_t>(arguments.kept);
  table.from = arena->Take<int32_t>(arguments.kept);
  table.filter = static_cast<float*>(filter);
  return table;
}

// Fills all but the filter. A counting sort: within a row the output channels ascend.
KS_INLINE void TransposeTable(const KsArguments& arguments, const TransposedTable& table) {
  const int64_t rows = arguments.geometry.in_channels;
  memset(table.row_splits, 0, (rows + 2) * 4);
  int32_t* next = table.row_splits + 1;  // Becomes row_splits once every row is filled.
  for (int64_t c = 0; c < arguments.kept; ++c) ++next[arguments.input_channels[c] + 1];
  for (int64_t s = 0; s < rows; ++s) next[s + 1] += next[s];
  for (int64_t o = 0; o < arguments.geometry.out_channels; ++o) {
    for (int32_t c = arguments.row_splits[o]; c < arguments.row_splits[o + 1]; ++c) {
      const int32_t at = next[arguments.input_channels[c]]++;
      table.channels[at] = static_cast<int32_t>(o);
      table.from[at] = c;
    }
  }
}

constexpr int64_t kTransposedRowsPerItem = 16;  // A piece of work for TransposeFilter.

KS_INLINE int64_t TransposeFilterItems(const KsArguments& arguments) {
  return CeilDiv(arguments.geometry.in_channels, kTransposedRowsPerItem);
}

// Fills the filter of some rows of the table: tap t of a connection is the caller's tap source(t).
template <typename TapSource>
KS_INLINE void TransposeFilter(const KsArguments& arguments, const TransposedTable& table,
                               int64_t begin_item, int64_t end_item, const TapSource& source) {
  const KsGeometry& geometry = arguments.geometry;
  const int64_t taps = geometry.kernel_height * geometry.kernel_width;
  const int64_t end_row = Min(end_item * kTransposedRowsPerItem, geometry.in_channels);
  const int64_t begin = table.row_splits[begin_item * kTransposedRowsPerItem];
  const int64_t end = table.row_splits[end_row];
  constexpr int64_t kAhead = 12;  // Connections: the filter is read in random order.
#ifdef KS_HAVE_PERMUTE
  if (taps <= kLanes) {
    int32_t sources[kLanes] = {};
    for (int64_t t = 0; t < taps; ++t) sources[t] = static_cast<int32_t>(source(t));
    const Places places = LoadPlaces(sources);
    for (int64_t c = begin; c < end; ++c) {
      __builtin_prefetch(arguments.filter + table.from[Min(c + kAhead, end - 1)] * taps);
      const Vec of_connection = LoadFirst(arguments.filter + table.from[c] * taps, taps);
      StoreFirst(table.filter + c * taps, Permute(of_connection, places), taps);
    }
    return;
  }
#endif
  for (int64_t c = begin; c < end; ++c) {
    __builtin_prefetch(arguments.filter + table.from[Min(c + kAhead, end - 1)] * taps);
    const float* from = arguments.filter + table.from[c] * taps;
    float* to = table.filter + c * taps;
    for (int64_t t = 0; t < taps; ++t) to[t] = from[source(t)];
  }
}

}  // namespace KS_ISA
}  // namespace ks

#endif  // KERAS_SPARSE_CUSTOM_OPS_KERNELS_CPU_TRANSPOSED_TABLE_H_
