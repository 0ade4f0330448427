// Copyright 2026 The keras_sparse Authors. Licensed under the Apache License, Version 2.0.
//
// The OpKernels: they check what the caller passes, allocate, and run the stages of a compute
// routine on TensorFlow's thread pool.

#include <string.h>
#ifdef __linux__
#include <sched.h>
#endif

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "custom_ops/kernels/conv2d.h"
#include "custom_ops/tensorflow/block_pool.h"
#include "custom_ops/tensorflow/conv2d_attributes.h"
#include "custom_ops/tensorflow/crew.h"
#include "custom_ops/tensorflow/prepared.h"
#include "custom_ops/tensorflow/results.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/tensor.h"
#include "tensorflow/core/framework/tensor_shape.h"
#include "tensorflow/core/platform/threadpool.h"
#include "tensorflow/core/util/work_sharder.h"

namespace keras_sparse {
namespace {

using ::tensorflow::DEVICE_CPU;
using ::tensorflow::OpKernel;
using ::tensorflow::OpKernelConstruction;
using ::tensorflow::OpKernelContext;
using ::tensorflow::Tensor;
using ::tensorflow::TensorShape;

constexpr int64_t kThreadCycles =
    40000;                              // Work that is worth another thread, which has to be woken.
constexpr int64_t kChunkCycles = 5000;  // Work that is taken at a time, at least,
constexpr int64_t kChunksAhead = 4;     // of the items that are left so many chunks.
constexpr int64_t kScratchOfAll = int64_t{2} << 30;  // Fewer threads work, rather than more memory.

int64_t CurrentCpu() {
#ifdef __linux__
  return std::max(0, sched_getcpu());
#else
  return 0;
#endif
}

// A stage whose items are cut into as many parts as there are workers. Each takes chunks of its own
// part, of the others' when that is done. The caller works as well and returns when all items are
// done; it never waits for a thread that has not started, and such a thread, once it starts, finds
// nothing left and touches only this object.
//
// A CPU begins with the same part and the same block of scratch memory in every op, whichever
// thread it runs. What it writes is then mostly what it wrote in the last op, and what it reads of
// another layer's result what it wrote there. To fetch a cache line that another CPU has written
// takes as long as some hundreds of multiply-adds, and much longer if the two share no cache, which
// a virtual machine cannot know.
class StageRun {
 public:
  StageRun(const KsArguments* arguments, const KsPlan* plan, const KsRoutine* routine,
           int32_t stage, const KsMemory& memory, int64_t scratch_stride, int64_t workers)
      : arguments_(arguments),
        plan_(plan),
        routine_(routine),
        stage_(stage),
        memory_(memory),
        scratch_stride_(scratch_stride),
        items_(plan->stages[stage].items),
        chunk_(std::max<int64_t>(1, kChunkCycles / plan->stages[stage].cost)),
        parts_(workers) {
    for (int64_t i = 0; i < workers; ++i) {
      parts_[i].next = items_ * i / workers;
      parts_[i].end = items_ * (i + 1) / workers;
    }
  }

  // Takes chunks until none is left. Called once by each worker.
  void Work() {
    const int64_t parts = static_cast<int64_t>(parts_.size());
    int64_t own = CurrentCpu() % parts;
    while (parts_[own].taken.exchange(true)) own = (own + 1) % parts;
    KsMemory memory = memory_;
    memory.scratch = static_cast<char*>(memory_.scratch) + own * scratch_stride_;
    int64_t held = -1;
    memory.held = &held;
    int64_t done = 0;
    for (int64_t i = 0; i < parts; ++i) {
      int64_t begin, end;
      while (TakeChunk(&parts_[(own + i) % parts], &begin, &end)) {
        routine_->run(arguments_, plan_, stage_, begin, end, &memory);
        done += end - begin;
      }
    }
    if (done == 0) return;
    if (done_.fetch_add(done) + done == items_) {
      std::lock_guard<std::mutex> lock(mutex_);  // The caller is before its test or asleep.
      all_done_.notify_all();
    }
  }

