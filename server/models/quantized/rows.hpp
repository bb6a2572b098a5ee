// The processing of rows of floats before and after they are multiplied.

#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "matrix.hpp"
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

using FourBits __attribute__((vector_size(16))) = uint32_t;

// The sum of a vector's numbers, modulo 2^32.
inline uint32_t sum_of(Bits vector) {
  FourBits parts[kLanes / 4];
  std::memcpy(parts, &vector, sizeof vector);
  for (int i = 1; i < kLanes / 4; ++i) parts[0] += parts[i];
  const FourBits pairs = parts[0] + FourBits{parts[0][2], parts[0][3], parts[0][0], parts[0][1]};
  return pairs[0] + pairs[1];
}

// The last bytes of a group's numbers.
inline void last_bytes(const Bits (&numbers)[kGroup / kLanes], int8_t* bytes) {
#if defined(__AVX512F__)
  // Words, then bytes of each 128 bits: the first and the second vector's in turn.
  const __m512i words = _mm512_packus_epi32((__m512i)(numbers[0] & 255), (__m512i)(numbers[1] & 255));
  const __m512i all = _mm512_packus_epi16(words, words);
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 0, 0, 0, 0, 0, 0, 0, 0);
  store(bytes, _mm512_castsi512_si256(_mm512_permutexvar_epi32(order, all)));
#else
  uint32_t all[kGroup];
  std::memcpy(all, numbers, sizeof all);
  for (int i = 0; i < kGroup; ++i) bytes[i] = static_cast<int8_t>(all[i]);
#endif
}

constexpr int kBatch = 16;  // groups that are encoded together: a processor looks ahead over one or two of them

// Of each group of a batch.
struct alignas(64) Largest {
  int32_t bits[kBatch], place[kBatch];  // of the largest number's size but for the last bits, and where it is
  float first[kBatch], second[kBatch];  // the two largest by size, but for the last bits
};

inline void find_largest(const float* numbers, int64_t groups, Largest& largest) {
  for (int64_t group = 0; group < groups; ++group, numbers += kGroup) {
    // Bits of sizes are ordered as the sizes are; the last ones make room for the place.
    Ints most = {}, next = {};
    for (int i = 0; i < kGroup; i += kLanes) {
      const Ints size = ((Ints)floats(numbers + i) & (0x7fffffff - (kGroup - 1))) | (lanes() + i);
      next = larger(next, smaller(most, size));
      most = larger(most, size);
    }
    const auto [first, second] = two_largest(most, next);
    const uint32_t place = static_cast<uint32_t>(first) % kGroup;
    largest.bits[group] = first;
    largest.place[group] = static_cast<int32_t>(place);
    largest.first[group] = numbers[place];
    largest.second[group] = numbers[static_cast<uint32_t>(second) % kGroup];
  }
}

// How the groups of a batch are encoded. `apart` is -1 or 0.
struct alignas(64) Coding {
  float scale[kBatch], factor[kBatch], spike[kBatch];
  int32_t apart[kBatch], at[kBatch], upward[kBatch], coded_as_0[kBatch];
};

// Without branches: whether a number is apart is a toss for the processor.
inline void choose(const Largest& largest, Form form, Coding& coding) {
  const int later = code_steps(form), sizes = 0x7fffffff;
  for (int i = 0; i < kBatch; i += kLanes) {
    const Ints first = load<Ints>(largest.first + i), place = load<Ints>(largest.place + i);
    const auto top = (Floats)(first & sizes), rest = (Floats)(load<Ints>(largest.second + i) & sizes);
    const Ints finite = load<Ints>(largest.bits + i) < Ints{} + 0x7f800000, apart = (top > rest * kApart) & finite;
    const Ints step = place >> 2, half = (step >= Ints{} + later) & 1;
    const Floats scale = where(apart, rest, top) / 127.0f;
    store(coding.scale + i, where(finite, scale, splat(NAN)));
    // A scale so small that its inverse may be infinite counts as 0.
    store(coding.factor + i, where(scale >= splat(FLT_MIN), splat(1.0f) / scale, Floats{}));
    store(coding.spike + i, first & apart);
    store(coding.apart + i, apart);
    store(coding.at + i, (step - half * later) * kStepBytes & apart);
    store(coding.upward + i, (((place & 3) << 3) + (half << 2)) & apart);
    store(coding.coded_as_0 + i, place | ~apart);
  }
}

