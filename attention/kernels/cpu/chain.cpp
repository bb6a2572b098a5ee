// Calls one function after another.

#include <cstdint>

#include "layout.hpp"

struct Entry {
  void (*function)(const void*);
  const void* argument;
};

extern "C" __attribute__((visibility("default"))) void longspan_chain(const Entry* entries, int64_t count) {
  for (int64_t i = 0; i < count; ++i) entries[i].function(entries[i].argument);
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
