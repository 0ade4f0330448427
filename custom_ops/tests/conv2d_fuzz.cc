// Copyright 2026 The keras_sparse Authors. Licensed under the Apache License, Version 2.0.
//
// Random shapes and tables through the C interface: ks_check_arguments() against an independent
// reading of its rules, every routine that takes the arguments against the scalar reference. All
// values are small integers, so every order of a sum gives the same float: results must be equal,
// not close.
//
// Built with clang and -fsanitize=fuzzer (make fuzz) libFuzzer drives it. Otherwise its own main()
// feeds it seeded bytes:
//
//   conv2d_fuzz [iterations [seed]]        one input from every seed on
//   conv2d_fuzz --file INPUT ...           inputs that libFuzzer wrote

#include <errno.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "custom_ops/kernels/conv2d.h"

namespace {

// What one input may cost the scalar reference, in multiply-adds.
constexpr int64_t kMaxWork = 300000;

// Reads the choices of an input off its bytes; zeros once these are used up.
class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : data_(data), size_(size) {}

  uint8_t Byte() { return position_ < size_ ? data_[position_++] : 0; }
  int64_t UpTo(int64_t last) { return Byte() % (last + 1); }
  template <typename T>
  T Word() {
    T word = 0;
    for (size_t i = 0; i < sizeof(T); ++i) word = static_cast<T>(word << 8 | Byte());
    return word;
  }
  template <typename T, size_t kSize>
  T OneOf(const T (&values)[kSize]) {
    return values[Byte() % kSize];
  }

 private:
  const uint8_t* data_;
  size_t size_, position_ = 0;
};

bool IsConnection(KsOperation operation) { return operation < KS_THINNED_CONV2D; }

// Stops with the input's meaning, wherever it came from.
class Report {
 public:
  std::string text;
  [[noreturn]] void Fail(const std::string& what) const {
    fprintf(stderr, "conv2d_fuzz: %s\n  %s\n", what.c_str(), text.c_str());
    abort();
  }
  void Check(bool good, const char* what) const {
    if (!good) Fail(what);
  }
};

std::string Describe(const KsArguments& a) {
  const KsGeometry& g = a.geometry;
  const int64_t sizes[] = {
      a.operation,     g.batch,        g.in_height,       g.in_width,       g.in_channels,
      g.out_height,    g.out_width,    g.out_channels,    g.kernel_height,  g.kernel_width,
      g.stride_height, g.stride_width, g.dilation_height, g.dilation_width, g.pad_top,
      g.pad_left,      a.kept};
  const char* names[] = {"operation", "batch", "in",     "x", "x",       "out",
                         "x",         "x",     "kernel", "x", "strides", ",",
                         "dilations", ",",     "pads",   ",", "kept"};
  std::string text;
  for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); ++i) {
    const bool joins = strlen(names[i]) == 1;
    text += (joins || i == 0 ? "" : ", ") + std::string(names[i]) + (joins ? "" : " ") +
            std::to_string(sizes[i]);
  }
  return text;
}

// The rules of the header, read once more and written differently.
bool TableIsValid(const KsArguments& a) {
  const KsGeometry& g = a.geometry;
  if (IsConnection(a.operation)) {
    if (a.row_splits[0] != 0 || a.row_splits[g.out_channels] != a.kept) return false;
    for (int64_t o = 0; o < g.out_channels; ++o) {
      if (a.row_splits[o] > a.row_splits[o + 1]) return false;
    }
    // The splits rise from 0 to `kept`: all of them are in range.
    for (int64_t o = 0; o < g.out_channels; ++o) {
      for (int32_t c = a.row_splits[o]; c < a.row_splits[o + 1]; ++c) {
        if (a.input_channels[c] < 0 || a.input_channels[c] >= g.in_channels) return false;
        if (c > a.row_splits[o] && a.input_channels[c] <= a.input_channels[c - 1]) return false;
      }
    }
    return true;
  }
  const int64_t rows = g.kernel_height * g.kernel_width * g.in_channels;
  for (int64_t k = 0; k < a.kept; ++k) {
    if (a.indices[k] < 0 || a.indices[k] >= rows) return false;
    if (k > 0 && a.indices[k] <= a.indices[k - 1]) return false;
  }
  return true;
}

