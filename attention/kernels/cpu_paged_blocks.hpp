// A block of consecutive query rows and one key head: matrix products over tiles of keys and values.
//
// Queries lie side by side in a vector's lanes, so that maximum, sum and rescaling need no sums across lanes.

#pragma once

#include "cpu_paged_lanes.hpp"
#include "cpu_paged_work.hpp"

// Rows and columns of a product whose sums stay in registers.
constexpr int kHigh = kRegisters == 32 ? 8 : 4;
constexpr int kWide = 3 * kLanes;

// c [R, kWide] = c * keep [kWide], or 0 without keep, + a [R, depth] times b [depth, kWide].
template <int R>
void multiply_panel(const float* a, int64_t row_step, int64_t depth_step, const float* b, int64_t depth, float* c,
                    int64_t stride, const float* keep) {
  Floats sum[R][3] = {};
  if (keep)
    for (int row = 0; row < R; ++row)
      for (int i = 0; i < 3; ++i)
        sum[row][i] = floats(c + row * stride + i * kLanes) * floats(keep + i * kLanes);
  for (int64_t k = 0; k < depth; ++k, a += depth_step, b += stride) {
    Floats right[3] = {floats(b), floats(b + kLanes), floats(b + 2 * kLanes)};
    for (Floats& vector : right) keep_at_hand(vector);
    for (int row = 0; row < R; ++row) {
      const float left = a[row * row_step];
      for (int i = 0; i < 3; ++i) sum[row][i] += left * right[i];
    }
  }
  for (int row = 0; row < R; ++row)
    for (int i = 0; i < 3; ++i) store(c + row * stride + i * kLanes, sum[row][i]);
}

// As above, for all `rows` rows and `stride` columns.
inline void multiply(const float* a, int64_t row_step, int64_t depth_step, const float* b, int64_t depth, float* c,
                     int64_t stride, int64_t rows, const float* keep) {
  for (int64_t column = 0; column < stride; column += kWide) {
    const float* panel_keep = keep ? keep + column : nullptr;
    int64_t row = 0;
    for (; row + kHigh <= rows; row += kHigh)
      multiply_panel<kHigh>(a + row * row_step, row_step, depth_step, b + column, depth, c + row * stride + column,
                            stride, panel_keep);
    for (; row < rows; ++row)
      multiply_panel<1>(a + row * row_step, row_step, depth_step, b + column, depth, c + row * stride + column,
                        stride, panel_keep);
  }
}

