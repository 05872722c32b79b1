// PagedAttention v1 on a GPU: what its kernels are given, and how a step becomes launches. The definition is
// kernels/reference.py, the layouts of a page are kernels/cuda_pages.py's.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "launch.h"

namespace skerry::cuda {

inline constexpr int kPage = 16;        // tokens
inline constexpr int kSplit = 256;      // tokens of a sequence that one block of few rows walks
inline constexpr int kFewRows = 64;     // up to here (tokens x heads of a KV head) a sequence's keys are split
inline constexpr int kTile = 16;        // rows of one tensor-core tile
inline constexpr int kWarps = 4;        // of a block; of few rows fewer, where shared memory is short
inline constexpr int kRowPadding = 16;  // bytes behind a row in shared memory: eight rows then lie in all 32 banks
inline constexpr int kScaleBytes = 2 * kPage * 4;  // of a page of codes and a KV head

// How a key or value lies in a page.
enum class Stored : int32_t { kWide = 0, kInt8 = 1, kE4m3 = 2 };  // kWide: as q does

// Plain data for host and device; pointers are the device's. All that changes from step to step (lengths, tables,
// slots) is behind them, so a captured launch serves every step of its size. Indices out of range read zeros and write
// nothing.
struct PagedAttentionTask {
  const void *q, *k, *v;  // [tokens, heads * head_size]
  void* out;
  uint8_t* kv;
  const float *cos, *sin;  // [table_rows, rotary / 2]
  const int32_t *positions, *query_start, *context_len, *block_table, *slot;
  // Where the keys of a token begin: page * page_stride + head * head_stride + token * token_stride; its values lie
  // value_offset behind them. Of codes the scales of keys, then of values, lie scale_offset behind the head's begin.
  int64_t page_stride, head_stride, token_stride, value_offset, scale_offset;
  int64_t pages, table_rows;
  int32_t tokens, sequences, table_width;
  int32_t heads, kv_heads, head_size, rotary, interleaved, window;
  float scale, softcap;
  Stored stored;
  // Of few rows, filled by the plan: at most so many tiles of 16 rows a sequence and KV head, splits, and rows of a
  // tile; the splits' results [sequence][kv_head][tile][split], each of part_floats: the rows' maxima, their sums,
  // their weighted values [part_rows][head_size]; and how many are there.
  int32_t tiles, splits, part_rows, part_floats;
  float* partial;
  uint32_t* arrived;
};

// Launches of one PagedAttention: append, then attention of sequences with few rows and, unless `most_query` says that
// none has many, with many. `task` has its pointers and sizes; `most_query`: tokens of a sequence's query at most.
// `scratch`: device memory of `scratch_bytes`, 16 bytes aligned, its content any; null asks for the bytes alone.
// Returns an empty string or what is wrong.
std::string plan_paged_attention(PagedAttentionTask task, bool bfloat16, int64_t most_query, const CudaDevice& device,
                                 void* scratch, int64_t& scratch_bytes, std::vector<Launch>& launches);

}  // namespace skerry::cuda
