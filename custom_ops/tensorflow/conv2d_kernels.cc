// Copyright 2026 The keras_sparse Authors. Licensed under the Apache License, Version 2.0.
//
// The OpKernels: they check what the caller passes, allocate, and run the stages of a compute
// routine on TensorFlow's thread pool.

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <vector>

#include "custom_ops/kernels/conv2d.h"
#include "custom_ops/tensorflow/conv2d_attributes.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/tensor.h"
#include "tensorflow/core/framework/tensor_shape.h"
#include "tensorflow/core/platform/threadpool.h"

namespace keras_sparse {
namespace {

using ::tensorflow::DEVICE_CPU;
using ::tensorflow::DT_UINT8;
using ::tensorflow::OpKernel;
using ::tensorflow::OpKernelConstruction;
using ::tensorflow::OpKernelContext;
using ::tensorflow::Tensor;
using ::tensorflow::TensorShape;

constexpr int64_t kChunkCycles = 20000;              // Work worth handing to a thread.
constexpr int64_t kScratchOfAll = int64_t{2} << 30;  // Fewer threads work, rather than more memory.

// A stage whose items are taken in chunks by whichever thread is free. The caller works as well and
// returns when all items are done; it never waits for a thread that has not started, and such a
// thread, once it starts, finds nothing left and touches only this object.
class StageRun {
 public:
  StageRun(const KsArguments* arguments, const KsPlan* plan, const KsRoutine* routine,
           int32_t stage, char* shared, char* scratch, int64_t scratch_stride)
      : arguments_(arguments),
        plan_(plan),
        routine_(routine),
        stage_(stage),
        shared_(shared),
        scratch_(scratch),
        scratch_stride_(scratch_stride),
        items_(plan->stages[stage].items),
        chunk_(std::max<int64_t>(1, kChunkCycles / 4 / plan->stages[stage].cost)) {}

  // Takes chunks until none is left. Called once by each worker.
  void Work() {
    int64_t done = 0;
    char* scratch = nullptr;
    while (true) {
      const int64_t begin = next_.fetch_add(chunk_);
      if (begin >= items_) break;
      if (scratch == nullptr) scratch = scratch_ + workers_.fetch_add(1) * scratch_stride_;
      const int64_t end = std::min(items_, begin + chunk_);
      routine_->run(arguments_, plan_, stage_, begin, end, shared_, scratch);
      done += end - begin;
    }
    if (done == 0) return;
    std::lock_guard<std::mutex> lock(mutex_);
    done_ += done;
    if (done_ == items_) all_done_.notify_all();
  }

  void Wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    all_done_.wait(lock, [this] { return done_ == items_; });
  }

 private:
  // Belong to the caller, who stays until all items are done.
  const KsArguments* arguments_;
  const KsPlan* plan_;
  const KsRoutine* routine_;
  const int32_t stage_;
  char* shared_;
  char* scratch_;
  const int64_t scratch_stride_;

