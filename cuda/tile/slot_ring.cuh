// Slots of shared memory that the copy engine fills and warps read, in turn.
#pragma once

#include "tile/ptx.cuh"

namespace jax_qgemm {

// Where they lie: a slot has two barriers, of which one says that it is full and the other that it has been read.
struct Slots {
  uint64_t* barriers;
  char* memory;
  int count, bytes;  // slots; of one

  // By one thread, before the slots are used; readers: arrivals.
  __device__ __forceinline__ void start(int readers) const {
    for (int i = 0; i < count; ++i) {
      ptx::barrier_init(barriers + 2 * i, 1);
      ptx::barrier_init(barriers + 2 * i + 1, readers);
    }
  }
};

// One side's place: that of the thread that fills the slots, or of a reading warp.
class SlotTurn {
 public:
  // Opaque: the compiler would compute and load it all again and again.
  __device__ __forceinline__ explicit SlotTurn(const Slots& of)
      : barriers(ptx::opaque(ptx::shared_address(of.barriers))),
        memory(ptx::opaque(ptx::shared_address(of.memory))),
        count(ptx::opaque(of.count)),
        bytes(ptx::opaque(of.bytes)) {}

  __device__ __forceinline__ ptx::SharedAddress full() const { return barriers + slot * 16; }
  __device__ __forceinline__ ptx::SharedAddress address() const { return memory + slot * bytes; }
  __device__ __forceinline__ void wait_full() const { ptx::barrier_wait(full(), parity); }
  // offset: from these slots' barriers to those of others, which are filled in step.
  __device__ __forceinline__ void wait_read(int offset = 0) const {
    ptx::barrier_wait(full() + (offset + 8), parity ^ 1);
  }
  // By all lanes, when the warp has read the slot.
  __device__ __forceinline__ void release(int lane) {
    ptx::barrier_arrive_if(lane == 0, full() + 8);
    advance();
  }
  __device__ __forceinline__ void advance() {
    if (++slot == count) slot = 0, parity ^= 1;
  }
  __device__ __forceinline__ int index() const { return slot; }
  __device__ __forceinline__ int phase() const { return parity; }
  // Of slots that stay as they are.
  __device__ __forceinline__ void pass() {
    if (++slot == count) slot = 0;
  }

 private:
  ptx::SharedAddress barriers, memory;
  int count, bytes;
  int slot = 0, parity = 0;
};

}  // namespace jax_qgemm
