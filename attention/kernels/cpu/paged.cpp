// Attention on the pages of the KV cache in place, for any rule that can be given as ranges of positions.
//
// A single query row streams its keys and values once, a group of heads per load; consecutive rows of a sequence, and
// all rows of a prompt, go in blocks, as matrix products. Both are split over the keys, and the thread that finishes
// a row's last part combines its parts (Dao et al.: Flash-Decoding for long-context inference, 2023).

#include <atomic>
#include <cmath>
#include <memory>

#include "layout.hpp"
#include "matrix_use.hpp"
#include "paged_blocks.hpp"
#include "paged_rows.hpp"
#include "paged_write.hpp"
#include "threads.hpp"

namespace {

struct Run {
  const Call& call;
  const Work& work;
  float* results;
  std::atomic<size_t>* waiting;  // for each group, its parts that are not done
  std::atomic<size_t> next{0};
};

// Combines a row's parts.
void finish_row(const Run& run, const Group& group) {
  const Call& call = run.call;
  const int64_t queries = group.heads * call.shared();
  const size_t size = run.work.result_size(group), parts = group.parts_end - group.part;
  const float* results = run.results + group.results;
  for (int64_t q = 0; q < queries; ++q) {
    const int64_t head = group.head * call.shared() + q;
    float top = call.sinks ? call.sinks[head] : kLowest;
    for (size_t part = 0; part < parts; ++part) top = std::max(top, results[part * size + q]);
    float sum = call.sinks ? std::exp(call.sinks[head] - top) : 0.0f;
    for (size_t part = 0; part < parts; ++part)
      sum += results[part * size + queries + q] * std::exp(results[part * size + q] - top);
    float* output = call.output + (call.rows[group.entry] * call.query_heads + head) * call.value_size;
    std::fill(output, output + call.value_size, 0.0f);
    for (size_t part = 0; part < parts; ++part) {
      const float share = std::exp(results[part * size + q] - top) / sum;
      const float* weighted = results + part * size + 2 * queries + q * call.value_size;
      for (int64_t d = 0; d < call.value_size; ++d) output[d] += share * weighted[d];
    }
  }
}

template <class Format>
void attend_as(const Call& call, const Work& work, const Part& part, bool packed, float* room, float* result) {
#if defined(__AMX_BF16__)
  using Rounded = InBfloat16;
#elif defined(__SSE2__)
  using Rounded = InPairs;
#else
  using Rounded = InFloats;
#endif
  if constexpr (sizeof(typename Format::Number) < sizeof(float))
    if (call.pairs && call.given[call.rows[work.groups[part.group].entry]])
      return attend_block<Format, Rounded>(call, work, part, packed, room, result);
  attend_block<Format, InFloats>(call, work, part, packed, room, result);
}

// Takes parts until there are none.
template <class Format>
void take_parts(void* given) {
  thread_local Scratch scratch;
  Run& run = *static_cast<Run*>(given);
  const Work& work = run.work;
  auto* room = scratch.get<float>(std::max(row_scratch(run.call), block_scratch(run.call)));
  [[maybe_unused]] const MatrixUse matrix;
  const auto claim = [&] { return run.next.fetch_add(1, std::memory_order_relaxed); };
  const Group* packed = nullptr;  // the block whose panels are in the scratch
  for (size_t i = claim(), next; i < work.parts.size(); i = next) {
    const Part& part = work.parts[i];
    const Group& group = work.groups[part.group];
    float* result = run.results + group.results + (i - group.part) * work.result_size(group);
    if (group.block) {
      attend_as<Format>(run.call, work, part, packed == &group, room, result);
      packed = &group;
      next = claim();
    } else {
      attend_row<Format>(run.call, work, part, room, result, [&] {
        next = claim();
        return next < work.parts.size() ? &work.parts[next] : nullptr;
      });
      packed = nullptr;
    }
    if (run.waiting[part.group].fetch_sub(1, std::memory_order_acq_rel) > 1) continue;
    if (group.block)
      finish_block<Format>(run.call, group, run.results + group.results, work.result_size(group));
    else
      finish_row(run, group);
  }
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void longspan_attend(const Call* call) {
  thread_local Scratch results;
  const Work work(*call);
  const std::unique_ptr<std::atomic<size_t>[]> waiting(new std::atomic<size_t>[work.groups.size()]);
  for (size_t i = 0; i < work.groups.size(); ++i) waiting[i] = work.groups[i].parts_end - work.groups[i].part;
  Run run{*call, work, results.get<float>(work.results_size), waiting.get()};
  void (*const by_dtype[])(void*) = {take_parts<Float32>, take_parts<BFloat16>, take_parts<Float16>,
                                     take_parts<Float8>};
  in_parallel(call->parallel, by_dtype[call->dtype], &run, work.threads());
}

// Whether `Call::pairs` may be set.
extern "C" __attribute__((visibility("default"))) int longspan_has_pairs() { return kPairProducts; }

extern "C" __attribute__((visibility("default"))) void longspan_write(const Write* write) {
  void (*const by_dtype[])(const Write&) = {write_rows<Float32>, write_rows<BFloat16>, write_rows<Float16>,
                                            write_rows<Float8>};
  by_dtype[write->dtype](*write);
}

namespace {

std::string layout_of_call() {
  using Type = Call;
  return described("Call", sizeof(Type),
                   {LONGSPAN_FIELD(query),       LONGSPAN_FIELD(rerotated),   LONGSPAN_FIELD(keys),
                    LONGSPAN_FIELD(values),      LONGSPAN_FIELD(page_table),  LONGSPAN_FIELD(rows),
                    LONGSPAN_FIELD(owners),      LONGSPAN_FIELD(ranges),      LONGSPAN_FIELD(given),
                    LONGSPAN_FIELD(sinks),       LONGSPAN_FIELD(output),      LONGSPAN_FIELD(parallel),
                    LONGSPAN_FIELD(entries),     LONGSPAN_FIELD(range_heads), LONGSPAN_FIELD(range_count),
                    LONGSPAN_FIELD(query_heads), LONGSPAN_FIELD(kv_heads),    LONGSPAN_FIELD(head_size),
                    LONGSPAN_FIELD(value_size),  LONGSPAN_FIELD(row_stride),  LONGSPAN_FIELD(head_stride),
                    LONGSPAN_FIELD(page_size),   LONGSPAN_FIELD(table_width), LONGSPAN_FIELD(near),
                    LONGSPAN_FIELD(dtype),       LONGSPAN_FIELD(pairs),       LONGSPAN_FIELD(threads),
                    LONGSPAN_FIELD(scale),       LONGSPAN_FIELD(softcap)});
}

std::string layout_of_write() {
  using Type = Write;
  return described(
      "Write", sizeof(Type),
      {LONGSPAN_FIELD(key), LONGSPAN_FIELD(value), LONGSPAN_FIELD(keys), LONGSPAN_FIELD(values), LONGSPAN_FIELD(slots),
       LONGSPAN_FIELD(rows), LONGSPAN_FIELD(key_stride), LONGSPAN_FIELD(value_stride), LONGSPAN_FIELD(key_numbers),
       LONGSPAN_FIELD(value_numbers), LONGSPAN_FIELD(dtype)});
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const char* longspan_layout() {
  static const std::string layout = layout_of_call() + layout_of_write();
  return layout.c_str();
}
