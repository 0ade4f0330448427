// Copyright 2026 The keras_sparse Authors. Licensed under the Apache License, Version 2.0.
//
// Thinned convolution, forward: out[pixel, :] = sum over kept rows k of x[pixel + offset(k)] *
// W'[k], directly from padded pixels; see terms.h.
//
// Kept rows are taken in the order (channel / 16, tap, channel): neighbouring terms then read the
// same cache line of a pixel. They are cut into chunks whose part of a panel of W' stays in the
// second-level cache, and in part in the first, while all pixels of a tile pass by.

#include "custom_ops/kernels/cpu/planes.h"
#include "custom_ops/kernels/cpu/routines.h"
#include "custom_ops/kernels/cpu/terms.h"

namespace ks {
namespace KS_ISA {
namespace {

constexpr int64_t kChunkBytes = 96 * 1024;          // Of a panel of W'.
constexpr int64_t kChunkInPlaceBytes = 256 * 1024;  // Of W', when it is read in place.
constexpr int64_t kRowsOfItem = 64;                 // Kept rows packed at a time.
constexpr int64_t kPackFrom = 100;                  // Pixels that pay for packing W'.
constexpr int64_t kLineChannels = 16;

struct Parameters {
  Tiles tiles;
  int64_t shared_tiles;  // 1: tiles are copied once, to memory of the whole call.
  int64_t splits;        // Parts of the panels, one item each.
  int64_t packed;        // 1: W' is packed into panels of consecutive rows.
};

struct Prepared {
  Term* terms;       // [kept], in the order of the sums.
  int64_t* offsets;  // Of a tile's pixels.
  int32_t* order;    // [kept]: the kept row of each term.
  int32_t* starts;   // Of the groups of channels.
  float* panels;     // Panel after panel, each [kept][its vectors * kLanes].
};

Prepared PlacePrepared(const KsArguments& arguments, const Parameters& parameters,
                       const KsMemory& memory) {
  Arena arena = {static_cast<char*>(memory.table)};
  Prepared place;
  place.terms = arena.Take<Term>(arguments.kept);
  place.offsets = arena.Take<int64_t>(TilePixels(parameters.tiles));
  place.order = arena.Take<int32_t>(arguments.kept);
  place.starts = arena.Take<int32_t>(CeilDiv(arguments.geometry.in_channels, kLineChannels) + 1);
  place.panels = static_cast<float*>(memory.filter);
  return place;
}

int64_t TableBytes(const KsArguments& arguments, const Parameters& parameters) {
  return PieceBytes(arguments.kept, sizeof(Term)) + PieceBytes(TilePixels(parameters.tiles), 8) +
         PieceBytes(arguments.kept, 4) +
         PieceBytes(CeilDiv(arguments.geometry.in_channels, kLineChannels) + 1, 4);
}

// Sorts the kept rows by group of channels. `indices` increase: taps do too, within a group. Rows
// of W' that are read in place keep their order: they come from memory once, one after another.
void SortTerms(const KsArguments& arguments, const Parameters& parameters,
               const Prepared& prepared) {
  const KsGeometry& geometry = arguments.geometry;
  const int64_t channels = geometry.in_channels;
  const int64_t line = parameters.packed ? kLineChannels : Max(1, channels);
  const int64_t groups = CeilDiv(channels, line);
  for (int pass = 0; pass < 2; ++pass) {
    if (pass == 0) {
      memset(prepared.starts, 0, (groups + 1) * 4);
    } else {
      for (int64_t g = 0; g < groups; ++g) prepared.starts[g + 1] += prepared.starts[g];
    }
    int64_t tap = 0, tap_begin = 0;
    int64_t tap_offset = 0;
    for (int64_t k = 0; k < arguments.kept; ++k) {
      const int64_t index = arguments.indices[k];
      if (index >= tap_begin + channels) {
        tap = index / channels;
        tap_begin = tap * channels;
        tap_offset = TapOffset(geometry, parameters.tiles, tap / geometry.kernel_width,
                               tap % geometry.kernel_width);
      }
      const int64_t channel = index - tap_begin;
      if (pass == 0) {
        ++prepared.starts[channel / line + 1];
        continue;
      }
      const int32_t place = prepared.starts[channel / line]++;
      prepared.order[place] = static_cast<int32_t>(k);
      prepared.terms[place] = {tap_offset + channel, parameters.packed ? place : k};
    }
  }
}

// Terms [begin, end) of W' into all panels.
void PackRows(const KsArguments& arguments, const Prepared& prepared, int64_t begin, int64_t end) {
  const Panels panels = MakePanels(arguments.geometry.out_channels);
  for (int64_t i = 0; i < panels.count; ++i) {
    const Panel panel = PanelAt(panels, i);
    const int64_t width = panel.vectors * kLanes;
    float* target = prepared.panels + arguments.kept * panel.first_vector * kLanes + begin * width;
    for (int64_t t = begin; t < end; ++t, target += width) {
      const float* row =
          arguments.filter + prepared.order[t] * panels.channels + panel.first_vector * kLanes;
      if (panel.channels == width) {
        for (int64_t v = 0; v < width; v += kLanes) Store(target + v, Load(row + v));
        continue;
      }
      for (int64_t c = 0; c < width; ++c) target[c] = c < panel.channels ? row[c] : 0;
    }
  }
}

void ComputeTile(const KsArguments& arguments, const Parameters& parameters,
                 const Prepared& prepared, const SumFunctions& functions, const Tile& tile,
                 const float* x, int64_t panel_begin, int64_t panel_end) {
  const Panels panels = MakePanels(arguments.geometry.out_channels);
  const int64_t row_bytes = parameters.packed ? kPanelVectors * kLanes * 4 : panels.channels * 4;
  const int64_t chunks = Max(
      1, CeilDiv(arguments.kept * row_bytes, parameters.packed ? kChunkBytes : kChunkInPlaceBytes));
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t first = PartBegin(arguments.kept, chunks, chunk);
    const int64_t last = PartBegin(arguments.kept, chunks, chunk + 1);
    for (int64_t i = panel_begin; i < panel_end; ++i) {
      const Panel panel = PanelAt(panels, i);
      Sums sums;
      if (parameters.packed) {
        sums.w = prepared.panels + arguments.kept * panel.first_vector * kLanes;
        sums.w_stride = panel.vectors * kLanes;
        sums.ahead = 0;
      } else {
        sums.w = arguments.filter + panel.first_vector * kLanes;
        sums.w_stride = panels.channels;
        sums.ahead =
            i + 1 < panel_end
                ? panel.vectors * kLanes
                : (last - first) * panels.channels -
                      (panel.first_vector - PanelAt(panels, panel_begin).first_vector) * kLanes;
      }
      sums.terms = prepared.terms + first;
      sums.num_terms = last - first;
      sums.out =
          arguments.output + tile.first_pixel * panels.channels + panel.first_vector * kLanes;
      sums.out_stride = panels.channels;
      sums.add = chunk > 0;
      Epilogue epilogue = MakeEpilogue(arguments);
      if (epilogue.bias != nullptr) epilogue.bias += panel.first_vector * kLanes;
      if (epilogue.residual != nullptr) epilogue.residual += sums.out - arguments.output;
      sums.epilogue = epilogue.used && chunk == chunks - 1 ? &epilogue : nullptr;
      SumPoints(functions, panel, x, prepared.offsets, tile.pixels, sums);
    }
  }
}

}  // namespace

int ThinnedConv2DPlan(const KsArguments* arguments, KsPlan* plan) {
  const KsGeometry& geometry = arguments->geometry;
  memset(plan, 0, sizeof(*plan));
  Parameters parameters = {};
  Tiles& tiles = parameters.tiles;
  if (geometry.out_channels == 0 || !PlanTiles(geometry, &tiles)) return 0;
  const int64_t num_tiles = NumTiles(tiles);
  const Panels panels = MakePanels(geometry.out_channels);
  const double pixels =
      static_cast<double>(geometry.batch) * geometry.out_height * geometry.out_width;
  // Rows that do not fill their vectors cannot be read in place.
  parameters.packed = pixels >= kPackFrom || geometry.out_channels % kLanes != 0;
  parameters.splits = 1;
  if (num_tiles < kWantedItems / 2) {
    parameters.shared_tiles = tiles.copied;
    parameters.splits = Min(CeilDiv(kWantedItems, num_tiles), panels.count);
  }

  KsStage* stage = plan->stages;
  stage->items = 1;
  stage->cost = 100 + arguments->kept * 10;
  stage->prepares = KS_PREPARES_TABLE;
  ++stage;
  stage->items = parameters.packed ? CeilDiv(arguments->kept, kRowsOfItem) : 0;
  stage->cost = 100 + kRowsOfItem * geometry.out_channels / 8;
  stage->prepares = KS_PREPARES_FILTER;
  ++stage;
  stage->items = parameters.shared_tiles ? num_tiles * tiles.images * tiles.padded_rows : 0;
  stage->cost = 100 + tiles.row_stride / 8;
  ++stage;
  stage->items = num_tiles * parameters.splits;
  stage->cost =
      100 + static_cast<int64_t>(static_cast<double>(TilePixels(tiles)) *
                                 (static_cast<double>(arguments->kept) * panels.vectors / 1.8 +
                                  static_cast<double>(geometry.in_channels) / 8) /
                                 static_cast<double>(parameters.splits));
  plan->num_stages = 4;
  plan->table_bytes = TableBytes(*arguments, parameters);
  plan->filter_bytes =
      parameters.packed ? PieceBytes(arguments->kept * panels.vectors * kLanes, 4) : 0;
  plan->scratch_bytes = parameters.shared_tiles ? 0 : TileBytes(tiles);
  plan->shared_bytes = parameters.shared_tiles ? num_tiles * TileBytes(tiles) : 0;
  SaveParameters(parameters, plan);
  return 1;
}

void ThinnedConv2DRun(const KsArguments* arguments, const KsPlan* plan, int32_t stage,
                      int64_t begin, int64_t end, const KsMemory* memory) {
  const Parameters parameters = LoadParameters<Parameters>(plan);
  const Tiles& tiles = parameters.tiles;
  const Prepared prepared = PlacePrepared(*arguments, parameters, *memory);
  float* const shared_tiles = static_cast<float*>(memory->shared);
  const int64_t tile_size = TileBytes(tiles) / 4;
  const int64_t tile_rows = tiles.images * tiles.padded_rows;
  if (stage == 0) {
    SortTerms(*arguments, parameters, prepared);
    PixelOffsets(tiles, prepared.offsets);
    return;
  }
  if (stage == 1) {
    PackRows(*arguments, prepared, begin * kRowsOfItem, Min(arguments->kept, end * kRowsOfItem));
    return;
  }
  if (stage == 2) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t tile_index = item / tile_rows;
      const int64_t row = item % tile_rows;
      const Tile tile = TileAt(tiles, tile_index);
      if (row >= tile.images * tiles.padded_rows) continue;
      CopyRows(tiles, tile, arguments->input, row, row + 1, shared_tiles + tile_index * tile_size);
    }
    return;
  }

  const SumFunctions functions = AllSumFunctions();
  const int64_t panels = MakePanels(arguments->geometry.out_channels).count;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t tile_index = item / parameters.splits;
    const int64_t split = item % parameters.splits;
    const Tile tile = TileAt(tiles, tile_index);
    float* copy = static_cast<float*>(memory->scratch);
    if (parameters.shared_tiles) {
      copy = shared_tiles + tile_index * tile_size;
    } else if (tiles.copied) {
      CopyRows(tiles, tile, arguments->input, 0, tile.images * tiles.padded_rows, copy);
    }
    ComputeTile(*arguments, parameters, prepared, functions, tile,
                TileData(tiles, tile, arguments->input, copy),
                PartBegin(panels, parameters.splits, split),
                PartBegin(panels, parameters.splits, split + 1));
  }
}

}  // namespace KS_ISA
}  // namespace ks
