// Plans of GPU kernels for Python: addresses in, launches out. They run nothing, so they need neither GPU nor driver.
#include "bind.h"
#include "include/paged_attention_cuda.h"

namespace skerry::bind {

nb::tuple as_tuple(const Launch& one) {
  return nb::make_tuple(one.kernel, nb::make_tuple(one.grid[0], one.grid[1], one.grid[2]),
                        nb::make_tuple(one.block[0], one.block[1], one.block[2]), one.shared_bytes, one.together,
                        nb::bytes(one.params.data(), one.params.size()));
}

namespace {

using cuda::PagedAttentionTask;

nb::tuple plan(const PagedAttentionTask& task, bool bfloat16, int64_t most_query, int sm, int multiprocessors,
               uint32_t shared_bytes, uintptr_t scratch) {
  int64_t bytes = 0;
  std::vector<Launch> launches;
  const CudaDevice device{sm, multiprocessors, shared_bytes};
  expect_none(cuda::plan_paged_attention(task, bfloat16, most_query, device, reinterpret_cast<void*>(scratch), bytes,
                                         launches));
  nb::list found;
  for (const Launch& one : launches) found.append(as_tuple(one));
  return nb::make_tuple(found, bytes);
}

template <class T>
void address(nb::class_<PagedAttentionTask>& type, const char* name, T* PagedAttentionTask::* field) {
  type.def_prop_rw(
      name, [field](const PagedAttentionTask& task) { return reinterpret_cast<uintptr_t>(task.*field); },
      [field](PagedAttentionTask& task, uintptr_t at) { task.*field = reinterpret_cast<T*>(at); });
}

}  // namespace

void bind_cuda(nb::module_& m) {
  using namespace nb::literals;
  nb::class_<PagedAttentionTask> type(m, "PagedAttentionTask");
  type.def("__init__", [](PagedAttentionTask* task) { new (task) PagedAttentionTask{}; });
  address(type, "q", &PagedAttentionTask::q);
  address(type, "k", &PagedAttentionTask::k);
  address(type, "v", &PagedAttentionTask::v);
  address(type, "out", &PagedAttentionTask::out);
  address(type, "kv", &PagedAttentionTask::kv);
  address(type, "cos", &PagedAttentionTask::cos);
  address(type, "sin", &PagedAttentionTask::sin);
  address(type, "positions", &PagedAttentionTask::positions);
  address(type, "query_start", &PagedAttentionTask::query_start);
  address(type, "context_len", &PagedAttentionTask::context_len);
  address(type, "block_table", &PagedAttentionTask::block_table);
  address(type, "slot", &PagedAttentionTask::slot);
  type.def_rw("page_stride", &PagedAttentionTask::page_stride)
      .def_rw("head_stride", &PagedAttentionTask::head_stride)
      .def_rw("token_stride", &PagedAttentionTask::token_stride)
      .def_rw("value_offset", &PagedAttentionTask::value_offset)
      .def_rw("scale_offset", &PagedAttentionTask::scale_offset)
      .def_rw("pages", &PagedAttentionTask::pages)
      .def_rw("table_rows", &PagedAttentionTask::table_rows)
      .def_rw("tokens", &PagedAttentionTask::tokens)
      .def_rw("sequences", &PagedAttentionTask::sequences)
      .def_rw("table_width", &PagedAttentionTask::table_width)
      .def_rw("heads", &PagedAttentionTask::heads)
      .def_rw("kv_heads", &PagedAttentionTask::kv_heads)
      .def_rw("head_size", &PagedAttentionTask::head_size)
      .def_rw("rotary", &PagedAttentionTask::rotary)
      .def_rw("interleaved", &PagedAttentionTask::interleaved)
      .def_rw("window", &PagedAttentionTask::window)
      .def_rw("scale", &PagedAttentionTask::scale)
      .def_rw("softcap", &PagedAttentionTask::softcap)
      .def_prop_rw(
          "stored", [](const PagedAttentionTask& task) { return static_cast<int>(task.stored); },
          [](PagedAttentionTask& task, int kind) {
            if (kind < 0 || kind > 2) throw std::invalid_argument("no kind of pages is number " + std::to_string(kind));
            task.stored = static_cast<cuda::Stored>(kind);
          });
  m.def("plan_paged_attention", &plan, "task"_a, "bfloat16"_a, "most_query"_a, "sm"_a, "multiprocessors"_a,
        "shared_bytes"_a, "scratch"_a);
}

}  // namespace skerry::bind
