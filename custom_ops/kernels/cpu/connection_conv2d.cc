// Copyright 2026 The keras_sparse Authors. Licensed under the Apache License, Version 2.0.
//
// Connection-table convolution, forward and gradient with respect to the input.
//
// Both are sums over kept connections of shifted planes. The forward pass reads planes of the input
// and has one list of taps. The gradient reads planes of out_backprop through the transposed table;
// input pixels fall into stride_height * stride_width phases (padded coordinates mod stride), and
// the taps that reach a phase form its list, as if the stride were 1. With stride 1 this is the
// forward pass with flipped taps.
//
// A block of grid rows x vectors stays in registers while it runs over the connections of an output
// channel; kLanes output channels are then transposed, so that NHWC stores are whole vectors.

#include "custom_ops/kernels/cpu/epilogue.h"
#include "custom_ops/kernels/cpu/planes.h"
#include "custom_ops/kernels/cpu/routines.h"
#include "custom_ops/kernels/cpu/transposed_table.h"

namespace ks {
namespace KS_ISA {
namespace {

// Accumulators of a block: kMaxRows x kMaxVectors, with room for nine weights beside them.
constexpr int kMaxRows = kRegisters == 32 ? 8 : (KS_VECTOR_BYTES == 32 ? 6 : 4);
constexpr int kMaxVectors = kRegisters == 32 ? 2 : 1;

constexpr int64_t kMaxTaps = 1 << 16;
constexpr int64_t kMaxPhases = 64;

// How the grid maps to the result: grid position (u, v) of phase (a, b) is the result's pixel
// (u * step_height + a - origin_height, v * step_width + b - origin_width), if there is one.
struct Result {
  int64_t height, width, channels;
  int64_t step_height, step_width;
  int64_t origin_height, origin_width;
};

struct Parameters {
  Grid grid;
  Planes planes;
  Result result;
  int64_t transposed;    // 1: the table and the filter are transposed in stage 0.
  int64_t shared_tiles;  // 1: a stage of its own packs all planes, the next one computes.
  int64_t splits;        // Parts of the result's channels, for shared_tiles.
  int64_t tile_bytes;
};

// --- Register blocks -----------------------------------------------------------------------------

struct Block {
  const float* planes;      // At the block's first grid position.
  int64_t channel_size;     // From the plane of one channel to the next.
  int64_t row_step;         // From one grid row to the next, in a plane.
  const int32_t* channels;  // The connections of this output channel: source channels
  const float* filter;      // and values,
  int64_t filter_stride;    // this far apart.
  int64_t connections;
  const int64_t* offsets;  // Of the taps, in a plane.
  int64_t taps;
  float* tile;  // Result: kMaxRows x (kMaxVectors * kLanes).
};

template <int kRows, int kVectors>
KS_INLINE void StoreBlock(const Vec (&sums)[kRows][kVectors], float* tile) {
  KS_UNROLL
  for (int r = 0; r < kRows; ++r) {
    KS_UNROLL
    for (int v = 0; v < kVectors; ++v) Store(tile + (r * kMaxVectors + v) * kLanes, sums[r][v]);
  }
}

// Any taps: one load per multiply-add.
template <int kRows, int kVectors>
void SumAnyTaps(const Block& block) {
  Vec sums[kRows][kVectors] = {};
  const int64_t row_step = block.row_step;
  for (int64_t c = 0; c < block.connections; ++c) {
    const float* plane = block.planes + block.channels[c] * block.channel_size;
    const float* filter = block.filter + c * block.filter_stride;
    for (int64_t t = 0; t < block.taps; ++t) {
      const Vec weight = Splat(filter[t]);
      const float* x = plane + block.offsets[t];
      KS_UNROLL
      for (int r = 0; r < kRows; ++r) {
        KS_UNROLL
        for (int v = 0; v < kVectors; ++v) {
          sums[r][v] += weight * Load(x + r * row_step + v * kLanes);
        }
      }
    }
  }
  StoreBlock<kRows, kVectors>(sums, block.tile);
}

// 3 x kWidth taps on neighbouring plane rows: a loaded vector feeds up to three rows of sums.
template <int kRows, int kVectors, int kWidth>
void SumThreeRows(const Block& block) {
  Vec sums[kRows][kVectors] = {};
  const int64_t row_step = block.row_step;
  int64_t columns[kWidth];
  for (int j = 0; j < kWidth; ++j) columns[j] = block.offsets[j];
  for (int64_t c = 0; c < block.connections; ++c) {
    const float* plane = block.planes + block.channels[c] * block.channel_size;
    const float* filter = block.filter + c * block.filter_stride;
    Vec weights[3][kWidth];
    KS_UNROLL
    for (int i = 0; i < 3; ++i) {
      KS_UNROLL
      for (int j = 0; j < kWidth; ++j) weights[i][j] = Splat(filter[i * kWidth + j]);
    }
    KS_UNROLL
    for (int q = 0; q < kRows + 2; ++q) {
      KS_UNROLL
      for (int j = 0; j < kWidth; ++j) {
        KS_UNROLL
        for (int v = 0; v < kVectors; ++v) {
          const Vec x = Load(plane + q * row_step + columns[j] + v * kLanes);
          KS_UNROLL
          for (int i = 0; i < 3; ++i) {
            if (q - i >= 0 && q - i < kRows) sums[q - i][v] += weights[i][j] * x;
          }
        }
      }
    }
  }
  StoreBlock<kRows, kVectors>(sums, block.tile);
}

typedef void (*BlockFunction)(const Block&);
enum { kAnyTaps = 0, kThreeByThree = 1, kThreeByOne = 2, kNumKinds = 3 };

struct BlockFunctions {
  BlockFunction of[kNumKinds][kMaxVectors + 1][kMaxRows + 1];
};

template <int kVectors, int kRows>
struct FillBlockFunctions {
  static void Run(BlockFunctions* functions) {
    functions->of[kAnyTaps][kVectors][kRows] = SumAnyTaps<kRows, kVectors>;
    functions->of[kThreeByThree][kVectors][kRows] = SumThreeRows<kRows, kVectors, 3>;
    functions->of[kThreeByOne][kVectors][kRows] = SumThreeRows<kRows, kVectors, 1>;
    FillBlockFunctions<kVectors, kRows - 1>::Run(functions);
  }
};
template <int kVectors>
struct FillBlockFunctions<kVectors, 0> {
  static void Run(BlockFunctions*) {}
};

// --- One tile ------------------------------------------------------------------------------------

struct Table {
  const int32_t* row_splits;
  const int32_t* channels;
  const float* filter;
};

// The taps, sorted by phase of the result and, within a phase, by ascending plane offset.
struct Taps {
  int64_t* offsets;      // [taps]
  int32_t* source;       // [taps]: the tap of the caller's filter at each place.
  int64_t* phase_begin;  // [phases + 1]
};

int64_t TapsBytes(int64_t taps, int64_t phases) {
  return PieceBytes(taps, 8) + PieceBytes(taps, 4) + PieceBytes(phases + 1, 8);
}

Taps MakeTaps(const KsGeometry& geometry, const Parameters& parameters, Arena* arena) {
  const int64_t kh = geometry.kernel_height, kw = geometry.kernel_width;
  const Planes& planes = parameters.planes;
  const int64_t row = planes.row_length;
  const int64_t phases_high = parameters.result.step_height;
  const int64_t phases_wide = parameters.result.step_width;
  Taps taps;
  taps.offsets = arena->Take<int64_t>(kh * kw);
  taps.source = arena->Take<int32_t>(kh * kw);
  taps.phase_begin = arena->Take<int64_t>(phases_high * phases_wide + 1);
  int64_t n = 0;
  if (!parameters.transposed) {
    for (int64_t i = 0; i < kh; ++i) {
      for (int64_t j = 0; j < kw; ++j, ++n) {
        taps.source[n] = static_cast<int32_t>(n);
        taps.offsets[n] = TapOffset(geometry, planes, i, j);
      }
    }
    taps.phase_begin[0] = 0;
    taps.phase_begin[1] = n;
    return taps;
  }
  const int64_t top = (kh - 1) * geometry.dilation_height / phases_high;
  const int64_t left = (kw - 1) * geometry.dilation_width / phases_wide;
  for (int64_t a = 0; a < phases_high; ++a) {
    for (int64_t b = 0; b < phases_wide; ++b) {
      taps.phase_begin[a * phases_wide + b] = n;
      for (int64_t i = kh - 1; i >= 0; --i) {
        if (i * geometry.dilation_height % phases_high != a) continue;
        for (int64_t j = kw - 1; j >= 0; --j) {
          if (j * geometry.dilation_width % phases_wide != b) continue;
          taps.source[n] = static_cast<int32_t>(i * kw + j);
          taps.offsets[n++] = (top - i * geometry.dilation_height / phases_high) * row + left -
                              j * geometry.dilation_width / phases_wide;
        }
      }
    }
  }
  taps.phase_begin[phases_high * phases_wide] = n;
  return taps;
}

// Stores kLanes pixels of `channels` channels each where the map says; -1 drops a pixel.
KS_INLINE void StorePixels(const Vec (&pixels)[kLanes], const int64_t* map, int64_t channels,
                           float* target) {
  if (channels == kLanes) {
    KS_UNROLL
    for (int i = 0; i < kLanes; ++i) {
      if (map[i] >= 0) Store(target + map[i], pixels[i]);
    }
  } else {
    for (int i = 0; i < kLanes; ++i) {
      if (map[i] >= 0) StoreFirst(target + map[i], pixels[i], channels);
    }
  }
}

// Computes result channels [channel_begin, channel_end) of one tile from its planes.
void ComputeTile(const KsArguments& arguments, const Parameters& parameters, const Table& table,
                 const Taps& taps, int64_t tile_index, int64_t channel_begin, int64_t channel_end,
                 const float* planes_data, int64_t* column_map, float* tile, float* output) {
  const KsGeometry& geometry = arguments.geometry;
  const Grid& grid = parameters.grid;
  const Planes& planes = parameters.planes;
  const Result& result = parameters.result;
  const int64_t first_image = tile_index / planes.row_tiles * planes.images;
  const int64_t first_row = tile_index % planes.row_tiles * planes.tile_rows;
  const int64_t rows = Min(planes.tile_rows, grid.rows - first_row);
  const int64_t images = Min(planes.images, grid.batch - first_image);
  const int64_t columns = (images - 1) * planes.pitch + grid.columns;
  const int64_t all_taps = geometry.kernel_height * geometry.kernel_width;
  const int64_t vectors = CeilDiv(columns, kLanes);
  // A block has several lines of vectors: grid rows or, in a tile of one row, that row's vectors.
  const bool flat = rows == 1;
  const int64_t lines = flat ? vectors : rows;
  const int64_t line_vectors = flat ? 1 : vectors;
  const int64_t line_step = flat ? kLanes : grid.step_height * planes.row_length;
  const int64_t line_blocks = CeilDiv(lines, kMaxRows);
  constexpr int64_t kTileSize = kMaxRows * kMaxVectors * kLanes;

  int kind = kAnyTaps;
  if (!flat && geometry.kernel_height == 3 && geometry.dilation_height == 1 &&
      grid.step_height == 1 && result.step_height == 1 && result.step_width == 1) {
    if (geometry.kernel_width == 3) kind = kThreeByThree;
    if (geometry.kernel_width == 1) kind = kThreeByOne;
  }
  const Epilogue epilogue = MakeEpilogue(arguments);
  BlockFunctions functions;
  FillBlockFunctions<1, kMaxRows>::Run(&functions);
  if (kMaxVectors > 1) FillBlockFunctions<kMaxVectors, kMaxRows>::Run(&functions);

  for (int64_t phase = 0; phase < result.step_height * result.step_width; ++phase) {
    const int64_t phase_row = phase / result.step_width;
    const int64_t phase_column = phase % result.step_width;
    for (int64_t c = 0; c < vectors * kLanes; ++c) {
      const int64_t image = c / planes.pitch;
      const int64_t v = c % planes.pitch;
      const int64_t x = v * result.step_width + phase_column - result.origin_width;
      const bool inside = c < columns && v < grid.columns && x >= 0 && x < result.width;
      column_map[c] = inside ? (image * result.height * result.width + x) * result.channels : -1;
    }
    Block block;
    block.channel_size = planes.channel_size;
    block.row_step = line_step;
    block.filter_stride = all_taps;
    block.offsets = taps.offsets + taps.phase_begin[phase];
    block.taps = taps.phase_begin[phase + 1] - taps.phase_begin[phase];

    for (int64_t o = channel_begin; o < channel_end; o += kLanes) {
      const int64_t block_channels = Min(kLanes, channel_end - o);
      if (block_channels < kLanes) memset(tile, 0, kLanes * kTileSize * 4);
      for (int64_t line_block = 0; line_block < line_blocks; ++line_block) {
        const int64_t line = PartBegin(lines, line_blocks, line_block);
        const int64_t block_lines = PartBegin(lines, line_blocks, line_block + 1) - line;
        for (int64_t vector = 0; vector < line_vectors; vector += kMaxVectors) {
          const int64_t block_vectors = Min(kMaxVectors, line_vectors - vector);
          const BlockFunction function = functions.of[kind][block_vectors][block_lines];
          block.planes = planes_data + line * line_step + vector * kLanes;
          for (int64_t b = 0; b < block_channels; ++b) {
            const int64_t begin = table.row_splits[o + b];
            block.channels = table.channels + begin;
            block.connections = table.row_splits[o + b + 1] - begin;
            block.filter = table.filter + begin * all_taps + taps.phase_begin[phase];
            block.tile = tile + b * kTileSize;
            function(block);
          }
          for (int64_t r = 0; r < block_lines; ++r) {
            const int64_t row = flat ? 0 : line + r;
            const int64_t y =
                (first_row + row) * result.step_height + phase_row - result.origin_height;
            if (y < 0 || y >= result.height) continue;
            const int64_t offset =
                (first_image * result.height + y) * result.width * result.channels + o;
            for (int64_t v = 0; v < block_vectors; ++v) {
              Vec lanes[kLanes];
              KS_UNROLL
              for (int b = 0; b < kLanes; ++b) {
                lanes[b] = Load(tile + b * kTileSize + (r * kMaxVectors + v) * kLanes);
              }
              Transpose(lanes);
              const int64_t* map = column_map + (flat ? line + r : vector + v) * kLanes;
              if (epilogue.used) {
                intptr_t residuals[kLanes];
                for (int i = 0; i < kLanes; ++i) {  // A dropped pixel reads the first one.
                  residuals[i] = reinterpret_cast<intptr_t>(epilogue.residual) +
                                 (map[i] >= 0 ? 4 * (offset - o + map[i]) : 0);
                }
                FinishPixels(epilogue, o, block_channels, residuals, lanes);
              }
              StorePixels(lanes, map, block_channels, output + offset);
            }
          }
        }
      }
    }
  }
}

// --- Plan and run --------------------------------------------------------------------------------

int64_t ColumnMapSize(const Planes& planes) { return RoundUp(planes.columns, kLanes); }

int Plan(const KsArguments& arguments, Parameters parameters, KsPlan* plan) {
  const KsGeometry& geometry = arguments.geometry;
  const int64_t taps = geometry.kernel_height * geometry.kernel_width;
  const int64_t phases = parameters.result.step_height * parameters.result.step_width;
  memset(plan, 0, sizeof(*plan));
  const Grid& grid = parameters.grid;
  if (!PlanPlanes(grid, grid.channels, 1, &parameters.planes)) return 0;
  const Planes& planes = parameters.planes;
  const int64_t tiles = planes.groups * planes.row_tiles;
  const int64_t channels = parameters.result.channels;
  parameters.tile_bytes = RoundUp(PlanesBytes(planes, grid.channels), KS_ALIGNMENT);
  parameters.splits = 1;
  if (tiles < kWantedItems && tiles * parameters.tile_bytes <= kScratchLimit / 4) {
    parameters.shared_tiles = 1;
    parameters.splits = Max(1, Min(CeilDiv(kWantedItems, tiles), CeilDiv(channels, kLanes)));
  }

  const double positions = static_cast<double>(planes.columns) * planes.tile_rows;
  const double sums = positions * arguments.kept * taps / kLanes / 1.5;
  const double moves = positions * (grid.channels + channels * phases) / 4;
  KsStage* stage = plan->stages;
  if (parameters.transposed) {
    stage->items = 1;
    stage->cost = 1000 + arguments.kept * 10;
    stage->prepares = KS_PREPARES_TABLE;
    ++stage;
    stage->items = grid.channels > 0 ? TransposeFilterItems(arguments) : 0;
    stage->cost = 100 + arguments.kept * taps * 32 / Max(1, geometry.in_channels);
    stage->prepares = KS_PREPARES_FILTER;
    ++stage;
  }
  if (parameters.shared_tiles) {
    stage->items = tiles * CeilDiv(grid.channels, kLanes);
    stage->cost = 100 + static_cast<int64_t>(positions * kLanes / 4);
    ++stage;
  }
  stage->items = tiles * parameters.splits;
  stage->cost = 100 + static_cast<int64_t>((sums + moves) / parameters.splits);
  ++stage;
  plan->num_stages = static_cast<int32_t>(stage - plan->stages);

  plan->scratch_bytes = TapsBytes(taps, phases) + PieceBytes(ColumnMapSize(planes), 8) +
                        PieceBytes(kLanes * kMaxRows * kMaxVectors * kLanes, 4) +
                        (parameters.shared_tiles ? 0 : parameters.tile_bytes);
  plan->table_bytes = parameters.transposed ? TransposedTableBytes(arguments) : 0;
  plan->filter_bytes = parameters.transposed ? TransposedFilterBytes(arguments) : 0;
  plan->shared_bytes = parameters.shared_tiles ? tiles * parameters.tile_bytes : 0;
  SaveParameters(parameters, plan);
  return 1;
}

void Run(const KsArguments& arguments, const KsPlan* plan, int32_t stage, int64_t begin,
         int64_t end, const KsMemory* memory, const float* source) {
  const Parameters parameters = LoadParameters<Parameters>(plan);
  const KsGeometry& geometry = arguments.geometry;
  const Grid& grid = parameters.grid;
  const Planes& planes = parameters.planes;

  Arena table_arena = {static_cast<char*>(memory->table)};
  Arena scratch_arena = {static_cast<char*>(memory->scratch)};
  const Taps taps = MakeTaps(geometry, parameters, &scratch_arena);
  Table table = {arguments.row_splits, arguments.input_channels, arguments.filter};
  if (parameters.transposed) {
    const TransposedTable transposed =
        PlaceTransposedTable(arguments, &table_arena, memory->filter);
    if (stage == 0) {
      TransposeTable(arguments, transposed);
      return;
    }
    if (stage == 1) {
      TransposeFilter(arguments, transposed, begin, end,
                      [&taps](int64_t t) { return taps.source[t]; });
      return;
    }
    stage -= 2;
    table = {transposed.row_splits, transposed.channels, transposed.filter};
  }

  float* shared_planes = static_cast<float*>(memory->shared);
  const int64_t tile_size = parameters.tile_bytes / 4;
  const int64_t plane_rows = (planes.tile_rows - 1) * grid.step_height + grid.reach_height + 1;
  if (parameters.shared_tiles && stage == 0) {
    const int64_t blocks = CeilDiv(grid.channels, kLanes);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t tile = item / blocks;
      const int64_t channel = item % blocks * kLanes;
      PackPlanes(grid, planes, source, channel, Min(channel + kLanes, grid.channels),
                 tile / planes.row_tiles * planes.images,
                 tile % planes.row_tiles * planes.tile_rows * grid.step_height, plane_rows,
                 shared_planes + tile * tile_size + channel * planes.channel_size);
    }
    return;
  }

