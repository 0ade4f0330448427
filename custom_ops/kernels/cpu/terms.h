// Copyright 2026 The keras_sparse Authors. Licensed under the Apache License, Version 2.0.
//
// Sums of scalars times rows of vectors, read in place from NHWC pixels:
//
//   out[p][:] = sum over terms t of x[p][t.x] * w[t.row][:]
//
// The thinned convolution is such a sum with pixels as points p and kept rows as terms; the
// gradient of its filter is one with kept rows as points and pixels as terms. The lowered matrix is
// never formed: where taps leave the image, a tile of the input is copied with its zero padding,
// and a tap is then one offset for all pixels.

#ifndef KERAS_SPARSE_CUSTOM_OPS_KERNELS_CPU_TERMS_H_
#define KERAS_SPARSE_CUSTOM_OPS_KERNELS_CPU_TERMS_H_

#include "custom_ops/kernels/conv2d.h"
#include "custom_ops/kernels/cpu/epilogue.h"
#include "custom_ops/kernels/cpu/planes.h"
#include "custom_ops/kernels/cpu/vector.h"

namespace ks {
namespace KS_ISA {

// --- Register blocks -----------------------------------------------------------------------------

// A block of points x vectors stays in registers; a term is one load per vector and one broadcast
// per point. Points have places of their own, so that a block may cross rows and images; the
// general registers limit them where the vector registers would not.
constexpr int kPanelVectors = kRegisters == 32 ? 4 : 2;
constexpr int kMostPoints = kRegisters == 32 ? 9 : 8;
constexpr int kBlockPoints[] = {0, kRegisters == 32 ? 9 : 8, kRegisters == 32 ? 9 : 6, 8, 6};

struct Term {
  int32_t x;    // Floats from a point.
  int32_t row;  // Of w.
};

struct Point {
  int64_t x;    // Floats from Sums::x,
  int64_t out;  // and from Sums::out.
};

struct Sums {
  const float* x;
  const float* w;
  int64_t w_stride;  // Floats between rows.
  const Term* terms;
  int64_t num_terms;
  int64_t ahead;  // Floats from a row to what is wanted next: fetched by the first blocks, which
                  // take a cache line each; 0: nothing is.
  // Floats from what is read of a point to what is fetched for later blocks; 0: nothing is. With
  // kFetchByTerms only.
  int64_t x_ahead;
  int64_t fetch_pair;  // Which two points that is done for, counted from 1; 0: all.
  bool in_order;       // Whether the rows of terms follow each other.
  float* out;
  bool add;     // To what `out` holds.
  bool stream;  // Stores past the caches.
  // Whether to fetch where a block will be stored to before it is computed: stores to memory that
  // no near cache holds would hold up the next block.
  bool fetch_out;
  // Where to fetch what later blocks will be stored to instead, a line to a term; or null. With
  // x_ahead only. Many fetches at a time hold up what is read.
  const float* fetch_later;
  // With its pointers at the place of `out`, or null: these sums are not the last.
  const Epilogue* epilogue;
};

// Where the results of the next point go. One place at a time: compilers would read all first, and
// keep in vector registers what the others do not hold. Moves from those wait for all products.
KS_INLINE float* NextOut(const Sums& sums, const Point** point) {
  float* const out = sums.out + (*point)->out;
  ++*point;
  asm("" : "+r"(*point));
  return out;
}

// The one place where finished sums of a block go to memory.
template <int kCount, int kVectors>
KS_INLINE void StoreSums(const Sums& sums, const Point* points, Vec (&block)[kCount][kVectors]) {
  // Adding at the end, rather than starting from what was there, keeps long sums more accurate.
  if (sums.add) {
    const Point* point = points;
    KS_UNROLL
    for (int p = 0; p < kCount; ++p) {
      const float* const out = NextOut(sums, &point);
      KS_UNROLL
      for (int v = 0; v < kVectors; ++v) block[p][v] += Load(out + v * kLanes);
    }
  }
  if (sums.epilogue != nullptr) {
    const Epilogue& epilogue = *sums.epilogue;
    const Vec least = Splat(epilogue.least), most = Splat(epilogue.most);
    KS_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const Vec bias = epilogue.bias == nullptr ? Vec{} : Load(epilogue.bias + v * kLanes);
      KS_UNROLL
      for (int p = 0; p < kCount; ++p) {
        block[p][v] += bias;
        if (epilogue.residual != nullptr) {
          block[p][v] += Load(epilogue.residual + points[p].out + v * kLanes);
        }
        block[p][v] = Clamp(block[p][v], least, most);
      }
    }
  }
  if (sums.stream) {
    KS_UNROLL
    for (int p = 0; p < kCount; ++p) {
      float* const out = NextOut(sums, &points);
      KS_UNROLL
      for (int v = 0; v < kVectors; ++v) Stream(out + v * kLanes, block[p][v]);
    }
    return;
  }
  KS_UNROLL
  for (int p = 0; p < kCount; ++p) {
    float* const out = NextOut(sums, &points);
    KS_UNROLL
    for (int v = 0; v < kVectors; ++v) Store(out + v * kLanes, block[p][v]);
  }
}

// Where the rows of terms are: anywhere; one after the other; anywhere, and what comes after them
// is fetched; that, and points as well; or anywhere, and two of the points. With short vectors a
// term has nearly as many loads as the CPU does in the time of its products, and a fetch takes the
// place of one.
enum { kAnyRows, kRowsInOrder, kRowsFetched, kAllFetched, kPairFetched, kRowKinds };
// Whether points that come from memory are fetched a cache line to a term, for which there is time
// with long vectors: into the second-level cache, as the first-level one holds what is read now.
constexpr bool kFetchByTerms = KS_VECTOR_BYTES == 64;

constexpr intptr_t kTermLine = KS_ALIGNMENT / sizeof(Term);
// What a term needs beside the places of points. Long vectors leave time to load it, and more
// points take all registers: see NextOut(). With short ones loads are what takes the time.
#if KS_VECTOR_BYTES == 64
typedef volatile int64_t InLoop;
#else
typedef int64_t InLoop;
#endif

template <int kCount, int kVectors, int kRows>
void SumTerms(const Sums& sums, const Point* points) {
  // Read again after the loop, from memory: see NextOut().
  const Sums* const volatile sums_after = &sums;
  const Point* const volatile points_after = points;
  const float* x[kCount];
  KS_UNROLL
  for (int p = 0; p < kCount; ++p) {
    x[p] = sums.x + points[p].x;
    asm("" : "+r"(x[p]));  // Not to be computed again from its parts.
  }
  if (sums.fetch_out) {
    const Point* point = points;
    KS_UNROLL
    for (int p = 0; p < kCount; ++p) {
      const float* const out = NextOut(sums, &point);
      KS_UNROLL
      for (int v = 0; v < kVectors; ++v) FetchFar(out + v * kLanes);
    }
  }
  Vec block[kCount][kVectors] = {};
  const float* const w = sums.w;
  const InLoop w_stride = sums.w_stride, ahead = sums.ahead, x_ahead = sums.x_ahead;
  const float* volatile first = nullptr, * volatile second = nullptr;
  if (kRows == kPairFetched) {
    first = sums.x + points[Min(2 * sums.fetch_pair - 2, kCount - 1)].x + x_ahead;
    second = sums.x + points[Min(2 * sums.fetch_pair - 1, kCount - 1)].x + x_ahead;
  }
  // A line to a term: the place of a term tells which.
  constexpr bool kFetchLater = kRows == kAllFetched || kRows == kPairFetched;
  volatile intptr_t later_out;
  if (kFetchLater) {
    later_out = reinterpret_cast<intptr_t>(sums.fetch_later != nullptr ? sums.fetch_later : w) -
                reinterpret_cast<intptr_t>(sums.terms) * kTermLine;
  }
  const Term* const last = sums.terms + sums.num_terms;
  const float* next = sums.num_terms > 0 ? w + sums.terms->row * w_stride : w;
  for (const Term* term = sums.terms; term != last; ++term) {
    const float* const row = kRows == kRowsInOrder ? next : w + term->row * w_stride;
    if (kRows == kRowsInOrder) next += w_stride;
    const int64_t at = term->x;
    if (kFetchLater) FetchFar(later_out + reinterpret_cast<intptr_t>(term) * kTermLine);
    if (kRows == kRowsFetched || kRows == kAllFetched) __builtin_prefetch(row + ahead);
    if (kRows == kPairFetched) {
      FetchFar(first + at);
      FetchFar(second + at);
    }
    if (kRows == kAllFetched) {
      const int64_t later = at + x_ahead;
      KS_UNROLL
      for (int p = 0; p < kCount; ++p) FetchFar(x[p] + later);
    }
    Vec weights[kVectors];
    KS_UNROLL
    for (int v = 0; v < kVectors; ++v) weights[v] = Load(row + v * kLanes);
    KS_UNROLL
    for (int p = 0; p < kCount; ++p) {
      const Vec value = Splat(x[p][at]);
      KS_UNROLL
      for (int v = 0; v < kVectors; ++v) block[p][v] += value * weights[v];
    }
  }
  StoreSums<kCount, kVectors>(*sums_after, points_after, block);
}

typedef void (*SumFunction)(const Sums&, const Point*);
struct SumFunctions {
  SumFunction of[kRowKinds][kPanelVectors + 1][kMostPoints + 1];
};
template <int kVectors, int kCount>
constexpr void FillSumFunctions(SumFunctions* functions) {
  if constexpr (kCount > 0) {
    functions->of[kAnyRows][kVectors][kCount] = SumTerms<kCount, kVectors, kAnyRows>;
    functions->of[kRowsInOrder][kVectors][kCount] = SumTerms<kCount, kVectors, kRowsInOrder>;
    functions->of[kRowsFetched][kVectors][kCount] = SumTerms<kCount, kVectors, kRowsFetched>;
    if constexpr (kFetchByTerms) {
      functions->of[kAllFetched][kVectors][kCount] = SumTerms<kCount, kVectors, kAllFetched>;
      functions->of[kPairFetched][kVectors][kCount] = SumTerms<kCount, kVectors, kPairFetched>;
    }
    FillSumFunctions<kVectors, kCount - 1>(functions);
  }
}
constexpr SumFunctions AllSumFunctions() {
  SumFunctions functions = {};
  FillSumFunctions<1, kBlockPoints[1]>(&functions);
  FillSumFunctions<2, kBlockPoints[2]>(&functions);
#if KS_VECTOR_BYTES == 64 || defined(__aarch64__)
  FillSumFunctions<3, kBlockPoints[3]>(&functions);
  FillSumFunctions<4, kBlockPoints[4]>(&functions);
#endif
  return functions;
}
constexpr SumFunctions kSumFunctions = AllSumFunctions();

// Output channels are cut into panels of nearly equal numbers of vectors.
struct Panels {
  int64_t channels, vectors, count;
};
struct Panel {
  int64_t first_vector, vectors;
  int64_t channels;  // Below vectors * kLanes in the last panel when the channels are ragged.
};
KS_INLINE Panels MakePanels(int64_t channels) {
  const int64_t vectors = CeilDiv(channels, kLanes);
  return {channels, vectors, CeilDiv(vectors, kPanelVectors)};
}
KS_INLINE Panel PanelAt(const Panels& panels, int64_t i) {
  const int64_t first = PartBegin(panels.vectors, panels.count, i);
  const int64_t vectors = PartBegin(panels.vectors, panels.count, i + 1) - first;
  return {first, vectors, Min(vectors * kLanes, panels.channels - first * kLanes)};
}

// The sums of a block of points for a panel with fewer channels than its vectors have lanes: by way
// of whole vectors. Not inlined: it would slow down callers that never come here.
__attribute__((noinline)) inline void SumRaggedBlock(const Panel& panel, SumFunction function,
                                                     const Point* points, int64_t count,
                                                     const Sums& sums) {
  const int64_t width = panel.vectors * kLanes;
  float lanes[kMostPoints * kPanelVectors * kLanes];
  Point padded[kMostPoints] = {};
  for (int64_t p = 0; p < count; ++p) {
    padded[p] = {points[p].x, p * width};
    if (!sums.add) continue;
    memset(lanes + p * width, 0, width * 4);
    memcpy(lanes + p * width, sums.out + points[p].out, panel.channels * 4);
  }
  Sums whole = sums;
  whole.out = lanes;
  whole.epilogue = nullptr;
  whole.stream = whole.fetch_out = false;
  function(whole, padded);
  const Epilogue* const epilogue = sums.epilogue;
  for (int64_t p = 0; p < count; ++p) {
    for (int64_t c = 0; c < panel.channels; ++c) {
      float sum = lanes[p * width + c];
      if (epilogue != nullptr) {
        if (epilogue->bias != nullptr) sum += epilogue->bias[c];
        if (epilogue->residual != nullptr) sum += epilogue->residual[points[p].out + c];
        sum = Clamp(sum, epilogue->least, epilogue->most);
      }
      sums.out[points[p].out + c] = sum;
    }
  }
}

// The sums of a block of points for one panel. `rows`: where those of terms are, see SumTerms.
KS_INLINE void SumBlock(const Panel& panel, int rows, const Point* points, int64_t count,
                        const Sums& sums) {
  const SumFunction function = kSumFunctions.of[rows][panel.vectors][count];
  if (panel.channels == panel.vectors * kLanes) {
    function(sums, points);
  } else {
    SumRaggedBlock(panel, function, points, count, sums);
  }
}

// Block `b` of a panel: the first ones fetch what is ahead of the rows, a line each. Those that
// fetch points do so again and again.
KS_INLINE int BlockRows(int64_t b, int64_t ahead, Sums* sums) {
  if (kFetchByTerms && sums->x_ahead != 0) {
    if (sums->fetch_pair > 0) return kPairFetched;
    sums->ahead = ahead + b % kPanelVectors * kLineFloats;
    return kAllFetched;
  }
  if (ahead != 0 && b * kLineFloats <= sums->w_stride) {  // A row may begin within a line.
    sums->ahead = ahead + b * kLineFloats;
    return kRowsFetched;
  }
  return sums->in_order ? kRowsInOrder : kAnyRows;
}

// The sums of `count` points for one panel.
KS_INLINE void SumPoints(const Panel& panel, const Point* points, int64_t count, Sums sums) {
  const int64_t blocks = CeilDiv(count, kBlockPoints[panel.vectors]);
  const int64_t few = count / Max(1, blocks), rest = count % Max(1, blocks);
  const int64_t ahead = sums.ahead;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t here = few + (b < rest ? 1 : 0);
    const int rows = BlockRows(b, ahead, &sums);
    SumBlock(panel, rows, points, here, sums);
    points += here;
  }
}

