// Linear layers of few bits, with what a decoder layer does between them, all threads in one parallel region.
//
// Activations are rounded to 8 bits by groups of 32, as the weights are, and multiplied in whole numbers. A row's
// result does not depend on the other rows or on the number of threads.

#include <algorithm>
#include <atomic>
#include <memory>

#include "../../../attention/kernels/cpu/layout.hpp"
#include "../../../attention/kernels/cpu/threads.hpp"
#include "lookup.hpp"
#include "pack.hpp"
#include "rows.hpp"

namespace {

constexpr int64_t kRowsAtOnce = 128;  // that stay in a core's cache while panels go by
constexpr int64_t kOwnRows = 2;       // are prepared by each thread for itself, to save a barrier

struct Progress {
  std::atomic<int64_t> prepared{0}, rotated{0};
};

// A thread's share of a stage's products, a stretch of memory: the thread takes them from the front, and the others,
// when they have none of their own left, from the back.
class alignas(64) Share {
 public:
  // A number below `size` that no thread has taken yet, or -1.
  int64_t take(int64_t size, bool back) {
    const uint64_t before = taken_.fetch_add(back ? uint64_t{1} << 32 : 1, std::memory_order_relaxed);
    const auto front = static_cast<int64_t>(before & 0xffffffffu), behind = static_cast<int64_t>(before >> 32);
    if (front + behind >= size) return -1;
    return back ? size - 1 - behind : front;
  }

 private:
  std::atomic<uint64_t> taken_{0};
};

struct Job {
  const Run& run;
  Block* blocks;
  Progress* progress;  // of each stage
  Share* shares;       // [stages, team]
  int64_t team;
  std::atomic<int64_t> begun{0};  // threads
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
void multiply_rows(const Stage& stage, const uint8_t* codes, const uint16_t* scales, const Block* blocks, int64_t first,
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
void multiply_panels(const Stage& stage, const Block* blocks, int64_t first, int64_t rows, int64_t panel, int64_t end) {
  const int64_t groups = ceil(stage.inputs, kGroup);
  for (; panel < end; ++panel) {
    const uint8_t* codes = stage.codes + panel * groups * group_bytes(kForm);
    const uint16_t* scales = stage.scales + panel * groups * group_scales(kForm);
    multiply_rows<kForm>(stage, codes, scales, blocks, first, rows, panel * kColumns);
  }
}

// A share is some panels with all rows. It begins with a long piece, since memory is slow at the begin of a stretch
// // and after a wait for an atomic number. The short pieces after it balance threads of unequal speed.
void multiply(const Job& job, const Stage& stage, const Block* blocks, int64_t own, Share* shares) {
  constexpr int64_t kEdges[] = {0, 6, 7, 8}, kPieces = 3;
  const int64_t rows = job.run.rows, chunks = ceil(rows, kRowsAtOnce), chunk = ceil(rows, chunks);
  const int64_t panels = ceil(stage.outputs, kColumns);
  const auto multiply_some = stage.bits == 8 ? multiply_panels<Form::kEight> : multiply_panels<Form::kFour>;
  for (int64_t k = 0; k < job.team; ++k) {
    const int64_t thread = (own + k) % job.team;
    const int64_t begin = panels * thread / job.team, size = panels * (thread + 1) / job.team - begin;
    for (int64_t i; (i = shares[thread].take(kPieces * chunks, k > 0)) >= 0;) {
      const int64_t first = i / kPieces * chunk, piece = i % kPieces;
      multiply_some(stage, blocks, first, std::min(chunk, rows - first), begin + size * kEdges[piece] / 8,
                    begin + size * kEdges[piece + 1] / 8);
    }
  }
}

void work(void* given) {
  thread_local Scratch scratch;
  Job& job = *static_cast<Job*>(given);
  const int64_t own = job.begun.fetch_add(1, std::memory_order_relaxed);
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
      blocks = scratch.get<Block>(rows * groups);
      for (int64_t row = 0; row < rows; ++row) prepare_row(stage, row, blocks + row * groups);
    } else {
      for (int64_t row; (row = progress.prepared.fetch_add(1, std::memory_order_relaxed)) < rows;)
        prepare_row(stage, row, blocks + row * groups);
      wait();
    }
    multiply(job, stage, blocks, own, job.shares + s * job.team);
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
  const std::unique_ptr<Share[]> shares(new Share[run->count * team]);
  auto* const blocks = scratch.get<Block>(run->rows > kOwnRows ? run->rows * most : 0);
  Job job{*run, blocks, progress.get(), shares.get(), team};
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

namespace {

std::string layout_of_stage() {
  using Type = Stage;
  return described("Stage", sizeof(Type),
                   {LONGSPAN_FIELD(input),         LONGSPAN_FIELD(norm),        LONGSPAN_FIELD(codes),
                    LONGSPAN_FIELD(scales),        LONGSPAN_FIELD(bias),        LONGSPAN_FIELD(output),
                    LONGSPAN_FIELD(cosines),       LONGSPAN_FIELD(sines),       LONGSPAN_FIELD(positions),
                    LONGSPAN_FIELD(query_norm),    LONGSPAN_FIELD(key_norm),    LONGSPAN_FIELD(input_stride),
                    LONGSPAN_FIELD(output_stride), LONGSPAN_FIELD(inputs),      LONGSPAN_FIELD(outputs),
                    LONGSPAN_FIELD(bits),          LONGSPAN_FIELD(gated),       LONGSPAN_FIELD(added),
                    LONGSPAN_FIELD(query_heads),   LONGSPAN_FIELD(kv_heads),    LONGSPAN_FIELD(head_size),
                    LONGSPAN_FIELD(epsilon),       LONGSPAN_FIELD(head_epsilon)});
}

std::string layout_of_run() {
  using Type = Run;
  return described("Run", sizeof(Type),
                   {LONGSPAN_FIELD(stages), LONGSPAN_FIELD(parallel), LONGSPAN_FIELD(barrier), LONGSPAN_FIELD(count),
                    LONGSPAN_FIELD(rows), LONGSPAN_FIELD(threads)});
}

std::string layout_of_pack() {
  using Type = Pack;
  return described("Pack", sizeof(Type),
                   {LONGSPAN_FIELD(weights), LONGSPAN_FIELD(codes), LONGSPAN_FIELD(scales), LONGSPAN_FIELD(parallel),
                    LONGSPAN_FIELD(inputs), LONGSPAN_FIELD(outputs), LONGSPAN_FIELD(bits), LONGSPAN_FIELD(threads),
                    LONGSPAN_FIELD(exactly), LONGSPAN_FIELD(exact), LONGSPAN_FIELD(finite)});
}

std::string layout_of_lookup() {
  using Type = LookUp;
  return described(
      "LookUp", sizeof(Type),
      {LONGSPAN_FIELD(ids), LONGSPAN_FIELD(codes), LONGSPAN_FIELD(scales), LONGSPAN_FIELD(output), LONGSPAN_FIELD(rows),
       LONGSPAN_FIELD(inputs), LONGSPAN_FIELD(outputs), LONGSPAN_FIELD(bits), LONGSPAN_FIELD(missing)});
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const char* longspan_layout() {
  static const std::string layout = layout_of_stage() + layout_of_run() + layout_of_pack() + layout_of_lookup();
  return layout.c_str();
}
