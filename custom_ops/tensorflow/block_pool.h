// Copyright 2026 The keras_sparse Authors. Licensed under the Apache License, Version 2.0.
//
// Memory for compute routines and their results: blocks that are kept from call to call, so that a
// model in steady state asks the system for none.

#ifndef KERAS_SPARSE_CUSTOM_OPS_TENSORFLOW_BLOCK_POOL_H_
#define KERAS_SPARSE_CUSTOM_OPS_TENSORFLOW_BLOCK_POOL_H_

#include <stdint.h>

#include <mutex>
#include <vector>

namespace keras_sparse {

// Uninitialised memory, aligned to KS_ALIGNMENT. Blocks from kHugePage on have whole huge pages of
// their own, where the system has them, and do not come from the C library: what that recycles was
// mapped by 4 kB before, and stays so. Finding those pages takes a part of a sparse layer's time,
// more so on a virtual machine.
class Block {
 public:
  Block() = default;
  explicit Block(int64_t bytes);  // data() is null when there is no such memory, or bytes is 0.
  Block(Block&& other) noexcept { *this = static_cast<Block&&>(other); }
  Block& operator=(Block&& other) noexcept;
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  ~Block();

  char* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

  static constexpr int64_t kHugePage = int64_t{2} << 20;

 private:
  char* data_ = nullptr;
  int64_t bytes_ = 0;
};

// Hands out blocks and takes them back. The one that came back last goes first, for it is the one
// in cache. What is kept at rest is bounded by kMostKept.
class BlockPool {
 public:
  // The pool of scratch memory.
  static BlockPool& Global();

  // A block of at least `bytes`, or an empty one when there is no such memory. A block that is kept
  // has `most_bytes` at most: of scratch memory any will do, as it comes back soon.
  Block Take(int64_t bytes, int64_t most_bytes = INT64_MAX);
  void Return(Block block);

 private:
  static constexpr int64_t kMostKept = int64_t{256} << 20;

  std::mutex mutex_;
  std::vector<Block> kept_;  // Guarded by mutex_, as is kept_bytes_.
  int64_t kept_bytes_ = 0;
};

// A block of the pool for the time of a scope.
class PooledBlock {
 public:
  explicit PooledBlock(int64_t bytes) : block_(BlockPool::Global().Take(bytes)) {}
  ~PooledBlock() { BlockPool::Global().Return(static_cast<Block&&>(block_)); }
  PooledBlock(const PooledBlock&) = delete;
  PooledBlock& operator=(const PooledBlock&) = delete;

  char* data() const { return block_.data(); }

 private:
  Block block_;
};

}  // namespace keras_sparse

#endif  // KERAS_SPARSE_CUSTOM_OPS_TENSORFLOW_BLOCK_POOL_H_
