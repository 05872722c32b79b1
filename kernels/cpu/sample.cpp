// Sample on the CPU: one row is one task; nothing sorts the vocabulary.
#include "../include/sample.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "../include/philox.h"
#include "isa.h"
#include "sample_math.h"
#include "sample_select.h"

namespace skerry {
namespace {

using std::to_string;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr double kMassUnit = 1099511627776.0;  // 2^40: masses are whole numbers, so their sums have no order

uint64_t mass_of(double weight) { return static_cast<uint64_t>(weight * kMassUnit); }

// Buffers of one thread, as long as the vocabulary.
struct Workspace {
  std::vector<float> logits;        // after penalties, bias, mask
  std::vector<float> scaled;        // divided by the temperature
  std::vector<double> weight;       // e^(raw - max), then e^(scaled - max)
  std::vector<int32_t> ids;         // candidates, ascending
  std::vector<uint32_t> keys;       // of the candidates
  std::vector<double> kept_weight;  // of the candidates

  void resize(int64_t n) {
    logits.resize(n);
    scaled.resize(n);
    weight.resize(n);
    ids.resize(n);
    keys.resize(n);
    kept_weight.resize(n);
  }
};

Workspace& workspace(int64_t n) {
  thread_local Workspace space;
  space.resize(n);
  return space;
}

bool plain(const SampleArgs& a, int64_t row) {
  return a.hist_start[row] == a.hist_start[row + 1] && a.bias_start[row] == a.bias_start[row + 1] &&
         a.mask_row[row] < 0;
}

// Penalties, bias, mask: each operation rounds to float, in this order.
void adjust(const SampleArgs& a, int64_t row, float* x) {
  for (int32_t i = a.hist_start[row]; i < a.hist_start[row + 1]; ++i) {
    float value = x[a.hist_ids[i]];
    value = value > 0.0f ? value / a.repetition[row] : value * a.repetition[row];
    value = value - a.frequency[row] * static_cast<float>(a.hist_counts[i]);
    if (a.hist_counts[i] > 0) value = value - a.presence[row];
    x[a.hist_ids[i]] = value;
  }
  for (int32_t i = a.bias_start[row]; i < a.bias_start[row + 1]; ++i) x[a.bias_ids[i]] += a.bias_values[i];
  if (a.mask_row[row] < 0) return;
  const int32_t* mask = a.mask + a.mask_row[row] * a.mask_words;
  for (int64_t word = 0; word * 32 < a.vocabulary; ++word) {
    const uint32_t bits = static_cast<uint32_t>(mask[word]);
    if (bits == 0xFFFFFFFFu) continue;
    const int64_t end = std::min<int64_t>(a.vocabulary, word * 32 + 32);
    for (int64_t i = word * 32; i < end; ++i) x[i] = bits >> (i % 32) & 1 ? x[i] : -kInfinity;
  }
}

// Keeps the candidates of the cut, in place; the first so many ties by index.
int64_t apply(const Cut& cut, int64_t n, Workspace& space) {
  int64_t count = 0;
  uint64_t ties = cut.ties;
  for (int64_t i = 0; i < n; ++i) {
    bool keep = space.keys[i] > cut.key;
    if (space.keys[i] == cut.key && ties > 0) {
      keep = true;
      --ties;
    }
    space.ids[count] = space.ids[i];
    space.keys[count] = space.keys[i];
    space.kept_weight[count] = space.kept_weight[i];
    count += keep;
  }
  return count;
}

// Candidates x >= floor, ascending, into the workspace; returns how many.
int64_t gather(const float* x, const double* weight, int64_t n, float floor, Workspace& space) {
  constexpr int64_t kBlock = 64;  // blocks without a candidate cost a vector compare
  int64_t count = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = std::min(n, begin + kBlock);
    int32_t any = 0;
    for (int64_t i = begin; i < end; ++i) any |= x[i] >= floor;
    for (int64_t i = begin; any != 0 && i < end; ++i) {
      space.ids[count] = static_cast<int32_t>(i);
      space.keys[count] = ordered_bits(x[i] + 0.0f);
      space.kept_weight[count] = weight[i];
      count += x[i] >= floor;
    }
  }
  return count;
}

constexpr float kLowest = std::numeric_limits<float>::lowest();
constexpr float kDepths[] = {5.0f, 12.0f, 28.0f};  // how far below the maximum to look first, for the few that matter

uint64_t kept_mass(const Workspace& space, int64_t n) { return sample_math().mass(space.kept_weight.data(), n); }

// At least the `k` largest (all, where there are fewer).
int64_t gather_count(const float* x, const double* weight, int64_t n, float max, int64_t k, Workspace& space) {
  for (const float depth : kDepths) {
    if (sample_math().count_from(x, n, max - depth) >= k) return gather(x, weight, n, max - depth, space);
  }
  return gather(x, weight, n, kLowest, space);
}

// The largest, with at least `need` of mass among them.
int64_t gather_mass(const float* x, const double* weight, int64_t n, float max, uint64_t need, Workspace& space) {
  for (const float depth : kDepths) {
    const int64_t count = gather(x, weight, n, max - depth, space);
    if (kept_mass(space, count) >= need) return count;
  }
  return gather(x, weight, n, kLowest, space);
}

uint64_t needed_mass(float top_p, uint64_t total) {
  const double wanted = std::ceil(static_cast<double>(std::max(top_p, 0.0f)) * static_cast<double>(total));
  return std::clamp<uint64_t>(static_cast<uint64_t>(wanted), 1, total);
}

// Candidates after top-k, top-p and min-p into space.ids and space.kept_weight; returns how many. x: scaled logits.
int64_t select(const SampleArgs& a, int64_t row, const float* x, float max, const double* weight, Workspace& space) {
  const int64_t vocabulary = a.vocabulary, k = a.top_k[row];
  const bool by_mass = a.top_p[row] < 1.0f;
  int64_t n = 0;
  uint64_t need = 0;
  if (k > 0 && k < vocabulary) {
    n = gather_count(x, weight, vocabulary, max, k, space);
    if (k < n) n = apply(find_cut(space.keys.data(), n, k, [](int64_t) { return uint64_t{1}; }), n, space);
    if (by_mass) need = needed_mass(a.top_p[row], kept_mass(space, n));
  } else if (by_mass) {
    need = needed_mass(a.top_p[row], sample_math().mass(weight, vocabulary));
    n = gather_mass(x, weight, vocabulary, max, need, space);
  } else {
    // min_p alone. Weights below it lie further down than this; the exact comparison follows.
    const float depth = 0.1f - std::log(a.min_p[row]) + std::abs(max) * 1e-6f;
    n = gather(x, weight, vocabulary, std::max(kLowest, max - depth), space);
  }
  if (by_mass) {
    const double* kept = space.kept_weight.data();
    n = apply(find_cut(space.keys.data(), n, need, [kept](int64_t i) { return mass_of(kept[i]); }), n, space);
  }
  if (a.min_p[row] > 0.0f) {
    const double least = a.min_p[row];
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i) {
      const double w = space.kept_weight[i];
      space.ids[count] = space.ids[i];
      space.kept_weight[count] = w;
      count += w >= least;
    }
    n = count;
  }
  return n;
}

