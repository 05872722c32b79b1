// Attention to pages of floats or halves. Part of attention_tile.cpp, which is compiled once per instruction set.
//
// A score is a sum over the head's dimensions in order, one key to a lane (pages hold their keys transposed); values
// are added key by key.
#pragma once

#include "attention_softmax.h"

namespace skerry {
namespace {

constexpr int kVectors = SKERRY_REGISTERS >= 32 ? 4 : 2;
constexpr int kKeysAhead = 64;  // values fetched ahead, 8 KB of halves: as many keys as score() takes at once

// Where the keys of a split lie, page by page ([head_size][16]), and its values, key by key. Only [low, high) is set.
template <class E>
struct Places {
  const E* page[kPages];
  const E* value[kSplit + kKeysAhead];  // past the last one: what to fetch while the last ones are used
  const E* first_values[kVectors];      // regions to fetch ahead
};

template <class E>
SKERRY_INLINE void locate(const AttentionTile& t, int first, int low, int high, Places<E>* places) {
  for (int p = low / kPage; p < pages_until(high); ++p) {
    const uint8_t* base = t.kv + t.table[first / kPage + p] * t.page_bytes;
    places->page[p] = (const E*)(base + t.key_offset);
    for (int j = 0; j < kPage; ++j) places->value[p * kPage + j] = (const E*)(base + t.value_offset) + j * t.head_size;
  }
  const int last = pages_until(high) - 1;
  for (int i = 0; i < kVectors; ++i) {
    const int p = low / kPage + i < last ? low / kPage + i : last;
    places->first_values[i] = places->value[p * kPage];
  }
  // After a split's values come the keys of the next one.
  const int end = (last + 1) * kPage;
  for (int j = 0; j < kKeysAhead; ++j) {
    const int page = (first + end + j) / kPage;
    const int known = t.ahead != nullptr && page < t.ahead->last ? page : first / kPage + last;
    const uint8_t* base = t.kv + t.table[known] * t.page_bytes;
    places->value[end + j] = (const E*)(base + t.key_offset) + j % kPage * t.head_size;
  }
}

// The same places as floats: many rows then share one conversion.
SKERRY_INLINE void widen(const AttentionTile& t, int low, int high, const Places<uint16_t>& from, float* into,
                         Places<float>* places) {
  const int size = t.head_size, whole = size / kLanes * kLanes;
  for (int p = low / kPage; p < pages_until(high); ++p) {
    places->page[p] = into;
    for (int d = 0; d < size * kPage; d += kLanes) store(into + d, load(from.page[p] + d));
    into += size * kPage;
    for (int j = p * kPage; j < (p + 1) * kPage; ++j, into += padded(size)) {
      places->value[j] = into;
      for (int d = 0; d < whole; d += kLanes) store(into + d, load(from.value[j] + d));
      if (whole == size) continue;
      uint16_t rest[kLanes] = {};
      memcpy(rest, from.value[j] + whole, sizeof(uint16_t) * (size - whole));
      store(into + whole, load(rest));
    }
  }
  for (int i = 0; i < kVectors; ++i) places->first_values[i] = places->value[low];
  for (int j = 0; j < kKeysAhead; ++j) places->value[pages_until(high) * kPage + j] = places->value[low];
}

// R rows against C registers of keys: register c is part c % kParts of page c / kParts.
// `ahead`: pages of keys that come next, or null.
template <int R, int C, class E>
SKERRY_INLINE void score(const float* q, int head_size, const E* const* page, int part, const E* const* ahead,
                         float* out) {
  Vec acc[R][C];
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) acc[r][c] = Vec{};
  }
  for (int d = 0; d < head_size; ++d) {
    if (ahead != nullptr) {
      for (int c = 0; c < (C + kParts - 1) / kParts; ++c) __builtin_prefetch(ahead[c] + d * kPage);
    }
    Vec k[C];
    for (int c = 0; c < C; ++c) k[c] = load(page[(part + c) / kParts] + d * kPage + (part + c) % kParts * kLanes);
    for (int r = 0; r < R; ++r) {
      const Vec x = splat(q[r * head_size + d]);
      for (int c = 0; c < C; ++c) acc[r][c] = fma(x, k[c], acc[r][c]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) store(out + r * kSplit + c * kLanes, acc[r][c]);
  }
}

template <int R, class E>
SKERRY_INLINE void score_rows(const AttentionTile& t, int row, const Places<E>& places, int low, int high,
                              float* scores) {
  const float* q = t.q + static_cast<int64_t>(row) * t.head_size;
  float* out = scores + row * kSplit;
  const int end = pages_until(high) * kParts;
  int at = low / kPage * kParts;  // register of keys within the split
  for (; at + kVectors <= end; at += kVectors) {
    const E* const* page = places.page + at / kParts;
    // After the last keys come the first values, regions of the same size.
    const E* const* ahead = at + 2 * kVectors <= end ? page + kVectors / kParts : places.first_values;
    if (t.ahead == nullptr) ahead = nullptr;  // many rows read the same keys: they are at hand
    score<R, kVectors>(q, t.head_size, page, at % kParts, ahead, out + at * kLanes);
  }
  for (; at < end; ++at) {
    score<R, 1>(q, t.head_size, places.page + at / kParts, at % kParts, (const E* const*)nullptr, out + at * kLanes);
  }
}

// value[r] += sum over keys [from, to) of weight[r][j] * v[j], key by key, for R rows and C vectors from dimension d.
template <int R, int C, class E>
SKERRY_INLINE void add_columns(const E* const* v, const float* weight, int from, int to, int d, float* value,
                               int stride) {
  Vec acc[R][C];
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) acc[r][c] = load(value + r * stride + d + c * kLanes);
  }
  for (int j = from; j < to; ++j) {
    for (int c = 0; c < C; ++c) __builtin_prefetch(v[j + kKeysAhead] + d + c * kLanes);
    Vec x[C];
    for (int c = 0; c < C; ++c) x[c] = load(v[j] + d + c * kLanes);
    for (int r = 0; r < R; ++r) {
      const Vec w = splat(weight[r * kSplit + j]);
      for (int c = 0; c < C; ++c) acc[r][c] = fma(w, x[c], acc[r][c]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) store(value + r * stride + d + c * kLanes, acc[r][c]);
  }
}

