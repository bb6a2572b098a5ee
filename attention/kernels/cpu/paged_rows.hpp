// One query row: products of a few queries with keys in place, a whole group of heads per load.
//
// Online softmax: Milakov and Gimelshein, Online normalizer calculation for softmax, 2018, algorithm 3.

#pragma once

#include <type_traits>

#include "paged_ahead.hpp"
#include "paged_staged.hpp"

// Products whose sums stay in registers: queries, and tokens or vectors of a value.
constexpr int kQueries = kRegisters == 32 ? 4 : 3;
constexpr int kBeside = 4;

// How many of `left` queries to take at once so that the last round is not a single one.
inline int64_t at_once(int64_t left) {
  const int64_t rounds = (left + kQueries - 1) / kQueries;
  return (left + rounds - 1) / rounds;
}

// Calls `run` with a compile-time 1, 2, 3 or 4.
template <class Run>
inline void dispatch(int64_t count, Run run) {
  switch (count) {
    case 1: return run(std::integral_constant<int, 1>());
    case 2: return run(std::integral_constant<int, 2>());
    // NOLINTNEXTLINE(bugprone-branch-clone): kQueries is 3 on some machines
    case 3: return run(std::integral_constant<int, 3>());
    default: return run(std::integral_constant<int, kQueries>());
  }
}

// Adds a block's products of Q queries with the keys that lie at `from` + `place`.
template <class Format, int Q>
[[gnu::always_inline]] inline void multiply_block(const float* query, int64_t query_stride,
                                                  const typename Format::Number* const (&from)[kBeside], int64_t place,
                                                  Floats (&sum)[Q][kBeside]) {
#pragma GCC unroll 2
  for (int step = 0; step < Format::kSteps; ++step) {
    typename Format::Operand queries[Q];
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q) {
      auto operand = Format::query(query + q * query_stride, step);
      keep_at_hand(operand);
      queries[q] = operand;
    }
#pragma GCC unroll 4
    for (int i = 0; i < kBeside; ++i) {
      auto key = Format::key(from[i] + place, step);
      keep_at_hand(key);
#pragma GCC unroll 4
      for (int q = 0; q < Q; ++q) sum[q][i] = Format::multiply(sum[q][i], key, queries[q]);
    }
  }
}

// logits [Q, kTile] of some tokens. Not inlined, since other live values would take its registers.
template <class Format, int Q>
[[gnu::noinline]] void multiply_keys(const float* query, int64_t query_stride, const Heads<Format>& keys, int count,
                                     Ahead& ahead, float* logits) {
  using Number = typename Format::Number;
  constexpr int64_t kLines = lines_of(kBeside * kBlock * sizeof(Number));
  const int64_t whole = keys.whole();
  for (int token = 0; token < count; token += kBeside) {
    const char* asked = ahead.take(whole / kBlock * kLines);
    const Number* from[kBeside];
    for (int i = 0; i < kBeside; ++i) from[i] = keys[std::min(token + i, count - 1)];
    Floats sum[Q][kBeside];
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q)
#pragma GCC unroll 4
      for (int i = 0; i < kBeside; ++i) sum[q][i] = Floats{};
    for (int64_t d = 0; d < whole; d += kBlock) {
      for (int line = 0; line < kLines; ++line, asked += kLine) prefetch(asked);
      multiply_block<Format, Q>(query + d, query_stride, from, d, sum);
    }
    if (whole < keys.size) {
      const int64_t left = keys.size - whole;
      const Rest<Format> rest[kBeside] = {
          {from[0] + whole, left}, {from[1] + whole, left}, {from[2] + whole, left}, {from[3] + whole, left}};
      const Number* const numbers[kBeside] = {rest[0].numbers, rest[1].numbers, rest[2].numbers, rest[3].numbers};
      multiply_block<Format, Q>(query + whole, query_stride, numbers, 0, sum);
    }
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q) store(logits + q * kTile + token, sums(sum[q][0], sum[q][1], sum[q][2], sum[q][3]));
  }
}

