// Copyright 2026 The keras_sparse Authors. Licensed under the Apache License, Version 2.0.
//
// Thinned convolution, forward: out[pixel, :] = sum over kept rows k of x[pixel + offset(k)] *
// W'[k]. The lowered matrix is never formed. A block of pixels x vectors of output channels stays
// in registers; each kept row is one broadcast per pixel. The input is read from planes, where
// neighbouring pixels are neighbouring floats.

#include "custom_ops/kernels/cpu/planes.h"
#include "custom_ops/kernels/cpu/routines.h"

namespace ks {
namespace KS_ISA {
namespace {

constexpr int kMaxPixels = kRegisters == 32 ? 12 : (KS_VECTOR_BYTES == 32 ? 6 : 4);
constexpr int kMaxVectors = 2;
constexpr int kPanel = kMaxVectors * kLanes;  // Output channels of a panel of W'.

struct Parameters {
  Grid grid;
  Planes planes;
  int64_t shared_tiles;  // 1: a stage of its own packs all planes, the next one computes.
  int64_t splits;        // Parts of the panels, for shared_tiles.
  int64_t tile_bytes;
};

// x: plane position of the first pixel. panel: [kept][kPanel].
template <int kPixels, int kVectors>
void SumPixels(const float* x, const int64_t* offsets, const float* panel, int64_t kept,
               float* const* targets, int64_t channels) {
  Vec sums[kPixels][kVectors] = {};
  for (int64_t k = 0; k < kept; ++k) {
    const float* here = x + offsets[k];
    Vec weights[kVectors];
    KS_UNROLL
    for (int v = 0; v < kVectors; ++v) weights[v] = Load(panel + k * kPanel + v * kLanes);
    KS_UNROLL
    for (int p = 0; p < kPixels; ++p) {
      const Vec value = Splat(here[p]);
      KS_UNROLL
      for (int v = 0; v < kVectors; ++v) sums[p][v] += value * weights[v];
    }
  }
  if (channels == kVectors * kLanes) {
    KS_UNROLL
    for (int p = 0; p < kPixels; ++p) {
      if (targets[p] == nullptr) continue;
      KS_UNROLL
      for (int v = 0; v < kVectors; ++v) Store(targets[p] + v * kLanes, sums[p][v]);
    }
    return;
  }
  float lanes[kPixels][kVectors * kLanes];
  KS_UNROLL
  for (int p = 0; p < kPixels; ++p) {
    KS_UNROLL
    for (int v = 0; v < kVectors; ++v) Store(lanes[p] + v * kLanes, sums[p][v]);
  }
  for (int p = 0; p < kPixels; ++p) {
    if (targets[p] == nullptr) continue;
    for (int64_t c = 0; c < channels; ++c) targets[p][c] = lanes[p][c];
  }
}

typedef void (*PixelFunction)(const float*, const int64_t*, const float*, int64_t, float* const*,
                              int64_t);
struct PixelFunctions {
  PixelFunction of[kMaxVectors + 1][kMaxPixels + 1];
};
template <int kPixels>
struct FillPixelFunctions {
  static void Run(PixelFunctions* functions) {
    functions->of[1][kPixels] = SumPixels<kPixels, 1>;
    functions->of[2][kPixels] = SumPixels<kPixels, 2>;
    FillPixelFunctions<kPixels - 1>::Run(functions);
  }
};
template <>
struct FillPixelFunctions<0> {
  static void Run(PixelFunctions*) {}
};

struct Packed {
  int64_t* offsets;  // [kept]
  float* panels;     // [panels][kept][kPanel], zero past the last output channel.
};

Packed PlacePacked(const KsArguments& arguments, Arena* arena) {
  Packed packed;
  packed.offsets = arena->Take<int64_t>(arguments.kept);
  packed.panels = arena->Take<float>(CeilDiv(arguments.geometry.out_channels, kPanel) *
                                     arguments.kept * kPanel);
  return packed;
}

void PackPanel(const KsArguments& arguments, int64_t panel, float* target) {
  const int64_t out_channels = arguments.geometry.out_channels;
  const int64_t channels = Min(kPanel, out_channels - panel * kPanel);
  for (int64_t k = 0; k < arguments.kept; ++k) {
    const float* row = arguments.filter + k * out_channels + panel * kPanel;
    for (int64_t c = 0; c < channels; ++c) target[k * kPanel + c] = row[c];
    for (int64_t c = channels; c < kPanel; ++c) target[k * kPanel + c] = 0;
  }
}

void ComputeTile(const KsArguments& arguments, const Parameters& parameters, const Packed& packed,
                 int64_t tile, int64_t panel_begin, int64_t panel_end, const float* planes_data,
                 float** column_targets) {
  const Grid& grid = parameters.grid;
  const Planes& planes = parameters.planes;
  const int64_t out_channels = arguments.geometry.out_channels;
  const int64_t first_image = tile / planes.row_tiles * planes.images;
  const int64_t first_row = tile % planes.row_tiles * planes.tile_rows;
  const int64_t rows = Min(planes.tile_rows, grid.rows - first_row);
  const int64_t images = Min(planes.images, grid.batch - first_image);
  const int64_t columns = (images - 1) * planes.pitch + grid.columns;
  const int64_t blocks = CeilDiv(columns, kMaxPixels);
  PixelFunctions functions;
  FillPixelFunctions<kMaxPixels>::Run(&functions);

  for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
    const int64_t channels = Min(kPanel, out_channels - panel * kPanel);
    const int64_t vectors = CeilDiv(channels, kLanes);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) {
        const int64_t image = first_image + c / planes.pitch;
        const int64_t x = c % planes.pitch;
        column_targets[c] =
            x < grid.columns
                ? arguments.output +
                      ((image * grid.rows + first_row + r) * grid.columns + x) * out_channels +
                      panel * kPanel
                : nullptr;
      }
      const float* row = planes_data + r * grid.step_height * planes.row_length;
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t column = PartBegin(columns, blocks, b);
        const int64_t pixels = PartBegin(columns, blocks, b + 1) - column;
        functions.of[vectors][pixels](row + column, packed.offsets,
                                      packed.panels + panel * arguments.kept * kPanel,
                                      arguments.kept, column_targets + column, channels);
      }
    }
  }
}

}  // namespace

