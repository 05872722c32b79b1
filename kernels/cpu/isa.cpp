#include "isa.h"

#include <cstdlib>
#include <cstring>

#if defined(__aarch64__) && defined(__linux__)
#  include <asm/hwcap.h>
#  include <sys/auxv.h>
#endif

namespace skerry {
namespace {

constexpr Isa kAll[] = {Isa::kNeonDot, Isa::kAvx512Vnni, Isa::kAvx512, Isa::kAvxVnni, Isa::kAvx2, Isa::kBase};

bool has(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  switch (isa) {
    case Isa::kAvx512Vnni:
      return avx512 && __builtin_cpu_supports("avx512vnni");
    case Isa::kAvx512:
      return avx512;
    case Isa::kAvxVnni:
      return avx2 && __builtin_cpu_supports("avxvnni");
    case Isa::kAvx2:
      return avx2;
    default:
      break;
  }
#elif defined(__aarch64__) && defined(__linux__)
  if (isa == Isa::kNeonDot) return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#endif
  return isa == Isa::kBase;
}

Isa detect() {
  const char* wanted = std::getenv("SKERRY_ISA");
  for (const Isa isa : kAll) {
    if (wanted != nullptr && std::strcmp(wanted, isa_name(isa)) == 0 && has(isa)) return isa;
  }
  for (const Isa isa : kAll) {
    if (has(isa)) return isa;
  }
  return Isa::kBase;
}

}  // namespace

Isa isa() {
  static const Isa found = detect();
  return found;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kNeonDot:
      return "neondot";
    case Isa::kAvx512Vnni:
      return "avx512vnni";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvxVnni:
      return "avxvnni";
    case Isa::kAvx2:
      return "avx2";
    default:
      return "base";
  }
}

}  // namespace skerry
