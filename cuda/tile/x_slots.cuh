// Activations on their way to wgmma's B operand, brought by the copy engine.
#pragma once

#include "formats/format.cuh"
#include "tile/tma.cuh"
#include "tile/wgmma.cuh"

namespace jax_qgemm {

// Up to Tokens rows of x over a range of k, for the warps of a thread block that multiply with it. A slot holds a piece
// of 128 k, as [tile of k][token][64]. Where every piece has a slot of its own they stay; else they pass through the
// slots, again for every pass over k.
template <int Tokens>
struct XSlots {
  static constexpr int kTiles = 2, kTileBytes = Tokens * kTileK * 2, kBytes = kTiles * kTileBytes;

  uint64_t* barriers;  // two a slot: x has come; every warp has read it, used where pieces do not stay
  char* memory;
  int slots, pieces;  // in use; of a pass
  bool stays;
  // What is to be read next.
  int slot = 0, parity = 0;
  // Of the one thread that loads, else 0: loads still to be started, of which piece_to_load is the next.
  int to_load = 0, piece_to_load = 0;

  __device__ __forceinline__ XSlots(uint64_t* barriers, char* memory, int slots, int pieces, bool stays)
      : barriers(barriers), memory(memory), slots(stays ? pieces : slots), pieces(pieces), stays(stays) {}

  // By one thread, before the others read, which are of so many warps: the first loads. load(barrier, address, piece)
  // starts the copies.
  template <class Load>
  __device__ __forceinline__ void start(int warps, int passes, const Load& load) {
    for (int i = 0; i < slots; ++i) {
      ptx::barrier_init(barriers + 2 * i, 1);
      ptx::barrier_init(barriers + 2 * i + 1, warps);
    }
    ptx::barrier_init_fence();
    to_load = stays ? pieces : pieces * passes;
    // The last slot of a ring is filled by the first release().
#pragma unroll 1
    for (int i = 0; i < (stays ? slots : slots - 1) && to_load > 0; ++i) load_next(i, load);
  }

  __device__ __forceinline__ void wait() const { ptx::barrier_wait(barriers + 2 * slot, parity); }
  // Of the slot's first k-step, in a uniform register, from which wgmma takes it.
  __device__ __forceinline__ uint64_t operand() const {
    const uint64_t first = swizzled_operand(address(slot));
    const int low = ptx::uniform(static_cast<int>(first));
    return (first & ~uint64_t{0xffffffff}) | static_cast<uint32_t>(low);
  }
  // By a whole warp, when it has read the slot. The thread that loads refills the slot before: by now the others have
  // read that too, or nearly.
  template <class Load>
  __device__ __forceinline__ void release(const Load& load) {
    if (!stays && threadIdx.x % 32 == 0) {
      ptx::barrier_arrive(barriers + 2 * slot + 1);
      if (to_load > 0) {
        const int before = slot == 0 ? slots - 1 : slot - 1;
        ptx::barrier_wait(barriers + 2 * before + 1, slot == 0 ? parity ^ 1 : parity);
        load_next(before, load);
      }
    }
    if (++slot == slots) {
      slot = 0;
      if (!stays) parity ^= 1;
    }
  }

 private:
  template <class Load>
  __device__ __forceinline__ void load_next(int to, const Load& load) {
    load(barriers + 2 * to, address(to), piece_to_load);
    --to_load;
    if (++piece_to_load == pieces) piece_to_load = 0;
  }
  __device__ __forceinline__ ptx::SharedAddress address(int of) const {
    return ptx::shared_address(memory + of * kBytes);
  }
};

}  // namespace jax_qgemm
