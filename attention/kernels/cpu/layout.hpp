// A library's description of the structures that it takes, which Python compares with its own; see layout.py.

#pragma once

#include <cstddef>
#include <initializer_list>
#include <string>

struct Field {
  const char* name;
  size_t offset, size;
};

// Of the structure that is called Type where it is used.
#define LONGSPAN_FIELD(name) \
  Field { #name, offsetof(Type, name), sizeof(Type::name) }

// A line: the structure's name and size in bytes; name, offset and size of each field.
inline std::string described(const char* name, size_t size, std::initializer_list<Field> fields) {
  std::string text = std::string(name) + " " + std::to_string(size);
  for (const Field& field : fields)
    text += std::string(" ") + field.name + " " + std::to_string(field.offset) + " " + std::to_string(field.size);
  return text + "\n";
}
