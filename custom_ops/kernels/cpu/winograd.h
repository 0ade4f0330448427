// Copyright 2026 The keras_sparse Authors. Licensed under the Apache License, Version 2.0.
//
// Minimal filtering, Winograd's F(4, 3): four neighbouring results of three taps from six products
// instead of twelve. With d the six source columns of a tile, g the taps of a row,
//
//   y = A^T [(G g) * (B^T d)]     (* element by element)
//
// computes a product of polynomials from their values at six points. A connection of 3x3 taps is
// transformed along its rows only: of each point remains a convolution of three taps along the
// columns, whose loads still feed three sums. Thinned kernels, whose loads feed many sums in any
// case, are transformed along columns as well where that pays: 36 products for 4x4 results instead
// of 144. Source tiles are transformed once for all result channels, taps once for all tiles, sums
// back once for all source channels.
//
// The points are 0, +-3/4, +-3/2 and infinity. They balance the sizes of the products: rounding
// errors are about 1.5 times those of sums of one product after the other
// (tests/ops/forward_test.py), where the customary 0, +-1, +-2 and infinity make it 2; along both
// axes, errors are those of one twice over. A value that is not finite reaches all results of its
// tile.

#ifndef KERAS_SPARSE_CUSTOM_OPS_KERNELS_CPU_WINOGRAD_H_
#define KERAS_SPARSE_CUSTOM_OPS_KERNELS_CPU_WINOGRAD_H_

#include "custom_ops/kernels/cpu/vector.h"

