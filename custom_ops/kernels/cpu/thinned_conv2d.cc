// Copyright 2026 The keras_sparse Authors. Licensed under the Apache License, Version 2.0.
//
// Thinned convolution, forward: out[pixel, :] = sum over kept rows k of x[pixel + offset(k)] *
// W'[k], directly from pixels; see terms.h.
//
// Output pixels whose taps fall inside the image alike form a class with terms of its own: taps in
// the padding cost nothing, and the input is read where it is. Classes of too few pixels would not
// fill their blocks: then an axis is left whole, and tiles of the input are copied with their
// padding instead.
//
// With one tap, the kept channels of the pixels of a tile may be gathered first: all panels then
// read few cache lines, and pixels that are a power of two apart do not meet in few cache sets.
//
// Kept rows are taken in the order (channel / 16, tap, channel): neighbouring terms then read the
// same cache line of a pixel. W' is packed into panels in that order, and a panel is cut into
// chunks that stay in the second-level cache while all pixels of a tile pass by.
//
// Where ThinnedConv2DWinograd needs so many products less that it is faster, this routine declines.

#include "custom_ops/kernels/cpu/fetch.h"
#include "custom_ops/kernels/cpu/planes.h"
#include "custom_ops/kernels/cpu/routines.h"
#include "custom_ops/kernels/cpu/terms.h"
#include "custom_ops/kernels/cpu/thinned.h"