  int64_t* column_map = scratch_arena.Take<int64_t>(ColumnMapSize(planes));
  float* tile_sums = scratch_arena.Take<float>(kLanes * kMaxRows * kMaxVectors * kLanes);
  float* own_planes = reinterpret_cast<float*>(scratch_arena.at);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t tile = item / parameters.splits;
    const int64_t split = item % parameters.splits;
    const float* tile_planes = shared_planes + tile * tile_size;
    if (!parameters.shared_tiles) {
      PackPlanes(grid, planes, source, 0, grid.channels, tile / planes.row_tiles * planes.images,
                 tile % planes.row_tiles * planes.tile_rows * grid.step_height, plane_rows,
                 own_planes);
      tile_planes = own_planes;
    }
    // Whole blocks of kLanes channels per split.
    const int64_t channels = parameters.result.channels;
    const int64_t blocks = CeilDiv(channels, kLanes);
    ComputeTile(arguments, parameters, table, taps, tile,
                PartBegin(blocks, parameters.splits, split) * kLanes,
                Min(channels, PartBegin(blocks, parameters.splits, split + 1) * kLanes),
                tile_planes, column_map, tile_sums, arguments.output);
  }
}

bool TooManyTaps(const KsGeometry& geometry) {
  return geometry.kernel_height > kMaxTaps || geometry.kernel_width > kMaxTaps ||
         geometry.kernel_height * geometry.kernel_width > kMaxTaps;
}

}  // namespace

