// A complaint about a size that was given, shared by the ops of every library.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace skerry {

inline void expect(const char* name, int64_t found, int64_t wanted) {
  if (found == wanted) return;
  throw std::invalid_argument(std::string(name) + " is " + std::to_string(found) + ", expected " +
                              std::to_string(wanted));
}

}  // namespace skerry
