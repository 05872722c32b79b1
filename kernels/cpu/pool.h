// A pool of parked threads for calls that come from Python instead of ONNX Runtime (sampling, tests).
#pragma once

#include <atomic>
#include <condition_variable>
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

 private:
  void run(int count, Parallel::Task task, void* argument);
  void work();
  void drain();

  std::mutex calls_;  // one parallel region at a time
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  uint64_t region_ = 0;
  int busy_ = 0;
  bool stopping_ = false;
  Parallel::Task task_ = nullptr;
  void* argument_ = nullptr;
  int count_ = 0;
  std::atomic<int> next_{0};
};

}  // namespace skerry
