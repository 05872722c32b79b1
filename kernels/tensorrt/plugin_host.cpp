// For tests: does with a library of plugins what TensorRT does, in its order, with memory of the host. Plain functions
// for ctypes; what went wrong, and what the plugin logged, is text (`host_said`).
#include <NvInfer.h>
#include <dlfcn.h>

#include <cstring>
#include <string>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

using namespace nvinfer1;

namespace {

constexpr int kInputs = 12, kOutputs = 2;
std::string said;
bool another = false;  // major version

class Logger final : public ILogger {
  void log(Severity, const char* text) noexcept override { said += std::string(text) + "\n"; }
};
class Finder final : public ILoggerFinder {
 public:
  ILogger* findLogger() override { return &logger_; }

 private:
  Logger logger_;
};

// A dimension that is known only when the engine runs.
class Wildcard final : public IDimensionExpr {
 public:
  Wildcard() { mImpl = &impl_; }

 private:
  class Impl final : public apiv::VDimensionExpr {
    bool isConstant() const override { return false; }
    int64_t getConstantValue() const override { return -1; }
    bool isSizeTensor() const override { return false; }
  } impl_;
};
// A plugin whose outputs look like inputs has nothing to build.
class Builder final : public IExprBuilder {
 public:
  Builder() { mImpl = &impl_; }

 private:
  class Impl final : public apiv::VExprBuilder {
    const IDimensionExpr* constant(int64_t) override { return nullptr; }
    const IDimensionExpr* operation(DimensionOperation, const IDimensionExpr&, const IDimensionExpr&) override {
      return nullptr;
    }
    const IDimensionExpr* declareSizeTensor(int32_t, const IDimensionExpr&, const IDimensionExpr&) override {
      return nullptr;
    }
  } impl_;
};

IPluginCreatorV3One* creator = nullptr;

template <class T>
T* capability(IPluginV3* plugin, PluginCapabilityType type) {
  return static_cast<T*>(plugin->getCapabilityInterface(type));
}

bool failed(const char* what) {
  said += std::string(what) + " failed\n";
  return true;
}

}  // namespace

// An input as a network and its profile have it; `dims` are those of a step.
struct Given {
  void* data;
  int32_t type, rank;
  int64_t min[2], max[2], dims[2];
};

namespace {

Dims dims_of(int32_t rank, const int64_t* d) {
  Dims dims{rank, {}};
  for (int32_t i = 0; i < rank && i < Dims::MAX_DIMS; ++i) dims.d[i] = i < 2 ? d[i] : 1;
  return dims;
}
DynamicPluginTensorDesc described(const Given& g) {
  DynamicPluginTensorDesc made{};
  made.min = dims_of(g.rank, g.min);
  made.max = made.opt = dims_of(g.rank, g.max);
  made.desc = {made.max, static_cast<DataType>(g.type), TensorFormat::kLINEAR, 0};
  return made;
}

// Output shapes must be those of q and kv, the very expressions.
bool shapes_are_right(IPluginV3OneBuild* build, const Given* given) {
  Builder builder;
  Wildcard wildcards[kInputs][2];
  DimsExprs in[kInputs], out[kOutputs];
  for (int i = 0; i < kInputs; ++i) in[i] = {given[i].rank, {&wildcards[i][0], &wildcards[i][1]}};
  if (build->getOutputShapes(in, kInputs, nullptr, 0, out, kOutputs, builder) != 0) return false;
  const auto same = [](const DimsExprs& a, const DimsExprs& b) {
    return a.nbDims == b.nbDims && std::memcmp(a.d, b.d, static_cast<size_t>(a.nbDims) * sizeof a.d[0]) == 0;
  };
  return same(out[0], in[0]) && same(out[1], in[3]);
}

// Each place takes its own type in rows, and nothing else; q may also have the other 16-bit type.
bool formats_are_right(IPluginV3OneBuild* build, const DynamicPluginTensorDesc (&all)[kInputs + kOutputs]) {
  for (int at = 0; at < kInputs + kOutputs; ++at) {
    if (!build->supportsFormatCombination(at, all, kInputs, kOutputs)) return false;
    DynamicPluginTensorDesc other[kInputs + kOutputs];
    std::memcpy(other, all, sizeof all);
    other[at].desc.format = TensorFormat::kCHW32;
    if (build->supportsFormatCombination(at, other, kInputs, kOutputs)) return false;
    other[at].desc.format = TensorFormat::kLINEAR;
    for (int32_t i = 0; i < EnumMax<DataType>(); ++i) {
      const auto type = static_cast<DataType>(i);
      const bool other_halves = at == 0 && (type == DataType::kHALF || type == DataType::kBF16);
      if (other_halves || type == all[at].desc.type) continue;
      other[at].desc.type = type;
      if (build->supportsFormatCombination(at, other, kInputs, kOutputs)) return false;
    }
  }
  return true;
}

}  // namespace

// TensorRT's; the plugin asks the library that its logger comes from.
EXPORT int32_t getInferLibMajorVersion() noexcept { return NV_TENSORRT_MAJOR + (another ? 1 : 0); }
EXPORT void host_be_another_version(int32_t yes) { another = yes != 0; }

// Opens a library and takes its only creator. 0, or it is no such library.
EXPORT int host_open(const char* path) {
  static Finder finder;
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return failed(dlerror());
  const auto find = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(library, "getCreators"));
  const auto set = reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(library, "setLoggerFinder"));
  if (find == nullptr || set == nullptr) return failed("looking for getCreators and setLoggerFinder");
  set(&finder);
  int32_t count = 0;
  IPluginCreatorInterface* const* all = find(count);
  if (count != 1 || std::string(all[0]->getInterfaceInfo().kind) != "PLUGIN CREATOR_V3ONE") return failed("counting");
  creator = static_cast<IPluginCreatorV3One*>(all[0]);
  return 0;
}

