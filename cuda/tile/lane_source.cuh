// Where a lane takes its words of a weight from. LaneCodes and GroupRegisters go through their words in an order of
// their own and call a source for each piece of 1, 2 or 4 words:
//
//   words<N>(out, from)  N words at `from`, aligned to as many bytes
//   codes<N>(out, from)  the same; no other lane, and no later turn, reads them
//   half(out, from)      two bytes; those of two neighbouring g share a word
#pragma once

#include "tile/ptx.cuh"

namespace jax_qgemm {

// Device memory, into registers.
struct FromDevice {
  template <int N>
  __device__ __forceinline__ void words(uint32_t* out, const void* from) {
    if constexpr (N == 4) {
      unpack(out, __ldg(static_cast<const uint4*>(from)));
    } else if constexpr (N == 2) {
      const uint2 v = __ldg(static_cast<const uint2*>(from));
      out[0] = v.x, out[1] = v.y;
    } else {
      out[0] = __ldg(static_cast<const uint32_t*>(from));
    }
  }
  template <int N>
  __device__ __forceinline__ void codes(uint32_t* out, const void* from) {
    if constexpr (N == 4) {
      unpack(out, ptx::load_once(static_cast<const uint4*>(from)));
    } else {
      words<N>(out, from);
    }
  }
  __device__ __forceinline__ void half(uint32_t& out, const void* from) {
    out = __ldg(static_cast<const uint16_t*>(from));
  }

  __device__ __forceinline__ static void unpack(uint32_t* out, uint4 v) {
    out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
  }
};

// Where StageCopier has put the same lane's words, in the order of LaneStage::load; the addresses are not looked at.
struct FromShared {
  ptx::SharedAddress next;
  int lane;

  template <int N>
  __device__ __forceinline__ void words(uint32_t* out, const void*) {
    ptx::load_shared<N>(out, next + lane * (4 * N));
    next += 128 * N;
  }
  template <int N>
  __device__ __forceinline__ void codes(uint32_t* out, const void* from) {
    words<N>(out, from);
  }
  // Of an odd g, the upper half.
  __device__ __forceinline__ void half(uint32_t& out, const void* from) {
    words<1>(&out, from);
    out = out >> (lane & 4) * 4 & 0xffff;
  }
};

}  // namespace jax_qgemm
