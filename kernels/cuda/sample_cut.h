// The last place that is kept when places are taken in the definition's order until their counts or masses sum to what
// is needed. Histograms narrow the candidates to a bin, until so few are left that each can be ranked; nothing is
// sorted. Counts and masses are whole numbers: sums in any order, by any number of blocks, are the same.
#pragma once

#include "sample_math.h"
#include "team.h"

namespace skerry::cuda {

// The ids first .. first + count - 1 of a row, which this block holds.
struct Part {
  float* z;
  uint32_t* marks;  // one bit an id
  int first;
  int count;
};

inline constexpr Place kEverything = {0, 0x7FFFFFFF};

// In which bin a place lies at each level, ascending in the order of the definition. The first level is by depth below
// the maximum: unlike the leading bits of a float it tells apart, and spreads over the bins, what lies near the
// maximum.
DEVICE uint32_t bin_of(int level, Place place, float top) {
  if (level == 0) {
    const float depth = (top - float_of(place.key)) * 64.0f;
    return depth < kBins - 1 ? static_cast<uint32_t>(depth) : kBins - 1;
  }
  if (level == 1) return ~place.key >> 21;
  if (level == 2) return ~place.key >> 10 & 2047;
  if (level == 3) return ~place.key & 1023;
  if (level == 4) return static_cast<uint32_t>(place.id) >> 9;
  return static_cast<uint32_t>(place.id) & 511;
}

// Candidates: the places that lie in one bin at each level so far.
struct Range {
  int levels = 0;
  uint32_t bins[6];

  DEVICE bool has(Place place, float top) const {
    bool found = true;
    for (int level = 0; level < levels; ++level) found = found && bin_of(level, place, top) == bins[level];
    return found;
  }
};

template <class Visit>
DEVICE void each_place(const Part& part, Place last, const Visit& visit) {
  for (int i = threadIdx.x; i < part.count; i += blockDim.x) {
    const Place place = {ordered_bits(part.z[i]), part.first + i};
    if (within(place, last)) visit(place);
  }
}

// Sums of the block's candidates by bin, in shared memory. The last bin of the first level has no end, and may have
// nearly everything in it: threads sum it up by themselves.
template <class Weigh>
DEVICE void histogram_of(const Part& part, const Range& range, float top, Place last, const Weigh& weigh,
                         SampleShared& s) {
  for (int bin = threadIdx.x; bin < kBins; bin += blockDim.x) s.histogram[bin] = 0;
  if (threadIdx.x == 0) {
    s.total = 0;
    s.listed[0] = s.listed[1] = 0;
  }
  __syncthreads();
  Count total = 0, deep = 0;
  each_place(part, last, [&](Place place) {
    if (!range.has(place, top)) return;
    const Count weight = weigh(place);
    const uint32_t bin = bin_of(range.levels, place, top);
    total += weight;
    if (range.levels == 0 && bin == kBins - 1) {
      deep += weight;
    } else if (weight > 0) {
      atomicAdd(&s.histogram[bin], weight);
    }
  });
  total = warp_sum(total);
  deep = warp_sum(deep);
  if (threadIdx.x % kWarp == 0) {
    atomicAdd(&s.total, total);
    if (deep > 0) atomicAdd(&s.histogram[kBins - 1], deep);
  }
  __syncthreads();
}

// The team's sums instead of the block's. What the narrowing before this one used is cleared for the one after the
// next.
DEVICE void share_histogram(Team& team, SampleShared& s) {
  if (team.size == 1) return;
  Narrowing& mine = team.scratch->narrowing[team.narrowings % 3];
  for (int bin = threadIdx.x; bin < kBins; bin += blockDim.x) {
    if (s.histogram[bin] > 0) atomicAdd(&mine.histogram[bin], s.histogram[bin]);
  }
  if (threadIdx.x == 0) atomicAdd(&mine.total, s.total);
  team.meet();
  Narrowing& old = team.scratch->narrowing[(team.narrowings + 2) % 3];
  for (int bin = threadIdx.x; bin < kBins; bin += blockDim.x) {
    s.histogram[bin] = mine.histogram[bin];
    if (bin % team.size == team.rank) old.histogram[bin] = 0;
  }
  if (threadIdx.x == 0) {
    s.total = mine.total;
    if (team.rank == 0) old.total = old.listed[0] = old.listed[1] = 0;
  }
  __syncthreads();
}

// s.bin: the first bin with which the sum reaches `need`; s.before: the sum of those before it.
DEVICE void find_bin(Count need, SampleShared& s) {
  if (threadIdx.x < kWarp) {
    const int lane = threadIdx.x;
    Count before = 0;
    for (int first = 0; first < kBins; first += kWarp) {
      const Count mine = s.histogram[first + lane];
      const Count sum = warp_inclusive_sum(mine);
      const uint32_t reached = __ballot_sync(~0u, before + sum >= need);
      if (reached != 0) {
        if (lane == __ffs(reached) - 1) {
          s.bin = first + lane;
          s.before = before + sum - mine;
        }
        break;
      }
      before += __shfl_sync(~0u, sum, kWarp - 1);
    }
  }
  __syncthreads();
}

// Those of all blocks that `wanted` says, into s.list, in any order. Returns how many; more than kListed: too many.
// `which` of a narrowing's two lists it is.
template <class Wanted>
DEVICE uint32_t list_places(Team& team, const Part& part, Place last, int which, const Wanted& wanted,
                            SampleShared& s) {
  Narrowing& shared = team.scratch->narrowing[team.narrowings % 3];
  Place* list = team.size == 1 ? s.list : shared.list;
  uint32_t* listed = team.size == 1 ? &s.listed[which] : &shared.listed[which];
  each_place(part, last, [&](Place place) {
    if (!wanted(place)) return;
    const uint32_t at = atomicAdd(listed, 1u);
    if (at < kListed) list[at] = place;
  });
  team.meet();
  const uint32_t count = *listed;
  for (uint32_t i = threadIdx.x; team.size > 1 && i < count && i < kListed; i += blockDim.x) s.list[i] = list[i];
  __syncthreads();
  return count;
}

// s.cut: the place of the list with which the sum of s.masses, in order, reaches `need`.
DEVICE void rank(uint32_t count, Count need, SampleShared& s) {
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < count; i += blockDim.x) {
    Count sum = 0;
    for (uint32_t j = 0; j < count; ++j) sum += within(s.list[j], s.list[i]) ? s.masses[j] : 0;
    if (sum >= need && sum - s.masses[i] < need) s.cut = s.list[i];
  }
  __syncthreads();
}

