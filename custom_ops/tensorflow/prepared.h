// Copyright 2026 The keras_sparse Authors. Licensed under the Apache License, Version 2.0.
//
// What ops prepare from tables and filters and keep from call to call. Ops that read the same table
// or filter, be it one layer called twice or several functions of one model, hold one copy.

#ifndef KERAS_SPARSE_CUSTOM_OPS_TENSORFLOW_PREPARED_H_
#define KERAS_SPARSE_CUSTOM_OPS_TENSORFLOW_PREPARED_H_

#include <memory>
#include <vector>

#include "custom_ops/kernels/conv2d.h"
#include "custom_ops/tensorflow/block_pool.h"
#include "tensorflow/core/framework/tensor.h"

namespace keras_sparse {

// The plan for some arguments and what it prepared from their table. Never changed once it is
// there.
struct Prepared {
  KsArguments arguments;  // Tensor values aside.
  // Hold on to the table: while somebody does, TensorFlow neither writes to its memory nor gives it
  // away, so that a table at the same place is the same table.
  std::vector<tensorflow::Tensor> table;
  KsPlan plan;
  const KsRoutine* routine;
  bool pools_apart;  // The plan does not pool, although the arguments say so.
  Block block;
};

// What was prepared from a filter, likewise.
struct PackedFilter {
  std::shared_ptr<const Prepared> prepared;
  tensorflow::Tensor filter;
  Block block;
};

// Whether arguments that are alike but for tensor values have the same table.
bool SamePlan(const KsArguments& a, const KsArguments& b);

// Whether `packed` was prepared from `filter`.
bool SameFilter(const PackedFilter& packed, const std::shared_ptr<const Prepared>& prepared,
                const float* filter);

// What an op of this process holds, or null.
std::shared_ptr<const Prepared> FindPrepared(const KsArguments& arguments);
std::shared_ptr<const PackedFilter> FindPackedFilter(
    const std::shared_ptr<const Prepared>& prepared, const float* filter);

// Lets other ops find these for as long as one holds them.
void Share(const std::shared_ptr<const Prepared>& prepared);
void Share(const std::shared_ptr<const PackedFilter>& packed);

}  // namespace keras_sparse

#endif  // KERAS_SPARSE_CUSTOM_OPS_TENSORFLOW_PREPARED_H_
