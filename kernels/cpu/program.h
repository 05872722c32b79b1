// A decoder graph of our own ops, resolved once: steps in order, each with its weights and with the places of what it
// reads and writes. A run is one call: what a session does between two ops (looking values up, shapes, allocation)
// costs a small model as much as a tenth of its arithmetic.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "../include/matmul_block.h"
#include "../include/paged_attention.h"
#include "scratch.h"

namespace skerry {

inline constexpr int kLogits = -1;  // the buffer that the caller brings

// Where a value lies: floats [rows, width] at the start of a buffer. Rows are the tokens of the step, or those whose
// logits are wanted.
struct Place {
  int buffer = kLogits;
  int64_t width = 0;
  bool wanted = false;
};

// What a decoder graph is given, by the names of its inputs (exporter/graph.py).
struct StepInputs {
  struct Group {
    const int32_t* block_table = nullptr;  // [sequences, table_width]
    int64_t table_width = 0;
    const int32_t* slot = nullptr;  // [tokens]
  };

  const int32_t* input_ids = nullptr;     // [tokens]
  const int32_t* positions = nullptr;     // [tokens]
  const int32_t* query_start = nullptr;   // [sequences + 1]
  const int32_t* context_len = nullptr;   // [sequences]
  const int32_t* sample_rows = nullptr;   // [wanted]
  const int32_t* adapter_rows = nullptr;  // [sequences]; read where the graph takes adapters
  std::vector<Group> groups;
  int64_t tokens = 0, sequences = 0, wanted = 0;
  float* logits = nullptr;  // [wanted, vocabulary]
  float* hidden = nullptr;  // [wanted, width of the place that set_hidden names], or null
};

struct KvPages {
  uint8_t* data = nullptr;
  int64_t pages = 0;
};

// Halves [slots, rank, columns].
struct AdapterValues {
  const uint16_t* data = nullptr;
  int64_t slots = 0, rank = 0, columns = 0;
};

// What steps see while they run.
struct Frame {
  const StepInputs& inputs;
  const std::vector<KvPages>& kv;  // of each layer
  const AdapterValues& adapters;
  const Parallel& parallel;
  const std::vector<float*>& buffers;

  float* at(const Place& place) const { return place.buffer == kLogits ? inputs.logits : buffers[place.buffer]; }
  int64_t rows(const Place& place) const { return place.wanted ? inputs.wanted : inputs.tokens; }
};

struct Step {
  virtual ~Step() = default;
  virtual std::vector<Place> places() const = 0;
  virtual std::string check() const = 0;  // empty, or what is wrong with it
  virtual std::string run(const Frame& frame) const = 0;
};

// out[tokens] = rows input_ids of a packed matrix.
struct GatherStep final : Step {
  BlockSegment table;
  Place out;

  std::vector<Place> places() const override { return {out}; }
  std::string check() const override;
  std::string run(const Frame& frame) const override;
};

struct ProductStep final : Step {
  MatMulBlockArgs args;  // all but tokens and the pointers of what a step reads and writes
  Place x, residual, out[kMaxSegments];
  bool adds_residual = false;

  std::vector<Place> places() const override;
  std::string check() const override;
  std::string run(const Frame& frame) const override;

 private:
  int outputs() const { return args.activation == Activation::kNone ? args.segments : 1; }
};

struct AttentionStep final : Step {
  PagedAttentionShape shape;
  const float *cos = nullptr, *sin = nullptr;  // [table_rows, rotary_dim / 2]
  int64_t table_rows = 0;
  int layer = 0, group = 0;
  Place q, k, v, out;

  std::vector<Place> places() const override { return {q, k, v, out}; }
  std::string check() const override;
  std::string run(const Frame& frame) const override;
};

// out[wanted] = x[sample_rows].
struct PickStep final : Step {
  Place x, out;

  std::vector<Place> places() const override { return {x, out}; }
  std::string check() const override;
  std::string run(const Frame& frame) const override;
};

// RMS normalization of each `size` elements of a row.
struct NormStep final : Step {
  const float* weight = nullptr;  // [size]
  int64_t size = 0;
  float epsilon = 0.0f;
  Place x, out;

  std::vector<Place> places() const override { return {x, out}; }
  std::string check() const override;
  std::string run(const Frame& frame) const override;
};

// Element by element: with another value of the same shape, or with a number.
struct ElementStep final : Step {
  enum class Kind : int { kAdd, kMultiply, kDivide, kTanh };

  Kind kind = Kind::kAdd;
  bool by_number = false;
  float number = 0.0f;
  Place x, y, out;

  std::vector<Place> places() const override;
  std::string check() const override;
  std::string run(const Frame& frame) const override;
};

class Program {
 public:
  // `layers` of KV pages, `groups` of block tables.
  Program(int buffers, int layers, int groups) : needs_(buffers), scratch_(buffers), kv_(layers), groups_(groups) {}
  Program(const Program&) = delete;

  // `name` is said where the step fails. Empty, or what is wrong with it.
  std::string add(std::string name, std::unique_ptr<Step> step);
  std::string set_pages(int layer, KvPages pages);
  void set_adapters(const AdapterValues& adapters) { adapters_ = adapters; }
  // Which value of a run is handed out as hidden: one that no later step writes over.
  std::string set_hidden(const Place& place);

  // Runs all steps on `threads` threads, which spin from the first to the last. Empty, or which step complains of what;
  // pages may have been written then.
  std::string run(const StepInputs& inputs, int threads);

 private:
  struct Named {
    std::string name;
    std::unique_ptr<Step> step;
  };
  struct Need {
    int64_t tokens = 0, wanted = 0;  // widest value of each kind of rows
  };

  std::string check_inputs(const StepInputs& inputs) const;

  std::vector<Named> steps_;
  std::vector<Need> needs_;
  std::vector<Scratch> scratch_;
  std::vector<float*> buffers_;
  std::vector<KvPages> kv_;
  AdapterValues adapters_;
  Place hidden_;  // of the logits' buffer: none
  int groups_;
};

}  // namespace skerry
