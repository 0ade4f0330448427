// Copyright 2026 The keras_sparse Authors. Licensed under the Apache License, Version 2.0.
//
// What the two filter gradients share: they reduce over all pixels of the batch. The tiles are cut
// into `parts` runs, each with sums of its own; a second stage adds the parts in order. Both are
// fixed by the sizes, so that the result does not depend on the number of threads.

#ifndef KERAS_SPARSE_CUSTOM_OPS_KERNELS_CPU_REDUCTION_H_
#define KERAS_SPARSE_CUSTOM_OPS_KERNELS_CPU_REDUCTION_H_

#include "custom_ops/kernels/conv2d.h"
#include "custom_ops/kernels/cpu/planes.h"

namespace ks {
namespace KS_ISA {

struct Reduction {
  Grid grid;          // The input, seen from the output's pixels.
  Planes planes;      // Of the input.
  Planes out_planes;  // Of out_backprop: the same columns, zero between images.
  int64_t parts;
  int64_t splits;     // Of the output channels.
  int64_t part_size;  // Sums of one part.
  int64_t channels_per_item;
  int64_t out_channels;
};

// `part_size` sums, `weights` multiply-adds per pixel, `extra_bytes` of scratch of the routine's
// own (taken before TakeItem).
KS_INLINE int PlanReduction(const KsArguments& arguments, int64_t part_size, double weights,
                            int64_t extra_bytes, KsPlan* plan) {
  const KsGeometry& geometry = arguments.geometry;
  memset(plan, 0, sizeof(*plan));
  if (geometry.stride_width > 64) return 0;
  Reduction reduction = {};
  reduction.grid = ForwardGrid(geometry);
  if (IsPointwise(geometry)) MakePointwise(&reduction.grid);
  // Both tensors' planes; every weight adds up its lanes once per tile.
  if (!PlanPlanes(reduction.grid, geometry.in_channels + geometry.out_channels, 16,
                  &reduction.planes)) {
    return 0;
  }
  const Planes& planes = reduction.planes;
  reduction.out_planes = planes;
  reduction.out_planes.phases = 1;
  SizePlanes(RoundUp(planes.columns, 16), planes.tile_rows, &reduction.out_planes);

  // The sums of all parts stay below 64 MB, unless one part alone takes more.
  const int64_t tiles = planes.groups * planes.row_tiles;
  reduction.part_size = part_size;
  reduction.out_channels = geometry.out_channels;
  reduction.parts =
      Min(Min(tiles, kWantedItems), Max(1, (int64_t{64} << 20) / (4 * Max(1, part_size))));
  const int64_t blocks = CeilDiv(geometry.out_channels, kLanes);
  reduction.splits = Max(1, Min(blocks, CeilDiv(kWantedItems, reduction.parts)));
  if (reduction.parts >= kWantedItems / 2) reduction.splits = 1;
  reduction.channels_per_item = CeilDiv(blocks, reduction.splits) * kLanes;

  const double pixels = static_cast<double>(planes.columns) * planes.tile_rows * tiles;
  const double moves = pixels * (geometry.in_channels * reduction.splits + geometry.out_channels);
  const int64_t items = reduction.parts * reduction.splits;
  plan->num_stages = reduction.parts > 1 ? 2 : 1;
  plan->stages[0].items = items;
  plan->stages[0].cost =
      100 + static_cast<int64_t>((pixels * weights / kLanes / 1.5 + moves / 4) / items);
  plan->stages[1].items = CeilDiv(part_size, 1024);
  plan->stages[1].cost = 64 * reduction.parts;
  plan->shared_bytes = reduction.parts > 1 ? reduction.parts * part_size * 4 : 0;
  plan->scratch_bytes =
      extra_bytes + RoundUp(PlanesBytes(planes, geometry.in_channels), KS_ALIGNMENT) +
      RoundUp(PlanesBytes(reduction.out_planes, reduction.channels_per_item), KS_ALIGNMENT);
  SaveParameters(reduction, plan);
  return 1;
}

// Stage 1: result = part 0 + part 1 + ..., items of 1024 sums.
KS_INLINE void AddParts(const Reduction& reduction, int64_t begin, int64_t end, const float* parts,
                        float* result) {
  const int64_t last = Min(end * 1024, reduction.part_size);
  for (int64_t i = begin * 1024; i < last; ++i) {
    float sum = parts[i];
    for (int64_t p = 1; p < reduction.parts; ++p) sum += parts[p * reduction.part_size + i];
    result[i] = sum;
  }
}

struct ReductionItem {
  int64_t part;
  int64_t tile_begin, tile_end;
  int64_t channel_begin, channel_end;
  int64_t vectors;  // Of a row of the packed tile.
  float* planes;
  float* out_planes;
};

KS_INLINE ReductionItem TakeItem(const Reduction& reduction, int64_t item, Arena arena) {
  const Planes& planes = reduction.planes;
  ReductionItem work;
  work.part = item / reduction.splits;
  const int64_t split = item % reduction.splits;
  const int64_t tiles = planes.groups * planes.row_tiles;
  work.tile_begin = PartBegin(tiles, reduction.parts, work.part);
  work.tile_end = PartBegin(tiles, reduction.parts, work.part + 1);
  work.channel_begin = Min(reduction.out_channels, split * reduction.channels_per_item);
  work.channel_end = Min(reduction.out_channels, work.channel_begin + reduction.channels_per_item);
  work.vectors = 0;
  work.planes = arena.Take<float>(PlanesBytes(planes, reduction.grid.channels) / 4);
  work.out_planes = reinterpret_cast<float*>(arena.at);
  return work;
}

// Packs the input and out_backprop of a tile; returns its grid rows.
KS_INLINE int64_t PackTile(const KsArguments& arguments, const Reduction& reduction, int64_t tile,
                           ReductionItem* work) {
  const Grid& grid = reduction.grid;
  const Planes& planes = reduction.planes;
  const int64_t first_image = tile / planes.row_tiles * planes.images;
  const int64_t first_row = tile % planes.row_tiles * planes.tile_rows;
  const int64_t rows = Min(planes.tile_rows, grid.rows - first_row);
  const int64_t images = Min(planes.images, grid.batch - first_image);
  work->vectors = CeilDiv((images - 1) * planes.pitch + grid.columns, kLanes);
  PackPlanes(grid, planes, arguments.input, 0, grid.channels, first_image,
             first_row * grid.step_height, (rows - 1) * grid.step_height + grid.reach_height + 1,
             work->planes);
  Grid out_grid = grid;
  out_grid.height = grid.rows;
  out_grid.width = grid.columns;
  out_grid.channels = arguments.geometry.out_channels;
  out_grid.step_height = out_grid.step_width = 1;
  out_grid.reach_height = out_grid.reach_width = 0;
  out_grid.pad_top = out_grid.pad_left = 0;
  Planes out_planes = reduction.out_planes;
  out_planes.source_width = grid.columns;
  PackPlanes(out_grid, out_planes, arguments.out_backprop, work->channel_begin, work->channel_end,
             first_image, first_row, rows, work->out_planes);
  return rows;
}

}  // namespace KS_ISA
}  // namespace ks

#endif  // KERAS_SPARSE_CUSTOM_OPS_KERNELS_CPU_REDUCTION_H_
