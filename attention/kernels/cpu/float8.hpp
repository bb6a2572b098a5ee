// The dtype float8_e4m3.
//
// Open Compute Project: 8-bit Floating Point Specification, revision 1.0, 2023: E4M3.

#pragma once

#include "lanes.hpp"

using Bytes __attribute__((vector_size(kLanes))) = uint8_t;

// A sign, 4 bits of exponent with a bias of 7, 3 of mantissa. All ones after the sign are NaN; there are no infinities.
// In float16, whose bias is 15, the same bits are 2^-8 times the number, also for subnormal ones.
struct Float8 {
  using Number = uint8_t;
  using Lanes = Float16::Lanes;
  static constexpr float kOfHalf = 256.0f;
  static constexpr int place(int i) { return Float16::place(i); }
  static void halves(const uint8_t* from, int64_t count, uint16_t* to) {
    int64_t i = 0;
#if defined(__AVX2__)
    // Looks for the largest code without its sign: NaN is rare, so it is handled afterwards.
    __m256i most = _mm256_setzero_si256();
    for (; i + 32 <= count; i += 32) {
      const auto codes = load<__m256i>(from + i);
      most = _mm256_max_epu8(most, _mm256_add_epi8(codes, codes));
      for (int64_t half = i; half < i + 32; half += 16) {
        const __m256i wide = _mm256_cvtepi8_epi16(load<__m128i>(from + half));
        store(to + half, _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(static_cast<short>(0xbf80))));
      }
    }
    if (_mm256_movemask_epi8(_mm256_cmpeq_epi8(most, _mm256_set1_epi8(static_cast<char>(0xfe))))) i = 0;
#endif
    for (; i < count; ++i) {
      const int bits = (static_cast<int8_t>(from[i]) * 0x80) & 0xbf80;
      to[i] = static_cast<uint16_t>(bits | ((bits + 0x80) & 0x4000));  // after all ones, the exponent's first bit
    }
  }
  static Lanes widen(const uint8_t* from) {
    uint16_t block[kBlock];
    halves(from, kBlock, block);
    const Lanes lanes = Float16::widen(block);
    return {lanes.first * kOfHalf, lanes.second * kOfHalf};
  }
  static Bytes cast(Floats numbers) {
    const Bits bits = (Bits)numbers, magnitude = bits & 0x7fffffffu;
    const Bits normal = ((magnitude + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20) - (120u << 3);
    // Below 2^-6: adding 2^14 leaves steps of 2^-9.
    const Bits small = (Bits)((Floats)magnitude + 16384.0f) - 0x46800000u;
    const Bits finite = magnitude < 0x3c800000u ? small : normal;
    const Bits result = magnitude > 0x43e80000u ? Bits{} + 0x7fu : finite;  // 464 is the largest that rounds to 448
    return __builtin_convertvector(result | (bits >> 24 & 0x80u), Bytes);
  }
};
