#include "paged_attention_inputs.h"

#include "../expect.h"

namespace skerry::cuda {

const char* const kInputNames[kInputs] = {"q",         "k",           "v",           "kv",          "cos",  "sin",
                                          "positions", "query_start", "context_len", "block_table", "slot", "plan"};

namespace {

constexpr int64_t kRanks[kInputs] = {2, 2, 2, 2, 2, 2, 1, 1, 1, 2, 1, 1};

void check(const PagedAttentionTask& task, const Tensor (&in)[kInputs], int64_t kv_bytes) {
  for (int i = 0; i < kInputs; ++i) {
    if (in[i].rank == kRanks[i]) continue;
    throw std::invalid_argument(std::string(kInputNames[i]) + " has " + std::to_string(in[i].rank) +
                                " dimensions, expected " + std::to_string(kRanks[i]));
  }
  const int64_t tokens = in[kQ].dims[0], sequences = in[kContextLen].dims[0];
  expect("columns of q", in[kQ].dims[1], int64_t{task.heads} * task.head_size);
  expect("rows of k", in[kK].dims[0], tokens);
  expect("columns of k", in[kK].dims[1], int64_t{task.kv_heads} * task.head_size);
  expect("rows of v", in[kV].dims[0], tokens);
  expect("columns of v", in[kV].dims[1], in[kK].dims[1]);
  expect("bytes of a page of kv", in[kKv].dims[1] * kv_bytes, task.page_stride);
  if (task.rotary > 0) {
    expect("columns of cos", in[kCos].dims[1], task.rotary / 2);
    expect("columns of sin", in[kSin].dims[1], task.rotary / 2);
    expect("rows of sin", in[kSin].dims[0], in[kCos].dims[0]);
  }
  expect("length of positions", in[kPositions].dims[0], tokens);
  expect("length of query_start", in[kQueryStart].dims[0], sequences + 1);
  expect("rows of block_table", in[kBlockTable].dims[0], sequences);
  expect("length of slot", in[kSlot].dims[0], tokens);
}

}  // namespace

void set_pages(PagedAttentionTask& task, int64_t layout, bool bfloat16) {
  const bool codes = layout == kInt8 || layout == kE4m3;
  if (!codes && layout != (bfloat16 ? kBfloats : kHalves)) {
    throw std::invalid_argument("kv_layout is " + std::to_string(layout) + ", not one of a GPU for this type");
  }
  task.stored = layout == kInt8 ? Stored::kInt8 : layout == kE4m3 ? Stored::kE4m3 : Stored::kWide;
  task.token_stride = int64_t{task.head_size} * (codes ? 1 : 2);
  task.value_offset = kPage * task.token_stride;
  task.scale_offset = 2 * task.value_offset;
  task.head_stride = task.scale_offset + (codes ? kScaleBytes : 0);
  task.page_stride = task.kv_heads * task.head_stride;
}

void set_inputs(PagedAttentionTask& task, const Tensor (&in)[kInputs], int64_t kv_bytes) {
  check(task, in, kv_bytes);
  task.q = in[kQ].data;
  task.k = in[kK].data;
  task.v = in[kV].data;
  task.kv = static_cast<uint8_t*>(const_cast<void*>(in[kKv].data));  // written too: kv_out is the same memory
  task.cos = static_cast<const float*>(in[kCos].data);
  task.sin = static_cast<const float*>(in[kSin].data);
  task.positions = static_cast<const int32_t*>(in[kPositions].data);
  task.query_start = static_cast<const int32_t*>(in[kQueryStart].data);
  task.context_len = static_cast<const int32_t*>(in[kContextLen].data);
  task.block_table = static_cast<const int32_t*>(in[kBlockTable].data);
  task.slot = static_cast<const int32_t*>(in[kSlot].data);
  task.pages = in[kKv].dims[0];
  task.table_rows = in[kCos].dims[0];
  task.tokens = static_cast<int32_t>(in[kQ].dims[0]);
  task.sequences = static_cast<int32_t>(in[kContextLen].dims[0]);
  task.table_width = static_cast<int32_t>(in[kBlockTable].dims[1]);
}

void set_outputs(PagedAttentionTask& task, void* out, void* kv_out) {
  if (task.kv != kv_out) throw std::invalid_argument("kv and kv_out are two buffers: bind one as both");
  task.out = out;
}

}  // namespace skerry::cuda