bool keeps_all(const SampleArgs& a, int64_t row) {
  const int64_t k = a.top_k[row];
  return (k == 0 || k >= a.vocabulary) && a.top_p[row] >= 1.0f && a.min_p[row] == 0.0f;
}

// Gumbel-max in its exponential form: the candidate with the least -log(u) / weight wins, the first of equals.
struct Race {
  double best = std::numeric_limits<double>::infinity();
  int32_t winner = -1;

  void enter(int32_t id, double weight, uint32_t word) {
    const double u = (static_cast<double>(word) + 0.5) * 0x1p-32;
    // -log(u) >= 1-u: most candidates lose without a logarithm. The margin covers the rounding of both sides.
    if ((1.0 - u) * (1.0 - 1e-9) > best * weight || weight == 0.0) return;
    const double score = -std::log(u) / weight;
    if (score < best) {
      best = score;
      winner = id;
    }
  }
};

// Over the whole vocabulary: excluded ids have weight 0.
int32_t draw_all(const SampleArgs& a, int64_t row, const double* weight) {
  constexpr int64_t kBlocks = 64, kWords = 4 * kBlocks;
  Race race;
  uint32_t words[kWords];
  for (int64_t id = 0; id < a.vocabulary; id += kWords) {
    const int64_t count = std::min(kWords, a.vocabulary - id);
    sample_math().noise(a.seed[row], static_cast<uint32_t>(a.token_index[row]), static_cast<uint32_t>(id / 4), kBlocks,
                        words);
    if (!sample_math().any_survivor(words, weight + id, count, race.best)) continue;
    for (int64_t i = 0; i < count; ++i) race.enter(static_cast<int32_t>(id + i), weight[id + i], words[i]);
  }
  return race.winner;
}

