// MatMulBlock on the CPU: quantizes the activations, then deals out panels of rows.
#include "../include/matmul_block.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "isa.h"
#include "matmul_block_tile.h"
#include "scratch.h"

namespace skerry {
namespace {

using std::to_string;

// Weights of a task where one tile of tokens passes them: what is fetched ahead at a task's end is another thread's, so
// tasks are long; a preempted thread keeps everybody waiting for its task, so they are not too long.
constexpr int64_t kLeastTaskBytes = 32 << 10, kMostTaskBytes = 1 << 20;
constexpr int64_t kTaskTokens = 128;            // tokens of a task, so that few panels still keep many threads busy
constexpr int64_t kSerialBytes = 64 << 10;      // below, handing work over costs more than it saves
constexpr int64_t kSerialDownBytes = 16 << 10;  // the same of an adapter's down
constexpr int64_t kDownTokens = 16;             // of one task, that share what is read of down
constexpr int kDownRows = 4;                    // of rank, of one task where tokens are few
constexpr int kPiecesAThread = 2;               // fewer are cut by rank

const MatMulBlockIsa& matmul_isa() {
#if defined(__aarch64__)
  if (isa() == Isa::kNeonDot) return kMatMulBlockNeonDot;
#elif defined(__x86_64__)
  switch (isa()) {
    case Isa::kAvx512Vnni:
      return kMatMulBlockAvx512Vnni;
    case Isa::kAvx512:
      return kMatMulBlockAvx512;
    case Isa::kAvxVnni:
      return kMatMulBlockAvxVnni;
    case Isa::kAvx2:
      return kMatMulBlockAvx2;
    default:
      break;
  }
#endif
  return kMatMulBlockBase;
}

// The activations of all tokens as tiles, one after another in one buffer.
class Activations {
 public:
  Activations(const MatMulBlockIsa& isa, int64_t tokens, int64_t blocks) : isa_(isa), tokens_(tokens), blocks_(blocks) {
    thread_local Scratch scratch;
    base_ = reinterpret_cast<uint8_t*>(scratch.get(tiles() * tile_bytes() / 4));
  }

  int64_t tiles() const { return (tokens_ + isa_.tokens - 1) / isa_.tokens; }

  ActivationTile tile(int64_t index) const {
    const int count = static_cast<int>(std::min<int64_t>(isa_.tokens, tokens_ - index * isa_.tokens));
    uint8_t* at = base_ + index * tile_bytes();
    auto* floats = reinterpret_cast<float*>(at + isa_.tokens * blocks_ * kBlock);
    const int64_t step = isa_.tokens * blocks_;
    auto* sums = reinterpret_cast<int32_t*>(floats + 2 * step);
    return {reinterpret_cast<int8_t*>(at), floats, sums, sums + step, floats + step, count};
  }

 private:
  int64_t tile_bytes() const { return isa_.tokens * blocks_ * (kBlock + 16); }

  const MatMulBlockIsa& isa_;
  int64_t tokens_, blocks_;
  uint8_t* base_;
};

// Tokens of one adapter side by side, and rows of its rank: what one task multiplies by down.
struct DownPiece {
  int32_t token, tokens, row, rows;
};

// The adapters of a call: which token has which, and its products with down, [tokens][segments][rank].
struct AdapterWork {
  std::vector<int32_t> slot;  // of each token, -1: none
  std::vector<DownPiece> pieces;
  Scratch scratch;
  float* inner = nullptr;
};

struct Job {
  const MatMulBlockArgs& args;
  const MatMulBlockIsa& isa;
  Activations activations;
  int64_t panels = 0;  // of all segments, or of each of two with an activation
  int64_t tiles_a_task = 1;
  const std::vector<int64_t>& starts;  // first panel of each task and, last, the number of panels
  const AdapterWork* adapters = nullptr;

