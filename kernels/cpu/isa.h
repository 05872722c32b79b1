// The best instruction set this machine has, asked once. SKERRY_ISA=base|avx2|avxvnni|avx512|avx512vnni lowers it
// (tests, comparisons); what the machine does not have is not chosen.
#pragma once

namespace skerry {

// Each holds what those before it hold, but for kAvx512, which may come without AVX-VNNI's encoding.
enum class Isa { kBase, kAvx2, kAvxVnni, kAvx512, kAvx512Vnni };

Isa isa();
const char* isa_name(Isa isa);

}  // namespace skerry
