// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), usable from any backend.
#pragma once

#include <cstdint>

#include "anywhere.h"

namespace skerry {

// One block: counter and key in, four words out (in place of the counter).
SKERRY_ANYWHERE inline void philox4x32(uint32_t counter[4], uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * counter[0];
    const uint64_t b = uint64_t{0xCD9E8D57u} * counter[2];
    const uint32_t c1 = counter[1], c3 = counter[3];
    counter[0] = static_cast<uint32_t>(b >> 32) ^ c1 ^ key0;
    counter[1] = static_cast<uint32_t>(b);
    counter[2] = static_cast<uint32_t>(a >> 32) ^ c3 ^ key1;
    counter[3] = static_cast<uint32_t>(a);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

}  // namespace skerry
