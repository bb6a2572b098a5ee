// Weights to codes and scales; packing.py says how they lie.

#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>

#include "stage.hpp"
#include "tile.hpp"

// To 16 bits, the nearest, ties to even; too large ones become infinite.
inline uint16_t half(float number) {
#if defined(__F16C__)
  return _cvtss_sh(number, 0);
#else
  uint32_t bits;
  std::memcpy(&bits, &number, sizeof bits);
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  const float size = std::fabs(number);
  if (!(size < 65520.0f)) return sign | (size == size ? 0x7c00u : 0x7e00u);
  if (size < 6.103515625e-05f)  // below 2^-14, in steps of 2^-24
    return sign | static_cast<uint16_t>(std::nearbyint(size * 16777216.0f));
  bits = (bits & 0x7fffffffu) + 0xfffu + (bits >> 13 & 1u);
  return sign | static_cast<uint16_t>((bits >> 13) - (112u << 10));
#endif
}

inline bool is_finite(uint16_t number) { return (number & 0x7c00u) != 0x7c00u; }

// A finite number as float16.
inline float whole(uint16_t number) {
  uint16_t numbers[kLanes] = {number};
  return halves(numbers)[0];
}

// A group's scale and offset, in 16 bits, and its codes as numbers.
struct Group {
  uint16_t scale, offset;
  alignas(64) int32_t codes[kGroup];
};

// The nearest codes for a group's scale and offset, of which the least may be; returns whether they stand for exactly
// these weights.
template <int kBits>
bool encode_weights(const float* weights, float least, Group& group) {
  const float scale = whole(group.scale), offset = kBits == 4 ? whole(group.offset) : 0.0f;
  const Floats magic = splat(12582912.0f), most_code = splat(kBits == 4 ? 15.0f : 127.0f), least_code = splat(least);
  Ints same = Ints{} - 1;
  for (int i = 0; i < kGroup; i += kLanes) {
    const Floats x = floats(weights + i);
    Floats code = scale != 0.0f ? (((x - offset) / scale) + magic) - magic : Floats{};
    code = where(code > most_code, most_code, where(code < least_code, least_code, code));
    same &= multiply_add(splat(scale), code, splat(offset)) == x;
    store(group.codes + i, __builtin_convertvector(code, Ints));
  }
  bool exact = true;
  for (int i = 0; i < kLanes; ++i) exact = exact && same[i];
  return exact;
}

// Puts a group's codes where they lie.
template <int kBits>
void put(const Group& group, uint8_t* codes, uint16_t* scales) {
  scales[0] = group.scale;
  if (kBits == 4) scales[kColumns] = group.offset;
  for (int i = 0; i < kGroup; ++i) {
    const int step = i / 4 % (kBits == 4 ? kSteps / 2 : kSteps), code = group.codes[i] + (kBits == 8 ? 128 : 0);
    uint8_t& place = codes[step * kStepBytes + i % 4];
    place = static_cast<uint8_t>(kBits == 4 && i >= kGroup / 2 ? place | code << 4 : code);
  }
}

// The least and the largest of a group's weights, and 0 if all are finite.
struct Extremes {
  float low, high, none;
};

inline Extremes extremes(const float* weights) {
  Floats least = floats(weights), most = least, sum = {};
  for (int i = 0; i < kGroup; i += kLanes) {
    const Floats x = floats(weights + i);
    most = larger(most, x);
    least = -larger(-least, -x);
    sum += x * 0.0f;
  }
  Extremes found{least[0], most[0], 0.0f};
  for (int i = 0; i < kLanes; ++i) {
    found.low = std::min(found.low, least[i]);
    found.high = std::max(found.high, most[i]);
    found.none += sum[i];
  }
  return found;
}

