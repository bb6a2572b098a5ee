// Heads of some tokens in a dtype whose products need no further conversion.
//
// A product loads each number once per query, between sums that leave no register free. A dtype that is expensive to
// widen is therefore first converted to float16, for all heads of the tokens at once.

#pragma once

#include "float8.hpp"
#include "paged_heads.hpp"

// Tokens whose keys or values, of all heads, are computed with while the next ones are prefetched.
constexpr int kChunk = 32;

template <class Format>
struct Staged {
  using Working = Format;
  static constexpr float kUnit = 1.0f;  // the value of 1 in the working dtype
  static Heads<Working> stage(const Heads<Format>& chunk, int, int64_t, uint16_t*) { return chunk; }
};

template <>
struct Staged<Float8> {
  using Working = Float16;
  static constexpr float kUnit = Float8::kOfHalf;

  // `chunk` is the first of `heads` heads of `count` tokens; room [kChunk, heads, size].
  static Heads<Working> stage(const Heads<Float8>& chunk, int count, int64_t heads, uint16_t* room) {
    static constexpr int64_t kOrder[kChunk] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                               16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};
    const int64_t numbers = heads * chunk.size;
    for (int token = 0; token < count; ++token) Float8::halves(chunk[token], numbers, room + token * numbers);
    return {room, numbers, chunk.size, kOrder};
  }
};

// The scratch that staging needs, in floats.
inline size_t stage_scratch(const Call& call) {
  return kChunk * call.kv_heads * std::max(call.head_size, call.value_size) / 2;
}
