// The products of numbers of activations that are apart from their group.

#pragma once

#include "panel.hpp"

// Adds those of a row's next kGroupsAtOnce groups to its results; of all, it and the panels have `groups`.
template <Form kForm, int kCount, class Scale>
[[gnu::always_inline]] inline void add_spikes(const uint8_t* codes, const Scale* scales, const Block* row,
                                              int64_t groups, Floats (&results)[kCount]) {
  Floats own[kCount];
  for (int v = 0; v < kCount; ++v) own[v] = results[v];
  for (uint32_t left = row->spikes; left != 0; left &= left - 1) {
    const int64_t group = __builtin_ctz(left);
    const Block& block = row[group];
    const uint8_t* from = codes + group * group_bytes(kForm) + block.at;
    const Scale* factors = scales + group * group_scales(kForm);
    for (int v = 0; v < kCount; ++v) {
      const Bits code = load<Bits>(from + codes_of(kForm, v, groups)) >> block.upward;
      const Ints whole = (Ints)(kForm == Form::kFour ? code & 15u : (code & 255u) - 128u);
      const Scale* own_factors = factors + scales_of(kForm, v, groups);
      const Floats offset = kForm == Form::kFour ? widened(own_factors + kColumns) : Floats{};
      const Floats weight = multiply_add(widened(own_factors), __builtin_convertvector(whole, Floats), offset);
      own[v] = multiply_add(splat(block.spike), weight, own[v]);
    }
  }
  for (int v = 0; v < kCount; ++v) results[v] = own[v];
}
