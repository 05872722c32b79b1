// Kernels that are right or wrong on purpose, which the emulator must tell apart; on a GPU the right ones show that the
// toolchain, the fat binary and whoever launches them work.
#include "device.h"
#include "selftest.h"

namespace skerry::cuda {
namespace {

// out[t] = sum of what the next warp's threads have put into shared memory.
DEVICE void exchange(const SelfTest& p, unsigned char* shared) {
  float* values = reinterpret_cast<float*>(shared);
  const int t = static_cast<int>(threadIdx.x), size = static_cast<int>(blockDim.x);
  values[t] = static_cast<const float*>(p.in)[t];
  if (p.fault != SelfTest::kNoBarrier) __syncthreads();
  p.out[t] = warp_sum(values[(t + 32) % size]);
  if (p.fault == SelfTest::kPastShared) values[size + t] = 0;
  if (p.fault == SelfTest::kHalfBarrier && t < 32) __syncthreads();
  if (p.fault == SelfTest::kSplitWarp && t % 2 == 0) __syncwarp();
}

// out[16][8] = in[16][16] in[16..31][8], halves, by one warp: copies, ldmatrix and the product of tensor cores.
DEVICE void product(const SelfTest& p, unsigned char* shared) {
  const int lane = static_cast<int>(threadIdx.x);
  const __half* in = static_cast<const __half*>(p.in);
  __half* tile = reinterpret_cast<__half*>(shared);
  copy_async(tile + 16 * (lane / 2) + 8 * (lane % 2), in + 16 * (lane / 2) + 8 * (lane % 2), true);
  if (lane < 16) copy_async(tile + 256 + 8 * lane, in + 256 + 8 * lane, true);
  commit_copies();
  if (p.fault != SelfTest::kNoWait) wait_copies<0>();
  __syncwarp();
  uint32_t a[4], b[4];
  load_matrices(a, tile + 16 * (lane % 16) + 8 * (lane / 16));
  load_matrices_trans(b, tile + 256 + 8 * (lane % 16));
  float d[4] = {0, 0, 0, 0};
  multiply(d, a, b[0], b[1], __half());
  for (int i = 0; i < 4; ++i) p.out[8 * (lane / 4 + 8 * (i / 2)) + 2 * (lane % 4) + i % 2] = d[i];
  if (p.fault == SelfTest::kNoWait) wait_copies<0>();
}

}  // namespace

SKERRY_KERNEL(selftest_exchange, SelfTest, 128, 1, exchange)
SKERRY_KERNEL(selftest_product, SelfTest, 32, 1, product)

}  // namespace skerry::cuda