// A block of exactly `count` values, so that a memory checker sees what leaves it, at an address
// that need not be aligned to more than a value.
template <typename T>
class Block {
 public:
  Block(size_t count, size_t offset) : count_(count), block_(new T[count + offset]) {
    data_ = block_.get() + offset;
  }
  T* data() const { return data_; }
  size_t size() const { return count_; }

 private:
  size_t count_;
  std::unique_ptr<T[]> block_;
  T* data_;
};

// Memory of a plan, of exactly its size and alignment, arriving as NaN.
class PlanMemory {
 public:
  explicit PlanMemory(int64_t bytes) : bytes_(bytes) {
    if (posix_memalign(&block_, KS_ALIGNMENT, bytes) != 0) abort();
    Spoil();
  }
  ~PlanMemory() { free(block_); }
  PlanMemory(const PlanMemory&) = delete;
  void Spoil() {
    if (bytes_ > 0) memset(block_, 0xff, bytes_);
  }
  void* get() const { return block_; }

 private:
  int64_t bytes_;
  void* block_ = nullptr;
};

int64_t OutSize(int64_t size, int64_t kernel, int64_t stride, int64_t dilation, int64_t pads) {
  const int64_t room = size + pads - ((kernel - 1) * dilation + 1);
  return room < 0 ? 0 : room / stride + 1;
}

// One axis of a convolution.
struct Axis {
  int64_t size, kernel, stride, dilation, pad, out;
};

// `common`: stride and dilation 1, as most routines and networks want. `kernel`: 0 where it is
// free.
Axis DrawAxis(Bytes* bytes, int64_t largest, int padding, bool common, int64_t kernel) {
  Axis axis;
  axis.size = bytes->UpTo(15) == 0 ? 0 : 1 + bytes->UpTo(largest - 1);
  axis.kernel = bytes->OneOf<int64_t>({3, 1, 3, 1, 3, 5, 7, 1, 3, 5, 7, 2, 4, 6, 8, 9, 10, 11});
  if (kernel > 0) axis.kernel = kernel;
  axis.stride = common ? 1 : bytes->OneOf<int64_t>({1, 2, 4, 3});
  axis.dilation = common ? 1 : bytes->OneOf<int64_t>({1, 1, 2, 3});
  const int64_t reach = (axis.kernel - 1) * axis.dilation + 1;
  int64_t after = 0;
  axis.pad = 0;
  if (padding == 1) {  // same
    const int64_t out = (axis.size + axis.stride - 1) / axis.stride;
    const int64_t total = std::max<int64_t>(0, (out - 1) * axis.stride + reach - axis.size);
    axis.pad = total / 2;
    after = total - axis.pad;
  } else if (padding == 2) {  // explicit, further than the kernel reaches now and then
    axis.pad = bytes->UpTo(reach + 2);
    after = bytes->UpTo(reach + 2);
  }
  axis.out = OutSize(axis.size, axis.kernel, axis.stride, axis.dilation, axis.pad + after);
  return axis;
}

KsGeometry DrawGeometry(Bytes* bytes) {
  KsGeometry g;
  g.batch = bytes->UpTo(15) == 0 ? 0 : bytes->OneOf<int64_t>({1, 2, 3, 5, 16, 17, 33});
  const int padding = static_cast<int>(bytes->UpTo(2));
  const bool common = bytes->UpTo(1) == 0;
  const bool square = bytes->UpTo(1) == 0;
  const Axis high = DrawAxis(bytes, 21, padding, common, 0);
  const Axis wide = DrawAxis(bytes, 37, padding, common, square ? high.kernel : 0);
  const auto channels = [&] {
    return bytes->UpTo(15) == 0 ? 0 : 1 + bytes->UpTo(bytes->UpTo(3) == 0 ? 139 : 34);
  };
  g.in_channels = channels();
  g.out_channels = channels();
  g.in_height = high.size;
  g.in_width = wide.size;
  g.out_height = high.out;
  g.out_width = wide.out;
  g.kernel_height = high.kernel;
  g.kernel_width = wide.kernel;
  g.stride_height = high.stride;
  g.stride_width = wide.stride;
  g.dilation_height = high.dilation;
  g.dilation_width = wide.dilation;
  g.pad_top = high.pad;
  g.pad_left = wide.pad;
  // Eight weights, and the tensors, stay within the reference's time.
  const int64_t pixels = g.out_height * g.out_width;
  const int64_t weights = 8 * pixels * std::max(g.kernel_height * g.kernel_width, g.out_channels);
  const int64_t values = g.in_height * g.in_width * g.in_channels + pixels * g.out_channels;
  if (g.batch * std::max(weights, values) > kMaxWork) g.batch = std::min<int64_t>(g.batch, 1);
  return g;
}

