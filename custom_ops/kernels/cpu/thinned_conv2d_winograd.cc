// Copyright 2026 The keras_sparse Authors. Licensed under the Apache License, Version 2.0.
//
// Thinned convolution, forward, by minimal filtering at stride 1; see winograd.h. Two routines:
//
// ThinnedConv2DWinograd filters along rows, kernels three taps wide. A bundle is the three taps of
// an input channel in a row of the kernel. Where two or three of them are kept, the bundle is one
// term at each of six points: six products for four neighbouring results instead of eight or
// twelve. A tap that is kept alone stays a term of pixels, as in ThinnedConv2D.
//
// ThinnedConv2DWinogradSquares filters along rows and columns, kernels of 3x3 taps. A bundle is the
// nine taps of an input channel. Where any of them is kept, the bundle is one term at each of 36
// points: 36 products for a square of 4x4 results, where nine taps kept take 144 and three take 48.
// Or one or two taps that are kept stay single ones: fewer products, but pixels to copy and more
// sums to keep.
//
// The input is transformed a tile of the batch at a time, point after point. Of each point, the
// sums over bundles go to scratch, a few panels of result channels at a time; so do the sums over
// single taps. They stay in the caches until they are finished together: transformed back, added,
// and stored once.
//
// Padding is zeros, but along rows those of tiles whose taps fall inside the image alike have terms
// of their own where there are enough of them; see ThinnedConv2D.

#include "custom_ops/kernels/cpu/fetch.h"
#include "custom_ops/kernels/cpu/routines.h"
#include "custom_ops/kernels/cpu/terms.h"
#include "custom_ops/kernels/cpu/thinned.h"
#include "custom_ops/kernels/cpu/winograd.h"

