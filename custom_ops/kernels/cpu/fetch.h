// Copyright 2026 The keras_sparse Authors. Licensed under the Apache License, Version 2.0.
//
// Fetching the pixels that are packed next while those packed before are computed with. Packing is
// bound by memory and arithmetic leaves memory idle: in turns, each would wait for the other.

#ifndef KERAS_SPARSE_CUSTOM_OPS_KERNELS_CPU_FETCH_H_
#define KERAS_SPARSE_CUSTOM_OPS_KERNELS_CPU_FETCH_H_

#include "custom_ops/kernels/conv2d.h"
#include "custom_ops/kernels/cpu/vector.h"

namespace ks {
namespace KS_ISA {

constexpr int64_t kFetchFrom = 1 << 20;  // Bytes that the second-level cache does not hold.

// What is read of a tensor by a group of regions, one to a lane, and how far fetching it has come.
struct Upcoming {
  intptr_t pixels[kLanes];        // Addresses of what is fetched of the first pixel of each lane.
  int64_t rows, columns;          // Pixels of a lane,
  int64_t lines;                  // and cache lines of each.
  int64_t row_step, column_step;  // Bytes.
  int64_t row, column, line;      // Fetched next; all has been at row == rows.
  // Cache lines of a lane to fetch in `steps` steps of work, and what is due, times `steps`.
  int64_t units, steps, due;
};

KS_INLINE void FetchNothing(Upcoming* upcoming) {
  *upcoming = {};
  upcoming->steps = 1;
}

// To fetch `bytes` of each of rows x columns pixels of each lane in the course of `steps` steps.
// The caller has set `pixels`, which may lie outside of the tensor: a prefetch ignores that.
KS_INLINE void FetchPixelsIn(int64_t steps, int64_t rows, int64_t columns, int64_t bytes,
                             int64_t row_step, int64_t column_step, Upcoming* upcoming) {
  upcoming->rows = rows;
  upcoming->columns = columns;
  upcoming->lines = CeilDiv(bytes, KS_ALIGNMENT);
  upcoming->row_step = row_step;
  upcoming->column_step = column_step;
  upcoming->row = upcoming->column = upcoming->line = 0;
  upcoming->units = rows * columns * upcoming->lines;
  upcoming->steps = Max(1, steps);
  upcoming->due = 0;
}

// Fetches what is due after `steps` more steps: into the second-level cache, as the first-level one
// is full of what is computed with.
KS_INLINE void FetchDue(int64_t steps, Upcoming* upcoming) {
  upcoming->due += steps * upcoming->units;
  for (; upcoming->due > 0 && upcoming->row < upcoming->rows; upcoming->due -= upcoming->steps) {
    const int64_t offset = upcoming->row * upcoming->row_step +
                           upcoming->column * upcoming->column_step + upcoming->line * KS_ALIGNMENT;
    KS_UNROLL
    for (int l = 0; l < kLanes; ++l) {
      FetchFar(upcoming->pixels[l] + offset);
    }
    if (++upcoming->line < upcoming->lines) continue;
    upcoming->line = 0;
    if (++upcoming->column < upcoming->columns) continue;
    upcoming->column = 0;
    ++upcoming->row;
  }
}

}  // namespace KS_ISA
}  // namespace ks

#endif  // KERAS_SPARSE_CUSTOM_OPS_KERNELS_CPU_FETCH_H_