  // Other threads are at most in the middle of a chunk each, less than it takes to fall asleep and
  // to be woken: look a while first.
  void Wait() {
    for (int i = 0; i < kLooks; ++i) {
      if (done_.load() == items_) return;
      Pause();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    all_done_.wait(lock, [this] { return done_.load() == items_; });
  }

 private:
  struct alignas(KS_ALIGNMENT) Part {
    std::atomic<int64_t> next{0};  // Item.
    int64_t end = 0;
    std::atomic<bool> taken{false};  // By the worker that begins with it.
  };

  // Chunks become smaller to the end: routines fetch one item while they compute another, which
  // wants long ones, and workers should finish together.
  bool TakeChunk(Part* part, int64_t* begin, int64_t* end) const {
    *begin = part->next.load();
    while (*begin < part->end) {
      const int64_t left = part->end - *begin;
      *end = *begin + std::min(left, std::max(chunk_, left / kChunksAhead));
      if (part->next.compare_exchange_weak(*begin, *end)) return true;
    }
    return false;
  }

  // Belong to the caller, who stays until all items are done.
  const KsArguments* arguments_;
  const KsPlan* plan_;
  const KsRoutine* routine_;
  const int32_t stage_;
  const KsMemory memory_;  // Its scratch is a block for each of the workers, one after another.
  const int64_t scratch_stride_;

  const int64_t items_, chunk_;
  std::vector<Part> parts_;
  std::mutex mutex_;
  std::condition_variable all_done_;
  std::atomic<int64_t> done_{0};
};

// Threads worth using for a stage.
int64_t StageWorkers(const KsStage& stage, int64_t threads) {
  const double worth = static_cast<double>(stage.items) * stage.cost / kThreadCycles;
  const int64_t most = std::min(threads, stage.items);
  return worth < most ? std::max<int64_t>(1, static_cast<int64_t>(worth)) : most;
}

// Runs stages of a plan on the threads of a device.
class StageRunner {
 public:
  StageRunner(OpKernelContext* context, const KsArguments& arguments, const KsPlan& plan,
              const KsRoutine* routine)
      : arguments_(arguments),
        plan_(plan),
        routine_(routine),
        workers_(context->device()->tensorflow_cpu_worker_threads()),
        scratch_stride_((plan.scratch_bytes + KS_ALIGNMENT - 1) / KS_ALIGNMENT * KS_ALIGNMENT),
        threads_(workers_->num_threads) {
    if (scratch_stride_ > 0) {
      threads_ = std::max<int64_t>(1, std::min(threads_, kScratchOfAll / scratch_stride_));
    }
    for (int32_t stage = 0; stage < plan.num_stages; ++stage) {
      most_ = std::max(most_, StageWorkers(plan.stages[stage], threads_));
    }
  }

  int64_t scratch_bytes() const { return scratch_stride_ * most_; }

  // Runs the stages that prepare `what`. The scratch of `memory` has scratch_bytes().
  void Run(int64_t what, const KsMemory& memory) const {
    for (int32_t stage = 0; stage < plan_.num_stages; ++stage) {
      const int64_t items = plan_.stages[stage].items;
      if (items == 0 || plan_.stages[stage].prepares != what) continue;
      const int64_t use = std::min(most_, StageWorkers(plan_.stages[stage], threads_));
      if (use == 1) {
        routine_->run(&arguments_, &plan_, stage, 0, items, &memory);
        continue;
      }
      const auto run = std::make_shared<StageRun>(&arguments_, &plan_, routine_, stage, memory,
                                                  scratch_stride_, use);
      Crew::Global().Start(workers_->workers, use - 1, [run] { run->Work(); });
      run->Work();
      run->Wait();
    }
  }