int ThinnedConv2DPlan(const KsArguments* arguments, KsPlan* plan) {
  const KsGeometry& geometry = arguments->geometry;
  memset(plan, 0, sizeof(*plan));
  if (geometry.stride_width > 64) return 0;
  Parameters parameters = {};
  parameters.grid = ForwardGrid(geometry);
  if (IsPointwise(geometry)) MakePointwise(&parameters.grid);
  if (!PlanPlanes(parameters.grid, geometry.in_channels, 1, &parameters.planes)) return 0;
  const Planes& planes = parameters.planes;
  const int64_t tiles = planes.groups * planes.row_tiles;
  const int64_t panels = CeilDiv(geometry.out_channels, kPanel);
  parameters.tile_bytes = RoundUp(PlanesBytes(planes, geometry.in_channels), KS_ALIGNMENT);
  parameters.splits = 1;
  if (tiles < kWantedItems && tiles * parameters.tile_bytes <= kScratchLimit / 4) {
    parameters.shared_tiles = 1;
    parameters.splits = Max(1, Min(CeilDiv(kWantedItems, tiles), panels));
  }

  const double positions = static_cast<double>(planes.columns) * planes.tile_rows;
  KsStage* stage = plan->stages;
  stage->items = 1 + panels;
  stage->cost = 100 + arguments->kept * 8;
  ++stage;
  if (parameters.shared_tiles) {
    stage->items = tiles * CeilDiv(geometry.in_channels, kLanes);
    stage->cost = 100 + static_cast<int64_t>(positions * kLanes / 4);
    ++stage;
  }
  stage->items = tiles * parameters.splits;
  stage->cost = 100 + static_cast<int64_t>(
                          positions *
                          (static_cast<double>(arguments->kept) * panels * kMaxVectors / 1.5 +
                           geometry.in_channels / 4) /
                          parameters.splits);
  ++stage;
  plan->num_stages = static_cast<int32_t>(stage - plan->stages);
  plan->scratch_bytes =
      PieceBytes(planes.columns, 8) + (parameters.shared_tiles ? 0 : parameters.tile_bytes);
  plan->shared_bytes = PieceBytes(arguments->kept, 8) +
                       PieceBytes(panels * arguments->kept * kPanel, 4) +
                       (parameters.shared_tiles ? tiles * parameters.tile_bytes : 0);
  SaveParameters(parameters, plan);
  return 1;
}

