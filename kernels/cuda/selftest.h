// The argument of the kernels in selftest.cu.
#pragma once

#include <cstdint>

namespace skerry::cuda {

struct SelfTest {
  enum Fault : int32_t { kNone, kNoBarrier, kPastShared, kHalfBarrier, kSplitWarp, kNoWait };
  const void* in = nullptr;
  float* out = nullptr;
  int32_t fault = kNone;
};

}  // namespace skerry::cuda
