// A block of consecutive query rows and one KV head: each tile of keys and values is multiplied with one panel of
// queries after another.
//
// Softmax by tiles as in Dao et al.: FlashAttention, 2022, section 3.1.

#pragma once

#include <type_traits>

#include "paged_heads.hpp"
#include "paged_panels.hpp"

// How a thread's scratch is divided among a block's panels, in numbers.
struct BlockRoom {
  int64_t key_size, value_size;  // whole blocks
  int64_t panels, panel_size;

  BlockRoom(const Call& call, int64_t queries)
      : key_size(rounded(call.head_size, kBlock)),
        value_size(rounded(call.value_size, kBlock)),
        panels((queries + kWide - 1) / kWide),
        panel_size(kWide * ((call.rerotated ? 2 : 1) * key_size + value_size + 2 + 2 * call.range_count)) {}
};

inline size_t block_scratch(const Call& call) {
  const BlockRoom room(call, std::max(kBlockQueries, call.shared()));
  return room.panels * room.panel_size + kTile * (kWide + room.key_size + room.value_size) + kWide + call.range_count;
}

// The panel of `queries` at `at`, with its rerotated queries or with the plain ones.
inline Panel panel_at(const Call& call, const BlockRoom& room, float* at, int64_t queries, bool rerotated) {
  Panel panel;
  panel.vectors = static_cast<int>((queries + kLanes - 1) / kLanes);
  panel.queries = at + (rerotated ? room.key_size * kWide : 0);
  panel.output = at + (call.rerotated ? 2 : 1) * room.key_size * kWide;
  panel.top = panel.output + room.value_size * kWide;
  panel.sum = panel.top + kWide;
  panel.begins = reinterpret_cast<const int32_t*>(panel.sum + kWide);
  panel.ends = panel.begins + call.range_count * kWide;
  return panel;
}

// Makes a panel at `to` of a group's queries from `first` on, with empty sums.
template <class Format>
void pack_panel(const Call& call, const BlockRoom& room, const Group& group, int64_t first, int64_t queries,
                float* to) {
  const Panel panel = panel_at(call, room, to, queries, false);
  const int64_t shared = call.shared();
  const auto factor = static_cast<float>(call.softcap > 0 ? call.scale : call.scale * kLog2E);
  std::fill(to, panel.top, 0.0f);
  std::fill(panel.top, panel.sum, kLowest);
  std::fill(panel.sum, panel.sum + kWide, 0.0f);
  auto* begins = reinterpret_cast<int32_t*>(panel.sum + kWide);
  int32_t* ends = begins + call.range_count * kWide;
  for (int64_t m = 0; m < kWide; ++m) {
    // A lane without a query gets the last query's ranges, so that no tile is masked because of it.
    const int64_t query = first + std::min(m, queries - 1), entry = group.entry + query / shared;
    for (int64_t i = 0; i < call.range_count; ++i) {
      const int64_t* range = call.ranges + (entry * call.range_count + i) * 2;
      begins[i * kWide + m] = static_cast<int32_t>(range[0]);
      ends[i * kWide + m] = static_cast<int32_t>(range[1]);
    }
    if (m >= queries) continue;
    const int64_t at = call.rows[entry] * call.row_stride + (group.head * shared + query % shared) * call.head_stride;
    for (int rerotated = 0; rerotated < (call.rerotated ? 2 : 1); ++rerotated) {
      const float* from = (rerotated ? call.rerotated : call.query) + at;
      float* column = to + rerotated * room.key_size * kWide + m;
      for (int64_t d = 0; d < room.key_size; d += kBlock) {
        const auto put = [&](const float* block) {
          for (int i = 0; i < kBlock; ++i) column[(d + i) * kWide] = block[Format::place(i)] * factor;
        };
        if (d + kBlock <= call.head_size)
          put(from + d);
        else
          put(Rest<Float32>(from + d, call.head_size - d).numbers);
      }
    }
  }
}

// Calls `put` with each token and each of its blocks in float32, and with zeros up to a multiple of kHigh tokens.
template <class Format, class Put>
void widen(const Heads<Format>& heads, int count, Put put) {
  const int64_t whole = heads.whole();
  for (int token = 0; token < count; ++token) {
    for (int64_t d = 0; d < whole; d += kBlock) put(token, d, Format::widen(heads[token] + d));
    if (whole < heads.size)
      put(token, whole, Format::widen(Rest<Format>(heads[token] + whole, heads.size - whole).numbers));
  }
  for (int token = count; token % kHigh; ++token)
    for (int64_t d = 0; d < heads.size; d += kBlock) put(token, d, typename Format::Lanes{});
}

