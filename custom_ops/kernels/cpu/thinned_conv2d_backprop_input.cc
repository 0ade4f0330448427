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
//
// Without strides, input and output are numbered alike, row after row and image after image: a tap
// is then one shift for all pixels, vectors are full whatever the image is, and what a shift
// carries over the edge of an image is masked. With strides, rows are handled one by one.

#include "custom_ops/kernels/cpu/planes.h"
#include "custom_ops/kernels/cpu/routines.h"

namespace ks {
namespace KS_ISA {
namespace {

// --- With strides --------------------------------------------------------------------------------

constexpr int kMaxRows = kRegisters == 32 ? 8 : 4;  // Kept rows of a block.
constexpr int kMaxVectors = kRegisters == 32 ? 3 : 2;
constexpr int64_t kMaxPhases = 64;

struct Parameters {
  int64_t flat;       // 0: see FlatParameters.
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

// --- Without strides -----------------------------------------------------------------------------

constexpr int kFlatVectors = kRegisters == 32 ? 4 : 2;
constexpr int kFlatRows[] = {0, kRegisters == 32 ? 10 : 8, kRegisters == 32 ? 10 : 6, 8, 6};
constexpr int kMostFlatRows = kRegisters == 32 ? 10 : 8;
constexpr int64_t kFlatBytes = 640 * 1024;  // Of a tile: out_backprop and planes.
constexpr int64_t kFlatPixels = 4 * kLanes * kFlatVectors;
constexpr int64_t kSplitChannels = 16;

typedef int32_t Mask __attribute__((vector_size(KS_VECTOR_BYTES)));

struct FlatParameters {
  int64_t flat;  // 1.
  // Pixels of a one-tap convolution are rows of one column.
  int64_t batch, in_height, in_width, out_height, out_width, out_image, in_image;
  int64_t height, width;  // Of an image as it is numbered: the larger of input and output.
  int64_t reach_height, reach_width;
  int64_t images, tile_rows;  // Of a tile: several whole images, or rows of one.
  int64_t groups, row_tiles;  // Tiles = groups of images x row tiles.
  int64_t vectors;            // Of pixels of out_backprop in a tile.
  int64_t margin, plane;      // Floats before the first pixel of a plane; from plane to plane.
  int64_t splits;             // Parts of the input channels.
  int64_t shared;             // 1: out_backprop is transposed once for all splits.
};

struct FlatRow {
  int64_t filter;   // Floats from the start of the filter.
  int64_t target;   // Floats from the first plane of the split, for the tile's first pixel.
  int32_t tap_row;  // Padded rows.
  int32_t mask;     // Which one.
};

// Adds products of kRows kept rows to planes. `d` is vector after vector, each [channels][kLanes].
template <int kRows, int kVectors>
void AddProducts(const float* d, int64_t channels, const float* const* filter, const float* next,
                 const int32_t* const* masks, float* const* targets) {
  const float* rows[kRows];
  KS_UNROLL
  for (int r = 0; r < kRows; ++r) rows[r] = filter[r];
  Vec sums[kRows][kVectors] = {};
  const int64_t size = channels * kLanes;
  for (int64_t o = 0; o < channels; ++o) {
    __builtin_prefetch(next + o * kRows);
    Vec values[kVectors];
    KS_UNROLL
    for (int v = 0; v < kVectors; ++v) values[v] = Load(d + v * size);
    d += kLanes;
    KS_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const Vec weight = Splat(rows[r][o]);
      KS_UNROLL
      for (int v = 0; v < kVectors; ++v) sums[r][v] += weight * values[v];
    }
  }
  // One after another: two rows may share a plane.
  KS_UNROLL
  for (int r = 0; r < kRows; ++r) {
    KS_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      float* const target = targets[r] + v * kLanes;
      Mask mask;
      memcpy(&mask, masks[r] + v * kLanes, sizeof(mask));
      Store(target,
            Load(target) + reinterpret_cast<Vec>(reinterpret_cast<Mask>(sums[r][v]) & mask));
    }
  }
}

typedef void (*AddFunction)(const float*, int64_t, const float* const*, const float*,
                            const int32_t* const*, float* const*);
struct AddFunctions {
  AddFunction of[kFlatVectors + 1][kMostFlatRows + 1];
};
template <int kVectors, int kRows>
struct FillAddFunctions {
  static void Run(AddFunctions* functions) {
    functions->of[kVectors][kRows] = AddProducts<kRows, kVectors>;
    FillAddFunctions<kVectors, kRows - 1>::Run(functions);
  }
};
template <int kVectors>
struct FillAddFunctions<kVectors, 0> {
  static void Run(AddFunctions*) {}
};
AddFunctions AllAddFunctions() {
  AddFunctions functions;
  FillAddFunctions<1, kFlatRows[1]>::Run(&functions);
  FillAddFunctions<2, kFlatRows[2]>::Run(&functions);
#if KS_VECTOR_BYTES == 64 || defined(__aarch64__)
  FillAddFunctions<3, kFlatRows[3]>::Run(&functions);
  FillAddFunctions<4, kFlatRows[4]>::Run(&functions);
#endif
  return functions;
}

struct FlatTile {
  int64_t first_image, images;
  int64_t first_row, rows;          // Of the input.
  int64_t out_first_row, out_rows;  // Of out_backprop.
};
FlatTile FlatTileAt(const FlatParameters& parameters, const KsGeometry& geometry, int64_t i) {
  FlatTile tile;
  tile.first_image = i / parameters.row_tiles * parameters.images;
  tile.images = Min(parameters.images, parameters.batch - tile.first_image);
  tile.first_row = i % parameters.row_tiles * parameters.tile_rows;
  tile.rows = Min(parameters.tile_rows, parameters.in_height - tile.first_row);
  tile.out_first_row = 0;
  tile.out_rows = parameters.out_height;
  if (parameters.images == 1) {
    tile.out_first_row = Min(parameters.out_height,
                             Max(0, tile.first_row + geometry.pad_top - parameters.reach_height));
    tile.out_rows = Max(tile.out_first_row,
                        Min(parameters.out_height, tile.first_row + tile.rows + geometry.pad_top)) -
                    tile.out_first_row;
  }
  return tile;
}

// Transposes vectors [begin, end) of the tile's pixels of out_backprop.
void PackFlat(const KsArguments& arguments, const FlatParameters& parameters, const FlatTile& tile,
              int64_t begin, int64_t end, const float* zeros, float* target) {
  const int64_t channels = arguments.geometry.out_channels;
  for (int64_t v = begin; v < end; ++v) {
    const float* pixels[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      const int64_t at = v * kLanes + l;
      const int64_t column = at % parameters.width;
      int64_t row = at / parameters.width, image = 0;
      if (parameters.images > 1) {
        image = row / parameters.height;
        row %= parameters.height;
      }
      pixels[l] = column < parameters.out_width && row < tile.out_rows && image < tile.images
                      ? arguments.out_backprop +
                            ((tile.first_image + image) * parameters.out_image +
                             (tile.out_first_row + row) * parameters.out_width + column) *
                                channels
                      : zeros;
    }
    float* const vectors = target + v * channels * kLanes;
    if (channels < kLanes) {
      for (int64_t c = 0; c < channels; ++c) {
        for (int l = 0; l < kLanes; ++l) vectors[c * kLanes + l] = pixels[l][c];
      }
      continue;
    }
    for (int64_t c = 0; c < channels; c += kLanes) {
      const int64_t first = Min(c, channels - kLanes);
      Vec rows[kLanes];
      KS_UNROLL
      for (int l = 0; l < kLanes; ++l) {
        rows[l] = Load(pixels[l] + first);
        FetchFar(pixels[l] + first + kLanes * channels);
      }
      Transpose(rows);
      KS_UNROLL
      for (int l = 0; l < kLanes; ++l) Store(vectors + (first + l) * kLanes, rows[l]);
    }
  }
}

// Where the channels of a split begin.
KS_INLINE int64_t SplitChannel(const KsGeometry& geometry, const FlatParameters& parameters,
                               int64_t split) {
  return Min(geometry.in_channels,
             PartBegin(CeilDiv(geometry.in_channels, kSplitChannels), parameters.splits, split) *
                 kSplitChannels);
}

struct FlatPrepared {
  FlatRow* rows;    // Split after split, in the order of the taps.
  int64_t* starts;  // [splits + 1].
  int32_t* masks;   // [taps or columns of taps][vectors * kLanes]
  uint8_t* used;    // Whether a group of kLanes input channels has kept rows.
};
int64_t FlatMasks(const KsGeometry& geometry, const FlatParameters& parameters) {
  return parameters.images > 1 ? geometry.kernel_height * geometry.kernel_width
                               : geometry.kernel_width;
}
FlatPrepared PlaceFlat(const KsArguments& arguments, const FlatParameters& parameters,
                       const KsMemory& memory) {
  Arena arena = {static_cast<char*>(memory.table)};
  FlatPrepared place;
  place.rows = arena.Take<FlatRow>(arguments.kept);
  place.starts = arena.Take<int64_t>(parameters.splits + 1);
  place.masks =
      arena.Take<int32_t>(FlatMasks(arguments.geometry, parameters) * parameters.vectors * kLanes);
  place.used = arena.Take<uint8_t>(CeilDiv(arguments.geometry.in_channels, kLanes));
  return place;
}

void PrepareFlat(const KsArguments& arguments, const FlatParameters& parameters,
                 const FlatPrepared& prepared) {
  const KsGeometry& geometry = arguments.geometry;
  memset(prepared.used, 0, CeilDiv(geometry.in_channels, kLanes));
  FlatRow* row = prepared.rows;
  for (int64_t split = 0; split < parameters.splits; ++split) {
    prepared.starts[split] = row - prepared.rows;
    const int64_t first = SplitChannel(geometry, parameters, split);
    const int64_t last = SplitChannel(geometry, parameters, split + 1);
    for (int64_t k = 0; k < arguments.kept; ++k) {
      const int64_t channel = arguments.indices[k] % geometry.in_channels;
      if (channel < first || channel >= last) continue;
      prepared.used[channel / kLanes] = 1;
      const int64_t tap = arguments.indices[k] / geometry.in_channels;
      const int64_t i = tap / geometry.kernel_width, j = tap % geometry.kernel_width;
      *row++ = {k * geometry.out_channels,
                (channel - first) * parameters.plane + parameters.margin +
                    (i * geometry.dilation_height - geometry.pad_top) * parameters.width +
                    j * geometry.dilation_width - geometry.pad_left,
                static_cast<int32_t>(i * geometry.dilation_height),
                static_cast<int32_t>(parameters.images > 1 ? tap : j)};
    }
  }
  prepared.starts[parameters.splits] = row - prepared.rows;
  // Pixels beyond the output are zero: only what leaves the input needs a mask. Rows of a single
  // image leave it for the margins.
  for (int64_t m = 0; m < FlatMasks(geometry, parameters); ++m) {
    const int64_t i = parameters.images > 1 ? m / geometry.kernel_width : 0;
    const int64_t j = m % geometry.kernel_width;
    int32_t* const mask = prepared.masks + m * parameters.vectors * kLanes;
    for (int64_t at = 0; at < parameters.vectors * kLanes; ++at) {
      const int64_t x = at % parameters.width + j * geometry.dilation_width - geometry.pad_left;
      const int64_t y = at / parameters.width % parameters.height + i * geometry.dilation_height -
                        geometry.pad_top;
      const bool inside = x >= 0 && x < parameters.in_width &&
                          (parameters.images == 1 || (y >= 0 && y < parameters.in_height));
      mask[at] = inside ? -1 : 0;
    }
  }
}

// Transposes kLanes channels of kLanes pixels; zeros when no kept row uses them.
KS_INLINE void UnpackBlock(const float* planes, int64_t plane, bool used, float* target,
                           int64_t stride) {
  if (!used) {
    KS_UNROLL
    for (int l = 0; l < kLanes; ++l) Store(target + l * stride, Vec{});
    return;
  }
  Vec rows[kLanes];
  KS_UNROLL
  for (int l = 0; l < kLanes; ++l) rows[l] = Load(planes + l * plane);
  Transpose(rows);
  KS_UNROLL
  for (int l = 0; l < kLanes; ++l) Store(target + l * stride, rows[l]);
}

// Moves rows of planes to `count` pixels, whole pixels at a time. `used` tells which groups of
// kLanes channels have kept rows.
void UnpackFlat(const float* planes, int64_t plane, int64_t count, int64_t channels,
                const uint8_t* used, bool stream, float* pixels, int64_t pixel_stride) {
  // Stores past the caches are fast when they follow each other in memory.
  constexpr int64_t kGroups = 256 / kLanes;
  float lines[kLanes * kGroups * kLanes];
  for (int64_t p = 0; p < count; p += kLanes) {
    const int64_t here = Min(kLanes, count - p);
    const bool direct = here == kLanes && !stream;
    for (int64_t first = 0; first < channels; first += kGroups * kLanes) {
      const int64_t last = Min(channels, first + kGroups * kLanes);
      for (int64_t c = first; c < last; c += kLanes) {
        const int64_t channel = Min(c, channels - kLanes);
        const bool any = used[c / kLanes] || channel < c;
        if (direct) {
          UnpackBlock(planes + channel * plane + p, plane, any, pixels + p * pixel_stride + channel,
                      pixel_stride);
        } else {
          UnpackBlock(planes + channel * plane + p, plane, any, lines + c - first,
                      kGroups * kLanes);
        }
      }
      if (direct) continue;
      for (int64_t l = 0; l < here; ++l) {
        float* const target = pixels + (p + l) * pixel_stride;
        for (int64_t c = first; c < last; c += kLanes) {
          const Vec line = Load(lines + l * kGroups * kLanes + c - first);
          if (stream) {
            Stream(target + c, line);
          } else {
            Store(target + Min(c, channels - kLanes), line);
          }
        }
      }
    }
  }
}

void ComputeFlat(const KsArguments& arguments, const FlatParameters& parameters,
                 const FlatPrepared& prepared, const AddFunctions& functions, const FlatTile& tile,
                 int64_t split, const float* d, bool stream, float* planes) {
  const KsGeometry& geometry = arguments.geometry;
  const int64_t out_channels = geometry.out_channels;
  const int64_t first_channel = SplitChannel(geometry, parameters, split);
  const int64_t channels = SplitChannel(geometry, parameters, split + 1) - first_channel;
  const uint8_t* const used = prepared.used + first_channel / kLanes;
  for (int64_t c = 0; c < channels; c += kLanes) {
    // The last group is cut together with some of the one before.
    if (!used[c / kLanes] && c + 2 * kLanes <= channels) continue;
    memset(planes + c * parameters.plane, 0, Min(kLanes, channels - c) * parameters.plane * 4);
  }
  // Pixel 0 of out_backprop in the tile, as a pixel of the input in the tile.
  const int64_t shift = (tile.out_first_row - tile.first_row) * parameters.width;
  const int64_t all_vectors = CeilDiv(
      (parameters.images > 1 ? tile.images * parameters.height : tile.out_rows) * parameters.width,
      kLanes);
  const FlatRow* const rows = prepared.rows + prepared.starts[split];
  const int64_t count = prepared.starts[split + 1] - prepared.starts[split];
  const int64_t widest = CeilDiv(all_vectors, Max(1, CeilDiv(all_vectors, kFlatVectors)));
  const int64_t blocks = CeilDiv(count, kFlatRows[widest]);
  for (int64_t b = 0; b < blocks; ++b) {
    const FlatRow* const block = rows + PartBegin(count, blocks, b);
    const int64_t here = rows + PartBegin(count, blocks, b + 1) - block;
    int64_t begin = 0, end = all_vectors;
    if (parameters.images == 1) {
      // The rows that one of the taps brings into the tile.
      const int64_t first =
          Max(0, tile.first_row + geometry.pad_top - block[here - 1].tap_row - tile.out_first_row);
      const int64_t last = Min(tile.out_rows, tile.first_row + tile.rows + geometry.pad_top -
                                                  block[0].tap_row - tile.out_first_row);
      begin = first * parameters.width / kLanes;
      end = CeilDiv(last * parameters.width, kLanes);
      if (first >= last) continue;
    }
    const float* filter[kMostFlatRows];
    const float* const next = arguments.filter + block[b + 1 < blocks ? here : here - 1].filter;
    for (int64_t r = 0; r < here; ++r) filter[r] = arguments.filter + block[r].filter;
    const int64_t pieces = CeilDiv(end - begin, widest);
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const int64_t first = begin + PartBegin(end - begin, pieces, piece);
      const int64_t vectors = begin + PartBegin(end - begin, pieces, piece + 1) - first;
      const int32_t* masks[kMostFlatRows];
      float* targets[kMostFlatRows];
      for (int64_t r = 0; r < here; ++r) {
        masks[r] = prepared.masks + (block[r].mask * parameters.vectors + first) * kLanes;
        targets[r] = planes + block[r].target + shift + first * kLanes;
      }
      functions.of[vectors][here](d + first * out_channels * kLanes, out_channels, filter, next,
                                  masks, targets);
    }
  }