template <int R, class E>
SKERRY_INLINE void add_values(const AttentionTile& t, const Places<E>& places, const float* weight, int from, int to,
                              float* value) {
  if (from >= to) return;
  const int stride = padded(t.head_size);
  int d = 0;
  for (; d + kVectors * kLanes <= t.head_size; d += kVectors * kLanes) {
    add_columns<R, kVectors>(places.value, weight, from, to, d, value, stride);
  }
  for (; d + kLanes <= t.head_size; d += kLanes) add_columns<R, 1>(places.value, weight, from, to, d, value, stride);
  if (d == t.head_size) return;
  for (int j = from; j < to; ++j) {  // a head size that is no multiple of the vector: the tail by memcpy
    E rest[kLanes] = {};
    memcpy(rest, places.value[j] + d, sizeof(E) * (t.head_size - d));
    const Vec x = load(rest);
    for (int r = 0; r < R; ++r) {
      float* into = value + r * stride + d;
      store(into, fma(splat(weight[r * kSplit + j]), x, load(into)));
    }
  }
}

// R rows from `row`: scores, weights, weighted values.
template <int R, class E>
SKERRY_INLINE void attend_rows(const AttentionTile& t, int row, int first, const Places<E>& places, const Room& room) {
  const int stride = padded(t.head_size);
  const Span any = seen_by_any(t, row, R, first);
  if (any.from < any.to) score_rows<R>(t, row, places, any.from, any.to, room.scores);
  int from[R], to[R], common_from = 0, common_to = kSplit;
  for (int i = 0; i < R; ++i) {
    const int r = row + i;
    from[i] = seen(t, r, first).from;
    to[i] = seen(t, r, first).to;
    if (from[i] >= to[i] || !softmax(room.scores + r * kSplit, from[i], to[i], t.softcap, room.max + r, room.sum + r)) {
      room.max[r] = -INFINITY;
      room.sum[r] = 0.0f;
      to[i] = from[i] = 0;
    }
    common_from = from[i] > common_from ? from[i] : common_from;
    common_to = to[i] < common_to ? to[i] : common_to;
  }
  float* into = room.value + static_cast<int64_t>(row) * stride;
  const float* weight = room.scores + row * kSplit;
  if (common_from >= common_to) {
    for (int i = 0; i < R; ++i) add_values<1>(t, places, weight + i * kSplit, from[i], to[i], into + i * stride);
    return;
  }
  for (int i = 0; i < R; ++i) add_values<1>(t, places, weight + i * kSplit, from[i], common_from, into + i * stride);
  add_values<R>(t, places, weight, common_from, common_to, into);
  for (int i = 0; i < R; ++i) add_values<1>(t, places, weight + i * kSplit, common_to, to[i], into + i * stride);
}

template <class E>
void attend_all(const AttentionTile& t, int first, const Places<E>& places, const Room& room) {
  int row = 0;
  for (; row + kRows <= t.rows; row += kRows) attend_rows<kRows>(t, row, first, places, room);
  if (t.rows - row == 3) attend_rows<3>(t, row, first, places, room);
  if (t.rows - row == 2) attend_rows<2>(t, row, first, places, room);
  if (t.rows - row == 1) attend_rows<1>(t, row, first, places, room);
}

void attend_floats(const AttentionTile& t, int first, Span any, const Room& room) {
  Places<float> places;
  if (t.layout == 0) {
    locate(t, first, any.from, any.to, &places);
    attend_all(t, first, places, room);
    return;
  }
  Places<uint16_t> halves;
  locate(t, first, any.from, any.to, &halves);
  if (t.ahead != nullptr) {
    attend_all(t, first, halves, room);
  } else {
    widen(t, any.from, any.to, halves, room.wide, &places);
    attend_all(t, first, places, room);
  }
}

}  // namespace
}  // namespace skerry
