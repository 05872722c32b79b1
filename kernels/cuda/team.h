// Blocks that work on one row together, and how they wait for each other. All blocks of a launch run at once (the host
// starts no more of them than the device has multiprocessors), so waiting ends.
#pragma once

#include "device.h"
#include "sample_task.h"

namespace skerry::cuda {

// Rather than hang for ever, where the host started more blocks than run at once: a minute or so.
inline constexpr uint32_t kMostLooks = 1u << 26;

struct Team {
  TeamScratch* scratch;
  int size;
  int rank;
  uint32_t expected = 0;  // arrivals once everybody has come to the next meeting
  int narrowings = 0;     // so far

  // The whole block calls it. What any block of the team wrote before is visible to all of them afterwards.
  DEVICE void meet() {
    __syncthreads();
    if (size == 1) return;
    expected += static_cast<uint32_t>(size);
    if (threadIdx.x == 0) {
      __threadfence();
      atomicAdd(&scratch->arrived, 1u);
      for (uint32_t looks = 0; static_cast<int32_t>(load_acquire(&scratch->arrived) - expected) < 0; ++looks) {
        if (looks == kMostLooks) __trap();
        pause();
      }
      __threadfence();
    }
    __syncthreads();
  }

  // Comes last: whoever arrives when all others have, and so will look at nothing again, gets true.
  DEVICE bool leave(uint32_t* flag) {
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();
      *flag = atomicAdd(&scratch->arrived, 1u) == expected + static_cast<uint32_t>(size) - 1;
      __threadfence();
    }
    __syncthreads();
    return *flag != 0;
  }
};

}  // namespace skerry::cuda