int ConnectionConv2DPlan(const KsArguments* arguments, KsPlan* plan) {
  const KsGeometry& geometry = arguments->geometry;
  if (TooManyTaps(geometry) || geometry.stride_width > kMaxPhases) return 0;
  if (arguments->pool > 1) return 0;
  Parameters parameters = {};
  parameters.grid = ForwardGrid(geometry);
  parameters.result = {geometry.out_height, geometry.out_width, geometry.out_channels, 1, 1, 0, 0};
  if (IsPointwise(geometry)) {
    MakePointwise(&parameters.grid);
    parameters.result.height = parameters.result.width = 1;
  }
  return Plan(*arguments, parameters, plan);
}

void ConnectionConv2DRun(const KsArguments* arguments, const KsPlan* plan, int32_t stage,
                         int64_t begin, int64_t end, const KsMemory* memory) {
  Run(*arguments, plan, stage, begin, end, memory, arguments->input);
}

int ConnectionConv2DBackpropInputPlan(const KsArguments* arguments, KsPlan* plan) {
  const KsGeometry& geometry = arguments->geometry;
  if (TooManyTaps(geometry) || geometry.stride_height > kMaxPhases ||
      geometry.stride_width > kMaxPhases || geometry.in_height == 0 || geometry.in_width == 0) {
    return 0;
  }
  // Grid positions are padded input pixels divided by the stride.
  const int64_t sh = geometry.stride_height, sw = geometry.stride_width;
  const int64_t first_row = geometry.pad_top / sh;
  const int64_t first_column = geometry.pad_left / sw;
  const int64_t reach_height = (geometry.kernel_height - 1) * geometry.dilation_height / sh;
  const int64_t reach_width = (geometry.kernel_width - 1) * geometry.dilation_width / sw;
  Parameters parameters = {};
  parameters.transposed = 1;
  parameters.grid = {geometry.batch,
                     geometry.out_height,
                     geometry.out_width,
                     geometry.out_channels,
                     (geometry.pad_top + geometry.in_height - 1) / sh - first_row + 1,
                     (geometry.pad_left + geometry.in_width - 1) / sw - first_column + 1,
                     1,
                     1,
                     reach_height,
                     reach_width,
                     reach_height - first_row,
                     reach_width - first_column};
  parameters.result = {geometry.in_height,
                       geometry.in_width,
                       geometry.in_channels,
                       sh,
                       sw,
                       geometry.pad_top - first_row * sh,
                       geometry.pad_left - first_column * sw};
  if (IsPointwise(geometry)) {
    MakePointwise(&parameters.grid);
    parameters.result.height = parameters.result.width = 1;
  }
  return Plan(*arguments, parameters, plan);
}

void ConnectionConv2DBackpropInputRun(const KsArguments* arguments, const KsPlan* plan,
                                      int32_t stage, int64_t begin, int64_t end,
                                      const KsMemory* memory) {
  Run(*arguments, plan, stage, begin, end, memory, arguments->out_backprop);
}

}  // namespace KS_ISA
}  // namespace ks
