// PagedAttention v1 on raw pointers: rotate, append at `slot`, then attend to what is stored.
// The definition is kernels/reference.py, the layouts of a page are kernels/pages.py's.
#pragma once

#include <cstdint>
#include <string>

#include "parallel.h"

namespace skerry {

// The KV axis is cut at multiples of this many tokens, counted from the start of the sequence, and the pieces are
// merged in order. The cuts never depend on the batch, the chunk or the threads, so neither do the bits of the result.
inline constexpr int kSplitTokens = 256;

// A page holds kPageTokens tokens: [2][kv_heads] regions, keys before values. A region of keys is [head_size][16], so
// that a register holds one dimension of many keys; a region of values is [16][head_size]. Codes of 8 bits lie in fours
// with their scales behind them (pages.py): keys [blocks of 32][8][16][4] and [blocks][16], values [4][size][4] and
// [16].
inline constexpr int kPageTokens = 16;
enum class KvLayout : int32_t { kFloat = 0, kHalf = 1, kCodes = 2 };  // "f32.k16t", "f16.k16t", "i8.k16t"

struct PagedAttentionShape {
  int num_heads = 0;
  int num_kv_heads = 0;
  int head_size = 0;
  int rotary_dim = 0;        // leading dimensions of a head that are rotated; 0: none
  bool interleaved = false;  // pairs (2i, 2i+1) instead of (i, i + rotary_dim/2)
  float scale = 0.0f;        // of q.k
  float softcap = 0.0f;      // cap * tanh(score / cap); 0: none
  int window = 0;            // a token sees itself and window-1 tokens before; 0: all
  KvLayout layout = KvLayout::kFloat;

  // Of one head's keys and values in a page.
  int64_t key_bytes() const {
    const int64_t blocks = (head_size + 31) / 32;
    return layout == KvLayout::kCodes ? kPageTokens * blocks * (32 + 4) : value_bytes();
  }
  int64_t value_bytes() const {
    if (layout == KvLayout::kCodes) return kPageTokens * ((head_size + 15) / 16 * 16 + 4);
    return int64_t{kPageTokens} * head_size * (layout == KvLayout::kFloat ? sizeof(float) : sizeof(uint16_t));
  }
  int64_t page_bytes() const { return num_kv_heads * (key_bytes() + value_bytes()); }
};

struct PagedAttentionArgs {
  const float* q = nullptr;  // [tokens, num_heads * head_size]
  const float* k = nullptr;  // [tokens, num_kv_heads * head_size]
  const float* v = nullptr;
  uint8_t* kv = nullptr;                 // [pages, page_bytes], written at the slots
  const float* cos = nullptr;            // [table_rows, rotary_dim / 2]
  const float* sin = nullptr;            //
  const int32_t* positions = nullptr;    // [tokens]: row of the cos and sin tables
  const int32_t* query_start = nullptr;  // [sequences + 1], first 0; tokens past the last entry are padding
  const int32_t* context_len = nullptr;  // [sequences]: tokens in the cache once this step is appended
  const int32_t* block_table = nullptr;  // [sequences, table_width]: pages of each sequence
  const int32_t* slot = nullptr;         // [tokens]: page * kPageTokens + offset, -1: no write
  float* out = nullptr;                  // [tokens, num_heads * head_size]; padding tokens get zeros
  int64_t tokens = 0;
  int64_t sequences = 0;
  int64_t table_width = 0;
  int64_t pages = 0;
  int64_t table_rows = 0;
};

// Empty when the shape makes sense, else what is wrong with it.
std::string check_shape(const PagedAttentionShape& shape);

// Empty when every index is in range, else the first one that is not, naming the numbers.
std::string check_paged_attention(const PagedAttentionShape& shape, const PagedAttentionArgs& args);

// Checks, then runs. Returns an empty string or the complaint; on a complaint nothing was written.
std::string paged_attention(const PagedAttentionShape& shape, const PagedAttentionArgs& args, const Parallel& parallel);

}  // namespace skerry