  // The planes back to NHWC: all pixels at once where they follow each other.
  const bool whole_rows = parameters.width == parameters.in_width;
  const bool whole = whole_rows && (tile.images == 1 || parameters.height == parameters.in_height);
  const int64_t runs = whole ? 1 : tile.images * (whole_rows ? 1 : tile.rows);
  const int64_t run_pixels = tile.images * tile.rows * parameters.in_width / runs;
  for (int64_t run = 0; run < runs; ++run) {
    const int64_t image = whole ? 0 : whole_rows ? run : run / tile.rows;
    const int64_t row = whole || whole_rows ? 0 : run % tile.rows;
    const float* const source =
        planes + parameters.margin + (image * parameters.height + row) * parameters.width;
    float* const target = arguments.output +
                          ((tile.first_image + image) * parameters.in_image +
                           (tile.first_row + row) * parameters.in_width) *
                              geometry.in_channels +
                          first_channel;
    if (channels < kLanes) {
      UnpackRun(source, parameters.plane, run_pixels, channels, target, geometry.in_channels);
    } else {
      UnpackFlat(source, parameters.plane, run_pixels, channels, used, stream, target,
                 geometry.in_channels);
    }
  }
}

int FlatPlan(const KsArguments* arguments, KsPlan* plan) {
  const KsGeometry& geometry = arguments->geometry;
  if (geometry.stride_height != 1 || geometry.stride_width != 1 || geometry.pad_top < 0 ||
      geometry.pad_left < 0 || geometry.in_channels == 0 || geometry.batch == 0) {
    return 0;
  }
  FlatParameters parameters = {};
  parameters.flat = 1;
  parameters.batch = geometry.batch;
  parameters.in_height = geometry.in_height;
  parameters.in_width = geometry.in_width;
  parameters.out_height = geometry.out_height;
  parameters.out_width = geometry.out_width;
  if (IsPointwise(geometry)) {
    parameters.in_height = parameters.out_height =
        geometry.batch * geometry.in_height * geometry.in_width;
    parameters.batch = parameters.in_width = parameters.out_width = 1;
  }
  parameters.in_image = parameters.in_height * parameters.in_width;
  parameters.out_image = parameters.out_height * parameters.out_width;
  parameters.height = Max(parameters.in_height, parameters.out_height);
  parameters.width = Max(parameters.in_width, parameters.out_width);
  parameters.reach_height = (geometry.kernel_height - 1) * geometry.dilation_height;
  parameters.reach_width = (geometry.kernel_width - 1) * geometry.dilation_width;
  const double channels =
      static_cast<double>(geometry.in_channels) + static_cast<double>(geometry.out_channels);
  const double least =
      4.0 * channels * (2.0 * static_cast<double>(parameters.reach_height) + 2) *
          (static_cast<double>(parameters.width) + static_cast<double>(parameters.reach_width)) +
      4.0 * channels * 8 * kLanes;
  if (least > static_cast<double>(kScratchLimit) / 4) return 0;

  // Pixels of a tile: enough to use a row of the filter often, and then as its memory wants it.
  const int64_t wanted =
      Max(kFlatPixels / 2, kFlatBytes / (4 * (geometry.in_channels + geometry.out_channels)));
  const int64_t image_pixels = parameters.height * parameters.width;
  parameters.images = 1;
  parameters.tile_rows = parameters.in_height;
  if (image_pixels > wanted) {
    const int64_t rows = Max(1, wanted / parameters.width);
    parameters.tile_rows = CeilDiv(parameters.in_height, CeilDiv(parameters.in_height, rows));
  } else {
    // The number of images that fills its vectors best, and then enough tiles for many threads.
    const int64_t most =
        Max(1, Min(Min(parameters.batch, wanted / image_pixels),
                   Max(CeilDiv(kFlatPixels, image_pixels), parameters.batch / kWantedItems)));
    double best = 0;
    for (int64_t images = 1; images <= most; ++images) {
      const int64_t pixels = images * image_pixels;
      const double full = static_cast<double>(pixels) / RoundUp(pixels, kLanes) *
                          Min(pixels, kFlatPixels / 2) / (kFlatPixels / 2);
      if (full < best) continue;
      best = full;
      parameters.images = images;
    }
  }
  parameters.row_tiles = CeilDiv(parameters.in_height, parameters.tile_rows);
  parameters.groups = CeilDiv(parameters.batch, parameters.images);
  const int64_t out_pixels =
      (parameters.images > 1
           ? parameters.images * parameters.height
           : Min(parameters.out_height, parameters.tile_rows + parameters.reach_height)) *
      parameters.width;
  const int64_t in_pixels =
      (parameters.images > 1 ? parameters.images * parameters.height : parameters.tile_rows) *
      parameters.width;
  parameters.vectors = CeilDiv(out_pixels, kLanes);
  parameters.margin = RoundUp(
      Max(parameters.reach_height, geometry.pad_top) * parameters.width + geometry.pad_left, 16);
  parameters.plane = (CeilDiv(parameters.margin + kLanes +
                                  Max(in_pixels, parameters.vectors * kLanes +
                                                     parameters.reach_height * parameters.width +
                                                     parameters.reach_width),
                              16) |
                      1) *
                     16;
  const int64_t num_tiles = parameters.groups * parameters.row_tiles;
  parameters.splits = 1;
  if (num_tiles < kWantedItems / 2) {
    parameters.splits =
        Min(CeilDiv(kWantedItems, num_tiles), CeilDiv(geometry.in_channels, kSplitChannels));
  }
  parameters.shared = parameters.splits > 1;

  const int64_t packed_bytes = PieceBytes(parameters.vectors * kLanes * geometry.out_channels, 4);
  const int64_t planes_bytes =
      PieceBytes(Min(geometry.in_channels,
                     CeilDiv(CeilDiv(geometry.in_channels, kSplitChannels), parameters.splits) *
                         kSplitChannels) *
                     parameters.plane,
                 4);
  const int64_t zeros_bytes = PieceBytes(geometry.out_channels, 4);
  if (planes_bytes + packed_bytes > kScratchLimit) return 0;
  KsStage* stage = plan->stages;
  stage->items = 1;
  stage->cost = 100 + arguments->kept * (8 + 2 * parameters.splits) +
                FlatMasks(geometry, parameters) * parameters.vectors * kLanes * 4;
  stage->prepares = KS_PREPARES_TABLE;
  ++stage;
  stage->items = parameters.shared ? num_tiles * parameters.vectors : 0;
  stage->cost = 100 + geometry.out_channels * 4;
  ++stage;
  stage->items = num_tiles * parameters.splits;
  stage->cost =
      100 +
      static_cast<int64_t>(
          static_cast<double>(parameters.vectors) / static_cast<double>(parameters.splits) *
          (static_cast<double>(arguments->kept) * geometry.out_channels / 1.8 + channels * 4));
  plan->num_stages = 3;
  plan->table_bytes = PieceBytes(arguments->kept, sizeof(FlatRow)) +
                      PieceBytes(parameters.splits + 1, 8) +
                      PieceBytes(FlatMasks(geometry, parameters) * parameters.vectors * kLanes, 4) +
                      PieceBytes(CeilDiv(geometry.in_channels, kLanes), 1);
  plan->shared_bytes = parameters.shared ? num_tiles * packed_bytes : 0;
  plan->scratch_bytes = zeros_bytes + planes_bytes + (parameters.shared ? 0 : packed_bytes);
  SaveParameters(parameters, plan);
  return 1;
}

void FlatRun(const KsArguments& arguments, const FlatParameters& parameters, int32_t stage,
             int64_t begin, int64_t end, const KsMemory& memory) {
  const KsGeometry& geometry = arguments.geometry;
  const FlatPrepared prepared = PlaceFlat(arguments, parameters, memory);
  if (stage == 0) {
    PrepareFlat(arguments, parameters, prepared);
    return;
  }
  const int64_t packed_size = parameters.vectors * kLanes * geometry.out_channels;
  const int64_t packed_stride = PieceBytes(packed_size, 4) / 4;
  Arena arena = {static_cast<char*>(memory.scratch)};
  float* const zeros = arena.Take<float>(geometry.out_channels);
  float* const own = arena.Take<float>(parameters.shared ? 0 : packed_size);
  float* const planes = reinterpret_cast<float*>(arena.at);
  float* const shared = static_cast<float*>(memory.shared);
  if (geometry.out_channels > 0) memset(zeros, 0, geometry.out_channels * 4);
  if (stage == 1) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t i = item / parameters.vectors, vector = item % parameters.vectors;
      PackFlat(arguments, parameters, FlatTileAt(parameters, geometry, i), vector, vector + 1,
               zeros, shared + i * packed_stride);
    }
    return;
  }
  const AddFunctions functions = AllAddFunctions();
  const double result =
      4.0 * static_cast<double>(parameters.batch) * parameters.in_image * geometry.in_channels;
  const bool stream = result >= static_cast<double>(kStreamFrom) &&
                      geometry.in_channels % kLanes == 0 &&
                      reinterpret_cast<uintptr_t>(arguments.output) % sizeof(Vec) == 0;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t i = item / parameters.splits, split = item % parameters.splits;
    const FlatTile tile = FlatTileAt(parameters, geometry, i);
    if (!parameters.shared) {
      PackFlat(arguments, parameters, tile, 0, parameters.vectors, zeros, own);
    }
    ComputeFlat(arguments, parameters, prepared, functions, tile, split,
                parameters.shared ? shared + i * packed_stride : own, stream, planes);
  }
  if (stream) StreamEnd();
}

}  // namespace

int ThinnedConv2DBackpropInputPlan(const KsArguments* arguments, KsPlan* plan) {
  const KsGeometry& geometry = arguments->geometry;
  memset(plan, 0, sizeof(*plan));
  if (geometry.stride_width > kMaxPhases || geometry.in_height == 0 || geometry.in_width == 0 ||
      geometry.out_height == 0 || geometry.out_width == 0) {
    return 0;
  }
  if (FlatPlan(arguments, plan)) return 1;
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
  const FlatParameters flat = LoadParameters<FlatParameters>(plan);
  if (flat.flat) {
    FlatRun(*arguments, flat, stage, begin, end, *memory);
    return;
  }
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
