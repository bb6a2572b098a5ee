// A block of consecutive query rows and one KV head: each tile of keys and values is multiplied with one panel of
// queries after another.
//
// Softmax by tiles as in Dao et al.: FlashAttention, 2022, section 3.1.

#pragma once

#include <type_traits>

#include "paged_floats.hpp"
#include "paged_matrix.hpp"
#include "paged_pairs.hpp"
#include "transposed.hpp"

// How a thread's scratch is divided among a block's panels, in numbers.
struct BlockRoom {
  int64_t key_size, value_size;  // whole blocks
  int64_t forms;                 // of the queries: the plain ones and perhaps the rerotated ones
  int64_t panels;
  int64_t sums_size;  // of a panel: the weighted values, the largest logits, the sums of weights
  int64_t panel_size;

  BlockRoom(const Call& call, int64_t queries)
      : key_size(rounded(call.head_size, kBlock)),
        value_size(rounded(call.value_size, kBlock)),
        forms(call.rerotated ? 2 : 1),
        panels((queries + kWide - 1) / kWide),
        sums_size(kWide * (value_size + 2)),
        panel_size(kWide * (forms * (key_size + 1) + 2 * call.range_count) + sums_size +
                   rounded(2 * call.range_count, kLanes)) {}

  // Of a tile.
  int64_t tile_size() const { return kTile * (kWide + key_size + value_size + 3) + 2 * kWide; }
};

inline size_t block_scratch(const Call& call) {
  const BlockRoom room(call, most_block_queries(call));
  return room.panels * room.panel_size + room.tile_size() + call.range_count;
}

// The panel of `queries` at `at`, with its rerotated queries or with the plain ones.
inline Panel panel_at(const Call& call, const BlockRoom& room, float* at, int64_t queries, bool rerotated) {
  Panel panel;
  panel.vectors = static_cast<int>((queries + kLanes - 1) / kLanes);
  panel.queries = at + (rerotated ? room.key_size * kWide : 0);
  float* units = at + room.forms * room.key_size * kWide;
  panel.units = units + (rerotated ? kWide : 0);
  panel.output = units + room.forms * kWide;
  panel.top = panel.output + room.value_size * kWide;
  panel.sum = panel.top + kWide;
  panel.begins = reinterpret_cast<const int32_t*>(panel.sum + kWide);
  panel.ends = panel.begins + call.range_count * kWide;
  panel.common = panel.ends + call.range_count * kWide;
  return panel;
}

// Makes a panel at `to` of a group's queries from `first` on. Needs some rows, [kLanes, key_size].
template <class Format, class Products>
void pack_panel(const Call& call, const BlockRoom& room, const Group& group, int64_t first, int64_t queries, float* to,
                float* rows) {
  const Panel panel = panel_at(call, room, to, queries, false);
  const int64_t shared = call.shared();
  const auto factor = static_cast<float>(call.softcap > 0 ? call.scale : call.scale * kLog2E);
  if (queries < kWide) std::fill(to, panel.output, 0.0f);
  auto* begins = reinterpret_cast<int32_t*>(panel.sum + kWide);
  int32_t *ends = begins + call.range_count * kWide, *common = ends + call.range_count * kWide;
  for (int64_t i = 0; i < call.range_count; ++i) {
    common[2 * i] = 0;
    common[2 * i + 1] = INT32_MAX;
  }
  for (int64_t m = 0; m < kWide; ++m) {
    // A lane without a query gets the last query's ranges, so that no tile is masked because of it.
    const int64_t query = first + std::min(m, queries - 1), entry = group.entry + query / shared;
    for (int64_t i = 0; i < call.range_count; ++i) {
      const int64_t* range = call.ranges + (entry * call.range_count + i) * 2;
      begins[i * kWide + m] = static_cast<int32_t>(range[0]);
      ends[i * kWide + m] = static_cast<int32_t>(range[1]);
      common[2 * i] = std::max(common[2 * i], begins[i * kWide + m]);
      common[2 * i + 1] = std::min(common[2 * i + 1], ends[i * kWide + m]);
    }
  }
  const auto query_at = [&](const float* queries_of_form, int64_t query) {
    const int64_t row = call.rows[group.entry + query / shared], head = group.head * shared + query % shared;
    return queries_of_form + row * call.row_stride + head * call.head_stride;
  };
  for (int64_t form = 0; form < room.forms; ++form) {
    float *own = to + form * room.key_size * kWide, *units = to + (room.forms * room.key_size + form) * kWide;
    for (int64_t m = 0; m < queries; m += kLanes) {
      const int64_t count = std::min<int64_t>(kLanes, queries - m);
      for (int64_t q = 0; q < count; ++q)
        Products::template pack_query<Format>(query_at(form ? call.rerotated : call.query, first + m + q),
                                              call.head_size, factor, rows + q * room.key_size, units + m + q);
      std::fill(rows + count * room.key_size, rows + kLanes * room.key_size, 0.0f);
      for (int64_t d = 0; d < room.key_size / Products::kPer; d += kLanes) {
        Floats square[kLanes];
        load_transposed(rows + d, room.key_size, square);
        for (int i = 0; i < kLanes; ++i) store(own + (d + i) * kWide + m, square[i]);
      }
    }
  }
}

