// Small pieces the custom ops share: ONNX Runtime's thread pool as a Parallel, typed access to tensors, statuses.
#pragma once

#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>
#undef ORT_API_MANUAL_INIT

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../expect.h"
#include "../include/parallel.h"

namespace skerry::ort {

inline OrtStatusPtr failed(OrtErrorCode code, const std::string& op, const std::string& problem) {
  return Ort::GetApi().CreateStatus(code, (op + ": " + problem).c_str());
}

// What `run` throws becomes a status: nothing is thrown past an op. A complaint about what was given is one of
// arguments.
template <class F>
OrtStatusPtr guarded(const std::string& op, F&& run) {
  try {
    run();
    return nullptr;
  } catch (const std::invalid_argument& error) {
    return failed(ORT_INVALID_ARGUMENT, op, error.what());
  } catch (const std::exception& error) {
    return failed(ORT_FAIL, op, error.what());
  }
}

// Tasks are handed out one by one from a counter, because later tiles of a causal prefill are heavier than early ones.
struct Lane {
  Parallel::Task task;
  void* argument;
  int count;
  std::atomic<int> next{0};
};

inline Parallel parallel_of(OrtKernelContext* context) {
  static const int threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  const auto run = [](void* kernel_context, int count, Parallel::Task task, void* argument) {
    Lane lane{task, argument, count};
    const auto drain = [](void* data, size_t) {
      Lane& l = *static_cast<Lane*>(data);
      for (int i = l.next++; i < l.count; i = l.next++) l.task(l.argument, i);
    };
    Ort::KernelContext(static_cast<OrtKernelContext*>(kernel_context))
        .ParallelFor(drain, static_cast<size_t>(std::min(count, threads)), 0, &lane);
  };
  return {run, context, threads};
}

// An input whose element type and rank are checked by the caller's declaration.
template <class T>
struct Tensor {
  const T* data;
  std::vector<int64_t> shape;

  int64_t dim(size_t i) const { return shape[i]; }
  int64_t count() const {
    int64_t n = 1;
    for (const int64_t d : shape) n *= d;
    return n;
  }
};

template <class T>
Tensor<T> input(const Ort::KernelContext& context, size_t index, const char* name, size_t rank) {
  const Ort::ConstValue value = context.GetInput(index);
  Tensor<T> tensor{value.GetTensorData<T>(), value.GetTensorTypeAndShapeInfo().GetShape()};
  if (tensor.shape.size() != rank) {
    throw std::invalid_argument(std::string(name) + " has " + std::to_string(tensor.shape.size()) +
                                " dimensions, expected " + std::to_string(rank));
  }
  return tensor;
}

template <class T>
T optional(const Ort::ConstKernelInfo& info, const char* name, T fallback) {
  try {
    return info.GetAttribute<T>(name);
  } catch (const Ort::Exception&) {
    return fallback;
  }
}

// The data of an input that is a constant of the graph, or null: its shape is checked once, as asking for it at every
// run costs as much as a small op.
template <class T>
const T* constant(const Ort::ConstKernelInfo& info, size_t index, const char* name, int64_t count) {
  if (index >= info.GetInputCount()) return nullptr;
  int is_constant = 0;
  const Ort::ConstValue value = info.GetTensorConstantInput(index, &is_constant);
  if (is_constant == 0 || !value) return nullptr;
  expect(name, static_cast<int64_t>(value.GetTensorTypeAndShapeInfo().GetElementCount()), count);
  return value.GetTensorData<T>();
}

}  // namespace skerry::ort
