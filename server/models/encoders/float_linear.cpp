// Linear layers of float32, their weights laid out in advance, with GELU or residual and LayerNorm in the same call.
//
// A row's result depends neither on the other rows nor on the number of threads.

#include "float_linear.hpp"

#include <atomic>
#include <cmath>

#include "../../../attention/kernels/cpu/layout.hpp"
#include "../../../attention/kernels/cpu/threads.hpp"
#include "../../../attention/kernels/cpu/tile.hpp"

namespace {

// Of a panel so many inputs at a time stay in the L1 cache, of a block so many rows in the L2 cache.
constexpr int64_t kDepth = 384;
constexpr int64_t kTiles = 16;
constexpr int64_t kUnitsPerThread = 8;  // so that threads that are held up leave little undone
constexpr int64_t kNormRows = 16;       // that a thread takes at once

struct Job {
  const FloatLinear& call;
  int64_t tiles, row_blocks, panels, column_blocks;
  std::atomic<int64_t> next{0};
};

// The error function: an odd rational approximation on [-4, 4], beyond which float32 rounds it to 1. The coefficients
// are Eigen's (MathFunctionsImpl.h); its error is below 3e-7.
Floats error_function(Floats x) {
  const Floats limit = splat(4.0f);
  x = larger(Floats{} - limit, x);
  x = where(x > limit, limit, x);
  const Floats square = x * x;
  Floats over = square * -2.72614225801306e-10f + 2.77068142495902e-08f;
  over = over * square - 2.10102402082508e-06f;
  over = over * square - 5.69250639462346e-05f;
  over = over * square - 7.34990630326855e-04f;
  over = over * square - 2.95459980854025e-03f;
  over = over * square - 1.60960333262415e-02f;
  Floats under = square * -1.45660718464996e-05f - 2.13374055278905e-04f;
  under = under * square - 1.68282697438203e-03f;
  under = under * square - 7.37332916720468e-03f;
  under = under * square - 1.42647390514189e-02f;
  return x * over / under;
}

Floats gelu(Floats x) {
  const Floats half = x * 0.5f;
  return half + half * error_function(x * 0.70710678f);
}

// The first `count` numbers, then zeros.
Floats some(const float* from, int64_t count) {
  Floats vector = {};
  std::memcpy(&vector, from, count * sizeof(float));
  return vector;
}

// What follows the products of a tile [count, kPanel] whose first output is `column`.
void finish(const FloatLinear& call, const float* sums, int64_t first, int64_t count, int64_t column) {
  for (int64_t row = 0; row < count; ++row)
    for (int v = 0; v < kTileVectors; ++v) {
      const int64_t at = column + v * kLanes, width = std::min<int64_t>(kLanes, call.outputs - at);
      if (width <= 0) break;
      const int64_t place = (first + row) * call.outputs + at;
      Floats sum = floats(sums + row * kPanel + v * kLanes) + floats(call.bias + at);
      if (call.gelu) sum = gelu(sum);
      if (width == kLanes) {
        if (call.added) sum += floats(call.added + place);
        store(call.output + place, sum);
      } else {
        if (call.added) sum += some(call.added + place, width);
        std::memcpy(call.output + place, &sum, width * sizeof(float));
      }
    }
}

void multiply_blocks(void* given) {
  Job& job = *static_cast<Job*>(given);
  const FloatLinear& call = job.call;
  alignas(64) float sums[kTiles * kTileRows * kPanel];
  // The threads take blocks of rows of the same columns, whose weights they so read from memory once.
  for (int64_t i; (i = job.next.fetch_add(1, std::memory_order_relaxed)) < job.row_blocks * job.column_blocks;) {
    const int64_t block = i % job.row_blocks, columns = i / job.row_blocks;
    const int64_t begin = job.tiles * block / job.row_blocks, end = job.tiles * (block + 1) / job.row_blocks;
    for (int64_t panel = job.panels * columns / job.column_blocks;
         panel < job.panels * (columns + 1) / job.column_blocks; ++panel) {
      const float* weights = call.weights + panel * call.inputs * kPanel;
      const auto each_tile = [&](auto function) {
        for (int64_t tile = begin; tile < end; ++tile) {
          const int64_t first = tile * kTileRows, count = std::min<int64_t>(kTileRows, call.rows - first);
          function(first, count, sums + (tile - begin) * kTileRows * kPanel);
        }
      };
      for (int64_t from = 0; from < call.inputs; from += kDepth)
        each_tile([&](int64_t first, int64_t count, float* to) {
          const TileRows rows(call.input + first * call.inputs, call.inputs, count);
          multiply_rows(rows, from, weights + from * kPanel, std::min(kDepth, call.inputs - from), to, kPanel,
                        from > 0);
        });
      each_tile(
          [&](int64_t first, int64_t count, const float* from) { finish(call, from, first, count, panel * kPanel); });
    }
  }
}

// The sum of `function` of all vectors of a row; the last one may be a part, whose other lanes do not count.
template <class Function>
float row_sum(const float* row, int64_t count, Function function) {
  Floats sum = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) sum += function(floats(row + i));
  if (i == count) return sum_of(sum);
  const Floats last = function(some(row + i, count - i));
  return sum_of(sum + some(reinterpret_cast<const float*>(&last), count - i));
}