namespace ks {
namespace KS_ISA {

constexpr int kPoints = 6;       // Of a tile, as many as it has source columns.
constexpr int kTileColumns = 4;  // Results.
constexpr int kPointTaps = 3;    // Rows of taps of a point.

// The points +-kNear and +-kFar, and powers.
constexpr float kNear = 0.75f, kFar = 1.5f;
constexpr float kNear2 = kNear * kNear, kFar2 = kFar * kFar;

// The parts of B^T d. The points 0 and infinity, of three columns two apart.
KS_INLINE Vec EndPoint(Vec a, Vec b, Vec c) {
  return (c - (kNear2 + kFar2) * b) + (kNear2 * kFar2) * a;
}
// The points +-kNear or +-kFar, of the inner four columns. Additions have units of their own: fused
// with the product before them, both would take those of products.
template <bool kIsFar>
KS_INLINE void PointPair(Vec d1, Vec d2, Vec d3, Vec d4, Vec* plus, Vec* minus) {
  constexpr float kOther2 = kIsFar ? kNear2 : kFar2;
  const Vec even = d4 - kOther2 * d2;
  const Vec odd = InRegister((kIsFar ? kFar : kNear) * (d3 - kOther2 * d1));
  *plus = even + odd;
  *minus = even - odd;
}

// B^T d. Points in the order 0, near, -near, far, -far, infinity.
KS_INLINE void TransformSource(const Vec (&d)[kPoints], Vec (&points)[kPoints]) {
  points[0] = EndPoint(d[0], d[2], d[4]);
  PointPair<false>(d[1], d[2], d[3], d[4], &points[1], &points[2]);
  PointPair<true>(d[1], d[2], d[3], d[4], &points[3], &points[4]);
  points[5] = EndPoint(d[1], d[3], d[5]);
}

// G g, for `taps` in ascending order of columns: floats, or vectors of them.
template <typename Value>
KS_INLINE void TransformTaps(const Value (&taps)[3], Value (&points)[kPoints]) {
  constexpr float kNearScale = 1 / (2 * kNear2 * (kNear2 - kFar2));
  constexpr float kFarScale = 1 / (2 * kFar2 * (kFar2 - kNear2));
  points[0] = taps[0] * (1 / (kNear2 * kFar2));
  const Value near_even = taps[0] + kNear2 * taps[2], near_odd = kNear * taps[1];
  points[1] = kNearScale * (near_even + near_odd);
  points[2] = kNearScale * (near_even - near_odd);
  const Value far_even = taps[0] + kFar2 * taps[2], far_odd = kFar * taps[1];
  points[3] = kFarScale * (far_even + far_odd);
  points[4] = kFarScale * (far_even - far_odd);
  points[5] = taps[2];
}

// The parts of A^T of the sums of products: the even results, and the odd ones.
KS_INLINE void EvenResults(Vec zero, Vec near, Vec minus_near, Vec far, Vec minus_far, Vec* first,
                           Vec* third) {
  const Vec near_sum = near + minus_near, far_sum = far + minus_far;
  *first = zero + near_sum + far_sum;
  *third = kNear2 * near_sum + kFar2 * far_sum;
}
KS_INLINE void OddResults(Vec near, Vec minus_near, Vec far, Vec minus_far, Vec infinity,
                          Vec* second, Vec* fourth) {
  const Vec near_difference = kNear * (near - minus_near),
            far_difference = kFar * (far - minus_far);
  *second = near_difference + far_difference;
  *fourth = kNear2 * near_difference + kFar2 * far_difference + infinity;
}

KS_INLINE void TransformSums(const Vec (&sums)[kPoints], Vec (&results)[kTileColumns]) {
  EvenResults(sums[0], sums[1], sums[2], sums[3], sums[4], &results[0], &results[2]);
  OddResults(sums[1], sums[2], sums[3], sums[4], sums[5], &results[1], &results[3]);
}

// --- Sums ----------------------------------------------------------------------------------------

// The sums of some points, a set of `together`, in a column of tiles.
struct PointBlock {
  const float* planes;  // Channel 0's, at the first point and the first tap of the first row.
  int64_t plane_size;   // Floats from the plane of one channel to the next,
  int64_t point_step;   // from one point to the next; rows follow each other.
  // The table: connections of result channel o are [splits[o], splits[o + 1]), and of their taps
  // those of the set, [connections][together][kPointTaps], are the set-th part.
  const int32_t* splits;
  const int32_t* channels;
  const float* filter;
  int64_t set;
  int64_t row_begin, row_end;  // Of the rows + kPointTaps - 1 rows those that are no padding.
  float* sums;                 // Of result channel 0, each [together][rows][lanes]
  int64_t sums_step;           // Floats from one result channel to the next.
};

// Result channels [first, last), taken one after another: with few connections in each, a call for
// every one of them would take as long as its sums.
typedef void (*PointFunction)(const PointBlock&, const int32_t* first, const int32_t* last);
constexpr int kMaxPointSums = kRegisters - kPointTaps - 3;
constexpr int kMaxPointRows = kMaxPointSums < 16 ? kMaxPointSums : 16;

// kEdge: the first or the last row may be padding.
template <int kTogether, int kRows, bool kEdge>
void SumPoints(const PointBlock& block, const int32_t* first, const int32_t* last) {
  constexpr int64_t kAhead = 256;  // Floats of the filter that are fetched before their use.
  const float* const planes = block.planes;
  const int64_t plane_size = block.plane_size, point_step = block.point_step;
  const int32_t* const splits = block.splits;
  const int32_t* const channels = block.channels;
  const float* const filters = block.filter;
  float* const all_sums = block.sums;
  const int64_t set_taps = block.set * kTogether * kPointTaps, sums_step = block.sums_step;
  const bool first_row = !kEdge || block.row_begin == 0;
  const bool last_row = !kEdge || block.row_end == kRows + kPointTaps - 1;
  for (; first != last; ++first) {
    const int64_t o = *first;
    const int64_t begin = splits[o], connections = splits[o + 1] - begin;
    Vec sums[kTogether][kRows] = {};
    const float* filter = filters + begin * kPoints * kPointTaps + connections * set_taps;
    const float* filter_end = filter + connections * kTogether * kPointTaps;
    const int32_t* channel = channels + begin;
    for (const int32_t* end = channel + connections; channel != end; ++channel) {
      const float* point = planes + *channel * plane_size;
      const float* ahead = filter + kAhead;
      __builtin_prefetch(ahead < filter_end ? ahead : filter_end);
      KS_UNROLL
      for (int t = 0; t < kTogether; ++t, point += point_step, filter += kPointTaps) {
        Vec weights[kPointTaps];
        KS_UNROLL
        for (int i = 0; i < kPointTaps; ++i) weights[i] = Splat(filter[i]);
        KS_UNROLL
        for (int q = 0; q < kRows + kPointTaps - 1; ++q) {
          if (kEdge && q == 0 && !first_row) continue;
          if (kEdge && q == kRows + kPointTaps - 2 && !last_row) continue;
          const Vec x = InRegister(Load(point + q * kLanes));
          KS_UNROLL
          for (int i = 0; i < kPointTaps; ++i) {
            if (q - i >= 0 && q - i < kRows) sums[t][q - i] += weights[i] * x;
          }
        }
      }
    }
    float* const results = all_sums + o * sums_step;
    KS_UNROLL
    for (int t = 0; t < kTogether; ++t) {
      KS_UNROLL
      for (int r = 0; r < kRows; ++r) Store(results + (t * kRows + r) * kLanes, sums[t][r]);
    }
  }
}

template <int kTogether, int kRows = kMaxPointRows>
PointFunction FindPointsOf(int64_t rows, bool edge) {
  if constexpr (kRows == 0) {
    return nullptr;
  } else {
    if constexpr (kTogether * kRows <= kMaxPointSums) {
      if (rows == kRows) {
        return edge ? SumPoints<kTogether, kRows, true> : SumPoints<kTogether, kRows, false>;
      }
    }
    return FindPointsOf<kTogether, kRows - 1>(rows, edge);
  }
}

// SumPoints for `together` points (1, 2, 3 or 6) and `rows` rows; null where registers are too few.
inline PointFunction FindPoints(int64_t together, int64_t rows, bool edge) {
  switch (together) {
    case 1:
      return FindPointsOf<1>(rows, edge);
    case 2:
      return FindPointsOf<2>(rows, edge);
    case 3:
      return FindPointsOf<3>(rows, edge);
    default:
      return FindPointsOf<6>(rows, edge);
  }
}

}  // namespace KS_ISA
}  // namespace ks

#endif  // KERAS_SPARSE_CUSTOM_OPS_KERNELS_CPU_WINOGRAD_H_
