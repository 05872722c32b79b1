// What a launch of Sample is given, and what its blocks share in device memory. Plain data, for host and device.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../include/philox.h"
#include "../include/sample.h"

namespace skerry::cuda {

using Count = unsigned long long;  // what 64-bit atomics take

inline constexpr int kChunk = 256;               // ids whose statistics are summed together, by one warp
inline constexpr int kMostVocabulary = 1 << 18;  // 262,144
inline constexpr int kChunks = kMostVocabulary / kChunk;
inline constexpr int kBins = 2048;
inline constexpr int kListed = 512;   // places that are ranked rather than put into a histogram once more
inline constexpr int kMostTeam = 32;  // blocks that share a row
inline constexpr int kWarp = 32;
inline constexpr int kMostWarps = 32;

// The order of the definition: larger logits first, the lower id of equals. `key` is ordered_bits.
struct Place {
  uint32_t key;
  int32_t id;
};

// Of one chunk of raw logits, relative to its own maximum, so that they do not depend on who sums what.
struct ChunkStatistics {
  float max, sum, weighted;
};

struct Winner {
  Count score;  // bits of a double >= 0: they are ordered as the numbers are
  int32_t id;   // -1: none
};

// One narrowing of the candidates: masses or counts by bin, and the places of a bin that is to be ranked.
struct Narrowing {
  Count histogram[kBins];
  Count total;
  uint32_t listed[2];  // of a first list that may turn out too long, and of a second
  Place list[kListed];
};

// Facts of a row that all its blocks contribute to. Zero: nothing yet.
struct RowFacts {
  uint32_t raw_max, max;        // ordered_bits, before and after adjusting
  uint32_t raw_broken, broken;  // holds a NaN or +inf
  uint32_t top;                 // places in the list of the most likely
};

// Scratch of a team of blocks. What begins at zero is zero before a launch and after it, and is there in three copies
// that rows or narrowings take in turn: one in use, one that slower blocks may still read, one that is being cleared.
struct TeamScratch {
  uint32_t arrived;
  RowFacts facts[3];
  Narrowing narrowing[3];  // but for the lists
  // Written before they are read. Of two rows in turn: the first block may still be at the one before.
  Winner winners[2][kMostTeam];
  ChunkStatistics chunks[2][kChunks];
  Place top[2][kMaxTopN];
};

// Shared memory of a block; the block's part of the logits and its marks follow, where there is room for them.
struct SampleShared {
  Count histogram[kBins];
  Count masses[kListed];
  Place list[kListed];
  Winner winners[kMostWarps];
  Count total, before;
  double log_sum;
  Place cut;
  uint32_t bin, listed[2], best, repeated;
  RowFacts facts;
};

// Pointers of `args` are the device's. `teams` teams of `team_size` blocks take rows in turn; a block holds `part` ids
// of its row, a multiple of kChunk. `parts`: device memory of [blocks][part] floats and [blocks][part / 32] words where
// shared memory is too small; null: it is not.
struct SampleTask {
  SampleArgs args;
  TeamScratch* scratch = nullptr;
  unsigned char* parts = nullptr;
  Place* cuts = nullptr;  // [rows], for tests: the last place that top-k and top-p keep; null: not asked for
  int32_t teams = 0;
  int32_t team_size = 0;
  int32_t part = 0;
};

SKERRY_ANYWHERE constexpr size_t part_bytes(int part) { return sizeof(float) * part + sizeof(uint32_t) * (part / 32); }

}  // namespace skerry::cuda
