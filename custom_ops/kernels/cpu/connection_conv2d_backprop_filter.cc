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

// Input planes worked on at a time stay in the second-level cache, and a region of a plane in the
// first. With few taps a vector of x is used too seldom for that: all of it stays in the first.
constexpr int64_t kChannelsBytes = 672 * 1024;
constexpr int64_t kMostPositions = 160;
constexpr int64_t kTileBytes = 20 * 1024;
KS_INLINE double Density(const KsGeometry& geometry, double kept) {
  return kept / (static_cast<double>(geometry.in_channels) * geometry.out_channels + 1);
}
KS_INLINE bool FewTaps(double taps) { return taps < 3; }
// Shorter vectors leave room for more of them, which pays where an output channel has several
// connections from the input channels of a block.
KS_INLINE int64_t FewTapsPositions(double density) {
  return kLanes == 16 || density < 0.07 ? 13 : 26;
}

// With few connections, a call for those of an output channel from the input channels of a block
// costs more than reading x from the second-level cache.
KS_INLINE int64_t FewTapsBytes(double density) {
  return (kLanes == 16 && density < 0.07 ? 108 : 54) * 1024;
}

// Few groups are all packed first, for several threads to share. Planes that take more than the
// second-level cache then wait in the third.
KS_INLINE bool PacksAllFirst(int64_t groups) { return groups < kWantedItems / 2; }
constexpr double kWaitingBytes = 768 * 1024;

// Clock cycles, roughly: of a vector to pack, a vector of products, a sum over lanes, a connection,
// and a vector of x that is read.
constexpr double kPackCost = 4;
constexpr double kWaitingPackCost = 8;
constexpr double kProductCost = 0.52;
constexpr double kSumCost = 1.5;
constexpr double kConnectionCost = 6;
constexpr double kLoadCost = 0.5;

KS_INLINE void Swap(int64_t* a, int64_t* b) {
  const int64_t value = *a;
  *a = *b;
  *b = value;
}

// Where dot products run, in floats.
struct Region {
  int64_t rows, columns;
  int64_t x_row, x_column;  // From one grid position to the next.
  int64_t tap_row;          // From one tap to the next one below.
  int64_t tap_rows;
  int64_t x_size;  // Of a plane.
};

struct Parameters {
  LaneRegions regions;
  int64_t x_rows, x_columns, x_size, d_size;
  int64_t pointwise;
  int64_t outer;           // 1: dense blocks of outer products.
  int64_t swapped;         // 1: rows and columns have traded places.
  int64_t window_columns;  // Of taps; 0 where products are taken tap by tap.
  // 1: a region is as high (wide) as the image. Its planes have no margin above and below (left and
  // right): taps that fall into the padding are skipped.
  int64_t tall, wide;
  int64_t block_channels;  // Input channels worked on at a time,
  int64_t blocks;          // and in how many blocks.
  int64_t tile_channels;   // Output channels whose planes are to stay in the first-level cache.
  int64_t groups;
  int64_t shared_planes;  // 1: all planes are packed first.
  int64_t splits;         // Parts of the output channels.
  int64_t split_channels;
  Parts parts;
};

// --- Dot products --------------------------------------------------------------------------------

// results[p] = dot product of x[p] and d for kCount values of p, or adds it to what is there.
template <int kCount>
void DotAny(const Region& region, const float* const* x, const float* d, bool accumulate,
            float* results) {
  // Positions take turns in the sets of sums, which hides the latency of adding.
  constexpr int kSets = kCount >= 5 ? 1 : kCount >= 3 ? 2 : 4;
  Vec all[kSets][kCount] = {};
  const float* base[kCount];
  KS_UNROLL
  for (int p = 0; p < kCount; ++p) base[p] = x[p];
  for (int64_t r = 0; r < region.rows; ++r) {
    int64_t at = r * region.x_row;
    int64_t q = region.columns;
    for (; q >= kSets; q -= kSets) {
      KS_UNROLL
      for (int s = 0; s < kSets; ++s) {
        const Vec here = Load(d);
        KS_UNROLL
        for (int p = 0; p < kCount; ++p) all[s][p] += here * Load(base[p] + at);
        at += region.x_column;
        d += kLanes;
      }
    }
    if (kSets == 1) continue;
    for (; q > 0; --q) {
      const Vec here = Load(d);
      KS_UNROLL
      for (int p = 0; p < kCount; ++p) all[0][p] += here * Load(base[p] + at);
      at += region.x_column;
      d += kLanes;
    }
  }
  KS_UNROLL
  for (int s = 1; s < kSets; ++s) {
    KS_UNROLL
    for (int p = 0; p < kCount; ++p) all[0][p] += all[s][p];
  }
  StoreSums<kCount>(all[0], accumulate, results);
}

// The same for a row of pixels and input planes next to each other: x[channels[p] * x_size].
template <int kCount>
void DotPixels(const Region& region, const float* x, const int32_t* channels, const float* d,
               bool accumulate, float* results) {
  constexpr int kSets = kCount >= 5 ? 1 : kCount >= 3 ? 2 : 4;
  Vec all[kSets][kCount] = {};
  const float* base[kCount];
  KS_UNROLL
  for (int p = 0; p < kCount; ++p) base[p] = x + channels[p] * region.x_size;
  const int64_t size = region.columns * kLanes;
  int64_t at = 0;
  for (; at + kSets * kLanes <= size; at += kSets * kLanes) {
    KS_UNROLL
    for (int s = 0; s < kSets; ++s) {
      const Vec here = Load(d + at + s * kLanes);
      KS_UNROLL
      for (int p = 0; p < kCount; ++p) all[s][p] += here * Load(base[p] + at + s * kLanes);
    }
  }
  for (; kSets > 1 && at < size; at += kLanes) {
    const Vec here = Load(d + at);
    KS_UNROLL
    for (int p = 0; p < kCount; ++p) all[0][p] += here * Load(base[p] + at);
  }
  KS_UNROLL
  for (int s = 1; s < kSets; ++s) {
    KS_UNROLL
    for (int p = 0; p < kCount; ++p) all[0][p] += all[s][p];
  }
  StoreSums<kCount>(all[0], accumulate, results);
}

