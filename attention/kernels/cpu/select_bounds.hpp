// Upper bounds of a query head's products with the keys of a page, from the page's summary.
//
// Tang et al.: Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference, 2024, section 3.4. Products of
// two floats are exact in double precision, and scores are rounded to floats in the end: the order of sums does not
// show. Single precision is tried first; see select_quick.hpp.

#pragma once

#include <algorithm>
#include <type_traits>

#include "select_call.hpp"
#include "select_doubles.hpp"

// Query heads and pages whose sums stay in registers, beside their operands.
constexpr int kHeadsAtOnce = kRegisters == 32 ? 4 : 3;
constexpr int kPagesAtOnce = kRegisters == 32 ? 4 : 3;

// The vectors that sums use: doubles, for each half of a vector of floats, or the vector of floats itself.
template <class Sum>
struct Summed;

template <>
struct Summed<double> {
  using Vector = Doubles;
  static constexpr int kParts = 2, kNumbers = kDoubles;
  template <int kPart>
  static Vector part(Floats numbers) {
    return half<kPart>(numbers);
  }
};

template <>
struct Summed<float> {
  using Vector = Floats;
  static constexpr int kParts = 1, kNumbers = kLanes;
  template <int>
  static Vector part(Floats numbers) {
    return numbers;
  }
};

// Numbers of a packed query head: its negative numbers, with 0 for the others, then its positive ones likewise.
inline int64_t packed_size(int64_t head_size) { return 2 * ((head_size + kBlock - 1) / kBlock * kBlock); }

// The larger product is with the largest key number where the query's is positive, else with the smallest.
template <class Format, class Sum>
void pack_head(const float* query, int64_t size, Sum* packed) {
  const int64_t whole = packed_size(size) / 2;
  for (int64_t d = 0; d < whole; ++d) {
    const int64_t place = d / kBlock * kBlock + Format::place(static_cast<int>(d % kBlock));
    const Sum number = place < size ? query[place] : 0;
    packed[d] = number > 0 ? 0 : number;
    packed[whole + d] = number < 0 ? 0 : number;
  }
}

// The smallest and the largest key numbers of one head in some pages.
template <class Format>
struct Extremes {
  const typename Format::Number *least[kPagesAtOnce], *most[kPagesAtOnce];
};

// Sums of H heads' products with kPagesAtOnce pages, and of the pages' squares, which only single precision needs.
template <class Sum, int H>
struct Sums {
  using Vector = typename Summed<Sum>::Vector;
  Vector products[H][kPagesAtOnce] = {}, squares[kPagesAtOnce] = {};
};

// Adds the products of page `p` with one part of a vector of its numbers.
template <int kPart, class Sum, int H>
[[gnu::always_inline]] inline void add_part(const Sum* query, int64_t stride, Floats numbers, int p,
                                            Sums<Sum, H>& sums) {
  using Vector = typename Summed<Sum>::Vector;
  Vector key = Summed<Sum>::template part<kPart>(numbers);
  keep_at_hand(key);
#pragma GCC unroll 4
  for (int h = 0; h < H; ++h) sums.products[h][p] += key * load<Vector>(query + h * stride);
  if constexpr (std::is_same_v<Sum, float>) sums.squares[p] += key * key;
}

// Adds the products of a block of numbers. All loops have to be unrolled and all functions inlined, else the compiler
// keeps the sums in memory.
template <class Format, class Sum, int H>
[[gnu::always_inline]] inline void add_block(const Sum* query, int64_t stride,
                                             const typename Format::Number* const (&from)[kPagesAtOnce], int64_t place,
                                             Sums<Sum, H>& sums) {
  constexpr int kNumbers = Summed<Sum>::kNumbers;
#pragma GCC unroll 4
  for (int p = 0; p < kPagesAtOnce; ++p) {
    const auto lanes = Format::widen(from[p] + place);
    add_part<0>(query, stride, lanes.first, p, sums);
    if constexpr (Summed<Sum>::kParts == 2) add_part<1>(query + kNumbers, stride, lanes.first, p, sums);
    add_part<0>(query + kLanes, stride, lanes.second, p, sums);
    if constexpr (Summed<Sum>::kParts == 2) add_part<1>(query + kLanes + kNumbers, stride, lanes.second, p, sums);
  }
}

