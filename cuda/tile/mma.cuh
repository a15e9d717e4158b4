// Warp-level pieces around mma.sync.m16n8k16: operand types, fragments, and the decoded weight as its A operand.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "tile/ptx.cuh"

namespace jax_qgemm {

// How x becomes 16-bit operands. kOne is 1.0 twice; kSplit: an element is several of them, two or three at run time.
struct MmaF16 {
  static constexpr bool kIsBF16 = false, kSplit = false;
  static constexpr uint32_t kOne = 0x3c003c00u;
};

struct MmaBF16 {
  static constexpr bool kIsBF16 = true, kSplit = false;
  static constexpr uint32_t kOne = 0x3f803f80u;
};

struct MmaSplitF32 : MmaBF16 {
  static constexpr bool kSplit = true;
};

// c += a (16 x 16) * b (16 x 8), float32 accumulation.
template <class T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (T::kIsBF16) {
    ptx::mma_m16n8k16_bf16(c, a, b0, b1);
  } else {
    ptx::mma_m16n8k16_f16(c, a, b0, b1);
  }
}

// Turns levels (four unsigned bytes of one row, elements k, k+8, k+1, k+9) into the row's two fragment registers, as
// exact integers level - zero: 0x6400 | u is the f16 1024 + u, and 0x4300 | u the bf16 128 + u for u below 128.
template <bool IsBF16, bool Wide>
struct Converter {
  using Vector = std::conditional_t<IsBF16, __nv_bfloat162, __half2>;
  static constexpr uint32_t kMagic = IsBF16 ? 0x43434343u : 0x64646464u;
  Vector offset;

  __device__ explicit Converter(int zero) {
    if constexpr (IsBF16) {
      offset = __float2bfloat162_rn(128.0f + static_cast<float>(zero));
    } else {
      offset = __float2half2_rn(1024.0f + static_cast<float>(zero));
    }
  }
  __device__ __forceinline__ void operator()(uint32_t levels, uint32_t& low, uint32_t& high) const {
    low = subtract(__byte_perm(levels, kMagic, 0x4240));
    high = subtract(__byte_perm(levels, kMagic, 0x4341));
  }
  __device__ __forceinline__ uint32_t subtract(uint32_t v) const {
    const Vector d = __hsub2(reinterpret_cast<const Vector&>(v), offset);
    return reinterpret_cast<const uint32_t&>(d);
  }
};

// bf16, levels of 8 bits: its 8 significant bits hold the difference, not the sum with 128, so through float32, where
// 0x4b000000 | u is 2^23 + u.
template <>
struct Converter<true, true> {
  float offset;
  __device__ explicit Converter(int zero) : offset(8388608.0f + static_cast<float>(zero)) {}

  __device__ __forceinline__ void operator()(uint32_t levels, uint32_t& low, uint32_t& high) const {
    low = pack(value(levels, 0x7650), value(levels, 0x7652));
    high = pack(value(levels, 0x7651), value(levels, 0x7653));
  }
  __device__ __forceinline__ float value(uint32_t levels, uint32_t selector) const {
    return __uint_as_float(__byte_perm(levels, 0x4b000000u, selector)) - offset;
  }
  __device__ __forceinline__ static uint32_t pack(float first, float second) {
    const __nv_bfloat162 v = __floats2bfloat162_rn(first, second);
    return reinterpret_cast<const uint32_t&>(v);
  }
};

}  // namespace jax_qgemm
