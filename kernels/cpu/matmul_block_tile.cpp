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

constexpr int kRows = 16, kGroups = 8;  // of a panel, of 4 codes in a block
constexpr int kParts = kRows / kLanes;
constexpr int kTokens = SKERRY_LANES == 16 ? 16 : 4;
constexpr int kAhead = 5120;  // bytes fetched ahead: few rows wait for memory, and many hardly notice

enum Format { kQ8_0, kQ4_0, kQ4_1 };

// The codes of one block for one register's rows: unsigned bytes, or Q8_0's less 128 if kSigned.
template <Format F>
SKERRY_INLINE void unpack(const uint8_t* codes, Bytes* w) {
  constexpr int stride = kRows * 4;
  if constexpr (F == kQ8_0) {
    for (int g = 0; g < kGroups; ++g) w[g] = load_codes(codes + g * stride);
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
    Vec v[kBlockVectors];
    for (int i = 0; i < kBlockVectors; ++i) {
      v[i] = load_as<Vec>(x + b * kBlockSize + i * kLanes);
      if (norm != nullptr) v[i] = v[i] * inverse_rms * load_as<Vec>(norm + b * kBlockSize + i * kLanes);
    }
    int32_t sum;
    const float scale = round_block(v, tile.codes + (b * tile.count + at) * kBlockSize, &sum);
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
