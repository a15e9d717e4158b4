// Copies of boxes of a matrix into shared memory by Hopper's copy engine.
#pragma once

#include <cuda.h>

#include "tile/ptx.cuh"

#ifdef JAX_QGEMM_EMULATION
#include "emulated_tma.h"
#else

namespace jax_qgemm::ptx {

// The box of a matrix whose first element is (column, row), zeros outside the matrix; its bytes count on `barrier`.
__device__ __forceinline__ void load_box(SharedAddress to, const CUtensorMap* map, int column, int row,
                                         SharedAddress barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
          "r"(to),
      "l"(map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}
__device__ __forceinline__ void load_box(SharedAddress to, const CUtensorMap* map, int column, int row,
                                         uint64_t* barrier) {
  load_box(to, map, column, row, shared_address(barrier));
}
// The same for both blocks of a cluster: to the same place in each, and counted on the barrier of each.
__device__ __forceinline__ void load_box_for_both(SharedAddress to, const CUtensorMap* map, int column, int row,
                                                  uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier)), "h"(static_cast<uint16_t>(3))
      : "memory");
}
__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

}  // namespace jax_qgemm::ptx

#endif
