// Work for several threads, and the memory that each keeps.

#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

// Work that is done before a second thread has woken up, in products.
constexpr int64_t kParallelProducts = 1 << 17;

// Runs `function` on `threads` threads of the OpenMP runtime that torch uses: `parallel` is its GOMP_parallel.
//
// A team of another size than torch's own would be made anew by each of the two in turn, so it is all or one.
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
