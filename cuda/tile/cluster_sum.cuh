// Sums that two thread blocks of a cluster hold parts of: each block ends up with one half of the results.
#pragma once

#include "tile/ptx.cuh"

namespace jax_qgemm {

// A block stores its part of the other's results in the other's memory, and each store counts its bytes on a barrier
// there. Two buffers in turn: a block stores into one again only after it has the results of the round between, hence
// after the other block, whose threads meet at a block barrier before they send, has read it.
struct ClusterSum {
  uint64_t* barriers;  // 2
  float* received;     // [2][cells]
  int cells;           // results of a block, a round
  int rank;
  int round = 0;

  // By the whole thread block, in good time before the first send().
  __device__ __forceinline__ void start() {
    if (threadIdx.x == 0) {
#pragma unroll
      for (int i = 0; i < 2; ++i) ptx::barrier_init(barriers + i, 1);
      ptx::barrier_init_fence();
#pragma unroll
      for (int i = 0; i < 2; ++i) ptx::barrier_expect(barriers + i, cells * 4);
    }
    __syncwarp();
    ptx::cluster_arrive();
  }

  __device__ __forceinline__ void send(int cell, float value) const {
    ptx::store_async(received + round % 2 * cells + cell, value, barriers + round % 2, rank ^ 1);
  }
  __device__ __forceinline__ void wait() const { ptx::barrier_wait_cluster(barriers + round % 2, round / 2 % 2); }
  __device__ __forceinline__ float part_of_other(int cell) const { return received[round % 2 * cells + cell]; }
  // After the thread's last part_of_other().
  __device__ __forceinline__ void finish_round() {
    if (threadIdx.x == 0) ptx::barrier_expect(barriers + round % 2, cells * 4);
    ++round;
  }
};

}  // namespace jax_qgemm
