// Runs functions on several threads, and the scratch memory that each thread keeps.

#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

// Products that one thread computes before a second one has woken up.
constexpr int64_t kParallelProducts = 1 << 17;

// Runs `function` on `threads` threads of the OpenMP runtime that torch uses: `parallel` is its GOMP_parallel.
//
// With a team of another size than torch's, each of the two would create its team anew at every turn: so either all
// threads or one.
inline void in_parallel(void* parallel, void (*function)(void*), void* given, int64_t threads) {
  using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
  if (threads > 1)
    reinterpret_cast<Parallel>(parallel)(function, given, static_cast<unsigned>(threads), 0);
  else
    function(given);
}

// Memory that a thread keeps from call to call, at a cache line's beginning.
class Scratch {
 public:
  template <class T>
  T* get(size_t count) {
    const size_t size = count * sizeof(T);
    if (bytes_.size() < size + 64) bytes_.resize(size + 64);
    void* begin = bytes_.data();
    size_t space = bytes_.size();
    return static_cast<T*>(std::align(64, size, begin, space));
  }

 private:
  std::vector<uint8_t> bytes_;
};
