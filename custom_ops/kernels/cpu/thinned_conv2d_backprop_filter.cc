// Copyright 2026 The keras_sparse Authors. Licensed under the Apache License, Version 2.0.
//
// Gradient of the thinned convolution with respect to its filter: dW'[k, :] = sum over pixels of
// x[pixel + offset(k)] * out_backprop[pixel, :], directly from padded pixels; see terms.h. See
// reduction.h for how the pixels are cut into parts.

#include "custom_ops/kernels/cpu/planes.h"
#include "custom_ops/kernels/cpu/reduction.h"
#include "custom_ops/kernels/cpu/routines.h"
#include "custom_ops/kernels/cpu/terms.h"

namespace ks {
namespace KS_ISA {
namespace {

constexpr int64_t kChunkBytes = 24 * 1024;  // Of a panel of out_backprop.

struct Parameters {
  Tiles tiles;
  Parts parts;
  int64_t splits;  // Parts of the kept rows.
  int64_t packed;  // 1: out_backprop is copied, so that every pixel fills its vectors.
};

}  // namespace

int ThinnedConv2DBackpropFilterPlan(const KsArguments* arguments, KsPlan* plan) {
  const KsGeometry& geometry = arguments->geometry;
  memset(plan, 0, sizeof(*plan));
  Parameters parameters = {};
  Tiles& tiles = parameters.tiles;
  if (!PlanTiles(geometry, true, &tiles)) return 0;
  const int64_t num_tiles = NumTiles(tiles);
  const int64_t sums = arguments->kept * geometry.out_channels;
  const Panels panels = MakePanels(geometry.out_channels);
  const int64_t parts = Min(Min(num_tiles, kWantedItems), MostParts(sums));
  parameters.parts = MakeParts(parts, sums);
  parameters.splits =
      parts >= kWantedItems / 2
          ? 1
          : Max(1, Min(CeilDiv(kWantedItems, parts), arguments->kept / (2 * kMostPoints)));
  parameters.packed = geometry.out_channels % kLanes != 0;

  plan->num_stages = 2;
  plan->stages[0].items = parts * parameters.splits;
  plan->stages[0].cost =
      100 +
      static_cast<int64_t>(static_cast<double>(num_tiles) * TilePixels(tiles) *
                           (static_cast<double>(arguments->kept) * panels.vectors / 1.8 +
                            static_cast<double>(geometry.in_channels) / 8 * parameters.splits) /
                           static_cast<double>(plan->stages[0].items));
  PlanPartsStage(parameters.parts, &plan->stages[1]);
  plan->shared_bytes = PartsBytes(parameters.parts);
  plan->scratch_bytes =
      PieceBytes(arguments->kept, sizeof(Point)) + PieceBytes(TilePixels(tiles), sizeof(Term)) +
      PieceBytes(parameters.packed ? TilePixels(tiles) * panels.vectors * kLanes : 0, 4) +
      TileBytes(tiles);
  SaveParameters(parameters, plan);
  return 1;
}

void ThinnedConv2DBackpropFilterRun(const KsArguments* arguments, const KsPlan* plan, int32_t stage,
                                    int64_t begin, int64_t end, const KsMemory* memory) {
  const KsGeometry& geometry = arguments->geometry;
  const Parameters parameters = LoadParameters<Parameters>(plan);
  float* const part_sums = static_cast<float*>(memory->shared);
  if (stage == 1) {
    AddParts(parameters.parts, begin, end, part_sums, arguments->output);
    return;
  }
  const Tiles& tiles = parameters.tiles;
  const Panels panels = MakePanels(geometry.out_channels);
  const SumFunctions functions = AllSumFunctions();
  Arena arena = {static_cast<char*>(memory->scratch)};
  Point* const points = arena.Take<Point>(arguments->kept);
  Term* const terms = arena.Take<Term>(TilePixels(tiles));
  const int64_t packed_channels = panels.vectors * kLanes;
  float* const packed =
      arena.Take<float>(parameters.packed ? TilePixels(tiles) * packed_channels : 0);
  float* const copy = reinterpret_cast<float*>(arena.at);
  for (int64_t k = 0; k < arguments->kept; ++k) {
    const int64_t tap = arguments->indices[k] / geometry.in_channels;
    points[k] = {
        arguments->indices[k] % geometry.in_channels +
            TapOffset(geometry, tiles, tap / geometry.kernel_width, tap % geometry.kernel_width),
        k * geometry.out_channels};
  }
  for (int64_t p = 0; p < TilePixels(tiles); ++p) {
    const int64_t row = p / tiles.grid.columns;
    terms[p] = {static_cast<int32_t>(
                    PixelOffset(tiles, row / tiles.rows, row % tiles.rows, p % tiles.grid.columns)),
                static_cast<int32_t>(p)};
  }

  for (int64_t item = begin; item < end; ++item) {
    const int64_t part = item / parameters.splits;
    const int64_t split = item % parameters.splits;
    const int64_t first = PartBegin(arguments->kept, parameters.splits, split);
    const int64_t rows = PartBegin(arguments->kept, parameters.splits, split + 1) - first;
    float* const result = PartSums(parameters.parts, part, part_sums, arguments->output);
    bool add = false;
    for (int64_t t = PartBegin(NumTiles(tiles), parameters.parts.count, part);
         t < PartBegin(NumTiles(tiles), parameters.parts.count, part + 1); ++t) {
      const Tile tile = TileAt(tiles, t);
      if (tiles.copied) {
        CopyRows(tiles, tile, arguments->input, 0, tile.images * tiles.padded_rows, copy);
      }
      const float* const x = TileData(tiles, tile, arguments->input, copy);
      const float* d = arguments->out_backprop + tile.first_pixel * geometry.out_channels;
      if (parameters.packed) {
        memset(packed, 0, tile.pixels * packed_channels * 4);
        for (int64_t p = 0; p < tile.pixels; ++p) {
          memcpy(packed + p * packed_channels, d + p * geometry.out_channels,
                 geometry.out_channels * 4);
        }
        d = packed;
      }
      const int64_t chunks = CeilDiv(tile.pixels * kPanelVectors * kLanes * 4, kChunkBytes);
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t pixel = PartBegin(tile.pixels, chunks, chunk);
        for (int64_t i = 0; i < panels.count; ++i) {
          const Panel panel = PanelAt(panels, i);
          Sums sums;
          sums.w = d + panel.first_vector * kLanes;
          sums.w_stride = parameters.packed ? packed_channels : geometry.out_channels;
          sums.terms = terms + pixel;
          sums.num_terms = PartBegin(tile.pixels, chunks, chunk + 1) - pixel;
          sums.ahead = 0;
          sums.x_ahead = 0;
          sums.stream = false;
          sums.out = result + panel.first_vector * kLanes;
          sums.add = add;
          SumPoints(functions, panel, x, points + first, rows, sums);
        }
        add = true;
      }
    }
  }
}

}  // namespace KS_ISA
}  // namespace ks
