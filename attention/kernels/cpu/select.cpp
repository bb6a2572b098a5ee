// Selects the pages that a query sees under `topk`, from page summaries in place; see attention/patterns/topk.py.
//
// A row's pages are cut into parts with all KV heads, in memory order. Threads take these one after the other, then
// the selections of each row and KV head. A selection depends only on the row and its sequence.

#include <atomic>
#include <memory>
#include <thread>
#include <vector>

#include "float8.hpp"
#include "layout.hpp"
#include "select_best.hpp"
#include "select_bounds.hpp"
#include "select_quick.hpp"
#include "select_summary.hpp"
#include "threads.hpp"

namespace {

// Bounds in memory at once: little compared with a KV cache, enough for all threads.
constexpr int64_t kMostBounds = 1 << 20;

// Pages of a part.
constexpr int64_t kPartPages = 48 * kPagesAtOnce;

// The pages between the first and the recent ones, which a row selects from.
struct Between {
  int64_t begin, end, recent;
  bool all;  // there is nothing to select

  Between(const Selection& call, int64_t position) {
    const int64_t own = position / call.page_size;
    recent = std::max<int64_t>(0, own - call.recent_pages + 1);
    begin = call.sink_pages;
    if (call.window) begin = std::max(begin, std::max<int64_t>(0, position - call.window + 1) / call.page_size);
    end = std::max(begin, recent);
    all = own + 1 <= call.sink_pages + call.selected + call.recent_pages;
  }

  int64_t count() const { return all ? 0 : end - begin; }
};

// One row whose pages have to be scored.
struct Row {
  int64_t entry, begin, count;
  int64_t bounds;  // the place of its first bound
  int64_t stride;
};

struct Part {
  int64_t row, first;
};

struct Selecting {
  const Selection& call;
  std::vector<Row> rows;
  std::vector<Part> parts;
  std::unique_ptr<std::atomic<int64_t>[]> waiting;  // for each row, its parts that are not done
  int64_t bounds_size = 0, longest = 0, products = 0;
  float* bounds = nullptr;
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> exact{0};  // selections that needed double precision
};

// Ranges of positions, cut to the layer's window; adjacent ones are merged, and the unused ones are empty.
class Ranges {
 public:
  Ranges(const Selection& call, int64_t entry, int64_t head)
      : first_(call.ranges + (entry * call.kv_heads + head) * (call.selected + 2) * 2),
        next_(first_),
        end_(first_ + (call.selected + 2) * 2),
        least_(call.window ? std::max<int64_t>(0, call.positions[entry] - call.window + 1) : 0) {}
  ~Ranges() { std::fill(next_, end_, int64_t{0}); }

  void add(int64_t begin, int64_t end) {
    begin = std::max(begin, least_);
    if (begin >= end) return;
    if (next_ > first_ && next_[-1] == begin) {
      next_[-1] = end;
      return;
    }
    *next_++ = begin;
    *next_++ = end;
  }