// A scale that is exact, if there is one although it doesn't reach the group's extremes: then they are a whole number
// of steps apart, whatever that is.
inline bool find_four(const float* weights, const Extremes& of, Group& group) {
  if (of.low == of.high) {
    for (const uint16_t offset : {half(0.0f), half(of.low)}) {
      group.offset = offset;
      for (int code = 1; code <= 15 && is_finite(offset); ++code) {
        group.scale = half((of.low - whole(offset)) / static_cast<float>(code));
        if (is_finite(group.scale) && encode_weights<4>(weights, 0.0f, group)) return true;
      }
    }
    return false;
  }
  // Either extreme may have the lowest code in use: scales may be negative.
  for (int lowest = 0; lowest < 15; ++lowest) {
    for (const bool upward : {true, false}) {
      const float from = upward ? of.low : of.high, to = upward ? of.high : of.low;
      for (int steps = 15 - lowest; steps > 0; --steps) {
        group.scale = half((to - from) / static_cast<float>(steps));
        if (!is_finite(group.scale)) break;
        group.offset = half(from - whole(group.scale) * static_cast<float>(lowest));
        if (is_finite(group.offset) && encode_weights<4>(weights, 0.0f, group)) return true;
      }
    }
  }
  return false;
}

inline bool find_eight(const float* weights, const Extremes& of, Group& group) {
  const float size = std::max(of.high, -of.low);
  for (int steps = 128; steps > 0; --steps) {
    // There is a code of -128, but none of 128.
    group.scale = half((steps == 128 && size == of.high ? -size : size) / static_cast<float>(steps));
    if (!is_finite(group.scale)) return false;
    if (encode_weights<8>(weights, -128.0f, group)) return true;
  }
  return false;
}

// One output's group; returns whether the codes stand for exactly these weights. If they need not, or cannot, they are
// the nearest ones for a scale that reaches the extremes.
template <int kBits>
bool pack_group(const float* weights, bool exactly, uint8_t* codes, uint16_t* scales, bool& finite) {
  const Extremes of = extremes(weights);
  Group group{};
  group.scale = half(kBits == 4 ? (of.high - of.low) / 15.0f : std::max(of.high, -of.low) / 127.0f);
  if (kBits == 4) group.offset = half(of.low);
  const bool known = std::isfinite(of.none);
  bool exact = encode_weights<kBits>(weights, kBits == 4 ? 0.0f : -127.0f, group);
  if (!exact && exactly) exact = known && (kBits == 4 ? find_four : find_eight)(weights, of, group);
  finite = finite && known && is_finite(group.scale) && is_finite(group.offset);
  put<kBits>(group, codes, scales);
  return exact;
}

struct Packing {
  const Pack& pack;
  std::atomic<int64_t> next{0};
  std::atomic<bool> exact{true}, finite{true};
};

// Takes panels until there are none.
template <int kBits>
void pack_panels(void* given) {
  constexpr Form kForm = kBits == 4 ? Form::kFour : Form::kEight;
  auto& packing = *static_cast<Packing*>(given);
  const Pack& pack = packing.pack;
  const int64_t groups = (pack.inputs + kGroup - 1) / kGroup;
  bool exact = true, finite = true;
  // One group is enough to tell that the whole is not exact.
  const auto in_vain = [&] { return pack.exactly && (!exact || !packing.exact.load(std::memory_order_relaxed)); };
  for (int64_t panel; (panel = packing.next.fetch_add(1, std::memory_order_relaxed)) * kColumns < pack.outputs;) {
    for (int64_t i = 0; i < groups * kColumns && !in_vain(); ++i) {
      const int64_t group = i % groups, column = i / groups;
      // Padding is never used: outputs beyond the last one, and the weights of inputs that are 0.
      const int64_t output = std::min(panel * kColumns + column, pack.outputs - 1);
      const int64_t count = std::min<int64_t>(kGroup, pack.inputs - group * kGroup);
      const float* from = pack.weights + output * pack.inputs + group * kGroup;
      alignas(64) float weights[kGroup];
      std::memcpy(weights, from, count * sizeof(float));
      // The last one again, which leaves a group's extremes as they are.
      std::fill(weights + count, weights + kGroup, from[count - 1]);
      uint8_t* codes = pack.codes + (panel * groups + group) * group_bytes(kForm) + 4 * column;
      uint16_t* scales = pack.scales + (panel * groups + group) * group_scales(kForm) + column;
      exact = pack_group<kBits>(weights, pack.exactly, codes, scales, finite) && exact;
    }
  }
  if (!exact) packing.exact = false;
  if (!finite) packing.finite = false;
}
