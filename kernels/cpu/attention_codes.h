// Attention to pages of 8-bit codes, in whole numbers. Part of attention_tile.cpp, which is compiled once per
// instruction set.
//
// Queries are rounded to 8 bits by blocks of 32 dimensions, as keys are; the sum over a block is exact, blocks are
// added in order. A split's weights, times the scales of their values, are rounded to 14 bits of the largest of them;
// their sum with the values' codes is exact.
#pragma once

#include "attention_softmax.h"

namespace skerry {
namespace {

constexpr int kTop = 16383;  // of a weight: two digits to the base of 128, which a signed and an unsigned byte hold
constexpr int kLines = 2, kLinesAQuad = 3;  // fetched ahead at each group of dimensions, and at each quad of values
constexpr int kPagesAhead = 2;              // that are fetched at once where no split before has done so
constexpr int kCodeVectors = SKERRY_REGISTERS >= 32 ? 2 : 1;
constexpr int kPagesAtOnce = kCodeVectors > kParts ? kCodeVectors / kParts : 1;
constexpr int kQuads = kPage / 4;
constexpr int kGroups = kBlockSize / 4;
constexpr int kGroupBytes = kPage * 4;
constexpr int kBlockBytes = kPage * kBlockSize;

// Pages of a split. Keys of a head: codes [blocks][8][16][4], scales [blocks][16]; values: codes [4][padded size][4],
// scales [16].
struct CodePages {
  const uint8_t* page[kPages];
};

SKERRY_INLINE void locate(const AttentionTile& t, int first, Span any, CodePages* pages) {
  for (int p = any.from / kPage; p < pages_until(any.to); ++p) {
    pages->page[p] = t.kv + t.table[first / kPage + p] * t.page_bytes;
  }
}

// The next `lines` lines, the first of which lies before page `last` of the table, to be fetched by whoever asks; null:
// there are none. After the last page comes what the thread reads after attention. Past a page's end they go on with
// its neighbour, which most often comes next.
SKERRY_INLINE const uint8_t* take(const AttentionTile& t, int last, int lines) {
  Lookahead* ahead = t.ahead;
  if (ahead->page >= last) {
    if (last < ahead->last || ahead->next_lines <= 0) return nullptr;
    ahead->next_lines -= lines;
    ahead->next += 64 * lines;
    return ahead->next - 64 * lines;
  }
  const uint8_t* from = ahead->at;
  ahead->at += 64 * lines;
  while (ahead->at >= ahead->end && ++ahead->page < ahead->last) {
    const uint8_t* base = t.kv + t.table[ahead->page] * t.page_bytes;
    if (base != ahead->end) ahead->at = base;
    ahead->end = base + t.page_bytes;
  }
  return from;
}

template <int N>
SKERRY_INLINE void fetch(const uint8_t* from) {
  for (int i = 0; i < N; ++i) __builtin_prefetch(from + 64 * i);
}

// R rows against C registers of keys: register c is part c % kParts of page c / kParts. `last`: page of the table
// before which lines are fetched meanwhile; 0: none are.
template <int R, int C>
SKERRY_INLINE void score_codes(const AttentionTile& t, int row, const uint8_t* const* page, int part, int last,
                               float* out) {
  const int blocks = code_blocks(t.head_size);
  const int8_t* q = t.codes + static_cast<int64_t>(row) * blocks * kBlockSize;
  const float* q_scale = t.code_scale + static_cast<int64_t>(row) * blocks;
  const int32_t* q_sum = t.code_sum + static_cast<int64_t>(row) * blocks;
  const uint8_t* lines = last > 0 ? take(t, last, kLines * kGroups * blocks) : nullptr;
  Vec total[R][C] = {};
  for (int b = 0; b < blocks; ++b) {
    VecI acc[R][C];
    for (int r = 0; r < R; ++r) {
      const VecI start = kSigned ? VecI{} : splat(-kOffset * q_sum[r * blocks + b]);
      for (int c = 0; c < C; ++c) acc[r][c] = start;
    }
    for (int g = 0; g < kGroups; ++g) {
      const int at = b * kBlockBytes + g * kGroupBytes;
      if (lines != nullptr) fetch<kLines>(lines + 64 * kLines * (b * kGroups + g));
      Bytes k[C];
      for (int c = 0; c < C; ++c) {
        const int piece = (part + c) % kParts;
        k[c] = load_codes(page[(part + c) / kParts] + t.key_offset + at + piece * kLanes * 4);
      }
      for (int r = 0; r < R; ++r) {
        const int32_t a = load_as<int32_t>(q + (r * blocks + b) * kBlockSize + 4 * g);
        for (int c = 0; c < C; ++c) acc[r][c] = dot4(acc[r][c], k[c], a);
      }
    }
    for (int c = 0; c < C; ++c) {
      const int scales = blocks * kBlockBytes + b * kGroupBytes, piece = (part + c) % kParts;
      const Vec scale = load_as<Vec>(page[(part + c) / kParts] + t.key_offset + scales + piece * kLanes * 4);
      for (int r = 0; r < R; ++r) {
        total[r][c] = fma(__builtin_convertvector(acc[r][c], Vec), scale * q_scale[r * blocks + b], total[r][c]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) store(out + r * kSplit + c * kLanes, total[r][c]);
  }
}

// The weights of one row as two digits each, and what their sums take back of the values' offset.
struct Digits {
  alignas(64) int8_t high[kSplit], low[kSplit];
  int32_t high_sum, low_sum;
  float unit;  // of the lower digit
};

// Scores of R rows from `row` become weights and, times the scales of their values, digits, for the pages of `any`;
// keys that a row does not see weigh nothing. Rows pass together, as a row alone waits for its own last sum.
template <int R>
SKERRY_INLINE void to_digits(const AttentionTile& t, int row, int first, const CodePages& pages, Span any,
                             const Room& room, Digits* out) {
  float* scores = room.scores + row * kSplit;
  const int begin = any.from / kPage * kPage, end = pages_until(any.to) * kPage;
  float max[R];
  for (int r = 0; r < R; ++r) {
    const Span own = seen(t, row + r, first);
    const bool sees = own.from < own.to;
    if (t.softcap > 0.0f && sees) cap_scores(scores + r * kSplit, own.from, own.to, t.softcap);
    for (int j = begin; j < (sees ? own.from : end); ++j) scores[r * kSplit + j] = -INFINITY;
    for (int j = sees ? own.to : end; j < end; ++j) scores[r * kSplit + j] = -INFINITY;
  }
  Vec top[R];
  for (int r = 0; r < R; ++r) top[r] = splat(-INFINITY);
  for (int j = begin; j < end; j += kLanes) {
    for (int r = 0; r < R; ++r) top[r] = larger(top[r], load(scores + r * kSplit + j));
  }
  Vec sum[R][kParts] = {};
  VecI largest[R] = {};
  for (int r = 0; r < R; ++r) {
    const float found = largest_lane(top[r]);
    room.max[row + r] = found;
    max[r] = found == -INFINITY ? 0.0f : found;
  }
  const int64_t scales = t.value_offset + kPage * padded(t.head_size);
  for (int j = begin; j < end; j += kPage) {
    for (int i = 0; i < kParts; ++i) {
      const Vec v = load_as<Vec>(pages.page[j / kPage] + scales + i * kLanes * 4);
      for (int r = 0; r < R; ++r) {
        float* at = scores + r * kSplit + j + i * kLanes;
        const Vec w = exp_of_weight(load(at) - max[r]);
        sum[r][i] += w;
        const Vec x = w > 0.0f ? w * v : splat(0.0f);  // the scale of a key that is not seen may be anything
        const VecI bits = load_as<VecI>(&x);           // none is negative: they are in the order of their bits
        largest[r] = bits > largest[r] ? bits : largest[r];
        store(at, x);
      }
    }
  }
  float inverse[R];
  VecI high_sum[R] = {}, low_sum[R] = {};
  for (int r = 0; r < R; ++r) {
    room.sum[row + r] = sum_of_16(sum[r]);
    const float most = largest_of_lanes(largest[r]);
    const bool nothing = most < 1e-30f;
    inverse[r] = nothing ? 0.0f : kTop / most;
    out[r].unit = nothing ? 0.0f : most / kTop;
  }
  for (int j = begin; j < end; j += kLanes) {
    for (int r = 0; r < R; ++r) {
      const Vec magic = splat(12582912.0f);
      const Vec x = load(scores + r * kSplit + j) * inverse[r];
      const VecI code = __builtin_convertvector((x + magic) - magic, VecI);
      const VecI high = code >> 7, low = code & 127;
      high_sum[r] += high;
      low_sum[r] += low;
      typedef int8_t Codes __attribute__((vector_size(kLanes)));
      const Codes h = __builtin_convertvector(high, Codes), l = __builtin_convertvector(low, Codes);
      memcpy(out[r].high + j, &h, sizeof h);
      memcpy(out[r].low + j, &l, sizeof l);
    }
  }
  for (int r = 0; r < R; ++r) {
    out[r].high_sum = sum_of_lanes(high_sum[r]);
    out[r].low_sum = sum_of_lanes(low_sum[r]);
  }
}

// value[r] = sum over the keys of `any` of weight * value, for R rows and C vectors from dimension d.
template <int R, int C>
SKERRY_INLINE void add_codes(const AttentionTile& t, const uint8_t* const* page, const Digits* digits, Span any, int d,
                             int last, float* value) {
  const int size = padded(t.head_size);
  VecI high[R][C], low[R][C];
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) {
      high[r][c] = kSigned ? VecI{} : splat(-kOffset * digits[r].high_sum);
      low[r][c] = kSigned ? VecI{} : splat(-kOffset * digits[r].low_sum);
    }
  }
  for (int p = any.from / kPage; p < pages_until(any.to); ++p) {
    const uint8_t* lines = last > 0 ? take(t, last, kLinesAQuad * kQuads) : nullptr;
    for (int quad = 0; quad < kQuads; ++quad) {
      const int at = (quad * size + d) * 4;
      if (lines != nullptr) fetch<kLinesAQuad>(lines + 64 * kLinesAQuad * quad);
      Bytes v[C];
      for (int c = 0; c < C; ++c) v[c] = load_codes(page[p] + t.value_offset + at + c * kLanes * 4);
      for (int r = 0; r < R; ++r) {
        const int32_t h = load_as<int32_t>(digits[r].high + p * kPage + quad * 4);
        const int32_t l = load_as<int32_t>(digits[r].low + p * kPage + quad * 4);
        for (int c = 0; c < C; ++c) {
          high[r][c] = dot4(high[r][c], v[c], h);
          low[r][c] = dot4(low[r][c], v[c], l);
        }
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) {
      const VecI total = (high[r][c] << 7) + low[r][c];
      store(value + r * size + d + c * kLanes, __builtin_convertvector(total, Vec) * digits[r].unit);
    }
  }
}

// Scores of R rows from `row` against pages [begin, end) of the split, where any of them sees a key.
template <int R>
SKERRY_INLINE void score_pages(const AttentionTile& t, int row, Span any, const CodePages& pages, int begin, int end,
                               int ahead, float* all_scores) {
  float* scores = all_scores + row * kSplit;
  begin = begin > any.from / kPage ? begin : any.from / kPage;
  end = end < pages_until(any.to) ? end : pages_until(any.to);
  int at = begin * kParts;
  for (; at + kCodeVectors <= end * kParts; at += kCodeVectors) {
    score_codes<R, kCodeVectors>(t, row, pages.page + at / kParts, at % kParts, ahead, scores + at * kLanes);
  }
  for (; at < end * kParts; ++at) {
    score_codes<R, 1>(t, row, pages.page + at / kParts, at % kParts, ahead, scores + at * kLanes);
  }
}

// Weights and weighted values of R rows from `row`, whose scores are there.
template <int R>
SKERRY_INLINE void weigh_values(const AttentionTile& t, int row, Span any, int first, const CodePages& pages, int ahead,
                                const Room& room) {
  if (any.from >= any.to) {
    for (int r = row; r < row + R; ++r) {
      room.max[r] = -INFINITY;
      room.sum[r] = 0.0f;
    }
    return;
  }
  Digits digits[R];
  to_digits<R>(t, row, first, pages, any, room, digits);
  const int size = padded(t.head_size);
  float* value = room.value + static_cast<int64_t>(row) * size;
  int d = 0;
  for (; d + kCodeVectors * kLanes <= size; d += kCodeVectors * kLanes) {
    add_codes<R, kCodeVectors>(t, pages.page, digits, any, d, ahead, value);
  }
  for (; d < size; d += kLanes) add_codes<R, 1>(t, pages.page, digits, any, d, ahead, value);
}

template <int R>
struct Rows {
  static constexpr int count = R;
};

// Calls body(Rows<R>, first row) for rows in fours and what is left.
template <class Body>
SKERRY_INLINE void in_fours(int rows, const Body& body) {
  int row = 0;
  for (; row + kRows <= rows; row += kRows) body(Rows<kRows>{}, row);
  if (rows - row == 3) body(Rows<3>{}, row);
  if (rows - row == 2) body(Rows<2>{}, row);
  if (rows - row == 1) body(Rows<1>{}, row);
}

// Many rows of one head: the keys stay at hand while rows pass.
void attend_many_codes(const AttentionTile& t, int first, Span any, const Room& room) {
  CodePages pages;
  locate(t, first, any, &pages);
  in_fours(t.rows, [&](auto rows, int row) __attribute__((always_inline)) {
    constexpr int R = decltype(rows)::count;
    const Span own = seen_by_any(t, row, R, first);
    score_pages<R>(t, row, own, pages, 0, kPages, 0, room.scores);
    weigh_values<R>(t, row, own, first, pages, 0, room);
  });
}

// Few rows of all heads: scores are computed page by page, so that pages are read from end to end.
void attend_few_codes(const AttentionTile* tiles, int heads, int first, Span any) {
  const AttentionTile& t = tiles[0];
  Lookahead* ahead = t.ahead;
  const int begin = any.from / kPage, end = pages_until(any.to), page = first / kPage;
  const int last = page + 2 * kPages < ahead->last ? page + 2 * kPages : ahead->last;  // to the end of the next split
  CodePages pages;
  locate(t, first, any, &pages);
  for (int p = begin; p < end; p += kPagesAtOnce) {
    const int soon = page + p + kPagesAtOnce + kPagesAhead < last ? page + p + kPagesAtOnce + kPagesAhead : last;
    while (ahead->page < soon) fetch<kLines>(take(t, soon, kLines));
    in_fours(t.rows, [&](auto rows, int row) __attribute__((always_inline)) {
      constexpr int R = decltype(rows)::count;
      const Span own = seen_by_any(t, row, R, first);
      for (int h = 0; h < heads; ++h) {
        score_pages<R>(tiles[h], row, own, pages, p, p + kPagesAtOnce, last, Room(tiles[h]).scores);
      }
    });
  }
  for (int h = 0; h < heads; ++h) {
    const Room room(tiles[h]);
    in_fours(t.rows, [&](auto rows, int row) __attribute__((always_inline)) {
      constexpr int R = decltype(rows)::count;
      weigh_values<R>(tiles[h], row, seen_by_any(t, row, R, first), first, pages, last, room);
    });
  }
}

// x [size] as codes of whole blocks, the last one filled up with zeros.
SKERRY_INLINE void round_head(const float* x, int size, int8_t* codes, float* scale, int32_t* sum) {
  for (int b = 0; b < code_blocks(size); ++b) {
    const int count = size - b * kBlockSize < kBlockSize ? size - b * kBlockSize : kBlockSize;
    Vec block[kBlockVectors] = {};
    memcpy(block, x + b * kBlockSize, sizeof(float) * count);
    int32_t sums[2];
    scale[b] = round_block(block, codes + b * kBlockSize, sums);
    sum[b] = sums[0];
  }
}

void round_queries(const float* q, int rows, int head_size, int8_t* codes, float* scale, int32_t* sum) {
  const int blocks = code_blocks(head_size);
  for (int r = 0; r < rows; ++r) {
    round_head(q + static_cast<int64_t>(r) * head_size, head_size,
               codes + static_cast<int64_t>(r) * blocks * kBlockSize, scale + static_cast<int64_t>(r) * blocks,
               sum + static_cast<int64_t>(r) * blocks);
  }
}

// Token `at` of a page. A value has one scale for all its dimensions, so that weights can carry it.
SKERRY_INLINE void append_codes(const float* key, const float* value, int head_size, int at, uint8_t* keys,
                                uint8_t* values) {
  constexpr int longest = 1024;  // that check_shape admits
  const int blocks = code_blocks(head_size), size = padded(head_size);
  int8_t codes[longest];
  float scale[longest / kBlockSize];
  int32_t sum[longest / kBlockSize];
  round_head(key, head_size, codes, scale, sum);
  for (int d = 0; d < blocks * kBlockSize; ++d) {
    keys[d / 4 * kGroupBytes + at * 4 + d % 4] = static_cast<uint8_t>(codes[d] + kOffset);
  }
  for (int b = 0; b < blocks; ++b) {
    memcpy(keys + blocks * kBlockBytes + b * kGroupBytes + at * 4, scale + b, sizeof(float));
  }
  int32_t most = 0;
  for (int d = 0; d < head_size; ++d) {
    const int32_t magnitude = load_as<int32_t>(value + d) & 0x7fffffff;
    most = magnitude > most ? magnitude : most;
  }
  float largest;
  memcpy(&largest, &most, sizeof largest);
  const bool nothing = largest < 1e-30f;
  const float inverse = nothing ? 0.0f : 127.0f / largest, unit = nothing ? 0.0f : largest / 127.0f;
  uint8_t* into = values + at / 4 * size * 4 + at % 4;
  for (int d = 0; d < size; ++d) {
    const float magic = 12582912.0f;
    const float x = d < head_size ? value[d] * inverse : 0.0f;
    into[d * 4] = static_cast<uint8_t>(static_cast<int32_t>((x + magic) - magic) + kOffset);
  }
  memcpy(values + kPage * size + at * 4, &unit, sizeof unit);
}

}  // namespace
}  // namespace skerry
