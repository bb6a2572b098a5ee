// One query row: products of a few queries with keys as they lie, a whole group of heads per load.
//
// Online softmax: Milakov and Gimelshein, Online normalizer calculation for softmax, 2018, algorithm 3.

#pragma once

#include <type_traits>

#include "cpu_paged_heads.hpp"

// How many of `left` queries to take at once so that their sums stay in registers, and none is left alone.
inline int64_t together(int64_t left) {
  constexpr int64_t most = kRegisters == 32 ? 4 : 3;
  const int64_t rounds = (left + most - 1) / most;
  return (left + rounds - 1) / rounds;
}

// Calls `run` with a compile-time 1, 2, 3 or 4.
template <class Run>
inline void dispatch(int64_t count, Run run) {
  switch (count) {
    case 1: return run(std::integral_constant<int, 1>());
    case 2: return run(std::integral_constant<int, 2>());
    case 3: return run(std::integral_constant<int, 3>());
    default: return run(std::integral_constant<int, 4>());
  }
}

// logits [Q, kTile] of a tile's tokens.
template <class Format, int Q>
void multiply_keys(const float* query, int64_t query_stride, const Heads<Format>& keys, int count,
                   const Heads<Format>& coming, int coming_count, float* logits) {
  const int64_t whole = keys.whole();
  for (int token = 0; token < count; token += 4) {
    const typename Format::Number* from[4];
    for (int i = 0; i < 4; ++i) {
      from[i] = keys[std::min(token + i, count - 1)];
      if (token + i < coming_count) coming.prefetch(token + i);
    }
    Floats sum[Q][4] = {};
    const auto add = [&](const auto& at, int64_t place) {
      for (int i = 0; i < 4; ++i) {
        const auto key = Format::keys(at(i));
        for (int q = 0; q < Q; ++q)
          sum[q][i] = Format::multiply(sum[q][i], key, query + q * query_stride + place);
      }
    };
    for (int64_t d = 0; d < whole; d += kBlock) add([&](int i) { return from[i] + d; }, d);
    if (whole < keys.size) {
      const Rest<Format> rest[4] = {{from[0] + whole, keys.size - whole},
                                    {from[1] + whole, keys.size - whole},
                                    {from[2] + whole, keys.size - whole},
                                    {from[3] + whole, keys.size - whole}};
      add([&](int i) { return rest[i].numbers; }, whole);
    }
    for (int q = 0; q < Q; ++q) store(logits + q * kTile + token, sums(sum[q][0], sum[q][1], sum[q][2], sum[q][3]));
  }
}

// output [Q, stride] = output * keep [Q] + weights [Q, kTile] times V blocks of the tile's values.
template <class Format, int Q, int V>
void add_values(const float* weights, const float* keep, const Heads<Format>& values, int64_t place, int count,
                const Heads<Format>& coming, int coming_count, float* output, int64_t stride) {
  Floats sum[Q][2 * V];
  for (int q = 0; q < Q; ++q)
    for (int v = 0; v < 2 * V; ++v) sum[q][v] = floats(output + q * stride + place + v * kLanes) * keep[q];
  const auto add = [&](int token, int v, const typename Format::Number* from) {
    // One after the other, since there are registers for the sums, the weights and one vector more.
    for (int which = 0; which < 2; ++which) {
      const Floats lane = Format::lane(from, which);
      for (int q = 0; q < Q; ++q) sum[q][2 * v + which] += weights[q * kTile + token] * lane;
    }
  };
  if (place + V * kBlock <= values.size) {
    for (int token = 0; token < count; ++token) {
      if (token < coming_count) coming.prefetch(token);
      for (int v = 0; v < V; ++v) add(token, v, values[token] + place + v * kBlock);
    }
  } else {
    for (int token = 0; token < count; ++token)
      add(token, 0, Rest<Format>(values[token] + place, values.size - place).numbers);
  }
  for (int q = 0; q < Q; ++q)
    for (int v = 0; v < 2 * V; ++v) store(output + q * stride + place + v * kLanes, sum[q][v]);
}

// One query's logits become weights; what was summed before must be multiplied by what this gives back.
inline float weigh(const Call& call, float* logits, int count, float& top, float& sum) {
  const int padded = static_cast<int>(rounded(count, kLanes));
  for (int i = count; i < padded; ++i) logits[i] = -__builtin_inff();
  Floats most = splat(top);
  for (int i = 0; i < padded; i += kLanes) {
    Floats scaled = floats(logits + i) * static_cast<float>(call.scale);
    if (call.softcap > 0) {
      scaled = softcapped(scaled, static_cast<float>(call.softcap));
      for (int lane = count - i; lane < kLanes; ++lane) scaled[lane] = -__builtin_inff();
    }
    store(logits + i, scaled);
    most = larger(scaled, most);
  }
  const float highest = largest_of(most);
  Floats total = {};
  for (int i = 0; i < padded; i += kLanes) {
    const Floats weight = exponential(floats(logits + i) - highest);
    store(logits + i, weight);
    total += weight;
  }
  const float keep = exponential(splat(top - highest))[0];
  sum = sum * keep + sum_of(total);
  top = highest;
  return keep;
}

