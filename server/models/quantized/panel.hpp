// How rows of activations and panels of weights lie in memory.

#pragma once

#include "codes.hpp"

constexpr int kGroupsAtOnce = 32;  // whose sums are kept in the first cache before they are scaled

// Activations of one row and group: codes, and what brings them back to floats. The largest of a group may be so
// far above the others that its scale would make them coarse: then it is apart, and its code is 0.
struct alignas(64) Block {
  int8_t codes[kGroup];
  float scale;
  float sum;        // of all codes, times the scale
  int32_t shift;    // what takes the 128 off weights' codes of 8 bits: -128 times the sum of these codes
  float spike;      // the number that is apart, or 0
  uint16_t at;      // where a panel has weights for that number: bytes in a group's codes,
  uint16_t upward;  // and bits
  uint32_t spikes;  // in the first of kGroupsAtOnce blocks: a bit for each of them that has a spike
};

// How a panel's codes lie, for each group: 4 bits, where a byte's low half belongs to the group's first half
// of inputs and its high half to the other; 8 bits.
enum class Form : uint8_t { kFour, kEight };

constexpr int code_bits(Form form) { return form == Form::kFour ? 4 : 8; }

// How many vectors' worth of codes a group has for each vector of outputs.
constexpr int code_steps(Form form) { return form == Form::kFour ? kSteps / 2 : kSteps; }

constexpr int64_t group_bytes(Form form) { return code_steps(form) * kStepBytes; }

// Scales of a panel and group, in 16 bits; those of 4 bits are followed by offsets.
constexpr int64_t group_scales(Form form) { return form == Form::kEight ? kColumns : 2 * kColumns; }

// Where a vector of outputs lies, of panels that follow each other and have so many groups: bytes from the first one's
// codes, and numbers from its scales.
constexpr int64_t codes_of(Form form, int vector, int64_t groups) {
  return vector / kVectors * groups * group_bytes(form) + vector % kVectors * int64_t{sizeof(Codes)};
}
constexpr int64_t scales_of(Form form, int vector, int64_t groups) {
  return vector / kVectors * groups * group_scales(form) + vector % kVectors * int64_t{kLanes};
}

// Scales are those in 16 bits, or floats made of them.
inline Floats widened(const uint16_t* scales) { return halves(scales); }
inline Floats widened(const float* scales) { return floats(scales); }
