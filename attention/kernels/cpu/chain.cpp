// Calls one function after another.

#include <cstdint>

struct Entry {
  void (*function)(const void*);
  const void* argument;
};

extern "C" __attribute__((visibility("default"))) void longspan_chain(const Entry* entries, int64_t count) {
  for (int64_t i = 0; i < count; ++i) entries[i].function(entries[i].argument);
}
