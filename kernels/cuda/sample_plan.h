// How the rows of Sample are laid over a device: pure, on the host.
#pragma once

#include <algorithm>

#include "../include/launch.h"
#include "sample_task.h"

namespace skerry::cuda {

struct SamplePlan {
  int32_t teams = 0, team_size = 0;
  int32_t part = 0;         // ids a block
  int32_t threads = 0;      // a block
  bool in_shared = true;    // parts lie in shared memory
  size_t shared_bytes = 0;  // a block
  size_t parts_bytes = 0;   // of device memory, where they do not

  int32_t blocks() const { return teams * team_size; }
};

// What meeting, clearing and searching cost a row, in chunks that a block could read meanwhile. An estimate.
inline constexpr int kTurnChunks = 32;
inline constexpr int kFewestChunks = 16;  // a block

// Never more blocks than multiprocessors, so all of them run at once and may wait for each other. The fewest chunks a
// block one after the other, counting a turn's fixed cost.
inline SamplePlan plan_sample(int64_t rows, int64_t vocabulary, const CudaDevice& device) {
  const int multiprocessors = device.multiprocessors;
  const size_t shared_limit = device.shared_bytes;
  const int chunks = static_cast<int>((vocabulary + kChunk - 1) / kChunk);
  const size_t room =
      shared_limit < sizeof(SampleShared) ? 0 : (shared_limit - sizeof(SampleShared)) / part_bytes(kChunk);
  const int most = std::min({kMostTeam, multiprocessors, std::max(1, chunks / kFewestChunks)});
  const int least = room == 0 ? kMostTeam + 1 : static_cast<int>((chunks + room - 1) / room);
  SamplePlan plan;
  plan.in_shared = least <= std::min(kMostTeam, multiprocessors);
  int64_t lowest = 0;
  for (int size = plan.in_shared ? least : 1; size <= std::max(most, plan.in_shared ? least : 1); ++size) {
    const int teams = static_cast<int>(std::min<int64_t>(rows, multiprocessors / size));
    const int64_t cost = (rows + teams - 1) / teams * ((chunks + size - 1) / size + kTurnChunks);
    if (plan.teams > 0 && cost >= lowest) continue;
    lowest = cost;
    plan.teams = teams;
    plan.part = (chunks + size - 1) / size * kChunk;
    plan.team_size = static_cast<int32_t>((vocabulary + plan.part - 1) / plan.part);
  }
  plan.threads = std::clamp(plan.part / 8, 128, 1024);
  plan.shared_bytes = sizeof(SampleShared) + (plan.in_shared ? part_bytes(plan.part) : 0);
  plan.parts_bytes = plan.in_shared ? 0 : plan.blocks() * part_bytes(plan.part);
  return plan;
}

}  // namespace skerry::cuda
