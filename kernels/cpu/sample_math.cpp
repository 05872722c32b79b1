// Compiled once per instruction set with -ffp-contract=off; plain loops that the compiler turns into vectors.
// No C++ library header with inline functions here, for the reason given in attention_tile.cpp.
#include "sample_math.h"

#include <math.h>
#include <string.h>

#include "../include/exponential.h"

namespace skerry {
namespace {

constexpr int kLanes = 16;

// Four registers' worth of lanes: one alone waits for its own last comparison.
float maximum(const float* x, int64_t n, bool* broken) {
  constexpr int kWide = 4 * kLanes;
  float top[kWide];
  int32_t bad[kWide] = {};
  for (int i = 0; i < kWide; ++i) top[i] = -INFINITY;
  int64_t j = 0;
  for (; j + kWide <= n; j += kWide) {
    for (int i = 0; i < kWide; ++i) {
      top[i] = x[j + i] > top[i] ? x[j + i] : top[i];
      bad[i] |= !(x[j + i] < INFINITY);
    }
  }
  for (; j < n; ++j) {
    top[0] = x[j] > top[0] ? x[j] : top[0];
    bad[0] |= !(x[j] < INFINITY);
  }
  for (int i = 1; i < kWide; ++i) {
    top[0] = top[i] > top[0] ? top[i] : top[0];
    bad[0] |= bad[i];
  }
  *broken = bad[0] != 0;
  return top[0];
}

int64_t first_of(const float* x, int64_t n, float value) {
  constexpr int kBlock = 256;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = begin + kBlock < n ? begin + kBlock : n;
    int32_t any = 0;
    for (int64_t i = begin; i < end; ++i) any |= x[i] == value;
    if (any == 0) continue;
    for (int64_t i = begin; i < end; ++i) {
      if (x[i] == value) return i;
    }
  }
  return n;
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
    double p = exponential_near_zero(r);
    uint64_t bits, exponent;
    memcpy(&bits, &p, sizeof bits);
    memcpy(&exponent, &t, sizeof exponent);
    bits += exponent << 52;
    memcpy(&p, &bits, sizeof p);
    weight[i] = d < -700.0 ? 0.0 : p;
  }
}

uint64_t mass(const double* weight, int64_t n) {
  uint64_t sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += static_cast<uint64_t>(static_cast<int64_t>(weight[i] * 1099511627776.0));
  return sum;
}

// e^d within 2 ulp for -87 <= d <= 0 (Cephes' expf)
inline float exp_float(float d) {
  const float magic = 12582912.0f;
  const float t = d * 1.44269504088896341f + magic;
  const float k = t - magic;
  const float r = (d - k * 0.693359375f) - k * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  uint32_t bits, exponent;
  memcpy(&bits, &p, sizeof bits);
  memcpy(&exponent, &t, sizeof exponent);
  bits += exponent << 23;
  memcpy(&p, &bits, sizeof p);
  return p;
}

RowStatistics statistics(const float* x, int64_t n, float max) {
  constexpr int64_t kBlock = 512;  // float sums of a block, double sums of blocks
  double sum = 0.0, weighted = 0.0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = begin + kBlock < n ? begin + kBlock : n;
    float part[kLanes] = {}, part_weighted[kLanes] = {};
    int64_t j = begin;
    for (; j + kLanes <= end; j += kLanes) {
      for (int i = 0; i < kLanes; ++i) {
        const float d = x[j + i] - max < -87.0f ? -87.0f : x[j + i] - max;
        const float e = exp_float(d);
        part[i] += e;
        part_weighted[i] += e * d;
      }
    }
    for (; j < end; ++j) {
      const float d = x[j] - max < -87.0f ? -87.0f : x[j] - max;
      const float e = exp_float(d);
      part[0] += e;
      part_weighted[0] += e * d;
    }
    for (int i = 0; i < kLanes; ++i) {
      sum += static_cast<double>(part[i]);
      weighted += static_cast<double>(part_weighted[i]);
    }
  }
  return {sum, weighted};
}

int64_t count_from(const float* x, int64_t n, float floor) {
  int32_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += x[i] >= floor;
  return count;
}

bool any_survivor(const uint32_t* words, const double* weight, int64_t count, double best) {
  int32_t any = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double u = (static_cast<double>(words[i]) + 0.5) * 0x1p-32;
    any |= (1.0 - u) * (1.0 - 1e-9) <= best * weight[i];
  }
  return any != 0;
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

extern const SampleMath SKERRY_SAMPLE_TABLE = {maximum,    first_of,   scale,        weights, mass,
                                               statistics, count_from, any_survivor, noise};

}  // namespace skerry