 private:
  const KsArguments& arguments_;
  const KsPlan& plan_;
  const KsRoutine* const routine_;
  const tensorflow::DeviceBase::CpuWorkerThreads* const workers_;
  const int64_t scratch_stride_;
  int64_t threads_;
  int64_t most_ = 1;
};

absl::Status OutOfMemory(int64_t bytes) {
  return absl::ResourceExhaustedError(
      absl::StrCat("a sparse convolution needs ", bytes, " bytes of memory beside its tensors"));
}

absl::Status CheckRank(const Tensor& tensor, const char* name, int rank) {
  if (tensor.dims() != rank) {
    return InvalidArgument(name, " must have rank ", rank, ", received shape ",
                           tensor.shape().DebugString());
  }
  return absl::OkStatus();
}

// What the checks of the compute routines found, in words.
absl::Status TableError(KsStatus status, const KsArguments& arguments, int64_t position) {
  const KsGeometry& g = arguments.geometry;
  switch (status) {
    case KS_OK:
      return absl::OkStatus();
    case KS_BAD_ROW_SPLITS:
      return InvalidArgument(
          "row_splits must start with 0, not decrease and end with the number of connections, ",
          arguments.kept, "; received row_splits[", position,
          "] = ", arguments.row_splits[position],
          position > 0 ? absl::StrCat(" after ", arguments.row_splits[position - 1]) : "");
    case KS_BAD_INPUT_CHANNELS:
      return InvalidArgument(
          "input_channels must be at least 0, below the number of input channels, ", g.in_channels,
          ", and strictly increasing within an output channel; received input_channels[", position,
          "] = ", arguments.input_channels[position],
          position > 0 ? absl::StrCat(" after ", arguments.input_channels[position - 1]) : "");
    case KS_BAD_INDICES:
      return InvalidArgument(
          "indices must be at least 0, below kernel_height * kernel_width * in_channels, ",
          g.kernel_height * g.kernel_width * g.in_channels,
          ", and strictly increasing; received indices[", position,
          "] = ", arguments.indices[position],
          position > 0 ? absl::StrCat(" after ", arguments.indices[position - 1]) : "");
    case KS_BAD_SIZE:
    case KS_TOO_LARGE:
      break;
  }
  return InvalidArgument(
      "sizes must be non-negative and stay below 2^31 - 1 kept weights, kernel rows and channels "
      "and 2^40 pixels along an axis; received input [",
      g.batch, ", ", g.in_height, ", ", g.in_width, ", ", g.in_channels, "], kernel ",
      g.kernel_height, " x ", g.kernel_width, ", ", arguments.kept, " kept, ", g.out_channels,
      " output channels");
}

// Max pooling of the output of a convolution.
void PoolImages(OpKernelContext* context, const KsArguments& arguments, const float* whole) {
  const KsGeometry& g = arguments.geometry;
  const int64_t size = g.out_height * g.out_width * g.out_channels;
  const auto* workers = context->device()->tensorflow_cpu_worker_threads();
  tensorflow::Shard(workers->num_threads, workers->workers, g.batch, std::max<int64_t>(1, size),
                    [&](int64_t begin, int64_t end) {
                      for (int64_t n = begin; n < end; ++n) {
                        ks_max_pool(&arguments, whole + n * size, n);
                      }
                    });
}

// kFused: with a bias, a residual and an activation. kPooled: with max pooling instead of the
// residual.
template <KsOperation kOperation, bool kFused = false, bool kPooled = false>
class Conv2DOp : public OpKernel {
 public:
  explicit Conv2DOp(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, ReadAttributes(context, kHasKernelSize, &attributes_));
    if (kFused) OP_REQUIRES_OK(context, ReadEpilogue(context, !kPooled, &epilogue_));
    if (kPooled) {
      OP_REQUIRES_OK(context, context->GetAttr("pool_size", &pool_size_));
      OP_REQUIRES_OK(context, CheckPoolSize(pool_size_));
    }
  }

  void Compute(OpKernelContext* context) override { OP_REQUIRES_OK(context, Run(context)); }

 private:
  static constexpr bool kTable = kOperation < KS_THINNED_CONV2D;
  static constexpr bool kBackpropInput = kOperation == KS_CONNECTION_CONV2D_BACKPROP_INPUT ||
                                         kOperation == KS_THINNED_CONV2D_BACKPROP_INPUT;
  static constexpr bool kBackpropFilter = kOperation == KS_CONNECTION_CONV2D_BACKPROP_FILTER ||
                                          kOperation == KS_THINNED_CONV2D_BACKPROP_FILTER;
  static constexpr bool kForward = !kBackpropInput && !kBackpropFilter;
  static constexpr bool kHasKernelSize = kBackpropFilter || !kTable;

