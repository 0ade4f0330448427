// Copyright 2026 The keras_sparse Authors. Licensed under the Apache License, Version 2.0.
//
// Gradient of the thinned convolution with respect to its input: every kept row k sends the row
// product sum over o of W'[k, o] * out_backprop[pixel, o] to the input plane of its channel,
// shifted by its tap. A block of kept rows x vectors of pixels stays in registers over all output
// channels.
//
// A tile owns rows of the input; the rows of out_backprop that reach it are computed for it alone,
// and only for the kept rows whose taps reach it, so that tiles are independent and nothing is
// computed twice.

#include "custom_ops/kernels/cpu/planes.h"
#include "custom_ops/kernels/cpu/routines.h"

namespace ks {
namespace KS_ISA {
namespace {

constexpr int kMaxRows = kRegisters == 32 ? 8 : 4;  // Kept rows of a block.
constexpr int kMaxVectors = kRegisters == 32 ? 3 : 2;
constexpr int64_t kMaxPhases = 64;

struct Parameters {
  Grid grid;          // The input, seen from the output's pixels.
  Planes planes;      // Of the input's gradient: tile_rows padded rows of it, all its columns.
  Planes out_planes;  // Of out_backprop.
  int64_t row_tiles;
  int64_t blocks;  // Of kMaxRows kept rows.
};

// Sums of kMaxRows kept rows at kVectors vectors of pixels: block is [out_channels][kMaxRows],
// result [kMaxRows][kMaxVectors * kLanes].
template <int kVectors>
void SumChannels(const float* d, int64_t d_channel, const float* block, int64_t channels,
                 float* result) {
  Vec sums[kMaxRows][kVectors] = {};
  for (int64_t o = 0; o < channels; ++o) {
    Vec values[kVectors];
    KS_UNROLL
    for (int v = 0; v < kVectors; ++v) values[v] = Load(d + o * d_channel + v * kLanes);
    KS_UNROLL
    for (int k = 0; k < kMaxRows; ++k) {
      const Vec weight = Splat(block[o * kMaxRows + k]);
      KS_UNROLL
      for (int v = 0; v < kVectors; ++v) sums[k][v] += weight * values[v];
    }
  }
  KS_UNROLL
  for (int k = 0; k < kMaxRows; ++k) {
    KS_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      Store(result + (k * kMaxVectors + v) * kLanes, sums[k][v]);
    }
  }
}

typedef void (*SumFunction)(const float*, int64_t, const float*, int64_t, float*);

// Transposes kMaxRows kept rows of the filter; rows past the last are zero.
void PackBlock(const KsArguments& arguments, int64_t block, float* target) {
  const int64_t channels = arguments.geometry.out_channels;
  for (int64_t k = 0; k < kMaxRows; ++k) {
    const int64_t row = block * kMaxRows + k;
    for (int64_t o = 0; o < channels; ++o) {
      target[o * kMaxRows + k] = row < arguments.kept ? arguments.filter[row * channels + o] : 0;
    }
  }
}

struct KeptRow {
  int64_t tap_row;  // Padded rows from an output row's first one.
  int64_t offset;   // In the planes of the input, tap_row left out.
};

}  // namespace

int ThinnedConv2DBackpropInputPlan(const KsArguments* arguments, KsPlan* plan) {
  const KsGeometry& geometry = arguments->geometry;
  memset(plan, 0, sizeof(*plan));
  if (geometry.stride_width > kMaxPhases || geometry.in_height == 0 || geometry.in_width == 0 ||
      geometry.out_height == 0 || geometry.out_width == 0) {
    return 0;
  }
  Parameters parameters = {};
  parameters.grid = ForwardGrid(geometry);
  if (IsPointwise(geometry)) MakePointwise(&parameters.grid);
  const Grid& grid = parameters.grid;
  // Rows are cut below: the plan here sees the columns, with reach_height left out.
  Grid wide = grid;
  wide.rows = grid.height;
  wide.step_height = 1;
  wide.reach_height = grid.reach_height / grid.step_height;
  // Columns that no output pixel reads are part of the gradient all the same (they are zero).
  wide.reach_width =
      Max(wide.reach_width, grid.pad_left + grid.width - (grid.columns - 1) * grid.step_width - 1);
  parameters.grid.reach_width = wide.reach_width;
  if (!PlanPlanes(wide, geometry.in_channels + geometry.out_channels, 1, &parameters.planes)) {
    return 0;
  }
  Planes& planes = parameters.planes;
  parameters.row_tiles = planes.row_tiles;
  SizePlanes(planes.row_length, planes.tile_rows, &planes);
  parameters.out_planes = planes;
  parameters.out_planes.phases = 1;
  parameters.out_planes.source_width = grid.columns;
  SizePlanes(RoundUp(planes.columns, 16),
             (planes.tile_rows + grid.reach_height) / grid.step_height + 1, &parameters.out_planes);
  parameters.blocks = CeilDiv(arguments->kept, kMaxRows);
  const int64_t scratch = RoundUp(PlanesBytes(planes, geometry.in_channels), KS_ALIGNMENT) +
                          PlanesBytes(parameters.out_planes, geometry.out_channels);
  if (scratch > kScratchLimit) return 0;

  plan->num_stages = 2;
  plan->stages[0].items = parameters.blocks + 1;
  plan->stages[0].cost = 100 + Max(geometry.out_channels * kMaxRows, arguments->kept * 8);
  plan->stages[1].items = planes.groups * planes.row_tiles;
  plan->stages[1].cost =
      100 + static_cast<int64_t>(
                static_cast<double>(planes.columns) * planes.tile_rows *
                (static_cast<double>(arguments->kept) * geometry.out_channels / kLanes / 1.5 +
                 (geometry.in_channels + geometry.out_channels) / 4));
  plan->scratch_bytes =
      PieceBytes(kMaxRows * kMaxVectors * kLanes, 4) + RoundUp(scratch, KS_ALIGNMENT);
  plan->shared_bytes = PieceBytes(parameters.blocks * kMaxRows * geometry.out_channels, 4) +
                       PieceBytes(arguments->kept, sizeof(KeptRow));
  SaveParameters(parameters, plan);
  return 1;
}

void ThinnedConv2DBackpropInputRun(const KsArguments* arguments, const KsPlan* plan, int32_t stage,
                                   int64_t begin, int64_t end, const KsMemory* memory) {
  const Parameters parameters = LoadParameters<Parameters>(plan);
  const KsGeometry& geometry = arguments->geometry;
  const Grid& grid = parameters.grid;
  const Planes& planes = parameters.planes;
  const Planes& out_planes = parameters.out_planes;
  const int64_t kept = arguments->kept;
  const int64_t in_channels = geometry.in_channels;
  const int64_t out_channels = geometry.out_channels;

  Arena shared_arena = {static_cast<char*>(memory->shared)};
  float* blocks = shared_arena.Take<float>(parameters.blocks * kMaxRows * out_channels);
  KeptRow* kept_rows = shared_arena.Take<KeptRow>(kept);
  if (stage == 0) {
    for (int64_t item = begin; item < end; ++item) {
      if (item < parameters.blocks) {
        PackBlock(*arguments, item, blocks + item * kMaxRows * out_channels);
        continue;
      }
      for (int64_t k = 0; k < kept; ++k) {
        const int64_t tap = arguments->indices[k] / in_channels;
        kept_rows[k].tap_row = tap / geometry.kernel_width * geometry.dilation_height;
        kept_rows[k].offset = arguments->indices[k] % in_channels * planes.channel_size +
                              TapOffset(geometry, planes, 0, tap % geometry.kernel_width);
      }
    }
    return;
  }

  Arena arena = {static_cast<char*>(memory->scratch)};
  float* sums = arena.Take<float>(kMaxRows * kMaxVectors * kLanes);
  float* gradient = arena.Take<float>(PlanesBytes(planes, in_channels) / 4);
  float* out_data = reinterpret_cast<float*>(arena.at);
  Grid out_grid = grid;
  out_grid.height = grid.rows;
  out_grid.width = grid.columns;
  out_grid.channels = out_channels;
  out_grid.step_height = out_grid.step_width = 1;
  out_grid.reach_height = out_grid.reach_width = 0;
  out_grid.pad_top = out_grid.pad_left = 0;
  const SumFunction functions[] = {nullptr, SumChannels<1>, SumChannels<2>,
                                   SumChannels<kMaxVectors>};

  for (int64_t item = begin; item < end; ++item) {
    const int64_t first_image = item / parameters.row_tiles * planes.images;
    const int64_t images = Min(planes.images, grid.batch - first_image);
    const int64_t vectors = CeilDiv((images - 1) * planes.pitch + grid.columns, kLanes);
    // Padded rows [first, last) of the input are this tile's.
    const int64_t first_row = item % parameters.row_tiles * planes.tile_rows;
    const int64_t first = first_row + grid.pad_top;
    const int64_t last = Min(first_row + planes.tile_rows, grid.height) + grid.pad_top;
    const int64_t out_first =
        Min(grid.rows, Max(0, CeilDiv(first - grid.reach_height, grid.step_height)));
    const int64_t out_last =
        Max(out_first, Min(grid.rows, FloorDiv(last - 1, grid.step_height) + 1));
    PackPlanes(out_grid, out_planes, arguments->out_backprop, 0, out_channels, first_image,
               out_first, out_last - out_first, out_data);
    if (in_channels > 0) memset(gradient, 0, PlanesBytes(planes, in_channels));

    for (int64_t block = 0; block < parameters.blocks; ++block) {
      const float* block_filter = blocks + block * kMaxRows * out_channels;
      const int64_t first_kept = block * kMaxRows;
      const int64_t block_rows = Min(kMaxRows, kept - first_kept);
      for (int64_t y = out_first; y < out_last; ++y) {
        int64_t target_rows[kMaxRows];
        bool any = false;
        for (int64_t k = 0; k < block_rows; ++k) {
          const int64_t row = y * grid.step_height + kept_rows[first_kept + k].tap_row;
          target_rows[k] = row >= first && row < last ? row - first : -1;
          any |= target_rows[k] >= 0;
        }
        if (!any) continue;
        for (int64_t v = 0; v < vectors; v += kMaxVectors) {
          const int64_t count = Min(kMaxVectors, vectors - v);
          functions[count](out_data + (y - out_first) * out_planes.row_length + v * kLanes,
                           out_planes.channel_size, block_filter, out_channels, sums);
          for (int64_t k = 0; k < block_rows; ++k) {
            if (target_rows[k] < 0) continue;
            float* target = gradient + kept_rows[first_kept + k].offset +
                            target_rows[k] * planes.row_length + v * kLanes;
            for (int64_t i = 0; i < count; ++i) {
              Store(target + i * kLanes,
                    Load(target + i * kLanes) + Load(sums + (k * kMaxVectors + i) * kLanes));
            }
          }
        }
      }
    }

    // The planes back to NHWC; see PackPlanes for the order of the columns.
    const int64_t image_size = grid.height * grid.width * in_channels;
    const bool merge = grid.height == 1 && grid.step_width == 1 && grid.pad_left == 0 &&
                       planes.pitch == grid.width;
    for (int64_t c = 0; c < in_channels; c += kLanes) {
      const int64_t channel = in_channels >= kLanes ? Min(c, in_channels - kLanes) : 0;
      const int64_t channels = Min(kLanes, in_channels);
      for (int64_t y = first_row; y < last - grid.pad_top; ++y) {
        float* row =
            arguments->output + first_image * image_size + y * grid.width * in_channels + channel;
        for (int64_t f = 0; f < planes.phases; ++f) {
          const float* source = gradient + channel * planes.channel_size + f * planes.phase_size +
                                (y - first_row) * planes.row_length;
          if (merge) {
            UnpackRun(source, planes.channel_size, images * grid.width, channels, row, in_channels);
            continue;
          }
          int64_t column, column_end;
          PhaseColumns(grid, planes, f, &column, &column_end);
          for (int64_t g = 0; g < images; ++g) {
            UnpackRun(
                source + g * planes.pitch + column, planes.channel_size, column_end - column,
                channels,
                row + g * image_size + (column * grid.step_width + f - grid.pad_left) * in_channels,
                grid.step_width * in_channels);
          }
        }
      }
    }
  }
}

}  // namespace KS_ISA
}  // namespace ks
