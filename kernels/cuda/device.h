// What kernels are written against: CUDA's own names, and functions for the instructions that have none. Compiled by
// nvcc they are those instructions; with SKERRY_CUDA_EMULATED a host compiler builds the same sources on emulator.h,
// which is how kernels are tested where there is no GPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

#ifdef SKERRY_CUDA_EMULATED
#  include "emulator.h"
#else

#  define DEVICE __device__ __forceinline__

// A kernel: one plain struct as argument, at most `threads` a block, so few registers that `blocks` of them fit on a
// multiprocessor. `function(params, shared)` is what it does; all of its shared memory is dynamic.
#  define SKERRY_KERNEL(name, Params, threads, blocks, function)                                                \
    extern "C" __global__ void __launch_bounds__(threads, blocks) name(const __grid_constant__ Params params) { \
      extern __shared__ __align__(128) unsigned char shared[];                                                  \
      function(params, shared);                                                                                 \
    }

namespace skerry::cuda {

DEVICE uint32_t load_acquire(const uint32_t* p) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}

DEVICE void pause() { __nanosleep(20); }

// 2^x within 2 ulp, below 2^-126 zero.
DEVICE float exp2_approx(float x) {
  float value;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
  return value;
}

DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Four 8x8 matrices of 16-bit elements: lane i names row i % 8 of matrix i / 8 (16 bytes, aligned); register m of lane
// i gets elements (i / 4, 2 (i % 4)) and the one right of it of matrix m. `trans`: of the transposed matrix.
DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
DEVICE void load_matrices_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// 16 bytes from global to shared memory, zeros unless `valid`. It is there for the thread that asked after
// wait_copies, for others after a barrier behind that. Before sm_80 it is a plain copy.
DEVICE void copy_async(void* to, const void* from, bool valid) {
#  if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
#  else
  *static_cast<uint4*>(to) = valid ? *static_cast<const uint4*>(from) : uint4{0, 0, 0, 0};
#  endif
}
DEVICE void commit_copies() {
#  if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#  endif
}
template <int kPending>
DEVICE void wait_copies() {
#  if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#  endif
}

// d[16 x 8] += a[16 x 16] b[16 x 8] in float32. Registers lie as the PTX ISA says of mma.m16n8k16.
DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __half) {
#  if __CUDA_ARCH__ >= 800
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#  else
  for (int half = 0; half < 2; ++half)
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(half ? b1 : b0));
#  endif
}
DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __nv_bfloat16) {
#  if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#  else
  __trap();  // no bfloat16 products before sm_80: plans refuse it
#  endif
}

}  // namespace skerry::cuda
#endif

namespace skerry::cuda {

template <class T>
DEVICE T warp_sum(T value) {
  for (int apart = 16; apart > 0; apart /= 2) value += __shfl_xor_sync(~0u, value, apart);
  return value;
}
template <class T>
DEVICE T warp_max(T value) {
  for (int apart = 16; apart > 0; apart /= 2) {
    const T other = __shfl_xor_sync(~0u, value, apart);
    value = value > other ? value : other;
  }
  return value;
}
// Of this lane and those before it.
template <class T>
DEVICE T warp_inclusive_sum(T value) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int apart = 1; apart < 32; apart *= 2) {
    const T other = __shfl_up_sync(~0u, value, apart);
    if (lane >= apart) value += other;
  }
  return value;
}

DEVICE float to_float(float x) { return x; }
DEVICE float to_float(__half x) { return __half2float(x); }
DEVICE float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
DEVICE void from_float(float x, float& to) { to = x; }
DEVICE void from_float(float x, __half& to) { to = __float2half_rn(x); }
DEVICE void from_float(float x, __nv_bfloat16& to) { to = __float2bfloat16_rn(x); }

}  // namespace skerry::cuda
