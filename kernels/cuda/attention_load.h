// From pages and queries to shared memory: queries are turned on the way (RoPE), codes become E, and what a sequence
// does not have, of a page that is not there or of slots past its end, is zero whatever lies in memory.
#pragma once

#include "attention_tile.h"

namespace skerry::cuda {

// A sequence as a block sees it.
struct Sequence {
  int number, first, tokens, context;

  DEVICE Sequence(const PagedAttentionTask& task, int b)
      : number(b),
        first(task.query_start[b]),
        tokens(task.query_start[b + 1] - task.query_start[b]),
        context(task.context_len[b]) {}

  // The key that query token `token` sees last, and the first one.
  DEVICE int last_key(int token) const { return context - tokens + token; }
  DEVICE int first_key(int token, int window) const { return window > 0 ? max(0, last_key(token) + 1 - window) : 0; }
};

// Element i of a head, turned: pairs are (i, i + rotary / 2), or (2i, 2i + 1) interleaved (Su et al., RoFormer, 2021).
template <class E>
DEVICE float turned(const PagedAttentionTask& task, const E* head, int i, int token) {
  const float x = to_float(head[i]);
  if (i >= task.rotary) return x;
  const int half = task.rotary / 2;
  const int pair = task.interleaved ? i / 2 : i % half;
  const bool second = task.interleaved ? i % 2 != 0 : i >= half;
  const float other = to_float(head[task.interleaved ? i ^ 1 : second ? i - half : i + half]);
  const int64_t row = min(max(static_cast<int64_t>(task.positions[token]), int64_t{0}), task.table_rows - 1);
  const float c = task.cos[row * half + pair], s = task.sin[row * half + pair];
  return second ? fmaf(x, c, other * s) : fmaf(x, c, -(other * s));
}

// Rows first_row to first_row + count - 1 of a sequence and KV head: row = token * group + head of the group.
template <class E, int D>
DEVICE void load_queries(const PagedAttentionTask& task, const Sequence& sequence, int kv_head, int first_row,
                         int count, unsigned char* to) {
  const int group = task.heads / task.kv_heads, all = sequence.tokens * group;
  for (int at = static_cast<int>(threadIdx.x); at < count * D / 2; at += static_cast<int>(blockDim.x)) {
    const int row = first_row + at / (D / 2), i = at % (D / 2) * 2;
    uint32_t both = 0;
    if (row < all) {
      const int token = sequence.first + row / group;
      const E* head = static_cast<const E*>(task.q) +
                      (static_cast<int64_t>(token) * task.heads + kv_head * group + row % group) * D;
      both = pack(turned(task, head, i, token), turned(task, head, i + 1, token), E());
    }
    *reinterpret_cast<uint32_t*>(to + at / (D / 2) * Layout<E, D>::kRow + i * 2) = both;
  }
}

// Where page `index` of a sequence begins for a KV head; null: it has none.
DEVICE const uint8_t* page_of(const PagedAttentionTask& task, const Sequence& sequence, int kv_head, int index) {
  if (index < 0 || index >= task.table_width) return nullptr;
  const int page = task.block_table[static_cast<int64_t>(sequence.number) * task.table_width + index];
  if (page < 0 || page >= task.pages) return nullptr;
  return task.kv + page * task.page_stride + kv_head * task.head_stride;
}

// Who of how many threads does a piece of work.
struct Share {
  int thread, threads;
};

// Asks for page `index`: its 16 keys and its 16 values as they lie (codes packed, D bytes a row).
template <class E, int D>
DEVICE void ask_page(const PagedAttentionTask& task, const Sequence& sequence, int kv_head, int index,
                     unsigned char* keys, unsigned char* values, Share share) {
  const uint8_t* page = page_of(task, sequence, kv_head, index);
  const bool wide = task.stored == Stored::kWide;
  const int bytes = wide ? D * 2 : D, pieces = bytes / 16, stride = wide ? Layout<E, D>::kRow : D;
  for (int at = share.thread; at < 2 * kPage * pieces; at += share.threads) {
    const int row = at / pieces, piece = at % pieces, token = row % kPage;
    const bool valid = page != nullptr && index * kPage + token < sequence.context;
    const uint8_t* from = valid ? page + token * task.token_stride + (row / kPage) * task.value_offset + piece * 16
                                : static_cast<const uint8_t*>(task.kv);
    copy_async((row < kPage ? keys : values) + token * stride + piece * 16, from, valid);
  }
}

DEVICE float code_value(uint8_t code, Stored stored) {
  if (stored == Stored::kInt8) return static_cast<float>(static_cast<int8_t>(code));
  __nv_fp8_e4m3 value;
  value.__x = code;
  return static_cast<float>(value);
}

// Codes that have arrived become rows of E, with their scales.
template <class E, int D>
DEVICE void widen_page(const PagedAttentionTask& task, const Sequence& sequence, int kv_head, int index,
                       const unsigned char* codes, unsigned char* keys, unsigned char* values, Share share) {
  const uint8_t* page = page_of(task, sequence, kv_head, index);
  for (int at = share.thread; at < 2 * kPage * D / 4; at += share.threads) {
    const int row = at / (D / 4), i = at % (D / 4) * 4;
    const bool valid = page != nullptr && index * kPage + row % kPage < sequence.context;
    const float scale = valid ? reinterpret_cast<const float*>(page + task.scale_offset)[row] : 0.0f;
    const uint32_t four = *reinterpret_cast<const uint32_t*>(codes + row * D + i);
    float x[4];
    for (int e = 0; e < 4; ++e)
      x[e] = valid ? code_value(static_cast<uint8_t>(four >> (8 * e)), task.stored) * scale : 0.0f;
    unsigned char* to = (row < kPage ? keys : values) + row % kPage * Layout<E, D>::kRow + i * 2;
    *reinterpret_cast<uint2*>(to) = uint2{pack(x[0], x[1], E()), pack(x[2], x[3], E())};
  }
}

}  // namespace skerry::cuda
