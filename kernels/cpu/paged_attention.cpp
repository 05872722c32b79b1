// PagedAttention on the CPU: checks every index, appends, then runs the plan's items.
#include "../include/paged_attention.h"

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <tuple>
#include <vector>

#include "../plan.h"
#include "attention_tile.h"
#include "isa.h"
#include "scratch.h"

namespace skerry {
namespace {

using std::to_string;

struct Job {
  const PagedAttentionShape& shape;
  const PagedAttentionArgs& args;
  const AttentionIsa& isa;
  const Parallel& parallel;
  AttentionPlan plan;
  float* partials = nullptr;
  std::atomic<int32_t>* left = nullptr;  // items of each merge that are not done

  int group() const { return shape.num_heads / shape.num_kv_heads; }
  int64_t partial_stride() const { return plan.partial_rows * (padded(shape.head_size) + 2); }

  AttentionState partial(int64_t index, int rows) const {
    float* base = partials + index * partial_stride();
    return {base, base + rows, base + 2 * rows};
  }
};

constexpr int kNextLines = 2048;  // 128 KB of what comes after attention: an eighth of a second-level cache

void clear(const AttentionState& state, int rows, int head_size) {
  for (int r = 0; r < rows; ++r) state.max[r] = -std::numeric_limits<float>::infinity();
  std::memset(state.sum, 0, sizeof(float) * rows);
  std::memset(state.value, 0, sizeof(float) * rows * padded(head_size));
}

void append_token(const Job& job, int64_t t, int head) {
  const auto& [shape, args] = std::tie(job.shape, job.args);
  if (args.slot[t] < 0) return;
  thread_local Scratch scratch;
  const int size = shape.head_size;
  const int half = shape.rotary_dim / 2;
  const int64_t from = (t * shape.num_kv_heads + head) * size;
  float* key = scratch.get(size);
  job.isa.rotate(args.k + from, args.cos + int64_t{args.positions[t]} * half,
                 args.sin + int64_t{args.positions[t]} * half, size, shape.rotary_dim, shape.interleaved, 1.0f, key);
  uint8_t* page = args.kv + args.slot[t] / kPageTokens * shape.page_bytes();
  job.isa.append(key, args.v + from, size, static_cast<int>(shape.layout), args.slot[t] % kPageTokens,
                 page + head * shape.key_bytes(),
                 page + shape.num_kv_heads * shape.key_bytes() + head * shape.value_bytes());
}

void append_head(void* argument, int head) {
  const Job& job = *static_cast<const Job*>(argument);
  const int64_t tokens = job.args.query_start[job.args.sequences];
  for (int64_t t = 0; t < tokens; ++t) append_token(job, t, head);
}

// Rotated, scaled queries of an item's rows for one KV head: row = token * group + head within the group.
void gather_queries(const Job& job, const AttentionItem& item, int kv_head, float* q) {
  const auto& [shape, args] = std::tie(job.shape, job.args);
  const int half = shape.rotary_dim / 2;
  for (int i = 0; i < item.tokens; ++i) {
    const int64_t t = args.query_start[item.sequence] + item.first_token + i;
    const int64_t position = args.positions[t];
    for (int g = 0; g < job.group(); ++g, q += shape.head_size) {
      job.isa.rotate(args.q + (t * shape.num_heads + kv_head * job.group() + g) * shape.head_size,
                     args.cos + position * half, args.sin + position * half, shape.head_size, shape.rotary_dim,
                     shape.interleaved, shape.scale, q);
    }
  }
}

void write_rows(const Job& job, const AttentionItem& item, int kv_head, const AttentionState& state) {
  const auto& [shape, args] = std::tie(job.shape, job.args);
  const int stride = padded(shape.head_size);
  int row = 0;
  for (int i = 0; i < item.tokens; ++i) {
    const int64_t t = args.query_start[item.sequence] + item.first_token + i;
    for (int g = 0; g < job.group(); ++g, ++row) {
      float* out = args.out + (t * shape.num_heads + kv_head * job.group() + g) * shape.head_size;
      const float sum = state.sum[row];
      for (int d = 0; d < shape.head_size; ++d) out[d] = sum == 0.0f ? 0.0f : state.value[row * stride + d] / sum;
    }
  }
}

// What a task computes with: the rows of each of its heads, in scratch memory of its thread.
class ItemTiles {
 public:
  ItemTiles(const Job& job, const AttentionItem& item)
      : job_(job), item_(item), rows_(item.tokens * job.group()), size_(job.shape.head_size) {
    thread_local Scratch scratch;
    thread_local std::vector<int32_t> bounds;
    const int32_t tokens = job.args.query_start[item.sequence + 1] - job.args.query_start[item.sequence];
    const int32_t context = job.args.context_len[item.sequence];
    bounds.resize(2 * rows_);
    for (int r = 0; r < rows_; ++r) {
      const int32_t token = item.first_token + r / job.group();
      bounds[r] = static_cast<int32_t>(first_key(context, tokens, token, job.shape.window));
      bounds[rows_ + r] = context - tokens + token + 1;
    }
    bounds_ = bounds.data();
    base_ = scratch.get(item.heads * head_floats());
    for (int h = 0; h < item.heads; ++h) {
      gather_queries(job, item, item.kv_head + h, head(h));
      if (job.shape.layout == KvLayout::kCodes) {
        job.isa.round_queries(head(h), rows_, size_, codes(h), code_scale(h), code_sum(h));
      }
    }
    const int pages = (context + kPageTokens - 1) / kPageTokens;
    ahead_.page = std::max<int>(item.first_split * kSplitTokens, bounds_[0]) / kPageTokens;
    ahead_.last = std::min(pages, (item.first_split + item.splits) * kSplitTokens / kPageTokens);
    ahead_.at = job.args.kv + int64_t{table()[ahead_.page]} * job.shape.page_bytes();
    ahead_.end = ahead_.at + job.shape.page_bytes();
    const bool streams = rows_ < kManyRows && job.parallel.next != nullptr;
    ahead_.next = streams ? static_cast<const uint8_t*>(job.parallel.next(job.parallel.context)) : nullptr;
    ahead_.next_lines = ahead_.next != nullptr ? kNextLines : 0;
  }

