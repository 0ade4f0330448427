// Copyright 2026 The keras_sparse Authors. Licensed under the Apache License, Version 2.0.
//
// The compute routines of keras_sparse behind a C interface: no TensorFlow, no Eigen, no Python.
//
// Six operations are computed, three for each of two storage formats of a sparse filter:
//
//   connection table   CSR by output channel. `row_splits` [out_channels + 1] and `input_channels`
//                      [kept] name the kept (input channel, output channel) pairs; `filter` is
//                      [kept, kernel_height, kernel_width] in table order.
//   thinned filter     `indices` [kept] are the kept rows of the lowered kernel matrix,
//                      index = (i * kernel_width + j) * in_channels + s for tap (i, j) and input
//                      channel s; `filter` is [kept, out_channels].
//
// The forward operations finish in the same pass with
//
//   output = activation(convolution + bias + residual)
//
// and that of a connection table, without a residual, may go on to keep the largest of each square
// of pixels (see `pool`).
//
// A caller fills KsArguments, asks ks_select() for a routine and its plan, provides the memory the
// plan asks for, and runs the stages of the plan one after another:
//
//   for stage in 0 .. plan.num_stages - 1:
//     for any partition of [0, plan.stages[stage].items) into ranges, on any threads:
//       routine->run(&arguments, &plan, stage, begin, end, &memory with scratch of this thread)
//
// Stages that only prepare the table or the filter say so, and come first. A caller that keeps
// their blocks leaves such stages out while the plan and the values they read are the same.
//
// The result does not depend on the partition, bit for bit: a routine fixes how the work is cut in
// its plan, which knows nothing of threads.
//
// Checks are the caller's: every routine relies on ks_check_arguments() having returned KS_OK.

#ifndef KERAS_SPARSE_CUSTOM_OPS_KERNELS_CONV2D_H_
#define KERAS_SPARSE_CUSTOM_OPS_KERNELS_CONV2D_H_

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Tensors are dense, float32, NHWC: input [batch, in_height, in_width, in_channels] and output
// [batch, out_height, out_width, out_channels]. Output pixel (y, x) and tap (i, j) meet at input
// pixel (y * stride_height + i * dilation_height - pad_top, ... likewise for columns); an input
// pixel outside the image is zero. Padding at the bottom and the right follows from the sizes.
typedef struct KsGeometry {
  int64_t batch;
  int64_t in_height, in_width, in_channels;
  int64_t out_height, out_width, out_channels;
  int64_t kernel_height, kernel_width;
  int64_t stride_height, stride_width;
  int64_t dilation_height, dilation_width;
  int64_t pad_top, pad_left;
} KsGeometry;

typedef enum KsOperation {
  KS_CONNECTION_CONV2D = 0,
  KS_CONNECTION_CONV2D_BACKPROP_INPUT = 1,
  KS_CONNECTION_CONV2D_BACKPROP_FILTER = 2,
  KS_THINNED_CONV2D = 3,
  KS_THINNED_CONV2D_BACKPROP_INPUT = 4,
  KS_THINNED_CONV2D_BACKPROP_FILTER = 5,
  KS_NUM_OPERATIONS = 6
} KsOperation;

typedef enum KsActivation { KS_LINEAR = 0, KS_RELU = 1, KS_RELU6 = 2 } KsActivation;

// All memory is the caller's; float pointers are aligned to 4 bytes or better. A pointer that the
// operation does not use is null. Which pointers an operation reads, and what it writes:
//
//   operation                  input   filter   out_backprop   result
//   *_CONV2D                   read    read     -              output   (the output tensor)
//   *_BACKPROP_INPUT           -       read     read           output   (shaped as the input)
//   *_BACKPROP_FILTER          read    -        read           output   (shaped as the filter)
//
// Every element of `output` is written, `output` overlaps nothing else.
typedef struct KsArguments {
  KsOperation operation;
  KsGeometry geometry;
  int64_t kept;                   // Connections of the table, or rows of the thinned filter.
  const int32_t* row_splits;      // [out_channels + 1]; connection operations only.
  const int32_t* input_channels;  // [kept]; connection operations only.
  const int32_t* indices;         // [kept]; thinned operations only.
  const float* input;
  const float* filter;
  const float* out_backprop;
  float* output;
  // Forward operations only; the others want null, null, KS_LINEAR.
  const float* bias;      // [out_channels], or null for none.
  const float* residual;  // Shaped as the output, or null for none.
  KsActivation activation;
  // KS_CONNECTION_CONV2D without a residual only; 0 or 1 for none. The output is then max pooling
  // of the convolution's by squares of pool x pool pixels, [batch, out_height / pool,
  // out_width / pool, out_channels]: rows and columns that fill no square are left out. The
  // largest sum is found first, from the lowest finite number on, and finished after that: the
  // same, as bias and activation keep the order, but that a square of NaN alone gives no NaN.
  int64_t pool;
} KsArguments;

