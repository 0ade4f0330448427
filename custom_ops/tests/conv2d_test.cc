// Copyright 2026 The keras_sparse Authors. Licensed under the Apache License, Version 2.0.
//
// Every routine of the list, for every instruction set of this machine, against the scalar
// reference; independence of the partition of the work, also on threads of its own, for the thread
// sanitizer to watch; the checks of ks_check_arguments().

#include "custom_ops/kernels/conv2d.h"

#include <gtest/gtest.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <vector>

namespace {

constexpr uint32_t kSeed = 20240711;

struct Case {
  int64_t batch, height, width, in_channels, out_channels;
  int64_t kernel_height, kernel_width;
  int64_t stride_height = 1, stride_width = 1;
  int64_t dilation_height = 1, dilation_width = 1;
  int64_t pad_top = 0, pad_bottom = 0, pad_left = 0, pad_right = 0;
  double density = 0.3;
};

std::string Describe(const Case& c) {
  std::string text =
      "batch " + std::to_string(c.batch) + ", " + std::to_string(c.height) + "x" +
      std::to_string(c.width) + ", channels " + std::to_string(c.in_channels) + "->" +
      std::to_string(c.out_channels) + ", kernel " + std::to_string(c.kernel_height) + "x" +
      std::to_string(c.kernel_width) + ", strides " + std::to_string(c.stride_height) + "," +
      std::to_string(c.stride_width) + ", dilations " + std::to_string(c.dilation_height) + "," +
      std::to_string(c.dilation_width) + ", pads " + std::to_string(c.pad_top) + "," +
      std::to_string(c.pad_bottom) + "," + std::to_string(c.pad_left) + "," +
      std::to_string(c.pad_right) + ", density " + std::to_string(c.density);
  return text;
}

int64_t OutSize(int64_t size, int64_t kernel, int64_t stride, int64_t dilation, int64_t pads) {
  const int64_t room = size + pads - ((kernel - 1) * dilation + 1);
  return room < 0 ? 0 : room / stride + 1;
}

KsGeometry Geometry(const Case& c) {
  KsGeometry g;
  g.batch = c.batch;
  g.in_height = c.height;
  g.in_width = c.width;
  g.in_channels = c.in_channels;
  g.out_height = OutSize(c.height, c.kernel_height, c.stride_height, c.dilation_height,
                         c.pad_top + c.pad_bottom);
  g.out_width =
      OutSize(c.width, c.kernel_width, c.stride_width, c.dilation_width, c.pad_left + c.pad_right);
  g.out_channels = c.out_channels;
  g.kernel_height = c.kernel_height;
  g.kernel_width = c.kernel_width;
  g.stride_height = c.stride_height;
  g.stride_width = c.stride_width;
  g.dilation_height = c.dilation_height;
  g.dilation_width = c.dilation_width;
  g.pad_top = c.pad_top;
  g.pad_left = c.pad_left;
  return g;
}

bool IsConnection(KsOperation operation) { return operation < KS_THINNED_CONV2D; }

// Tensors and tables of a case. Pointers go to blocks of exactly the right size, so that a memory
// checker sees a routine that leaves them.
class Problem {
 public:
  Problem(KsOperation operation, const Case& c) {
    std::mt19937 random(kSeed);
    std::uniform_real_distribution<double> uniform(0, 1);
    std::normal_distribution<float> normal(0, 1);
    arguments_ = {};
    arguments_.operation = operation;
    arguments_.geometry = Geometry(c);
    const KsGeometry& g = arguments_.geometry;
    if (IsConnection(operation)) {
      row_splits_.push_back(0);
      for (int64_t o = 0; o < g.out_channels; ++o) {
        for (int64_t s = 0; s < g.in_channels; ++s) {
          // Every third output channel is empty when the table is sparse.
          if (uniform(random) < c.density && (c.density > 0.5 || o % 3 != 1)) {
            channels_.push_back(static_cast<int32_t>(s));
          }
        }
        row_splits_.push_back(static_cast<int32_t>(channels_.size()));
      }
      arguments_.kept = static_cast<int64_t>(channels_.size());
      arguments_.row_splits = row_splits_.data();
      arguments_.input_channels = channels_.data();
    } else {
      for (int64_t k = 0; k < g.kernel_height * g.kernel_width * g.in_channels; ++k) {
        if (uniform(random) < c.density) indices_.push_back(static_cast<int32_t>(k));
      }
      arguments_.kept = static_cast<int64_t>(indices_.size());
      arguments_.indices = indices_.data();
    }
    const int64_t filter_size =
        arguments_.kept *
        (IsConnection(operation) ? g.kernel_height * g.kernel_width : g.out_channels);
    const auto fill = [&](int64_t size) {
      std::vector<float> values(size);
      for (float& value : values) value = normal(random);
      return values;
    };
    input_ = fill(g.batch * g.in_height * g.in_width * g.in_channels);
    filter_ = fill(filter_size);
    out_backprop_ = fill(g.batch * g.out_height * g.out_width * g.out_channels);
    const int kind = operation % 3;  // Forward, gradient of the input, of the filter.
    if (kind != 1) arguments_.input = input_.data();
    if (kind != 2) arguments_.filter = filter_.data();
    if (kind != 0) arguments_.out_backprop = out_backprop_.data();
    result_size_ = kind == 0 ? out_backprop_.size() : kind == 1 ? input_.size() : filter_.size();
    // Terms of one sum, for the tolerance.
    terms_ = kind == 2
                 ? g.batch * g.out_height * g.out_width
                 : g.kernel_height * g.kernel_width * (kind == 0 ? g.in_channels : g.out_channels);
  }

  const KsArguments& arguments() const { return arguments_; }
  // Each of n additions rounds a partial sum of about sqrt(n): n times the unit roundoff, with
  // room.
  double tolerance() const {
    const double n = static_cast<double>(terms_);
    return 1e-6 * (8 + 4 * std::sqrt(n)) + 1e-7 * n;
  }