// --- Tiles of the input --------------------------------------------------------------------------

// A tile is `rows` output rows of `images` images (all rows, if there are several images).
struct Tiles {
  Grid grid;
  int64_t copied;  // 1: tiles are copied with their padding; 0: read where they are.
  int64_t images, rows;
  int64_t groups, row_tiles;  // Tiles = groups of images x row tiles.
  int64_t padded_rows, padded_width;
  int64_t pixel_stride, row_stride, image_stride;  // Floats.
};

constexpr int64_t kTileBytes = 640 * 1024;  // Stays in the second-level cache.

KS_INLINE int64_t NumTiles(const Tiles& tiles) { return tiles.groups * tiles.row_tiles; }
KS_INLINE int64_t TilePixels(const Tiles& tiles) {
  return tiles.images * tiles.rows * tiles.grid.columns;
}
KS_INLINE int64_t TileBytes(const Tiles& tiles) {
  return tiles.copied ? PieceBytes(tiles.images * tiles.image_stride, 4) : 0;
}
KS_INLINE int64_t TapOffset(const KsGeometry& geometry, const Tiles& tiles, int64_t i, int64_t j) {
  return i * geometry.dilation_height * tiles.row_stride +
         j * geometry.dilation_width * tiles.pixel_stride;
}

// Cuts the batch: of several images, `rows` are all.
KS_INLINE void CutTiles(int64_t rows, int64_t images, Tiles* tiles) {
  const Grid& grid = tiles->grid;
  tiles->rows = rows;
  tiles->row_tiles = CeilDiv(grid.rows, rows);
  tiles->padded_rows = (rows - 1) * grid.step_height + grid.reach_height + 1;
  tiles->image_stride = (tiles->copied ? tiles->padded_rows : grid.height) * tiles->row_stride;
  tiles->images = images;
  tiles->groups = CeilDiv(grid.batch, images);
}

