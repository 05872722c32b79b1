// The part of attention that one warp does: rows of queries against keys and values in shared memory, on tensor cores,
// with a running maximum and sum (Dao, FlashAttention-2, 2023).
#pragma once

#include "../include/paged_attention_cuda.h"
#include "device.h"

namespace skerry::cuda {

template <class E, int D>
struct Layout {
  static constexpr int kRow = D * 2 + kRowPadding;  // bytes of a row in shared memory
  static constexpr int kPageBytes = 2 * kPage * kRow;
};

DEVICE uint32_t pack(float a, float b, __half) {
  const __half2 both = __floats2half2_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&both);
}
DEVICE uint32_t pack(float a, float b, __nv_bfloat16) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&both);
}

// Of two rows a lane has in each tile: (lane / 4) and 8 below. The sums are the lane's own share until `finish`.
template <class E, int D, int kTiles>
struct Rows {
  float o[kTiles][D / 8][4];
  float max[kTiles][2];
  float sum[kTiles][2];

  DEVICE void clear() {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      for (int h = 0; h < 2; ++h) max[t][h] = -INFINITY, sum[t][h] = 0;
#pragma unroll
      for (int d = 0; d < D / 8; ++d)
        for (int i = 0; i < 4; ++i) o[t][d][i] = 0;
    }
  }

  DEVICE void finish() {
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
      for (int h = 0; h < 2; ++h) {
        sum[t][h] += __shfl_xor_sync(~0u, sum[t][h], 1);
        sum[t][h] += __shfl_xor_sync(~0u, sum[t][h], 2);
      }
  }
};

// 2 to the power of what lies below a maximum; a row that has seen nothing has no maximum, and its weights are 0.
DEVICE float weight(float score, float max) { return exp2_approx(score - (max == -INFINITY ? 0.0f : max)); }

struct Scores {
  float scale;    // of q.k, times log2(e)
  float softcap;  // 0: none; else times log2(e)
  float inner;    // scale / cap, without log2(e)

  DEVICE Scores(const PagedAttentionTask& task)
      : scale(task.scale * 1.44269504f),
        softcap(task.softcap * 1.44269504f),
        inner(task.softcap > 0 ? task.scale / task.softcap : 0) {}
  DEVICE float of(float product) const { return softcap > 0 ? softcap * tanhf(product * inner) : product * scale; }
};

// scores[kTiles][16 x kKeys] = q k^T. `q`: kTiles * 16 rows, `k`: kKeys rows, both with the stride of Layout.
template <class E, int D, int kTiles, int kKeys>
DEVICE void score(float (&s)[kTiles][kKeys / 8][4], const unsigned char* q, const unsigned char* k) {
  constexpr int kRow = Layout<E, D>::kRow;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const unsigned char* q_at = q + (lane % 16) * kRow + (lane / 16) * 16;
  const unsigned char* k_at = k + (lane % 8 + lane / 16 * 8) * kRow + (lane / 8 % 2) * 16;
#pragma unroll
  for (int t = 0; t < kTiles; ++t)
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n)
      for (int i = 0; i < 4; ++i) s[t][n][i] = 0;
#pragma unroll
  for (int d = 0; d < D / 16; ++d) {
    uint32_t a[kTiles][4];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) load_matrices(a[t], q_at + t * kTile * kRow + d * 32);
#pragma unroll
    for (int n = 0; n < kKeys / 16; ++n) {
      uint32_t b[4];
      load_matrices(b, k_at + n * 16 * kRow + d * 32);
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        multiply(s[t][2 * n], a[t], b[0], b[1], E());
        multiply(s[t][2 * n + 1], a[t], b[2], b[3], E());
      }
    }
  }
}

// Takes kKeys more keys into account. `seen(row, key)`: whether a row of the tile, from 0, sees a key, from 0.
template <class E, int D, int kTiles, int kKeys, class Seen>
DEVICE void attend(Rows<E, D, kTiles>& rows, const unsigned char* q, const unsigned char* k, const unsigned char* v,
                   const Scores& scores, bool all_seen, const Seen& seen) {
  constexpr int kRow = Layout<E, D>::kRow;
  const int lane = static_cast<int>(threadIdx.x % 32);
  float s[kTiles][kKeys / 8][4];
  score<E, D, kTiles, kKeys>(s, q, k);
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    float top[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool visible = all_seen || seen(t * kTile + lane / 4 + i / 2 * 8, n * 8 + 2 * (lane % 4) + i % 2);
        s[t][n][i] = visible ? scores.of(s[t][n][i]) : -INFINITY;
        top[i / 2] = fmaxf(top[i / 2], s[t][n][i]);
      }
    float shrink[2];
    for (int h = 0; h < 2; ++h) {
      top[h] = fmaxf(top[h], __shfl_xor_sync(~0u, top[h], 1));
      top[h] = fmaxf(top[h], __shfl_xor_sync(~0u, top[h], 2));
      top[h] = fmaxf(top[h], rows.max[t][h]);
      shrink[h] = weight(rows.max[t][h], top[h]);
      rows.max[t][h] = top[h];
      rows.sum[t][h] *= shrink[h];
    }
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[t][n][i] = weight(s[t][n][i], top[i / 2]);
        rows.sum[t][i / 2] += s[t][n][i];
      }
    if (__any_sync(~0u, !(shrink[0] == 1 && shrink[1] == 1))) {  // rare, once the first keys have been seen
#pragma unroll
      for (int d = 0; d < D / 8; ++d)
#pragma unroll
        for (int i = 0; i < 4; ++i) rows.o[t][d][i] *= shrink[i / 2];
    }
  }
  const unsigned char* v_at = v + (lane % 16) * kRow + (lane / 16) * 16;
#pragma unroll
  for (int n = 0; n < kKeys / 16; ++n) {
    uint32_t p[kTiles][4];
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
#pragma unroll
      for (int r = 0; r < 4; ++r)
        p[t][r] = pack(s[t][2 * n + r / 2][r % 2 * 2], s[t][2 * n + r / 2][r % 2 * 2 + 1], E());
#pragma unroll
    for (int d = 0; d < D / 16; ++d) {
      uint32_t b[4];
      load_matrices_trans(b, v_at + n * 16 * kRow + d * 32);
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        multiply(rows.o[t][2 * d], p[t], b[0], b[1], E());
        multiply(rows.o[t][2 * d + 1], p[t], b[2], b[3], E());
      }
    }
  }
}

}  // namespace skerry::cuda