void norm_row(const FloatLinear& call, float* row) {
  const int64_t count = call.outputs;
  const auto size = static_cast<float>(count);
  const float mean = row_sum(row, count, [](Floats x) { return x; }) / size;
  const float squares = row_sum(row, count, [mean](Floats x) { return (x - mean) * (x - mean); });
  const float share = 1.0f / std::sqrt(squares / size + static_cast<float>(call.epsilon));
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    store(row + i, (floats(row + i) - mean) * share * floats(call.scale + i) + floats(call.shift + i));
  for (; i < count; ++i) row[i] = (row[i] - mean) * share * call.scale[i] + call.shift[i];
}

void norm_rows(void* given) {
  Job& job = *static_cast<Job*>(given);
  const FloatLinear& call = job.call;
  for (int64_t first; (first = job.next.fetch_add(kNormRows, std::memory_order_relaxed)) < call.rows;)
    for (int64_t row = first; row < std::min(first + kNormRows, call.rows); ++row)
      norm_row(call, call.output + row * call.outputs);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int64_t longspan_panel() { return kPanel; }

extern "C" __attribute__((visibility("default"))) void longspan_float_linear(const FloatLinear* call) {
  if (!call->rows) return;
  const int64_t threads = call->rows * call->inputs * call->outputs < kParallelProducts ? 1 : call->threads;
  const int64_t tiles = (call->rows + kTileRows - 1) / kTileRows, row_blocks = (tiles + kTiles - 1) / kTiles;
  const int64_t panels = (call->outputs + kPanel - 1) / kPanel;
  const int64_t wanted = (kUnitsPerThread * threads + row_blocks - 1) / row_blocks;
  Job products{*call, tiles, row_blocks, panels, std::min(panels, wanted)};
  in_parallel(call->parallel, multiply_blocks, &products, threads);
  if (!call->scale) return;
  Job norms{*call, 0, 0, 0, 0};
  in_parallel(call->parallel, norm_rows, &norms, threads);
}

extern "C" __attribute__((visibility("default"))) const char* longspan_layout() {
  using Type = FloatLinear;
  static const std::string layout =
      described("FloatLinear", sizeof(Type),
                {LONGSPAN_FIELD(input), LONGSPAN_FIELD(weights), LONGSPAN_FIELD(bias), LONGSPAN_FIELD(added),
                 LONGSPAN_FIELD(scale), LONGSPAN_FIELD(shift), LONGSPAN_FIELD(output), LONGSPAN_FIELD(parallel),
                 LONGSPAN_FIELD(rows), LONGSPAN_FIELD(inputs), LONGSPAN_FIELD(outputs), LONGSPAN_FIELD(gelu),
                 LONGSPAN_FIELD(threads), LONGSPAN_FIELD(epsilon)});
  return layout.c_str();
}
