// Copyright 2026 The keras_sparse Authors. Licensed under the Apache License, Version 2.0.
//
// Gradient of the connection-table convolution with respect to its filter: for every kept
// connection, dot products of an input plane, shifted by each tap, with an output plane. The dense
// gradient is never formed.
//
// Both planes have a region in every lane, see lane_planes.h. A block of taps stays in registers
// over a whole region and is summed over its lanes once. Where there are many groups of regions,
// they are cut into a fixed number of parts, each with sums of its own, which are added in order at
// the end; where there are few, all planes are packed first, and output channels are shared out.

#include "custom_ops/kernels/cpu/lane_planes.h"
#include "custom_ops/kernels/cpu/planes.h"
#include "custom_ops/kernels/cpu/reduction.h"
#include "custom_ops/kernels/cpu/routines.h"

namespace ks {
namespace KS_ISA {
namespace {

constexpr int kMaxProducts = 9;
constexpr int kMaxWindowColumns = 10;  // Of a region, where windows are used.

// Input planes worked on at a time stay in the second-level cache, and a region of a plane in the
// first. With few taps a vector of x is used too seldom for that: all of it stays in the first.
constexpr int64_t kChannelsBytes = 672 * 1024;
constexpr int64_t kMostPositions = 160;
constexpr int64_t kFewTapsBytes = 54 * 1024;
constexpr int64_t kFewTapsPositions = 13;
KS_INLINE bool FewTaps(double taps) { return taps < 3; }

struct Parameters {
  LaneRegions regions;
  int64_t x_rows, x_columns, x_size, d_size;
  int64_t pointwise;
  int64_t windows;         // 1: 3 x 3 neighbouring taps.
  int64_t block_channels;  // Input channels worked on at a time.
  int64_t groups;
  int64_t shared_planes;  // 1: all planes are packed in stage 0.
  int64_t splits;         // Parts of the output channels.
  int64_t split_channels;
  Parts parts;
};

// --- Dot products --------------------------------------------------------------------------------

// Where dot products run, in floats.
struct Region {
  int64_t rows, columns;
  int64_t x_row, x_column;  // From one grid position to the next.
  int64_t tap_row;          // From one tap to the next one below.
};

// results[p] += dot product of x + offsets[p] and d, for kCount values of p.
template <int kCount>
void DotAny(const Region& region, const float* x, const int64_t* offsets, const float* d,
            float* results) {
  Vec sums[kCount] = {};
  const float* base[kCount];
  KS_UNROLL
  for (int p = 0; p < kCount; ++p) base[p] = x + offsets[p];
  for (int64_t r = 0; r < region.rows; ++r) {
    int64_t at = r * region.x_row;
    for (int64_t q = 0; q < region.columns; ++q) {
      const Vec here = Load(d);
      KS_UNROLL
      for (int p = 0; p < kCount; ++p) sums[p] += here * Load(base[p] + at);
      at += region.x_column;
      d += kLanes;
    }
  }
  AddLaneSums(sums, results);
}

// 3 x 3 neighbouring taps at kColumns neighbouring positions: a vector of x is loaded once for all
// taps that read it. Positions take turns in the sets of sums, which hides the latency of adding.
template <int kColumns, int kSets>
KS_INLINE void AddWindow(const float* x, int64_t tap_row, const float* d, Vec (&sums)[kSets][9]) {
  Vec values[kColumns];
  KS_UNROLL
  for (int q = 0; q < kColumns; ++q) values[q] = Load(d + q * kLanes);
  KS_UNROLL
  for (int i = 0; i < 3; ++i) {
    const float* row = x + i * tap_row;
    KS_UNROLL
    for (int t = 0; t < kColumns + 2; ++t) {
      const Vec here = Load(row + t * kLanes);
      KS_UNROLL
      for (int j = 0; j < 3; ++j) {
        if (t - j >= 0 && t - j < kColumns) {
          sums[(t - j) % kSets][i * 3 + j] += here * values[t - j];
        }
      }
    }
  }
}

// All windows of a row of kColumns positions.
template <int kColumns, int kSets>
struct AddRow {
  KS_INLINE void Run(const float* x, int64_t tap_row, const float* d, Vec (&sums)[kSets][9]) {
    constexpr int kHere = kColumns > 5 ? 4 : kColumns;
    AddWindow<kHere, kSets>(x, tap_row, d, sums);
    AddRow<kColumns - kHere, kSets>::Run(x + kHere * kLanes, tap_row, d + kHere * kLanes, sums);
  }
};
template <int kSets>
struct AddRow<0, kSets> {
  KS_INLINE void Run(const float*, int64_t, const float*, Vec (&)[kSets][9]) {}
};

// region.columns is kColumns.
template <int kColumns>
void DotThreeByThree(const Region& region, const float* x, const float* d, float* results) {
  constexpr int kSets = kRegisters == 32 ? 2 : 1;
  Vec sums[kSets][9] = {};
  const int64_t tap_row = region.tap_row, x_row = region.x_row;
  for (int64_t r = region.rows; r > 0; --r) {
    AddRow<kColumns, kSets>::Run(x, tap_row, d, sums);
    x += x_row;
    d += kColumns * kLanes;
  }
  KS_UNROLL
  for (int t = 0; t < 9; ++t)
    sums[0][t] = kSets == 2 ? sums[0][t] + sums[kSets - 1][t] : sums[0][t];
  AddLaneSums(sums[0], results);
}

typedef void (*WindowFunction)(const Region&, const float*, const float*, float*);
template <int kColumns>
struct FillWindowFunctions {
  static void Run(WindowFunction* functions) {
    functions[kColumns] = DotThreeByThree<kColumns>;
    FillWindowFunctions<kColumns - 1>::Run(functions);
  }
};
template <>
struct FillWindowFunctions<0> {
  static void Run(WindowFunction*) {}
};

typedef void (*DotFunction)(const Region&, const float*, const int64_t*, const float*, float*);
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

// --- The plan ------------------------------------------------------------------------------------

// A convolution with one tap sees pixels: the batch is one long row of them.
Grid ReductionGrid(const KsGeometry& geometry, bool pointwise) {
  Grid grid = ForwardGrid(geometry);
  if (pointwise) {
    grid.width = grid.columns = grid.batch * grid.height * grid.width;
    grid.batch = grid.height = grid.rows = 1;
  }
  return grid;
}

// Whether regions of `size` positions along an axis are the smallest of their number.
bool CutsEvenly(int64_t axis, int64_t size) { return CeilDiv(axis, CeilDiv(axis, size)) == size; }

// Cuts the grid into the regions that look cheapest, in clock cycles.
void ChooseRegions(const Grid& grid, double taps, double kept, double out_channels,
                   Parameters* parameters) {
  const int64_t most_positions =
      FewTaps(taps) ? kFewTapsPositions
                    : Max(kMostPositions, 3 * (grid.reach_height + 1) * (grid.reach_width + 1));
  const int64_t most_columns = parameters->windows ? kMaxWindowColumns : most_positions;
  double best = -1;
  for (int64_t rows = 1; rows <= Min(grid.rows, most_positions); ++rows) {
    if (!CutsEvenly(grid.rows, rows)) continue;
    const int64_t x_rows = (rows - 1) * grid.step_height + grid.reach_height + 1;
    for (int64_t columns = 1; columns <= Min(grid.columns, most_columns); ++columns) {
      const int64_t x_columns = (columns - 1) * grid.step_width + grid.reach_width + 1;
      if (best >= 0 && x_rows * x_columns > most_positions) break;
      if (!CutsEvenly(grid.columns, columns)) continue;
      const LaneRegions regions = {grid.batch, rows, columns, CeilDiv(grid.rows, rows),
                                   CeilDiv(grid.columns, columns)};
      const double positions = static_cast<double>(rows * columns);
      const double x_positions = static_cast<double>(x_rows) * static_cast<double>(x_columns);
      // Packing; then multiply-adds, sums over lanes and loads of each connection.
      const double cost =
          static_cast<double>(LaneGroups(regions)) *
          (3 * (x_positions * static_cast<double>(grid.channels) + positions * out_channels) +
           kept * (positions * taps / 1.9 + 2.5 * taps + x_positions * 0.7));
      if (best < 0 || cost < best) {
        best = cost;
        parameters->regions = regions;
        parameters->x_rows = x_rows;
        parameters->x_columns = x_columns;
      }
    }
  }
}

}  // namespace

int ConnectionConv2DBackpropFilterPlan(const KsArguments* arguments, KsPlan* plan) {
  const KsGeometry& geometry = arguments->geometry;
  memset(plan, 0, sizeof(*plan));
  const double taps =
      static_cast<double>(geometry.kernel_height) * static_cast<double>(geometry.kernel_width);
  if (taps > 1 << 16) return 0;
  if (geometry.batch == 0 || geometry.out_height == 0 || geometry.out_width == 0) return 0;
  Parameters parameters = {};
  parameters.pointwise = IsPointwise(geometry);
  parameters.windows = geometry.kernel_height == 3 && geometry.kernel_width == 3 &&
                       geometry.stride_width == 1 && geometry.dilation_width == 1;
  const Grid grid = ReductionGrid(geometry, parameters.pointwise);
  const double reach =
      (static_cast<double>(grid.reach_height) + 1) * (static_cast<double>(grid.reach_width) + 1);
  if (reach > 1 << 16) return 0;
  ChooseRegions(grid, taps, static_cast<double>(arguments->kept),
                static_cast<double>(geometry.out_channels), &parameters);
  const LaneRegions& regions = parameters.regions;
  parameters.x_size = LanePlaneSize(parameters.x_rows, parameters.x_columns);
  parameters.d_size = LanePlaneSize(regions.rows, regions.columns);
  parameters.block_channels = Min(
      RoundUp(Max(1, geometry.in_channels), kLanes),
      Max(1, (FewTaps(taps) ? kFewTapsBytes : kChannelsBytes) / (parameters.x_size * 4 * kLanes)) *
          kLanes);
  const int64_t groups = parameters.groups = LaneGroups(regions);

  const int64_t sums = arguments->kept * static_cast<int64_t>(taps);
  int64_t parts = 1;
  const double planes_bytes =
      4.0 * static_cast<double>(groups) *
      (static_cast<double>(parameters.x_size) * static_cast<double>(geometry.in_channels) +
       static_cast<double>(parameters.d_size) * static_cast<double>(geometry.out_channels));
  if (groups < kWantedItems / 2 && planes_bytes <= static_cast<double>(kScratchLimit) / 2) {
    parameters.shared_planes = 1;
    parameters.splits = kWantedItems;
  } else {
    parts = Min(kWantedItems, Min(groups, MostParts(sums)));
    parameters.splits = parts >= kWantedItems / 2 ? 1 : CeilDiv(kWantedItems, parts);
  }
  parameters.split_channels = RoundUp(CeilDiv(geometry.out_channels, parameters.splits), kLanes);
  if (parameters.shared_planes) {
    parameters.split_channels = Max(1, CeilDiv(geometry.out_channels, parameters.splits));
  }
  parameters.splits = Max(1, CeilDiv(geometry.out_channels, Max(1, parameters.split_channels)));
  parameters.parts = MakeParts(parts, sums);

  const int64_t x_items = CeilDiv(geometry.in_channels, kPackedChannels);
  const int64_t d_items = CeilDiv(geometry.out_channels, kPackedChannels);
  KsStage* stage = plan->stages;
  stage->items = parameters.shared_planes ? groups * (x_items + d_items) : 0;
  stage->cost = 100 + parameters.x_size * kPackedChannels / 5;
  ++stage;
  stage->items = parts * parameters.splits;
  stage->cost =
      100 + static_cast<int64_t>(
                static_cast<double>(groups) *
                (static_cast<double>(parameters.x_size) * static_cast<double>(grid.channels) / 5 +
                 static_cast<double>(arguments->kept) * taps *
                     static_cast<double>(regions.rows * regions.columns) / 1.8) /
                static_cast<double>(stage->items));
  ++stage;
  PlanPartsStage(parameters.parts, stage);
  plan->num_stages = 3;

  const int64_t x_bytes =
      PieceBytes(parameters.x_size * (parameters.shared_planes ? groups * geometry.in_channels
                                                               : parameters.block_channels),
                 4);
  const int64_t d_bytes =
      PieceBytes(parameters.d_size * (parameters.shared_planes ? groups * geometry.out_channels
                                                               : parameters.split_channels),
                 4);
  if (x_bytes + d_bytes > kScratchLimit) return 0;
  plan->shared_bytes = PartsBytes(parameters.parts);
  plan->scratch_bytes =
      PieceBytes(static_cast<int64_t>(taps), 8) + PieceBytes(parameters.split_channels, 4);
  (parameters.shared_planes ? plan->shared_bytes : plan->scratch_bytes) += x_bytes + d_bytes;
  SaveParameters(parameters, plan);
  return 1;
}

namespace {

struct Work {
  const KsArguments& arguments;
  const Parameters& parameters;
  Region region;
  int64_t taps;
  int64_t* offsets;  // Of the taps, in a plane.
  int32_t* next;     // Next connection of each output channel of the item.
  float* sums;
  DotFunction dot[kMaxProducts + 1];
  WindowFunction windows[kMaxWindowColumns + 1];
};

// All connections from input channels below channel_end that have not been taken yet. `x` is the
// plane of channel_begin, `d` that of out_begin.
void AddProducts(Work* work, int64_t channel_begin, int64_t channel_end, const float* x,
                 int64_t out_begin, int64_t out_end, const float* d) {
  const KsArguments& arguments = work->arguments;
  const Parameters& parameters = work->parameters;
  const int64_t taps = work->taps;
  for (int64_t o = out_begin; o < out_end; ++o, d += parameters.d_size) {
    const int64_t first = work->next[o - out_begin];
    const int64_t end = arguments.row_splits[o + 1];
    int64_t last = first;
    while (last < end && arguments.input_channels[last] < channel_end) ++last;
    work->next[o - out_begin] = static_cast<int32_t>(last);
    if (parameters.windows) {
      const WindowFunction dot = work->windows[parameters.regions.columns];
      for (int64_t c = first; c < last; ++c) {
        dot(work->region, x + (arguments.input_channels[c] - channel_begin) * parameters.x_size, d,
            work->sums + c * taps);
      }
      continue;
    }
    // Products in table order, up to kMaxProducts at a time.
    int64_t c = first, t = 0;
    float* results = work->sums + first * taps;
    for (int64_t left = (last - first) * taps; left > 0;) {
      const int64_t count = Min(kMaxProducts, left);
      int64_t at[kMaxProducts];
      for (int64_t i = 0; i < count; ++i) {
        at[i] =
            (arguments.input_channels[c] - channel_begin) * parameters.x_size + work->offsets[t];
        if (++t == taps) {
          t = 0;
          ++c;
        }
      }
      work->dot[count](work->region, x, at, d, results);
      results += count;
      left -= count;
    }
  }
}

}  // namespace

void ConnectionConv2DBackpropFilterRun(const KsArguments* arguments, const KsPlan* plan,
                                       int32_t stage, int64_t begin, int64_t end,
                                       const KsMemory* memory) {
  const KsGeometry& geometry = arguments->geometry;
  const Parameters parameters = LoadParameters<Parameters>(plan);
  const LaneRegions& regions = parameters.regions;
  Arena shared_arena = {static_cast<char*>(memory->shared)};
  float* const part_sums = shared_arena.Take<float>(PartsBytes(parameters.parts) / 4);
  if (stage == 2) {
    AddParts(parameters.parts, begin, end, part_sums, arguments->output);
    return;
  }
  const Grid grid = ReductionGrid(geometry, parameters.pointwise);
  const LaneSource x_source = {arguments->input,     grid.height,      grid.width,
                               grid.channels,        grid.step_height, grid.step_width,
                               grid.pad_top,         grid.pad_left,    parameters.x_rows,
                               parameters.x_columns, parameters.x_size};
  const LaneSource d_source = {arguments->out_backprop,
                               grid.rows,
                               grid.columns,
                               geometry.out_channels,
                               1,
                               1,
                               0,
                               0,
                               regions.rows,
                               regions.columns,
                               parameters.d_size};
  const int64_t x_group = geometry.in_channels * parameters.x_size;
  const int64_t d_group = geometry.out_channels * parameters.d_size;
  if (stage == 0) {
    float* const x = shared_arena.Take<float>(parameters.groups * x_group);
    float* const d = reinterpret_cast<float*>(shared_arena.at);
    const int64_t x_items = CeilDiv(geometry.in_channels, kPackedChannels);
    const int64_t items = x_items + CeilDiv(geometry.out_channels, kPackedChannels);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t group = item / items;
      const bool is_x = item % items < x_items;
      const LaneSource& source = is_x ? x_source : d_source;
      const int64_t channel = (is_x ? item % items : item % items - x_items) * kPackedChannels;
      PackLanes(regions, source, group, channel, Min(channel + kPackedChannels, source.channels),
                (is_x ? x + group * x_group : d + group * d_group) + channel * source.plane_size);
    }
    return;
  }

