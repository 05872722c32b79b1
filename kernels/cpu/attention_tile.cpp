// Compiled once per instruction set: SKERRY_ISA names the table, SKERRY_LANES is the vector width in floats.
//
// This file includes no C++ library header with inline functions: the linker keeps one copy of such a function, and
// it might keep the one built for AVX-512 and call it on a machine without.
//
// Order of arithmetic, the same for every tile shape: a score is a sum over the head's dimensions in order; the weights
// of a split are summed in 16 lanes by absolute key, then the lanes in order; values are added key by key.
#include "attention_tile.h"

#include <math.h>
#include <string.h>

namespace skerry {
namespace {

constexpr int kLanes = SKERRY_LANES;
constexpr int kSplit = 256;
constexpr int kBlock = 64;  // keys transposed together: [head_size][64]

typedef float Vec __attribute__((vector_size(SKERRY_LANES * 4), may_alias));
typedef int32_t VecI __attribute__((vector_size(SKERRY_LANES * 4), may_alias));
typedef float Vec4 __attribute__((vector_size(16), may_alias));

#if defined(__clang__) || __GNUC__ >= 12
#  define SKERRY_SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
typedef int32_t VecI4 __attribute__((vector_size(16)));
#  define SKERRY_SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, VecI4{i, j, k, l})
#endif

#define SKERRY_INLINE static inline __attribute__((always_inline))

SKERRY_INLINE Vec load(const float* p) {
  Vec v;
  memcpy(&v, p, sizeof v);
  return v;
}
SKERRY_INLINE void store(float* p, Vec v) { memcpy(p, &v, sizeof v); }
SKERRY_INLINE Vec splat(float x) { return Vec{} + x; }
SKERRY_INLINE Vec4 load4(const float* p) {
  Vec4 v;
  memcpy(&v, p, sizeof v);
  return v;
}
SKERRY_INLINE void store4(float* p, Vec4 v) { memcpy(p, &v, sizeof v); }

// e^x for x <= 0 within 2 ulp (Cephes' expf), 0 below -87; a NaN stays one.
SKERRY_INLINE Vec exp_negative(Vec x) {
  const Vec magic = splat(12582912.0f);
  const Vec clamped = x > -87.0f ? x : splat(-87.0f);
  const Vec n = (clamped * 1.44269504088896341f + magic) - magic;
  const Vec r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const VecI bits = (__builtin_convertvector(n, VecI) + 127) << 23;
  Vec power;
  memcpy(&power, &bits, sizeof power);
  p = p * power;
  p = x > -87.0f ? p : splat(0.0f);
  return x == x ? p : x;
}

SKERRY_INLINE Vec tanh_capped(Vec x, float cap) {
  const Vec t = x / cap;
  const Vec a = t < 0.0f ? t : -t;  // -|t|
  const Vec e = exp_negative(a + a);
  const Vec y = (1.0f - e) / (1.0f + e);
  return cap * (t < 0.0f ? -y : y);
}

// Where each key of a split lies. The pointers past `count` are unset.
struct Keys {
  const float* key[kSplit];
  const float* value[kSplit];
};

SKERRY_INLINE void locate(const AttentionTile& t, int first, int from, int to, Keys* keys) {
  for (int j = from; j < to; ++j) {
    const int position = first + j;
    const int page = position / t.page_size;
    const float* base = t.kv + t.table[page] * t.page_stride;
    const int64_t row = static_cast<int64_t>(position - page * t.page_size) * t.head_size;
    keys->key[j] = base + t.key_offset + row;
    keys->value[j] = base + t.value_offset + row;
  }
}

// Keys [from, to) of the split as blocks of [head_size][64]; places without a key are zero.
SKERRY_INLINE void transpose(const AttentionTile& t, const Keys& keys, int from, int to, const float* zeros,
                             float* out) {
  const int d_whole = t.head_size / 4 * 4;
  for (int j = from / kBlock * kBlock; j < (to + kBlock - 1) / kBlock * kBlock; j += 4) {
    const float* row[4];
    for (int i = 0; i < 4; ++i) row[i] = j + i >= from && j + i < to ? keys.key[j + i] : zeros;
    float* block = out + static_cast<int64_t>(j / kBlock) * kBlock * t.head_size + j % kBlock;
    for (int d = 0; d < d_whole; d += 4) {
      const Vec4 a = load4(row[0] + d), b = load4(row[1] + d), c = load4(row[2] + d), e = load4(row[3] + d);
      const Vec4 ab_low = SKERRY_SHUFFLE(a, b, 0, 4, 1, 5), ab_high = SKERRY_SHUFFLE(a, b, 2, 6, 3, 7);
      const Vec4 ce_low = SKERRY_SHUFFLE(c, e, 0, 4, 1, 5), ce_high = SKERRY_SHUFFLE(c, e, 2, 6, 3, 7);
      store4(block + (d + 0) * kBlock, SKERRY_SHUFFLE(ab_low, ce_low, 0, 1, 4, 5));
      store4(block + (d + 1) * kBlock, SKERRY_SHUFFLE(ab_low, ce_low, 2, 3, 6, 7));
      store4(block + (d + 2) * kBlock, SKERRY_SHUFFLE(ab_high, ce_high, 0, 1, 4, 5));
      store4(block + (d + 3) * kBlock, SKERRY_SHUFFLE(ab_high, ce_high, 2, 3, 6, 7));
    }
    for (int d = d_whole; d < t.head_size; ++d) {
      for (int i = 0; i < 4; ++i) block[d * kBlock + i] = row[i][d];
    }
  }
}

// R rows against C vectors of keys.
template <int R, int C>
SKERRY_INLINE void score(const float* q, int head_size, const float* keys, float* out) {
  Vec acc[R][C];
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) acc[r][c] = Vec{};
  }
  for (int d = 0; d < head_size; ++d) {
    Vec k[C];
    for (int c = 0; c < C; ++c) k[c] = load(keys + d * kBlock + c * kLanes);
    for (int r = 0; r < R; ++r) {
      const Vec x = splat(q[r * head_size + d]);
      for (int c = 0; c < C; ++c) acc[r][c] += x * k[c];
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) store(out + r * kSplit + c * kLanes, acc[r][c]);
  }
}

