// One thread block at a time, a fiber a thread.
#pragma once

#include <cstdint>
#include <functional>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};

namespace emulation {

struct Thread {
  dim3 index;
  int lane() const { return static_cast<int>(index.x % 32); }
};

extern Thread* current;
extern dim3 blockIdx, gridDim;
extern unsigned char* dynamic_shared;  // filled with NaNs before each block

// What the lanes of a warp show one another in a collective instruction.
struct WarpExchange {
  float values[32][6][2];
  const void* pointers[32];
};

WarpExchange& warp_exchange();
void sync_warp();
void sync_block();

// Runs every block of the grid, one after the other. Throws if threads of a block wait at different barriers.
void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);

}  // namespace emulation
