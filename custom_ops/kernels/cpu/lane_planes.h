// Copyright 2026 The keras_sparse Authors. Licensed under the Apache License, Version 2.0.
//
// Planes with a region in every lane. The grid of a batch is cut into equal regions; a group is
// kLanes of them, one to a lane: the plane of a channel is [rows][columns][kLanes], zero where a
// region leaves its image or the batch. Every tap of every kernel is then an aligned load, whatever
// the strides and dilations, and no lane is ever split.

#ifndef KERAS_SPARSE_CUSTOM_OPS_KERNELS_CPU_LANE_PLANES_H_
#define KERAS_SPARSE_CUSTOM_OPS_KERNELS_CPU_LANE_PLANES_H_

#include "custom_ops/kernels/conv2d.h"
#include "custom_ops/kernels/cpu/fetch.h"
#include "custom_ops/kernels/cpu/vector.h"

namespace ks {
namespace KS_ISA {

// How the grid of a batch is cut.
struct LaneRegions {
  int64_t batch;
  int64_t rows, columns;             // Grid positions of a region.
  int64_t row_regions, col_regions;  // Of an image.
};

KS_INLINE int64_t LaneGroups(const LaneRegions& regions) {
  return CeilDiv(regions.batch * regions.row_regions * regions.col_regions, kLanes);
}

// A tensor seen from the regions: grid position (y, x) reads pixels from
// (y * step_height - origin_height, x * step_width - origin_width) on.
struct LaneSource {
  const float* data;
  int64_t height, width, channels;
  int64_t image, row, column;  // Floats from one to the next.
  int64_t step_height, step_width;
  int64_t origin_height, origin_width;
  int64_t rows, columns;  // Of a plane.
  int64_t plane_size;     // Floats, an odd number of vectors: planes do not share cache sets.
};

KS_INLINE int64_t LanePlaneSize(int64_t rows, int64_t columns) {
  return (rows * columns | 1) * kLanes;
}

// --- Lanes in registers --------------------------------------------------------------------------

template <int kWidth>
KS_INLINE Vec MergeSum(Vec a, Vec b) {
  return Merge<kWidth, 0>(a, b, AllLanes()) + Merge<kWidth, 1>(a, b, AllLanes());
}

// Lane i of the result: the sum of the lanes of vectors[i], zero from kCount on.
template <int kCount>
KS_INLINE Vec SumEach(const Vec* vectors) {
  const Vec zero = {};
  Vec fours[kLanes / 4];
  KS_UNROLL
  for (int g = 0; g < kLanes / 4; ++g) {
    Vec row[4];
    KS_UNROLL
    for (int i = 0; i < 4; ++i) row[i] = 4 * g + i < kCount ? vectors[4 * g + i] : zero;
    fours[g] = MergeSum<2>(MergeSum<1>(row[0], row[1]), MergeSum<1>(row[2], row[3]));
  }
#if KS_VECTOR_BYTES >= 64
  return MergeSum<4>(MergeSum<4>(fours[0], fours[1]), MergeSum<4>(fours[2], fours[3]));
#elif KS_VECTOR_BYTES >= 32
  return MergeSum<4>(fours[0], fours[1]);
#else
  return fours[0];
#endif
}

// results[i] = the sum of the lanes of vectors[i], or adds it to what is there.
template <int kCount>
KS_INLINE void StoreSums(const Vec* vectors, bool accumulate, float* results) {
  if constexpr (kCount >= kLanes) {
    const Vec sums = SumEach<kLanes>(vectors);
    Store(results, accumulate ? Load(results) + sums : sums);
    if constexpr (kCount > kLanes) {
      StoreSums<kCount - kLanes>(vectors + kLanes, accumulate, results + kLanes);
    }
  } else {
    Vec sums = SumEach<kCount>(vectors);
#if KS_VECTOR_BYTES == 64
    constexpr __mmask16 kUsed = (1 << kCount) - 1;
    if (accumulate) sums += reinterpret_cast<Vec>(_mm512_maskz_loadu_ps(kUsed, results));
    _mm512_mask_storeu_ps(results, kUsed, reinterpret_cast<__m512>(sums));
#else
    KS_UNROLL
    for (int i = 0; i < kCount; ++i) results[i] = accumulate ? results[i] + sums[i] : sums[i];
#endif
  }
}

// --- Packing -------------------------------------------------------------------------------------

constexpr int64_t kPackedChannels = 64;  // The most that PackLanes packs at once.
constexpr int64_t kPixelsAhead = 2;      // That are fetched while a pixel is packed.

// Fills the planes of channels [channel_begin, channel_end) of a group; `planes` is that of
// channel_begin.
KS_INLINE void PackLanes(const LaneRegions& regions, const LaneSource& source, int64_t group,
                         int64_t channel_begin, int64_t channel_end, float* planes) {
  alignas(KS_ALIGNMENT) static const float kZeros[kPackedChannels] = {};
  const int64_t channels = channel_end - channel_begin;
  const int64_t per_image = regions.row_regions * regions.col_regions;
  // A lane's first pixel as an address, which may lie outside of the image, and the part of the
  // plane that is in the image.
  intptr_t first[kLanes];
  int64_t row_begin[kLanes], row_end[kLanes], column_begin[kLanes], column_end[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    const int64_t region = group * kLanes + l;
    const int64_t image = region / per_image;
    const int64_t y = region % per_image / regions.col_regions * regions.rows * source.step_height -
                      source.origin_height;
    const int64_t x =
        region % regions.col_regions * regions.columns * source.step_width - source.origin_width;
    first[l] = reinterpret_cast<intptr_t>(source.data) +
               4 * (image * source.image + y * source.row + x * source.column + channel_begin);
    row_begin[l] = -y;
    row_end[l] = image < regions.batch ? source.height - y : 0;
    column_begin[l] = -x;
    column_end[l] = source.width - x;
  }
  for (int64_t r = 0; r < source.rows; ++r) {
    int64_t row_columns[kLanes];  // The end of its columns; 0 where the row is outside.
    for (int l = 0; l < kLanes; ++l) {
      row_columns[l] = r >= row_begin[l] && r < row_end[l] ? column_end[l] : 0;
    }
    for (int64_t q = 0; q < source.columns; ++q) {
      const int64_t offset = 4 * (r * source.row + q * source.column);
      // Fetched while this pixel is packed: the next ones, in the image or not.
      const int64_t next = q + kPixelsAhead;
      const int64_t ahead =
          next < source.columns
              ? offset + 4 * kPixelsAhead * source.column
              : 4 * ((r + 1) * source.row + (next - source.columns) * source.column);
      intptr_t pixels[kLanes];
      for (int l = 0; l < kLanes; ++l) {
        const bool inside = q >= column_begin[l] && q < row_columns[l];
        pixels[l] = inside ? first[l] + offset : reinterpret_cast<intptr_t>(kZeros);
      }
      float* target = planes + (r * source.columns + q) * kLanes;
      int64_t c = 0;
      for (; c + kLanes <= channels; c += kLanes) {
        Vec lanes[kLanes];
        KS_UNROLL
        for (int l = 0; l < kLanes; ++l) {
          const float* pixel = reinterpret_cast<const float*>(pixels[l]) + c;
          lanes[l] = Load(pixel);
          // The lanes are too many streams for the hardware to follow.
          FetchFar(first[l] + ahead + 4 * c);
        }
        StoreColumns(lanes, target + c * source.plane_size, source.plane_size);
      }
      for (; c < channels; ++c) {
        for (int l = 0; l < kLanes; ++l) {
          target[c * source.plane_size + l] = reinterpret_cast<const float*>(pixels[l])[c];
        }
      }
    }
  }
}

// What PackLanes reads, without margins, to be fetched in `steps` steps.
KS_INLINE void FetchLanes(const LaneRegions& regions, const LaneSource& source, int64_t group,
                          int64_t channel_begin, int64_t channel_end, int64_t steps,
                          Upcoming* upcoming) {
  const int64_t per_image = regions.row_regions * regions.col_regions;
  const int64_t rows = regions.rows * source.step_height;
  const int64_t columns = regions.columns * source.step_width;
  for (int l = 0; l < kLanes; ++l) {
    const int64_t region = group * kLanes + l;
    const int64_t y = region % per_image / regions.col_regions * rows;
    const int64_t x = region % regions.col_regions * columns;
    upcoming->pixels[l] = reinterpret_cast<intptr_t>(source.data) +
                          4 * (region / per_image * source.image + y * source.row +
                               x * source.column + channel_begin);
  }
  FetchPixelsIn(steps, rows, columns, 4 * (channel_end - channel_begin), 4 * source.row,
                4 * source.column, upcoming);
}

}  // namespace KS_ISA
}  // namespace ks

#endif  // KERAS_SPARSE_CUSTOM_OPS_KERNELS_CPU_LANE_PLANES_H_
