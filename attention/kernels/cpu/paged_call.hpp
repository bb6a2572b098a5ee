// The call of paged.cpp.

#pragma once

#include <cstdint>

// One call; calls.py builds it. `entries` query rows, each with ranges of key positions of its own.
struct Call {
  const float* query;         // [T, query_heads, head_size], strides in numbers, the last one 1
  const float* rerotated;     // like query, with the same strides, or null
  const void* keys;           // [pages, page_size, kv_heads, head_size]
  const void* values;         // [pages, page_size, kv_heads, value_size]
  const int32_t* page_table;  // [sequences, table_width]
  const int64_t* rows;        // [entries], ascending
  const int64_t* owners;      // [entries], the rows' sequences
  const int64_t* ranges;      // [entries, range_heads, range_count, 2]
  const bool* given;          // [T], whether a row belongs to a prompt
  const float* sinks;         // [query_heads] or null
  float* output;              // [T, query_heads, value_size]
  void* parallel;             // GNU OpenMP's GOMP_parallel
  int64_t entries, range_heads, range_count;
  int64_t query_heads, kv_heads, head_size, value_size;
  int64_t row_stride, head_stride;
  int64_t page_size, table_width;
  int64_t near;   // keys at positions below it are multiplied with `rerotated`
  int64_t dtype;  // 0 float32, 1 bfloat16, 2 float16, 3 float8_e4m3
  int64_t pairs;  // whether blocks of prompts are multiplied in 16-bit integers; float32 is not
  int64_t threads;
  double scale;
  double softcap;  // 0: off

  int64_t shared() const { return query_heads / kv_heads; }
};