  const int64_t items_, chunk_;
  std::atomic<int64_t> next_{0};
  std::atomic<int64_t> workers_{0};  // That have taken scratch memory.
  std::mutex mutex_;
  std::condition_variable all_done_;
  int64_t done_ = 0;  // Guarded by mutex_.
};

// Threads worth using for a stage.
int64_t StageWorkers(const KsStage& stage, int64_t threads) {
  const double chunks = static_cast<double>(stage.items) * stage.cost / kChunkCycles;
  const int64_t worth = chunks < threads ? 1 + static_cast<int64_t>(chunks) : threads;
  return std::max<int64_t>(1, std::min({threads, stage.items, worth}));
}

absl::Status RunRoutine(OpKernelContext* context, const KsArguments& arguments) {
  KsPlan plan;
  const KsRoutine* routine = ks_select(&arguments, &plan);
  const auto* workers = context->device()->tensorflow_cpu_worker_threads();

  const int64_t scratch_stride =
      (plan.scratch_bytes + KS_ALIGNMENT - 1) / KS_ALIGNMENT * KS_ALIGNMENT;
  int64_t threads = workers->num_threads;
  if (scratch_stride > 0) {
    threads = std::max<int64_t>(1, std::min(threads, kScratchOfAll / scratch_stride));
  }
  int64_t most = 1;
  for (int32_t stage = 0; stage < plan.num_stages; ++stage) {
    most = std::max(most, StageWorkers(plan.stages[stage], threads));
  }

  // The blocks are aligned by hand: an allocator promises less for small tensors on some devices.
  Tensor shared, scratch;
  const auto allocate = [&](int64_t bytes, Tensor* tensor, char** block) -> absl::Status {
    const absl::Status status =
        context->allocate_temp(DT_UINT8, TensorShape({bytes + KS_ALIGNMENT}), tensor);
    if (!status.ok()) return status;
    const uintptr_t address = reinterpret_cast<uintptr_t>(tensor->flat<uint8_t>().data());
    *block = reinterpret_cast<char*>((address + KS_ALIGNMENT - 1) / KS_ALIGNMENT * KS_ALIGNMENT);
    return absl::OkStatus();
  };
  char *shared_block, *scratch_block;
  absl::Status status = allocate(plan.shared_bytes, &shared, &shared_block);
  if (!status.ok()) return status;
  status = allocate(scratch_stride * most, &scratch, &scratch_block);
  if (!status.ok()) return status;

  for (int32_t stage = 0; stage < plan.num_stages; ++stage) {
    const int64_t items = plan.stages[stage].items;
    if (items == 0) continue;
    const int64_t use = std::min(most, StageWorkers(plan.stages[stage], threads));
    if (use == 1) {
      routine->run(&arguments, &plan, stage, 0, items, shared_block, scratch_block);
      continue;
    }
    const auto run = std::make_shared<StageRun>(&arguments, &plan, routine, stage, shared_block,
                                                scratch_block, scratch_stride);
    for (int64_t worker = 1; worker < use; ++worker) {
      workers->workers->Schedule([run] { run->Work(); });
    }
    run->Work();
    run->Wait();
  }
  return absl::OkStatus();
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

template <KsOperation kOperation>
class Conv2DOp : public OpKernel {
 public:
  explicit Conv2DOp(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, ReadAttributes(context, kHasKernelSize, &attributes_));
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

    int64_t position;
    const KsStatus check = ks_check_arguments(&arguments, &position);
    if (check != KS_OK) return TableError(check, arguments, position);

    TensorShape shape;
    if (kForward) {
      status = TensorShape::BuildTensorShape({g.batch, g.out_height, g.out_width, g.out_channels},
                                             &shape);
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
    status = context->allocate_output(0, shape, &output);
    if (!status.ok()) return status;
    if (output->NumElements() == 0) return absl::OkStatus();
    arguments.output = output->flat<float>().data();
    return RunRoutine(context, arguments);
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

  Conv2DAttributes attributes_;
};

#define KS_REGISTER_KERNEL(name, operation) \
  REGISTER_KERNEL_BUILDER(Name("KerasSparse>" name).Device(DEVICE_CPU), Conv2DOp<operation>)

KS_REGISTER_KERNEL("ConnectionConv2D", KS_CONNECTION_CONV2D);
KS_REGISTER_KERNEL("ConnectionConv2DBackpropInput", KS_CONNECTION_CONV2D_BACKPROP_INPUT);
KS_REGISTER_KERNEL("ConnectionConv2DBackpropFilter", KS_CONNECTION_CONV2D_BACKPROP_FILTER);
KS_REGISTER_KERNEL("ThinnedConv2D", KS_THINNED_CONV2D);
KS_REGISTER_KERNEL("ThinnedConv2DBackpropInput", KS_THINNED_CONV2D_BACKPROP_INPUT);
KS_REGISTER_KERNEL("ThinnedConv2DBackpropFilter", KS_THINNED_CONV2D_BACKPROP_FILTER);

}  // namespace
}  // namespace keras_sparse
