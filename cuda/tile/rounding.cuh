// float32 numbers rounded to codes of 8 bits, four in a word.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace jax_qgemm {

// The low bytes of four words.
__device__ __forceinline__ uint32_t low_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

// To int8, ties to even, of magnitudes up to 127.
struct RoundToInt8 {
  static constexpr float kLargest = 127;
  static __device__ __forceinline__ uint32_t four(float a, float b, float c, float d) {
    return low_bytes(one(a), one(b), one(c), one(d));
  }

 private:
  // At 1.5 * 2^23 the last bit of a number is 1.
  static __device__ __forceinline__ uint32_t one(float v) { return __float_as_uint(__fadd_rn(v, 0x1.8p23f)); }
};

// To int8, halves away from zero, of magnitudes up to 127.
struct RoundAwayToInt8 {
  static __device__ __forceinline__ uint32_t four(float a, float b, float c, float d) {
    return low_bytes(one(a), one(b), one(c), one(d));
  }

 private:
  // The sum is cut off, not rounded, for 0.5 behind the largest number below it must not become 1.
  static __device__ __forceinline__ uint32_t one(float v) {
    return static_cast<uint32_t>(__float2int_rz(__fadd_rz(v, copysignf(0.5f, v))));
  }
};

// To float8_e4m3fn, ties to even, of magnitudes up to 448.
struct RoundToE4M3 {
  static constexpr float kLargest = 448;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890 && !defined(JAX_QGEMM_EMULATION)
  static __device__ __forceinline__ uint32_t four(float a, float b, float c, float d) {
    uint16_t low, high;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(b), "f"(a));
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(d), "f"(c));
    return static_cast<uint32_t>(high) << 16 | low;
  }
#else
  static __device__ __forceinline__ uint32_t four(float a, float b, float c, float d) {
    return low_bytes(one(a), one(b), one(c), one(d));
  }

 private:
  static __device__ __forceinline__ uint32_t one(float v) {
    const uint32_t bits = __float_as_uint(v), magnitude = bits & 0x7fffffffu;
    // Normal numbers keep three bits of the fraction, and their exponent has a bias of 7, not of 127.
    const uint32_t normal = (magnitude + 0x7ffffu + (magnitude >> 20 & 1)) >> 20;
    // At 2^14 the last bit of a number is 2^-9, the step of subnormal ones.
    const uint32_t subnormal = __float_as_uint(__fadd_rn(__uint_as_float(magnitude), 0x1p14f));
    const uint32_t code = magnitude < 0x3c800000u ? subnormal : normal - (120u << 3);
    return (code & 0x7fu) | (bits >> 24 & 0x80u);
  }
#endif
};

}  // namespace jax_qgemm
