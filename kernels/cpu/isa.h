// The best instruction set this machine has, asked once. SKERRY_ISA=base|avx2|avxvnni|avx512 lowers it
// (tests, comparisons); what the machine does not have is not chosen.
#pragma once

namespace skerry {

// Each of x86-64 holds what those before it hold, but for kAvx512, which may come without AVX-VNNI's encoding. kBase is
// SSE2 or NEON; kNeonDot adds the dot product of Armv8.2.
enum class Isa { kBase, kAvx2, kAvxVnni, kAvx512, kAvx512Vnni, kNeonDot };

Isa isa();
const char* isa_name(Isa isa);

}  // namespace skerry
