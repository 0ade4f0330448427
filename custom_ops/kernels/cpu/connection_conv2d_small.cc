// Copyright 2026 The keras_sparse Authors. Licensed under the Apache License, Version 2.0.
//
// Connection-table convolution of images so small that one vector holds a whole channel of one or
// of several of them; forward and gradient with respect to the input, any stride and dilation.
//
// A tap is a permutation of the pixels, with zeros where it meets the padding: one load of a
// channel serves all taps, and the channels of a vector of images are small enough to stay in the
// L1 cache. The region routine needs a load for every tap there, from planes nine times as large.

#include "custom_ops/kernels/cpu/epilogue.h"
#include "custom_ops/kernels/cpu/planes.h"
#include "custom_ops/kernels/cpu/routines.h"
#include "custom_ops/kernels/cpu/transposed_table.h"

namespace ks {
namespace KS_ISA {
namespace {

constexpr int kMaxTaps = 9;            // Whose sums and permutations are in registers.
constexpr int64_t kMostVectors = 2;    // With more, regions fill their lanes and win.
constexpr int64_t kFilterAhead = 128;  // Floats of the filter that are fetched before their use.

struct Parameters {
  int64_t batch;
  int64_t pixels, channels;             // Of an image of the source.
  int64_t result_pixels, out_channels;  // Of an image of the result.
  int64_t images;                       // In a vector.
  int64_t vectors;
  int64_t splits;      // Parts of the result's channels.
  int64_t transposed;  // 1: the gradient, by the transposed table.
};

#if KS_VECTOR_BYTES == 64 && defined(__AVX512F__)

typedef __m512i Lookup;

// Lane i is lane lookup[i] of x, or 0 where lookup[i] is kLanes.
KS_INLINE Vec Permute(Vec x, Lookup lookup) {
  return reinterpret_cast<Vec>(
      _mm512_permutex2var_ps(reinterpret_cast<__m512>(x), lookup, _mm512_setzero_ps()));
}

struct Table {
  const int32_t* row_splits;
  const int32_t* channels;
  const float* filter;
};

struct Taps {
  int32_t source[kMaxTaps][kLanes];
};

// Where the pixels of a vector of the result find each tap in a vector of the source.
void FindTaps(const KsGeometry& g, const Parameters& p, Taps* taps) {
  for (int64_t t = 0; t < g.kernel_height * g.kernel_width; ++t) {
    for (int64_t l = 0; l < kLanes; ++l) taps->source[t][l] = kLanes;
    const int64_t i = t / g.kernel_width * g.dilation_height - g.pad_top;
    const int64_t j = t % g.kernel_width * g.dilation_width - g.pad_left;
    for (int64_t image = 0; image < p.images; ++image) {
      for (int64_t out = 0; out < g.out_height * g.out_width; ++out) {
        const int64_t y = out / g.out_width * g.stride_height + i;
        const int64_t x = out % g.out_width * g.stride_width + j;
        if (y < 0 || y >= g.in_height || x < 0 || x >= g.in_width) continue;
        const int64_t in = y * g.in_width + x;
        if (p.transposed) {
          taps->source[t][image * p.result_pixels + in] =
              static_cast<int32_t>(image * p.pixels + out);
        } else {
          taps->source[t][image * p.result_pixels + out] =
              static_cast<int32_t>(image * p.pixels + in);
        }
      }
    }
  }
}

// The sums of `count` channels of the result from `first` on.
template <int kTaps>
void SumChannels(const Table& table, const Taps& taps, const float* planes, int64_t first,
                 int64_t count, Vec* results) {
  Lookup lookups[kTaps];
  KS_UNROLL
  for (int t = 0; t < kTaps; ++t) lookups[t] = _mm512_loadu_si512(taps.source[t]);
  for (int64_t k = 0; k < count; ++k) {
    const int64_t begin = table.row_splits[first + k], end = table.row_splits[first + k + 1];
    const float* filter = table.filter + begin * kTaps;
    Vec sums[kTaps] = {};  // One for each tap: no addition waits for another.
    for (const int32_t* channel = table.channels + begin; channel != table.channels + end;
         ++channel, filter += kTaps) {
      const Vec x = Load(planes + *channel * kLanes);
      __builtin_prefetch(filter + kFilterAhead);
      KS_UNROLL
      for (int t = 0; t < kTaps; ++t) sums[t] += Splat(filter[t]) * Permute(x, lookups[t]);
    }
    KS_UNROLL
    for (int t = 1; t < kTaps; ++t) sums[0] += sums[t];
    results[k] = sums[0];
  }
}

typedef void (*SumFunction)(const Table&, const Taps&, const float*, int64_t, int64_t, Vec*);
SumFunction FindSum(int64_t taps) {
  const SumFunction functions[] = {nullptr,        SumChannels<1>, SumChannels<2>, SumChannels<3>,
                                   SumChannels<4>, SumChannels<5>, SumChannels<6>, SumChannels<7>,
                                   SumChannels<8>, SumChannels<9>};
  return functions[taps];
}

// Images of a vector times pixels: the lanes in use.
int64_t UsedLanes(const Parameters& p, int64_t vector, int64_t pixels) {
  return Min(p.images, p.batch - vector * p.images) * pixels;
}

// Channels [begin, end) of a vector of the source, a vector each.
void PackChannels(const Parameters& p, const float* source, int64_t vector, int64_t begin,
                  int64_t end, float* planes) {
  const int64_t used = UsedLanes(p, vector, p.pixels);
  const float* pixels = source + vector * p.images * p.pixels * p.channels;
  for (int64_t channel = begin; channel < end; channel += kLanes) {
    const int64_t count = Min(kLanes, end - channel);
    Vec rows[kLanes];
    for (int64_t l = 0; l < kLanes; ++l) {
      const float* pixel = pixels + l * p.channels + channel;
      rows[l] = l >= used ? Vec{} : count == kLanes ? Load(pixel) : LoadFirst(pixel, count);
    }
    Transpose(rows);
    for (int64_t c = 0; c < count; ++c) Store(planes + (channel + c) * kLanes, rows[c]);
  }
}

// Stores `count` channels from `first` on of a vector of the result.
void StoreChannels(const Parameters& p, int64_t vector, int64_t first, int64_t count,
                   const Epilogue& epilogue, Vec (&results)[kLanes], float* output) {
  const int64_t used = UsedLanes(p, vector, p.result_pixels);
  const int64_t begin = vector * p.images * p.result_pixels * p.out_channels + first;
  for (int64_t k = count; k < kLanes; ++k) results[k] = Vec{};
  Transpose(results);
  if (epilogue.used) {
    const float* residual =
        epilogue.residual == nullptr
            ? nullptr
            : epilogue.residual + vector * p.images * p.result_pixels * p.out_channels;
    intptr_t residuals[kLanes];
    for (int64_t l = 0; l < kLanes; ++l) {  // A lane without a pixel reads the first one.
      residuals[l] = reinterpret_cast<intptr_t>(residual + (l < used ? l * p.out_channels : 0));
    }
    FinishPixels(epilogue, first, count, residuals, results);
  }
  for (int64_t l = 0; l < used; ++l) {
    float* pixel = output + begin + l * p.out_channels;
    if (count == kLanes) {
      Store(pixel, results[l]);
    } else {
      StoreFirst(pixel, results[l], count);
    }
  }
}

int Plan(const KsArguments& arguments, bool transposed, KsPlan* plan) {
  const KsGeometry& g = arguments.geometry;
  const int64_t taps = g.kernel_height * g.kernel_width;
  const int64_t least = Min(Min(Min(g.batch, g.in_channels), Min(g.in_height, g.in_width)),
                            Min(Min(g.out_height, g.out_width), g.out_channels));
  if (least < 1 || taps < 2 || taps > kMaxTaps) return 0;
  if (Max(Max(g.in_height, g.in_width), Max(g.out_height, g.out_width)) > kLanes) return 0;
  const int64_t in = g.in_height * g.in_width, out = g.out_height * g.out_width;
  if (Max(in, out) > kLanes) return 0;
  Parameters p = {};
  p.transposed = transposed;
  p.batch = g.batch;
  p.pixels = transposed ? out : in;
  p.channels = transposed ? g.out_channels : g.in_channels;
  p.result_pixels = transposed ? in : out;
  p.out_channels = transposed ? g.in_channels : g.out_channels;
  p.images = kLanes / Max(in, out);
  p.vectors = CeilDiv(p.batch, p.images);
  if (p.vectors > kMostVectors) return 0;
  p.splits = Min(CeilDiv(kWantedItems, p.vectors), CeilDiv(p.out_channels, kLanes));
  memset(plan, 0, sizeof(*plan));
  KsStage* stage = plan->stages;
  stage->items = 1;
  stage->cost = 2000 + (transposed ? arguments.kept * 10 : 0);
  stage->prepares = KS_PREPARES_TABLE;
  ++stage;
  plan->table_bytes =
      PieceBytes(1, sizeof(Taps)) + (transposed ? TransposedTableBytes(arguments) : 0);
  if (transposed) {
    stage->items = TransposeFilterItems(arguments);
    stage->cost = 100 + arguments.kept * taps * 32 / p.out_channels;
    stage->prepares = KS_PREPARES_FILTER;
    ++stage;
    plan->filter_bytes = TransposedFilterBytes(arguments);
  }
  stage->items = p.vectors * p.splits;
  stage->cost =
      100 + (p.channels * 6 + arguments.kept * taps + p.out_channels * (taps + 8)) / p.splits;
  ++stage;
  plan->num_stages = static_cast<int32_t>(stage - plan->stages);
  plan->scratch_bytes = p.channels * kLanes * 4;
  SaveParameters(p, plan);
  return 1;
}

void Run(const KsArguments& arguments, const KsPlan* plan, int32_t stage, int64_t begin,
         int64_t end, const KsMemory* memory, const float* source) {
  const Parameters p = LoadParameters<Parameters>(plan);
  const KsGeometry& g = arguments.geometry;
  Table table = {arguments.row_splits, arguments.input_channels, arguments.filter};
  TransposedTable transposed = {};
  Arena arena = {static_cast<char*>(memory->table)};
  Taps* const taps = arena.Take<Taps>(1);
  if (p.transposed) {
    transposed = PlaceTransposedTable(arguments, &arena, memory->filter);
    table = {transposed.row_splits, transposed.channels, transposed.filter};
  }
  if (stage == 0) {
    FindTaps(g, p, taps);
    if (p.transposed) TransposeTable(arguments, transposed);
    return;
  }
  --stage;
  if (p.transposed && stage-- == 0) {
    TransposeFilter(arguments, transposed, begin, end, [](int64_t t) { return t; });
    return;
  }
  // Each thread packs for itself: that is less work than to read what another CPU has packed.
  float* const planes = static_cast<float*>(memory->scratch);
  int64_t held = memory->held == nullptr ? -1 : *memory->held;  // The vector in `planes`.
  const Epilogue epilogue = MakeEpilogue(arguments);
  const SumFunction sum = FindSum(g.kernel_height * g.kernel_width);
  const int64_t blocks = CeilDiv(p.out_channels, kLanes);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t vector = item / p.splits, split = item % p.splits;
    if (held != vector) PackChannels(p, source, vector, 0, p.channels, planes);
    held = vector;
    const int64_t last = Min(p.out_channels, PartBegin(blocks, p.splits, split + 1) * kLanes);
    for (int64_t o = PartBegin(blocks, p.splits, split) * kLanes; o < last; o += kLanes) {
      const int64_t count = Min(kLanes, last - o);
      Vec results[kLanes];
      sum(table, *taps, planes, o, count, results);
      StoreChannels(p, vector, o, count, epilogue, results, arguments.output);
    }
  }
  if (memory->held != nullptr) *memory->held = held;
}

#else  // Without permutations of a whole vector by a table.

int Plan(const KsArguments&, bool, KsPlan*) { return 0; }

void Run(const KsArguments&, const KsPlan*, int32_t, int64_t, int64_t, const KsMemory*,
         const float*) {}

#endif

}  // namespace

int ConnectionConv2DSmallPlan(const KsArguments* arguments, KsPlan* plan) {
  return arguments->pool > 1 ? 0 : Plan(*arguments, false, plan);
}

void ConnectionConv2DSmallRun(const KsArguments* arguments, const KsPlan* plan, int32_t stage,
                              int64_t begin, int64_t end, const KsMemory* memory) {
  Run(*arguments, plan, stage, begin, end, memory, arguments->input);
}

int ConnectionConv2DBackpropInputSmallPlan(const KsArguments* arguments, KsPlan* plan) {
  return Plan(*arguments, true, plan);
}

void ConnectionConv2DBackpropInputSmallRun(const KsArguments* arguments, const KsPlan* plan,
                                           int32_t stage, int64_t begin, int64_t end,
                                           const KsMemory* memory) {
  Run(*arguments, plan, stage, begin, end, memory, arguments->out_backprop);
}

}  // namespace KS_ISA
}  // namespace ks
