// Copyright 2026 The keras_sparse Authors. Licensed under the Apache License, Version 2.0.
//
// The operations as scalar loops in the order of their formulas: what the routines are tested
// against, and what runs where no routine takes the arguments. A work item is one image of the
// result or, for filter gradients, one connection or one row of the thinned filter.

#include <string.h>

#include <limits>

#include "custom_ops/kernels/cpu/routines.h"

namespace ks {
namespace reference {
namespace {

int64_t InputRow(const KsGeometry& g, int64_t y, int64_t i) {
  return y * g.stride_height + i * g.dilation_height - g.pad_top;
}

int64_t InputColumn(const KsGeometry& g, int64_t x, int64_t j) {
  return x * g.stride_width + j * g.dilation_width - g.pad_left;
}

// Calls visit(input pixel index, output pixel index) for every pair of pixels of image n that meet
// at tap (i, j).
template <typename Visit>
void ForEachPair(const KsGeometry& g, int64_t n, int64_t i, int64_t j, const Visit& visit) {
  for (int64_t y = 0; y < g.out_height; ++y) {
    const int64_t row = InputRow(g, y, i);
    if (row < 0 || row >= g.in_height) continue;
    for (int64_t x = 0; x < g.out_width; ++x) {
      const int64_t column = InputColumn(g, x, j);
      if (column < 0 || column >= g.in_width) continue;
      visit((n * g.in_height + row) * g.in_width + column,
            (n * g.out_height + y) * g.out_width + x);
    }
  }
}

// Calls visit(kept weight, i, j, input channel, output channel) for the weights of the table;
// `kept weight` indexes the filter.
template <typename Visit>
void ForEachWeight(const KsArguments& a, int64_t first, int64_t last, const Visit& visit) {
  const KsGeometry& g = a.geometry;
  if (a.operation < KS_THINNED_CONV2D) {
    const int64_t taps = g.kernel_height * g.kernel_width;
    int64_t o = 0;
    for (int64_t c = first; c < last; ++c) {
      while (a.row_splits[o + 1] <= c) ++o;
      for (int64_t t = 0; t < taps; ++t) {
        visit(c * taps + t, t / g.kernel_width, t % g.kernel_width,
              static_cast<int64_t>(a.input_channels[c]), o);
      }
    }
  } else {
    for (int64_t k = first; k < last; ++k) {
      const int64_t tap = a.indices[k] / g.in_channels;
      for (int64_t o = 0; o < g.out_channels; ++o) {
        visit(k * g.out_channels + o, tap / g.kernel_width, tap % g.kernel_width,
              a.indices[k] % g.in_channels, o);
      }
    }
  }
}

// Adds bias and residual and activates values [begin, end) of the output.
void Finish(const KsArguments& a, int64_t begin, int64_t end) {
  for (int64_t e = begin; e < end; ++e) {
    float value = a.output[e];
    if (a.bias != nullptr) value += a.bias[e % a.geometry.out_channels];
    if (a.residual != nullptr) value += a.residual[e];
    if (a.activation != KS_LINEAR && value < 0) value = 0;  // NaN stays.
    if (a.activation == KS_RELU6 && value > 6) value = 6;
    a.output[e] = value;
  }
}

// `sums` is an image of sums where they are pooled, and not used otherwise.
void Forward(const KsArguments& a, int64_t n, float* sums) {
  const KsGeometry& g = a.geometry;
  const int64_t pixels = g.out_height * g.out_width;
  const int64_t size = pixels * g.out_channels;
  if (a.pool <= 1) sums = a.output + n * size;
  if (size > 0) memset(sums, 0, size * sizeof(float));
  ForEachWeight(a, 0, a.kept, [&](int64_t w, int64_t i, int64_t j, int64_t s, int64_t o) {
    ForEachPair(g, n, i, j, [&](int64_t in, int64_t out) {
      sums[(out - n * pixels) * g.out_channels + o] +=
          a.filter[w] * a.input[in * g.in_channels + s];
    });
  });
  if (a.pool <= 1) {
    Finish(a, n * size, (n + 1) * size);
    return;
  }
  ks_max_pool(&a, sums, n);
  const int64_t pooled = g.out_height / a.pool * (g.out_width / a.pool) * g.out_channels;
  Finish(a, n * pooled, (n + 1) * pooled);
}

void BackpropInput(const KsArguments& a, int64_t n) {
  const KsGeometry& g = a.geometry;
  const int64_t size = g.in_height * g.in_width * g.in_channels;
  if (size > 0) memset(a.output + n * size, 0, size * sizeof(float));
  ForEachWeight(a, 0, a.kept, [&](int64_t w, int64_t i, int64_t j, int64_t s, int64_t o) {
    ForEachPair(g, n, i, j, [&](int64_t in, int64_t out) {
      a.output[in * g.in_channels + s] += a.filter[w] * a.out_backprop[out * g.out_channels + o];
    });
  });
}

void BackpropFilter(const KsArguments& a, int64_t first, int64_t last) {
  const KsGeometry& g = a.geometry;
  ForEachWeight(a, first, last, [&](int64_t w, int64_t i, int64_t j, int64_t s, int64_t o) {
    double sum = 0;
    for (int64_t n = 0; n < g.batch; ++n) {
      ForEachPair(g, n, i, j, [&](int64_t in, int64_t out) {
        sum += static_cast<double>(a.input[in * g.in_channels + s]) *
               a.out_backprop[out * g.out_channels + o];
      });
    }
    a.output[w] = static_cast<float>(sum);
  });
}

bool IsBackpropFilter(KsOperation operation) {
  return operation == KS_CONNECTION_CONV2D_BACKPROP_FILTER ||
         operation == KS_THINNED_CONV2D_BACKPROP_FILTER;
}

bool IsBackpropInput(KsOperation operation) {
  return operation == KS_CONNECTION_CONV2D_BACKPROP_INPUT ||
         operation == KS_THINNED_CONV2D_BACKPROP_INPUT;
}

}  // namespace

int Plan(const KsArguments* arguments, KsPlan* plan) {
  memset(plan, 0, sizeof(*plan));
  plan->num_stages = 1;
  plan->stages[0].items =
      IsBackpropFilter(arguments->operation) ? arguments->kept : arguments->geometry.batch;
  plan->stages[0].cost = 1000000;
  const KsGeometry& g = arguments->geometry;
  if (arguments->pool > 1) {
    plan->scratch_bytes = g.out_height * g.out_width * g.out_channels * int64_t{sizeof(float)};
  }
  return 1;
}

void Run(const KsArguments* arguments, const KsPlan*, int32_t, int64_t begin, int64_t end,
         const KsMemory* memory) {
  if (IsBackpropFilter(arguments->operation)) {
    BackpropFilter(*arguments, begin, end);
    return;
  }
  for (int64_t n = begin; n < end; ++n) {
    if (IsBackpropInput(arguments->operation)) {
      BackpropInput(*arguments, n);
    } else {
      Forward(*arguments, n, static_cast<float*>(memory->scratch));
    }
  }
}

}  // namespace reference
}  // namespace ks

void ks_max_pool(const KsArguments* arguments, const float* image, int64_t n) {
  const KsGeometry& g = arguments->geometry;
  const int64_t pool = arguments->pool, channels = g.out_channels;
  const int64_t rows = g.out_height / pool, columns = g.out_width / pool;
  float* output = arguments->output + n * rows * columns * channels;
  for (int64_t y = 0; y < rows; ++y) {
    for (int64_t x = 0; x < columns; ++x, output += channels) {
      for (int64_t o = 0; o < channels; ++o) output[o] = std::numeric_limits<float>::lowest();
      for (int64_t i = 0; i < pool; ++i) {
        for (int64_t j = 0; j < pool; ++j) {
          const float* pixel = image + ((y * pool + i) * g.out_width + x * pool + j) * channels;
          for (int64_t o = 0; o < channels; ++o) {
            output[o] = pixel[o] > output[o] ? pixel[o] : output[o];
          }
        }
      }
    }
  }
}
