// skerry.kernels._native: both ops on NumPy arrays. The runtime samples through it; tests compare it with reference.py.
#include "bind.h"

#include <algorithm>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "cpu/isa.h"
#include "cpu/pool.h"
#include "include/matmul_block.h"
#include "include/paged_attention.h"
#include "include/philox.h"
#include "include/sample.h"

namespace nb = nanobind;

namespace skerry::bind {

BlockSegment block_segment(const Segment& given, size_t width) {
  const auto& [weight, rows, format, bias] = given;
  BlockSegment segment;
  segment.rows = rows;
  segment.format = static_cast<BlockFormat>(format);
  const bool known = format >= 0 && format < kFormats;
  if (!known || rows < 1 || width % span(segment.format) != 0) {
    throw std::invalid_argument("a segment of " + std::to_string(rows) + " rows of " + std::to_string(width) +
                                " elements in format " + std::to_string(format));
  }
  const size_t bytes = panels_of(rows) * panel_bytes(segment.format, width / kBlock);
  segment.weight = checked("weight", weight, {bytes});
  if (!bias.is_none()) segment.bias = checked("bias", nb::cast<In<float>>(bias), {static_cast<size_t>(rows)});
  return segment;
}

// adapters (halves), adapter_rows and query_start: all of them or none.
BlockAdapters block_adapters(const nb::object& values, const nb::object& rows, const nb::object& query_start,
                             int64_t offset) {
  BlockAdapters found;
  found.offset = offset;
  const int missing = values.is_none() + rows.is_none() + query_start.is_none();
  if (missing == 3 && offset < 0) return found;
  if (missing > 0) throw std::invalid_argument("adapters, adapter_rows and query_start go together");
  const auto halves = nb::cast<HalfTensor>(values);
  expect_adapters(halves);
  const auto slots = nb::cast<In<int32_t>>(rows);
  expect("dimensions of adapter_rows", slots.ndim(), 1);
  found.given = true;
  found.values = static_cast<const uint16_t*>(halves.data());
  found.rows = slots.data();
  found.query_start = checked("query_start", nb::cast<In<int32_t>>(query_start), {slots.shape(0) + 1});
  found.slots = static_cast<int64_t>(halves.shape(0));
  found.rank = static_cast<int64_t>(halves.shape(1));
  found.columns = static_cast<int64_t>(halves.shape(2));
  found.sequences = static_cast<int64_t>(slots.shape(0));
  return found;
}

}  // namespace skerry::bind

