// How a step of PagedAttention is laid over a GPU. Pure: it reads sizes, never what lies on the device.
#include <algorithm>
#include <limits>

#include "../include/paged_attention_cuda.h"

namespace skerry::cuda {
namespace {

constexpr int kStages = 3;
constexpr int64_t kMostThreads = 2'048;  // of a multiprocessor

std::string check(const PagedAttentionTask& t, bool bfloat16, const CudaDevice& device) {
  const auto number = [](int64_t n) { return std::to_string(n); };
  if (device.sm < 75) return "compute capability " + number(device.sm) + ", at least 75 is needed";
  if (bfloat16 && device.sm < 80)
    return "bfloat16 on compute capability " + number(device.sm) + ", at least 80 is needed";
  if (t.head_size != 64 && t.head_size != 128 && t.head_size != 256)
    return "a head size of " + number(t.head_size) + ", the GPU kernels have 64, 128 and 256";
  if (t.kv_heads < 1 || t.heads < 1 || t.heads % t.kv_heads != 0 || t.heads / t.kv_heads > kFewRows)
    return number(t.heads) + " heads over " + number(t.kv_heads) + " KV heads";
  if (t.rotary < 0 || t.rotary > t.head_size || t.rotary % 2 != 0) return "a rotary dimension of " + number(t.rotary);
  if (t.rotary > 0 && t.table_rows < 1) return "rotary tables without rows";
  if (t.window < 0 || !(t.softcap >= 0))
    return "a window of " + number(t.window) + ", a soft cap of " + std::to_string(t.softcap);
  if (t.tokens < 0 || t.sequences < 1 || t.table_width < 0 || t.pages < 0) return "negative sizes, or no sequence";
  if (t.pages > std::numeric_limits<int32_t>::max() / kPage)
    return number(t.pages) + " pages: slots are 32-bit numbers";
  if (t.table_width > std::numeric_limits<int32_t>::max() / kPage)
    return "a block table of " + number(t.table_width) + " pages";
  for (const void* at : {t.q, t.k, t.v, static_cast<const void*>(t.out), static_cast<const void*>(t.kv)})
    if (reinterpret_cast<uintptr_t>(at) % 16 != 0)
      return "q, k, v, the result and pages begin at multiples of 16 bytes";
  for (const int64_t stride : {t.page_stride, t.head_stride, t.token_stride, t.value_offset, t.scale_offset})
    if (stride < 0 || stride % 16 != 0) return "a stride of " + number(stride) + " bytes, multiples of 16 are needed";
  if (t.token_stride > std::numeric_limits<int32_t>::max() / kPage)
    return "a token's stride of " + number(t.token_stride) + " bytes";
  return "";
}

struct Bytes {
  int64_t row, page;  // of E, padded
  int64_t codes;      // of a page as codes, with their scales
  bool wide;

  explicit Bytes(const PagedAttentionTask& t)
      : row(t.head_size * 2 + kRowPadding),
        page(2 * kPage * row),
        codes(2 * kPage * t.head_size + kScaleBytes),
        wide(t.stored == Stored::kWide) {}
  int64_t few(int warps) const { return 16 + kTile * row + warps * (wide ? kStages * page : kStages * codes + page); }
  int64_t many(int tiles, int keys) const {
    const int64_t steps = keys / kPage;
    return kWarps * tiles * kTile * row + steps * (wide ? 2 * page : 2 * codes + page);
  }
};

Launch launch(const std::string& kernel, const PagedAttentionTask& task, int64_t x, int64_t y, int64_t z, int warps,
              int64_t shared_bytes) {
  Launch made;
  made.kernel = kernel;
  made.grid[0] = static_cast<uint32_t>(x);
  made.grid[1] = static_cast<uint32_t>(y);
  made.grid[2] = static_cast<uint32_t>(z);
  made.block[0] = static_cast<uint32_t>(32 * warps);
  made.shared_bytes = static_cast<uint32_t>(shared_bytes);
  made.params = params_of(task);
  return made;
}

}  // namespace

std::string plan_paged_attention(PagedAttentionTask task, bool bfloat16, int64_t most_query, const CudaDevice& device,
                                 void* scratch, int64_t& scratch_bytes, std::vector<Launch>& launches) {
  const std::string problem = check(task, bfloat16, device);
  if (!problem.empty()) return problem;
  const int64_t group = task.heads / task.kv_heads;
  const int64_t most_rows = std::clamp<int64_t>(most_query, 1, std::max(task.tokens, 1)) * group;
  task.tiles = static_cast<int32_t>((std::min<int64_t>(most_rows, kFewRows) + kTile - 1) / kTile);
  task.splits = std::max(1, (task.table_width * kPage + kSplit - 1) / kSplit);
  const int64_t places = int64_t{task.sequences} * task.kv_heads * task.tiles;
  const int64_t counts = (places * static_cast<int64_t>(sizeof(uint32_t)) + 15) / 16 * 16;
  task.part_rows =
      static_cast<int32_t>(std::min<int64_t>(most_rows + most_rows % 2, kTile));  // even: float4 after them
  task.part_floats = task.part_rows * (2 + task.head_size);
  const int64_t parts = task.splits > 1 ? places * task.splits * task.part_floats : 0;
  scratch_bytes = counts + parts * static_cast<int64_t>(sizeof(float));
  if (scratch == nullptr) return "";
  task.arrived = static_cast<uint32_t*>(scratch);
  task.partial = reinterpret_cast<float*>(static_cast<uint8_t*>(scratch) + counts);

  const Bytes bytes(task);
  const std::string kind = (bfloat16 ? "bf16_" : "f16_") + std::to_string(task.head_size);
  const int64_t warps = int64_t{task.tokens} * task.kv_heads;
  launches.push_back(launch(bfloat16 ? "rope_append_bf16" : "rope_append_f16", task,
                            std::max<int64_t>(1, (warps + kWarps - 1) / kWarps), 1, 1, kWarps, 0));
  int few = kWarps;
  while (few > 1 && bytes.few(few) > device.shared_bytes) few /= 2;
  const int64_t at_once = std::clamp<int64_t>(device.shared_bytes / bytes.few(few), 1, kMostThreads / (32 * few));
  launches.push_back(launch("paged_attention_few_" + kind, task,
                            std::min(places * task.splits, at_once * std::max(1, device.multiprocessors)), 1, 1, few,
                            bytes.few(few)));
  if (most_rows > kFewRows) {
    const int keys = task.head_size == 256 ? 16 : 32;
    const bool turing = task.head_size == 128 && !bfloat16 && bytes.many(2, keys) > device.shared_bytes;
    const int tiles = task.head_size == 256 || turing ? 1 : 2;
    const int64_t blocks = task.tokens * group / (kWarps * tiles * kTile) + task.sequences;
    launches.push_back(launch("paged_attention_many" + std::to_string(tiles) + "_" + kind, task, blocks, task.kv_heads,
                              1, kWarps, bytes.many(tiles, keys)));
  }
  for (const Launch& one : launches)
    if (one.shared_bytes > device.shared_bytes)
      return one.kernel + " needs " + std::to_string(one.shared_bytes) +
             " bytes of shared memory a block, the device has " + std::to_string(device.shared_bytes);
  return "";
}

}  // namespace skerry::cuda