typedef void (*PixelsFunction)(const Region&, const float*, const int32_t*, const float*, bool,
                               float*);
typedef void (*DotFunction)(const Region&, const float* const*, const float*, bool, float*);
template <int kCount>
struct FillDotFunctions {
  static void Run(DotFunction* functions, PixelsFunction* pixels) {
    functions[kCount] = DotAny<kCount>;
    pixels[kCount] = DotPixels<kCount>;
    FillDotFunctions<kCount - 1>::Run(functions, pixels);
  }
};
template <>
struct FillDotFunctions<0> {
  static void Run(DotFunction*, PixelsFunction*) {}
};

// Neighbouring taps: kTapRows x kTapColumns of them in registers, over a region of kColumns
// columns. kWide: as Parameters::wide.
template <int kRowsOfTaps, int kColumnsOfTaps, int kRegionColumns, bool kWide>
struct Window {
  static constexpr int kTapRows = kRowsOfTaps, kTapColumns = kColumnsOfTaps;
  static constexpr int kColumns = kRegionColumns;
  static constexpr int kTaps = kTapRows * kTapColumns;
  // Columns take turns in the sets of sums, which hides the latency of adding.
  static constexpr int kSets = kRegisters == 32 && kColumns > 1 ? 2 : 1;
  static constexpr int kMargin = kWide ? kTapColumns / 2 : 0;
  static constexpr int kPlaneColumns = kColumns + (kWide ? 0 : kTapColumns - 1);

  // Columns [kAt, kColumns) of a row of the region and taps of rows [0, kRows): a vector of x is
  // loaded once for all taps of a row that read it.
  template <int kFirst, int kRows, int kAt>
  KS_INLINE void AddColumns(const float* x, const float* d, Vec (&sums)[kSets][kTaps]) {
    if constexpr (kAt < kColumns) {
      constexpr int kHere = kColumns - kAt > 5 ? 4 : kColumns - kAt;
      Vec values[kHere];
      KS_UNROLL
      for (int q = 0; q < kHere; ++q) values[q] = Load(d + (kAt + q) * kLanes);
      KS_UNROLL
      for (int i = 0; i < kRows; ++i) {
        KS_UNROLL
        for (int t = 0; t < kHere + kTapColumns - 1; ++t) {
          const int column = kAt + t - kMargin;
          if (kWide && (column < 0 || column >= kColumns)) continue;
          const Vec here = InRegister(Load(x + (i * kPlaneColumns + column) * kLanes));
          KS_UNROLL
          for (int j = 0; j < kTapColumns; ++j) {
            if (t - j >= 0 && t - j < kHere) {
              sums[(t - j) % kSets][(kFirst + i) * kTapColumns + j] += here * values[t - j];
            }
          }
        }
      }
      AddColumns<kFirst, kRows, kAt + kHere>(x, d, sums);
    }
  }

  // A row of a plane.
  KS_INLINE void FetchRow(const float* x) {
    KS_UNROLL
    for (int i = 0; i < kPlaneColumns * kLanes; i += KS_ALIGNMENT / 4) __builtin_prefetch(x + i);
  }

  KS_INLINE void Keep(const Vec (&sums)[kSets][kTaps], bool accumulate, float* results) {
    Vec all[kTaps];
    KS_UNROLL
    for (int t = 0; t < kTaps; ++t) {
      all[t] = kSets == 2 ? sums[0][t] + sums[kSets - 1][t] : sums[0][t];
    }
    StoreSums<kTaps>(all, accumulate, results);
  }
};

// A connection as windows take them.
struct Connection {
  int32_t x, d;  // Floats to its planes.
  int32_t at;    // Its place in the table.
};

// Takes connections [first, last). `results` is that of the first connection of the table.
typedef void (*WindowFunction)(const Region&, const float* x, const float* d,
                               const Connection* first, const Connection* last, bool accumulate,
                               float* results);

// kTall: as Parameters::tall.
template <int kColumns, bool kWide, bool kTall>
void DotThreeByThree(const Region& region, const float* x, const float* d, const Connection* first,
                     const Connection* last, bool accumulate, float* results) {
  typedef Window<3, 3, kColumns, kWide> W;
  const int64_t x_row = region.x_row;
  for (const Connection* c = first; c != last; ++c) {
    const float* at = x + c->x;
    // Planes come from the second-level cache, in an order that the hardware does not know.
    const float* next = x + c[c + 1 != last].x;
    const float* values = d + c->d;
    Vec sums[W::kSets][W::kTaps] = {};
    int64_t rows = region.rows;
    if (kTall) {
      W::FetchRow(next);
      next += x_row;
      W::template AddColumns<1, 2, 0>(at, values, sums);
      values += kColumns * kLanes;
      rows -= 2;
    }
    for (; rows > 0; --rows) {
      W::FetchRow(next);
      next += x_row;
      W::template AddColumns<0, 3, 0>(at, values, sums);
      values += kColumns * kLanes;
      at += x_row;
    }
    if (kTall) W::template AddColumns<0, 2, 0>(at, values, sums);
    W::Keep(sums, accumulate, results + c->at * W::kTaps);
  }
}

