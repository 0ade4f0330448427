// Copyright 2026 The keras_sparse Authors. Licensed under the Apache License, Version 2.0.
//
// Memory of large results.

#ifndef KERAS_SPARSE_CUSTOM_OPS_TENSORFLOW_RESULTS_H_
#define KERAS_SPARSE_CUSTOM_OPS_TENSORFLOW_RESULTS_H_

#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/tensor.h"
#include "tensorflow/core/framework/tensor_shape.h"

namespace keras_sparse {

// Like context->allocate_output(0, shape, output), with large results on huge pages of a pool. They
// are written and, by the next layer, read once each, a page after the other: to find pages of 4 kB
// takes a part of a sparse layer's time. TensorFlow's allocator does not ask for huge ones.
absl::Status AllocateResult(tensorflow::OpKernelContext* context,
                            const tensorflow::TensorShape& shape, tensorflow::Tensor** output);

// Like context->allocate_temp().
absl::Status AllocateTemporary(tensorflow::OpKernelContext* context,
                               const tensorflow::TensorShape& shape, tensorflow::Tensor* temporary);

}  // namespace keras_sparse

#endif  // KERAS_SPARSE_CUSTOM_OPS_TENSORFLOW_RESULTS_H_