// "skerry::PagedAttention 1" and the fields that the creator knows.
EXPORT const char* host_names() {
  static std::string text;
  text =
      std::string(creator->getPluginNamespace()) + "::" + creator->getPluginName() + " " + creator->getPluginVersion();
  const PluginFieldCollection& fields = *creator->getFieldNames();
  for (int32_t i = 0; i < fields.nbFields; ++i) text += std::string(" ") + fields.fields[i].name;
  return text.c_str();
}

EXPORT const char* host_said() {
  static std::string text;
  text.swap(said);
  said.clear();
  return text.c_str();
}

// Values are 32 bits each, of the types that TensorRT numbers.
EXPORT IPluginV3* host_create(int32_t count, const char* const* names, const int32_t* types, const void* values) {
  std::vector<PluginField> fields;
  for (int32_t i = 0; i < count; ++i)
    fields.emplace_back(names[i], static_cast<const int32_t*>(values) + i, static_cast<PluginFieldType>(types[i]), 1);
  const PluginFieldCollection all{count, fields.data()};
  return creator->createPlugin("attention", &all, TensorRTPhase::kBUILD);
}

EXPORT void host_destroy(IPluginV3* plugin) { delete plugin; }

// As the builder: types, shapes, formats, a profile. Bytes of workspace, or -1 where something was refused.
EXPORT int64_t host_build(IPluginV3* original, const Given* given) {
  IPluginV3* plugin = original->clone();  // as it works on copies
  auto* build = capability<IPluginV3OneBuildV2>(plugin, PluginCapabilityType::kBUILD);
  DataType in[kInputs], out[kOutputs];
  DynamicPluginTensorDesc all[kInputs + kOutputs];
  for (int i = 0; i < kInputs; ++i) {
    all[i] = described(given[i]);
    in[i] = all[i].desc.type;
  }
  all[kInputs] = all[0];
  all[kInputs + 1] = all[3];
  const bool wrong = (build->getNbOutputs() != kOutputs && failed("counting outputs")) ||
                     ((build->getAliasedInput(0) != -1 || build->getAliasedInput(1) != 3) && failed("aliases")) ||
                     (build->getOutputDataTypes(out, kOutputs, in, kInputs) != 0 && failed("types")) ||
                     ((out[0] != in[0] || out[1] != in[3]) && failed("types of outputs")) ||
                     (!shapes_are_right(build, given) && failed("shapes")) ||
                     (!formats_are_right(build, all) && failed("formats")) ||
                     (build->configurePlugin(all, kInputs, all + kInputs, kOutputs) != 0 && failed("configure"));
  const size_t bytes = wrong ? 0 : build->getWorkspaceSize(all, kInputs, all + kInputs, kOutputs);
  delete plugin;
  return wrong ? -1 : static_cast<int64_t>(bytes);
}

// What an engine holds of it, as "name=value" of 32 bits each.
EXPORT const char* host_fields(IPluginV3* plugin) {
  static std::string text;
  text.clear();
  const PluginFieldCollection& fields =
      *capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME)->getFieldsToSerialize();
  for (int32_t i = 0; i < fields.nbFields; ++i) {
    const PluginField& field = fields.fields[i];
    const bool whole = field.type == PluginFieldType::kINT32;
    text += std::string(i > 0 ? " " : "") + field.name + "=" +
            (whole ? std::to_string(*static_cast<const int32_t*>(field.data))
                   : std::to_string(*static_cast<const float*>(field.data)));
  }
  return text.c_str();
}

// The plugin of an engine that was written and read again.
EXPORT IPluginV3* host_reload(IPluginV3* plugin) {
  const PluginFieldCollection& fields =
      *capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME)->getFieldsToSerialize();
  std::vector<PluginField> copies(fields.fields, fields.fields + fields.nbFields);
  std::vector<std::vector<char>> bytes;
  for (PluginField& field : copies) {
    const auto* from = static_cast<const char*>(field.data);
    bytes.emplace_back(from, from + 4 * field.length);
    field.data = bytes.back().data();
  }
  const PluginFieldCollection all{fields.nbFields, copies.data()};
  return creator->createPlugin("attention", &all, TensorRTPhase::kRUNTIME);
}

// A step as an execution context does it. 0, or what the plugin returned.
EXPORT int host_step(IPluginV3* engine, const Given* given, void* out, void* kv_out, void* workspace) {
  IPluginV3* plugin = capability<IPluginV3OneRuntime>(engine, PluginCapabilityType::kRUNTIME)->attachToContext(nullptr);
  auto* runtime = capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
  PluginTensorDesc all[kInputs + kOutputs];
  const void* inputs[kInputs];
  void* outputs[kOutputs] = {out, kv_out};
  for (int i = 0; i < kInputs; ++i) {
    all[i] = {dims_of(given[i].rank, given[i].dims), static_cast<DataType>(given[i].type), TensorFormat::kLINEAR, 0};
    inputs[i] = given[i].data;
  }
  all[kInputs] = all[0];
  all[kInputs + 1] = all[3];
  int code = runtime->onShapeChange(all, kInputs, all + kInputs, kOutputs);
  if (code == 0) code = runtime->enqueue(all, all + kInputs, inputs, outputs, workspace, nullptr);
  delete plugin;
  return code;
}