  absl::Status Run(OpKernelContext* context) {
    KsArguments arguments = {};
    arguments.operation = kOperation;
    KsGeometry& g = arguments.geometry;
    int next = 0;
    // Inputs in the order of the op's definition.
    const Tensor& first = context->input(next++);
    absl::Status status = kBackpropInput ? ReadInputSizes(first, &g) : ReadInput(first, &arguments);
    if (!status.ok()) return status;
    const Tensor* filter = kBackpropFilter ? nullptr : &context->input(next++);
    if (kTable) {
      const Tensor& row_splits = context->input(next++);
      const Tensor& input_channels = context->input(next++);
      status = ReadTable(row_splits, input_channels, filter, &arguments);
    } else {
      status = ReadThinned(context->input(next++), filter, &arguments);
    }
    if (!status.ok()) return status;

    status = OutputSize(attributes_, 0, g.in_height, g.kernel_height, &g.out_height, &g.pad_top);
    if (!status.ok()) return status;
    status = OutputSize(attributes_, 1, g.in_width, g.kernel_width, &g.out_width, &g.pad_left);
    if (!status.ok()) return status;
    g.stride_height = attributes_.strides[0];
    g.stride_width = attributes_.strides[1];
    g.dilation_height = attributes_.dilations[0];
    g.dilation_width = attributes_.dilations[1];
    if (!kForward) {
      status = ReadOutBackprop(context->input(next++), &arguments);
      if (!status.ok()) return status;
    }
    if (kFused) {
      if (epilogue_.num_bias > 0) status = ReadBias(context->input(next++), &arguments);
      if (!status.ok()) return status;
      if (epilogue_.num_residual > 0) status = ReadResidual(context->input(next++), &arguments);
      if (!status.ok()) return status;
      arguments.activation = epilogue_.activation;
      arguments.pool = pool_size_;
    }

    std::shared_ptr<const Prepared> prepared;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (prepared_ != nullptr && SamePlan(prepared_->arguments, arguments)) prepared = prepared_;
    }
    if (prepared == nullptr && (prepared = FindPrepared(arguments)) != nullptr) {
      std::lock_guard<std::mutex> lock(mutex_);
      prepared_ = prepared;
    }
    if (prepared == nullptr) {
      int64_t position;
      const KsStatus check = ks_check_arguments(&arguments, &position);
      if (check != KS_OK) return TableError(check, arguments, position);
    }

    TensorShape shape;
    if (kForward) {
      status = TensorShape::BuildTensorShape(
          {g.batch, g.out_height / pool_size_, g.out_width / pool_size_, g.out_channels}, &shape);
    } else if (kBackpropInput) {
      status =
          TensorShape::BuildTensorShape({g.batch, g.in_height, g.in_width, g.in_channels}, &shape);
    } else if (kTable) {
      status =
          TensorShape::BuildTensorShape({arguments.kept, g.kernel_height, g.kernel_width}, &shape);
    } else {
      status = TensorShape::BuildTensorShape({arguments.kept, g.out_channels}, &shape);
    }
    if (!status.ok()) return status;
    Tensor* output = nullptr;
    status = AllocateResult(context, shape, &output);
    if (!status.ok()) return status;
    if (output->NumElements() == 0) return absl::OkStatus();
    arguments.output = output->flat<float>().data();
    return RunRoutine(context, arguments, filter, std::move(prepared));
  }

