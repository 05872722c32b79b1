#pragma once

#include "../include/sample.h"
#include "common.h"

namespace skerry::ort {

class SampleKernel {
 public:
  OrtStatusPtr ComputeV2(OrtKernelContext* context);
};

// Inputs: logits temperature top_k top_p min_p repetition frequency presence seed(uint64) token_index target
// hist_start hist_ids hist_counts bias_start bias_ids bias_values mask mask_row top_n[1].
// Outputs: token logprob entropy top_ids top_logprobs.
struct SampleOp : Ort::CustomOpBase<SampleOp, SampleKernel, true> {
  SampleOp() { end_ver_ = 1; }
  OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo*, void** kernel) const {
    *kernel = new SampleKernel();
    return nullptr;
  }
  const char* GetName() const { return "Sample"; }
  size_t GetInputTypeCount() const { return 20; }
  ONNXTensorElementDataType GetInputType(size_t index) const;
  size_t GetOutputTypeCount() const { return 5; }
  ONNXTensorElementDataType GetOutputType(size_t index) const;
};

}  // namespace skerry::ort
