#include "paged_attention_cuda.h"

#include <exception>

#include "../include/paged_attention_cuda.h"
#ifdef SKERRY_CUDA_EMULATED
#  include "../cuda/emulator.h"
#else
#  include "cuda_driver.h"
#endif

namespace skerry::ort {
namespace {

enum Input { kQ, kK, kV, kKv, kCos, kSin, kPositions, kQueryStart, kContextLen, kBlockTable, kSlot, kPlan };
enum Output { kOut, kKvOut };
// Of the attribute `kv_layout`, behind those of the CPU (kernels/pages.py).
enum Layout : int64_t { kHalves = 3, kBfloats = 4, kInt8 = 5, kE4m3 = 6 };

template <class T>
constexpr bool kIsBfloat = std::is_same_v<T, Ort::BFloat16_t>;
template <class T>
constexpr ONNXTensorElementDataType kElement =
    kIsBfloat<T> ? ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;

#ifdef SKERRY_CUDA_EMULATED
constexpr const char* kProvider = nullptr;  // the CPU's
constexpr const char* kMemory = "Cpu";
CudaDevice device() {
  CudaDevice found;
  found.sm = 90;
  found.multiprocessors = 8;
  found.shared_bytes = 231'424;
  return found;
}
void execute(const std::vector<Launch>& launches, OrtKernelContext*) {
  for (const Launch& one : launches) {
    if (const std::string problem = emulator::run(one, 1); !problem.empty()) throw std::runtime_error(problem);
  }
}
#else
constexpr const char* kProvider = "CUDAExecutionProvider";
constexpr const char* kMemory = "Cuda";
CudaDevice device() { return current_device(); }
void execute(const std::vector<Launch>& launches, OrtKernelContext* context) {
  skerry::ort::run(launches, Ort::KernelContext(context).GetGPUComputeStream());
}
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

void set_pages(cuda::PagedAttentionTask& task, int64_t layout) {
  const bool codes = layout == kInt8 || layout == kE4m3;
  task.stored = layout == kInt8 ? cuda::Stored::kInt8 : layout == kE4m3 ? cuda::Stored::kE4m3 : cuda::Stored::kWide;
  task.token_stride = int64_t{task.head_size} * (codes ? 1 : 2);
  task.value_offset = cuda::kPage * task.token_stride;
  task.scale_offset = 2 * task.value_offset;
  task.head_stride = task.scale_offset + (codes ? 2 * cuda::kPage * int64_t{sizeof(float)} : 0);
  task.page_stride = task.kv_heads * task.head_stride;
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
  const auto layout = optional<int64_t>(info, "kv_layout", 0);
  if (layout != kInt8 && layout != kE4m3 && layout != (kIsBfloat<T> ? kBfloats : kHalves)) {
    throw std::invalid_argument("kv_layout is " + std::to_string(layout) + ", not one of a GPU for this type");
  }
  set_pages(task_, layout);
}

template <class T>
void PagedAttentionCudaKernel<T>::run(OrtKernelContext* raw) const {
  const Ort::KernelContext context(raw);
  const auto q = input<T>(context, kQ, "q", 2);
  const auto k = input<T>(context, kK, "k", 2);
  const auto v = input<T>(context, kV, "v", 2);
  const auto kv = input<uint8_t>(context, kKv, "kv", 2);
  const auto cos = input<float>(context, kCos, "cos", 2);
  const auto sin = input<float>(context, kSin, "sin", 2);
  const auto positions = input<int32_t>(context, kPositions, "positions", 1);
  const auto query_start = input<int32_t>(context, kQueryStart, "query_start", 1);
  const auto context_len = input<int32_t>(context, kContextLen, "context_len", 1);
  const auto block_table = input<int32_t>(context, kBlockTable, "block_table", 2);
  const auto slot = input<int32_t>(context, kSlot, "slot", 1);
  const auto plan = input<int32_t>(context, kPlan, "plan", 1);
  const int64_t tokens = q.dim(0), sequences = context_len.dim(0);
  expect("columns of q", q.dim(1), int64_t{task_.heads} * task_.head_size);
  expect("rows of k", k.dim(0), tokens);
  expect("columns of k", k.dim(1), int64_t{task_.kv_heads} * task_.head_size);
  expect("rows of v", v.dim(0), tokens);
  expect("columns of v", v.dim(1), k.dim(1));
  expect("bytes of a page of kv", kv.dim(1), task_.page_stride);
  if (task_.rotary > 0) {
    expect("columns of cos", cos.dim(1), task_.rotary / 2);
    expect("columns of sin", sin.dim(1), task_.rotary / 2);
    expect("rows of sin", sin.dim(0), cos.dim(0));
  }
  expect("length of positions", positions.dim(0), tokens);
  expect("length of query_start", query_start.dim(0), sequences + 1);
  expect("rows of block_table", block_table.dim(0), sequences);
  expect("length of slot", slot.dim(0), tokens);

  Ort::UnownedValue out = context.GetOutput(kOut, {tokens, q.dim(1)});
  Ort::UnownedValue kv_out = context.GetOutput(kKvOut, kv.shape);
  cuda::PagedAttentionTask task = task_;
  task.kv = kv_out.GetTensorMutableData<uint8_t>();
  if (task.kv != kv.data) throw std::invalid_argument("kv and kv_out are two buffers: bind one as both");
  task.q = q.data;
  task.k = k.data;
  task.v = v.data;
  task.out = out.GetTensorMutableData<T>();
  task.cos = cos.data;
  task.sin = sin.data;
  task.positions = positions.data;
  task.query_start = query_start.data;
  task.context_len = context_len.data;
  task.block_table = block_table.data;
  task.slot = slot.data;
  task.pages = kv.dim(0);
  task.table_rows = cos.dim(0);
  task.tokens = static_cast<int32_t>(tokens);
  task.sequences = static_cast<int32_t>(sequences);
  task.table_width = static_cast<int32_t>(block_table.dim(1));
  launch(raw, task, plan.dim(0) > 0 ? plan.dim(0) : tokens);
}

// Lengths are on the device, where the host must not look: the longest query is told by the length of `plan`.
template <class T>
void PagedAttentionCudaKernel<T>::launch(OrtKernelContext* context, const cuda::PagedAttentionTask& task,
                                         int64_t most_query) const {
  if (task.tokens == 0) return;
  const CudaDevice found = device();
  std::vector<Launch> launches;
  int64_t bytes = 0;
  std::string problem = cuda::plan_paged_attention(task, kIsBfloat<T>, most_query, found, nullptr, bytes, launches);
  if (!problem.empty()) throw std::invalid_argument(problem);
  const Scratch scratch(context, static_cast<size_t>(bytes));
  problem = cuda::plan_paged_attention(task, kIsBfloat<T>, most_query, found, scratch.data, bytes, launches);
  if (!problem.empty()) throw std::invalid_argument(problem);
  execute(launches, context);
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
