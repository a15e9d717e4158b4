#include "emulator.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

namespace emulation {

Thread* current = nullptr;
Device device;
Launch last_launch;
dim3 blockIdx, blockDim, gridDim;
unsigned char* dynamic_shared = nullptr;

namespace {

constexpr size_t kStackBytes = 256 << 10;

enum class Wait { kNothing, kWarp, kBlock, kNamed, kPoll, kDone };

struct Fiber {
  Thread thread;
  dim3 block;
  unsigned char* shared = nullptr;
  ucontext_t entry;  // where the fiber starts; from then on it is resumed by longjmp, which makes no system call
  jmp_buf resume;
  bool started = false;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  Wait wait = Wait::kNothing;
  int barrier = 0, barrier_threads = 0;  // of Wait::kNamed
};

struct QueuedCopy {
  uint64_t* barrier;
  std::function<void()> copy;
};

std::vector<Fiber> fibers;
std::vector<QueuedCopy> copies;
std::vector<WarpExchange> exchanges;
std::vector<unsigned char*> blocks_shared;  // of the cluster
std::vector<std::array<int, 16>> arrived;   // of each block: threads at a named barrier that do not wait there
size_t threads_of_block;
jmp_buf scheduler;
const std::function<void()>* body;
Fiber* running;
const char* broken;  // what a kernel must not do, if it has

void start() {
  (*body)();
  if (!running->thread.wgmmas.empty()) broken = "a wgmma that its thread has not waited for";
  running->wait = Wait::kDone;
  _longjmp(scheduler, 1);
}

void yield(Wait wait) {
  running->wait = wait;
  if (_setjmp(running->resume) == 0) _longjmp(scheduler, 1);
}

// Runs the fiber until it waits or is done.
void resume(Fiber& fiber) {
  running = &fiber;
  current = &fiber.thread;
  blockIdx = fiber.block;
  dynamic_shared = fiber.shared;
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  setcontext(&fiber.entry);
}

// Lets fibers [first, last) go on if all of them wait for the same thing.
bool release(size_t first, size_t last, Wait wait) {
  for (size_t i = first; i < last; ++i) {
    if (fibers[i].wait != wait) return false;
  }
  for (size_t i = first; i < last; ++i) fibers[i].wait = Wait::kNothing;
  return true;
}

// The same for the threads of a block at each of its named barriers.
bool release_named(size_t first, size_t last) {
  std::array<int, 16> waiting = arrived[first / threads_of_block];
  std::array<int, 16> released = {};
  for (size_t i = first; i < last; ++i) {
    if (fibers[i].wait == Wait::kNamed) ++waiting[fibers[i].barrier];
  }
  for (size_t i = first; i < last; ++i) {
    Fiber& fiber = fibers[i];
    if (fiber.wait != Wait::kNamed || waiting[fiber.barrier] != fiber.barrier_threads) continue;
    fiber.wait = Wait::kNothing;
    released[fiber.barrier] = 1;
  }
  for (size_t i = 0; i < released.size(); ++i) {
    if (released[i]) arrived[first / threads_of_block][i] = 0;
  }
  return released != std::array<int, 16>{};
}

// One block of the cluster at a time, as far as it gets: what it does too early or too late shows in the other.
void run_cluster() {
  const size_t count = fibers.size(), blocks = count / threads_of_block;
  bool backwards = false;
  size_t active = 0, idle = 0;  // the block; passes in which threads did nothing but poll
  for (size_t done = 0; done < count;) {
    bool progressed = false;
    const size_t first = active * threads_of_block, last = first + threads_of_block;
    for (size_t i = first; i < last; ++i) {
      // Every other pass backwards: a missing barrier shows in one direction or the other.
      Fiber& fiber = fibers[backwards ? first + last - 1 - i : i];
      if (fiber.wait != Wait::kNothing && fiber.wait != Wait::kPoll) continue;
      resume(fiber);
      progressed |= fiber.wait != Wait::kPoll;
      done += fiber.wait == Wait::kDone;
    }
    backwards = !backwards;
    for (size_t w = first; w < last; w += 32) progressed |= release(w, w + 32, Wait::kWarp);
    progressed |= release(first, last, Wait::kBlock);
    progressed |= release_named(first, last);
    if (progressed) {
      idle = 0;
      continue;
    }
    active = (active + 1) % blocks;
    if (++idle == 3 * blocks) throw std::logic_error("threads wait for what never comes");
  }
  if (!copies.empty()) broken = "a copy that no thread has waited for";
  if (broken) throw std::logic_error(broken);
}

}  // namespace

WarpExchange& warp_exchange() { return exchanges[static_cast<size_t>(running - fibers.data()) / 32]; }
void sync_warp() { yield(Wait::kWarp); }
void sync_block() { yield(Wait::kBlock); }
void poll() { yield(Wait::kPoll); }
void wait_for_cluster() {
  const int phase = ++current->cluster_waits;
  const auto has_arrived = [&](const Fiber& fiber) { return fiber.thread.cluster_arrivals >= phase; };
  while (!std::all_of(fibers.begin(), fibers.end(), has_arrived)) poll();
}

void sync_named(int barrier, int threads) {
  if (barrier < 1 || barrier > 15 || threads % 32 != 0) __builtin_trap();
  running->barrier = barrier;
  running->barrier_threads = threads;
  yield(Wait::kNamed);
}

void arrive_named(int barrier, int threads) {
  if (barrier < 1 || barrier > 15 || threads % 32 != 0) __builtin_trap();
  ++arrived[static_cast<size_t>(running - fibers.data()) / threads_of_block][static_cast<size_t>(barrier)];
}

void enqueue(uint64_t* barrier, std::function<void()> copy) { copies.push_back({barrier, std::move(copy)}); }

void complete_copies(uint64_t* barrier) {
  std::erase_if(copies, [&](const QueuedCopy& queued) {
    if (queued.barrier == barrier) queued.copy();
    return queued.barrier == barrier;
  });
}

void* shared_of(void* own, int rank) {
  const auto first = fibers.begin() + static_cast<std::ptrdiff_t>(static_cast<size_t>(rank) * threads_of_block);
  const bool ended = std::all_of(first, first + static_cast<std::ptrdiff_t>(threads_of_block),
                                 [](const Fiber& fiber) { return fiber.wait == Wait::kDone; });
  if (ended) broken = "access to the memory of a block that has ended";
  return blocks_shared[static_cast<size_t>(rank)] + (static_cast<unsigned char*>(own) - dynamic_shared);
}

void run_grid(const Launch& launch, const std::function<void()>& kernel) {
  const auto [grid, block, cluster, shared_bytes] = last_launch = launch;
  if (block.x % 32 != 0 || block.x > 1024 || grid.x % cluster != 0 ||
      shared_bytes > static_cast<size_t>(device.shared_bytes)) {
    throw std::logic_error("a launch that a device would refuse");
  }
  // Exactly as large as asked for, so that an address sanitizer sees what lies outside.
  std::vector<std::unique_ptr<void, void (*)(void*)>> memory;
  blocks_shared.clear();
  for (unsigned i = 0; i < cluster; ++i) {
    memory.emplace_back(std::aligned_alloc(1024, (shared_bytes + 1023) / 1024 * 1024), std::free);
    blocks_shared.push_back(static_cast<unsigned char*>(memory.back().get()));
  }
  gridDim = grid;
  blockDim = block;
  body = &kernel;
  copies.clear();
  broken = nullptr;
  threads_of_block = block.x;
  fibers = std::vector<Fiber>(block.x * cluster);
  exchanges = std::vector<WarpExchange>(fibers.size() / 32);
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; x += cluster) {
      for (unsigned char* shared : blocks_shared) memset(shared, 0xff, shared_bytes);
      arrived.assign(cluster, {});
      for (unsigned i = 0; i < fibers.size(); ++i) {
        Fiber& fiber = fibers[i];
        fiber.thread = Thread{};
        fiber.thread.index = dim3(i % block.x, 0, 0);
        fiber.thread.rank = static_cast<int>(i / block.x);
        fiber.block = dim3(x + i / block.x, y);
        fiber.shared = blocks_shared[i / block.x];
        fiber.wait = Wait::kNothing;
        fiber.started = false;
        getcontext(&fiber.entry);
        fiber.entry.uc_stack.ss_sp = fiber.stack.get();
        fiber.entry.uc_stack.ss_size = kStackBytes;
        makecontext(&fiber.entry, start, 0);
      }
      run_cluster();
    }
  }
}

}  // namespace emulation
