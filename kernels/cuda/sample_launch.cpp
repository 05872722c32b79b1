#include "../include/sample_cuda.h"
#include "sample_plan.h"

namespace skerry {
namespace {

const char* kernel_of(LogitType type) {
  if (type == LogitType::kFloat16) return "sample_f16";
  return type == LogitType::kBfloat16 ? "sample_bf16" : "sample_f32";
}

}  // namespace

std::string check_sample_launch(int64_t vocabulary) {
  if (vocabulary >= 1 && vocabulary <= cuda::kMostVocabulary) return "";
  return "vocabulary " + std::to_string(vocabulary) + " is outside 1.." + std::to_string(cuda::kMostVocabulary);
}

SampleMemory sample_memory(int64_t rows, int64_t vocabulary, const CudaDevice& device) {
  if (rows == 0) return {};
  const cuda::SamplePlan plan = cuda::plan_sample(rows, vocabulary, device);
  return {plan.teams * sizeof(cuda::TeamScratch), plan.parts_bytes};
}

Launch sample_launch(const SampleArgs& args, LogitType type, void* scratch, void* parts, void* cuts,
                     const CudaDevice& device) {
  Launch launch;
  launch.kernel = kernel_of(type);
  launch.grid[0] = 0;
  if (args.rows == 0) return launch;
  const cuda::SamplePlan plan = cuda::plan_sample(args.rows, args.vocabulary, device);
  cuda::SampleTask task;
  task.args = args;
  task.scratch = static_cast<cuda::TeamScratch*>(scratch);
  task.parts = plan.in_shared ? nullptr : static_cast<unsigned char*>(parts);
  task.cuts = static_cast<cuda::Place*>(cuts);
  task.teams = plan.teams;
  task.team_size = plan.team_size;
  task.part = plan.part;
  launch.grid[0] = static_cast<uint32_t>(plan.blocks());
  launch.block[0] = static_cast<uint32_t>(plan.threads);
  launch.shared_bytes = static_cast<uint32_t>(plan.shared_bytes);
  launch.together = plan.team_size > 1;
  launch.params = params_of(task);
  return launch;
}

}  // namespace skerry
