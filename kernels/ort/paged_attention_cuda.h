// PagedAttention of halves on the CUDA provider; compiled with SKERRY_CUDA_EMULATED, the same op on the CPU provider
// with its kernels on the emulator, for tests of graphs where there is no GPU. T is Ort::Float16_t or Ort::BFloat16_t.
#pragma once

#include "../include/paged_attention_cuda.h"
#include "common.h"

namespace skerry::ort {

template <class T>
class PagedAttentionCudaKernel {
 public:
  explicit PagedAttentionCudaKernel(const OrtKernelInfo* info);
  OrtStatusPtr ComputeV2(OrtKernelContext* context);

 private:
  void run(OrtKernelContext* context) const;
  void launch(OrtKernelContext* context, const cuda::PagedAttentionTask& task, int64_t most_query) const;
  cuda::PagedAttentionTask task_{};  // sizes and strides; pointers come with each run
};

// Input 3 (kv) and output 1 (kv_out) must be one buffer: pages are on the device and are not copied.
template <class T>
struct PagedAttentionCudaOp : Ort::CustomOpBase<PagedAttentionCudaOp<T>, PagedAttentionCudaKernel<T>, true> {
  PagedAttentionCudaOp();
  OrtStatusPtr CreateKernelV2(const OrtApi& api, const OrtKernelInfo* info, void** kernel) const;
  const char* GetName() const { return "PagedAttention"; }
  const char* GetExecutionProviderType() const;
  size_t GetInputTypeCount() const { return 12; }
  ONNXTensorElementDataType GetInputType(size_t index) const;
  size_t GetOutputTypeCount() const { return 2; }
  ONNXTensorElementDataType GetOutputType(size_t index) const;
};

}  // namespace skerry::ort
