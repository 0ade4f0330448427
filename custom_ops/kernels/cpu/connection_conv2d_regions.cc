// Copyright 2026 The keras_sparse Authors. Licensed under the Apache License, Version 2.0.
//
// Connection-table convolution with stride 1, forward and gradient with respect to the input.
//
// The images of the batch are cut into equal regions, and a lane of a vector is a region: vector
// (r, c) of a channel's plane holds source pixel (r, c) of kLanes regions. Every tap of every
// output pixel is then an aligned load, whatever the width of the images, and one loaded vector
// feeds the sums of all output pixels that its pixel reaches: the weights of a connection and the
// sums of a block of output pixels stay in registers. An unstructured sparse convolution needs a
// load for each multiply-add; this one needs a load for two to five.
//
//   group    kLanes regions; one after another, or several pieces of work on each when few
//   plane    [rows][columns][lanes] of one source channel of a group, with its margin of taps.
//            Where a region is as high (wide) as the image there is no margin above and below (left
//            and right): taps that fall into the padding are skipped.
//   block    the output pixels of a region whose sums stay in registers
//
// Source channels are taken in several parts when their planes together would not fit the cache;
// sums then pass through memory from part to part. The gradient with respect to the input is the
// same convolution of out_backprop over the transposed table with flipped taps.
//
// With one tap a multiply-add takes a load of its own. The parts of the source channels are then
// chosen so that their planes stay in the L1 cache (see region_sums.h, which has the sums).
//
// With 3x3 taps and connections enough to pay for it, ConnectionConv2DWinograd does the same on
// planes that hold the rows of the source at the six points of winograd.h, with half the
// multiply-adds (see "Points").

#include "custom_ops/kernels/cpu/epilogue.h"
#include "custom_ops/kernels/cpu/fetch.h"
#include "custom_ops/kernels/cpu/planes.h"
#include "custom_ops/kernels/cpu/region_sums.h"
#include "custom_ops/kernels/cpu/routines.h"
#include "custom_ops/kernels/cpu/transposed_table.h"
#include "custom_ops/kernels/cpu/winograd.h"

namespace ks {
namespace KS_ISA {
namespace {

// Rows and columns are those of the images, except that they trade places for kernels of one
// column: these run as kernels of one row.
struct Parameters {
  int64_t batch, height, width, channels;  // Of the source.
  int64_t source_image;                    // Floats from one image of it to the next,
  int64_t source_row, source_column;       // from one row, column of a region to the next.
  int64_t rows, columns, out_channels;     // Of the sums.
  // Sums whose largest is a result: squares of pool x pool; 1 or 2, whole squares in a block.
  int64_t pool;
  int64_t result_row, result_column;  // Floats from one row, column of the result to the next.
  int64_t kernel_height, kernel_width;
  int64_t pad_top, pad_left;
  // 1: one tap on one long row of pixels. The lanes are then neighbouring pixels, the columns of a
  // region kLanes pixels apart, and memory is read and written in one stream.
  int64_t interleaved;
  int64_t pointwise;  // 1: one tap,
  int64_t paired;     // 1: by pairs of result channels.

  int64_t region_rows, region_columns;  // Sums of a region.
  int64_t regions_high, regions_wide;   // Of an image.
  int64_t groups;
  int64_t origin_row, origin_column;  // Source pixel at (0, 0) of a plane, seen from the region.
  int64_t plane_rows, plane_columns;
  int64_t plane_size;                // Floats.
  int64_t lead;                      // Floats before the first plane that pointers may go back.
  int64_t blocks_high, blocks_wide;  // Of a region.
  int64_t parts;                     // Of the source channels.
  int64_t together;                  // Result channels whose sums are kept at a time.
  int64_t tile_stride;               // Floats from the sums of one result channel to the next.
  // Points whose sums are computed at a time, or 0: without points. With points a region is one
  // tile wide and one block, and a channel has a plane for each set of points, [points][plane_rows]
  // [lanes]: the planes of a set follow each other, so that few pages of memory are in use.
  int64_t points;
  int64_t set_size;  // Floats from the planes of one set to those of the next.

