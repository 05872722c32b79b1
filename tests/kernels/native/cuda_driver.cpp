// Asks kernels/cuda/driver.cpp for a device and for launches; the driver behind it is tests/simulators/cuda.c.
#include <cstdio>
#include <exception>

#include "../../../kernels/cuda/driver.h"

namespace {

skerry::Launch make(const char* kernel, uint32_t blocks, uint32_t shared_bytes, bool together, int first) {
  skerry::Launch launch;
  launch.kernel = kernel;
  launch.grid[0] = blocks;
  launch.grid[1] = 2;
  launch.block[0] = 128;
  launch.shared_bytes = shared_bytes;
  launch.together = together;
  launch.params = skerry::params_of(first);
  return launch;
}

}  // namespace

int main() {
  try {
    const skerry::CudaDevice device = skerry::cuda::current_device();
    std::printf("device %d %d %u\n", device.sm, device.multiprocessors, device.shared_bytes);
    for (int step = 0; step < 2; ++step) {
      skerry::cuda::run({make("rope_append_f16", 3, 0, false, 11), make("sample_f32", 4, 50'000, true, 12),
                         make("sample_f32", 0, 0, false, 13)},
                        reinterpret_cast<void*>(0x99));
    }
    skerry::cuda::run({make("unheard_of", 1, 0, false, 0)}, nullptr);
  } catch (const std::exception& error) {
    std::printf("error %s\n", error.what());
  }
}
