// For tests: the custom ops that the CUDA provider has, on the CPU provider, with their kernels on the emulator.
#include "paged_attention_cuda.h"

extern "C" __attribute__((visibility("default"))) OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options,
                                                                                            const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(ORT_API_VERSION);
  if (api == nullptr) return nullptr;
  Ort::InitApi(api);
  try {
    static const skerry::ort::PagedAttentionCudaOp<Ort::Float16_t> attention_of_halves;
    static const skerry::ort::PagedAttentionCudaOp<Ort::BFloat16_t> attention_of_bfloats;
    static Ort::CustomOpDomain domain = [] {
      Ort::CustomOpDomain made("skerry");
      made.Add(&attention_of_halves);
      made.Add(&attention_of_bfloats);
      return made;
    }();
    Ort::UnownedSessionOptions(options).Add(domain);
    return nullptr;
  } catch (const std::exception& error) {
    return api->CreateStatus(ORT_FAIL, error.what());
  }
}
