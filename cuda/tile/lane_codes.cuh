// The codes of a tile that a lane holds in registers.
#pragma once

#include "formats/tile_codes.cuh"
#include "tile/ptx.cuh"

namespace jax_qgemm {

// A lane's words of one plane of a tile, loaded as widely as the layout allows.
template <int Bits>
struct LanePlane {
  uint32_t words[Bits];

  // first: 32 x the tile's number, plus the lane.
  __device__ __forceinline__ void load(const void* plane, uint64_t first, int lane) {
    if constexpr (Bits == 1) {
      words[0] = __ldg(static_cast<const uint32_t*>(plane) + first);
    } else if constexpr (Bits == 2) {
      const uint2 v = __ldg(static_cast<const uint2*>(plane) + first);
      words[0] = v.x, words[1] = v.y;
    } else {
      const uint4* from = static_cast<const uint4*>(plane) + (Bits == 8 ? 2 * first - lane : first);
#pragma unroll
      for (int i = 0; i < Bits / 4; ++i) {
        const uint4 v = ptx::load_once(from + i * 32);
        words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
      }
    }
  }

  // Run `run` (a compile-time constant after unrolling), a code in each byte.
  __device__ __forceinline__ uint32_t run(int run) const {
    constexpr int kFields = 8 / Bits;
    constexpr uint32_t kMask = 0x01010101u * ((1u << Bits) - 1);
    return words[run / kFields] >> (Bits * (run % kFields)) & kMask;
  }
};

template <>
struct LanePlane<0> {
  __device__ __forceinline__ void load(const void*, uint64_t, int) {}
  __device__ __forceinline__ uint32_t run(int) const { return 0; }
};

template <class F>
struct LaneCodes {
  LanePlane<F::kLowBits> low;
  LanePlane<F::kHighBits> high;

  __device__ __forceinline__ void load(const Weight& w, uint64_t first, int lane) {
    low.load(w.planes[0], first, lane);
    if constexpr (F::kHighBits != 0) high.load(w.planes[1], first, lane);
  }

  __device__ __forceinline__ uint32_t levels(int run) const {
    return F::levels(low.run(run) | high.run(run) << F::kLowBits);
  }
};

// Whether levels take all 8 bits.
template <class F>
constexpr bool wide_levels() {
  if constexpr (F::kHasTable) {
    return F::table(15) >= 128 || F::table(7) >= 128;
  } else {
    return F::kLowBits == 8;
  }
}

}  // namespace jax_qgemm