namespace ks {
namespace KS_ISA {
namespace {

struct Parameters {
  Tiles tiles;
  int64_t gathered;              // 1: a copied pixel is its kept channels.
  int64_t shared_tiles;          // 1: tiles are copied once, to memory of the whole call.
  int64_t splits;                // Parts of the panels, one item each.
  int64_t split;                 // The axes that are cut into spans.
  int64_t row_spans, col_spans;  // Classes = row spans x column spans.
  int64_t chunks;                // Of the kept rows.
  int64_t together;              // Panels computed together.
  int64_t stream;
  int64_t fetch_out;  // See Sums.
};

constexpr int64_t kMostTogether = 32;  // Panels,
constexpr int64_t kTogetherBytes = 128 * 1024;
constexpr int64_t kFewItems = kWantedItems / 2;  // With fewer, work is cut once more.
constexpr int64_t kFewPixels = 64;               // A tile has as many at least.
constexpr int64_t kMemoryCycles = 1500;          // Until what is fetched is there, under load.
constexpr int64_t kFarFrom = 2 << 20;            // Bytes of an input that no cache holds.
// Of a result that is fetched before it is stored.
constexpr int64_t kFetchOutFrom = kFetchByTerms ? 64 * 1024 : kFetchFrom;

// Whether there is one tap, which meets an input pixel at every output pixel.
bool MayGather(const KsGeometry& g) {
  return g.kernel_height == 1 && g.kernel_width == 1 && g.pad_top == 0 && g.pad_left == 0 &&
         (g.out_height - 1) * g.stride_height < g.in_height &&
         (g.out_width - 1) * g.stride_width < g.in_width;
}

// The convolution as tiles see it, which is one of gathered pixels where they are.
KsGeometry View(const KsArguments& arguments, int64_t gathered) {
  KsGeometry view = arguments.geometry;
  if (!gathered) return view;
  view.in_height = view.out_height;
  view.in_width = view.out_width;
  view.in_channels = arguments.kept;
  view.stride_height = view.stride_width = 1;
  view.dilation_height = view.dilation_width = 1;
  return view;
}

struct Spans {
  Span rows[kMostSpans], columns[kMostSpans];
};
enum { kSplitRows = 1, kSplitColumns = 2 };
void WidestFirst(int64_t count, Span* spans) {
  int64_t widest = 0;
  for (int64_t i = 1; i < count; ++i) {
    if (spans[i].end - spans[i].begin > spans[widest].end - spans[widest].begin) widest = i;
  }
  const Span first = spans[0];
  spans[0] = spans[widest];
  spans[widest] = first;
}
bool SetSpans(const KsGeometry& geometry, Parameters* parameters, Spans* spans) {
  parameters->row_spans =
      MakeSpans(RowAxis(geometry), (parameters->split & kSplitRows) != 0, spans->rows);
  parameters->col_spans =
      MakeSpans(ColumnAxis(geometry), (parameters->split & kSplitColumns) != 0, spans->columns);
  // The widest first, where terms fetch pixels some rows ahead for its blocks: they are there for
  // the others then. Pixels fetched row by row are wanted in that order.
  if (kFetchByTerms) {
    WidestFirst(parameters->row_spans, spans->rows);
    WidestFirst(parameters->col_spans, spans->columns);
  }
  return parameters->row_spans > 0 && parameters->col_spans > 0;
}

// Pixels of a class in a tile, at most.
KS_INLINE int64_t ClassPixels(const Tiles& tiles, const Span& rows, const Span& columns) {
  return tiles.images * Min(tiles.rows, rows.end - rows.begin) * (columns.end - columns.begin);
}
int64_t AllClassPixels(const Tiles& tiles, const Parameters& parameters, const Spans& spans) {
  int64_t pixels = 0;
  for (int64_t r = 0; r < parameters.row_spans; ++r) {
    for (int64_t c = 0; c < parameters.col_spans; ++c) {
      pixels += ClassPixels(tiles, spans.rows[r], spans.columns[c]);
    }
  }
  return pixels;
}

struct Prepared {
  Spans* spans;     // At the begin of the table, as the places of the others depend on it.
  Term* terms;      // Class after class, each with room for [kept].
  int32_t* chunks;  // [classes][chunks + 1]: where the terms of a chunk begin.
  Point* points;    // Class after class: its pixels in a tile.
  int32_t* order;   // [kept]: the kept row of each packed row.
  int32_t* starts;  // Of the groups of channels.
  float* panels;    // Panel after panel, each [kept][its vectors * kLanes].
};

// The spans have been set.
Prepared PlacePrepared(const KsArguments& arguments, const Parameters& parameters,
                       const KsMemory& memory) {
  const int64_t classes = parameters.row_spans * parameters.col_spans;
  Arena arena = {static_cast<char*>(memory.table)};
  Prepared place;
  place.spans = arena.Take<Spans>(1);
  place.terms = arena.Take<Term>(classes * arguments.kept);
  place.chunks = arena.Take<int32_t>(classes * (parameters.chunks + 1));
  place.points = arena.Take<Point>(AllClassPixels(parameters.tiles, parameters, *place.spans));
  place.order = arena.Take<int32_t>(arguments.kept);
  place.starts = arena.Take<int32_t>(CeilDiv(arguments.geometry.in_channels, kLineFloats) + 1);
  place.panels = static_cast<float*>(memory.filter);
  return place;
}

int64_t TableBytes(const KsArguments& arguments, const Parameters& parameters, const Spans& spans) {
  const int64_t classes = parameters.row_spans * parameters.col_spans;
  return PieceBytes(1, sizeof(Spans)) + PieceBytes(classes * arguments.kept, sizeof(Term)) +
         PieceBytes(classes * (parameters.chunks + 1), 4) +
         PieceBytes(AllClassPixels(parameters.tiles, parameters, spans), sizeof(Point)) +
         PieceBytes(arguments.kept, 4) +
         PieceBytes(CeilDiv(arguments.geometry.in_channels, kLineFloats) + 1, 4);
}

// Sorts the kept rows by group of channels. `indices` increase: taps do too, within a group.
void SortRows(const KsArguments& arguments, const Prepared& prepared) {
  const int64_t channels = Max(1, arguments.geometry.in_channels);
  const int64_t groups = CeilDiv(channels, kLineFloats);
  memset(prepared.starts, 0, (groups + 1) * 4);
  for (int pass = 0; pass < 2; ++pass) {
    for (int64_t k = 0; k < arguments.kept; ++k) {
      const int64_t group = arguments.indices[k] % channels / kLineFloats;
      if (pass == 0) {
        ++prepared.starts[group + 1];
      } else {
        prepared.order[prepared.starts[group]++] = static_cast<int32_t>(k);
      }
    }
    if (pass == 0) {
      for (int64_t g = 0; g < groups; ++g) prepared.starts[g + 1] += prepared.starts[g];
    }
  }
}

// The terms and the pixels of every class.
void MakeClasses(const KsArguments& arguments, const Parameters& parameters, const Spans& spans,
                 const Prepared& prepared) {
  const KsGeometry& geometry = arguments.geometry;
  const Tiles& tiles = parameters.tiles;
  Term* terms = prepared.terms;
  int32_t* chunks = prepared.chunks;
  Point* point = prepared.points;
  for (int64_t r = 0; r < parameters.row_spans; ++r) {
    for (int64_t c = 0; c < parameters.col_spans; ++c) {
      const Span& rows = spans.rows[r];
      const Span& columns = spans.columns[c];
      int64_t count = 0, chunk = 0;
      for (int64_t t = 0; t < arguments.kept; ++t) {
        while (t >= PartBegin(arguments.kept, parameters.chunks, chunk)) {
          chunks[chunk++] = static_cast<int32_t>(count);
        }
        const int64_t index = arguments.indices[prepared.order[t]];
        const int64_t tap = index / geometry.in_channels;
        const int64_t i = tap / geometry.kernel_width, j = tap % geometry.kernel_width;
        if (i < rows.tap_begin || i >= rows.tap_end || j < columns.tap_begin ||
            j >= columns.tap_end) {
          continue;
        }
        const int64_t x = parameters.gathered ? t
                                              : TapOffset(geometry, tiles, i - rows.tap_begin,
                                                          j - columns.tap_begin) +
                                                    index % geometry.in_channels;
        terms[count++] = {static_cast<int32_t>(x), static_cast<int32_t>(t)};
      }
      while (chunk <= parameters.chunks) chunks[chunk++] = static_cast<int32_t>(count);
      terms += arguments.kept;
      chunks += parameters.chunks + 1;
      for (int64_t g = 0; g < tiles.images; ++g) {
        for (int64_t y = 0; y < Min(tiles.rows, rows.end - rows.begin); ++y) {
          for (int64_t x = 0; x < columns.end - columns.begin; ++x) {
            *point++ = {
                PixelOffset(tiles, g, y, x),
                ((g * tiles.grid.rows + y) * tiles.grid.columns + x) * geometry.out_channels};
          }
        }
      }
    }
  }
}

// Copies rows [begin, end) of a tile, which count on over its images: all channels of all pixels
// with the padding, or what is gathered of them. With one tap rows are sorted as they come.
void CopyTileRows(const KsArguments& arguments, const Parameters& parameters, const Tile& tile,
                  int64_t begin, int64_t end, float* target) {
  const Tiles& tiles = parameters.tiles;
  if (!parameters.gathered) {
    CopyRows(tiles, tile, arguments.input, begin, end, target);
    return;
  }
  const KsGeometry& g = arguments.geometry;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t image = tile.first_image + r / tiles.padded_rows;
    const int64_t y = (tile.first_row + r % tiles.padded_rows) * g.stride_height;
    if (y >= g.in_height) continue;  // A last tile has fewer rows.
    const float* pixel = arguments.input + (image * g.in_height + y) * g.in_width * g.in_channels;
    float* to = target + r * tiles.row_stride;
    for (int64_t c = 0; c < g.out_width; ++c) {
      for (int64_t k = 0; k < arguments.kept; ++k) to[k] = pixel[arguments.indices[k]];
      pixel += g.stride_width * g.in_channels;
      to += tiles.pixel_stride;
    }
  }
}

// The rows of a span that a tile has.
KS_INLINE int64_t RowsInTile(const Span& rows, const Tile& tile) {
  return Max(0, Min(rows.end, tile.first_row + tile.rows) - Max(rows.begin, tile.first_row));
}

// The sums of one class over one chunk of its terms, in a tile.
struct ClassSums {
  const float* x;       // Of its first pixel's first tap,
  int64_t out;          // and of its first result, from arguments.output on.
  const Point* points;  // Its pixels.
  int64_t count;
  const Term* terms;
  int64_t num_terms;
  int64_t all_terms;  // Of the chunk.
  bool first, last;   // Whether the chunk is.
  bool fetch;         // Whether its pixels come from memory, to the first of its panels.
};

// A few panels are computed together, a block of pixels after the other: what the pixels have in
// the near cache serves them all.
void SumClass(const KsArguments& arguments, const Parameters& parameters, const Prepared& prepared,
              const ClassSums& of_class, const Panel* panels, int64_t num_panels,
              Upcoming* upcoming) {
  // Fetched are what follows in a row of pixels or, with one tap, in so many blocks that memory has
  // time.
  const KsGeometry& g = arguments.geometry;
  const int64_t most_points = kBlockPoints[panels[0].vectors];
  const int64_t block_cycles =
      Max(1, of_class.num_terms * most_points * panels[0].vectors * num_panels);
  const int64_t x_ahead = g.kernel_height * g.kernel_width > 1
                              ? ((g.kernel_height - 1) * g.dilation_height + g.stride_height) *
                                    parameters.tiles.row_stride
                              : CeilDiv(kMemoryCycles, block_cycles) * most_points *
                                    g.stride_width * parameters.tiles.pixel_stride;
  // By a few panels, two pixels of a block each, or by one.
  const int64_t pairs = CeilDiv(most_points, 2);
  const bool in_pairs = num_panels >= pairs;
  // Later results are fetched where these panels are all, and have terms that fetch.
  const bool later = parameters.fetch_out && kFetchByTerms && of_class.fetch && of_class.first &&
                     num_panels == MakePanels(g.out_channels).count;
  Sums all_sums[kMostTogether];
  Epilogue epilogues[kMostTogether];
  for (int64_t i = 0; i < num_panels; ++i) {
    const int64_t channel = panels[i].first_vector * kLanes;
    Sums& sums = all_sums[i];
    sums = {};
    sums.x = of_class.x;
    sums.w = prepared.panels + arguments.kept * channel;
    sums.w_stride = panels[i].vectors * kLanes;
    sums.terms = of_class.terms;
    sums.num_terms = of_class.num_terms;
    sums.x_ahead = kFetchByTerms && of_class.fetch && i < (in_pairs ? pairs : 1) ? x_ahead : 0;
    sums.fetch_pair = in_pairs ? i + 1 : 0;
    sums.in_order = of_class.num_terms == of_class.all_terms;
    sums.out = arguments.output + of_class.out + channel;
    sums.add = !of_class.first;
    sums.stream = parameters.stream;
    sums.fetch_out = parameters.fetch_out && !later;
    epilogues[i] = MakeEpilogue(arguments);
    if (!epilogues[i].used || !of_class.last) continue;
    if (epilogues[i].bias != nullptr) epilogues[i].bias += channel;
    if (epilogues[i].residual != nullptr) epilogues[i].residual += of_class.out + channel;
    sums.epilogue = &epilogues[i];
  }
  // No panel has more vectors than the first, whose blocks are therefore not too large for any.
  const int64_t blocks = CeilDiv(of_class.count, kBlockPoints[panels[0].vectors]);
  const int64_t few = of_class.count / Max(1, blocks), rest = of_class.count % Max(1, blocks);
  const Point* points = of_class.points;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t count = few + (b < rest ? 1 : 0);
    for (int64_t i = 0; i < num_panels; ++i) {
      // The next chunk, or panel, comes next in memory.
      const int rows = BlockRows(b, of_class.all_terms * all_sums[i].w_stride, &all_sums[i]);
      if (later) {
        // A part of the next pixels, which follow these but for the end of a row.
        const int64_t next = count * g.out_channels;
        all_sums[i].fetch_later =
            arguments.output + of_class.out + points->out + next + PartBegin(next, num_panels, i);
      }
      SumBlock(panels[i], rows, points, count, all_sums[i]);
    }
    points += count;
    FetchDue(1, upcoming);
  }
}

void ComputeTile(const KsArguments& arguments, const Parameters& parameters, const Spans& spans,
                 const Prepared& prepared, const Tile& tile, const float* x, int64_t panel_begin,
                 int64_t panel_end) {
  const KsGeometry geometry = View(arguments, parameters.gathered);
  const Tiles& tiles = parameters.tiles;
  const Panels panels = MakePanels(geometry.out_channels);
  const int64_t pad_top = tiles.copied ? 0 : geometry.pad_top;
  const int64_t pad_left = tiles.copied ? 0 : geometry.pad_left;
  // What is read in place is fetched as the first panels come to it: by terms, or from the row on
  // that follows those of the first results.
  Upcoming upcoming;
  FetchNothing(&upcoming);
  if (!tiles.copied && !kFetchByTerms) {
    int64_t steps = 0;
    const int64_t at_once = kBlockPoints[PanelAt(panels, panel_begin).vectors];
    for (int64_t r = 0; r < parameters.row_spans; ++r) {
      const int64_t pixels = tile.images * RowsInTile(spans.rows[r], tile);
      for (int64_t c = 0; c < parameters.col_spans; ++c) {
        steps += CeilDiv(pixels * (spans.columns[c].end - spans.columns[c].begin), at_once);
      }
    }
    const int64_t row = tile.first_row * geometry.stride_height - pad_top +
                        (geometry.kernel_height - 1) * geometry.dilation_height + 1;
    const int64_t rows =
        tile.images > 1 ? tile.images * geometry.in_height : tile.rows * geometry.stride_height;
    FetchRows(arguments, tile.first_image * geometry.in_height + row, rows,
              steps * parameters.chunks, &upcoming);
  }
  for (int64_t i = panel_begin; i < panel_end; i += parameters.together) {
    Panel set[kMostTogether];
    const int64_t num_panels = Min(parameters.together, panel_end - i);
    for (int64_t j = 0; j < num_panels; ++j) set[j] = PanelAt(panels, i + j);
    for (int64_t chunk = 0; chunk < parameters.chunks; ++chunk) {
      ClassSums of_class;
      of_class.all_terms = PartBegin(arguments.kept, parameters.chunks, chunk + 1) -
                           PartBegin(arguments.kept, parameters.chunks, chunk);
      of_class.first = chunk == 0;
      of_class.last = chunk == parameters.chunks - 1;
      of_class.fetch = !tiles.copied && i == panel_begin;
      const Term* terms = prepared.terms;
      const int32_t* begins = prepared.chunks + chunk;
      const Point* points = prepared.points;
      for (int64_t r = 0; r < parameters.row_spans; ++r) {
        const Span& rows = spans.rows[r];
        const int64_t y = Max(rows.begin, tile.first_row);
        const int64_t height = RowsInTile(rows, tile);
        for (int64_t c = 0; c < parameters.col_spans; ++c) {
          const Span& columns = spans.columns[c];
          if (height > 0) {
            const int64_t x_row = (y - tile.first_row) * geometry.stride_height - pad_top +
                                  rows.tap_begin * geometry.dilation_height;
            const int64_t x_column = columns.begin * geometry.stride_width - pad_left +
                                     columns.tap_begin * geometry.dilation_width;
            of_class.x = x + x_row * tiles.row_stride + x_column * tiles.pixel_stride;
            of_class.out =
                ((tile.first_image * tiles.grid.rows + y) * tiles.grid.columns + columns.begin) *
                panels.channels;
            of_class.points = points;
            of_class.count = tile.images * height * (columns.end - columns.begin);
            of_class.terms = terms + begins[0];
            of_class.num_terms = begins[1] - begins[0];
            SumClass(arguments, parameters, prepared, of_class, set, num_panels, &upcoming);
          }
          terms += arguments.kept;
          begins += parameters.chunks + 1;
          points += ClassPixels(tiles, rows, columns);
        }
      }
    }
  }
}

// What reading a pixel costs beside its products with one tap, which take `products`, all in
// cycles: every panel reads all cache lines that hold kept channels, or gathered ones. What comes
// from memory is waited for where pixels are gathered, line after line. Otherwise it comes while
// others are computed with, but slower, as lines are left out.
double OneTapCost(const KsArguments& arguments, bool gathered, int64_t apart, int64_t panels,
                  double products) {
  const KsGeometry& geometry = arguments.geometry;
  const double channels = static_cast<double>(geometry.in_channels);
  const double kept = static_cast<double>(arguments.kept);
  double missed = 1;  // The share of lines without a kept channel.
  for (int64_t i = 0; i < kLineFloats; ++i) missed *= 1 - kept / (channels > 1 ? channels : 1);
  const double all_lines = channels / kLineFloats, lines = (1 - missed) * all_lines;
  const double passes = static_cast<double>(panels);
  const double bytes =
      4.0 * static_cast<double>(geometry.batch) * geometry.in_height * geometry.in_width * channels;
  if (kFetchByTerms) {
    const bool far = bytes > static_cast<double>(kFarFrom);
    if (gathered) return 12 + kept * 1.4 + (far ? all_lines * 7 : all_lines * 3);
    const double memory = lines * 22 < all_lines * 15 ? lines * 22 : all_lines * 15;
    return far && memory > products ? memory - products : 0.0;
  }
  if (!gathered) return passes * lines * (apart % 2048 == 0 ? 1.8 : apart % 1024 == 0 ? 1.5 : 0.8);
  return 12 + kept * 1.4 + passes * kept / kLineFloats * 0.8 +
         (bytes > static_cast<double>(kFetchFrom) ? lines * 6 : 0.0);
}

// About what a group of tiles with all rows costs, in cycles.
double GroupCost(const KsArguments& arguments, const Parameters& parameters, const Spans& spans) {
  const KsGeometry geometry = View(arguments, parameters.gathered);
  const Tiles& tiles = parameters.tiles;
  const Panels panels = MakePanels(geometry.out_channels);
  const int64_t vectors = PanelAt(panels, 0).vectors;
  const double taps = static_cast<double>(geometry.kernel_height) * geometry.kernel_width;
  double cycles = 0;
  for (int64_t r = 0; r < parameters.row_spans; ++r) {
    for (int64_t c = 0; c < parameters.col_spans; ++c) {
      const Span& rows = spans.rows[r];
      const Span& columns = spans.columns[c];
      const double pixels = static_cast<double>(tiles.images) * (rows.end - rows.begin) *
                            (columns.end - columns.begin);
      const double blocks = static_cast<double>(
          CeilDiv(static_cast<int64_t>(pixels), kBlockPoints[vectors]) + tiles.row_tiles - 1);
      const double terms = static_cast<double>(arguments.kept) * (rows.tap_end - rows.tap_begin) *
                           (columns.tap_end - columns.tap_begin) / taps;
      cycles += TermCost(pixels, blocks, vectors) * terms + blocks * 40;
    }
  }
  cycles *= static_cast<double>(panels.count);
  // Pixels a large power of two apart meet in few sets of the first-level cache.
  const int64_t apart = tiles.pixel_stride * 4;
  if (MayGather(arguments.geometry)) {
    const double pixels = static_cast<double>(tiles.images * tiles.row_tiles * tiles.rows) *
                          static_cast<double>(tiles.grid.columns);
    return cycles + pixels * OneTapCost(arguments, parameters.gathered, apart, panels.count,
                                        cycles / pixels);
  }
  if (tiles.copied) {
    return cycles + static_cast<double>(tiles.images * tiles.row_tiles * tiles.padded_rows) *
                        tiles.row_stride * (8.0 / 16);
  }
  return cycles * (apart % 2048 == 0 ? 1.15 : apart % 1024 == 0 ? 1.04 : 1.01);
}

}  // namespace

