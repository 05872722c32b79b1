#include "driver.h"

#include <dlfcn.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>

namespace skerry::cuda {
namespace {

// The driver API's types and numbers, as cuda.h has had them since CUDA 12.
using Result = int;
using Handle = void*;
enum Attribute { kMultiprocessors = 16, kMajor = 75, kMinor = 76, kSharedOptIn = 97 };
constexpr int kMaxDynamicShared = 8;  // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
constexpr uint32_t kSharedByDefault = 48 << 10;

struct Driver {
  Result (*error_name)(Result, const char**) = nullptr;
  Result (*current_context)(Handle*) = nullptr;
  Result (*current_device)(int*) = nullptr;
  Result (*attribute)(int*, int, int) = nullptr;
  Result (*load_module)(Handle*, const void*) = nullptr;
  Result (*function)(Handle*, Handle, const char*) = nullptr;
  Result (*set_attribute)(Handle, int, int) = nullptr;
  Result (*launch)(Handle, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, Handle, void**,
                   void**) = nullptr;
  Result (*launch_together)(Handle, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, Handle,
                            void**) = nullptr;

  void check(Result code, const std::string& doing) const {
    if (code == 0) return;
    const char* name = nullptr;
    if (error_name(code, &name) != 0 || name == nullptr) name = "an unknown error";
    throw std::runtime_error(doing + ": " + name + " (" + std::to_string(code) + ")");
  }
};

template <class F>
void find(void* library, const char* name, F& function) {
  function = reinterpret_cast<F>(dlsym(library, name));
  if (function == nullptr) throw std::runtime_error(std::string("the CUDA driver has no ") + name);
}

Driver opened() {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw std::runtime_error(std::string("no CUDA driver: ") + dlerror());
  Driver d;
  find(library, "cuGetErrorName", d.error_name);
  find(library, "cuCtxGetCurrent", d.current_context);
  find(library, "cuCtxGetDevice", d.current_device);
  find(library, "cuDeviceGetAttribute", d.attribute);
  find(library, "cuModuleLoadData", d.load_module);
  find(library, "cuModuleGetFunction", d.function);
  find(library, "cuFuncSetAttribute", d.set_attribute);
  find(library, "cuLaunchKernel", d.launch);
  find(library, "cuLaunchCooperativeKernel", d.launch_together);
  return d;
}

const Driver& driver() {
  static const Driver d = opened();
  return d;
}

Handle context() {
  Handle found = nullptr;
  driver().check(driver().current_context(&found), "ask for the CUDA context");
  if (found == nullptr) throw std::runtime_error("this thread has no CUDA context");
  return found;
}

std::filesystem::path directory() {
  Dl_info info;
  if (dladdr(reinterpret_cast<const void*>(&directory), &info) == 0) throw std::runtime_error("where is this library?");
  return std::filesystem::path(info.dli_fname).parent_path();
}

// Kernels are named after their op: sample_f32 is one of sample.fatbin's.
std::filesystem::path file_of(const std::string& kernel) {
  for (const auto& entry : std::filesystem::directory_iterator(directory())) {
    const std::string stem = entry.path().stem().string();
    if (entry.path().extension() == ".fatbin" && (kernel == stem || kernel.rfind(stem + "_", 0) == 0)) {
      return entry.path();
    }
  }
  throw std::runtime_error("no fat binary beside the library has kernel " + kernel + ": build where nvcc is installed");
}

std::vector<char> contents(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  if (!file || bytes.empty()) throw std::runtime_error("cannot read " + path.string());
  return bytes;
}

// Modules and functions of each context; modules stay until the process ends, as sessions may.
class Kernels {
 public:
  Handle get(const std::string& kernel) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Handle& found = functions_[{context(), kernel}];
    if (found == nullptr) found = load(kernel);
    return found;
  }

 private:
  Handle load(const std::string& kernel) {
    const std::filesystem::path path = file_of(kernel);
    Handle& module = modules_[{context(), path.string()}];
    if (module == nullptr) {
      driver().check(driver().load_module(&module, contents(path).data()), "load " + path.filename().string());
    }
    Handle function = nullptr;
    driver().check(driver().function(&function, module, kernel.c_str()), "find kernel " + kernel);
    return function;
  }

  std::mutex mutex_;
  std::map<std::pair<Handle, std::string>, Handle> modules_, functions_;
};

int attribute(int device, Attribute what) {
  int value = 0;
  driver().check(driver().attribute(&value, what, device), "ask for attribute " + std::to_string(what));
  return value;
}

}  // namespace

CudaDevice current_device() {
  int device = 0;
  driver().check(driver().current_device(&device), "ask for the CUDA device");
  CudaDevice found;
  found.sm = 10 * attribute(device, kMajor) + attribute(device, kMinor);
  found.multiprocessors = attribute(device, kMultiprocessors);
  found.shared_bytes = static_cast<uint32_t>(attribute(device, kSharedOptIn));
  return found;
}

void run(const std::vector<Launch>& launches, void* stream) {
  static Kernels kernels;
  const Driver& d = driver();
  for (const Launch& one : launches) {
    if (one.grid[0] == 0 || one.grid[1] == 0 || one.grid[2] == 0) continue;
    const Handle function = kernels.get(one.kernel);
    if (one.shared_bytes > kSharedByDefault) {
      d.check(d.set_attribute(function, kMaxDynamicShared, static_cast<int>(one.shared_bytes)),
              "shared memory of kernel " + one.kernel);
    }
    std::vector<uint8_t> params = one.params;  // the driver takes a pointer that is not const
    void* arguments[] = {params.data()};
    const auto [gx, gy, gz] = one.grid;
    const auto [bx, by, bz] = one.block;
    d.check(one.together ? d.launch_together(function, gx, gy, gz, bx, by, bz, one.shared_bytes, stream, arguments)
                         : d.launch(function, gx, gy, gz, bx, by, bz, one.shared_bytes, stream, arguments, nullptr),
            "launch kernel " + one.kernel);
  }
}

}  // namespace skerry::cuda
