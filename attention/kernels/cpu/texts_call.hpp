// The call of texts.cpp; texts.py builds it.

#pragma once

#include <cstdint>

// Attention within each of some texts that lie one after another: a token sees all of its own text, or those
// nearer than a window. Strides are in numbers; numbers of a head lie one after another.
struct Texts {
  const float* query;     // [tokens, query_heads, head_size]
  const float* key;       // [tokens, kv_heads, head_size]
  const float* value;     // [tokens, kv_heads, value_size]
  float* output;          // [tokens, query_heads, value_size], contiguous
  const int64_t* begins;  // [texts + 1], each text's first token, and after the last one their number
  void* parallel;         // GNU OpenMP's GOMP_parallel
  int64_t texts;
  int64_t query_heads, kv_heads, head_size, value_size;
  int64_t query_stride, query_head_stride, key_stride, key_head_stride, value_stride, value_head_stride;
  int64_t window;  // i sees j where |i - j| is less; 0: all of the text
  int64_t threads;
  double scale;  // above 0
};
