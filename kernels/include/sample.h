// Sample v1 on raw pointers: rows of logits -> tokens, with the log-probability and entropy of the raw logits.
// The definition, with the order of every rounding that decides what is kept, is kernels/reference.py.
#pragma once

#include <cstdint>
#include <string>

#include "parallel.h"

namespace skerry {

inline constexpr int kMaxTopN = 1024;
inline constexpr float kGreedyTemperature = 1e-5f;  // below this a row is an argmax

struct SampleArgs {
  const float* logits = nullptr;  // [rows, vocabulary]
  int64_t rows = 0;
  int64_t vocabulary = 0;

  const float* temperature = nullptr;    // [rows] >= 0
  const int32_t* top_k = nullptr;        // [rows], 0: off
  const float* top_p = nullptr;          // [rows], >= 1: off
  const float* min_p = nullptr;          // [rows] in 0..1
  const float* repetition = nullptr;     // [rows] > 0, 1: off
  const float* frequency = nullptr;      // [rows]
  const float* presence = nullptr;       // [rows]
  const uint64_t* seed = nullptr;        // [rows]
  const int32_t* token_index = nullptr;  // [rows]: which token of its request this row draws
  const int32_t* target = nullptr;       // [rows]: score this id instead of drawing, -1: draw

  const int32_t* hist_start = nullptr;   // [rows + 1]
  const int32_t* hist_ids = nullptr;     // [entries]: ids that occurred in prompt or output
  const int32_t* hist_counts = nullptr;  // how often in the output; 0: in the prompt only
  int64_t hist_entries = 0;

  const int32_t* bias_start = nullptr;  // [rows + 1]
  const int32_t* bias_ids = nullptr;    //
  const float* bias_values = nullptr;   //
  int64_t bias_entries = 0;

  const int32_t* mask = nullptr;      // [mask_rows, mask_words], bit i of word w allows id 32 w + i
  const int32_t* mask_row = nullptr;  // [rows]: row of the mask, -1: everything is allowed
  int64_t mask_rows = 0;
  int64_t mask_words = 0;

  int32_t top_n = 0;

  int32_t* token = nullptr;       // [rows], -1: no token can be drawn (NaN or +inf in the row, or all excluded)
  float* logprob = nullptr;       // [rows] of the token under softmax(logits), NaN without a token
  float* entropy = nullptr;       // [rows] of softmax(logits), nats
  int32_t* top_ids = nullptr;     // [rows, top_n] most likely ids under softmax(logits); -1 where there is none
  float* top_logprobs = nullptr;  // [rows, top_n]
};

// Empty when every index and parameter is in range, else what is not, naming the numbers.
std::string check_sample(const SampleArgs& args);

// Checks, then runs. Returns an empty string or the complaint.
std::string sample(const SampleArgs& args, const Parallel& parallel);

// The ids a row keeps after top-k, top-p and min-p, ascending: for tests. `kept` has room for the vocabulary.
int64_t kept_ids(const SampleArgs& args, int64_t row, int32_t* kept);

}  // namespace skerry
