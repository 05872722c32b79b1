// Which piece of attention is one task: (sequence, KV heads, run of query tokens, run of KV splits). Few rows are bound
// by memory, so a task has all heads of its splits and reads pages from end to end; of many rows a task has one head.
// Shared by every backend that plans on the host. Plans differ with threads and batch; results do not, because each
// split's partial result is computed on its own and partials are merged in ascending order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "include/paged_attention.h"

namespace skerry {

inline constexpr int kManyRows = 12;  // from which rows of one head keys and values stay at hand
inline constexpr int kTileRows = 64;  // query rows (tokens x heads of one KV group) that share one pass over the keys

struct AttentionItem {
  int32_t sequence;
  int32_t kv_head;  // the first of `heads`
  int32_t heads;
  int32_t first_token;  // within the sequence's query
  int32_t tokens;
  int32_t first_split;
  int32_t splits;
  int64_t partial;  // the first of [splits][heads] partial results, or -1: the item finishes its rows by itself
  int32_t merge;    // which of `merges` its partial results belong to
};

struct AttentionPlan {
  std::vector<AttentionItem> items;
  std::vector<AttentionItem> merges;  // whole items, whose partial results are merged once all are there
  std::vector<int32_t> parts;         // of how many items each merge consists
  int64_t partials = 0;               // how many (split x tile) partial results to keep
  int64_t partial_rows = 0;           // rows of the largest of them
  double work = 0;                    // multiply-adds, for the decision to go parallel at all
};

// First key that query token `token` (of `tokens`, the last at context-1) may see.
inline int64_t first_key(int64_t context, int64_t tokens, int64_t token, int window) {
  const int64_t end = context - tokens + token + 1;
  return window > 0 ? std::max<int64_t>(0, end - window) : 0;
}

inline AttentionPlan plan_attention(const PagedAttentionShape& shape, const PagedAttentionArgs& args, int threads) {
  AttentionPlan plan;
  const int group = shape.num_heads / shape.num_kv_heads;
  const int tile_tokens = std::max(1, kTileRows / group);
  const auto heads_of = [&](int64_t tokens) { return tokens * group < kManyRows ? shape.num_kv_heads : 1; };
  int64_t items = 0;
  for (int64_t b = 0; b < args.sequences; ++b) {
    const int64_t tokens = args.query_start[b + 1] - args.query_start[b];
    items += (tokens + tile_tokens - 1) / tile_tokens * (shape.num_kv_heads / heads_of(tokens));
  }
  const bool split = threads > 1 && items < 4 * threads;
  for (int64_t b = 0; b < args.sequences; ++b) {
    const int32_t tokens = args.query_start[b + 1] - args.query_start[b];
    for (int32_t first = (tokens - 1) / tile_tokens * tile_tokens; tokens > 0 && first >= 0; first -= tile_tokens) {
      const int32_t count = std::min(tile_tokens, tokens - first);
      const int64_t begin = first_key(args.context_len[b], tokens, first, shape.window) / kSplitTokens;
      const int64_t last = args.context_len[b] - tokens + first + count;  // one past the last key of the last row
      const int64_t splits = (last + kSplitTokens - 1) / kSplitTokens - begin;
      plan.work += static_cast<double>(splits) * kSplitTokens * shape.head_size * 2 * std::max(4, count * group) *
                   shape.num_kv_heads;
      const int heads = heads_of(count);
      for (int32_t h = 0; h < shape.num_kv_heads; h += heads) {
        AttentionItem item{static_cast<int32_t>(b),      h,  heads, first, count, static_cast<int32_t>(begin),
                           static_cast<int32_t>(splits), -1, -1};
        if (!split || splits < 2) {
          plan.items.push_back(item);
          continue;
        }
        item.partial = plan.partials;
        item.merge = static_cast<int32_t>(plan.merges.size());
        plan.merges.push_back(item);
        const int32_t run = (item.splits + threads - 1) / threads;  // in one piece: each begins without lookahead
        for (int32_t s = 0; s < splits; s += run) {
          plan.items.push_back({item.sequence, h, heads, first, count, item.first_split + s,
                                std::min<int32_t>(run, item.splits - s), plan.partials + int64_t{s} * heads,
                                item.merge});
        }
        plan.parts.push_back((item.splits + run - 1) / run);
        plan.partials += splits * heads;
        plan.partial_rows = std::max<int64_t>(plan.partial_rows, int64_t{count} * group);
      }
    }
  }
  return plan;
}

}  // namespace skerry
