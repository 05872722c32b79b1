// Attention to what is stored, in two kernels. Sequences of few rows (decode, verification) are bound by memory: a
// block takes 16 rows of one KV head and one split of 256 tokens at a time, and its warps stream pages independently of
// each other. Sequences of many rows (prefill) are bound by arithmetic: a block takes 64 or 128 rows and walks all
// their keys. Which it is depends on the sequence alone, so no neighbour in the batch changes a bit. The host sees none
// of the lengths: blocks find their work from them, so a captured launch serves any step of its size. A grid padded to
// the longest table would spend more time on blocks without work than on the others.
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

  DEVICE Span(const PagedAttentionTask& task, const Sequence& sequence, int first, int last) {
    end = max(0, min(sequence.last_key(last) + 1, task.table_width * kPage));
    begin = min(sequence.first_key(first, task.window), max(0, end - 1));
  }
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
DEVICE int warp_bytes(Stored kind) {
  constexpr int kWide = Layout<E, D>::kPageBytes;
  return kind == Stored::kWide ? kStages * kWide : kStages * kCodeBytes<D> + kWide;
}

// The pages of a split that are this warp's, one after the other, kStages - 1 of them asked for ahead. `meanwhile` is
// done once the first ones are on their way.
template <class E, int D, class Meanwhile>
DEVICE void walk_pages(const PagedAttentionTask& task, const Sequence& sequence, int kv_head, int split,
                       const Span& span, const Sight& sight, Rows<E, D, 1>& rows, const unsigned char* q,
                       unsigned char* room, const Meanwhile& meanwhile) {
  constexpr int kRow = Layout<E, D>::kRow;
  const int warps = static_cast<int>(blockDim.x / 32), warp = static_cast<int>(threadIdx.x / 32);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const bool wide = task.stored == Stored::kWide;
  const int stage_bytes = wide ? Layout<E, D>::kPageBytes : kCodeBytes<D>;
  unsigned char* tile = room + kStages * stage_bytes;  // of codes only
  const Scores scores(task);
  const int begin = split * (kSplit / kPage);
  const int end = min((span.end + kPage - 1) / kPage, begin + kSplit / kPage);
  int first = begin + warp;
  while ((first + 1) * kPage <= span.begin) first += warps;
  const auto ask = [&](int i) {
    unsigned char* stage = room + i % kStages * stage_bytes;
    const int index = first + i * warps;
    if (index < end) {
      const Page page(task, sequence, kv_head, index);
      if (wide)
        ask_wide<E, D, 32>(task, page, stage, stage + kPage * kRow, lane);
      else
        ask_codes<D, 32>(task, page, stage, lane);
    }
    commit_copies();
  };
  for (int i = 0; i < kStages - 1; ++i) ask(i);
  meanwhile();
  for (int i = 0; first + i * warps < end; ++i) {
    const int key = (first + i * warps) * kPage;
    ask(i + kStages - 1);
    wait_copies<kStages - 1>();
    __syncwarp();
    const unsigned char* k = room + i % kStages * stage_bytes;
    if (!wide) {
      widen_page<E, D, 32>(task.stored, sequence.context - key, k, tile, tile + kPage * kRow, lane);
      __syncwarp();
      k = tile;
    }
    attend<E, D, 1, kPage>(rows, q, k, k + kPage * kRow, scores, sight.all(key, kPage),
                           [&](int row, int at) { return sight.of(row, key + at); });
    __syncwarp();
  }
  wait_copies<0>();
}

// Parts of a tile, `rows` rows each, become its rows of the output.
template <class E, int D>
DEVICE void write_rows(const PagedAttentionTask& task, const Sequence& sequence, int kv_head, const Sight& sight,
                       const float* parts, int count, int64_t stride, int rows) {
  const int all_rows = min(rows, sight.last_row + 1 - sight.first_row);
  for (int at = 4 * static_cast<int>(threadIdx.x); at < all_rows * D; at += 4 * static_cast<int>(blockDim.x)) {
    const int row = at / D, d = at % D;
    const Merged all = merged<D>(parts, count, stride, rows, row, d);
    const float share = all.sum == 0 ? 0.0f : 1.0f / all.sum;  // of a NaN it is one
    const uint2 four = {pack(all.value.x * share, all.value.y * share, E()),
                        pack(all.value.z * share, all.value.w * share, E())};
    *reinterpret_cast<uint2*>(out_row<E>(task, sequence, kv_head, sight.first_row + row) + d) = four;
  }
}