  // For forward operations. Large enough for ReLU6 to meet both of its bounds.
  void SetEpilogue(bool bias, bool residual, KsActivation activation) {
    std::mt19937 random(kSeed + 1);
    std::normal_distribution<float> normal(1, 5);
    bias_.resize(bias ? arguments_.geometry.out_channels : 0);
    residual_.resize(residual ? result_size_ : 0);
    for (float& value : bias_) value = normal(random);
    for (float& value : residual_) value = normal(random);
    arguments_.bias = bias ? bias_.data() : nullptr;
    arguments_.residual = residual ? residual_.data() : nullptr;
    arguments_.activation = activation;
  }
  // For the forward operation of tables, after SetEpilogue().
  void SetPool(int64_t pool) {
    const KsGeometry& g = arguments_.geometry;
    arguments_.pool = pool;
    result_size_ = g.batch * (g.out_height / pool) * (g.out_width / pool) * g.out_channels;
  }
  void SetInput(float value) { std::fill(input_.begin(), input_.end(), value); }

  // Runs a routine, its work cut into ranges of `range` items taken backwards when range > 0, with
  // all memory filled with NaN before. Returns false when the routine declines.
  // Runs it a second time on the blocks prepared by the first, and expects the same.
  bool Run(const KsRoutine* routine, int64_t range, std::vector<float>* result) const {
    KsArguments arguments = arguments_;
    KsPlan plan;
    if (!routine->plan(&arguments, &plan)) return false;
    KsMemory memory = {Allocate(plan.table_bytes), Allocate(plan.filter_bytes), nullptr, nullptr,
                       nullptr};
    const std::vector<float> first = RunStages(routine, plan, range, true, arguments, &memory);
    *result = RunStages(routine, plan, range, false, arguments, &memory);
    EXPECT_TRUE(first.empty() || memcmp(first.data(), result->data(), first.size() * 4) == 0)
        << routine->name;
    CheckAndFree(memory.table, plan.table_bytes);
    CheckAndFree(memory.filter, plan.filter_bytes);
    return true;
  }

  // Runs a routine as the op does: a stage's items go in chunks to whichever thread is free, and
  // the next stage starts when all are done. Each thread has exactly its own scratch.
  bool RunOnThreads(const KsRoutine* routine, int threads, int64_t chunk,
                    std::vector<float>* result) const {
    KsArguments arguments = arguments_;
    result->assign(result_size_, std::numeric_limits<float>::quiet_NaN());
    arguments.output = result->data();
    KsPlan plan;
    if (!routine->plan(&arguments, &plan)) return false;
    const KsMemory blocks = {Allocate(plan.table_bytes), Allocate(plan.filter_bytes),
                             Allocate(plan.shared_bytes), nullptr, nullptr};
    for (int32_t stage = 0; stage < plan.num_stages; ++stage) {
      const int64_t items = plan.stages[stage].items;
      std::atomic<int64_t> next{0};
      std::vector<std::thread> workers;
      for (int t = 0; t < threads; ++t) {
        workers.emplace_back([&] {
          KsMemory memory = blocks;
          memory.scratch = Allocate(plan.scratch_bytes);
          int64_t held = -1;
          memory.held = &held;
          while (true) {
            // Relaxed: the counter must not order what the items do.
            const int64_t begin = next.fetch_add(chunk, std::memory_order_relaxed);
            if (begin >= items) break;
            routine->run(&arguments, &plan, stage, begin, std::min(items, begin + chunk), &memory);
            std::this_thread::yield();  // So that the others get some, on a single core too.
          }
          CheckAndFree(memory.scratch, plan.scratch_bytes);
        });
      }
      for (std::thread& worker : workers) worker.join();
    }
    CheckAndFree(blocks.table, plan.table_bytes);
    CheckAndFree(blocks.filter, plan.filter_bytes);
    CheckAndFree(blocks.shared, plan.shared_bytes);
    return true;
  }

 private:
  static constexpr int64_t kGuard = 4096;

  std::vector<float> RunStages(const KsRoutine* routine, const KsPlan& plan, int64_t range,
                               bool prepare, KsArguments arguments, KsMemory* memory) const {
    std::vector<float> result(result_size_, std::numeric_limits<float>::quiet_NaN());
    arguments.output = result.data();
    memory->shared = Allocate(plan.shared_bytes);
    memory->scratch = Allocate(plan.scratch_bytes);
    int64_t last_kind = KS_PREPARES_TABLE;
    for (int32_t stage = 0; stage < plan.num_stages; ++stage) {
      const int64_t items = plan.stages[stage].items;
      const int64_t prepares = plan.stages[stage].prepares;
      EXPECT_GE(items, 0);
      EXPECT_TRUE(items == 0 || plan.stages[stage].cost > 0);
      // Those that prepare come first, the table before the filter.
      const int64_t kind = prepares == KS_PREPARES_NOTHING ? 3 : prepares;
      EXPECT_GE(kind, last_kind);
      last_kind = kind;
      if (!prepare && prepares != KS_PREPARES_NOTHING) continue;
      if (range <= 0) {
        if (items > 0) routine->run(&arguments, &plan, stage, 0, items, memory);
        continue;
      }
      for (int64_t end = items; end > 0; end -= range) {
        memset(memory->scratch, 0xff, plan.scratch_bytes);
        routine->run(&arguments, &plan, stage, end > range ? end - range : 0, end, memory);
      }
    }
    CheckAndFree(memory->shared, plan.shared_bytes);
    CheckAndFree(memory->scratch, plan.scratch_bytes);
    return result;
  }

  // Filled with 0xff bytes (NaN), and followed by a guard that must stay so.
  static void* Allocate(int64_t bytes) {
    const int64_t size = (bytes + kGuard + KS_ALIGNMENT - 1) / KS_ALIGNMENT * KS_ALIGNMENT;
    void* block = aligned_alloc(KS_ALIGNMENT, size);
    memset(block, 0xff, size);
    return block;
  }
  static void CheckAndFree(void* block, int64_t bytes) {
    const unsigned char* guard = static_cast<unsigned char*>(block) + bytes;
    for (int64_t i = 0; i < kGuard; ++i) {
      if (guard[i] != 0xff) {
        ADD_FAILURE() << "A routine wrote past its memory, by " << i << " bytes.";
        break;
      }
    }
    free(block);
  }

