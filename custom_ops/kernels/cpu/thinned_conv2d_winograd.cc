// Copyright 2026 The keras_sparse Authors. Licensed under the Apache License, Version 2.0.
//
// Thinned convolution, forward, of kernels three taps wide at stride 1, by minimal filtering along
// rows; see winograd.h.
//
// A tap row is the three taps of an input channel in a row of the kernel. Where two or three of
// them are kept, the tap row is one term at each of six points of a tile: six products for four
// neighbouring results instead of eight or twelve. A tap that is kept alone stays a term of pixels,
// as in ThinnedConv2D, with four.
//
// The input is transformed a tile of the batch at a time, point after point. Of each point, the
// sums over tap rows go to scratch, a panel of result channels at a time; so do the sums over
// single taps. Both stay in the second-level cache until they are finished together: transformed
// back, added, and stored once.
//
// Padding is zeros, but rows of tiles whose taps fall inside the image alike have terms of their
// own where there are enough of them; see ThinnedConv2D.

#include "custom_ops/kernels/cpu/fetch.h"
#include "custom_ops/kernels/cpu/routines.h"
#include "custom_ops/kernels/cpu/terms.h"
#include "custom_ops/kernels/cpu/thinned.h"
#include "custom_ops/kernels/cpu/winograd.h"

