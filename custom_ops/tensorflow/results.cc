// Copyright 2026 The keras_sparse Authors. Licensed under the Apache License, Version 2.0.

#include "custom_ops/tensorflow/results.h"

#include <stddef.h>
#include <stdint.h>

#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>

#include "custom_ops/kernels/conv2d.h"
#include "custom_ops/tensorflow/block_pool.h"
#include "tensorflow/core/framework/allocator.h"

namespace keras_sparse {
namespace {

using ::tensorflow::DT_FLOAT;
using ::tensorflow::OpKernelContext;
using ::tensorflow::Tensor;
using ::tensorflow::TensorShape;

// Bytes. A block is whole huge pages: smaller results would leave most of one empty.
constexpr int64_t kLargeFrom = int64_t{1} << 20;

// Any number of results may be alive, as long as their tensors are; what is kept of those that are
// not is bounded by the pool.
class ResultAllocator : public tensorflow::Allocator {
 public:
  static ResultAllocator& Global() {
    static ResultAllocator* const allocator = new ResultAllocator;  // Tensors may outlive main().
    return *allocator;
  }

  std::string Name() override { return "keras_sparse_results"; }

  using tensorflow::Allocator::AllocateRaw;
  void* AllocateRaw(size_t alignment, size_t num_bytes) override {
    if (alignment > KS_ALIGNMENT) return nullptr;
    const int64_t bytes = static_cast<int64_t>(num_bytes);
    // A result holds its block for long: not one that is much too large for it.
    Block block = pool_.Take(bytes, bytes + bytes / 4 + Block::kHugePage);
    char* const data = block.data();
    if (data == nullptr) return nullptr;
    std::lock_guard<std::mutex> lock(mutex_);
    used_.emplace(data, std::move(block));
    return data;
  }

  using tensorflow::Allocator::DeallocateRaw;
  void DeallocateRaw(void* data) override {
    Block block;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      const auto found = used_.find(data);
      if (found == used_.end()) return;
      block = std::move(found->second);
      used_.erase(found);
    }
    pool_.Return(std::move(block));
  }

 private:
  BlockPool pool_;
  std::mutex mutex_;
  std::unordered_map<const void*, Block> used_;  // Guarded by mutex_.
};

// Whether `tensor` could be made.
bool AllocateLarge(const TensorShape& shape, Tensor* tensor) {
  if (shape.num_elements() < kLargeFrom / static_cast<int64_t>(sizeof(float))) return false;
  Tensor large(&ResultAllocator::Global(), DT_FLOAT, shape);
  if (!large.IsInitialized()) return false;
  *tensor = std::move(large);
  return true;
}

}  // namespace

absl::Status AllocateResult(OpKernelContext* context, const TensorShape& shape, Tensor** output) {
  Tensor large;
  // Memory that another device reads has to come from TensorFlow.
  const tensorflow::AllocatorAttributes attributes = context->output_alloc_attr(0);
  if (attributes.gpu_compatible() || attributes.nic_compatible() || !AllocateLarge(shape, &large)) {
    return context->allocate_output(0, shape, output);
  }
  context->set_output(0, std::move(large));
  *output = context->mutable_output(0);
  return absl::OkStatus();
}

absl::Status AllocateTemporary(OpKernelContext* context, const TensorShape& shape,
                               Tensor* temporary) {
  if (AllocateLarge(shape, temporary)) return absl::OkStatus();
  return context->allocate_temp(DT_FLOAT, shape, temporary);
}

}  // namespace keras_sparse
