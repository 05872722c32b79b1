#include "plugin.h"

#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <exception>

#include "../cuda/driver.h"
#include "../expect.h"

namespace skerry::tensorrt {
namespace {

using namespace nvinfer1;
using namespace cuda;  // the op's inputs and outputs by their place

constexpr const char *kName = "PagedAttention", *kVersion = "1", *kNamespace = "skerry";
constexpr int kKvBytes = 4;  // of an element of kv

ILoggerFinder* finder = nullptr;

// A logger has another binary interface in each major version, so it is asked for only where the library that `symbol`
// is of has the version of our headers.
bool is_of_our_version(const void* symbol) {
  Dl_info info;
  if (symbol == nullptr || dladdr(symbol, &info) == 0) return false;
  void* library = dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD);
  if (library == nullptr) return false;
  const auto major = reinterpret_cast<int32_t (*)()>(dlsym(library, "getInferLibMajorVersion"));
  const bool found = major != nullptr && major() == NV_TENSORRT_MAJOR;
  dlclose(library);
  return found;
}

// Whoever loads the library through TensorRT's registry gives a finder; else the process may have TensorRT's own.
ILogger* logger() {
  if (finder != nullptr) return is_of_our_version(*reinterpret_cast<void**>(finder)) ? finder->findLogger() : nullptr;
  const auto get = reinterpret_cast<ILogger* (*)()>(dlsym(RTLD_DEFAULT, "getLogger"));
  return is_of_our_version(reinterpret_cast<const void*>(get)) ? get() : nullptr;
}

void complain(const char* doing, const char* problem) noexcept {
  char text[512];
  std::snprintf(text, sizeof text, "skerry.PagedAttention: %s: %s", doing, problem);
  if (ILogger* found = logger()) return found->log(ILogger::Severity::kERROR, text);
  std::fprintf(stderr, "%s\n", text);
}

// What `run` returns, or `otherwise` where it throws: nothing is thrown across to TensorRT.
template <class Result, class F>
Result guarded(const char* doing, Result otherwise, F&& run) noexcept {
  try {
    return run();
  } catch (const std::exception& error) {
    complain(doing, error.what());
    return otherwise;
  }
}

// The type of an input, or of an output behind those, where q has type `q`.
DataType type_of(int32_t at, DataType q) {
  if (at < kKv || at == kInputs + kOut) return q;
  return at == kCos || at == kSin ? DataType::kFLOAT : DataType::kINT32;
}

Tensor tensor_of(const Dims& dims, const void* data = nullptr) { return {data, dims.nbDims, {dims.d[0], dims.d[1]}}; }

// Bytes of workspace that a step takes, which no device changes; throws what is wrong with it.
int64_t bytes_of(const PagedAttentionTask& task, bool bfloat16, int64_t most_query) {
  int64_t bytes = 0;
  std::vector<Launch> none;
  const std::string problem = plan_paged_attention(task, bfloat16, most_query, CudaDevice{}, nullptr, bytes, none);
  if (!problem.empty()) throw std::invalid_argument(problem);
  return bytes;
}

Attributes read(const PluginFieldCollection& given) {
  Attributes attributes;
  const Fields known = fields_of(attributes);
  for (int32_t i = 0; i < given.nbFields; ++i) {
    const PluginField& field = given.fields[i];
    const auto* found = std::find_if(known.begin(), known.end(),
                                     [&](const PluginField& one) { return std::strcmp(one.name, field.name) == 0; });
    if (found == known.end()) throw std::invalid_argument(std::string("no field is named ") + field.name);
    if (field.type != found->type || field.length != 1 || field.data == nullptr)
      throw std::invalid_argument(std::string(field.name) + " is not one number of " +
                                  (found->type == PluginFieldType::kINT32 ? "int32" : "float32"));
    std::memcpy(const_cast<void*>(found->data), field.data, sizeof(int32_t));
  }
  return attributes;
}

}  // namespace

Fields fields_of(const Attributes& a) {
  const auto whole = [](const char* name, const int32_t& at) {
    return PluginField(name, &at, PluginFieldType::kINT32, 1);
  };
  const auto real = [](const char* name, const float& at) {
    return PluginField(name, &at, PluginFieldType::kFLOAT32, 1);
  };
  return {whole("num_heads", a.num_heads),     whole("num_kv_heads", a.num_kv_heads),
          whole("head_size", a.head_size),     whole("rotary_dim", a.rotary_dim),
          whole("interleaved", a.interleaved), whole("window", a.window),
          whole("kv_layout", a.kv_layout),     real("scale", a.scale),
          real("softcap", a.softcap)};
}

