// Program for Python: what kernels/program.py makes of a graph. Arrays that steps point into are kept alive.
#include <chrono>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "bind.h"
#include "cpu/program.h"

namespace skerry::bind {
namespace {

using PlaceTuple = std::tuple<int, int64_t, bool>;  // buffer, width, wanted
using Name = const std::string&;

Place place(const PlaceTuple& given) { return {std::get<0>(given), std::get<1>(given), std::get<2>(given)}; }

class BoundProgram {
 public:
  BoundProgram(int buffers, int layers, int groups) : program_(buffers, layers, groups) {}
  BoundProgram(const BoundProgram&) = delete;

  void gather(Name name, const Segment& table, const PlaceTuple& out) {
    auto step = std::make_unique<GatherStep>();
    step->out = place(out);
    step->table = segment(table, step->out.width);
    add(name, std::move(step));
  }

  void product(Name name, const PlaceTuple& x, const std::vector<Segment>& segments, const std::vector<PlaceTuple>& out,
               const nb::object& norm, const std::optional<PlaceTuple>& residual, float epsilon, int activation,
               int64_t adapter_offset) {
    auto step = std::make_unique<ProductStep>();
    step->x = place(x);
    MatMulBlockArgs& args = step->args;
    args.width = step->x.width;
    args.epsilon = epsilon;
    args.adapters.offset = adapter_offset;
    args.activation = static_cast<Activation>(activation);
    args.segments = static_cast<int>(segments.size());
    if (segments.size() > kMaxSegments) throw std::invalid_argument(name + ": too many segments");
    for (size_t s = 0; s < segments.size(); ++s) args.segment[s] = segment(segments[s], args.width);
    expect((name + ": outputs").c_str(), out.size(), activation == 0 ? segments.size() : 1);
    for (size_t s = 0; s < out.size(); ++s) step->out[s] = place(out[s]);
    if (!norm.is_none()) args.norm = floats("norm", norm, {static_cast<size_t>(args.width)});
    step->adds_residual = residual.has_value();
    if (residual) step->residual = place(*residual);
    add(name, std::move(step));
  }

  void attention(Name name, const PlaceTuple& q, const PlaceTuple& k, const PlaceTuple& v, const PlaceTuple& out,
                 const nb::object& cos, const nb::object& sin, int layer, int group, int num_heads, int num_kv_heads,
                 int head_size, float scale, float softcap, int window, int rotary_dim, bool interleaved,
                 int kv_layout) {
    auto step = std::make_unique<AttentionStep>();
    step->shape = {num_heads,  num_kv_heads, head_size,
                   rotary_dim, interleaved,  scale,
                   softcap,    window,       static_cast<KvLayout>(kv_layout)};
    const size_t rows = nb::cast<In<float>>(cos).shape(0), half = rotary_dim / 2;
    step->cos = rotary_dim > 0 ? floats("cos", cos, {rows, half}) : nullptr;
    step->sin = rotary_dim > 0 ? floats("sin", sin, {rows, half}) : nullptr;
    step->table_rows = static_cast<int64_t>(rows);
    step->layer = layer;
    step->group = group;
    step->q = place(q);
    step->k = place(k);
    step->v = place(v);
    step->out = place(out);
    const auto bytes = static_cast<size_t>(step->shape.page_bytes());
    add(name, std::move(step));
    if (page_bytes_.size() <= static_cast<size_t>(layer)) page_bytes_.resize(layer + 1);
    page_bytes_[layer] = bytes;
  }

  void pick(Name name, const PlaceTuple& x, const PlaceTuple& out) {
    auto step = std::make_unique<PickStep>();
    step->x = place(x);
    step->out = place(out);
    add(name, std::move(step));
  }

  void norm(Name name, const PlaceTuple& x, const PlaceTuple& out, const In<float>& weight, float epsilon) {
    auto step = std::make_unique<NormStep>();
    step->x = place(x);
    step->out = place(out);
    step->size = static_cast<int64_t>(weight.shape(0));
    step->weight = floats("norm", nb::cast(weight), {weight.shape(0)});
    step->epsilon = epsilon;
    add(name, std::move(step));
  }

  void element(Name name, int kind, const PlaceTuple& x, const PlaceTuple& out, const std::optional<PlaceTuple>& y,
               float number) {
    auto step = std::make_unique<ElementStep>();
    step->kind = static_cast<ElementStep::Kind>(kind);
    step->x = place(x);
    step->out = place(out);
    step->by_number = !y.has_value();
    if (y) step->y = place(*y);
    step->number = number;
    add(name, std::move(step));
  }

  void set_pages(int layer, const InOut<uint8_t>& pages) {
    if (layer < 0 || page_bytes_.size() <= static_cast<size_t>(layer)) throw std::invalid_argument("no such layer");
    expect("dimensions of kv", pages.ndim(), 2);
    expect("bytes of a page of kv", pages.shape(1), page_bytes_[layer]);
    expect_none(program_.set_pages(layer, {pages.data(), static_cast<int64_t>(pages.shape(0))}));
    kept_.push_back(nb::cast(pages));
  }

  void set_adapters(const HalfTensor& values) {
    expect_adapters(values);
    program_.set_adapters({static_cast<const uint16_t*>(values.data()), static_cast<int64_t>(values.shape(0)),
                           static_cast<int64_t>(values.shape(1)), static_cast<int64_t>(values.shape(2))});
    kept_.push_back(nb::cast(values));
  }

  void set_hidden(const PlaceTuple& given) {
    expect_none(program_.set_hidden(place(given)));
    hidden_size_ = std::get<1>(given);
  }

