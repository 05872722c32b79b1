// A row on its way from raw logits to what is drawn from: loading, statistics, penalties, bias, mask, temperature.
#pragma once

#include "sample_cut.h"

namespace skerry::cuda {

// A warp's chunk of 256 ids: statistics relative to its own maximum, as sums do not depend on who else sums then.
DEVICE ChunkStatistics statistics_of(const float (&v)[kChunk / kWarp]) {
  ChunkStatistics found = {-INFINITY, 0.0f, 0.0f};
  for (const float x : v) found.max = fmaxf(found.max, x);
  found.max = warp_max(found.max);
  if (found.max == -INFINITY) return found;
  for (const float x : v) {
    if (x == -INFINITY) continue;
    const float d = x - found.max, e = expf(d);
    found.sum += e;
    found.weighted += e > 0.0f ? e * d : 0.0f;  // d may be -inf
  }
  found.sum = warp_sum(found.sum);
  found.weighted = warp_sum(found.weighted);
  return found;
}

// Raw logits into the block's part; statistics of its chunks; their maximum and whether they are broken into s.facts.
template <class Logit>
DEVICE void load_part(const Logit* row, const Part& part, ChunkStatistics* chunks, SampleShared& s) {
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  uint32_t largest = 0, broken = 0;
  for (int begin = threadIdx.x / kWarp * kChunk; begin < part.count; begin += warps * kChunk) {
    float v[kChunk / kWarp];
    for (int j = 0; j < kChunk / kWarp; ++j) {
      const int i = begin + j * kWarp + lane;
      v[j] = i < part.count ? to_float(row[part.first + i]) : -INFINITY;
      broken |= !(v[j] < INFINITY);
      if (i < part.count) part.z[i] = v[j];
    }
    const ChunkStatistics found = statistics_of(v);
    if (lane == 0) chunks[(part.first + begin) / kChunk] = found;
    largest = max(largest, ordered_bits(found.max));
  }
  if (lane == 0) atomicMax(&s.facts.raw_max, largest);
  if (broken) atomicOr(&s.facts.raw_broken, 1u);
  __syncthreads();
}

// apply(entry) for those entries whose id this block holds: each by some thread, or all by one, in order, where an id
// comes more than once.
template <class Apply>
DEVICE void each_entry(const Part& part, const int32_t* ids, int begin, int end, SampleShared& s, const Apply& apply) {
  const auto local = [&](int entry) { return ids[entry] - part.first; };
  const auto mine = [&](int entry) { return local(entry) >= 0 && local(entry) < part.count; };
  for (int word = threadIdx.x; word * 32 < part.count; word += blockDim.x) part.marks[word] = 0;
  if (threadIdx.x == 0) s.repeated = 0;
  __syncthreads();
  for (int entry = begin + threadIdx.x; entry < end; entry += blockDim.x) {
    if (!mine(entry)) continue;
    const uint32_t bit = 1u << (local(entry) % 32);
    if (atomicOr(&part.marks[local(entry) / 32], bit) & bit) atomicOr(&s.repeated, 1u);
  }
  __syncthreads();
  const int first = s.repeated ? (threadIdx.x == 0 ? 0 : end) : threadIdx.x, step = s.repeated ? 1 : blockDim.x;
  for (int entry = begin + first; entry < end; entry += step) {
    if (mine(entry)) apply(entry, part.z[local(entry)]);
  }
  __syncthreads();
}

// Steps 1 and 2 of the definition on the block's part, in place; its maximum and whether it is broken into s.facts.
DEVICE void adjust_part(const SampleArgs& a, int row, const Part& part, SampleShared& s) {
  if (a.hist_start[row] < a.hist_start[row + 1]) {
    each_entry(part, a.hist_ids, a.hist_start[row], a.hist_start[row + 1], s, [&](int entry, float& z) {
      const int32_t count = a.hist_counts[entry];
      float value = z > 0.0f ? z / a.repetition[row] : z * a.repetition[row];
      value = value - a.frequency[row] * static_cast<float>(count);
      z = count > 0 ? value - a.presence[row] : value;
    });
  }
  if (a.bias_start[row] < a.bias_start[row + 1]) {
    each_entry(part, a.bias_ids, a.bias_start[row], a.bias_start[row + 1], s,
               [&](int entry, float& z) { z = z + a.bias_values[entry]; });
  }
  const int32_t* mask = a.mask_row[row] < 0 ? nullptr : a.mask + a.mask_row[row] * a.mask_words;
  const float temperature = a.temperature[row];
  uint32_t largest = 0, broken = 0;
  for (int i = threadIdx.x; i < part.count; i += blockDim.x) {
    const int id = part.first + i;
    float z = part.z[i];
    if (mask != nullptr && (static_cast<uint32_t>(mask[id / 32]) >> (id % 32) & 1) == 0) z = -INFINITY;
    if (temperature >= kGreedyTemperature) z = z / temperature + 0.0f;
    part.z[i] = z;
    broken |= !(z < INFINITY);
    if (z < INFINITY) largest = max(largest, ordered_bits(z));
  }
  largest = warp_max(largest);
  if (threadIdx.x % kWarp == 0) atomicMax(&s.facts.max, largest);
  if (broken) atomicOr(&s.facts.broken, 1u);
  __syncthreads();
}

struct RowStatistics {
  double log_sum;  // of e^(x - max)
  double entropy;  // nats
};

// Of the chunks of all blocks, always summed in the same order; for thread 0.
DEVICE RowStatistics merge_chunks(const ChunkStatistics* chunks, int count, float top, SampleShared& s) {
  static_assert(sizeof s.histogram >= 2 * kChunks * sizeof(double));
  double* sums = reinterpret_cast<double*>(s.histogram);
  double* weighted = sums + kChunks;
  __syncthreads();
  for (int c = threadIdx.x; c < count; c += blockDim.x) {
    const double apart = static_cast<double>(chunks[c].max) - static_cast<double>(top), factor = exp(apart);
    sums[c] = factor > 0.0 ? factor * chunks[c].sum : 0.0;
    weighted[c] = factor > 0.0 ? factor * (chunks[c].weighted + apart * chunks[c].sum) : 0.0;
  }
  __syncthreads();
  double sum = 0.0, all_weighted = 0.0;
  if (threadIdx.x < kWarp) {
    for (int c = threadIdx.x; c < count; c += kWarp) {
      sum += sums[c];
      all_weighted += weighted[c];
    }
    sum = warp_sum(sum);
    all_weighted = warp_sum(all_weighted);
  }
  __syncthreads();
  return {log(sum), fmax(0.0, log(sum) - all_weighted / sum)};
}

}  // namespace skerry::cuda
