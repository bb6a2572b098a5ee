// Makes recorded calls of native functions: native_calls.py writes them and reads what became of their memory.
//
// Every buffer is an allocation of its own and of its very size, so that a sanitizer sees what goes beyond it.

#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <memory>
#include <thread>
#include <vector>

extern "C" {
#define LONGSPAN_FUNCTION(name) void name(void*);
LONGSPAN_FUNCTIONS
#undef LONGSPAN_FUNCTION
}

namespace {

pthread_barrier_t barrier;

// As GNU OpenMP's own, but of threads that a sanitizer knows.
void parallel(void (*function)(void*), void* given, unsigned threads, unsigned) {
  pthread_barrier_init(&barrier, nullptr, threads);
  std::vector<std::thread> others;
  for (unsigned i = 1; i < threads; ++i) others.emplace_back(function, given);
  function(given);
  for (std::thread& other : others) other.join();
  pthread_barrier_destroy(&barrier);
}

void wait() { pthread_barrier_wait(&barrier); }

void fail(const char* what) {
  std::perror(what);
  std::exit(2);  // NOLINT(concurrency-mt-unsafe): no other thread runs between calls
}

void read(std::FILE* file, void* to, size_t size) {
  if (size && std::fread(to, size, 1, file) != 1) fail("the calls end early");
}

int64_t number(std::FILE* file) {
  int64_t value;
  read(file, &value, sizeof value);
  return value;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) return 2;
#if defined(__AMX_TILE__)
  if (syscall(SYS_arch_prctl, 0x1023, 18)) fail("Linux does not give the registers of AMX");
#endif
  std::FILE* calls = std::fopen(arguments[1], "rb");
  std::FILE* results = std::fopen(arguments[2], "wb");
  if (!calls || !results) fail("a file cannot be opened");
  void (*const functions[])(void*) = {
#define LONGSPAN_FUNCTION(name) name,
      LONGSPAN_FUNCTIONS
#undef LONGSPAN_FUNCTION
  };
  for (int64_t left = number(calls); left > 0; --left) {
    const int64_t function = number(calls);
    if (function < 0 || function >= static_cast<int64_t>(std::size(functions))) fail("there is no such function");
    std::vector<std::unique_ptr<uint8_t[]>> buffers(number(calls));
    std::vector<size_t> sizes(buffers.size());
    for (size_t i = 0; i < buffers.size(); ++i) {
      sizes[i] = number(calls);
      buffers[i].reset(new uint8_t[sizes[i]]);
      read(calls, buffers[i].get(), sizes[i]);
    }
    for (int64_t pointers = number(calls); pointers > 0; --pointers) {
      const int64_t buffer = number(calls), offset = number(calls), target = number(calls);
      void** const place = reinterpret_cast<void**>(buffers[buffer].get() + offset);
      *place = target >= 0    ? static_cast<void*>(buffers[target].get())
               : target == -1 ? reinterpret_cast<void*>(parallel)
                              : reinterpret_cast<void*>(wait);
    }
    functions[function](buffers[0].get());
    for (size_t i = 0; i < buffers.size(); ++i)
      if (sizes[i] && std::fwrite(buffers[i].get(), sizes[i], 1, results) != 1) fail("the results");
  }
  std::fclose(calls);
  if (std::fclose(results)) fail("the results");
}