  absl::Status RunRoutine(OpKernelContext* context, const KsArguments& arguments,
                          const Tensor* filter, std::shared_ptr<const Prepared> prepared) {
    std::shared_ptr<Prepared> fresh;
    if (prepared == nullptr) {
      fresh = std::make_shared<Prepared>();
      fresh->arguments = arguments;
      Choose(arguments, fresh.get());
      fresh->block = Block(fresh->plan.table_bytes);
      const int first = kBackpropFilter ? 1 : 2;  // Of the table among the inputs.
      for (int i = first; i < first + (kTable ? 2 : 1); ++i) {
        fresh->table.push_back(context->input(i));
      }
      prepared = fresh;
    }
    if (!kPooled || !prepared->pools_apart) {
      return RunPlan(context, arguments, filter, prepared, fresh != nullptr);
    }
    const KsGeometry& g = arguments.geometry;
    TensorShape shape;
    absl::Status status =
        TensorShape::BuildTensorShape({g.batch, g.out_height, g.out_width, g.out_channels}, &shape);
    Tensor whole;
    if (status.ok()) status = AllocateTemporary(context, shape, &whole);
    if (!status.ok()) return status;
    KsArguments apart = arguments;
    apart.pool = 0;
    apart.output = whole.flat<float>().data();
    status = RunPlan(context, apart, filter, prepared, fresh != nullptr);
    if (!status.ok()) return status;
    PoolImages(context, arguments, apart.output);
    return absl::OkStatus();
  }

  // The routine and its plan. Where only the reference pools, the best one convolves, and pooling
  // comes after that.
  static void Choose(const KsArguments& arguments, Prepared* prepared) {
    prepared->routine = ks_select(&arguments, &prepared->plan);
    prepared->pools_apart = false;
    if (arguments.pool <= 1 || strcmp(prepared->routine->isa, ks_isa()) == 0) return;
    KsArguments apart = arguments;
    apart.pool = 0;
    prepared->routine = ks_select(&apart, &prepared->plan);
    prepared->pools_apart = true;
  }

  // `fresh`: the table has not been prepared yet.
  absl::Status RunPlan(OpKernelContext* context, const KsArguments& arguments, const Tensor* filter,
                       const std::shared_ptr<const Prepared>& prepared, bool fresh) {
    const KsPlan& plan = prepared->plan;
    const StageRunner runner(context, arguments, plan, prepared->routine);
    PooledBlock shared(plan.shared_bytes), scratch(runner.scratch_bytes());
    KsMemory memory = {prepared->block.data(), nullptr, shared.data(), scratch.data(), nullptr};
    const int64_t bytes = plan.table_bytes + plan.shared_bytes + runner.scratch_bytes();
    if ((plan.table_bytes > 0 && memory.table == nullptr) ||
        (plan.shared_bytes > 0 && memory.shared == nullptr) ||
        (runner.scratch_bytes() > 0 && memory.scratch == nullptr)) {
      return OutOfMemory(bytes);
    }
    if (fresh) {
      runner.Run(KS_PREPARES_TABLE, memory);
      Share(prepared);
      std::lock_guard<std::mutex> lock(mutex_);
      prepared_ = prepared;
    }
    if (plan.filter_bytes == 0) {
      runner.Run(KS_PREPARES_NOTHING, memory);
      return absl::OkStatus();
    }

    std::shared_ptr<const PackedFilter> packed;
    bool keep = false;
    if (kForward) {
      std::lock_guard<std::mutex> lock(mutex_);
      if (packed_ != nullptr && SameFilter(*packed_, prepared, arguments.filter)) {
        packed = packed_;
        changes_ = 0;
      } else {
        keep = ++changes_ <= kMostChanges;
        if (!keep) packed_ = nullptr;
      }
    }
    if (keep && (packed = FindPackedFilter(prepared, arguments.filter)) != nullptr) {
      std::lock_guard<std::mutex> lock(mutex_);
      packed_ = packed;
    }
    if (packed != nullptr) {
      memory.filter = packed->block.data();
      runner.Run(KS_PREPARES_NOTHING, memory);
      return absl::OkStatus();
    }
    if (keep) {
      const auto fresh_filter = std::make_shared<PackedFilter>();
      fresh_filter->prepared = prepared;
      fresh_filter->filter = *filter;
      fresh_filter->block = Block(plan.filter_bytes);
      memory.filter = fresh_filter->block.data();
      if (memory.filter == nullptr) return OutOfMemory(plan.filter_bytes);
      runner.Run(KS_PREPARES_FILTER, memory);
      Share(fresh_filter);
      {
        std::lock_guard<std::mutex> lock(mutex_);
        packed_ = fresh_filter;
      }
      runner.Run(KS_PREPARES_NOTHING, memory);
      return absl::OkStatus();
    }
    PooledBlock filter_block(plan.filter_bytes);
    memory.filter = filter_block.data();
    if (memory.filter == nullptr) return OutOfMemory(plan.filter_bytes);
    runner.Run(KS_PREPARES_FILTER, memory);
    runner.Run(KS_PREPARES_NOTHING, memory);
    return absl::OkStatus();
  }

