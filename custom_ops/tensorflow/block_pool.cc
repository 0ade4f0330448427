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

int64_t RoundUp(int64_t bytes, int64_t unit) { return (bytes + unit - 1) / unit * unit; }

#ifdef __linux__
// `bytes` are whole huge pages.
char* MapHugePages(int64_t bytes) {
  const int64_t mapped = bytes + Block::kHugePage;
  void* const start =
      mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (start == MAP_FAILED) return nullptr;
  const intptr_t begin = reinterpret_cast<intptr_t>(start);
  const intptr_t data = RoundUp(begin, Block::kHugePage);
  if (data > begin) munmap(start, data - begin);
  const intptr_t end = data + bytes;
  if (begin + mapped > end) munmap(reinterpret_cast<void*>(end), begin + mapped - end);
  char* const pages = reinterpret_cast<char*>(data);
  madvise(pages, bytes, MADV_HUGEPAGE);  // A wish: nothing depends on it.
  return pages;
}
#endif

}  // namespace

Block::Block(int64_t bytes) {
  if (bytes <= 0) return;
#ifdef __linux__
  if (bytes >= kHugePage) {
    const int64_t size = RoundUp(bytes, kHugePage);
    data_ = MapHugePages(size);
    if (data_ != nullptr) bytes_ = size;
    return;
  }
#endif
  void* data = nullptr;
  const int64_t size = RoundUp(bytes, KS_ALIGNMENT);
  if (posix_memalign(&data, KS_ALIGNMENT, size) != 0) return;
  data_ = static_cast<char*>(data);
  bytes_ = size;
}

Block& Block::operator=(Block&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

Block::~Block() {
#ifdef __linux__
  if (bytes_ >= kHugePage) {
    munmap(data_, bytes_);
    return;
  }
#endif
  free(data_);
}

BlockPool& BlockPool::Global() {
  static BlockPool* const pool = new BlockPool;  // Never destroyed: threads may outlive main().
  return *pool;
}

Block BlockPool::Take(int64_t bytes, int64_t most_bytes) {
  if (bytes <= 0) return Block();
  Block small;  // Freed outside of the lock.
  {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto block = kept_.rbegin(); block != kept_.rend(); ++block) {
      if (block->bytes() >= bytes && block->bytes() <= most_bytes) {
        Block found = std::move(*block);
        kept_.erase(std::next(block).base());
        kept_bytes_ -= found.bytes();
        return found;
      }
    }
    // None is large enough: the new one replaces one of those that turned out too small.
    if (!kept_.empty() && most_bytes == INT64_MAX) {
      small = std::move(kept_.back());
      kept_.pop_back();
      kept_bytes_ -= small.bytes();
    }
  }
  // Whole huge pages, so that layers of about the same size share a block.
  return Block(RoundUp(bytes, Block::kHugePage));
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