namespace {

using namespace skerry::bind;

skerry::Parallel parallel_for(int threads) {
  skerry::Pool* pool = skerry::Pool::of(threads);
  return pool == nullptr ? skerry::Parallel{} : pool->parallel();
}

template <class T>
Out<T> make(std::initializer_list<size_t> shape) {
  size_t count = 1;
  for (const size_t d : shape) count *= d;
  T* data = new T[count > 0 ? count : 1];
  return Out<T>(data, shape, nb::capsule(data, [](void* p) noexcept { delete[] static_cast<T*>(p); }));
}

Out<float> paged_attention(const In<float>& q, const In<float>& k, const In<float>& v, const InOut<uint8_t>& kv,
                           const In<float>& cos, const In<float>& sin, const In<int32_t>& positions,
                           const In<int32_t>& query_start, const In<int32_t>& context_len,
                           const In<int32_t>& block_table, const In<int32_t>& slot, int num_heads, int num_kv_heads,
                           int head_size, float scale, float softcap, int window, int rotary_dim, bool interleaved,
                           int kv_layout, int threads) {
  const skerry::PagedAttentionShape shape{num_heads,  num_kv_heads, head_size,
                                          rotary_dim, interleaved,  scale,
                                          softcap,    window,       static_cast<skerry::KvLayout>(kv_layout)};
  expect("dimensions of q", q.ndim(), 2);
  expect("dimensions of kv", kv.ndim(), 2);
  expect("dimensions of cos", cos.ndim(), 2);
  expect("dimensions of context_len", context_len.ndim(), 1);
  expect("dimensions of block_table", block_table.ndim(), 2);
  const size_t tokens = q.shape(0), sequences = context_len.shape(0);
  const size_t heads = num_heads, kv_heads = num_kv_heads, size = head_size, half = rotary_dim / 2;
  if (const std::string problem = skerry::check_shape(shape); !problem.empty()) throw std::invalid_argument(problem);
  expect("bytes of a page of kv", kv.shape(1), static_cast<size_t>(shape.page_bytes()));
  skerry::PagedAttentionArgs args;
  args.q = checked("q", q, {tokens, heads * size});
  args.k = checked("k", k, {tokens, kv_heads * size});
  args.v = checked("v", v, {tokens, kv_heads * size});
  args.kv = kv.data();
  args.cos = checked("cos", cos, {cos.shape(0), half});
  args.sin = checked("sin", sin, {cos.shape(0), half});
  args.positions = checked("positions", positions, {tokens});
  args.query_start = checked("query_start", query_start, {sequences + 1});
  args.context_len = context_len.data();
  args.block_table = checked("block_table", block_table, {sequences, block_table.shape(1)});
  args.slot = checked("slot", slot, {tokens});
  args.tokens = static_cast<int64_t>(tokens);
  args.sequences = static_cast<int64_t>(sequences);
  args.table_width = static_cast<int64_t>(block_table.shape(1));
  args.pages = static_cast<int64_t>(kv.shape(0));
  args.table_rows = static_cast<int64_t>(cos.shape(0));
  Out<float> out = make<float>({tokens, heads * size});
  args.out = out.data();
  std::string problem;
  {
    const nb::gil_scoped_release release;
    problem = skerry::paged_attention(shape, args, parallel_for(threads));
  }
  expect_none(problem);
  return out;
}

// The ragged and per-row inputs of Sample, as kernels/sampling.py's SampleRows holds them. Checked.
skerry::SampleArgs sample_args(size_t count, size_t vocabulary, const nb::object& rows) {
  skerry::SampleArgs a;
  a.rows = static_cast<int64_t>(count);
  a.vocabulary = static_cast<int64_t>(vocabulary);
  const auto floats = [&](const char* name, size_t n) {
    return checked(name, nb::cast<In<float>>(rows.attr(name)), {n});
  };
  const auto ints = [&](const char* name, size_t n) {
    return checked(name, nb::cast<In<int32_t>>(rows.attr(name)), {n});
  };
  const auto length = [&](const char* name) { return nb::cast<In<int32_t>>(rows.attr(name)).shape(0); };
  a.temperature = floats("temperature", count);
  a.top_k = ints("top_k", count);
  a.top_p = floats("top_p", count);
  a.min_p = floats("min_p", count);
  a.repetition = floats("repetition", count);
  a.frequency = floats("frequency", count);
  a.presence = floats("presence", count);
  a.seed = checked("seed", nb::cast<In<uint64_t>>(rows.attr("seed")), {count});
  a.token_index = ints("token_index", count);
  a.target = ints("target", count);
  a.hist_start = ints("hist_start", count + 1);
  const size_t hist = length("hist_ids"), bias = length("bias_ids");
  a.hist_ids = ints("hist_ids", hist);
  a.hist_counts = ints("hist_counts", hist);
  a.hist_entries = static_cast<int64_t>(hist);
  a.bias_start = ints("bias_start", count + 1);
  a.bias_ids = ints("bias_ids", bias);
  a.bias_values = floats("bias_values", bias);
  a.bias_entries = static_cast<int64_t>(bias);
  const auto mask = nb::cast<In<int32_t>>(rows.attr("mask"));
  expect("dimensions of mask", mask.ndim(), 2);
  a.mask = mask.data();
  a.mask_rows = static_cast<int64_t>(mask.shape(0));
  a.mask_words = static_cast<int64_t>(mask.shape(1));
  a.mask_row = ints("mask_row", count);
  a.top_n = nb::cast<int32_t>(rows.attr("top_n"));
  if (const std::string problem = skerry::check_sample(a); !problem.empty()) throw std::invalid_argument(problem);
  return a;
}

skerry::SampleArgs sample_args(const In<float>& logits, const nb::object& rows) {
  expect("dimensions of logits", logits.ndim(), 2);
  skerry::SampleArgs a = sample_args(logits.shape(0), logits.shape(1), rows);
  a.logits = logits.data();
  return a;
}

nb::tuple sample(const In<float>& logits, const nb::object& rows, int threads) {
  skerry::SampleArgs a = sample_args(logits, rows);
  const size_t count = logits.shape(0), top = static_cast<size_t>(a.top_n);
  Out<int32_t> token = make<int32_t>({count});
  Out<float> logprob = make<float>({count});
  Out<float> entropy = make<float>({count});
  Out<int32_t> top_ids = make<int32_t>({count, top});
  Out<float> top_logprobs = make<float>({count, top});
  a.token = token.data();
  a.logprob = logprob.data();
  a.entropy = entropy.data();
  a.top_ids = top_ids.data();
  a.top_logprobs = top_logprobs.data();
  std::string problem;
  {
    const nb::gil_scoped_release release;
    problem = skerry::sample(a, parallel_for(threads));
  }
  expect_none(problem);
  return nb::make_tuple(token, logprob, entropy, top_ids, top_logprobs);
}

Out<int32_t> kept(const In<float>& logits, const nb::object& rows, size_t row) {
  const skerry::SampleArgs a = sample_args(logits, rows);
  if (row >= logits.shape(0)) throw std::out_of_range("row");
  std::vector<int32_t> ids(logits.shape(1));
  const size_t count = static_cast<size_t>(skerry::kept_ids(a, static_cast<int64_t>(row), ids.data()));
  Out<int32_t> out = make<int32_t>({count});
  std::copy_n(ids.data(), count, out.data());
  return out;
}

nb::list matmul_block(const In<float>& x, const std::vector<Segment>& segments, const nb::object& norm,
                      const nb::object& residual, float epsilon, int activation, const nb::object& adapters,
                      const nb::object& adapter_rows, const nb::object& query_start, int64_t adapter_offset,
                      int threads) {
  expect("dimensions of x", x.ndim(), 2);
  const size_t tokens = x.shape(0), width = x.shape(1);
  skerry::MatMulBlockArgs args;
  args.x = x.data();
  args.tokens = static_cast<int64_t>(tokens);
  args.width = static_cast<int64_t>(width);
  args.epsilon = epsilon;
  args.activation = static_cast<skerry::Activation>(activation);
  args.segments = static_cast<int>(segments.size());
  args.adapters = block_adapters(adapters, adapter_rows, query_start, adapter_offset);
  if (!norm.is_none()) args.norm = checked("norm", nb::cast<In<float>>(norm), {width});
  nb::list outputs;
  for (size_t s = 0; s < segments.size() && s < skerry::kMaxSegments; ++s) {
    args.segment[s] = block_segment(segments[s], width);
    const size_t rows = args.segment[s].rows;
    if (s == 0 && !residual.is_none())
      args.residual = checked("residual", nb::cast<In<float>>(residual), {tokens, rows});
    if (s > 0 && activation != 0) continue;
    Out<float> out = make<float>({tokens, rows});
    args.segment[s].out = out.data();
    outputs.append(out);
  }
  std::string problem;
  {
    const nb::gil_scoped_release release;
    problem = skerry::matmul_block(args, parallel_for(threads));
  }
  expect_none(problem);
  return outputs;
}

Out<float> gather_block(const In<int32_t>& ids, const Segment& table, size_t width) {
  expect("dimensions of ids", ids.ndim(), 1);
  Out<float> out = make<float>({ids.shape(0), width});
  const std::string problem = skerry::gather_block(block_segment(table, width), static_cast<int64_t>(width), ids.data(),
                                                   static_cast<int64_t>(ids.shape(0)), out.data());
  expect_none(problem);
  return out;
}

nb::tuple philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t key0, uint32_t key1) {
  uint32_t counter[4] = {c0, c1, c2, c3};
  skerry::philox4x32(counter, key0, key1);
  return nb::make_tuple(counter[0], counter[1], counter[2], counter[3]);
}

}  // namespace