template <class Format>
void attend_row(const Call& call, const Work& work, const Part& part, float* scratch, float* result) {
  const Group& group = work.groups[part.group];
  const int64_t shared = call.shared(), queries = group.heads * shared;
  const int64_t key_stride = rounded(call.head_size, kBlock), value_stride = rounded(call.value_size, kBlock);
  float* packed = scratch;  // [2, queries, key_stride]
  float* output = packed + 2 * queries * key_stride;  // [queries, value_stride]
  float* logits = output + queries * value_stride;  // [shared, kTile]
  float* keep = logits + rounded(shared, kLanes) * kTile;
  float* top = result;
  float* sum = top + queries;

  const int64_t first = call.rows[group.entry] * call.row_stride + group.head * shared * call.head_stride;
  for (int turned = 0; turned < (call.turned ? 2 : 1); ++turned) {
    for (int64_t q = 0; q < queries; ++q) {
      const float* from = (turned ? call.turned : call.query) + first + q * call.head_stride;
      float* to = packed + (turned * queries + q) * key_stride;
      for (int64_t d = 0; d < key_stride; d += kBlock) {
        const Rest<Float32> padded(from + d, std::min<int64_t>(kBlock, call.head_size - d));
        Format::pack(padded.numbers, to + d);
      }
    }
  }
  std::fill(output, output + queries * value_stride, 0.0f);
  std::fill(top, top + queries, kLowest);
  std::fill(sum, sum + queries, 0.0f);

  const auto head = [&](const void* pages, int64_t h, int64_t size, const Tile& tile) {
    return Heads<Format>(call, pages, group.head + h, size, tile);
  };
  Walk walk(call, work, part);
  Tile tiles[2];
  walk.next(tiles[0]);
  for (int current = 0; tiles[current].count > 0; current = 1 - current) {
    const Tile &tile = tiles[current], &after = tiles[1 - current];
    walk.next(tiles[1 - current]);
    for (int64_t h = 0; h < group.heads; ++h) {
      const bool last = h + 1 == group.heads;
      const Tile& coming = last ? after : tile;
      const auto keys = head(call.keys, h, call.head_size, tile);
      const auto coming_keys = head(call.keys, last ? 0 : h + 1, call.head_size, coming);
      const float* query = packed + ((tile.near ? queries : 0) + h * shared) * key_stride;
      int coming_count = coming.count;
      for (int64_t q = 0, taken; q < shared; q += taken, coming_count = 0) {
        taken = together(shared - q);
        dispatch(taken, [&](auto constant) {
          multiply_keys<Format, constant>(query + q * key_stride, key_stride, keys, tile.count, coming_keys,
                                          coming_count, logits + q * kTile);
        });
      }
      const auto coming_values = head(call.values, last ? 0 : h + 1, call.value_size, coming);
      for (int64_t q = 0; q < shared; ++q)
        keep[q] = weigh(call, logits + q * kTile, tile.count, top[h * shared + q], sum[h * shared + q]);
      const auto values = head(call.values, h, call.value_size, tile);
      coming_count = coming.count;
      for (int64_t q = 0, taken; q < shared; q += taken) {
        taken = together(shared - q);
        dispatch(taken, [&](auto constant) {
          float* to = output + (h * shared + q) * value_stride;
          int64_t place = 0;
          for (; place + 2 * kBlock <= call.value_size; place += 2 * kBlock, coming_count = 0)
            add_values<Format, constant, 2>(logits + q * kTile, keep + q, values, place, tile.count, coming_values,
                                            coming_count, to, value_stride);
          for (; place < call.value_size; place += kBlock, coming_count = 0)
            add_values<Format, constant, 1>(logits + q * kTile, keep + q, values, place, tile.count, coming_values,
                                            coming_count, to, value_stride);
        });
      }
    }
  }

  float* weighted = sum + queries;
  for (int64_t q = 0; q < queries; ++q)
    for (int64_t d = 0; d < value_stride; ++d) {
      const int64_t place = d / kBlock * kBlock + Format::place(static_cast<int>(d % kBlock));
      if (place < call.value_size) weighted[q * call.value_size + place] = output[q * value_stride + d];
    }
}

inline size_t row_scratch(const Call& call) {
  const int64_t key_stride = rounded(call.head_size, kBlock), value_stride = rounded(call.value_size, kBlock);
  return call.query_heads * (2 * key_stride + value_stride) + rounded(call.shared(), kLanes) * (kTile + 1);
}