  const int64_t taps = geometry.kernel_height * geometry.kernel_width;
  const int64_t x_columns = parameters.x_columns;
  Arena arena = {static_cast<char*>(memory->scratch)};
  Work work = {*arguments, parameters, {}, taps, nullptr, nullptr, nullptr, {}, {}};
  work.region = {regions.rows, regions.columns, grid.step_height * x_columns * kLanes,
                 grid.step_width * kLanes, geometry.dilation_height * x_columns * kLanes};
  work.offsets = arena.Take<int64_t>(taps);
  work.next = arena.Take<int32_t>(parameters.split_channels);
  for (int64_t t = 0; t < taps; ++t) {
    work.offsets[t] = t / geometry.kernel_width * work.region.tap_row +
                      t % geometry.kernel_width * geometry.dilation_width * kLanes;
  }
  FillWindowFunctions<kMaxWindowColumns>::Run(work.windows);
  FillDotFunctions<kMaxProducts>::Run(work.dot);
  Arena& planes_arena = parameters.shared_planes ? shared_arena : arena;
  float* const x_planes = planes_arena.Take<float>(
      parameters.shared_planes ? parameters.groups * x_group
                               : parameters.block_channels * parameters.x_size);
  float* const d_planes = reinterpret_cast<float*>(planes_arena.at);