template <class Format>
void attend_block(const Call& call, const Work& work, const Part& part, float* scratch, float* result) {
  using Number = typename Format::Number;
  const Group& group = work.groups[part.group];
  const int64_t shared = call.shared(), queries = group.rows * shared, columns = rounded(queries, kWide);
  const int64_t key_size = rounded(call.head_size, kBlock), value_size = rounded(call.value_size, kBlock);
  float* packed = scratch;                         // [2, key_size, columns]
  float* output = packed + 2 * key_size * columns;  // [value_size, columns]
  float* weights = output + value_size * columns;  // [kTile, columns]
  float* keys = weights + kTile * columns;         // [kTile, key_size]
  float* values = keys + kTile * key_size;         // [kTile, value_size]
  float* keep = values + kTile * value_size;
  float* top = keep + columns;
  float* sum = top + columns;
  int32_t* begins = reinterpret_cast<int32_t*>(sum + columns);  // [range_count, columns]
  int32_t* ends = begins + call.range_count * columns;
  int32_t* seen = ends + call.range_count * columns;  // [rows]
  int32_t* touched = seen + group.rows;               // [range_count]

  const bool turned = call.turned != nullptr;
  std::fill(packed, packed + (turned ? 2 : 1) * key_size * columns, 0.0f);
  std::fill(output, output + value_size * columns, 0.0f);
  std::fill(top, top + columns, kLowest);
  std::fill(sum, sum + columns, 0.0f);
  std::fill(begins, ends + call.range_count * columns, 0);
  for (int64_t m = 0; m < queries; ++m) {
    const int64_t entry = group.entry + m / shared;
    const int64_t at = call.rows[entry] * call.row_stride + (group.head * shared + m % shared) * call.head_stride;
    for (int64_t d = 0; d < key_size; ++d) {
      const int64_t place = d / kBlock * kBlock + Format::place(static_cast<int>(d % kBlock));
      if (place >= call.head_size) continue;
      packed[d * columns + m] = call.query[at + place];
      if (turned) packed[(key_size + d) * columns + m] = call.turned[at + place];
    }
    for (int64_t i = 0; i < call.range_count; ++i) {
      const int64_t* range = call.ranges + (entry * call.range_count + i) * 2;
      begins[i * columns + m] = static_cast<int32_t>(range[0]);
      ends[i * columns + m] = static_cast<int32_t>(range[1]);
    }
  }

  Walk walk(call, work, part);
  Tile tile;
  while (walk.next(tile)) {
    const auto widen = [&](const void* pages, int64_t size, int64_t padded, float* to) {
      for (int token = 0; token < tile.count; ++token, to += padded) {
        const int64_t head = tile.slots[token] * call.kv_heads + group.head;
        const Number* from = static_cast<const Number*>(pages) + head * size;
        for (int64_t d = 0; d < padded; d += kBlock) {
          const Rest<Format> rest(from + d, std::min<int64_t>(kBlock, size - d));
          const auto lanes = Format::widen(rest.numbers);
          store(to + d, lanes.first);
          store(to + d + kLanes, lanes.second);
        }
      }
    };
    widen(call.keys, call.head_size, key_size, keys);
    widen(call.values, call.value_size, value_size, values);
    multiply(keys, key_size, 1, packed + (tile.near ? key_size * columns : 0), key_size, weights, columns, tile.count,
             nullptr);

    // Only ranges that hold some of the tile are looked at, and none if every row sees all of it.
    const int32_t first = tile.positions[0], last = tile.positions[tile.count - 1];
    int64_t touched_count = 0;
    std::fill(seen, seen + group.rows, 0);
    for (int64_t i = 0; i < call.range_count; ++i) {
      bool touches = false;
      for (int64_t row = 0; row < group.rows; ++row) {
        const int32_t begin = begins[i * columns + row * shared], end = ends[i * columns + row * shared];
        touches |= begin <= last && first < end;
        seen[row] |= begin <= first && last < end;
      }
      if (touches) touched[touched_count++] = static_cast<int32_t>(i);
    }
    if (std::all_of(seen, seen + group.rows, [](int32_t all) { return all != 0; })) touched_count = 0;
    const auto visible = [&](int token, int64_t column) {
      const Ints at = Ints{} + tile.positions[token];
      Ints any = {};
      for (int64_t i = 0; i < touched_count; ++i) {
        const int64_t place = touched[i] * columns + column;
        any |= (at >= load<Ints>(begins + place)) & (at < load<Ints>(ends + place));
      }
      return any;
    };
    for (int64_t column = 0; column < columns; column += kLanes) {
      Floats most = floats(top + column), total = {};
      for (int token = 0; token < tile.count; ++token) {
        float* at = weights + token * columns + column;
        Floats logits = floats(at) * static_cast<float>(call.scale);
        if (call.softcap > 0) logits = softcapped(logits, static_cast<float>(call.softcap));
        if (touched_count > 0) logits = where(visible(token, column), logits, splat(-__builtin_inff()));
        store(at, logits);
        most = larger(logits, most);
      }
      for (int token = 0; token < tile.count; ++token) {
        float* at = weights + token * columns + column;
        const Floats weight = exponential(floats(at) - most);
        store(at, weight);
        total += weight;
      }
      const Floats kept = exponential(floats(top + column) - most);
      store(keep + column, kept);
      store(sum + column, floats(sum + column) * kept + total);
      store(top + column, most);
    }
    multiply(values, 1, value_size, weights, tile.count, output, columns, value_size, keep);
  }

  float* weighted = result + 2 * queries;
  std::copy(top, top + queries, result);
  std::copy(sum, sum + queries, result + queries);
  for (int64_t m = 0; m < queries; ++m)
    for (int64_t d = 0; d < value_size; ++d) {
      const int64_t place = d / kBlock * kBlock + Format::place(static_cast<int>(d % kBlock));
      if (place < call.value_size) weighted[m * call.value_size + place] = output[d * columns + m];
    }
}

inline size_t block_scratch(const Call& call) {
  const int64_t rows = std::max<int64_t>(1, kBlockQueries / call.shared());
  const int64_t columns = rounded(rows * call.shared(), kWide);
  const int64_t key_size = rounded(call.head_size, kBlock), value_size = rounded(call.value_size, kBlock);
  return columns * (2 * key_size + value_size + kTile + 3 + 2 * call.range_count) + kTile * (key_size + value_size) +
         rows + call.range_count;
}
