// Compiled once per instruction set: SKERRY_ISA_NAME names the table, SKERRY_LANES is the vector width in floats.
//
// This file includes no C++ library header with inline functions: the linker keeps one copy of such a function, and
// it might keep the one built for AVX-512 and call it on a machine without.
//
// The order of arithmetic is the same for every tile shape: the weights of a split are summed in 16 lanes by absolute
// key, then the lanes in order, and splits are merged in order; the rest is stated in the two headers.
#include "attention_tile.h"

#include "attention_codes.h"
#include "attention_floats.h"
#include "vector.h"

namespace skerry {
namespace {

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

void attend(const AttentionTile* tiles, int heads, int split, const AttentionState* states) {
  const AttentionTile& t = tiles[0];  // what rows see is the same for all heads
  const int first = split * kSplit;
  const Span any = seen_by_any(t, 0, t.rows, first);
  if (any.from >= any.to) return;
  for (int h = 0; h < heads; ++h) memset(Room(tiles[h]).value, 0, sizeof(float) * t.rows * padded(t.head_size));
  if (t.layout == 2 && t.ahead != nullptr) attend_few_codes(tiles, heads, first, any);
  for (int h = 0; h < heads; ++h) {
    const Room room(tiles[h]);
    if (t.layout != 2) attend_floats(tiles[h], first, any, room);
    if (t.layout == 2 && t.ahead == nullptr) attend_many_codes(tiles[h], first, any, room);
    merge(t.rows, t.head_size, {room.max, room.sum, room.value}, states[h]);
  }
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
  if (layout == 2) {
    append_codes(key, value, head_size, at, keys, values);
    return;
  }
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
extern const AttentionIsa SKERRY_ATTENTION_TABLE = {
    SKERRY_STRING(SKERRY_ISA_NAME), attend, merge, rotate, round_queries, append};

}  // namespace skerry
