// Where a tile's results go: to memory, with what is added to them, or into the search for the largest.

#pragma once

#include "likely.hpp"
#include "rows.hpp"

// A panel's results of a row that fill it, with what is added to them.
inline void store_panel(const Stage& stage, const Floats* results, float* output, int64_t column) {
  for (int v = 0; v < kVectors; ++v) {
    Floats result = results[v];
    if (stage.bias) result += floats(stage.bias + column + v * kLanes);
    if (stage.added) result += floats(output + v * kLanes);
    store(output + v * kLanes, result);
  }
}

// The same where the last columns are none.
[[gnu::noinline]] inline void store_part(const Stage& stage, const Floats* results, float* output, int64_t column,
                                         int64_t columns) {
  alignas(64) float all[kColumns];
  std::memcpy(all, results, sizeof all);
  for (int64_t c = 0; c < columns; ++c) {
    if (stage.bias) all[c] += stage.bias[column + c];
    output[c] = stage.added ? all[c] + output[c] : all[c];
  }
}

// A row's results of a panel, with what is added to them.
inline void store_results(const Stage& stage, const Floats* results, float* output, int64_t column) {
  if (column + kColumns <= stage.outputs)
    store_panel(stage, results, output, column);
  else
    store_part(stage, results, output, column, stage.outputs - column);
}

// The same, compared with the row's others; nothing is added but a bias.
inline void compare_results(const Stage& stage, const Floats* results, int64_t column, Likely& likely) {
  alignas(64) float values[kColumns];
  std::fill(values, values + kColumns, -__builtin_inff());
  store_results(stage, results, values, column);
  for (int v = 0; v < kVectors; ++v)
    likely.add(floats(values + v * kLanes), lanes() + static_cast<int32_t>(column + v * kLanes));
}

// The rows of a run in the order in which they are computed: as they lie, or others.
struct Order {
  const int64_t* rows;  // or null
  int64_t operator[](int64_t number) const { return rows ? rows[number] : number; }
};

// A tile's results go where they belong.
template <int kPanels>
void store_tile(const Stage& stage, const Floats* results, Order order, int64_t row, int64_t rows, int64_t column,
                Likely* likely) {
  for (int64_t i = row; i < row + rows; ++i) {
    const int64_t r = order[i];
    for (int64_t c = column; c < column + kPanels * kColumns; c += kColumns, results += kVectors)
      if (stage.likely)
        compare_results(stage, results, c, likely[r]);
      else
        store_results(stage, results, stage.output + r * stage.output_stride + c, c);
  }
}

// Asks memory for the places of a tile's results.
template <int kRows, int kPanels>
void ask_for_outputs(const Stage& stage, Order order, int64_t row, int64_t column) {
  if (stage.likely) return;
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < kPanels; ++c)
      __builtin_prefetch(stage.output + order[row + r] * stage.output_stride + column + c * kColumns, 1);
}
