// Attention to what is stored, in two kernels. Sequences of few rows (decode, verification) are bound by memory: a
// block takes 16 rows of one KV head and one split of 256 tokens, and its warps stream pages independently of each
// other. Sequences of many rows (prefill) are bound by arithmetic: a block takes 64 or 128 rows and walks all their
// keys. Which it is depends on the sequence alone, so no neighbour in the batch changes a bit. The host sees none of
// the lengths: grids are padded, and what has no work returns at once, so a captured launch serves any step of its
// size.
#include "attention_load.h"
#include "attention_split.h"

namespace skerry::cuda {
namespace {

template <class E>
DEVICE E* out_row(const PagedAttentionTask& task, const Sequence& sequence, int kv_head, int row) {
  const int group = task.heads / task.kv_heads;
  const int64_t token = sequence.first + row / group;
  return static_cast<E*>(task.out) + (token * task.heads + kv_head * group + row % group) * task.head_size;
}

// The keys that rows first..last (tokens of the query) see between them, as far as the block table goes.
struct Span {
  int begin, end;

  DEVICE Span(const PagedAttentionTask& task, const Sequence& sequence, int first, int last)
      : begin(sequence.first_key(first, task.window)),
        end(min(sequence.last_key(last) + 1, task.table_width * kPage)) {}
};

// Whether a row sees a key, and whether all rows of a tile see all keys of a stretch.
struct Sight {
  const PagedAttentionTask& task;
  const Sequence& sequence;
  int first_row, last_row, group;