// The splits of a sequence in which its rows see keys.
struct Splits {
  int first, count;

  DEVICE Splits(const PagedAttentionTask& task, const Sequence& sequence) {
    const Span span(task, sequence, 0, sequence.tokens - 1);
    first = span.begin / kSplit;
    count = min(max(1, (span.end + kSplit - 1) / kSplit - first), task.splits);
  }
};

// What a block does at a time: a tile of a sequence's rows and a split of its keys.
struct Piece {
  int sequence, kv_head, tile, split;
};

DEVICE int tiles_of(const PagedAttentionTask& task, const Sequence& sequence) {
  const int all = sequence.tokens * (task.heads / task.kv_heads);
  return all <= 0 || all > kFewRows ? 0 : min((all + kTile - 1) / kTile, task.tiles);
}

// Piece `number` of a step, counted over the sequences by one warp; false: there are fewer. KV heads come first, as
// theirs lie side by side in a page.
DEVICE bool find_piece(const PagedAttentionTask& task, int number, Piece& piece) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int first = 0; first < task.sequences; first += 32) {
    int own = 0, tiles = 0;
    if (first + lane < task.sequences) {
      const Sequence sequence(task, first + lane);
      tiles = tiles_of(task, sequence);
      if (tiles > 0) own = tiles * task.kv_heads * Splits(task, sequence).count;
    }
    const int upto = warp_inclusive_sum(own);
    const unsigned behind = __ballot_sync(~0u, upto > number);
    const int found = behind == 0 ? 31 : __ffs(static_cast<int>(behind)) - 1;
    const int before = __shfl_sync(~0u, upto - own, found), all = __shfl_sync(~0u, upto, 31);
    tiles = __shfl_sync(~0u, tiles, found);
    if (behind != 0) {
      const int at = number - before;
      piece = {first + found, at % task.kv_heads, at / task.kv_heads % tiles, at / task.kv_heads / tiles};
      return true;
    }
    number -= all;
  }
  return false;
}

// What the warps found becomes the split's result; the block that brings the last one merges them.
template <class E, int D>
DEVICE void hand_in(const PagedAttentionTask& task, const Sequence& sequence, const Piece& piece, const Sight& sight,
                    int splits, const float* parts, int64_t stride, uint32_t* last) {
  const int warps = static_cast<int>(blockDim.x / 32), rows = task.part_rows;
  if (splits == 1) return write_rows<E, D>(task, sequence, piece.kv_head, sight, parts, warps, stride, kTile);
  const int64_t place =
      (static_cast<int64_t>(piece.sequence) * task.kv_heads + piece.kv_head) * task.tiles + piece.tile;
  float* results = task.partial + place * task.splits * task.part_floats;
  float* mine = results + static_cast<int64_t>(piece.split) * task.part_floats;
  for (int at = 4 * static_cast<int>(threadIdx.x); at < rows * D; at += 4 * static_cast<int>(blockDim.x)) {
    const int row = at / D;
    const Merged all = merged<D>(parts, warps, stride, kTile, row, at % D);
    *reinterpret_cast<float4*>(mine + 2 * rows + at) = all.value;
    if (at % D == 0) mine[row] = all.max, mine[rows + row] = all.sum;
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    *last = atomicAdd(&task.arrived[place], 1u) == static_cast<uint32_t>(splits) - 1;
    __threadfence();
  }
  __syncthreads();
  if (*last) write_rows<E, D>(task, sequence, piece.kv_head, sight, results, splits, task.part_floats, rows);
}

template <class E, int D>
DEVICE void few_piece(const PagedAttentionTask& task, const Piece& piece, unsigned char* shared) {
  const Sequence sequence(task, piece.sequence);
  const int group = task.heads / task.kv_heads;
  const Sight sight(task, sequence, piece.tile * kTile, kTile);
  const Span span(task, sequence, sight.first_row / group, sight.last_row / group);
  const Splits splits(task, sequence);
  uint32_t* last = reinterpret_cast<uint32_t*>(shared);
  unsigned char* q = shared + 16;
  unsigned char* rooms = q + kTile * Layout<E, D>::kRow;
  Rows<E, D, 1> rows;
  rows.clear();
  unsigned char* room = rooms + threadIdx.x / 32 * warp_bytes<E, D>(task.stored);
  walk_pages<E, D>(task, sequence, piece.kv_head, splits.first + piece.split, span, sight, rows, q, room, [&] {
    load_queries<E, D>(task, sequence, piece.kv_head, sight.first_row, kTile, q);
    __syncthreads();
  });
  rows.finish();
  keep_part(rows, reinterpret_cast<float*>(room));
  __syncthreads();
  hand_in<E, D>(task, sequence, piece, sight, splits.count, reinterpret_cast<float*>(rooms),
                warp_bytes<E, D>(task.stored) / 4, last);
}

