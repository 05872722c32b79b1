#include "isa.h"

#include <cstdlib>
#include <cstring>

namespace skerry {
namespace {

Isa detect() {
  Isa best = Isa::kBase;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    best = Isa::kAvx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl")) {
      best = Isa::kAvx512;
    }
  }
#endif
  if (const char* wanted = std::getenv("SKERRY_ISA")) {
    if (std::strcmp(wanted, "base") == 0) return Isa::kBase;
    if (std::strcmp(wanted, "avx2") == 0 && best == Isa::kAvx512) return Isa::kAvx2;
  }
  return best;
}

}  // namespace

Isa isa() {
  static const Isa found = detect();
  return found;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    default:
      return "base";
  }
}

}  // namespace skerry
