// Panels: queries side by side in a few vectors, and a tile of tokens' products with them.
//
// The logits of a tile and a panel fit into the L1 cache, beside the keys or values that stream by.
// Since queries lie in a vector's lanes, maximum, sum and rescaling need no sums across lanes.

#pragma once

#include <algorithm>

#include "lanes.hpp"
#include "paged_work.hpp"

static_assert(kBlock % kHigh == 0 && kTile % kHigh == 0, "tokens and numbers of a value are taken in rows");

// Some queries of a block, and their sums over the tokens seen so far.
struct Panel {
  int vectors;            // that hold queries, the first of kVectors
  const float* queries;   // [key_size, kWide], in the form in which they are multiplied
  const float* units;     // [kWide], the value of 1 in that form
  float* output;          // [value_size, kWide]
  float* top;             // [kWide]
  float* sum;             // [kWide]
  const int32_t* begins;  // [range_count, kWide]
  const int32_t* ends;    // [range_count, kWide]
  const int32_t* common;  // [range_count, 2], the positions of each range that all queries see
};

// a [kHigh, depth] times b [depth, V vectors of kWide], of which `take` gets row, vector and sum.
// Aligned to a cache line, so that its loop does not span three of them, depending on the code before it: where another
// thread shares the core, that costs a tenth of the whole kernel's time. Not inlined, since other live values would
// take its registers.
template <class Products, int V, class Take>
[[gnu::aligned(64), gnu::noinline]] void multiply_panel(const typename Products::Unit* a, int64_t row_step,
                                                        int64_t depth_step, const typename Products::Unit* b,
                                                        int64_t depth, const Take& take) {
  using Vector = typename Products::Vector;
  const Take put = take;  // whose pointers no store can change
  Vector sum[kHigh][V];
#pragma GCC unroll 8
  for (auto& row : sum)
#pragma GCC unroll 3
    for (Vector& one : row) one = Vector{};
  for (int64_t k = 0; k < depth; ++k, a += depth_step, b += kWide) {
    Vector right[V];
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) {
      auto vector = load<Vector>(b + v * kLanes);
      keep_at_hand(vector);
      right[v] = vector;
    }
#pragma GCC unroll 8
    for (int row = 0; row < kHigh; ++row)
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) sum[row][v] = Products::add(sum[row][v], a[row * row_step], right[v]);
  }
#pragma GCC unroll 8
  for (int row = 0; row < kHigh; ++row)
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) put(row, v, sum[row][v]);
}

// The largest logits [V] of the tokens `from` to `to` and of those before.
template <int V>
void find_most(const Panel& panel, const float* logits, int64_t from, int64_t to, Floats (&most)[V]) {
  for (int v = 0; v < V; ++v) most[v] = floats(panel.top + v * kLanes);
  for (int64_t at = from * kWide; at < to * kWide; at += kWide)
    for (int v = 0; v < V; ++v) most[v] = larger(floats(logits + at + v * kLanes), most[v]);
}

// Takes the weights' sums [V] of a tile into a panel's, under its new largest logits. Earlier sums must be multiplied
// by `keep` [kWide].
template <int V>
void keep_sums(const Panel& panel, const Floats (&most)[V], const Floats (&total)[V], float* keep) {
  for (int v = 0; v < V; ++v) {
    const Floats kept = power_of_two(floats(panel.top + v * kLanes) - most[v]);
    store(keep + v * kLanes, kept);
    store(panel.sum + v * kLanes, floats(panel.sum + v * kLanes) * kept + total[v]);
    store(panel.top + v * kLanes, most[v]);
  }
}

// The tokens `from` to `to` of a tile that some query of a panel sees. If `ranges` is 0, every query sees them all;
// else so many ranges decide.
struct Sight {
  int from, to;
  int64_t ranges;
};

// The part of a tile that a panel sees. Fills `touched` with the ranges that decide.
inline Sight look(const Panel& panel, const Tile& tile, int64_t range_count, int32_t* touched) {
  const int32_t first = tile.positions[0], last = tile.positions[tile.count - 1];
  for (int64_t i = 0; i < range_count; ++i)
    if (panel.common[2 * i] <= first && last < panel.common[2 * i + 1]) return {0, tile.count, 0};
  const auto any = [](Ints mask) { return sum_of(where(mask, splat(1.0f), Floats{})) > 0; };
  Ints all[kVectors] = {}, begin = Ints{} + last + 1, end = Ints{} + first;
  int64_t count = 0;
  for (int64_t i = 0; i < range_count; ++i) {
    Ints some = {};
    for (int v = 0; v < panel.vectors; ++v) {
      const Ints begins = load<Ints>(panel.begins + i * kWide + v * kLanes);
      const Ints ends = load<Ints>(panel.ends + i * kWide + v * kLanes);
      const Ints touches = (begins <= last) & (ends > first);
      all[v] |= (begins <= first) & (ends > last);
      begin = touches & (begins < begin) ? begins : begin;
      end = touches & (ends > end) ? ends : end;
      some |= touches;
    }
    if (any(some)) touched[count++] = static_cast<int32_t>(i);
  }
  Ints missed = {};
  for (int v = 0; v < panel.vectors; ++v) missed |= ~all[v];
  if (!any(missed)) return {0, tile.count, 0};
  int32_t least = begin[0], most = end[0];
  for (int i = 1; i < kLanes; ++i) {
    least = std::min(least, begin[i]);
    most = std::max(most, end[i]);
  }
  const auto before = [&](int32_t position) {
    return static_cast<int>(std::lower_bound(tile.positions, tile.positions + tile.count, position) - tile.positions);
  };
  return {before(least) / kHigh * kHigh, before(most), count};
}

// Logits of absent tokens, which no query sees.
inline void mask_absent(const Tile& tile, const Sight& sight, float* logits) {
  for (int token = sight.from; token < sight.to; ++token)
    if (tile.absent >> token & 1) std::fill(logits + token * kWide, logits + (token + 1) * kWide, -__builtin_inff());
}

// Caps the logits [tile.count, kWide] of the tokens that a panel sees, and masks those that a query does not see.
inline void cap_and_mask(const Call& call, const Panel& panel, const Tile& tile, const Sight& sight,
                         const int32_t* touched, float* logits) {
  for (int token = sight.from; token < sight.to; ++token)
    for (int column = 0; column < panel.vectors * kLanes; column += kLanes) {
      float* at = logits + token * kWide + column;
      Floats logit = floats(at);
      if (call.softcap > 0) logit = softcapped(logit, static_cast<float>(call.softcap)) * kLog2E;
      if (sight.ranges > 0) {
        const Ints position = Ints{} + tile.positions[token];
        Ints visible = {};
        for (int64_t i = 0; i < sight.ranges; ++i) {
          const int64_t range = touched[i] * kWide + column;
          visible |= (load<Ints>(panel.begins + range) <= position) & (load<Ints>(panel.ends + range) > position);
        }
        logit = where(visible, logit, splat(-__builtin_inff()));
      }
      store(at, logit);
    }
}
