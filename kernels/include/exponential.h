// The exponential that decides what Sample keeps and draws, for the CPU and the GPU alike.
#pragma once

#include "anywhere.h"

namespace skerry {

// e^r for r within half of log 2 of zero: Taylor's polynomial of degree 13. Every operation rounds once; reference.py
// repeats them in this order. Static: files are compiled for several instruction sets, and no two may share one copy.
SKERRY_ANYWHERE static inline double exponential_near_zero(double r) {
  double p = 1.0 / 6227020800.0;
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * r + 1.0;
  return p * r + 1.0;
}

}  // namespace skerry
