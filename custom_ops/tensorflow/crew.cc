// Copyright 2026 The keras_sparse Authors. Licensed under the Apache License, Version 2.0.

#include "custom_ops/tensorflow/crew.h"

#include <algorithm>
#include <atomic>
#include <utility>

namespace keras_sparse {
namespace {

// A thread may be done a chunk of work before the caller is, and then waits for the next op.
constexpr int kLooksOfCrew = 2 * kLooks;

}  // namespace

// Lives on the stack of its thread, which leaves only once it is no longer among those waiting.
struct Crew::Member {
  tensorflow::thread::ThreadPool* pool;
  std::function<void()> work;  // Set before `called`, under the lock.
  std::atomic<bool> called{false};
};

Crew& Crew::Global() {
  static Crew* const crew = new Crew;  // Never destroyed: threads may outlive main().
  return *crew;
}

void Crew::Start(tensorflow::thread::ThreadPool* pool, int64_t count,
                 const std::function<void()>& work) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    for (size_t i = waiting_.size(); i-- > 0 && count > 0;) {
      Member* const member = waiting_[i];
      if (member->pool != pool) continue;
      waiting_.erase(waiting_.begin() + static_cast<std::ptrdiff_t>(i));
      member->work = work;
      member->called.store(true, std::memory_order_release);  // It may be gone after this.
      --count;
    }
  }
  for (; count > 0; --count) {
    pool->Schedule([this, pool, work] { Serve(pool, work); });
  }
}

void Crew::Serve(tensorflow::thread::ThreadPool* pool, std::function<void()> work) {
  while (true) {
    work();
    work = nullptr;  // With what it holds.
    Member self;
    self.pool = pool;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      // One thread of the pool, at least, is there for other ops.
      const auto same = [pool](const Member* member) { return member->pool == pool; };
      const int64_t others = std::count_if(waiting_.begin(), waiting_.end(), same);
      if (others + 1 >= pool->NumThreads()) return;
      waiting_.push_back(&self);
    }
    for (int i = 0; i < kLooksOfCrew && !self.called.load(std::memory_order_acquire); ++i) Pause();
    if (!self.called.load(std::memory_order_acquire)) {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!self.called.load(std::memory_order_relaxed)) {
        waiting_.erase(std::find(waiting_.begin(), waiting_.end(), &self));
        return;
      }
    }
    work = std::move(self.work);
  }
}

}  // namespace keras_sparse
