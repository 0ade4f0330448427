// Copyright 2026 The keras_sparse Authors. Licensed under the Apache License, Version 2.0.
//
// Memory for compute routines: blocks that are kept from call to call, so that a model in steady
// state allocates nothing but its tensors.

#ifndef KERAS_SPARSE_CUSTOM_OPS_TENSORFLOW_BLOCK_POOL_H_
#define KERAS_SPARSE_CUSTOM_OPS_TENSORFLOW_BLOCK_POOL_H_

#include <stdint.h>

#include <mutex>
#include <vector>

namespace keras_sparse {

// Asks the system for huge pages in [data, data + bytes), which may belong to anyone: a wish, on
// which nothing depends.
void AskForHugePages(void* data, int64_t bytes);

// Uninitialised memory, aligned to KS_ALIGNMENT; large blocks lie on huge pages where the system
// has them, which planes read in random order need.
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

 private:
  char* data_ = nullptr;
  int64_t bytes_ = 0;
};

// Hands out blocks and takes them back. The one that came back last goes first, for it is the one
// in cache. What is kept at rest is bounded by kMostKept.
class BlockPool {
 public:
  static BlockPool& Global();

  // A block of at least `bytes`, or an empty one when there is no such memory.
  Block Take(int64_t bytes);
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
