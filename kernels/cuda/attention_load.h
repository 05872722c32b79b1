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

// The row of the rotary tables for a token.
DEVICE int64_t turn_of(const PagedAttentionTask& task, int token) {
  return min(max(static_cast<int64_t>(task.positions[token]), int64_t{0}), task.table_rows - 1);
}

// Element i of a head, turned: pairs are (i, i + rotary / 2), or (2i, 2i + 1) interleaved (Su et al., RoFormer, 2021).
template <class E>
DEVICE float turned(const PagedAttentionTask& task, const E* head, int i, int64_t turn) {
  const float x = to_float(head[i]);
  if (i >= task.rotary) return x;
  const int half = task.rotary / 2;
  const int pair = task.interleaved ? i / 2 : i % half;
  const bool second = task.interleaved ? i % 2 != 0 : i >= half;
  const float other = to_float(head[task.interleaved ? i ^ 1 : second ? i - half : i + half]);
  const float c = task.cos[turn * half + pair], s = task.sin[turn * half + pair];
  return second ? fmaf(x, c, other * s) : fmaf(x, c, -(other * s));
}

struct Two {
  float a, b;
};

template <class E>
DEVICE Two two(const E* at) {
  const uint32_t bits = *reinterpret_cast<const uint32_t*>(at);
  const E* both = reinterpret_cast<const E*>(&bits);
  return {to_float(both[0]), to_float(both[1])};
}

// Elements i and i + 1, i even, with half the loads.
template <class E>
DEVICE Two turned_two(const PagedAttentionTask& task, const E* head, int i, int64_t turn) {
  if (i >= task.rotary) return two(head + i);
  const int half = task.rotary / 2;
  if (task.interleaved || half % 2 != 0) return {turned(task, head, i, turn), turned(task, head, i + 1, turn)};
  const bool second = i >= half;
  const int pair = second ? i - half : i;
  const Two x = two(head + i), other = two(head + (second ? pair : i + half));
  const float *c = task.cos + turn * half + pair, *s = task.sin + turn * half + pair;
  const float sign = second ? 1.0f : -1.0f;
  return {fmaf(x.a, c[0], sign * (other.a * s[0])), fmaf(x.b, c[1], sign * (other.b * s[1]))};
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
      const Two x = turned_two(task, head, i, turn_of(task, token));
      both = pack(x.a, x.b, E());
    }
    *reinterpret_cast<uint32_t*>(to + at / (D / 2) * Layout<E, D>::kRow + i * 2) = both;
  }
}

// Where a page of a sequence begins for a KV head, and how many of its tokens are stored; none where there is no page.
struct Page {
  const uint8_t* at;
  int stored;

  DEVICE Page(const PagedAttentionTask& task, const Sequence& sequence, int kv_head, int index)
      : at(task.kv), stored(0) {
    if (index < 0 || index >= task.table_width) return;
    const int page = task.block_table[static_cast<int64_t>(sequence.number) * task.table_width + index];
    if (page < 0 || page >= task.pages) return;
    at += page * task.page_stride + kv_head * task.head_stride;
    stored = sequence.context - index * kPage;
  }
};

// Asks for 16 rows of kBytes; those from `stored` on become zeros.
template <int kBytes, int kStride, int kThreads>
DEVICE void ask_rows(const uint8_t* from, int token_stride, int stored, unsigned char* to, int thread) {
  constexpr int kPieces = kBytes / 16, kStep = kThreads / kPieces;
  static_assert(kThreads % kPieces == 0);
  from += thread % kPieces * 16;
  to += thread % kPieces * 16;
#pragma unroll
  for (int first = 0; first < kPage; first += kStep) {
    const int row = first + thread / kPieces;
    if (kStep <= kPage || row < kPage)
      copy_async(to + row * kStride, row < stored ? from + row * token_stride : from, row < stored);
  }
}

// The same of a page of numbers like q's, its keys and its values ...
template <class E, int D, int kThreads>
DEVICE void ask_wide(const PagedAttentionTask& task, const Page& page, unsigned char* keys, unsigned char* values,
                     int thread) {
  const int stride = static_cast<int>(task.token_stride);
  ask_rows<D * 2, Layout<E, D>::kRow, kThreads>(page.at, stride, page.stored, keys, thread);
  ask_rows<D * 2, Layout<E, D>::kRow, kThreads>(page.at + task.value_offset, stride, page.stored, values, thread);
}

// ... and of a page of codes: keys, values and scales one behind the other.
template <int D>
inline constexpr int kCodeBytes = 2 * kPage * D + kScaleBytes;

template <int D, int kThreads>
DEVICE void ask_codes(const PagedAttentionTask& task, const Page& page, unsigned char* to, int thread) {
  const int stride = static_cast<int>(task.token_stride);
  ask_rows<D, D, kThreads>(page.at, stride, page.stored, to, thread);
  ask_rows<D, D, kThreads>(page.at + task.value_offset, stride, page.stored, to + kPage * D, thread);
  if (thread < kScaleBytes / 16)
    copy_async(to + 2 * kPage * D + thread * 16, page.at + task.scale_offset + thread * 16, page.stored > 0);
}

// Codes 2 `pair` and the one behind it of four.
DEVICE Two code_values(uint32_t four, int pair, Stored stored) {
  if (stored == Stored::kInt8) {  // 2^23 + 128 + code is a float that ends in those bits
    const uint32_t above = (four ^ 0x80808080u) >> (16 * pair);
    return {__uint_as_float(0x4B000000u | (above & 0xFF)) - 8388736.0f,
            __uint_as_float(0x4B000000u | (above >> 8 & 0xFF)) - 8388736.0f};
  }
  __nv_fp8x2_e4m3 both;
  both.__x = static_cast<__nv_fp8x2_storage_t>(four >> (16 * pair));
  const float2 values = static_cast<float2>(both);
  return {values.x, values.y};
}

// Codes that have arrived become rows of E, with their scales; those from `stored` on, zeros.
template <class E, int D, int kThreads>
DEVICE void widen_page(Stored kind, int stored, const unsigned char* codes, unsigned char* keys, unsigned char* values,
                       int thread) {
#pragma unroll 4
  for (int at = thread; at < 2 * kPage * D / 8; at += kThreads) {
    const int row = at / (D / 8), i = at % (D / 8) * 8;
    const float scale = reinterpret_cast<const float*>(codes + 2 * kPage * D)[row];
    const uint2 eight = *reinterpret_cast<const uint2*>(codes + row * D + i);
    uint32_t wide[4] = {};
    for (int pair = 0; pair < 4; ++pair) {
      const Two x = code_values(pair < 2 ? eight.x : eight.y, pair % 2, kind);
      if (row % kPage < stored) wide[pair] = pack(x.a * scale, x.b * scale, E());
    }
    unsigned char* to = (row < kPage ? keys : values) + row % kPage * Layout<E, D>::kRow + i * 2;
    *reinterpret_cast<uint4*>(to) = uint4{wide[0], wide[1], wide[2], wide[3]};
  }
}

}  // namespace skerry::cuda
