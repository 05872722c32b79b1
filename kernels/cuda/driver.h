// Launches on the CUDA device of the calling thread, for libraries that others load: through the driver's own library,
// which is opened when first needed, so that they are linked against nothing of CUDA and load on machines without it.
// driver_emulated.cpp has the same two functions for tests.
#pragma once

#include <vector>

#include "../include/launch.h"

namespace skerry::cuda {

// What plans need to know of the current device. Throws std::runtime_error: no driver, no context, no such attribute.
CudaDevice current_device();

// Starts launches on a stream, one after the other. Kernels come from the fat binaries beside this library, loaded once
// for each context. Throws std::runtime_error naming the kernel and the driver's error.
void run(const std::vector<Launch>& launches, void* stream);

}  // namespace skerry::cuda
