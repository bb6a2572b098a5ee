// Which pages a query sees under `topk`, from digests where they lie; see attention/patterns/topk.py.
//
// The pages of a row and key head are cut into parts that threads take one after the other; whoever finishes the
// last of them chooses. What is chosen depends on the row and its sequence alone.

#include <atomic>
#include <functional>
#include <memory>
#include <vector>

#include "float8.hpp"
#include "select_best.hpp"
#include "select_bounds.hpp"
#include "select_digest.hpp"
#include "threads.hpp"

namespace {

// Bounds that are kept at once: little beside a cache, enough for all threads.
constexpr int64_t kMostBounds = 1 << 20;

// Pages of a part.
constexpr int64_t kPartPages = 48 * kPagesAtOnce;

// The pages between the first and the recent ones, which a row chooses from.
struct Between {
  int64_t begin, end, recent;
  bool all;  // there is nothing to choose

  Between(const Selection& call, int64_t position) {
    const int64_t own = position / call.page_size;
    recent = std::max<int64_t>(0, own - call.recent_pages + 1);
    begin = call.sink_pages;
    if (call.window) begin = std::max(begin, std::max<int64_t>(0, position - call.window + 1) / call.page_size);
    end = std::max(begin, recent);
    all = own + 1 <= call.sink_pages + call.choices + call.recent_pages;
  }

  int64_t count() const { return all ? 0 : end - begin; }
};

// One row and key head whose pages have to be scored.
struct Group {
  int64_t entry, head, begin, count;
  int64_t bounds;  // where they lie
  int64_t stride;
};

struct Part {
  int64_t group, first;
};

struct Choosing {
  const Selection& call;
  std::vector<Group> groups;
  std::vector<Part> parts;
  std::unique_ptr<std::atomic<int64_t>[]> waiting;  // for each group, its parts that are not done
  int64_t bounds_size = 0, longest = 0, products = 0;
  double* bounds = nullptr;
  std::atomic<size_t> next{0};
};

// Ranges of positions, cut where the layer's window begins, neighbors as one; the rest become empty.
class Ranges {
 public:
  Ranges(const Selection& call, int64_t entry, int64_t head)
      : first_(call.ranges + (entry * call.kv_heads + head) * (call.choices + 2) * 2),
        next_(first_),
        end_(first_ + (call.choices + 2) * 2),
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

// Takes parts until there are none.
template <class Format>
void choose(void* given) {
  thread_local Scratch scratch;
  thread_local std::vector<int64_t> places;
  Choosing& choosing = *static_cast<Choosing*>(given);
  const Selection& call = choosing.call;
  const int64_t shared = call.shared();
  double* packed = scratch.get<double>(
      std::max(shared * packed_size(call.head_size), best_scratch(shared, choosing.longest)));
  places.resize(call.choices);
  for (size_t i; (i = choosing.next.fetch_add(1, std::memory_order_relaxed)) < choosing.parts.size();) {
    const Part& part = choosing.parts[i];
    const Group& group = choosing.groups[part.group];
    double* bounds = choosing.bounds + group.bounds;
    const int32_t* pages = call.page_table + call.owners[group.entry] * call.table_width + group.begin + part.first;
    bound_pages<Format>(call, group.entry, group.head, pages, std::min(kPartPages, group.count - part.first), packed,
                        bounds + part.first, group.stride);
    if (choosing.waiting[part.group].fetch_sub(1, std::memory_order_acq_rel) > 1) continue;
    best_pages(bounds, shared, group.stride, group.count, call.choices, packed, places.data());
    for (int64_t& place : places) place += group.begin;
    add_ranges(call, group.entry, group.head, places.data(), call.choices);
  }
}

// Finds rows from `entry` on whose pages have to be scored; the others are done at once. Gives back where to go on.
int64_t plan(Choosing& choosing, int64_t entry) {
  const Selection& call = choosing.call;
  std::vector<int64_t> all;
  for (; entry < call.entries && choosing.bounds_size < kMostBounds; ++entry) {
    const Between between(call, call.positions[entry]);
    const int64_t count = between.count();
    if (count <= call.choices || call.choices == 0) {
      all.resize(std::min(count, call.choices));
      for (size_t i = 0; i < all.size(); ++i) all[i] = between.begin + static_cast<int64_t>(i);
      for (int64_t head = 0; head < call.kv_heads; ++head) add_ranges(call, entry, head, all.data(), all.size());
      continue;
    }
    // Parts write some numbers more than they have pages.
    const int64_t stride = (count + kPagesAtOnce + kDoubles - 1) / kDoubles * kDoubles;
    choosing.longest = std::max(choosing.longest, stride);
    choosing.products += 2 * count * call.query_heads * call.head_size;
    const auto group = static_cast<int64_t>(choosing.groups.size());
    for (int64_t head = 0; head < call.kv_heads; ++head) {
      choosing.groups.push_back({entry, head, between.begin, count, choosing.bounds_size, stride});
      choosing.bounds_size += call.shared() * stride;
    }
    // All heads of some pages after each other, since their digests lie side by side.
    for (int64_t first = 0; first < count; first += kPartPages)
      for (int64_t head = 0; head < call.kv_heads; ++head) choosing.parts.push_back({group + head, first});
  }
  return entry;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void longspan_update(const Update* update) {
  Updating updating{*update};
  const int64_t numbers = update->count * update->page_size * update->kv_heads * update->head_size;
  const int64_t threads = numbers < kParallelProducts ? 1 : update->threads;
  void (*const formats[])(void*) = {digest_pages<int32_t>, digest_pages<int16_t>, digest_pages<int16_t>,
                                    digest_pages<int8_t>};
  in_parallel(update->parallel, formats[update->format], &updating, threads);
}

extern "C" __attribute__((visibility("default"))) void longspan_select(const Selection* call) {
  thread_local Scratch scratch;
  void (*const formats[])(void*) = {choose<Float32>, choose<BFloat16>, choose<Float16>, choose<Float8>};
  for (int64_t entry = 0; entry < call->entries;) {
    Choosing choosing{*call, {}, {}, {}};
    entry = plan(choosing, entry);
    if (choosing.groups.empty()) continue;
    choosing.waiting.reset(new std::atomic<int64_t>[choosing.groups.size()]);
    for (size_t i = 0; i < choosing.groups.size(); ++i)
      choosing.waiting[i] = (choosing.groups[i].count + kPartPages - 1) / kPartPages;
    choosing.bounds = scratch.get<double>(choosing.bounds_size);
    in_parallel(call->parallel, formats[call->format], &choosing,
                choosing.products < kParallelProducts ? 1 : call->threads);
  }
}
