#include "emulator.h"

#include <setjmp.h>
#include <ucontext.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

namespace emulation {

Thread* current = nullptr;
dim3 blockIdx, gridDim;
unsigned char* dynamic_shared = nullptr;

namespace {

constexpr size_t kStackBytes = 256 << 10;

enum class Wait { kNothing, kWarp, kBlock, kDone };

struct Fiber {
  Thread thread;
  ucontext_t entry;  // where the fiber starts; from then on it is resumed by longjmp, which makes no system call
  jmp_buf resume;
  bool started = false;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  Wait wait = Wait::kNothing;
};

std::vector<Fiber> fibers;
std::vector<WarpExchange> exchanges;
jmp_buf scheduler;
const std::function<void()>* body;
Fiber* running;

void start() {
  (*body)();
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

void run_block() {
  const size_t count = fibers.size();
  bool backwards = false;
  for (size_t done = 0; done < count;) {
    bool progressed = false;
    for (size_t i = 0; i < count; ++i) {
      // Every other pass backwards: a missing barrier shows in one direction or the other.
      Fiber& fiber = fibers[backwards ? count - 1 - i : i];
      if (fiber.wait != Wait::kNothing) continue;
      progressed = true;
      resume(fiber);
      done += fiber.wait == Wait::kDone;
    }
    backwards = !backwards;
    for (size_t w = 0; w < count; w += 32) progressed |= release(w, w + 32, Wait::kWarp);
    progressed |= release(0, count, Wait::kBlock);
    if (!progressed) throw std::logic_error("threads of a block wait at different barriers");
  }
}

}  // namespace

WarpExchange& warp_exchange() { return exchanges[current->index.x / 32]; }
void sync_warp() { yield(Wait::kWarp); }
void sync_block() { yield(Wait::kBlock); }

void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
  // Exactly as large as asked for, so that an address sanitizer sees what lies outside.
  const std::unique_ptr<void, void (*)(void*)> memory(std::aligned_alloc(128, (shared_bytes + 127) / 128 * 128),
                                                      std::free);
  dynamic_shared = static_cast<unsigned char*>(memory.get());
  gridDim = grid;
  body = &kernel;
  fibers = std::vector<Fiber>(block.x);
  exchanges = std::vector<WarpExchange>((block.x + 31) / 32);
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = dim3(x, y);
      memset(dynamic_shared, 0xff, shared_bytes);
      for (unsigned i = 0; i < block.x; ++i) {
        Fiber& fiber = fibers[i];
        fiber.thread.index = dim3(i, 0, 0);
        fiber.wait = Wait::kNothing;
        fiber.started = false;
        getcontext(&fiber.entry);
        fiber.entry.uc_stack.ss_sp = fiber.stack.get();
        fiber.entry.uc_stack.ss_size = kStackBytes;
        makecontext(&fiber.entry, start, 0);
      }
      run_block();
    }
  }
}

}  // namespace emulation
