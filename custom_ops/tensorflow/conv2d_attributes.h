// Copyright 2026 The keras_sparse Authors. Licensed under the Apache License, Version 2.0.
//
// What the convolution ops share: their attributes, and the size rules of a convolution.

#ifndef KERAS_SPARSE_CUSTOM_OPS_TENSORFLOW_CONV2D_ATTRIBUTES_H_
#define KERAS_SPARSE_CUSTOM_OPS_TENSORFLOW_CONV2D_ATTRIBUTES_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "custom_ops/kernels/conv2d.h"

namespace keras_sparse {

template <typename... Args>
absl::Status InvalidArgument(const Args&... args) {
  return absl::InvalidArgumentError(absl::StrCat(args...));
}

enum class Padding { kSame, kValid, kExplicit };

// Heights are at index 0, widths at index 1.
struct Conv2DAttributes {
  int64_t strides[2];
  int64_t dilations[2];
  Padding padding;
  int64_t paddings[2][2];  // [axis][before, after]; zero unless padding is kExplicit.
  int64_t kernel_size[2];  // Where the op has that attribute.
};

absl::Status CheckAttributes(const std::vector<int64_t>& strides,
                             const std::vector<int64_t>& dilations, const std::string& padding,
                             const std::vector<int64_t>& explicit_paddings,
                             Conv2DAttributes* attributes);

absl::Status CheckKernelSize(const std::vector<int64_t>& kernel_size, Conv2DAttributes* attributes);

// Reads and checks the attributes. Context is an OpKernelConstruction or an InferenceContext.
template <typename Context>
absl::Status ReadAttributes(Context* context, bool has_kernel_size, Conv2DAttributes* attributes) {
  std::vector<int64_t> strides, dilations, explicit_paddings;
  std::string padding;
  absl::Status status = context->GetAttr("strides", &strides);
  if (status.ok()) status = context->GetAttr("dilations", &dilations);
  if (status.ok()) status = context->GetAttr("padding", &padding);
  if (status.ok()) status = context->GetAttr("explicit_paddings", &explicit_paddings);
  if (status.ok()) {
    status = CheckAttributes(strides, dilations, padding, explicit_paddings, attributes);
  }
  if (status.ok() && has_kernel_size) {
    std::vector<int64_t> kernel_size;
    status = context->GetAttr("kernel_size", &kernel_size);
    if (status.ok()) status = CheckKernelSize(kernel_size, attributes);
  }
  return status;
}

// Of the fused ops. An input that may be missing is a list of at most one tensor.
struct EpilogueAttributes {
  int64_t num_bias, num_residual;
  KsActivation activation;
};

absl::Status CheckEpilogue(int64_t num_bias, int64_t num_residual, const std::string& activation,
                           EpilogueAttributes* attributes);

template <typename Context>
absl::Status ReadEpilogue(Context* context, bool may_have_residual,
                          EpilogueAttributes* attributes) {
  int64_t num_bias, num_residual = 0;
  std::string activation;
  absl::Status status = context->GetAttr("num_bias", &num_bias);
  if (status.ok() && may_have_residual) status = context->GetAttr("num_residual", &num_residual);
  if (status.ok()) status = context->GetAttr("activation", &activation);
  if (status.ok()) status = CheckEpilogue(num_bias, num_residual, activation, attributes);
  return status;
}

// Of an op that pools.
absl::Status CheckPoolSize(int64_t pool_size);

// The output size along an axis (0 height, 1 width), and the padding before the first pixel.
absl::Status OutputSize(const Conv2DAttributes& attributes, int axis, int64_t input_size,
                        int64_t kernel_size, int64_t* output_size, int64_t* pad_before);

}  // namespace keras_sparse

#endif  // KERAS_SPARSE_CUSTOM_OPS_TENSORFLOW_CONV2D_ATTRIBUTES_H_
