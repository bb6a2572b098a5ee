// The calls of select.cpp; select.py builds them. Fields that are the same in every step are filled in once, and a
// call is made again with the others changed.

#pragma once

#include <cstdint>

// A page's summary: the smallest and the largest numbers of its keys, in the keys' own dtype.
struct Update {
  const void* keys;      // [pages, page_size, kv_heads, head_size]
  void* summary;         // [pages, 2, kv_heads, head_size]
  const int64_t* pages;  // [count], the complete pages whose summaries are to be made
  void* parallel;        // GNU OpenMP's GOMP_parallel
  int64_t count;
  int64_t page_size, kv_heads, head_size;
  int64_t dtype;  // 0 float32, 1 bfloat16, 2 float16, 3 float8_e4m3
  int64_t threads;
};

// For each of `entries` query rows and each KV head, ranges of key positions: the first pages, the pages selected
// by their summaries, the recent pages.
struct Selection {
  const float* query;         // [T, query_heads, head_size], strides in numbers, the last one 1
  const void* summary;        // [pages, 2, kv_heads, head_size]
  const int32_t* page_table;  // [sequences, table_width]
  const int64_t* rows;        // [entries], indices of query rows
  const int64_t* owners;      // [entries], the rows' sequences
  const int64_t* positions;   // [entries]
  int64_t* ranges;            // [entries, kv_heads, selected + 2, 2], filled by the call
  void* parallel;
  int64_t entries, selected;  // selected: pages that a row selects at most
  int64_t query_heads, kv_heads, head_size;
  int64_t row_stride, head_stride;
  int64_t page_size, table_width;
  int64_t sink_pages, recent_pages;  // always selected
  int64_t window;                    // the layer's own, or 0
  int64_t dtype, threads;
  int64_t exact;  // the result: the number of rows and KV heads whose selection needed double precision
  double scale;

  int64_t shared() const { return query_heads / kv_heads; }
};
