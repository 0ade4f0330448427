// Copyright 2026 The keras_sparse Authors. Licensed under the Apache License, Version 2.0.

#include "custom_ops/tensorflow/prepared.h"

#include <string.h>

#include <algorithm>
#include <mutex>

namespace keras_sparse {
namespace {

// Looked through by an op that has to prepare something, which takes far longer.
template <typename Entry>
class Shared {
 public:
  static Shared& Global() {
    static Shared* const shared = new Shared;
    return *shared;
  }

  template <typename Matches>
  std::shared_ptr<const Entry> Find(const Matches& matches) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (const std::weak_ptr<const Entry>& weak : entries_) {
      std::shared_ptr<const Entry> entry = weak.lock();
      if (entry != nullptr && matches(*entry)) return entry;
    }
    return nullptr;
  }

  void Add(const std::shared_ptr<const Entry>& entry) {
    std::lock_guard<std::mutex> lock(mutex_);
    entries_.erase(
        std::remove_if(entries_.begin(), entries_.end(),
                       [](const std::weak_ptr<const Entry>& weak) { return weak.expired(); }),
        entries_.end());
    entries_.push_back(entry);
  }

 private:
  std::mutex mutex_;
  std::vector<std::weak_ptr<const Entry>> entries_;  // Guarded by mutex_.
};

}  // namespace

bool SamePlan(const KsArguments& a, const KsArguments& b) {
  return a.operation == b.operation && memcmp(&a.geometry, &b.geometry, sizeof(a.geometry)) == 0 &&
         a.kept == b.kept && a.row_splits == b.row_splits && a.input_channels == b.input_channels &&
         a.indices == b.indices && (a.bias == nullptr) == (b.bias == nullptr) &&
         (a.residual == nullptr) == (b.residual == nullptr) && a.activation == b.activation &&
         a.pool == b.pool;
}

bool SameFilter(const PackedFilter& packed, const std::shared_ptr<const Prepared>& prepared,
                const float* filter) {
  return packed.prepared == prepared && packed.filter.flat<float>().data() == filter;
}

std::shared_ptr<const Prepared> FindPrepared(const KsArguments& arguments) {
  return Shared<Prepared>::Global().Find(
      [&](const Prepared& entry) { return SamePlan(entry.arguments, arguments); });
}

std::shared_ptr<const PackedFilter> FindPackedFilter(
    const std::shared_ptr<const Prepared>& prepared, const float* filter) {
  return Shared<PackedFilter>::Global().Find(
      [&](const PackedFilter& entry) { return SameFilter(entry, prepared, filter); });
}

void Share(const std::shared_ptr<const Prepared>& prepared) {
  Shared<Prepared>::Global().Add(prepared);
}

void Share(const std::shared_ptr<const PackedFilter>& packed) {
  Shared<PackedFilter>::Global().Add(packed);
}

}  // namespace keras_sparse