  int64_t transposed;     // 1: stage 0 transposes the table, stage 1 the filter.
  int64_t shared_planes;  // 1: a stage of its own packs all planes, the next one computes.
  int64_t splits;         // Parts of the result's channels, one item each.
};

// --- Packing -------------------------------------------------------------------------------------

// Where the regions of a group lie.
struct Regions {
  intptr_t
      source[kLanes];  // Address of the source pixel at (0, 0) of the plane, in the image or not
  int64_t row_begin[kLanes], row_end[kLanes];  // The part of the plane that is in the image;
  int64_t column_begin[kLanes], column_end[kLanes];
  int64_t result[kLanes];                 // offset of the first pixel of the result
  int64_t rows[kLanes], columns[kLanes];  // and how many of the region's are in it.
};

void FindRegions(const Parameters& p, int64_t group, const float* source, Regions* regions) {
  if (p.interleaved) {
    for (int64_t l = 0; l < kLanes; ++l) {
      const int64_t pixel = group * kLanes * p.region_columns + l;
      regions->source[l] = reinterpret_cast<intptr_t>(source) + 4 * pixel * p.channels;
      regions->row_begin[l] = regions->column_begin[l] = 0;
      regions->row_end[l] = regions->rows[l] = 1;
      regions->column_end[l] = regions->columns[l] =
          Min(p.region_columns, Max(0, CeilDiv(p.width - pixel, kLanes)));
      regions->result[l] = pixel * p.out_channels;
    }
    return;
  }
  for (int64_t l = 0; l < kLanes; ++l) {
    const int64_t region = group * kLanes + l;
    const int64_t column = region % p.regions_wide * p.region_columns;
    const int64_t row = region / p.regions_wide % p.regions_high * p.region_rows;
    const int64_t image = region / p.regions_wide / p.regions_high;
    const bool used = image < p.batch;
    const int64_t y = row + p.origin_row, x = column + p.origin_column;
    regions->source[l] = reinterpret_cast<intptr_t>(source) +
                         4 * (image * p.source_image + y * p.source_row + x * p.source_column);
    regions->row_begin[l] = Max(0, -y);
    regions->row_end[l] = used ? Min(p.plane_rows, p.height - y) : 0;
    regions->column_begin[l] = Max(0, -x);
    regions->column_end[l] = Min(p.plane_columns, p.width - x);
    regions->result[l] = image * (p.rows / p.pool) * (p.columns / p.pool) * p.out_channels +
                         row / p.pool * p.result_row + column / p.pool * p.result_column;
    regions->rows[l] = used ? Min(p.region_rows, p.rows - row) / p.pool : 0;
    regions->columns[l] = Min(p.region_columns, p.columns - column) / p.pool;
  }
}

// How far ahead of the pixel that is packed memory is fetched, for each lane. More would push out
// of the L1 cache what comes first.
constexpr int64_t kFloatsAhead = 128;

// Whether a vector of channels is the first in its cache line: one fetch for all of them.
KS_INLINE bool StartsLine(int64_t channel) {
  return kLanes >= kLineFloats || channel % kLineFloats == 0;
}

// Fills the planes of source channels [begin, end); `planes` is the plane of `begin`. `zeros` is as
// long as a pixel.
void PackPlanes(const Parameters& p, const Regions& regions, int64_t begin, int64_t end,
                const float* zeros, float* planes) {
  const intptr_t zero = reinterpret_cast<intptr_t>(zeros);
  const int64_t channels = end - begin;
  const int64_t pixels_ahead = CeilDiv(kFloatsAhead, channels);
  for (int64_t r = 0; r < p.plane_rows; ++r) {
    int64_t column_begin[kLanes], column_end[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      const bool inside = r >= regions.row_begin[l] && r < regions.row_end[l];
      column_begin[l] = regions.column_begin[l];
      column_end[l] = inside ? regions.column_end[l] : 0;
    }
    for (int64_t c = 0; c < p.plane_columns; ++c) {
      const int64_t offset = 4 * (r * p.source_row + c * p.source_column);
      // The pixel some way on, in the image or not.
      int64_t next_row = r, next_column = c + pixels_ahead;
      for (; next_column >= p.plane_columns; next_column -= p.plane_columns) ++next_row;
      const int64_t later = 4 * (next_row * p.source_row + next_column * p.source_column);
      intptr_t pixels[kLanes];
      for (int l = 0; l < kLanes; ++l) {
        const bool inside = c >= column_begin[l] && c < column_end[l];
        pixels[l] = inside ? regions.source[l] + offset : zero;
      }
      float* target = planes + (r * p.plane_columns + c) * kLanes;
      if (end - begin < kLanes) {
        for (int64_t channel = begin; channel < end; ++channel) {
          for (int l = 0; l < kLanes; ++l) {
            target[(channel - begin) * p.plane_size + l] =
                reinterpret_cast<const float*>(pixels[l])[channel];
          }
        }
        continue;
      }
      for (int64_t next = begin; next < end; next += kLanes) {
        // The last channels overlap those before rather than being fewer.
        const int64_t channel = Min(next, end - kLanes);
        Vec lanes[kLanes];
        const int64_t ahead =
            next + kFloatsAhead < end
                ? offset + 4 * (channel + kFloatsAhead)
                : later +
                      4 * (channels > kFloatsAhead ? channel + kFloatsAhead - channels : channel);
        KS_UNROLL
        for (int l = 0; l < kLanes; ++l) {
          lanes[l] = Load(reinterpret_cast<const float*>(pixels[l]) + channel);
          if (!StartsLine(next - begin)) continue;
          FetchFar(regions.source[l] + ahead);
        }
        StoreColumns(lanes, target + (channel - begin) * p.plane_size, p.plane_size);
      }
    }
  }
}

// A row of a channel's plane before its transformation: floats, an odd number of vectors so that
// those of different channels do not fall into the same cache sets.
constexpr int64_t kPointRow = (kPoints | 1) * kLanes;

// PackPlanes with the source at its points; at least kLanes channels. `row` holds kLanes rows.
void PackPoints(const Parameters& p, const Regions& regions, int64_t begin, int64_t end,
                const float* zeros, float* row, float* planes) {
  constexpr int64_t kAhead = kLanes > kLineFloats ? kLanes : kLineFloats;
  int64_t steps[kPoints];  // From the first point to each.
  for (int64_t t = 0; t < kPoints; ++t) {
    steps[t] = t / p.points * p.set_size + t % p.points * p.plane_rows * kLanes;
  }
  for (int64_t r = 0; r < p.plane_rows; ++r) {
    intptr_t pixels[kPoints][kLanes];
    for (int l = 0; l < kLanes; ++l) {
      const bool inside = r >= regions.row_begin[l] && r < regions.row_end[l];
      const int64_t column_end = inside ? regions.column_end[l] : 0;
      intptr_t pixel = regions.source[l] + 4 * r * p.source_row;
      for (int64_t c = 0; c < kPoints; ++c, pixel += 4 * p.source_column) {
        pixels[c][l] = c >= regions.column_begin[l] && c < column_end
                           ? pixel
                           : reinterpret_cast<intptr_t>(zeros);
      }
    }
    for (int64_t next = begin; next < end; next += kLanes) {
      // The last channels overlap those before rather than being fewer.
      const int64_t channel = Min(next, end - kLanes);
      // What is packed next: more channels of these pixels, or those of the row below.
      const int64_t ahead = next + kAhead < end ? 4 * (channel + kAhead + r * p.source_row)
                                                : 4 * (begin + (r + 1) * p.source_row);
      for (int64_t c = 0; c < kPoints; ++c) {
        Vec lanes[kLanes];
        KS_UNROLL
        for (int l = 0; l < kLanes; ++l) {
          lanes[l] = Load(reinterpret_cast<const float*>(pixels[c][l]) + channel);
          if (!StartsLine(next - begin)) continue;
          FetchFar(regions.source[l] + ahead + 4 * c * p.source_column);
        }
        StoreColumns(lanes, row + c * kLanes, kPointRow);
      }
      for (int64_t i = 0; i < kLanes; ++i) {
        float* to = planes + (channel - begin + i) * p.plane_size + r * kLanes;
        Vec columns[kPoints], points[kPoints];
        KS_UNROLL
        for (int c = 0; c < kPoints; ++c) columns[c] = Load(row + i * kPointRow + c * kLanes);
        TransformSource(columns, points);
        KS_UNROLL
        for (int t = 0; t < kPoints; ++t) Store(to + steps[t], points[t]);
      }
    }
  }
}

// Source channels [begin, end) of a group without margins, to be fetched in `steps` steps.
void FetchPlanes(const Parameters& p, const Regions& regions, int64_t begin, int64_t end,
                 int64_t steps, Upcoming* upcoming) {
  for (int l = 0; l < kLanes; ++l) upcoming->pixels[l] = regions.source[l] + 4 * begin;
  FetchPixelsIn(steps, p.plane_rows, p.plane_columns, 4 * (end - begin), 4 * p.source_row,
                4 * p.source_column, upcoming);
}

// Fetches one cache line of every pixel of a block in lane `lane`, the one that holds `channel`:
// where StoreBlock will store, while the sums are computed. Where a lane has no pixel this names
// memory that may not exist, which a prefetch ignores.
KS_INLINE void FetchPixels(const Parameters& p, const Regions& regions, int64_t first_row,
                           int64_t first_column, int64_t rows, int64_t columns, int64_t lane,
                           int64_t channel, const float* data) {
  intptr_t row =
      reinterpret_cast<intptr_t>(data) + 4 * (regions.result[lane] + first_row * p.result_row +
                                              first_column * p.result_column + channel);
  for (int64_t r = 0; r < rows; ++r, row += 4 * p.result_row) {
    intptr_t pixel = row;
    for (int64_t c = 0; c < columns; ++c, pixel += 4 * p.result_column) {
      FetchFar(pixel);
    }
  }
}

constexpr float kLowest = -__FLT_MAX__;  // What the largest of sums starts from.

// The largest of two sums, and `a` where `b` is NaN.
KS_INLINE Vec Larger(Vec a, Vec b) { return b > a ? b : a; }

// Stores the sums of a block of rows x columns pixels of the result from (first_row, first_column)
// of the regions on: those of result channel begin + i are at sums + i * stride, kPool * kPool for
// a pixel. Pixels outside the images go to `sink`, as long as a pixel. kStream: past the caches;
// `begin` and `end` are then multiples of kLineFloats. kFinish: with the epilogue.
template <bool kStream, bool kFinish, int kPool>
void StoreBlock(const Parameters& p, const Regions& regions, int64_t first_row,
                int64_t first_column, int64_t rows, int64_t columns, int64_t begin, int64_t end,
                const float* sums, int64_t stride, const Epilogue& epilogue, float* sink,
                float* output) {
  const intptr_t sink_address = reinterpret_cast<intptr_t>(sink);
  const intptr_t residual = reinterpret_cast<intptr_t>(epilogue.residual);
  const int64_t sums_row = columns * kPool * kLanes;
  for (int64_t r = first_row; r < first_row + rows; ++r, sums += (kPool - 1) * sums_row) {
    for (int64_t c = first_column; c < first_column + columns; ++c, sums += kPool * kLanes) {
      const intptr_t target =
          reinterpret_cast<intptr_t>(output) + 4 * (r * p.result_row + c * p.result_column);
      const intptr_t source = residual + 4 * (r * p.result_row + c * p.result_column);
      intptr_t pixels[kLanes], residuals[kLanes];
      for (int l = 0; l < kLanes; ++l) {
        const bool inside = r < regions.rows[l] && c < regions.columns[l];
        pixels[l] = inside ? target + 4 * regions.result[l] : sink_address;
        // A lane without a pixel reads the first one.
        if (kFinish) residuals[l] = inside ? source + 4 * regions.result[l] : residual;
      }
      const float* from = sums;
      // The results of kLanes channels, a vector for each lane's pixel.
      const auto take = [&](int64_t channel, Vec(&lanes)[kLanes]) {
        KS_UNROLL
        for (int l = 0; l < kLanes; ++l) {
          lanes[l] = Load(from + l * stride);
          if (kPool == 1) continue;
          lanes[l] = Larger(Splat(kLowest), lanes[l]);
          KS_UNROLL
          for (int i = 1; i < kPool * kPool; ++i) {
            const float* sum = from + l * stride + i / kPool * sums_row + i % kPool * kLanes;
            lanes[l] = Larger(lanes[l], Load(sum));
          }
        }
        from += kLanes * stride;
        Transpose(lanes);
        if (kFinish) {
          FinishPixels(epilogue, channel, Min(kLanes, end - channel), residuals, lanes);
        }
      };
      if (kStream) {
        for (int64_t channel = begin; channel < end; channel += kLineFloats) {
          // All of a cache line at once: past the caches, parts of it would go out one by one.
          constexpr int kFirst = kLineFloats - kLanes;
          float firsts[kLanes][kFirst > 0 ? kFirst : 1];
          Vec lanes[kLanes];
          for (int i = 0; i < kFirst; i += kLanes) {
            take(channel + i, lanes);
            KS_UNROLL
            for (int l = 0; l < kLanes; ++l) Store(firsts[l] + i, lanes[l]);
          }
          take(channel + kFirst, lanes);
          KS_UNROLL
          for (int l = 0; l < kLanes; ++l) {
            float* pixel = reinterpret_cast<float*>(pixels[l]) + channel;
            // The sink stays in the cache.
            const bool past = pixels[l] != sink_address;
            for (int i = 0; i < kFirst; i += kLanes) {
              const Vec first = Load(firsts[l] + i);
              past ? Stream(pixel + i, first) : Store(pixel + i, first);
            }
            past ? Stream(pixel + kFirst, lanes[l]) : Store(pixel + kFirst, lanes[l]);
          }
        }
        continue;
      }
      for (int64_t channel = begin; channel < end; channel += kLanes) {
        Vec lanes[kLanes];
        take(channel, lanes);
        if (end - channel >= kLanes) {
          KS_UNROLL
          for (int l = 0; l < kLanes; ++l) {
            Store(reinterpret_cast<float*>(pixels[l]) + channel, lanes[l]);
          }
          continue;
        }
        float buffer[kLanes][kLanes];
        KS_UNROLL
        for (int l = 0; l < kLanes; ++l) Store(buffer[l], lanes[l]);
        for (int l = 0; l < kLanes; ++l) {
          float* pixel = reinterpret_cast<float*>(pixels[l]) + channel;
          for (int64_t i = 0; i < end - channel; ++i) pixel[i] = buffer[l][i];
        }
      }
    }
  }
}

typedef void (*StoreFunction)(const Parameters& p, const Regions& regions, int64_t first_row,
                              int64_t first_column, int64_t rows, int64_t columns, int64_t begin,
                              int64_t end, const float* sums, int64_t stride,
                              const Epilogue& epilogue, float* sink, float* output);

// --- The table, cut into parts -------------------------------------------------------------------

struct Table {
  const int32_t* row_splits;
  const int32_t* channels;
  const float* filter;
  // Part s of the connections of result channel o is [starts[s][o], starts[s + 1][o]).
  int32_t* starts;  // [parts + 1][out_channels]
  // Result channels by how many connections they have in a part, within those that are computed
  // together: the processor then predicts where loops over connections end.
  int32_t* order;  // [parts][out_channels]
  // One tap: see Lists.
  int32_t* begins;   // [parts * NumLists() + 1]
  int32_t* offsets;  // [kept]
  int32_t* sources;  // [kept]: where the weights are in the caller's filter.
  float* weights;    // [kept]
};

// Source channels [PartChannel(s), PartChannel(s + 1)) are part s: whole vectors, and at least
// kLanes of them when there are several parts.
KS_INLINE int64_t PartChannel(const Parameters& p, int64_t part) {
  return part == p.parts ? p.channels
                         : PartBegin(CeilDiv(p.channels, kLanes), p.parts, part) * kLanes;
}

// Result channels of split s begin here.
KS_INLINE int64_t SplitChannel(const Parameters& p, int64_t split) {
  return Min(p.out_channels,
             PartBegin(CeilDiv(p.out_channels, kLineFloats), p.splits, split) * kLineFloats);
}

void SortByLength(const int32_t* begin, const int32_t* end, int64_t first, int64_t last,
                  int32_t* order) {
  constexpr int kLengths = 256;
  int32_t places[kLengths + 1] = {};
  const auto length = [begin, end](int64_t o) {
    return Min(kLengths - 1, static_cast<int64_t>(end[o]) - begin[o]);
  };
  if (last - first <= kLanes) {
    for (int64_t o = first; o < last; ++o) {
      int64_t at = o;
      for (; at > first && length(order[at - 1]) > length(o); --at) order[at] = order[at - 1];
      order[at] = static_cast<int32_t>(o);
    }
    return;
  }
  for (int64_t o = first; o < last; ++o) ++places[length(o) + 1];
  for (int i = 0; i < kLengths; ++i) places[i + 1] += places[i];
  for (int64_t o = first; o < last; ++o) {
    order[first + places[length(o)]++] = static_cast<int32_t>(o);
  }
}

void CutTable(const Parameters& p, const Table& table) {
  for (int64_t o = 0; o < p.out_channels; ++o) {
    int64_t at = table.row_splits[o];
    const int64_t end = table.row_splits[o + 1];
    table.starts[o] = static_cast<int32_t>(at);
    for (int64_t part = 1; part < p.parts; ++part) {
      const int64_t channel = PartChannel(p, part);
      int64_t high = end;
      while (at < high) {
        const int64_t middle = (at + high) / 2;
        if (table.channels[middle] < channel) {
          at = middle + 1;
        } else {
          high = middle;
        }
      }
      table.starts[part * p.out_channels + o] = static_cast<int32_t>(at);
    }
    table.starts[p.parts * p.out_channels + o] = static_cast<int32_t>(end);
  }
  for (int64_t part = 0; part < p.parts; ++part) {
    const int32_t* starts = table.starts + part * p.out_channels;
    for (int64_t split = 0; split < p.splits; ++split) {
      const int64_t end = SplitChannel(p, split + 1);
      for (int64_t o = SplitChannel(p, split); o < end; o += p.together) {
        SortByLength(starts, starts + p.out_channels, o, Min(end, o + p.together),
                     table.order + part * p.out_channels);
      }
    }
  }
}

// Lists of a part.
int64_t NumLists(const Parameters& p) {
  return p.paired ? CeilDiv(p.out_channels, 2) * 3 : p.out_channels;
}

// Lays out the connections of all parts. Those of a transposed table have come from places `from`.
void LayLists(const Parameters& p, const Table& table, const int32_t* from) {
  int32_t at = 0;
  int32_t* begin = table.begins;
  for (int64_t part = 0; part < p.parts; ++part) {
    const int32_t* starts = table.starts + part * p.out_channels;
    const int32_t* ends = starts + p.out_channels;
    const int32_t* order = table.order + part * p.out_channels;
    const int64_t first = PartChannel(p, part);
    const auto lay = [&](int32_t c) {
      table.offsets[at] = static_cast<int32_t>((table.channels[c] - first) * p.plane_size);
      table.sources[at++] = from == nullptr ? c : from[c];
    };
    for (int64_t k = 0; k < p.out_channels; k += p.paired ? 2 : 1) {
      *begin++ = at;
      const int32_t c_end = ends[order[k]];
      if (!p.paired) {
        for (int32_t c = starts[order[k]]; c < c_end; ++c) lay(c);
        continue;
      }
      const bool alone = k + 1 == p.out_channels;
      const int32_t d_begin = alone ? 0 : starts[order[k + 1]];
      const int32_t d_end = alone ? 0 : ends[order[k + 1]];
      // Those of both, of the first and of the second; channels ascend.
      for (int list = 0; list < 3; ++list) {
        if (list > 0) *begin++ = at;
        int32_t c = starts[order[k]], d = d_begin;
        while (c < c_end || d < d_end) {
          const int32_t c_channel = c < c_end ? table.channels[c] : INT32_MAX;
          const int32_t d_channel = d < d_end ? table.channels[d] : INT32_MAX;
          if (list == 0 && c_channel == d_channel) {
            lay(c);
            lay(d);
          }
          if (list == 1 && c_channel < d_channel) lay(c);
          if (list == 2 && d_channel < c_channel) lay(d);
          c += c_channel <= d_channel;
          d += d_channel <= c_channel;
        }
      }
    }
  }
  *begin = at;
}

constexpr int64_t kWeightsOfItem = 4096;  // A piece of work that lays out weights.

// --- Compute -------------------------------------------------------------------------------------

struct Work {
  Parameters p;
  // Of a block with the least rows (columns) that a region's blocks have, or one more; and whether
  // its window holds padding.
  BlockFunction functions[2][2][2];
  PixelFunction sum_pixels;  // For one tap, instead.
  Table table;
  Regions regions;
  Upcoming upcoming;
  float* sums;   // [channels computed together][tile_stride]
  float* row;    // With points: a row of planes, or of results.
  float* zeros;  // [channels of the source]
  float* sink;   // [channels of the result]
  float* output;
  Epilogue epilogue;
  bool fetch;   // The result's memory is fetched before it is stored to.
  bool stream;  // Stores go past the caches.
};

constexpr int64_t kResultsAhead = 2;

// Fetches the first connections of a result channel; its block then fetches those that follow.
KS_INLINE void FetchTable(const Table& table, int64_t begin, int64_t end, int64_t taps) {
  const float* filter = table.filter + begin * taps;
  const int64_t floats = Min((end - begin) * taps, kFilterAhead);
  for (int64_t i = 0; i < floats; i += kLineFloats) __builtin_prefetch(filter + i);
  const int64_t channels = Min(end - begin, 2 * kLineFloats);
  for (int64_t i = 0; i < channels; i += kLineFloats) {
    __builtin_prefetch(table.channels + begin + i);
  }
}

// The memory of a block's results, and what is added to them, in result channels [begin, end): is
// fetched in the course of `steps` steps.
class UpcomingResults {
 public:
  UpcomingResults(const Work& work, int64_t row, int64_t column, int64_t rows, int64_t columns,
                  int64_t begin, int64_t end, int64_t steps)
      : row_(row),
        column_(column),
        rows_(rows),
        columns_(columns),
        begin_(begin),
        lines_(CeilDiv(end - begin, kLineFloats)),
        steps_(steps),
        data_{work.fetch && !work.stream ? work.output : nullptr,
              work.fetch ? work.epilogue.residual : nullptr} {}

