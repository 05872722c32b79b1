// PagedAttention as a plugin of TensorRT 10 and 11: "PagedAttention", version "1", namespace "skerry". Inputs are the
// ONNX op's, but kv is int32 [pages, bytes of a page / 4], as a strongly typed network has no plain bytes. Outputs are
// out and kv_out, the same memory as kv: networks are built with PreviewFeature::kALIASED_PLUGIN_IO_10_03.
#pragma once

#include <NvInfer.h>

#include <array>
#include <limits>

#include "../cuda/paged_attention_inputs.h"

namespace skerry::tensorrt {

// The op's, of the 32 bits that fields of a plugin have.
struct Attributes {
  int32_t num_heads = 0, num_kv_heads = 0, head_size = 0, rotary_dim = -1;  // -1: head_size
  int32_t interleaved = 0, window = 0, kv_layout = 0;
  float scale = std::numeric_limits<float>::quiet_NaN(), softcap = 0;
};
// As fields that point into `attributes`, in the order in which engines hold them.
using Fields = std::array<nvinfer1::PluginField, 9>;
Fields fields_of(const Attributes& attributes);

// Throws nothing but when it is made: what goes wrong is told to TensorRT's logger, and by what a method returns.
class PagedAttentionPlugin final : public nvinfer1::IPluginV3,
                                   public nvinfer1::IPluginV3OneCore,
                                   public nvinfer1::IPluginV3OneBuildV2,
                                   public nvinfer1::IPluginV3OneRuntime {
 public:
  explicit PagedAttentionPlugin(const Attributes& attributes);  // throws std::invalid_argument

  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
  nvinfer1::IPluginV3* clone() noexcept override;

  const char* getPluginName() const noexcept override;
  const char* getPluginVersion() const noexcept override;
  const char* getPluginNamespace() const noexcept override;

  int32_t getNbOutputs() const noexcept override { return cuda::kOutputs; }
  int32_t getAliasedInput(int32_t output) noexcept override { return output == cuda::kKvOut ? cuda::kKv : -1; }
  int32_t getOutputDataTypes(nvinfer1::DataType* outputs, int32_t output_count, const nvinfer1::DataType* inputs,
                             int32_t input_count) const noexcept override;
  int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t input_count, const nvinfer1::DimsExprs*, int32_t,
                          nvinfer1::DimsExprs* outputs, int32_t output_count,
                          nvinfer1::IExprBuilder&) noexcept override;
  bool supportsFormatCombination(int32_t at, const nvinfer1::DynamicPluginTensorDesc* all, int32_t input_count,
                                 int32_t output_count) noexcept override;
  int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t input_count,
                          const nvinfer1::DynamicPluginTensorDesc*, int32_t) noexcept override;
  size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t input_count,
                          const nvinfer1::DynamicPluginTensorDesc*, int32_t) const noexcept override;

  int32_t onShapeChange(const nvinfer1::PluginTensorDesc* inputs, int32_t input_count,
                        const nvinfer1::PluginTensorDesc*, int32_t) noexcept override;
  int32_t enqueue(const nvinfer1::PluginTensorDesc* input_descs, const nvinfer1::PluginTensorDesc*,
                  const void* const* inputs, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept override;
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override { return clone(); }
  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override { return &serialized_; }

 private:
  bool takes(nvinfer1::DataType q) const;
  cuda::PagedAttentionTask task(bool bfloat16) const;
  cuda::PagedAttentionTask task(nvinfer1::DataType type, const cuda::Tensor (&inputs)[cuda::kInputs]) const;
  int64_t workspace(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t count) const;

  Attributes attributes_;
  Fields fields_;
  nvinfer1::PluginFieldCollection serialized_;
};

class PagedAttentionCreator final : public nvinfer1::IPluginCreatorV3One {
 public:
  nvinfer1::IPluginV3* createPlugin(const char*, const nvinfer1::PluginFieldCollection* given,
                                    nvinfer1::TensorRTPhase) noexcept override;
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &names_; }
  const char* getPluginName() const noexcept override;
  const char* getPluginVersion() const noexcept override;
  const char* getPluginNamespace() const noexcept override;

 private:
  Attributes defaults_;
  Fields fields_ = fields_of(defaults_);
  nvinfer1::PluginFieldCollection names_{static_cast<int32_t>(fields_.size()), fields_.data()};
};

}  // namespace skerry::tensorrt
