// A block's products in pairs of 16-bit integers, twice as many at once as in floats.
//
// Each query, key and value is a multiple of its own length / 32767, and a query's weights in a tile, times the units
// of the values, are multiples of their sum / 32767. No sum can exceed 32 bits: that of a query and a key is at most
// the product of their lengths (Cauchy and Schwarz), that of weights and values at most the weights' sum times the
// largest number of a value. A logit is off by about 1.3e-5 of the product of both lengths, a tile's weighted value by
// about 1e-4 of the largest of its values: a channel far above the others costs these their last digits. Lengths
// above 1.8e19, whose squares float32 does not have, give NaN. All units are a token's or a row's own, so that a row's
// result depends on no other.

#pragma once

#include <cmath>

#include "paged_floats.hpp"
#include "pairs.hpp"

#if defined(__SSE2__)
static_assert(kLanes % kHigh == 0, "a vector of pairs is stored in rows");

struct InPairs {
  using Unit = int32_t;
  using Vector = Ints;
  static constexpr int kPer = 2;
  static constexpr bool kByPosition = false;
  static Vector add(Vector sum, Unit a, Vector b) { return add_products(sum, Vector{} + a, b); }

  template <class Format>
  static void pack_query(const float* from, int64_t size, float factor, float* row, float* query_unit) {
    Floats squares = {};
    each_query_block<Format>(from, size,
                             [&](int64_t, Floats first, Floats second) { squares += first * first + second * second; });
    float unit = sum_of(squares), scale;
    measure(&unit, &scale, 1);
    *query_unit = unit * factor;
    each_query_block<Format>(from, size, [&](int64_t d, Floats first, Floats second) {
      store(row + d / kPer, paired(first * scale, second * scale));
    });
  }

  template <class Format>
  static void pack_keys(const Heads<Format>& heads, int count, const TileRoom<InPairs>& room, int64_t key_size) {
    measure_heads(heads, count, room.key_units, room.scales);
    for (int token = 0; token < count; ++token) {
      int32_t* to = room.keys + token * key_size / kPer;
      const float scale = room.scales[token];
      each_block<Format>(heads[token], heads.size, [&](int64_t d, auto lanes) {
        store(to + d / kPer, paired(lanes.first * scale, lanes.second * scale));
      });
    }
    std::fill(room.keys + count * key_size / kPer, room.keys + rounded(count, kHigh) * key_size / kPer, 0);
  }

  template <class Format>
  static void pack_values(const Heads<Format>& heads, int count, const TileRoom<InPairs>& room, int64_t value_size) {
    measure_heads(heads, count, room.value_units, room.scales);
    const auto put = [&](int token, int64_t d, Ints pairs) {
      int32_t units[kLanes];
      store(units, pairs);
      for (int i = 0; i < kLanes; i += kHigh)
        std::memcpy(room.values + ((d + i) * kTile + token * kHigh) / kPer, units + i, kHigh * sizeof *units);
    };
    for (int token = 0; token < count; token += kPer) {
      const bool both = token + 1 < count;
      const typename Format::Number *one = heads[token], *other = heads[both ? token + 1 : token];
      const float scale = room.scales[token], other_scale = both ? room.scales[token + 1] : 0.0f;
      each_block<Format>(one, heads.size, [&](int64_t d, auto lanes) {
        const auto others = block_at<Format>(other, d, heads.size);
        put(token, d, paired(lanes.first * scale, others.first * other_scale));
        put(token, d + kLanes, paired(lanes.second * scale, others.second * other_scale));
      });
    }
    for (int64_t token = rounded(count, kPer); token % kHigh; token += kPer)
      for (int64_t d = 0; d < value_size; d += kLanes) put(static_cast<int>(token), d, Ints{});
  }

