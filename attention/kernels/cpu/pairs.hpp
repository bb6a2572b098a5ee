// Pairs of 16-bit integers in lanes of 32 bits, and the processor's products of them.
//
// Every x86-64 processor has these, and multiplies twice as many of them at once as floats or more. AArch64 does not.

#pragma once

#include "lanes.hpp"

#if defined(__SSE2__)
#include <immintrin.h>
constexpr bool kPairProducts = true;
#else
constexpr bool kPairProducts = false;
#endif

// The largest of these integers.
constexpr float kLargestInteger = 32767.0f;

inline Floats converted(Ints integers) { return __builtin_convertvector(integers, Floats); }

// Each lane has the integers nearest to those of `low` and `high`, and any for NaN and infinity.
inline Ints paired(Floats low, Floats high) {
  const Floats magic = splat(12582912.0f);  // 1.5 * 2^23: a sum's low half is the nearest integer
  return (Ints)(((Bits)(low + magic) & 0xffffu) | (Bits)(high + magic) << 16);
}

#if defined(__SSE2__)
// sum + the products of both integers of each pair.
inline Ints add_products(Ints sum, Ints a, Ints b) {
#if defined(__AVX512VNNI__)
  return (Ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
  return sum + (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVXVNNI__)
  return (Ints)_mm256_dpwssd_avx_epi32((__m256i)sum, (__m256i)a, (__m256i)b);
#elif defined(__AVX2__)
  return sum + (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
  return sum + (Ints)_mm_madd_epi16((__m128i)a, (__m128i)b);
#endif
}
#endif