// Empties a panel's sums.
inline void clear_sums(const Panel& panel) {
  std::fill(panel.output, panel.top, 0.0f);
  std::fill(panel.top, panel.sum, kLowest);
  std::fill(panel.sum, panel.sum + kWide, 0.0f);
}

// `Call::output` of a panel's queries from `first` on gets their weighted values [value_size, kWide].
template <class Format>
void put_weighted(const Call& call, const Group& group, int64_t first, int64_t queries, const float* weighted) {
  const int64_t shared = call.shared();
  for (int64_t m = 0; m < queries; m += kLanes)
    for (int64_t d = 0; d < call.value_size; d += kBlock) {
      Floats halves[2][kLanes];
      load_transposed(weighted + d * kWide + m, kWide, halves[0]);
      load_transposed(weighted + (d + kLanes) * kWide + m, kWide, halves[1]);
      const int64_t end = std::min<int64_t>(queries, m + kLanes);
      for (int64_t q = m; q < end; ++q) {
        float lanes[kBlock], block[kBlock];
        store(lanes, halves[0][q - m]);
        store(lanes + kLanes, halves[1][q - m]);
        for (int i = 0; i < kBlock; ++i) block[Format::place(i)] = lanes[i];
        const int64_t row = call.rows[group.entry + (first + q) / shared];
        const int64_t head = group.head * shared + (first + q) % shared;
        float* own = call.output + (row * call.query_heads + head) * call.value_size + d;
        if (d + kBlock <= call.value_size)
          std::memcpy(own, block, sizeof block);
        else
          std::memcpy(own, block, (call.value_size - d) * sizeof *block);
      }
    }
}

// Combines a block's parts, `size` numbers each, in the first one's place, and puts the outcome into `Call::output`.
template <class Format>
void finish_block(const Call& call, const Group& group, float* results, size_t size) {
  const int64_t shared = call.shared(), queries = group.rows * shared;
  const BlockRoom room(call, queries);
  const size_t parts = group.parts_end - group.part;
  for (int64_t i = 0; i < room.panels; ++i) {
    const int64_t first = i * kWide, count = std::min<int64_t>(kWide, queries - first);
    const auto vectors = static_cast<int>((count + kLanes - 1) / kLanes);
    float* weighted = results + i * room.sums_size;
    const auto top = [&](size_t part) { return weighted + part * size + room.value_size * kWide; };
    float sinks[kWide];
    for (int m = 0; call.sinks && m < kWide; ++m)
      sinks[m] = call.sinks[group.head * shared + (first + m) % shared] * kLog2E;
    Floats most[kVectors], sum[kVectors];
    for (int v = 0; v < vectors; ++v) {
      const auto at = [v](const float* numbers) { return floats(numbers + v * kLanes); };
      most[v] = call.sinks ? at(sinks) : splat(kLowest);
      for (size_t part = 0; part < parts; ++part) most[v] = larger(at(top(part)), most[v]);
      sum[v] = call.sinks ? power_of_two(at(sinks) - most[v]) : Floats{};
      for (size_t part = 0; part < parts; ++part)
        sum[v] += at(top(part) + kWide) * power_of_two(at(top(part)) - most[v]);
    }
    for (size_t part = 0; part < parts; ++part)
      for (int v = 0; v < vectors; ++v) {
        const Floats share = power_of_two(floats(top(part) + v * kLanes) - most[v]) / sum[v];
        for (int64_t d = 0; d < room.value_size; ++d) {
          float* at = weighted + d * kWide + v * kLanes;
          store(at, (part ? floats(at) : Floats{}) + share * floats(at + part * size));
        }
      }
    put_weighted<Format>(call, group, first, count, weighted);
  }
}

