// What happens to rows of floats before and after they are multiplied.

#pragma once

#include <algorithm>
#include <cmath>

#include "stage.hpp"
#include "tile.hpp"

// The sum of a vector's numbers, always in the same order.
inline float total(Floats vector) {
  float sum = 0.0f;
  for (int i = 0; i < kLanes; ++i) sum += vector[i];
  return sum;
}

inline float inverse_rms(const float* row, int64_t count, double epsilon) {
  Floats squares = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) squares = multiply_add(floats(row + i), floats(row + i), squares);
  float sum = total(squares);
  for (; i < count; ++i) sum += row[i] * row[i];
  return 1.0f / std::sqrt(sum / static_cast<float>(count) + static_cast<float>(epsilon));
}

inline Ints larger(Ints a, Ints b) { return a > b ? a : b; }
inline Ints smaller(Ints a, Ints b) { return a > b ? b : a; }

// Lane numbers.
inline Ints lanes() {
  Ints number = {};
  for (int i = 0; i < kLanes; ++i) number[i] = i;
  return number;
}

// kGroup numbers to a block. All but the largest are rounded to the nearest of 255 steps up to the second
// largest, the largest to multiples of the same step. What is no number makes the whole block none.
inline void encode(const float* numbers, Block& block) {
  // Bits of sizes are ordered as the sizes are; the last ones make room for the place.
  Ints most = {}, next = {};
  for (int i = 0; i < kGroup; i += kLanes) {
    const Ints size = ((Ints)floats(numbers + i) & (0x7fffffff - (kGroup - 1))) | (lanes() + i);
    next = larger(next, smaller(most, size));
    most = larger(most, size);
  }
  int32_t first = 0, second = 0;
  for (int i = 0; i < kLanes; ++i) {
    second = std::max({second, next[i], std::min(first, most[i])});
    first = std::max(first, most[i]);
  }
  if (first >= 0x7f800000) {
    block = {};
    block.scale = block.sum = NAN;
    return;
  }
  const int32_t spike = first % kGroup;
  const float top = std::fabs(numbers[spike]);
  const float scale = std::max(std::fabs(numbers[second % kGroup]) / 127.0f, top / (127.0f * kSpike));
  const Floats factor = even(scale > 0.0f ? 1.0f / scale : 0.0f), magic = even(12582912.0f);
  Ints sums = {};
  alignas(64) int32_t codes[kGroup];
  for (int i = 0; i < kGroup; i += kLanes) {
    const Floats whole = (floats(numbers + i) * factor + magic) - magic;
    sums += __builtin_convertvector(whole, Ints);
    store(codes + i, __builtin_convertvector(whole, Ints));
  }
  for (int i = 0; i < kGroup; ++i) block.codes[i] = static_cast<int8_t>(codes[i]);
  int32_t sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += sums[i];
  const int32_t code = codes[spike];
  const int32_t times = (code + (code < 0 ? -kSpike / 2 : kSpike / 2)) / kSpike;
  block.codes[spike] = static_cast<int8_t>(code - kSpike * times);
  std::memset(block.spike, 0, sizeof block.spike);
  block.spike[spike % 4] = static_cast<int8_t>(times);
  block.spike_at = static_cast<uint32_t>(spike / 4 * kStepBytes);
  block.scale = scale;
  block.sum = scale * static_cast<float>(sum);
  block.shift = -128 * sum;
}

// At most kGroup numbers; with a count that is known, copies are a few instructions.
inline void take(float* to, const float* from, int64_t count) {
  std::memcpy(to, from, (count == kGroup ? kGroup : count) * sizeof(float));
}

// A row as a stage's product takes it.
inline void prepare_row(const Stage& stage, int64_t row, Block* blocks) {
  const float* x = stage.input + row * stage.input_stride;
  const float inverse = stage.norm ? inverse_rms(x, stage.inputs, stage.epsilon) : 0.0f;
  for (int64_t begin = 0; begin < stage.inputs; begin += kGroup) {
    alignas(64) float numbers[kGroup] = {}, others[kGroup] = {};
    const int64_t count = std::min<int64_t>(kGroup, stage.inputs - begin);
    take(numbers, x + begin, count);
    if (stage.norm) {
      take(others, stage.norm + begin, count);
      for (int i = 0; i < kGroup; i += kLanes)
        store(numbers + i, floats(numbers + i) * inverse * floats(others + i));
    } else if (stage.gated) {
      take(others, x + stage.inputs + begin, count);
      for (int i = 0; i < kGroup; i += kLanes) {
        const Floats gate = floats(numbers + i);
        // Below -88 the divisor would be infinite, and the quotient -0.
        const Floats bounded = where(gate < splat(-80.0f), splat(-80.0f), gate);
        store(numbers + i, gate / (exponential(-bounded) + 1.0f) * floats(others + i));
      }
    }
    encode(numbers, *blocks++);
  }
}

// Norms of the heads of a row, where there are any, and rotary embedding of halves.
inline void rotate_row(const Stage& stage, int64_t row) {
  const int64_t size = stage.head_size, half = size / 2;
  const float *cosines = stage.cosines + row * size, *sines = stage.sines + row * size;
  for (int64_t head = 0; head < stage.query_heads + stage.key_heads; ++head) {
    float* x = stage.output + row * stage.output_stride + head * size;
    const float* norm = head < stage.query_heads ? stage.query_norm : stage.key_norm;
    if (norm) {
      const float inverse = inverse_rms(x, size, stage.head_epsilon);
      for (int64_t i = 0; i < size; ++i) x[i] *= inverse * norm[i];
    }
    for (int64_t i = 0; i < half; ++i) {
      const float first = x[i], second = x[half + i];
      x[i] = first * cosines[i] - second * sines[i];
      x[half + i] = second * cosines[half + i] + first * sines[half + i];
    }
  }
}
