// A block's products in float32.

#pragma once

#include "paged_heads.hpp"
#include "paged_panels.hpp"

// A tile's state while panels are multiplied with it.
template <class Products>
struct TileRoom {
  using Unit = typename Products::Unit;
  float* weights;      // [kTile, kWide]: logits, then weights in the form in which they are multiplied
  float* keep;         // [kWide], by which earlier sums must be multiplied
  float* weight_unit;  // [kWide], the value of 1 in products of weights and values
  float* key_units;    // [kTile], the value of 1 in a key
  float* value_units;  // [kTile], the value of 1 in a token's values
  float* scales;       // [kTile], by which numbers become integers
  Unit* keys;          // [kTile, key_size / kPer]
  Unit* values;        // [value_size / kHigh, kTile / kPer, kHigh]
};

// The block of a head that begins at `from` + `d`, with zeros after the head's end.
template <class Format>
auto block_at(const typename Format::Number* from, int64_t d, int64_t size) {
  return d + kBlock <= size ? Format::widen(from + d) : Format::widen(Rest<Format>(from + d, size - d).numbers);
}

// Calls `put` with where each block of a head begins, and the block.
template <class Format, class Put>
void each_block(const typename Format::Number* from, int64_t size, Put put) {
  for (int64_t d = 0; d < size; d += kBlock) put(d, block_at<Format>(from, d, size));
}

// Calls `put` with where each block of a query begins, and the block's two vectors in the order of a dtype's.
template <class Format, class Put>
void each_query_block(const float* from, int64_t size, Put put) {
  each_block<Float32>(from, size, [&](int64_t d, Float32::Lanes lanes) {
    if constexpr (Format::place(1) == 1) return put(d, lanes.first, lanes.second);
    float plain[kBlock], ordered[kBlock];
    store(plain, lanes.first);
    store(plain + kLanes, lanes.second);
    for (int i = 0; i < kBlock; ++i) ordered[i] = plain[Format::place(i)];
    put(d, floats(ordered), floats(ordered + kLanes));
  });
}

struct InFloats {
  using Unit = float;
  using Vector = Floats;
  static constexpr int kPer = 1;              // numbers of a unit
  static constexpr bool kByPosition = false;  // whether sums over a tile depend on where its tokens lie
  static Vector add(Vector sum, Unit a, Vector b) { return sum + a * b; }

  // Puts a query, times `factor`, into a row; `unit` is not needed.
  template <class Format>
  static void pack_query(const float* from, int64_t size, float factor, float* row, float*) {
    each_query_block<Format>(from, size, [&](int64_t d, Floats first, Floats second) {
      store(row + d, first * factor);
      store(row + d + kLanes, second * factor);
    });
  }

  // Zeros fill up to a multiple of kHigh tokens.
  template <class Format>
  static void pack_keys(const Heads<Format>& heads, int count, const TileRoom<InFloats>& room, int64_t key_size) {
    for (int token = 0; token < count; ++token) {
      float* to = room.keys + token * key_size;
      each_block<Format>(heads[token], heads.size, [&](int64_t d, auto lanes) {
        store(to + d, lanes.first);
        store(to + d + kLanes, lanes.second);
      });
    }
    std::fill(room.keys + count * key_size, room.keys + rounded(count, kHigh) * key_size, 0.0f);
  }

  template <class Format>
  static void pack_values(const Heads<Format>& heads, int count, const TileRoom<InFloats>& room, int64_t value_size) {
    const auto put = [&](int token, int64_t d, auto lanes) {
      float block[kBlock];
      store(block, lanes.first);
      store(block + kLanes, lanes.second);
      for (int i = 0; i < kBlock; i += kHigh)
        std::memcpy(room.values + (d + i) * kTile + token * kHigh, block + i, kHigh * sizeof *block);
    };
    for (int token = 0; token < count; ++token)
      each_block<Format>(heads[token], heads.size, [&](int64_t d, auto lanes) { put(token, d, lanes); });
    for (int token = count; token % kHigh; ++token)
      for (int64_t d = 0; d < value_size; d += kBlock) put(token, d, typename Format::Lanes{});
  }

  // Logits of the tokens `from` to `end`, a multiple of kHigh apart.
  template <int V>
  static void multiply_keys(const Panel& panel, const TileRoom<InFloats>& room, int64_t key_size, int64_t from,
                            int64_t end) {
    for (int64_t token = from; token < end; token += kHigh) {
      float* to = room.weights + token * kWide;
      multiply_panel<InFloats, V>(room.keys + token * key_size, key_size, 1, panel.queries, key_size,
                                  [to](int row, int v, Floats sum) { store(to + row * kWide + v * kLanes, sum); });
    }
  }

  // Logits of the tokens `from` to `to` become weights, up to `end` zeros.
  template <int V>
  static void weigh(const Panel& panel, const TileRoom<InFloats>& room, int64_t from, int64_t to, int64_t end) {
    float* logits = room.weights;
    Floats most[V], total[V] = {};
    find_most<V>(panel, logits, from, to, most);
    for (int64_t at = from * kWide; at < to * kWide; at += kWide)
      for (int v = 0; v < V; ++v) {
        const Floats weight = power_of_two(floats(logits + at + v * kLanes) - most[v]);
        store(logits + at + v * kLanes, weight);
        total[v] += weight;
      }
    std::fill(logits + to * kWide, logits + end * kWide, 0.0f);
    keep_sums<V>(panel, most, total, room.keep);
  }

  template <int V>
  static void add_values(const Panel& panel, const TileRoom<InFloats>& room, int64_t value_size, int64_t from,
                         int64_t end) {
    for (int64_t d = 0; d < value_size; d += kHigh) {
      float* to = panel.output + d * kWide;
      const float* keep = room.keep;
      multiply_panel<InFloats, V>(room.values + d * kTile + from * kHigh, 1, kHigh, room.weights + from * kWide,
                                  end - from, [to, keep](int row, int v, Floats sum) {
                                    float* at = to + row * kWide + v * kLanes;
                                    store(at, floats(at) * floats(keep + v * kLanes) + sum);
                                  });
    }
  }
};