  static absl::Status ReadInput(const Tensor& input, KsArguments* arguments) {
    const absl::Status status = CheckRank(input, "input", 4);
    if (!status.ok()) return status;
    KsGeometry& g = arguments->geometry;
    g.batch = input.dim_size(0);
    g.in_height = input.dim_size(1);
    g.in_width = input.dim_size(2);
    g.in_channels = input.dim_size(3);
    arguments->input = input.flat<float>().data();
    return absl::OkStatus();
  }

  static absl::Status ReadInputSizes(const Tensor& sizes, KsGeometry* g) {
    if (sizes.dims() != 1 || sizes.NumElements() != 4) {
      return InvalidArgument(
          "input_sizes must have 4 values (batch, height, width, channels), received shape ",
          sizes.shape().DebugString());
    }
    const auto values = sizes.vec<int32_t>();
    for (int i = 0; i < 4; ++i) {
      if (values(i) < 0) {
        return InvalidArgument("input_sizes must not be negative, received [", values(0), ", ",
                               values(1), ", ", values(2), ", ", values(3), "]");
      }
    }
    g->batch = values(0);
    g->in_height = values(1);
    g->in_width = values(2);
    g->in_channels = values(3);
    return absl::OkStatus();
  }

  absl::Status ReadTable(const Tensor& row_splits, const Tensor& input_channels,
                         const Tensor* filter, KsArguments* arguments) const {
    absl::Status status = CheckRank(row_splits, "row_splits", 1);
    if (status.ok()) status = CheckRank(input_channels, "input_channels", 1);
    if (status.ok() && filter != nullptr) status = CheckRank(*filter, "filter", 3);
    if (!status.ok()) return status;
    if (row_splits.NumElements() < 1) {
      return InvalidArgument("row_splits must have out_channels + 1 values, received 0");
    }
    KsGeometry& g = arguments->geometry;
    g.out_channels = row_splits.NumElements() - 1;
    arguments->kept = input_channels.NumElements();
    arguments->row_splits = row_splits.flat<int32_t>().data();
    arguments->input_channels = input_channels.flat<int32_t>().data();
    if (filter == nullptr) {
      g.kernel_height = attributes_.kernel_size[0];
      g.kernel_width = attributes_.kernel_size[1];
      return absl::OkStatus();
    }
    if (filter->dim_size(0) != arguments->kept) {
      return InvalidArgument("filter must have as many connections as input_channels has values, ",
                             arguments->kept, ", received shape ", filter->shape().DebugString());
    }
    g.kernel_height = filter->dim_size(1);
    g.kernel_width = filter->dim_size(2);
    arguments->filter = filter->flat<float>().data();
    return absl::OkStatus();
  }

  absl::Status ReadThinned(const Tensor& indices, const Tensor* filter,
                           KsArguments* arguments) const {
    absl::Status status = CheckRank(indices, "indices", 1);
    if (status.ok() && filter != nullptr) status = CheckRank(*filter, "filter", 2);
    if (!status.ok()) return status;
    KsGeometry& g = arguments->geometry;
    g.kernel_height = attributes_.kernel_size[0];
    g.kernel_width = attributes_.kernel_size[1];
    arguments->kept = indices.NumElements();
    arguments->indices = indices.flat<int32_t>().data();
    if (filter == nullptr) return absl::OkStatus();
    if (filter->dim_size(0) != arguments->kept) {
      return InvalidArgument("filter must have as many rows as indices has values, ",
                             arguments->kept, ", received shape ", filter->shape().DebugString());
    }
    g.out_channels = filter->dim_size(1);
    arguments->filter = filter->flat<float>().data();
    return absl::OkStatus();
  }

