// Numbers of Sample that decide what is kept and drawn. reference.py states their roundings; nothing here is contracted
// into fused multiply-adds (kernels.cmake).
#pragma once

#include "../include/exponential.h"
#include "device.h"
#include "sample_task.h"

namespace skerry::cuda {

// Further below the maximum than this nothing counts: a mass is floor(weight * 2^40), and 2^-40 is e^-27.7; and the
// largest, which every cut keeps and whose weight is 1, draws at most -log(2^-33) = 22.9 where the least that another
// can draw is 2^-33 / weight, which is 22.9 at e^-26. So double precision is spent on what is nearer alone.
inline constexpr float kDepth = 28.0f;

DEVICE uint32_t ordered_bits(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);  // zeros tie
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

DEVICE float float_of(uint32_t ordered) {
  return __uint_as_float(ordered & 0x80000000u ? ordered & 0x7FFFFFFFu : ~ordered);
}

DEVICE bool within(Place place, Place last) {
  return place.key > last.key || (place.key == last.key && place.id <= last.id);
}

// e^(z - top) in double, for z at most 700 below. Every operation rounds once; reference.py repeats them in this order.
DEVICE double weight_of(float z, float top) {
  const double shift = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer in the low bits
  const double d = static_cast<double>(z) - static_cast<double>(top);
  const double t = d * 1.4426950408889634 + shift;
  const double k = t - shift;
  const double r = (d - k * 0.6931471803691238) - k * 1.9082149292705877e-10;
  const double p = exponential_near_zero(r);
  return __longlong_as_double(__double_as_longlong(p) + (__double_as_longlong(t) << 52));
}

DEVICE Count mass_of(float z, float top) {
  return top - z > kDepth ? 0 : static_cast<Count>(weight_of(z, top) * 1099511627776.0);
}

DEVICE double uniform(uint32_t word) { return (static_cast<double>(word) + 0.5) * 0x1p-32; }

// -log(u) / weight, the least of which wins. The logarithm's last bit is the library's.
DEVICE double exact_score(uint32_t word, float z, float top) { return -log(uniform(word)) / weight_of(z, top); }

// The same in single precision, within 1e-5, to find the few that may win. The logarithm of a u near 1 comes from its
// distance to 1.
DEVICE float rough_score(uint32_t word, float z, float top) {
  const bool near_one = word >> 31;
  const float rest = (static_cast<float>(near_one ? ~word : word) + 0.5f) * 0x1p-32f;
  return (near_one ? -log1pf(-rest) : -logf(rest)) * expf(top - z);
}
inline constexpr float kRoughness = 1.001f;

}  // namespace skerry::cuda
