#include "paged_attention_cuda.h"

#include <algorithm>
#include <exception>

#include "../cuda/driver.h"
#include "../cuda/paged_attention_inputs.h"

namespace skerry::ort {
namespace {

using namespace cuda;  // the op's inputs and outputs by their place

template <class T>
constexpr bool kIsBfloat = std::is_same_v<T, Ort::BFloat16_t>;
template <class T>
constexpr ONNXTensorElementDataType kElement =
    kIsBfloat<T> ? ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;

#ifdef SKERRY_CUDA_EMULATED
constexpr const char* kProvider = nullptr;  // the CPU's
constexpr const char* kMemory = "Cpu";
void* stream_of(OrtKernelContext*) { return nullptr; }
#else
constexpr const char* kProvider = "CUDAExecutionProvider";
constexpr const char* kMemory = "Cuda";
void* stream_of(OrtKernelContext* context) { return Ort::KernelContext(context).GetGPUComputeStream(); }
#endif

// Memory of the kernel's own device until the end of the scope; the next user of it comes after us on the same stream.
class Scratch {
 public:
  Scratch(OrtKernelContext* context, size_t bytes) {
    const Ort::MemoryInfo place(kMemory, OrtDeviceAllocator, 0, OrtMemTypeDefault);
    Ort::ThrowOnError(Ort::GetApi().KernelContext_GetAllocator(context, place, &allocator_));
    data = allocator_->Alloc(allocator_, bytes);
    if (data == nullptr) {
      Ort::GetApi().ReleaseAllocator(allocator_);
      throw std::runtime_error("out of memory: " + std::to_string(bytes) + " bytes of scratch");
    }
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    allocator_->Free(allocator_, data);
    Ort::GetApi().ReleaseAllocator(allocator_);
  }
  void* data = nullptr;

 private:
  OrtAllocator* allocator_ = nullptr;
};

cuda::Tensor given(const Ort::KernelContext& context, size_t index) {
  const Ort::ConstValue value = context.GetInput(index);
  const std::vector<int64_t> shape = value.GetTensorTypeAndShapeInfo().GetShape();
  cuda::Tensor tensor{value.GetTensorRawData(), static_cast<int64_t>(shape.size()), {}};
  std::copy_n(shape.begin(), std::min<size_t>(shape.size(), 2), tensor.dims);
  return tensor;
}

}  // namespace

template <class T>
PagedAttentionCudaKernel<T>::PagedAttentionCudaKernel(const OrtKernelInfo* raw) {
  const Ort::ConstKernelInfo info(raw);
  task_.heads = static_cast<int32_t>(info.GetAttribute<int64_t>("num_heads"));
  task_.kv_heads = static_cast<int32_t>(info.GetAttribute<int64_t>("num_kv_heads"));
  task_.head_size = static_cast<int32_t>(info.GetAttribute<int64_t>("head_size"));
  task_.scale = info.GetAttribute<float>("scale");
  task_.rotary = static_cast<int32_t>(optional<int64_t>(info, "rotary_dim", task_.head_size));
  task_.interleaved = optional<int64_t>(info, "interleaved", 0) != 0;
  task_.softcap = optional<float>(info, "softcap", 0.0f);
  task_.window = static_cast<int32_t>(optional<int64_t>(info, "window", 0));
  set_pages(task_, optional<int64_t>(info, "kv_layout", 0), kIsBfloat<T>);
}

template <class T>
void PagedAttentionCudaKernel<T>::run(OrtKernelContext* raw) const {
  const Ort::KernelContext context(raw);
  cuda::Tensor in[kInputs];
  for (size_t i = 0; i < kInputs; ++i) in[i] = given(context, i);
  PagedAttentionTask task = task_;
  set_inputs(task, in, 1);
  Ort::UnownedValue out = context.GetOutput(kOut, {in[kQ].dims[0], in[kQ].dims[1]});
  Ort::UnownedValue kv_out = context.GetOutput(kKvOut, {in[kKv].dims[0], in[kKv].dims[1]});
  set_outputs(task, out.GetTensorMutableRawData(), kv_out.GetTensorMutableRawData());
  launch(raw, task, most_query(in[kPlan], task.tokens));
}

template <class T>
void PagedAttentionCudaKernel<T>::launch(OrtKernelContext* context, const cuda::PagedAttentionTask& task,
                                         int64_t most_query) const {
  if (task.tokens == 0) return;
  const CudaDevice found = current_device();
  std::vector<Launch> launches;
  int64_t bytes = 0;
  std::string problem = cuda::plan_paged_attention(task, kIsBfloat<T>, most_query, found, nullptr, bytes, launches);
  if (!problem.empty()) throw std::invalid_argument(problem);
  const Scratch scratch(context, static_cast<size_t>(bytes));
  problem = cuda::plan_paged_attention(task, kIsBfloat<T>, most_query, found, scratch.data, bytes, launches);
  if (!problem.empty()) throw std::invalid_argument(problem);
  cuda::run(launches, stream_of(context));
}

template <class T>
OrtStatusPtr PagedAttentionCudaKernel<T>::ComputeV2(OrtKernelContext* context) {
  return guarded("skerry.PagedAttention on CUDA", [&] { run(context); });
}

template <class T>
PagedAttentionCudaOp<T>::PagedAttentionCudaOp() {
  OrtCustomOp::GetAliasMap = [](int** inputs, int** outputs) -> size_t {
    *inputs = new int[1]{kKv};
    *outputs = new int[1]{kKvOut};
    return 1;
  };
  OrtCustomOp::ReleaseAliasMap = [](int* inputs, int* outputs) {
    delete[] inputs;
    delete[] outputs;
  };
  this->end_ver_ = 1;
}

template <class T>
OrtStatusPtr PagedAttentionCudaOp<T>::CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const {
  try {
    *kernel = new PagedAttentionCudaKernel<T>(info);
    return nullptr;
  } catch (const std::exception& error) {
    return failed(ORT_INVALID_ARGUMENT, "create skerry.PagedAttention on CUDA", error.what());
  }
}

template <class T>
const char* PagedAttentionCudaOp<T>::GetExecutionProviderType() const {
  return kProvider;
}

template <class T>
ONNXTensorElementDataType PagedAttentionCudaOp<T>::GetInputType(size_t index) const {
  if (index < kKv) return kElement<T>;
  if (index == kKv) return ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
  return index < kPositions ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT : ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
}

template <class T>
ONNXTensorElementDataType PagedAttentionCudaOp<T>::GetOutputType(size_t index) const {
  return index == kOut ? kElement<T> : ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
}

template class PagedAttentionCudaKernel<Ort::Float16_t>;
template class PagedAttentionCudaKernel<Ort::BFloat16_t>;
template struct PagedAttentionCudaOp<Ort::Float16_t>;
template struct PagedAttentionCudaOp<Ort::BFloat16_t>;

}  // namespace skerry::ort
