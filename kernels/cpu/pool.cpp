#include "pool.h"

namespace skerry {

Pool::Pool(int threads) {
  for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { work(); });
}

Pool::~Pool() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

Parallel Pool::parallel() {
  const auto call = [](void* self, int count, Parallel::Task task, void* argument) {
    static_cast<Pool*>(self)->run(count, task, argument);
  };
  return {call, this, threads()};
}

void Pool::drain() {
  for (int i = next_++; i < count_; i = next_++) task_(argument_, i);
}

void Pool::run(int count, Parallel::Task task, void* argument) {
  const std::lock_guard call(calls_);
  {
    const std::lock_guard lock(mutex_);
    task_ = task;
    argument_ = argument;
    count_ = count;
    next_ = 0;
    busy_ = static_cast<int>(workers_.size());
    ++region_;
  }
  wake_.notify_all();
  drain();
  std::unique_lock lock(mutex_);
  done_.wait(lock, [this] { return busy_ == 0; });
}

void Pool::work() {
  uint64_t seen = 0;
  std::unique_lock lock(mutex_);
  while (true) {
    wake_.wait(lock, [&] { return stopping_ || region_ != seen; });
    if (stopping_) return;
    seen = region_;
    lock.unlock();
    drain();
    lock.lock();
    if (--busy_ == 0) done_.notify_one();
  }
}

}  // namespace skerry