template <class Format>
void attend_block(const Call& call, const Work& work, const Part& part, float* scratch, float* result) {
  const Group& group = work.groups[part.group];
  const int64_t queries = group.rows * call.shared();
  const BlockRoom room(call, queries);
  float* weights = scratch + room.panels * room.panel_size;                      // [kTile, kWide]
  float* keep = weights + kTile * kWide;                                         // [kWide]
  float* keys = keep + kWide;                                                    // [kTile, key_size]
  float* values = keys + kTile * room.key_size;                                  // [value_size / kHigh, kTile, kHigh]
  auto* touched = reinterpret_cast<int32_t*>(values + kTile * room.value_size);  // [range_count]

  // Calls `run` with each panel, its first query and how many it has.
  const auto each_panel = [&](auto run) {
    for (int64_t i = 0; i < room.panels; ++i)
      run(scratch + i * room.panel_size, i * kWide, std::min<int64_t>(kWide, queries - i * kWide));
  };
  each_panel(
      [&](float* panel, int64_t first, int64_t count) { pack_panel<Format>(call, room, group, first, count, panel); });

  Walk walk(call, work, part);
  Tile tiles[2];
  walk.next(tiles[0]);
  for (int current = 0; tiles[current].count > 0; current = 1 - current) {
    const Tile &tile = tiles[current], &next = tiles[1 - current];
    walk.next(tiles[1 - current]);
    const Heads<Format> tile_keys(call, call.keys, group.head, call.head_size, tile);
    const Heads<Format> tile_values(call, call.values, group.head, call.value_size, tile);
    widen(tile_keys, tile.count, [&](int token, int64_t d, auto lanes) {
      store(keys + token * room.key_size + d, lanes.first);
      store(keys + token * room.key_size + d + kLanes, lanes.second);
    });
    widen(tile_values, tile.count, [&](int token, int64_t d, auto lanes) {
      float block[kBlock];
      store(block, lanes.first);
      store(block + kLanes, lanes.second);
      for (int i = 0; i < kBlock; i += kHigh)
        std::memcpy(values + (d + i) * kTile + token * kHigh, block + i, kHigh * sizeof *block);
    });

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
        for (int64_t token = sight.from; token < end; token += kHigh)
          multiply_panel<vectors>(keys + token * room.key_size, room.key_size, 1, panel.queries, room.key_size,
                                  weights + token * kWide, nullptr);
        if (call.softcap > 0 || sight.ranges > 0) cap_and_mask(call, panel, tile, sight, touched, weights);
        weigh<vectors>(panel, sight.to - sight.from, weights + sight.from * kWide, keep);
        std::fill(weights + sight.to * kWide, weights + end * kWide, 0.0f);
        for (int64_t d = 0; d < room.value_size; d += kHigh)
          multiply_panel<vectors>(values + d * kTile + sight.from * kHigh, 1, kHigh, weights + sight.from * kWide,
                                  end - sight.from, panel.output + d * kWide, keep);
      };
      switch (panel.vectors) {
        case 1: return attend(std::integral_constant<int, 1>());
        // NOLINTNEXTLINE(bugprone-branch-clone): kVectors is 2 on some machines
        case 2: return attend(std::integral_constant<int, 2>());
        default: return attend(std::integral_constant<int, kVectors>());
      }
    });
  }

  float* top = result;
  float* sum = top + queries;
  float* weighted = sum + queries;
  each_panel([&](float* at, int64_t first, int64_t count) {
    const Panel panel = panel_at(call, room, at, count, false);
    for (int64_t m = 0; m < count; ++m) {
      top[first + m] = panel.top[m] / kLog2E;
      sum[first + m] = panel.sum[m];
      float* to = weighted + (first + m) * call.value_size;
      for (int64_t d = 0; d < room.value_size; d += kBlock) {
        float block[kBlock];
        for (int i = 0; i < kBlock; ++i) block[Format::place(i)] = panel.output[(d + i) * kWide + m];
        if (d + kBlock <= call.value_size)
          std::memcpy(to + d, block, sizeof block);
        else
          std::memcpy(to + d, block, (call.value_size - d) * sizeof *block);
      }
    }
  });
}
