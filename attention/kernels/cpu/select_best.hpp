// The pages that score highest for a KV head, from the bounds of the query heads that share it.
//
// With a head's bounds as logits, softmax gives each page a share of its attention; a page's score is the logarithm
// of the sum of its shares, as a float.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "select_doubles.hpp"

// Smaller shares are too near to the end of double precision.
constexpr double kLeastShare = 1e-290;

// A score and its page's place as one whole number: the larger, the earlier it is selected. NaN comes
// first, so that it is selected and shows.
inline uint64_t rank(float score, int64_t place) {
  uint32_t bits;
  score += 0.0f;  // -0 becomes 0
  std::memcpy(&bits, &score, sizeof bits);
  bits = bits >> 31 ? ~bits : bits | 0x80000000u;
  if (score != score) bits = ~0u;
  return static_cast<uint64_t>(bits) << 32 | (0xffffffffu - static_cast<uint32_t>(place));
}

inline int64_t place_of(uint64_t rank) { return 0xffffffffu - static_cast<uint32_t>(rank); }

// Numbers of `scratch` that `best_pages` needs.
inline int64_t best_scratch(int64_t shared, int64_t stride) { return 3 * stride + 2 * shared; }

// The places of the `selected` best of `count` pages, ascending.
//
// bounds [heads, stride], stride a multiple of kDoubles and at least count; numbers after a head's `count` are
// overwritten.
inline void best_pages(double* bounds, int64_t heads, int64_t stride, int64_t count, int64_t selected, double* scratch,
                       int64_t* places) {
  double* shares = scratch;                                     // [stride]
  double* weights = shares + stride;                            // [stride]
  auto* ranks = reinterpret_cast<uint64_t*>(weights + stride);  // [stride]
  double* top = weights + 2 * stride;                           // [heads]
  double* total = top + heads;                                  // [heads]
  const int64_t padded = (count + kDoubles - 1) / kDoubles * kDoubles;
  std::fill_n(shares, padded, 0.0);
  for (int64_t h = 0; h < heads; ++h) {
    double* own = bounds + h * stride;
    std::fill(own + count, own + padded, -HUGE_VAL);
    Doubles most = doubles(own);
    for (int64_t i = 0; i < padded; i += kDoubles) {
      const Doubles bound = doubles(own + i);
      most = where(bound > most, bound, most);
    }
    top[h] = most[0];
    for (int i = 1; i < kDoubles; ++i) top[h] = std::max(top[h], most[i]);
    Doubles sum = {};
    for (int64_t i = 0; i < padded; i += kDoubles) {
      const Doubles weight = exponential(doubles(own + i) - top[h]);
      store(weights + i, weight);
      sum += weight;
    }
    total[h] = sum_of(sum);
    for (int64_t i = 0; i < padded; i += kDoubles)
      store(shares + i, doubles(shares + i) + doubles(weights + i) / total[h]);
  }
  for (int64_t i = 0; i < padded; i += kDoubles) store(weights + i, logarithm(doubles(shares + i)));
  for (int64_t i = 0; i < count; ++i) {
    double score = weights[i];
    if (!(shares[i] >= kLeastShare)) {  // or NaN
      double most = -HUGE_VAL, sum = 0;
      for (int64_t h = 0; h < heads; ++h) most = std::max(most, bounds[h * stride + i] - top[h] - std::log(total[h]));
      for (int64_t h = 0; h < heads; ++h) sum += std::exp(bounds[h * stride + i] - top[h] - std::log(total[h]) - most);
      score = most + std::log(sum);
    }
    ranks[i] = rank(static_cast<float>(score), i);
  }
  std::nth_element(ranks, ranks + selected, ranks + count, std::greater<uint64_t>());
  for (int64_t i = 0; i < selected; ++i) places[i] = place_of(ranks[i]);
  std::sort(places, places + selected);
}
