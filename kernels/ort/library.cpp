// The entry point ONNX Runtime looks for. Op objects and the domain live as long as the process: sessions refer to
// them.
#include "gather_block.h"
#include "matmul_block.h"
#include "paged_attention.h"
#include "paged_attention_cuda.h"
#include "sample.h"

extern "C" __attribute__((visibility("default"))) OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options,
                                                                                            const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(ORT_API_VERSION);
  if (api == nullptr) return nullptr;  // an older runtime reports its own missing ops
  Ort::InitApi(api);
  try {
    static const skerry::ort::PagedAttentionOp paged_attention;
    // One name on two providers: a session takes the one of the provider that its node is placed on.
    static const skerry::ort::PagedAttentionCudaOp<Ort::Float16_t> attention_of_halves;
    static const skerry::ort::PagedAttentionCudaOp<Ort::BFloat16_t> attention_of_bfloats;
    static const skerry::ort::SampleOp sample;
    static const skerry::ort::MatMulBlockOp matmul_block;
    static const skerry::ort::GatherBlockOp gather_block;
    static Ort::CustomOpDomain domain = [] {
      Ort::CustomOpDomain made("skerry");
      made.Add(&paged_attention);
      made.Add(&attention_of_halves);
      made.Add(&attention_of_bfloats);
      made.Add(&sample);
      made.Add(&matmul_block);
      made.Add(&gather_block);
      return made;
    }();
    Ort::UnownedSessionOptions(options).Add(domain);
    return nullptr;
  } catch (const std::exception& error) {
    return api->CreateStatus(ORT_FAIL, error.what());
  }
}