namespace ks {
namespace KS_ISA {
namespace {

constexpr int64_t kTaps = 3;                                    // Of a row of the kernel.
constexpr int64_t kMostTaps = kTaps * kTaps;                    // Of a bundle.
constexpr int64_t kSquarePoints = kPoints * kPoints;            // Of a square of results.
constexpr int64_t kSumWidth = kPanelVectors * kLanes;           // Floats of the sums of a panel.
constexpr int64_t kEnoughPixels = 192;                          // Of a tile of the batch.
constexpr int64_t kMostTileBytes = 8 << 20;                     // Likewise, of the input.
constexpr double kNearTaps = 1 << 20;                           // Bytes.
constexpr double kFarTap = 0.01;                                // Cycles for a byte of others,
constexpr double kFarSquareTap = kFetchByTerms ? 0.012 : 0.03;  // and of those of squares.
constexpr double kMemoryTaps = 16 << 20, kMemoryTap = 0.012;    // Likewise, once for all tiles.
// Cycles to transform a vector of a square.
constexpr double kSquareCost = kFetchByTerms ? 90 : 240;
// How many taps are to be kept of a bundle to be worth its products. With all taps in bundles, none
// is left to be summed up beside those of squares.
constexpr int64_t kRowBundlesFrom = 2, kSquareBundlesFrom[] = {1, 3};
// Squares of a tile of the batch, where the second-level cache holds all taps, and where tiles are
// to use them more often;
constexpr int64_t kFewSquares = kFetchByTerms ? 16 : 32, kEnoughSquares = 32;
constexpr int64_t kSquareBytes = 200 * 1024;  // and of all of their points, in the latter case.
constexpr int64_t kBlocksAtOnce = 3;          // Between two turns of fetching.
constexpr int64_t kTogetherWidth = 64;        // Channels of panels computed together.
// Of PlanTiles' budget: transformed pixels and sums take the rest.
constexpr int64_t kPixelBytes = kTileBytes / 2;

// The terms of one kind, those of bundles or those of single taps.
struct Kind {
  int64_t terms;
  int64_t chunks;  // Of the terms.
  // What is summed up at a time: the results of a tile, or a pixel.
  int64_t columns;  // Of it in a row,
  int64_t height;   // and its rows of results.
};

struct Parameters {
  Tiles tiles;
  int64_t squares;      // 1: tiles are squares; 0: rows.
  int64_t bundle_from;  // Taps that are kept of a bundle; with fewer, they are single ones.
  Kind bundles, singles;
  int64_t shared_tiles;  // 1: the input is transformed once, to memory of the whole call.
  int64_t splits;        // Parts of the panels, one item each,
  int64_t together;      // and of its panels those that are computed point after point.
  int64_t split_rows;    // 1: rows are cut into spans.
  int64_t row_spans;
  int64_t stream;
  int64_t fetch_input, fetch_output;  // Those that the near caches do not hold.
};

struct Spans {
  Span rows[kMostSpans];
};

KS_INLINE int64_t NumPoints(const Parameters& parameters) {
  return parameters.squares ? kSquarePoints : kPoints;
}
// Taps of a bundle.
KS_INLINE int64_t BundleTaps(const Parameters& parameters) {
  return parameters.squares ? kMostTaps : kTaps;
}

// The shape of transformed pixels, [points][images * rows][columns of tiles][channels]: floats
// between neighbours. The rows are those of squares, or else padded ones of pixels. Tiles are an
// odd number of cache lines apart, and so are points.
struct Transformed {
  int64_t tile, row, rows, point;
};
KS_INLINE Transformed TransformedShape(const Parameters& parameters) {
  const Tiles& tiles = parameters.tiles;
  Transformed shape;
  shape.tile = OddLines(tiles.grid.channels);
  shape.row = parameters.bundles.columns * shape.tile;
  shape.rows = parameters.squares ? tiles.rows / kTileColumns : tiles.padded_rows;
  shape.point = OddLines(tiles.images * shape.rows * shape.row);
  return shape;
}

// Likewise for the sums of a panel, [points][images * rows][columns of tiles][kSumWidth] and then
// [images * rows][columns][kSumWidth].
KS_INLINE int64_t SumsOfKind(const Parameters& parameters, const Kind& kind) {
  const Tiles& tiles = parameters.tiles;
  return tiles.images * (tiles.rows / kind.height) * kind.columns * kSumWidth;
}
KS_INLINE int64_t SumsOfPoint(const Parameters& parameters) {
  return OddLines(SumsOfKind(parameters, parameters.bundles));
}
KS_INLINE int64_t SumsOfPanel(const Parameters& parameters) {
  return NumPoints(parameters) * SumsOfPoint(parameters) +
         (parameters.singles.terms > 0 ? SumsOfKind(parameters, parameters.singles) : 0);
}

KS_INLINE int64_t TransformedBytes(const Parameters& parameters) {
  return PieceBytes(NumPoints(parameters) * TransformedShape(parameters).point, 4);
}
KS_INLINE int64_t SumBytes(const Parameters& parameters) {
  return PieceBytes(parameters.together * SumsOfPanel(parameters), 4);
}

// --- Tables --------------------------------------------------------------------------------------

// The terms of a kind, and its points in a tile of the batch.
struct Terms {
  Term* terms;      // Span after span, each with room for all.
  int32_t* chunks;  // [spans][chunks + 1]: where the terms of a chunk begin.
  Point* points;    // Span after span.
};

struct Prepared {
  Terms bundles, singles;
  int32_t* kept;       // [kernel_height][kTaps][in_channels]: the kept row of a tap, or -1.
  int32_t* rows;       // [bundles][their taps]: kept rows, or -1.
  int32_t* order;      // [singles]: kept rows.
  float* point_taps;   // Panel after panel, each [points][bundles][its vectors * kLanes].
  float* single_taps;  // As PackRows() packs them.
};

int64_t SpanRows(const Parameters& parameters, const Spans& spans) {
  int64_t rows = 0;
  for (int64_t r = 0; r < parameters.row_spans; ++r) {
    rows += Min(parameters.tiles.rows, spans.rows[r].end - spans.rows[r].begin);
  }
  return rows;
}

int64_t TermBytes(const Parameters& parameters, const Spans& spans, const Kind& kind) {
  return PieceBytes(parameters.row_spans * kind.terms, sizeof(Term)) +
         PieceBytes(parameters.row_spans * (kind.chunks + 1), 4) +
         PieceBytes(parameters.tiles.images * SpanRows(parameters, spans) * kind.columns,
                    sizeof(Point));
}
Terms PlaceTerms(const Parameters& parameters, const Spans& spans, const Kind& kind, Arena* arena) {
  Terms place;
  place.terms = arena->Take<Term>(parameters.row_spans * kind.terms);
  place.chunks = arena->Take<int32_t>(parameters.row_spans * (kind.chunks + 1));
  place.points =
      arena->Take<Point>(parameters.tiles.images * SpanRows(parameters, spans) * kind.columns);
  return place;
}

int64_t TableBytes(const KsGeometry& geometry, const Parameters& parameters, const Spans& spans) {
  return TermBytes(parameters, spans, parameters.bundles) +
         TermBytes(parameters, spans, parameters.singles) +
         PieceBytes(geometry.kernel_height * kTaps * geometry.in_channels, 4) +
         PieceBytes(parameters.bundles.terms * BundleTaps(parameters), 4) +
         PieceBytes(parameters.singles.terms, 4);
}
int64_t FilterBytes(const KsGeometry& geometry, const Parameters& parameters) {
  const int64_t width = MakePanels(geometry.out_channels).vectors * kLanes;
  return PieceBytes(NumPoints(parameters) * parameters.bundles.terms * width, 4) +
         PieceBytes(parameters.singles.terms * width, 4);
}
Prepared PlacePrepared(const KsGeometry& geometry, const Parameters& parameters, const Spans& spans,
                       const KsMemory& memory) {
  Arena arena = {static_cast<char*>(memory.table)};
  Prepared place;
  place.bundles = PlaceTerms(parameters, spans, parameters.bundles, &arena);
  place.singles = PlaceTerms(parameters, spans, parameters.singles, &arena);
  place.kept = arena.Take<int32_t>(geometry.kernel_height * kTaps * geometry.in_channels);
  place.rows = arena.Take<int32_t>(parameters.bundles.terms * BundleTaps(parameters));
  place.order = arena.Take<int32_t>(parameters.singles.terms);
  const int64_t width = MakePanels(geometry.out_channels).vectors * kLanes;
  arena = {static_cast<char*>(memory.filter)};
  place.point_taps = arena.Take<float>(NumPoints(parameters) * parameters.bundles.terms * width);
  place.single_taps = arena.Take<float>(parameters.singles.terms * width);
  return place;
}

// Counts the terms: merges the channels of the taps of bundles, all of which increase.
void CountTerms(const KsArguments& arguments, Parameters* parameters) {
  const int64_t channels = arguments.geometry.in_channels, taps = BundleTaps(*parameters);
  const int32_t* next = arguments.indices;
  const int32_t* const last = arguments.indices + arguments.kept;
  int64_t bundles = 0, singles = 0;
  while (next != last) {
    // The taps before those of the next index are empty.
    const int64_t first = *next / (taps * channels) * (taps * channels);
    const int32_t* at[kMostTaps];
    const int32_t* end[kMostTaps];
    for (int64_t j = 0; j < taps; ++j) {
      at[j] = next;
      int64_t size = Min(last - next, channels);
      while (size > 0) {
        const int64_t half = size / 2;
        const bool before = next[half] < first + (j + 1) * channels;
        next = before ? next + half + 1 : next;
        size = before ? size - half - 1 : half;
      }
      end[j] = next;
    }
    while (true) {
      int64_t channel[kMostTaps], least = channels;
      for (int64_t j = 0; j < taps; ++j) {
        channel[j] = at[j] < end[j] ? *at[j] - (first + j * channels) : channels;
        least = Min(least, channel[j]);
      }
      if (least == channels) break;
      int64_t kept = 0;
      for (int64_t j = 0; j < taps; ++j) {
        at[j] += channel[j] == least;
        kept += channel[j] == least;
      }
      const bool bundled = kept >= parameters->bundle_from;
      bundles += bundled;
      singles += bundled ? 0 : kept;
    }
  }
  parameters->bundles.terms = bundles;
  parameters->singles.terms = singles;
}

// Finds the bundles and the single taps, in the order (channel / 16, row, tap, channel); a bundle
// has the place of its first tap.
void SortTerms(const KsArguments& arguments, const Parameters& parameters,
               const Prepared& prepared) {
  const KsGeometry& geometry = arguments.geometry;
  const int64_t channels = geometry.in_channels, taps = BundleTaps(parameters);
  memset(prepared.kept, 0xff, geometry.kernel_height * kTaps * channels * 4);
  for (int64_t k = 0; k < arguments.kept; ++k) {
    prepared.kept[arguments.indices[k]] = static_cast<int32_t>(k);
  }
  int32_t* rows = prepared.rows;
  int32_t* order = prepared.order;
  for (int64_t first = 0; first < channels; first += kLineFloats) {
    const int64_t last = Min(channels, first + kLineFloats);
    for (int64_t i = 0; i < geometry.kernel_height * kTaps; i += taps) {
      const int32_t* of_tap = prepared.kept + i * channels;
      bool bundled[kLineFloats];
      for (int64_t s = first; s < last; ++s) {
        int64_t kept = 0;
        for (int64_t j = 0; j < taps; ++j) kept += of_tap[j * channels + s] >= 0;
        bundled[s - first] = kept >= parameters.bundle_from;
        if (!bundled[s - first]) continue;
        for (int64_t j = 0; j < taps; ++j) *rows++ = of_tap[j * channels + s];
      }
      for (int64_t j = 0; j < taps; ++j) {
        for (int64_t s = first; s < last; ++s) {
          const int32_t kept = of_tap[j * channels + s];
          if (kept >= 0 && !bundled[s - first]) *order++ = kept;
        }
      }
    }
  }
}

// Of what the points of a kind read: floats between neighbours.
struct Steps {
  int64_t image, row, column;  // Those of the kind.
  int64_t tap_row, tap;
};

// The terms of a kind and its points for every span. A term has `rows` entries in `kept`, of which
// one at least is a kept row and the others may be -1.
void MakeTerms(const KsArguments& arguments, const Parameters& parameters, const Spans& spans,
               const Kind& kind, const int32_t* kept, int64_t rows, const Steps& steps,
               const Terms& target) {
  const int64_t channels = arguments.geometry.in_channels;
  const Tiles& tiles = parameters.tiles;
  Term* terms = target.terms;
  int32_t* chunks = target.chunks;
  Point* point = target.points;
  for (int64_t r = 0; r < parameters.row_spans; ++r) {
    const Span& span = spans.rows[r];
    int64_t count = 0, chunk = 0;
    for (int64_t t = 0; t < kind.terms; ++t) {
      while (t >= PartBegin(kind.terms, kind.chunks, chunk)) {
        chunks[chunk++] = static_cast<int32_t>(count);
      }
      const int32_t* any = kept + t * rows;
      while (*any < 0) ++any;
      const int64_t index = arguments.indices[*any];
      const int64_t i = index / (kTaps * channels), j = index / channels % kTaps;
      if (i < span.tap_begin || i >= span.tap_end) continue;
      terms[count++] = {static_cast<int32_t>(i * steps.tap_row + j * steps.tap + index % channels),
                        static_cast<int32_t>(t)};
    }
    while (chunk <= kind.chunks) chunks[chunk++] = static_cast<int32_t>(count);
    terms += kind.terms;
    chunks += kind.chunks + 1;
    const int64_t rows_of_kind = CeilDiv(Min(tiles.rows, span.end - span.begin), kind.height);
    for (int64_t g = 0; g < tiles.images; ++g) {
      for (int64_t y = 0; y < rows_of_kind; ++y) {
        for (int64_t x = 0; x < kind.columns; ++x) {
          *point++ = {g * steps.image + y * steps.row + x * steps.column,
                      ((g * (tiles.rows / kind.height) + y) * kind.columns + x) * kSumWidth};
        }
      }
    }
  }
}

// Transforms bundles [begin, end), into all panels.
void PackBundles(const KsArguments& arguments, const Parameters& parameters,
                 const Prepared& prepared, int64_t begin, int64_t end) {
  const Panels panels = MakePanels(arguments.geometry.out_channels);
  const int64_t num_points = NumPoints(parameters), num_taps = BundleTaps(parameters);
  for (int64_t i = 0; i < panels.count; ++i) {
    const Panel panel = PanelAt(panels, i);
    const int64_t width = panel.vectors * kLanes, point = parameters.bundles.terms * width;
    float* target = prepared.point_taps +
                    num_points * parameters.bundles.terms * panel.first_vector * kLanes +
                    begin * width;
    for (int64_t t = begin; t < end; ++t, target += width) {
      for (int64_t v = 0; v < width; v += kLanes) {
        Vec taps[kTaps][kTaps];
        for (int64_t j = 0; j < num_taps; ++j) {
          const int64_t kept = prepared.rows[t * num_taps + j];
          Vec& tap = taps[j / kTaps][j % kTaps];
          tap = Vec{};
          if (kept < 0) continue;
          const float* row =
              arguments.filter + kept * panels.channels + panel.first_vector * kLanes + v;
          tap = v + kLanes <= panel.channels ? Load(row) : LoadFirst(row, panel.channels - v);
        }
        Vec points[kPoints];
        if (!parameters.squares) {
          TransformTaps(taps[0], points);
          for (int64_t p = 0; p < kPoints; ++p) Store(target + p * point + v, points[p]);
          continue;
        }
        Vec columns[kPoints][kTaps];  // Transformed along columns.
        for (int64_t j = 0; j < kTaps; ++j) {
          const Vec column[kTaps] = {taps[0][j], taps[1][j], taps[2][j]};
          TransformTaps(column, points);
          for (int64_t p = 0; p < kPoints; ++p) columns[p][j] = points[p];
        }
        for (int64_t q = 0; q < kPoints; ++q) {
          TransformTaps(columns[q], points);
          for (int64_t p = 0; p < kPoints; ++p) {
            Store(target + (q * kPoints + p) * point + v, points[p]);
          }
        }
      }
    }
  }
}

// --- Tiles ---------------------------------------------------------------------------------------

// Transforms padded row `r` of a tile of the batch, whose pixels begin at `x`.
void TransformRow(const Parameters& parameters, const float* x, int64_t r, float* target) {
  const Tiles& tiles = parameters.tiles;
  const Transformed shape = TransformedShape(parameters);
  const int64_t pixel = tiles.pixel_stride;
  x += r / tiles.padded_rows * tiles.image_stride + r % tiles.padded_rows * tiles.row_stride;
  target += r * shape.row;
  for (int64_t t = 0; t < parameters.bundles.columns; ++t) {
    for (int64_t c = 0; c < tiles.grid.channels; c += kLanes) {
      Vec source[kPoints], points[kPoints];
      KS_UNROLL
      for (int q = 0; q < kPoints; ++q) {
        // A copied pixel may hold more floats than channels.
        source[q] = c + kLanes <= pixel ? Load(x + q * pixel + c)
                                        : LoadFirst(x + q * pixel + c, tiles.grid.channels - c);
      }
      TransformSource(source, points);
      KS_UNROLL
      for (int p = 0; p < kPoints; ++p) Store(target + p * shape.point + c, points[p]);
    }
    x += kTileColumns * pixel;
    target += shape.tile;
  }
}

// Six places a step apart. Two pointers reach them all by scaled steps, where the compiler would
// keep six and advance them all.
template <typename Float>
struct Six {
  Float *first, *second;
  int64_t step;
};
template <typename Float>
KS_INLINE Six<Float> MakeSix(Float* first, int64_t step) {
  return {first, first + step, step};
}
template <int kPlace, typename Float>
KS_INLINE Float* PlaceOf(const Six<Float>& six) {
  return (kPlace % 2 == 0 ? six.first : six.second) + kPlace / 2 * 2 * six.step;
}
template <typename Float>
KS_INLINE void Advance(Six<Float>* six, int64_t floats) {
  six->first += floats;
  six->second += floats;
  asm("" : "+r"(six->first), "+r"(six->second));  // The next places are computed from these.
}

// A vector of channels of the source pixels of a square, 6x6 of them.
struct SquareSource {
  const float* pixels;  // The first,
  int64_t row, column;  // and floats from one to the next.
  int64_t ahead;        // Floats from a pixel to one that is fetched; 0: none is.
};

// Which points of columns: few enough of them at a time to stay in registers with those of rows.
enum { kZero, kNearPair, kFarPair, kInfinity };

// Transforms along columns: the points of a pair, or one.
template <int kWhich>
KS_INLINE void TransformColumns(const SquareSource& source, Vec (&plus)[kPoints],
                                Vec (&minus)[kPoints]) {
  Six<const float> column = MakeSix(source.pixels, source.row);
  KS_UNROLL
  for (int x = 0; x < kPoints; ++x, Advance(&column, source.column)) {
    // The squares below share two rows of these; neighbours share the columns.
    if ((kWhich == kZero || kWhich == kInfinity) && source.ahead != 0 && x < kTileColumns) {
      constexpr int kOdd = kWhich == kInfinity;
      FetchFar(PlaceOf<2 + kOdd>(column) + source.ahead);
      FetchFar(PlaceOf<4 + kOdd>(column) + source.ahead);
    }
    if constexpr (kWhich == kZero) {
      plus[x] =
          EndPoint(Load(PlaceOf<0>(column)), Load(PlaceOf<2>(column)), Load(PlaceOf<4>(column)));
    } else if constexpr (kWhich == kInfinity) {
      plus[x] =
          EndPoint(Load(PlaceOf<1>(column)), Load(PlaceOf<3>(column)), Load(PlaceOf<5>(column)));
    } else {
      PointPair<kWhich == kFarPair>(Load(PlaceOf<1>(column)), Load(PlaceOf<2>(column)),
                                    Load(PlaceOf<3>(column)), Load(PlaceOf<4>(column)), &plus[x],
                                    &minus[x]);
    }
  }
}

// Transforms a row of points along the row, and stores it.
KS_INLINE void StorePoints(const Vec (&columns)[kPoints], float* target, int64_t point) {
  Vec points[kPoints];
  TransformSource(columns, points);
  Six<float> places = MakeSix(target, point);
  Advance(&places, 0);
  Store(PlaceOf<0>(places), points[0]);
  Store(PlaceOf<1>(places), points[1]);
  Store(PlaceOf<2>(places), points[2]);
  Store(PlaceOf<3>(places), points[3]);
  Store(PlaceOf<4>(places), points[4]);
  Store(PlaceOf<5>(places), points[5]);
}

// `point`: floats between the points of the target.
void TransformSquare(const SquareSource& source, float* target, int64_t point) {
  const int64_t row = kPoints * point;
  Vec plus[kPoints], minus[kPoints];
  TransformColumns<kZero>(source, plus, minus);
  StorePoints(plus, target, point);
  TransformColumns<kNearPair>(source, plus, minus);
  StorePoints(plus, target += row, point);
  StorePoints(minus, target += row, point);
  TransformColumns<kFarPair>(source, plus, minus);
  StorePoints(plus, target += row, point);
  StorePoints(minus, target += row, point);
  TransformColumns<kInfinity>(source, plus, minus);
  StorePoints(plus, target += row, point);
}

// Transforms row `r` of squares of a tile of the batch, straight from the input.
void TransformSquares(const KsArguments& arguments, const Parameters& parameters, const Tile& tile,
                      int64_t r, float* target) {
  const KsGeometry& geometry = arguments.geometry;
  const Transformed shape = TransformedShape(parameters);
  const int64_t channels = geometry.in_channels, row = geometry.in_width * channels;
  const float* const image =
      arguments.input + (tile.first_image + r / shape.rows) * geometry.in_height * row;
  const int64_t top = tile.first_row + r % shape.rows * kTileColumns - geometry.pad_top;
  const int64_t row_begin = Max(0, -top), row_end = Min(kPoints, geometry.in_height - top);
  // Those of the next row of squares, unless they were fetched with all of the tile.
  const int64_t ahead = parameters.fetch_input && !parameters.shared_tiles ? 0 : kTileColumns * row;
  target += r * shape.row;
  float copy[kPoints * kPoints * kLanes];  // Where not all pixels are inside of the image.
  for (int64_t t = 0; t < parameters.bundles.columns; ++t, target += shape.tile) {
    const int64_t left = t * kTileColumns - geometry.pad_left;
    const int64_t begin = Max(0, -left), end = Min(kPoints, geometry.in_width - left);
    const bool inside = row_begin == 0 && row_end == kPoints && begin == 0 && end == kPoints;
    if (!inside) memset(copy, 0, sizeof(copy));
    for (int64_t c = 0; c < channels; c += kLanes) {
      const int64_t lanes = Min(kLanes, channels - c);
      const int64_t first = top * row + left * channels + c;
      if (inside && lanes == kLanes) {
        TransformSquare({image + first, row, channels, ahead}, target + c, shape.point);
        continue;
      }
      for (int64_t y = row_begin; y < row_end; ++y) {
        for (int64_t x = begin; x < end; ++x) {
          const float* const pixel = image + first + y * row + x * channels;
          if (ahead != 0) FetchFar(pixel + ahead);
          Store(copy + (y * kPoints + x) * kLanes,
                lanes == kLanes ? Load(pixel) : LoadFirst(pixel, lanes));
        }
      }
      TransformSquare({copy, kPoints * kLanes, kLanes, 0}, target + c, shape.point);
    }
  }
}

// Copies, where needed, and transforms padded rows [begin, end) of a tile of the batch. With the
// first rows go those of squares.
void TransformRows(const KsArguments& arguments, const Parameters& parameters, const Tile& tile,
                   int64_t begin, int64_t end, float* copy, float* transformed) {
  const Tiles& tiles = parameters.tiles;
  const float* x = TileData(tiles, tile, arguments.input, copy);
  const int64_t rows = tile.rows + arguments.geometry.kernel_height - 1;
  const int64_t square_rows = tile.images * TransformedShape(parameters).rows;
  for (int64_t r = begin; r < Min(end, tile.images * tiles.padded_rows); ++r) {
    if (parameters.squares && r < square_rows) {
      TransformSquares(arguments, parameters, tile, r, transformed);
    }
    if (r % tiles.padded_rows >= rows) continue;
    if (tiles.copied) CopyRows(tiles, tile, arguments.input, r, r + 1, copy);
    if (!parameters.squares) TransformRow(parameters, x, r, transformed);
  }
}

// What is fetched while sums are computed: the input of the next tile of the batch, and where the
// results of panels will be stored.
struct Fetching {
  Upcoming input, output;
};
KS_INLINE Fetching NothingToFetch() {
  Fetching fetching;
  FetchNothing(&fetching.input);
  FetchNothing(&fetching.output);
  return fetching;
}

// Of the sums of `points`, the parts between which to fetch.
KS_INLINE int64_t Turns(int64_t points, int64_t vectors) {
  return CeilDiv(points, kBlocksAtOnce * kBlockPoints[vectors]);
}

// SumPoints, a step of fetching to a turn.
inline void SumAndFetch(const Panel& panel, const Point* points, int64_t count, Sums sums,
                        Fetching* fetching) {
  const int64_t at_once = kBlocksAtOnce * kBlockPoints[panel.vectors];
  const int64_t ahead = sums.ahead;
  for (int64_t first = 0, lines = 0; first < count; first += at_once, lines += kBlocksAtOnce) {
    // The turns that fetch rows of taps come first.
    sums.ahead = lines * kLineFloats <= panel.vectors * kLanes ? ahead + lines * kLineFloats : 0;
    SumPoints(panel, points + first, Min(at_once, count - first), sums);
    FetchDue(1, &fetching->input);
    FetchDue(1, &fetching->output);
  }
}

// The rows of a kind in a span that a tile of the batch has, counted from the tile's first.
struct SpanInTile {
  int64_t begin, rows;
};
KS_INLINE SpanInTile InTile(const Span& span, const Tile& tile, const Kind& kind) {
  const int64_t begin = Min(Max(span.begin - tile.first_row, 0), tile.rows);
  const int64_t end = Max(begin, Min(span.end - tile.first_row, tile.rows));
  return {begin / kind.height, CeilDiv(end - begin, kind.height)};
}

// The turns of all sums of a kind.
int64_t KindTurns(const Parameters& parameters, const Spans& spans, const Kind& kind,
                  const Tile& tile, int64_t vectors) {
  int64_t turns = 0;
  for (int64_t r = 0; r < parameters.row_spans; ++r) {
    turns += Turns(tile.images * InTile(spans.rows[r], tile, kind).rows * kind.columns, vectors);
  }
  return turns * kind.chunks;
}

// The sums of one kind for all points of a tile of the batch. `x` and `out` are the first row's,
// `x_row` the floats between rows of `x`.
void SumKind(const Parameters& parameters, const Spans& spans, const Kind& kind,
             const Terms& prepared, const Tile& tile, const Panel& panel, const float* taps,
             const float* x, int64_t x_row, float* out, Fetching* fetching) {
  const Tiles& tiles = parameters.tiles;
  Panel whole = panel;  // Sums are kept with zeros for the channels that are missing.
  whole.channels = panel.vectors * kLanes;
  Sums sums = {};
  sums.w = taps;
  sums.w_stride = whole.channels;
  for (int64_t chunk = 0; chunk < kind.chunks; ++chunk) {
    // The next chunk comes next in memory.
    const int64_t kind_terms =
        PartBegin(kind.terms, kind.chunks, chunk + 1) - PartBegin(kind.terms, kind.chunks, chunk);
    sums.ahead = kind_terms * sums.w_stride;
    sums.add = chunk > 0;
    const Term* terms = prepared.terms;
    const int32_t* begins = prepared.chunks + chunk;
    const Point* points = prepared.points;
    for (int64_t r = 0; r < parameters.row_spans; ++r) {
      const Span& span = spans.rows[r];
      const SpanInTile here = InTile(span, tile, kind);
      sums.terms = terms + begins[0];
      sums.num_terms = begins[1] - begins[0];
      sums.out = out + here.begin * kind.columns * kSumWidth;
      sums.in_order = sums.num_terms == kind_terms;
      sums.x = x + here.begin * x_row;
      SumAndFetch(whole, points, tile.images * here.rows * kind.columns, sums, fetching);
      terms += kind.terms;
      begins += kind.chunks + 1;
      points += tiles.images * CeilDiv(Min(tiles.rows, span.end - span.begin), kind.height) *
                kind.columns;
    }
  }
}

// What finishes the results of a vector of channels.
struct Finishing {
  Epilogue epilogue;
  const float* singles;  // Sums of pixels, or null.
  int64_t channels;      // Floats from a result to its neighbour.
  int64_t count;         // Of the lanes those that are results.
  Vec bias;
  bool stream;
};
// `at`: of the result; `single`: of its sums of single taps.
KS_INLINE void FinishResult(const Finishing& finishing, Vec result, int64_t at, int64_t single,
                            float* output) {
  if (finishing.singles != nullptr) result += Load(finishing.singles + single);
  result += finishing.bias;
  const float* const residual = finishing.epilogue.residual;
  if (residual != nullptr) {
    result +=
        finishing.count == kLanes ? Load(residual + at) : LoadFirst(residual + at, finishing.count);
  }
  result = Clamp(result, Splat(finishing.epilogue.least), Splat(finishing.epilogue.most));
  if (finishing.count < kLanes) {
    StoreFirst(output + at, result, finishing.count);
  } else if (finishing.stream) {
    Stream(output + at, result);
  } else {
    Store(output + at, result);
  }
}

// Transforms the sums of points back along columns: the even results, or the odd ones. `point`:
// floats between points.
template <bool kOdd>
KS_INLINE void TransformBack(const float* sums, int64_t point, Vec (&first)[kPoints],
                             Vec (&second)[kPoints]) {
  Six<const float> column = MakeSix(sums, kPoints * point);
  KS_UNROLL
  for (int p = 0; p < kPoints; ++p, Advance(&column, point)) {
    const Vec near = Load(PlaceOf<1>(column)), minus_near = Load(PlaceOf<2>(column));
    const Vec far = Load(PlaceOf<3>(column)), minus_far = Load(PlaceOf<4>(column));
    if (kOdd) {
      OddResults(near, minus_near, far, minus_far, Load(PlaceOf<5>(column)), &first[p], &second[p]);
    } else {
      EvenResults(Load(PlaceOf<0>(column)), near, minus_near, far, minus_far, &first[p],
                  &second[p]);
    }
  }
}

// Where the results of a vector of a square go, of which `high` rows of `wide` lie in the image.
struct Square {
  int64_t at, row;          // Of the output: the first, and floats between rows.
  int64_t single, singles;  // Likewise of the sums of single taps.
  int64_t high, wide;
  bool plain;  // All lie in the image, and nothing but stores waits for them.
};
// Row `i` of the results. One function for all squares, as the compiler might otherwise round them
// in different ways.
KS_INLINE void FinishRow(const Finishing& finishing, const Square& square, int i,
                         const Vec (&columns)[kPoints], float* output) {
  Vec results[kTileColumns];
  TransformSums(columns, results);
  const int64_t at = square.at + i * square.row;
  if (square.plain) {
    const Vec least = Splat(finishing.epilogue.least), most = Splat(finishing.epilogue.most);
    KS_UNROLL
    for (int q = 0; q < kTileColumns; ++q) {
      Store(output + at + q * finishing.channels, Clamp(results[q] + finishing.bias, least, most));
    }
    return;
  }
  if (i >= square.high) return;
  for (int64_t q = 0; q < square.wide; ++q) {
    FinishResult(finishing, results[q], at + q * finishing.channels,
                 square.single + i * square.singles + q * kSumWidth, output);
  }
}
KS_INLINE void FinishSquare(const Finishing& finishing, const Square& square, const float* sums,
                            int64_t point, float* output) {
  Vec first[kPoints], second[kPoints];
  TransformBack<false>(sums, point, first, second);
  FinishRow(finishing, square, 0, first, output);
  FinishRow(finishing, square, 2, second, output);
  TransformBack<true>(sums, point, first, second);
  FinishRow(finishing, square, 1, first, output);
  FinishRow(finishing, square, 3, second, output);
}

// Transforms the sums of a panel back, adds those of single taps, and stores results.
void Finish(const KsArguments& arguments, const Parameters& parameters, const Tile& tile,
            const Panel& panel, const float* sums) {
  const KsGeometry& geometry = arguments.geometry;
  const Kind& bundles = parameters.bundles;
  const int64_t point = SumsOfPoint(parameters), channels = geometry.out_channels;
  Finishing finishing;
  finishing.epilogue = MakeEpilogue(arguments);
  finishing.channels = channels;
  finishing.stream = parameters.stream;
  finishing.singles = parameters.singles.terms > 0 ? sums + NumPoints(parameters) * point : nullptr;
  const bool plain =
      finishing.epilogue.residual == nullptr && !finishing.stream && finishing.singles == nullptr;
  const int64_t row = geometry.out_width * channels;
  const int64_t rows = Min(tile.rows, geometry.out_height - tile.first_row);
  for (int64_t g = 0; g < tile.images; ++g) {
    for (int64_t y = 0; y < rows; y += bundles.height) {
      const int64_t high = Min(bundles.height, rows - y);
      for (int64_t x = 0; x < geometry.out_width; x += kTileColumns) {
        const int64_t wide = Min(kTileColumns, geometry.out_width - x);
        const int64_t pixel = ((tile.first_image + g) * geometry.out_height + tile.first_row + y) *
                                  geometry.out_width +
                              x;
        const int64_t single = ((g * parameters.tiles.rows + y) * geometry.out_width + x);
        const float* from =
            sums +
            ((g * (parameters.tiles.rows / bundles.height) + y / bundles.height) * bundles.columns +
             x / kTileColumns) *
                kSumWidth;
        for (int64_t v = 0; v < panel.vectors; ++v, from += kLanes) {
          finishing.count = Min(kLanes, panel.channels - v * kLanes);
          const int64_t channel = (panel.first_vector + v) * kLanes;
          finishing.bias = Vec{};
          if (finishing.epilogue.bias != nullptr) {
            const float* const bias = finishing.epilogue.bias + channel;
            finishing.bias =
                finishing.count == kLanes ? Load(bias) : LoadFirst(bias, finishing.count);
          }
          Vec of_points[kPoints], results[kTileColumns];
          if (!parameters.squares) {
            KS_UNROLL
            for (int p = 0; p < kPoints; ++p) of_points[p] = Load(from + p * point);
            TransformSums(of_points, results);
            KS_UNROLL
            for (int q = 0; q < kTileColumns; ++q) {
              if (q >= wide) break;
              FinishResult(finishing, results[q], (pixel + q) * channels + channel,
                           (single + q) * kSumWidth + v * kLanes, arguments.output);
            }
            continue;
          }
          Square square;
          square.at = pixel * channels + channel;
          square.row = row;
          square.single = single * kSumWidth + v * kLanes;
          square.singles = geometry.out_width * kSumWidth;
          square.high = high;
          square.wide = wide;
          square.plain =
              plain && finishing.count == kLanes && high == kTileColumns && wide == kTileColumns;
          FinishSquare(finishing, square, from, point, arguments.output);
        }
      }
    }
  }
}

// Fetches where results go, from a panel on for `channels`, in `steps` steps: a pixel to a lane.
void FetchResults(const KsArguments& arguments, const Tile& tile, const Panel& panel,
                  int64_t channels, int64_t steps, Upcoming* upcoming) {
  const KsGeometry& geometry = arguments.geometry;
  const int64_t pixel = geometry.out_channels * 4;
  const int64_t first =
      (tile.first_image * geometry.out_height + tile.first_row) * geometry.out_width;
  const int64_t pixels = tile.images * tile.rows * geometry.out_width;
  for (int l = 0; l < kLanes; ++l) {
    upcoming->pixels[l] = reinterpret_cast<intptr_t>(arguments.output) + (first + l) * pixel +
                          panel.first_vector * kLanes * 4;
  }
  FetchPixelsIn(steps, 1, CeilDiv(pixels, kLanes), channels * 4, 0, kLanes * pixel, upcoming);
}

// `next` is the tile to be transformed after this one, or null.
void ComputeTile(const KsArguments& arguments, const Parameters& parameters, const Spans& spans,
                 const Prepared& prepared, const Tile& tile, const Tile* next, const float* x,
                 const float* transformed, int64_t panel_begin, int64_t panel_end, float* sums) {
  const Panels panels = MakePanels(arguments.geometry.out_channels);
  const Transformed shape = TransformedShape(parameters);
  const int64_t point_sums = SumsOfPoint(parameters), panel_sums = SumsOfPanel(parameters);
  const int64_t num_points = NumPoints(parameters), terms = parameters.bundles.terms;
  const int64_t single_terms = parameters.singles.terms;
  Fetching fetching = NothingToFetch();
  for (int64_t first = panel_begin; first < panel_end; first += parameters.together) {
    const int64_t together = Min(parameters.together, panel_end - first);
    const Panel begin = PanelAt(panels, first), last = PanelAt(panels, first + together - 1);
    int64_t turns =
        num_points * KindTurns(parameters, spans, parameters.bundles, tile, begin.vectors);
    if (single_terms > 0) {
      turns += KindTurns(parameters, spans, parameters.singles, tile, begin.vectors);
    }
    if (parameters.fetch_input && next != nullptr && first == panel_begin) {
      const KsGeometry& g = arguments.geometry;
      const int64_t row = Max(0, next->first_row - g.pad_top);
      const int64_t end =
          Min(g.in_height, next->first_row - g.pad_top + next->rows + g.kernel_height - 1);
      FetchRows(arguments, next->first_image * g.in_height + row,
                (next->images - 1) * g.in_height + Max(0, end - row),
                turns * (panel_end - panel_begin), &fetching.input);
    }
    if (parameters.fetch_output) {
      const int64_t channels = (last.first_vector - begin.first_vector) * kLanes + last.channels;
      FetchResults(arguments, tile, begin, channels, turns * together, &fetching.output);
    }
    for (int64_t p = 0; p < num_points; ++p) {
      for (int64_t i = 0; i < together; ++i) {
        const Panel panel = PanelAt(panels, first + i);
        const int64_t channel = panel.first_vector * kLanes, width = panel.vectors * kLanes;
        SumKind(parameters, spans, parameters.bundles, prepared.bundles, tile, panel,
                prepared.point_taps + terms * (num_points * channel + p * width),
                transformed + p * shape.point, shape.row, sums + i * panel_sums + p * point_sums,
                &fetching);
      }
    }
    for (int64_t i = 0; i < together; ++i) {
      const Panel panel = PanelAt(panels, first + i);
      if (single_terms > 0) {
        SumKind(parameters, spans, parameters.singles, prepared.singles, tile, panel,
                prepared.single_taps + single_terms * panel.first_vector * kLanes, x,
                parameters.tiles.row_stride, sums + i * panel_sums + num_points * point_sums,
                &fetching);
      }
      Finish(arguments, parameters, tile, panel, sums + i * panel_sums);
    }
  }
}

// --- The plan ------------------------------------------------------------------------------------

// About what the terms of a kind cost for a group of tiles with all rows, in cycles, for a panel
// and for one set of sums.
double KindCost(const KsGeometry& geometry, const Parameters& parameters, const Spans& spans,
                const Kind& kind) {
  const Tiles& tiles = parameters.tiles;
  const int64_t vectors = PanelAt(MakePanels(geometry.out_channels), 0).vectors;
  double cycles = 0;
  for (int64_t r = 0; r < parameters.row_spans; ++r) {
    const Span& span = spans.rows[r];
    const int64_t points =
        tiles.images * CeilDiv(span.end - span.begin, kind.height) * kind.columns;
    const double blocks =
        static_cast<double>(CeilDiv(points, kBlockPoints[vectors]) + tiles.row_tiles - 1);
    const double terms = static_cast<double>(kind.terms) * (span.tap_end - span.tap_begin) /
                         static_cast<double>(geometry.kernel_height);
    cycles += TermCost(static_cast<double>(points), blocks, vectors) * terms +
              blocks * 40 * static_cast<double>(kind.chunks);
  }
  return cycles;
}

double GroupCost(const KsGeometry& geometry, const Parameters& parameters, const Spans& spans) {
  const Tiles& tiles = parameters.tiles;
  const Panels panels = MakePanels(geometry.out_channels);
  const double rows = static_cast<double>(tiles.images) * tiles.grid.rows;
  const double padded_rows =
      static_cast<double>(tiles.images) * tiles.row_tiles * tiles.padded_rows;
  const double columns = static_cast<double>(parameters.bundles.columns);
  const double num_points = static_cast<double>(NumPoints(parameters));
  double cycles = num_points * KindCost(geometry, parameters, spans, parameters.bundles);
  if (parameters.singles.terms > 0) {
    cycles += KindCost(geometry, parameters, spans, parameters.singles);
  }
  cycles *= static_cast<double>(panels.count);
  const double sums_to_vector = parameters.squares ? kSquareCost : 16;
  const double vectors = static_cast<double>(panels.vectors);
  cycles +=
      rows / static_cast<double>(parameters.bundles.height) * columns * vectors * sums_to_vector;
  // Pixels of less than a cache line are not padded to vectors.
  const bool padded = geometry.in_channels >= kLineFloats;
  const double source_vectors = static_cast<double>(CeilDiv(geometry.in_channels, kLanes));
  if (parameters.squares) {
    cycles += rows / kTileColumns * columns * source_vectors * kSquareCost *
              (geometry.in_channels % kLanes == 0 ? 1 : 2);
  } else {
    cycles += padded_rows * columns * source_vectors * (padded ? 16 : 40);
  }
  if (tiles.copied) cycles += padded_rows * tiles.row_stride * (4.0 / 16);
  // Taps that the second-level cache does not hold come from afar for each tile.
  const double taps = static_cast<double>(FilterBytes(geometry, parameters));
  if (taps > kNearTaps) {
    cycles += tiles.row_tiles * taps * (parameters.squares ? kFarSquareTap : kFarTap);
  }
  return cycles;
}

// Cuts the batch into tiles: rows of all columns, or all rows of some images.
bool CutBatch(const KsGeometry& geometry, Parameters* parameters) {
  KsGeometry whole = geometry;  // Of whole tiles.
  whole.out_width = RoundUp(geometry.out_width, kTileColumns);
  if (parameters->squares) whole.out_height = RoundUp(geometry.out_height, kTileColumns);
  Tiles* tiles = &parameters->tiles;
  if (!PlanTiles(whole, true, tiles, kPixelBytes)) return false;
  Kind& bundles = parameters->bundles;
  Kind& singles = parameters->singles;
  bundles.columns = whole.out_width / kTileColumns;
  bundles.height = parameters->squares ? kTileColumns : 1;
  singles.columns = geometry.out_width;
  singles.height = 1;
  int64_t images = tiles->images, rows = tiles->rows;
  if (parameters->squares) {
    const int64_t square_rows = whole.out_height / kTileColumns;
    const int64_t bytes = kSquarePoints * 4 * OddLines(geometry.in_channels);
    if (bytes > kScratchLimit / 4 / bundles.columns) return false;
    const bool near = static_cast<double>(FilterBytes(geometry, *parameters)) <= kNearTaps;
    const int64_t squares = near ? kFewSquares : Max(kEnoughSquares, kSquareBytes / bytes);
    const int64_t row_tiles = CeilDiv(square_rows, Max(1, squares / bundles.columns));
    rows = CeilDiv(square_rows, row_tiles) * kTileColumns;
    images = row_tiles > 1 ? 1 : Max(1, squares / (square_rows * bundles.columns));
    images = Min(geometry.batch, images);
  } else if (tiles->row_tiles == 1) {
    // Taps are more at six points: few pixels would use them too seldom. Each point's pixels are
    // still few enough for the cache.
    const int64_t enough = Min(CeilDiv(kEnoughPixels, whole.out_height * whole.out_width),
                               kMostTileBytes / (4 * Max(1, tiles->image_stride)));
    images = Max(images, Min(geometry.batch, enough));
  }
  images = CeilDiv(geometry.batch, CeilDiv(geometry.batch, images));
  CutTiles(rows, images, tiles);
  return true;
}

// All of the parameters but how the work is cut into items. Returns the cost, negative when this
// routine does not take the arguments.
double Choose(const KsArguments& arguments, bool squares, Parameters* parameters, Spans* spans) {
  const KsGeometry& geometry = arguments.geometry;
  if (geometry.kernel_width != kTaps || geometry.stride_height != 1 || geometry.stride_width != 1 ||
      geometry.dilation_height != 1 || geometry.dilation_width != 1 || geometry.out_channels == 0 ||
      (squares && geometry.kernel_height != kTaps)) {
    return -1;
  }
  const Panels panels = MakePanels(geometry.out_channels);
  const int64_t row_bytes = PanelAt(panels, 0).vectors * kLanes * 4;
  double best = -1;
  for (int64_t way = 0; way < (squares ? 2 : 1); ++way) {
    Parameters of_terms = {};
    of_terms.squares = squares;
    of_terms.bundle_from = squares ? kSquareBundlesFrom[way] : kRowBundlesFrom;
    CountTerms(arguments, &of_terms);
    if (FilterBytes(geometry, of_terms) > kScratchLimit) continue;
    if (!CutBatch(geometry, &of_terms)) return -1;
    Kind& bundles = of_terms.bundles;
    Kind& singles = of_terms.singles;
    bundles.chunks = Max(1, CeilDiv(bundles.terms * row_bytes, kChunkBytes));
    singles.chunks = Max(1, CeilDiv(singles.terms * row_bytes, kChunkBytes));
    of_terms.together = squares ? Min(Max(1, kTogetherWidth / kSumWidth), panels.count) : 1;
    // Squares are transformed straight from the input.
    if (squares && singles.terms == 0) of_terms.tiles.copied = 0;
    for (int64_t split = 0; split < (squares ? 1 : 2); ++split) {
      Parameters candidate = of_terms;
      Spans candidate_spans;
      candidate.split_rows = split;
      candidate.row_spans = MakeSpans(RowAxis(geometry), split != 0, candidate_spans.rows);
      if (candidate.row_spans == 0 ||
          (split != 0 &&
           candidate.row_spans * (bundles.terms + singles.terms) * 8 > kMostTermBytes)) {
        continue;
      }
      const double taps = static_cast<double>(FilterBytes(geometry, candidate));
      // With long vectors memory, rather than arithmetic, limits taps that no cache holds.
      const double tap_cost =
          kFilterByteCost + (kFetchByTerms && taps > kMemoryTaps ? kMemoryTap : 0.0);
      const double cost = GroupCost(geometry, candidate, candidate_spans) * candidate.tiles.groups +
                          tap_cost * taps;
      if (best >= 0 && cost >= best) continue;
      best = cost;
      *parameters = candidate;
      *spans = candidate_spans;
    }
  }
  return best;
}

double Cost(const KsArguments& arguments, bool squares) {
  Parameters parameters;
  Spans spans;
  return Choose(arguments, squares, &parameters, &spans);
}

int Plan(const KsArguments* arguments, bool squares, KsPlan* plan) {
  const KsGeometry& geometry = arguments->geometry;
  memset(plan, 0, sizeof(*plan));
  Parameters parameters;
  Spans spans;
  const double cost = Choose(*arguments, squares, &parameters, &spans);
  if (cost < 0) return 0;
  const Tiles& tiles = parameters.tiles;
  const int64_t num_tiles = NumTiles(tiles);
  const Panels panels = MakePanels(geometry.out_channels);
  parameters.splits = 1;
  if (num_tiles < kWantedItems / 2) {
    parameters.splits = Min(CeilDiv(kWantedItems, num_tiles), panels.count);
    parameters.shared_tiles = parameters.splits > 1;
  }
  const double result = 4.0 * static_cast<double>(geometry.batch) * geometry.out_height *
                        geometry.out_width * geometry.out_channels;
  const double input = 4.0 * static_cast<double>(geometry.batch) * geometry.in_height *
                       geometry.in_width * geometry.in_channels;
  parameters.stream = Streams(geometry, result);
  parameters.fetch_input = input >= static_cast<double>(kFetchFrom);
  parameters.fetch_output = !parameters.stream && result >= static_cast<double>(kFetchFrom);

  KsStage* stage = plan->stages;
  stage->items = 1;
  stage->cost = 100 + geometry.kernel_height * kTaps * geometry.in_channels * 10 +
                arguments->kept * 10 * (1 + parameters.row_spans);
  stage->prepares = KS_PREPARES_TABLE;
  ++stage;
  stage->items = CeilDiv(parameters.bundles.terms, kRowsOfItem) +
                 CeilDiv(parameters.singles.terms, kRowsOfItem);
  stage->cost = 100 + kRowsOfItem * geometry.out_channels * (parameters.squares ? 6 : 1);
  stage->prepares = KS_PREPARES_FILTER;
  ++stage;
  stage->items = parameters.shared_tiles ? num_tiles * tiles.images * tiles.padded_rows : 0;
  stage->cost = 100 + tiles.row_stride / 4;
  ++stage;
  stage->items = num_tiles * parameters.splits;
  stage->cost = 100 + static_cast<int64_t>(cost / static_cast<double>(stage->items));
  plan->num_stages = 4;
  plan->table_bytes = TableBytes(geometry, parameters, spans);
  plan->filter_bytes = FilterBytes(geometry, parameters);
  const int64_t tile_bytes = TileBytes(tiles) + TransformedBytes(parameters);
  plan->shared_bytes = parameters.shared_tiles ? num_tiles * tile_bytes : 0;
  plan->scratch_bytes = SumBytes(parameters) + (parameters.shared_tiles ? 0 : tile_bytes);
  SaveParameters(parameters, plan);
  return 1;
}

void Run(const KsArguments* arguments, const KsPlan* plan, int32_t stage, int64_t begin,
         int64_t end, const KsMemory* memory) {
  const KsGeometry& geometry = arguments->geometry;
  Parameters parameters = LoadParameters<Parameters>(plan);
  const Tiles& tiles = parameters.tiles;
  Spans spans;
  MakeSpans(RowAxis(geometry), parameters.split_rows != 0, spans.rows);
  const Prepared prepared = PlacePrepared(geometry, parameters, spans, *memory);
  if (stage == 0) {
    const Transformed shape = TransformedShape(parameters);
    SortTerms(*arguments, parameters, prepared);
    MakeTerms(
        *arguments, parameters, spans, parameters.bundles, prepared.rows, BundleTaps(parameters),
        {shape.rows * shape.row, shape.row, shape.tile, parameters.squares ? 0 : shape.row, 0},
        prepared.bundles);
    MakeTerms(*arguments, parameters, spans, parameters.singles, prepared.order, 1,
              {tiles.image_stride, tiles.row_stride, tiles.pixel_stride, tiles.row_stride,
               tiles.pixel_stride},
              prepared.singles);
    return;
  }
  if (stage == 1) {
    const int64_t bundle_items = CeilDiv(parameters.bundles.terms, kRowsOfItem);
    for (int64_t item = begin; item < end; ++item) {
      if (item < bundle_items) {
        PackBundles(*arguments, parameters, prepared, item * kRowsOfItem,
                    Min(parameters.bundles.terms, (item + 1) * kRowsOfItem));
        continue;
      }
      const int64_t first = (item - bundle_items) * kRowsOfItem;
      PackRows(*arguments, prepared.order, parameters.singles.terms, first,
               Min(parameters.singles.terms, first + kRowsOfItem), prepared.single_taps);
    }
    return;
  }
  // A tile of the batch: its copy, then its transformed pixels.
  const int64_t copy_size = TileBytes(tiles) / 4;
  const int64_t tile_size = copy_size + TransformedBytes(parameters) / 4;
  const int64_t tile_rows = tiles.images * tiles.padded_rows;
  if (stage == 2) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t row = item % tile_rows;
      float* copy = static_cast<float*>(memory->shared) + item / tile_rows * tile_size;
      TransformRows(*arguments, parameters, TileAt(tiles, item / tile_rows), row, row + 1, copy,
                    copy + copy_size);
    }
    return;
  }

