// Compiled once per instruction set, under the rules that attention_tile.cpp states: no C++ library header.
//
// Order of arithmetic, the same for every tile: the products of a block are whole numbers, summed exactly; blocks are
// added in order, sum = fma(block, scale of weights * scale of activations, sum), then the minima's term. Lanes are
// output rows, so the width of a register changes nothing. Those of an adapter's down are k mod 16, added as a tree;
// those of its up are output rows again.
#include "matmul_block_tile.h"

#include <math.h>

#include "vector.h"

namespace skerry {
namespace {

constexpr int kRows = 16, kGroups = 8;  // of a panel, of 4 codes in a block
constexpr int kParts = kRows / kLanes;
constexpr int kTokens = SKERRY_LANES == 16 ? 16 : 4;
constexpr int kAhead = 5120;  // bytes fetched ahead: few rows wait for memory, and many hardly notice

enum Format { kQ8_0, kQ4_0, kQ4_1, kQ5_0, kQ5_1, kQ4_K, kQ5_K, kQ6_K };

// include/matmul_block.h says the same in words that this file may not include.
constexpr int kBits[] = {8, 4, 4, 5, 5, 4, 5, 6};
constexpr int kShift[] = {7, 3, 0, 4, 0, 0, 0, 5};  // an offset is a power of two; 0: none
constexpr bool has_minima(Format f) { return kShift[f] == 0; }
constexpr bool has_steps(Format f) { return f >= kQ4_K; }
constexpr int kSuper = 8;

// The codes of one block for one register's rows: unsigned bytes, or Q8_0's less 128 if kSigned.
template <Format F>
SKERRY_INLINE void unpack(const uint8_t* codes, Bytes* w) {
  constexpr int stride = kRows * 4, half = kGroups / 2;
  if constexpr (F == kQ8_0) {
    for (int g = 0; g < kGroups; ++g) w[g] = load_codes(codes + g * stride);
    return;
  }
  for (int g = 0; g < half; ++g) {
    const Bytes both = load_as<Bytes>(codes + g * stride);
    w[g] = both & 15;
    w[g + half] = both >> 4;
  }
  if constexpr (kBits[F] == 5) {
    const Bytes fifth = load_as<Bytes>(codes + half * stride);
    for (int g = 0; g < half; ++g) w[g] |= (fifth << (half - g)) & 16;
    for (int g = half; g < kGroups; ++g) w[g] |= (fifth >> (g - half)) & 16;
  } else if constexpr (kBits[F] == 6) {
    for (int h = 0; h < 2; ++h) {
      const Bytes top = load_as<Bytes>(codes + (half + h) * stride);
      w[half * h] |= (top << 4) & 48;
      w[half * h + 1] |= (top << 2) & 48;
      w[half * h + 2] |= top & 48;
      w[half * h + 3] |= (top >> 2) & 48;
    }
  }
}

// What a panel says of its rows besides codes.
struct Head {
  const uint16_t* scale;    // [blocks or blocks / 8][16]
  const uint16_t* minimum;  // likewise
  const uint8_t* step;      // [blocks][2][16]
};

template <Format F>
SKERRY_INLINE Head head_of(const uint8_t* panel, int64_t blocks, int64_t* bytes) {
  const int64_t halves = (has_steps(F) ? blocks / kSuper : blocks) * kRows;
  const auto* scale = (const uint16_t*)panel;
  const Head head{scale, scale + halves, (const uint8_t*)(scale + halves * (has_minima(F) ? 2 : 1))};
  *bytes = (2 * halves * (has_minima(F) ? 2 : 1) + (has_steps(F) ? 2 * blocks * kRows : 0) + 63) / 64 * 64;
  return head;
}

// One register's scale of block `b` (of its first half for Q6_K) and, in `other`, its minimum or second half's scale.
template <Format F>
SKERRY_INLINE Vec scale_of(const Head& head, int64_t b, int lane, Vec* other) {
  const int64_t at = (has_steps(F) ? b / kSuper : b) * kRows + lane;
  const Vec d = load(head.scale + at);
  if constexpr (!has_steps(F)) {
    if constexpr (has_minima(F)) *other = load(head.minimum + at);
    return d;
  }
  const uint8_t* step = head.step + 2 * b * kRows + lane;
  if constexpr (F == kQ6_K) {
    *other = d * load_bytes<int8_t>(step + kRows);
    return d * load_bytes<int8_t>(step);
  }
  *other = -load(head.minimum + at) * load_bytes<uint8_t>(step + kRows);
  return d * load_bytes<uint8_t>(step);
}

// A tile of T tokens against `P` registers of rows from `part`.
template <Format F, int T, int P>
SKERRY_INLINE void strip(const uint8_t* panel, int64_t blocks, const ActivationTile& tile, int part, float* out) {
  constexpr bool centred = has_minima(F) || (F == kQ8_0 && kSigned);
  constexpr int64_t code_stride = kRows * kBlockSize * kBits[F] / 8;
  int64_t bytes;
  const Head head = head_of<F>(panel, blocks, &bytes);
  const uint8_t* codes = panel + bytes;
  Vec sum[P][T] = {};
  for (int64_t b = 0; b < blocks; ++b) {
    const int8_t* a = tile.codes + b * T * kBlockSize;
    for (int64_t line = 0; line < code_stride; line += 64) __builtin_prefetch(codes + kAhead + line);
    for (int p = 0; p < P; ++p) {
      Bytes w[kGroups];
      unpack<F>(codes + (part + p) * kLanes * 4, w);
      Vec other;
      const Vec d = scale_of<F>(head, b, (part + p) * kLanes, &other);
      for (int t = 0; t < T; ++t) {
        const auto dot = [&](int first, int last, int32_t sum_of_codes) {
          VecI acc = centred ? VecI{} : splat(sum_of_codes) << kShift[F];
          for (int g = first; g < last; ++g) acc = dot4(acc, w[g], load_as<int32_t>(a + t * kBlockSize + 4 * g));
          return __builtin_convertvector(acc, Vec);
        };
        const int64_t at = b * T + t;
        const float scale = tile.scale[at];
        if constexpr (F == kQ6_K) {
          const int32_t half = tile.half[at];
          sum[p][t] = fma(dot(0, kGroups / 2, half), d * scale, sum[p][t]);
          sum[p][t] = fma(dot(kGroups / 2, kGroups, tile.sum[at] - half), other * scale, sum[p][t]);
        } else {
          sum[p][t] = fma(dot(0, kGroups, tile.sum[at]), d * scale, sum[p][t]);
          if constexpr (has_minima(F)) sum[p][t] = fma(other, splat(tile.weighted[at]), sum[p][t]);
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
  if constexpr (T == 1) {
    strip<F, T, kParts>(panel, blocks, tile, 0, out);
  } else {
    for (int part = 0; part < kParts; ++part) strip<F, T, 1>(panel, blocks, tile, part, out);
  }
}

typedef void (*PanelFunction)(const uint8_t*, int64_t, const ActivationTile&, float*);

#define SKERRY_FOUR(F, T) panel_of<F, T>, panel_of<F, T + 1>, panel_of<F, T + 2>, panel_of<F, T + 3>
#if SKERRY_LANES == 16
#  define SKERRY_COUNTS(F) {SKERRY_FOUR(F, 1), SKERRY_FOUR(F, 5), SKERRY_FOUR(F, 9), SKERRY_FOUR(F, 13)}
#else
#  define SKERRY_COUNTS(F) {SKERRY_FOUR(F, 1)}
#endif
constexpr PanelFunction kPanels[8][kTokens] = {SKERRY_COUNTS(kQ8_0), SKERRY_COUNTS(kQ4_0), SKERRY_COUNTS(kQ4_1),
                                               SKERRY_COUNTS(kQ5_0), SKERRY_COUNTS(kQ5_1), SKERRY_COUNTS(kQ4_K),
                                               SKERRY_COUNTS(kQ5_K), SKERRY_COUNTS(kQ6_K)};

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

SKERRY_INLINE float inverse_rms_of(const float* x, float epsilon, int64_t width) {
  return 1.0f / sqrtf(sum_of_squares(x, width) / static_cast<float>(width) + epsilon);
}

void quantize(const float* x, const float* norm, float epsilon, int64_t blocks, const ActivationTile& tile, int at) {
  const int64_t width = blocks * kBlockSize;
  const float inverse_rms = norm == nullptr ? 1.0f : inverse_rms_of(x, epsilon, width);
  for (int64_t b = 0; b < blocks; ++b) {
    Vec v[kBlockVectors];
    for (int i = 0; i < kBlockVectors; ++i) {
      v[i] = load_as<Vec>(x + b * kBlockSize + i * kLanes);
      if (norm != nullptr) v[i] = v[i] * inverse_rms * load_as<Vec>(norm + b * kBlockSize + i * kLanes);
    }
    const int64_t place = b * tile.count + at;
    int32_t sums[2];
    const float scale = round_block(v, tile.codes + place * kBlockSize, sums);
    tile.scale[place] = scale;
    tile.sum[place] = -sums[0];
    tile.half[place] = -sums[1];
    tile.weighted[place] = scale * static_cast<float>(sums[0]);
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

void normalize(const float* x, const float* norm, float epsilon, int64_t width, float* out) {
  const float inverse_rms = inverse_rms_of(x, epsilon, width);
  for (int64_t i = 0; i < width; i += kLanes) store(out + i, load(x + i) * inverse_rms * load(norm + i));
}

// Lanes i and i + 8, then 4, 2 and 1 apart.
SKERRY_INLINE float tree_of_lanes(const Vec* sum) {
  float lanes[kRows];
  memcpy(lanes, sum, sizeof lanes);
  for (int half = kRows / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// R rows against T tokens: that many sums are under way at once.
template <int R, int T>
SKERRY_INLINE void down_of(const uint16_t* down, int64_t columns, const float* x, int64_t width, float* out,
                           int64_t stride) {
  Vec sum[R][T][kParts] = {};
  for (int64_t k = 0; k < width; k += kRows) {
    for (int p = 0; p < kParts; ++p) {
      const int64_t at = k + p * kLanes;
      Vec v[T];
      for (int t = 0; t < T; ++t) v[t] = load(x + t * width + at);
      for (int r = 0; r < R; ++r) {
        const Vec w = load(down + r * columns + at);
        for (int t = 0; t < T; ++t) sum[r][t][p] = fma(w, v[t], sum[r][t][p]);
      }
    }
  }
  for (int t = 0; t < T; ++t) {
    for (int r = 0; r < R; ++r) out[t * stride + r] = tree_of_lanes(sum[r][t]);
  }
}

constexpr int kAdapterRows = 4, kAdapterTokens = SKERRY_LANES == 16 ? 4 : 1;

template <int T>
SKERRY_INLINE void down_rows(const uint16_t* down, int64_t columns, int rank, const float* x, int64_t width, float* out,
                             int64_t stride) {
  int r = 0;
  for (; r + kAdapterRows <= rank; r += kAdapterRows) {
    down_of<kAdapterRows, T>(down + r * columns, columns, x, width, out + r, stride);
  }
  for (; r < rank; ++r) down_of<1, T>(down + r * columns, columns, x, width, out + r, stride);
}

void down(const uint16_t* down, int64_t columns, int rank, const float* x, int64_t width, int tokens, float* out,
          int64_t stride) {
  int t = 0;
  for (; t + kAdapterTokens <= tokens; t += kAdapterTokens) {
    down_rows<kAdapterTokens>(down, columns, rank, x + t * width, width, out + t * stride, stride);
  }
  for (; t < tokens; ++t) down_rows<1>(down, columns, rank, x + t * width, width, out + t * stride, stride);
}

template <int T>
SKERRY_INLINE void up_of(const uint16_t* up, int64_t columns, int rank, int rows, const float* inner, int64_t stride,
                         float* out) {
  Vec sum[T][kParts] = {};
  for (int r = 0; r < rank; ++r) {
    uint16_t edge[kRows] = {};
    const uint16_t* from = up + r * columns;
    if (rows < kRows) from = (const uint16_t*)memcpy(edge, from, rows * sizeof *from);
    for (int p = 0; p < kParts; ++p) {
      const Vec w = load(from + p * kLanes);
      for (int t = 0; t < T; ++t) sum[t][p] = fma(splat(inner[t * stride + r]), w, sum[t][p]);
    }
  }
  for (int t = 0; t < T; ++t) {
    for (int p = 0; p < kParts; ++p) {
      float* at = out + t * kRows + p * kLanes;
      store(at, load(at) + sum[t][p]);
    }
  }
}

void up(const uint16_t* up, int64_t columns, int rank, int rows, const float* inner, int64_t stride, int tokens,
        float* out) {
  int t = 0;
  for (; t + kAdapterTokens <= tokens; t += kAdapterTokens) {
    up_of<kAdapterTokens>(up, columns, rank, rows, inner + t * stride, stride, out + t * kRows);
  }
  for (; t < tokens; ++t) up_of<1>(up, columns, rank, rows, inner + t * stride, stride, out + t * kRows);
}

}  // namespace

#define SKERRY_STRING_(x) #x
#define SKERRY_STRING(x) SKERRY_STRING_(x)
extern const MatMulBlockIsa SKERRY_MATMUL_TABLE = {
    SKERRY_STRING(SKERRY_ISA_NAME), kTokens, quantize, panel, gate, normalize, down, up};

}  // namespace skerry
