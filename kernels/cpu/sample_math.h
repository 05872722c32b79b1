// The passes of sampling that touch every logit, compiled once per instruction set and picked at run time (isa.h).
// No fused multiply-adds: the definition in reference.py rounds every operation, and kept sets must agree exactly.
#pragma once

#include <cstdint>

namespace skerry {

struct RowStatistics {
  double sum;       // of e^(x - max)
  double weighted;  // of e^(x - max) * (x - max)
};

struct SampleMath {
  // Largest value; *broken is set where the row holds a NaN or +inf.
  float (*maximum)(const float* x, int64_t n, bool* broken);
  // Index of the first that equals `value`; n if none does.
  int64_t (*first_of)(const float* x, int64_t n, float value);
  // out[i] = x[i] / temperature + 0
  void (*scale)(const float* x, int64_t n, float temperature, float* out);
  // weight[i] = e^(x[i] - max) in double, 0 more than 700 below the maximum
  void (*weights)(const float* x, int64_t n, float max, double* weight);
  // Sum of floor(weight * 2^40)
  uint64_t (*mass)(const double* weight, int64_t n);
  // For log-probability and entropy, where float32's exponential is enough
  RowStatistics (*statistics)(const float* x, int64_t n, float max);
  int64_t (*count_from)(const float* x, int64_t n, float floor);  // how many are >= floor
  // Whether any of the `count` entrants could beat `best` (Race in sample.cpp)
  bool (*any_survivor)(const uint32_t* words, const double* weight, int64_t count, double best);
  // Four words for each of `count` consecutive blocks of the stream (seed, token_index).
  void (*noise)(uint64_t seed, uint32_t token_index, uint32_t first_block, int64_t count, uint32_t* out);
};

extern const SampleMath kSampleBase;
#if defined(__x86_64__)
extern const SampleMath kSampleAvx2;
extern const SampleMath kSampleAvx512;
#endif

const SampleMath& sample_math();

}  // namespace skerry