// Chooses tiles of about `tile_bytes`. They are copied where taps leave the image, or always,
// unless !may_copy: the caller then keeps to the taps inside. Returns false when there is nothing
// to compute or even one row takes too much memory. Depends on sizes only.
KS_INLINE bool PlanTiles(const KsGeometry& geometry, bool may_copy, Tiles* tiles,
                         int64_t tile_bytes = kTileBytes, bool always_copy = false) {
  const Grid grid = ForwardGrid(geometry);
  if (grid.batch <= 0 || grid.rows <= 0 || grid.columns <= 0) return false;
  const double least = 4.0 * (static_cast<double>(grid.reach_height) + 1) *
                       (static_cast<double>(grid.columns) * grid.step_width + grid.reach_width) *
                       (static_cast<double>(grid.channels) + 32);
  if (least > static_cast<double>(kScratchLimit) / 4) return false;
  tiles->grid = grid;
  const int64_t read_width = (grid.columns - 1) * grid.step_width + grid.reach_width + 1;
  const int64_t read_height = (grid.rows - 1) * grid.step_height + grid.reach_height + 1;
  tiles->copied = may_copy && (always_copy || grid.pad_top > 0 || grid.pad_left > 0 ||
                               read_width > grid.width || read_height > grid.height);
  if (tiles->copied) {
    tiles->pixel_stride = grid.channels < kLineFloats ? grid.channels : OddLines(grid.channels);
    tiles->padded_width = read_width;
  } else {
    tiles->pixel_stride = grid.channels;
    tiles->padded_width = grid.width;
  }
  tiles->row_stride = tiles->padded_width * tiles->pixel_stride;
  // What an output row takes: its part of the input, its result, and tables of its pixels.
  const int64_t row_bytes =
      4 * tiles->row_stride * grid.step_height + grid.columns * (4 * geometry.out_channels + 32);
  const int64_t reach_bytes = 4 * tiles->row_stride * (grid.reach_height + 1);
  int64_t rows = Min(grid.rows, Max(1, (tile_bytes - reach_bytes) / row_bytes));
  rows = CeilDiv(grid.rows, CeilDiv(grid.rows, rows));
  CutTiles(rows, 1, tiles);
  if (tiles->row_tiles == 1) {
    // Enough pixels to use a row of the filter often, and then enough tiles for many threads.
    const int64_t most = Max(1, tile_bytes / (reach_bytes + grid.rows * row_bytes));
    const int64_t enough = CeilDiv(192, grid.rows * grid.columns);
    const int64_t images = Min(Min(grid.batch, most), Max(enough, grid.batch / kWantedItems));
    // Terms count in 32 bits.
    CutTiles(rows, Max(1, Min(images, (int64_t{1} << 30) / Max(1, tiles->image_stride))), tiles);
  }
  return true;
}

