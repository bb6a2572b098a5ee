// Calls one function after another, until something has come that is waited for.

#include <poll.h>

#include <cstdint>

#include "layout.hpp"

struct Entry {
  void (*function)(const void*);
  const void* argument;
};

namespace {

// Whether a descriptor has something to read, or its other end is closed.
bool readable(int descriptor) {
  pollfd watched{descriptor, POLLIN, 0};
  return poll(&watched, 1, 0) > 0;
}

}  // namespace

// Returns how many functions were called: all, or those before the descriptor `watched` had something to read; a
// negative one never has.
extern "C" __attribute__((visibility("default"))) int64_t longspan_chain(const Entry* entries, int64_t count,
                                                                         int64_t watched) {
  for (int64_t i = 0; i < count; ++i) {
    if (watched >= 0 && readable(static_cast<int>(watched))) return i;
    entries[i].function(entries[i].argument);
  }
  return count;
}

namespace {

std::string layout_of_entry() {
  using Type = Entry;
  return described("Entry", sizeof(Type), {LONGSPAN_FIELD(function), LONGSPAN_FIELD(argument)});
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const char* longspan_layout() {
  static const std::string layout = layout_of_entry();
  return layout.c_str();
}
