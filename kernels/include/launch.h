// A kernel launch as data. Planning is pure and on the host; whoever executes (CUDA's driver, CuPy, the emulator in
// tests) does the same: look up `kernel`, hand over `params`, start `grid` blocks of `block` threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

namespace skerry {

struct Launch {
  std::string kernel;  // its name in the fat binary
  uint32_t grid[3] = {1, 1, 1};
  uint32_t block[3] = {1, 1, 1};
  uint32_t shared_bytes = 0;    // of dynamic shared memory, all that our kernels use
  bool together = false;        // blocks wait for each other, so all of them must run at once
  std::vector<uint8_t> params;  // the kernel's one argument, a plain struct
};

template <class Params>
std::vector<uint8_t> params_of(const Params& params) {
  static_assert(std::is_trivially_copyable_v<Params>);
  std::vector<uint8_t> bytes(sizeof(Params));
  std::memcpy(bytes.data(), &params, sizeof(Params));
  return bytes;
}

// What plans need to know of a device.
struct CudaDevice {
  int sm = 80;  // compute capability: 86 for 8.6
  int multiprocessors = 1;
  uint32_t shared_bytes = 49'152;  // that a block may have, opted in
};

}  // namespace skerry