namespace ks {
namespace KS_ISA {
namespace {

constexpr int64_t kTaps = 3;                           // Of a tap row.
constexpr int64_t kSumWidth = kPanelVectors * kLanes;  // Floats of the sums of a panel.
constexpr int64_t kEnoughPixels = 192;                 // Of a tile of the batch.
constexpr int64_t kMostTileBytes = 8 << 20;            // Likewise, of the input.
constexpr double kNearTaps = 1 << 20;                  // Bytes.
constexpr int64_t kBlocksAtOnce = 3;                   // Between two turns of fetching.
// Of PlanTiles' budget: transformed pixels and sums take the rest.
constexpr int64_t kPixelBytes = kTileBytes / 2;

// The terms of one kind, those of tap rows or those of single taps.
struct Kind {
  int64_t terms;
  int64_t chunks;   // Of the terms.
  int64_t columns;  // Points of a row: tiles, or pixels.
};

struct Parameters {
  Tiles tiles;
  Kind tap_rows, singles;
  int64_t shared_tiles;  // 1: the input is transformed once, to memory of the whole call.
  int64_t splits;        // Parts of the panels, one item each.
  int64_t split_rows;    // 1: rows are cut into spans.
  int64_t row_spans;
  int64_t stream;
  int64_t fetch_input, fetch_output;  // Those that the near caches do not hold.
};

struct Spans {
  Span rows[kMostSpans];
};

// The shape of transformed pixels, [kPoints][images * padded rows][columns of tiles][channels]:
// floats between neighbours. Tiles are an odd number of cache lines apart, and so are points.
struct Transformed {
  int64_t tile, row, point;
};
KS_INLINE Transformed TransformedShape(const Parameters& parameters) {
  const Tiles& tiles = parameters.tiles;
  Transformed shape;
  shape.tile = (CeilDiv(tiles.grid.channels, 16) | 1) * 16;
  shape.row = parameters.tap_rows.columns * shape.tile;
  shape.point = (tiles.images * tiles.padded_rows * shape.row / 16 | 1) * 16;
  return shape;
}

// Likewise for the sums of a panel, [kPoints][images * rows][columns of tiles][kSumWidth] and then
// [images * rows][columns][kSumWidth].
KS_INLINE int64_t SumsOfPoint(const Parameters& parameters) {
  const Tiles& tiles = parameters.tiles;
  return (CeilDiv(tiles.images * tiles.rows * parameters.tap_rows.columns * kSumWidth, 16) | 1) *
         16;
}
KS_INLINE int64_t SumsOfSingles(const Parameters& parameters) {
  if (parameters.singles.terms == 0) return 0;
  return parameters.tiles.images * parameters.tiles.rows * parameters.singles.columns * kSumWidth;
}

KS_INLINE int64_t TransformedBytes(const Parameters& parameters) {
  return PieceBytes(kPoints * TransformedShape(parameters).point, 4);
}
KS_INLINE int64_t SumBytes(const Parameters& parameters) {
  return PieceBytes(kPoints * SumsOfPoint(parameters), 4) +
         PieceBytes(SumsOfSingles(parameters), 4);
}

// --- Tables --------------------------------------------------------------------------------------

// The terms of a kind, and its points in a tile of the batch.
struct Terms {
  Term* terms;      // Span after span, each with room for all.
  int32_t* chunks;  // [spans][chunks + 1]: where the terms of a chunk begin.
  Point* points;    // Span after span.
};

struct Prepared {
  Terms tap_rows, singles;
  int32_t* kept;       // [kernel_height][kTaps][in_channels]: the kept row of a tap, or -1.
  int32_t* rows;       // [tap rows][kTaps]: kept rows, or -1.
  int32_t* order;      // [singles]: kept rows.
  float* point_taps;   // Panel after panel, each [kPoints][tap rows][its vectors * kLanes].
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
  return TermBytes(parameters, spans, parameters.tap_rows) +
         TermBytes(parameters, spans, parameters.singles) +
         PieceBytes(geometry.kernel_height * kTaps * geometry.in_channels, 4) +
         PieceBytes(parameters.tap_rows.terms * kTaps, 4) + PieceBytes(parameters.singles.terms, 4);
}
int64_t FilterBytes(const KsGeometry& geometry, const Parameters& parameters) {
  const int64_t width = MakePanels(geometry.out_channels).vectors * kLanes;
  return PieceBytes(kPoints * parameters.tap_rows.terms * width, 4) +
         PieceBytes(parameters.singles.terms * width, 4);
}
Prepared PlacePrepared(const KsGeometry& geometry, const Parameters& parameters, const Spans& spans,
                       const KsMemory& memory) {
  Arena arena = {static_cast<char*>(memory.table)};
  Prepared place;
  place.tap_rows = PlaceTerms(parameters, spans, parameters.tap_rows, &arena);
  place.singles = PlaceTerms(parameters, spans, parameters.singles, &arena);
  place.kept = arena.Take<int32_t>(geometry.kernel_height * kTaps * geometry.in_channels);
  place.rows = arena.Take<int32_t>(parameters.tap_rows.terms * kTaps);
  place.order = arena.Take<int32_t>(parameters.singles.terms);
  const int64_t width = MakePanels(geometry.out_channels).vectors * kLanes;
  arena = {static_cast<char*>(memory.filter)};
  place.point_taps = arena.Take<float>(kPoints * parameters.tap_rows.terms * width);
  place.single_taps = arena.Take<float>(parameters.singles.terms * width);
  return place;
}

// Counts the terms: merges the channels of the three taps of each row, all of which increase.
void CountTerms(const KsArguments& arguments, int64_t* tap_rows, int64_t* singles) {
  const int64_t channels = arguments.geometry.in_channels;
  const int32_t* next = arguments.indices;
  const int32_t* const last = arguments.indices + arguments.kept;
  *tap_rows = *singles = 0;
  while (next != last) {
    // The rows before that of the next index are empty.
    const int64_t first = *next / (kTaps * channels) * (kTaps * channels);
    const int32_t* at[kTaps];
    const int32_t* end[kTaps];
    for (int64_t j = 0; j < kTaps; ++j) {
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
      int64_t channel[kTaps], least = channels;
      for (int64_t j = 0; j < kTaps; ++j) {
        channel[j] = at[j] < end[j] ? *at[j] - (first + j * channels) : channels;
        least = Min(least, channel[j]);
      }
      if (least == channels) break;
      int64_t taps = 0;
      for (int64_t j = 0; j < kTaps; ++j) {
        at[j] += channel[j] == least;
        taps += channel[j] == least;
      }
      *tap_rows += taps > 1;
      *singles += taps == 1;
    }
  }
}

// Finds the tap rows and the single taps, in the order (channel / 16, row, channel).
void SortTerms(const KsArguments& arguments, const Prepared& prepared) {
  const KsGeometry& geometry = arguments.geometry;
  const int64_t channels = geometry.in_channels;
  memset(prepared.kept, 0xff, geometry.kernel_height * kTaps * channels * 4);
  for (int64_t k = 0; k < arguments.kept; ++k) {
    prepared.kept[arguments.indices[k]] = static_cast<int32_t>(k);
  }
  int32_t* rows = prepared.rows;
  int32_t* order = prepared.order;
  for (int64_t first = 0; first < channels; first += kLineChannels) {
    for (int64_t i = 0; i < geometry.kernel_height; ++i) {
      for (int64_t s = first; s < Min(channels, first + kLineChannels); ++s) {
        int32_t kept[kTaps];
        int64_t taps = 0;
        for (int64_t j = 0; j < kTaps; ++j) {
          kept[j] = prepared.kept[(i * kTaps + j) * channels + s];
          taps += kept[j] >= 0;
        }
        if (taps > 1) {
          memcpy(rows, kept, sizeof(kept));
          rows += kTaps;
        } else if (taps == 1) {
          for (int64_t j = 0; j < kTaps; ++j) {
            if (kept[j] >= 0) *order++ = kept[j];
          }
        }
      }
    }
  }
}

// Of what the points of a kind read: floats between neighbours.
struct Steps {
  int64_t image, row, column;  // Column of points.
  int64_t tap;
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
      terms[count++] = {static_cast<int32_t>(i * steps.row + j * steps.tap + index % channels),
                        static_cast<int32_t>(t)};
    }
    while (chunk <= kind.chunks) chunks[chunk++] = static_cast<int32_t>(count);
    terms += kind.terms;
    chunks += kind.chunks + 1;
    for (int64_t g = 0; g < tiles.images; ++g) {
      for (int64_t y = 0; y < Min(tiles.rows, span.end - span.begin); ++y) {
        for (int64_t x = 0; x < kind.columns; ++x) {
          *point++ = {g * steps.image + y * steps.row + x * steps.column,
                      ((g * tiles.rows + y) * kind.columns + x) * kSumWidth};
        }
      }
    }
  }
}

// Transforms tap rows [begin, end), into all panels.
void PackTapRows(const KsArguments& arguments, const Parameters& parameters,
                 const Prepared& prepared, int64_t begin, int64_t end) {
  const Panels panels = MakePanels(arguments.geometry.out_channels);
  for (int64_t i = 0; i < panels.count; ++i) {
    const Panel panel = PanelAt(panels, i);
    const int64_t width = panel.vectors * kLanes, point = parameters.tap_rows.terms * width;
    float* target = prepared.point_taps +
                    kPoints * parameters.tap_rows.terms * panel.first_vector * kLanes +
                    begin * width;
    for (int64_t t = begin; t < end; ++t, target += width) {
      for (int64_t v = 0; v < width; v += kLanes) {
        Vec taps[kTaps], points[kPoints];
        for (int64_t j = 0; j < kTaps; ++j) {
          const int64_t kept = prepared.rows[t * kTaps + j];
          taps[j] = Vec{};
          if (kept < 0) continue;
          const float* row =
              arguments.filter + kept * panels.channels + panel.first_vector * kLanes + v;
          taps[j] = v + kLanes <= panel.channels ? Load(row) : LoadFirst(row, panel.channels - v);
        }
        TransformTaps(taps, points);
        for (int64_t p = 0; p < kPoints; ++p) Store(target + p * point + v, points[p]);
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
  for (int64_t t = 0; t < parameters.tap_rows.columns; ++t) {
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

// Copies, where needed, and transforms padded rows [begin, end) of a tile of the batch.
void TransformRows(const KsArguments& arguments, const Parameters& parameters, const Tile& tile,
                   int64_t begin, int64_t end, float* copy, float* transformed) {
  const Tiles& tiles = parameters.tiles;
  const float* x = TileData(tiles, tile, arguments.input, copy);
  const int64_t rows = tile.rows + arguments.geometry.kernel_height - 1;
  for (int64_t r = begin; r < Min(end, tile.images * tiles.padded_rows); ++r) {
    if (r % tiles.padded_rows >= rows) continue;
    if (tiles.copied) CopyRows(tiles, tile, arguments.input, r, r + 1, copy);
    TransformRow(parameters, x, r, transformed);
  }
}

// What is fetched while sums are computed: the input of the next tile of the batch, and where the
// results of the panel will be stored.
struct Fetching {
  Upcoming input, output;
};

// Of a span's points, the parts between which to fetch.
KS_INLINE int64_t Turns(int64_t points, int64_t vectors) {
  return CeilDiv(points, kBlocksAtOnce * kBlockPoints[vectors]);
}

// The rows of a span that a tile of the batch has, counted from the tile's first.
struct SpanInTile {
  int64_t begin, rows;
};
KS_INLINE SpanInTile InTile(const Span& span, const Tile& tile) {
  const int64_t begin = Min(Max(span.begin - tile.first_row, 0), tile.rows);
  return {begin, Max(0, Min(span.end - tile.first_row, tile.rows) - begin)};
}

// The turns of all sums of a kind.
int64_t KindTurns(const Parameters& parameters, const Spans& spans, const Kind& kind,
                  const Tile& tile, int64_t vectors) {
  int64_t turns = 0;
  for (int64_t r = 0; r < parameters.row_spans; ++r) {
    turns += Turns(tile.images * InTile(spans.rows[r], tile).rows * kind.columns, vectors);
  }
  return turns * kind.chunks;
}

// The sums of one kind for all points of a tile of the batch. `x` and `out` are the first row's,
// `x_row` the floats between rows of `x`.
void SumKind(const Parameters& parameters, const Spans& spans, const Kind& kind,
             const Terms& prepared, const SumFunctions& functions, const Tile& tile,
             const Panel& panel, const float* taps, const float* x, int64_t x_row, float* out,
             Fetching* fetching) {
  const Tiles& tiles = parameters.tiles;
  Panel whole = panel;  // Sums are kept with zeros for the channels that are missing.
  whole.channels = panel.vectors * kLanes;
  Sums sums = {};
  sums.w = taps;
  sums.w_stride = whole.channels;
  const int64_t at_once = kBlocksAtOnce * kBlockPoints[panel.vectors];
  for (int64_t chunk = 0; chunk < kind.chunks; ++chunk) {
    sums.ahead = (PartBegin(kind.terms, kind.chunks, chunk + 1) -
                  PartBegin(kind.terms, kind.chunks, chunk)) *
                 sums.w_stride;
    sums.add = chunk > 0;
    const Term* terms = prepared.terms;
    const int32_t* begins = prepared.chunks + chunk;
    const Point* points = prepared.points;
    for (int64_t r = 0; r < parameters.row_spans; ++r) {
      const Span& span = spans.rows[r];
      const SpanInTile here = InTile(span, tile);
      const int64_t count = tile.images * here.rows * kind.columns;
      const int64_t turns = Turns(count, panel.vectors);
      sums.terms = terms + begins[0];
      sums.num_terms = begins[1] - begins[0];
      sums.out = out + here.begin * kind.columns * kSumWidth;
      for (int64_t turn = 0; turn < turns; ++turn) {
        const int64_t first = turn * at_once;
        SumPoints(functions, whole, x + here.begin * x_row, points + first,
                  Min(at_once, count - first), sums);
        FetchDue(1, &fetching->input);
        FetchDue(1, &fetching->output);
      }
      terms += kind.terms;
      begins += kind.chunks + 1;
      points += tiles.images * Min(tiles.rows, span.end - span.begin) * kind.columns;
    }
  }
}

// Transforms the sums of a panel back, adds those of single taps, and stores results.
void Finish(const KsArguments& arguments, const Parameters& parameters, const Tile& tile,
            const Panel& panel, const float* sums) {
  const KsGeometry& geometry = arguments.geometry;
  const int64_t point = SumsOfPoint(parameters), channels = geometry.out_channels;
  const float* singles = parameters.singles.terms > 0 ? sums + kPoints * point : nullptr;
  const Epilogue epilogue = MakeEpilogue(arguments);
  const Vec least = Splat(epilogue.least), most = Splat(epilogue.most);
  const int64_t rows = tile.images * tile.rows;
  for (int64_t r = 0; r < rows; ++r) {
    // Several images come with all of their rows.
    const int64_t first =
        ((tile.first_image * geometry.out_height + tile.first_row + r) * geometry.out_width) *
            channels +
        panel.first_vector * kLanes;
    for (int64_t x = 0; x < geometry.out_width; x += kTileColumns) {
      const float* from = sums + (r * parameters.tap_rows.columns + x / kTileColumns) * kSumWidth;
      for (int64_t v = 0; v < panel.vectors; ++v) {
        Vec of_points[kPoints], results[kTileColumns];
        KS_UNROLL
        for (int p = 0; p < kPoints; ++p) of_points[p] = Load(from + p * point + v * kLanes);
        TransformSums(of_points, results);
        const int64_t count = Min(kLanes, panel.channels - v * kLanes);
        const int64_t channel = (panel.first_vector + v) * kLanes;
        Vec bias = {};
        if (epilogue.bias != nullptr) {
          bias = count == kLanes ? Load(epilogue.bias + channel)
                                 : LoadFirst(epilogue.bias + channel, count);
        }
        KS_UNROLL
        for (int q = 0; q < kTileColumns; ++q) {
          if (x + q >= geometry.out_width) break;
          const int64_t at = first + (x + q) * channels + v * kLanes;
          Vec result = results[q];
          if (singles != nullptr) {
            result += Load(singles + (r * geometry.out_width + x + q) * kSumWidth + v * kLanes);
          }
          result += bias;
          if (epilogue.residual != nullptr) {
            result += count == kLanes ? Load(epilogue.residual + at)
                                      : LoadFirst(epilogue.residual + at, count);
          }
          result = Clamp(result, least, most);
          if (count < kLanes) {
            StoreFirst(arguments.output + at, result, count);
          } else if (parameters.stream) {
            Stream(arguments.output + at, result);
          } else {
            Store(arguments.output + at, result);
          }
        }
      }
    }
  }
}

// Fetches the rows of a tile of the batch in `steps` steps: a line to a lane, and on from there.
void FetchTile(const KsArguments& arguments, const Tile& tile, int64_t steps, Upcoming* upcoming) {
  const KsGeometry& geometry = arguments.geometry;
  const int64_t row = geometry.in_width * geometry.in_channels;
  const int64_t y = Max(0, tile.first_row - geometry.pad_top);
  const int64_t last = Min(geometry.in_height, tile.first_row - geometry.pad_top + tile.rows +
                                                   geometry.kernel_height - 1);
  const int64_t rows = (tile.images - 1) * geometry.in_height + Max(0, last - y);
  const float* from = arguments.input + (tile.first_image * geometry.in_height + y) * row;
  for (int l = 0; l < kLanes; ++l) {
    upcoming->pixels[l] = reinterpret_cast<intptr_t>(from) + l * KS_ALIGNMENT;
  }
  FetchPixelsIn(steps, 1, CeilDiv(rows * row * 4, kLanes * KS_ALIGNMENT), KS_ALIGNMENT, 0,
                kLanes * KS_ALIGNMENT, upcoming);
}
// Likewise where the results of a panel go: a pixel to a lane.
void FetchResults(const KsArguments& arguments, const Tile& tile, const Panel& panel, int64_t steps,
                  Upcoming* upcoming) {
  const KsGeometry& geometry = arguments.geometry;
  const int64_t pixel = geometry.out_channels * 4;
  const int64_t first =
      (tile.first_image * geometry.out_height + tile.first_row) * geometry.out_width;
  const int64_t pixels = tile.images * tile.rows * geometry.out_width;
  for (int l = 0; l < kLanes; ++l) {
    upcoming->pixels[l] = reinterpret_cast<intptr_t>(arguments.output) + (first + l) * pixel +
                          panel.first_vector * kLanes * 4;
  }
  FetchPixelsIn(steps, 1, CeilDiv(pixels, kLanes), panel.channels * 4, 0, kLanes * pixel, upcoming);
}

// `next` is the tile to be transformed after this one, or null.
void ComputeTile(const KsArguments& arguments, const Parameters& parameters, const Spans& spans,
                 const Prepared& prepared, const SumFunctions& functions, const Tile& tile,
                 const Tile* next, const float* x, const float* transformed, int64_t panel_begin,
                 int64_t panel_end, float* sums) {
  const Panels panels = MakePanels(arguments.geometry.out_channels);
  const Transformed shape = TransformedShape(parameters);
  const int64_t point_sums = SumsOfPoint(parameters);
  Fetching fetching;
  FetchNothing(&fetching.input);
  FetchNothing(&fetching.output);
  for (int64_t i = panel_begin; i < panel_end; ++i) {
    const Panel panel = PanelAt(panels, i);
    const int64_t first = panel.first_vector * kLanes, width = panel.vectors * kLanes;
    const int64_t terms = parameters.tap_rows.terms;
    int64_t turns =
        kPoints * KindTurns(parameters, spans, parameters.tap_rows, tile, panel.vectors);
    if (parameters.singles.terms > 0) {
      turns += KindTurns(parameters, spans, parameters.singles, tile, panel.vectors);
    }
    if (parameters.fetch_input && next != nullptr && i == panel_begin) {
      FetchTile(arguments, *next, turns * (panel_end - panel_begin), &fetching.input);
    }
    if (parameters.fetch_output) {
      FetchResults(arguments, tile, panel, turns, &fetching.output);
    }
    for (int64_t p = 0; p < kPoints; ++p) {
      SumKind(parameters, spans, parameters.tap_rows, prepared.tap_rows, functions, tile, panel,
              prepared.point_taps + terms * (kPoints * first + p * width),
              transformed + p * shape.point, shape.row, sums + p * point_sums, &fetching);
    }
    if (parameters.singles.terms > 0) {
      SumKind(parameters, spans, parameters.singles, prepared.singles, functions, tile, panel,
              prepared.single_taps + parameters.singles.terms * first, x,
              parameters.tiles.row_stride, sums + kPoints * point_sums, &fetching);
    }
    Finish(arguments, parameters, tile, panel, sums);
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
    const int64_t points = tiles.images * (span.end - span.begin) * kind.columns;
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
  const double columns = static_cast<double>(parameters.tap_rows.columns);
  double cycles = kPoints * KindCost(geometry, parameters, spans, parameters.tap_rows);
  if (parameters.singles.terms > 0) {
    cycles += KindCost(geometry, parameters, spans, parameters.singles);
  }
  cycles *= static_cast<double>(panels.count);
  cycles += rows * columns * static_cast<double>(panels.vectors) * 16;
  // Pixels of less than a cache line are not padded to vectors.
  cycles += padded_rows * columns * CeilDiv(geometry.in_channels, kLanes) *
            (geometry.in_channels < kLineChannels ? 40 : 16);
  if (tiles.copied) cycles += padded_rows * tiles.row_stride * (4.0 / 16);
  // Taps that the second-level cache does not hold come from afar for each tile.
  const double taps = static_cast<double>(FilterBytes(geometry, parameters));
  if (taps > kNearTaps) cycles += tiles.row_tiles * taps * 0.01;
  return cycles;
}

// All of the parameters but how the work is cut into items. Returns the cost, negative when this
// routine does not take the arguments.
double Choose(const KsArguments& arguments, Parameters* parameters, Spans* spans) {
  const KsGeometry& geometry = arguments.geometry;
  if (geometry.kernel_width != kTaps || geometry.stride_height != 1 || geometry.stride_width != 1 ||
      geometry.dilation_height != 1 || geometry.dilation_width != 1 || geometry.out_channels == 0) {
    return -1;
  }
  *parameters = {};
  KsGeometry whole = geometry;  // Of whole tiles.
  whole.out_width = RoundUp(geometry.out_width, kTileColumns);
  if (!PlanTiles(whole, true, &parameters->tiles, kPixelBytes)) return -1;
  Tiles& tiles = parameters->tiles;
  if (tiles.row_tiles == 1) {
    // Taps are more at six points: few pixels would use them too seldom. Each point's pixels are
    // still few enough for the cache.
    const int64_t enough = Min(CeilDiv(kEnoughPixels, whole.out_height * whole.out_width),
                               kMostTileBytes / (4 * Max(1, tiles.image_stride)));
    tiles.groups = CeilDiv(geometry.batch, Max(tiles.images, Min(geometry.batch, enough)));
    tiles.images = CeilDiv(geometry.batch, tiles.groups);
  }
  Kind& tap_rows = parameters->tap_rows;
  Kind& singles = parameters->singles;
  CountTerms(arguments, &tap_rows.terms, &singles.terms);
  const int64_t row_bytes = PanelAt(MakePanels(geometry.out_channels), 0).vectors * kLanes * 4;
  tap_rows.chunks = Max(1, CeilDiv(tap_rows.terms * row_bytes, kChunkBytes));
  singles.chunks = Max(1, CeilDiv(singles.terms * row_bytes, kChunkBytes));
  tap_rows.columns = whole.out_width / kTileColumns;
  singles.columns = geometry.out_width;
  double best = -1;
  for (int64_t split = 0; split < 2; ++split) {
    Parameters candidate = *parameters;
    Spans candidate_spans;
    candidate.split_rows = split;
    candidate.row_spans = MakeSpans(RowAxis(geometry), split != 0, candidate_spans.rows);
    if (candidate.row_spans == 0 ||
        (split != 0 &&
         candidate.row_spans * (tap_rows.terms + singles.terms) * 8 > kMostTermBytes)) {
      continue;
    }
    const double cost = GroupCost(geometry, candidate, candidate_spans) * candidate.tiles.groups +
                        kFilterByteCost * static_cast<double>(FilterBytes(geometry, candidate));
    if (best >= 0 && cost >= best) continue;
    best = cost;
    *parameters = candidate;
    *spans = candidate_spans;
  }
  return best;
}

}  // namespace

double ThinnedConv2DWinogradCost(const KsArguments& arguments) {
  Parameters parameters;
  Spans spans;
  return Choose(arguments, &parameters, &spans);
}

int ThinnedConv2DWinogradPlan(const KsArguments* arguments, KsPlan* plan) {
  const KsGeometry& geometry = arguments->geometry;
  memset(plan, 0, sizeof(*plan));
  Parameters parameters;
  Spans spans;
  const double cost = Choose(*arguments, &parameters, &spans);
  if (cost < 0) return 0;
  const Tiles& tiles = parameters.tiles;
  const int64_t num_tiles = NumTiles(tiles);
  const Panels panels = MakePanels(geometry.out_channels);
  parameters.splits = 1;
  if (num_tiles < kWantedItems / 2) {
    parameters.shared_tiles = 1;
    parameters.splits = Min(CeilDiv(kWantedItems, num_tiles), panels.count);
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
  stage->items = CeilDiv(parameters.tap_rows.terms, kRowsOfItem) +
                 CeilDiv(parameters.singles.terms, kRowsOfItem);
  stage->cost = 100 + kRowsOfItem * geometry.out_channels;
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

void ThinnedConv2DWinogradRun(const KsArguments* arguments, const KsPlan* plan, int32_t stage,
                              int64_t begin, int64_t end, const KsMemory* memory) {
  const KsGeometry& geometry = arguments->geometry;
  Parameters parameters = LoadParameters<Parameters>(plan);
  const Tiles& tiles = parameters.tiles;
  Spans spans;
  MakeSpans(RowAxis(geometry), parameters.split_rows != 0, spans.rows);
  const Prepared prepared = PlacePrepared(geometry, parameters, spans, *memory);
  if (stage == 0) {
    const Transformed shape = TransformedShape(parameters);
    SortTerms(*arguments, prepared);
    MakeTerms(*arguments, parameters, spans, parameters.tap_rows, prepared.rows, kTaps,
              {tiles.padded_rows * shape.row, shape.row, shape.tile, 0}, prepared.tap_rows);
    MakeTerms(*arguments, parameters, spans, parameters.singles, prepared.order, 1,
              {tiles.image_stride, tiles.row_stride, tiles.pixel_stride, tiles.pixel_stride},
              prepared.singles);
    return;
  }
  if (stage == 1) {
    const int64_t tap_row_items = CeilDiv(parameters.tap_rows.terms, kRowsOfItem);
    for (int64_t item = begin; item < end; ++item) {
      if (item < tap_row_items) {
        PackTapRows(*arguments, parameters, prepared, item * kRowsOfItem,
                    Min(parameters.tap_rows.terms, (item + 1) * kRowsOfItem));
        continue;
      }
      const int64_t first = (item - tap_row_items) * kRowsOfItem;
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
  const SumFunctions functions = AllSumFunctions();
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
    ComputeTile(*arguments, parameters, spans, prepared, functions, tile, last ? nullptr : &next,
                TileData(tiles, tile, arguments->input, copy), transformed,
                PartBegin(panels, parameters.splits, split),
                PartBegin(panels, parameters.splits, split + 1), sums);
  }
  if (parameters.stream) StreamEnd();
}

}  // namespace KS_ISA
}  // namespace ks
