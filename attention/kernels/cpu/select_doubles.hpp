// Double precision in vectors as wide as the processor's.

#pragma once

#include "lanes.hpp"

constexpr int kDoubles = kLanes / 2;

using Doubles __attribute__((vector_size(8 * kDoubles))) = double;
using Longs __attribute__((vector_size(8 * kDoubles))) = int64_t;
using HalfFloats __attribute__((vector_size(4 * kDoubles))) = float;

inline Doubles doubles(const double* from) { return load<Doubles>(from); }
inline Doubles every(double number) { return Doubles{} + number; }
inline Doubles where(Longs mask, Doubles yes, Doubles no) { return mask ? yes : no; }

inline double sum_of(Doubles vector) {
  double sum = 0;
  for (int i = 0; i < kDoubles; ++i) sum += vector[i];
  return sum;
}

inline Doubles widened(HalfFloats numbers) {
#if defined(__AVX512F__)
  return (Doubles)_mm512_cvtps_pd((__m256)numbers);
#elif defined(__AVX2__)
  return (Doubles)_mm256_cvtps_pd((__m128)numbers);
#else
  return __builtin_convertvector(numbers, Doubles);
#endif
}

// One half of a vector of floats.
template <int kHalf>
inline Doubles half(Floats vector) {
  HalfFloats parts[2];
  std::memcpy(parts, &vector, sizeof vector);
  return widened(parts[kHalf]);
}

// For x up to 0, relative error 3e-16; below -700, 0. NaN stays NaN.
inline Doubles exponential(Doubles x) {
  const Doubles magic = every(6755399441055744.0);  // 1.5 * 2^52: adding it rounds to whole numbers
  const Doubles shifted = x * 1.4426950408889634 + magic;
  const Doubles twos = shifted - magic;
  const Doubles rest = (x - twos * 6.93147180369123816490e-01) - twos * 1.90821492927058770002e-10;
  Doubles sum = every(1.0 / 6227020800.0);
  for (const double next : {1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0, 1.0 / 362880.0, 1.0 / 40320.0,
                            1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0})
    sum = sum * rest + next;
  const Longs power = (Longs)sum + (((Longs)shifted - (Longs)magic) << 52);
  return (Doubles)(power & ~(Longs)(x < -700.0));
}

// For normal positive x, error 3e-16, relative to the result or to 1.
inline Doubles logarithm(Doubles x) {
  // x is 2^twos times a number from sqrt(1/2) to sqrt(2).
  const Longs half = Longs{} + 0x3fe6a09e667f3bcdll;
  const Longs twos = ((Longs)x - half) >> 52;
  const auto mantissa = (Doubles)((Longs)x - (twos << 52));
  const Doubles ratio = (mantissa - 1.0) / (mantissa + 1.0), square = ratio * ratio;
  Doubles sum = every(1.0 / 23.0);
  for (const double odd : {21.0, 19.0, 17.0, 15.0, 13.0, 11.0, 9.0, 7.0, 5.0, 3.0, 1.0}) sum = sum * square + 1.0 / odd;
  return __builtin_convertvector(twos, Doubles) * 0.6931471805599453 + 2.0 * ratio * sum;
}
