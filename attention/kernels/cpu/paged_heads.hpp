// One head of some tokens, in the KV cache.

#pragma once

#include "lanes.hpp"
#include "paged_work.hpp"

constexpr int64_t kLine = 64;  // bytes of a cache line

// Prefetches a line into the L2 cache.
inline void prefetch(const char* line) { __builtin_prefetch(line, 0, 2); }

template <class Format>
struct Heads {
  using Number = typename Format::Number;
  const Number* first;
  int64_t stride, size;
  const int64_t* slots;

  Heads(const Number* first, int64_t stride, int64_t size, const int64_t* slots)
      : first(first), stride(stride), size(size), slots(slots) {}

  Heads(const Call& call, const void* pages, int64_t head, int64_t head_size, const Tile& tile)
      : first(static_cast<const Number*>(pages) + head * head_size),
        stride(call.kv_heads * head_size),
        size(head_size),
        slots(tile.slots) {}

  const Number* operator[](int token) const { return first + slots[token] * stride; }
  int64_t whole() const { return size / kBlock * kBlock; }

  // Another head, from a later token on.
  Heads at(int64_t heads, int token) const {
    Heads other = *this;
    other.first += heads * size;
    other.slots += token;
    return other;
  }

  // Prefetches a token's numbers.
  void prefetch(int token) const {
    const auto* from = reinterpret_cast<const char*>((*this)[token]);
    const int64_t bytes = size * static_cast<int64_t>(sizeof(Number));
    for (int64_t i = 0; i < bytes; i += kLine) ::prefetch(from + i);
  }
};
