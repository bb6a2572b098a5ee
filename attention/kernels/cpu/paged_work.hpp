// A call, and how it is cut into parts that threads take one after the other.
//
// There are two ways, which sum in different orders: a block of rows, or a single row. All rows of a prompt go in
// blocks, even a block of one row, so that results do not depend on how the prompt is cut into steps. A row after the
// prompt is computed by itself, unless it is recomputed with its neighbors; a row with ranges for each KV head always.
// In both ways a row's tokens are cut by the ranges that it sees, never by other rows or the number of threads, and
// the parts' results are combined in order: to the last bit, a row's result is the same in any batch.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "lanes.hpp"
#include "paged_call.hpp"
#include "threads.hpp"

inline int64_t rounded(int64_t number, int64_t to) { return (number + to - 1) / to * to; }

// Rows and columns of a product whose sums stay in registers: 8 sums hide a product's latency of 4 cycles where two
// begin in each. A block's queries lie side by side in panels of kWide.
constexpr int kHigh = kRegisters == 32 ? 8 : 4;
constexpr int kVectors = kRegisters == 32 ? 3 : 2;
constexpr int kWide = kVectors * kLanes;

// Tokens that are computed at once: their logits fit into the L1 cache.
constexpr int kTile = 64;

// Tokens of a part: enough to outweigh the final combination, few enough that threads end at about the same time. A row
// of at least twice kLeastRowTokens is cut into an even number of equal parts of at most kMostRowTokens. A block is
// cut at multiples of some number of positions, so that a part has about kBlockTokens.
constexpr int64_t kLeastRowTokens = 64;
constexpr int64_t kMostRowTokens = 512;
constexpr int64_t kBlockTokens = 1024;
constexpr int64_t kRowStep = 16;  // all parts but the last are multiples of it

// Queries (rows times the heads that share a KV head) of a block of rows. The more there are, the less of the time goes
// into loading keys and values, and the fewer parts there are for threads. Many queries of large heads would not fit
// into the L2 cache.
constexpr int64_t kMostBlockQueries = 768;
constexpr int64_t kLeastBlockQueries = 192;
constexpr int64_t kBlockHeads = 128;  // numbers of a key and a value together with which most queries fit
constexpr int64_t kPartsPerThread = 6;

// The largest logit before any: small enough for a weight of 0, and finite, so that no difference is NaN.
constexpr float kLowest = -1e30f;

// The most queries of a block.
inline int64_t most_block_queries(const Call& call) {
  const int64_t most = kMostBlockQueries * kBlockHeads / std::max(kBlockHeads, call.head_size + call.value_size);
  return std::max({kLeastBlockQueries, most, call.shared()});
}

struct Range {
  int64_t begin, end;
};

// Query rows and KV heads that are computed at once: one row and some heads, or a block of rows and one head.
struct Group {
  bool block;
  int64_t entry, rows;
  int64_t head, heads;
  size_t ranges, ranges_end;  // the union of the rows' ranges
  size_t part, parts_end;
  size_t results;  // where the first part's result lies
};

struct Part {
  size_t group;
  size_t range;  // it begins in this range, at this position
  int64_t position, tokens;
};

class Work {
 public:
  explicit Work(const Call& call) : call_(call) {
    for (int64_t entry = 0, stop; entry < call.entries; entry = stop) {
      for (stop = entry + 1; stop < call.entries && follows(stop);) ++stop;
      add_run(entry, stop - entry);
    }
    add_rows();
  }

  std::vector<Range> ranges;
  std::vector<Group> groups;
  std::vector<Part> parts;
  size_t results_size = 0;

  // As many threads as are worth their start.
  int64_t threads() const {
    int64_t products = 0;
    for (const Part& part : parts) products += part.tokens * groups[part.group].rows * groups[part.group].heads;
    products *= call_.shared() * (call_.head_size + call_.value_size);
    return parts.size() > 1 && products >= kParallelProducts ? call_.threads : 1;
  }

  // Numbers of one part's result: for each query the largest logit, the sum of weights, the weighted values. A block's
  // are whole panels.
  size_t result_size(const Group& group) const {
    const int64_t queries = group.rows * group.heads * call_.shared();
    if (group.block) return rounded(queries, kWide) * (2 + rounded(call_.value_size, kBlock));
    return queries * (2 + call_.value_size);
  }

 private:
  const Call& call_;
  std::vector<int64_t> single_rows_;