constexpr int kScoreVectors = SKERRY_REGISTERS >= 32 ? 4 : 2;
constexpr int kValueVectors = SKERRY_REGISTERS >= 32 ? 4 : 2;

template <int R>
SKERRY_INLINE void score_rows(const AttentionTile& t, int row, const float* keys, int from, int to, float* scores) {
  constexpr int step = kScoreVectors * kLanes;
  for (int j = from / step * step; j < to; j += step) {
    const float* block = keys + static_cast<int64_t>(j / kBlock) * kBlock * t.head_size + j % kBlock;
    score<R, kScoreVectors>(t.q + static_cast<int64_t>(row) * t.head_size, t.head_size, block,
                            scores + row * kSplit + j);
  }
}

// Scores of a row become weights. Only [from, to) counts. Returns false where no key has a finite score.
SKERRY_INLINE bool softmax(float* s, int from, int to, float softcap, float* max_out, float* sum_out) {
  const int begin = from / 16 * 16;
  const int end = (to + 15) / 16 * 16;
  if (softcap > 0.0f) {
    for (int j = begin; j < end; j += kLanes) store(s + j, tanh_capped(load(s + j), softcap));
  }
  for (int j = begin; j < from; ++j) s[j] = -INFINITY;
  for (int j = to; j < end; ++j) s[j] = -INFINITY;
  Vec top = splat(-INFINITY);
  for (int j = begin; j < end; j += kLanes) {
    const Vec x = load(s + j);
    top = x > top ? x : (x == x ? top : x);
  }
  float lanes[16];
  store(lanes, top);
  float max = -INFINITY;
  for (int i = 0; i < kLanes; ++i) max = lanes[i] > max ? lanes[i] : (lanes[i] == lanes[i] ? max : lanes[i]);
  if (max == -INFINITY) return false;
  Vec sum[16 / kLanes] = {};
  for (int j = begin; j < end; j += 16) {
    for (int i = 0; i < 16 / kLanes; ++i) {
      const Vec p = exp_negative(load(s + j + i * kLanes) - max);
      store(s + j + i * kLanes, p);
      sum[i] += p;
    }
  }
  for (int i = 0; i < 16 / kLanes; ++i) store(lanes + i * kLanes, sum[i]);
  float total = 0.0f;
  for (int i = 0; i < 16; ++i) total += lanes[i];
  *max_out = max;
  *sum_out = total;
  return true;
}