  if (reinterpret_cast<uintptr_t>(arguments->output) % KS_ALIGNMENT != 0) parameters.stream = 0;
  const int64_t panels = MakePanels(geometry.out_channels).count;
  float* const sums = static_cast<float*>(memory->scratch);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t tile_index = item / parameters.splits;
    const int64_t split = item % parameters.splits;
    const Tile tile = TileAt(tiles, tile_index);
    float* copy = parameters.shared_tiles
                      ? static_cast<float*>(memory->shared) + tile_index * tile_size
                      : sums + SumBytes(parameters) / 4;
    float* transformed = copy + copy_size;
    if (!parameters.shared_tiles) {
      TransformRows(*arguments, parameters, tile, 0, tile_rows, copy, transformed);
    }
    const bool last = parameters.shared_tiles || item + 1 == end;
    const Tile next = TileAt(tiles, last ? tile_index : tile_index + 1);
    ComputeTile(*arguments, parameters, spans, prepared, tile, last ? nullptr : &next,
                TileData(tiles, tile, arguments->input, copy), transformed,
                PartBegin(panels, parameters.splits, split),
                PartBegin(panels, parameters.splits, split + 1), sums);
  }
  if (parameters.stream) StreamEnd();
}

}  // namespace

double ThinnedConv2DWinogradCost(const KsArguments& arguments) {
  const double rows = Cost(arguments, false), squares = Cost(arguments, true);
  return squares >= 0 && squares < rows ? squares : rows;
}

int ThinnedConv2DWinogradPlan(const KsArguments* arguments, KsPlan* plan) {
  const double squares = Cost(*arguments, true);
  if (squares >= 0 && squares < Cost(*arguments, false)) return 0;
  return Plan(arguments, false, plan);
}
void ThinnedConv2DWinogradRun(const KsArguments* arguments, const KsPlan* plan, int32_t stage,
                              int64_t begin, int64_t end, const KsMemory* memory) {
  Run(arguments, plan, stage, begin, end, memory);
}

int ThinnedConv2DWinogradSquaresPlan(const KsArguments* arguments, KsPlan* plan) {
  return Plan(arguments, true, plan);
}
void ThinnedConv2DWinogradSquaresRun(const KsArguments* arguments, const KsPlan* plan,
                                     int32_t stage, int64_t begin, int64_t end,
                                     const KsMemory* memory) {
  Run(arguments, plan, stage, begin, end, memory);
}

}  // namespace KS_ISA
}  // namespace ks