NB_MODULE(_native, m) {
  using namespace nb::literals;
  // At exit the interpreter does not take everything apart; what is left then is no leak, and no news for users.
  nb::set_leak_warnings(false);
  m.attr("ABI") = 1;
  m.attr("VERSION") = SKERRY_VERSION;
  m.attr("OPS") = nb::make_tuple("skerry.GatherBlock:1", "skerry.MatMulBlock:1", "skerry.MatMulBlock:2",
                                 "skerry.PagedAttention:1", "skerry.Sample:1");
  m.attr("SPLIT_TOKENS") = skerry::kSplitTokens;
  m.def("isa", [] { return std::string(skerry::isa_name(skerry::isa())); });
  m.def("paged_attention", &paged_attention, "q"_a, "k"_a, "v"_a, "kv"_a, "cos"_a, "sin"_a, "positions"_a,
        "query_start"_a, "context_len"_a, "block_table"_a, "slot"_a, nb::kw_only(), "num_heads"_a, "num_kv_heads"_a,
        "head_size"_a, "scale"_a, "softcap"_a = 0.0f, "window"_a = 0, "rotary_dim"_a = 0, "interleaved"_a = false,
        "kv_layout"_a = 0, "threads"_a = 1);
  m.def("matmul_block", &matmul_block, "x"_a, "segments"_a, nb::kw_only(), "norm"_a = nb::none(),
        "residual"_a = nb::none(), "epsilon"_a = 0.0f, "activation"_a = 0, "adapters"_a = nb::none(),
        "adapter_rows"_a = nb::none(), "query_start"_a = nb::none(), "adapter_offset"_a = -1, "threads"_a = 1);
  m.def("gather_block", &gather_block, "ids"_a, "table"_a, "width"_a);
  m.def("sample", &sample, "logits"_a, "rows"_a, "threads"_a = 1);
  m.def("kept", &kept, "logits"_a, "rows"_a, "row"_a);
  m.def(
      "check_sample",
      [](size_t vocabulary, const nb::object& rows) {
        sample_args(nb::cast<In<float>>(rows.attr("temperature")).shape(0), vocabulary, rows);
      },
      "vocabulary"_a, "rows"_a);
  bind_program(m);
  bind_cuda(m);
  bind_sample_cuda(m);
  m.def("philox4x32", &philox, "c0"_a, "c1"_a, "c2"_a, "c3"_a, "key0"_a, "key1"_a);
}