int32_t draw(const SampleArgs& a, int64_t row, int64_t n, const Workspace& space) {
  Race race;
  uint32_t words[4] = {};
  int32_t block = -1;
  for (int64_t i = 0; i < n; ++i) {
    if (space.ids[i] / 4 != block) {
      block = space.ids[i] / 4;
      words[0] = static_cast<uint32_t>(block);
      words[1] = static_cast<uint32_t>(a.token_index[row]);
      words[2] = words[3] = 0;
      philox4x32(words, static_cast<uint32_t>(a.seed[row]), static_cast<uint32_t>(a.seed[row] >> 32));
    }
    race.enter(space.ids[i], space.kept_weight[i], words[space.ids[i] % 4]);
  }
  return race.winner;
}

// Of one logit. Not logit - (max + log_total): beside logits of 1e30 the logarithm would be lost.
float log_probability(float logit, float max, double log_total) {
  return static_cast<float>(static_cast<double>(logit) - static_cast<double>(max) - log_total);
}

// The most likely ids of the raw logits. log_total: of the sum of exp(logit - max).
void write_top(const SampleArgs& a, int64_t row, const float* raw, float max, double log_total, Workspace& space) {
  int32_t* ids = a.top_ids + row * a.top_n;
  float* logprobs = a.top_logprobs + row * a.top_n;
  const int64_t n = std::min<int64_t>(a.top_n, a.vocabulary);
  int64_t candidates = gather_count(raw, space.weight.data(), a.vocabulary, max, n, space);
  if (candidates < n) candidates = gather(raw, space.weight.data(), a.vocabulary, -kInfinity, space);
  apply(find_cut(space.keys.data(), candidates, n, [](int64_t) { return uint64_t{1}; }), candidates, space);
  std::vector<int64_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return space.keys[i] > space.keys[j]; });
  for (int64_t i = 0; i < a.top_n; ++i) {
    ids[i] = i < n ? space.ids[order[i]] : -1;
    logprobs[i] = i < n ? log_probability(raw[ids[i]], max, log_total) : -kInfinity;
  }
}

void write_broken(const SampleArgs& a, int64_t row) {
  a.token[row] = -1;
  a.logprob[row] = a.entropy[row] = kNan;
  std::fill_n(a.top_ids + row * a.top_n, a.top_n, -1);
  std::fill_n(a.top_logprobs + row * a.top_n, a.top_n, kNan);
}

// Adjusted and scaled logits of a row that will be drawn from; null where nothing can be. *max: the raw logits'
// maximum, then theirs.
const float* prepare(const SampleArgs& a, int64_t row, Workspace& space, float* max) {
  const SampleMath& math = sample_math();
  const float* x = a.logits + row * a.vocabulary;
  if (!plain(a, row)) {
    std::copy_n(x, a.vocabulary, space.logits.data());
    adjust(a, row, space.logits.data());
    x = space.logits.data();
  }
  if (a.temperature[row] >= kGreedyTemperature && a.temperature[row] != 1.0f) {
    math.scale(x, a.vocabulary, a.temperature[row], space.scaled.data());
    x = space.scaled.data();
  }
  if (x == a.logits + row * a.vocabulary) return x;
  bool broken = false;
  *max = math.maximum(x, a.vocabulary, &broken);
  return broken || *max == -kInfinity ? nullptr : x;
}

int32_t choose(const SampleArgs& a, int64_t row, float max, Workspace& space) {
  const float* x = prepare(a, row, space, &max);
  if (x == nullptr) return -1;
  if (a.temperature[row] < kGreedyTemperature)
    return static_cast<int32_t>(sample_math().first_of(x, a.vocabulary, max));
  sample_math().weights(x, a.vocabulary, max, space.weight.data());
  if (keeps_all(a, row)) return draw_all(a, row, space.weight.data());
  return draw(a, row, select(a, row, x, max, space.weight.data(), space), space);
}

void sample_row(void* argument, int row) {
  const SampleArgs& a = *static_cast<const SampleArgs*>(argument);
  Workspace& space = workspace(a.vocabulary);
  const float* raw = a.logits + row * a.vocabulary;
  bool broken = false;
  const float max = sample_math().maximum(raw, a.vocabulary, &broken);
  if (broken || max == -kInfinity) return write_broken(a, row);

  const RowStatistics found = sample_math().statistics(raw, a.vocabulary, max);
  const double log_total = std::log(found.sum);
  a.entropy[row] = static_cast<float>(std::max(0.0, log_total - found.weighted / found.sum));
  if (a.top_n > 0) write_top(a, row, raw, max, log_total, space);
  a.token[row] = a.target[row] >= 0 ? a.target[row] : choose(a, row, max, space);
  a.logprob[row] = a.token[row] >= 0 ? log_probability(raw[a.token[row]], max, log_total) : kNan;
}

