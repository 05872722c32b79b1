#include "emulator.h"

#include <ucontext.h>

#include <csetjmp>
#include <deque>
#include <memory>

namespace skerry::emulator {
namespace {

constexpr size_t kStack = 128 << 10;
constexpr size_t kFence = 4 << 10;  // bytes behind a block's shared memory that must stay as they are
constexpr unsigned char kFenceByte = 0xA5;
constexpr unsigned char kPoison = 0xFF;  // four of them are a NaN, as are two
constexpr uint64_t kMostSwitches = 1ull << 30;
constexpr unsigned kResident = 4;  // blocks that run at once where they need not wait for each other

struct Copy {
  void* to;
  const void* from;
  bool valid;
};

struct Block;

struct Fiber {
  Block* block = nullptr;
  Index index{};
  std::unique_ptr<char[]> stack;
  ucontext_t entry;
  jmp_buf at;
  bool begun = false, done = false;
  const char* waits = nullptr;  // where; null: it can run
  std::vector<Copy> copies;     // of the group that is open
  std::deque<std::vector<Copy>> groups;
};

struct Block {
  Index index{};
  std::vector<unsigned char> shared;
  std::vector<Warp> warps;
  std::vector<int> waiting;  // in sync_block
  unsigned left = 0;
};

// One launch. There is one at a time in a thread.
struct Machine {
  const Launch* launch = nullptr;
  const Kernel* kernel = nullptr;
  Index block_size{}, grid_size{};
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<int> ready;  // fibers that can run, in no order
  std::vector<int> idle;   // fibers whose thread has ended
  uint64_t random = 0, next_block = 0, blocks_left = 0;
  int running = -1;
  jmp_buf scheduler;
  std::string error;
};

thread_local Machine* machine = nullptr;

Fiber& self() { return *machine->fibers[machine->running]; }

uint64_t draw(uint64_t& state) {  // xorshift64* (Vigna, 2016)
  state ^= state >> 12;
  state ^= state << 25;
  state ^= state >> 27;
  return state * 0x2545F4914F6CDD1Dull;
}

[[noreturn]] void to_scheduler() { _longjmp(machine->scheduler, 1); }

// Lets others run, and comes back once the scheduler picks this fiber again.
void leave() {
  if (_setjmp(self().at) == 0) to_scheduler();
}

void wait_in(const char* where, std::vector<int>& waiting) {
  self().waits = where;
  waiting.push_back(machine->running);
  leave();
}

void wake(std::vector<int>& waiting) {
  for (const int fiber : waiting) {
    machine->fibers[fiber]->waits = nullptr;
    machine->ready.push_back(fiber);
  }
  waiting.clear();
}

void finish_block(Block& block) {
  for (size_t i = machine->launch->shared_bytes; i < block.shared.size(); ++i)
    if (block.shared[i] != kFenceByte)
      fail("wrote past its " + std::to_string(machine->launch->shared_bytes) + " bytes of shared memory");
  --machine->blocks_left;
}

void thread_main() {
  Fiber& fiber = self();
  machine->kernel->body(machine->launch->params.data(), fiber.block->shared.data());
  fiber.done = true;
  if (!fiber.copies.empty() || !fiber.groups.empty()) fail("ended before its copies were waited for");
  if (--fiber.block->left == 0) finish_block(*fiber.block);
  machine->idle.push_back(machine->running);
  to_scheduler();
}

int new_fiber() {
  if (!machine->idle.empty()) {
    const int found = machine->idle.back();
    machine->idle.pop_back();
    return found;
  }
  machine->fibers.push_back(std::make_unique<Fiber>());
  machine->fibers.back()->stack = std::make_unique_for_overwrite<char[]>(kStack);
  return static_cast<int>(machine->fibers.size()) - 1;
}

void start_block() {
  const Index grid = machine->grid_size, size = machine->block_size;
  const uint64_t number = machine->next_block++;
  auto block = std::make_unique<Block>();
  block->index = {static_cast<unsigned>(number % grid.x), static_cast<unsigned>(number / grid.x % grid.y),
                  static_cast<unsigned>(number / grid.x / grid.y)};
  const unsigned threads = size.x * size.y * size.z;
  block->shared.assign(machine->launch->shared_bytes + kFence, kFenceByte);
  std::fill_n(block->shared.begin(), machine->launch->shared_bytes, kPoison);
  block->warps.resize(threads / kWarp);
  block->left = threads;
  for (unsigned t = 0; t < threads; ++t) {
    const int id = new_fiber();
    Fiber& fiber = *machine->fibers[id];
    fiber.block = block.get();
    fiber.index = {t % size.x, t / size.x % size.y, t / size.x / size.y};
    fiber.begun = fiber.done = false;
    fiber.waits = nullptr;
    machine->ready.push_back(id);
  }
  machine->blocks.push_back(std::move(block));
}

void resume(int id) {
  machine->running = id;
  Fiber& fiber = *machine->fibers[id];
  if (fiber.begun) _longjmp(fiber.at, 1);
  fiber.begun = true;
  getcontext(&fiber.entry);
  fiber.entry.uc_stack.ss_sp = fiber.stack.get();
  fiber.entry.uc_stack.ss_size = kStack;
  fiber.entry.uc_link = nullptr;
  makecontext(&fiber.entry, thread_main, 0);
  setcontext(&fiber.entry);
}

std::string who_waits() {
  std::map<std::string, int> places;
  for (const auto& fiber : machine->fibers)
    if (!fiber->done && fiber->waits != nullptr) ++places[fiber->waits];
  std::string said;
  for (const auto& [place, count] : places) said += (said.empty() ? "" : ", ") + std::to_string(count) + " in " + place;
  return said;
}

void schedule() {
  const uint64_t resident = machine->launch->together ? ~0ull : kResident;
  const uint64_t blocks = machine->blocks_left;
  volatile uint64_t switches = 0;
  _setjmp(machine->scheduler);
  if (!machine->error.empty()) return;
  while (machine->next_block < blocks && machine->next_block - (blocks - machine->blocks_left) < resident)
    start_block();
  if (machine->blocks_left == 0) return;
  if (machine->ready.empty()) {
    machine->error = "threads wait for ever: " + who_waits();
    return;
  }
  switches = switches + 1;
  if (switches > kMostSwitches) {
    machine->error = "does not end";
    return;
  }
  std::swap(machine->ready[draw(machine->random) % machine->ready.size()], machine->ready.back());
  const int chosen = machine->ready.back();
  machine->ready.pop_back();
  resume(chosen);
}

std::map<std::string, Kernel>& registry() {
  static std::map<std::string, Kernel> all;
  return all;
}

}  // namespace

Kernel::Kernel(const char* name, size_t params, unsigned threads, Body body)
    : params(params), threads(threads), body(body) {
  registry().emplace(name, *this);
}

const std::map<std::string, Kernel>& kernels() { return registry(); }

std::string run(const Launch& launch, uint64_t seed) {
  const auto found = registry().find(launch.kernel);
  if (found == registry().end()) return launch.kernel + ": no kernel has this name";
  const Kernel& kernel = found->second;
  const uint32_t threads = launch.block[0] * launch.block[1] * launch.block[2];
  if (launch.params.size() != kernel.params)
    return launch.kernel + ": " + std::to_string(launch.params.size()) + " bytes of parameters, not " +
           std::to_string(kernel.params);
  if (threads == 0 || threads % kWarp != 0 || threads > kernel.threads)
    return launch.kernel + ": a block of " + std::to_string(threads) + " threads, not whole warps of at most " +
           std::to_string(kernel.threads);
  Machine here;
  here.launch = &launch;
  here.kernel = &kernel;
  here.block_size = {launch.block[0], launch.block[1], launch.block[2]};
  here.grid_size = {launch.grid[0], launch.grid[1], launch.grid[2]};
  here.random = seed * 2 + 1;
  here.blocks_left = uint64_t{launch.grid[0]} * launch.grid[1] * launch.grid[2];
  machine = &here;
  schedule();
  machine = nullptr;
  return here.error.empty() ? "" : launch.kernel + ": " + here.error;
}

const Index& thread_index() { return self().index; }
const Index& block_index() { return self().block->index; }
const Index& block_size() { return machine->block_size; }
const Index& grid_size() { return machine->grid_size; }

int lane() {
  const Index &i = self().index, &size = machine->block_size;
  return static_cast<int>((i.x + size.x * (i.y + size.y * i.z)) % kWarp);
}

void fail(const std::string& why) {
  const Index &t = self().index, &b = self().block->index;
  const auto said = [](const Index& i) {
    return std::to_string(i.x) + "," + std::to_string(i.y) + "," + std::to_string(i.z);
  };
  machine->error = "thread " + said(t) + " of block " + said(b) + ": " + why;
  to_scheduler();
}

void yield() {
  machine->ready.push_back(machine->running);
  leave();
}

void sync_block() {
  Block& block = *self().block;
  if (block.waiting.size() + 1 < block.left) return wait_in("__syncthreads", block.waiting);
  if (block.left != machine->block_size.x * machine->block_size.y * machine->block_size.z)
    fail("__syncthreads after threads of the block have ended");
  wake(block.waiting);
  yield();
}

Warp& arrive(const char* instruction, const void* in, size_t bytes, const std::function<void(Warp&)>& perform) {
  const Index &i = self().index, &size = machine->block_size;
  Warp& warp = self().block->warps[(i.x + size.x * (i.y + size.y * i.z)) / kWarp];
  if (warp.arrived == 0) warp.doing = instruction;
  if (std::strcmp(warp.doing, instruction) != 0)
    fail(std::string("its warp is in ") + warp.doing + ", it is in " + instruction);
  std::memcpy(warp.in[lane()], in, bytes);
  if (++warp.arrived < kWarp) {
    wait_in(instruction, warp.waiting);
    return warp;
  }
  perform(warp);
  warp.arrived = 0;
  wake(warp.waiting);
  return warp;
}

void copy_later(void* to, const void* from, bool valid) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || (valid && reinterpret_cast<uintptr_t>(from) % 16 != 0))
    fail("copies 16 bytes from or to an address that is no multiple of 16");
  self().copies.push_back({to, from, valid});
}

