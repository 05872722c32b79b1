// Results of parts of a sequence, and how they become one: always in ascending order, whoever computed them.
#pragma once

#include "attention_tile.h"

namespace skerry::cuda {

// Of one tile over some keys: maxima [16], sums [16], weighted values [16][D], in floats.
template <int D>
inline constexpr int kPartFloats = static_cast<int>(part_floats(D));

template <class E, int D>
DEVICE void keep_part(const Rows<E, D, 1>& rows, float* part) {
  const int lane = static_cast<int>(threadIdx.x % 32), row = lane / 4;
  for (int h = 0; h < 2; ++h) {
    if (lane % 4 == 0) {
      part[row + 8 * h] = rows.max[0][h];
      part[kTile + row + 8 * h] = rows.sum[0][h];
    }
#pragma unroll
    for (int d = 0; d < D / 8; ++d) {
      float* to = part + 2 * kTile + (row + 8 * h) * D + d * 8 + 2 * (lane % 4);
      to[0] = rows.o[0][d][2 * h];
      to[1] = rows.o[0][d][2 * h + 1];
    }
  }
}

struct Merged {
  float max, sum, value;
};

// Element d of a row over `count` parts that lie `stride` floats apart.
DEVICE Merged merged(const float* parts, int count, int64_t stride, int row, int d, int head_size) {
  Merged all = {-INFINITY, 0, 0};
  for (int i = 0; i < count; ++i) all.max = fmaxf(all.max, parts[i * stride + row]);
  for (int i = 0; i < count; ++i) {
    const float* part = parts + i * stride;
    const float share = weight(part[row], all.max);
    all.sum = fmaf(part[kTile + row], share, all.sum);
    all.value = fmaf(part[2 * kTile + row * head_size + d], share, all.value);
  }
  return all;
}

}  // namespace skerry::cuda
