// The codes of a tile that a lane holds in registers.
#pragma once

#include "formats/tile_codes.cuh"

namespace jax_qgemm {

// A lane's words of one plane of a tile, loaded as widely as the layout allows.
template <int Bits>
struct LanePlane {
  uint32_t words[Bits];

  __device__ __forceinline__ void load(const void* plane, int64_t tile, int lane) {
    const auto* base = static_cast<const uint32_t*>(plane) + tile * (32 * Bits);
    if constexpr (Bits == 1) {
      words[0] = __ldg(base + lane);
    } else if constexpr (Bits == 2) {
      const uint2 v = __ldg(reinterpret_cast<const uint2*>(base) + lane);
      words[0] = v.x, words[1] = v.y;
    } else {
#pragma unroll
      for (int i = 0; i < Bits / 4; ++i) {
        const uint4 v = __ldg(reinterpret_cast<const uint4*>(base) + i * 32 + lane);
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
  __device__ __forceinline__ void load(const void*, int64_t, int) {}
  __device__ __forceinline__ uint32_t run(int) const { return 0; }
};

template <class F>
struct LaneCodes {
  LanePlane<F::kLowBits> low;
  LanePlane<F::kHighBits> high;

  __device__ __forceinline__ void load(const Weight& w, int64_t tile, int lane) {
    low.load(w.planes[0], tile, lane);
    if constexpr (F::kHighBits != 0) high.load(w.planes[1], tile, lane);
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