int ThinnedConv2DPlan(const KsArguments* arguments, KsPlan* plan) {
  const KsGeometry& geometry = arguments->geometry;
  memset(plan, 0, sizeof(*plan));
  if (geometry.out_channels == 0) return 0;
  Parameters parameters = {};
  Spans spans;
  double best = -1;
  // The input in place, then copies of it for all ways to cut the axes, then gathered.
  for (int way = 4; way >= -1; --way) {
    Parameters candidate = {};
    Spans candidate_spans;
    candidate.gathered = way < 0;
    if (candidate.gathered && !MayGather(geometry)) continue;
    const KsGeometry view = View(*arguments, candidate.gathered);
    candidate.split = Max(0, Min(way, kSplitRows | kSplitColumns));
    if (!SetSpans(view, &candidate, &candidate_spans)) continue;
    const int64_t classes = candidate.row_spans * candidate.col_spans;
    if (way > 0 && classes * arguments->kept * 8 > kMostTermBytes) continue;
    if (!PlanTiles(view, way < 4, &candidate.tiles, kTileBytes, candidate.gathered)) return 0;
    const double cost = GroupCost(*arguments, candidate, candidate_spans) * candidate.tiles.groups;
    if (best >= 0 && cost >= best) continue;
    best = cost;
    parameters = candidate;
    spans = candidate_spans;
  }
  Tiles& tiles = parameters.tiles;
  best += kFilterByteCost * 4.0 * static_cast<double>(arguments->kept) * geometry.out_channels;
  // Estimates err by a tenth.
  const double winograd = ThinnedConv2DWinogradCost(*arguments);
  if (winograd >= 0 && winograd < 0.9 * best) return 0;
  const Panels panels = MakePanels(geometry.out_channels);
  if (!tiles.copied && NumTiles(tiles) < kFewItems &&
      arguments->kept * panels.vectors * kLanes * 4 <= kTogetherBytes) {
    // Work is cut by rows rather than by panels, all of which a block of pixels then serves. A
    // class may be a single column, whose pixels fill a block as well where vectors are long.
    const int64_t least = Max(CeilDiv(kFewPixels, tiles.grid.columns),
                              kFetchByTerms ? kBlockPoints[PanelAt(panels, 0).vectors] : 1);
    const int64_t rows = Max(least, CeilDiv(tiles.grid.rows, CeilDiv(kFewItems, tiles.grid.batch)));
    CutTiles(Min(rows, tiles.grid.rows), 1, &tiles);
  }
  const int64_t num_tiles = NumTiles(tiles);
  parameters.splits = 1;
  if (num_tiles < kFewItems) {
    parameters.shared_tiles = tiles.copied;
    parameters.splits = Min(CeilDiv(kWantedItems, num_tiles), panels.count);
  }
  parameters.chunks =
      Max(1, CeilDiv(arguments->kept * PanelAt(panels, 0).vectors * kLanes * 4, kChunkBytes));
  const double result = 4.0 * static_cast<double>(geometry.batch) * geometry.out_height *
                        geometry.out_width * geometry.out_channels;
  // Gathered pixels come to every panel one line after the other, as panels do to them.
  const int64_t chunk_bytes =
      CeilDiv(arguments->kept, parameters.chunks) * PanelAt(panels, 0).vectors * kLanes * 4;
  parameters.together =
      parameters.gathered ? 1 : Max(1, Min(kMostTogether, kTogetherBytes / Max(1, chunk_bytes)));
  parameters.stream = parameters.chunks == 1 && Streams(geometry, result);
  parameters.fetch_out = !parameters.stream && result >= static_cast<double>(kFetchOutFrom);

  KsStage* stage = plan->stages;
  stage->items = 1;
  stage->cost = 100 + arguments->kept * 10 * (1 + parameters.row_spans * parameters.col_spans);
  stage->prepares = KS_PREPARES_TABLE;
  ++stage;
  stage->items = CeilDiv(arguments->kept, kRowsOfItem);
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
  plan->table_bytes = TableBytes(*arguments, parameters, spans);
  plan->filter_bytes = PieceBytes(arguments->kept * panels.vectors * kLanes, 4);
  plan->scratch_bytes = parameters.shared_tiles ? 0 : TileBytes(tiles);
  plan->shared_bytes = parameters.shared_tiles ? num_tiles * TileBytes(tiles) : 0;
  SaveParameters(parameters, plan);
  return 1;
}