PagedAttentionPlugin::PagedAttentionPlugin(const Attributes& attributes)
    : attributes_(attributes),
      fields_(fields_of(attributes_)),
      serialized_{static_cast<int32_t>(fields_.size()), fields_.data()} {
  if (attributes_.rotary_dim < 0) attributes_.rotary_dim = attributes_.head_size;
  if (!std::isfinite(attributes_.scale)) throw std::invalid_argument("scale is missing or no finite number");
  const bool bfloat16 = attributes_.kv_layout == kBfloats;
  PagedAttentionTask smallest = task(bfloat16);
  smallest.tokens = smallest.sequences = 1;
  smallest.table_rows = 1;
  bytes_of(smallest, bfloat16, 1);
}

IPluginCapability* PagedAttentionPlugin::getCapabilityInterface(PluginCapabilityType type) noexcept {
  switch (type) {
    case PluginCapabilityType::kCORE:
      return static_cast<IPluginV3OneCore*>(this);
    case PluginCapabilityType::kBUILD:
      return static_cast<IPluginV3OneBuildV2*>(this);
    case PluginCapabilityType::kRUNTIME:
      return static_cast<IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

IPluginV3* PagedAttentionPlugin::clone() noexcept {
  return guarded<IPluginV3*>("clone", nullptr, [&] { return new PagedAttentionPlugin(attributes_); });
}

const char* PagedAttentionPlugin::getPluginName() const noexcept { return kName; }
const char* PagedAttentionPlugin::getPluginVersion() const noexcept { return kVersion; }
const char* PagedAttentionPlugin::getPluginNamespace() const noexcept { return kNamespace; }

bool PagedAttentionPlugin::takes(DataType q) const {
  return (q == DataType::kHALF && attributes_.kv_layout != kBfloats) ||
         (q == DataType::kBF16 && attributes_.kv_layout != kHalves);
}

PagedAttentionTask PagedAttentionPlugin::task(bool bfloat16) const {
  PagedAttentionTask made{};
  made.heads = attributes_.num_heads;
  made.kv_heads = attributes_.num_kv_heads;
  made.head_size = attributes_.head_size;
  made.rotary = attributes_.rotary_dim;
  made.interleaved = attributes_.interleaved != 0;
  made.window = attributes_.window;
  made.scale = attributes_.scale;
  made.softcap = attributes_.softcap;
  set_pages(made, attributes_.kv_layout, bfloat16);
  return made;
}

PagedAttentionTask PagedAttentionPlugin::task(DataType type, const Tensor (&inputs)[kInputs]) const {
  PagedAttentionTask made = task(type == DataType::kBF16);
  set_inputs(made, inputs, kKvBytes);
  return made;
}

int32_t PagedAttentionPlugin::getOutputDataTypes(DataType* outputs, int32_t output_count, const DataType* inputs,
                                                 int32_t input_count) const noexcept {
  return guarded("types", -1, [&] {
    expect("number of inputs", input_count, kInputs);
    expect("number of outputs", output_count, kOutputs);
    if (!takes(inputs[kQ])) {
      throw std::invalid_argument("DataType of q is " + std::to_string(static_cast<int32_t>(inputs[kQ])) +
                                  ", not one of pages of kv_layout " + std::to_string(attributes_.kv_layout));
    }
    for (int32_t i = 0; i < kInputs; ++i) {
      expect(("DataType of " + std::string(kInputNames[i])).c_str(), static_cast<int64_t>(inputs[i]),
             static_cast<int64_t>(type_of(i, inputs[kQ])));
    }
    for (int32_t i = 0; i < kOutputs; ++i) outputs[i] = type_of(kInputs + i, inputs[kQ]);
    return 0;
  });
}

int32_t PagedAttentionPlugin::getOutputShapes(const DimsExprs* inputs, int32_t input_count, const DimsExprs*, int32_t,
                                              DimsExprs* outputs, int32_t output_count, IExprBuilder&) noexcept {
  return guarded("shapes", -1, [&] {
    expect("number of inputs", input_count, kInputs);
    expect("number of outputs", output_count, kOutputs);
    outputs[kOut] = inputs[kQ];
    outputs[kKvOut] = inputs[kKv];
    return 0;
  });
}

bool PagedAttentionPlugin::supportsFormatCombination(int32_t at, const DynamicPluginTensorDesc* all,
                                                     int32_t input_count, int32_t output_count) noexcept {
  if (input_count != kInputs || output_count != kOutputs || at < 0 || at >= kInputs + kOutputs) return false;
  const DataType q = all[kQ].desc.type;
  return all[at].desc.format == TensorFormat::kLINEAR && takes(q) && all[at].desc.type == type_of(at, q);
}

// A smaller step never takes more: the bytes grow with tokens, sequences, the table's width and the longest query. But
// an empty plan leaves that unknown, which is more than a profile's longest.
int64_t PagedAttentionPlugin::workspace(const DynamicPluginTensorDesc* inputs, int32_t count) const {
  expect("number of inputs", count, kInputs);
  Tensor largest[kInputs];
  for (int32_t i = 0; i < kInputs; ++i) largest[i] = tensor_of(inputs[i].max);
  const DataType type = inputs[kQ].desc.type;
  const PagedAttentionTask made = task(type, largest);
  const int64_t most = inputs[kPlan].min.d[0] > 0 ? largest[kPlan].dims[0] : made.tokens;
  return bytes_of(made, type == DataType::kBF16, most);
}

int32_t PagedAttentionPlugin::configurePlugin(const DynamicPluginTensorDesc* inputs, int32_t input_count,
                                              const DynamicPluginTensorDesc*, int32_t) noexcept {
  return guarded("configure", -1, [&] { return workspace(inputs, input_count) > 0 ? 0 : -1; });
}

// 0 where something is wrong, which configurePlugin told before; enqueue refuses to run without.
size_t PagedAttentionPlugin::getWorkspaceSize(const DynamicPluginTensorDesc* inputs, int32_t input_count,
                                              const DynamicPluginTensorDesc*, int32_t) const noexcept {
  return guarded("workspace", size_t{0}, [&] { return static_cast<size_t>(workspace(inputs, input_count)); });
}

int32_t PagedAttentionPlugin::onShapeChange(const PluginTensorDesc* inputs, int32_t input_count,
                                            const PluginTensorDesc*, int32_t) noexcept {
  return guarded("shape change", -1, [&] {
    expect("number of inputs", input_count, kInputs);
    Tensor step[kInputs];
    for (int32_t i = 0; i < kInputs; ++i) step[i] = tensor_of(inputs[i].dims);
    task(inputs[kQ].type, step);
    return 0;
  });
}

int32_t PagedAttentionPlugin::enqueue(const PluginTensorDesc* input_descs, const PluginTensorDesc*,
                                      const void* const* inputs, void* const* outputs, void* workspace,
                                      cudaStream_t stream) noexcept {
  return guarded("enqueue", -1, [&] {
    Tensor step[kInputs];
    for (int32_t i = 0; i < kInputs; ++i) step[i] = tensor_of(input_descs[i].dims, inputs[i]);
    PagedAttentionTask made = task(input_descs[kQ].type, step);
    set_outputs(made, outputs[kOut], outputs[kKvOut]);
    if (made.tokens == 0) return 0;
    if (workspace == nullptr) throw std::invalid_argument("there is no workspace");
    int64_t bytes = 0;
    std::vector<Launch> launches;
    const std::string problem =
        plan_paged_attention(made, input_descs[kQ].type == DataType::kBF16, most_query(step[kPlan], made.tokens),
                             current_device(), workspace, bytes, launches);
    if (!problem.empty()) throw std::invalid_argument(problem);
    cuda::run(launches, stream);
    return 0;
  });
}

IPluginV3* PagedAttentionCreator::createPlugin(const char*, const PluginFieldCollection* given,
                                               TensorRTPhase) noexcept {
  return guarded<IPluginV3*>("create", nullptr, [&] {
    return new PagedAttentionPlugin(read(given == nullptr ? PluginFieldCollection{} : *given));
  });
}

const char* PagedAttentionCreator::getPluginName() const noexcept { return kName; }
const char* PagedAttentionCreator::getPluginVersion() const noexcept { return kVersion; }
const char* PagedAttentionCreator::getPluginNamespace() const noexcept { return kNamespace; }

}  // namespace skerry::tensorrt

// What TensorRT's registry looks for in a library of plugins.
extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface* const* getCreators(
    int32_t& count) {
  static skerry::tensorrt::PagedAttentionCreator creator;
  static nvinfer1::IPluginCreatorInterface* const all[] = {&creator};
  count = 1;
  return all;
}

extern "C" __attribute__((visibility("default"))) void setLoggerFinder(nvinfer1::ILoggerFinder* found) {
  skerry::tensorrt::finder = found;
}
