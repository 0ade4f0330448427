// Copyright 2026 The keras_sparse Authors. Licensed under the Apache License, Version 2.0.
//
// Gradient of the connection-table convolution with respect to its filter: for every kept
// connection, dot products of an input plane, shifted by each tap, with an output plane. The dense
// gradient is never formed.
//
// The tiles of the batch are cut into a fixed number of parts, each with sums of its own, which are
// added in order at the end. Where there are few tiles, output channels are split as well.

#include "custom_ops/kernels/cpu/planes.h"
#include "custom_ops/kernels/cpu/reduction.h"
#include "custom_ops/kernels/cpu/routines.h"

namespace ks {
namespace KS_ISA {
namespace {

constexpr int kMaxProducts = kRegisters == 32 ? 12 : 8;

// sums[i * kWidth + j] = sum over rows and columns of x[row + i, column + offset of j] * d.
template <int kWidth>
void DotThreeRows(const float* x, int64_t x_step, const int64_t* columns, const float* d,
                  int64_t d_step, int64_t rows, int64_t vectors, float* results) {
  Vec sums[3][kWidth] = {};
  int64_t shifts[kWidth];
  for (int j = 0; j < kWidth; ++j) shifts[j] = columns[j];
  for (int64_t v = 0; v < vectors; ++v) {
    Vec one_up = {}, two_up = {};
    const float* x_row = x + v * kLanes;
    const float* d_row = d + v * kLanes;
    for (int64_t q = 0; q < rows + 2; ++q) {
      const Vec here = q < rows ? Load(d_row) : Vec{};
      KS_UNROLL
      for (int j = 0; j < kWidth; ++j) {
        const Vec value = Load(x_row + shifts[j]);
        sums[0][j] += value * here;
        sums[1][j] += value * one_up;
        sums[2][j] += value * two_up;
      }
      two_up = one_up;
      one_up = here;
      x_row += x_step;
      d_row += d_step;
    }
  }
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < kWidth; ++j) results[i * kWidth + j] += Sum(sums[i][j]);
  }
}

// results[p] += dot product of x + offsets[p] and d, for kCount values of p.
template <int kCount>
void DotAny(const float* x, const int64_t* offsets, int64_t x_step, const float* d, int64_t d_step,
            int64_t rows, int64_t vectors, float* results) {
  Vec sums[kCount] = {};
  const float* base[kCount];
  for (int p = 0; p < kCount; ++p) base[p] = x + offsets[p];
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t v = 0; v < vectors; ++v) {
      const Vec here = Load(d + r * d_step + v * kLanes);
      const int64_t at = r * x_step + v * kLanes;
      KS_UNROLL
      for (int p = 0; p < kCount; ++p) sums[p] += here * Load(base[p] + at);
    }
  }
  for (int p = 0; p < kCount; ++p) results[p] += Sum(sums[p]);
}

typedef void (*DotFunction)(const float*, const int64_t*, int64_t, const float*, int64_t, int64_t,
                            int64_t, float*);
template <int kCount>
struct FillDotFunctions {
  static void Run(DotFunction* functions) {
    functions[kCount] = DotAny<kCount>;
    FillDotFunctions<kCount - 1>::Run(functions);
  }
};
template <>
struct FillDotFunctions<0> {
  static void Run(DotFunction*) {}
};

}  // namespace

int ConnectionConv2DBackpropFilterPlan(const KsArguments* arguments, KsPlan* plan) {
  const KsGeometry& geometry = arguments->geometry;
  const double taps =
      static_cast<double>(geometry.kernel_height) * static_cast<double>(geometry.kernel_width);
  if (taps > 1 << 16) return 0;
  return PlanReduction(*arguments, arguments->kept * static_cast<int64_t>(taps),
                       arguments->kept * taps, PieceBytes(static_cast<int64_t>(taps), 8), plan);
}

void ConnectionConv2DBackpropFilterRun(const KsArguments* arguments, const KsPlan* plan,
                                       int32_t stage, int64_t begin, int64_t end, void* shared,
                                       void* scratch) {
  const KsGeometry& geometry = arguments->geometry;
  const Reduction reduction = LoadParameters<Reduction>(plan);
  if (stage == 1) {
    AddParts(reduction, begin, end, static_cast<const float*>(shared), arguments->output);
    return;
  }
  const int64_t taps = geometry.kernel_height * geometry.kernel_width;
  const Planes& planes = reduction.planes;
  const int64_t x_step = reduction.grid.step_height * planes.row_length;
  const int64_t d_step = reduction.out_planes.row_length;

  Arena arena = {static_cast<char*>(scratch)};
  int64_t* offsets = arena.Take<int64_t>(taps);
  for (int64_t t = 0; t < taps; ++t) {
    offsets[t] = TapOffset(geometry, planes, t / geometry.kernel_width, t % geometry.kernel_width);
  }
  const bool three_rows =
      geometry.kernel_height == 3 && geometry.dilation_height == 1 && geometry.stride_height == 1;
  DotFunction dot[kMaxProducts + 1];
  FillDotFunctions<kMaxProducts>::Run(dot);

  for (int64_t item = begin; item < end; ++item) {
    ReductionItem work = TakeItem(reduction, item, arena);
    float* sums = reduction.parts == 1
                      ? arguments->output
                      : static_cast<float*>(shared) + work.part * reduction.part_size;
    const int32_t first = arguments->row_splits[work.channel_begin];
    const int32_t last = arguments->row_splits[work.channel_end];
    if (last > first) memset(sums + first * taps, 0, (last - first) * taps * 4);
    for (int64_t tile = work.tile_begin; tile < work.tile_end; ++tile) {
      const int64_t rows = PackTile(*arguments, reduction, tile, &work);
      for (int64_t o = work.channel_begin; o < work.channel_end; ++o) {
        const float* d =
            work.out_planes + (o - work.channel_begin) * reduction.out_planes.channel_size;
        const int64_t row_begin = arguments->row_splits[o];
        const int64_t row_end = arguments->row_splits[o + 1];
        if (three_rows && (geometry.kernel_width == 3 || geometry.kernel_width == 1)) {
          for (int64_t c = row_begin; c < row_end; ++c) {
            const float* x = work.planes + arguments->input_channels[c] * planes.channel_size;
            (geometry.kernel_width == 3 ? DotThreeRows<3>
                                        : DotThreeRows<1>)(x, x_step, offsets, d, d_step, rows,
                                                           work.vectors, sums + c * taps);
          }
          continue;
        }
        // Products of this output channel in table order, up to kMaxProducts at a time.
        const int64_t products = (row_end - row_begin) * taps;
        for (int64_t p = 0; p < products; p += kMaxProducts) {
          const int64_t count = Min(kMaxProducts, products - p);
          int64_t at[kMaxProducts];
          for (int64_t i = 0; i < count; ++i) {
            at[i] = arguments->input_channels[row_begin + (p + i) / taps] * planes.channel_size +
                    offsets[(p + i) % taps];
          }
          dot[count](work.planes, at, x_step, d, d_step, rows, work.vectors,
                     sums + row_begin * taps + p);
        }
      }
    }
  }
}

}  // namespace KS_ISA
}  // namespace ks
