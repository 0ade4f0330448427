// Copyright 2026 The keras_sparse Authors. Licensed under the Apache License, Version 2.0.
//
// Gradient of the thinned convolution with respect to its filter: dW'[k, :] = sum over pixels of
// x[pixel + offset(k)] * out_backprop[pixel, :]; see terms.h. The input is turned into zero-padded
// planes, one per channel, tile by tile, so that neighbouring pixels of a kept row share cache
// lines; out_backprop is read in place.
//
// The work is cut into parts of the pixels, each with sums of its own (see reduction.h), and the
// parts into splits by input channels, which share nothing but out_backprop.

#include "custom_ops/kernels/cpu/planes.h"
#include "custom_ops/kernels/cpu/reduction.h"
#include "custom_ops/kernels/cpu/routines.h"
#include "custom_ops/kernels/cpu/terms.h"

namespace ks {
namespace KS_ISA {
namespace {

constexpr int64_t kChunkPixels = 256;  // Summed up before results are added to.
constexpr int64_t kSplitChannels = 16;

struct Parameters {
  Tiles tiles;
  Parts parts;
  int64_t splits;       // Parts of the input channels.
  int64_t plane_width;  // Columns of a plane.
  int64_t plane;        // Floats from plane to plane.
  int64_t packed;       // 1: out_backprop is copied, so that every pixel fills its vectors.
};

struct Prepared {
  Point* points;    // [kept], split after split.
  int64_t* starts;  // [splits + 1]: of the points.
  Term* terms;      // Of a tile's pixels.
  uint8_t* used;    // Whether a group of kLanes input channels has kept rows.
};

KS_INLINE int64_t Groups(const KsGeometry& geometry) {
  return CeilDiv(geometry.in_channels, kLanes);
}
Prepared PlacePrepared(const KsArguments& arguments, const Parameters& parameters,
                       const KsMemory& memory) {
  Arena arena = {static_cast<char*>(memory.table)};
  Prepared place;
  place.points = arena.Take<Point>(arguments.kept);
  place.starts = arena.Take<int64_t>(parameters.splits + 1);
  place.terms = arena.Take<Term>(TilePixels(parameters.tiles));
  place.used = arena.Take<uint8_t>(Groups(arguments.geometry));
  return place;
}
int64_t TableBytes(const KsArguments& arguments, const Parameters& parameters) {
  return PieceBytes(arguments.kept, sizeof(Point)) + PieceBytes(parameters.splits + 1, 8) +
         PieceBytes(TilePixels(parameters.tiles), sizeof(Term)) +
         PieceBytes(Groups(arguments.geometry), 1);
}

// Where the channels of a split begin.
int64_t SplitChannel(const KsGeometry& geometry, const Parameters& parameters, int64_t split) {
  return Min(geometry.in_channels,
             PartBegin(CeilDiv(geometry.in_channels, kSplitChannels), parameters.splits, split) *
                 kSplitChannels);
}
int64_t MostSplitChannels(const KsGeometry& geometry, const Parameters& parameters) {
  return Min(
      geometry.in_channels,
      CeilDiv(CeilDiv(geometry.in_channels, kSplitChannels), parameters.splits) * kSplitChannels);
}

void Prepare(const KsArguments& arguments, const Parameters& parameters, const Prepared& prepared) {
  const KsGeometry& geometry = arguments.geometry;
  const Tiles& tiles = parameters.tiles;
  memset(prepared.used, 0, Groups(geometry));
  Point* point = prepared.points;
  for (int64_t split = 0; split < parameters.splits; ++split) {
    prepared.starts[split] = point - prepared.points;
    const int64_t first = SplitChannel(geometry, parameters, split);
    const int64_t last = SplitChannel(geometry, parameters, split + 1);
    for (int64_t k = 0; k < arguments.kept; ++k) {
      const int64_t channel = arguments.indices[k] % geometry.in_channels;
      if (channel < first || channel >= last) continue;
      prepared.used[channel / kLanes] = 1;
      const int64_t tap = arguments.indices[k] / geometry.in_channels;
      *point++ = {
          (channel - first) * parameters.plane +
              tap / geometry.kernel_width * geometry.dilation_height * parameters.plane_width +
              tap % geometry.kernel_width * geometry.dilation_width,
          k * geometry.out_channels};
    }
  }
  prepared.starts[parameters.splits] = point - prepared.points;
  for (int64_t p = 0; p < TilePixels(tiles); ++p) {
    const int64_t row = p / tiles.grid.columns;
    prepared.terms[p] = {static_cast<int32_t>((row / tiles.rows * tiles.padded_rows +
                                               row % tiles.rows * tiles.grid.step_height) *
                                                  parameters.plane_width +
                                              p % tiles.grid.columns * tiles.grid.step_width),
                         static_cast<int32_t>(p)};
  }
}

// Fills the planes of `channels` channels, from `first` on; `zeros` holds a pixel of them.
void PackTile(const Parameters& parameters, const Tile& tile, const float* input, int64_t first,
              int64_t channels, const uint8_t* used, const float* zeros, float* planes) {
  const Tiles& tiles = parameters.tiles;
  const Grid& grid = tiles.grid;
  const int64_t top = tile.first_row * grid.step_height - grid.pad_top;
  const int64_t size = tile.images * tiles.padded_rows * parameters.plane_width;
  const float* image = input + tile.first_image * grid.height * grid.width * grid.channels + first;
  int64_t row = 0, column = 0;
  for (int64_t at = 0; at < size; at += kLanes) {
    const float* pixels[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      const int64_t y = top + row, x = column - grid.pad_left;
      // Rows below a lower tile's last one are there, or not: nothing reads them.
      const bool inside = at + l < size && y >= 0 && y < grid.height && x >= 0 && x < grid.width;
      pixels[l] = inside ? image + (y * grid.width + x) * grid.channels : zeros;
      if (++column < parameters.plane_width) continue;
      column = 0;
      if (++row < tiles.padded_rows) continue;
      row = 0;
      image += grid.height * grid.width * grid.channels;
    }
    float* const target = planes + at;
    if (channels < kLanes) {
      for (int64_t c = 0; c < channels; ++c) {
        for (int l = 0; l < kLanes; ++l) target[c * parameters.plane + l] = pixels[l][c];
      }
      continue;
    }
    for (int64_t c = 0; c < channels; c += kLanes) {
      const int64_t channel = Min(c, channels - kLanes);
      if (!used[c / kLanes] && channel == c) continue;
      Vec rows[kLanes];
      KS_UNROLL
      for (int l = 0; l < kLanes; ++l) {
        rows[l] = Load(pixels[l] + channel);
        FetchFar(pixels[l] + channel + kLanes * grid.channels);
      }
      Transpose(rows);
      KS_UNROLL
      for (int l = 0; l < kLanes; ++l) Store(target + (channel + l) * parameters.plane, rows[l]);
    }
  }
}

}  // namespace

int ThinnedConv2DBackpropFilterPlan(const KsArguments* arguments, KsPlan* plan) {
  const KsGeometry& geometry = arguments->geometry;
  memset(plan, 0, sizeof(*plan));
  Parameters parameters = {};
  Tiles& tiles = parameters.tiles;
  if (!PlanTiles(geometry, true, &tiles)) return 0;
  const Grid& grid = tiles.grid;
  if (grid.pad_left < 0 || grid.pad_top < 0) return 0;
  const int64_t num_tiles = NumTiles(tiles);
  const int64_t sums = arguments->kept * geometry.out_channels;
  const Panels panels = MakePanels(geometry.out_channels);
  parameters.plane_width = (grid.columns - 1) * grid.step_width + grid.reach_width + 1;
  // The last vector of a plane may be stored past its pixels.
  parameters.plane = OddLines(tiles.images * tiles.padded_rows * parameters.plane_width + kLanes);
  if (parameters.plane > int64_t{1} << 30) return 0;

  // Every part adds a result to sum up, every split reads out_backprop once more.
  const int64_t most_parts = Min(Min(num_tiles, kWantedItems), MostParts(sums));
  const int64_t most_splits = Max(
      1, Min(CeilDiv(geometry.in_channels, kSplitChannels), arguments->kept / (4 * kMostPoints)));
  const double pixels =
      static_cast<double>(geometry.batch) * geometry.out_height * geometry.out_width;
  int64_t parts = 1, items = 0;
  double best = 0;
  for (int64_t candidate = 1; candidate <= most_parts;
       candidate = candidate < most_parts ? Min(candidate * 2, most_parts) : most_parts + 1) {
    const int64_t splits = Min(CeilDiv(kWantedItems, candidate), most_splits);
    const double cost = static_cast<double>(candidate > 1 ? 3 * candidate : 0) * arguments->kept +
                        static_cast<double>(splits) * pixels;
    const int64_t enough = Min(candidate * splits, kWantedItems);
    if (enough < items || (enough == items && cost >= best)) continue;
    items = enough;
    best = cost;
    parts = candidate;
    parameters.splits = splits;
  }
  parameters.parts = MakeParts(parts, sums);
  parameters.packed = geometry.out_channels % kLanes != 0;

  KsStage* stage = plan->stages;
  stage->items = 1;
  stage->cost = 100 + arguments->kept * (8 + 2 * parameters.splits) + TilePixels(tiles) * 8;
  stage->prepares = KS_PREPARES_TABLE;
  ++stage;
  stage->items = parts * parameters.splits;
  stage->cost =
      100 + static_cast<int64_t>(static_cast<double>(num_tiles) * TilePixels(tiles) *
                                 (static_cast<double>(arguments->kept) * panels.vectors / 1.8 +
                                  static_cast<double>(geometry.in_channels) / 4) /
                                 static_cast<double>(stage->items));
  ++stage;
  PlanPartsStage(parameters.parts, stage);
  plan->num_stages = 3;
  plan->table_bytes = TableBytes(*arguments, parameters);
  plan->shared_bytes = PartsBytes(parameters.parts);
  plan->scratch_bytes =
      PieceBytes(parameters.packed ? TilePixels(tiles) * panels.vectors * kLanes : 0, 4) +
      PieceBytes(geometry.in_channels, 4) +
      PieceBytes(MostSplitChannels(geometry, parameters) * parameters.plane, 4);
  if (plan->scratch_bytes > kScratchLimit) return 0;
  SaveParameters(parameters, plan);
  return 1;
}

void ThinnedConv2DBackpropFilterRun(const KsArguments* arguments, const KsPlan* plan, int32_t stage,
                                    int64_t begin, int64_t end, const KsMemory* memory) {
  const KsGeometry& geometry = arguments->geometry;
  const Parameters parameters = LoadParameters<Parameters>(plan);
  const Prepared prepared = PlacePrepared(*arguments, parameters, *memory);
  float* const part_sums = static_cast<float*>(memory->shared);
  if (stage == 0) {
    Prepare(*arguments, parameters, prepared);
    return;
  }
  if (stage == 2) {
    AddParts(parameters.parts, begin, end, part_sums, arguments->output);
    return;
  }
  const Tiles& tiles = parameters.tiles;
  const Panels panels = MakePanels(geometry.out_channels);
  Arena arena = {static_cast<char*>(memory->scratch)};
  const int64_t packed_channels = panels.vectors * kLanes;
  float* const packed =
      arena.Take<float>(parameters.packed ? TilePixels(tiles) * packed_channels : 0);
  float* const zeros = arena.Take<float>(geometry.in_channels);
  float* const planes = reinterpret_cast<float*>(arena.at);
  if (geometry.in_channels > 0) memset(zeros, 0, geometry.in_channels * 4);

  for (int64_t item = begin; item < end; ++item) {
    const int64_t part = item / parameters.splits;
    const int64_t split = item % parameters.splits;
    const int64_t first = SplitChannel(geometry, parameters, split);
    const int64_t channels = SplitChannel(geometry, parameters, split + 1) - first;
    float* const result = PartSums(parameters.parts, part, part_sums, arguments->output);
    bool add = false;
    for (int64_t t = PartBegin(NumTiles(tiles), parameters.parts.count, part);
         t < PartBegin(NumTiles(tiles), parameters.parts.count, part + 1); ++t) {
      const Tile tile = TileAt(tiles, t);
      PackTile(parameters, tile, arguments->input, first, channels, prepared.used + first / kLanes,
               zeros, planes);
      const float* d = arguments->out_backprop + tile.first_pixel * geometry.out_channels;
      if (parameters.packed) {
        memset(packed, 0, tile.pixels * packed_channels * 4);
        for (int64_t p = 0; p < tile.pixels; ++p) {
          memcpy(packed + p * packed_channels, d + p * geometry.out_channels,
                 geometry.out_channels * 4);
        }
        d = packed;
      }
      const int64_t chunks = CeilDiv(tile.pixels, kChunkPixels);
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t pixel = PartBegin(tile.pixels, chunks, chunk);
        for (int64_t i = 0; i < panels.count; ++i) {
          const Panel panel = PanelAt(panels, i);
          Sums sums = {};
          sums.x = planes;
          sums.w = d + panel.first_vector * kLanes;
          sums.w_stride = parameters.packed ? packed_channels : geometry.out_channels;
          sums.terms = prepared.terms + pixel;
          sums.num_terms = PartBegin(tile.pixels, chunks, chunk + 1) - pixel;
          sums.in_order = true;
          sums.out = result + panel.first_vector * kLanes;
          sums.add = add;
          SumPoints(panel, prepared.points + prepared.starts[split],
                    prepared.starts[split + 1] - prepared.starts[split], sums);
        }
        add = true;
      }
    }
  }
}

}  // namespace KS_ISA
}  // namespace ks
