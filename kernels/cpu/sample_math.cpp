// Compiled once per instruction set with -ffp-contract=off; plain loops that the compiler turns into vectors.
// No C++ library header with inline functions here, for the reason given in attention_tile.cpp.
#include "sample_math.h"

#include <math.h>
#include <string.h>

namespace skerry {
namespace {

constexpr int kLanes = 16;

float maximum(const float* x, int64_t n, bool* broken) {
  float top[kLanes];
  int32_t bad[kLanes] = {};
  for (int i = 0; i < kLanes; ++i) top[i] = -INFINITY;
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    for (int i = 0; i < kLanes; ++i) {
      top[i] = x[j + i] > top[i] ? x[j + i] : top[i];
      bad[i] |= !(x[j + i] < INFINITY);
    }
  }
  for (; j < n; ++j) {
    top[0] = x[j] > top[0] ? x[j] : top[0];
    bad[0] |= !(x[j] < INFINITY);
  }
  for (int i = 1; i < kLanes; ++i) {
    top[0] = top[i] > top[0] ? top[i] : top[0];
    bad[0] |= bad[i];
  }
  *broken = bad[0] != 0;
  return top[0];
}

void scale(const float* x, int64_t n, float temperature, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] / temperature + 0.0f;
}

// Every operation rounds once; reference.py repeats them in the same order.
void weights(const float* x, int64_t n, float max, double* weight) {
  const double shift = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer in the low bits
  for (int64_t i = 0; i < n; ++i) {
    const double d = static_cast<double>(x[i]) - static_cast<double>(max);
    const double c = d < -700.0 ? -700.0 : d;
    const double t = c * 1.4426950408889634 + shift;
    const double k = t - shift;
    const double r = (c - k * 0.6931471803691238) - k * 1.9082149292705877e-10;
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
    p = p * r + 1.0;
    uint64_t bits, exponent;
    memcpy(&bits, &p, sizeof bits);
    memcpy(&exponent, &t, sizeof exponent);
    bits += exponent << 52;
    memcpy(&p, &bits, sizeof p);
    weight[i] = d < -700.0 ? 0.0 : p;
  }
}

RowStatistics statistics(const float* x, const double* weight, int64_t n, float max) {
  double sum[kLanes] = {}, weighted[kLanes] = {};
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    for (int i = 0; i < kLanes; ++i) {
      const double d = static_cast<double>(x[j + i]) - static_cast<double>(max);
      sum[i] += weight[j + i];
      weighted[i] += weight[j + i] * (d < -700.0 ? -700.0 : d);
    }
  }
  for (; j < n; ++j) {
    const double d = static_cast<double>(x[j]) - static_cast<double>(max);
    sum[0] += weight[j];
    weighted[0] += weight[j] * (d < -700.0 ? -700.0 : d);
  }
  for (int i = 1; i < kLanes; ++i) {
    sum[0] += sum[i];
    weighted[0] += weighted[i];
  }
  return {sum[0], weighted[0]};
}

void noise(uint64_t seed, uint32_t token_index, uint32_t first_block, int64_t count, uint32_t* out) {
  const uint32_t seed_low = static_cast<uint32_t>(seed), seed_high = static_cast<uint32_t>(seed >> 32);
  for (int64_t i = 0; i < count; ++i) {
    uint32_t c0 = first_block + static_cast<uint32_t>(i), c1 = token_index, c2 = 0, c3 = 0;
    uint32_t key0 = seed_low, key1 = seed_high;
    for (int round = 0; round < 10; ++round) {
      const uint64_t a = uint64_t{0xD2511F53u} * c0;
      const uint64_t b = uint64_t{0xCD9E8D57u} * c2;
      c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ key0;
      c1 = static_cast<uint32_t>(b);
      c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ key1;
      c3 = static_cast<uint32_t>(a);
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
    out[4 * i] = c0;
    out[4 * i + 1] = c1;
    out[4 * i + 2] = c2;
    out[4 * i + 3] = c3;
  }
}

}  // namespace

extern const SampleMath SKERRY_SAMPLE_TABLE = {maximum, scale, weights, statistics, noise};

}  // namespace skerry
