// The inner part of attention on the CPU, compiled once per instruction set and picked at run time (isa.h).
#pragma once

#include <cstdint>

namespace skerry {

// Walks the pages of a sequence from end to end, a few lines at a time: what runs ahead of a task that computes. Reads
// in order come twice as fast as runs of one head's keys and values do.
struct Lookahead {
  const uint8_t* at;
  const uint8_t* end;  // of the page
  int page;            // of the table
  int last;            // one past the last page of the task
  // What this thread reads next, when attention is done, and how many lines of it to fetch.
  const uint8_t* next;
  int next_lines;
};

// One tile of query rows against one KV head. Rows hold rotated, scaled queries; row r sees keys [start[r], end[r]).
struct AttentionTile {
  const uint8_t* kv;     // the whole cache
  const int32_t* table;  // this sequence's pages
  int64_t page_bytes;    // from one page to the next
  int64_t key_offset;    // bytes from a page's start to this head's keys
  int64_t value_offset;  // and to its values
  int layout;            // as in KvLayout
  int head_size;
  float softcap;
  int rows;
  const float* q;  // [rows, head_size]
  // The same rounded by round_queries where the layout is of codes: [rows, blocks, 32], [rows, blocks].
  const int8_t* codes;
  const float* code_scale;
  const int32_t* code_sum;
  const int32_t* start;  // [rows]
  const int32_t* end;    // [rows]
  float* scratch;        // attention_scratch() floats
  Lookahead* ahead;      // null: the pages are at hand
};

// Softmax state of a tile: row maximum, sum of weights, weighted values (not divided by the sum).
struct AttentionState {
  float* max;    // [rows]
  float* sum;    // [rows]
  float* value;  // [rows, padded head size]
};

inline int padded(int n) { return (n + 15) / 16 * 16; }
inline int code_blocks(int head_size) { return (head_size + 31) / 32; }  // that share a scale

// Scores of a split, its state and, `widened`, its keys and values as floats, which many rows share.
inline int64_t attention_scratch(int rows, int head_size, bool widened) {
  const int64_t own = int64_t{256} * rows + padded(rows * (padded(head_size) + 2));
  return own + (widened ? int64_t{2 * 256} * padded(head_size) : 0);
}

struct AttentionIsa {
  const char* name;
  // Results of keys [256 split, 256 (split + 1)) merged into the states, one of each head.
  void (*attend)(const AttentionTile* tiles, int heads, int split, const AttentionState* states);
  // The same merge for a partial result that was computed elsewhere.
  void (*merge)(int rows, int head_size, const AttentionState& partial, const AttentionState& state);
  // Rotates one head: out[i] from x by the cos and sin rows, multiplied by scale; dimensions past rotary are copied.
  void (*rotate)(const float* x, const float* cos, const float* sin, int head_size, int rotary, bool interleaved,
                 float scale, float* out);
  // Rows [rows, head_size] as codes, scales and sums of codes by block.
  void (*round_queries)(const float* q, int rows, int head_size, int8_t* codes, float* scale, int32_t* sum);
  // Token `at` of a page's keys and values of one head, from floats.
  void (*append)(const float* key, const float* value, int head_size, int layout, int at, uint8_t* keys,
                 uint8_t* values);
};

extern const AttentionIsa kAttentionBase;
#if defined(__aarch64__)
extern const AttentionIsa kAttentionNeonDot;
#elif defined(__x86_64__)
extern const AttentionIsa kAttentionAvx2;
extern const AttentionIsa kAttentionAvxVnni;
extern const AttentionIsa kAttentionAvx512;
extern const AttentionIsa kAttentionAvx512Vnni;
#endif

const AttentionIsa& attention_isa();  // the best this machine has; SKERRY_ISA lowers it

}  // namespace skerry
