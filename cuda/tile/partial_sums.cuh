// Sums over k that warpgroups of one thread block, or of the two of a cluster, hold parts of.
#pragma once

#include "tile/ptx.cuh"

namespace jax_qgemm {

// The parts of a tile of 64 rows by Tokens tokens: `slices` warpgroups a block hold one each, as wgmma leaves it. All
// of them send their parts to the block that owns a token, half of them each, and go on; barriers count what has come
// and that it has been read. The blocks' buffers take turns.
template <int Tokens>
struct PartialSums {
  static constexpr int kTokenTiles = Tokens / 8;

  float4* parts;   // [buffer][block of the cluster][slice][token tile that this block owns][thread of a warpgroup]
  uint64_t* full;  // [buffer]
  uint64_t* read;  // [buffer]
  int slices, cluster, rank, buffers;  // cluster: 1 or 2

  // Token tiles of a block, and the warpgroups that sum them.
  __device__ __forceinline__ int token_tiles() const { return kTokenTiles >> (cluster - 1); }
  __device__ __forceinline__ int readers() const { return slices < token_tiles() ? slices : token_tiles(); }
  __device__ __forceinline__ float4* part(int buffer, int source) const {
    return parts + (buffer * cluster * slices + source) * token_tiles() * 128;
  }

  // By one thread of the block.
  __device__ __forceinline__ void start() const {
    const int of_full = 4 * slices, of_read = 4 * readers() * cluster;
    for (int i = 0; i < buffers; ++i) {
      ptx::barrier_init(full + i, of_full);
      ptx::barrier_init(read + i, of_read);
    }
  }

  // A warpgroup's part in round `round`.
  __device__ __forceinline__ void send(const float (&sums)[Tokens / 2], int slice, int round) const {
    const int buffer = round % buffers, thread = static_cast<int>(threadIdx.x) % 128;
    if (round >= buffers) ptx::barrier_wait(read + buffer, (round / buffers - 1) % 2);
    float4* to = part(buffer, rank * slices + slice) + thread;
#pragma unroll
    for (int tile = 0; tile < kTokenTiles; ++tile) {
      const float4 v = make_float4(sums[4 * tile], sums[4 * tile + 1], sums[4 * tile + 2], sums[4 * tile + 3]);
      const int owner = cluster == 2 ? tile / (kTokenTiles / 2) : 0;
      float4* at = to + (cluster == 2 ? tile % (kTokenTiles / 2) : tile) * 128;
      if (owner == rank) {
        *at = v;
      } else {
        ptx::store_async(at, v, full + buffer, owner);
      }
    }
    __syncwarp();
    if (thread % 32 != 0) return;
    if (cluster == 2 && slice == 0 && thread == 0) {
      ptx::barrier_expect(full + buffer, slices * token_tiles() * 128 * static_cast<int>(sizeof(float4)));
    } else {
      ptx::barrier_arrive(full + buffer);
    }
  }

  __device__ __forceinline__ void wait(int round) const {
    if (cluster == 2) {
      ptx::barrier_wait_cluster(full + round % buffers, round / buffers % 2);
    } else {
      ptx::barrier_wait(full + round % buffers, round / buffers % 2);
    }
  }
  // This thread's sums of one of the block's token tiles, the parts in their order.
  __device__ __forceinline__ float4 sum(int round, int token_tile) const {
    const float4* from = part(round % buffers, 0) + token_tile * 128 + threadIdx.x % 128;
    float4 sum = *from;
    for (int i = 1; i < cluster * slices; ++i) {
      const float4 v = from[i * token_tiles() * 128];
      sum = make_float4(sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w);
    }
    return sum;
  }
  // After the warp's last sum() of a round whose buffer is used again.
  __device__ __forceinline__ void release(int round) const {
    __syncwarp();
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if (lane < cluster) ptx::barrier_arrive(read + round % buffers, lane);
  }
};

}  // namespace jax_qgemm