  template <int V>
  static void multiply_keys(const Panel& panel, const TileRoom<InPairs>& room, int64_t key_size, int64_t from,
                            int64_t end) {
    const auto* queries = reinterpret_cast<const int32_t*>(panel.queries);
    for (int64_t token = from; token < end; token += kHigh) {
      float* to = room.weights + token * kWide;
      const float *units = room.key_units + token, *query_units = panel.units;
      multiply_panel<InPairs, V>(room.keys + token * key_size / kPer, key_size / kPer, 1, queries, key_size / kPer,
                                 [to, units, query_units](int row, int v, Ints sum) {
                                   const Floats unit = floats(query_units + v * kLanes) * units[row];
                                   store(to + row * kWide + v * kLanes, converted(sum) * unit);
                                 });
    }
  }

  template <int V>
  static void weigh(const Panel& panel, const TileRoom<InPairs>& room, int64_t from, int64_t to, int64_t end) {
    float* logits = room.weights;
    Floats most[V], total[V] = {}, share[V] = {}, scale[V];
    find_most<V>(panel, logits, from, to, most);
    for (int64_t token = from; token < to; ++token)
      for (int v = 0; v < V; ++v) {
        float* at = logits + token * kWide + v * kLanes;
        const Floats weight = power_of_two(floats(at) - most[v]), scaled = weight * room.value_units[token];
        store(at, scaled);
        total[v] += weight;
        share[v] += scaled;
      }
    std::fill(logits + to * kWide, logits + end * kWide, 0.0f);
    keep_sums<V>(panel, most, total, room.keep);
    for (int v = 0; v < V; ++v) {
      store(room.weight_unit + v * kLanes, share[v] * (1.0f / kLargestInteger));
      scale[v] = where(share[v] > 0.0f, kLargestInteger / share[v], Floats{});
    }
    // In place: a pair is stored where its first weight or an earlier one was.
    for (int64_t token = from; token < end; token += kPer)
      for (int v = 0; v < V; ++v) {
        const float* at = logits + token * kWide + v * kLanes;
        store(logits + (from + (token - from) / kPer) * kWide + v * kLanes,
              paired(floats(at) * scale[v], floats(at + kWide) * scale[v]));
      }
  }

  template <int V>
  static void add_values(const Panel& panel, const TileRoom<InPairs>& room, int64_t value_size, int64_t from,
                         int64_t end) {
    const auto* weights = reinterpret_cast<const int32_t*>(room.weights + from * kWide);
    for (int64_t d = 0; d < value_size; d += kHigh) {
      float* to = panel.output + d * kWide;
      const float *keep = room.keep, *unit = room.weight_unit;
      multiply_panel<InPairs, V>(
          room.values + (d * kTile + from * kHigh) / kPer, 1, kHigh, weights, (end - from) / kPer,
          [to, keep, unit](int row, int v, Ints sum) {
            float* at = to + row * kWide + v * kLanes;
            store(at, floats(at) * floats(keep + v * kLanes) + converted(sum) * floats(unit + v * kLanes));
          });
    }
  }

 private:
  // Squares of lengths become the value of 1 in integers, and `scales` the factors by which numbers become these. A
  // unit that is not finite is NaN: a logit of -infinity would go unnoticed, and so would an integer that is 0.
  static void measure(float* squares, float* scales, int count) {
    for (int i = 0; i < count; ++i) {
      const float length = std::sqrt(squares[i]);
      scales[i] = length > 0 ? kLargestInteger / length : 0.0f;
      squares[i] = length * (1.0f / kLargestInteger) + length * 0.0f;
    }
  }

  // Units and scales of some heads, 0 up to a multiple of kHigh tokens.
  template <class Format>
  static void measure_heads(const Heads<Format>& heads, int count, float* units, float* scales) {
    const auto squares_of = [&](int token) {
      Floats squares = {};
      if (token < count)
        each_block<Format>(heads[token], heads.size, [&](int64_t, auto lanes) {
          squares += lanes.first * lanes.first + lanes.second * lanes.second;
        });
      return squares;
    };
    const int end = static_cast<int>(rounded(count, kHigh));
    for (int token = 0; token < end; token += 4)
      store(units + token,
            sums(squares_of(token), squares_of(token + 1), squares_of(token + 2), squares_of(token + 3)));
    measure(units, scales, end);
  }
};
#endif
