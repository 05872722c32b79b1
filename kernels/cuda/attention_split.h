// Results of parts of a sequence, and how they become one: always in ascending order, whoever computed them.
#pragma once

#include "attention_tile.h"

namespace skerry::cuda {

// What a warp found, as the maxima of 16 rows, their sums, their weighted values [16][D].
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

// Four elements of a row over some keys.
struct Merged {
  float max, sum;
  float4 value;

  DEVICE void add(float other_max, float other_sum, const float4& other) {
    const float top = fmaxf(max, other_max), keep = weight(max, top), take = weight(other_max, top);
    max = top;
    sum = fmaf(other_sum, take, sum * keep);
    value.x = fmaf(other.x, take, value.x * keep);
    value.y = fmaf(other.y, take, value.y * keep);
    value.z = fmaf(other.z, take, value.z * keep);
    value.w = fmaf(other.w, take, value.w * keep);
  }
};

// Elements d to d + 3 of a row over `count` parts of `rows` rows, `stride` floats apart. Eight are fetched at a time:
// one after the other, 128 splits would take longer to merge than to compute.
template <int D>
DEVICE Merged merged(const float* parts, int count, int64_t stride, int rows, int row, int d) {
  constexpr int kAtOnce = 8;
  Merged all = {-INFINITY, 0, {0, 0, 0, 0}};
  for (int first = 0; first < count; first += kAtOnce) {
    float max[kAtOnce], sum[kAtOnce];
    float4 value[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const float* part = parts + min(first + i, count - 1) * stride;
      max[i] = part[row];
      sum[i] = part[rows + row];
      value[i] = *reinterpret_cast<const float4*>(part + 2 * rows + row * D + d);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (first + i < count) all.add(max[i], sum[i], value[i]);
  }
  return all;
}

}  // namespace skerry::cuda
