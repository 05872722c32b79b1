#pragma once

#include <vector>

#include "../include/matmul_block.h"
#include "common.h"

namespace skerry::ort {

class MatMulBlockKernel {
 public:
  explicit MatMulBlockKernel(const OrtKernelInfo* info);
  OrtStatusPtr ComputeV2(OrtKernelContext* context);

 private:
  void run(OrtKernelContext* context) const;

  void read_adapters(const Ort::KernelContext& context, BlockAdapters& adapters) const;

  MatMulBlockArgs shape_;         // what attributes and constants say; other pointers are filled in at each call
  std::vector<int64_t> weights_;  // bytes of each segment's weight
};

// Inputs: x[T, K] norm[K]? residual[T, N]? then weight and bias[N]? of each segment and, after the last that there can
// be, query_start[B+1]? adapter_rows[B]? adapters[A, R, W]?, which came with version 2. Outputs: one or, without
// activation, one for each segment. Attributes: width; rows and formats by segment; epsilon; activation;
// adapter_offset (-1).
struct MatMulBlockOp : Ort::CustomOpBase<MatMulBlockOp, MatMulBlockKernel, true> {
  MatMulBlockOp() { end_ver_ = 2; }
  OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const;
  const char* GetName() const { return "MatMulBlock"; }
  size_t GetInputTypeCount() const { return 6 + 2 * kMaxSegments; }
  ONNXTensorElementDataType GetInputType(size_t index) const;
  OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t index) const;
  size_t GetOutputTypeCount() const { return kMaxSegments; }
  ONNXTensorElementDataType GetOutputType(size_t) const { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; }
  OrtCustomOpInputOutputCharacteristic GetOutputCharacteristic(size_t index) const;
};

}  // namespace skerry::ort