// value[r] += sum over keys [from, to) of weight[r][j] * v[j], key by key, for R rows and C vectors from dimension d.
template <int R, int C>
SKERRY_INLINE void add_values(const float* const* v, const float* weight, int from, int to, int d, float* value,
                              int stride) {
  Vec acc[R][C];
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) acc[r][c] = load(value + r * stride + d + c * kLanes);
  }
  for (int j = from; j < to; ++j) {
    Vec x[C];
    for (int c = 0; c < C; ++c) x[c] = load(v[j] + d + c * kLanes);
    for (int r = 0; r < R; ++r) {
      const Vec w = splat(weight[r * kSplit + j]);
      for (int c = 0; c < C; ++c) acc[r][c] += w * x[c];
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) store(value + r * stride + d + c * kLanes, acc[r][c]);
  }
}

template <int R>
SKERRY_INLINE void add_values(const AttentionTile& t, const Keys& keys, const float* weight, int from, int to,
                              float* value) {
  if (from >= to) return;
  const int stride = padded(t.head_size);
  int d = 0;
  for (; d + kValueVectors * kLanes <= t.head_size; d += kValueVectors * kLanes) {
    add_values<R, kValueVectors>(keys.value, weight, from, to, d, value, stride);
  }
  for (; d + kLanes <= t.head_size; d += kLanes) add_values<R, 1>(keys.value, weight, from, to, d, value, stride);
  if (d == t.head_size) return;
  for (int j = from; j < to; ++j) {  // a head size that is no multiple of the vector: the tail by memcpy
    Vec x = {};
    memcpy(&x, keys.value[j] + d, sizeof(float) * (t.head_size - d));
    for (int r = 0; r < R; ++r) {
      Vec acc = load(value + r * stride + d);
      acc += splat(weight[r * kSplit + j]) * x;
      store(value + r * stride + d, acc);
    }
  }
}

void merge(int rows, int head_size, const AttentionState& partial, const AttentionState& state) {
  const int stride = padded(head_size);
  for (int r = 0; r < rows; ++r) {
    if (partial.max[r] == -INFINITY) continue;
    const bool grows = partial.max[r] > state.max[r] || partial.max[r] != partial.max[r];  // a NaN must show
    const float max = grows ? partial.max[r] : state.max[r];
    float both[2] = {state.max[r] - max, partial.max[r] - max};
    Vec x = {};
    memcpy(&x, both, sizeof both);
    x = exp_negative(x);
    memcpy(both, &x, sizeof both);
    state.max[r] = max;
    state.sum[r] = state.sum[r] * both[0] + partial.sum[r] * both[1];
    for (int d = 0; d < stride; d += kLanes) {
      float* into = state.value + static_cast<int64_t>(r) * stride + d;
      store(into, load(into) * both[0] + load(partial.value + static_cast<int64_t>(r) * stride + d) * both[1]);
    }
  }
}