struct Tile {
  int64_t first_image, images;
  int64_t first_row, rows;
  int64_t first_pixel, pixels;  // Of the output.
};
KS_INLINE Tile TileAt(const Tiles& tiles, int64_t i) {
  Tile tile;
  tile.first_image = i / tiles.row_tiles * tiles.images;
  tile.images = Min(tiles.images, tiles.grid.batch - tile.first_image);
  tile.first_row = i % tiles.row_tiles * tiles.rows;
  tile.rows = Min(tiles.rows, tiles.grid.rows - tile.first_row);
  tile.first_pixel = (tile.first_image * tiles.grid.rows + tile.first_row) * tiles.grid.columns;
  tile.pixels = tile.images * tile.rows * tiles.grid.columns;
  return tile;
}

// Where the taps of each output pixel of a tile start. A tile with fewer pixels uses the first.
KS_INLINE int64_t PixelOffset(const Tiles& tiles, int64_t image, int64_t row, int64_t column) {
  return image * tiles.image_stride + row * tiles.grid.step_height * tiles.row_stride +
         column * tiles.grid.step_width * tiles.pixel_stride;
}

KS_INLINE void CopyPixels(const float* source, int64_t count, int64_t channels, float* target,
                          int64_t pixel_stride) {
  if (channels == 0) return;  // `source` may be null.
  if (channels == pixel_stride) {
    memcpy(target, source, count * channels * 4);
    return;
  }
  for (int64_t p = 0; p < count; ++p) {
    int64_t c = 0;
    for (; c + kLanes <= channels; c += kLanes) Store(target + c, Load(source + c));
    for (; c < channels; ++c) target[c] = source[c];
    source += channels;
    target += pixel_stride;
  }
}

