// MatMulBlock v2 on raw pointers: block-quantized products with int8 activations. The definition is reference.py; the
// packing is blocks.py's. Results depend on no batch, chunk or thread count: a row's sum has one order, block by block.
#pragma once

#include <cstdint>
#include <string>

#include "parallel.h"

namespace skerry {

inline constexpr int kBlock = 32;      // elements of k that share a scale
inline constexpr int kPanelRows = 16;  // output rows interleaved in the packing
inline constexpr int kMaxSegments = 4;

// What GGUF calls the same things, with their scales and minima as halves.
enum class BlockFormat : int32_t { kQ8_0, kQ4_0, kQ4_1, kQ5_0, kQ5_1, kQ4_K, kQ5_K, kQ6_K };
inline constexpr int kFormats = 8;

// bits: of a code; offset: taken off a code; minima: whether there are any; steps: a half holds for 8 blocks, each of
// which has two steps of 8 bits (of scale and minimum; without minima of its two halves, signed).
struct BlockTraits {
  int bits, offset;
  bool minima, steps;
};
inline constexpr BlockTraits kTraits[kFormats] = {{8, 128, false, false}, {4, 8, false, false}, {4, 0, true, false},
                                                  {5, 16, false, false},  {5, 0, true, false},  {4, 0, true, true},
                                                  {5, 0, true, true},     {6, 32, false, true}};
inline constexpr const BlockTraits& traits(BlockFormat format) { return kTraits[static_cast<int>(format)]; }
inline constexpr int kSuper = 8;  // blocks that share a half where there are steps
// Elements of a row that belong together: its width is a multiple.
inline constexpr int span(BlockFormat format) { return traits(format).steps ? kSuper * kBlock : kBlock; }

// Bytes of 16 rows: scales [blocks][16] (or [blocks / 8][16]), minima likewise, steps [blocks][2][16] as bytes, padded
// to 64; then codes: [blocks][8][16][4] bytes at 8 bits; else nibbles [4][16][4], where a low one belongs to k group g
// and a high one to group g + 4, and what is above them, [1][16][4] with group g at bit g or [2][16][4] with group g at
// bits 2 (g % 4) of half g / 4.
inline int64_t scale_count(BlockFormat format, int64_t blocks) {
  return (traits(format).steps ? blocks / kSuper : blocks) * kPanelRows;
}
inline int64_t head_bytes(BlockFormat format, int64_t blocks) {
  const int64_t halves = scale_count(format, blocks) * (traits(format).minima ? 2 : 1);
  const int64_t steps = traits(format).steps ? 2 * blocks * kPanelRows : 0;
  return (2 * halves + steps + 63) / 64 * 64;
}
inline int64_t code_bytes(BlockFormat format) { return kPanelRows * kBlock * traits(format).bits / 8; }
inline int64_t panel_bytes(BlockFormat format, int64_t blocks) {
  return head_bytes(format, blocks) + blocks * code_bytes(format);
}
inline int64_t panels_of(int64_t rows) { return (rows + kPanelRows - 1) / kPanelRows; }

// Of the first of two segments, before it multiplies the second.
enum class Activation : int32_t { kNone = 0, kSilu = 1, kGeluTanh = 2 };

// A run of output columns with one weight matrix.
struct BlockSegment {
  const uint8_t* weight = nullptr;  // packed [panels]
  const float* bias = nullptr;      // [rows] or null
  float* out = nullptr;             // [tokens, rows]; with an activation only the first segment's is written
  int64_t rows = 0;
  BlockFormat format = BlockFormat::kQ8_0;
};

// Low-rank terms of fine-tunings (LoRA: Hu et al., 2021), one slot each, for every product of a graph. From column
// `offset` on a node has, for each of its segments, the `width` columns of down and the `rows` columns of up.
struct BlockAdapters {
  int64_t offset = -1;                   // -1: no columns are this node's
  bool given = false;                    // whether there are the tensors below
  const uint16_t* values = nullptr;      // halves [slots, rank, columns]
  const int32_t* query_start = nullptr;  // [sequences + 1]; tokens past the last one belong to nobody
  const int32_t* rows = nullptr;         // [sequences]: the slot of each, -1: none
  int64_t slots = 0, rank = 0, columns = 0, sequences = 0;
};

// out_s = norm(x) W_s^T + bias_s + adapter (+ residual, with one segment); with an activation: out_0 = act(.._0) *
// (.._1).
struct MatMulBlockArgs {
  const float* x = nullptr;         // [tokens, width]
  const float* norm = nullptr;      // [width]: RMS normalization before the product, or null
  const float* residual = nullptr;  // [tokens, rows] or null
  float epsilon = 0.0f;
  int64_t tokens = 0;
  int64_t width = 0;  // a multiple of the span of each segment's format
  Activation activation = Activation::kNone;
  int segments = 0;
  BlockSegment segment[kMaxSegments];
  BlockAdapters adapters;
};

std::string check_matmul_block(const MatMulBlockArgs& args);
std::string matmul_block(const MatMulBlockArgs& args, const Parallel& parallel);

// Rows `ids` of one packed matrix, dequantized: out[n, width]. A negative id, or one past `rows`, is an error.
std::string gather_block(const BlockSegment& table, int64_t width, const int32_t* ids, int64_t count, float* out);

}  // namespace skerry
