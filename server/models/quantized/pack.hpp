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

// Of a finite number.
inline float whole(uint16_t number) {
  uint16_t numbers[kLanes] = {number};
  return halves(numbers)[0];
}

// One output's group; returns whether the codes stand for exactly these weights.
template <int kBits>
bool pack_group(const float* weights, uint8_t* codes, uint16_t* scales, bool& finite) {
  constexpr float kLeast = kBits == 4 ? 0.0f : -127.0f, kMost = kBits == 4 ? 15.0f : 127.0f;
  Floats least = floats(weights), most = least, sum = {};
  for (int i = 0; i < kGroup; i += kLanes) {
    const Floats x = floats(weights + i);
    most = larger(most, x);
    least = -larger(-least, -x);
    sum += x * 0.0f;
  }
  float low = least[0], high = most[0], none = 0.0f;
  for (int i = 0; i < kLanes; ++i) {
    low = std::min(low, least[i]);
    high = std::max(high, most[i]);
    none += sum[i];
  }
  if (kBits == 8) high = std::max(high, -low);
  scales[0] = half(kBits == 4 ? (high - low) / 15.0f : high / 127.0f);
  if (kBits == 4) scales[kColumns] = half(low);
  const float scale = whole(scales[0]), offset = kBits == 4 ? whole(scales[kColumns]) : 0.0f;
  finite = finite && std::isfinite(none) && is_finite(scales[0]) && (kBits == 8 || is_finite(scales[kColumns]));
  const Floats magic = splat(12582912.0f), most_code = splat(kMost), least_code = splat(kLeast);
  Ints same = Ints{} - 1;
  alignas(64) int32_t places[kGroup];
  for (int i = 0; i < kGroup; i += kLanes) {
    const Floats x = floats(weights + i);
    Floats code = scale > 0.0f ? (((x - offset) / scale) + magic) - magic : Floats{};
    code = where(code > most_code, most_code, where(code < least_code, least_code, code));
    same &= multiply_add(splat(scale), code, splat(offset)) == x;
    store(places + i, __builtin_convertvector(code, Ints) + (kBits == 8 ? 128 : 0));
  }
  for (int i = 0; i < kGroup; ++i) {
    const int step = i / 4 % (kBits == 4 ? kSteps / 2 : kSteps);
    uint8_t& place = codes[step * kStepBytes + i % 4];
    place = static_cast<uint8_t>(kBits == 4 && i >= kGroup / 2 ? place | places[i] << 4 : places[i]);
  }
  bool exact = true;
  for (int i = 0; i < kLanes; ++i) exact = exact && same[i];
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
  for (int64_t panel; (panel = packing.next.fetch_add(1, std::memory_order_relaxed)) * kColumns < pack.outputs;) {
    for (int64_t i = 0; i < groups * kColumns; ++i) {
      const int64_t group = i % groups, column = i / groups;
      // What fills up is never used: outputs beyond the last one, and the weights of inputs that are 0.
      const int64_t output = std::min(panel * kColumns + column, pack.outputs - 1);
      const int64_t count = std::min<int64_t>(kGroup, pack.inputs - group * kGroup);
      const float* from = pack.weights + output * pack.inputs + group * kGroup;
      alignas(64) float weights[kGroup];
      std::memcpy(weights, from, count * sizeof(float));
      // The last one again, which leaves a group's extremes as they are.
      std::fill(weights + count, weights + kGroup, from[count - 1]);
      uint8_t* codes = pack.codes + (panel * groups + group) * group_bytes(kForm) + 4 * column;
      uint16_t* scales = pack.scales + (panel * groups + group) * group_scales(kForm) + column;
      exact = pack_group<kBits>(weights, codes, scales, finite) && exact;
    }
  }
  if (!exact) packing.exact = false;
  if (!finite) packing.finite = false;
}
