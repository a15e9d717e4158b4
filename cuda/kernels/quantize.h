// The CUDA launcher that quantizes activations, to the bit as jax_qgemm/formats/activations.py says.
#pragma once

#include <cstdint>

#include "kernels/product.h"

typedef struct CUstream_st* cudaStream_t;

namespace jax_qgemm {

enum class ActivationFormat : int32_t { kInt8, kFp8, kQ8_1 };

constexpr int kQ8_1Group = 32;

// x (rows, k) as codes of its shape and, for every row or every group of 32, a scale and perhaps the sum of the codes.
struct Activations {
  ActivationFormat format;
  Scalar x_type;  // f16, bf16 or f32
  const void* x;
  void* codes;    // int8 or float8_e4m3fn
  void* scales;   // float32 (rows), of q8_1 float16 (rows, k / 32)
  int16_t* sums;  // of q8_1 (rows, k / 32)
  int64_t rows, k;
};

// Enqueues the work on `stream`; returns what went wrong, or nullptr. Allocates nothing and never synchronizes.
const char* launch_quantize(const Activations& activations, cudaStream_t stream);

}  // namespace jax_qgemm
