// A few rows times a panel of outputs.

#pragma once

#include <algorithm>

#include "codes.hpp"

constexpr int kGroupsAtOnce = 32;  // whose sums are kept in the first cache before they are scaled

// Activations of one row and group: codes, and what brings them back to floats. The largest of a group may be so
// far above the others that its scale would make them coarse: then it is apart, and its code is 0.
struct alignas(64) Block {
  int8_t codes[kGroup];
  float scale;
  float sum;        // of all codes, times the scale
  int32_t shift;    // what takes the 128 off weights' codes of 8 bits: -128 times the sum of these codes
  float spike;      // the number that is apart, or 0
  uint16_t at;      // where a panel has weights for that number: bytes in a group's codes,
  uint16_t upward;  // and bits
  uint32_t spikes;  // in the first of kGroupsAtOnce blocks: a bit for each of them that has a spike
};

// How a panel's codes lie, for each group: 4 bits, where a byte's low half belongs to the group's first half
// of inputs and its high half to the other; 8 bits.
enum class Form : uint8_t { kFour, kEight };

constexpr int code_bits(Form form) { return form == Form::kFour ? 4 : 8; }

// How many vectors' worth of codes a group has for each vector of outputs.
constexpr int code_steps(Form form) { return form == Form::kFour ? kSteps / 2 : kSteps; }

constexpr int64_t group_bytes(Form form) { return code_steps(form) * kStepBytes; }

// Scales of a panel and group, in 16 bits; those of 4 bits are followed by offsets.
constexpr int64_t group_scales(Form form) { return form == Form::kEight ? kColumns : 2 * kColumns; }

constexpr int64_t kAhead = 2048;  // bytes, that memory is asked for beforehand

constexpr int kMostSums = kRegisters / 2;  // of a group, that stay in registers
constexpr int kFewRows = 2;                // wait for memory more than for arithmetic

// How many rows a tile can have at most. The sums of a group must fit into registers, for a vector of outputs at a
// time where they have two parts, and those of kGroupsAtOnce into the first cache.
constexpr int most_rows(Form form) {
  const int parts = form == Form::kEight ? Sum<8>::kParts : 1;
  return std::min(8, kMostSums / (parts == 2 ? parts : kVectors));
}

// Vector by vector, and so from register to register: as a whole, they would be copied through memory.
inline void copy(const Floats (&from)[kVectors], Floats (&to)[kVectors]) {
  for (int v = 0; v < kVectors; ++v) to[v] = from[v];
}
template <int kRows>
void copy(const Floats (&from)[kRows][kVectors], Floats (&to)[kRows][kVectors]) {
  for (int r = 0; r < kRows; ++r) copy(from[r], to[r]);
}

// A group's sums, [kRows][kVectors][kParts], for rows that lie `row_blocks` blocks apart.
template <Form kForm, int kRows>
[[gnu::always_inline]] inline void sum_group(const uint8_t* codes, const Block* rows, int64_t row_blocks, Ints* sums) {
  using GroupSum = Sum<code_bits(kForm)>;
  constexpr int steps = code_steps(kForm);
  constexpr int at_once = kRows * kVectors * GroupSum::kParts > kMostSums ? 1 : kVectors;
  for (int first = 0; first < kVectors; first += at_once) {
    GroupSum own[kRows][at_once];
#pragma GCC unroll 8
    for (int step = 0; step < steps; ++step) {
      if (first == 0) __builtin_prefetch(codes + step * kStepBytes + kAhead);
      Codes weights[at_once];
      for (int v = 0; v < at_once; ++v)
        weights[v] = load<Codes>(codes + step * kStepBytes + (first + v) * sizeof(Codes));
      for (int r = 0; r < kRows; ++r) {
        const Ints inputs = spread(rows[r * row_blocks].codes + 4 * step);
        for (int v = 0; v < at_once; ++v) own[r][v].add(kForm == Form::kFour ? low(weights[v]) : weights[v], inputs);
      }
      if (kForm != Form::kFour) continue;
      for (int r = 0; r < kRows; ++r) {
        const Ints inputs = spread(rows[r * row_blocks].codes + 4 * (step + steps));
        for (int v = 0; v < at_once; ++v) own[r][v].add(high(weights[v]), inputs);
      }
    }
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < at_once; ++v) own[r][v].keep(sums + (r * kVectors + first + v) * GroupSum::kParts);
  }
}

// Scales a group's sums and adds them to the results.
template <Form kForm, int kRows>
[[gnu::always_inline]] inline void scale_group(const Ints* sums, const uint16_t* scales, const Block* rows,
                                               int64_t row_blocks, Floats (&results)[kRows][kVectors]) {
  using GroupSum = Sum<code_bits(kForm)>;
  Floats scale[kVectors], offset[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    scale[v] = halves(scales + v * kLanes);
    if (kForm == Form::kFour) offset[v] = halves(scales + kColumns + v * kLanes);
  }
  for (int r = 0; r < kRows; ++r) {
    const Block& block = rows[r * row_blocks];
    for (int v = 0; v < kVectors; ++v, sums += GroupSum::kParts) {
      Ints total = GroupSum::total(sums);
      if (kForm == Form::kEight && !GroupSum::kSigned) total += block.shift;
      const Floats scaled = __builtin_convertvector(total, Floats) * scale[v];
      Floats& result = results[r][v];
      if (kForm == Form::kFour)
        result += multiply_add(scaled, splat(block.scale), offset[v] * splat(block.sum));
      else
        result = multiply_add(scaled, splat(block.scale), result);
    }
  }
}