// Taps row by row.
template <int kTapColumns, int kColumns, bool kWide>
void DotRows(const Region& region, const float* x, const float* d, const Connection* first,
             const Connection* last, bool accumulate, float* results) {
  typedef Window<1, kTapColumns, kColumns, kWide> W;
  const int64_t x_row = region.x_row;
  for (const Connection* c = first; c != last; ++c) {
    const float* plane = x + c->x;
    const float* next = x + c[c + 1 != last].x;
    for (int64_t i = 0; i < region.tap_rows; ++i) {
      const float* at = plane + i * region.tap_row;
      const float* values = d + c->d;
      Vec sums[W::kSets][W::kTaps] = {};
      for (int64_t r = 0; r < region.rows; ++r) {
        if (i == 0) W::FetchRow(next);
        next += x_row;
        W::template AddColumns<0, 1, 0>(at, values, sums);
        values += kColumns * kLanes;
        at += x_row;
      }
      W::Keep(sums, accumulate, results + (c->at * region.tap_rows + i) * W::kTaps);
    }
  }
}

constexpr int64_t kWindowsTogether = 4;  // Connections between two fetches.
constexpr int64_t kMaxColumnsOfThree = 14, kMaxColumnsOfRows = 18;

template <int kColumns = kMaxColumnsOfThree>
WindowFunction FindThreeByThree(int64_t columns, bool wide, bool tall) {
  if constexpr (kColumns == 0) {
    return nullptr;
  } else {
    if (columns != kColumns) return FindThreeByThree<kColumns - 1>(columns, wide, tall);
    if (wide) {
      return tall ? DotThreeByThree<kColumns, true, true> : DotThreeByThree<kColumns, true, false>;
    }
    return tall ? DotThreeByThree<kColumns, false, true> : DotThreeByThree<kColumns, false, false>;
  }
}

template <int kTapColumns, int kColumns = kMaxColumnsOfRows>
WindowFunction FindRows(int64_t columns, bool wide) {
  if constexpr (kColumns == 0) {
    return nullptr;
  } else {
    if (columns != kColumns) return FindRows<kTapColumns, kColumns - 1>(columns, wide);
    return wide ? DotRows<kTapColumns, kColumns, true> : DotRows<kTapColumns, kColumns, false>;
  }
}

// 3 x 3 taps next to each other. Other kernels of three columns go row by row.
bool IsThreeByThree(const KsGeometry& view) {
  return view.kernel_height == 3 && view.kernel_width == 3 && view.dilation_height == 1;
}

WindowFunction FindWindow(const KsGeometry& view, const Parameters& p) {
  if (p.window_columns == 3) {
    return IsThreeByThree(view) ? FindThreeByThree<>(p.regions.columns, p.wide, p.tall)
                                : FindRows<3>(p.regions.columns, p.wide);
  }
  return p.window_columns == 5 ? FindRows<5>(p.regions.columns, p.wide)
                               : FindRows<7>(p.regions.columns, p.wide);
}

// --- Outer products ------------------------------------------------------------------------------

// With one tap, every product above needs a load of its own. At high density it is faster to
// compute all connections of a block of kBlockChannels input and kBlockOutputs output channels,
// with lanes that are input channels, and to keep those of the table: half of the loads become
// broadcasts that several vectors share, and there is nothing to transpose or to add up over lanes.
// For these, x is [blocks of channels][pixels][kBlockChannels] and d
// [blocks of outputs][pixels][kBlockOutputs], with zeros where there are no more channels.
constexpr int64_t kBlockVectors = kRegisters == 32 ? 4 : 2;
constexpr int64_t kBlockChannels = kBlockVectors * kLanes;
constexpr int64_t kBlockOutputs = 6;
constexpr int64_t kOuterPixels = 200;  // At a time, at most: x of a block stays close.
constexpr double kOuterDensity = KS_VECTOR_BYTES == 64   ? 0.38
                                 : KS_VECTOR_BYTES == 32 ? 0.46
                                                         : 0.65;  // From which on they win.

void PackBlock(const float* source, int64_t channels, int64_t pixels, int64_t begin, int64_t end,
               int64_t width, float* target) {
  const int64_t here = Min(width, end - begin);
  for (int64_t p = 0; p < pixels; ++p, target += width) {
    const float* from = source + p * channels + begin;
    if (width == kBlockChannels && here == width) {
      KS_UNROLL
      for (int v = 0; v < kBlockVectors; ++v) Store(target + v * kLanes, Load(from + v * kLanes));
    } else if (width == kBlockOutputs && here == width) {
      memcpy(target, from, kBlockOutputs * 4);
    } else {
      for (int64_t i = 0; i < width; ++i) target[i] = i < here ? from[i] : 0;
    }
  }
}

// sums[o][channel of the block] = the sum of x * d over the pixels.
void OuterProducts(int64_t pixels, const float* x, const float* d, float* sums) {
  Vec all[kBlockOutputs][kBlockVectors] = {};
  for (; pixels > 0; --pixels) {
    Vec here[kBlockVectors];
    KS_UNROLL
    for (int v = 0; v < kBlockVectors; ++v) here[v] = InRegister(Load(x + v * kLanes));
    KS_UNROLL
    for (int o = 0; o < kBlockOutputs; ++o) {
      const Vec factor = InRegister(Splat(d[o]));
      KS_UNROLL
      for (int v = 0; v < kBlockVectors; ++v) all[o][v] += here[v] * factor;
    }
    x += kBlockChannels;
    d += kBlockOutputs;
  }
  KS_UNROLL
  for (int o = 0; o < kBlockOutputs; ++o) {
    KS_UNROLL
    for (int v = 0; v < kBlockVectors; ++v)
      Store(sums + (o * kBlockVectors + v) * kLanes, all[o][v]);
  }
}

// --- The plan ------------------------------------------------------------------------------------

