// Single outputs of packed weights, as floats.

#pragma once

#include <algorithm>

#include "pack.hpp"

template <Form kForm>
void look_up(LookUp& call) {
  constexpr bool four = kForm == Form::kFour;
  const int64_t groups = (call.inputs + kGroup - 1) / kGroup;
  call.missing = 0;
  for (int64_t row = 0; row < call.rows; ++row) {
    if (call.ids[row] < 0 || call.ids[row] >= call.outputs) {
      ++call.missing;
      continue;
    }
    const int64_t first = call.ids[row] / kColumns * groups, column = call.ids[row] % kColumns;
    for (int64_t group = 0; group < groups; ++group) {
      const uint8_t* codes = call.codes + (first + group) * group_bytes(kForm) + 4 * column;
      const uint16_t* scales = call.scales + (first + group) * group_scales(kForm) + column;
      const float scale = whole(scales[0]), offset = four ? whole(scales[kColumns]) : 0.0f;
      alignas(64) float numbers[kGroup];
      for (int i = 0; i < kGroup; ++i) {
        const uint8_t both = codes[i / 4 % (four ? kSteps / 2 : kSteps) * kStepBytes + i % 4];
        numbers[i] = static_cast<float>(!four ? both - 128 : i < kGroup / 2 ? both & 15 : both >> 4);
      }
      // Rounded once, as when it was proven that the codes stand for the very weights.
      for (int i = 0; i < kGroup; i += kLanes)
        store(numbers + i, multiply_add(splat(scale), floats(numbers + i), splat(offset)));
      const int64_t count = std::min<int64_t>(kGroup, call.inputs - group * kGroup);
      std::memcpy(call.output + row * call.inputs + group * kGroup, numbers, count * sizeof(float));
    }
  }
}