  bool follows(int64_t entry) const {
    return call_.range_heads == 1 && call_.rows[entry] == call_.rows[entry - 1] + 1 &&
           call_.owners[entry] == call_.owners[entry - 1] && given(entry) == given(entry - 1) &&
           cut(entry) == cut(entry - 1);
  }

  // Rows that were decoded and are computed again after a preemption are computed as exactly as they were.
  bool given(int64_t entry) const { return call_.given[call_.rows[entry]]; }

  // How many positions a part spans in a block with this row: more if it sees only some of them.
  int64_t cut(int64_t entry) const {
    int64_t seen = 0, last = 0, step = kBlockTokens;
    each_range(entry, 0, [&](int64_t begin, int64_t end) {
      seen += end - begin;
      last = std::max(last, end);
    });
    if (seen <= kBlockTokens) return INT64_MAX;
    while (2 * step * seen <= kBlockTokens * last) step *= 2;
    return step;
  }

  // How many blocks `rows` rows make, of which `last` sees most: few, but enough for all threads to end together.
  int64_t block_count(int64_t last, int64_t rows) const {
    int64_t seen = 0;
    each_range(last, 0, [&](int64_t begin, int64_t end) { seen += end - begin; });
    const int64_t parts = call_.kv_heads * (seen / kBlockTokens + 1);
    int64_t blocks = 0;
    for (int64_t queries = most_block_queries(call_);; queries /= 2) {
      const int64_t most = std::max<int64_t>(1, queries / call_.shared());
      blocks = (rows + most - 1) / most;
      if (blocks * parts >= kPartsPerThread * call_.threads || queries / 2 < kLeastBlockQueries) return blocks;
    }
  }

  // Consecutive rows: blocks of about equally many, the last ones first, since these see most and threads end at about
  // the same time if the last parts are small.
  void add_run(int64_t entry, int64_t rows) {
    const int64_t blocks = block_count(entry + rows - 1, rows);
    for (int64_t block = blocks; block-- > 0;) {
      const int64_t first = rows * block / blocks, stop = rows * (block + 1) / blocks;
      if (stop == first + 1 && !(call_.range_heads == 1 && given(entry + first)))
        single_rows_.push_back(entry + first);
      else
        add_block(entry + first, stop - first);
    }
  }

  void add_block(int64_t entry, int64_t rows) {
    const size_t first = ranges.size();
    for (int64_t row = entry; row < entry + rows; ++row) add_ranges(row, 0);
    merge(first);
    for (int64_t head = 0; head < call_.kv_heads; ++head)
      add_group({true, entry, rows, head, 1, first, ranges.size(), 0, 0, 0}, cut(entry));
  }

  // All heads at once, in memory order, unless that leaves fewer parts than threads.
  void add_rows() {
    int64_t heads = 1;
    if (call_.range_heads == 1) {
      int64_t seen = 0, expected = 0;
      for (const int64_t entry : single_rows_) {
        const size_t first = ranges.size();
        add_ranges(entry, 0);
        seen += tokens(first);
        expected += row_parts(tokens(first));
        ranges.resize(first);
      }
      heads = call_.kv_heads;
      if (seen * call_.query_heads * (call_.head_size + call_.value_size) >= kParallelProducts)
        while (heads > 1 && expected * ((call_.kv_heads + heads - 1) / heads) < call_.threads) heads = (heads + 1) / 2;
    }
    for (const int64_t entry : single_rows_) {
      size_t first = ranges.size();
      for (int64_t head = 0; head < call_.kv_heads; head += heads) {
        if (head == 0 || call_.range_heads > 1) {
          first = ranges.size();
          add_ranges(entry, head);
        }
        const int64_t seen = tokens(first), parts = row_parts(seen);
        add_group({false, entry, 1, head, std::min(heads, call_.kv_heads - head), first, ranges.size(), 0, 0, 0},
                  rounded((seen + parts - 1) / parts, kRowStep));
      }
    }
  }

  static int64_t row_parts(int64_t tokens) {
    return tokens < 2 * kLeastRowTokens ? 1 : 2 * ((tokens + 2 * kMostRowTokens - 1) / (2 * kMostRowTokens));
  }

  // Calls `take` with the begin and the end of each range of positions that a row sees.
  template <class Take>
  void each_range(int64_t entry, int64_t head, Take take) const {
    const int64_t* range = call_.ranges + (entry * call_.range_heads + head) * call_.range_count * 2;
    for (int64_t i = 0; i < call_.range_count; ++i, range += 2)
      if (range[0] < range[1]) take(range[0], range[1]);
  }