struct Table {
  std::vector<int32_t> row_splits, input_channels, indices;

  int64_t kept(bool connection) const {
    return static_cast<int64_t>(connection ? input_channels.size() : indices.size());
  }
};

// Which rows of the table are empty, which full and which in between comes from the bytes; the
// entries themselves from `random`.
Table DrawTable(Bytes* bytes, bool connection, const KsGeometry& g, int64_t most,
                std::mt19937* random) {
  Table table;
  const int64_t density = bytes->OneOf<int64_t>({26, 13, 3, 128, 256, 0, 77, 52});
  const int64_t empty_every = bytes->UpTo(4);
  const auto kept = [&](int64_t row) {
    if (empty_every > 0 && row % empty_every == 0) return false;
    return static_cast<int64_t>((*random)() % 256) < density;
  };
  if (!connection) {
    const int64_t rows = g.kernel_height * g.kernel_width * g.in_channels;
    for (int64_t k = 0; k < rows && table.kept(false) < most; ++k) {
      if (kept(k / std::max<int64_t>(1, g.in_channels))) {
        table.indices.push_back(static_cast<int32_t>(k));
      }
    }
    return table;
  }
  table.row_splits.push_back(0);
  for (int64_t o = 0; o < g.out_channels; ++o) {
    for (int64_t s = 0; s < g.in_channels && table.kept(true) < most; ++s) {
      if (kept(o)) table.input_channels.push_back(static_cast<int32_t>(s));
    }
    table.row_splits.push_back(static_cast<int32_t>(table.input_channels.size()));
  }
  return table;
}

// Changes an entry or two; the table may stay valid by chance.
void Corrupt(Bytes* bytes, bool connection, const KsGeometry& g, Table* table) {
  const int64_t changes = 1 + bytes->UpTo(1);
  for (int64_t i = 0; i < changes; ++i) {
    std::vector<int32_t>* entries = &table->indices;
    int64_t bound = g.kernel_height * g.kernel_width * g.in_channels;
    if (connection) {
      const bool splits = table->input_channels.empty() || bytes->UpTo(1) == 0;
      entries = splits ? &table->row_splits : &table->input_channels;
      bound = splits ? static_cast<int64_t>(table->input_channels.size()) : g.in_channels;
    }
    if (entries->empty()) return;
    const size_t at = bytes->Word<uint16_t>() % entries->size();
    int32_t& entry = (*entries)[at];
    switch (bytes->UpTo(6)) {
      case 0:
        entry = -1;
        break;
      case 1:
        entry = static_cast<int32_t>(bound);
        break;
      case 2:
        entry = bytes->OneOf<int32_t>({INT32_MIN, INT32_MAX, -2, 1 << 16, 1 << 24});
        break;
      case 3:
        entry = entry == INT32_MAX ? INT32_MIN : entry + 1;
        break;
      case 4:
        entry = (*entries)[at == 0 ? entries->size() - 1 : at - 1];
        break;
      case 5:
        std::swap(entry, (*entries)[bytes->Word<uint16_t>() % entries->size()]);
        break;
      default:
        entry = static_cast<int32_t>(bytes->Word<uint32_t>());
    }
  }
}

// Puts sizes that no machine has into the geometry. The table keeps the lengths it has memory for,
// as the interface demands.
void Exaggerate(Bytes* bytes, KsArguments* a) {
  KsGeometry& g = a->geometry;
  int64_t* sizes[] = {&g.batch,           &g.in_height,      &g.in_width,      &g.in_channels,
                      &g.out_height,      &g.out_width,      &g.kernel_height, &g.kernel_width,
                      &g.stride_height,   &g.stride_width,   &g.pad_top,       &g.pad_left,
                      &g.dilation_height, &g.dilation_width, &g.out_channels,  &a->kept};
  const int64_t changes = 1 + bytes->UpTo(3);
  for (int64_t i = 0; i < changes; ++i) {
    const int64_t which = bytes->UpTo(15);
    int64_t value = bytes->OneOf<int64_t>({0, -1, INT32_MAX, INT64_MAX, INT64_MIN, int64_t{1} << 20,
                                           int64_t{1} << 31, int64_t{1} << 40, int64_t{1} << 59,
                                           1000, 65536, 12345678});
    if (bytes->UpTo(3) == 0) value = bytes->Word<int64_t>() >> bytes->UpTo(63);
    const bool has_memory = which >= 14;
    if (has_memory && value >= 0 && value <= INT32_MAX) value = -1;
    *sizes[which] = value;
  }
}

