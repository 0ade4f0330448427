// Copyright 2026 The keras_sparse Authors. Licensed under the Apache License, Version 2.0.
//
// Registers the ops and infers their shapes. See custom_ops/kernels/conv2d.h for the two storage
// formats. Tensors are NHWC, float32.

#include <vector>

#include "custom_ops/tensorflow/conv2d_attributes.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace keras_sparse {
namespace {

using ::tensorflow::shape_inference::DimensionHandle;
using ::tensorflow::shape_inference::InferenceContext;
using ::tensorflow::shape_inference::ShapeHandle;

#define KS_RETURN_IF_ERROR(expression)        \
  do {                                        \
    const absl::Status status = (expression); \
    if (!status.ok()) return status;          \
  } while (false)

// Input `index`, which must have the rank.
absl::Status InputOfRank(InferenceContext* c, int index, const char* name, int rank,
                         ShapeHandle* shape) {
  const absl::Status status = c->WithRank(c->input(index), rank, shape);
  if (!status.ok()) {
    return InvalidArgument(name, " must have rank ", rank, ", received shape ",
                           c->DebugString(c->input(index)));
  }
  return absl::OkStatus();
}

absl::Status MergeDimensions(InferenceContext* c, DimensionHandle a, DimensionHandle b,
                             const char* rule, DimensionHandle* merged) {
  if (!c->Merge(a, b, merged).ok()) {
    return InvalidArgument(rule, ", received ", c->Value(a), " and ", c->Value(b));
  }
  return absl::OkStatus();
}

// Output height or width, unknown when one of its sources is.
absl::Status OutputDimension(InferenceContext* c, const Conv2DAttributes& attributes, int axis,
                             DimensionHandle input, DimensionHandle kernel,
                             DimensionHandle* output) {
  *output = c->UnknownDim();
  if (!c->ValueKnown(input)) return absl::OkStatus();
  if (attributes.padding != Padding::kSame && !c->ValueKnown(kernel)) return absl::OkStatus();
  int64_t size, pad_before;
  KS_RETURN_IF_ERROR(OutputSize(attributes, axis, c->Value(input),
                                c->ValueKnown(kernel) ? c->Value(kernel) : 1, &size, &pad_before));
  *output = c->MakeDim(size);
  return absl::OkStatus();
}

// Output channels of a table with these row_splits.
absl::Status TableChannels(InferenceContext* c, ShapeHandle row_splits, DimensionHandle* channels) {
  const DimensionHandle size = c->Dim(row_splits, 0);
  if (c->ValueKnown(size) && c->Value(size) < 1) {
    return InvalidArgument("row_splits must have out_channels + 1 values, received 0");
  }
  return c->Subtract(size, 1, channels);
}

// Which inputs an op has, and where; -1: not there.
struct Inputs {
  int input, input_sizes, filter, row_splits, input_channels, indices, out_backprop;
  int epilogue;  // The first of what the fused ops take beside.
  bool pool;     // Whether max pooling follows: then there is no residual.
};

// Checks the inputs of an epilogue, the first of which is input `next`, against the output of the
// convolution, and sharpens that with what they tell of it.
absl::Status InferEpilogue(InferenceContext* c, int next, bool pool, ShapeHandle* output) {
  EpilogueAttributes attributes;
  KS_RETURN_IF_ERROR(ReadEpilogue(c, !pool, &attributes));
  if (attributes.num_bias > 0) {
    ShapeHandle bias;
    DimensionHandle channels;
    KS_RETURN_IF_ERROR(InputOfRank(c, next++, "bias", 1, &bias));
    KS_RETURN_IF_ERROR(MergeDimensions(c, c->Dim(bias, 0), c->Dim(*output, 3),
                                       "bias must have a value for each output channel",
                                       &channels));
    KS_RETURN_IF_ERROR(c->ReplaceDim(*output, 3, channels, output));
  }
  if (attributes.num_residual > 0) {
    ShapeHandle residual;
    KS_RETURN_IF_ERROR(InputOfRank(c, next, "residual", 4, &residual));
    if (!c->Merge(*output, residual, &residual).ok()) {
      return InvalidArgument("residual must have the shape of the convolution's output, ",
                             c->DebugString(*output), ", received ",
                             c->DebugString(c->input(next)));
    }
    *output = residual;
  }
  return absl::OkStatus();
}

// Shrinks the output of a convolution to that of pooling by squares.
absl::Status InferPool(InferenceContext* c, ShapeHandle* output) {
  int64_t pool_size;
  KS_RETURN_IF_ERROR(c->GetAttr("pool_size", &pool_size));
  KS_RETURN_IF_ERROR(CheckPoolSize(pool_size));
  for (int axis = 1; axis <= 2; ++axis) {
    const DimensionHandle size = c->Dim(*output, axis);
    if (!c->ValueKnown(size)) continue;
    KS_RETURN_IF_ERROR(
        c->ReplaceDim(*output, axis, c->MakeDim(c->Value(size) / pool_size), output));
  }
  return absl::OkStatus();
}

absl::Status InferShape(InferenceContext* c, const Inputs& at) {
  const bool table = at.row_splits >= 0;
  const bool has_kernel_size = at.filter < 0 || !table;
  Conv2DAttributes attributes;
  KS_RETURN_IF_ERROR(ReadAttributes(c, has_kernel_size, &attributes));

  // The filter in its storage format: kept weights, kernel size, output channels.
  DimensionHandle kept, out_channels = c->UnknownDim();
  DimensionHandle kernel[2] = {c->UnknownDim(), c->UnknownDim()};
  if (has_kernel_size) {
    kernel[0] = c->MakeDim(attributes.kernel_size[0]);
    kernel[1] = c->MakeDim(attributes.kernel_size[1]);
  }
  ShapeHandle filter;
  if (table) {
    ShapeHandle row_splits, input_channels;
    KS_RETURN_IF_ERROR(InputOfRank(c, at.row_splits, "row_splits", 1, &row_splits));
    KS_RETURN_IF_ERROR(InputOfRank(c, at.input_channels, "input_channels", 1, &input_channels));
    KS_RETURN_IF_ERROR(TableChannels(c, row_splits, &out_channels));
    kept = c->Dim(input_channels, 0);
    if (at.filter >= 0) {
      KS_RETURN_IF_ERROR(InputOfRank(c, at.filter, "filter", 3, &filter));
      KS_RETURN_IF_ERROR(MergeDimensions(
          c, c->Dim(filter, 0), kept,
          "filter must have as many connections as input_channels has values", &kept));
      kernel[0] = c->Dim(filter, 1);
      kernel[1] = c->Dim(filter, 2);
    }
  } else {
    ShapeHandle indices;
    KS_RETURN_IF_ERROR(InputOfRank(c, at.indices, "indices", 1, &indices));
    kept = c->Dim(indices, 0);
    if (at.filter >= 0) {
      KS_RETURN_IF_ERROR(InputOfRank(c, at.filter, "filter", 2, &filter));
      KS_RETURN_IF_ERROR(MergeDimensions(c, c->Dim(filter, 0), kept,
                                         "filter must have as many rows as indices has values",
                                         &kept));
      out_channels = c->Dim(filter, 1);
    }
  }
  for (int axis = 0; axis < 2; ++axis) {
    if (c->ValueKnown(kernel[axis]) && c->Value(kernel[axis]) < 1) {
      return InvalidArgument("filter must have a kernel ", axis == 0 ? "height" : "width",
                             " of at least 1, received ", c->Value(kernel[axis]));
    }
  }

  // The input, or the shape it is to have.
  ShapeHandle input;
  if (at.input >= 0) {
    KS_RETURN_IF_ERROR(InputOfRank(c, at.input, "input", 4, &input));
  } else {
    ShapeHandle sizes;
    KS_RETURN_IF_ERROR(InputOfRank(c, at.input_sizes, "input_sizes", 1, &sizes));
    if (c->ValueKnown(c->Dim(sizes, 0)) && c->Value(c->Dim(sizes, 0)) != 4) {
      return InvalidArgument("input_sizes must have 4 values, received ",
                             c->Value(c->Dim(sizes, 0)));
    }
    KS_RETURN_IF_ERROR(c->MakeShapeFromShapeTensor(at.input_sizes, &input));
    KS_RETURN_IF_ERROR(c->WithRank(input, 4, &input));
  }
  DimensionHandle out_size[2];
  for (int axis = 0; axis < 2; ++axis) {
    KS_RETURN_IF_ERROR(OutputDimension(c, attributes, axis, c->Dim(input, 1 + axis), kernel[axis],
                                       &out_size[axis]));
  }

  if (at.out_backprop < 0) {
    ShapeHandle output = c->MakeShape({c->Dim(input, 0), out_size[0], out_size[1], out_channels});
    if (at.epilogue >= 0) KS_RETURN_IF_ERROR(InferEpilogue(c, at.epilogue, at.pool, &output));
    if (at.pool) KS_RETURN_IF_ERROR(InferPool(c, &output));
    c->set_output(0, output);
    return absl::OkStatus();
  }
  ShapeHandle out;
  DimensionHandle batch, unused;
  KS_RETURN_IF_ERROR(InputOfRank(c, at.out_backprop, "out_backprop", 4, &out));
  KS_RETURN_IF_ERROR(MergeDimensions(c, c->Dim(out, 0), c->Dim(input, 0),
                                     "out_backprop must have the batch size of the input", &batch));
  KS_RETURN_IF_ERROR(
      MergeDimensions(c, c->Dim(out, 1), out_size[0],
                      "out_backprop must have the height of the convolution's output", &unused));
  KS_RETURN_IF_ERROR(MergeDimensions(c, c->Dim(out, 2), out_size[1],
                                     "out_backprop must have the width of the convolution's output",
                                     &unused));
  KS_RETURN_IF_ERROR(MergeDimensions(c, c->Dim(out, 3), out_channels,
                                     "out_backprop must have the filter's output channels",
                                     &out_channels));
  if (at.filter >= 0) {
    KS_RETURN_IF_ERROR(c->ReplaceDim(input, 0, batch, &input));
    c->set_output(0, input);
  } else if (table) {
    c->set_output(0, c->MakeShape({kept, kernel[0], kernel[1]}));
  } else {
    c->set_output(0, c->Matrix(kept, out_channels));
  }
  return absl::OkStatus();
}

template <int kInput, int kInputSizes, int kFilter, int kRowSplits, int kInputChannels,
          int kIndices, int kOutBackprop, int kEpilogue = -1, bool kPool = false>
absl::Status InferShapeWith(InferenceContext* c) {
  return InferShape(c, {kInput, kInputSizes, kFilter, kRowSplits, kInputChannels, kIndices,
                        kOutBackprop, kEpilogue, kPool});
}

#define KS_COMMON_ATTRIBUTES                          \
  Attr("strides: list(int) = [1, 1]")                 \
      .Attr("dilations: list(int) = [1, 1]")          \
      .Attr("padding: {'SAME', 'VALID', 'EXPLICIT'}") \
      .Attr("explicit_paddings: list(int) = []")

// An op that takes inputs which may be missing has them as lists, which may be empty.
#define KS_EPILOGUE_INPUTS Input("bias: num_bias * float").Input("residual: num_residual * float")
#define KS_EPILOGUE_ATTRIBUTES            \
  Attr("num_bias: int >= 0 = 0")          \
      .Attr("num_residual: int >= 0 = 0") \
      .Attr("activation: {'linear', 'relu', 'relu6'} = 'linear'")

REGISTER_OP("KerasSparse>ConnectionConv2D")
    .Input("input: float")
    .Input("filter: float")
    .Input("row_splits: int32")
    .Input("input_channels: int32")
    .Output("output: float")
    .KS_COMMON_ATTRIBUTES.SetShapeFn(InferShapeWith<0, -1, 1, 2, 3, -1, -1>)
    .Doc(R"doc(
2D convolution whose filter is a table of connections, in CSR form by output channel.

input: [batch, height, width, in_channels].
filter: [connections, kernel_height, kernel_width], in the order of the table.
row_splits: [out_channels + 1]; connections row_splits[o] to row_splits[o + 1] feed output channel o.
input_channels: [connections]; strictly increasing within an output channel.
output: [batch, out_height, out_width, out_channels].
strides: Along height and width.
dilations: Along height and width.
explicit_paddings: Top, bottom, left, right; with padding EXPLICIT only.
)doc");

REGISTER_OP("KerasSparse>FusedConnectionConv2D")
    .Input("input: float")
    .Input("filter: float")
    .Input("row_splits: int32")
    .Input("input_channels: int32")
    .KS_EPILOGUE_INPUTS.Output("output: float")
    .KS_EPILOGUE_ATTRIBUTES.KS_COMMON_ATTRIBUTES
    .SetShapeFn(InferShapeWith<0, -1, 1, 2, 3, -1, -1, 4>)
    .Doc(R"doc(
activation(KerasSparse>ConnectionConv2D + bias + residual), in one pass.

bias: At most one, [out_channels].
residual: At most one, shaped as the output.
)doc");

REGISTER_OP("KerasSparse>MaxPooledConnectionConv2D")
    .Input("input: float")
    .Input("filter: float")
    .Input("row_splits: int32")
    .Input("input_channels: int32")
    .Input("bias: num_bias * float")
    .Output("output: float")
    .Attr("num_bias: int >= 0 = 0")
    .Attr("activation: {'linear', 'relu', 'relu6'} = 'linear'")
    .Attr("pool_size: int >= 1")
    .KS_COMMON_ATTRIBUTES.SetShapeFn(InferShapeWith<0, -1, 1, 2, 3, -1, -1, 4, true>)
    .Doc(R"doc(
Max pooling of activation(KerasSparse>ConnectionConv2D + bias), in one pass.

bias: At most one, [out_channels].
output: [batch, out_height / pool_size, out_width / pool_size, out_channels].
pool_size: Height and width of the squares of pixels whose largest value is kept. Rows and columns
  at the end that fill no square are left out.
)doc");

REGISTER_OP("KerasSparse>ConnectionConv2DBackpropInput")
    .Input("input_sizes: int32")
    .Input("filter: float")
    .Input("row_splits: int32")
    .Input("input_channels: int32")
    .Input("out_backprop: float")
    .Output("output: float")
    .KS_COMMON_ATTRIBUTES.SetShapeFn(InferShapeWith<-1, 0, 1, 2, 3, -1, 4>)
    .Doc("Gradient of KerasSparse>ConnectionConv2D with respect to its input.");

REGISTER_OP("KerasSparse>ConnectionConv2DBackpropFilter")
    .Input("input: float")
    .Input("row_splits: int32")
    .Input("input_channels: int32")
    .Input("out_backprop: float")
    .Output("output: float")
    .Attr("kernel_size: list(int)")
    .KS_COMMON_ATTRIBUTES.SetShapeFn(InferShapeWith<0, -1, -1, 1, 2, -1, 3>)
    .Doc("Gradient of KerasSparse>ConnectionConv2D with respect to its filter.");

REGISTER_OP("KerasSparse>ThinnedConv2D")
    .Input("input: float")
    .Input("filter: float")
    .Input("indices: int32")
    .Output("output: float")
    .Attr("kernel_size: list(int)")
    .KS_COMMON_ATTRIBUTES.SetShapeFn(InferShapeWith<0, -1, 1, -1, -1, 2, -1>)
    .Doc(R"doc(
2D convolution whose filter keeps some rows of the lowered kernel matrix.

input: [batch, height, width, in_channels].
filter: [kept, out_channels].
indices: [kept], strictly increasing; (i * kernel_width + j) * in_channels + s for the row of tap
  (i, j) and input channel s.
output: [batch, out_height, out_width, out_channels].
kernel_size: Kernel height and width.
strides: Along height and width.
dilations: Along height and width.
explicit_paddings: Top, bottom, left, right; with padding EXPLICIT only.
)doc");

REGISTER_OP("KerasSparse>FusedThinnedConv2D")
    .Input("input: float")
    .Input("filter: float")
    .Input("indices: int32")
    .KS_EPILOGUE_INPUTS.Output("output: float")
    .Attr("kernel_size: list(int)")
    .KS_EPILOGUE_ATTRIBUTES.KS_COMMON_ATTRIBUTES
    .SetShapeFn(InferShapeWith<0, -1, 1, -1, -1, 2, -1, 3>)
    .Doc(R"doc(
activation(KerasSparse>ThinnedConv2D + bias + residual), in one pass.

bias: At most one, [out_channels].
residual: At most one, shaped as the output.
)doc");

REGISTER_OP("KerasSparse>ThinnedConv2DBackpropInput")
    .Input("input_sizes: int32")
    .Input("filter: float")
    .Input("indices: int32")
    .Input("out_backprop: float")
    .Output("output: float")
    .Attr("kernel_size: list(int)")
    .KS_COMMON_ATTRIBUTES.SetShapeFn(InferShapeWith<-1, 0, 1, -1, -1, 2, 3>)
    .Doc("Gradient of KerasSparse>ThinnedConv2D with respect to its input.");

REGISTER_OP("KerasSparse>ThinnedConv2DBackpropFilter")
    .Input("input: float")
    .Input("indices: int32")
    .Input("out_backprop: float")
    .Output("output: float")
    .Attr("kernel_size: list(int)")
    .KS_COMMON_ATTRIBUTES.SetShapeFn(InferShapeWith<0, -1, -1, -1, -1, 1, 2>)
    .Doc("Gradient of KerasSparse>ThinnedConv2D with respect to its filter.");

}  // namespace
}  // namespace keras_sparse
