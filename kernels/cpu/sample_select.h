// Selection of the largest without sorting: a radix search for the threshold over the bits of the logits.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

namespace skerry {

// A float's bits as an unsigned number of the same order. Zeros must not be negative.
inline uint32_t ordered_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

struct Cut {
  uint32_t key;   // everything above is kept
  uint64_t ties;  // and so many of the first that equal it
};

// The smallest prefix of the order (key descending, index ascending) whose weights sum to at least `need`.
// 1 <= need <= sum of all weights; equal keys have equal weights. weight(i) -> uint64_t.
template <class Weight>
Cut find_cut(const uint32_t* keys, int64_t n, uint64_t need, const Weight& weight) {
  thread_local std::vector<uint64_t> histogram;
  thread_local std::vector<int32_t> inside;
  constexpr int kShift[3] = {21, 10, 0};
  constexpr uint32_t kBins[3] = {2048, 2048, 1024};
  uint32_t bin = 0;
  for (int level = 0; level < 3; ++level) {
    histogram.assign(kBins[level], 0);
    const auto digit = [&](int64_t i) { return (keys[i] >> kShift[level]) & (kBins[level] - 1); };
    if (level == 0) {
      for (int64_t i = 0; i < n; ++i) histogram[digit(i)] += weight(i);
    } else {
      for (const int32_t i : inside) histogram[digit(i)] += weight(i);
    }
    for (bin = kBins[level] - 1; bin > 0 && histogram[bin] < need; --bin) need -= histogram[bin];
    size_t count = 0;
    if (level == 0) {
      inside.resize(n);
      for (int64_t i = 0; i < n; ++i) {
        inside[count] = static_cast<int32_t>(i);
        count += digit(i) == bin;
      }
    } else {
      for (const int32_t i : inside) {
        inside[count] = i;
        count += digit(i) == bin;
      }
    }
    inside.resize(count);
  }
  const uint64_t each = weight(inside.front());
  return {keys[inside.front()], (need + each - 1) / each};
}

}  // namespace skerry
