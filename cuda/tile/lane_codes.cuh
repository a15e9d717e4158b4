// The codes of a tile that a lane holds in registers.
#pragma once

#include "formats/tile_codes.cuh"
#include "tile/lane_source.cuh"

namespace jax_qgemm {

// A lane's words of one plane of a tile, loaded as widely as the layout allows.
template <int Bits>
struct LanePlane {
  uint32_t words[Bits];

  // first: 32 x the tile's number, plus the lane.
  template <class Source>
  __device__ __forceinline__ void load(const void* plane, uint64_t first, int lane, Source& source) {
    if constexpr (Bits < 4) {
      source.template codes<Bits>(words, static_cast<const uint32_t*>(plane) + Bits * first);
    } else {
      const uint4* from = static_cast<const uint4*>(plane) + (Bits == 8 ? 2 * first - lane : first);
#pragma unroll
      for (int i = 0; i < Bits / 4; ++i) source.template codes<4>(words + 4 * i, from + i * 32);
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
  template <class Source>
  __device__ __forceinline__ void load(const void*, uint64_t, int, Source&) {}
  __device__ __forceinline__ uint32_t run(int) const { return 0; }
};

template <class F>
struct LaneCodes {
  LanePlane<F::kLowBits> low;
  LanePlane<F::kHighBits> high;

  template <class Source = FromDevice>
  __device__ __forceinline__ void load(const Weight& w, uint64_t first, int lane, Source&& source = {}) {
    low.load(w.planes[0], first, lane, source);
    if constexpr (F::kHighBits != 0) high.load(w.planes[1], first, lane, source);
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