// bounds [H, stride]: of H heads and kPagesAtOnce pages, with room for all of them.
// norms [the same pages], only in floats: the sum of the squares of all numbers of the page's extremes.
template <class Format, class Sum, int H, bool kRest>
void bound_heads(const Sum* packed, const Extremes<Format>& pages, int64_t size, Sum scale, Sum* bounds, Sum* norms,
                 int64_t stride) {
  using Number = typename Format::Number;
  const int64_t whole = size / kBlock * kBlock, rounded = packed_size(size) / 2;
  Sums<Sum, H> sums;
  for (int64_t d = 0; d < whole; d += kBlock) {
    add_block<Format>(packed + d, 2 * rounded, pages.least, d, sums);
    add_block<Format>(packed + rounded + d, 2 * rounded, pages.most, d, sums);
  }
  if (kRest) {
    Number numbers[2][kPagesAtOnce][kBlock] = {};
    const Number *least[kPagesAtOnce], *most[kPagesAtOnce];
    for (int p = 0; p < kPagesAtOnce; ++p) {
      std::memcpy(numbers[0][p], pages.least[p] + whole, (size - whole) * sizeof(Number));
      std::memcpy(numbers[1][p], pages.most[p] + whole, (size - whole) * sizeof(Number));
      least[p] = numbers[0][p];
      most[p] = numbers[1][p];
    }
    add_block<Format>(packed + whole, 2 * rounded, least, 0, sums);
    add_block<Format>(packed + rounded + whole, 2 * rounded, most, 0, sums);
  }
#pragma GCC unroll 4
  for (int p = 0; p < kPagesAtOnce; ++p) {
    if constexpr (std::is_same_v<Sum, float>) {
      const auto product = [&](int h) { return sums.products[std::min(h, H - 1)][p]; };
      const Four totals = ::sums(product(0), product(1), product(2), sums.squares[p]);
      for (int h = 0; h < std::min(H, 3); ++h) bounds[h * stride + p] = totals[h] * scale;
      if constexpr (H > 3) bounds[3 * stride + p] = sum_of(sums.products[3][p]) * scale;
      norms[p] = totals[3];
    } else {
      for (int h = 0; h < H; ++h) bounds[h * stride + p] = sum_of(sums.products[h][p]) * scale;
    }
  }
}

// The queries of one row, packed [query_heads, packed_size].
template <class Format, class Sum>
void pack_row(const Selection& call, int64_t entry, Sum* packed) {
  const float* query = call.query + call.rows[entry] * call.row_stride;
  for (int64_t h = 0; h < call.query_heads; ++h)
    pack_head<Format>(query + h * call.head_stride, call.head_size, packed + h * packed_size(call.head_size));
}

// The bounds of some pages: of the KV heads from `head` to `end`, in the memory order of their summaries, and of the
// query heads that share each.
//
// packed as pack_row gives it. bounds [end - head, shared, stride], and in floats [end - head, shared + 1, stride] with
// the pages' norms as one more head; up to kPagesAtOnce - 1 further numbers are written.
template <class Format, class Sum>
void bound_pages(const Selection& call, const Sum* packed, int64_t head, int64_t end, const int32_t* pages,
                 int64_t count, Sum* bounds, int64_t stride) {
  using Number = typename Format::Number;
  const int64_t shared = call.shared(), size = call.head_size, all = call.kv_heads * size;
  const int64_t rows = shared + (std::is_same_v<Sum, float> ? 1 : 0);
  const bool rest = size % kBlock > 0;
  const auto summary = [&](int64_t page) {
    return static_cast<const Number*>(call.summary) + 2 * pages[std::min(page, count - 1)] * all;
  };
  for (int64_t page = 0; page < count; page += kPagesAtOnce) {
    const Number *current[kPagesAtOnce], *next[kPagesAtOnce];
    for (int p = 0; p < kPagesAtOnce; ++p) {
      current[p] = summary(page + p);
      next[p] = summary(page + p + kPagesAtOnce);
    }
    for (int64_t k = head; k < end; ++k) {
      Extremes<Format> extremes;
      for (int p = 0; p < kPagesAtOnce; ++p) {
        extremes.least[p] = current[p] + k * size;
        extremes.most[p] = extremes.least[p] + all;
        for (int64_t d = k * size; d < (k + 1) * size; d += 64 / static_cast<int64_t>(sizeof(Number))) {
          __builtin_prefetch(next[p] + d, 0, 2);
          __builtin_prefetch(next[p] + all + d, 0, 2);
        }
      }
      Sum* to = bounds + (k - head) * rows * stride + page;
      for (int64_t h = 0; h < shared;) {
        const auto bound = [&](auto constant) {
          const auto some = rest ? bound_heads<Format, Sum, constant, true> : bound_heads<Format, Sum, constant, false>;
          some(packed + (k * shared + h) * packed_size(size), extremes, size, static_cast<Sum>(call.scale),
               to + h * stride, to + shared * stride, stride);
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
}
