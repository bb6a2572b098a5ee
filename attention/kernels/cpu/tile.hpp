// Products of a few rows of floats with a panel of columns, whose sums stay in registers.

#pragma once

#include <algorithm>

#include "lanes.hpp"

// Sums, a row's number and a panel's vectors fill the registers.
constexpr int kTileRows = kRegisters == 32 ? 8 : 6;
constexpr int kTileVectors = kRegisters == 32 ? 3 : 2;
constexpr int kPanel = kTileVectors * kLanes;  // columns

constexpr int64_t rounded_up(int64_t number, int64_t to) { return (number + to - 1) / to * to; }

// Rows of numbers that lie one after another; those beyond the last are the last again, whose sums are not looked at.
struct TileRows {
  const float* at[kTileRows];
  TileRows(const float* first, int64_t step, int64_t count) {
    for (int64_t row = 0; row < kTileRows; ++row) at[row] = first + std::min(row, count - 1) * step;
  }
};

// Adds rows [kTileRows, depth] times panel [depth, kPanel] to `sums`, whose rows lie `step` apart, or puts it there;
// `depth` is above 0.
// Each sum takes its products in order, whatever the other rows are.
//
// Aligned and not inlined for the reasons of multiply_panel in paged_panels.hpp.
[[gnu::aligned(64), gnu::noinline]] inline void multiply_rows(const TileRows& rows, int64_t from, const float* panel,
                                                              int64_t depth, float* sums, int64_t step, bool add) {
  const float* row[kTileRows];
  Floats sum[kTileRows][kTileVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
    row[r] = rows.at[r] + from;
#pragma GCC unroll 3
    for (int v = 0; v < kTileVectors; ++v) sum[r][v] = add ? floats(sums + r * step + v * kLanes) : Floats{};
  }
  int64_t k = 0;
  do {  // at least once: a loop that may not run has the compiler keep two copies of the sums
    Floats right[kTileVectors];
#pragma GCC unroll 3
    for (int v = 0; v < kTileVectors; ++v) {
      right[v] = floats(panel + v * kLanes);
      keep_at_hand(right[v]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 3
      for (int v = 0; v < kTileVectors; ++v) sum[r][v] = sum[r][v] + row[r][k] * right[v];
    panel += kPanel;
  } while (++k < depth);
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < kTileVectors; ++v) store(sums + r * step + v * kLanes, sum[r][v]);
}
