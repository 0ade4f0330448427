// Copyright 2026 The keras_sparse Authors. Licensed under the Apache License, Version 2.0.
//
// Threads of a pool that work on one op after another.

#ifndef KERAS_SPARSE_CUSTOM_OPS_TENSORFLOW_CREW_H_
#define KERAS_SPARSE_CUSTOM_OPS_TENSORFLOW_CREW_H_

#include <stdint.h>

#include <functional>
#include <mutex>
#include <vector>

#include "tensorflow/core/platform/threadpool.h"

namespace keras_sparse {

// Once it has done its work, a thread of the pool looks out for more, some microseconds: the ops of
// a network follow each other, and the next one finds the same threads awake. Left to the pool,
// each op might wake another of its threads while those of the last one still look for work there.
// The caller is a thread, too: with one of them in excess, all share the CPUs, and an op of two
// threads takes longer than of one.
class Crew {
 public:
  static Crew& Global();

  // Calls `work` on `count` threads of `pool`, some time soon. The caller's is none of them.
  void Start(tensorflow::thread::ThreadPool* pool, int64_t count,
             const std::function<void()>& work);

 private:
  struct Member;  // A thread that looks out for work.

  void Serve(tensorflow::thread::ThreadPool* pool, std::function<void()> work);

  std::mutex mutex_;
  std::vector<Member*> waiting_;  // The last to come is the first to go.
};

// Tells the CPU that the caller looks for a change in a loop.
inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

constexpr int kLooks = 2000;  // Some 20 to 80 microseconds.

}  // namespace keras_sparse

#endif  // KERAS_SPARSE_CUSTOM_OPS_TENSORFLOW_CREW_H_
