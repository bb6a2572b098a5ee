// Linear layers of few bits, with what a decoder layer does between them, all threads in one parallel region.
//
// Activations are rounded to 8 bits by groups of 32, as the weights are, and multiplied in whole numbers; where there
// is a matrix unit, those of prompts in bfloat16. A row's result does not depend on the other rows or on the number of
// threads.

#include <algorithm>
#include <atomic>
#include <memory>
#include <optional>
#include <vector>

#include "../../../attention/kernels/cpu/layout.hpp"
#include "../../../attention/kernels/cpu/threads.hpp"
#include "lookup.hpp"
#include "pack.hpp"
#include "results.hpp"
#include "rows.hpp"
#include "unpacked.hpp"

namespace {

constexpr int64_t kRowsAtOnce = kLanes == 16 ? 256 : 128;  // that stay in a core's cache through all stages of a run
constexpr int64_t kTileRows = 8;                           // at most, at any level
constexpr int64_t kOwnRows = 2;                            // are prepared by each thread for itself, to save a barrier

// Panels of a tile with many rows, whose scales are made floats once for all its tiles. Where a panel is a single
// vector, a number of a row that is read should serve two; with few rows, that wait for memory, one stretch of it is
// read faster than two.
constexpr int kPanelsAtOnce = kLanes == 16 ? 2 : 1;
constexpr int64_t kManyRows = 16;

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

// The state of a thread.
struct Own {
  Scratch& scratch;  // for panels that many rows share
  Likely* likely;    // [rows], of the last stage
  Order order;
};

struct Job {
  const Run& run;
  Block* blocks;
  Progress* progress;  // [chunks, stages]
  Share* shares;       // [chunks, stages, team]
  Likely* likely;      // [team, rows], or null
  int64_t team;
  int64_t chunk, chunks;  // rows that go through all stages before the next ones
  Order order;
  int64_t plain;                  // of them are first and are multiplied in whole numbers, the others in bfloat16
  std::atomic<int64_t> begun{0};  // threads
};

int64_t ceil(int64_t number, int64_t by) { return (number + by - 1) / by; }

// Some panels' products with some rows, whose blocks begin with the first row's.
template <Form kForm, int kPanels>
void multiply_rows(const Stage& stage, const Block* blocks, int64_t first, int64_t rows, int64_t panel,
                   const Own& own) {
  constexpr int kMost = most_rows(kForm);
  const int64_t groups = ceil(stage.inputs, kGroup), end = first + rows, column = panel * kColumns;
  const uint8_t* codes = stage.codes + panel * groups * group_bytes(kForm);
  const uint16_t* scales = stage.scales + panel * groups * group_scales(kForm);
  Floats results[kMost * kPanels * kVectors];
  int64_t row = first;
  if (rows >= kManyRows) {
    const int64_t count = kPanels * groups * group_scales(kForm);
    auto* const wide = own.scratch.get<float>(count);
    for (int64_t i = 0; i < count; i += kLanes) store(wide + i, halves(scales + i));
    for (; row + kMost <= end; row += kMost) {
      ask_for_outputs<kMost, kPanels>(stage, own.order, row, column);
      multiply_tile<kForm, kMost, kPanels, float>(codes, wide, blocks + (row - first) * groups, groups, results);
      store_tile<kPanels>(stage, results, own.order, row, kMost, column, own.likely);
    }
  }
  for (; row < end; row += kMost) {
    const int64_t count = std::min<int64_t>(kMost, end - row);
    tile_of<kForm, kPanels>(count)(codes, scales, blocks + (row - first) * groups, groups, results);
    store_tile<kPanels>(stage, results, own.order, row, count, column, own.likely);
  }
}

// kUnpackedPanels panels with some rows.
template <Form kForm>
void multiply_many(const Stage& stage, const Block* blocks, int64_t first, int64_t rows, int64_t panel,
                   const Own& own) {
  const int64_t groups = ceil(stage.inputs, kGroup), end = first + rows, column = panel * kColumns;
  const size_t codes_size = Unpacked::codes_size(groups);
  auto* const room = own.scratch.get<Codes>(codes_size + Unpacked::scales_size(groups));
  const Unpacked panels{room, reinterpret_cast<Floats*>(room + codes_size)};
  const uint8_t* codes = stage.codes + panel * groups * group_bytes(kForm);
  const uint16_t* scales = stage.scales + panel * groups * group_scales(kForm);
  unpack<kForm>(codes, scales, groups, panels);
  const int64_t code_bytes = kUnpackedPanels * groups * group_bytes(kForm);
  const int64_t scale_count = kUnpackedPanels * groups * group_scales(kForm);
  Floats results[kUnpackedRows * kUnpackedCount];
  int64_t row = first;
  // Asks for a tile's share of what is unpacked next.
  const auto ask = [&](const void* next, int64_t bytes) {
    const int64_t share = bytes * kUnpackedRows / rows;
    const auto* from = static_cast<const uint8_t*>(next) + (row - first) / kUnpackedRows * share;
    for (int64_t byte = 0; byte < share; byte += 64) __builtin_prefetch(from + byte, 0, 2);
  };
  for (; row + kUnpackedRows <= end; row += kUnpackedRows, blocks += kUnpackedRows * groups) {
    ask(codes + code_bytes, code_bytes);
    ask(scales + scale_count, scale_count * int64_t{sizeof *scales});
    ask_for_outputs<kUnpackedRows, kUnpackedPanels>(stage, own.order, row, column);
    multiply_unpacked<kForm>(panels, blocks, groups, results);
    store_tile<kUnpackedPanels>(stage, results, own.order, row, kUnpackedRows, column, own.likely);
  }
  if (row == end) return;
  tile_of<kForm, kUnpackedPanels, kUnpackedRows - 1>(end - row)(codes, scales, blocks, groups, results);
  store_tile<kUnpackedPanels>(stage, results, own.order, row, end - row, column, own.likely);
}

#if defined(__AMX_BF16__)

// Panels from `panel` to `end` with some rows in bfloat16, which begin with the first row's.
template <Form kForm>
void multiply_given(const Stage& stage, const Block* blocks, int64_t first, int64_t rows, int64_t panel, int64_t end,
                    const Own& own) {
  const int64_t groups = ceil(stage.inputs, kGroup), bands = in_bands(rows) / kBand;
  auto* const results =
      own.scratch.get<Band>(bands + ceil(sizeof(MatrixWeights) * kPart * kMatrixPanels, sizeof(Band)));
  auto* const weights = reinterpret_cast<MatrixWeights*>(results + bands);
  for (; panel < end; panel += kMatrixPanels) {
    const int64_t panels = std::min<int64_t>(kMatrixPanels, end - panel), column = panel * kColumns;
    const auto ask = [&](int64_t row) {
      if (row + kBand <= rows) ask_for_outputs<kBand, kMatrixPanels>(stage, own.order, first + row, column);
    };
    multiply_bfloat16<kForm>({stage.codes + panel * groups * group_bytes(kForm),
                              stage.scales + panel * groups * group_scales(kForm), panels, groups},
                             blocks, rows, weights, results, ask);
    const Floats* found = results[0];
    if (panels == kMatrixPanels)
      store_tile<kMatrixPanels>(stage, found, own.order, first, rows, column, own.likely);
    else
      for (int64_t row = first; row < first + rows; ++row, found += kMatrixPanels)
        store_tile<1>(stage, found, own.order, row, 1, column, own.likely);
  }
}

#endif

// Panels from `panel` to `end` with some rows, whose blocks begin with the first row's.
template <Form kForm>
void multiply_panels(const Stage& stage, const Block* blocks, int64_t first, int64_t rows, int64_t panel, int64_t end,
                     const Own& own) {
  if constexpr (kUnpackedPanels > 0 && Sum<code_bits(kForm)>::kParts == 1)
    if (rows >= kUnpackedFrom)
      for (; panel + kUnpackedPanels <= end; panel += kUnpackedPanels)
        multiply_many<kForm>(stage, blocks, first, rows, panel, own);
  if (rows >= kManyRows)
    for (; panel + kPanelsAtOnce <= end; panel += kPanelsAtOnce)
      multiply_rows<kForm, kPanelsAtOnce>(stage, blocks, first, rows, panel, own);
  for (; panel < end; ++panel) multiply_rows<kForm, 1>(stage, blocks, first, rows, panel, own);
}

// A share is some panels with all of some rows. It begins with a long piece, since memory is slow at the begin of a
// stretch and after a wait for an atomic number. The short pieces after it balance threads of unequal speed.
void multiply(const Job& job, const Stage& stage, const Block* blocks, int64_t first, int64_t rows, int64_t own,
              Share* shares, const Own& room) {
  constexpr int64_t kEdges[] = {0, 6, 7, 8}, kPieces = 3;
  const int64_t together = kUnpackedPanels > 0 && rows >= kUnpackedFrom ? kUnpackedPanels : kPanelsAtOnce;
  const int64_t panels = ceil(stage.outputs, kColumns), units = ceil(panels, together);
  const auto multiply_some = stage.bits == 8 ? multiply_panels<Form::kEight> : multiply_panels<Form::kFour>;
  const int64_t plain = std::clamp<int64_t>(job.plain - first, 0, rows);
  for (int64_t k = 0; k < job.team; ++k) {
    const int64_t thread = (own + k) % job.team;
    const int64_t begin = units * thread / job.team, size = units * (thread + 1) / job.team - begin;
    for (int64_t piece; (piece = shares[thread].take(kPieces, k > 0)) >= 0;) {
      const int64_t panel = together * (begin + size * kEdges[piece] / 8);
      const int64_t end = std::min(panels, together * (begin + size * kEdges[piece + 1] / 8));
      if (plain > 0) multiply_some(stage, blocks, first, plain, panel, end, room);
#if defined(__AMX_BF16__)
      const int64_t groups = ceil(stage.inputs, kGroup);
      const auto multiply_others = stage.bits == 8 ? multiply_given<Form::kEight> : multiply_given<Form::kFour>;
      if (plain < rows) multiply_others(stage, blocks + plain * groups, first + plain, rows - plain, panel, end, room);
#endif
    }
  }
}

// Prepares one of a chunk's rows, of which so many are multiplied in whole numbers; beyond the last, zeros.
void prepare(const Job& job, const Stage& stage, int64_t first, int64_t plain, [[maybe_unused]] int64_t rows,
             int64_t row, Block* blocks) {
  const int64_t groups = ceil(stage.inputs, kGroup);
  if (row < plain) return prepare_row<true>(stage, job.order[first + row], blocks + row * groups);
#if defined(__AMX_BF16__)
  Block* const to = in_tiles(blocks + plain * groups, row - plain, groups);
  if (row < rows) return prepare_row<false>(stage, job.order[first + row], to);
  for (int64_t group = 0; group < groups; ++group) to[group * kMatrixRows] = {};
#endif
}

void work(void* given) {
  thread_local Scratch scratch, widened;
  Job& job = *static_cast<Job*>(given);
  std::optional<MatrixUse> matrix;
  if (job.plain < job.run.rows) matrix.emplace();
  const int64_t own = job.begun.fetch_add(1, std::memory_order_relaxed);
  const auto wait = [&] {
    if (job.team > 1) reinterpret_cast<void (*)()>(job.run.barrier)();
  };
  const int64_t count = job.run.count, turns = count * job.chunks;
  for (int64_t turn = 0; turn < turns; ++turn) {
    const Stage& stage = job.run.stages[turn % count];
    const int64_t first = turn / count * job.chunk, rows = std::min(job.chunk, job.run.rows - first);
    Progress& progress = job.progress[turn];
    const int64_t groups = ceil(stage.inputs, kGroup);
    const int64_t plain = std::clamp<int64_t>(job.plain - first, 0, rows);
    Block* blocks = job.blocks;
    if (rows <= kOwnRows && plain == rows) {
      blocks = scratch.get<Block>(rows * groups);
      for (int64_t row = 0; row < rows; ++row) prepare_row<true>(stage, job.order[first + row], blocks + row * groups);
    } else {
      const int64_t all = plain < rows ? plain + in_bands(rows - plain) : rows;
      for (int64_t row; (row = progress.prepared.fetch_add(1, std::memory_order_relaxed)) < all;)
        prepare(job, stage, first, plain, rows, row, blocks);
      wait();
    }
    multiply(job, stage, blocks, first, rows, own, job.shares + turn * job.team,
             {widened, job.likely + own * job.run.rows, job.order});
    if (stage.cosines) {
      wait();
      for (int64_t row; (row = progress.rotated.fetch_add(1, std::memory_order_relaxed)) < rows;)
        rotate_row(stage, job.order[first + row]);
    }
    if (turn + 1 < turns) wait();
  }
}

// Rows that belong to no prompt first, each kind in its order; returns how many these are.
int64_t divide(const Run& run, std::vector<int64_t>& order) {
  order.clear();
  for (int64_t row = 0; row < run.rows; ++row)
    if (!run.given[row]) order.push_back(row);
  const auto plain = static_cast<int64_t>(order.size());
  for (int64_t row = 0; row < run.rows; ++row)
    if (run.given[row]) order.push_back(row);
  return plain;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void longspan_run(const Run* run) {
  thread_local Scratch scratch;
  int64_t most = 0, products = 0;
  for (int64_t s = 0; s < run->count; ++s) {
    most = std::max(most, ceil(run->stages[s].inputs, kGroup));
    products += run->rows * run->stages[s].inputs * run->stages[s].outputs;
  }
  const int64_t team = products < kParallelProducts ? 1 : run->threads;
  const int64_t chunks = std::max<int64_t>(1, ceil(run->rows, kRowsAtOnce));
  const int64_t chunk = ceil(ceil(run->rows, chunks), kTileRows) * kTileRows;
  const std::unique_ptr<Progress[]> progress(new Progress[chunks * run->count]);
  const std::unique_ptr<Share[]> shares(new Share[chunks * run->count * team]);
  thread_local std::vector<int64_t> order;
  const int64_t plain = kMatrixUnit && run->given ? divide(*run, order) : run->rows;
  const bool as_they_lie = plain == 0 || plain == run->rows, shared = run->rows > kOwnRows || plain < run->rows;
  auto* const blocks = scratch.get<Block>(shared ? (std::min(chunk, run->rows) + kZeroRows) * most : 0);
  const Stage& last = run->stages[run->count - 1];
  const std::unique_ptr<Likely[]> likely(new Likely[last.likely ? team * run->rows : 0]);
  const Order in_order{as_they_lie ? nullptr : order.data()};
  Job job{*run, blocks, progress.get(), shares.get(), likely.get(), team, chunk, chunks, in_order, plain};
  in_parallel(run->parallel, work, &job, team);
  for (int64_t row = 0; last.likely && row < run->rows; ++row) {
    for (int64_t thread = 1; thread < team; ++thread) likely[row].add(likely[thread * run->rows + row]);
    last.likely[row] = likely[row].best();
  }
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
                   {LONGSPAN_FIELD(input),        LONGSPAN_FIELD(norm),          LONGSPAN_FIELD(codes),
                    LONGSPAN_FIELD(scales),       LONGSPAN_FIELD(bias),          LONGSPAN_FIELD(output),
                    LONGSPAN_FIELD(cosines),      LONGSPAN_FIELD(sines),         LONGSPAN_FIELD(positions),
                    LONGSPAN_FIELD(query_norm),   LONGSPAN_FIELD(key_norm),      LONGSPAN_FIELD(likely),
                    LONGSPAN_FIELD(input_stride), LONGSPAN_FIELD(output_stride), LONGSPAN_FIELD(inputs),
                    LONGSPAN_FIELD(outputs),      LONGSPAN_FIELD(bits),          LONGSPAN_FIELD(gated),
                    LONGSPAN_FIELD(added),        LONGSPAN_FIELD(query_heads),   LONGSPAN_FIELD(kv_heads),
                    LONGSPAN_FIELD(head_size),    LONGSPAN_FIELD(epsilon),       LONGSPAN_FIELD(head_epsilon)});
}

std::string layout_of_run() {
  using Type = Run;
  return described("Run", sizeof(Type),
                   {LONGSPAN_FIELD(stages), LONGSPAN_FIELD(parallel), LONGSPAN_FIELD(barrier), LONGSPAN_FIELD(given),
                    LONGSPAN_FIELD(count), LONGSPAN_FIELD(rows), LONGSPAN_FIELD(threads)});
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