// output [Q, stride] + weights [Q, kTile] times V vectors of some tokens' values, from the number `place` on.
template <class Format, int Q, int V>
[[gnu::noinline]] void add_values(const float* weights, const Heads<Format>& values, int64_t place, int count,
                                  Ahead& ahead, float* output, int64_t stride) {
  using Number = typename Format::Number;
  constexpr int kRound = 8;
  constexpr int64_t kLines = lines_of(V * kLanes * sizeof(Number));
  Floats sum[Q][V];
#pragma GCC unroll 4
  for (int q = 0; q < Q; ++q)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[q][v] = floats(output + q * stride + place + v * kLanes);
  const auto add = [&](int token, const Number* from) {
    Floats weight[Q];
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q) weight[q] = splat(weights[q * kTile + token]);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      // One vector at a time: registers hold the sums, the weights and one more vector.
      Floats lane = Format::lane(from + v / 2 * kBlock, v % 2);
      keep_at_hand(lane);
#pragma GCC unroll 4
      for (int q = 0; q < Q; ++q) sum[q][v] += weight[q] * lane;
    }
  };
  if (place + V * kLanes <= values.size) {
    for (int token = 0; token < count;) {
      const char* asked = ahead.take(kRound * kLines);
      for (const int stop = std::min(token + kRound, count); token < stop; ++token) {
        for (int line = 0; line < kLines; ++line, asked += kLine) prefetch(asked);
        add(token, values[token] + place);
      }
    }
  } else {
    for (int token = 0; token < count; ++token) {
      Number rest[V * kLanes] = {};
      std::memcpy(rest, values[token] + place, (values.size - place) * sizeof(Number));
      add(token, rest);
    }
  }
#pragma GCC unroll 4
  for (int q = 0; q < Q; ++q)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(output + q * stride + place + v * kLanes, sum[q][v]);
}

// One query's logits become weights. Returns the factor by which earlier sums must be multiplied.
inline float weigh(const Call& call, float* logits, int count, float& top, float& sum) {
  const int padded = static_cast<int>(rounded(count, kLanes));
  if (call.softcap > 0)
    for (int i = 0; i < padded; i += kLanes)
      store(logits + i, softcapped(floats(logits + i), static_cast<float>(call.softcap)) * kLog2E);
  for (int i = count; i < padded; ++i) logits[i] = -__builtin_inff();
  Floats most = splat(top);
  for (int i = 0; i < padded; i += kLanes) most = larger(floats(logits + i), most);
  const float highest = largest_of(most);
  Floats total = {};
  for (int i = 0; i < padded; i += kLanes) {
    const Floats weight = power_of_two(floats(logits + i) - highest);
    store(logits + i, weight);
    total += weight;
  }
  const float keep = highest > top ? power_of_two(splat(top - highest))[0] : 1.0f;
  sum = sum * keep + sum_of(total);
  top = highest;
  return keep;
}

