// Sample on a GPU, one launch for all rows of a step. A team of blocks takes a row; each block keeps its part of it in
// shared memory from the first pass to the draw, so device memory is read once. The blocks of a team meet when a
// maximum, a histogram or a list of candidates is complete: two to six times a row that wants no top ids. The
// definition is kernels/reference.py.
#include "sample_draw.h"
#include "sample_row.h"

namespace skerry::cuda {
namespace {

// Everything about one row that the functions below need.
struct Row {
  const SampleArgs& a;
  int row;
  Team& team;
  Part part;
  SampleShared& s;
  RowFacts& facts;  // the team's
  Place* top;       // the team's list of the most likely
};

// What this block found so far becomes the team's, and the team's the block's.
DEVICE void share_facts(const Row& r) {
  if (threadIdx.x == 0) {
    atomicMax(&r.facts.raw_max, r.s.facts.raw_max);
    atomicMax(&r.facts.max, r.s.facts.max);
    if (r.s.facts.raw_broken) atomicOr(&r.facts.raw_broken, 1u);
    if (r.s.facts.broken) atomicOr(&r.facts.broken, 1u);
  }
  r.team.meet();
  if (threadIdx.x == 0) r.s.facts = r.facts;
  __syncthreads();
}

DEVICE bool without_distribution(uint32_t largest, uint32_t broken) {
  return broken || largest <= ordered_bits(-INFINITY);
}

// The most likely under the raw logits into the team's list, in any order; those at -inf too.
DEVICE void list_top(const Row& r) {
  const Count wanted = min(static_cast<Count>(r.a.top_n), static_cast<Count>(r.a.vocabulary));
  const float top = float_of(r.s.facts.raw_max);
  const auto need = [&](Count) { return wanted; };
  const Kept kept = find_cut(r.team, r.part, top, kEverything, false, need, [](Place) { return Count{1}; }, r.s);
  each_place(r.part, kept.last, [&](Place place) { r.top[atomicAdd(&r.facts.top, 1u)] = place; });
}

// What top-k and top-p keep.
DEVICE Kept cut(const Row& r, float top) {
  const int32_t k = r.a.top_k[r.row];
  const float p = r.a.top_p[r.row];
  Kept kept = {kEverything, 0};
  if (k > 0 && k < r.a.vocabulary) {
    const auto need = [&](Count) { return static_cast<Count>(k); };
    const auto one = [](Place place) { return static_cast<Count>(place.key > ordered_bits(-INFINITY)); };
    kept = find_cut(r.team, r.part, top, kept.last, k <= kListed, need, one, r.s);
  }
  if (p >= 1.0f) return kept;
  const auto need = [&](Count total) {
    const double wanted = ceil(static_cast<double>(fmaxf(p, 0.0f)) * static_cast<double>(total));
    return min(max(static_cast<Count>(wanted), Count{1}), total);
  };
  const auto mass = [&](Place place) { return mass_of(float_of(place.key), top); };
  return kept.listed > 0 ? cut_list(kept, need, mass, r.s)
                         : find_cut(r.team, r.part, top, kept.last, true, need, mass, r.s);
}

// `winner` is thread 0's. Not `final`: it is the best of the block's part alone.
struct Choice {
  Winner winner;
  bool final;
};

DEVICE Choice choose(const Row& r, Place* cuts) {
  const SampleArgs& a = r.a;
  if (a.target[r.row] >= 0) return {{0, a.target[r.row]}, true};
  if (without_distribution(r.s.facts.max, r.s.facts.broken)) return {{0, -1}, true};
  const float top = float_of(r.s.facts.max);
  if (a.temperature[r.row] < kGreedyTemperature) return {first_of_largest(r.part, top, r.s), false};
  const Kept kept = cut(r, top);
  if (cuts != nullptr && r.team.rank == 0 && threadIdx.x == 0) cuts[r.row] = kept.last;
  if (kept.listed > 0 && r.team.rank > 0) return {{0, -1}, true};  // the first block has all of it
  const Entrants entrants = {kept.last, top, a.min_p[r.row]};
  const Noise noise = {a.seed[r.row], static_cast<uint32_t>(a.token_index[r.row])};
  return {draw(r.part, kept.listed, entrants, noise, r.s), kept.listed > 0};
}

DEVICE void write_broken(const SampleArgs& a, int row) {
  if (threadIdx.x == 0) {
    a.token[row] = -1;
    a.logprob[row] = a.entropy[row] = NAN;
  }
  for (int i = threadIdx.x; i < a.top_n; i += blockDim.x) {
    a.top_ids[static_cast<int64_t>(row) * a.top_n + i] = -1;
    a.top_logprobs[static_cast<int64_t>(row) * a.top_n + i] = NAN;
  }
}

DEVICE float log_probability(float logit, float top, double log_sum) {
  return static_cast<float>((static_cast<double>(logit) - static_cast<double>(top)) - log_sum);
}

// The list of the most likely in order: the place of each is how many come before it.
DEVICE void write_top(const Row& r, float top, double log_sum) {
  const int count = static_cast<int>(min(static_cast<int64_t>(r.a.top_n), r.a.vocabulary));
  int32_t* ids = r.a.top_ids + static_cast<int64_t>(r.row) * r.a.top_n;
  float* logprobs = r.a.top_logprobs + static_cast<int64_t>(r.row) * r.a.top_n;
  Place* list = reinterpret_cast<Place*>(r.s.histogram);
  static_assert(sizeof r.s.histogram >= kMaxTopN * sizeof(Place));
  for (int i = threadIdx.x; i < count; i += blockDim.x) list[i] = r.top[i];
  __syncthreads();
  for (int i = threadIdx.x; i < r.a.top_n; i += blockDim.x) {
    if (i >= count) {
      ids[i] = -1;
      logprobs[i] = -INFINITY;
      continue;
    }
    int before = 0;
    for (int j = 0; j < count; ++j) before += j != i && within(list[j], list[i]);
    ids[before] = list[i].id;
    logprobs[before] = log_probability(float_of(list[i].key), top, log_sum);
  }
  __syncthreads();
}

// By the team's first block. `winner` is thread 0's.
template <class Logit>
DEVICE void write_row(const Row& r, const Logit* logits, Winner winner, const ChunkStatistics* chunks) {
  const SampleArgs& a = r.a;
  const float top = float_of(r.s.facts.raw_max);
  const int count = static_cast<int>((a.vocabulary + kChunk - 1) / kChunk);
  const RowStatistics found = merge_chunks(chunks, count, top, r.s);
  if (threadIdx.x == 0) {
    r.s.log_sum = found.log_sum;
    a.token[r.row] = winner.id;
    a.logprob[r.row] = winner.id < 0 ? NAN : log_probability(to_float(logits[winner.id]), top, found.log_sum);
    a.entropy[r.row] = static_cast<float>(found.entropy);
  }
  __syncthreads();
  if (a.top_n > 0) write_top(r, top, r.s.log_sum);
}

template <class Logit>
DEVICE void sample_row(const SampleTask& task, int row, int turn, Team& team, const Part& part, SampleShared& s) {
  const SampleArgs& a = task.args;
  TeamScratch& scratch = *team.scratch;
  const Row r = {a, row, team, part, s, scratch.facts[turn % 3], scratch.top[turn % 2]};
  const Logit* logits = reinterpret_cast<const Logit*>(a.logits) + row * a.vocabulary;
  __syncthreads();  // some threads may still look at the facts of the row before
  if (threadIdx.x == 0) {
    s.facts = {};
    if (team.rank == 0) scratch.facts[(turn + 1) % 3] = {};
  }
  __syncthreads();
  load_part(logits, part, scratch.chunks[turn % 2], s);
  if (a.top_n > 0) {
    share_facts(r);
    if (!without_distribution(s.facts.raw_max, s.facts.raw_broken)) list_top(r);
  }
  if (a.target[row] < 0) adjust_part(a, row, part, s);
  share_facts(r);
  if (without_distribution(s.facts.raw_max, s.facts.raw_broken)) {
    if (team.rank == 0) write_broken(a, row);
    return;
  }
  Choice choice = choose(r, task.cuts);
  if (!choice.final) {
    Winner* winners = scratch.winners[turn % 2];
    if (threadIdx.x == 0) winners[team.rank] = choice.winner;
    team.meet();
    for (int rank = 0; rank < team.size; ++rank) {
      if (beats(winners[rank], choice.winner)) choice.winner = winners[rank];
    }
  }
  if (team.rank == 0) write_row(r, logits, choice.winner, scratch.chunks[turn % 2]);
}

DEVICE void clear(TeamScratch& scratch) {
  for (Narrowing& narrowing : scratch.narrowing) {
    for (int bin = threadIdx.x; bin < kBins; bin += blockDim.x) narrowing.histogram[bin] = 0;
    if (threadIdx.x == 0) narrowing.total = narrowing.listed[0] = narrowing.listed[1] = 0;
  }
  if (threadIdx.x > 0) return;
  for (RowFacts& facts : scratch.facts) facts = {};
  scratch.arrived = 0;
}

template <class Logit>
DEVICE void sample_rows(const SampleTask& task, unsigned char* shared) {
  SampleShared& s = *reinterpret_cast<SampleShared*>(shared);
  unsigned char* rest =
      task.parts == nullptr ? shared + sizeof(SampleShared) : task.parts + blockIdx.x * part_bytes(task.part);
  const int vocabulary = static_cast<int>(task.args.vocabulary);
  const int number = static_cast<int>(blockIdx.x) / task.team_size;
  Team team = {task.scratch + number, task.team_size, static_cast<int>(blockIdx.x) % task.team_size};
  const int first = team.rank * task.part;
  float* z = reinterpret_cast<float*>(rest);
  const Part part = {z, reinterpret_cast<uint32_t*>(z + task.part), first, max(0, min(task.part, vocabulary - first))};
  int turn = 0;
  for (int64_t row = number; row < task.args.rows; row += task.teams, ++turn)
    sample_row<Logit>(task, static_cast<int>(row), turn, team, part, s);
  if (team.leave(&s.bin)) clear(*team.scratch);
}

}  // namespace

// Blocks of at most 1,024 threads; shared memory: SampleShared and, unless task.parts is set, a part.
SKERRY_KERNEL(sample_f32, SampleTask, 1024, 1, sample_rows<float>)
SKERRY_KERNEL(sample_f16, SampleTask, 1024, 1, sample_rows<__half>)
SKERRY_KERNEL(sample_bf16, SampleTask, 1024, 1, sample_rows<__nv_bfloat16>)

}  // namespace skerry::cuda
