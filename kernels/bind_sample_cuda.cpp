// Sample's launch on a CUDA device, as data: what kernels/sample_cuda.py asks for.
#include "bind.h"
#include "include/sample_cuda.h"

namespace nb = nanobind;

namespace skerry::bind {
namespace {

template <class T>
T* at(const nb::dict& addresses, const char* name) {
  return reinterpret_cast<T*>(nb::cast<uintptr_t>(addresses[name]));
}

// Addresses on the device by the names of SampleArgs' pointers; 0 for what has no entries.
SampleArgs args_at(const nb::dict& a) {
  SampleArgs args;
  args.logits = at<const float>(a, "logits");
  args.temperature = at<const float>(a, "temperature");
  args.top_k = at<const int32_t>(a, "top_k");
  args.top_p = at<const float>(a, "top_p");
  args.min_p = at<const float>(a, "min_p");
  args.repetition = at<const float>(a, "repetition");
  args.frequency = at<const float>(a, "frequency");
  args.presence = at<const float>(a, "presence");
  args.seed = at<const uint64_t>(a, "seed");
  args.token_index = at<const int32_t>(a, "token_index");
  args.target = at<const int32_t>(a, "target");
  args.hist_start = at<const int32_t>(a, "hist_start");
  args.hist_ids = at<const int32_t>(a, "hist_ids");
  args.hist_counts = at<const int32_t>(a, "hist_counts");
  args.bias_start = at<const int32_t>(a, "bias_start");
  args.bias_ids = at<const int32_t>(a, "bias_ids");
  args.bias_values = at<const float>(a, "bias_values");
  args.mask = at<const int32_t>(a, "mask");
  args.mask_row = at<const int32_t>(a, "mask_row");
  args.token = at<int32_t>(a, "token");
  args.logprob = at<float>(a, "logprob");
  args.entropy = at<float>(a, "entropy");
  args.top_ids = at<int32_t>(a, "top_ids");
  args.top_logprobs = at<float>(a, "top_logprobs");
  return args;
}

LogitType logit_type(const std::string& dtype) {
  if (dtype == "float32") return LogitType::kFloat32;
  if (dtype == "float16") return LogitType::kFloat16;
  if (dtype == "bfloat16") return LogitType::kBfloat16;
  throw std::invalid_argument("logits of " + dtype + ": not float32, float16 or bfloat16");
}

nb::tuple memory(int64_t rows, int64_t vocabulary, int multiprocessors, uint32_t shared_bytes) {
  expect_none(check_sample_launch(vocabulary));
  CudaDevice device;
  device.multiprocessors = multiprocessors;
  device.shared_bytes = shared_bytes;
  const SampleMemory found = sample_memory(rows, vocabulary, device);
  return nb::make_tuple(found.scratch_bytes, found.parts_bytes);
}

nb::tuple plan(const nb::dict& addresses, int64_t rows, int64_t vocabulary, int64_t mask_rows, int64_t mask_words,
               int32_t top_n, const std::string& dtype, int multiprocessors, uint32_t shared_bytes) {
  expect_none(check_sample_launch(vocabulary));
  SampleArgs args = args_at(addresses);
  args.rows = rows;
  args.vocabulary = vocabulary;
  args.mask_rows = mask_rows;
  args.mask_words = mask_words;
  args.top_n = top_n;
  CudaDevice device;
  device.multiprocessors = multiprocessors;
  device.shared_bytes = shared_bytes;
  return as_tuple(sample_launch(args, logit_type(dtype), at<void>(addresses, "scratch"), at<void>(addresses, "parts"),
                                at<void>(addresses, "cuts"), device));
}

}  // namespace

void bind_sample_cuda(nb::module_& m) {
  using namespace nb::literals;
  m.def("sample_memory", &memory, "rows"_a, "vocabulary"_a, "multiprocessors"_a, "shared_bytes"_a);
  m.def("plan_sample", &plan, "addresses"_a, "rows"_a, "vocabulary"_a, nb::kw_only(), "mask_rows"_a, "mask_words"_a,
        "top_n"_a, "dtype"_a, "multiprocessors"_a, "shared_bytes"_a);
}

}  // namespace skerry::bind