  static absl::Status ReadOutBackprop(const Tensor& out_backprop, KsArguments* arguments) {
    const absl::Status status = CheckRank(out_backprop, "out_backprop", 4);
    if (!status.ok()) return status;
    KsGeometry& g = arguments->geometry;
    // The thinned filter's gradient has its number of output channels from here alone.
    if (!kTable && kBackpropFilter) g.out_channels = out_backprop.dim_size(3);
    if (out_backprop.dim_size(0) != g.batch || out_backprop.dim_size(1) != g.out_height ||
        out_backprop.dim_size(2) != g.out_width || out_backprop.dim_size(3) != g.out_channels) {
      return InvalidArgument("out_backprop must have the shape of the convolution's output, [",
                             g.batch, ",", g.out_height, ",", g.out_width, ",", g.out_channels,
                             "], received ", out_backprop.shape().DebugString());
    }
    arguments->out_backprop = out_backprop.flat<float>().data();
    return absl::OkStatus();
  }

  static absl::Status ReadBias(const Tensor& bias, KsArguments* arguments) {
    const absl::Status status = CheckRank(bias, "bias", 1);
    if (!status.ok()) return status;
    if (bias.NumElements() != arguments->geometry.out_channels) {
      return InvalidArgument("bias must have a value for each output channel, ",
                             arguments->geometry.out_channels, ", received ", bias.NumElements());
    }
    arguments->bias = bias.flat<float>().data();
    return absl::OkStatus();
  }

  static absl::Status ReadResidual(const Tensor& residual, KsArguments* arguments) {
    const absl::Status status = CheckRank(residual, "residual", 4);
    if (!status.ok()) return status;
    const KsGeometry& g = arguments->geometry;
    if (residual.dim_size(0) != g.batch || residual.dim_size(1) != g.out_height ||
        residual.dim_size(2) != g.out_width || residual.dim_size(3) != g.out_channels) {
      return InvalidArgument("residual must have the shape of the convolution's output, [", g.batch,
                             ",", g.out_height, ",", g.out_width, ",", g.out_channels,
                             "], received ", residual.shape().DebugString());
    }
    arguments->residual = residual.flat<float>().data();
    return absl::OkStatus();
  }

  Conv2DAttributes attributes_;
  EpilogueAttributes epilogue_ = {};
  int64_t pool_size_ = 1;

  // From the call before. A constant table, or one that changes now and then, is prepared once; a
  // filter as well, until it has changed kMostChanges times in a row: holding on to weights that
  // are being trained would make TensorFlow copy them in every step.
  static constexpr int kMostChanges = 3;
  std::mutex mutex_;
  std::shared_ptr<const Prepared> prepared_;    // Guarded by mutex_, as are
  std::shared_ptr<const PackedFilter> packed_;  // these.
  int changes_ = 0;
};

#define KS_REGISTER_KERNEL(name, ...) \
  REGISTER_KERNEL_BUILDER(Name("KerasSparse>" name).Device(DEVICE_CPU), Conv2DOp<__VA_ARGS__>)

KS_REGISTER_KERNEL("ConnectionConv2D", KS_CONNECTION_CONV2D);
KS_REGISTER_KERNEL("FusedConnectionConv2D", KS_CONNECTION_CONV2D, true);
KS_REGISTER_KERNEL("MaxPooledConnectionConv2D", KS_CONNECTION_CONV2D, true, true);
KS_REGISTER_KERNEL("ConnectionConv2DBackpropInput", KS_CONNECTION_CONV2D_BACKPROP_INPUT);
KS_REGISTER_KERNEL("ConnectionConv2DBackpropFilter", KS_CONNECTION_CONV2D_BACKPROP_FILTER);
KS_REGISTER_KERNEL("ThinnedConv2D", KS_THINNED_CONV2D);
KS_REGISTER_KERNEL("FusedThinnedConv2D", KS_THINNED_CONV2D, true);
KS_REGISTER_KERNEL("ThinnedConv2DBackpropInput", KS_THINNED_CONV2D_BACKPROP_INPUT);
KS_REGISTER_KERNEL("ThinnedConv2DBackpropFilter", KS_THINNED_CONV2D_BACKPROP_FILTER);

}  // namespace
}  // namespace keras_sparse
