#include "program.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "pool.h"

namespace skerry {
namespace {

using std::to_string;

constexpr int64_t kRowsATask = 16;
constexpr int kSums = 16;  // partial sums of a norm, by index: one order for every width of register

std::string wrong_width(const char* what, const Place& place, int64_t wanted) {
  if (place.width == wanted) return "";
  return std::string(what) + " has rows of " + to_string(place.width) + " elements, expected " + to_string(wanted);
}

std::string unlike(const char* what, const Place& place, const Place& other) {
  if (place.wanted != other.wanted) return std::string(what) + " has other rows than what it belongs to";
  return wrong_width(what, place, other.width);
}

// The first complaint.
std::string first(std::initializer_list<std::string> problems) {
  const auto found = std::find_if(problems.begin(), problems.end(), [](const std::string& p) { return !p.empty(); });
  return found == problems.end() ? "" : *found;
}

// Calls body(row) for each row, in tasks where that pays.
template <class Body>
void for_rows(const Frame& frame, int64_t rows, int64_t width, const Body& body) {
  struct Job {
    const Body& body;
    int64_t rows;
  } job{body, rows};
  const auto task = [](void* argument, int index) {
    const Job& j = *static_cast<const Job*>(argument);
    const int64_t last = std::min(j.rows, (index + 1) * kRowsATask);
    for (int64_t row = index * kRowsATask; row < last; ++row) j.body(row);
  };
  const Parallel serial;
  const bool short_work = static_cast<double>(rows * width) < frame.parallel.serial_work;
  (short_work ? serial : frame.parallel)(static_cast<int>((rows + kRowsATask - 1) / kRowsATask), task, &job);
}

}  // namespace

std::string GatherStep::check() const {
  if (out.wanted) return "an embedding belongs to tokens";
  return out.width % span(table.format) == 0 ? "" : "rows of " + to_string(out.width) + " elements";
}

std::string GatherStep::run(const Frame& frame) const {
  return gather_block(table, out.width, frame.inputs.input_ids, frame.inputs.tokens, frame.at(out));
}

std::vector<Place> ProductStep::places() const {
  std::vector<Place> found{x};
  if (adds_residual) found.push_back(residual);
  found.insert(found.end(), out, out + outputs());
  return found;
}

std::string ProductStep::check() const {
  if (std::string problem = check_matmul_block(args); !problem.empty()) return problem;
  if (adds_residual && outputs() != 1) return "a residual goes with one output";
  if (std::string problem = wrong_width("x", x, args.width); !problem.empty()) return problem;
  for (int s = 0; s < outputs(); ++s) {
    const Place wanted{0, args.segment[s].rows, x.wanted};
    if (std::string problem = unlike("an output", out[s], wanted); !problem.empty()) return problem;
  }
  return adds_residual ? unlike("the residual", residual, out[0]) : "";
}

std::string ProductStep::run(const Frame& frame) const {
  MatMulBlockArgs filled = args;
  filled.x = frame.at(x);
  filled.tokens = frame.rows(x);
  if (adds_residual) filled.residual = frame.at(residual);
  for (int s = 0; s < outputs(); ++s) filled.segment[s].out = frame.at(out[s]);
  if (args.adapters.offset >= 0) {
    BlockAdapters& adapters = filled.adapters;
    adapters.given = frame.adapters.data != nullptr;
    adapters.values = frame.adapters.data;
    adapters.slots = frame.adapters.slots;
    adapters.rank = frame.adapters.rank;
    adapters.columns = frame.adapters.columns;
    adapters.query_start = frame.inputs.query_start;
    adapters.rows = frame.inputs.adapter_rows;
    adapters.sequences = frame.inputs.sequences;
  }
  return matmul_block(filled, frame.parallel);
}

std::string AttentionStep::check() const {
  if (std::string problem = check_shape(shape); !problem.empty()) return problem;
  const Place of_queries{0, int64_t{shape.num_heads} * shape.head_size, false};
  const Place of_keys{0, int64_t{shape.num_kv_heads} * shape.head_size, false};
  return first({unlike("q", q, of_queries), unlike("k", k, of_keys), unlike("v", v, of_keys),
                unlike("the output", out, of_queries)});
}

std::string AttentionStep::run(const Frame& frame) const {
  const StepInputs& in = frame.inputs;
  PagedAttentionArgs args;
  args.q = frame.at(q);
  args.k = frame.at(k);
  args.v = frame.at(v);
  args.kv = frame.kv[layer].data;
  args.pages = frame.kv[layer].pages;
  args.cos = cos;
  args.sin = sin;
  args.table_rows = table_rows;
  args.positions = in.positions;
  args.query_start = in.query_start;
  args.context_len = in.context_len;
  args.block_table = in.groups[group].block_table;
  args.table_width = in.groups[group].table_width;
  args.slot = in.groups[group].slot;
  args.out = frame.at(out);
  args.tokens = in.tokens;
  args.sequences = in.sequences;
  return paged_attention(shape, args, frame.parallel);
}

std::string PickStep::check() const {
  if (x.wanted || !out.wanted) return "rows are picked from those of tokens";
  return wrong_width("the output", out, x.width);
}

std::string PickStep::run(const Frame& frame) const {
  for (int64_t row = 0; row < frame.inputs.wanted; ++row) {
    const int32_t token = frame.inputs.sample_rows[row];
    if (token < 0 || token >= frame.inputs.tokens) {
      return "sample_rows has token " + to_string(token) + " of " + to_string(frame.inputs.tokens);
    }
    std::memcpy(frame.at(out) + row * out.width, frame.at(x) + token * x.width, sizeof(float) * x.width);
  }
  return "";
}

std::string NormStep::check() const {
  if (size < 1 || x.width % size != 0) {
    return "rows of " + to_string(x.width) + " elements in parts of " + to_string(size);
  }
  return unlike("the output", out, x);
}

std::string NormStep::run(const Frame& frame) const {
  const float* from = frame.at(x);
  float* to = frame.at(out);
  const int64_t parts = x.width / size;
  for_rows(frame, frame.rows(x) * parts, size, [=, this](int64_t part) {
    const float* in = from + part * size;
    float sums[kSums] = {}, total = 0.0f;
    int64_t i = 0;
    for (; i + kSums <= size; i += kSums) {
      for (int lane = 0; lane < kSums; ++lane) sums[lane] += in[i + lane] * in[i + lane];
    }
    for (; i < size; ++i) sums[i % kSums] += in[i] * in[i];
    for (const float sum : sums) total += sum;
    const float inverse_rms = 1.0f / std::sqrt(total / static_cast<float>(size) + epsilon);
    for (int64_t j = 0; j < size; ++j) to[part * size + j] = in[j] * inverse_rms * weight[j];
  });
  return "";
}

std::vector<Place> ElementStep::places() const {
  if (by_number || kind == Kind::kTanh) return {x, out};
  return {x, y, out};
}

std::string ElementStep::check() const {
  if (static_cast<int>(kind) < 0 || kind > Kind::kTanh) return "unknown kind " + to_string(static_cast<int>(kind));
  if (by_number || kind == Kind::kTanh) return unlike("the output", out, x);
  return first({unlike("the second value", y, x), unlike("the output", out, x)});
}

std::string ElementStep::run(const Frame& frame) const {
  const float* left = frame.at(x);
  const float* right = by_number || kind == Kind::kTanh ? nullptr : frame.at(y);
  float* to = frame.at(out);
  const auto apply = [&](auto operation) {
    for_rows(frame, frame.rows(x), x.width, [=, this](int64_t row) {
      for (int64_t i = row * x.width; i < (row + 1) * x.width; ++i) {
        to[i] = operation(left[i], right == nullptr ? number : right[i]);
      }
    });
  };
  if (kind == Kind::kAdd) apply([](float a, float b) { return a + b; });
  if (kind == Kind::kMultiply) apply([](float a, float b) { return a * b; });
  if (kind == Kind::kDivide) apply([](float a, float b) { return a / b; });
  if (kind == Kind::kTanh) apply([](float a, float) { return std::tanh(a); });
  return "";
}

std::string Program::add(std::string name, std::unique_ptr<Step> step) {
  std::string problem = step->check();
  for (const Place& place : step->places()) {
    if (!problem.empty()) break;
    if (place.buffer < kLogits || place.buffer >= static_cast<int>(needs_.size()) || place.width < 1) {
      problem = "buffer " + to_string(place.buffer) + " of " + to_string(needs_.size());
    } else if (place.buffer == kLogits && !place.wanted) {
      problem = "logits belong to wanted rows";
    } else if (place.buffer != kLogits) {
      int64_t& need = place.wanted ? needs_[place.buffer].wanted : needs_[place.buffer].tokens;
      need = std::max(need, place.width);
    }
  }
  if (const auto* attention = dynamic_cast<const AttentionStep*>(step.get()); attention != nullptr) {
    const bool known = attention->layer >= 0 && attention->layer < static_cast<int>(kv_.size()) &&
                       attention->group >= 0 && attention->group < groups_;
    if (problem.empty() && !known) problem = "layer " + to_string(attention->layer) + " has no pages";
  }
  if (!problem.empty()) return name + ": " + problem;
  steps_.push_back({std::move(name), std::move(step)});
  return "";
}

std::string Program::set_pages(int layer, KvPages pages) {
  if (layer < 0 || layer >= static_cast<int>(kv_.size())) return "no layer " + to_string(layer);
  kv_[layer] = pages;
  return "";
}

std::string Program::set_hidden(const Place& place) {
  if (place.buffer < 0 || place.buffer >= static_cast<int>(needs_.size()) || !place.wanted ||
      needs_[place.buffer].wanted < place.width) {
    return "hidden is no value of wanted rows";
  }
  hidden_ = place;
  return "";
}

std::string Program::check_inputs(const StepInputs& inputs) const {
  if (static_cast<int>(inputs.groups.size()) != groups_) {
    return to_string(inputs.groups.size()) + " block tables, expected " + to_string(groups_);
  }
  for (size_t layer = 0; layer < kv_.size(); ++layer) {
    if (kv_[layer].data == nullptr) return "layer " + to_string(layer) + " has no pages";
  }
  if (inputs.hidden != nullptr && hidden_.buffer < 0) return "the graph has no output hidden";
  return "";
}

std::string Program::run(const StepInputs& inputs, int threads) {
  if (std::string problem = check_inputs(inputs); !problem.empty()) return problem;
  buffers_.resize(needs_.size());
  for (size_t i = 0; i < needs_.size(); ++i) {
    buffers_[i] = scratch_[i].get(std::max(needs_[i].tokens * inputs.tokens, needs_[i].wanted * inputs.wanted));
  }
  Pool* pool = Pool::of(threads);
  if (pool != nullptr) pool->begin();
  const Parallel parallel = pool == nullptr ? Parallel{} : pool->parallel();
  const Frame frame{inputs, kv_, adapters_, parallel, buffers_};
  std::string problem;
  for (const Named& step : steps_) {
    problem = step.step->run(frame);
    if (problem.empty()) continue;
    problem = step.name + ": " + problem;
    break;
  }
  if (pool != nullptr) pool->end();
  if (problem.empty() && inputs.hidden != nullptr && inputs.wanted > 0) {
    std::memcpy(inputs.hidden, buffers_[hidden_.buffer], sizeof(float) * inputs.wanted * hidden_.width);
  }
  return problem;
}

}  // namespace skerry
