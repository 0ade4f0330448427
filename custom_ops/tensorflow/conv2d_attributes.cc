// Copyright 2026 The keras_sparse Authors. Licensed under the Apache License, Version 2.0.

#include "custom_ops/tensorflow/conv2d_attributes.h"

#include <algorithm>
#include <limits>

#include "absl/strings/str_join.h"

namespace keras_sparse {
namespace {

// Far beyond any image, and small enough that sums and products of two stay in 64 bits.
constexpr int64_t kMaxAttribute = std::numeric_limits<int32_t>::max();
constexpr int64_t kMaxSize = int64_t{1} << 40;

absl::Status CheckPair(const char* name, const std::vector<int64_t>& values, int64_t* pair) {
  if (values.size() != 2) {
    return InvalidArgument(name, " must have 2 values (height, width), received [",
                           absl::StrJoin(values, ", "), "]");
  }
  for (int axis = 0; axis < 2; ++axis) {
    if (values[axis] < 1 || values[axis] > kMaxAttribute) {
      return InvalidArgument(name, " must be between 1 and 2^31 - 1, received [",
                             absl::StrJoin(values, ", "), "]");
    }
    pair[axis] = values[axis];
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status CheckAttributes(const std::vector<int64_t>& strides,
                             const std::vector<int64_t>& dilations, const std::string& padding,
                             const std::vector<int64_t>& explicit_paddings,
                             Conv2DAttributes* attributes) {
  *attributes = {};
  absl::Status status = CheckPair("strides", strides, attributes->strides);
  if (!status.ok()) return status;
  status = CheckPair("dilations", dilations, attributes->dilations);
  if (!status.ok()) return status;

  if (padding == "EXPLICIT") {
    attributes->padding = Padding::kExplicit;
    if (explicit_paddings.size() != 4) {
      return InvalidArgument(
          "explicit_paddings must have 4 values (top, bottom, left, right) when padding is "
          "EXPLICIT, received [",
          absl::StrJoin(explicit_paddings, ", "), "]");
    }
    for (int i = 0; i < 4; ++i) {
      if (explicit_paddings[i] < 0 || explicit_paddings[i] > kMaxAttribute) {
        return InvalidArgument("explicit_paddings must be between 0 and 2^31 - 1, received [",
                               absl::StrJoin(explicit_paddings, ", "), "]");
      }
      attributes->paddings[i / 2][i % 2] = explicit_paddings[i];
    }
    return absl::OkStatus();
  }
  if (padding == "SAME") {
    attributes->padding = Padding::kSame;
  } else if (padding == "VALID") {
    attributes->padding = Padding::kValid;
  } else {
    return InvalidArgument("padding must be SAME, VALID or EXPLICIT, received ", padding);
  }
  if (!explicit_paddings.empty()) {
    return InvalidArgument("explicit_paddings must be empty unless padding is EXPLICIT, received [",
                           absl::StrJoin(explicit_paddings, ", "), "] with padding ", padding);
  }
  return absl::OkStatus();
}

absl::Status CheckKernelSize(const std::vector<int64_t>& kernel_size,
                             Conv2DAttributes* attributes) {
  return CheckPair("kernel_size", kernel_size, attributes->kernel_size);
}

absl::Status CheckEpilogue(int64_t num_bias, int64_t num_residual, const std::string& activation,
                           EpilogueAttributes* attributes) {
  if (num_bias < 0 || num_bias > 1) {
    return InvalidArgument("bias must be a list of at most one tensor, received ", num_bias);
  }
  if (num_residual < 0 || num_residual > 1) {
    return InvalidArgument("residual must be a list of at most one tensor, received ",
                           num_residual);
  }
  *attributes = {num_bias, num_residual, KS_LINEAR};
  if (activation == "relu") {
    attributes->activation = KS_RELU;
  } else if (activation == "relu6") {
    attributes->activation = KS_RELU6;
  } else if (activation != "linear") {
    return InvalidArgument("activation must be linear, relu or relu6, received ", activation);
  }
  return absl::OkStatus();
}

absl::Status CheckPoolSize(int64_t pool_size) {
  if (pool_size < 1 || pool_size > kMaxAttribute) {
    return InvalidArgument("pool_size must be between 1 and 2^31 - 1, received ", pool_size);
  }
  return absl::OkStatus();
}

absl::Status OutputSize(const Conv2DAttributes& attributes, int axis, int64_t input_size,
                        int64_t kernel_size, int64_t* output_size, int64_t* pad_before) {
  const char* name = axis == 0 ? "height" : "width";
  const int64_t stride = attributes.strides[axis];
  const int64_t dilation = attributes.dilations[axis];
  if (input_size < 0 || input_size > kMaxSize) {
    return InvalidArgument("input ", name, " must be between 0 and 2^40, received ", input_size);
  }
  if (kernel_size < 1 || kernel_size > kMaxAttribute) {
    return InvalidArgument("kernel ", name, " must be between 1 and 2^31 - 1, received ",
                           kernel_size);
  }
  const int64_t reach = (kernel_size - 1) * dilation + 1;  // Below 2^62.
  if (reach > kMaxSize) {
    return InvalidArgument("kernel ", name, " ", kernel_size, " with dilation ", dilation,
                           " must reach over at most 2^40 pixels, received ", reach);
  }
  if (attributes.padding == Padding::kSame) {
    *output_size = (input_size + stride - 1) / stride;
    const int64_t total = std::max<int64_t>(0, (*output_size - 1) * stride + reach - input_size);
    *pad_before = *output_size == 0 ? 0 : total / 2;
    return absl::OkStatus();
  }
  const int64_t before = attributes.paddings[axis][0];
  const int64_t after = attributes.paddings[axis][1];
  const int64_t padded = input_size + before + after;
  if (padded < reach) {
    return InvalidArgument("padded input ", name, " must be at least the dilated kernel's ", reach,
                           ", received ", padded);
  }
  *output_size = (padded - reach) / stride + 1;
  *pad_before = before;
  return absl::OkStatus();
}

}  // namespace keras_sparse