 private:
  int64_t *first_, *next_, *end_, least_;
};

void add_ranges(const Selection& call, int64_t entry, int64_t head, const int64_t* pages, int64_t count) {
  const int64_t position = call.positions[entry];
  const Between between(call, position);
  Ranges ranges(call, entry, head);
  if (between.all) return ranges.add(0, position + 1);
  ranges.add(0, std::min(call.sink_pages, between.recent) * call.page_size);
  for (int64_t i = 0; i < count; ++i) ranges.add(pages[i] * call.page_size, (pages[i] + 1) * call.page_size);
  ranges.add(between.recent * call.page_size, position + 1);
}

// Selects the pages of a row for a KV head, once all their bounds are computed; places [selected].
template <class Format>
void select_pages(Selecting& selecting, const Row& row, int64_t head, float* scratch, int64_t* places) {
  thread_local Scratch exact;
  const Selection& call = selecting.call;
  const int64_t shared = call.shared(), size = call.head_size;
  const float* query = call.query + call.rows[row.entry] * call.row_stride + head * shared * call.head_stride;
  const double reach = longest(query, shared, call.head_stride, size) * std::fabs(call.scale);
  float* bounds = selecting.bounds + row.bounds + head * (shared + 1) * row.stride;
  if (surely_best(bounds, shared, row.stride, row.count, call.selected, size, reach, scratch, places)) return;
  selecting.exact.fetch_add(1, std::memory_order_relaxed);
  const int64_t packed_numbers = call.query_heads * packed_size(size), bound_numbers = shared * row.stride;
  auto* packed = exact.get<double>(packed_numbers + bound_numbers + best_scratch(shared, row.stride));
  double* doubles = packed + packed_numbers;
  pack_row<Format>(call, row.entry, packed);
  const int32_t* pages = call.page_table + call.owners[row.entry] * call.table_width + row.begin;
  bound_pages<Format>(call, packed, head, head + 1, pages, row.count, doubles, row.stride);
  best_pages(doubles, shared, row.stride, row.count, call.selected, doubles + bound_numbers, places);
}

// Takes parts and then selections until there are none.
template <class Format>
void select_rows(void* given) {
  thread_local Scratch scratch;
  thread_local std::vector<int64_t> places;
  Selecting& selecting = *static_cast<Selecting*>(given);
  const Selection& call = selecting.call;
  auto* room =
      scratch.get<float>(std::max(call.query_heads * packed_size(call.head_size), quick_scratch(selecting.longest)));
  places.resize(call.selected);
  const auto parts = static_cast<int64_t>(selecting.parts.size());
  const int64_t tasks = parts + static_cast<int64_t>(selecting.rows.size()) * call.kv_heads;
  for (int64_t i, packed = -1; (i = selecting.next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
    if (i < parts) {
      const Part& part = selecting.parts[i];
      const Row& row = selecting.rows[part.row];
      if (packed != part.row) pack_row<Format>(call, row.entry, room);
      packed = part.row;
      const int32_t* pages = call.page_table + call.owners[row.entry] * call.table_width + row.begin + part.first;
      bound_pages<Format>(call, room, 0, call.kv_heads, pages, std::min(kPartPages, row.count - part.first),
                          selecting.bounds + row.bounds + part.first, row.stride);
      selecting.waiting[part.row].fetch_sub(1, std::memory_order_release);
      continue;
    }
    const int64_t number = (i - parts) / call.kv_heads, head = (i - parts) % call.kv_heads;
    const Row& row = selecting.rows[number];
    // Its parts are all taken; other threads may still compute them.
    while (selecting.waiting[number].load(std::memory_order_acquire) > 0) std::this_thread::yield();
    select_pages<Format>(selecting, row, head, room, places.data());
    for (int64_t& place : places) place += row.begin;
    add_ranges(call, row.entry, head, places.data(), call.selected);
  }
}

// Finds rows from `entry` on whose pages have to be scored; finishes the others. Returns the entry to continue with.
int64_t plan(Selecting& selecting, int64_t entry) {
  const Selection& call = selecting.call;
  std::vector<int64_t> all;
  for (; entry < call.entries && selecting.bounds_size < kMostBounds; ++entry) {
    const Between between(call, call.positions[entry]);
    const int64_t count = between.count();
    if (count <= call.selected || call.selected == 0) {
      const int64_t taken = std::min(count, call.selected);
      all.resize(taken);
      for (int64_t i = 0; i < taken; ++i) all[i] = between.begin + i;
      for (int64_t head = 0; head < call.kv_heads; ++head) add_ranges(call, entry, head, all.data(), taken);
      continue;
    }
    // A part writes up to kPagesAtOnce - 1 numbers more than it has pages.
    const int64_t stride = (count + kPagesAtOnce + kLanes - 1) / kLanes * kLanes;
    selecting.longest = std::max(selecting.longest, stride);
    selecting.products += 2 * count * call.query_heads * call.head_size;
    const auto row = static_cast<int64_t>(selecting.rows.size());
    selecting.rows.push_back({entry, between.begin, count, selecting.bounds_size, stride});
    selecting.bounds_size += call.kv_heads * (call.shared() + 1) * stride;
    for (int64_t first = 0; first < count; first += kPartPages) selecting.parts.push_back({row, first});
  }
  return entry;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void longspan_update(const Update* update) {
  Updating updating{*update};
  const int64_t numbers = update->count * update->page_size * update->kv_heads * update->head_size;
  const int64_t threads = numbers < kParallelProducts ? 1 : update->threads;
  void (*const by_dtype[])(void*) = {summarize_pages<int32_t>, summarize_pages<int16_t>, summarize_pages<int16_t>,
                                     summarize_pages<int8_t>};
  in_parallel(update->parallel, by_dtype[update->dtype], &updating, threads);
}

extern "C" __attribute__((visibility("default"))) void longspan_select(Selection* call) {
  thread_local Scratch scratch;
  call->exact = 0;
  void (*const by_dtype[])(void*) = {select_rows<Float32>, select_rows<BFloat16>, select_rows<Float16>,
                                     select_rows<Float8>};
  for (int64_t entry = 0; entry < call->entries;) {
    Selecting selecting{*call, {}, {}, {}};
    entry = plan(selecting, entry);
    if (selecting.rows.empty()) continue;
    selecting.waiting.reset(new std::atomic<int64_t>[selecting.rows.size()]);
    for (size_t i = 0; i < selecting.rows.size(); ++i)
      selecting.waiting[i] = (selecting.rows[i].count + kPartPages - 1) / kPartPages;
    selecting.bounds = scratch.get<float>(selecting.bounds_size);
    in_parallel(call->parallel, by_dtype[call->dtype], &selecting,
                selecting.products < kParallelProducts ? 1 : call->threads);
    call->exact += selecting.exact;
  }
}

namespace {

std::string layout_of_update() {
  using Type = Update;
  return described("Update", sizeof(Type),
                   {LONGSPAN_FIELD(keys), LONGSPAN_FIELD(summary), LONGSPAN_FIELD(pages), LONGSPAN_FIELD(parallel),
                    LONGSPAN_FIELD(count), LONGSPAN_FIELD(page_size), LONGSPAN_FIELD(kv_heads),
                    LONGSPAN_FIELD(head_size), LONGSPAN_FIELD(dtype), LONGSPAN_FIELD(threads)});
}

std::string layout_of_selection() {
  using Type = Selection;
  return described(
      "Selection", sizeof(Type),
      {LONGSPAN_FIELD(query),       LONGSPAN_FIELD(summary),    LONGSPAN_FIELD(page_table),   LONGSPAN_FIELD(rows),
       LONGSPAN_FIELD(owners),      LONGSPAN_FIELD(positions),  LONGSPAN_FIELD(ranges),       LONGSPAN_FIELD(parallel),
       LONGSPAN_FIELD(entries),     LONGSPAN_FIELD(selected),   LONGSPAN_FIELD(query_heads),  LONGSPAN_FIELD(kv_heads),
       LONGSPAN_FIELD(head_size),   LONGSPAN_FIELD(row_stride), LONGSPAN_FIELD(head_stride),  LONGSPAN_FIELD(page_size),
       LONGSPAN_FIELD(table_width), LONGSPAN_FIELD(sink_pages), LONGSPAN_FIELD(recent_pages), LONGSPAN_FIELD(window),
       LONGSPAN_FIELD(dtype),       LONGSPAN_FIELD(threads),    LONGSPAN_FIELD(exact),        LONGSPAN_FIELD(scale)});
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const char* longspan_layout() {
  static const std::string layout = layout_of_update() + layout_of_selection();
  return layout.c_str();
}
