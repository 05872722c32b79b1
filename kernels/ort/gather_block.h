#pragma once

#include "../include/matmul_block.h"
#include "common.h"

namespace skerry::ort {

class GatherBlockKernel {
 public:
  explicit GatherBlockKernel(const OrtKernelInfo* info);
  OrtStatusPtr ComputeV2(OrtKernelContext* context);

 private:
  BlockSegment table_;
  int64_t width_ = 0;
};

// Rows of a matrix packed for MatMulBlock: ids[T] weight -> [T, width]. Attributes: width, rows, format.
struct GatherBlockOp : Ort::CustomOpBase<GatherBlockOp, GatherBlockKernel, true> {
  GatherBlockOp() { end_ver_ = 1; }
  OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const;
  const char* GetName() const { return "GatherBlock"; }
  size_t GetInputTypeCount() const { return 2; }
  ONNXTensorElementDataType GetInputType(size_t index) const {
    return index == 0 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32 : ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
  }
  size_t GetOutputTypeCount() const { return 1; }
  ONNXTensorElementDataType GetOutputType(size_t) const { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; }
};

}  // namespace skerry::ort