void ThinnedConv2DRun(const KsArguments* arguments, const KsPlan* plan, int32_t stage,
                      int64_t begin, int64_t end, void* shared, void* scratch) {
  const Parameters parameters = LoadParameters<Parameters>(plan);
  const KsGeometry& geometry = arguments->geometry;
  const Grid& grid = parameters.grid;
  const Planes& planes = parameters.planes;
  Arena shared_arena = {static_cast<char*>(shared)};
  const Packed packed = PlacePacked(*arguments, &shared_arena);
  if (stage == 0) {
    for (int64_t item = begin; item < end; ++item) {
      if (item > 0) {
        PackPanel(*arguments, item - 1, packed.panels + (item - 1) * arguments->kept * kPanel);
        continue;
      }
      for (int64_t k = 0; k < arguments->kept; ++k) {
        const int64_t tap = arguments->indices[k] / geometry.in_channels;
        packed.offsets[k] =
            arguments->indices[k] % geometry.in_channels * planes.channel_size +
            TapOffset(geometry, planes, tap / geometry.kernel_width, tap % geometry.kernel_width);
      }
    }
    return;
  }

  float* shared_planes = reinterpret_cast<float*>(shared_arena.at);
  const int64_t tile_size = parameters.tile_bytes / 4;
  const int64_t plane_rows = (planes.tile_rows - 1) * grid.step_height + grid.reach_height + 1;
  if (parameters.shared_tiles && stage == 1) {
    const int64_t blocks = CeilDiv(geometry.in_channels, kLanes);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t tile = item / blocks;
      const int64_t channel = item % blocks * kLanes;
      PackPlanes(grid, planes, arguments->input, channel,
                 Min(channel + kLanes, geometry.in_channels),
                 tile / planes.row_tiles * planes.images,
                 tile % planes.row_tiles * planes.tile_rows * grid.step_height, plane_rows,
                 shared_planes + tile * tile_size + channel * planes.channel_size);
    }
    return;
  }

  Arena scratch_arena = {static_cast<char*>(scratch)};
  float** column_targets = scratch_arena.Take<float*>(planes.columns);
  float* own_planes = reinterpret_cast<float*>(scratch_arena.at);
  const int64_t panels = CeilDiv(geometry.out_channels, kPanel);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t tile = item / parameters.splits;
    const int64_t split = item % parameters.splits;
    const float* tile_planes = shared_planes + tile * tile_size;
    if (!parameters.shared_tiles) {
      PackPlanes(grid, planes, arguments->input, 0, geometry.in_channels,
                 tile / planes.row_tiles * planes.images,
                 tile % planes.row_tiles * planes.tile_rows * grid.step_height, plane_rows,
                 own_planes);
      tile_planes = own_planes;
    }
    ComputeTile(*arguments, parameters, packed, tile, PartBegin(panels, parameters.splits, split),
                PartBegin(panels, parameters.splits, split + 1), tile_planes, column_targets);
  }
}

}  // namespace KS_ISA
}  // namespace ks
