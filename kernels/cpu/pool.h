// The threads of this process that kernels share. Within a step (begin .. end) they spin between regions, because a
// step has a hundred regions of a few microseconds each; between steps they are parked and cost nothing.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "../include/parallel.h"

namespace skerry {

class Pool {
 public:
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }
  Parallel parallel();
  void begin();
  void end();

  // The pool of so many threads, made on first use and kept as long as the process. Null: one thread needs none.
  static Pool* of(int threads);

 private:
  void run(int count, Parallel::Task task, void* argument);
  void work(int index);
  bool drain();
  void announce(const void* const* begins, int streams);
  const void* next() const;

  // Reads ahead for one thread: a line of each stream of the region that comes next, one after another.
  class Ahead {
   public:
    Ahead(const Pool& pool, int thread) : pool_(pool), thread_(thread) {}
    bool fetch(int lines);  // false if there is nothing (more) to fetch

   private:
    const Pool& pool_;
    int thread_, region_ = -1, line_ = 0;
  };

  std::mutex calls_;  // one parallel region at a time
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> workers_;
  bool stopping_ = false;
  uint32_t region_ = 0;
  std::atomic<bool> spinning_{false};
  // Where every thread began to read in each region of the last step, [kMostRegions][threads][kMostStreams], and the
  // row of the region that comes next (-1: none).
  std::unique_ptr<std::atomic<const char*>[]> begins_;
  size_t announced_ = 0;
  std::atomic<int> next_region_{-1};
  // What is left to claim: region << 32 | claims << 16 | next claim. A claim below `claims` is one of the region that
  // it came with, which lives until all of its claims are finished: a thread that comes late finds nothing, or claims
  // of the next region, and nobody waits for it.
  alignas(64) std::atomic<uint64_t> ticket_{0};
  // Of the region, in the line that a claim brings along.
  std::atomic<Parallel::Task> task_{nullptr};
  std::atomic<void*> argument_{nullptr};
  std::atomic<int> count_{0}, run_{1};  // tasks, and how many of them are claimed at once
  alignas(64) std::atomic<int> finished_{0};
};

}  // namespace skerry
