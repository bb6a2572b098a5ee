// Linear layers of few bits, with what a decoder layer does between them, all threads in one parallel region.
//
// Activations are rounded to 8 bits by groups of 32, as the weights are, and multiplied in whole numbers. Every
// row is computed alone: its result does not depend on the others or on the number of threads.

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "../../../attention/kernels/cpu/threads.hpp"
#include "lookup.hpp"
#include "pack.hpp"
#include "rows.hpp"

namespace {

constexpr int64_t kRowsAtOnce = 128;      // that stay in a core's cache while panels go by
constexpr int64_t kOwnRows = 2;           // are prepared by each thread for itself, to save a barrier

struct Progress {
  std::atomic<int64_t> prepared{0}, multiplied{0}, rotated{0};
};

struct Job {
  const Run& run;
  Block* blocks;
  Progress* progress;
  int64_t team;
};

int64_t ceil(int64_t number, int64_t by) { return (number + by - 1) / by; }

void store_tile(const Stage& stage, float* results, int64_t row, int64_t rows, int64_t column) {
  const size_t size = std::min<int64_t>(kColumns, stage.outputs - column) * sizeof(float);
  alignas(64) float shift[kColumns] = {}, before[kColumns];
  if (stage.bias) std::memcpy(shift, stage.bias + column, size);
  for (int64_t r = 0; r < rows; ++r) {
    float* output = stage.output + (row + r) * stage.output_stride + column;
    float* result = results + r * kColumns;
    if (stage.bias)
      for (int c = 0; c < kColumns; c += kLanes) store(result + c, floats(result + c) + floats(shift + c));
    if (stage.added) {
      std::memcpy(before, output, size);
      for (int c = 0; c < kColumns; c += kLanes) store(result + c, floats(result + c) + floats(before + c));
    }
    if (size == kColumns * sizeof(float))
      std::memcpy(output, result, kColumns * sizeof(float));
    else
      std::memcpy(output, result, size);
  }
}

template <Form kForm>
void multiply_rows(
    const Stage& stage, const uint8_t* codes, const uint16_t* scales, const Block* blocks, int64_t first,
    int64_t rows, int64_t column) {
  constexpr int kMost = most_rows(kForm);
  const int64_t groups = ceil(stage.inputs, kGroup);
  alignas(64) float results[kMost * kColumns];
  for (int64_t row = first; row < first + rows; row += kMost) {
    const int64_t count = std::min<int64_t>(kMost, first + rows - row);
    tile_of<kForm>(count)(codes, scales, blocks + row * groups, groups, groups, results);
    store_tile(stage, results, row, count, column);
  }
}

// Some panels' products with some rows.
template <Form kForm>
void multiply_panels(
    const Stage& stage, const Block* blocks, int64_t first, int64_t rows, int64_t panel, int64_t panels) {
  const int64_t groups = ceil(stage.inputs, kGroup);
  for (; panels-- > 0; ++panel) {
    const uint8_t* codes = stage.codes + panel * groups * group_bytes(kForm);
    const uint16_t* scales = stage.scales + panel * groups * group_scales(kForm);
    multiply_rows<kForm>(stage, codes, scales, blocks, first, rows, panel * kColumns);
  }
}

void multiply(const Job& job, const Stage& stage, const Block* blocks, std::atomic<int64_t>& next) {
  const int64_t rows = job.run.rows, panels = ceil(stage.outputs, kColumns);
  const int64_t chunks = ceil(rows, kRowsAtOnce), chunk = ceil(rows, chunks);
  // Pieces for threads of unequal speed, but each long enough to read memory in a stream.
  const int64_t piece = std::max<int64_t>(1, panels / (8 * job.team));
  const int64_t pieces = ceil(panels, piece);
  for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < pieces * chunks;) {
    const int64_t first = i / pieces * chunk, panel = i % pieces * piece;
    (stage.bits == 8 ? multiply_panels<Form::kEight> : multiply_panels<Form::kFour>)(
        stage, blocks, first, std::min(chunk, rows - first), panel, std::min(piece, panels - panel));
  }
}

void work(void* given) {
  thread_local Scratch own;
  const Job& job = *static_cast<Job*>(given);
  const int64_t rows = job.run.rows;
  const auto wait = [&] {
    if (job.team > 1) reinterpret_cast<void (*)()>(job.run.barrier)();
  };
  for (int64_t s = 0; s < job.run.count; ++s) {
    const Stage& stage = job.run.stages[s];
    Progress& progress = job.progress[s];
    const int64_t groups = ceil(stage.inputs, kGroup);
    Block* blocks = job.blocks;
    if (rows <= kOwnRows) {
      blocks = own.get<Block>(rows * groups);
      for (int64_t row = 0; row < rows; ++row) prepare_row(stage, row, blocks + row * groups);
    } else {
      for (int64_t row; (row = progress.prepared.fetch_add(1, std::memory_order_relaxed)) < rows;)
        prepare_row(stage, row, blocks + row * groups);
      wait();
    }
    multiply(job, stage, blocks, progress.multiplied);
    if (stage.cosines) {
      wait();
      for (int64_t row; (row = progress.rotated.fetch_add(1, std::memory_order_relaxed)) < rows;)
        rotate_row(stage, row);
    }
    if (s + 1 < job.run.count) wait();
  }
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void longspan_run(const Run* run) {
  thread_local Scratch scratch;
  int64_t most = 0, products = 0;
  for (int64_t s = 0; s < run->count; ++s) {
    most = std::max(most, ceil(run->stages[s].inputs, kGroup));
    products += run->rows * run->stages[s].inputs * run->stages[s].outputs;
  }
  const std::unique_ptr<Progress[]> progress(new Progress[run->count]);
  const int64_t team = products < kParallelProducts ? 1 : run->threads;
  Job job{*run, scratch.get<Block>(run->rows > kOwnRows ? run->rows * most : 0), progress.get(), team};
  in_parallel(run->parallel, work, &job, team);
}

extern "C" __attribute__((visibility("default"))) void longspan_pack(Pack* pack) {
  Packing packing{*pack};
  in_parallel(pack->parallel, pack->bits == 4 ? pack_panels<4> : pack_panels<8>, &packing, pack->threads);
  pack->exact = packing.exact;
  pack->finite = packing.finite;
}

extern "C" __attribute__((visibility("default"))) void longspan_look_up(LookUp* call) {
  (call->bits == 4 ? look_up<Form::kFour> : look_up<Form::kEight>)(*call);
}