void close_group() {
  self().groups.push_back(std::move(self().copies));
  self().copies.clear();
}

void finish_groups(size_t pending) {
  Fiber& fiber = self();
  while (fiber.groups.size() > pending) {
    for (const Copy& copy : fiber.groups.front()) {
      if (copy.valid)
        std::memcpy(copy.to, copy.from, 16);
      else
        std::memset(copy.to, 0, 16);
    }
    fiber.groups.pop_front();
  }
}

Matrices load_matrices(const void* row, bool trans) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fail("ldmatrix from an address that is no multiple of 16");
  return together<Matrices>(
      trans ? "ldmatrix.trans" : "ldmatrix", row, [trans](const void* const* rows, Matrices* out) {
        for (int i = 0; i < kWarp; ++i) {
          for (int m = 0; m < 4; ++m) {
            uint16_t pair[2];
            for (int e = 0; e < 2; ++e) {
              const int at_row = trans ? 2 * (i % 4) + e : i / 4, at_column = trans ? i / 4 : 2 * (i % 4) + e;
              pair[e] = static_cast<const uint16_t*>(rows[8 * m + at_row])[at_column];
            }
            std::memcpy(&out[i].r[m], pair, sizeof pair);
          }
        }
      });
}

// Sums in order of k in float32: the tensor cores' own order is not documented, and only errors are compared.
Tile multiply(const Tile& d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float (*widen)(uint16_t)) {
  struct In {
    Tile d;
    uint32_t a[4], b[2];
    float (*widen)(uint16_t);
  };
  In mine{d, {}, {b0, b1}, widen};
  std::memcpy(mine.a, a, sizeof mine.a);
  return together<Tile>("mma", mine, [](const In* in, Tile* out) {
    float left[16][16], right[16][8];
    const auto element = [&](uint32_t pair, int e) { return in[0].widen(static_cast<uint16_t>(pair >> (16 * e))); };
    for (int i = 0; i < kWarp; ++i) {
      for (int e = 0; e < 2; ++e) {
        for (int r = 0; r < 4; ++r) left[i / 4 + 8 * (r % 2)][2 * (i % 4) + e + 8 * (r / 2)] = element(in[i].a[r], e);
        for (int r = 0; r < 2; ++r) right[2 * (i % 4) + e + 8 * r][i / 4] = element(in[i].b[r], e);
      }
    }
    for (int i = 0; i < kWarp; ++i) {
      out[i] = in[i].d;
      for (int r = 0; r < 4; ++r)
        for (int k = 0; k < 16; ++k) out[i].d[r] += left[i / 4 + 8 * (r / 2)][k] * right[k][2 * (i % 4) + r % 2];
    }
  });
}

}  // namespace skerry::emulator