  bool any() const { return data_[0] != nullptr || data_[1] != nullptr; }

  // Fetches what is due after `steps` more steps.
  KS_ALWAYS_INLINE void Fetch(const Work& work, int64_t steps) {
    if (!any()) return;
    due_ += steps * lines_ * kLanes;
    for (; due_ > 0 && fetched_ < lines_ * kLanes; ++fetched_, due_ -= steps_) {
      const int64_t lane = fetched_ / lines_, channel = begin_ + fetched_ % lines_ * kLineFloats;
      for (const float* data : data_) {
        if (data == nullptr) continue;
        FetchPixels(work.p, work.regions, row_, column_, rows_, columns_, lane, channel, data);
      }
    }
  }

 private:
  int64_t row_, column_, rows_, columns_, begin_, lines_, steps_;
  const float* data_[2];
  int64_t fetched_ = 0, due_ = 0;  // due_: times steps_.
};

// The function that stores this work's results, of kPool * kPool sums each.
template <int kPool>
StoreFunction FindStore(const Work& work) {
  const bool finish = work.epilogue.used;
  return work.stream ? (finish ? StoreBlock<true, true, kPool> : StoreBlock<true, false, kPool>)
                     : (finish ? StoreBlock<false, true, kPool> : StoreBlock<false, false, kPool>);
}

// Fills the planes of source channels [begin, end) of work.regions.
void PackPart(const Work& work, int64_t begin, int64_t end, float* planes) {
  if (work.p.points > 0) {
    PackPoints(work.p, work.regions, begin, end, work.zeros, work.row, planes);
  } else {
    PackPlanes(work.p, work.regions, begin, end, work.zeros, planes);
  }
}

// Blocks of a region's `size` rows or columns begin here, on whole squares of the pooling,
KS_INLINE int64_t BlockBegin(const Parameters& p, int64_t size, int64_t blocks, int64_t i) {
  return PartBegin(size / p.pool, blocks, i) * p.pool;
}
// and have as many of them or p.pool more.
KS_INLINE int64_t LeastOfBlock(const Parameters& p, int64_t size, int64_t blocks) {
  return size / p.pool / blocks * p.pool;
}

// Adds one part of the source channels to result channels [begin, end); stores them after the last.
void ComputePart(Work& work, int64_t part, int64_t begin, int64_t end, const float* planes) {
  const Parameters& p = work.p;
  const int64_t taps = p.kernel_height * p.kernel_width;
  const int32_t* starts = work.table.starts + part * p.out_channels;
  const int32_t* ends = starts + p.out_channels;
  const int32_t* order = work.table.order + part * p.out_channels;
  Block block;
  block.plane_size = p.plane_size;
  block.row_step = p.plane_columns * kLanes;
  block.kernel_height = p.kernel_height;
  block.accumulate = part > 0;
  PixelSums pixel_sums = {};
  if (p.pointwise) {
    pixel_sums = {{planes, work.table.offsets, work.table.weights,
                   work.table.begins + part * NumLists(p), order},
                  begin,
                  work.sums,
                  p.tile_stride,
                  part > 0};
  }
  planes -= PartChannel(p, part) * p.plane_size;  // Where channel 0 would be.
  float* sums = work.sums;
  for (int64_t i = 0; i < p.blocks_high; ++i) {
    const int64_t row = BlockBegin(p, p.region_rows, p.blocks_high, i);
    const int64_t rows = BlockBegin(p, p.region_rows, p.blocks_high, i + 1) - row;
    const int64_t window_row = row - p.pad_top - p.origin_row;
    block.row_begin = Max(0, -window_row);
    block.row_end = Min(rows + p.kernel_height - 1, p.plane_rows - window_row);
    for (int64_t j = 0; j < p.blocks_wide; ++j) {
      const int64_t column = BlockBegin(p, p.region_columns, p.blocks_wide, j);
      const int64_t columns = BlockBegin(p, p.region_columns, p.blocks_wide, j + 1) - column;
      const int64_t window_column = column - p.pad_left - p.origin_column;
      block.column_begin = Max(0, -window_column);
      block.column_end = Min(columns + p.kernel_width - 1, p.plane_columns - window_column);
      block.planes = planes + window_row * block.row_step + window_column * kLanes;
      const bool edge = block.row_begin > 0 || block.row_end < rows + p.kernel_height - 1 ||
                        block.column_begin > 0 || block.column_end < columns + p.kernel_width - 1;
      const BlockFunction function =
          p.pointwise
              ? nullptr
              : work.functions[rows > LeastOfBlock(p, p.region_rows, p.blocks_high)]
                              [columns > LeastOfBlock(p, p.region_columns, p.blocks_wide)][edge];
      // What is stored to and added at the end, a little before each result channel.
      const bool last_part = part == p.parts - 1;
      UpcomingResults results(work, row / p.pool, column / p.pool, rows / p.pool, columns / p.pool,
                              begin, end, end - begin);
      const bool fetches = last_part && results.any();
      // With one tap several channels at a time, all of them where nothing is fetched.
      int64_t step = !p.pointwise ? 1 : fetches ? 4 : end - begin;
      if (work.upcoming.units > 0) {
        step = Min(step, RoundUp(CeilDiv(work.upcoming.steps, work.upcoming.units), 4));
      }
      for (int64_t k = begin; k < end; k += step) {
        if (fetches) results.Fetch(work, step);
        if (p.pointwise) {
          FetchDue(Min(step, end - k), &work.upcoming);
          work.sum_pixels(pixel_sums, k, Min(end, k + step));
          continue;
        }
        FetchDue(1, &work.upcoming);
        const int64_t o = order[k];
        if (k + kResultsAhead < end) {
          const int64_t next = order[k + kResultsAhead];
          FetchTable(work.table, starts[next], ends[next], taps);
        }
        block.channels = work.table.channels + starts[o];
        block.filter = work.table.filter + starts[o] * taps;
        block.connections = ends[o] - starts[o];
        block.sums = sums + (o - begin) * p.tile_stride;
        if (block.connections > 0 || !block.accumulate) function(block);
      }
      if (last_part) {
        const StoreFunction store = p.pool == 2 ? FindStore<2>(work) : FindStore<1>(work);
        store(p, work.regions, row / p.pool, column / p.pool, rows / p.pool, columns / p.pool,
              begin, end, sums, p.tile_stride, work.epilogue, work.sink, work.output);
      }
      if (p.parts > 1) sums += rows * columns * kLanes;
    }
  }
}

// --- Points --------------------------------------------------------------------------------------

int64_t PointFilterBytes(int64_t kept) { return PieceBytes(kept * kPoints * kPointTaps, 4); }

// Lays out the filter of result channels [begin, end) for SumPoints: from where the table has its
// connections on, each set of kTogether points [connections][kTogether][kPointTaps]. Connections of
// a transposed table have come from places `from`, and their taps are flipped.
#ifdef KS_HAVE_PERMUTE
// Some weights at a time, each the sum of the three taps of a row.
template <int kTogether>
void LayPointsOf(const Table& table, const float* filter, const int32_t* from, int64_t begin,
                 int64_t end, float* to) {
  constexpr int kSetTaps = kTogether * kPointTaps;
  constexpr int kMostWeights = 9;
  constexpr int kWeights = kSetTaps < kMostWeights ? kSetTaps : kMostWeights;
  constexpr int kPieces = kPoints * kPointTaps / kWeights;
  Places places[kPieces][kPointTaps];
  Vec factors[kPieces][kPointTaps];
  for (int tap = 0; tap < kPointTaps; ++tap) {
    float taps[kPointTaps] = {}, points[kPoints];
    taps[tap] = 1;
    TransformTaps(taps, points);
    for (int piece = 0; piece < kPieces; ++piece) {
      int32_t sources[kLanes] = {};
      float of_tap[kLanes] = {};
      for (int l = 0; l < kWeights; ++l) {
        const int weight = piece * kWeights + l;
        const int source = weight % kPointTaps * kPointTaps + tap;
        sources[l] = from == nullptr ? source : kPointTaps * kPointTaps - 1 - source;
        of_tap[l] = points[weight / kPointTaps];
      }
      places[piece][tap] = LoadPlaces(sources);
      factors[piece][tap] = Load(of_tap);
    }
  }
  // A transposed table reads the filter in random order.
  constexpr int64_t kAhead = 12;
  const int64_t last = Max(0, int64_t{table.row_splits[end]} - 1);
  to += int64_t{table.row_splits[begin]} * kPoints * kPointTaps;
  for (int64_t o = begin; o < end; ++o) {
    const int64_t first = table.row_splits[o];
    const int64_t connections = table.row_splits[o + 1] - first;
    const int64_t set = connections * kSetTaps;
    for (int64_t c = 0; c < connections; ++c, to += kSetTaps) {
      if (from != nullptr) __builtin_prefetch(filter + from[Min(first + c + kAhead, last)] * 9);
      const Vec taps = LoadFirst(filter + (from == nullptr ? first + c : from[first + c]) * 9, 9);
      KS_UNROLL
      for (int piece = 0; piece < kPieces; ++piece) {
        Vec weights = factors[piece][0] * Permute(taps, places[piece][0]);
        KS_UNROLL
        for (int i = 1; i < kPointTaps; ++i) {
          weights += factors[piece][i] * Permute(taps, places[piece][i]);
        }
        constexpr int kOfSet = kSetTaps / kWeights;
        StoreFirst(to + piece / kOfSet * set + piece % kOfSet * kWeights, weights, kWeights);
      }
    }
    to += connections * (kPoints * kPointTaps - kSetTaps);
  }
}
#else
template <int kTogether>
void LayPointsOf(const Table& table, const float* filter, const int32_t* from, int64_t begin,
                 int64_t end, float* to) {
  constexpr int64_t kSetTaps = kTogether * kPointTaps;
  // A transposed table reads the filter in random order.
  constexpr int64_t kAhead = 12;
  const int64_t last = Max(0, int64_t{table.row_splits[end]} - 1);
  to += int64_t{table.row_splits[begin]} * kPoints * kPointTaps;
  for (int64_t o = begin; o < end; ++o) {
    const int64_t first = table.row_splits[o];
    const int64_t connections = table.row_splits[o + 1] - first;
    for (int64_t c = 0; c < connections; ++c, to += kSetTaps) {
      if (from != nullptr) __builtin_prefetch(filter + from[Min(first + c + kAhead, last)] * 9);
      const float* taps = filter + (from == nullptr ? first + c : from[first + c]) * 9;
      KS_UNROLL
      for (int i = 0; i < kPointTaps; ++i, taps += 3) {
        float points[kPoints];
        if (from == nullptr) {
          TransformTaps({taps[0], taps[1], taps[2]}, points);
        } else {
          TransformTaps({taps[2], taps[1], taps[0]}, points);
        }
        float* const row = to + (from == nullptr ? i : kPointTaps - 1 - i);
        KS_UNROLL
        for (int t = 0; t < kPoints; ++t) {
          row[t / kTogether * connections * kSetTaps + t % kTogether * kPointTaps] = points[t];
        }
      }
    }
    to += connections * (kPoints * kPointTaps - kSetTaps);
  }
}
#endif

void LayPoints(const Parameters& p, const Table& table, const float* filter, const int32_t* from,
               int64_t begin, int64_t end, float* to) {
  // A number of points that the compiler knows: a division for each weight took most of the time.
  const auto lay = p.points == 1   ? LayPointsOf<1>
                   : p.points == 2 ? LayPointsOf<2>
                   : p.points == 3 ? LayPointsOf<3>
                                   : LayPointsOf<6>;
  lay(table, filter, from, begin, end, to);
}

// A row of kTileColumns results of one channel: floats, an odd number of vectors.
constexpr int64_t kResultRow = (kTileColumns | 1) * kLanes;
// Result channels: whole cache lines of a pixel, several of them, while their sums are near.
constexpr int64_t kStoredTogether = kLanes == 16 ? 64 : 128;

// A row of a tile from its sums in the points, which are `rows` vectors apart.
KS_INLINE void SumsOfRow(const float* from, int64_t rows, Vec (&results)[kTileColumns]) {
  Vec sums[kPoints];
  KS_UNROLL
  for (int t = 0; t < kPoints; ++t) sums[t] = Load(from + t * rows * kLanes);
  TransformSums(sums, results);
}

// Stores what the sums of result channels [begin, end) are in pixels.
void StorePoints(const Work& work, int64_t begin, int64_t end) {
  const Parameters& p = work.p;
  const StoreFunction store = FindStore<1>(work);
  for (int64_t first = begin; first < end; first += kStoredTogether) {
    const int64_t last = Min(end, first + kStoredTogether);
    for (int64_t r = 0; r < p.region_rows; r += p.pool) {
      const float* from = work.sums + (first - begin) * p.tile_stride + r * kLanes;
      float* to = work.row;
      for (int64_t o = first; o < last; ++o, from += p.tile_stride, to += kResultRow) {
        Vec results[kTileColumns];
        SumsOfRow(from, p.region_rows, results);
        if (p.pool == 2) {
          Vec below[kTileColumns];
          SumsOfRow(from + kLanes, p.region_rows, below);
          KS_UNROLL
          for (int c = 0; c < kTileColumns; ++c) {
            results[c] = Larger(Larger(Splat(kLowest), results[c]), below[c]);
          }
          KS_UNROLL
          for (int c = 0; c < kTileColumns / 2; ++c) {
            results[c] = Larger(results[2 * c], results[2 * c + 1]);
          }
        }
        KS_UNROLL
        for (int c = 0; c < kTileColumns; ++c) Store(to + c * kLanes, results[c]);
      }
      store(p, work.regions, r / p.pool, 0, 1, kTileColumns / p.pool, first, last, work.row,
            kResultRow, work.epilogue, work.sink, work.output);
    }
  }
}

constexpr int64_t kPointsTogether = 4;  // Result channels between two fetches.

// ComputePart with points: all source channels are one part.
void ComputePoints(Work& work, int64_t begin, int64_t end, const float* planes) {
  const Parameters& p = work.p;
  const int32_t* order = work.table.order;
  const int64_t sets = kPoints / p.points;
  const int64_t window_row = -p.pad_top - p.origin_row;
  PointBlock block;
  block.plane_size = p.plane_size;
  block.point_step = p.plane_rows * kLanes;
  block.splits = work.table.row_splits;
  block.channels = work.table.channels;
  block.filter = work.table.filter;
  block.row_begin = Max(0, -window_row);
  block.row_end = Min(p.region_rows + kPointTaps - 1, p.plane_rows - window_row);
  block.sums_step = p.tile_stride;
  const bool edge = block.row_begin > 0 || block.row_end < p.region_rows + kPointTaps - 1;
  const PointFunction function = FindPoints(p.points, p.region_rows, edge);
  UpcomingResults results(work, 0, 0, p.region_rows / p.pool, p.region_columns / p.pool, begin, end,
                          sets * (end - begin));
  // Fetching comes between result channels; where there is nothing to fetch, all are done at once.
  const int64_t step = work.upcoming.units > 0 || results.any() ? kPointsTogether : end - begin;
  for (int64_t set = 0; set < sets; ++set) {
    block.set = set;
    block.planes = planes + set * p.set_size + window_row * kLanes;
    block.sums = work.sums + set * p.points * p.region_rows * kLanes - begin * p.tile_stride;
    for (int64_t k = begin; k < end; k += step) {
      const int64_t here = Min(step, end - k);
      results.Fetch(work, here);
      FetchDue(here, &work.upcoming);
      function(block, order + k, order + k + here);
    }
  }
  StorePoints(work, begin, end);
}

// --- Plan ----------------------------------------------------------------------------------------

constexpr int64_t kMaxRegion = 20;  // Rows, columns of a region.

constexpr double kNearBytes = 400 << 10;  // Of planes and sums that stay in the L2 cache,
constexpr double kOnceBytes = 600 << 10;  // and of those that do not.
constexpr int64_t kSharedGroups = 8;      // With fewer groups, work on one is split,
constexpr int64_t kSplitCycles = 40000;   // but not into less than this.

struct Axis {
  int64_t size, source, kernel, pad;
};

// How a region of `region` pixels lies on an axis.
struct Cut {
  int64_t regions, region, origin, plane;
  double inside;  // Share of the taps that is not skipped.
};

Cut CutAxis(const Axis& axis, int64_t region) {
  Cut cut;
  cut.region = region;
  cut.regions = CeilDiv(axis.size, region);
  const int64_t pad_after = axis.size + axis.kernel - 1 - axis.pad - axis.source;
  const int64_t half = axis.kernel / 2;
  cut.inside = 1;
  cut.origin = -axis.pad;
  cut.plane = region + axis.kernel - 1;
  if (cut.regions == 1 && axis.pad >= 0 && axis.pad <= half && pad_after >= 0 &&
      pad_after <= half) {
    cut.origin = 0;
    cut.plane = axis.source;
    const int64_t skipped = (axis.pad * (axis.pad + 1) + pad_after * (pad_after + 1)) / 2;
    cut.inside = 1.0 - static_cast<double>(skipped) / static_cast<double>(region * axis.kernel);
  }
  return cut;
}

// Regions worth a thought: the smallest of those that give the same number.
int64_t CandidateCuts(const Axis& axis, Cut* cuts) {
  int64_t count = 0;
  for (int64_t region = Min(axis.size, kMaxRegion); region >= 1; --region) {
    if (CeilDiv(axis.size, CeilDiv(axis.size, region)) == region) {
      cuts[count++] = CutAxis(axis, region);
    }
  }
  return count;
}

// How far `bytes` are on their way from `begin` to `end`, 0 to 1.
double ShareBetween(double bytes, double begin, double end) {
  const double share = (bytes - begin) / (end - begin);
  return share < 0 ? 0.0 : share > 1 ? 1.0 : share;
}

// Kilobytes between which more and more of what is loaded comes from the L2 cache, or from beyond.
// CPUs with vectors of 64 bytes have an L2 cache of 1 MB and more, others often one of 512 KB.
struct CacheSteps {
  double near_begin, near_end, far_begin, far_end;
};
constexpr CacheSteps kCacheSteps =
    kLanes == 16 ? CacheSteps{34, 104, 286, 2050} : CacheSteps{24, 80, 143, 1025};

// Cycles to load a vector in random order: out of `near` bytes that are used for a while, of `far`
// in all.
double LoadCost(double near, double far) {
  return 0.8 + ShareBetween(near / 1024, kCacheSteps.near_begin, kCacheSteps.near_end) * 1.05 +
         ShareBetween(far / 1024, kCacheSteps.far_begin, kCacheSteps.far_end) * 1.86;
}

KS_INLINE double Larger(double a, double b) { return a > b ? a : b; }

// Whether regions of this size end with squares of the pooling.
KS_INLINE bool EndsWithSquare(const Parameters& p, const Cut& cut) {
  return cut.region % p.pool == 0;
}

// Chooses the regions, blocks and parts. Costs are clock cycles, roughly; the constants are those
// that chose best among 2000 measured candidates, 3% above the fastest on average, with 64-byte
// vectors. Depends on sizes and the number of connections only.
double ChooseRegions(const KindTraits& kind, int64_t kept, Parameters* p) {
  const Axis high = {p->rows, p->height, p->kernel_height, p->pad_top};
  const Axis wide = {p->columns, p->width, p->kernel_width, p->pad_left};
  Cut rows[kMaxRegion], columns[kMaxRegion];
  const int64_t num_rows = CandidateCuts(high, rows);
  const int64_t num_columns = CandidateCuts(wide, columns);
  const double taps = static_cast<double>(p->kernel_height * p->kernel_width);
  const double passes = static_cast<double>(p->kernel_height) / static_cast<double>(kind.tap_rows);
  const int64_t most_parts = Max(1, Min(32, CeilDiv(p->channels, kLanes) / 2));
  double best = 0;
  for (int64_t y = 0; y < num_rows; ++y) {
    for (int64_t x = 0; x < num_columns; ++x) {
      const Cut& row = rows[y];
      const Cut& column = columns[x];
      if (!EndsWithSquare(*p, row) || !EndsWithSquare(*p, column)) continue;
      const int64_t groups = CeilDiv(p->batch * row.regions * column.regions, kLanes);
      const int64_t plane = row.plane * column.plane;
      const double pixels = static_cast<double>(row.region * column.region);
      // Planes that wait in shared memory leave the L2 cache.
      const double lines = static_cast<double>(plane * p->channels);
      const bool wait =
          groups < kSharedGroups && lines * static_cast<double>(groups * kLanes * 4) > 512.0 * 1024;
      const double fill = (wait ? 14.0 : 2.6) * lines;
      const double empty = 7.2 * pixels * static_cast<double>(p->out_channels);
      const double multiply = 0.65 * taps * pixels * row.inside * column.inside;
      const double least_cost = fill + empty + static_cast<double>(kept) * multiply;
      if (best > 0 && least_cost * static_cast<double>(groups) >= best) continue;
      const int64_t least = CeilDiv(column.region, kind.max_columns);
      for (int64_t blocks_wide = least; blocks_wide <= least + 2; ++blocks_wide) {
        if (blocks_wide > column.region / p->pool) break;
        const int64_t block_columns = CeilDiv(column.region / p->pool, blocks_wide) * p->pool;
        const int64_t most_rows =
            Min(kind.max_rows, kind.max_sums / block_columns) / p->pool * p->pool;
        if (block_columns > kind.max_columns || most_rows < 1) continue;
        const int64_t blocks_high = CeilDiv(row.region, most_rows);
        const double blocks = static_cast<double>(blocks_high * blocks_wide);
        const double block_rows =
            static_cast<double>(row.region) / static_cast<double>(blocks_high);
        const double block_width =
            static_cast<double>(column.region) / static_cast<double>(blocks_wide);
        const double loads = blocks * (block_rows + static_cast<double>(kind.tap_rows - 1)) *
                             (block_width + static_cast<double>(p->kernel_width - 1)) * passes;
        const double chain = blocks * (taps * 3.8 * pixels / blocks / kSumsInFlight);
        const double weights = blocks * taps * 0.38;
        for (int64_t parts = 1; parts <= most_parts; parts *= 2) {
          const double part_bytes =
              static_cast<double>(plane * kLanes * 4 * CeilDiv(p->channels, parts));
          const double sums_bytes =
              parts == 1 ? 0 : pixels * static_cast<double>(kLanes * 4 * p->out_channels);
          const double block_bytes = part_bytes / static_cast<double>(plane) *
                                     (block_rows + static_cast<double>(p->kernel_height - 1)) *
                                     (block_width + static_cast<double>(p->kernel_width - 1));
          const double load = LoadCost(block_bytes, part_bytes);
          const double connection = Larger(Larger(multiply, chain), loads * load + weights * 0.3) +
                                    weights * 0.3 + blocks * 2.2;
          const double call = blocks * 90 + pixels * 0.5 +
                              (parts > 1 ? pixels * 1.4 * LoadCost(sums_bytes, sums_bytes) : 0.0);
          const double cost =
              static_cast<double>(groups) * (static_cast<double>(kept) * connection + fill + empty +
                                             static_cast<double>(p->out_channels * parts) * call);
          if (best > 0 && cost >= best) continue;
          best = cost;
          p->region_rows = row.region;
          p->region_columns = column.region;
          p->regions_high = row.regions;
          p->regions_wide = column.regions;
          p->groups = groups;
          p->origin_row = row.origin;
          p->origin_column = column.origin;
          p->plane_rows = row.plane;
          p->plane_columns = column.plane;
          p->blocks_high = blocks_high;
          p->blocks_wide = blocks_wide;
          p->parts = parts;
        }
      }
    }
  }
  return best;
}

bool Takes(const KsGeometry& geometry) {
  return geometry.stride_height == 1 && geometry.stride_width == 1 &&
         geometry.dilation_height == 1 && geometry.dilation_width == 1 &&
         Max(geometry.kernel_height, geometry.kernel_width) <= 7 &&
         (Max(geometry.kernel_height, geometry.kernel_width) > 1 || IsPointwise(geometry));
}

bool TakesPoints(const KsGeometry& geometry, int64_t channels) {
  return Takes(geometry) && geometry.kernel_height == 3 && geometry.kernel_width == 3 &&
         channels >= kLanes;
}

// ChooseRegions with points; returns the cost. On a CPU with one multiply-add a cycle points win
// from 2 or 3 connections of a result channel on; the constants leave room for those with two.
double ChoosePoints(int64_t kept, Parameters* p) {
  Cut rows[kMaxRegion];
  const int64_t num_rows = CandidateCuts({p->rows, p->height, 3, p->pad_top}, rows);
  const int64_t regions_wide = CeilDiv(p->columns, kTileColumns);
  const double channels = static_cast<double>(p->channels);
  const double results = static_cast<double>(p->out_channels);
  double best = 0;
  for (int64_t y = 0; y < num_rows; ++y) {
    const Cut& row = rows[y];
    if (!EndsWithSquare(*p, row)) continue;
    const int64_t groups = CeilDiv(p->batch * row.regions * regions_wide, kLanes);
    const double region = static_cast<double>(row.region), plane = static_cast<double>(row.plane);
    const double bytes = plane * channels * kPoints * kLanes * 4;
    const double sums_bytes =
        region * kPoints * kLanes * 4 * static_cast<double>(Min(p->out_channels, kStoredTogether));
    const double far = ShareBetween(bytes + sums_bytes, kNearBytes, kOnceBytes);
    const bool wait = groups < kSharedGroups && bytes * static_cast<double>(groups) > 512.0 * 1024;
    const double fill = (wait ? 100 : 35 + 17 * far) * plane * channels;
    const double empty = (43 + 9 * far) * region * results;
    for (int64_t points = 1; points <= kPoints; ++points) {
      const int64_t sums = points * row.region;
      if (kPoints % points != 0 || row.region > kMaxPointRows || sums > kMaxPointSums) continue;
      const double blocks = static_cast<double>(kPoints / points);
      const double near = static_cast<double>(points) * plane * channels * kLanes * 4;
      const double multiply = 0.65 * kPoints * kPointTaps * region * row.inside;
      const double loads = kPoints * plane * LoadCost(near, near) + 2;
      const double chain = blocks * kPointTaps * 3.8;
      const double connection = Larger(Larger(multiply, chain), loads) + 4 * blocks;
      const double cost = static_cast<double>(groups) * (static_cast<double>(kept) * connection +
                                                         fill + empty + results * 30 * blocks);
      if (best > 0 && cost >= best) continue;
      best = cost;
      p->points = points;
      p->region_rows = row.region;
      p->region_columns = kTileColumns;
      p->regions_high = row.regions;
      p->regions_wide = regions_wide;
      p->groups = groups;
      p->origin_row = row.origin;
      p->origin_column = -p->pad_left;
      p->plane_rows = row.plane;
      p->plane_columns = kPoints;
      p->blocks_high = p->blocks_wide = p->parts = 1;
      // Planes beyond the L2 cache are read once, point by point, for all result channels.
      p->together = bytes > kOnceBytes ? p->out_channels : kStoredTogether;
    }
  }
  return best;
}

// ChooseRegions for one tap: all pixels of a region are one block.
void ChoosePixels(int64_t kept, Parameters* p) {
  Cut rows[kMaxRegion], columns[kMaxRegion];
  const int64_t num_rows = CandidateCuts({p->rows, p->height, 1, 0}, rows);
  const int64_t num_columns = CandidateCuts({p->columns, p->width, 1, 0}, columns);
  const int64_t vectors = CeilDiv(p->channels, kLanes);
  const double results = static_cast<double>(p->out_channels);
  const double density = static_cast<double>(kept) / (results * static_cast<double>(p->channels));
  double best = 0;
  for (int64_t y = 0; y < num_rows; ++y) {
    for (int64_t x = 0; x < num_columns; ++x) {
      const int64_t size = rows[y].region * columns[x].region;
      if (size > kMaxPixels) continue;
      const int64_t groups = CeilDiv(p->batch * rows[y].regions * columns[x].regions, kLanes);
      const double pixels = static_cast<double>(size);
      for (int64_t parts = 1; parts <= Max(1, vectors / 2); ++parts) {
        if (parts > 1 && CeilDiv(vectors, parts) == CeilDiv(vectors, parts - 1)) continue;
        const bool whole = parts == 1;
        const double near =
            static_cast<double>(CeilDiv(vectors, parts) * kLanes * OddLines(size * kLanes) * 4);
        const double fill = pixels * static_cast<double>(p->channels) *
                            (whole                    ? 10.5
                             : groups < kSharedGroups ? 18
                                                      : 13.5);
        const double load = 0.9 * LoadCost(0.85 * near, near);
        const double call = static_cast<double>(parts) * (whole ? 20 + pixels : 34 + 2 * pixels);
        const double alone = Larger(4.2, (pixels + 1) * load);
        const double both = Larger(4.2, (pixels + 2) * load) / 2;
        double sums = static_cast<double>(kept) * alone;
        const double pairs = static_cast<double>(kept) * (density * both + (1 - density) * alone) +
                             results * static_cast<double>(parts) * 20;
        const bool paired = size <= kMaxPaired && pairs < sums;
        if (paired) sums = pairs;
        const double cost =
            static_cast<double>(groups) * (fill + sums + results * (call + 6 * pixels));
        if (best > 0 && cost >= best) continue;
        best = cost;
        p->region_rows = p->plane_rows = rows[y].region;
        p->region_columns = p->plane_columns = columns[x].region;
        p->regions_high = rows[y].regions;
        p->regions_wide = columns[x].regions;
        p->groups = groups;
        p->origin_row = p->origin_column = 0;
        p->blocks_high = p->blocks_wide = 1;
        p->paired = paired;
        p->parts = parts;
      }
    }
  }
}

// Floats of the planes of one group, all parts of which are there at a time or only one.
int64_t PlanesSize(const Parameters& p, bool all_parts) {
  int64_t channels = p.channels;
  if (!all_parts) channels = CeilDiv(CeilDiv(p.channels, kLanes), p.parts) * kLanes;
  const int64_t planes = p.points > 0 ? kPoints / p.points * p.set_size : channels * p.plane_size;
  return RoundUp(p.lead + planes, KS_ALIGNMENT / 4);
}

// Planes of a group are packed in pieces of this many channels, the last one with what remains.
int64_t PackChannels(const Parameters& p) {
  constexpr int64_t kPixels = 4096;  // Times channels: worth a piece.
  return RoundUp(CeilDiv(kPixels, p.plane_rows * p.plane_columns), kLanes);
}
// With points: kLanes rows of planes, or a row of each channel that is stored together.
int64_t RowBytes(const Parameters& p) {
  if (p.points == 0) return 0;
  return PieceBytes(Max(kLanes * kPointRow, kStoredTogether * kResultRow), 4);
}
int64_t PackItems(const Parameters& p) { return Max(1, p.channels / PackChannels(p)); }

int64_t TableBytes(const Parameters& p, int64_t kept) {
  return PieceBytes((p.parts + 1) * p.out_channels, 4) + PieceBytes(p.parts * p.out_channels, 4) +
         (p.pointwise ? PieceBytes(p.parts * NumLists(p) + 1, 4) + 2 * PieceBytes(kept, 4) : 0);
}

int Plan(const KsArguments& arguments, bool points, Parameters p, KsPlan* plan) {
  const int64_t least = Min(Min(Min(p.batch, p.channels), Min(p.height, p.width)),
                            Min(Min(p.rows, p.columns), p.out_channels));
  KindTraits kind;
  if (least < 1) return 0;
  p.pointwise = p.kernel_height == 1 && p.kernel_width == 1;
  if (!p.pointwise && !FindKind(p.kernel_height, p.kernel_width, &kind)) return 0;
  if (p.pool > 1 && (p.pool > 2 || p.pointwise || p.rows % 2 != 0 || p.columns % 2 != 0)) return 0;
  memset(plan, 0, sizeof(*plan));
  p.splits = 1;
  if (p.pointwise) {
    ChoosePixels(arguments.kept, &p);
  } else if (points) {
    ChoosePoints(arguments.kept, &p);
  } else {
    const double cost = ChooseRegions(kind, arguments.kept, &p);
    Parameters other = p;
    if (TakesPoints(arguments.geometry, p.channels) &&
        ChoosePoints(arguments.kept, &other) < cost) {
      return 0;  // The next routine does it.
    }
  }
  // With one part, as many as are stored together; with several, all of them.
  if (p.points == 0) p.together = p.parts == 1 ? kStoredTogether : p.out_channels;
  if (p.interleaved) {
    p.source_column *= kLanes;
    p.result_column *= kLanes;
  }
  // A plane is an odd number of cache lines, so that the planes of different channels do not fall
  // into the same cache sets; so are the sums of a channel.
  p.plane_size = OddLines(p.plane_rows * p.plane_columns * kLanes);
  if (p.points > 0) {
    p.plane_size = RoundUp(p.points * p.plane_rows * kLanes, kLineFloats);
    p.set_size = OddLines(p.channels * p.plane_size);
  }
  if (p.pointwise && p.channels > INT32_MAX / p.plane_size) return 0;
  p.lead = (Max(0, p.pad_top + p.origin_row) * (p.points > 0 ? 1 : p.plane_columns) +
            Max(0, p.pad_left + p.origin_column)) *
           kLanes;
  const int64_t pixels = p.region_rows * p.region_columns;
  const int64_t block_pixels = CeilDiv(p.region_rows / p.pool, p.blocks_high) *
                               CeilDiv(p.region_columns / p.pool, p.blocks_wide) * p.pool * p.pool;
  const int64_t tile_vectors = p.points > 0   ? p.region_rows * kPoints
                               : p.parts == 1 ? block_pixels
                                              : pixels;
  p.tile_stride = OddLines(tile_vectors * kLanes);
  const int64_t taps = p.kernel_height * p.kernel_width;
  const int64_t fill = p.plane_rows * p.plane_columns * 5;
  const int64_t empty = pixels * 6 * p.out_channels;
  const int64_t sums = arguments.kept * pixels * taps * (p.points > 0 ? 3 : 6) / 10;
  const int64_t group_bytes = PlanesSize(p, true) * 4;
  if (p.groups < kSharedGroups && p.groups * group_bytes <= kScratchLimit) {
    // A thread that takes a part of the channels reads most planes for it.
    p.splits = Min(Min(CeilDiv(kWantedItems, p.groups), CeilDiv(p.out_channels, kLineFloats)),
                   CeilDiv(sums + empty, kSplitCycles));
    // Each thread packs planes for itself where that is less than to compute: to read those that
    // another CPU has written takes about as long, to write over what it has read still longer.
    p.shared_planes = p.splits > 1 && fill * p.channels > sums + empty;
  }

  KsStage* stage = plan->stages;
  stage->items = 1;
  stage->cost = 1000 + p.parts * p.out_channels * 10 +
                arguments.kept * ((p.transposed ? 10 : 0) + (p.pointwise ? 10 : 0));
  stage->prepares = KS_PREPARES_TABLE;
  ++stage;
  if (p.pointwise) {
    stage->items = CeilDiv(arguments.kept, kWeightsOfItem);
    stage->cost = 2 * kWeightsOfItem;
    stage->prepares = KS_PREPARES_FILTER;
    ++stage;
  } else if (p.points > 0) {
    stage->items = CeilDiv(p.out_channels, kLanes);
    stage->cost = 100 + arguments.kept * 40 * kLanes / p.out_channels;
    stage->prepares = KS_PREPARES_FILTER;
    ++stage;
  } else if (p.transposed) {
    stage->items = TransposeFilterItems(arguments);
    stage->cost = 100 + arguments.kept * taps * 32 / p.out_channels;
    stage->prepares = KS_PREPARES_FILTER;
    ++stage;
  }
  if (p.shared_planes) {
    stage->items = p.groups * PackItems(p);
    stage->cost = 100 + fill * Min(p.channels, PackChannels(p));
    ++stage;
    stage->items = p.groups * p.splits;
    stage->cost = 100 + (sums + empty) / p.splits;
    ++stage;
  } else {
    stage->items = p.groups * p.splits;
    stage->cost = 100 + (fill * p.channels + sums + empty) / p.splits;
    ++stage;
  }
  plan->num_stages = static_cast<int32_t>(stage - plan->stages);

  plan->table_bytes =
      (p.transposed ? TransposedTableBytes(arguments) : 0) + TableBytes(p, arguments.kept);
  plan->filter_bytes = p.pointwise    ? PieceBytes(arguments.kept, 4)
                       : p.points > 0 ? PointFilterBytes(arguments.kept)
                       : p.transposed ? TransposedFilterBytes(arguments)
                                      : 0;
  plan->shared_bytes = p.shared_planes ? p.groups * group_bytes : 0;
  plan->scratch_bytes =
      PieceBytes(RoundUp(Min(p.out_channels, p.together), kLanes) * p.tile_stride, 4) +
      PieceBytes(p.channels, 4) + PieceBytes(p.out_channels, 4) + RowBytes(p) +
      (p.shared_planes ? 0 : PlanesSize(p, p.splits > 1) * 4);
  if (plan->scratch_bytes > kScratchLimit) return 0;
  SaveParameters(p, plan);
  return 1;
}

void Run(const KsArguments& arguments, const KsPlan* plan, int32_t stage, int64_t begin,
         int64_t end, const KsMemory* memory, const float* source) {
  Work work;
  work.p = LoadParameters<Parameters>(plan);
  work.output = arguments.output;
  work.epilogue = MakeEpilogue(arguments);
  const Parameters& p = work.p;
  const int64_t pixels = p.batch * (p.rows / p.pool) * (p.columns / p.pool);
  work.fetch = pixels * p.out_channels * 4 >= kFetchFrom;
  work.stream = pixels * p.out_channels * 4 >= kStreamFrom && p.out_channels % kLineFloats == 0 &&
                reinterpret_cast<uintptr_t>(work.output) % KS_ALIGNMENT == 0;
  KindTraits kind = {};
  work.sum_pixels = p.pointwise ? FindPixels(p.region_rows * p.region_columns, p.paired) : nullptr;
  if (!p.pointwise) FindKind(p.kernel_height, p.kernel_width, &kind);
  for (int i = 0; i < 2 && !p.pointwise && p.points == 0; ++i) {
    for (int j = 0; j < 2; ++j) {
      const int64_t rows = LeastOfBlock(p, p.region_rows, p.blocks_high) + i * p.pool;
      const int64_t columns = LeastOfBlock(p, p.region_columns, p.blocks_wide) + j * p.pool;
      for (int edge = 0; edge < 2; ++edge)
        work.functions[i][j][edge] = kind.find(rows, columns, edge);
    }
  }
  Arena table_arena = {static_cast<char*>(memory->table)};
  Arena scratch_arena = {static_cast<char*>(memory->scratch)};

  work.table.row_splits = arguments.row_splits;
  work.table.channels = arguments.input_channels;
  work.table.filter = arguments.filter;
  TransposedTable transposed = {};
  if (p.transposed) {
    transposed = PlaceTransposedTable(arguments, &table_arena, memory->filter);
    work.table.row_splits = transposed.row_splits;
    work.table.channels = transposed.channels;
    work.table.filter = transposed.filter;
  }
  work.table.starts = table_arena.Take<int32_t>((p.parts + 1) * p.out_channels);
  work.table.order = table_arena.Take<int32_t>(p.parts * p.out_channels);
  if (p.pointwise) {
    work.table.begins = table_arena.Take<int32_t>(p.parts * NumLists(p) + 1);
    work.table.offsets = table_arena.Take<int32_t>(arguments.kept);
    work.table.sources = table_arena.Take<int32_t>(arguments.kept);
    work.table.weights = static_cast<float*>(memory->filter);
  }
  float* shared_planes = static_cast<float*>(memory->shared) + p.lead;
  if (stage == 0) {
    if (p.transposed) TransposeTable(arguments, transposed);
    CutTable(p, work.table);
    if (p.pointwise) LayLists(p, work.table, transposed.from);
    return;
  }
  --stage;
  if (p.pointwise && stage-- == 0) {
    const int64_t last = Min(end * kWeightsOfItem, arguments.kept);
    for (int64_t i = begin * kWeightsOfItem; i < last; ++i) {
      work.table.weights[i] = arguments.filter[work.table.sources[i]];
    }
    return;
  }
  if (p.points > 0) work.table.filter = static_cast<float*>(memory->filter);
  if (p.points > 0 && stage-- == 0) {
    LayPoints(p, work.table, arguments.filter, transposed.from, begin * kLanes,
              Min(end * kLanes, p.out_channels), static_cast<float*>(memory->filter));
    return;
  }
  if (p.transposed && !p.pointwise && p.points == 0 && stage-- == 0) {
    const int64_t last_tap = p.kernel_height * p.kernel_width - 1;
    TransposeFilter(arguments, transposed, begin, end,
                    [last_tap](int64_t t) { return last_tap - t; });
    return;
  }

  const int64_t together = p.together;
  work.sums =
      scratch_arena.Take<float>(RoundUp(Min(p.out_channels, together), kLanes) * p.tile_stride);
  work.zeros = scratch_arena.Take<float>(p.channels);
  work.sink = scratch_arena.Take<float>(p.out_channels);
  work.row = scratch_arena.Take<float>(RowBytes(p) / 4);
  memset(work.zeros, 0, p.channels * 4);
  float* own_planes = reinterpret_cast<float*>(scratch_arena.at) + p.lead;
  const int64_t group_size = PlanesSize(p, true);
  int64_t group = -1;  // Of work.regions.
  if (p.shared_planes && stage == 0) {
    const int64_t blocks = PackItems(p);
    for (int64_t item = begin; item < end; ++item) {
      if (item / blocks != group) {
        group = item / blocks;
        FindRegions(p, group, source, &work.regions);
      }
      const int64_t first = item % blocks * PackChannels(p);
      const int64_t last = item % blocks == blocks - 1 ? p.channels : first + PackChannels(p);
      PackPart(work, first, last, shared_planes + group * group_size + first * p.plane_size);
    }
    return;
  }
  // A source that the L2 cache does not hold is fetched for one pack while the last one is computed
  // with.
  const bool fetch_source =
      p.splits == 1 && p.batch * p.height * p.width * p.channels * 4 > kFetchFrom;
  // The group whose planes are packed, all parts of them.
  int64_t held = memory->held == nullptr ? -1 : *memory->held;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t split = item % p.splits;
    if (item / p.splits != group) {
      group = item / p.splits;
      FindRegions(p, group, source, &work.regions);
    }
    const float* group_planes = p.shared_planes ? shared_planes + group * group_size : own_planes;
    if (p.splits > 1 && !p.shared_planes && held != group) {
      PackPart(work, 0, p.channels, own_planes);
      held = group;
    }
    const int64_t last_channel = SplitChannel(p, split + 1);
    for (int64_t part = 0; part < p.parts; ++part) {
      const int64_t channel = PartChannel(p, part);
      const float* planes = group_planes + channel * p.plane_size;
      if (p.splits == 1) {
        PackPart(work, channel, PartChannel(p, part + 1), own_planes);
        planes = own_planes;
      }
      FetchNothing(&work.upcoming);
      const bool last_part = part == p.parts - 1;
      if (fetch_source && (!last_part || item + 1 < end)) {
        Regions regions;
        FindRegions(p, last_part ? group + 1 : group, source, &regions);
        const int64_t next = last_part ? 0 : part + 1;
        const int64_t steps =
            p.out_channels * (p.points > 0 ? kPoints / p.points : p.blocks_high * p.blocks_wide);
        FetchPlanes(p, regions, PartChannel(p, next), PartChannel(p, next + 1), steps,
                    &work.upcoming);
      }
      for (int64_t o = SplitChannel(p, split); o < last_channel; o += together) {
        const int64_t end_channel = Min(last_channel, o + together);
        if (p.points > 0) {
          ComputePoints(work, o, end_channel, planes);
        } else {
          ComputePart(work, part, o, end_channel, planes);
        }
      }
    }
  }
  if (memory->held != nullptr) *memory->held = held;
  if (work.stream) StreamEnd();
}

// Swaps rows and columns where the kernel has one column: a kernel of one row remains.
void PreferWide(Parameters* p) {
  if (p->kernel_width != 1 || p->kernel_height == 1) return;
  const auto swap = [](int64_t* a, int64_t* b) {
    const int64_t value = *a;
    *a = *b;
    *b = value;
  };
  swap(&p->height, &p->width);
  swap(&p->source_row, &p->source_column);
  swap(&p->rows, &p->columns);
  swap(&p->result_row, &p->result_column);
  swap(&p->kernel_height, &p->kernel_width);
  swap(&p->pad_top, &p->pad_left);
}

// Sizes of a pass with stride 1 from [height, width, channels] to [rows, columns, out_channels].
Parameters Pass(const KsGeometry& geometry, int64_t height, int64_t width, int64_t channels,
                int64_t rows, int64_t columns, int64_t out_channels) {
  Parameters p = {};
  p.batch = geometry.batch;
  p.height = height;
  p.width = width;
  p.channels = channels;
  p.rows = rows;
  p.columns = columns;
  p.out_channels = out_channels;
  p.pool = 1;
  if (IsPointwise(geometry)) {  // One row of pixels.
    p.width = p.columns = p.batch * p.height * p.width;
    p.batch = p.height = p.rows = 1;
    // Neighbouring pixels that are whole pages apart would fall into the same cache set.
    p.interleaved = channels * 4 % 4096 != 0;
  }
  p.source_image = p.height * p.width * channels;
  p.source_row = p.width * channels;
  p.source_column = channels;
  p.result_row = p.columns * out_channels;
  p.result_column = out_channels;
  p.kernel_height = geometry.kernel_height;
  p.kernel_width = geometry.kernel_width;
  return p;
}

// One tap that skips pixels: the convolution of the pixels it meets.
bool IsSubsampled(const KsGeometry& geometry) {
  return geometry.kernel_height == 1 && geometry.kernel_width == 1 &&
         Max(geometry.stride_height, geometry.stride_width) > 1 && geometry.pad_top == 0 &&
         geometry.pad_left == 0 &&
         (geometry.out_height - 1) * geometry.stride_height < geometry.in_height &&
         (geometry.out_width - 1) * geometry.stride_width < geometry.in_width;
}

// The source is the input,
Parameters ForwardPass(const KsArguments& arguments) {
  const KsGeometry& geometry = arguments.geometry;
  Parameters p = Pass(geometry, geometry.in_height, geometry.in_width, geometry.in_channels,
                      geometry.out_height, geometry.out_width, geometry.out_channels);
  if (IsSubsampled(geometry)) {
    p.height = p.rows;
    p.width = p.columns;
    p.source_row *= geometry.stride_height;
    p.source_column *= geometry.stride_width;
  }
  p.pad_top = geometry.pad_top;
  p.pad_left = geometry.pad_left;
  p.pool = Max(1, arguments.pool);
  if (p.pool > 1) p.result_row = geometry.out_width / p.pool * geometry.out_channels;
  PreferWide(&p);
  return p;
}

// Images of a few pixels have a routine of their own, which does not pool, and there is little to.
bool PoolsBetterApart(const KsArguments& arguments) {
  if (arguments.pool <= 1) return false;
  KsArguments apart = arguments;
  apart.pool = 0;
  KsPlan plan;
  return ConnectionConv2DSmallPlan(&apart, &plan) != 0;
}

// or out_backprop.
Parameters BackwardPass(const KsGeometry& geometry) {
  Parameters p = Pass(geometry, geometry.out_height, geometry.out_width, geometry.out_channels,
                      geometry.in_height, geometry.in_width, geometry.in_channels);
  p.transposed = 1;
  p.pad_top = geometry.kernel_height - 1 - geometry.pad_top;
  p.pad_left = geometry.kernel_width - 1 - geometry.pad_left;
  PreferWide(&p);
  return p;
}

}  // namespace

int ConnectionConv2DRegionsPlan(const KsArguments* arguments, KsPlan* plan) {
  const KsGeometry& geometry = arguments->geometry;
  if (!IsSubsampled(geometry) && !Takes(geometry)) return 0;
  if (PoolsBetterApart(*arguments)) return 0;
  return Plan(*arguments, false, ForwardPass(*arguments), plan);
}

void ConnectionConv2DRegionsRun(const KsArguments* arguments, const KsPlan* plan, int32_t stage,
                                int64_t begin, int64_t end, const KsMemory* memory) {
  Run(*arguments, plan, stage, begin, end, memory, arguments->input);
}

int ConnectionConv2DWinogradPlan(const KsArguments* arguments, KsPlan* plan) {
  const KsGeometry& geometry = arguments->geometry;
  if (!TakesPoints(geometry, geometry.in_channels) || PoolsBetterApart(*arguments)) return 0;
  return Plan(*arguments, true, ForwardPass(*arguments), plan);
}

void ConnectionConv2DWinogradRun(const KsArguments* arguments, const KsPlan* plan, int32_t stage,
                                 int64_t begin, int64_t end, const KsMemory* memory) {
  Run(*arguments, plan, stage, begin, end, memory, arguments->input);
}

int ConnectionConv2DBackpropInputRegionsPlan(const KsArguments* arguments, KsPlan* plan) {
  const KsGeometry& geometry = arguments->geometry;
  if (!Takes(geometry)) return 0;
  return Plan(*arguments, false, BackwardPass(geometry), plan);
}

void ConnectionConv2DBackpropInputRegionsRun(const KsArguments* arguments, const KsPlan* plan,
                                             int32_t stage, int64_t begin, int64_t end,
                                             const KsMemory* memory) {
  Run(*arguments, plan, stage, begin, end, memory, arguments->out_backprop);
}

int ConnectionConv2DBackpropInputWinogradPlan(const KsArguments* arguments, KsPlan* plan) {
  const KsGeometry& geometry = arguments->geometry;
  if (!TakesPoints(geometry, geometry.out_channels)) return 0;
  return Plan(*arguments, true, BackwardPass(geometry), plan);
}

void ConnectionConv2DBackpropInputWinogradRun(const KsArguments* arguments, const KsPlan* plan,
                                              int32_t stage, int64_t begin, int64_t end,
                                              const KsMemory* memory) {
  Run(*arguments, plan, stage, begin, end, memory, arguments->out_backprop);
}

}  // namespace KS_ISA
}  // namespace ks