// What a cut leaves. `listed` > 0: all of it is in s.list, among so many places; every block of the team has it.
struct Kept {
  Place last;
  uint32_t listed;
};

// Among the places up to `last`: the one with which the sum of weigh(place) reaches need_of(total); `last` itself where
// the total is less. `top`: the largest of the row, finite. `few`: what is left may be so little that it can be listed.
template <class Need, class Weigh>
DEVICE Kept find_cut(Team& team, const Part& part, float top, Place last, bool few, const Need& need_of,
                     const Weigh& weigh, SampleShared& s) {
  Range range;
  Count need = 0;
  for (;; ++team.narrowings) {
    histogram_of(part, range, top, last, weigh, s);
    share_histogram(team, s);
    if (range.levels == 0) {
      need = need_of(s.total);
      if (need > s.total) break;
    }
    find_bin(need, s);
    const bool first = range.levels == 0;
    const Count before = s.before;
    range.bins[range.levels++] = s.bin;
    uint32_t count = kListed + 1;
    if (first && few) {
      const auto up_to_bin = [&](Place place) { return bin_of(0, place, top) <= range.bins[0]; };
      count = list_places(team, part, last, 0, up_to_bin, s);
    }
    const bool all = count <= kListed;
    if (!all) {
      need -= before;
      count = list_places(team, part, last, 1, [&](Place place) { return range.has(place, top); }, s);
    }
    if (count > kListed) continue;
    for (uint32_t i = threadIdx.x; i < count; i += blockDim.x) s.masses[i] = weigh(s.list[i]);
    rank(count, need, s);
    last = s.cut;
    ++team.narrowings;
    return {last, all ? count : 0};
  }
  ++team.narrowings;
  return {last, 0};
}

// The same for what is listed, by each block for itself.
template <class Need, class Weigh>
DEVICE Kept cut_list(Kept kept, const Need& need_of, const Weigh& weigh, SampleShared& s) {
  if (threadIdx.x == 0) s.total = 0;
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < kept.listed; i += blockDim.x) {
    s.masses[i] = within(s.list[i], kept.last) ? weigh(s.list[i]) : 0;
    atomicAdd(&s.total, s.masses[i]);
  }
  __syncthreads();
  rank(kept.listed, need_of(s.total), s);
  return {s.cut, kept.listed};
}

}  // namespace skerry::cuda
