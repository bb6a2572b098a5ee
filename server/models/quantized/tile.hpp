// A few rows times a panel of outputs, or two.

#pragma once

#include <algorithm>

#include "spikes.hpp"

// Bytes of codes, that memory is asked for beforehand: a core reads so many in one to two hundred nanoseconds.
constexpr int64_t kAhead = 8192;

constexpr int kMostSums = kRegisters / 2;  // of a group, that stay in registers
constexpr int kFewRows = 2;                // wait for memory more than for arithmetic

// How many rows a tile can have at most. The sums of a group must fit into registers, for a vector of outputs at a
// time where they have two parts, and those of kGroupsAtOnce into the first cache.
constexpr int most_rows(Form form) {
  const int parts = form == Form::kEight ? Sum<8>::kParts : 1;
  return std::min(8, kMostSums / (parts == 2 ? parts : kVectors));
}

// Vector by vector, and so from register to register: as a whole, they would be copied through memory.
template <int kRows, int kCount>
void copy(const Floats (&from)[kRows][kCount], Floats (&to)[kRows][kCount]) {
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kCount; ++v) to[r][v] = from[r][v];
}

template <int kRows, int kCount>
void clear(Floats (&vectors)[kRows][kCount]) {
  for (auto& row : vectors)
    for (Floats& vector : row) vector = Floats{};
}

// A group's sums, [kRows][kCount][kParts], of rows and panels that have `groups` in all: kRows rows, which lie as many
// blocks apart, and kCount vectors of outputs. Memory is asked for `ahead` bytes beforehand.
template <Form kForm, int kRows, int kCount>
[[gnu::always_inline]] inline void sum_group(const uint8_t* codes, const Block* rows, int64_t groups, int64_t ahead,
                                             Ints* sums) {
  using GroupSum = Sum<code_bits(kForm)>;
  constexpr int steps = code_steps(kForm);
  constexpr int at_once = kRows * kCount * GroupSum::kParts > kMostSums ? 1 : kCount;
  for (int first = 0; first < kCount; first += at_once) {
    GroupSum own[kRows][at_once];
#pragma GCC unroll 8
    for (int step = 0; step < steps; ++step) {
      Codes weights[at_once];
      for (int v = 0; v < at_once; ++v) {
        const uint8_t* from = codes + codes_of(kForm, first + v, groups) + step * kStepBytes;
        if ((first + v) % kVectors == 0) __builtin_prefetch(from + ahead);
        weights[v] = load<Codes>(from);
      }
      for (int r = 0; r < kRows; ++r) {
        const Ints inputs = spread(rows[r * groups].codes + 4 * step);
        for (int v = 0; v < at_once; ++v) own[r][v].add(kForm == Form::kFour ? low(weights[v]) : weights[v], inputs);
      }
      if (kForm != Form::kFour) continue;
      for (int r = 0; r < kRows; ++r) {
        const Ints inputs = spread(rows[r * groups].codes + 4 * (step + steps));
        for (int v = 0; v < at_once; ++v) own[r][v].add(high(weights[v]), inputs);
      }
    }
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < at_once; ++v) own[r][v].keep(sums + (r * kCount + first + v) * GroupSum::kParts);
  }
}

// Scales a group's sum of a row and a vector of outputs, and adds it to the result. The offset is one of 4 bits'.
template <Form kForm>
[[gnu::always_inline]] inline void add_scaled(Ints total, const Block& block, Floats scale, Floats offset,
                                              Floats& result) {
  if (kForm == Form::kEight && !Sum<8>::kSigned) total += block.shift;
  const Floats scaled = __builtin_convertvector(total, Floats) * scale;
  if (kForm == Form::kFour)
    result += multiply_add(scaled, splat(block.scale), offset * splat(block.sum));
  else
    result = multiply_add(scaled, splat(block.scale), result);
}

// Scales a group's sums and adds them to the results.
template <Form kForm, int kRows, int kCount, class Scale>
[[gnu::always_inline]] inline void scale_group(const Ints* sums, const Scale* scales, const Block* rows, int64_t groups,
                                               Floats (&results)[kRows][kCount]) {
  using GroupSum = Sum<code_bits(kForm)>;
  Floats scale[kCount], offset[kCount];
  for (int v = 0; v < kCount; ++v) {
    const Scale* from = scales + scales_of(kForm, v, groups);
    scale[v] = widened(from);
    if (kForm == Form::kFour) offset[v] = widened(from + kColumns);
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kCount; ++v, sums += GroupSum::kParts)
      add_scaled<kForm>(GroupSum::total(sums), rows[r * groups], scale[v], offset[v], results[r][v]);
}

// How many vectors the sums of a group fill.
template <Form kForm, int kRows, int kCount>
constexpr int kSumVectors = kRows * kCount * Sum<code_bits(kForm)>::kParts;

