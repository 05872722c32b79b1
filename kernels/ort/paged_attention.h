#pragma once

#include "../include/paged_attention.h"
#include "common.h"

namespace skerry::ort {

class PagedAttentionKernel {
 public:
  explicit PagedAttentionKernel(const OrtKernelInfo* info);
  OrtStatusPtr ComputeV2(OrtKernelContext* context);

 private:
  void run(OrtKernelContext* context) const;
  PagedAttentionShape shape_;
};

// Input 3 (kv) and output 1 (kv_out) are one buffer when the caller binds them so; otherwise kv is copied first.
struct PagedAttentionOp : Ort::CustomOpBase<PagedAttentionOp, PagedAttentionKernel, true> {
  PagedAttentionOp();
  OrtStatusPtr CreateKernelV2(const OrtApi& api, const OrtKernelInfo* info, void** kernel) const;
  const char* GetName() const { return "PagedAttention"; }
  size_t GetInputTypeCount() const { return 12; }
  ONNXTensorElementDataType GetInputType(size_t index) const;
  size_t GetOutputTypeCount() const { return 2; }
  ONNXTensorElementDataType GetOutputType(size_t index) const {
    return index == 0 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT : ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
  }
};

}  // namespace skerry::ort
