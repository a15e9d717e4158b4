// One matrix product with a quantized weight, as the CPU and CUDA launchers take it. Plain data, no FFI and no CUDA
// types.
#pragma once

#include <cstdint>
#include <string_view>

#include "formats/format.cuh"

namespace jax_qgemm {

enum class Scalar : int32_t { kF16, kBF16, kF32 };

// forward:    x (batch, m, k) @ w (batch, k, n)   -> out (batch, m, n)
// transpose:  x (batch, m, n) @ w^T (batch, n, k) -> out (batch, m, k)
struct Product {
  std::string_view format;
  std::string_view kernel;  // "auto", or the name of one
  Weight w;
  const void* x;
  void* out;
  Scalar x_type;
  Scalar out_type;
  int64_t batch, m, n, k;
  bool transpose;
  bool highest;  // float32 x: full float32 products, else TF32-class

  QG_HD int64_t tile_rows() const { return (n + kTileN - 1) / kTileN; }  // of one weight of the batch
};

}  // namespace jax_qgemm
