// Compiled once per instruction set: SKERRY_ISA_NAME names the table, SKERRY_LANES is the vector width in floats.
//
// This file includes no C++ library header with inline functions: the linker keeps one copy of such a function, and
// it might keep the one built for AVX-512 and call it on a machine without.
//
// Order of arithmetic, the same for every tile shape: a score is a sum over the head's dimensions in order, one key to
// a lane (pages hold their keys transposed); the weights of a split are summed in 16 lanes by absolute key, then the
// lanes in order; values are added key by key.
#include "attention_tile.h"

#include <math.h>

#include "vector.h"

namespace skerry {
namespace {

constexpr int kSplit = 256;
constexpr int kPage = 16;               // tokens of a page
constexpr int kParts = kPage / kLanes;  // registers that hold a page's keys of one dimension
constexpr int kPages = kSplit / kPage;  // of a split
constexpr int kRows = 4;                // query rows that share a load
constexpr int kVectors = SKERRY_REGISTERS >= 32 ? 4 : 2;
constexpr int kKeysAhead = 12;              // values fetched ahead
constexpr int kWorthUnpacking = 3 * kRows;  // rows from which halves are widened once for all of them

SKERRY_INLINE Vec tanh_capped(Vec x, float cap) {
  const Vec t = x / cap;
  const Vec a = t < 0.0f ? t : -t;  // -|t|
  const Vec e = exp_negative(a + a);
  const Vec y = (1.0f - e) / (1.0f + e);
  return cap * (t < 0.0f ? -y : y);
}

// Where the keys of a split lie, page by page ([head_size][16]), and its values, key by key. Only [low, high) is set.
template <class E>
struct Places {
  const E* page[kPages];
  const E* value[kSplit];
  const E* first_values[kVectors];  // regions to fetch ahead
};

template <class E>
SKERRY_INLINE void locate(const AttentionTile& t, int first, int low, int high, Places<E>* places) {
  for (int p = low / kPage; p < (high + kPage - 1) / kPage; ++p) {
    const uint8_t* base = t.kv + t.table[first / kPage + p] * t.page_bytes;
    places->page[p] = (const E*)(base + t.key_offset);
    for (int j = 0; j < kPage; ++j) places->value[p * kPage + j] = (const E*)(base + t.value_offset) + j * t.head_size;
  }
  const int last = (high + kPage - 1) / kPage - 1;
  for (int i = 0; i < kVectors; ++i) {
    const int p = low / kPage + i < last ? low / kPage + i : last;
    places->first_values[i] = places->value[p * kPage];
  }
}

// The same places as floats: many rows then share one conversion.
SKERRY_INLINE void widen(const AttentionTile& t, int low, int high, const Places<uint16_t>& from, float* into,
                         Places<float>* places) {
  const int size = t.head_size, whole = size / kLanes * kLanes;
  for (int p = low / kPage; p < (high + kPage - 1) / kPage; ++p) {
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
  const int end = (high + kPage - 1) / kPage * kParts;
  int at = low / kPage * kParts;  // register of keys within the split
  for (; at + kVectors <= end; at += kVectors) {
    const E* const* page = places.page + at / kParts;
    // After the last keys come the first values, regions of the same size.
    const E* const* ahead = at + 2 * kVectors <= end ? page + kVectors / kParts : places.first_values;
    if (t.rows >= kWorthUnpacking) ahead = nullptr;  // many rows read the same keys: they are at hand
    score<R, kVectors>(q, t.head_size, page, at % kParts, ahead, out + at * kLanes);
  }
  for (; at < end; ++at) {
    score<R, 1>(q, t.head_size, places.page + at / kParts, at % kParts, (const E* const*)nullptr, out + at * kLanes);
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
template <int R, int C, class E>
SKERRY_INLINE void add_columns(const E* const* v, const float* weight, int from, int to, int d, float* value,
                               int stride) {
  Vec acc[R][C];
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) acc[r][c] = load(value + r * stride + d + c * kLanes);
  }
  for (int j = from; j < to; ++j) {
    const E* next = v[j + kKeysAhead < to ? j + kKeysAhead : j] + d;
    for (int c = 0; c < C; ++c) __builtin_prefetch(next + c * kLanes);
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

// R rows from `row`: scores, weights, weighted values.
template <int R, class E>
SKERRY_INLINE void attend_rows(const AttentionTile& t, int row, int first, const Places<E>& places, int low, int high,
                               const Room& room) {
  score_rows<R>(t, row, places, low, high, room.scores);
  const int stride = padded(t.head_size);
  int from[R], to[R], common_from = 0, common_to = kSplit;
  for (int i = 0; i < R; ++i) {
    const int r = row + i;
    from[i] = t.start[r] > first ? t.start[r] - first : 0;
    to[i] = t.end[r] - first < kSplit ? t.end[r] - first : kSplit;
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
void attend_all(const AttentionTile& t, int first, const Places<E>& places, int low, int high, const Room& room) {
  int row = 0;
  for (; row + kRows <= t.rows; row += kRows) attend_rows<kRows>(t, row, first, places, low, high, room);
  if (t.rows - row == 3) attend_rows<3>(t, row, first, places, low, high, room);
  if (t.rows - row == 2) attend_rows<2>(t, row, first, places, low, high, room);
  if (t.rows - row == 1) attend_rows<1>(t, row, first, places, low, high, room);
}

void attend(const AttentionTile& t, int split, const AttentionState& state) {
  const int first = split * kSplit;
  int low = kSplit, high = 0;
  for (int r = 0; r < t.rows; ++r) {
    const int a = t.start[r] > first ? t.start[r] - first : 0;
    const int b = t.end[r] - first < kSplit ? t.end[r] - first : kSplit;
    if (a >= b) continue;
    low = a < low ? a : low;
    high = b > high ? b : high;
  }
  if (low >= high) return;
  const Room room(t);
  memset(room.value, 0, sizeof(float) * t.rows * padded(t.head_size));
  Places<float> places;
  if (t.layout == 0) {
    locate(t, first, low, high, &places);
    attend_all(t, first, places, low, high, room);
  } else {
    Places<uint16_t> halves;
    locate(t, first, low, high, &halves);
    if (t.rows < kWorthUnpacking) {
      attend_all(t, first, halves, low, high, room);
    } else {
      widen(t, low, high, halves, room.wide, &places);
      attend_all(t, first, places, low, high, room);
    }
  }
  merge(t.rows, t.head_size, {room.max, room.sum, room.value}, state);
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

// Halves of x [head_size], a register at a time.
SKERRY_INLINE void to_halves(const float* x, int head_size, uint16_t* out) {
  for (int d = 0; d < head_size; d += kLanes) {
    const int count = head_size - d < kLanes ? head_size - d : kLanes;
    Vec v = {};
    memcpy(&v, x + d, sizeof(float) * count);
    uint16_t part[kLanes];
    store_halves(part, v);
    memcpy(out + d, part, sizeof(uint16_t) * count);
  }
}

void append(const float* key, const float* value, int head_size, int layout, int at, uint8_t* keys, uint8_t* values) {
  if (layout == 0) {
    for (int d = 0; d < head_size; ++d) ((float*)keys)[d * kPage + at] = key[d];
    memcpy((float*)values + at * head_size, value, sizeof(float) * head_size);
    return;
  }
  uint16_t halves[1024];  // of the longest head that check_shape admits
  to_halves(key, head_size, halves);
  for (int d = 0; d < head_size; ++d) ((uint16_t*)keys)[d * kPage + at] = halves[d];
  to_halves(value, head_size, halves);
  memcpy((uint16_t*)values + at * head_size, halves, sizeof(uint16_t) * head_size);
}

}  // namespace

#define SKERRY_STRING_(x) #x
#define SKERRY_STRING(x) SKERRY_STRING_(x)
extern const AttentionIsa SKERRY_ATTENTION_TABLE = {SKERRY_STRING(SKERRY_ISA_NAME), attend, merge, rotate, append};

}  // namespace skerry