void CheckPlan(const Report& report, const KsPlan& plan) {
  report.Check(plan.table_bytes >= 0 && plan.filter_bytes >= 0 && plan.shared_bytes >= 0 &&
                   plan.scratch_bytes >= 0,
               "a plan asks for negative bytes");
  report.Check(plan.num_stages >= 0 && plan.num_stages <= KS_MAX_STAGES, "stages of a plan");
  for (int32_t stage = 0; stage < plan.num_stages; ++stage) {
    const KsStage& s = plan.stages[stage];
    report.Check(s.items >= 0 && (s.items == 0 || s.cost > 0), "items or cost of a stage");
  }
}

// How a stage's items are cut into ranges.
enum class Cut { kWhole, kSingle, kShuffled };

// Returns false when the routine does not take the arguments.
bool Run(const Report& report, const KsRoutine* routine, KsArguments arguments, Cut cut,
         std::mt19937* random, const Block<float>& result) {
  std::fill_n(result.data(), result.size(), std::numeric_limits<float>::quiet_NaN());
  arguments.output = result.data();
  KsPlan plan;
  memset(&plan, 0xff, sizeof(plan));
  if (!routine->plan(&arguments, &plan)) return false;
  CheckPlan(report, plan);
  // The shapes are small: a plan that wants this much is a mistake, and would be a slow one.
  constexpr int64_t kMost = int64_t{1} << 28;
  report.Check(plan.table_bytes < kMost && plan.filter_bytes < kMost && plan.shared_bytes < kMost &&
                   plan.scratch_bytes < kMost,
               "a plan of 256 MiB");
  PlanMemory table(plan.table_bytes), filter(plan.filter_bytes), shared(plan.shared_bytes),
      scratch(plan.scratch_bytes);
  // Ranges in any order find what the last one left, now and then.
  int64_t held = -1;
  const KsMemory memory = {table.get(), filter.get(), shared.get(), scratch.get(),
                           cut == Cut::kShuffled ? &held : nullptr};
  for (int32_t stage = 0; stage < plan.num_stages; ++stage) {
    const int64_t items = plan.stages[stage].items;
    std::vector<std::pair<int64_t, int64_t>> ranges;
    for (int64_t begin = 0; begin < items;) {
      const int64_t length = cut == Cut::kWhole    ? items
                             : cut == Cut::kSingle ? 1
                                                   : 1 + static_cast<int64_t>((*random)() % 7);
      const int64_t end = std::min(items, begin + length);
      ranges.emplace_back(begin, end);
      begin = end;
    }
    if (cut == Cut::kSingle) std::reverse(ranges.begin(), ranges.end());
    if (cut == Cut::kShuffled) std::shuffle(ranges.begin(), ranges.end(), *random);
    held = -1;
    int64_t spoils = 64;  // As often as shows a dependence, large scratch in mind.
    for (const auto& range : ranges) {
      const bool spoil = cut == Cut::kSingle || (cut == Cut::kShuffled && (*random)() % 2 == 0);
      if (spoil && spoils-- > 0) {
        scratch.Spoil();
        held = -1;
      }
      routine->run(&arguments, &plan, stage, range.first, range.second, &memory);
    }
  }
  return true;
}

