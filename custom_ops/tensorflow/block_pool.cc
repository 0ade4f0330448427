// Copyright 2026 The keras_sparse Authors. Licensed under the Apache License, Version 2.0.

#include "custom_ops/tensorflow/block_pool.h"

#include <stdlib.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <utility>

#include "custom_ops/kernels/conv2d.h"

namespace keras_sparse {
namespace {

constexpr int64_t kHugePage = int64_t{2} << 20;

int64_t RoundUp(int64_t bytes, int64_t unit) { return (bytes + unit - 1) / unit * unit; }

}  // namespace

void AskForHugePages(void* data, int64_t bytes) {
#ifdef __linux__
  const int64_t address = reinterpret_cast<intptr_t>(data);
  const int64_t begin = RoundUp(address, kHugePage);
  const int64_t end = (address + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

Block::Block(int64_t bytes) {
  if (bytes <= 0) return;
  const bool huge = bytes >= kHugePage;
  const int64_t alignment = huge ? kHugePage : int64_t{KS_ALIGNMENT};
  const int64_t size = RoundUp(bytes, alignment);
  void* data = nullptr;
  if (posix_memalign(&data, alignment, size) != 0) return;
  if (huge) AskForHugePages(data, size);
  data_ = static_cast<char*>(data);
  bytes_ = size;
}

Block& Block::operator=(Block&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

Block::~Block() { free(data_); }

BlockPool& BlockPool::Global() {
  static BlockPool* const pool = new BlockPool;  // Never destroyed: threads may outlive main().
  return *pool;
}

Block BlockPool::Take(int64_t bytes) {
  if (bytes <= 0) return Block();
  Block small;  // Freed outside of the lock.
  {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto block = kept_.rbegin(); block != kept_.rend(); ++block) {
      if (block->bytes() >= bytes) {
        Block found = std::move(*block);
        kept_.erase(std::next(block).base());
        kept_bytes_ -= found.bytes();
        return found;
      }
    }
    // None is large enough: the new one replaces one of those that turned out too small.
    if (!kept_.empty()) {
      small = std::move(kept_.back());
      kept_.pop_back();
      kept_bytes_ -= small.bytes();
    }
  }
  // Whole huge pages, so that layers of about the same size share a block.
  return Block(RoundUp(bytes, kHugePage));
}

void BlockPool::Return(Block block) {
  if (block.data() == nullptr) return;
  std::vector<Block> dropped;  // Declared before the lock: freed after it.
  std::lock_guard<std::mutex> lock(mutex_);
  kept_bytes_ += block.bytes();
  kept_.push_back(std::move(block));
  while (kept_bytes_ > kMostKept) {  // The one not used for longest goes.
    kept_bytes_ -= kept_.front().bytes();
    dropped.push_back(std::move(kept_.front()));
    kept_.erase(kept_.begin());
  }
}

}  // namespace keras_sparse
