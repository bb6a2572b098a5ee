// A few rows times a panel of outputs.

#pragma once

#include "codes.hpp"

// Activations of one row and group: codes, and what brings them back to floats. The largest of a group is often
// far above the others, whose scale it would make coarse: it has kSpike times a code of its own besides.
struct alignas(64) Block {
  int8_t codes[kGroup];
  int8_t spike[4];     // codes of four inputs, at most one of them not 0
  uint32_t spike_at;    // where a panel has weights for these four, in bytes, if each had one
  float scale;
  float sum;      // of all codes, times the scale
  int32_t shift;  // what takes the 128 off weights' codes of 8 bits: -128 times the sum of these codes
};


// How a panel's codes lie, for each group: 4 bits, where a byte's low half belongs to the group's first half
// of inputs and its high half to the other; the same with a byte for each code; 8 bits.
enum class Form { kFour, kSpread, kEight };

constexpr uint32_t group_bytes(Form form) { return (form == Form::kFour ? kSteps / 2 : kSteps) * kStepBytes; }

// Scales of a panel and group, in 16 bits; those of 4 bits are followed by offsets.
constexpr int64_t group_scales(Form form) { return form == Form::kEight ? kColumns : 2 * kColumns; }

constexpr int64_t kAhead = 2048;  // bytes, that memory is asked for beforehand

// Which rows a tile can have at most, so that its sums stay in registers.
constexpr int most_rows(Form form) {
  constexpr int halves = LONGSPAN_PRODUCTS == 2 ? 2 : 1;
  return form == Form::kEight ? kRegisters / (2 * kVectors * halves) : kRegisters / (2 * kVectors);
}

// The products of kRows rows, `row_blocks` blocks apart, with a panel, [kRows][kColumns].
//
// A row's result is the same whatever the number of rows.
template <Form kForm, int kRows>
void multiply_tile(
    const uint8_t* codes, const uint16_t* scales, const Block* rows, int64_t row_blocks, int64_t groups,
    float* results) {
  constexpr int kBits = kForm == Form::kEight ? 8 : 4;
  constexpr int kLoads = kForm == Form::kFour ? kSteps / 2 : kSteps;
  Floats result[kRows][kVectors] = {};
  for (int64_t group = 0; group < groups; ++group) {
    Sum<kBits> sums[kRows][kVectors];
#pragma GCC unroll 8
    for (int step = 0; step < kLoads; ++step) {
      if (kForm != Form::kSpread) __builtin_prefetch(codes + step * kStepBytes + kAhead);
      Codes weights[kVectors];
      for (int v = 0; v < kVectors; ++v) weights[v] = load<Codes>(codes + step * kStepBytes + v * sizeof(Codes));
      for (int r = 0; r < kRows; ++r) {
        const Ints inputs = spread(rows[r * row_blocks + group].codes + 4 * step);
        for (int v = 0; v < kVectors; ++v)
          sums[r][v].add(kForm == Form::kFour ? low(weights[v]) : weights[v], inputs);
      }
      if (kForm != Form::kFour) continue;
      for (int r = 0; r < kRows; ++r) {
        const Ints inputs = spread(rows[r * row_blocks + group].codes + 4 * (step + kLoads));
        for (int v = 0; v < kVectors; ++v) sums[r][v].add(high(weights[v]), inputs);
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      const Floats scale = halves(scales + v * kLanes);
      for (int r = 0; r < kRows; ++r) {
        const Block& block = rows[r * row_blocks + group];
        const int64_t at = kForm == Form::kFour ? block.spike_at % group_bytes(kForm) : block.spike_at;
        auto spiked = load<Codes>(codes + at + v * sizeof(Codes));
        if (kForm == Form::kFour) spiked = low((Codes)((Bits)spiked >> (block.spike_at / group_bytes(kForm) * 4)));
        Ints total = sums[r][v].total(spiked, spread(block.spike));
        if (kForm == Form::kEight) total += block.shift;
        const Floats scaled = __builtin_convertvector(total, Floats) * scale;
        result[r][v] = multiply_add(scaled, even(block.scale), result[r][v]);
        if (kForm != Form::kEight)
          result[r][v] = multiply_add(halves(scales + kColumns + v * kLanes), even(block.sum), result[r][v]);
      }
    }
    codes += group_bytes(kForm);
    scales += group_scales(kForm);
  }
  std::memcpy(results, result, sizeof result);
}

// A panel's codes of 4 bits, a byte each.
inline void spread_panel(const uint8_t* codes, int64_t groups, uint8_t* spread) {
  for (int64_t group = 0; group < groups; ++group) {
    for (int at = 0; at < kSteps / 2 * kStepBytes; at += sizeof(Codes)) {
      const auto both = load<Codes>(codes + at);
      store(spread + at, low(both));
      store(spread + at + kSteps / 2 * kStepBytes, high(both));
    }
    codes += group_bytes(Form::kFour);
    spread += group_bytes(Form::kSpread);
  }
}

using Tile = void (*)(const uint8_t*, const uint16_t*, const Block*, int64_t, int64_t, float*);

// The tile function for a number of rows, 1 to most_rows.
template <Form kForm, int kRows = most_rows(kForm)>
Tile tile_of(int64_t rows) {
  if constexpr (kRows > 1)
    if (rows < kRows) return tile_of<kForm, kRows - 1>(rows);
  return multiply_tile<kForm, kRows>;
}