// Some groups, at most kBatch, to blocks: rounded to the nearest of 255 steps up to the largest that is not apart. A
// non-finite number makes the whole block NaN. Returns a bit for each that has a number apart.
inline uint32_t encode(const float* numbers, int64_t groups, Form form, Block* blocks) {
  Largest largest{};
  Coding coding;
  find_largest(numbers, groups, largest);
  choose(largest, form, coding);
  uint32_t spikes = 0;
  for (int64_t group = 0; group < groups; ++group, numbers += kGroup) {
    const Floats factor = splat(coding.factor[group]);
    const Floats magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds, and the last bits are the whole number's
    const Ints coded_as_0 = Ints{} + coding.coded_as_0[group];
    Bits sums = {}, wholes[kGroup / kLanes];
    for (int i = 0; i < kGroup / kLanes; ++i) {
      const Floats number = where(lanes() + i * kLanes == coded_as_0, Floats{}, floats(numbers + i * kLanes));
      wholes[i] = (Bits)(number * factor + magic);
      sums += wholes[i];
    }
    Block& block = blocks[group];
    last_bytes(wholes, block.codes);
    const auto sum = static_cast<int32_t>(sum_of(sums) - kGroup * 0x4b400000u);
    block.scale = coding.scale[group];
    block.sum = coding.scale[group] * static_cast<float>(sum);
    block.shift =
        static_cast<int32_t>(0u - 128u * static_cast<uint32_t>(sum));  // of a group that is not finite it wraps
    block.spike = coding.spike[group];
    block.at = static_cast<uint16_t>(coding.at[group]);
    block.upward = static_cast<uint16_t>(coding.upward[group]);
    block.spikes = 0;
    spikes |= static_cast<uint32_t>(coding.apart[group] & 1) << group;
  }
  return spikes;
}

// Some numbers where they lie, or, if they don't fill their groups, copied and filled up with zeros.
inline const float* filled_up(const float* from, int64_t count, float* copy) {
  if (count % kGroup == 0) return from;
  std::fill(std::copy(from, from + count, copy), copy + (count + kGroup - 1) / kGroup * kGroup, 0.0f);
  return copy;
}

// A row as a stage's product takes it: in blocks, or in bfloat16 for a matrix unit.
template <bool kInBlocks>
void prepare_row(const Stage& stage, int64_t row, Block* blocks) {
  constexpr int64_t numbers_at_once = kBatch * kGroup;
  const float* x = stage.input + row * stage.input_stride;
  const float inverse = stage.norm ? inverse_rms(x, stage.inputs, stage.epsilon) : 0.0f;
  const Form form = stage.bits == 8 ? Form::kEight : Form::kFour;
  for (int64_t begin = 0; begin < stage.inputs; begin += numbers_at_once) {
    alignas(64) float numbers[numbers_at_once], copy[numbers_at_once], other_copy[numbers_at_once];
    const int64_t count = std::min(numbers_at_once, stage.inputs - begin), groups = (count + kGroup - 1) / kGroup;
    const float* from = filled_up(x + begin, count, copy);
    if (stage.norm) {
      const float* weights = filled_up(stage.norm + begin, count, other_copy);
      for (int64_t i = 0; i < groups * kGroup; i += kLanes)
        store(numbers + i, floats(from + i) * inverse * floats(weights + i));
      from = numbers;
    } else if (stage.gated) {
      const float* others = filled_up(x + stage.inputs + begin, count, other_copy);
      for (int64_t i = 0; i < groups * kGroup; i += kLanes) {
        const Floats gate = floats(from + i);
        // Below -88 the divisor would be infinite, and the quotient -0.
        const Floats bounded = where(gate < splat(-80.0f), splat(-80.0f), gate);
        store(numbers + i, gate / (exponential(-bounded) + 1.0f) * floats(others + i));
      }
      from = numbers;
    }
    const int64_t group = begin / kGroup, at = group % kGroupsAtOnce;
#if defined(__AMX_BF16__)
    if constexpr (!kInBlocks) {
      to_bfloat16(from, groups, blocks + group * kMatrixRows);
      continue;
    }
#endif
    const uint32_t spikes = encode(from, groups, form, blocks + group);
    blocks[group - at].spikes |= spikes << at;
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
