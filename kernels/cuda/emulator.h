// CUDA's names for a host compiler, for tests: each thread of a block is a fiber, and the fibers run in an order drawn
// from a seed, each until it waits. Kernels that lack a barrier give other results for other seeds, shared memory
// begins as NaNs, asynchronous copies arrive when they are waited for and not before, and what would hang is an error
// that says who waits where. Warp instructions are done once all lanes have come, register by register as the PTX ISA
// lays them out. It shows that a kernel is right; of its speed it says nothing.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "../include/launch.h"

#define DEVICE inline
#define SKERRY_KERNEL(name, Params, threads, blocks, function) \
  static const ::skerry::emulator::Kernel kernel_##name(       \
      #name, sizeof(Params), threads,                          \
      [](const void* params, unsigned char* shared) { function(*static_cast<const Params*>(params), shared); });

namespace skerry::emulator {

struct Index {
  unsigned x, y, z;
};

inline constexpr int kWarp = 32;
inline constexpr int kLaneBytes = 64;  // of what a lane brings to an instruction, and of what it takes away

// A kernel by its name; made by SKERRY_KERNEL before main.
struct Kernel {
  using Body = void (*)(const void* params, unsigned char* shared);
  Kernel(const char* name, size_t params, unsigned threads, Body body);
  size_t params;
  unsigned threads;
  Body body;
};
const std::map<std::string, Kernel>& kernels();

// Runs one launch to its end. Empty, or what went wrong: an unknown kernel, threads that wait for ever, a warp whose
// lanes meet in different instructions, writes past the shared memory.
std::string run(const Launch& launch, uint64_t seed);

struct Warp {
  const char* doing = nullptr;  // the instruction in which its lanes meet
  int arrived = 0;
  std::vector<int> waiting;  // fibers
  alignas(16) unsigned char in[kWarp][kLaneBytes];
  alignas(16) unsigned char out[kWarp][kLaneBytes];
};

// Of the thread that runs.
const Index& thread_index();
const Index& block_index();
const Index& block_size();
const Index& grid_size();
void sync_block();
void yield();
[[noreturn]] void fail(const std::string& why);
Warp& arrive(const char* instruction, const void* in, size_t bytes, const std::function<void(Warp&)>& perform);
int lane();

// An instruction of a warp: each lane brings an In, the last one to come performs it for all, each takes an Out.
template <class Out, class In, class Perform>
Out together(const char* instruction, const In& in, const Perform& perform) {
  static_assert(sizeof(In) <= kLaneBytes && sizeof(Out) <= kLaneBytes);
  Warp& warp = arrive(instruction, &in, sizeof(In), [&](Warp& w) {
    In all[kWarp];
    Out found[kWarp];
    for (int i = 0; i < kWarp; ++i) std::memcpy(&all[i], w.in[i], sizeof(In));
    perform(all, found);
    for (int i = 0; i < kWarp; ++i) std::memcpy(w.out[i], &found[i], sizeof(Out));
  });
  Out mine;
  std::memcpy(&mine, warp.out[lane()], sizeof(Out));
  return mine;
}

template <class T>
T shuffle(const char* name, unsigned mask, T value, int from) {
  if (mask != ~0u) fail(std::string(name) + " with some lanes only: not done here");
  struct In {
    T value;
    int from;
  };
  return together<T>(name, In{value, from}, [](const In* in, T* out) {
    for (int i = 0; i < kWarp; ++i) out[i] = in[in[i].from & (kWarp - 1)].value;
  });
}

void copy_later(void* to, const void* from, bool valid);
void close_group();
void finish_groups(size_t pending);

struct Matrices {
  uint32_t r[4];
};
Matrices load_matrices(const void* row, bool trans);
struct Tile {
  float d[4];
};
Tile multiply(const Tile& d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float (*widen)(uint16_t));

}  // namespace skerry::emulator

#define threadIdx (::skerry::emulator::thread_index())
#define blockIdx (::skerry::emulator::block_index())
#define blockDim (::skerry::emulator::block_size())
#define gridDim (::skerry::emulator::grid_size())

