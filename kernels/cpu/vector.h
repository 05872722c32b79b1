// Vectors of SKERRY_LANES floats for the files that are compiled once per instruction set. Everything is inlined: see
// attention_tile.cpp for why these files include no C++ library header.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#  include <immintrin.h>
#elif defined(__aarch64__)
#  include <arm_neon.h>
#endif

namespace skerry {
namespace {

constexpr int kLanes = SKERRY_LANES;

typedef float Vec __attribute__((vector_size(SKERRY_LANES * 4), may_alias));
typedef int32_t VecI __attribute__((vector_size(SKERRY_LANES * 4), may_alias));
typedef uint32_t VecU __attribute__((vector_size(SKERRY_LANES * 4), may_alias));
typedef uint8_t Bytes __attribute__((vector_size(SKERRY_LANES * 4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(SKERRY_LANES * 2), may_alias));

#define SKERRY_INLINE [[maybe_unused]] static inline __attribute__((always_inline))

template <class V>
SKERRY_INLINE V load_as(const void* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
SKERRY_INLINE void store(float* p, Vec v) { memcpy(p, &v, sizeof v); }
SKERRY_INLINE Vec splat(float x) { return Vec{} + x; }
SKERRY_INLINE VecI splat(int32_t x) { return VecI{} + x; }

SKERRY_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

SKERRY_INLINE Vec load(const float* p) { return load_as<Vec>(p); }

// IEEE halves, exactly.
SKERRY_INLINE Vec load(const uint16_t* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  // A half's 15 bits in a float's place are 2^-112 of its value, subnormals too; infinities and NaNs get the top
  // exponent.
  const VecU h = __builtin_convertvector(load_as<Halves>(p), VecU);
  const VecU magnitude = (h & 0x7fff) << 13, sign = (h & 0x8000) << 16;
  const Vec scaled = load_as<Vec>(&magnitude) * 5.192296858534828e33f;
  VecU bits = load_as<VecU>(&scaled);
  bits = (magnitude >= 0x0f800000 ? magnitude | 0x7f800000 : bits) | sign;
  return load_as<Vec>(&bits);
#endif
}

// Rounded to nearest, ties to even; what is too large becomes infinite.
SKERRY_INLINE void store_halves(uint16_t* p, Vec x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  const VecU bits = load_as<VecU>(&x), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  const VecU rounded = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;  // normal halves
  const VecU half_ulp = VecU{} + 0x3f000000u;                                             // 0.5: its ulp is 2^-24
  const Vec small = load_as<Vec>(&magnitude) + load_as<Vec>(&half_ulp);                   // subnormal halves
  VecU found = magnitude < 0x38800000 ? load_as<VecU>(&small) - half_ulp : rounded;
  found = found > 0x7c00 ? VecU{} + 0x7c00u : found;
  found = magnitude > 0x7f800000 ? VecU{} + 0x7e00u : found;
  const Halves narrow = __builtin_convertvector(found | sign, Halves);
  memcpy(p, &narrow, sizeof narrow);
#endif
}

// e^x for x <= 0 within 2 ulp (Cephes' expf), 0 below -87; a NaN stays one.
SKERRY_INLINE Vec exp_negative(Vec x) {
  const Vec magic = splat(12582912.0f);
  const Vec clamped = x > -87.0f ? x : splat(-87.0f);
  const Vec n = fma(clamped, splat(1.44269504088896341f), magic) - magic;
  const Vec r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), clamped));
  Vec p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r + 1.0f);
  const VecI bits = (__builtin_convertvector(n, VecI) + 127) << 23;
  p = p * load_as<Vec>(&bits);
  p = x > -87.0f ? p : splat(0.0f);
  return x == x ? p : x;
}

}  // namespace
}  // namespace skerry