void CheckRoutines(Report* report, const KsArguments& arguments, size_t result_size, size_t offset,
                   std::mt19937* random) {
  const Block<float> expected(result_size, offset), actual(result_size, offset);
  const Block<float> whole(result_size, offset);
  const std::string text = report->text;
  for (int32_t i = ks_num_routines() - 1; i >= 0; --i) {  // the references first
    const KsRoutine* routine = ks_routine(i);
    if (routine->operation != arguments.operation) continue;
    report->text = text + ", " + routine->name + " " + routine->isa;
    if (strcmp(routine->isa, "reference") == 0) {
      Run(*report, routine, arguments, Cut::kWhole, random, expected);
      continue;
    }
    // Minimal filtering rounds, if only a little: the next integer must be the expected one.
    const bool rounds = strstr(routine->name, "Winograd") != nullptr;
    for (Cut cut : {Cut::kWhole, Cut::kSingle, Cut::kShuffled}) {
      if (!Run(*report, routine, arguments, cut, random, actual)) break;
      for (size_t e = 0; e < result_size; ++e) {
        const float wanted = expected.data()[e];
        const float nearest = rounds ? std::nearbyint(actual.data()[e]) : actual.data()[e];
        if (nearest != wanted || std::abs(actual.data()[e] - wanted) > 0.01f) {  // NaN is not equal
          report->Fail("element " + std::to_string(e) + " is " + std::to_string(actual.data()[e]) +
                       ", expected " + std::to_string(wanted));
        }
      }
      if (cut == Cut::kWhole) {
        std::copy_n(actual.data(), result_size, whole.data());
      } else if (result_size > 0 && memcmp(actual.data(), whole.data(), 4 * result_size) != 0) {
        report->Fail("the result depends on how the work is cut");
      }
    }
  }
  report->text = text;
  KsPlan plan;
  const KsRoutine* selected = ks_select(&arguments, &plan);
  report->Check(selected != nullptr && selected->operation == arguments.operation, "ks_select");
}

// Checks what the interface says of arguments that are valid but too large to be computed here.
void CheckPlans(const Report& report, const KsArguments& arguments) {
  for (int32_t i = 0; i < ks_num_routines(); ++i) {
    KsPlan plan;
    if (ks_routine(i)->operation == arguments.operation && ks_routine(i)->plan(&arguments, &plan)) {
      CheckPlan(report, plan);
    }
  }
}

int64_t Product(std::initializer_list<int64_t> factors) {
  int64_t product = 1;
  for (int64_t factor : factors) product *= factor;
  return product;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Bytes bytes(data, size);
  KsArguments a = {};
  a.operation = static_cast<KsOperation>(bytes.UpTo(KS_NUM_OPERATIONS - 1));
  const bool connection = IsConnection(a.operation);
  enum Mode { kValid, kCorrupt, kWild };
  const Mode mode = bytes.OneOf({kValid, kValid, kValid, kValid, kCorrupt, kCorrupt, kWild});
  a.geometry = DrawGeometry(&bytes);
  const KsGeometry& g = a.geometry;
  std::mt19937 random(bytes.Word<uint32_t>());

  // The number of weights that the reference computes in its time.
  const int64_t per_kept =
      std::max<int64_t>(1, g.batch * g.out_height * g.out_width) *
      std::max<int64_t>(1, connection ? g.kernel_height * g.kernel_width : g.out_channels);
  Table table =
      DrawTable(&bytes, connection, g, std::max<int64_t>(8, kMaxWork / per_kept), &random);
  if (mode == kCorrupt) Corrupt(&bytes, connection, g, &table);
  a.kept = table.kept(connection);
  if (mode == kCorrupt && a.kept > 0 && bytes.UpTo(15) == 0) a.kept -= 1;

  // Tables end where their memory ends, too.
  const auto copy = [](const std::vector<int32_t>& values) {
    Block<int32_t> block(values.size(), 0);
    std::copy(values.begin(), values.end(), block.data());
    return block;
  };
  const Block<int32_t> row_splits = copy(table.row_splits);
  const Block<int32_t> input_channels = copy(table.input_channels);
  const Block<int32_t> indices = copy(table.indices);
  if (connection) {
    a.row_splits = row_splits.data();
    a.input_channels = input_channels.data();
  } else {
    a.indices = indices.data();
  }
  if (mode == kWild) Exaggerate(&bytes, &a);

  Report report;
  report.text = Describe(a);
  int64_t position = -2;
  const KsStatus status = ks_check_arguments(&a, &position);
  if (mode == kWild) {
    if (status == KS_OK) CheckPlans(report, a);
    return 0;
  }
  const bool valid = TableIsValid(a);
  report.Check(valid || status != KS_OK, "ks_check_arguments takes a broken table");
  report.Check(!valid || status == KS_OK, "ks_check_arguments refuses a good table");
  if (!valid) {
    const int64_t entries = status == KS_BAD_ROW_SPLITS ? g.out_channels + 1 : a.kept;
    report.Check(position >= 0 && position < entries, "the position of an error");
    report.Check((status == KS_BAD_INDICES) == !connection, "the kind of an error");
    return 0;
  }

  const size_t offset = bytes.UpTo(3);
  const auto fill = [&](int64_t count) {
    Block<float> values(count, offset);
    for (int64_t i = 0; i < count; ++i) {
      values.data()[i] = static_cast<float>(static_cast<int>(random() % 9) - 4);
    }
    return values;
  };
  const Block<float> input = fill(Product({g.batch, g.in_height, g.in_width, g.in_channels}));
  const Block<float> filter =
      fill(a.kept * (connection ? g.kernel_height * g.kernel_width : g.out_channels));
  const Block<float> out_backprop =
      fill(Product({g.batch, g.out_height, g.out_width, g.out_channels}));
  const int kind = a.operation % 3;  // Forward, gradient of the input, of the filter.
  if (kind != 1) a.input = input.data();
  if (kind != 2) a.filter = filter.data();
  if (kind != 0) a.out_backprop = out_backprop.data();
  size_t result_size = kind == 0 ? out_backprop.size() : kind == 1 ? input.size() : filter.size();
  if (a.operation == KS_CONNECTION_CONV2D && bytes.UpTo(2) == 0) {
    a.pool = 1 + bytes.UpTo(2);
    result_size = Product({g.batch, g.out_height / a.pool, g.out_width / a.pool, g.out_channels});
    report.Check(ks_check_arguments(&a, &position) == KS_OK, "ks_check_arguments refuses pooling");
    report.text += ", pool " + std::to_string(a.pool);
  }
  CheckRoutines(&report, a, result_size, offset, &random);
  return 0;
}