void ThinnedConv2DRun(const KsArguments* arguments, const KsPlan* plan, int32_t stage,
                      int64_t begin, int64_t end, const KsMemory* memory) {
  Parameters parameters = LoadParameters<Parameters>(plan);
  const Tiles& tiles = parameters.tiles;
  if (stage == 0) {
    SetSpans(View(*arguments, parameters.gathered), &parameters,
             static_cast<Spans*>(memory->table));
  }
  const Prepared prepared = PlacePrepared(*arguments, parameters, *memory);
  const Spans& spans = *prepared.spans;
  float* const shared_tiles = static_cast<float*>(memory->shared);
  const int64_t tile_size = TileBytes(tiles) / 4;
  const int64_t tile_rows = tiles.images * tiles.padded_rows;
  if (stage == 0) {
    SortRows(*arguments, prepared);
    MakeClasses(*arguments, parameters, spans, prepared);
    return;
  }
  if (stage == 1) {
    PackRows(*arguments, prepared.order, arguments->kept, begin * kRowsOfItem,
             Min(arguments->kept, end * kRowsOfItem), prepared.panels);
    return;
  }
  if (stage == 2) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t tile_index = item / tile_rows;
      const int64_t row = item % tile_rows;
      const Tile tile = TileAt(tiles, tile_index);
      if (row >= tile.images * tiles.padded_rows) continue;
      CopyTileRows(*arguments, parameters, tile, row, row + 1,
                   shared_tiles + tile_index * tile_size);
    }
    return;
  }

  if (reinterpret_cast<uintptr_t>(arguments->output) % KS_ALIGNMENT != 0) parameters.stream = 0;
  const int64_t panels = MakePanels(arguments->geometry.out_channels).count;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t tile_index = item / parameters.splits;
    const int64_t split = item % parameters.splits;
    const Tile tile = TileAt(tiles, tile_index);
    float* copy = static_cast<float*>(memory->scratch);
    if (parameters.shared_tiles) {
      copy = shared_tiles + tile_index * tile_size;
    } else if (tiles.copied) {
      CopyTileRows(*arguments, parameters, tile, 0, tile.images * tiles.padded_rows, copy);
    }
    ComputeTile(*arguments, parameters, spans, prepared, tile,
                TileData(tiles, tile, arguments->input, copy),
                PartBegin(panels, parameters.splits, split),
                PartBegin(panels, parameters.splits, split + 1));
  }
  if (parameters.stream) StreamEnd();
}

}  // namespace KS_ISA
}  // namespace ks
