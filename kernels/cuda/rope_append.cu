// Keys are turned and, as values are, rounded and written to their slots: a warp for each token and KV head. Tokens
// past the last sequence have no result, so theirs is zeroed here, as is the count of splits that the attention behind
// keeps.
#include "attention_load.h"

namespace skerry::cuda {
namespace {

constexpr int kPairs = 4;  // of a lane: heads have at most 256 elements

// What lane `lane` holds of a head: elements 2 lane, 2 lane + 1 and those 64, 128 and 192 on; turned unless `turn` is
// -1.
struct Head {
  float x[2 * kPairs];
};

template <class E>
DEVICE Head read_head(const PagedAttentionTask& task, const E* head, int64_t turn, int lane) {
  Head found = {};
  for (int p = 0; p < kPairs; ++p) {
    const int i = 64 * p + 2 * lane;
    if (i >= task.head_size) break;
    const Two x = turn < 0 ? two(head + i) : turned_two(task, head, i, turn);
    found.x[2 * p] = x.a;
    found.x[2 * p + 1] = x.b;
  }
  return found;
}

DEVICE uint8_t code_of(float x, Stored stored) {
  if (stored == Stored::kInt8) return static_cast<uint8_t>(static_cast<int8_t>(rintf(x)));
  return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3);
}

template <class E>
DEVICE void write_head(const PagedAttentionTask& task, const Head& head, uint8_t* to, float* scale, int lane) {
  const bool wide = task.stored == Stored::kWide;
  float largest = 0;
  for (const float x : head.x) largest = fmaxf(largest, fabsf(x));
  const float unit = warp_max(largest) / (task.stored == Stored::kInt8 ? 127.0f : 448.0f);
  const float inverse = unit > 0 ? 1.0f / unit : 0.0f;
  if (!wide && lane == 0) *scale = unit;
  for (int p = 0; p < kPairs; ++p) {
    const int i = 64 * p + 2 * lane;
    if (i >= task.head_size) break;
    const float a = head.x[2 * p], b = head.x[2 * p + 1];
    if (wide) {
      *reinterpret_cast<uint32_t*>(to + 2 * i) = pack(a, b, E());
    } else {
      const uint16_t first = code_of(a * inverse, task.stored), second = code_of(b * inverse, task.stored);
      *reinterpret_cast<uint16_t*>(to + i) = static_cast<uint16_t>(first | second << 8);
    }
  }
}

template <class E>
DEVICE void append(const PagedAttentionTask& task, unsigned char*) {
  const int64_t warp = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x % 32), head = static_cast<int>(warp % task.kv_heads);
  const int64_t token = warp / task.kv_heads;
  const int64_t places = static_cast<int64_t>(task.sequences) * task.kv_heads * task.tiles;
  for (int64_t at = warp * 32 + lane; at < places; at += static_cast<int64_t>(gridDim.x) * blockDim.x)
    task.arrived[at] = 0;
  if (token >= task.tokens) return;
  if (token >= task.query_start[task.sequences]) {
    const int group = task.heads / task.kv_heads;
    E* out = static_cast<E*>(task.out) + (token * task.heads + head * group) * task.head_size;
    for (int i = lane; i < group * task.head_size; i += 32) from_float(0.0f, out[i]);
    return;
  }
  const int64_t slot = task.slot[token], page = slot / kPage;
  if (slot < 0 || page >= task.pages) return;
  uint8_t* begin = task.kv + page * task.page_stride + head * task.head_stride;
  uint8_t* key = begin + slot % kPage * task.token_stride;
  float* scales = reinterpret_cast<float*>(begin + task.scale_offset) + slot % kPage;
  const int64_t from = (token * task.kv_heads + head) * task.head_size;
  const int64_t turn = turn_of(task, static_cast<int>(token));
  write_head<E>(task, read_head(task, static_cast<const E*>(task.k) + from, turn, lane), key, scales, lane);
  write_head<E>(task, read_head(task, static_cast<const E*>(task.v) + from, -1, lane), key + task.value_offset,
                scales + kPage, lane);
}

}  // namespace

SKERRY_KERNEL(rope_append_f16, PagedAttentionTask, 128, 1, append<__half>)
SKERRY_KERNEL(rope_append_bf16, PagedAttentionTask, 128, 1, append<__nv_bfloat16>)

}  // namespace skerry::cuda
