// The best instruction set this machine has, asked once. SKERRY_ISA=base|avx2|avx512 lowers it (tests, comparisons).
#pragma once

namespace skerry {

enum class Isa { kBase, kAvx2, kAvx512 };

Isa isa();
const char* isa_name(Isa isa);

}  // namespace skerry