// `packed`: the scratch has this group's panels, from its part before.
template <class Format, class Products>
void attend_block(const Call& call, const Work& work, const Part& part, bool packed, float* scratch, float* result) {
  using Unit = typename Products::Unit;
  const Group& group = work.groups[part.group];
  const int64_t queries = group.rows * call.shared();
  const BlockRoom room(call, queries);
  TileRoom<Products> own;
  own.weights = scratch + room.panels * room.panel_size;
  own.keep = own.weights + kTile * kWide;
  own.weight_unit = own.keep + kWide;
  own.key_units = own.weight_unit + kWide;
  own.value_units = own.key_units + kTile;
  own.scales = own.value_units + kTile;
  float* keys = own.scales + kTile;
  float* values = keys + kTile * room.key_size;
  own.keys = reinterpret_cast<Unit*>(keys);
  own.values = reinterpret_cast<Unit*>(values);
  auto* touched = reinterpret_cast<int32_t*>(scratch + room.panels * room.panel_size + room.tile_size());

  // Calls `run` with each panel, its first query and how many it has.
  const auto each_panel = [&](auto run) {
    for (int64_t i = 0; i < room.panels; ++i)
      run(scratch + i * room.panel_size, i * kWide, std::min<int64_t>(kWide, queries - i * kWide));
  };
  each_panel([&](float* panel, int64_t first, int64_t count) {
    if (!packed) pack_panel<Format, Products>(call, room, group, first, count, panel, keys);
    clear_sums(panel_at(call, room, panel, count, false));
  });

  Walk walk(call, work, part);
  Tile tiles[2];
  walk.next(tiles[0]);
  for (int current = 0; tiles[current].count > 0; current = 1 - current) {
    const Tile &tile = tiles[current], &next = tiles[1 - current];
    if (Products::kByPosition) tiles[current].spread();
    walk.next(tiles[1 - current]);
    Products::pack_keys(Heads<Format>(call, call.keys, group.head, call.head_size, tile), tile.count, own,
                        room.key_size);
    Products::pack_values(Heads<Format>(call, call.values, group.head, call.value_size, tile), tile.count, own,
                          room.value_size);

    const Heads<Format> next_keys(call, call.keys, group.head, call.head_size, next);
    const Heads<Format> next_values(call, call.values, group.head, call.value_size, next);
    int asked = 0;
    each_panel([&](float* at, int64_t first, int64_t count) {
      for (const int64_t stop = next.count * (first / kWide + 1) / room.panels; asked < stop; ++asked) {
        next_keys.prefetch(asked);
        next_values.prefetch(asked);
      }
      const Panel panel = panel_at(call, room, at, count, tile.near);
      const Sight sight = look(panel, tile, call.range_count, touched);
      if (sight.from >= sight.to) return;
      const int64_t end = rounded(sight.to, kHigh);
      const auto attend = [&](auto vectors) {
        Products::template multiply_keys<vectors>(panel, own, room.key_size, sight.from, end);
        if (call.softcap > 0 || sight.ranges > 0) cap_and_mask(call, panel, tile, sight, touched, own.weights);
        if (tile.absent) mask_absent(tile, sight, own.weights);
        Products::template weigh<vectors>(panel, own, sight.from, sight.to, end);
        Products::template add_values<vectors>(panel, own, room.value_size, sight.from, end);
      };
      switch (panel.vectors) {
        case 1: return attend(std::integral_constant<int, 1>());
        // NOLINTNEXTLINE(bugprone-branch-clone): kVectors is 2 on some machines
        case 2: return attend(std::integral_constant<int, 2>());
        default: return attend(std::integral_constant<int, kVectors>());
      }
    });
  }

  each_panel([&](float* at, int64_t first, int64_t count) {
    const float* sums = panel_at(call, room, at, count, false).output;
    std::copy(sums, sums + room.sums_size, result + first / kWide * room.sums_size);
  });
}