#ifndef KS_LIBFUZZER

// In every sanitizer's runtime; null without one.
extern "C" void __sanitizer_set_death_callback(void (*callback)()) __attribute__((weak));

namespace {

uint64_t current_seed = 0;

// However an input ends the process, it is named.
void NameInput(int) {
  fprintf(stderr, "\nconv2d_fuzz: to repeat it: conv2d_fuzz 1 %llu\n",
          static_cast<unsigned long long>(current_seed));
}
void NameInputOnDeath() { NameInput(0); }

bool Number(const char* text, uint64_t* number) {
  char* end = nullptr;
  errno = 0;
  *number = strtoull(text, &end, 10);
  return errno == 0 && end != text && *end == '\0';
}

int RunFile(const char* path) {
  FILE* file = fopen(path, "rb");
  if (file == nullptr) {
    perror(path);
    return 1;
  }
  std::vector<uint8_t> data;
  for (int c = fgetc(file); c != EOF; c = fgetc(file)) data.push_back(static_cast<uint8_t>(c));
  fclose(file);
  LLVMFuzzerTestOneInput(data.data(), data.size());
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && strcmp(argv[1], "--file") == 0) {
    for (int i = 2; i < argc; ++i) {
      if (RunFile(argv[i]) != 0) return 1;
    }
    return 0;
  }
  uint64_t iterations = 10000, seed = 0;
  if (argc > 3 || (argc > 1 && !Number(argv[1], &iterations)) ||
      (argc > 2 && !Number(argv[2], &seed))) {
    fprintf(stderr, "usage: conv2d_fuzz [iterations [seed]] | --file INPUT ...\n");
    return 2;
  }
  signal(SIGABRT, NameInput);
  if (__sanitizer_set_death_callback != nullptr) __sanitizer_set_death_callback(NameInputOnDeath);
  for (uint64_t i = 0; i < iterations; ++i) {
    current_seed = seed + i;
    std::mt19937_64 random(current_seed);
    std::vector<uint8_t> data(96);
    for (uint8_t& byte : data) byte = static_cast<uint8_t>(random());
    LLVMFuzzerTestOneInput(data.data(), data.size());
  }
  printf("conv2d_fuzz: %llu inputs from seed %llu on, no failure\n",
         static_cast<unsigned long long>(iterations), static_cast<unsigned long long>(seed));
  return 0;
}

#endif  // KS_LIBFUZZER
