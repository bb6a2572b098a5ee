// Page summaries of complete pages.

#pragma once

#include <algorithm>
#include <atomic>
#include <limits>

#include "select_call.hpp"

// A number's bits as an integer of the same order, and back again. NaN becomes the largest or the smallest of all, and
// so shows in the summary.
template <class Whole>
inline Whole in_order(Whole bits) {
  constexpr int sign = std::numeric_limits<Whole>::digits;
  return static_cast<Whole>(bits ^ ((bits >> sign) & std::numeric_limits<Whole>::max()));
}

struct Updating {
  const Update& update;
  std::atomic<int64_t> next{0};
};

template <class Whole>
void summarize_pages(void* given) {
  Updating& updating = *static_cast<Updating*>(given);
  const Update& update = updating.update;
  const int64_t numbers = update.kv_heads * update.head_size;
  constexpr int64_t kAtOnce = 128 / sizeof(Whole);  // whose extremes stay in registers
  for (int64_t i; (i = updating.next.fetch_add(1, std::memory_order_relaxed)) < update.count;) {
    const int64_t page = update.pages[i];
    const Whole* keys = static_cast<const Whole*>(update.keys) + page * update.page_size * numbers;
    Whole* summary = static_cast<Whole*>(update.summary) + page * 2 * numbers;
    for (int64_t first = 0; first < numbers; first += kAtOnce) {
      const int64_t count = std::min(kAtOnce, numbers - first);
      Whole least[kAtOnce], most[kAtOnce];
      std::fill_n(least, kAtOnce, std::numeric_limits<Whole>::max());
      std::fill_n(most, kAtOnce, std::numeric_limits<Whole>::min());
      const auto meet = [&](const Whole* key, int64_t size) {
        for (int64_t d = 0; d < size; ++d) {
          const Whole number = in_order(key[d]);
          least[d] = std::min(least[d], number);
          most[d] = std::max(most[d], number);
        }
      };
      for (int64_t token = 0; token < update.page_size; ++token) {
        const Whole* key = keys + token * numbers + first;
        if (count == kAtOnce)
          meet(key, kAtOnce);
        else
          meet(key, count);
      }
      for (int64_t d = 0; d < count; ++d) {
        summary[first + d] = in_order(least[d]);
        summary[numbers + first + d] = in_order(most[d]);
      }
    }
  }
}
