// Copyright 2026 The keras_sparse Authors. Licensed under the Apache License, Version 2.0.
//
// The sums of connection_conv2d_regions.cc over planes with a region in every lane: of a block of
// pixels for one result channel, with several taps; of all pixels of a region for one result
// channel or two, with one tap.

#ifndef KERAS_SPARSE_CUSTOM_OPS_KERNELS_CPU_REGION_SUMS_H_
#define KERAS_SPARSE_CUSTOM_OPS_KERNELS_CPU_REGION_SUMS_H_

#include "custom_ops/kernels/cpu/vector.h"

namespace ks {
namespace KS_ISA {

// --- Blocks --------------------------------------------------------------------------------------

struct Block {
  const float* planes;      // The first channel's, at the first tap of the block's first pixel.
  int64_t plane_size;       // Floats from the plane of one channel to the next.
  int64_t row_step;         // Floats from one row of a plane to the next.
  const int32_t* channels;  // The connections: source channels, counted from the one of `planes`,
  const float* filter;      // and their taps.
  int64_t connections;
  int64_t kernel_height;
  // The part of the block's window, [rows + kernel_height - 1][columns + kernel_width - 1] vectors,
  // that is in the plane. The rest is padding; it is less than half a kernel on each side.
  int64_t row_begin, row_end, column_begin, column_end;
  int64_t accumulate;  // 1: adds to what `sums` holds.
  float* sums;         // [rows][columns][lanes]
};

typedef void (*BlockFunction)(const Block&);

// A kind of kernel: its width and how many rows of its taps are in registers at a time.
template <int kRowsOfTaps, int kColumnsOfTaps, int kBlockRows, int kBlockColumns,
          bool kFetch = false>
struct Kind {
  static constexpr int kTapRows = kRowsOfTaps, kTapColumns = kColumnsOfTaps;
  // Columns of taps whose weights are in registers at a time. All of them would leave too few of 16
  // registers.
  static constexpr int kWeights = kRegisters == 16 && kTapColumns > 5 ? 4 : kTapColumns;
  // Whether to fetch the next connection's window: it pays where blocks are few and wide.
  static constexpr bool kFetchNext = kFetch;
  // Limits of a block. Beside its sums there are weights and one or two operands.
  static constexpr int kFree = kRegisters - kTapRows * kWeights - 2;
  static constexpr int kMaxSums = kFree < 22 ? kFree : 22;
  static constexpr int kMaxRows = kBlockRows < kMaxSums ? kBlockRows : kMaxSums;
  static constexpr int kMaxColumns = kBlockColumns < kMaxSums ? kBlockColumns : kMaxSums;
};
#if KS_VECTOR_BYTES == 64
typedef Kind<3, 3, 8, 5> ThreeByThree;
#else
typedef Kind<1, 3, 4, 8> ThreeByThree;
#endif
typedef Kind<1, 3, 4, 8> ThreeWide;
typedef Kind<1, 5, 4, 8> FiveWide;
typedef Kind<1, 7, 4, 9, true> SevenWide;

// Enough separate sums to hide the latency of a multiply-add: small blocks keep several for a
// pixel.
constexpr int kSumsInFlight = 8;
constexpr int Least(int a, int b) { return a < b ? a : b; }

constexpr int64_t kFilterAhead = 256;  // Floats of the filter that are fetched before their use.

// Adds the products with K::kTapRows rows of a connection's taps, from row `first` on and from
// column kBegin on.
template <typename K, int kRows, int kColumns, bool kEdge, int kBegin, int kSets>
KS_INLINE void AddTaps(const Block& block, const float* plane, const float* next_plane,
                       int64_t row_step, const float* filter, int64_t first,
                       Vec (&sums)[kSets][kRows][kColumns]) {
  constexpr int kTapRows = K::kTapRows, kTapColumns = K::kTapColumns;
  constexpr int kEnd = Least(kBegin + K::kWeights, kTapColumns);
  Vec weights[kTapRows][kEnd - kBegin];
  KS_UNROLL
  for (int i = 0; i < kTapRows; ++i) {
    KS_UNROLL
    for (int j = kBegin; j < kEnd; ++j) {
      weights[i][j - kBegin] = Splat(filter[i * kTapColumns + j]);
    }
  }
  const float* row = plane + first * row_step;
  KS_UNROLL
  for (int q = 0; q < kRows + kTapRows - 1; ++q, row += row_step) {
    // Only the outermost rows and columns can be padding.
    if (!kEdge) {
    } else if (kTapRows == 1 ? first + q < block.row_begin || first + q >= block.row_end
                             : (q < kTapRows / 2 && q < block.row_begin) ||
                                   (q >= kRows + kTapRows / 2 && q >= block.row_end)) {
      continue;
    }
    KS_UNROLL
    for (int p = kBegin; p < kColumns + kEnd - 1; ++p) {
      if (kEdge && ((p < kTapColumns / 2 && p < block.column_begin) ||
                    (p >= kColumns + kTapColumns / 2 && p >= block.column_end))) {
        continue;
      }
      const Vec x = Load(row + p * kLanes);
      if (K::kFetchNext && kBegin == 0) {
        __builtin_prefetch(next_plane + (row - plane) + p * kLanes);
      }
      KS_UNROLL
      for (int i = 0; i < kTapRows; ++i) {
        KS_UNROLL
        for (int j = kBegin; j < kEnd; ++j) {
          if (q - i >= 0 && q - i < kRows && p - j >= 0 && p - j < kColumns) {
            sums[(i * kTapColumns + j) % kSets][q - i][p - j] += weights[i][j - kBegin] * x;
          }
        }
      }
    }
  }
  if constexpr (kEnd < kTapColumns) {
    AddTaps<K, kRows, kColumns, kEdge, kEnd>(block, plane, next_plane, row_step, filter, first,
                                             sums);
  }
}

// kEdge: part of the window may be padding.
template <typename K, int kRows, int kColumns, bool kEdge>
void SumBlock(const Block& block) {
  constexpr int kTapRows = K::kTapRows, kTapColumns = K::kTapColumns;
  constexpr int kWanted =
      Least((kSumsInFlight + kRows * kColumns - 1) / (kRows * kColumns), kTapRows * kTapColumns);
  constexpr int kSets = Least(kWanted, K::kFree / (kRows * kColumns));
  Vec sums[kSets][kRows][kColumns] = {};
  if (block.accumulate) {
    KS_UNROLL
    for (int r = 0; r < kRows; ++r) {
      KS_UNROLL
      for (int c = 0; c < kColumns; ++c) {
        sums[0][r][c] = Load(block.sums + (r * kColumns + c) * kLanes);
      }
    }
  }
  const int64_t row_step = block.row_step;
  const float* filter = block.filter;
  const float* filter_end = filter + block.connections * block.kernel_height * kTapColumns;
  const int32_t* channel = block.channels;
  for (const int32_t* end = channel + block.connections; channel != end; ++channel) {
    const float* plane = block.planes + *channel * block.plane_size;
    // The last connection fetches its own plane again.
    const float* next_plane = block.planes + channel[channel + 1 != end] * block.plane_size;
    const int64_t tap_rows = kTapRows == 1 ? block.kernel_height : kTapRows;
    for (int64_t first = 0; first < tap_rows; first += kTapRows) {
      const float* taps = filter;
      filter += kTapRows * kTapColumns;
      // The hardware loses this stream among the loads of planes.
      const float* ahead = filter + kFilterAhead;
      __builtin_prefetch(ahead < filter_end ? ahead : filter_end);
      AddTaps<K, kRows, kColumns, kEdge, 0>(block, plane, next_plane, row_step, taps, first, sums);
    }
  }
  KS_UNROLL
  for (int r = 0; r < kRows; ++r) {
    KS_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      Vec sum = sums[0][r][c];
      KS_UNROLL
      for (int s = 1; s < kSets; ++s) sum += sums[s][r][c];
      Store(block.sums + (r * kColumns + c) * kLanes, sum);
    }
  }
}

// SumBlock for a block of rows x columns.
template <typename K, int kRows = K::kMaxRows, int kColumns = K::kMaxColumns>
BlockFunction FindBlock(int64_t rows, int64_t columns, bool edge) {
  if constexpr (kRows == 0) {
    return nullptr;
  } else if constexpr (kColumns == 0) {
    return FindBlock<K, kRows - 1, K::kMaxColumns>(rows, columns, edge);
  } else {
    if constexpr (kRows * kColumns <= K::kMaxSums) {
      if (rows == kRows && columns == kColumns) {
        return edge ? SumBlock<K, kRows, kColumns, true> : SumBlock<K, kRows, kColumns, false>;
      }
    }
    return FindBlock<K, kRows, kColumns - 1>(rows, columns, edge);
  }
}

struct KindTraits {
  int64_t tap_rows, max_rows, max_columns, max_sums;
  BlockFunction (*find)(int64_t rows, int64_t columns, bool edge);
};
template <typename K>
KindTraits TraitsOf() {
  return {K::kTapRows, K::kMaxRows, K::kMaxColumns, K::kMaxSums, FindBlock<K>};
}

// False when there is no kind for such a kernel.
inline bool FindKind(int64_t kernel_height, int64_t kernel_width, KindTraits* traits) {
  if (kernel_height == 3 && kernel_width == 3) {
    *traits = TraitsOf<ThreeByThree>();
  } else if (kernel_width == 3) {
    *traits = TraitsOf<ThreeWide>();
  } else if (kernel_width == 5) {
    *traits = TraitsOf<FiveWide>();
  } else if (kernel_width == 7) {
    *traits = TraitsOf<SevenWide>();
  } else {
    return false;
  }
  return true;
}

// --- One tap -------------------------------------------------------------------------------------

// A multiply-add takes a load of its own then, unless two result channels share it. What matters
// besides is that loads come from the L1 cache: where the connections are many, source channels are
// cut into parts whose planes stay there for all result channels. Lists of connections are short
// then, and are laid out in the order in which they are used.

// The connections of a part, each its plane and its weight. They make up a list for each result
// channel or three for each pair of them: those that both have, as two entries each, those that
// only the first and those that only the second has.
struct Lists {
  const float* planes;     // Of the part.
  const int32_t* offsets;  // [kept]: floats from `planes` to the plane of a connection.
  const float* weights;    // [kept]
  const int32_t* begins;   // Of the lists of the part, and where the last one ends.
  const int32_t* order;    // [out_channels]: the result channels.
};

struct PixelSums {
  Lists lists;
  int64_t first;  // Result channel of `sums`.
  float* sums;
  int64_t stride;  // Floats from the sums of one result channel to the next.
  bool accumulate;
};

typedef void (*PixelFunction)(const PixelSums&, int64_t begin, int64_t end);
constexpr int kMaxPixels = kRegisters == 32 ? 16 : 13;  // Vectors of a region
constexpr int kMaxPaired = (kRegisters - 3) / 2;        // and of one whose channels are paired.

// Adds the connections from `at` to `end`; returns `end`.
template <int kPixels>
KS_INLINE int32_t AddList(const Lists& lists, int32_t at, int32_t end, Vec (&sums)[kPixels]) {
  for (; at < end; ++at) {
    const float* plane = lists.planes + lists.offsets[at];
    const Vec weight = Splat(lists.weights[at]);
    KS_UNROLL
    for (int i = 0; i < kPixels; ++i) sums[i] += weight * Load(plane + i * kLanes);
  }
  return at;
}
template <int kPixels>
KS_INLINE void LoadSums(const float* from, Vec (&sums)[kPixels]) {
  KS_UNROLL
  for (int i = 0; i < kPixels; ++i) sums[i] = Load(from + i * kLanes);
}
template <int kPixels>
KS_INLINE void KeepSums(const Vec (&sums)[kPixels], float* to) {
  KS_UNROLL
  for (int i = 0; i < kPixels; ++i) Store(to + i * kLanes, sums[i]);
}

// The sums of result channels order[begin], ..., order[end - 1] in all pixels of a region.
template <int kPixels>
void SumPixels(const PixelSums& work, int64_t begin, int64_t end) {
  const Lists lists = work.lists;
  int32_t at = lists.begins[begin];
  for (int64_t k = begin; k < end; ++k) {
    float* const target = work.sums + (lists.order[k] - work.first) * work.stride;
    if (work.accumulate && at == lists.begins[k + 1]) continue;
    Vec sums[kPixels] = {};
    if (work.accumulate) LoadSums<kPixels>(target, sums);
    at = AddList<kPixels>(lists, at, lists.begins[k + 1], sums);
    KeepSums<kPixels>(sums, target);
  }
}

// The same for pairs: `begin` is even, and `end` is unless it is the number of result channels.
template <int kPixels>
void SumPixelPairs(const PixelSums& work, int64_t begin, int64_t end) {
  const Lists lists = work.lists;
  int32_t at = lists.begins[begin / 2 * 3];
  for (int64_t k = begin; k < end; k += 2) {
    const int32_t* const ends = lists.begins + k / 2 * 3 + 1;
    float* const target = work.sums + (lists.order[k] - work.first) * work.stride;
    // A channel without a second one is its own, without connections and overwritten.
    float* const second =
        k + 1 == end ? target : work.sums + (lists.order[k + 1] - work.first) * work.stride;
    Vec sums[kPixels] = {}, second_sums[kPixels] = {};
    if (work.accumulate) {
      LoadSums<kPixels>(target, sums);
      LoadSums<kPixels>(second, second_sums);
    }
    for (; at < ends[0]; at += 2) {
      const float* plane = lists.planes + lists.offsets[at];
      const Vec weight = Splat(lists.weights[at]), second_weight = Splat(lists.weights[at + 1]);
      KS_UNROLL
      for (int i = 0; i < kPixels; ++i) {
        const Vec x = Load(plane + i * kLanes);
        sums[i] += weight * x;
        second_sums[i] += second_weight * x;
      }
    }
    at = AddList<kPixels>(lists, at, ends[1], sums);
    at = AddList<kPixels>(lists, at, ends[2], second_sums);
    KeepSums<kPixels>(second_sums, second);
    KeepSums<kPixels>(sums, target);
  }
}

template <int kPixels = kMaxPixels>
PixelFunction FindPixels(int64_t pixels, bool paired) {
  if constexpr (kPixels == 0) {
    return nullptr;
  } else {
    if (pixels != kPixels) return FindPixels<kPixels - 1>(pixels, paired);
    if constexpr (kPixels <= kMaxPaired) {
      if (paired) return SumPixelPairs<kPixels>;
    }
    return SumPixels<kPixels>;
  }
}

}  // namespace KS_ISA
}  // namespace ks

#endif  // KERAS_SPARSE_CUSTOM_OPS_KERNELS_CPU_REGION_SUMS_H_
