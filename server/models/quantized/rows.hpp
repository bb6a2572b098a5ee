// The processing of rows of floats before and after they are multiplied.

#pragma once

#include <algorithm>
#include <cfloat>
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

using FourInts __attribute__((vector_size(16))) = int32_t;

struct TwoLargest {
  int32_t first, second;
};

// Of all lanes; `next` has the second largest of each lane.
inline TwoLargest two_largest(Ints most, Ints next) {
  FourInts firsts[kLanes / 4], seconds[kLanes / 4];
  std::memcpy(firsts, &most, sizeof most);
  std::memcpy(seconds, &next, sizeof next);
  FourInts first = firsts[0], second = seconds[0];
  const auto join = [&](FourInts other, FourInts others_second) {
    const FourInts lesser = first > other ? other : first;
    first = first > other ? first : other;
    second = second > others_second ? second : others_second;
    second = second > lesser ? second : lesser;
  };
  for (int i = 1; i < kLanes / 4; ++i) join(firsts[i], seconds[i]);
  join(FourInts{first[2], first[3], first[0], first[1]}, FourInts{second[2], second[3], second[0], second[1]});
  join(FourInts{first[1], first[0], first[3], first[2]}, FourInts{second[1], second[0], second[3], second[2]});
  return {first[0], second[0]};
}

constexpr float kApart = 2.0f;  // how many times the second largest of a group the largest must be to be apart

// kGroup numbers to a block: rounded to the nearest of 255 steps up to the largest that is not apart. A non-finite
// // number makes the whole block NaN.
inline void encode(const float* numbers, int64_t bits, Block& block) {
  // Bits of sizes are ordered as the sizes are; the last ones make room for the place.
  Ints most = {}, next = {};
  for (int i = 0; i < kGroup; i += kLanes) {
    const Ints size = ((Ints)floats(numbers + i) & (0x7fffffff - (kGroup - 1))) | (lanes() + i);
    next = larger(next, smaller(most, size));
    most = larger(most, size);
  }
  const auto [first, second] = two_largest(most, next);
  block = {};
  if (first >= 0x7f800000) {
    block.scale = block.sum = NAN;
    return;
  }
  const int32_t place = first % kGroup;
  const float rest = std::fabs(numbers[second % kGroup]);
  const float top = std::fabs(numbers[place]);
  const bool apart = top > kApart * rest;
  if (apart) {
    block.spike = numbers[place];
    const int steps = code_steps(bits == 8 ? Form::kEight : Form::kFour), step = place / 4;
    block.at = static_cast<uint16_t>(step % steps * kStepBytes);
    block.upward = static_cast<uint16_t>(place % 4 * 8 + step / steps * 4);
  }
  const int32_t coded_as_0 = apart ? place : kGroup;
  const float scale = (apart ? rest : top) / 127.0f;
  // A scale so small that its inverse may be infinite counts as 0.
  const Floats factor = splat(scale >= FLT_MIN ? 1.0f / scale : 0.0f), magic = splat(12582912.0f);
  Ints sums = {};
  alignas(64) int32_t codes[kGroup];
  for (int i = 0; i < kGroup; i += kLanes) {
    const Floats number = where(lanes() + i == coded_as_0, Floats{}, floats(numbers + i));
    const Floats whole = (number * factor + magic) - magic;
    sums += __builtin_convertvector(whole, Ints);
    store(codes + i, __builtin_convertvector(whole, Ints));
  }
  for (int i = 0; i < kGroup; ++i) block.codes[i] = static_cast<int8_t>(codes[i]);
  int32_t sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += sums[i];
  block.scale = scale;
  block.sum = scale * static_cast<float>(sum);
  block.shift = -128 * sum;
}

// A group of numbers where it lies, or, if some are missing, copied and filled up with zeros.
inline const float* filled_up(const float* from, int64_t count, float* copy) {
  if (count == kGroup) return from;
  std::fill(std::copy(from, from + count, copy), copy + kGroup, 0.0f);
  return copy;
}

// A row as a stage's product takes it.
inline void prepare_row(const Stage& stage, int64_t row, Block* blocks) {
  const float* x = stage.input + row * stage.input_stride;
  const float inverse = stage.norm ? inverse_rms(x, stage.inputs, stage.epsilon) : 0.0f;
  for (int64_t begin = 0; begin < stage.inputs; begin += kGroup) {
    alignas(64) float numbers[kGroup], copy[kGroup], other_copy[kGroup];
    const int64_t count = std::min<int64_t>(kGroup, stage.inputs - begin);
    const float* from = filled_up(x + begin, count, copy);
    if (stage.norm) {
      const float* weights = filled_up(stage.norm + begin, count, other_copy);
      for (int i = 0; i < kGroup; i += kLanes) store(numbers + i, floats(from + i) * inverse * floats(weights + i));
      from = numbers;
    } else if (stage.gated) {
      const float* others = filled_up(x + stage.inputs + begin, count, other_copy);
      for (int i = 0; i < kGroup; i += kLanes) {
        const Floats gate = floats(from + i);
        // Below -88 the divisor would be infinite, and the quotient -0.
        const Floats bounded = where(gate < splat(-80.0f), splat(-80.0f), gate);
        store(numbers + i, gate / (exponential(-bounded) + 1.0f) * floats(others + i));
      }
      from = numbers;
    }
    const int64_t group = begin / kGroup, at = group % kGroupsAtOnce;
    encode(from, stage.bits, blocks[group]);
    if (blocks[group].spike != 0.0f) blocks[group - at].spikes |= 1u << at;
  }
}

// Norms of the heads of a row, where there are any, and rotary embedding of halves.
inline void rotate_row(const Stage& stage, int64_t row) {
  const int64_t size = stage.head_size, half = size / 2;
  const int64_t position = stage.positions ? stage.positions[row] : row;
  const float *cosines = stage.cosines + position * size, *sines = stage.sines + position * size;
  for (int64_t head = 0; head < stage.query_heads + stage.kv_heads; ++head) {
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