  KsArguments arguments_;
  std::vector<int32_t> row_splits_, channels_, indices_;
  std::vector<float> input_, filter_, out_backprop_, bias_, residual_;
  size_t result_size_;
  int64_t terms_;
};

void CheckProblem(const Problem& problem, int* runs) {
  const KsOperation operation = problem.arguments().operation;
  int64_t position;
  ASSERT_EQ(ks_check_arguments(&problem.arguments(), &position), KS_OK);
  std::vector<float> expected;
  for (int32_t i = 0; i < ks_num_routines(); ++i) {
    const KsRoutine* routine = ks_routine(i);
    if (routine->operation == operation && strcmp(routine->isa, "reference") == 0) {
      ASSERT_TRUE(problem.Run(routine, 0, &expected));
    }
  }
  for (int32_t i = 0; i < ks_num_routines(); ++i) {
    const KsRoutine* routine = ks_routine(i);
    if (routine->operation != operation || strcmp(routine->isa, "reference") == 0) continue;
    SCOPED_TRACE(std::string(routine->name) + " " + routine->isa);
    std::vector<float> actual, again;
    if (!problem.Run(routine, 0, &actual)) continue;
    ++*runs;
    for (size_t e = 0; e < expected.size(); ++e) {
      ASSERT_NEAR(actual[e], expected[e], problem.tolerance()) << "element " << e;
    }
    ASSERT_TRUE(problem.Run(routine, 1, &again));
    ASSERT_TRUE(actual.empty() ||
                memcmp(actual.data(), again.data(), actual.size() * sizeof(float)) == 0)
        << "The result depends on how the work is cut.";
  }
}

void CheckRoutines(const Case& c, int* runs) {
  SCOPED_TRACE(Describe(c));
  for (int operation = 0; operation < KS_NUM_OPERATIONS; ++operation) {
    CheckProblem(Problem(static_cast<KsOperation>(operation), c), runs);
  }
}

void CheckAll(const std::vector<Case>& cases) {
  int runs = 0;
  for (const Case& c : cases) CheckRoutines(c, &runs);
  EXPECT_GT(runs, 0);
  testing::Test::RecordProperty("routine_runs", runs);
}

Case Same(Case c) {
  const auto pads = [](int64_t size, int64_t kernel, int64_t stride, int64_t dilation,
                       int64_t* before, int64_t* after) {
    const int64_t out = (size + stride - 1) / stride;
    const int64_t total =
        std::max<int64_t>(0, (out - 1) * stride + (kernel - 1) * dilation + 1 - size);
    *before = total / 2;
    *after = total - total / 2;
  };
  pads(c.height, c.kernel_height, c.stride_height, c.dilation_height, &c.pad_top, &c.pad_bottom);
  pads(c.width, c.kernel_width, c.stride_width, c.dilation_width, &c.pad_left, &c.pad_right);
  return c;
}

TEST(Routines, KernelShapes) {
  std::vector<Case> cases;
  const int64_t kernels[][2] = {{1, 1}, {1, 7}, {7, 1}, {3, 3}, {5, 5}, {11, 11}, {3, 1}, {2, 4}};
  for (const auto& kernel : kernels) {
    cases.push_back({2, 13, 11, 5, 7, kernel[0], kernel[1]});
    cases.push_back(Same({3, 12, 17, 17, 18, kernel[0], kernel[1]}));
  }
  CheckAll(cases);
}

TEST(Routines, Strides) {
  std::vector<Case> cases;
  for (int64_t kernel : {1, 2, 3, 5}) {
    for (int64_t stride : {1, 2, 4}) {
      Case c{2, 15, 18, 4, 19, kernel, kernel, stride, stride};
      cases.push_back(c);
      cases.push_back(Same(c));
      cases.push_back(Same({2, 9, 21, 17, 5, kernel, kernel, stride, 1}));
      cases.push_back(Same({2, 21, 9, 3, 16, kernel, kernel, 1, stride}));
    }
  }
  CheckAll(cases);
}

TEST(Routines, Dilations) {
  std::vector<Case> cases;
  for (int64_t dilation : {1, 2, 3}) {
    for (int64_t stride : {1, 2, 3}) {
      cases.push_back(Same({2, 17, 19, 3, 17, 3, 3, stride, stride, dilation, dilation}));
      cases.push_back({1, 17, 19, 4, 5, 3, 2, stride, 1, dilation, 4 - dilation});
      cases.push_back(Same({1, 14, 23, 4, 5, 1, 7, 1, stride, dilation, dilation}));
    }
  }
  CheckAll(cases);
}

TEST(Routines, Channels) {
  std::vector<Case> cases;
  for (int64_t in : {1, 3, 17, 64}) {
    for (int64_t out : {1, 3, 17, 64}) {
      cases.push_back(Same({2, 8, 9, in, out, 3, 3}));
      cases.push_back({3, 5, 6, in, out, 1, 1});
    }
  }
  CheckAll(cases);
}

TEST(Routines, ImageSizes) {
  std::vector<Case> cases;
  for (int64_t size : {1, 2, 4, 7, 15, 16, 17, 31, 32, 33, 70}) {
    cases.push_back(Same({5, size, size, 6, 5, 3, 3}));
    cases.push_back(Same({3, size, 1, 6, 5, 3, 3}));
    cases.push_back(Same({3, 1, size, 6, 5, 3, 3, 2, 2}));
    cases.push_back({9, size, size, 6, 5, 1, 1});
  }
  CheckAll(cases);
}

TEST(Routines, LargerThanATile) {
  CheckAll({Same({1, 70, 66, 64, 20, 3, 3, 1, 1, 1, 1, 0, 0, 0, 0, 0.05}),
            Same({40, 8, 8, 40, 20, 3, 3, 1, 1, 1, 1, 0, 0, 0, 0, 0.1}),
            Same({3, 40, 300, 40, 5, 3, 3, 2, 2, 1, 1, 0, 0, 0, 0, 0.1}),
            Same({30, 28, 28, 96, 8, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0.1})});
}

// Panels of output channels, blocks of pixels, chunks of kept rows and tiles of the thinned
// routines, each full, partial and alone.
TEST(Routines, ThinnedTiles) {
  std::vector<Case> cases;
  for (int64_t out : {16, 32, 48, 80, 83, 144}) {
    for (int64_t size : {1, 3, 4, 7}) cases.push_back(Same({1, size, size, 33, out, 3, 3}));
    cases.push_back(Same({14, 4, 4, 64, out, 3, 3}));  // Several images to a tile, several chunks.
    cases.push_back({5, 13, 9, 20, out, 3, 3, 2, 2});  // Nothing padded: read in place.
    cases.push_back({5, 13, 9, 20, out, 1, 1, 2, 3});
  }
  cases.push_back(Same({2, 70, 41, 64, 24, 3, 3}));  // Bands of rows.
  for (int64_t batch : {1, 2, 9, 33}) {
    cases.push_back({batch, 12, 12, 130, 32, 1, 1});
  }
  cases.push_back(Same({1, 3, 6000, 8, 7, 3, 3}));
  cases.push_back(Same({2, 5, 6, 20, 600, 3, 3}));  // More panels than are computed together.
  cases.push_back({2, 5, 6, 20, 600, 5, 1});
  cases.push_back(Same({2, 256, 256, 3, 16, 3, 3}));  // Results stored past the caches.
  cases.push_back(Same({5, 30, 57, 272, 3, 1, 3, 1, 1, 1, 1, 0, 0, 0, 0, 0.05}));
  // Taps in the padding alone, and more kinds of rows and columns than classes are made for.
  cases.push_back({2, 3, 4, 20, 18, 3, 5, 4, 3, 1, 1, 5, 6, 5, 9});
  cases.push_back(Same({3, 14, 12, 18, 16, 13, 11}));
  CheckAll(cases);
}

// One tap with few of many channels, which are gathered: for all threads at first, or tile by tile.
TEST(Routines, ThinnedGathered) {
  std::vector<Case> cases;
  for (int64_t out : {130, 528}) {
    for (double density : {0.004, 0.05, 0.1}) {
      Case c{1, 9, 7, 300, out, 1, 1};
      c.density = density;
      cases.push_back(c);
      c.stride_height = 2;
      c.stride_width = 3;
      cases.push_back(c);
      c.batch = 33;  // Several images to a tile.
      cases.push_back(c);
    }
  }
  Case rows{4, 64, 40, 300, 130, 1, 1};  // Several tiles to an image, the last with fewer rows.
  rows.density = 0.05;
  cases.push_back(rows);
  rows = {4, 65, 80, 300, 528, 1, 1, 2, 3};
  rows.density = 0.02;
  cases.push_back(rows);
  CheckAll(cases);
}

// Regions, groups, channel blocks and parts of the connection filter gradient.
TEST(Routines, FilterGradientRegions) {
  std::vector<Case> cases;
  for (int64_t width = 1; width <= 12; ++width) {
    cases.push_back(Same({3, 5, width, 18, 5, 3, 3}));
    cases.push_back(Same({1, 20, width, 3, 17, 3, 3}));
  }
  for (int64_t batch : {1, 4, 15, 17, 33}) {
    cases.push_back(Same({batch, 4, 4, 20, 6, 3, 3}));
    cases.push_back({batch, 9, 7, 70, 6, 1, 1});
  }
  Case c = Same({16, 8, 8, 300, 5, 3, 3});  // More input channels than a block takes.
  c.density = 0.1;
  cases.push_back(c);
  c = Same({140, 8, 8, 70, 20, 3, 3});  // Parts with sums of their own.
  c.density = 0.1;
  cases.push_back(c);
  c = {20, 20, 20, 150, 40, 1, 1};
  c.density = 0.1;
  cases.push_back(c);
  cases.push_back(Same({2, 30, 31, 5, 6, 9, 9}));  // Taps that reach further than a region.
  cases.push_back(Same({2, 30, 31, 5, 6, 3, 3, 1, 1, 9, 9}));
  CheckAll(cases);
}

// Windows of the connection filter gradient: regions as high or wide as the image or not, rows that
// are not next to each other, columns traded for rows.
TEST(Routines, FilterGradientWindows) {
  std::vector<Case> cases;
  for (int64_t batch : {1, 16}) {
    for (int64_t height : {1, 2, 3, 14, 29}) {
      for (int64_t width : {1, 2, 7, 14, 29}) {
        cases.push_back(Same({batch, height, width, 5, 6, 3, 3}));
      }
    }
  }
  for (int64_t size : {5, 18, 19}) {
    for (int64_t kernel : {3, 5, 7}) {
      cases.push_back(Same({3, size, size, 5, 20, 1, kernel}));
      cases.push_back(Same({3, size, size, 20, 5, kernel, 1}));
      cases.push_back({3, size, size, 5, 4, 2, size < kernel ? 1 : kernel});
      cases.push_back(Same({2, size, size, 4, 5, 15, kernel}));
    }
    cases.push_back(Same({2, size, size, 5, 20, 3, 3, 2, 1}));
    cases.push_back(Same({2, size, size, 5, 20, 3, 3, 1, 1, 2, 1}));
    cases.push_back(Same({2, size, size, 5, 20, 3, 3, 3, 1, 2, 1}));
    cases.push_back(Same({2, size, size, 5, 20, 3, 1, 1, 2, 1, 2}));
  }
  CheckAll(cases);
}

// Dense blocks of the connection filter gradient, full and partial.
TEST(Routines, FilterGradientOuterProducts) {
  std::vector<Case> cases;
  for (double density : {0.4, 0.7, 1.0}) {
    for (int64_t in : {1, 15, 64, 70, 130}) {
      for (int64_t out : {1, 6, 17, 200}) {
        Case c = {3, 7, 9, in, out, 1, 1};
        c.density = density;
        cases.push_back(c);
      }
    }
    for (int64_t batch : {1, 5, 20, 41}) {
      Case c = {batch, 11, 9, 70, 19, 1, 1};
      c.density = density;
      cases.push_back(c);
    }
  }
  CheckAll(cases);
}

// Regions that do and do not divide the images, lanes without a region, several parts of the input
// channels, and every way a kernel can reach over an edge.
TEST(Routines, Regions) {
  std::vector<Case> cases;
  for (int64_t batch : {1, 3, 17}) {
    for (int64_t size : {4, 7, 13}) {
      Case c = Same({batch, size, size + 1, 20, 19, 3, 3});
      cases.push_back(c);
      c.pad_top = c.pad_left = 2;
      c.pad_bottom = c.pad_right = 0;
      cases.push_back(c);
      cases.push_back(Same({batch, size, size, 33, 16, 5, 5}));
      cases.push_back(Same({batch, size, size + 1, 16, 33, 1, 7}));
      cases.push_back(Same({batch, size, size + 1, 16, 33, 7, 1}));
      cases.push_back(Same({batch, size, size + 1, 17, 16, 7, 7}));
    }
    // Images that fit a vector, or just do not.
    for (int64_t stride : {1, 2}) {
      cases.push_back(Same({batch, 4, 4, 20, 19, 3, 3, stride, stride}));
      cases.push_back(Same({batch, 2, 2, 37, 33, 3, 3, stride, stride}));
      cases.push_back(Same({batch, 1, 5, 16, 40, 2, 3, stride, stride}));
      cases.push_back(Same({batch, 3, 5, 3, 16, 1, 7, stride, stride}));
      cases.push_back(Same({batch, 3, 3, 17, 5, 3, 3, stride, stride, 2, 2}));
      cases.push_back({batch, 4, 4, 20, 19, 3, 3, stride, stride});
      cases.push_back({batch, 2, 2, 20, 19, 3, 2, stride, stride, 1, 1, 2, 2, 1, 2});
      cases.push_back(Same({batch, 4, 5, 20, 19, 3, 3, stride, stride}));
    }
    for (double density : {0.02, 0.5}) {
      Case c = Same({batch, 9, 6, 300, 37, 3, 3});
      c.density = density;
      cases.push_back(c);
      c = {batch, 9, 6, 530, 35, 1, 1};
      c.density = density;
      cases.push_back(c);
      c = {batch, 3, 6, 1024, 20, 1, 1};  // Pixels that are whole pages.
      c.density = density;
      cases.push_back(c);
      c = Same({batch, 9, 8, 70, 35, 1, 1, 2, 3});
      c.density = density;
      cases.push_back(c);
      c = Same({batch, 2, 3, 290, 300, 3, 3});
      c.density = density;
      cases.push_back(c);
    }
  }
  CheckAll(cases);
}

// Every height of a region, with and without padding above and below, tiles that the width cuts
// short, channels that do and do not fill vectors, planes that stay in a cache or do not.
TEST(Routines, Winograd) {
  std::vector<Case> cases;
  for (int64_t height = 1; height <= 34; ++height) {
    cases.push_back(Same({1, height, 1 + height % 9, 17, 5, 3, 3}));
    cases.push_back({1, height + 2, 3 + height % 5, 33, 18, 3, 3});
  }
  for (int64_t pad = 0; pad < 3; ++pad) {
    cases.push_back({3, 9, 10, 20, 7, 3, 3, 1, 1, 1, 1, pad, 1, 2 - pad, 2});
    cases.push_back({3, 5, 6, 20, 7, 3, 3, 1, 1, 1, 1, 1, pad, 0, pad});
  }
  for (double density : {0.0, 0.1, 0.9, 1.0}) {
    Case c = Same({2, 16, 16, 24, 70, 3, 3});
    c.density = density;
    cases.push_back(c);
    c = Same({40, 7, 7, 40, 20, 3, 3});
    c.density = density / 2;
    cases.push_back(c);
  }
  Case c = Same({9, 14, 14, 150, 150, 3, 3});  // Sums of more channels than are stored together.
  c.density = 0.05;
  cases.push_back(c);
  CheckAll(cases);
}

// Widths that do and do not fill tiles, rows of taps that are kept whole, in part or not at all,
// panels that result channels do not fill, several chunks of terms, several tiles of the batch.
TEST(Routines, ThinnedWinograd) {
  std::vector<Case> cases;
  const int64_t channels[] = {1, 5, 17, 64, 83, 144};
  const double densities[] = {0, 0.3, 0.5, 0.9, 1};
  for (int64_t height = 1; height <= 9; ++height) {
    for (int64_t kernel_height : {1, 3, 5}) {
      Case c = Same({1 + height % 2, height, 1 + (height * 5 + kernel_height) % 11, 7 + height,
                     channels[(height + kernel_height) % 6], kernel_height, 3});
      c.density = densities[height % 5];
      cases.push_back(c);
    }
  }
  for (int64_t out_channels : channels) {
    for (double density : densities) {
      Case c = {2, 6, 9, 19, out_channels, 3, 3};
      c.density = density;
      cases.push_back(c);
    }
  }
  for (int64_t pad = 0; pad < 3; ++pad) {
    for (double density : densities) {
      Case c = {3, 7, 10, 20, 17, 3, 3, 1, 1, 1, 1, pad, 1, 2 - pad, 2};
      c.density = density;
      cases.push_back(c);
      c = {2, 5, 4, 16, 33, 5, 3, 1, 1, 1, 1, 2, pad, 0, pad};
      c.density = density;
      cases.push_back(c);
    }
  }
  cases.push_back({2, 6, 10, 20, 17, 3, 3});  // Whole tiles without padding: read in place.
  cases.push_back({1, 50, 58, 48, 16, 3, 3});
  Case c = Same({1, 6, 7, 300, 83, 3, 3});  // Chunks.
  c.density = 0.6;
  cases.push_back(c);
  c.batch = 9;
  c.density = 0.3;
  cases.push_back(c);
  c = Same({2, 40, 41, 32, 70, 3, 3});  // Tiles that end within an image,
  c.density = 0.5;
  cases.push_back(c);
  c = Same({40, 7, 7, 40, 20, 3, 3});  // and that hold several.
  c.density = 0.5;
  cases.push_back(c);
  c = Same({3, 21, 10, 70, 300, 3, 3});  // Panels that are computed together, and the rest.
  c.density = 0.5;
  cases.push_back(c);
  CheckAll(cases);
}

// What the op does with its thread pool; make sanitize runs these under the thread sanitizer.
void CheckThreads(const Case& c, int* runs) {
  SCOPED_TRACE(Describe(c));
  for (int32_t i = 0; i < ks_num_routines(); ++i) {
    const KsRoutine* routine = ks_routine(i);
    SCOPED_TRACE(std::string(routine->name) + " " + routine->isa);
    const Problem problem(routine->operation, c);
    std::vector<float> expected, actual;
    if (!problem.Run(routine, 0, &expected)) continue;
    for (int64_t chunk : {1, 3}) {
      ASSERT_TRUE(problem.RunOnThreads(routine, 4, chunk, &actual));
      ASSERT_TRUE(expected.empty() ||
                  memcmp(expected.data(), actual.data(), expected.size() * sizeof(float)) == 0)
          << "The result depends on the threads.";
      ++*runs;
    }
  }
}

TEST(Threads, AnyThreadTakesAnyChunk) {
  Case sparse = Same({3, 9, 6, 100, 37, 3, 3});
  sparse.density = 0.05;
  Case pointwise = {5, 12, 12, 130, 32, 1, 1};
  pointwise.density = 0.1;
  Case parts = Same({40, 8, 8, 70, 20, 3, 3});  // Filter gradients with partial sums.
  parts.density = 0.1;
  int runs = 0;
  for (const Case& c :
       {sparse, pointwise, parts, Same({1, 13, 14, 20, 19, 3, 3}), Same({2, 13, 11, 5, 40, 1, 7}),
        Same({17, 4, 4, 33, 16, 5, 5}), Same({3, 15, 18, 17, 19, 3, 3, 2, 2}),
        Same({3, 15, 18, 17, 19, 3, 3, 1, 1, 2, 2}),
        Case{2, 9, 10, 4, 5, 3, 3, 2, 2, 1, 1, 5, 4, 7, 0}, Same({2, 30, 41, 24, 24, 3, 3})}) {
    CheckThreads(c, &runs);
  }
  EXPECT_GT(runs, 0);
}

TEST(Routines, ExplicitPaddings) {
  CheckAll({{2, 9, 10, 4, 5, 3, 3, 1, 1, 1, 1, 0, 3, 2, 1},
            {2, 9, 10, 4, 5, 3, 3, 2, 2, 1, 1, 5, 4, 7, 0},
            {2, 9, 10, 4, 5, 1, 1, 1, 1, 1, 1, 1, 0, 0, 2},
            {2, 9, 10, 4, 5, 2, 2, 3, 3, 2, 2, 9, 9, 9, 9},
            {1, 2, 2, 4, 5, 3, 3, 4, 4, 1, 1, 20, 20, 20, 20}});
}

// Bias, residual and activation in all combinations: odd channels, lanes without a pixel, pixels
// that no connection feeds, several parts and chunks, sums that are stored past the caches.
TEST(Routines, Epilogue) {
  std::vector<Case> cases = {
      Same({2, 9, 7, 5, 19, 3, 3}),
      Same({3, 8, 8, 16, 16, 3, 3}),
      Same({2, 9, 6, 300, 37, 3, 3}),
      Same({1, 2, 3, 290, 66, 3, 3}),
      {5, 6, 7, 33, 35, 1, 1},
      Same({2, 13, 12, 6, 33, 3, 3, 2, 2}),
      Same({2, 9, 12, 6, 32, 3, 2, 1, 1, 2, 1}),
      Same({2, 7, 9, 4, 17, 7, 1}),
      Same({2, 9, 70, 4, 5, 1, 7}),
      Same({14, 4, 4, 64, 83, 3, 3}),
      {2, 9, 10, 4, 5, 1, 1, 1, 1, 1, 1, 1, 0, 0, 2},
      Same({1, 11, 9, 3, 7, 11, 11}),
      {2, 8, 8, 0, 4, 3, 3},
  };
  Case c = Same({2, 10, 11, 18, 21, 3, 3});
  c.density = 0;
  cases.push_back(c);
  c = Same({33, 32, 32, 2, 64, 3, 3});
  cases.push_back(c);
  c.out_channels = 67;
  cases.push_back(c);
  for (const Case& each : cases) {
    SCOPED_TRACE(Describe(each));
    for (int choice = 0; choice < 12; ++choice) {
      const bool bias = choice & 1, residual = choice & 2;
      const KsActivation activation = static_cast<KsActivation>(choice / 4);
      SCOPED_TRACE("bias " + std::to_string(bias) + ", residual " + std::to_string(residual) +
                   ", activation " + std::to_string(activation));
      if (each.batch > 30 && choice % 4 != 3) continue;  // Large.
      for (KsOperation operation : {KS_CONNECTION_CONV2D, KS_THINNED_CONV2D}) {
        Problem problem(operation, each);
        problem.SetEpilogue(bias, residual, activation);
        int runs = 0;
        CheckProblem(problem, &runs);
        EXPECT_GT(runs, 0);
      }
    }
  }
}

// Max pooling behind bias and activation: regions and tiles that end with the image and before it,
// blocks of several sizes, kernels on their side, sums in parts, results past the caches.
TEST(Routines, Pool) {
  std::vector<Case> cases = {
      Same({2, 8, 8, 16, 16, 3, 3}),    Same({3, 32, 32, 16, 37, 3, 3}),
      Same({2, 14, 14, 33, 19, 3, 3}),  Same({5, 4, 4, 64, 83, 3, 3}),
      Same({2, 10, 26, 300, 37, 3, 3}), {2, 12, 14, 5, 7, 3, 3},
      Same({3, 18, 20, 6, 33, 5, 5}),   Same({2, 12, 22, 4, 17, 1, 7}),
      Same({2, 22, 12, 4, 17, 7, 1}),   Same({2, 2, 2, 20, 18, 3, 3}),
      Same({2, 44, 46, 17, 6, 3, 3}),   Same({65, 32, 32, 2, 128, 3, 3}),
  };
  cases.push_back(cases[1]);
  cases.back().density = 0;
  cases.push_back(cases[2]);
  cases.back().density = 1;
  std::map<std::string, int> runs_of;
  for (const Case& each : cases) {
    SCOPED_TRACE(Describe(each));
    for (int choice = 0; choice < 6; ++choice) {
      if (each.batch > 60 && choice != 3) continue;  // Large.
      Problem problem(KS_CONNECTION_CONV2D, each);
      problem.SetEpilogue(choice & 1, false, static_cast<KsActivation>(choice / 2));
      problem.SetPool(2);
      int runs = 0;
      CheckProblem(problem, &runs);
      EXPECT_GT(runs, 0);
      for (int32_t i = 0; i < ks_num_routines(); ++i) {
        KsPlan plan;
        if (ks_routine(i)->operation != KS_CONNECTION_CONV2D) continue;
        runs_of[ks_routine(i)->name] += ks_routine(i)->plan(&problem.arguments(), &plan);
      }
    }
  }
  EXPECT_GT(runs_of["ConnectionConv2DRegions"], 0);
  EXPECT_GT(runs_of["ConnectionConv2DWinograd"], 0);
  // Only the reference pools images of odd sizes, and by other squares.
  for (int64_t pool : {2, 3}) {
    Problem problem(KS_CONNECTION_CONV2D, Same({2, 9, 8, 5, 6, 3, 3}));
    problem.SetPool(pool);
    KsPlan plan;
    EXPECT_STREQ(ks_select(&problem.arguments(), &plan)->isa, "reference");
    std::vector<float> result;
    ASSERT_TRUE(problem.Run(ks_select(&problem.arguments(), &plan), 0, &result));
    for (float value : result) ASSERT_FALSE(std::isnan(value));
  }
}

// The reference itself: of its convolution's output, the largest of each square.
TEST(Routines, PoolOfReference) {
  const KsRoutine* reference = ks_routine(ks_num_routines() - 1);
  for (int32_t i = 0; i < ks_num_routines(); ++i) {
    if (ks_routine(i)->operation == KS_CONNECTION_CONV2D) reference = ks_routine(i);
  }
  ASSERT_STREQ(reference->isa, "reference");
  for (int64_t pool : {1, 2, 3, 5}) {
    Problem problem(KS_CONNECTION_CONV2D, Same({2, 9, 13, 5, 6, 3, 3}));
    problem.SetEpilogue(true, false, KS_RELU6);
    std::vector<float> whole, pooled;
    ASSERT_TRUE(problem.Run(reference, 0, &whole));
    problem.SetPool(pool);
    ASSERT_TRUE(problem.Run(reference, 0, &pooled));
    const int64_t rows = 9 / pool, columns = 13 / pool;
    for (int64_t e = 0; e < static_cast<int64_t>(pooled.size()); ++e) {
      const int64_t o = e % 6, x = e / 6 % columns, y = e / 6 / columns % rows;
      const int64_t n = e / 6 / columns / rows;
      float largest = 0;
      for (int64_t i = 0; i < pool * pool; ++i) {
        const int64_t row = y * pool + i / pool, column = x * pool + i % pool;
        largest = std::max(largest, whole[((n * 9 + row) * 13 + column) * 6 + o]);
      }
      ASSERT_EQ(pooled[e], largest) << "pool " << pool << ", element " << e;
    }
  }
}

// A NaN is no maximum, and where there is nothing else the lowest finite number is.
TEST(Routines, PoolPassesOverNan) {
  for (KsActivation activation : {KS_LINEAR, KS_RELU}) {
    Problem problem(KS_CONNECTION_CONV2D,
                    Same({2, 8, 16, 17, 19, 3, 3, 1, 1, 1, 1, 0, 0, 0, 0, 1.0}));
    problem.SetEpilogue(false, false, activation);
    problem.SetInput(std::numeric_limits<float>::quiet_NaN());
    problem.SetPool(2);
    int runs = 0;
    for (int32_t i = 0; i < ks_num_routines(); ++i) {
      std::vector<float> result;
      if (ks_routine(i)->operation != KS_CONNECTION_CONV2D ||
          !problem.Run(ks_routine(i), 0, &result)) {
        continue;
      }
      ++runs;
      const float expected = activation == KS_RELU ? 0.0f : std::numeric_limits<float>::lowest();
      for (float value : result) ASSERT_EQ(value, expected) << ks_routine(i)->name;
    }
    EXPECT_GT(runs, 1);
  }
}

TEST(Routines, PoolIsChecked) {
  Problem problem(KS_CONNECTION_CONV2D, Same({2, 9, 8, 5, 6, 3, 3}));
  KsArguments arguments = problem.arguments();
  int64_t position;
  arguments.pool = 3;
  EXPECT_EQ(ks_check_arguments(&arguments, &position), KS_OK);
  arguments.pool = -1;
  EXPECT_EQ(ks_check_arguments(&arguments, &position), KS_BAD_SIZE);
  arguments.pool = 2;
  arguments.residual = arguments.input;
  EXPECT_EQ(ks_check_arguments(&arguments, &position), KS_BAD_SIZE);
  Problem thinned(KS_THINNED_CONV2D, Same({2, 9, 8, 5, 6, 3, 3}));
  arguments = thinned.arguments();
  arguments.pool = 1;
  EXPECT_EQ(ks_check_arguments(&arguments, &position), KS_OK);
  arguments.pool = 2;
  EXPECT_EQ(ks_check_arguments(&arguments, &position), KS_BAD_SIZE);
}

TEST(Routines, EpilogueKeepsNan) {
  for (KsOperation operation : {KS_CONNECTION_CONV2D, KS_THINNED_CONV2D}) {
    for (KsActivation activation : {KS_LINEAR, KS_RELU, KS_RELU6}) {
      Problem problem(operation, Same({2, 9, 7, 5, 19, 3, 3, 1, 1, 1, 1, 0, 0, 0, 0, 1.0}));
      problem.SetEpilogue(true, true, activation);
      problem.SetInput(std::numeric_limits<float>::quiet_NaN());
      for (int32_t i = 0; i < ks_num_routines(); ++i) {
        std::vector<float> result;
        if (ks_routine(i)->operation != operation || !problem.Run(ks_routine(i), 0, &result)) {
          continue;
        }
        for (float value : result) ASSERT_TRUE(std::isnan(value)) << ks_routine(i)->name;
      }
    }
  }
}

TEST(Routines, Densities) {
  std::vector<Case> cases;
  for (double density : {0.0, 0.02, 0.5, 1.0}) {
    Case c = Same({2, 10, 11, 18, 21, 3, 3});
    c.density = density;
    cases.push_back(c);
    c = Same({2, 10, 11, 18, 21, 1, 1, 2, 2});
    c.density = density;
    cases.push_back(c);
  }
  CheckAll(cases);
}

TEST(Routines, NothingToDo) {
  std::vector<Case> cases = {{0, 8, 8, 3, 4, 3, 3}, {2, 2, 8, 3, 4, 3, 3}, {2, 8, 8, 0, 4, 3, 3},
                             {2, 8, 8, 3, 0, 3, 3}, {2, 0, 8, 3, 4, 1, 1}, {2, 8, 0, 3, 4, 1, 1}};
  for (const Case& c : cases) {
    SCOPED_TRACE(Describe(c));
    for (int operation = 0; operation < KS_NUM_OPERATIONS; ++operation) {
      const Problem problem(static_cast<KsOperation>(operation), c);
      for (int32_t i = 0; i < ks_num_routines(); ++i) {
        if (ks_routine(i)->operation != operation) continue;
        std::vector<float> result;
        if (!problem.Run(ks_routine(i), 1, &result)) continue;
        for (float value : result) EXPECT_EQ(value, 0);
      }
    }
  }
}

TEST(Routines, SelectIsTheFirstThatTakesTheArguments) {
  const Problem problem(KS_CONNECTION_CONV2D, Same({2, 10, 11, 18, 21, 3, 3}));
  KsPlan plan;
  const KsRoutine* routine = ks_select(&problem.arguments(), &plan);
  ASSERT_NE(routine, nullptr);
  EXPECT_STREQ(routine->isa, ks_isa());
  // A kernel that reaches across 2^30 columns takes more memory than a routine may; images that fit
  // a vector do not count their columns.
  Case far = {1, 17, 4, 3, 4, 2, 2, 1, 1, 1, int64_t{1} << 30};
  far.pad_right = int64_t{1} << 30;
  for (int operation = 0; operation < KS_NUM_OPERATIONS; ++operation) {
    Problem wide(static_cast<KsOperation>(operation), far);
    int64_t position;
    ASSERT_EQ(ks_check_arguments(&wide.arguments(), &position), KS_OK);
    routine = ks_select(&wide.arguments(), &plan);
    ASSERT_NE(routine, nullptr);
    EXPECT_STREQ(routine->isa, "reference");
  }
}

// --- Checks --------------------------------------------------------------------------------------

class Checks : public testing::Test {
 protected:
  KsStatus Check(const KsArguments& arguments) {
    return ks_check_arguments(&arguments, &position_);
  }

