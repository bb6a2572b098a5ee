// Squares of kLanes by kLanes numbers, transposed.

#pragma once

#include <utility>

#include "lanes.hpp"

// The numbers of `a` and `b` in turn, from lane kFrom of each.
template <int kFrom, size_t... kLane>
inline Floats in_turn(Floats a, Floats b, std::index_sequence<kLane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (kLane % 2 * kLanes + kFrom + kLane / 2)...);
#else
  return __builtin_shuffle(a, b, Ints{(kLane % 2 * kLanes + kFrom + kLane / 2)...});
#endif
}

inline void transpose(Floats (&square)[kLanes]) {
  using Each = std::make_index_sequence<kLanes>;
#pragma GCC unroll 4
  for (int step = 1; step < kLanes; step *= 2) {
    Floats next[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = in_turn<0>(square[i], square[i + kLanes / 2], Each());
      next[2 * i + 1] = in_turn<kLanes / 2>(square[i], square[i + kLanes / 2], Each());
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) square[i] = next[i];
  }
}

// The square whose rows lie `stride` numbers apart, transposed.
inline void load_transposed(const float* from, int64_t stride, Floats (&square)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) square[i] = floats(from + i * stride);
  transpose(square);
}
