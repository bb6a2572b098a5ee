// Writes keys and values of new tokens to their pages, `cast` to the cache's dtype.

#pragma once

#include "lanes.hpp"

// Rows of a step; calls.py builds it. Strides are in numbers.
struct Write {
  const float* key;      // [rows, kv_heads, head_size]
  const float* value;    // [rows, kv_heads, value_size]
  void* keys;            // [slots, kv_heads, head_size]
  void* values;          // [slots, kv_heads, value_size]
  const int64_t* slots;  // [rows]
  int64_t rows, key_stride, value_stride;
  int64_t key_numbers, value_numbers;  // of a row
  int64_t dtype;                       // as in Call
};

template <class Format>
void write_rows(const Write& write) {
  using Number = typename Format::Number;
  const auto copy = [](const float* from, void* pages, int64_t row, int64_t count) {
    Number* to = static_cast<Number*>(pages) + row * count;
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(to + i, Format::cast(floats(from + i)));
    if (i < count) {
      const auto rest = Format::cast(floats(Rest<Float32>(from + i, count - i).numbers));
      std::memcpy(to + i, &rest, (count - i) * sizeof(Number));
    }
  };
  for (int64_t row = 0; row < write.rows; ++row) {
    copy(write.key + row * write.key_stride, write.keys, write.slots[row], write.key_numbers);
    copy(write.value + row * write.value_stride, write.values, write.slots[row], write.value_numbers);
  }
}