std::string check_ragged(const char* name, const int32_t* start, const int32_t* ids, int64_t entries, int64_t rows,
                         int64_t vocabulary) {
  if (start[0] != 0) return std::string(name) + "_start begins with " + to_string(start[0]) + ", not 0";
  for (int64_t r = 0; r < rows; ++r) {
    if (start[r + 1] < start[r]) return std::string(name) + "_start decreases at row " + to_string(r);
  }
  if (start[rows] > entries) {
    return std::string(name) + "_start ends at " + to_string(start[rows]) + " but there are " + to_string(entries) +
           " entries";
  }
  for (int32_t i = 0; i < start[rows]; ++i) {
    if (ids[i] < 0 || ids[i] >= vocabulary) {
      return std::string(name) + " id " + to_string(ids[i]) + " is outside the vocabulary of " + to_string(vocabulary);
    }
  }
  return "";
}

std::string check_row(const SampleArgs& a, int64_t r) {
  const std::string at = " of row " + to_string(r);
  if (!(a.temperature[r] >= 0.0f) || !std::isfinite(a.temperature[r])) {
    return "temperature " + to_string(a.temperature[r]) + at + " is negative or not finite";
  }
  if (a.top_k[r] < 0) return "top_k " + to_string(a.top_k[r]) + at + " is negative";
  if (std::isnan(a.top_p[r])) return "top_p" + at + " is not a number";
  if (!(a.min_p[r] >= 0.0f && a.min_p[r] <= 1.0f)) return "min_p " + to_string(a.min_p[r]) + at + " is outside 0..1";
  if (!(a.repetition[r] > 0.0f) || !std::isfinite(a.repetition[r])) {
    return "repetition " + to_string(a.repetition[r]) + at + " is not positive";
  }
  if (!std::isfinite(a.frequency[r]) || !std::isfinite(a.presence[r])) return "a penalty" + at + " is not finite";
  if (a.target[r] < -1 || a.target[r] >= a.vocabulary) {
    return "target " + to_string(a.target[r]) + at + " is outside the vocabulary of " + to_string(a.vocabulary);
  }
  if (a.mask_row[r] < -1 || a.mask_row[r] >= a.mask_rows) {
    return "mask_row " + to_string(a.mask_row[r]) + at + " is outside the " + to_string(a.mask_rows) + " masks";
  }
  return "";
}

}  // namespace

const SampleMath& sample_math() {
#if defined(__x86_64__)
  if (isa() >= Isa::kAvx512) return kSampleAvx512;
  if (isa() >= Isa::kAvx2) return kSampleAvx2;
#endif
  return kSampleBase;
}

std::string check_sample(const SampleArgs& a) {
  if (a.vocabulary < 1 || a.vocabulary > (1 << 22)) return "vocabulary " + to_string(a.vocabulary) + " is out of range";
  if (a.top_n < 0 || a.top_n > kMaxTopN) {
    return "top_n " + to_string(a.top_n) + " is outside 0.." + to_string(kMaxTopN);
  }
  if (a.mask_rows > 0 && a.mask_words * 32 < a.vocabulary) {
    return "a mask of " + to_string(a.mask_words) + " words is too short for a vocabulary of " +
           to_string(a.vocabulary);
  }
  if (a.rows == 0) return "";
  std::string problem = check_ragged("hist", a.hist_start, a.hist_ids, a.hist_entries, a.rows, a.vocabulary);
  if (problem.empty()) problem = check_ragged("bias", a.bias_start, a.bias_ids, a.bias_entries, a.rows, a.vocabulary);
  for (int64_t r = 0; r < a.rows && problem.empty(); ++r) problem = check_row(a, r);
  return problem;
}

std::string sample(const SampleArgs& args, const Parallel& parallel) {
  if (std::string problem = check_sample(args); !problem.empty()) return problem;
  parallel(static_cast<int>(args.rows), sample_row, const_cast<SampleArgs*>(&args));
  return "";
}

int64_t kept_ids(const SampleArgs& args, int64_t row, int32_t* kept) {
  Workspace& space = workspace(args.vocabulary);
  bool broken = false;
  float max = sample_math().maximum(args.logits + row * args.vocabulary, args.vocabulary, &broken);
  if (broken || max == -kInfinity) return 0;
  const float* x = prepare(args, row, space, &max);
  if (x == nullptr) return 0;
  if (args.temperature[row] < kGreedyTemperature) {
    kept[0] = static_cast<int32_t>(sample_math().first_of(x, args.vocabulary, max));
    return 1;
  }
  sample_math().weights(x, args.vocabulary, max, space.weight.data());
  const int64_t n = select(args, row, x, max, space.weight.data(), space);
  std::copy_n(space.ids.data(), n, kept);
  return n;
}

}  // namespace skerry