  DEVICE Sight(const PagedAttentionTask& t, const Sequence& s, int first, int count)
      : task(t), sequence(s), first_row(first), group(t.heads / t.kv_heads) {
    last_row = min(first + count, s.tokens * group) - 1;
  }
  DEVICE bool of(int row, int key) const {
    const int token = (first_row + row) / group;
    return first_row + row <= last_row && key <= sequence.last_key(token) &&
           key >= sequence.first_key(token, task.window);
  }
  DEVICE bool all(int key, int keys) const {
    return key + keys - 1 <= sequence.last_key(first_row / group) &&
           key >= sequence.first_key(last_row / group, task.window);
  }
  DEVICE bool none(int key) const { return first_row > last_row || key > sequence.last_key(last_row / group); }
};

constexpr int kStages = 3;  // pages of a warp on their way or in use

template <class E, int D>
DEVICE int warp_bytes(Stored stored) {
  constexpr int kWide = Layout<E, D>::kPageBytes;
  return stored == Stored::kWide ? kStages * kWide : kStages * 2 * kPage * D + kWide;
}

// The pages of a split that are this warp's, one after the other, kStages - 1 of them asked for ahead.
template <class E, int D>
DEVICE void walk_pages(const PagedAttentionTask& task, const Sequence& sequence, int kv_head, const Span& span,
                       const Sight& sight, Rows<E, D, 1>& rows, const unsigned char* q, unsigned char* room) {
  constexpr int kRow = Layout<E, D>::kRow;
  const int warps = static_cast<int>(blockDim.x / 32), warp = static_cast<int>(threadIdx.x / 32);
  const Share share = {static_cast<int>(threadIdx.x % 32), 32};
  const bool wide = task.stored == Stored::kWide;
  const int stage_bytes = wide ? Layout<E, D>::kPageBytes : 2 * kPage * D;
  const int values = wide ? kPage * kRow : kPage * D;
  unsigned char* tile = room + kStages * stage_bytes;  // of codes only
  const Scores scores(task);
  const int split = static_cast<int>(blockIdx.z) * (kSplit / kPage);
  const int end = min((span.end + kPage - 1) / kPage, split + kSplit / kPage);
  int first = split + warp;
  while ((first + 1) * kPage <= span.begin) first += warps;
  const auto ask = [&](int i) {
    unsigned char* stage = room + i % kStages * stage_bytes;
    const int page = first + i * warps;
    if (page < end) ask_page<E, D>(task, sequence, kv_head, page, stage, stage + values, share);
    commit_copies();
  };
  for (int i = 0; i < kStages - 1; ++i) ask(i);
  for (int i = 0; first + i * warps < end; ++i) {
    const int page = first + i * warps;
    ask(i + kStages - 1);
    wait_copies<kStages - 1>();
    __syncwarp();
    const unsigned char* stage = room + i % kStages * stage_bytes;
    const unsigned char* k = stage;
    if (!wide) {
      widen_page<E, D>(task, sequence, kv_head, page, stage, tile, tile + kPage * kRow, share);
      __syncwarp();
      k = tile;
    }
    attend<E, D, 1, kPage>(rows, q, k, k + kPage * kRow, scores, sight.all(page * kPage, kPage),
                           [&](int row, int key) { return sight.of(row, page * kPage + key); });
    __syncwarp();
  }
  wait_copies<0>();
}

// parts[count] of the block's tile become its rows of the output.
template <class E, int D>
DEVICE void write_rows(const PagedAttentionTask& task, const Sequence& sequence, int kv_head, const Sight& sight,
                       const float* parts, int count, int64_t stride) {
  for (int at = static_cast<int>(threadIdx.x); at < kTile * D; at += static_cast<int>(blockDim.x)) {
    const int row = at / D;
    if (sight.first_row + row > sight.last_row) break;
    const Merged all = merged(parts, count, stride, row, at % D, D);
    from_float(all.sum > 0 ? all.value / all.sum : 0.0f,
               out_row<E>(task, sequence, kv_head, sight.first_row + row)[at % D]);
  }
}

// What the warps found becomes the split's result; the block that brings the last one merges them.
template <class E, int D>
DEVICE void hand_in(const PagedAttentionTask& task, const Sequence& sequence, int kv_head, const Sight& sight, int tile,
                    int split, int splits, const float* parts, int64_t stride, uint32_t* last) {
  const int warps = static_cast<int>(blockDim.x / 32);
  if (splits == 1) return write_rows<E, D>(task, sequence, kv_head, sight, parts, warps, stride);
  const int64_t place = (static_cast<int64_t>(sequence.number) * task.kv_heads + kv_head) * task.tiles + tile;
  float* results = task.partial + place * task.splits * kPartFloats<D>;
  float* mine = results + static_cast<int64_t>(split) * kPartFloats<D>;
  for (int at = static_cast<int>(threadIdx.x); at < kTile * D; at += static_cast<int>(blockDim.x)) {
    const int row = at / D;
    const Merged all = merged(parts, warps, stride, row, at % D, D);
    mine[2 * kTile + at] = all.value;
    if (at % D == 0) mine[row] = all.max, mine[kTile + row] = all.sum;
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    *last = atomicAdd(&task.arrived[place], 1u) == static_cast<uint32_t>(splits) - 1;
    __threadfence();
  }
  __syncthreads();
  if (*last) write_rows<E, D>(task, sequence, kv_head, sight, results, splits, kPartFloats<D>);
}

// grid: sequences * tiles, KV heads, splits. Shared memory: 16 bytes, 16 query rows, what each warp needs.
template <class E, int D>
DEVICE void few(const PagedAttentionTask& task, unsigned char* shared) {
  const int tile = static_cast<int>(blockIdx.x) % task.tiles, kv_head = static_cast<int>(blockIdx.y);
  const Sequence sequence(task, static_cast<int>(blockIdx.x) / task.tiles);
  const int group = task.heads / task.kv_heads, all = sequence.tokens * group;
  if (all > kFewRows || tile * kTile >= all) return;
  const Sight sight(task, sequence, tile * kTile, kTile);
  const Span span(task, sequence, sight.first_row / group, sight.last_row / group);
  const int first_split = span.begin / kSplit, split = static_cast<int>(blockIdx.z);
  const int splits = max(1, (span.end + kSplit - 1) / kSplit - first_split);
  if (split < first_split || split >= first_split + splits) return;
  uint32_t* last = reinterpret_cast<uint32_t*>(shared);
  unsigned char* q = shared + 16;
  unsigned char* rooms = q + kTile * Layout<E, D>::kRow;
  load_queries<E, D>(task, sequence, kv_head, sight.first_row, kTile, q);
  __syncthreads();
  Rows<E, D, 1> rows;
  rows.clear();
  unsigned char* room = rooms + threadIdx.x / 32 * warp_bytes<E, D>(task.stored);
  walk_pages<E, D>(task, sequence, kv_head, span, sight, rows, q, room);
  rows.finish();
  keep_part(rows, reinterpret_cast<float*>(room));
  __syncthreads();
  hand_in<E, D>(task, sequence, kv_head, sight, tile, split - first_split, splits, reinterpret_cast<float*>(rooms),
                warp_bytes<E, D>(task.stored) / 4, last);
}

// The sequence and the first row of a block of `rows` rows; false: there is none. Long tiles of a sequence come first.
DEVICE bool find_rows(const PagedAttentionTask& task, int rows, int& sequence, int& first_row) {
  const int group = task.heads / task.kv_heads;
  int left = static_cast<int>(blockIdx.x);
  for (sequence = 0; sequence < task.sequences; ++sequence) {
    const int all = (task.query_start[sequence + 1] - task.query_start[sequence]) * group;
    const int blocks = all > kFewRows ? (all + rows - 1) / rows : 0;
    if (left < blocks) {
      first_row = (blocks - 1 - left) * rows;
      return true;
    }
    left -= blocks;
  }
  return false;
}

template <class E, int D, int kTiles>
DEVICE void write_tiles(const PagedAttentionTask& task, const Sequence& sequence, int kv_head, const Sight& sight,
                        const Rows<E, D, kTiles>& rows) {
  const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
  for (int t = 0; t < kTiles; ++t)
    for (int h = 0; h < 2; ++h) {
      const int row = sight.first_row + t * kTile + lane / 4 + 8 * h;
      if (row > sight.last_row) continue;
      const float share = rows.sum[t][h] > 0 ? 1.0f / rows.sum[t][h] : 0.0f;
      E* out = out_row<E>(task, sequence, kv_head, row) + 2 * (lane % 4);
#pragma unroll
      for (int d = 0; d < D / 8; ++d)
        *reinterpret_cast<uint32_t*>(out + d * 8) =
            pack(rows.o[t][d][2 * h] * share, rows.o[t][d][2 * h + 1] * share, E());
    }
}

// grid: tiles of all sequences, KV heads. Shared memory: the block's query rows, two stages of kKeys keys and values
// and, of codes, room to widen them.
template <class E, int D, int kTiles, int kKeys>
DEVICE void many(const PagedAttentionTask& task, unsigned char* shared) {
  constexpr int kRow = Layout<E, D>::kRow;
  const int rows_of_block = static_cast<int>(blockDim.x) / 32 * kTiles * kTile, kv_head = static_cast<int>(blockIdx.y);
  int number, first_row;
  if (!find_rows(task, rows_of_block, number, first_row)) return;
  const Sequence sequence(task, number);
  const int group = task.heads / task.kv_heads, warp = static_cast<int>(threadIdx.x / 32);
  const Sight block(task, sequence, first_row, rows_of_block);
  const Sight sight(task, sequence, first_row + warp * kTiles * kTile, kTiles * kTile);
  const Span span(task, sequence, first_row / group, block.last_row / group);
  const Share share = {static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x)};
  const bool wide = task.stored == Stored::kWide;
  const int stage_bytes = wide ? 2 * kKeys * kRow : 2 * kKeys * D, row_bytes = wide ? kRow : D;
  unsigned char* q = shared;
  unsigned char* stages = q + rows_of_block * kRow;
  unsigned char* tile = stages + 2 * stage_bytes;  // of codes only
  load_queries<E, D>(task, sequence, kv_head, first_row, rows_of_block, q);
  Rows<E, D, kTiles> rows;
  rows.clear();
  const Scores scores(task);
  const int begin = span.begin / kKeys * kKeys;
  const auto ask = [&](int key) {
    unsigned char* stage = stages + (key / kKeys) % 2 * stage_bytes;
    for (int page = 0; key < span.end && page < kKeys / kPage; ++page) {
      unsigned char* keys = wide ? stage + page * kPage * row_bytes : stage + page * 2 * kPage * D;
      unsigned char* values = wide ? keys + kKeys * row_bytes : keys + kPage * D;
      ask_page<E, D>(task, sequence, kv_head, key / kPage + page, keys, values, share);
    }
    commit_copies();
  };
  ask(begin);
  for (int key = begin; key < span.end; key += kKeys) {
    ask(key + kKeys);
    wait_copies<1>();
    __syncthreads();
    const unsigned char* stage = stages + (key / kKeys) % 2 * stage_bytes;
    const unsigned char* k = stage;
    if (!wide) {
      for (int page = 0; page < kKeys / kPage; ++page) {
        unsigned char* keys = tile + page * kPage * kRow;
        widen_page<E, D>(task, sequence, kv_head, key / kPage + page, stage + page * 2 * kPage * D, keys,
                         keys + kKeys * kRow, share);
      }
      __syncthreads();
      k = tile;
    }
    if (!sight.none(key))
      attend<E, D, kTiles, kKeys>(rows, q + warp * kTiles * kTile * kRow, k, k + kKeys * kRow, scores,
                                  sight.all(key, kKeys), [&](int row, int at) { return sight.of(row, key + at); });
    __syncthreads();
  }
  wait_copies<0>();
  rows.finish();
  write_tiles<E, D, kTiles>(task, sequence, kv_head, sight, rows);
}

}  // namespace

#define SKERRY_FEW(type, E, D) SKERRY_KERNEL(paged_attention_few_##type##_##D, PagedAttentionTask, 128, 1, (few<E, D>))
#define SKERRY_MANY(type, E, D, tiles, keys) \
  SKERRY_KERNEL(paged_attention_many##tiles##_##type##_##D, PagedAttentionTask, 128, 1, (many<E, D, tiles, keys>))
#define SKERRY_ATTENTION(type, E)  \
  SKERRY_FEW(type, E, 64)          \
  SKERRY_FEW(type, E, 128)         \
  SKERRY_FEW(type, E, 256)         \
  SKERRY_MANY(type, E, 64, 1, 32)  \
  SKERRY_MANY(type, E, 64, 2, 32)  \
  SKERRY_MANY(type, E, 128, 1, 32) \
  SKERRY_MANY(type, E, 128, 2, 32) \
  SKERRY_MANY(type, E, 256, 1, 16)

SKERRY_ATTENTION(f16, __half)
SKERRY_ATTENTION(bf16, __nv_bfloat16)

}  // namespace skerry::cuda
