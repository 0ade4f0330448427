// Copyright 2026 The keras_sparse Authors. Licensed under the Apache License, Version 2.0.
//
// What the routines of the forward thinned convolution share: the rows (or columns) that see
// the padding alike, packing kept rows into panels, and what a term costs.

#ifndef KERAS_SPARSE_CUSTOM_OPS_KERNELS_CPU_THINNED_H_
#define KERAS_SPARSE_CUSTOM_OPS_KERNELS_CPU_THINNED_H_

#include "custom_ops/kernels/cpu/fetch.h"
#include "custom_ops/kernels/cpu/terms.h"

namespace ks {
namespace KS_ISA {

constexpr int64_t kChunkBytes = 96 * 1024;   // Of a panel of W'.
constexpr int64_t kRowsOfItem = 64;          // Kept rows packed at a time.
constexpr int64_t kMostSpans = 9;            // Of an axis.
constexpr int64_t kMostPositions = 4096;     // Of an axis: more are not worth looking at each.
constexpr int64_t kMostTermBytes = 8 << 20;  // Of all classes.

// Cycles to read a byte of W': since the last call other layers have driven it out of the caches.
// As in TermCost(), those of a CPU with two products a cycle; with long vectors it is mostly one.
constexpr double kFilterByteCost = kFetchByTerms ? 0.045 : 0.09;

// What the faster one of ThinnedConv2DWinograd and ThinnedConv2DWinogradSquares costs, in the
// cycles in which ThinnedConv2D estimates itself; negative when none takes the arguments.
double ThinnedConv2DWinogradCost(const KsArguments& arguments);

// A term for points in blocks takes as long as its products, as the loads of its values where a
// panel is a single vector, or as fetching its part of W'.
KS_INLINE double TermCost(double points, double blocks, int64_t vectors) {
  const double products = points * (vectors > 1 ? static_cast<double>(vectors) / 2 : 0.66);
  const double least = blocks * 2.0 * vectors;
  return products > least ? products : least;
}

// Whether a result of `bytes` goes past the caches: if panels are whole cache lines of it, as
// memory would take parts of them one by one.
KS_INLINE bool Streams(const KsGeometry& geometry, double bytes) {
  return bytes >= static_cast<double>(kStreamFrom) && geometry.out_channels % kLineFloats == 0 &&
         kPanelVectors * kLanes % kLineFloats == 0;
}

// Neighbouring rows (or columns) of the output with the same taps inside the image.
struct Span {
  int64_t begin, end;          // Rows of the output.
  int64_t tap_begin, tap_end;  // Taps inside.
};

// One axis of the convolution.
struct Axis {
  int64_t size, in_size;  // Of the output and of the input.
  int64_t taps, stride, dilation, pad;
};
KS_INLINE Axis RowAxis(const KsGeometry& g) {
  return {g.out_height,    g.in_height,       g.kernel_height,
          g.stride_height, g.dilation_height, g.pad_top};
}
KS_INLINE Axis ColumnAxis(const KsGeometry& g) {
  return {g.out_width, g.in_width, g.kernel_width, g.stride_width, g.dilation_width, g.pad_left};
}

KS_INLINE void TapsAt(const Axis& axis, int64_t at, Span* span) {
  const int64_t first = at * axis.stride - axis.pad;
  span->tap_begin = Min(axis.taps, Max(0, CeilDiv(-first, axis.dilation)));
  span->tap_end =
      Max(span->tap_begin, Min(axis.taps, FloorDiv(axis.in_size - 1 - first, axis.dilation) + 1));
}

// The spans of an axis, all of it when it is not split. Returns 0 when there are too many.
inline int64_t MakeSpans(const Axis& axis, bool split, Span* spans) {
  if (!split) {
    spans[0] = {0, axis.size, 0, axis.taps};
    return 1;
  }
  if (axis.size > kMostPositions) return 0;
  int64_t count = 0;
  for (int64_t at = 0; at < axis.size; ++at) {
    Span span = {at, at + 1, 0, 0};
    TapsAt(axis, at, &span);
    if (count > 0 && spans[count - 1].tap_begin == span.tap_begin &&
        spans[count - 1].tap_end == span.tap_end) {
      spans[count - 1].end = at + 1;
      continue;
    }
    if (count == kMostSpans) return 0;
    spans[count++] = span;
  }
  return count;
}

// Packs rows [begin, end) of `count` kept rows, taken in `order`, into all panels: panel after
// panel, each [count][its vectors * kLanes].
inline void PackRows(const KsArguments& arguments, const int32_t* order, int64_t count,
                     int64_t begin, int64_t end, float* packed) {
  const Panels panels = MakePanels(arguments.geometry.out_channels);
  for (int64_t i = 0; i < panels.count; ++i) {
    const Panel panel = PanelAt(panels, i);
    const int64_t width = panel.vectors * kLanes;
    float* target = packed + count * panel.first_vector * kLanes + begin * width;
    for (int64_t t = begin; t < end; ++t, target += width) {
      const float* row =
          arguments.filter + order[t] * panels.channels + panel.first_vector * kLanes;
      if (panel.channels == width) {
        for (int64_t v = 0; v < width; v += kLanes) Store(target + v, Load(row + v));
        continue;
      }
      for (int64_t c = 0; c < width; ++c) target[c] = c < panel.channels ? row[c] : 0;
    }
  }
}

// --- Fetching ------------------------------------------------------------------------------------

// Fetches `rows` rows of the input from `row` on, counted over all images, in `steps` steps: a line
// to a lane, and on from there. Rows may lie outside of the input.
inline void FetchRows(const KsArguments& arguments, int64_t row, int64_t rows, int64_t steps,
                      Upcoming* upcoming) {
  const int64_t bytes = arguments.geometry.in_width * arguments.geometry.in_channels * 4;
  for (int l = 0; l < kLanes; ++l) {
    upcoming->pixels[l] =
        reinterpret_cast<intptr_t>(arguments.input) + row * bytes + l * KS_ALIGNMENT;
  }
  FetchPixelsIn(steps, 1, CeilDiv(rows * bytes, kLanes * KS_ALIGNMENT), KS_ALIGNMENT, 0,
                kLanes * KS_ALIGNMENT, upcoming);
}

}  // namespace KS_ISA
}  // namespace ks

#endif  // KERAS_SPARSE_CUSTOM_OPS_KERNELS_CPU_THINNED_H_