// How many vectors the sums of a group fill.
template <Form kForm, int kRows>
constexpr int kSumVectors = kRows * kVectors * Sum<code_bits(kForm)>::kParts;

// Some groups' sums, which are scaled later: with many rows the compiler runs out of registers in a loop that
// // does both, and the long chain of scaling a group's sums would hold up the next group's.
template <Form kForm, int kRows>
[[gnu::noinline]] void sum_groups(const uint8_t* codes, const Block* rows, int64_t row_blocks, int64_t groups,
                                  Ints* sums) {
  for (int64_t group = 0; group < groups; ++group)
    sum_group<kForm, kRows>(codes + group * group_bytes(kForm), rows + group, row_blocks,
                            sums + group * kSumVectors<kForm, kRows>);
}

template <Form kForm, int kRows>
[[gnu::noinline]] void scale_groups(const Ints* sums, const uint16_t* scales, const Block* rows, int64_t row_blocks,
                                    int64_t groups, Floats (&results)[kRows][kVectors]) {
  Floats own[kRows][kVectors];
  copy(results, own);
  for (int64_t group = 0; group < groups; ++group)
    scale_group<kForm, kRows>(sums + group * kSumVectors<kForm, kRows>, scales + group * group_scales(kForm),
                              rows + group, row_blocks, own);
  copy(own, results);
}

// The same in one loop, for few rows: memory must be asked for all the time.
template <Form kForm, int kRows>
[[gnu::noinline]] void sum_and_scale_groups(const uint8_t* codes, const uint16_t* scales, const Block* rows,
                                            int64_t row_blocks, int64_t groups, Floats (&results)[kRows][kVectors]) {
  Floats own[kRows][kVectors];
  copy(results, own);
  for (int64_t group = 0; group < groups; ++group) {
    Ints sums[kSumVectors<kForm, kRows>];
    sum_group<kForm, kRows>(codes + group * group_bytes(kForm), rows + group, row_blocks, sums);
    scale_group<kForm, kRows>(sums, scales + group * group_scales(kForm), rows + group, row_blocks, own);
  }
  copy(own, results);
}

// Adds the products of a row's numbers that are apart. With one row, a call for each panel would be felt.
template <Form kForm>
[[gnu::always_inline]] inline void add_spikes(const uint8_t* codes, const uint16_t* scales, const Block* row,
                                              Floats (&results)[kVectors]) {
  Floats own[kVectors];
  copy(results, own);
  for (uint32_t left = row->spikes; left != 0; left &= left - 1) {
    const int64_t group = __builtin_ctz(left);
    const Block& block = row[group];
    const uint8_t* from = codes + group * group_bytes(kForm) + block.at;
    const uint16_t* factors = scales + group * group_scales(kForm);
    for (int v = 0; v < kVectors; ++v) {
      const Bits code = load<Bits>(from + v * sizeof(Codes)) >> block.upward;
      const Ints whole = (Ints)(kForm == Form::kFour ? code & 15u : (code & 255u) - 128u);
      const Floats offset = kForm == Form::kFour ? halves(factors + kColumns + v * kLanes) : Floats{};
      const Floats weight = multiply_add(halves(factors + v * kLanes), __builtin_convertvector(whole, Floats), offset);
      own[v] = multiply_add(splat(block.spike), weight, own[v]);
    }
  }
  copy(own, results);
}

// The products of kRows rows, `row_blocks` blocks apart, with a panel, [kRows][kColumns].
//
// A row's result is the same whatever the number of rows.
template <Form kForm, int kRows>
void multiply_tile(const uint8_t* codes, const uint16_t* scales, const Block* rows, int64_t row_blocks, int64_t groups,
                   float* products) {
  Floats results[kRows][kVectors];
  for (auto& row : results)
    for (Floats& result : row) result = Floats{};
  for (int64_t left = groups; left > 0; left -= kGroupsAtOnce) {
    const int64_t count = std::min<int64_t>(left, kGroupsAtOnce);
    if constexpr (kRows <= kFewRows) {
      sum_and_scale_groups<kForm, kRows>(codes, scales, rows, row_blocks, count, results);
    } else {
      Ints sums[kGroupsAtOnce * kSumVectors<kForm, kRows>];
      sum_groups<kForm, kRows>(codes, rows, row_blocks, count, sums);
      scale_groups<kForm, kRows>(sums, scales, rows, row_blocks, count, results);
    }
    for (int r = 0; r < kRows; ++r) add_spikes<kForm>(codes, scales, rows + r * row_blocks, results[r]);
    codes += count * group_bytes(kForm);
    scales += count * group_scales(kForm);
    rows += count;
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) store(products + r * kColumns + v * kLanes, results[r][v]);
}

using Tile = void (*)(const uint8_t*, const uint16_t*, const Block*, int64_t, int64_t, float*);

// The tile function for a number of rows, 1 to most_rows.
template <Form kForm, int kRows = most_rows(kForm)>
Tile tile_of(int64_t rows) {
  if constexpr (kRows > 1)
    if (rows < kRows) return tile_of<kForm, kRows - 1>(rows);
  return multiply_tile<kForm, kRows>;
}
