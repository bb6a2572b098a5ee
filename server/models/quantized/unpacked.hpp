// Many rows times panels whose codes are unpacked once for all of them.
//
// Unpacking in the tile takes a fifth of a wide machine's instructions. The tile is narrow in rows and wide in outputs,
// so that results and a group's sums all stay in registers.

#pragma once

#include "tile.hpp"

constexpr int kUnpackedRows = 4;                       // of a tile
constexpr int kUnpackedPanels = kLanes == 16 ? 3 : 0;  // of a tile; 0: not done at this width
constexpr int kUnpackedCount = kUnpackedPanels ? kUnpackedPanels * kVectors : 1;
constexpr int64_t kUnpackedFrom = 48;  // rows

// Codes of a few panels, a byte each, [groups][kSteps][kUnpackedCount], and their scales as floats, [groups][scales
// and, of 4 bits, offsets][kUnpackedCount].
struct Unpacked {
  Codes* codes;
  Floats* scales;

  static size_t codes_size(int64_t groups) { return groups * kSteps * kUnpackedCount; }
  static size_t scales_size(int64_t groups) { return groups * 2 * kUnpackedCount; }
};

template <Form kForm>
void unpack(const uint8_t* codes, const uint16_t* scales, int64_t groups, const Unpacked& to) {
  constexpr int steps = code_steps(kForm);
  for (int64_t group = 0; group < groups; ++group)
    for (int v = 0; v < kUnpackedCount; ++v) {
      const uint8_t* from = codes + codes_of(kForm, v, groups) + group * group_bytes(kForm);
      Codes* own = to.codes + group * kSteps * kUnpackedCount + v;
      for (int step = 0; step < steps; ++step) {
        const auto both = load<Codes>(from + step * kStepBytes);
        own[step * kUnpackedCount] = kForm == Form::kFour ? low(both) : both;
        if (kForm == Form::kFour) own[(step + steps) * kUnpackedCount] = high(both);
      }
      const uint16_t* factors = scales + scales_of(kForm, v, groups) + group * group_scales(kForm);
      Floats* own_factors = to.scales + group * 2 * kUnpackedCount + v;
      own_factors[0] = halves(factors);
      if (kForm == Form::kFour) own_factors[kUnpackedCount] = halves(factors + kColumns);
    }
}

// As add_spikes, of groups from `group` on.
template <Form kForm>
[[gnu::always_inline]] inline void add_unpacked_spikes(const Unpacked& panels, const Block* row, int64_t group,
                                                       Floats (&results)[kUnpackedCount]) {
  for (uint32_t left = row->spikes; left != 0; left &= left - 1) {
    const int64_t at = __builtin_ctz(left);
    const Block& block = row[at];
    // Where the number's code is, of a byte each.
    const int later = kForm == Form::kFour && (block.upward & 4) ? kSteps / 2 : 0, upward = block.upward & 24;
    const Codes* codes = panels.codes + ((group + at) * kSteps + block.at / kStepBytes + later) * kUnpackedCount;
    const Floats* factors = panels.scales + (group + at) * 2 * kUnpackedCount;
    for (int v = 0; v < kUnpackedCount; ++v) {
      const Ints whole = (Ints)(((Bits)codes[v] >> upward & 255u) - (kForm == Form::kFour ? 0u : 128u));
      const Floats offset = kForm == Form::kFour ? factors[kUnpackedCount + v] : Floats{};
      const Floats weight = multiply_add(factors[v], __builtin_convertvector(whole, Floats), offset);
      results[v] = multiply_add(splat(block.spike), weight, results[v]);
    }
  }
}

// Adds the products of kUnpackedRows rows in the groups from `first` to `end`.
template <Form kForm>
[[gnu::noinline]] void multiply_unpacked_groups(const Unpacked& panels, const Block* rows, int64_t groups,
                                                int64_t first, int64_t end,
                                                Floats (&results)[kUnpackedRows][kUnpackedCount]) {
  using GroupSum = Sum<code_bits(kForm)>;
  static_assert(GroupSum::kParts == 1);
  constexpr int kRows = kUnpackedRows, kCount = kUnpackedCount;
  Floats own[kRows][kCount];
  copy(results, own);
  const Codes* codes = panels.codes + first * kSteps * kCount;
  const Floats* factors = panels.scales + first * 2 * kCount;
  for (int64_t group = first; group < end; ++group, factors += 2 * kCount) {
    Ints sums[kRows][kCount];
#pragma GCC unroll 8
    for (auto& row : sums)
#pragma GCC unroll 8
      for (Ints& sum : row) sum = Ints{};
#pragma GCC unroll 8
    for (int step = 0; step < kSteps; ++step, codes += kCount) {
      Codes weights[kCount];
      for (int v = 0; v < kCount; ++v) {
        weights[v] = codes[v];
        keep_at_hand(weights[v]);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        Ints inputs = spread(rows[r * groups + group].codes + 4 * step);
        keep_at_hand(inputs);
        for (int v = 0; v < kCount; ++v) {
          sums[r][v] = products(sums[r][v], weights[v], inputs);
          in_order(sums[r][v]);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kCount; ++v)
        add_scaled<kForm>(GroupSum::total(&sums[r][v]), rows[r * groups + group], factors[v], factors[kCount + v],
                          own[r][v]);
  }
  copy(own, results);
}

// The products of kUnpackedRows rows, [kUnpackedRows][kUnpackedCount], to the last bit those of multiply_tile.
template <Form kForm>
void multiply_unpacked(const Unpacked& panels, const Block* rows, int64_t groups, Floats* products) {
  auto& results = *reinterpret_cast<Floats(*)[kUnpackedRows][kUnpackedCount]>(products);
  clear(results);
  for (int64_t first = 0; first < groups; first += kGroupsAtOnce) {
    multiply_unpacked_groups<kForm>(panels, rows, groups, first, std::min<int64_t>(groups, first + kGroupsAtOnce),
                                    results);
    for (int r = 0; r < kUnpackedRows; ++r)
      add_unpacked_spikes<kForm>(panels, rows + r * groups + first, first, results[r]);
  }
}
