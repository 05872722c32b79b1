// Compiled once per instruction set, under the rules that attention_tile.cpp states: no C++ library header.
//
// Order of arithmetic, the same for every tile: the products of a block are whole numbers, summed exactly; blocks are
// added in order, sum = fma(block, scale of weights * scale of activations, sum), then the minima's term. Lanes are
// output rows, so the width of a register changes nothing.
#include "matmul_block_tile.h"

#include <math.h>

#include "vector.h"

namespace skerry {
namespace {

constexpr int kRows = 16, kBlockSize = 32, kGroups = 8;  // of a panel, of a block, of 4 codes in a block
constexpr int kParts = kRows / kLanes;
constexpr int kTokens = SKERRY_LANES == 16 ? 16 : 4;
constexpr int kAhead = 5120;  // bytes fetched ahead: few rows wait for memory, and many hardly notice

enum Format { kQ8_0, kQ4_0, kQ4_1 };

// NEON multiplies signed bytes by signed ones, x86 unsigned by signed.
#if defined(__aarch64__)
constexpr bool kSigned = true;
#else
constexpr bool kSigned = false;
#endif

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

// The codes of one block for one register's rows: unsigned bytes, or Q8_0's less 128 if kSigned.
template <Format F>
SKERRY_INLINE void unpack(const uint8_t* codes, Bytes* w) {
  constexpr int stride = kRows * 4;
  if constexpr (F == kQ8_0) {
    constexpr uint8_t offset = kSigned ? 128 : 0;
    for (int g = 0; g < kGroups; ++g) w[g] = load_as<Bytes>(codes + g * stride) ^ offset;
  } else {
    for (int g = 0; g < kGroups / 2; ++g) {
      const Bytes both = load_as<Bytes>(codes + g * stride);
      w[g] = both & 15;
      w[g + kGroups / 2] = both >> 4;
    }
  }
}

// A tile of T tokens against `P` registers of rows from `part`.
template <Format F, int T, int P>
SKERRY_INLINE void strip(const uint8_t* scales, const uint8_t* codes, int64_t blocks, const ActivationTile& tile,
                         int part, float* out) {
  constexpr int shift = F == kQ8_0 ? 7 : 3;  // the offset of the codes: 128, or 8
  constexpr bool centred = F == kQ4_1 || (F == kQ8_0 && kSigned);
  constexpr int64_t code_stride = kRows * kBlockSize / (F == kQ8_0 ? 1 : 2);
  const uint16_t* scale = (const uint16_t*)scales + part * kLanes;
  const uint16_t* minimum = scale + blocks * kRows;
  Vec sum[P][T] = {};
  for (int64_t b = 0; b < blocks; ++b) {
    const int8_t* a = tile.codes + b * T * kBlockSize;
    for (int64_t line = 0; line < code_stride; line += 64) __builtin_prefetch(codes + kAhead + line);
    for (int p = 0; p < P; ++p) {
      Bytes w[kGroups];
      unpack<F>(codes + (part + p) * kLanes * 4, w);
      const Vec d = load(scale + b * kRows + p * kLanes);
      for (int t = 0; t < T; ++t) {
        VecI acc = centred ? VecI{} : splat(tile.sum[b * T + t]) << shift;
        for (int g = 0; g < kGroups; ++g) acc = dot4(acc, w[g], load_as<int32_t>(a + t * kBlockSize + 4 * g));
        sum[p][t] = fma(__builtin_convertvector(acc, Vec), d * tile.scale[b * T + t], sum[p][t]);
        if constexpr (F == kQ4_1) {
          const Vec m = load(minimum + b * kRows + p * kLanes);
          sum[p][t] = fma(m, splat(tile.weighted[b * T + t]), sum[p][t]);
        }
      }
    }
    codes += code_stride;
  }
  for (int t = 0; t < T; ++t) {
    for (int p = 0; p < P; ++p) memcpy(out + t * kRows + (part + p) * kLanes, &sum[p][t], sizeof(Vec));
  }
}

template <Format F, int T>
void panel_of(const uint8_t* panel, int64_t blocks, const ActivationTile& tile, float* out) {
  const int64_t halves = blocks * kRows * (F == kQ4_1 ? 2 : 1);
  const uint8_t* codes = panel + (2 * halves + 63) / 64 * 64;
  if constexpr (T == 1) {
    strip<F, T, kParts>(panel, codes, blocks, tile, 0, out);
  } else {
    for (int part = 0; part < kParts; ++part) strip<F, T, 1>(panel, codes, blocks, tile, part, out);
  }
}

typedef void (*PanelFunction)(const uint8_t*, int64_t, const ActivationTile&, float*);

#define SKERRY_FOUR(F, T) panel_of<F, T>, panel_of<F, T + 1>, panel_of<F, T + 2>, panel_of<F, T + 3>
#if SKERRY_LANES == 16
#  define SKERRY_COUNTS(F) {SKERRY_FOUR(F, 1), SKERRY_FOUR(F, 5), SKERRY_FOUR(F, 9), SKERRY_FOUR(F, 13)}
#else
#  define SKERRY_COUNTS(F) {SKERRY_FOUR(F, 1)}
#endif
constexpr PanelFunction kPanels[3][kTokens] = {SKERRY_COUNTS(kQ8_0), SKERRY_COUNTS(kQ4_0), SKERRY_COUNTS(kQ4_1)};

void panel(const uint8_t* panel, int format, int64_t blocks, const ActivationTile& tile, float* out) {
  kPanels[format][tile.count - 1](panel, blocks, tile, out);
}

// Sixteen lanes by index, then the lanes in order.
SKERRY_INLINE float sum_of_squares(const float* x, int64_t n) {
  Vec sum[kParts] = {};
  for (int64_t i = 0; i < n; i += kRows) {
    for (int p = 0; p < kParts; ++p) {
      const Vec v = load_as<Vec>(x + i + p * kLanes);
      sum[p] = fma(v, v, sum[p]);
    }
  }
  float lanes[kRows], total = 0.0f;
  memcpy(lanes, sum, sizeof lanes);
  for (int i = 0; i < kRows; ++i) total += lanes[i];
  return total;
}

void quantize(const float* x, const float* norm, float epsilon, int64_t blocks, const ActivationTile& tile, int at) {
  const int64_t width = blocks * kBlockSize;
  const float inverse_rms =
      norm == nullptr ? 1.0f : 1.0f / sqrtf(sum_of_squares(x, width) / static_cast<float>(width) + epsilon);
  for (int64_t b = 0; b < blocks; ++b) {
    constexpr int vectors = kBlockSize / kLanes;
    Vec v[vectors];
    VecI top = {};
    for (int i = 0; i < vectors; ++i) {
      v[i] = load_as<Vec>(x + b * kBlockSize + i * kLanes);
      if (norm != nullptr) v[i] = v[i] * inverse_rms * load_as<Vec>(norm + b * kBlockSize + i * kLanes);
      const VecI magnitude = load_as<VecI>(&v[i]) & 0x7fffffff;  // NaN is above all of them, and so shows
      top = magnitude > top ? magnitude : top;
    }
    int32_t lanes[kLanes], most = 0;
    memcpy(lanes, &top, sizeof lanes);
    for (int i = 0; i < kLanes; ++i) most = lanes[i] > most ? lanes[i] : most;
    float largest;
    memcpy(&largest, &most, sizeof largest);
    const bool nothing = largest < 1e-30f;  // its inverse would overflow
    const float inverse = nothing ? 0.0f : 127.0f / largest;
    int8_t* codes = tile.codes + (b * tile.count + at) * kBlockSize;
    VecI total = {};
    for (int i = 0; i < vectors; ++i) {
      const Vec magic = splat(12582912.0f);  // rounds to the nearest, ties to even
      const VecI q = __builtin_convertvector((v[i] * inverse + magic) - magic, VecI);
      total += q;
      typedef int8_t Codes __attribute__((vector_size(kLanes)));
      const Codes narrow = __builtin_convertvector(q, Codes);
      memcpy(codes + i * kLanes, &narrow, sizeof narrow);
    }
    memcpy(lanes, &total, sizeof lanes);
    int32_t sum = 0;
    for (int i = 0; i < kLanes; ++i) sum += lanes[i];
    const float scale = nothing ? 0.0f : largest / 127.0f;
    tile.scale[b * tile.count + at] = scale;
    tile.sum[b * tile.count + at] = -sum;
    tile.weighted[b * tile.count + at] = scale * static_cast<float>(sum);
  }
}

SKERRY_INLINE Vec sigmoid(Vec x) {
  const Vec e = exp_negative(x < 0.0f ? x : -x);
  return (x < 0.0f ? e : splat(1.0f)) / (1.0f + e);
}

// Both activations are x times a sigmoid: silu of x itself, and gelu_tanh of 2 sqrt(2 / pi) (x + 0.044715 x^3), because
// (1 + tanh(u)) / 2 = sigmoid(2 u).
void gate(int activation, float* first, const float* second, int n) {
  for (int i = 0; i < n; i += kLanes) {
    const Vec x = load_as<Vec>(first + i);
    const Vec at = activation == 2 ? 1.5957691216057308f * (x * fma(0.044715f * x, x, splat(1.0f))) : x;
    const Vec y = x * sigmoid(at) * load_as<Vec>(second + i);
    memcpy(first + i, &y, sizeof y);
  }
}

}  // namespace

#define SKERRY_STRING_(x) #x
#define SKERRY_STRING(x) SKERRY_STRING_(x)
extern const MatMulBlockIsa SKERRY_MATMUL_TABLE = {SKERRY_STRING(SKERRY_ISA_NAME), kTokens, quantize, panel, gate};

}  // namespace skerry
