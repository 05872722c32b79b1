// Sample on a CUDA device: the recipe of its one launch. Pure host code; needs neither CUDA's headers nor a device.
#pragma once

#include "launch.h"
#include "sample.h"

namespace skerry {

enum class LogitType { kFloat32, kFloat16, kBfloat16 };

// Device memory of a launch. `scratch` is zero before the first launch, and every launch leaves it so: it can be kept
// from step to step. `parts` need no value.
struct SampleMemory {
  size_t scratch_bytes = 0;
  size_t parts_bytes = 0;
};
SampleMemory sample_memory(int64_t rows, int64_t vocabulary, const CudaDevice& device);

// Pointers of `args` are the device's; what they point at was checked (check_sample) where it was on the host. `cuts`:
// for tests, [rows] pairs (ordered bits of the logit, id) of the last place that top-k and top-p keep; null: not asked
// for. Blocks wait for each other, so two such launches must not run at once on one device. 1 to 262,144 ids; no rows:
// a launch of no blocks.
Launch sample_launch(const SampleArgs& args, LogitType type, void* scratch, void* parts, void* cuts,
                     const CudaDevice& device);

// Empty, or why a device cannot sample: a vocabulary out of range.
std::string check_sample_launch(int64_t vocabulary);

}  // namespace skerry