inline void __syncthreads() { skerry::emulator::sync_block(); }
inline void __syncwarp(unsigned = ~0u) {
  skerry::emulator::together<int>("__syncwarp", 0,
                                  [](const int*, int* out) { std::fill_n(out, skerry::emulator::kWarp, 0); });
}
inline void __threadfence() {}
inline void __threadfence_block() {}
[[noreturn]] inline void __trap() { skerry::emulator::fail("__trap"); }

template <class T>
T __shfl_sync(unsigned mask, T value, int from) {
  return skerry::emulator::shuffle("__shfl_sync", mask, value, from);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int apart) {
  return skerry::emulator::shuffle("__shfl_xor_sync", mask, value, skerry::emulator::lane() ^ apart);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned apart) {
  const int lane = skerry::emulator::lane(), from = lane - static_cast<int>(apart);
  return skerry::emulator::shuffle("__shfl_up_sync", mask, value, from < 0 ? lane : from);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned apart) {
  const int lane = skerry::emulator::lane(), from = lane + static_cast<int>(apart);
  return skerry::emulator::shuffle("__shfl_down_sync", mask, value, from >= skerry::emulator::kWarp ? lane : from);
}
inline unsigned __ballot_sync(unsigned mask, bool vote) {
  if (mask != ~0u) skerry::emulator::fail("__ballot_sync with some lanes only: not done here");
  return skerry::emulator::together<unsigned>("__ballot_sync", vote, [](const bool* in, unsigned* out) {
    unsigned votes = 0;
    for (int i = 0; i < skerry::emulator::kWarp; ++i) votes |= static_cast<unsigned>(in[i]) << i;
    std::fill_n(out, skerry::emulator::kWarp, votes);
  });
}
inline bool __any_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) != 0; }
inline bool __all_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) == ~0u; }

// Fibers run one at a time, so these are atomic as they stand; another thread may come in after each.
template <class T, class V, class F>
T skerry_exchange(T* at, V value, F change) {
  const T before = *at;
  *at = change(before, static_cast<T>(value));
  skerry::emulator::yield();
  return before;
}
template <class T, class V>
T atomicAdd(T* at, V value) {
  return skerry_exchange(at, value, [](T a, T b) { return static_cast<T>(a + b); });
}
template <class T, class V>
T atomicMax(T* at, V value) {
  return skerry_exchange(at, value, [](T a, T b) { return std::max(a, b); });
}
template <class T, class V>
T atomicMin(T* at, V value) {
  return skerry_exchange(at, value, [](T a, T b) { return std::min(a, b); });
}
template <class T, class V>
T atomicOr(T* at, V value) {
  return skerry_exchange(at, value, [](T a, T b) { return static_cast<T>(a | b); });
}
template <class T, class V>
T atomicExch(T* at, V value) {
  return skerry_exchange(at, value, [](T, T b) { return b; });
}

inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(uint32_t x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return std::exp(x); }
template <class T>
T __ldg(const T* at) {
  return *at;
}
using std::max;
using std::min;

namespace skerry::cuda {

DEVICE uint32_t load_acquire(const uint32_t* p) {
  emulator::yield();
  return *p;
}
DEVICE void pause() { emulator::yield(); }
DEVICE float exp2_approx(float x) { return std::exp2(x); }
DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  std::memcpy(r, emulator::load_matrices(row, false).r, sizeof r);
}
DEVICE void load_matrices_trans(uint32_t (&r)[4], const void* row) {
  std::memcpy(r, emulator::load_matrices(row, true).r, sizeof r);
}
DEVICE void copy_async(void* to, const void* from, bool valid) { emulator::copy_later(to, from, valid); }
DEVICE void commit_copies() { emulator::close_group(); }
template <int kPending>
DEVICE void wait_copies() {
  emulator::finish_groups(kPending);
}
DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __half) {
  const auto widen = [](uint16_t bits) { return __half2float(std::bit_cast<__half>(bits)); };
  std::memcpy(d, emulator::multiply(std::bit_cast<emulator::Tile>(d), a, b0, b1, widen).d, sizeof d);
}
DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __nv_bfloat16) {
  const auto widen = [](uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); };
  std::memcpy(d, emulator::multiply(std::bit_cast<emulator::Tile>(d), a, b0, b1, widen).d, sizeof d);
}

}  // namespace skerry::cuda
