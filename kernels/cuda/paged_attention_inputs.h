// What a graph hands to PagedAttention on a GPU, as a task; shared by the libraries whose graphs have the op.
#pragma once

#include "../include/paged_attention_cuda.h"

namespace skerry::cuda {

// The op's inputs and outputs by their place.
enum Input { kQ, kK, kV, kKv, kCos, kSin, kPositions, kQueryStart, kContextLen, kBlockTable, kSlot, kPlan };
enum Output { kOut, kKvOut };
inline constexpr int kInputs = 12, kOutputs = 2;
extern const char* const kInputNames[kInputs];
// Of the attribute `kv_layout`, behind those of the CPU (kernels/pages.py).
enum Layout : int64_t { kHalves = 3, kBfloats = 4, kInt8 = 5, kE4m3 = 6 };

struct Tensor {
  const void* data = nullptr;
  int64_t rank = 0;
  int64_t dims[2] = {};  // the first ones; no input has more
};

// The strides of a page, from the task's heads. Throws std::invalid_argument: no layout of a GPU for this type.
void set_pages(PagedAttentionTask& task, int64_t layout, bool bfloat16);

// Pointers and sizes of a step into a task that has the op's attributes and its pages' strides. `kv_bytes`: of an
// element of kv, whose pages are bytes to us. Throws std::invalid_argument naming the first bad number.
void set_inputs(PagedAttentionTask& task, const Tensor (&inputs)[kInputs], int64_t kv_bytes);

// The results' memory. Throws std::invalid_argument where kv_out is not kv: pages are on the device and are not copied.
void set_outputs(PagedAttentionTask& task, void* out, void* kv_out);

// Lengths are on the device, where the host must not look: the longest query is told by the length of `plan`.
inline int64_t most_query(const Tensor& plan, int64_t tokens) { return plan.dims[0] > 0 ? plan.dims[0] : tokens; }

}  // namespace skerry::cuda
