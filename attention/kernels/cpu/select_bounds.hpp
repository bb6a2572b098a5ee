// What a query head's product with any key of a page is at most, from the page's digest.
//
// Tang et al.: Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference, 2024, section 3.4. Products of
// two floats are exact in double precision, and sums are rounded to floats in the end: their order does not show.

#pragma once

#include <algorithm>
#include <type_traits>

#include "select_call.hpp"
#include "select_doubles.hpp"

// Query heads and pages whose sums stay in registers, beside what they are made from.
constexpr int kHeadsAtOnce = kRegisters == 32 ? 4 : 3;
constexpr int kPagesAtOnce = kRegisters == 32 ? 4 : 3;

// Numbers of a packed query head: its negative numbers and zeros for others, its positive ones and zeros.
inline int64_t packed_size(int64_t head_size) { return 2 * ((head_size + kBlock - 1) / kBlock * kBlock); }

// The larger product is with the largest key number where the query's is positive, else with the smallest.
template <class Format>
void pack_head(const float* query, int64_t size, double* packed) {
  const int64_t whole = packed_size(size) / 2;
  for (int64_t d = 0; d < whole; ++d) {
    const int64_t place = d / kBlock * kBlock + Format::place(static_cast<int>(d % kBlock));
    const double number = place < size ? query[place] : 0.0;
    packed[d] = number > 0 ? 0.0 : number;
    packed[whole + d] = number < 0 ? 0.0 : number;
  }
}

// The smallest and the largest key numbers of one head in a page.
template <class Format>
struct Extremes {
  const typename Format::Number *least, *most;
};

// bounds [H, stride]: of H heads and the pages from..from + kPagesAtOnce - 1, all of which there must be room for.
template <class Format, int H, bool kRest>
void bound_heads(const double* packed, const Extremes<Format> (&pages)[kPagesAtOnce], int64_t size, double scale,
                 double* bounds, int64_t stride) {
  using Number = typename Format::Number;
  const int64_t whole = size / kBlock * kBlock, rounded = packed_size(size) / 2;
  Doubles sum[H][kPagesAtOnce] = {};
  const auto multiply = [&](const Doubles (&keys)[kPagesAtOnce], const double* query) {
    for (int h = 0; h < H; ++h) {
      const Doubles numbers = doubles(query + 2 * h * rounded);
      for (int p = 0; p < kPagesAtOnce; ++p) sum[h][p] += keys[p] * numbers;
    }
  };
  const auto add = [&](const Number* const (&from)[kPagesAtOnce], const double* query) {
    Floats first[kPagesAtOnce], second[kPagesAtOnce];
    Doubles keys[kPagesAtOnce];
    for (int p = 0; p < kPagesAtOnce; ++p) {
      const auto lanes = Format::widen(from[p]);
      first[p] = lanes.first;
      second[p] = lanes.second;
    }
    for (int p = 0; p < kPagesAtOnce; ++p) keys[p] = half<0>(first[p]);
    multiply(keys, query);
    for (int p = 0; p < kPagesAtOnce; ++p) keys[p] = half<1>(first[p]);
    multiply(keys, query + kDoubles);
    for (int p = 0; p < kPagesAtOnce; ++p) keys[p] = half<0>(second[p]);
    multiply(keys, query + 2 * kDoubles);
    for (int p = 0; p < kPagesAtOnce; ++p) keys[p] = half<1>(second[p]);
    multiply(keys, query + 3 * kDoubles);
  };
  for (int64_t d = 0; d < whole; d += kBlock) {
    const Number *least[kPagesAtOnce], *most[kPagesAtOnce];
    for (int p = 0; p < kPagesAtOnce; ++p) {
      least[p] = pages[p].least + d;
      most[p] = pages[p].most + d;
    }
    add(least, packed + d);
    add(most, packed + rounded + d);
  }
  if (kRest) {
    Number numbers[2][kPagesAtOnce][kBlock] = {};
    const Number *least[kPagesAtOnce], *most[kPagesAtOnce];
    for (int p = 0; p < kPagesAtOnce; ++p) {
      std::memcpy(numbers[0][p], pages[p].least + whole, (size - whole) * sizeof(Number));
      std::memcpy(numbers[1][p], pages[p].most + whole, (size - whole) * sizeof(Number));
      least[p] = numbers[0][p];
      most[p] = numbers[1][p];
    }
    add(least, packed + whole);
    add(most, packed + rounded + whole);
  }
  for (int h = 0; h < H; ++h)
    for (int p = 0; p < kPagesAtOnce; ++p) bounds[h * stride + p] = sum_of(sum[h][p]) * scale;
}

// bounds [shared, stride]: of the query heads that share `head`, and `count` pages; room for kPagesAtOnce - 1 more is
// written, too.
template <class Format>
void bound_pages(const Selection& call, int64_t entry, int64_t head, const int32_t* pages, int64_t count,
                 double* packed, double* bounds, int64_t stride) {
  using Number = typename Format::Number;
  const int64_t shared = call.shared(), size = call.head_size, head_numbers = packed_size(size);
  const float* query = call.query + call.rows[entry] * call.row_stride + head * shared * call.head_stride;
  for (int64_t h = 0; h < shared; ++h)
    pack_head<Format>(query + h * call.head_stride, size, packed + h * head_numbers);
  const bool rest = size % kBlock > 0;
  const auto extremes = [&](int64_t page) {
    const Number* least = static_cast<const Number*>(call.digest) +
                          (2 * pages[std::min(page, count - 1)] * call.kv_heads + head) * size;
    return Extremes<Format>{least, least + call.kv_heads * size};
  };
  for (int64_t page = 0; page < count; page += kPagesAtOnce) {
    Extremes<Format> together[kPagesAtOnce];
    for (int p = 0; p < kPagesAtOnce; ++p) {
      together[p] = extremes(page + p);
      const auto coming = extremes(page + p + 2 * kPagesAtOnce);
      for (int64_t d = 0; d < size; d += 64 / static_cast<int64_t>(sizeof(Number))) {
        __builtin_prefetch(coming.least + d, 0, 2);
        __builtin_prefetch(coming.most + d, 0, 2);
      }
    }
    for (int64_t h = 0; h < shared;) {
      const double* heads = packed + h * head_numbers;
      double* to = bounds + h * stride + page;
      const auto bound = [&](auto constant) {
        (rest ? bound_heads<Format, constant, true> : bound_heads<Format, constant, false>)(heads, together, size, call.scale, to, stride);
        h += constant;
      };
      const int64_t left = shared - h;
      if (left >= kHeadsAtOnce)
        bound(std::integral_constant<int, kHeadsAtOnce>());
      else if (left >= 2)
        bound(std::integral_constant<int, 2>());
      else
        bound(std::integral_constant<int, 1>());
    }
  }
}