// A part of a row. `claim` is called once, before the end: it returns the part that this thread takes next, or null.
template <class Format, class Claim>
void attend_row(const Call& call, const Work& work, const Part& part, float* scratch, float* result, Claim claim) {
  using Stage = Staged<Format>;
  using Working = typename Stage::Working;
  const Group& group = work.groups[part.group];
  const int64_t shared = call.shared(), queries = group.heads * shared;
  const int64_t key_stride = rounded(call.head_size, kBlock), value_stride = rounded(call.value_size, kBlock);
  float* packed = scratch;                                             // [2, queries, key_stride]
  float* output = packed + 2 * queries * key_stride;                   // [queries, value_stride]
  float* logits = output + queries * value_stride;                     // [queries, kTile]
  auto* room = reinterpret_cast<uint16_t*>(logits + queries * kTile);  // for staged heads
  float* top = result;
  float* sum = top + queries;

  const int64_t first = call.rows[group.entry] * call.row_stride + group.head * shared * call.head_stride;
  const auto factor = static_cast<float>(call.softcap > 0 ? call.scale : call.scale * kLog2E) * Stage::kUnit;
  for (int rerotated = 0; rerotated < (call.rerotated ? 2 : 1); ++rerotated) {
    for (int64_t q = 0; q < queries; ++q) {
      const float* from = (rerotated ? call.rerotated : call.query) + first + q * call.head_stride;
      float* to = packed + (rerotated * queries + q) * key_stride;
      for (int64_t d = 0; d < key_stride; d += kBlock) {
        const auto put = [&](const float* block) {
          float scaled[kBlock];
          for (int i = 0; i < kBlock; ++i) scaled[i] = block[i] * factor;
          Working::pack(scaled, to + d);
        };
        if (d + kBlock <= call.head_size)
          put(from + d);
        else
          put(Rest<Float32>(from + d, call.head_size - d).numbers);
      }
    }
  }
  std::fill(output, output + queries * value_stride, 0.0f);
  std::fill(top, top + queries, kLowest);
  std::fill(sum, sum + queries, 0.0f);

  // Calls `run` with a head, some of its queries as a compile-time number, and the first of them.
  const auto each_queries = [&](auto run) {
    for (int64_t h = 0; h < group.heads; ++h)
      for (int64_t q = 0, taken; q < shared; q += taken) {
        taken = at_once(shared - q);
        dispatch(taken, [&](auto count) { run(h, count, h * shared + q); });
      }
  };
  // Calls `run` with each chunk of `heads` and the next one to prefetch, at the end `after`.
  const auto each_chunk = [&](const Heads<Format>& heads, int count, Ahead after, auto run) {
    for (int begin = 0, size; begin < count; begin += size) {
      size = std::min(kChunk, count - begin);
      const int end = begin + size;
      Ahead ahead = end < count ? Ahead(heads.at(0, end), std::min(kChunk, count - end), group.heads) : after;
      run(begin, size, ahead);
      ahead.ask_rest();
    }
  };

  Walk walk(call, work, part);
  Tile tiles[2];
  walk.next(tiles[0]);
  bool last = false;
  for (int current = 0; !last; current = 1 - current) {
    const Tile& tile = tiles[current];
    Tile& next_tile = tiles[1 - current];
    const Group* next_group = &group;
    if (!walk.next(next_tile)) {
      last = true;
      if (const Part* next = claim()) {
        next_group = &work.groups[next->group];
        Walk(call, work, *next).next(next_tile);
      }
    }
    const Heads<Format> keys(call, call.keys, group.head, call.head_size, tile);
    const Heads<Format> values(call, call.values, group.head, call.value_size, tile);
    const Heads<Format> next_keys(call, call.keys, next_group->head, call.head_size, next_tile);
    const float* query = packed + (tile.near ? queries : 0) * key_stride;
    each_chunk(keys, tile.count, Ahead(values, std::min(kChunk, tile.count), group.heads),
               [&](int begin, int count, Ahead& ahead) {
                 const Heads<Working> chunk = Stage::stage(keys.at(0, begin), count, group.heads, room);
                 each_queries([&](int64_t h, auto taken, int64_t q) {
                   multiply_keys<Working, taken>(query + q * key_stride, key_stride, chunk.at(h, 0), count, ahead,
                                                 logits + q * kTile + begin);
                 });
               });
    for (int64_t q = 0; q < queries; ++q) {
      const float keep = weigh(call, logits + q * kTile, tile.count, top[q], sum[q]);
      if (keep == 1.0f) continue;
      float* to = output + q * value_stride;
      for (int64_t d = 0; d < value_stride; d += kLanes) store(to + d, floats(to + d) * keep);
    }
    each_chunk(values, tile.count, Ahead(next_keys, std::min(kChunk, next_tile.count), next_group->heads),
               [&](int begin, int count, Ahead& ahead) {
                 const Heads<Working> staged = Stage::stage(values.at(0, begin), count, group.heads, room);
                 each_queries([&](int64_t h, auto taken, int64_t q) {
                   const float* weights = logits + q * kTile + begin;
                   float* to = output + q * value_stride;
                   const Heads<Working> chunk = staged.at(h, 0);
                   int64_t place = 0;
                   for (; place + kBlock < call.value_size; place += 2 * kBlock)
                     add_values<Working, taken, 4>(weights, chunk, place, count, ahead, to, value_stride);
                   if (place < call.value_size)
                     add_values<Working, taken, 2>(weights, chunk, place, count, ahead, to, value_stride);
                 });
               });
  }

  float* weighted = sum + queries;
  for (int64_t q = 0; q < queries; ++q) {
    top[q] /= kLog2E;
    const float* from = output + q * value_stride;
    float* to = weighted + q * call.value_size;
    for (int64_t d = 0; d < value_stride; d += kBlock) {
      float block[kBlock];
      for (int i = 0; i < kBlock; ++i) block[Working::place(i)] = from[d + i] * Stage::kUnit;
      if (d + kBlock <= call.value_size)
        std::memcpy(to + d, block, sizeof block);
      else
        std::memcpy(to + d, block, (call.value_size - d) * sizeof *block);
    }
  }
}

inline size_t row_scratch(const Call& call) {
  const int64_t key_stride = rounded(call.head_size, kBlock), value_stride = rounded(call.value_size, kBlock);
  return call.query_heads * (2 * key_stride + value_stride + kTile) + stage_scratch(call);
}