  int64_t hidden_size() const { return hidden_size_; }

  // Seconds of the run itself.
  double run(const In<int32_t>& input_ids, const In<int32_t>& positions, const In<int32_t>& query_start,
             const In<int32_t>& context_len, const std::vector<In<int32_t>>& block_tables,
             const std::vector<In<int32_t>>& slots, const In<int32_t>& sample_rows, const In<int32_t>& adapter_rows,
             const InOut<float>& logits, int threads, const std::optional<InOut<float>>& hidden) {
    StepInputs in;
    const size_t tokens = input_ids.size(), sequences = context_len.size(), wanted = sample_rows.size();
    in.input_ids = checked("input_ids", input_ids, {tokens});
    in.positions = checked("positions", positions, {tokens});
    in.query_start = checked("query_start", query_start, {sequences + 1});
    in.context_len = checked("context_len", context_len, {sequences});
    in.sample_rows = checked("sample_rows", sample_rows, {wanted});
    in.adapter_rows = checked("adapter_rows", adapter_rows, {sequences});
    in.tokens = static_cast<int64_t>(tokens);
    in.sequences = static_cast<int64_t>(sequences);
    in.wanted = static_cast<int64_t>(wanted);
    expect("slots", slots.size(), block_tables.size());
    for (size_t g = 0; g < slots.size(); ++g) {
      expect("dimensions of block_table", block_tables[g].ndim(), 2);
      const size_t width = block_tables[g].shape(1);
      in.groups.push_back({checked("block_table", block_tables[g], {sequences, width}), static_cast<int64_t>(width),
                           checked("slot", slots[g], {tokens})});
    }
    expect("dimensions of logits", logits.ndim(), 2);
    expect("rows of logits", logits.shape(0), wanted);
    expect("columns of logits", logits.shape(1), static_cast<size_t>(vocabulary_));
    in.logits = logits.data();
    if (hidden) {
      expect("dimensions of hidden", hidden->ndim(), 2);
      expect("rows of hidden", hidden->shape(0), wanted);
      expect("columns of hidden", hidden->shape(1), static_cast<size_t>(hidden_size_));
      in.hidden = hidden->data();
    }
    std::string problem;
    const nb::gil_scoped_release release;
    const auto began = std::chrono::steady_clock::now();
    problem = program_.run(in, threads);
    expect_none(problem);
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
  }

 private:
  BlockSegment segment(const Segment& given, int64_t width) {
    kept_.push_back(nb::cast(std::get<0>(given)));
    if (!std::get<3>(given).is_none()) kept_.push_back(std::get<3>(given));
    return block_segment(given, static_cast<size_t>(width));
  }

  const float* floats(const char* what, const nb::object& array, std::initializer_list<size_t> shape) {
    kept_.push_back(array);
    return checked(what, nb::cast<In<float>>(array), shape);
  }

  void add(Name name, std::unique_ptr<Step> step) {
    for (const Place& each : step->places()) {
      if (each.buffer != kLogits) continue;
      if (vocabulary_ == 0) vocabulary_ = each.width;
      expect((name + ": columns of logits").c_str(), each.width, vocabulary_);
    }
    expect_none(program_.add(name, std::move(step)));
  }

  Program program_;
  std::vector<nb::object> kept_;
  std::vector<size_t> page_bytes_;  // of each layer
  int64_t vocabulary_ = 0, hidden_size_ = 0;
};

}  // namespace

void bind_program(nb::module_& m) {
  using namespace nb::literals;
  nb::class_<BoundProgram>(m, "Program")
      .def(nb::init<int, int, int>(), "buffers"_a, "layers"_a, "groups"_a)
      .def("gather", &BoundProgram::gather, "name"_a, "table"_a, "out"_a)
      .def("product", &BoundProgram::product, "name"_a, "x"_a, "segments"_a, "out"_a, nb::kw_only(),
           "norm"_a.none() = nb::none(), "residual"_a = nb::none(), "epsilon"_a = 0.0f, "activation"_a = 0,
           "adapter_offset"_a = -1)
      .def("attention", &BoundProgram::attention, "name"_a, "q"_a, "k"_a, "v"_a, "out"_a, "cos"_a, "sin"_a, "layer"_a,
           "group"_a, nb::kw_only(), "num_heads"_a, "num_kv_heads"_a, "head_size"_a, "scale"_a, "softcap"_a = 0.0f,
           "window"_a = 0, "rotary_dim"_a = 0, "interleaved"_a = false, "kv_layout"_a = 0)
      .def("pick", &BoundProgram::pick, "name"_a, "x"_a, "out"_a)
      .def("norm", &BoundProgram::norm, "name"_a, "x"_a, "out"_a, "weight"_a, "epsilon"_a)
      .def("element", &BoundProgram::element, "name"_a, "kind"_a, "x"_a, "out"_a, "y"_a = nb::none(), "number"_a = 0.0f)
      .def("set_adapters", &BoundProgram::set_adapters, "values"_a)
      .def("set_pages", &BoundProgram::set_pages, "layer"_a, "pages"_a)
      .def("run", &BoundProgram::run, "input_ids"_a, "positions"_a, "query_start"_a, "context_len"_a, "block_tables"_a,
           "slots"_a, "sample_rows"_a, "adapter_rows"_a, "logits"_a, "threads"_a, "hidden"_a = nb::none())
      .def("set_hidden", &BoundProgram::set_hidden, "place"_a)
      .def_prop_ro("hidden_size", &BoundProgram::hidden_size);
}

}  // namespace skerry::bind
