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

// Whole numbers of 8 bits.
template <class Byte>
SKERRY_INLINE Vec load_bytes(const uint8_t* p) {
  typedef Byte Narrow __attribute__((vector_size(kLanes)));
  return __builtin_convertvector(__builtin_convertvector(load_as<Narrow>(p), VecI), Vec);
}

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

// The same within 3e-7 where it is above 2^-14, which is what is left of weights that are rounded to 14 bits.
SKERRY_INLINE Vec exp_of_weight(Vec x) {
  const Vec magic = splat(12582912.0f);
  const Vec clamped = x < -87.0f ? splat(-87.0f) : x;
  const Vec n = fma(clamped, splat(1.44269504088896341f), magic) - magic;
  const Vec r = fma(n, splat(-0.693147180559945309f), clamped);
  Vec p = splat(0.00829027221f);
  p = fma(p, r, splat(0.0418981612f));
  p = fma(p, r, splat(0.166676387f));
  p = fma(p, r, splat(0.499991477f));
  p = fma(p, r, splat(0.999999702f));
  p = fma(p, r, splat(1.0f));
  const VecI bits = (__builtin_convertvector(n, VecI) + 127) << 23;
  p = p * load_as<Vec>(&bits);
  return x < -87.0f ? splat(0.0f) : p;
}

// NEON multiplies signed bytes by signed ones, x86 unsigned by signed.
#if defined(__aarch64__)
constexpr bool kSigned = true;
#else
constexpr bool kSigned = false;
#endif
constexpr int kOffset = 128;  // of 8-bit codes that are stored as unsigned bytes

// acc + sum over 4 of w[4 i + j] * a[j] in every lane i, exactly; w unsigned (signed if kSigned), a four signed bytes.
SKERRY_INLINE VecI dot4(VecI acc, Bytes w, int32_t a) {
#if defined(__AVX512VNNI__)
  return (VecI)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, _mm512_set1_epi32(a));
#elif defined(__AVXVNNI__)
  return (VecI)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)w, _mm256_set1_epi32(a));
#elif defined(__AVX512BW__)
  // Bytes 0 and 2 of each lane, then 1 and 3, as 16-bit pairs: products and their sums fit 32 bits.
  const __m512i x = _mm512_set1_epi32(a), even = _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8);
  const __m512i low = _mm512_and_si512((__m512i)w, _mm512_set1_epi16(255));
  const __m512i one = _mm512_madd_epi16(low, even);
  const __m512i two = _mm512_madd_epi16(_mm512_srli_epi16((__m512i)w, 8), _mm512_srai_epi16(x, 8));
  return acc + (VecI)_mm512_add_epi32(one, two);
#elif defined(__AVX2__)
  const __m256i x = _mm256_set1_epi32(a), even = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8);
  const __m256i low = _mm256_and_si256((__m256i)w, _mm256_set1_epi16(255));
  const __m256i one = _mm256_madd_epi16(low, even);
  const __m256i two = _mm256_madd_epi16(_mm256_srli_epi16((__m256i)w, 8), _mm256_srai_epi16(x, 8));
  return acc + (VecI)_mm256_add_epi32(one, two);
#elif defined(__SSE2__)
  const __m128i x = _mm_set1_epi32(a), even = _mm_srai_epi16(_mm_slli_epi16(x, 8), 8);
  const __m128i low = _mm_and_si128((__m128i)w, _mm_set1_epi16(255));
  const __m128i one = _mm_madd_epi16(low, even);
  const __m128i two = _mm_madd_epi16(_mm_srli_epi16((__m128i)w, 8), _mm_srai_epi16(x, 8));
  return acc + (VecI)_mm_add_epi32(one, two);
#elif defined(__ARM_FEATURE_DOTPROD)
  return (VecI)vdotq_s32((int32x4_t)acc, (int8x16_t)w, (int8x16_t)vdupq_n_s32(a));
#elif defined(__aarch64__)
  // Products of signed bytes fit 16 bits; pairs of them are widened, then pairs of pairs are added.
  const int8x8_t x = vreinterpret_s8_s32(vdup_n_s32(a));
  const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8((int8x16_t)w), x));
  const int32x4_t high = vpaddlq_s16(vmull_s8(vget_high_s8((int8x16_t)w), x));
  return acc + (VecI)vpaddq_s32(low, high);
#else
  int8_t code[4];
  memcpy(code, &a, 4);
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < 4; ++j) acc[i] += int32_t{w[4 * i + j]} * code[j];
  }
  return acc;
#endif
}

// A register's worth of codes that are stored as unsigned bytes, as dot4 wants them.
SKERRY_INLINE Bytes load_codes(const uint8_t* p) {
  constexpr uint8_t flip = kSigned ? kOffset : 0;
  return load_as<Bytes>(p) ^ flip;
}

SKERRY_INLINE int32_t sum_of_lanes(VecI x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_epi32((__m512i)x);
#else
  int32_t lanes[kLanes], sum = 0;
  memcpy(lanes, &x, sizeof lanes);
  for (int i = 0; i < kLanes; ++i) sum += lanes[i];
  return sum;
#endif
}

// The largest of floats that are not negative, by their bits: a NaN is above all of them, and so shows.
SKERRY_INLINE float largest_of_lanes(VecI bits) {
#if defined(__AVX512F__)
  const int32_t most = _mm512_reduce_max_epi32((__m512i)bits);
#else
  int32_t lanes[kLanes], most = 0;
  memcpy(lanes, &bits, sizeof lanes);
  for (int i = 0; i < kLanes; ++i) most = lanes[i] > most ? lanes[i] : most;
#endif
  float largest;
  memcpy(&largest, &most, sizeof largest);
  return largest;
}

constexpr int kBlockSize = 32;
constexpr int kBlockVectors = kBlockSize / kLanes;

// A block of 32 floats becomes signed bytes: codes[i] = round(x[i] / scale), to even, with the largest magnitude at
// 127. Returns the scale, 0 for a block that is nothing; where there is a NaN or an infinity it shows in the scale.
// `sums`: of all codes and of the first 16.
SKERRY_INLINE float round_block(const Vec* x, int8_t* codes, int32_t* sums) {
  VecI top = {};
  for (int i = 0; i < kBlockVectors; ++i) {
    const VecI magnitude = load_as<VecI>(&x[i]) & 0x7fffffff;  // NaN is above all of them, and so shows
    top = magnitude > top ? magnitude : top;
  }
  const float largest = largest_of_lanes(top);
  const bool nothing = largest < 1e-30f;  // its inverse would overflow
  const float inverse = nothing ? 0.0f : 127.0f / largest;
  VecI total[2] = {};  // of each half
  for (int i = 0; i < kBlockVectors; ++i) {
    const Vec magic = splat(12582912.0f);  // rounds to the nearest, ties to even
    const VecI q = __builtin_convertvector((x[i] * inverse + magic) - magic, VecI);
    total[2 * i / kBlockVectors] += q;
    typedef int8_t Codes __attribute__((vector_size(kLanes)));
    const Codes narrow = __builtin_convertvector(q, Codes);
    memcpy(codes + i * kLanes, &narrow, sizeof narrow);
  }
  sums[1] = sum_of_lanes(total[0]);
  sums[0] = sums[1] + sum_of_lanes(total[1]);
  return nothing ? 0.0f : largest / 127.0f;
}

}  // namespace
}  // namespace skerry
