// The draw among what is kept: Gumbel-max in its exponential form. Scores are found roughly first, and exactly for the
// few that are near the least: a logarithm and a division in double precision for each id would cost more than all the
// rest.
#pragma once

#include "sample_cut.h"

namespace skerry::cuda {

// What may be drawn: kept by the cut, not too deep to win, not below min_p.
struct Entrants {
  Place cut;
  float top;
  float min_p;

  DEVICE bool has(Place place) const {
    const float z = float_of(place.key), depth = top - z;
    if (!within(place, cut) || !(depth <= kDepth)) return false;
    if (min_p == 0.0f) return true;
    if (expf(-depth) * kRoughness < min_p) return false;
    return weight_of(z, top) >= static_cast<double>(min_p);
  }
};

// Which token of which request is drawn: the key of the noise.
struct Noise {
  uint64_t seed;
  uint32_t token_index;

  // Of the four ids from 4 * block on.
  DEVICE void words(int block, uint32_t (&out)[4]) const {
    out[0] = static_cast<uint32_t>(block);
    out[1] = token_index;
    out[2] = out[3] = 0;
    philox4x32(out, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  }
};

// visit(place, word of noise) for all entrants: those in s.list, if any are `listed`, else those of the block's part.
template <class Visit>
DEVICE void each_entrant(const Part& part, uint32_t listed, const Entrants& entrants, Noise noise,
                         const SampleShared& s, const Visit& visit) {
  uint32_t words[4];
  for (uint32_t i = threadIdx.x; i < listed; i += blockDim.x) {
    const Place place = s.list[i];
    if (!entrants.has(place)) continue;
    noise.words(place.id / 4, words);
    visit(place, words[place.id % 4]);
  }
  if (listed > 0) return;
  for (int i = 4 * threadIdx.x; i < part.count; i += 4 * blockDim.x) {
    Place places[4];
    bool in[4], any = false;
    for (int j = 0; j < 4; ++j) {
      const bool there = i + j < part.count;
      places[j] = {there ? ordered_bits(part.z[i + j]) : 0, part.first + i + j};
      in[j] = there && entrants.has(places[j]);
      any = any || in[j];
    }
    if (!any) continue;
    noise.words((part.first + i) / 4, words);
    for (int j = 0; j < 4; ++j) {
      if (in[j]) visit(places[j], words[j]);
    }
  }
}

DEVICE bool beats(const Winner& a, const Winner& b) {
  if (a.id < 0 || b.id < 0) return b.id < 0 && a.id >= 0;
  return a.score < b.score || (a.score == b.score && a.id < b.id);
}

// The best of all threads, for thread 0.
DEVICE Winner block_best(Winner mine, SampleShared& s) {
  for (int apart = kWarp / 2; apart > 0; apart /= 2) {
    const Winner other = {__shfl_xor_sync(~0u, mine.score, apart), __shfl_xor_sync(~0u, mine.id, apart)};
    if (beats(other, mine)) mine = other;
  }
  if (threadIdx.x % kWarp == 0) s.winners[threadIdx.x / kWarp] = mine;
  __syncthreads();
  for (int warp = 1; threadIdx.x == 0 && warp < static_cast<int>(blockDim.x) / kWarp; ++warp) {
    if (beats(s.winners[warp], mine)) mine = s.winners[warp];
  }
  return mine;
}

// The winner of those that each_entrant visits, for thread 0.
DEVICE Winner draw(const Part& part, uint32_t listed, const Entrants& entrants, Noise noise, SampleShared& s) {
  if (threadIdx.x == 0) s.best = 0x7F800000u;  // bits of infinity
  __syncthreads();
  float best = INFINITY;
  each_entrant(part, listed, entrants, noise, s, [&](Place place, uint32_t word) {
    best = fminf(best, rough_score(word, float_of(place.key), entrants.top));
  });
  best = -warp_max(-best);
  if (threadIdx.x % kWarp == 0)
    atomicMin(&s.best, __float_as_uint(best));  // positive: their bits are ordered as they are
  __syncthreads();
  const float enough = __uint_as_float(s.best) * kRoughness;
  Winner mine = {0, -1};
  each_entrant(part, listed, entrants, noise, s, [&](Place place, uint32_t word) {
    const float z = float_of(place.key);
    if (rough_score(word, z, entrants.top) > enough) return;
    const Winner found = {static_cast<Count>(__double_as_longlong(exact_score(word, z, entrants.top))), place.id};
    if (beats(found, mine)) mine = found;
  });
  return block_best(mine, s);
}

// The block's first id with the largest value, for thread 0.
DEVICE Winner first_of_largest(const Part& part, float top, SampleShared& s) {
  Winner mine = {0, -1};
  for (int i = threadIdx.x; i < part.count; i += blockDim.x) {
    const Winner found = {0, part.first + i};
    if (part.z[i] == top && beats(found, mine)) mine = found;
  }
  return block_best(mine, s);
}

}  // namespace skerry::cuda
