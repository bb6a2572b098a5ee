// Prefetches the keys and values that are needed next while others are computed.

#pragma once

#include <algorithm>

#include "paged_heads.hpp"

// Cache lines that hold so many bytes.
constexpr int64_t lines_of(int64_t bytes) { return (bytes + kLine - 1) / kLine; }

// Prefetches the cache lines of some heads of tokens in memory order, which is fastest, and only a few at a time: too
// many outstanding lines delay loads that hit the caches.
class Ahead {
 public:
  // `first` is the first head of the first of `tokens`.
  template <class Format>
  Ahead(const Heads<Format>& first, int tokens, int64_t heads)
      : first_(reinterpret_cast<const char*>(first.first)),
        slots_(first.slots),
        stop_(first.slots + tokens),
        stride_(first.stride * static_cast<int64_t>(sizeof(typename Format::Number))),
        bytes_(heads * first.size * static_cast<int64_t>(sizeof(typename Format::Number))) {}

  // The address of the next `lines`, which the caller prefetches one by one between its products. At the end it gets
  // memory that is cached already, so that it needs no branch.
  const char* take(int64_t lines) {
    const char* from = at_;
    if (end_ - from < lines * kLine) {
      ask(lines);
      return reinterpret_cast<const char*>(this);
    }
    at_ += lines * kLine;
    return from;
  }

  void ask_rest() { ask(INT64_MAX); }

 private:
  const char* first_;  // the heads of slot 0
  const int64_t *slots_, *stop_;
  int64_t stride_, bytes_;  // from slot to slot, and of the heads
  const char *at_ = nullptr, *end_ = nullptr;

  void ask(int64_t lines) {
    for (; lines > 0 && (at_ < end_ || run()); --lines, at_ += kLine) prefetch(at_);
  }

  // Goes to the next tokens that lie one after the other; false if there are none.
  bool run() {
    if (slots_ == stop_) return false;
    const char* from = first_ + *slots_ * stride_;
    at_ = from - reinterpret_cast<uintptr_t>(from) % kLine;
    do {
      end_ = first_ + *slots_ * stride_ + bytes_;
      ++slots_;
    } while (bytes_ == stride_ && slots_ < stop_ && slots_[0] == slots_[-1] + 1);
    return true;
  }
};
