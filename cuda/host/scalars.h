// Between float32 and the types of x and out. Included only by matmul_<instruction set>.cc.
#pragma once

#include <cstring>

#include "host/vector.h"
#include "kernels/product.h"

namespace jax_qgemm::host::QG_ISA {

// Rounding to nearest, ties to even; without branches, so that loops vectorize.
QG_INLINE uint16_t f32_to_bf16(float f) {
  uint32_t bits;
  memcpy(&bits, &f, sizeof bits);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? bits >> 16 | 0x40u : rounded);
}

QG_INLINE uint16_t f32_to_f16(float f) {
  uint32_t bits;
  memcpy(&bits, &f, sizeof bits);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - (112u << 23)) >> 13;
  // Below 2^-14 the addition rounds to multiples of 2^-24, the steps of 0.5 and of float16's subnormals.
  const float shifted = float_from_bits(magnitude) + 0.5f;
  uint32_t subnormal;
  memcpy(&subnormal, &shifted, sizeof subnormal);
  uint32_t out = magnitude < 0x38800000u ? subnormal - 0x3f000000u : normal;
  out = magnitude >= 0x477ff000u ? 0x7c00u : out;  // 65520 and above round to infinity
  out = magnitude > 0x7f800000u ? 0x7e00u : out;
  return static_cast<uint16_t>((bits >> 16 & 0x8000u) | out);
}

inline int bytes_of(Scalar type) { return type == Scalar::kF32 ? 4 : 2; }

static void to_f32(const void* values, Scalar type, int64_t count, float* out) {
  const auto* halves = static_cast<const uint16_t*>(values);
  if (type == Scalar::kF32) memcpy(out, values, static_cast<size_t>(count) * sizeof(float));
  if (type == Scalar::kF16) {
    for (int64_t i = 0; i < count; ++i) out[i] = f16_to_f32(halves[i]);
  }
  if (type == Scalar::kBF16) {
    for (int64_t i = 0; i < count; ++i) out[i] = bf16_to_f32(halves[i]);
  }
}

// Writes `count` values from element `first` of `out` on.
static void from_f32(const float* values, Scalar type, int64_t count, void* out, int64_t first) {
  auto* halves = static_cast<uint16_t*>(out) + first;
  if (type == Scalar::kF32) {
    memcpy(static_cast<float*>(out) + first, values, static_cast<size_t>(count) * sizeof(float));
  }
  if (type == Scalar::kF16) {
    for (int64_t i = 0; i < count; ++i) halves[i] = f32_to_f16(values[i]);
  }
  if (type == Scalar::kBF16) {
    for (int64_t i = 0; i < count; ++i) halves[i] = f32_to_bf16(values[i]);
  }
}

}  // namespace jax_qgemm::host::QG_ISA