// The geometry with rows and columns traded for kernels of one column: these run as kernels of one
// row.
KsGeometry View(const KsGeometry& geometry, bool swapped) {
  if (!swapped) return geometry;
  return {geometry.batch,           geometry.in_width,      geometry.in_height,
          geometry.in_channels,     geometry.out_width,     geometry.out_height,
          geometry.out_channels,    geometry.kernel_width,  geometry.kernel_height,
          geometry.stride_width,    geometry.stride_height, geometry.dilation_width,
          geometry.dilation_height, geometry.pad_left,      geometry.pad_top};
}

// A convolution with one tap sees pixels: the batch is one long row of them.
Grid ReductionGrid(const KsGeometry& view, bool pointwise) {
  Grid grid = ForwardGrid(view);
  if (pointwise) {
    grid.width = grid.columns = grid.batch * grid.height * grid.width;
    grid.batch = grid.height = grid.rows = 1;
  }
  return grid;
}

// Whether regions of `size` positions along an axis are the smallest of their number.
bool CutsEvenly(int64_t axis, int64_t size) { return CeilDiv(axis, CeilDiv(axis, size)) == size; }

// Cuts the grid into the regions that look cheapest, in clock cycles.
void ChooseRegions(const KsGeometry& view, const Grid& grid, double taps, double kept,
                   double out_channels, Parameters* parameters) {
  const int64_t most_positions =
      FewTaps(taps) ? FewTapsPositions(Density(view, kept))
                    : Max(kMostPositions, 3 * (grid.reach_height + 1) * (grid.reach_width + 1));
  const bool three = parameters->window_columns == 3 && IsThreeByThree(view);
  const int64_t most_columns = three                        ? kMaxColumnsOfThree
                               : parameters->window_columns ? kMaxColumnsOfRows
                                                            : most_positions;
  const bool may_be_tall = three && grid.step_height == 1 && grid.reach_height == 2 &&
                           grid.pad_top == 1 && grid.rows == grid.height && grid.rows > 1;
  const bool may_be_wide = parameters->window_columns > 0 &&
                           grid.pad_left * 2 == grid.reach_width && grid.columns == grid.width;
  double best = -1;
  for (int64_t rows = 1; rows <= Min(grid.rows, most_positions); ++rows) {
    if (!CutsEvenly(grid.rows, rows)) continue;
    const bool tall = may_be_tall && rows == grid.rows;
    const int64_t x_rows = tall ? rows : (rows - 1) * grid.step_height + grid.reach_height + 1;
    for (int64_t columns = 1; columns <= Min(grid.columns, most_columns); ++columns) {
      const bool wide = may_be_wide && columns == grid.columns;
      const int64_t x_columns =
          wide ? columns : (columns - 1) * grid.step_width + grid.reach_width + 1;
      if (best >= 0 && x_rows * x_columns > most_positions) continue;
      if (!CutsEvenly(grid.columns, columns)) continue;
      const LaneRegions regions = {grid.batch, rows, columns, CeilDiv(grid.rows, rows),
                                   CeilDiv(grid.columns, columns)};
      const double positions = static_cast<double>(rows * columns);
      const double x_positions = static_cast<double>(x_rows) * static_cast<double>(x_columns);
      // The share of products that is not skipped.
      double inside = 1;
      if (tall) inside -= 2.0 / static_cast<double>(3 * rows);
      if (wide) {
        const double margin = static_cast<double>(grid.reach_width / 2);
        inside *= 1 - margin * (margin + 1) / static_cast<double>((grid.reach_width + 1) * columns);
      }
      const int64_t groups = LaneGroups(regions);
      const double vectors =
          x_positions * static_cast<double>(grid.channels) + positions * out_channels;
      const bool wait = PacksAllFirst(groups) &&
                        vectors * static_cast<double>(groups * kLanes * 4) > kWaitingBytes;
      // Packing; then multiply-adds, sums over lanes and loads of each connection.
      const double cost = static_cast<double>(groups) *
                          ((wait ? kWaitingPackCost : kPackCost) * vectors +
                           kept * (positions * taps * inside * kProductCost + kSumCost * taps +
                                   kConnectionCost + x_positions * kLoadCost));
      if (best < 0 || cost < best) {
        best = cost;
        parameters->regions = regions;
        parameters->x_rows = x_rows;
        parameters->x_columns = x_columns;
        parameters->tall = tall;
        parameters->wide = wide;
      }
    }
  }
}

// Channels that a piece of work packs.
int64_t PackedTogether(const Parameters& p, bool is_x) {
  return !p.outer ? kPackedChannels : is_x ? kBlockChannels : 10 * kBlockOutputs;
}

// Floats of all planes of a group.
int64_t GroupSizeOfX(const KsGeometry& geometry, const Parameters& p) {
  return RoundUp(geometry.in_channels, p.outer ? kBlockChannels : 1) * p.x_size;
}
int64_t GroupSizeOfD(const KsGeometry& geometry, const Parameters& p) {
  return RoundUp(geometry.out_channels, p.outer ? kBlockOutputs : 1) * p.d_size;
}

// Connections for windows; where those of each block of a split begin; or, without windows, where
// those of each output channel from each block of input channels begin.
int64_t ConnectionsBytes(const Parameters& p, int64_t kept) {
  return p.window_columns > 0 ? PieceBytes(kept, sizeof(Connection)) : 0;
}
int64_t StartsBytes(const Parameters& p, int64_t out_channels) {
  return p.window_columns > 0 ? PieceBytes(p.splits * p.blocks + 1, 4)
                              : PieceBytes((p.blocks + 1) * out_channels, 4);
}