  int rows() const { return rows_; }

  AttentionTile tile(int h) {
    const PagedAttentionShape& shape = job_.shape;
    const int kv_head = item_.kv_head + h;
    return {job_.args.kv,
            table(),
            shape.page_bytes(),
            kv_head * shape.key_bytes(),
            shape.num_kv_heads * shape.key_bytes() + kv_head * shape.value_bytes(),
            static_cast<int>(shape.layout),
            size_,
            shape.softcap,
            rows_,
            head(h),
            codes(h),
            code_scale(h),
            code_sum(h),
            bounds_,
            bounds_ + rows_,
            head(h) + padded(rows_ * size_) + code_floats() + state_floats(),
            rows_ < kManyRows ? &ahead_ : nullptr};
  }

  // Of rows that the task finishes by itself.
  AttentionState state(int h) const {
    float* base = head(h) + padded(rows_ * size_) + code_floats();
    return {base, base + rows_, base + 2 * rows_};
  }

 private:
  const int32_t* table() const { return job_.args.block_table + item_.sequence * job_.args.table_width; }
  int64_t blocks() const { return int64_t{rows_} * code_blocks(size_); }
  int64_t code_floats() const { return padded(static_cast<int>(blocks()) * (32 / 4 + 2)); }
  int64_t state_floats() const { return padded(rows_ * (padded(size_) + 2)); }
  // Of a head: queries, codes and their scales, state, and what a split needs.
  int64_t head_floats() const {
    return padded(rows_ * size_) + code_floats() + state_floats() + attention_scratch(rows_, size_, rows_ >= kManyRows);
  }
  float* head(int h) const { return base_ + h * head_floats(); }
  int8_t* codes(int h) const { return reinterpret_cast<int8_t*>(head(h) + padded(rows_ * size_)); }
  float* code_scale(int h) const { return head(h) + padded(rows_ * size_) + blocks() * (32 / 4); }
  int32_t* code_sum(int h) const { return reinterpret_cast<int32_t*>(code_scale(h) + blocks()); }