enum { KS_MAX_STAGES = 4, KS_PLAN_PARAMETERS = 64 };

typedef struct KsStage {
  int64_t items;  // Independent pieces of work.
  int64_t cost;   // Of one item, in clock cycles, roughly; never 0.
  // What the stage reads and writes: KS_PREPARES_TABLE reads the table alone and writes
  // memory.table alone; KS_PREPARES_FILTER reads these and the filter and writes memory.filter
  // alone.
  int64_t prepares;
} KsStage;
enum { KS_PREPARES_NOTHING = 0, KS_PREPARES_TABLE = 1, KS_PREPARES_FILTER = 2 };

typedef struct KsPlan {
  int64_t table_bytes;    // One block, written by stages that prepare the table.
  int64_t filter_bytes;   // One block, written by stages that prepare the filter.
  int64_t shared_bytes;   // One block for the whole call, kept from stage to stage.
  int64_t scratch_bytes;  // One block for each thread; see KsMemory.held.
  int32_t num_stages;
  KsStage stages[KS_MAX_STAGES];
  int64_t parameters[KS_PLAN_PARAMETERS];  // The routine's own: tile sizes and the like.
} KsPlan;

// The blocks a plan asks for, each of its number of bytes; they arrive uninitialised and belong to
// the caller.
typedef struct KsMemory {
  void* table;
  void* filter;
  void* shared;
  void* scratch;
  // What `scratch` holds, in the routine's own words: null, and run() relies on nothing there; or a
  // number that belongs to the caller, -1 before the first run() call of a stage on this scratch,
  // then as the last call left it, and the scratch as well.
  int64_t* held;
} KsMemory;
enum { KS_ALIGNMENT = 64 };  // Of each block, bytes.

typedef struct KsRoutine {
  KsOperation operation;
  const char* name;  // As in cpu/routines.inc.
  const char* isa;   // "avx512", "avx2", "baseline" or "reference".
  // Fills `plan` and returns 1, or returns 0 when the routine does not take these arguments (the
  // next routine in the list is then asked). Reads sizes and the table, never tensor values.
  int (*plan)(const KsArguments* arguments, KsPlan* plan);
  void (*run)(const KsArguments* arguments, const KsPlan* plan, int32_t stage, int64_t begin,
              int64_t end, const KsMemory* memory);
} KsRoutine;

typedef enum KsStatus {
  KS_OK = 0,
  // A size is negative, or a stride, dilation or kernel size below 1, or `pool` is where it may not
  // be.
  KS_BAD_SIZE = 1,
  KS_BAD_ROW_SPLITS = 2,      // Entry `position` breaks the rules of row_splits.
  KS_BAD_INPUT_CHANNELS = 3,  // Entry `position` is out of range or does not increase in its row.
  KS_BAD_INDICES = 4,         // Entry `position` is out of range or does not increase.
  KS_TOO_LARGE = 5            // A tensor would hold more than 2^62 bytes, or a table over 2^31 - 1.
} KsStatus;

// Checks the sizes and the values of the table. On an error that has one, *position is the
// offending entry. Never reads out of the bounds given in KsArguments. Reads no tensor values.
KsStatus ks_check_arguments(const KsArguments* arguments, int64_t* position);

// The routine for these arguments: the first one of the best instruction set that takes them. Never
// null: the scalar reference takes everything.
const KsRoutine* ks_select(const KsArguments* arguments, KsPlan* plan);

// Max pooling by squares of arguments->pool: `image` is image n of a convolution's output, as
// KsArguments describes it; writes image n of arguments->output. For what no routine pools itself.
void ks_max_pool(const KsArguments* arguments, const float* image, int64_t n);

// All routines this machine can run, best instruction set first, the reference last. Entry i of
// ks_num_routines(); for tests and benchmarks.
int32_t ks_num_routines(void);
const KsRoutine* ks_routine(int32_t i);

// The instruction set that ks_select() uses: the best of this CPU, or a lower one when the
// environment variable KERAS_SPARSE_ISA names one ("avx512", "avx2", "baseline", "reference"). Read
// once.
const char* ks_isa(void);

#ifdef __cplusplus
}  // extern "C"
#endif

#endif  // KERAS_SPARSE_CUSTOM_OPS_KERNELS_CONV2D_H_
