#include "sample.h"

#include <exception>

namespace skerry::ort {
namespace {

enum Input {
  kLogits,
  kTemperature,
  kTopK,
  kTopP,
  kMinP,
  kRepetition,
  kFrequency,
  kPresence,
  kSeed,
  kTokenIndex,
  kTarget,
  kHistStart,
  kHistIds,
  kHistCounts,
  kBiasStart,
  kBiasIds,
  kBiasValues,
  kMask,
  kMaskRow,
  kTopN
};
enum Output { kToken, kLogprob, kEntropy, kTopIds, kTopLogprobs };

template <class T>
const T* vector_of(const Ort::KernelContext& context, size_t index, const char* name, int64_t length) {
  const auto tensor = input<T>(context, index, name, 1);
  if (length >= 0) expect((std::string("length of ") + name).c_str(), tensor.dim(0), length);
  return tensor.data;
}

void run(OrtKernelContext* raw) {
  const Ort::KernelContext context(raw);
  SampleArgs args;
  const auto logits = input<float>(context, kLogits, "logits", 2);
  const int64_t rows = logits.dim(0);
  args.logits = logits.data;
  args.rows = rows;
  args.vocabulary = logits.dim(1);
  args.temperature = vector_of<float>(context, kTemperature, "temperature", rows);
  args.top_k = vector_of<int32_t>(context, kTopK, "top_k", rows);
  args.top_p = vector_of<float>(context, kTopP, "top_p", rows);
  args.min_p = vector_of<float>(context, kMinP, "min_p", rows);
  args.repetition = vector_of<float>(context, kRepetition, "repetition", rows);
  args.frequency = vector_of<float>(context, kFrequency, "frequency", rows);
  args.presence = vector_of<float>(context, kPresence, "presence", rows);
  args.seed = vector_of<uint64_t>(context, kSeed, "seed", rows);
  args.token_index = vector_of<int32_t>(context, kTokenIndex, "token_index", rows);
  args.target = vector_of<int32_t>(context, kTarget, "target", rows);
  const auto hist_ids = input<int32_t>(context, kHistIds, "hist_ids", 1);
  args.hist_start = vector_of<int32_t>(context, kHistStart, "hist_start", rows + 1);
  args.hist_ids = hist_ids.data;
  args.hist_counts = vector_of<int32_t>(context, kHistCounts, "hist_counts", hist_ids.dim(0));
  args.hist_entries = hist_ids.dim(0);
  const auto bias_ids = input<int32_t>(context, kBiasIds, "bias_ids", 1);
  args.bias_start = vector_of<int32_t>(context, kBiasStart, "bias_start", rows + 1);
  args.bias_ids = bias_ids.data;
  args.bias_values = vector_of<float>(context, kBiasValues, "bias_values", bias_ids.dim(0));
  args.bias_entries = bias_ids.dim(0);
  const auto mask = input<int32_t>(context, kMask, "mask", 2);
  args.mask = mask.data;
  args.mask_rows = mask.dim(0);
  args.mask_words = mask.dim(1);
  args.mask_row = vector_of<int32_t>(context, kMaskRow, "mask_row", rows);
  args.top_n = *vector_of<int32_t>(context, kTopN, "top_n", 1);
  if (const std::string problem = check_sample(args); !problem.empty()) throw std::invalid_argument(problem);

  args.token = context.GetOutput(kToken, {rows}).GetTensorMutableData<int32_t>();
  args.logprob = context.GetOutput(kLogprob, {rows}).GetTensorMutableData<float>();
  args.entropy = context.GetOutput(kEntropy, {rows}).GetTensorMutableData<float>();
  args.top_ids = context.GetOutput(kTopIds, {rows, args.top_n}).GetTensorMutableData<int32_t>();
  args.top_logprobs = context.GetOutput(kTopLogprobs, {rows, args.top_n}).GetTensorMutableData<float>();
  if (const std::string problem = sample(args, parallel_of(raw)); !problem.empty())
    throw std::invalid_argument(problem);
}

}  // namespace

OrtStatusPtr SampleKernel::ComputeV2(OrtKernelContext* context) {
  return guarded("skerry.Sample", [&] { run(context); });
}

ONNXTensorElementDataType SampleOp::GetInputType(size_t index) const {
  switch (index) {
    case kLogits:
    case kTemperature:
    case kTopP:
    case kMinP:
    case kRepetition:
    case kFrequency:
    case kPresence:
    case kBiasValues:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    case kSeed:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT64;
    default:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
  }
}

ONNXTensorElementDataType SampleOp::GetOutputType(size_t index) const {
  return index == kToken || index == kTopIds ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32
                                             : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
}

}  // namespace skerry::ort
