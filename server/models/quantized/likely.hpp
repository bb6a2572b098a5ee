// The largest of a row's outputs, found while they are computed: none is written to memory and read again.

#pragma once

#include "codes.hpp"

// Of the outputs of a row that a thread has seen, for each lane the largest and its number; NaN once one was NaN.
struct Likely {
  Floats value = splat(-__builtin_inff());
  Ints output = Ints{} - 1;

  // Threads take panels in any order: of equal values the first output counts.
  void add(Floats values, Ints outputs) {
    const Ints more = (values > value) | ((values == value) & (outputs < output)) | (values != values);
    const Ints mask = more & (value == value);
    value = mask ? values : value;
    output = mask ? outputs : output;
  }

  // Those of another thread.
  void add(const Likely& other) { add(other.value, other.output); }

  // The output with the largest value, or -1 where that is infinite or a value is NaN.
  int64_t best() const {
    float most = value[0];
    int32_t found = output[0];
    for (int i = 0; i < kLanes; ++i) {
      if (value[i] != value[i]) return -1;
      if (value[i] > most || (value[i] == most && output[i] < found)) most = value[i], found = output[i];
    }
    return __builtin_isfinite(most) ? found : -1;
  }
};
