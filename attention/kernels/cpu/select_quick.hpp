// The pages that score highest, in single precision where that surely selects the same pages as double precision.
//
// The largest error of a score in single precision is known. If the gap between the last page selected and the first
// one not selected is larger, both precisions select the same pages, single precision in half the time or less. Else,
// as with similar pages, with numbers that are too large or with NaN, there is no result.

#pragma once

#include <algorithm>
#include <cmath>

#include "lanes.hpp"

constexpr double kRounding = 0x1p-24;  // the largest relative error of one operation in single precision

// Smaller shares of attention are too near to where single precision ends.
constexpr float kLeastQuickShare = 0x1p-100f;

// The length of the longest of some query heads, in double precision.
inline double longest(const float* query, int64_t heads, int64_t stride, int64_t size) {
  double most = 0;
  for (int64_t h = 0; h < heads; ++h, query += stride) {
    double squares = 0;
    for (int64_t d = 0; d < size; ++d) squares += static_cast<double>(query[d]) * query[d];
    most = std::max(most, squares);
  }
  return std::sqrt(most);
}

// The largest error of the difference between the logarithms of two pages' shares.
//
// A bound is a chain of sums in each lane, a sum across lanes and a product; its error is that many roundings of the
// sum of all products' absolute values, which is at most the product of two lengths (Cauchy-Schwarz): `reach`. A weight
// is 2 to the power of a number of at most 127, which three roundings make, and of which power_of_two gives 2e-7. Their
// total and the shares are plain sums.
inline double doubt(double reach, int64_t size, int64_t heads, int64_t count) {
  const int64_t chain = 2 * ((size + kLanes - 1) / kLanes + 2);
  const double bound = 1.01 * static_cast<double>(chain + kLanes + 2) * kRounding * reach;
  const double weight = 3 * 127 * kRounding + 2e-7;
  const int64_t additions = count / kLanes + kLanes + heads + 8;
  const double sums = static_cast<double>(additions) * kRounding;
  const double score = 0x1p-17;  // the rounding error of a score of -70 or more as a float
  return 2 * (2 * bound + 2 * weight + sums) + score;
}

// Numbers of `scratch` that `surely_best` needs.
inline int64_t quick_scratch(int64_t stride) { return 3 * stride; }

// The places of the `selected` best of `count` pages, ascending; false if single precision cannot tell.
//
// bounds [heads + 1, stride], stride a multiple of kLanes and at least count: the last row are norms; numbers after a
// head's `count` are overwritten. `reach` is the longest query's length times the scale.
inline bool surely_best(float* bounds, int64_t heads, int64_t stride, int64_t count, int64_t selected, int64_t size,
                        double reach, float* scratch, int64_t* places) {
  float *shares = scratch, *weights = shares + stride, *sorted = weights + stride;  // [stride] each
  const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
  std::fill_n(shares, padded, 0.0f);
  for (int64_t h = 0; h < heads; ++h) {
    float* own = bounds + h * stride;
    std::fill(own + count, own + padded, -HUGE_VALF);
    Floats most = floats(own);
    for (int64_t i = 0; i < padded; i += kLanes) most = larger(floats(own + i), most);
    const float top = largest_of(most);
    Floats sum = {};
    for (int64_t i = 0; i < padded; i += kLanes) {
      const Floats weight = power_of_two((floats(own + i) - top) * kLog2E);
      store(weights + i, weight);
      sum += weight;
    }
    const float total = sum_of(sum);
    if (!std::isfinite(total)) return false;
    for (int64_t i = 0; i < padded; i += kLanes)
      store(shares + i, floats(shares + i) + floats(weights + i) * (1.0f / total));
  }
  const float* norms = bounds + heads * stride;
  // Squares may have underflowed.
  const double norm = std::sqrt(*std::max_element(norms, norms + count) + static_cast<double>(size) * 0x1p-124);
  std::copy_n(shares, count, sorted);
  std::nth_element(sorted, sorted + selected, sorted + count, [](float a, float b) { return a > b; });
  const float last = *std::min_element(sorted, sorted + selected), next = sorted[selected];
  if (!(next >= kLeastQuickShare && last > next * std::exp(doubt(reach * norm, size, heads, count)))) return false;
  for (int64_t i = 0; i < count; ++i)
    if (shares[i] > next) *places++ = i;
  return true;
}