  KsArguments Connection() {
    KsArguments a = {};
    a.operation = KS_CONNECTION_CONV2D;
    a.geometry = Geometry({2, 8, 8, 4, 2, 3, 3});
    a.kept = 4;
    a.row_splits = row_splits_;
    a.input_channels = channels_;
    return a;
  }
  KsArguments Thinned() {
    KsArguments a = {};
    a.operation = KS_THINNED_CONV2D;
    a.geometry = Geometry({2, 8, 8, 4, 2, 3, 3});
    a.kept = 3;
    a.indices = indices_;
    return a;
  }

  int32_t row_splits_[3] = {0, 3, 4};
  int32_t channels_[4] = {0, 1, 3, 2};
  int32_t indices_[3] = {0, 7, 35};
  int64_t position_ = 0;
};

TEST_F(Checks, GoodTablesPass) {
  EXPECT_EQ(Check(Connection()), KS_OK);
  EXPECT_EQ(Check(Thinned()), KS_OK);
}

TEST_F(Checks, RowSplits) {
  row_splits_[0] = 1;
  EXPECT_EQ(Check(Connection()), KS_BAD_ROW_SPLITS);
  EXPECT_EQ(position_, 0);
  row_splits_[0] = 0;
  row_splits_[1] = -1;
  EXPECT_EQ(Check(Connection()), KS_BAD_ROW_SPLITS);
  EXPECT_EQ(position_, 1);
  row_splits_[1] = 5;
  EXPECT_EQ(Check(Connection()), KS_BAD_ROW_SPLITS);
  row_splits_[1] = 3;
  row_splits_[2] = 3;
  EXPECT_EQ(Check(Connection()), KS_BAD_ROW_SPLITS);
  EXPECT_EQ(position_, 2);
}

TEST_F(Checks, InputChannels) {
  channels_[1] = 0;
  EXPECT_EQ(Check(Connection()), KS_BAD_INPUT_CHANNELS);
  EXPECT_EQ(position_, 1);
  channels_[1] = 1;
  channels_[3] = 4;
  EXPECT_EQ(Check(Connection()), KS_BAD_INPUT_CHANNELS);
  EXPECT_EQ(position_, 3);
  channels_[3] = -1;
  EXPECT_EQ(Check(Connection()), KS_BAD_INPUT_CHANNELS);
}

TEST_F(Checks, Indices) {
  indices_[2] = 36;
  EXPECT_EQ(Check(Thinned()), KS_BAD_INDICES);
  EXPECT_EQ(position_, 2);
  indices_[2] = 7;
  EXPECT_EQ(Check(Thinned()), KS_BAD_INDICES);
  indices_[2] = 35;
  indices_[0] = -1;
  EXPECT_EQ(Check(Thinned()), KS_BAD_INDICES);
  EXPECT_EQ(position_, 0);
}

TEST_F(Checks, Sizes) {
  KsArguments a = Connection();
  a.geometry.stride_width = 0;
  EXPECT_EQ(Check(a), KS_BAD_SIZE);
  a = Connection();
  a.geometry.pad_top = -1;
  EXPECT_EQ(Check(a), KS_BAD_SIZE);
  a = Connection();
  a.geometry.batch = int64_t{1} << 39;
  a.geometry.in_height = int64_t{1} << 39;
  EXPECT_EQ(Check(a), KS_TOO_LARGE);
  a = Thinned();
  a.geometry.kernel_height = 1 << 20;
  a.geometry.kernel_width = 1 << 20;
  EXPECT_EQ(Check(a), KS_TOO_LARGE);
  a = Connection();
  a.geometry.kernel_width = 1 << 30;
  a.geometry.dilation_width = 1 << 30;
  EXPECT_EQ(Check(a), KS_TOO_LARGE);
}

}  // namespace
