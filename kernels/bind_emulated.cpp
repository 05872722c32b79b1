// skerry.kernels._emulated: GPU kernels on this machine's processor, for tests. Addresses are those of NumPy arrays.
#include "bind.h"
#include "cuda/emulator.h"

namespace nb = nanobind;

NB_MODULE(_emulated, m) {
  using namespace nb::literals;
  nb::set_leak_warnings(false);
  m.def("kernels", [] {
    std::vector<std::string> names;
    for (const auto& [name, kernel] : skerry::emulator::kernels()) names.push_back(name);
    return names;
  });
  m.def(
      "run",
      [](const std::string& kernel, std::vector<uint32_t> grid, std::vector<uint32_t> block, uint32_t shared_bytes,
         bool together, const nb::bytes& params, uint64_t seed) {
        skerry::bind::expect("dimensions of grid", grid.size(), 3);
        skerry::bind::expect("dimensions of block", block.size(), 3);
        skerry::Launch launch;
        launch.kernel = kernel;
        std::copy_n(grid.begin(), 3, launch.grid);
        std::copy_n(block.begin(), 3, launch.block);
        launch.shared_bytes = shared_bytes;
        launch.together = together;
        const auto* bytes = static_cast<const uint8_t*>(params.data());
        launch.params.assign(bytes, bytes + params.size());
        const std::string problem = skerry::emulator::run(launch, seed);
        if (!problem.empty()) throw std::runtime_error(problem);
      },
      "kernel"_a, "grid"_a, "block"_a, "shared_bytes"_a, "together"_a, "params"_a, "seed"_a = 0);
}
