#include "gather_block.h"

#include <exception>

namespace skerry::ort {

GatherBlockKernel::GatherBlockKernel(const OrtKernelInfo* raw) {
  const Ort::ConstKernelInfo info(raw);
  MatMulBlockArgs as_product;  // what can be gathered from is what can be multiplied with
  as_product.width = width_ = info.GetAttribute<int64_t>("width");
  as_product.segments = 1;
  table_.rows = info.GetAttribute<int64_t>("rows");
  table_.format = static_cast<BlockFormat>(info.GetAttribute<int64_t>("format"));
  as_product.segment[0] = table_;
  if (const std::string problem = check_matmul_block(as_product); !problem.empty()) {
    throw std::invalid_argument(problem);
  }
}

OrtStatusPtr GatherBlockKernel::ComputeV2(OrtKernelContext* raw) {
  return guarded("skerry.GatherBlock", [&] {
    const Ort::KernelContext context(raw);
    const auto ids = input<int32_t>(context, 0, "ids", 1);
    const auto weight = input<uint8_t>(context, 1, "weight", 1);
    expect("bytes of weight", weight.count(), panels_of(table_.rows) * panel_bytes(table_.format, width_ / kBlock));
    BlockSegment table = table_;
    table.weight = weight.data;
    Ort::UnownedValue out = context.GetOutput(0, {ids.dim(0), width_});
    const std::string problem = gather_block(table, width_, ids.data, ids.dim(0), out.GetTensorMutableData<float>());
    if (!problem.empty()) throw std::invalid_argument(problem);
  });
}

OrtStatusPtr GatherBlockOp::CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const {
  try {
    *kernel = new GatherBlockKernel(info);
    return nullptr;
  } catch (const std::exception& error) {
    return failed(ORT_INVALID_ARGUMENT, "create skerry.GatherBlock", error.what());
  }
}

}  // namespace skerry::ort
