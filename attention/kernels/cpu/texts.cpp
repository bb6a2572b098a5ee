// Attention within texts of any lengths, without padding: all heads of all texts of a batch in one call.
//
// A head's keys and values are put into panels; then a few queries at a time take their logits, weights and output from
// them. A text's result depends neither on the texts beside it nor on the number of threads.

#include <atomic>
#include <limits>
#include <vector>

#include "layout.hpp"
#include "texts_call.hpp"
#include "threads.hpp"
#include "tile.hpp"

namespace {

// Queries that share the panels that a thread has made, so that those cost little beside the products.
constexpr int64_t kQueries = 16 * kTileRows;

struct Attending {
  const Texts& call;
  std::vector<int64_t> ends;  // of each text's units; a unit is a head of some queries
  std::atomic<int64_t> next{0};
};

// Rows [count, size] as [size rounded up / kPanel, count, kPanel], with zeros after their ends.
void pack_values(const float* from, int64_t stride, int64_t count, int64_t size, float* to) {
  for (int64_t first = 0; first < size; first += kPanel) {
    const int64_t width = std::min<int64_t>(kPanel, size - first);
    for (int64_t row = 0; row < count; ++row, to += kPanel) {
      std::copy_n(from + row * stride + first, width, to);
      std::fill_n(to + width, kPanel - width, 0.0f);
    }
  }
}

// Rows [count, size] as [count rounded up / kPanel, size, kPanel]: each is a column, and zeros follow the last.
void pack_keys(const float* from, int64_t stride, int64_t count, int64_t size, float* to) {
  for (int64_t first = 0; first < count; first += kPanel, to += size * kPanel)
    for (int64_t column = 0; column < kPanel; ++column)
      for (int64_t i = 0; i < size; ++i)
        to[i * kPanel + column] = first + column < count ? from[(first + column) * stride + i] : 0.0f;
}

// Logits [size, a multiple of kPanel] become weights, those before `from` and from `to` on 0; returns the reciprocal of
// their sum.
float weigh(float* logits, int64_t from, int64_t to, int64_t size, float factor) {
  constexpr float kNever = -std::numeric_limits<float>::infinity();
  std::fill(logits, logits + from, kNever);
  std::fill(logits + to, logits + size, kNever);
  Floats most = splat(kNever), sum = {};
  for (int64_t i = 0; i < size; i += kLanes) most = larger(floats(logits + i), most);
  const Floats top = splat(largest_of(most));
  for (int64_t i = 0; i < size; i += kLanes) {
    const Floats weight = power_of_two((floats(logits + i) - top) * factor);
    store(logits + i, weight);
    sum += weight;
  }
  return 1.0f / sum_of(sum);
}

// Some queries of a text's head.
void attend_unit(const Texts& call, int64_t text, int64_t unit, Scratch& scratch) {
  const int64_t begin = call.begins[text], length = call.begins[text + 1] - begin;
  const int64_t head = unit % call.query_heads, shared = head / (call.query_heads / call.kv_heads);
  const int64_t first = unit / call.query_heads * kQueries, last = std::min(first + kQueries, length);
  const int64_t window = call.window ? std::min(call.window, length) : length;
  // The keys that some of these queries see.
  const int64_t low = std::max<int64_t>(0, first - window + 1), seen = std::min(length, last + window - 1) - low;
  const int64_t size = rounded_up(seen, kPanel), value_size = rounded_up(call.value_size, kPanel);
  float* keys = scratch.get<float>(size * call.head_size + value_size * seen + kTileRows * (size + kPanel));
  float* values = keys + size * call.head_size;
  float* logits = values + value_size * seen;
  float* sums = logits + kTileRows * size;
  pack_keys(call.key + (begin + low) * call.key_stride + shared * call.key_head_stride, call.key_stride, seen,
            call.head_size, keys);
  pack_values(call.value + (begin + low) * call.value_stride + shared * call.value_head_stride, call.value_stride, seen,
              call.value_size, values);
  const float* queries = call.query + begin * call.query_stride + head * call.query_head_stride;
  const auto factor = static_cast<float>(call.scale * 1.4426950408889634);
  for (int64_t query = first; query < last; query += kTileRows) {
    const int64_t count = std::min<int64_t>(kTileRows, last - query);
    const TileRows rows(queries + query * call.query_stride, call.query_stride, count);
    for (int64_t key = 0; key < size; key += kPanel)
      multiply_rows(rows, 0, keys + key * call.head_size, call.head_size, logits + key, size, false);
    float shares[kTileRows];
    for (int64_t row = 0; row < count; ++row) {
      const int64_t own = query + row - low;
      shares[row] = weigh(logits + row * size, std::max<int64_t>(0, own - window + 1), std::min(seen, own + window),
                          size, factor);
    }
    const TileRows weights(logits, size, count);
    for (int64_t d = 0; d < call.value_size; d += kPanel) {
      multiply_rows(weights, 0, values + d * seen, seen, sums, kPanel, false);
      const int64_t width = std::min<int64_t>(kPanel, call.value_size - d);
      for (int64_t row = 0; row < count; ++row) {
        float* to = call.output + ((begin + query + row) * call.query_heads + head) * call.value_size + d;
        for (int64_t i = 0; i < width; ++i) to[i] = sums[row * kPanel + i] * shares[row];
      }
    }
  }
}

void attend_units(void* given) {
  thread_local Scratch scratch;
  Attending& attending = *static_cast<Attending*>(given);
  const std::vector<int64_t>& ends = attending.ends;
  // From the end on: texts ascend by length, and threads that end with short ones end together.
  for (int64_t i; (i = attending.next.fetch_add(1, std::memory_order_relaxed)) < ends.back();) {
    const int64_t unit = ends.back() - 1 - i;
    const auto text = std::upper_bound(ends.begin(), ends.end(), unit) - ends.begin();
    attend_unit(attending.call, text, text ? unit - ends[text - 1] : unit, scratch);
  }
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void longspan_attend_texts(const Texts* call) {
  Attending attending{*call, {}};
  int64_t units = 0, products = 0;
  for (int64_t text = 0; text < call->texts; ++text) {
    const int64_t length = call->begins[text + 1] - call->begins[text];
    units += (length + kQueries - 1) / kQueries * call->query_heads;
    products += length * length * call->query_heads * (call->head_size + call->value_size);
    attending.ends.push_back(units);
  }
  if (units) in_parallel(call->parallel, attend_units, &attending, products < kParallelProducts ? 1 : call->threads);
}

extern "C" __attribute__((visibility("default"))) const char* longspan_layout() {
  using Type = Texts;
  static const std::string layout = described("Texts", sizeof(Type),
                                              {LONGSPAN_FIELD(query),
                                               LONGSPAN_FIELD(key),
                                               LONGSPAN_FIELD(value),
                                               LONGSPAN_FIELD(output),
                                               LONGSPAN_FIELD(begins),
                                               LONGSPAN_FIELD(parallel),
                                               LONGSPAN_FIELD(texts),
                                               LONGSPAN_FIELD(query_heads),
                                               LONGSPAN_FIELD(kv_heads),
                                               LONGSPAN_FIELD(head_size),
                                               LONGSPAN_FIELD(value_size),
                                               LONGSPAN_FIELD(query_stride),
                                               LONGSPAN_FIELD(query_head_stride),
                                               LONGSPAN_FIELD(key_stride),
                                               LONGSPAN_FIELD(key_head_stride),
                                               LONGSPAN_FIELD(value_stride),
                                               LONGSPAN_FIELD(value_head_stride),
                                               LONGSPAN_FIELD(window),
                                               LONGSPAN_FIELD(threads),
                                               LONGSPAN_FIELD(scale)});
  return layout.c_str();
}