void attend(const AttentionTile& t, int split, const AttentionState& state) {
  const int first = split * kSplit;
  const int stride = padded(t.head_size);
  int low = kSplit, high = 0;
  for (int r = 0; r < t.rows; ++r) {
    const int a = t.start[r] > first ? t.start[r] - first : 0;
    const int b = t.end[r] - first < kSplit ? t.end[r] - first : kSplit;
    if (a >= b) continue;
    low = a < low ? a : low;
    high = b > high ? b : high;
  }
  if (low >= high) return;

  float* keys_t = t.scratch;
  float* scores = keys_t + static_cast<int64_t>(kSplit) * t.head_size;
  float* value = scores + static_cast<int64_t>(kSplit) * t.rows;
  float* max = value + static_cast<int64_t>(t.rows) * stride;
  float* sum = max + t.rows;
  float* zeros = sum + t.rows;
  memset(value, 0, sizeof(float) * t.rows * stride);
  memset(zeros, 0, sizeof(float) * stride);

  Keys keys;
  locate(t, first, low, high, &keys);
  transpose(t, keys, low, high, zeros, keys_t);
  int row = 0;
  for (; row + 4 <= t.rows; row += 4) score_rows<4>(t, row, keys_t, low, high, scores);
  for (; row < t.rows; ++row) score_rows<1>(t, row, keys_t, low, high, scores);

  for (row = 0; row < t.rows;) {
    const int count = row + 4 <= t.rows ? 4 : 1;
    int from[4], to[4], common_from = 0, common_to = kSplit;
    for (int i = 0; i < count; ++i) {
      const int r = row + i;
      from[i] = t.start[r] > first ? t.start[r] - first : 0;
      to[i] = t.end[r] - first < kSplit ? t.end[r] - first : kSplit;
      if (from[i] >= to[i] || !softmax(scores + r * kSplit, from[i], to[i], t.softcap, max + r, sum + r)) {
        max[r] = -INFINITY;
        sum[r] = 0.0f;
        to[i] = from[i] = 0;
      }
      common_from = from[i] > common_from ? from[i] : common_from;
      common_to = to[i] < common_to ? to[i] : common_to;
    }
    float* into = value + static_cast<int64_t>(row) * stride;
    const float* weight = scores + row * kSplit;
    if (count == 1 || common_from >= common_to) {
      for (int i = 0; i < count; ++i) add_values<1>(t, keys, weight + i * kSplit, from[i], to[i], into + i * stride);
    } else {
      for (int i = 0; i < 4; ++i) add_values<1>(t, keys, weight + i * kSplit, from[i], common_from, into + i * stride);
      add_values<4>(t, keys, weight, common_from, common_to, into);
      for (int i = 0; i < 4; ++i) add_values<1>(t, keys, weight + i * kSplit, common_to, to[i], into + i * stride);
    }
    row += count;
  }
  merge(t.rows, t.head_size, {max, sum, value}, state);
}

void rotate(const float* x, const float* cos, const float* sin, int head_size, int rotary, bool interleaved,
            float scale, float* out) {
  const int half = rotary / 2;
  if (interleaved) {
    for (int i = 0; i < half; ++i) {
      const float a = x[2 * i], b = x[2 * i + 1];
      out[2 * i] = (a * cos[i] - b * sin[i]) * scale;
      out[2 * i + 1] = (b * cos[i] + a * sin[i]) * scale;
    }
  } else {
    for (int i = 0; i < half; ++i) {
      const float a = x[i], b = x[i + half];
      out[i] = (a * cos[i] - b * sin[i]) * scale;
      out[i + half] = (b * cos[i] + a * sin[i]) * scale;
    }
  }
  for (int i = rotary; i < head_size; ++i) out[i] = x[i] * scale;
}

}  // namespace

#define SKERRY_STRING_(x) #x
#define SKERRY_STRING(x) SKERRY_STRING_(x)
extern const AttentionIsa SKERRY_ATTENTION_TABLE = {SKERRY_STRING(SKERRY_ISA_NAME), attend, merge, rotate};

}  // namespace skerry
