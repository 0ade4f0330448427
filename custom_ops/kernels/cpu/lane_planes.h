// Copyright 2026 The keras_sparse Authors. Licensed under the Apache License, Version 2.0.
//
// Planes with a region in every lane. The grid of a batch is cut into equal regions; a group is
// kLanes of them, one to a lane: the plane of a channel is [rows][columns][kLanes], zero where a
// region leaves its image or the batch. Every tap of every kernel is then an aligned load, whatever
// the strides and dilations, and no lane is ever split.

#ifndef KERAS_SPARSE_CUSTOM_OPS_KERNELS_CPU_LANE_PLANES_H_
#define KERAS_SPARSE_CUSTOM_OPS_KERNELS_CPU_LANE_PLANES_H_

#include "custom_ops/kernels/conv2d.h"
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

// An NHWC tensor seen from the regions: grid position (y, x) reads pixels from
// (y * step_height - origin_height, x * step_width - origin_width) on.
struct LaneSource {
  const float* data;
  int64_t height, width, channels;
  int64_t step_height, step_width;
  int64_t origin_height, origin_width;
  int64_t rows, columns;  // Of a plane.
  int64_t plane_size;     // Floats, an odd number of vectors: planes do not share cache sets.
};

KS_INLINE int64_t LanePlaneSize(int64_t rows, int64_t columns) {
  return (rows * columns | 1) * kLanes;
}

constexpr int64_t kPackedChannels = 64;  // The most that PackLanes packs at once.

// Fills the planes of channels [channel_begin, channel_end) of a group; `planes` is that of
// channel_begin.
KS_INLINE void PackLanes(const LaneRegions& regions, const LaneSource& source, int64_t group,
                         int64_t channel_begin, int64_t channel_end, float* planes) {
  static const float kZeros[kPackedChannels] = {};
  const int64_t channels = channel_end - channel_begin;
  const int64_t per_image = regions.row_regions * regions.col_regions;
  // A lane's first pixel, as image row, column and offset, and whether the lane is in use.
  int64_t y[kLanes], x[kLanes], image[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    const int64_t region = group * kLanes + l;
    image[l] = region / per_image;
    y[l] = region % per_image / regions.col_regions * regions.rows * source.step_height -
           source.origin_height;
    x[l] = region % regions.col_regions * regions.columns * source.step_width - source.origin_width;
    if (image[l] >= regions.batch) y[l] = -source.rows;  // Every row of it is outside.
  }
  for (int64_t r = 0; r < source.rows; ++r) {
    const float* base[kLanes];
    int64_t first[kLanes];
    uint64_t used[kLanes];  // Columns from the first one in the image on.
    for (int l = 0; l < kLanes; ++l) {
      const bool inside = y[l] + r >= 0 && y[l] + r < source.height;
      base[l] =
          source.data + channel_begin +
          (inside ? ((image[l] * source.height + y[l] + r) * source.width + x[l]) * source.channels
                  : 0);
      first[l] = -x[l];
      used[l] = inside ? source.width : 0;
    }
    for (int64_t q = 0; q < source.columns; ++q) {
      const float* from[kLanes];
      for (int l = 0; l < kLanes; ++l) {
        const float* const pixel = base[l] + q * source.channels;
        from[l] = static_cast<uint64_t>(q - first[l]) < used[l] ? pixel : kZeros;
      }
      float* target = planes + (r * source.columns + q) * kLanes;
      for (int64_t c = 0; c < channels; c += kLanes) {
        float* plane = target + c * source.plane_size;
        Vec lanes[kLanes];
        if (c + kLanes <= channels) {
          KS_UNROLL
          for (int l = 0; l < kLanes; ++l) lanes[l] = Load(from[l] + c);
          // The lanes are too many streams for the hardware to follow.
          KS_UNROLL
          for (int l = 0; l < kLanes; ++l) {
            __builtin_prefetch(base[l] + (q + 1) * source.channels + c);
          }
          Transpose(lanes);
          KS_UNROLL
          for (int l = 0; l < kLanes; ++l) Store(plane + l * source.plane_size, lanes[l]);
          continue;
        }
        for (int64_t i = 0; i < channels - c; ++i) {
          for (int l = 0; l < kLanes; ++l) {
            plane[i * source.plane_size + l] = from[l][c + i];
          }
        }
      }
    }
  }
}

// --- Sums over lanes -----------------------------------------------------------------------------

// One level of SumLanes: pairs of vectors become one, lanes kStep apart added up.
template <int kStep, int kCount, int... kIndex>
KS_INLINE void AddPairs(const Vec (&in)[kCount], Vec (&out)[(kCount + 1) / 2],
                        Lanes<kIndex...> lanes) {
  KS_UNROLL
  for (int i = 0; i < (kCount + 1) / 2; ++i) {
    Vec a = in[2 * i];
    Vec b = 2 * i + 1 < kCount ? in[2 * i + 1 < kCount ? 2 * i + 1 : 0] : Vec{};
    Exchange<kStep>(a, b, lanes);
    out[i] = a + b;
  }
}

template <int kStep, int kCount>
struct LaneSums {
  template <int kTotal>
  KS_INLINE void AddTo(const Vec (&in)[kCount], float* results) {
    Vec out[(kCount + 1) / 2];
    AddPairs<kStep>(in, out, AllLanes());
    LaneSums<kStep * 2, (kCount + 1) / 2>::template AddTo<kTotal>(out, results);
  }
};
template <int kCount>
struct LaneSums<kLanes, kCount> {
  template <int kTotal>
  KS_INLINE void AddTo(const Vec (&in)[kCount], float* results) {
    float sums[kCount * kLanes];
    KS_UNROLL
    for (int i = 0; i < kCount; ++i) Store(sums + i * kLanes, in[i]);
    for (int i = 0; i < kTotal; ++i) results[i] += sums[i];
  }
};

// results[i] += the sum of the lanes of in[i].
template <int kCount>
KS_INLINE void AddLaneSums(const Vec (&in)[kCount], float* results) {
  LaneSums<1, kCount>::template AddTo<kCount>(in, results);
}

}  // namespace KS_ISA
}  // namespace ks

#endif  // KERAS_SPARSE_CUSTOM_OPS_KERNELS_CPU_LANE_PLANES_H_