  void add_ranges(int64_t entry, int64_t head) {
    each_range(entry, head, [&](int64_t begin, int64_t end) { ranges.push_back({begin, end}); });
  }

  int64_t tokens(size_t first) const {
    int64_t sum = 0;
    for (size_t i = first; i < ranges.size(); ++i) sum += ranges[i].end - ranges[i].begin;
    return sum;
  }

  // Makes the ranges from `first` on disjoint and ascending.
  void merge(size_t first) {
    std::sort(ranges.begin() + static_cast<std::ptrdiff_t>(first), ranges.end(),
              [](const Range& a, const Range& b) { return a.begin < b.begin; });
    size_t last = first;
    for (size_t i = first + 1; i < ranges.size(); ++i) {
      if (ranges[i].begin <= ranges[last].end)
        ranges[last].end = std::max(ranges[last].end, ranges[i].end);
      else
        ranges[++last] = ranges[i];
    }
    ranges.resize(std::min(ranges.size(), last + 1));
  }

  // A block is cut by position, a row by the number of its tokens before.
  void add_group(Group group, int64_t part_tokens) {
    group.part = parts.size();
    group.results = results_size;
    int64_t seen = 0, current = -1;
    for (size_t i = group.ranges; i < group.ranges_end; ++i) {
      for (int64_t position = ranges[i].begin, taken; position < ranges[i].end; position += taken, seen += taken) {
        const int64_t place = group.block ? position : seen;
        if (place / part_tokens != current) parts.push_back({groups.size(), i, position, 0});
        current = place / part_tokens;
        taken = std::min(part_tokens - place % part_tokens, ranges[i].end - position);
        parts.back().tokens += taken;
      }
    }
    group.parts_end = parts.size();
    results_size += result_size(group) * (group.parts_end - group.part);
    groups.push_back(group);
  }
};

// Consecutive tokens that a part sees, without those on evicted pages; in a block, tiles end at multiples of kTile.
struct Tile {
  int count = 0;
  bool near = false;    // all of them take the rerotated queries, else none
  uint64_t absent = 0;  // a bit for each that is none, see `spread`
  int32_t positions[kTile];
  int64_t slots[kTile];

  // Puts each token at the place of its position, so that sums over a tile have one order whatever a block sees of it.
  // Places in between are absent tokens, in the slot of another.
  void spread() {
    const int32_t base = positions[0] / kTile * kTile, last = positions[count - 1] - base;
    const int64_t any = slots[0];
    int token = count - 1;
    for (int place = last; place >= 0; --place) {
      const bool there = token >= 0 && positions[token] == base + place;
      const int64_t slot = there ? slots[token--] : any;
      if (!there) absent |= uint64_t{1} << place;
      slots[place] = slot;
      positions[place] = base + place;
    }
    count = last + 1;
  }
};

// Walks through the tokens of a part.
class Walk {
 public:
  Walk(const Call& call, const Work& work, const Part& part)
      : call_(call),
        range_(&work.ranges[part.range]),
        table_(call.page_table + call.owners[work.groups[part.group].entry] * call.table_width),
        position_(part.position),
        left_(part.tokens),
        block_(work.groups[part.group].block) {}

  // The next tokens; false if there are no more.
  bool next(Tile& tile) {
    tile.count = 0;
    tile.absent = 0;
    while (left_ > 0 && tile.count < kTile) {
      if (position_ >= range_->end) position_ = (++range_)->begin;
      const bool near = call_.rerotated && position_ < call_.near;
      if (tile.count > 0 && (near != tile.near || (block_ && position_ / kTile != tile.positions[0] / kTile))) break;
      const int64_t offset = position_ % call_.page_size;
      int64_t run = std::min({left_, range_->end - position_, call_.page_size - offset,
                              kTile - (block_ ? position_ % kTile : tile.count)});
      if (near) run = std::min(run, call_.near - position_);
      if (const int64_t page = table_[position_ / call_.page_size]) {
        tile.near = near;
        for (int64_t i = 0; i < run; ++i, ++tile.count) {
          tile.positions[tile.count] = static_cast<int32_t>(position_ + i);
          tile.slots[tile.count] = page * call_.page_size + offset + i;
        }
      }
      position_ += run;
      left_ -= run;
    }
    return tile.count > 0;
  }

 private:
  const Call& call_;
  const Range* range_;
  const int32_t* table_;
  int64_t position_, left_;
  const bool block_;
};
