// Runs one kernel on a case from standard input and writes its result, so that kernels built for another processor can
// be compared with the definition under an emulator. A case is a list of blobs, each a length in 8 bytes and its
// content; test_neon.py writes and reads them.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../../../kernels/cpu/isa.h"
#include "../../../kernels/cpu/pool.h"
#include "../../../kernels/include/matmul_block.h"
#include "../../../kernels/include/paged_attention.h"
#include "../../../kernels/include/sample.h"

namespace {

using Blob = std::vector<uint8_t>;

[[noreturn]] void fail(const std::string& problem) {
  std::fprintf(stderr, "%s\n", problem.c_str());
  std::exit(1);
}

bool read(Blob* blob) {
  uint64_t size = 0;
  if (std::fread(&size, sizeof size, 1, stdin) != 1) return false;
  blob->resize(size);
  if (size > 0 && std::fread(blob->data(), 1, size, stdin) != size) fail("a case is cut short");
  return true;
}

template <class T>
T* as(Blob& blob) {
  return blob.empty() ? nullptr : reinterpret_cast<T*>(blob.data());
}

void write(const void* data, size_t bytes) {
  if (bytes > 0 && std::fwrite(data, 1, bytes, stdout) != bytes) fail("cannot write");
}

skerry::Parallel threads() { return skerry::Pool::of(2)->parallel(); }

// int64: tokens, width, rows, format, activation, epsilon as float bits and, with adapters, their offset, slots, rank,
// columns, sequences; x, norm, residual and, with adapters, query_start, rows, values; then weight and bias of each.
void matmul_block(std::vector<Blob>& blobs) {
  const auto* n = as<int64_t>(blobs[0]);
  skerry::MatMulBlockArgs args;
  args.tokens = n[0];
  args.width = n[1];
  args.activation = static_cast<skerry::Activation>(n[4]);
  std::memcpy(&args.epsilon, &n[5], sizeof args.epsilon);
  args.x = as<float>(blobs[1]);
  args.norm = as<float>(blobs[2]);
  args.residual = as<float>(blobs[3]);
  const bool adapted = blobs[0].size() > 6 * sizeof(int64_t);
  const size_t first = adapted ? 7 : 4;
  if (adapted) {
    args.adapters = {n[6], true, as<uint16_t>(blobs[6]), as<int32_t>(blobs[4]), as<int32_t>(blobs[5]),
                     n[7], n[8], n[9],                   n[10]};
  }
  args.segments = static_cast<int>(blobs.size() - first) / 2;
  std::vector<float> out(n[0] * n[2] * args.segments);
  for (int s = 0; s < args.segments; ++s) {
    args.segment[s] = {as<uint8_t>(blobs[first + 2 * s]), as<float>(blobs[first + 1 + 2 * s]),
                       out.data() + s * n[0] * n[2], n[2], static_cast<skerry::BlockFormat>(n[3])};
  }
  const std::string problem = skerry::matmul_block(args, threads());
  if (!problem.empty()) fail(problem);
  write(out.data(), sizeof(float) * out.size());
}

// int64: heads, kv_heads, head_size, rotary, interleaved, window, layout, tokens, sequences, table width, pages, rows
// of the tables; float: scale, softcap; then the arrays in the op's order. Writes the output, then the cache.
void paged_attention(std::vector<Blob>& blobs) {
  const auto* n = as<int64_t>(blobs[0]);
  const auto* f = as<float>(blobs[1]);
  const skerry::PagedAttentionShape shape{static_cast<int>(n[0]),
                                          static_cast<int>(n[1]),
                                          static_cast<int>(n[2]),
                                          static_cast<int>(n[3]),
                                          n[4] != 0,
                                          f[0],
                                          f[1],
                                          static_cast<int>(n[5]),
                                          static_cast<skerry::KvLayout>(n[6])};
  std::vector<float> out(n[7] * n[0] * n[2]);
  const skerry::PagedAttentionArgs args{as<float>(blobs[2]),
                                        as<float>(blobs[3]),
                                        as<float>(blobs[4]),
                                        as<uint8_t>(blobs[5]),
                                        as<float>(blobs[6]),
                                        as<float>(blobs[7]),
                                        as<int32_t>(blobs[8]),
                                        as<int32_t>(blobs[9]),
                                        as<int32_t>(blobs[10]),
                                        as<int32_t>(blobs[11]),
                                        as<int32_t>(blobs[12]),
                                        out.data(),
                                        n[7],
                                        n[8],
                                        n[9],
                                        n[10],
                                        n[11]};
  const std::string problem = skerry::paged_attention(shape, args, threads());
  if (!problem.empty()) fail(problem);
  write(out.data(), sizeof(float) * out.size());
  write(blobs[5].data(), blobs[5].size());
}

// int64: rows, vocabulary, history entries, bias entries, mask rows, words of one, top_n; logits, then SampleRows'
// arrays in their order. Writes token, logprob, entropy, top_ids, top_logprobs.
void sample(std::vector<Blob>& blobs) {
  const auto* n = as<int64_t>(blobs[0]);
  skerry::SampleArgs a;
  a.rows = n[0];
  a.vocabulary = n[1];
  a.hist_entries = n[2];
  a.bias_entries = n[3];
  a.mask_rows = n[4];
  a.mask_words = n[5];
  a.top_n = static_cast<int32_t>(n[6]);
  const float** floats[] = {&a.logits,     &a.temperature, nullptr,     &a.top_p, &a.min_p,
                            &a.repetition, &a.frequency,   &a.presence, nullptr,  nullptr,
                            nullptr,       nullptr,        nullptr,     nullptr,  nullptr,
                            nullptr,       &a.bias_values, nullptr,     nullptr};
  const int32_t** ints[] = {nullptr,     nullptr,       &a.top_k,    nullptr,        nullptr,
                            nullptr,     nullptr,       nullptr,     nullptr,        &a.token_index,
                            &a.target,   &a.hist_start, &a.hist_ids, &a.hist_counts, &a.bias_start,
                            &a.bias_ids, nullptr,       &a.mask,     &a.mask_row};
  for (int i = 0; i < 19; ++i) {
    if (floats[i] != nullptr) *floats[i] = as<float>(blobs[1 + i]);
    if (ints[i] != nullptr) *ints[i] = as<int32_t>(blobs[1 + i]);
  }
  a.seed = as<uint64_t>(blobs[9]);
  std::vector<int32_t> token(n[0]), top_ids(n[0] * n[6]);
  std::vector<float> logprob(n[0]), entropy(n[0]), top_logprobs(n[0] * n[6]);
  a.token = token.data();
  a.logprob = logprob.data();
  a.entropy = entropy.data();
  a.top_ids = top_ids.data();
  a.top_logprobs = top_logprobs.data();
  if (const std::string problem = skerry::sample(a, threads()); !problem.empty()) fail(problem);
  write(token.data(), 4 * token.size());
  write(logprob.data(), 4 * logprob.size());
  write(entropy.data(), 4 * entropy.size());
  write(top_ids.data(), 4 * top_ids.size());
  write(top_logprobs.data(), 4 * top_logprobs.size());
}

}  // namespace

int main(int count, char** words) {
  const std::string kernel = count > 1 ? words[1] : "";
  if (kernel == "isa") {
    std::puts(skerry::isa_name(skerry::isa()));
    return 0;
  }
  std::vector<Blob> blobs;
  for (Blob blob; read(&blob);) blobs.push_back(blob);
  if (kernel == "matmul_block") {
    matmul_block(blobs);
  } else if (kernel == "paged_attention") {
    paged_attention(blobs);
  } else if (kernel == "sample") {
    sample(blobs);
  } else {
    fail("usage: driver isa | matmul_block | paged_attention | sample < case");
  }
  return 0;
}