  int64_t panel_tasks() const { return static_cast<int64_t>(starts.size()) - 1; }
  int64_t blocks() const { return args.width / kBlock; }
};

void quantize_tile(void* argument, int index) {
  const Job& job = *static_cast<const Job*>(argument);
  const ActivationTile tile = job.activations.tile(index);
  const float* x = job.args.x + int64_t{index} * job.isa.tokens * job.args.width;
  for (int t = 0; t < tile.count; ++t) {
    job.isa.quantize(x + t * job.args.width, job.args.norm, job.args.epsilon, job.blocks(), tile, t);
  }
}

// Where a segment's columns of a slot begin: those of down, then those of up.
const uint16_t* adapter_at(const MatMulBlockArgs& args, int32_t slot, int segment) {
  int64_t column = args.adapters.offset;
  for (int s = 0; s < segment; ++s) column += args.width + args.segment[s].rows;
  return args.adapters.values + slot * args.adapters.rank * args.adapters.columns + column;
}

// Slot of each token; false where none has one.
bool slots_of_tokens(const MatMulBlockArgs& args, std::vector<int32_t>& slot) {
  const BlockAdapters& adapters = args.adapters;
  if (std::all_of(adapters.rows, adapters.rows + adapters.sequences, [](int32_t row) { return row < 0; })) return false;
  slot.assign(args.tokens, -1);
  for (int64_t b = 0; b < adapters.sequences; ++b) {
    std::fill(slot.begin() + adapters.query_start[b], slot.begin() + adapters.query_start[b + 1], adapters.rows[b]);
  }
  return true;
}

// Runs of tokens with one slot, cut so that many threads have work and few rows of rank are read by one at a time.
const AdapterWork* plan_adapters(const MatMulBlockArgs& args, int threads) {
  thread_local AdapterWork work;
  if (!args.adapters.given || !slots_of_tokens(args, work.slot)) return nullptr;
  const int64_t rank = args.adapters.rank;
  work.inner = work.scratch.get(args.tokens * args.segments * rank);
  work.pieces.clear();
  for (int64_t t = 0, end = 0; t < args.tokens; t = end) {
    for (end = t + 1; end < args.tokens && end < t + kDownTokens && work.slot[end] == work.slot[t];) ++end;
    if (work.slot[t] < 0) continue;
    work.pieces.push_back({static_cast<int32_t>(t), static_cast<int32_t>(end - t), 0, static_cast<int32_t>(rank)});
  }
  if (static_cast<int>(work.pieces.size()) < kPiecesAThread * threads && threads > 1) {
    const std::vector<DownPiece> whole = work.pieces;
    work.pieces.clear();
    for (DownPiece piece : whole) {
      for (; piece.row < rank; piece.row += kDownRows) {
        piece.rows = static_cast<int32_t>(std::min<int64_t>(kDownRows, rank - piece.row));
        work.pieces.push_back(piece);
      }
    }
  }
  return &work;
}

void run_piece(const Job& job, const DownPiece& piece) {
  thread_local Scratch normed;
  const MatMulBlockArgs& args = job.args;
  const int64_t columns = args.adapters.columns, stride = args.segments * args.adapters.rank;
  const float* x = args.x + piece.token * args.width;
  if (args.norm != nullptr) {
    float* to = normed.get(piece.tokens * args.width);
    for (int t = 0; t < piece.tokens; ++t) {
      job.isa.normalize(x + t * args.width, args.norm, args.epsilon, args.width, to + t * args.width);
    }
    x = to;
  }
  for (int s = 0; s < args.segments; ++s) {
    job.isa.down(adapter_at(args, job.adapters->slot[piece.token], s) + piece.row * columns, columns, piece.rows, x,
                 args.width, piece.tokens,
                 job.adapters->inner + piece.token * stride + s * args.adapters.rank + piece.row, stride);
  }
}

void run_down(void* argument, int index) {
  const Job& job = *static_cast<const Job*>(argument);
  const int tiles = static_cast<int>(job.activations.tiles());
  if (index < tiles) {
    quantize_tile(argument, index);
  } else {
    run_piece(job, job.adapters->pieces[index - tiles]);
  }
}

// What a tile's tokens get of their adapters for one panel of a segment.
void add_adapters(const Job& job, int segment, int64_t first, int rows, int64_t tile_index, int count, float* out) {
  const MatMulBlockArgs& args = job.args;
  const int64_t rank = args.adapters.rank, stride = args.segments * rank, token = tile_index * job.isa.tokens;
  const int32_t* slot = job.adapters->slot.data() + token;
  for (int t = 0, end = 0; t < count; t = end) {
    for (end = t + 1; end < count && slot[end] == slot[t];) ++end;
    if (slot[t] < 0) continue;
    job.isa.up(adapter_at(args, slot[t], segment) + args.width + first, args.adapters.columns, static_cast<int>(rank),
               rows, job.adapters->inner + (token + t) * stride + segment * rank, stride, end - t,
               out + t * kPanelRows);
  }
}

const uint8_t* panel_at(const BlockSegment& segment, int64_t panel, int64_t blocks) {
  return segment.weight + panel * panel_bytes(segment.format, blocks);
}

void add_bias(const BlockSegment& segment, int64_t first, int rows, int count, float* out) {
  if (segment.bias == nullptr) return;
  for (int t = 0; t < count; ++t) {
    for (int r = 0; r < rows; ++r) out[t * kPanelRows + r] += segment.bias[first + r];
  }
}

void run_panel(const Job& job, int s, int64_t panel, int64_t tile_index) {
  alignas(64) float buffer[2][16 * kPanelRows];
  const MatMulBlockArgs& args = job.args;
  const BlockSegment& segment = args.segment[s];
  const ActivationTile tile = job.activations.tile(tile_index);
  const int64_t first = panel * kPanelRows;
  const int rows = static_cast<int>(std::min<int64_t>(kPanelRows, segment.rows - first));
  float* out = buffer[0];
  job.isa.panel(panel_at(segment, panel, job.blocks()), static_cast<int>(segment.format), job.blocks(), tile, out);
  add_bias(segment, first, rows, tile.count, out);
  if (job.adapters != nullptr) add_adapters(job, s, first, rows, tile_index, tile.count, out);
  if (args.activation != Activation::kNone) {
    const BlockSegment& up = args.segment[1];
    job.isa.panel(panel_at(up, panel, job.blocks()), static_cast<int>(up.format), job.blocks(), tile, buffer[1]);
    add_bias(up, first, rows, tile.count, buffer[1]);
    if (job.adapters != nullptr) add_adapters(job, 1, first, rows, tile_index, tile.count, buffer[1]);
    job.isa.gate(static_cast<int>(args.activation), out, buffer[1], tile.count * kPanelRows);
  }
  for (int t = 0; t < tile.count; ++t, out += kPanelRows) {
    const int64_t at = (tile_index * job.isa.tokens + t) * segment.rows + first;
    if (args.residual != nullptr) {
      for (int r = 0; r < rows; ++r) out[r] += args.residual[at + r];
    }
    std::memcpy(segment.out + at, out, sizeof(float) * rows);
  }
}

void run_task(void* argument, int index) {
  const Job& job = *static_cast<const Job*>(argument);
  const int64_t first_tile = index / job.panel_tasks() * job.tiles_a_task;
  const int64_t last_tile = std::min(first_tile + job.tiles_a_task, job.activations.tiles());
  const int64_t first = job.starts[index % job.panel_tasks()], last = job.starts[index % job.panel_tasks() + 1];
  int64_t before = 0;  // panels of the segments before this one
  for (int s = 0; s < job.args.segments; ++s) {
    const int64_t count = panels_of(job.args.segment[s].rows);
    for (int64_t p = std::max(first, before); p < std::min(last, before + count); ++p) {
      for (int64_t tile = first_tile; tile < last_tile; ++tile) run_panel(job, s, p - before, tile);
    }
    before += count;
    if (job.args.activation != Activation::kNone) break;
  }
}

std::string check_segment(const MatMulBlockArgs& args, int index) {
  const BlockSegment& segment = args.segment[index];
  if (segment.rows < 1 || segment.rows > std::numeric_limits<int32_t>::max()) {
    return "segment " + to_string(index) + " has " + to_string(segment.rows) + " rows";
  }
  if (static_cast<int32_t>(segment.format) < 0 || static_cast<int32_t>(segment.format) >= kFormats) {
    return "segment " + to_string(index) + " has unknown format " + to_string(static_cast<int32_t>(segment.format));
  }
  if (args.width % span(segment.format) != 0) {
    return "segment " + to_string(index) + " has rows of " + to_string(args.width) +
           " elements, its format takes multiples of " + to_string(span(segment.format));
  }
  return "";
}

std::string check_adapters(const MatMulBlockArgs& args) {
  const BlockAdapters& adapters = args.adapters;
  if (adapters.offset < -1) return "adapter_offset " + to_string(adapters.offset);
  if (!adapters.given) return "";
  if (adapters.offset < 0) return "adapters are given, but adapter_offset is -1";
  int64_t end = adapters.offset;
  for (int s = 0; s < args.segments; ++s) end += args.width + args.segment[s].rows;
  if (end > adapters.columns) {
    return "adapter columns " + to_string(adapters.offset) + " to " + to_string(end) + " are beyond the " +
           to_string(adapters.columns) + " of adapters";
  }
  if (adapters.query_start[0] != 0) return "query_start begins with " + to_string(adapters.query_start[0]) + ", not 0";
  for (int64_t b = 0; b < adapters.sequences; ++b) {
    const int32_t first = adapters.query_start[b], last = adapters.query_start[b + 1], row = adapters.rows[b];
    if (last < first) {
      return "query_start decreases from " + to_string(first) + " to " + to_string(last) + " at sequence " +
             to_string(b);
    }
    if (row < -1 || row >= adapters.slots) {
      return "adapter_rows has " + to_string(row) + " for sequence " + to_string(b) + ", there are " +
             to_string(adapters.slots) + " slots";
    }
  }
  if (adapters.query_start[adapters.sequences] > args.tokens) {
    return "query_start ends at " + to_string(adapters.query_start[adapters.sequences]) + " but there are " +
           to_string(args.tokens) + " tokens";
  }
  return "";
}

}  // namespace

std::string check_matmul_block(const MatMulBlockArgs& args) {
  if (args.width < kBlock || args.width % kBlock != 0) {
    return "rows of " + to_string(args.width) + " elements, not a multiple of " + to_string(kBlock);
  }
  if (args.segments < 1 || args.segments > kMaxSegments) {
    return to_string(args.segments) + " segments, 1 to " + to_string(kMaxSegments) + " are possible";
  }
  for (int s = 0; s < args.segments; ++s) {
    if (std::string problem = check_segment(args, s); !problem.empty()) return problem;
  }
  const auto activation = static_cast<int32_t>(args.activation);
  if (activation < 0 || activation > 2) return "unknown activation " + to_string(activation);
  if (args.residual != nullptr && args.segments != 1) return "a residual goes with one segment";
  if (args.activation != Activation::kNone &&
      (args.segments != 2 || args.segment[0].rows != args.segment[1].rows || args.residual != nullptr)) {
    return "a gated product takes two segments of equal rows and no residual";
  }
  return check_adapters(args);
}

namespace {

// Each round of `threads` equal tasks takes three quarters of what is left: threads stream long runs first, and what
// they wait for at the end is a short task (factoring: Hummel, Schonberg and Flynn, 1992).
void deal_panels(int64_t panels, int64_t panel_bytes, int threads, std::vector<int64_t>& starts) {
  const int64_t least = std::max<int64_t>(1, kLeastTaskBytes / panel_bytes);
  const int64_t most = std::max<int64_t>(1, kMostTaskBytes / panel_bytes);
  while (starts.back() < panels) {
    const int64_t size = std::clamp((panels - starts.back()) * 3 / (4 * threads), least, most);
    for (int i = 0; i < threads && starts.back() < panels; ++i) {
      starts.push_back(std::min(panels, starts.back() + size));
    }
  }
}

// Tells waiting threads of the next step where they began to read in this one.
void announce(const Job& job, const Parallel& parallel) {
  if (parallel.announce == nullptr) return;
  const int streams = job.args.activation != Activation::kNone ? 2 : 1;
  thread_local std::vector<const void*> begins;
  begins.clear();
  for (int i = 0; i < parallel.threads; ++i) {
    int64_t panel = job.starts[std::min<int64_t>(i, job.panel_tasks() - 1)];
    int s = 0;
    for (; s + 1 < job.args.segments && panel >= panels_of(job.args.segment[s].rows); ++s) {
      panel -= panels_of(job.args.segment[s].rows);
    }
    for (int stream = 0; stream < streams; ++stream) {
      begins.push_back(panel_at(job.args.segment[s + stream], panel, job.blocks()));
    }
  }
  parallel.announce(parallel.context, begins.data(), streams);
}

}  // namespace

std::string matmul_block(const MatMulBlockArgs& args, const Parallel& parallel) {
  if (std::string problem = check_matmul_block(args); !problem.empty()) return problem;
  if (args.tokens == 0) return "";
  const MatMulBlockIsa& isa = matmul_isa();
  const bool gated = args.activation != Activation::kNone;
  thread_local std::vector<int64_t> starts;
  Job job{args, isa, Activations(isa, args.tokens, args.width / kBlock), 0, 1, starts};
  int64_t bytes = 0;
  for (int s = 0; s < args.segments; ++s) {
    const int64_t panels = panels_of(args.segment[s].rows);
    if (s == 0 || !gated) job.panels += panels;
    bytes += panels * panel_bytes(args.segment[s].format, job.blocks());
  }
  const int64_t tiles = job.activations.tiles();
  job.tiles_a_task = std::min(tiles, kTaskTokens / isa.tokens);
  starts.assign(1, 0);
  if (tiles == 1) {
    deal_panels(job.panels, bytes / job.panels, std::max(1, parallel.threads), starts);
    announce(job, parallel);
  } else {
    for (int64_t panel = 1; panel <= job.panels; ++panel) starts.push_back(panel);
  }
  const Parallel serial;
  job.adapters = plan_adapters(args, parallel.threads);
  if (job.adapters == nullptr) {
    (tiles > 1 ? parallel : serial)(static_cast<int>(tiles), quantize_tile, &job);
  } else {
    const int64_t read = args.adapters.rank * args.segments * args.width * int64_t{sizeof(uint16_t)};
    const size_t pieces = job.adapters->pieces.size();
    (tiles > 1 || read >= kSerialDownBytes ? parallel : serial)(static_cast<int>(tiles + pieces), run_down, &job);
  }
  const int64_t tasks = job.panel_tasks() * ((tiles + job.tiles_a_task - 1) / job.tiles_a_task);
  if (tasks > std::numeric_limits<int>::max()) return to_string(args.tokens) + " tokens are too many for one step";
  (bytes * args.tokens < kSerialBytes ? serial : parallel)(static_cast<int>(tasks), run_task, &job);
  return "";
}

namespace {

float from_half(uint16_t half) {
  const uint32_t exponent = half >> 10 & 31, fraction = half & 1023;
  const float magnitude = exponent == 0
                              ? std::ldexp(static_cast<float>(fraction), -24)
                              : std::ldexp(static_cast<float>(fraction + 1024), static_cast<int>(exponent) - 25);
  return half & 0x8000 ? -magnitude : magnitude;
}

// A row of one block, which begins at the panel's scales and codes: 32 floats.
void dequantize(const BlockSegment& table, const uint8_t* panel, int64_t blocks, int64_t b, int row, float* out) {
  const BlockTraits& kind = traits(table.format);
  const auto* halves = reinterpret_cast<const uint16_t*>(panel);
  const int64_t count = scale_count(table.format, blocks);
  const int64_t at = (kind.steps ? b / kSuper : b) * kPanelRows + row;
  float scale[2] = {from_half(halves[at]), from_half(halves[at])};  // of each half of the block
  float minimum = kind.minima ? from_half(halves[count + at]) : 0.0f;
  if (kind.steps) {
    const uint8_t* step = panel + 2 * count * (kind.minima ? 2 : 1) + 2 * b * kPanelRows + row;
    if (kind.minima) {
      scale[0] = scale[1] = scale[0] * static_cast<float>(step[0]);
      minimum *= -static_cast<float>(step[kPanelRows]);
    } else {
      scale[0] *= static_cast<float>(static_cast<int8_t>(step[0]));
      scale[1] *= static_cast<float>(static_cast<int8_t>(step[kPanelRows]));
    }
  }
  const uint8_t* codes = panel + head_bytes(table.format, blocks) + b * code_bytes(table.format) + row * 4;
  for (int k = 0; k < kBlock; ++k) {
    const int group = k / 4, place = k % 4;
    int code = codes[group * 64 + place];
    if (kind.bits < 8) {
      const int both = codes[group % 4 * 64 + place], extra = kind.bits - 4;
      code = group < 4 ? both & 15 : both >> 4;
      const int planes = extra == 2 ? group / 4 : 0, bit = extra == 2 ? 2 * (group % 4) : group;
      if (extra > 0) code |= (codes[(4 + planes) * 64 + place] >> bit & ((1 << extra) - 1)) << 4;
    }
    out[k] = scale[k / 16] * static_cast<float>(code - kind.offset) + minimum;
  }
}

}  // namespace

std::string gather_block(const BlockSegment& table, int64_t width, const int32_t* ids, int64_t count, float* out) {
  const int64_t blocks = width / kBlock;
  for (int64_t i = 0; i < count; ++i) {
    if (ids[i] < 0 || ids[i] >= table.rows) {
      return "id " + to_string(ids[i]) + " at " + to_string(i) + " is outside the table of " + to_string(table.rows) +
             " rows";
    }
  }
  for (int64_t i = 0; i < count; ++i, out += width) {
    const uint8_t* panel = panel_at(table, ids[i] / kPanelRows, blocks);
    for (int64_t b = 0; b < blocks; ++b) {
      dequantize(table, panel, blocks, b, ids[i] % kPanelRows, out + b * kBlock);
    }
  }
  return "";
}

}  // namespace skerry