  for (int64_t item = begin; item < end; ++item) {
    const int64_t part = item / parameters.splits;
    const int64_t split = item % parameters.splits;
    const int64_t out_begin = Min(geometry.out_channels, split * parameters.split_channels);
    const int64_t out_end = Min(geometry.out_channels, out_begin + parameters.split_channels);
    work.sums = PartSums(parameters.parts, part, part_sums, arguments->output);
    const int64_t first = arguments->row_splits[out_begin];
    const int64_t last = arguments->row_splits[out_end];
    if (last > first) memset(work.sums + first * taps, 0, (last - first) * taps * 4);
    for (int64_t group = PartBegin(parameters.groups, parameters.parts.count, part);
         group < PartBegin(parameters.groups, parameters.parts.count, part + 1); ++group) {
      const float* d = d_planes + group * d_group + out_begin * parameters.d_size;
      if (!parameters.shared_planes) {
        for (int64_t o = out_begin; o < out_end; o += kPackedChannels) {
          PackLanes(regions, d_source, group, o, Min(o + kPackedChannels, out_end),
                    d_planes + (o - out_begin) * parameters.d_size);
        }
        d = d_planes;
      }
      for (int64_t o = out_begin; o < out_end; ++o) {
        work.next[o - out_begin] = arguments->row_splits[o];
      }
      for (int64_t c = 0; c < geometry.in_channels; c += parameters.block_channels) {
        const int64_t c_end = Min(geometry.in_channels, c + parameters.block_channels);
        const float* x = x_planes + group * x_group + c * parameters.x_size;
        if (!parameters.shared_planes) {
          for (int64_t i = c; i < c_end; i += kPackedChannels) {
            PackLanes(regions, x_source, group, i, Min(i + kPackedChannels, c_end),
                      x_planes + (i - c) * parameters.x_size);
          }
          x = x_planes;
        }
        AddProducts(&work, c, c_end, x, out_begin, out_end, d);
      }
    }
  }
}

}  // namespace KS_ISA
}  // namespace ks