  const Job& job_;
  const AttentionItem& item_;
  int rows_, size_;
  int32_t* bounds_;
  float* base_;
  Lookahead ahead_{};
};

// In order, whoever computed them.
void merge_partials(const Job& job, const AttentionItem& item) {
  thread_local Scratch scratch;
  const int rows = item.tokens * job.group();
  float* own = scratch.get(rows * (padded(job.shape.head_size) + 2));
  const AttentionState state{own, own + rows, own + 2 * rows};
  for (int h = 0; h < item.heads; ++h) {
    clear(state, rows, job.shape.head_size);
    for (int s = 0; s < item.splits; ++s) {
      const int64_t partial = item.partial + int64_t{s} * item.heads + h;
      job.isa.merge(rows, job.shape.head_size, job.partial(partial, rows), state);
    }
    write_rows(job, item, item.kv_head + h, state);
  }
}

void run_item(void* argument, int index) {
  const Job& job = *static_cast<const Job*>(argument);
  const AttentionItem& item = job.plan.items[index];
  const int size = job.shape.head_size;
  ItemTiles tiles(job, item);
  thread_local std::vector<AttentionTile> of_heads;
  thread_local std::vector<AttentionState> states;
  of_heads.clear();
  states.clear();
  for (int h = 0; h < item.heads; ++h) {
    of_heads.push_back(tiles.tile(h));
    states.push_back(tiles.state(h));
    if (item.partial < 0) clear(states[h], tiles.rows(), size);
  }
  for (int s = 0; s < item.splits; ++s) {
    for (int h = 0; h < item.heads && item.partial >= 0; ++h) {
      states[h] = job.partial(item.partial + int64_t{s} * item.heads + h, tiles.rows());
      clear(states[h], tiles.rows(), size);
    }
    job.isa.attend(of_heads.data(), item.heads, item.first_split + s, states.data());
  }
  if (item.partial >= 0) {
    const bool last = job.left[item.merge].fetch_sub(1, std::memory_order_acq_rel) == 1;
    if (last) merge_partials(job, job.plan.merges[item.merge]);
    return;
  }
  for (int h = 0; h < item.heads; ++h) write_rows(job, item, item.kv_head + h, states[h]);
}

std::string check_sequence(const PagedAttentionShape& shape, const PagedAttentionArgs& args, int64_t b) {
  const std::string name = "sequence " + to_string(b);
  const int64_t tokens = int64_t{args.query_start[b + 1]} - args.query_start[b];
  const int64_t context = args.context_len[b];
  if (tokens < 0) {
    return "query_start decreases from " + to_string(args.query_start[b]) + " to " +
           to_string(args.query_start[b + 1]) + " at " + name;
  }
  if (context < tokens) {
    return name + " has context_len " + to_string(context) + " but " + to_string(tokens) + " tokens in this step";
  }
  const int64_t pages = (context + kPageTokens - 1) / kPageTokens;
  if (pages > args.table_width) {
    return name + " needs " + to_string(pages) + " pages for context_len " + to_string(context) +
           " but its block table has " + to_string(args.table_width) + " entries";
  }
  if (tokens == 0) return "";
  for (int64_t i = first_key(context, tokens, 0, shape.window) / kPageTokens; i < pages; ++i) {
    const int32_t page = args.block_table[b * args.table_width + i];
    if (page < 0 || page >= args.pages) {
      return "block table entry " + to_string(i) + " of " + name + " is page " + to_string(page) + ", the cache has " +
             to_string(args.pages) + " pages";
    }
  }
  return "";
}

}  // namespace

const AttentionIsa& attention_isa() {
#if defined(__aarch64__)
  if (isa() == Isa::kNeonDot) return kAttentionNeonDot;
#elif defined(__x86_64__)
  switch (isa()) {
    case Isa::kAvx512Vnni:
      return kAttentionAvx512Vnni;
    case Isa::kAvx512:
      return kAttentionAvx512;
    case Isa::kAvxVnni:
      return kAttentionAvxVnni;
    case Isa::kAvx2:
      return kAttentionAvx2;
    default:
      break;
  }
#endif
  return kAttentionBase;
}

std::string check_shape(const PagedAttentionShape& shape) {
  if (shape.num_heads < 1 || shape.num_kv_heads < 1 || shape.num_heads % shape.num_kv_heads != 0) {
    return "num_heads " + to_string(shape.num_heads) + " is no multiple of num_kv_heads " +
           to_string(shape.num_kv_heads);
  }
  if (shape.head_size < 1 || shape.head_size > 1024) {
    return "head_size " + to_string(shape.head_size) + " is outside 1..1024";
  }
  if (shape.rotary_dim < 0 || shape.rotary_dim > shape.head_size || shape.rotary_dim % 2 != 0) {
    return "rotary_dim " + to_string(shape.rotary_dim) + " is not an even number within head_size " +
           to_string(shape.head_size);
  }
  if (shape.window < 0) return "window " + to_string(shape.window) + " is negative";
  if (!(shape.softcap >= 0.0f) || !std::isfinite(shape.softcap) || !std::isfinite(shape.scale)) {
    return "softcap " + to_string(shape.softcap) + " or scale " + to_string(shape.scale) + " is out of range";
  }
  if (shape.layout < KvLayout::kFloat || shape.layout > KvLayout::kCodes) {
    return "kv_layout " + to_string(static_cast<int32_t>(shape.layout)) + " is unknown";
  }
  return "";
}

std::string check_paged_attention(const PagedAttentionShape& shape, const PagedAttentionArgs& args) {
  if (args.sequences == 0 && args.tokens == 0) return "";
  if (args.query_start[0] != 0) return "query_start begins with " + to_string(args.query_start[0]) + ", not 0";
  const int64_t limit = std::min<int64_t>(args.pages * kPageTokens, std::numeric_limits<int32_t>::max());
  for (int64_t b = 0; b < args.sequences; ++b) {
    if (std::string problem = check_sequence(shape, args, b); !problem.empty()) return problem;
  }
  const int64_t tokens = args.query_start[args.sequences];
  if (tokens > args.tokens) {
    return "query_start ends at " + to_string(tokens) + " but there are " + to_string(args.tokens) + " tokens";
  }
  for (int64_t t = 0; t < tokens; ++t) {
    const int32_t slot = args.slot[t];
    if (slot < -1 || slot >= limit) {
      return "slot " + to_string(slot) + " of token " + to_string(t) + " is outside -1.." + to_string(limit - 1);
    }
    const int32_t position = args.positions[t];
    if (shape.rotary_dim > 0 && (position < 0 || position >= args.table_rows)) {
      return "position " + to_string(position) + " of token " + to_string(t) + " is outside the rotary tables of " +
             to_string(args.table_rows) + " rows";
    }
  }
  return "";
}

std::string paged_attention(const PagedAttentionShape& shape, const PagedAttentionArgs& args,
                            const Parallel& parallel) {
  if (std::string problem = check_shape(shape); !problem.empty()) return problem;
  if (std::string problem = check_paged_attention(shape, args); !problem.empty()) return problem;
  const int64_t tokens = args.sequences > 0 ? args.query_start[args.sequences] : 0;
  const int64_t width = int64_t{shape.num_heads} * shape.head_size;
  std::memset(args.out + tokens * width, 0, sizeof(float) * (args.tokens - tokens) * width);
  if (tokens == 0) return "";

  thread_local Scratch scratch;
  Job job{shape, args, attention_isa(), parallel, plan_attention(shape, args, parallel.threads)};
  job.partials = scratch.get(job.plan.partials * job.partial_stride());
  std::vector<std::atomic<int32_t>> left(job.plan.parts.size());
  for (size_t i = 0; i < left.size(); ++i) left[i].store(job.plan.parts[i], std::memory_order_relaxed);
  job.left = left.data();
  const Parallel serial;
  const bool large_append = tokens * shape.num_kv_heads * shape.head_size > 65536;
  (large_append ? parallel : serial)(shape.num_kv_heads, append_head, &job);
  const Parallel& workers = job.plan.work < parallel.serial_work ? serial : parallel;
  workers(static_cast<int>(job.plan.items.size()), run_item, &job);
  return "";
}

}  // namespace skerry
