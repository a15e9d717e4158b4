// One cluster of thread blocks at a time, a fiber a thread.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <vector>

#include "tensor_core.h"

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};

namespace emulation {

// A thread's asynchronous copies: they happen as late as they may, when the thread waits for them.
struct Copy {
  void* to;
  const void* from;  // nullptr: zeros
  int bytes;
};

// A wgmma of a thread: it happens when the thread waits for it, and reads its operands only then.
struct Wgmma {
  void (*multiply)(const Wgmma&);
  void* sums;
  int columns;  // 2 sums each
  const uint32_t* a;
  uint64_t b;
  bool adds;
};

struct Thread {
  dim3 index;
  int rank = 0;  // of the block in its cluster
  int cluster_arrivals = 0, cluster_waits = 0;
  std::vector<Copy> open;  // not yet committed
  std::deque<std::vector<Copy>> committed;
  std::vector<Wgmma> wgmmas;
  std::vector<size_t> wgmma_groups;  // committed ones, each by the number of wgmmas up to its end
  int lane() const { return static_cast<int>(index.x % 32); }
};

extern Thread* current;
// Of the running thread.
extern dim3 blockIdx, blockDim, gridDim;
extern unsigned char* dynamic_shared;  // filled with NaNs before each block

// Hopper, but with few multiprocessors, so that small products take several turns of a persistent grid.
struct Device {
  int major = 9, multiprocessors = 3, shared_bytes = 227 << 10;
  int compiled = 90;  // the compute capability, times 10, of the kernels' code
  int number = 0;     // launchers keep what they learnt of a device
};
extern Device device;

struct Launch {
  dim3 grid, block;
  unsigned cluster = 1;
  size_t shared_bytes = 0;
};
extern Launch last_launch;

// What the lanes of a warp show one another in a collective instruction.
struct WarpExchange {
  Operand values[32][6][2];
  const void* pointers[32];
  union {  // of a wgmma's b
    Operands columns[256];
    Fp8Operands fp8_columns[256];
    Int8Operands int8_columns[256];
  };
};

WarpExchange& warp_exchange();
void sync_warp();
void sync_block();
void wait_for_cluster();
void sync_named(int barrier, int threads);
void arrive_named(int barrier, int threads);
// Lets the other threads run before a condition is looked at again.
void poll();

// Copies by the copy engine: each happens when some thread waits on its barrier.
void enqueue(uint64_t* barrier, std::function<void()> copy);
void complete_copies(uint64_t* barrier);

// Where an address in this block's shared memory lies in that of block `rank` of the cluster.
void* shared_of(void* own, int rank);

// Runs every cluster of the grid, one after the other. Throws if threads wait for what never comes.
void run_grid(const Launch& launch, const std::function<void()>& kernel);

}  // namespace emulation
