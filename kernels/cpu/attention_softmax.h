// What the tiles of attention share, whatever a page holds: the cuts of the KV axis, scores that become weights. Part
// of attention_tile.cpp, which is compiled once per instruction set.
#pragma once

#include <math.h>

#include "attention_tile.h"
#include "vector.h"

namespace skerry {
namespace {

constexpr int kSplit = 256;
constexpr int kPage = 16;               // tokens of a page
constexpr int kParts = kPage / kLanes;  // registers that hold a page's keys of one dimension
constexpr int kPages = kSplit / kPage;  // of a split
constexpr int kRows = 4;                // query rows that share a load

// What a row sees of a split, as offsets from its first key; nothing where from >= to.
struct Span {
  int from, to;
};

SKERRY_INLINE Span seen(const AttentionTile& t, int row, int first) {
  return {t.start[row] > first ? t.start[row] - first : 0, t.end[row] - first < kSplit ? t.end[row] - first : kSplit};
}

// What any of `rows` rows from `row` sees; from >= to: nothing.
SKERRY_INLINE Span seen_by_any(const AttentionTile& t, int row, int rows, int first) {
  Span all{kSplit, 0};
  for (int r = row; r < row + rows; ++r) {
    const Span one = seen(t, r, first);
    if (one.from >= one.to) continue;
    all.from = one.from < all.from ? one.from : all.from;
    all.to = one.to > all.to ? one.to : all.to;
  }
  return all;
}

SKERRY_INLINE int pages_until(int key) { return (key + kPage - 1) / kPage; }

// A split's scratch: scores [rows][256], its own state, then room to widen.
struct Room {
  float *scores, *value, *max, *sum, *wide;

  Room(const AttentionTile& t) {
    scores = t.scratch;
    value = scores + static_cast<int64_t>(kSplit) * t.rows;
    max = value + static_cast<int64_t>(t.rows) * padded(t.head_size);
    sum = max + t.rows;
    wide = sum + t.rows;
  }
};

SKERRY_INLINE Vec tanh_capped(Vec x, float cap) {
  const Vec t = x / cap;
  const Vec a = t < 0.0f ? t : -t;  // -|t|
  const Vec e = exp_negative(a + a);
  const Vec y = (1.0f - e) / (1.0f + e);
  return cap * (t < 0.0f ? -y : y);
}

// 16 lanes in a fixed order, whatever the register: halves are added, then their halves.
SKERRY_INLINE float sum_of_16(const Vec* sum) {
  float lanes[16];
  for (int i = 0; i < 16 / kLanes; ++i) store(lanes + i * kLanes, sum[i]);
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

SKERRY_INLINE void cap_scores(float* s, int from, int to, float softcap) {
  for (int j = from / 16 * 16; j < to; j += kLanes) store(s + j, tanh_capped(load(s + j), softcap));
}

// Of each lane, a NaN above all.
SKERRY_INLINE Vec larger(Vec top, Vec x) { return x > top ? x : (x == x ? top : x); }

SKERRY_INLINE float largest_lane(Vec top) {
  float lanes[kLanes];
  store(lanes, top);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) {
      const float other = lanes[i + half];
      lanes[i] = other > lanes[i] || other != other ? other : lanes[i];
    }
  }
  return lanes[0];
}

// Scores of a row become weights. Only [from, to) counts. Returns false where no key has a finite score.
SKERRY_INLINE bool softmax(float* s, int from, int to, float softcap, float* max_out, float* sum_out) {
  const int begin = from / 16 * 16, end = (to + 15) / 16 * 16;
  if (softcap > 0.0f) cap_scores(s, from, to, softcap);
  for (int j = begin; j < from; ++j) s[j] = -INFINITY;
  for (int j = to; j < end; ++j) s[j] = -INFINITY;
  Vec top = splat(-INFINITY);
  for (int j = begin; j < end; j += kLanes) top = larger(top, load(s + j));
  const float max = largest_lane(top);
  if (max == -INFINITY) return false;
  Vec sum[16 / kLanes] = {};
  for (int j = begin; j < end; j += 16) {
    for (int i = 0; i < 16 / kLanes; ++i) {
      const Vec p = exp_negative(load(s + j + i * kLanes) - max);
      store(s + j + i * kLanes, p);
      sum[i] += p;
    }
  }
  *max_out = max;
  *sum_out = sum_of_16(sum);
  return true;
}

}  // namespace
}  // namespace skerry
