#include "matmul_block.h"

#include <exception>

namespace skerry::ort {
namespace {

enum Input { kX, kNorm, kResidual, kFirst, kQueryStart = kFirst + 2 * kMaxSegments, kAdapterRows, kAdapters };

template <class T>
const T* optional_input(const Ort::KernelContext& context, size_t index, const char* name, int64_t count) {
  if (index >= context.GetInputCount()) return nullptr;
  const Ort::ConstValue value = context.GetInput(index);
  if (!value) return nullptr;
  expect(name, static_cast<int64_t>(value.GetTensorTypeAndShapeInfo().GetElementCount()), count);
  return value.GetTensorData<T>();
}

}  // namespace

MatMulBlockKernel::MatMulBlockKernel(const OrtKernelInfo* raw) {
  const Ort::ConstKernelInfo info(raw);
  const auto rows = info.GetAttributes<int64_t>("rows");
  const auto formats = info.GetAttributes<int64_t>("formats");
  shape_.width = info.GetAttribute<int64_t>("width");
  shape_.epsilon = info.GetAttribute<float>("epsilon");
  shape_.activation = static_cast<Activation>(info.GetAttribute<int64_t>("activation"));
  expect("length of formats", static_cast<int64_t>(formats.size()), static_cast<int64_t>(rows.size()));
  shape_.segments = static_cast<int>(std::min<size_t>(rows.size(), kMaxSegments + 1));
  for (int s = 0; s < std::min(shape_.segments, kMaxSegments); ++s) {
    shape_.segment[s].rows = rows[s];
    shape_.segment[s].format = static_cast<BlockFormat>(formats[s]);
  }
  shape_.adapters.offset = optional<int64_t>(info, "adapter_offset", -1);
  if (const std::string problem = check_matmul_block(shape_); !problem.empty()) throw std::invalid_argument(problem);
  const size_t last = std::min<size_t>(info.GetInputCount(), kAdapters + 1);
  if (shape_.adapters.offset >= 0 ? last <= kAdapters : last > kQueryStart) {
    throw std::invalid_argument("adapter_offset is " + std::to_string(shape_.adapters.offset) + " with " +
                                std::to_string(last) + " inputs: query_start, adapter_rows and adapters go with it");
  }
  shape_.norm = constant<float>(info, kNorm, "length of norm", shape_.width);
  for (int s = 0; s < shape_.segments; ++s) {
    BlockSegment& segment = shape_.segment[s];
    weights_.push_back(panels_of(rows[s]) * panel_bytes(segment.format, shape_.width / kBlock));
    segment.weight = constant<uint8_t>(info, kFirst + 2 * s, "bytes of weight", weights_[s]);
    segment.bias = constant<float>(info, kFirst + 2 * s + 1, "length of bias", segment.rows);
  }
}

void MatMulBlockKernel::read_adapters(const Ort::KernelContext& context, BlockAdapters& adapters) const {
  const char* names[] = {"query_start", "adapter_rows", "adapters"};
  for (size_t i = 0; i < 3; ++i) {
    if (!context.GetInput(kQueryStart + i)) throw std::invalid_argument(std::string(names[i]) + " is missing");
  }
  const auto query_start = input<int32_t>(context, kQueryStart, "query_start", 1);
  const auto rows = input<int32_t>(context, kAdapterRows, "adapter_rows", 1);
  const auto values = input<Ort::Float16_t>(context, kAdapters, "adapters", 3);
  expect("length of query_start", query_start.dim(0), rows.dim(0) + 1);
  adapters.given = true;
  adapters.values = reinterpret_cast<const uint16_t*>(values.data);
  adapters.query_start = query_start.data;
  adapters.rows = rows.data;
  adapters.slots = values.dim(0);
  adapters.rank = values.dim(1);
  adapters.columns = values.dim(2);
  adapters.sequences = rows.dim(0);
}

void MatMulBlockKernel::run(OrtKernelContext* raw) const {
  const Ort::KernelContext context(raw);
  const auto x = input<float>(context, kX, "x", 2);
  expect("columns of x", x.dim(1), shape_.width);
  MatMulBlockArgs args = shape_;
  args.x = x.data;
  args.tokens = x.dim(0);
  if (args.norm == nullptr) args.norm = optional_input<float>(context, kNorm, "length of norm", args.width);
  args.residual = optional_input<float>(context, kResidual, "elements of residual", args.tokens * args.segment[0].rows);
  const int outputs = args.activation == Activation::kNone ? args.segments : 1;
  for (int s = 0; s < args.segments; ++s) {
    BlockSegment& segment = args.segment[s];
    if (segment.weight == nullptr) {
      segment.weight = optional_input<uint8_t>(context, kFirst + 2 * s, "bytes of weight", weights_[s]);
    }
    if (segment.weight == nullptr) {
      throw std::invalid_argument("weight of segment " + std::to_string(s) + " is missing");
    }
    if (segment.bias == nullptr) {
      segment.bias = optional_input<float>(context, kFirst + 2 * s + 1, "length of bias", segment.rows);
    }
    if (s >= outputs) continue;
    Ort::UnownedValue out = context.GetOutput(s, {args.tokens, segment.rows});
    segment.out = out.GetTensorMutableData<float>();
  }
  if (args.adapters.offset >= 0) read_adapters(context, args.adapters);
  const std::string problem = matmul_block(args, parallel_of(raw));
  if (!problem.empty()) throw std::invalid_argument(problem);
}

OrtStatusPtr MatMulBlockKernel::ComputeV2(OrtKernelContext* context) {
  return guarded("skerry.MatMulBlock", [&] { run(context); });
}

OrtStatusPtr MatMulBlockOp::CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const {
  try {
    *kernel = new MatMulBlockKernel(info);
    return nullptr;
  } catch (const std::exception& error) {
    return failed(ORT_INVALID_ARGUMENT, "create skerry.MatMulBlock", error.what());
  }
}

ONNXTensorElementDataType MatMulBlockOp::GetInputType(size_t index) const {
  if (index == kAdapters) return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
  if (index >= kQueryStart) return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
  const bool weight = index >= kFirst && (index - kFirst) % 2 == 0;
  return weight ? ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
}

OrtCustomOpInputOutputCharacteristic MatMulBlockOp::GetInputCharacteristic(size_t index) const {
  return index == kX || index == kFirst ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
}

OrtCustomOpInputOutputCharacteristic MatMulBlockOp::GetOutputCharacteristic(size_t index) const {
  return index == 0 ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
}

}  // namespace skerry::ort