// The next groups' sums, which are scaled later: with many rows and few registers, the long chain of scaling a group's
// sums would hold up the next group's in one loop.
template <Form kForm, int kRows, int kCount>
[[gnu::noinline]] void sum_groups(const uint8_t* codes, const Block* rows, int64_t groups, int64_t count, Ints* sums) {
  for (int64_t group = 0; group < count; ++group)
    sum_group<kForm, kRows, kCount>(codes + group * group_bytes(kForm), rows + group, groups, kAhead,
                                    sums + group * kSumVectors<kForm, kRows, kCount>);
}

template <Form kForm, int kRows, int kCount, class Scale>
[[gnu::noinline]] void scale_groups(const Ints* sums, const Scale* scales, const Block* rows, int64_t groups,
                                    int64_t count, Floats (&results)[kRows][kCount]) {
  Floats own[kRows][kCount];
  copy(results, own);
  for (int64_t group = 0; group < count; ++group)
    scale_group<kForm, kRows, kCount>(sums + group * kSumVectors<kForm, kRows, kCount>,
                                      scales + group * group_scales(kForm), rows + group, groups, own);
  copy(own, results);
}

// The same in one loop, of groups of which `left` are left in the panel.
template <Form kForm, int kRows, int kCount, class Scale>
[[gnu::noinline]] void sum_and_scale_groups(const uint8_t* codes, const Scale* scales, const Block* rows,
                                            int64_t groups, int64_t count, int64_t left,
                                            Floats (&results)[kRows][kCount]) {
  Floats own[kRows][kCount];
  if (left == groups)
    clear(own);
  else
    copy(results, own);
  for (int64_t group = 0; group < count; ++group) {
    Ints sums[kSumVectors<kForm, kRows, kCount>];
    // After a panel's end comes the next one, which is being read; those that are read next come after the tile's last.
    const bool beyond = group + kAhead / group_bytes(kForm) >= left;
    const int64_t ahead = kAhead + (beyond ? kCount / kVectors - 1 : 0) * groups * group_bytes(kForm);
    sum_group<kForm, kRows, kCount>(codes + group * group_bytes(kForm), rows + group, groups, ahead, sums);
    __builtin_prefetch(scales + (group + ahead / group_bytes(kForm)) * group_scales(kForm));
    scale_group<kForm, kRows, kCount>(sums, scales + group * group_scales(kForm), rows + group, groups, own);
  }
  copy(own, results);
}

// Few rows wait for memory, which must be asked for all the time; and a wide machine computes a group's products for
// longer than it takes to scale those before.
template <int kRows>
constexpr bool kInOneLoop = kRows <= kFewRows || kLanes == 16;

// The products of kRows rows with kPanels panels, [kRows][kPanels][kVectors].
//
// A row's result is the same whatever the number of rows and panels. (Pointers one by one, not in a structure, which
// GCC passes by vectors that its caller has just written in halves: a processor waits for that.)
template <Form kForm, int kRows, int kPanels, class Scale>
void multiply_tile(const uint8_t* codes, const Scale* scales, const Block* rows, int64_t groups, Floats* products) {
  constexpr int kCount = kPanels * kVectors;
  auto& results = *reinterpret_cast<Floats(*)[kRows][kCount]>(products);
  if (!kInOneLoop<kRows>) clear(results);
  for (int64_t left = groups; left > 0; left -= kGroupsAtOnce) {
    const int64_t count = std::min<int64_t>(left, kGroupsAtOnce);
    if constexpr (kInOneLoop<kRows>) {
      sum_and_scale_groups<kForm, kRows, kCount>(codes, scales, rows, groups, count, left, results);
    } else {
      Ints sums[kGroupsAtOnce * kSumVectors<kForm, kRows, kCount>];
      sum_groups<kForm, kRows, kCount>(codes, rows, groups, count, sums);
      scale_groups<kForm, kRows, kCount>(sums, scales, rows, groups, count, results);
    }
    for (int r = 0; r < kRows; ++r) add_spikes<kForm, kCount>(codes, scales, rows + r * groups, groups, results[r]);
    codes += kGroupsAtOnce * group_bytes(kForm);
    scales += kGroupsAtOnce * group_scales(kForm);
    rows += kGroupsAtOnce;
  }
}

using Tile = void (*)(const uint8_t*, const uint16_t*, const Block*, int64_t, Floats*);

// The tile function for a number of rows, 1 to most_rows.
template <Form kForm, int kPanels, int kRows = most_rows(kForm)>
Tile tile_of(int64_t rows) {
  if constexpr (kRows > 1)
    if (rows < kRows) return tile_of<kForm, kPanels, kRows - 1>(rows);
  return multiply_tile<kForm, kRows, kPanels, uint16_t>;
}
