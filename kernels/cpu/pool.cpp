#include "pool.h"

#include <algorithm>
#include <map>
#include <memory>

namespace skerry {
namespace {

constexpr int kMostClaims = 0xf000;            // claims that come too late are counted on, once for each thread
constexpr double kSpinningSerialWork = 5.0e4;  // a microsecond or two
constexpr int kMostRegions = 1024;             // of a step, that are remembered
constexpr int kAheadLines = 1024;              // 128 KB a stream: an eighth of a second-level cache
constexpr int kCallersLines = 16;              // by the thread that goes on to the next region itself
constexpr int kLinesAtOnce = 8;                // fetched by a waiting thread between two looks at the ticket
constexpr int kPatience = 4096;                // pauses before a waiting thread gives its core away

thread_local int this_thread = 0;  // of its pool; whoever runs a region is 0

bool claimable(uint64_t ticket) { return (ticket & 0xffff) < (ticket >> 16 & 0xffff); }

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

Pool::Pool(int threads)
    : begins_(std::make_unique<std::atomic<const char*>[]>(size_t{kMostRegions} * threads * kMostStreams)) {
  for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
}

Pool::~Pool() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
    spinning_ = false;
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

Pool* Pool::of(int threads) {
  static std::mutex mutex;
  static std::map<int, std::unique_ptr<Pool>> pools;
  if (threads <= 1) return nullptr;
  const std::lock_guard lock(mutex);
  std::unique_ptr<Pool>& pool = pools[threads];
  if (!pool) pool = std::make_unique<Pool>(threads);
  return pool.get();
}

Parallel Pool::parallel() {
  const auto call = [](void* self, int count, Parallel::Task task, void* argument) {
    static_cast<Pool*>(self)->run(count, task, argument);
  };
  const auto hear = [](void* self, const void* const* begins, int streams) {
    static_cast<Pool*>(self)->announce(begins, streams);
  };
  const auto next = [](void* self) { return static_cast<const Pool*>(self)->next(); };
  if (!spinning_) return {call, this, threads()};
  return {call, this, threads(), kSpinningSerialWork, hear, next};
}

void Pool::begin() {
  {
    const std::lock_guard lock(mutex_);
    spinning_ = true;
  }
  announced_ = 0;
  wake_.notify_all();
}

void Pool::end() {
  spinning_ = false;
  next_region_ = -1;
}

void Pool::announce(const void* const* begins, int streams) {
  if (announced_ == kMostRegions) return;
  std::atomic<const char*>* row = &begins_[announced_ * threads() * kMostStreams];
  for (int i = 0; i < threads(); ++i) {
    for (int s = 0; s < kMostStreams; ++s) {
      row[i * kMostStreams + s] = s < streams ? static_cast<const char*>(begins[i * streams + s]) : nullptr;
    }
  }
  next_region_ = static_cast<int>(++announced_);
}

const void* Pool::next() const {
  const int region = next_region_;
  if (region < 0 || region == kMostRegions) return nullptr;
  return begins_[(static_cast<size_t>(region) * threads() + this_thread) * kMostStreams].load(
      std::memory_order_relaxed);
}

bool Pool::Ahead::fetch(int lines) {
  const int region = pool_.next_region_;
  if (region < 0 || region == kMostRegions) return false;
  if (region != region_) line_ = 0;
  region_ = region;
  const std::atomic<const char*>* begin =
      &pool_.begins_[(static_cast<size_t>(region) * pool_.threads() + thread_) * kMostStreams];
  const int last = std::min(line_ + lines, kAheadLines);
  for (; line_ < last; ++line_) {
    for (int s = 0; s < kMostStreams; ++s) {
      if (const char* at = begin[s]) __builtin_prefetch(at + 64 * line_, 0, 2);
    }
  }
  return last < kAheadLines && begin[0] != nullptr;
}

// Runs what can be claimed of the current region; false if that was nothing.
bool Pool::drain() {
  if (!claimable(ticket_.load(std::memory_order_acquire))) return false;
  int done = 0;
  while (true) {
    const uint64_t ticket = ticket_.fetch_add(1, std::memory_order_acq_rel);
    if (!claimable(ticket)) break;
    // These belong to the ticket's region, which lives until this claim is finished.
    const Parallel::Task task = task_.load(std::memory_order_relaxed);
    void* argument = argument_.load(std::memory_order_relaxed);
    const int count = count_.load(std::memory_order_relaxed), run = run_.load(std::memory_order_relaxed);
    const int first = static_cast<int>(ticket & 0xffff) * run;
    for (int i = first; i < std::min(count, first + run); ++i) task(argument, i);
    ++done;
  }
  if (done > 0) finished_.fetch_add(done, std::memory_order_release);
  return done > 0;
}

void Pool::run(int count, Parallel::Task task, void* argument) {
  const std::lock_guard call(calls_);
  const int run = (count + kMostClaims - 1) / kMostClaims, claims = (count + run - 1) / run;
  task_.store(task, std::memory_order_relaxed);
  argument_.store(argument, std::memory_order_relaxed);
  count_.store(count, std::memory_order_relaxed);
  run_.store(run, std::memory_order_relaxed);
  finished_.store(0, std::memory_order_relaxed);
  ticket_.store(uint64_t{++region_} << 32 | uint64_t(claims) << 16, std::memory_order_release);
  if (!spinning_.load(std::memory_order_relaxed)) {
    {
      const std::lock_guard lock(mutex_);
    }  // a worker is either past its look at the ticket, and waits, or sees it
    wake_.notify_all();
  }
  drain();
  for (int i = 0; finished_.load(std::memory_order_acquire) < claims; ++i) {
    if (i < kPatience) {
      pause();
    } else {
      std::this_thread::yield();
    }
  }
  Ahead(*this, 0).fetch(kCallersLines);
}

void Pool::work(int index) {
  this_thread = index;
  std::unique_lock lock(mutex_);
  while (true) {
    wake_.wait(lock, [&] { return stopping_ || spinning_ || claimable(ticket_); });
    if (stopping_) return;
    lock.unlock();
    Ahead ahead(*this, index);
    do {
      if (!drain() && !ahead.fetch(kLinesAtOnce)) pause();
    } while (spinning_.load(std::memory_order_relaxed));
    lock.lock();
  }
}

}  // namespace skerry