// For outer products, which lanes of each vector of a block are connections.
int64_t MasksBytes(const Parameters& p, int64_t out_channels) {
  return p.outer ? PieceBytes(p.blocks * out_channels * kBlockVectors, 2) : 0;
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
  parameters.swapped = geometry.kernel_width == 1 && geometry.kernel_height > 1;
  const KsGeometry view = View(geometry, parameters.swapped);
  if (view.stride_width == 1 && view.dilation_width == 1 &&
      (view.kernel_width == 3 || view.kernel_width == 5 || view.kernel_width == 7)) {
    parameters.window_columns = view.kernel_width;
  }
  const Grid grid = ReductionGrid(view, parameters.pointwise);
  const double reach =
      (static_cast<double>(grid.reach_height) + 1) * (static_cast<double>(grid.reach_width) + 1);
  if (reach > 1 << 16) return 0;
  parameters.outer = parameters.pointwise && arguments->kept > 0 &&
                     static_cast<double>(arguments->kept) >=
                         kOuterDensity * static_cast<double>(geometry.in_channels) *
                             static_cast<double>(geometry.out_channels);
  if (parameters.outer) {
    const int64_t regions = CeilDiv(grid.columns, kOuterPixels);
    parameters.regions = {1, 1, CeilDiv(grid.columns, regions), 1, regions};
  } else {
    ChooseRegions(view, grid, taps, static_cast<double>(arguments->kept),
                  static_cast<double>(geometry.out_channels), &parameters);
  }
  const LaneRegions& regions = parameters.regions;
  parameters.x_size = LanePlaneSize(parameters.x_rows, parameters.x_columns);
  parameters.d_size = LanePlaneSize(regions.rows, regions.columns);
  if (parameters.outer) parameters.x_size = parameters.d_size = regions.columns;
  const int64_t plane_bytes = parameters.x_size * 4;
  const int64_t block_bytes =
      FewTaps(taps) ? FewTapsBytes(Density(geometry, static_cast<double>(arguments->kept)))
                    : kChannelsBytes;
  parameters.block_channels = Min(RoundUp(Max(1, geometry.in_channels), kLanes),
                                  Max(1, block_bytes / (plane_bytes * kLanes)) * kLanes);
  if (parameters.outer) parameters.block_channels = kBlockChannels;
  parameters.blocks = Max(1, CeilDiv(geometry.in_channels, parameters.block_channels));
  const int64_t groups = parameters.groups =
      parameters.outer ? regions.col_regions : LaneGroups(regions);

  const int64_t sums = arguments->kept * static_cast<int64_t>(taps);
  int64_t parts = 1;
  const double planes_bytes =
      4.0 * static_cast<double>(groups) *
      (static_cast<double>(parameters.x_size) * static_cast<double>(geometry.in_channels) +
       static_cast<double>(parameters.d_size) * static_cast<double>(geometry.out_channels));
  if (PacksAllFirst(groups) && planes_bytes <= static_cast<double>(kScratchLimit) / 2) {
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
  if (parameters.outer) {
    parameters.split_channels = RoundUp(Max(1, parameters.split_channels), kBlockOutputs);
  }
  parameters.splits = Max(1, CeilDiv(geometry.out_channels, Max(1, parameters.split_channels)));
  parameters.tile_channels = Max(1, kTileBytes / (parameters.d_size * 4));
  parameters.parts = MakeParts(parts, sums);

  const int64_t x_items = CeilDiv(geometry.in_channels, PackedTogether(parameters, true));
  const int64_t d_items = CeilDiv(geometry.out_channels, PackedTogether(parameters, false));
  KsStage* stage = plan->stages;
  stage->items = 1;
  stage->cost = 1000 + parameters.blocks * geometry.out_channels * 10;
  stage->prepares = KS_PREPARES_TABLE;
  ++stage;
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
  plan->num_stages = 4;

  const int64_t x_bytes =
      PieceBytes(parameters.shared_planes ? groups * GroupSizeOfX(geometry, parameters)
                                          : parameters.block_channels * parameters.x_size,
                 4);
  const int64_t d_bytes =
      PieceBytes(parameters.shared_planes ? groups * GroupSizeOfD(geometry, parameters)
                                          : parameters.split_channels * parameters.d_size,
                 4);
  if (x_bytes + d_bytes > kScratchLimit) return 0;
  plan->table_bytes = ConnectionsBytes(parameters, arguments->kept) +
                      StartsBytes(parameters, geometry.out_channels) +
                      MasksBytes(parameters, geometry.out_channels);
  plan->shared_bytes = PartsBytes(parameters.parts);
  plan->scratch_bytes = PieceBytes(static_cast<int64_t>(taps), 8);
  (parameters.shared_planes ? plan->shared_bytes : plan->scratch_bytes) += x_bytes + d_bytes;
  SaveParameters(parameters, plan);
  return 1;
}

namespace {

// Pixels of a group, for outer products.
int64_t OuterPixels(const Parameters& p, int64_t pixels, int64_t group) {
  return Min(p.regions.columns, pixels - group * p.regions.columns);
}

// Fills the planes of channels [begin, end) of a group; `planes` is that of `begin`.
void Pack(const Parameters& p, const LaneSource& source, bool is_x, int64_t group, int64_t begin,
          int64_t end, float* planes) {
  if (p.outer) {
    const int64_t pixels = OuterPixels(p, source.width, group);
    // Blocks are a full group's pixels apart.
    const int64_t width = is_x ? kBlockChannels : kBlockOutputs;
    for (int64_t c = begin; c < end; c += width) {
      PackBlock(source.data + group * p.regions.columns * source.channels, source.channels, pixels,
                c, end, width, planes + (c - begin) * p.regions.columns);
    }
    return;
  }
  for (int64_t c = begin; c < end; c += kPackedChannels) {
    PackLanes(p.regions, source, group, c, Min(c + kPackedChannels, end),
              planes + (c - begin) * source.plane_size);
  }
}

// starts[block * out_channels + o]: the first connection of output channel o from an input channel
// of the block or a later one.
void CutTable(const KsArguments& arguments, const Parameters& p, int32_t* starts) {
  const int64_t out_channels = arguments.geometry.out_channels;
  for (int64_t o = 0; o < out_channels; ++o) {
    int64_t c = arguments.row_splits[o];
    for (int64_t block = 0; block <= p.blocks; ++block) {
      while (c < arguments.row_splits[o + 1] &&
             arguments.input_channels[c] < block * p.block_channels) {
        ++c;
      }
      starts[block * out_channels + o] = static_cast<int32_t>(c);
    }
  }
}

void MarkConnections(const KsArguments& arguments, const Parameters& p, const int32_t* starts,
                     uint16_t* masks) {
  const int64_t out_channels = arguments.geometry.out_channels;
  memset(masks, 0, p.blocks * out_channels * kBlockVectors * 2);
  for (int64_t i = 0; i < p.blocks * out_channels; ++i) {
    for (int64_t c = starts[i]; c < starts[i + out_channels]; ++c) {
      const int64_t lane = arguments.input_channels[c] % kBlockChannels;
      masks[i * kBlockVectors + lane / kLanes] |= static_cast<uint16_t>(1 << lane % kLanes);
    }
  }
}

// The connections of each split, block by block of input channels and tile by tile of output
// channels. In a tile, all that read an input channel come together: its plane comes from the
// second-level cache once for all of them.
void SortTable(const KsArguments& arguments, const Parameters& p, Connection* connections,
               int32_t* starts) {
  const KsGeometry& geometry = arguments.geometry;
  constexpr int64_t kMost = 64;
  const int64_t tile = Min(kMost, p.tile_channels);
  int64_t next = 0;
  for (int64_t split = 0; split < p.splits; ++split) {
    const int64_t begin = Min(geometry.out_channels, split * p.split_channels);
    const int64_t end = Min(geometry.out_channels, begin + p.split_channels);
    for (int64_t block = 0; block < p.blocks; ++block) {
      const int64_t channel = block * p.block_channels;
      starts[split * p.blocks + block] = static_cast<int32_t>(next);
      for (int64_t o = begin; o < end; o += tile) {
        const int64_t here = Min(tile, end - o);
        int64_t at[kMost];  // The next connection of each output channel of the tile.
        for (int64_t i = 0; i < here; ++i) {
          const int32_t* row = arguments.input_channels + arguments.row_splits[o + i];
          int64_t low = 0, high = arguments.row_splits[o + i + 1] - arguments.row_splits[o + i];
          while (low < high) {
            const int64_t middle = (low + high) / 2;
            if (row[middle] < channel) {
              low = middle + 1;
            } else {
              high = middle;
            }
          }
          at[i] = arguments.row_splits[o + i] + low;
        }
        for (int64_t c = channel; c < Min(geometry.in_channels, channel + p.block_channels); ++c) {
          for (int64_t i = 0; i < here; ++i) {
            if (at[i] == arguments.row_splits[o + i + 1] || arguments.input_channels[at[i]] != c) {
              continue;
            }
            connections[next++] = {static_cast<int32_t>((c - channel) * p.x_size),
                                   static_cast<int32_t>((o + i - begin) * p.d_size),
                                   static_cast<int32_t>(at[i]++)};
          }
        }
      }
    }
  }
  starts[p.splits * p.blocks] = static_cast<int32_t>(next);
}

struct Work {
  const KsArguments& arguments;
  const Parameters& parameters;
  const Connection* connections;
  const int32_t* starts;
  const uint16_t* masks;
  Region region;
  int64_t taps;
  int64_t* offsets;                 // Of the taps, in a plane.
  bool accumulate;                  // Whether to add to the results.
  float* results;                   // Of all connections.
  Upcoming upcoming_x, upcoming_d;  // What is packed next.
  WindowFunction window;
  DotFunction dot[kMaxProducts + 1];
  PixelsFunction pixels[kMaxProducts + 1];
};

// How many of the products that are left to take at a time: few are slower each.
KS_INLINE int64_t Together(int64_t left) {
  return left <= kMaxProducts ? left : left < 2 * kMaxProducts ? left / 2 : kMaxProducts;
}

// All connections from a block of input channels. `x` is the plane of the first of them, `d` that
// of out_begin.
void AddProducts(Work& work, int64_t block, const float* x, int64_t out_begin, int64_t out_end,
                 const float* d) {
  const KsArguments& arguments = work.arguments;
  const Parameters& parameters = work.parameters;
  const int64_t taps = work.taps;
  const int64_t channel_begin = block * parameters.block_channels;
  const int32_t* starts = work.starts + block * arguments.geometry.out_channels;
  const int32_t* ends = starts + arguments.geometry.out_channels;
  for (int64_t o = out_begin; o < out_end; ++o, d += parameters.d_size) {
    const int64_t first = starts[o], last = ends[o];
    FetchDue(1, &work.upcoming_x);
    FetchDue(1, &work.upcoming_d);
    if (first == last) continue;
    float* results = work.results + first * taps;
    if (parameters.pointwise) {
      const float* origin = x - channel_begin * parameters.x_size;
      for (int64_t left = last - first; left > 0;) {
        const int64_t count = Together(left);
        work.pixels[count](work.region, origin, arguments.input_channels + last - left, d,
                           work.accumulate, results);
        results += count;
        left -= count;
      }
      continue;
    }
    // Products in table order.
    int64_t c = first, t = 0;
    const float* plane = x + (arguments.input_channels[c] - channel_begin) * parameters.x_size;
    for (int64_t left = (last - first) * taps; left > 0;) {
      const int64_t count = Together(left);
      const float* at[kMaxProducts];
      for (int64_t i = 0; i < count; ++i) {
        at[i] = plane + work.offsets[t];
        if (++t == taps && ++c < last) {
          t = 0;
          plane = x + (arguments.input_channels[c] - channel_begin) * parameters.x_size;
        }
      }
      work.dot[count](work.region, at, d, work.accumulate, results);
      results += count;
      left -= count;
    }
  }
}

// The same by outer products.
void AddBlock(const Work& work, int64_t block, int64_t pixels, const float* x, int64_t out_begin,
              int64_t out_end, const float* d) {
  const KsArguments& arguments = work.arguments;
  const bool accumulate = work.accumulate;
  const int64_t out_channels = arguments.geometry.out_channels;
  const int32_t* starts = work.starts + block * out_channels;
  for (int64_t o = out_begin; o < out_end; o += kBlockOutputs) {
    alignas(KS_ALIGNMENT) float sums[kBlockOutputs * kBlockChannels];
    OuterProducts(pixels, x, d + (o - out_begin) * work.parameters.d_size, sums);
    const int64_t last = Min(o + kBlockOutputs, out_end);
    for (int64_t i = o; i < last; ++i) {
      const float* row = sums + (i - o) * kBlockChannels;
      float* results = work.results + starts[i];
#if KS_VECTOR_BYTES == 64
      const uint16_t* masks = work.masks + (block * out_channels + i) * kBlockVectors;
      for (int64_t v = 0; v < kBlockVectors; ++v) {
        const int64_t count = __builtin_popcount(masks[v]);
        const __mmask16 used = static_cast<__mmask16>((1u << count) - 1);
        __m512 kept = _mm512_maskz_compress_ps(masks[v], _mm512_load_ps(row + v * kLanes));
        if (accumulate) kept = _mm512_add_ps(kept, _mm512_maskz_loadu_ps(used, results));
        _mm512_mask_storeu_ps(results, used, kept);
        results += count;
      }
#else
      const int32_t* channel = arguments.input_channels + starts[i];
      const int64_t count = starts[out_channels + i] - starts[i];
      for (int64_t c = 0; c < count; ++c) {
        const float sum = row[channel[c] - block * kBlockChannels];
        results[c] = accumulate ? results[c] + sum : sum;
      }
#endif
    }
  }
}

// Connections of a block in a split, for windows.
int64_t NumWindows(const Work& work, int64_t split, int64_t block) {
  const int32_t* starts = work.starts + split * work.parameters.blocks + block;
  return starts[1] - starts[0];
}

// The same by windows.
void AddWindows(Work& work, int64_t split, int64_t block, const float* x, const float* d) {
  const int64_t first = work.starts[split * work.parameters.blocks + block];
  const int64_t last = first + NumWindows(work, split, block);
  // Fetching comes between connections; where there is nothing to fetch, all are done at once.
  const int64_t step =
      work.upcoming_x.units + work.upcoming_d.units > 0 ? kWindowsTogether : Max(1, last - first);
  for (int64_t c = first; c < last; c += step) {
    const int64_t end = Min(last, c + step);
    FetchDue(end - c, &work.upcoming_x);
    FetchDue(end - c, &work.upcoming_d);
    work.window(work.region, x, d, work.connections + c, work.connections + end, work.accumulate,
                work.results);
  }
}

}  // namespace

void ConnectionConv2DBackpropFilterRun(const KsArguments* arguments, const KsPlan* plan,
                                       int32_t stage, int64_t begin, int64_t end,
                                       const KsMemory* memory) {
  const KsGeometry& geometry = arguments->geometry;
  const Parameters parameters = LoadParameters<Parameters>(plan);
  const LaneRegions& regions = parameters.regions;
  Arena table_arena = {static_cast<char*>(memory->table)};
  Connection* const connections = reinterpret_cast<Connection*>(
      table_arena.Take<char>(ConnectionsBytes(parameters, arguments->kept)));
  int32_t* const starts = reinterpret_cast<int32_t*>(
      table_arena.Take<char>(StartsBytes(parameters, geometry.out_channels)));
  uint16_t* const masks = reinterpret_cast<uint16_t*>(table_arena.at);
  if (stage == 0) {
    if (parameters.window_columns > 0) {
      SortTable(*arguments, parameters, connections, starts);
    } else {
      CutTable(*arguments, parameters, starts);
      if (parameters.outer) MarkConnections(*arguments, parameters, starts, masks);
    }
    return;
  }
  Arena shared_arena = {static_cast<char*>(memory->shared)};
  float* const part_sums = shared_arena.Take<float>(PartsBytes(parameters.parts) / 4);
  if (stage == 3) {
    AddParts(parameters.parts, begin, end, part_sums, arguments->output);
    return;
  }
  const KsGeometry view = View(geometry, parameters.swapped);
  const Grid grid = ReductionGrid(view, parameters.pointwise);
  LaneSource x_source = {};
  x_source.data = arguments->input;
  x_source.height = grid.height;
  x_source.width = grid.width;
  x_source.channels = geometry.in_channels;
  x_source.image = geometry.in_height * geometry.in_width * geometry.in_channels;
  x_source.row = geometry.in_width * geometry.in_channels;
  x_source.column = geometry.in_channels;
  x_source.step_height = grid.step_height;
  x_source.step_width = grid.step_width;
  x_source.origin_height = parameters.tall ? 0 : grid.pad_top;
  x_source.origin_width = parameters.wide ? 0 : grid.pad_left;
  x_source.rows = parameters.x_rows;
  x_source.columns = parameters.x_columns;
  x_source.plane_size = parameters.x_size;
  LaneSource d_source = {};
  d_source.data = arguments->out_backprop;
  d_source.height = grid.rows;
  d_source.width = grid.columns;
  d_source.channels = geometry.out_channels;
  d_source.image = geometry.out_height * geometry.out_width * geometry.out_channels;
  d_source.row = geometry.out_width * geometry.out_channels;
  d_source.column = geometry.out_channels;
  d_source.step_height = d_source.step_width = 1;
  d_source.rows = regions.rows;
  d_source.columns = regions.columns;
  d_source.plane_size = parameters.d_size;
  if (parameters.swapped) {
    Swap(&x_source.row, &x_source.column);
    Swap(&d_source.row, &d_source.column);
  }
  const int64_t x_group = GroupSizeOfX(geometry, parameters);
  const int64_t d_group = GroupSizeOfD(geometry, parameters);
  if (stage == 1) {
    float* const x = shared_arena.Take<float>(parameters.groups * x_group);
    float* const d = reinterpret_cast<float*>(shared_arena.at);
    const int64_t x_together = PackedTogether(parameters, true);
    const int64_t d_together = PackedTogether(parameters, false);
    const int64_t x_items = CeilDiv(geometry.in_channels, x_together);
    const int64_t items = x_items + CeilDiv(geometry.out_channels, d_together);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t group = item / items;
      const int64_t i = item % items;
      if (i < x_items) {
        Pack(parameters, x_source, true, group, i * x_together,
             Min((i + 1) * x_together, geometry.in_channels),
             x + group * x_group + i * x_together * parameters.x_size);
      } else {
        const int64_t o = (i - x_items) * d_together;
        Pack(parameters, d_source, false, group, o, Min(o + d_together, geometry.out_channels),
             d + group * d_group + o * parameters.d_size);
      }
    }
    return;
  }

  const int64_t taps = geometry.kernel_height * geometry.kernel_width;
  const int64_t x_columns = parameters.x_columns;
  Arena arena = {static_cast<char*>(memory->scratch)};
  Work work = {*arguments, parameters, connections, starts, masks,   {}, taps, nullptr,
               false,      nullptr,    {},          {},     nullptr, {}, {}};
  work.region = {regions.rows,
                 regions.columns,
                 grid.step_height * x_columns * kLanes,
                 grid.step_width * kLanes,
                 view.dilation_height * x_columns * kLanes,
                 view.kernel_height,
                 parameters.x_size};
  work.offsets = arena.Take<int64_t>(taps);
  for (int64_t t = 0; t < taps; ++t) {
    work.offsets[t] = t / view.kernel_width * work.region.tap_row +
                      t % view.kernel_width * view.dilation_width * kLanes;
  }
  if (parameters.window_columns > 0) work.window = FindWindow(view, parameters);
  FillDotFunctions<kMaxProducts>::Run(work.dot, work.pixels);
  Arena& planes_arena = parameters.shared_planes ? shared_arena : arena;
  float* const x_planes = planes_arena.Take<float>(
      parameters.shared_planes ? parameters.groups * x_group
                               : parameters.block_channels * parameters.x_size);
  float* const d_planes = reinterpret_cast<float*>(planes_arena.at);

  // Tensors that the second-level cache does not hold are fetched for one pack while the last one
  // is computed with.
  const bool fetch = !parameters.shared_planes && !parameters.outer &&
                     grid.batch *
                             (grid.height * grid.width * geometry.in_channels +
                              grid.rows * grid.columns * geometry.out_channels) *
                             4 >=
                         kFetchFrom;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t part = item / parameters.splits;
    const int64_t split = item % parameters.splits;
    const int64_t out_begin = Min(geometry.out_channels, split * parameters.split_channels);
    const int64_t out_end = Min(geometry.out_channels, out_begin + parameters.split_channels);
    work.results = PartSums(parameters.parts, part, part_sums, arguments->output);
    const int64_t first = PartBegin(parameters.groups, parameters.parts.count, part);
    const int64_t last = PartBegin(parameters.groups, parameters.parts.count, part + 1);
    for (int64_t group = first; group < last; ++group) {
      work.accumulate = group > first;
      const float* d = d_planes + group * d_group + out_begin * parameters.d_size;
      if (!parameters.shared_planes) {
        Pack(parameters, d_source, false, group, out_begin, out_end, d_planes);
        d = d_planes;
      }
      for (int64_t block = 0; block < parameters.blocks; ++block) {
        const int64_t c = block * parameters.block_channels;
        const int64_t c_end = Min(geometry.in_channels, c + parameters.block_channels);
        const float* x = x_planes + group * x_group + c * parameters.x_size;
        if (!parameters.shared_planes) {
          Pack(parameters, x_source, true, group, c, c_end, x_planes);
          x = x_planes;
        }
        FetchNothing(&work.upcoming_x);
        FetchNothing(&work.upcoming_d);
        if (fetch) {
          const bool last_block = block + 1 == parameters.blocks;
          const int64_t steps =
              work.window != nullptr ? NumWindows(work, split, block) : out_end - out_begin;
          const int64_t next_group = last_block ? group + 1 : group;
          if (next_group < last || (parameters.splits == 1 && item + 1 < end)) {
            const int64_t next = last_block ? 0 : c_end;
            FetchLanes(regions, x_source, next_group, next,
                       Min(geometry.in_channels, next + parameters.block_channels), steps,
                       &work.upcoming_x);
            if (last_block) {
              FetchLanes(regions, d_source, next_group, out_begin, out_end, steps,
                         &work.upcoming_d);
            }
          }
        }
        if (parameters.outer) {
          AddBlock(work, block, OuterPixels(parameters, grid.columns, group), x, out_begin, out_end,
                   d);
        } else if (work.window != nullptr) {
          AddWindows(work, split, block, x, d);
        } else {
          AddProducts(work, block, x, out_begin, out_end, d);
        }
      }
    }
  }
}

}  // namespace KS_ISA
}  // namespace ks