// Copies padded rows [row_begin, row_end) of a tile; rows count on over its images.
KS_INLINE void CopyRows(const Tiles& tiles, const Tile& tile, const float* input, int64_t row_begin,
                        int64_t row_end, float* target) {
  const Grid& grid = tiles.grid;
  const int64_t left = Min(grid.pad_left, tiles.padded_width);
  const int64_t inside = Max(0, Min(grid.width, tiles.padded_width - left));
  const int64_t right = tiles.padded_width - left - inside;
  for (int64_t r = row_begin; r < row_end; ++r) {
    const int64_t image = tile.first_image + r / tiles.padded_rows;
    const int64_t y = tile.first_row * grid.step_height + r % tiles.padded_rows - grid.pad_top;
    float* row = target + r * tiles.row_stride;
    if (y < 0 || y >= grid.height) {
      memset(row, 0, tiles.row_stride * 4);
      continue;
    }
    memset(row, 0, left * tiles.pixel_stride * 4);
    CopyPixels(input + (image * grid.height + y) * grid.width * grid.channels, inside,
               grid.channels, row + left * tiles.pixel_stride, tiles.pixel_stride);
    memset(row + (left + inside) * tiles.pixel_stride, 0, right * tiles.pixel_stride * 4);
  }
}

// The tile's first padded pixel, in `copy` when tiles are copied.
KS_INLINE const float* TileData(const Tiles& tiles, const Tile& tile, const float* input,
                                const float* copy) {
  if (tiles.copied) return copy;
  return input + tile.first_image * tiles.image_stride +
         tile.first_row * tiles.grid.step_height * tiles.row_stride;
}

}  // namespace KS_ISA
}  // namespace ks

#endif  // KERAS_SPARSE_CUSTOM_OPS_KERNELS_CPU_TERMS_H_