// grid: as many blocks as run at once; each takes every so-manyth piece. Shared memory: 16 bytes, 16 query rows, what
// each warp needs.
template <class E, int D>
DEVICE void few(const PagedAttentionTask& task, unsigned char* shared) {
  Piece piece;
  for (int number = static_cast<int>(blockIdx.x); find_piece(task, number, piece);
       number += static_cast<int>(gridDim.x)) {
    few_piece<E, D>(task, piece, shared);
    __syncthreads();
  }
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
      const float share = rows.sum[t][h] == 0 ? 0.0f : 1.0f / rows.sum[t][h];
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
  constexpr int rows_of_block = kWarps * kTiles * kTile;
  const int kv_head = static_cast<int>(blockIdx.y), thread = static_cast<int>(threadIdx.x);
  int number, first_row;
  if (!find_rows(task, rows_of_block, number, first_row)) return;
  const Sequence sequence(task, number);
  const int group = task.heads / task.kv_heads, warp = thread / 32;
  const Sight block(task, sequence, first_row, rows_of_block);
  const Sight sight(task, sequence, first_row + warp * kTiles * kTile, kTiles * kTile);
  const Span span(task, sequence, first_row / group, block.last_row / group);
  const bool wide = task.stored == Stored::kWide;
  const int stage_bytes = wide ? 2 * kKeys * kRow : kKeys / kPage * kCodeBytes<D>;
  unsigned char* q = shared;
  unsigned char* stages = q + rows_of_block * kRow;
  unsigned char* tile = stages + 2 * stage_bytes;  // of codes only
  Rows<E, D, kTiles> rows;
  rows.clear();
  const Scores scores(task);
  const int begin = span.begin / kKeys * kKeys;
  const auto ask = [&](int key) {
    unsigned char* stage = stages + (key / kKeys) % 2 * stage_bytes;
    for (int p = 0; key < span.end && p < kKeys / kPage; ++p) {
      const Page page(task, sequence, kv_head, key / kPage + p);
      unsigned char* keys = stage + p * kPage * kRow;
      if (wide)
        ask_wide<E, D, 32 * kWarps>(task, page, keys, keys + kKeys * kRow, thread);
      else
        ask_codes<D, 32 * kWarps>(task, page, stage + p * kCodeBytes<D>, thread);
    }
    commit_copies();
  };
  ask(begin);
  load_queries<E, D>(task, sequence, kv_head, first_row, rows_of_block, q);
  for (int key = begin; key < span.end; key += kKeys) {
    ask(key + kKeys);
    wait_copies<1>();
    __syncthreads();
    const unsigned char* stage = stages + (key / kKeys) % 2 * stage_bytes;
    const unsigned char* k = stage;
    if (!wide) {
      for (int p = 0; p < kKeys / kPage; ++p) {
        unsigned char* keys = tile + p * kPage * kRow;
        widen_page<E, D, 32 * kWarps>(task.stored, sequence.context - key - p * kPage, stage + p * kCodeBytes<D>, keys,
                                      keys + kKeys * kRow, thread);
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

#define SKERRY_FEW(type, E, D) \
  SKERRY_KERNEL(paged_attention_few_##type##_##D, PagedAttentionTask, 32 * kWarps, 1, (few<E, D>))
#define SKERRY_MANY(type, E, D, tiles, keys)                                                    \
  SKERRY_KERNEL(paged_attention_many##tiles##_##type##_##D, PagedAttentionTask, 32 * kWarps, 1, \
                (many<E, D, tiles, keys>))
#define SKERRY_ATTENTION(type, E)  \
  SKERRY_FEW(type, E, 64)          \
  SKERRY_FEW(type, E, 128)         \
  SKERRY_FEW(type, E, 256)         \
  SKERRY_MANY(type, E, 64, 2, 32)  \
  SKERRY_MANY(type, E, 128, 2, 32) \
  SKERRY_MANY(type, E, 256, 1, 16)

SKERRY_ATTENTION(f16, __half)
SKERRY_MANY(f16, __half, 128, 1, 32)  // for Turing, which has too little shared memory for two tiles and no bfloat16
SKERRY_ATTENTION(bf16, __nv_bfloat16)

}  // namespace skerry::cuda
