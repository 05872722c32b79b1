// The inner part of MatMulBlock, compiled once per instruction set and picked at run time (isa.h).
#pragma once

#include <cstdint>

namespace skerry {

// A tile of up to `tokens` quantized activation rows. Within a block the tokens lie side by side:
// codes [blocks][count][32] int8; scale, sum, half and weighted [blocks][count], where sum is minus the sum of the
// codes (it takes the offset of unsigned weights back), half that of the first 16, and weighted is scale times the sum
// of all (for minima).
struct ActivationTile {
  int8_t* codes;
  float* scale;
  int32_t* sum;
  int32_t* half;
  float* weighted;
  int count;
};

struct MatMulBlockIsa {
  const char* name;
  int tokens;  // of a tile at most
  // Row `at` of the tile from x [32 blocks]; norm null: as it is, else RMS-normalized first.
  void (*quantize)(const float* x, const float* norm, float epsilon, int64_t blocks, const ActivationTile& tile,
                   int at);
  // out[count][16] = the panel's 16 rows against the tile. `format` as in BlockFormat.
  void (*panel)(const uint8_t* panel, int format, int64_t blocks, const ActivationTile& tile, float* out);
  // first[n] = act(first[n]) * second[n]; n a multiple of 16, `activation` as in Activation.
  void (*gate)(int activation, float* first, const float* second, int n);
  // out[width] = x RMS-normalized, as `quantize` has it before it rounds.
  void (*normalize)(const float* x, const float* norm, float epsilon, int64_t width, float* out);
  // out[t * stride + r] = sum over k of down[r * columns + k] * x[t * width + k], r < rank.
  void (*down)(const uint16_t* down, int64_t columns, int rank, const float* x, int64_t width, int tokens, float* out,
               int64_t stride);
  // out[t][16] += sum over r of inner[t * stride + r] * up[r * columns + lane], lane < rows.
  void (*up)(const uint16_t* up, int64_t columns, int rank, int rows, const float* inner, int64_t stride, int tokens,
             float* out);
};

extern const MatMulBlockIsa kMatMulBlockBase;
#if defined(__aarch64__)
extern const MatMulBlockIsa kMatMulBlockNeonDot;
#elif defined(__x86_64__)
extern const MatMulBlockIsa kMatMulBlockAvx2;
extern const MatMulBlockIsa kMatMulBlockAvxVnni;
extern const MatMulBlockIsa kMatMulBlockAvx512;
extern const MatMulBlockIsa kMatMulBlockAvx512Vnni;
#endif

}  // namespace skerry
