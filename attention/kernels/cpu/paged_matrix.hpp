// A block's products by a matrix unit: pairs of bfloat16, with sums in float32.
//
// Queries, keys, weights and values are rounded to bfloat16. What a query does not see has a weight of 0, so that a
// row's result depends on no other.

#pragma once

#include <algorithm>

#include "matrix_use.hpp"
#include "paged_floats.hpp"

#if defined(__AMX_BF16__)

struct InBfloat16 {
  using Unit = int32_t;
  static constexpr int kPer = 2;
  static constexpr bool kByPosition = true;
  static constexpr int kDepth = 2 * kMatrixRows;  // numbers of a tile's row

  static_assert(kLanes == kMatrixRows && kBlock == kDepth && kTile % kDepth == 0);

  template <class Format>
  static void pack_query(const float* from, int64_t size, float factor, float* row, float*) {
    each_query_block<Format>(from, size, [&](int64_t d, Floats first, Floats second) {
      store(row + d / kPer, paired(first * factor, second * factor));
    });
  }

  template <class Format>
  static void pack_keys(const Heads<Format>& heads, int count, const TileRoom<InBfloat16>& room, int64_t key_size) {
    for (int token = 0; token < count; ++token) {
      int32_t* to = room.keys + token * key_size / kPer;
      each_block<Format>(heads[token], heads.size,
                         // An infinite key is NaN: a logit of -infinity would go unnoticed.
                         [&](int64_t d, auto lanes) {
                           store(to + d / kPer,
                                 paired(lanes.first + lanes.first * 0.0f, lanes.second + lanes.second * 0.0f));
                         });
    }
  }

  // [value_size, kTile / kPer]; tokens that are not there are zeros, which weights of 0 leave so.
  template <class Format>
  static void pack_values(const Heads<Format>& heads, int count, const TileRoom<InBfloat16>& room, int64_t value_size) {
    if (count < kTile) std::fill(room.values, room.values + value_size * kTile / kPer, 0);
    Ints rows = {};
    for (int i = 0; i < kLanes; ++i) rows[i] = i * kTile / kPer;
    const auto put = [&](int token, int64_t d, Ints pairs) {
      _mm512_i32scatter_epi32(room.values + (d * kTile + token) / kPer, (__m512i)rows, (__m512i)pairs, sizeof(Unit));
    };
    for (int token = 0; token < count; token += kPer) {
      const bool both = token + 1 < count;
      const typename Format::Number *one = heads[token], *other = heads[both ? token + 1 : token];
      each_block<Format>(one, heads.size, [&](int64_t d, auto lanes) {
        const auto others = block_at<Format>(other, d, heads.size);
        put(token, d, paired(lanes.first, both ? others.first : Floats{}));
        put(token, d + kLanes, paired(lanes.second, both ? others.second : Floats{}));
      });
    }
  }

  // Logits from whole tiles of tokens: also of some before `from` and behind `end`.
  template <int V>
  static void multiply_keys(const Panel& panel, const TileRoom<InBfloat16>& room, int64_t key_size, int64_t from,
                            int64_t end) {
    let_matrix_unit_read();
    for (int64_t token = from / kMatrixRows * kMatrixRows; token < end; token += kMatrixRows) {
      const int32_t* keys = room.keys + token * key_size / kPer;
      multiply<V>(keys, key_size / kPer, panel.queries, key_size / kDepth, room.weights + token * kWide, kWide);
    }
  }

  // A pair of weights is stored where its first or an earlier one was; zeros fill whole tiles.
  template <int V>
  static void weigh(const Panel& panel, const TileRoom<InBfloat16>& room, int64_t from, int64_t to, int64_t end) {
    float* logits = room.weights;
    Floats most[V], total[V] = {};
    find_most<V>(panel, logits, from, to, most);
    const auto weights = [&](int64_t token, int v) {
      if (token >= to) return Floats{};
      const Floats weight = power_of_two(floats(logits + token * kWide + v * kLanes) - most[v]);
      total[v] += weight;
      return weight;
    };
    for (int64_t token = from; token < end; token += kPer)
      for (int v = 0; v < V; ++v) {
        const Floats first = weights(token, v), second = weights(token + 1, v);
        store(logits + token / kPer * kWide + v * kLanes, paired(first, second));
      }
    const int64_t tile = kDepth / kPer * kWide;
    std::fill(logits + from / kDepth * tile, logits + from / kPer * kWide, 0.0f);
    std::fill(logits + end / kPer * kWide, logits + (end + kDepth - 1) / kDepth * tile, 0.0f);
    keep_sums<V>(panel, most, total, room.keep);
  }

  template <int V>
  static void add_values(const Panel& panel, const TileRoom<InBfloat16>& room, int64_t value_size, int64_t from,
                         int64_t end) {
    const int64_t first = from / kDepth, tiles = (end + kDepth - 1) / kDepth - first;
    const float* weights = room.weights + first * kDepth / kPer * kWide;
    alignas(64) float sums[kMatrixRows * kWide];
    let_matrix_unit_read();
    for (int64_t d = 0; d < value_size; d += kMatrixRows) {
      multiply<V>(room.values + (d * kTile + first * kDepth) / kPer, kTile / kPer, weights, tiles, sums, kWide);
      float* to = panel.output + d * kWide;
      for (int v = 0; v < V; ++v) {
        const Floats keep = floats(room.keep + v * kLanes);
        for (int at = v * kLanes; at < kMatrixRows * kWide; at += kWide)
          store(to + at, floats(to + at) * keep + floats(sums + at));
      }
    }
  }

 private:
  // The nearest of bfloat16, ties to even, lane by lane.
  static Ints paired(Floats first, Floats second) {
    const auto halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    alignas(64) static constexpr uint16_t kOrder[] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return (Ints)_mm512_permutexvar_epi16(_mm512_load_si512(kOrder), halves);
  }

  // kMatrixRows rows of `a`, so many pairs apart, times V vectors of columns, over so many tiles.
  template <int V>
  static void multiply(const int32_t* a, int64_t a_step, const float* b, int64_t tiles, float* to, int64_t to_step) {
    const int64_t a_stride = a_step * int64_t{sizeof *a}, stride = to_step * int64_t{sizeof *to};
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    for (int64_t k = 0; k < tiles; ++k, a += kDepth / kPer, b += kDepth / kPer * kWide) {
      _tile_loadd(3, a, a_stride);
      _tile_loadd(4, b, kWide * sizeof *b);
      _tile_dpbf16ps(0, 3, 4);
      if constexpr (V > 1) {
        _tile_loadd(5, b + kLanes, kWide * sizeof *b);
        _tile_dpbf16ps(1, 3, 5);
      }
      if constexpr (V > 2) {
        _tile_loadd(6, b + 2 * kLanes, kWide * sizeof *b);
        _tile_dpbf16ps(2, 3, 6);
      }
    }
    _tile_stored(0, to, stride);
    if constexpr (V > 1) _tile_stored(1, to + kLanes, stride);
    if constexpr (V > 2) _tile_stored(2, to + 2 * kLanes, stride);
  }
};
#endif
