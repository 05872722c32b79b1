#include "paged_attention.h"

#include <cstring>
#include <exception>

namespace skerry::ort {
namespace {

enum Input { kQ, kK, kV, kKv, kCos, kSin, kPositions, kQueryStart, kContextLen, kBlockTable, kSlot, kPlan };
enum Output { kOut, kKvOut };

int64_t attribute(const Ort::ConstKernelInfo& info, const char* name) { return info.GetAttribute<int64_t>(name); }

}  // namespace

PagedAttentionKernel::PagedAttentionKernel(const OrtKernelInfo* raw) {
  const Ort::ConstKernelInfo info(raw);
  shape_.num_heads = static_cast<int>(attribute(info, "num_heads"));
  shape_.num_kv_heads = static_cast<int>(attribute(info, "num_kv_heads"));
  shape_.head_size = static_cast<int>(attribute(info, "head_size"));
  shape_.scale = info.GetAttribute<float>("scale");
  shape_.rotary_dim = static_cast<int>(optional<int64_t>(info, "rotary_dim", shape_.head_size));
  shape_.interleaved = optional<int64_t>(info, "interleaved", 0) != 0;
  shape_.softcap = optional<float>(info, "softcap", 0.0f);
  shape_.window = static_cast<int>(optional<int64_t>(info, "window", 0));
  shape_.layout = static_cast<KvLayout>(optional<int64_t>(info, "kv_layout", 0));
  if (const std::string problem = check_shape(shape_); !problem.empty()) throw std::invalid_argument(problem);
}

void PagedAttentionKernel::run(OrtKernelContext* raw) const {
  const Ort::KernelContext context(raw);
  const auto q = input<float>(context, kQ, "q", 2);
  const auto k = input<float>(context, kK, "k", 2);
  const auto v = input<float>(context, kV, "v", 2);
  const auto kv = input<uint8_t>(context, kKv, "kv", 2);
  const auto cos = input<float>(context, kCos, "cos", 2);
  const auto sin = input<float>(context, kSin, "sin", 2);
  const auto positions = input<int32_t>(context, kPositions, "positions", 1);
  const auto query_start = input<int32_t>(context, kQueryStart, "query_start", 1);
  const auto context_len = input<int32_t>(context, kContextLen, "context_len", 1);
  const auto block_table = input<int32_t>(context, kBlockTable, "block_table", 2);
  const auto slot = input<int32_t>(context, kSlot, "slot", 1);
  const auto plan = input<int32_t>(context, kPlan, "plan", 1);

  const int64_t tokens = q.dim(0);
  const int64_t sequences = context_len.dim(0);
  expect("columns of q", q.dim(1), int64_t{shape_.num_heads} * shape_.head_size);
  expect("rows of k", k.dim(0), tokens);
  expect("columns of k", k.dim(1), int64_t{shape_.num_kv_heads} * shape_.head_size);
  expect("rows of v", v.dim(0), tokens);
  expect("columns of v", v.dim(1), k.dim(1));
  expect("bytes of a page of kv", kv.dim(1), shape_.page_bytes());
  if (shape_.rotary_dim > 0) {
    expect("columns of cos", cos.dim(1), shape_.rotary_dim / 2);
    expect("columns of sin", sin.dim(1), shape_.rotary_dim / 2);
    expect("rows of sin", sin.dim(0), cos.dim(0));
  }
  expect("length of positions", positions.dim(0), tokens);
  expect("length of query_start", query_start.dim(0), sequences + 1);
  expect("rows of block_table", block_table.dim(0), sequences);
  expect("length of slot", slot.dim(0), tokens);
  expect("length of plan (this library plans by itself)", plan.dim(0), 0);

  Ort::UnownedValue out = context.GetOutput(kOut, {tokens, q.dim(1)});
  Ort::UnownedValue kv_out = context.GetOutput(kKvOut, kv.shape);
  PagedAttentionArgs args;
  args.q = q.data;
  args.k = k.data;
  args.v = v.data;
  args.kv = kv_out.GetTensorMutableData<uint8_t>();
  args.cos = cos.data;
  args.sin = sin.data;
  args.positions = positions.data;
  args.query_start = query_start.data;
  args.context_len = context_len.data;
  args.block_table = block_table.data;
  args.slot = slot.data;
  args.out = out.GetTensorMutableData<float>();
  args.tokens = tokens;
  args.sequences = sequences;
  args.table_width = block_table.dim(1);
  args.pages = kv.dim(0);
  args.table_rows = cos.dim(0);
  if (args.kv != kv.data) std::memcpy(args.kv, kv.data, kv.count());
  const std::string problem = paged_attention(shape_, args, parallel_of(raw));
  if (!problem.empty()) throw std::invalid_argument(problem);
}

OrtStatusPtr PagedAttentionKernel::ComputeV2(OrtKernelContext* context) {
  return guarded("skerry.PagedAttention", [&] { run(context); });
}

PagedAttentionOp::PagedAttentionOp() {
  OrtCustomOp::GetAliasMap = [](int** inputs, int** outputs) -> size_t {
    *inputs = new int[1]{kKv};
    *outputs = new int[1]{kKvOut};
    return 1;
  };
  OrtCustomOp::ReleaseAliasMap = [](int* inputs, int* outputs) {
    delete[] inputs;
    delete[] outputs;
  };
  end_ver_ = 1;
}

OrtStatusPtr PagedAttentionOp::CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const {
  try {
    *kernel = new PagedAttentionKernel(info);
    return nullptr;
  } catch (const std::exception& error) {
    return failed(ORT_INVALID_ARGUMENT, "create skerry.PagedAttention", error.what());
  }
}

ONNXTensorElementDataType PagedAttentionOp::GetInputType(size_t index) const {
  if (index == kKv) return ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
  return index < kPositions ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT : ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
}

}  // namespace skerry::ort
