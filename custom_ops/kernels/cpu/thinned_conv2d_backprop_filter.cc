// Copyright 2026 The keras_sparse Authors. Licensed under the Apache License, Version 2.0.
//
// Gradient of the thinned convolution with respect to its filter: dW'[k, o] is the dot product of
// the input plane of row k, shifted by its tap, with the output plane of channel o. Blocks of rows
// x output channels stay in registers; lanes are pixels. See reduction.h for how the work is cut.

#include "custom_ops/kernels/cpu/planes.h"
#include "custom_ops/kernels/cpu/reduction.h"
#include "custom_ops/kernels/cpu/routines.h"

namespace ks {
namespace KS_ISA {
namespace {

constexpr int kMaxRows = kRegisters == 32 ? 4 : 2;  // Kept rows of a block.
constexpr int kMaxChannels = 4;                     // Output channels of a block.

// sums[k * sums_stride + o] += dot product, kRows x kChannels of them.
template <int kRows, int kChannels>
void Dot(const float* x, const int64_t* offsets, int64_t x_step, const float* d, int64_t d_channel,
         int64_t d_step, int64_t rows, int64_t vectors, float* sums, int64_t sums_stride) {
  Vec block[kRows][kChannels] = {};
  const float* base[kRows];
  for (int k = 0; k < kRows; ++k) base[k] = x + offsets[k];
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t at = r * x_step + v * kLanes;
      const float* d_here = d + r * d_step + v * kLanes;
      Vec values[kChannels];
      KS_UNROLL
      for (int o = 0; o < kChannels; ++o) values[o] = Load(d_here + o * d_channel);
      KS_UNROLL
      for (int k = 0; k < kRows; ++k) {
        const Vec here = Load(base[k] + at);
        KS_UNROLL
        for (int o = 0; o < kChannels; ++o) block[k][o] += here * values[o];
      }
    }
  }
  for (int k = 0; k < kRows; ++k) {
    for (int o = 0; o < kChannels; ++o) sums[k * sums_stride + o] += Sum(block[k][o]);
  }
}

typedef void (*DotFunction)(const float*, const int64_t*, int64_t, const float*, int64_t, int64_t,
                            int64_t, int64_t, float*, int64_t);
struct DotFunctions {
  DotFunction of[kMaxRows + 1][kMaxChannels + 1];
};
template <int kRows>
struct FillDotFunctions {
  static void Run(DotFunctions* functions) {
    functions->of[kRows][1] = Dot<kRows, 1>;
    functions->of[kRows][2] = Dot<kRows, 2>;
    functions->of[kRows][3] = Dot<kRows, 3>;
    functions->of[kRows][4] = Dot<kRows, 4>;
    FillDotFunctions<kRows - 1>::Run(functions);
  }
};
template <>
struct FillDotFunctions<0> {
  static void Run(DotFunctions*) {}
};

}  // namespace

int ThinnedConv2DBackpropFilterPlan(const KsArguments* arguments, KsPlan* plan) {
  const int64_t sums = arguments->kept * arguments->geometry.out_channels;
  return PlanReduction(*arguments, sums, static_cast<double>(sums), PieceBytes(arguments->kept, 8),
                       plan);
}

void ThinnedConv2DBackpropFilterRun(const KsArguments* arguments, const KsPlan* plan, int32_t stage,
                                    int64_t begin, int64_t end, void* shared, void* scratch) {
  const KsGeometry& geometry = arguments->geometry;
  const Reduction reduction = LoadParameters<Reduction>(plan);
  if (stage == 1) {
    AddParts(reduction, begin, end, static_cast<const float*>(shared), arguments->output);
    return;
  }
  const Planes& planes = reduction.planes;
  const int64_t x_step = reduction.grid.step_height * planes.row_length;
  const int64_t d_step = reduction.out_planes.row_length;
  const int64_t d_channel = reduction.out_planes.channel_size;
  DotFunctions dot;
  FillDotFunctions<kMaxRows>::Run(&dot);

  Arena arena = {static_cast<char*>(scratch)};
  int64_t* offsets = arena.Take<int64_t>(arguments->kept);
  for (int64_t k = 0; k < arguments->kept; ++k) {
    const int64_t tap = arguments->indices[k] / geometry.in_channels;
    offsets[k] =
        arguments->indices[k] % geometry.in_channels * planes.channel_size +
        TapOffset(geometry, planes, tap / geometry.kernel_width, tap % geometry.kernel_width);
  }
  for (int64_t item = begin; item < end; ++item) {
    ReductionItem work = TakeItem(reduction, item, arena);
    const int64_t channels = work.channel_end - work.channel_begin;
    float* sums =
        (reduction.parts == 1 ? arguments->output
                              : static_cast<float*>(shared) + work.part * reduction.part_size) +
        work.channel_begin;
    for (int64_t k = 0; k < arguments->kept; ++k) {
      for (int64_t o = 0; o < channels; ++o) sums[k * geometry.out_channels + o] = 0;
    }
    for (int64_t tile = work.tile_begin; tile < work.tile_end; ++tile) {
      const int64_t rows = PackTile(*arguments, reduction, tile, &work);
      for (int64_t o = 0; o < channels; o += kMaxChannels) {
        const int64_t block_channels = Min(kMaxChannels, channels - o);
        for (int64_t k = 0; k < arguments->kept; k += kMaxRows) {
          const int64_t block_rows = Min(kMaxRows, arguments->kept - k);
          dot.of[block_rows][block_channels](
              work.planes, offsets + k, x_step, work.out_planes + o * d_channel, d_channel, d_step,
              rows, work.vectors, sums + k * geometry.out_channels + o, geometry.out_channels);
        }
      }
    }
  }
}

}  // namespace KS_ISA
}  // namespace ks
