// One matrix product with a quantized weight, as the CPU and CUDA launchers take it. Plain data, no FFI and no CUDA
// types.
#pragma once

#include <cstdint>
#include <string_view>

#include "formats/format.cuh"

namespace jax_qgemm {

// The last two are types of the codes of quantized x alone; kFp8 is float8_e4m3fn.
enum class Scalar : int32_t { kF16, kBF16, kF32, kInt8, kFp8 };

enum class Activation : int32_t { kNone, kSilu, kGelu, kGeluTanh, kRelu };

// What happens to the float32 sums before they are stored: activation(scale * sum + bias) + residual. Gated, tile rows
// 2i and 2i + 1 of w are 16 columns of a gate and of what it opens, and an element is
// activation(scale * gate + bias) * (scale * up + bias) + residual. A null pointer leaves its part out.
struct Epilogue {
  const float* scale;    // element batch * scale_stride
  const void* bias;      // element batch * bias_stride + column of w
  const void* residual;  // of the shape of out
  int64_t scale_stride, bias_stride;
  Scalar bias_type, residual_type;
  Activation activation;
  bool gated;

  // Whether nothing happens to the sums.
  QG_HD bool empty() const { return !scale && !bias && !residual && activation == Activation::kNone && !gated; }
};

// The weights of a batch, side by side in the planes.
struct Stack {
  int64_t weights;
  const int32_t* experts;  // (batch,): the weight of each entry; null: entry i has weight i

  // Whatever stands in `experts`, the weight is one of the stack: for an index out of range the first or the last.
  QG_HD int64_t weight_of(int64_t batch) const {
    if (!experts) return batch;
    const int64_t expert = experts[batch];
    return expert < 0 ? 0 : expert < weights ? expert : weights - 1;
  }
};

// forward:    x (batch, m, k) @ w (weights, k, n)   -> out (batch, m, n), or (batch, m, n / 2) gated
// transpose:  x (batch, m, n) @ w^T (weights, n, k) -> out (batch, m, k)
struct Product {
  std::string_view format;
  std::string_view kernel;  // "auto", or the name of one
  Weight w;
  Stack stack;
  const void* x;
  void* out;
  Scalar x_type;
  Scalar out_type;
  int64_t batch, m, n, k;
  bool transpose;
  bool highest;  // float32 x: full float32 products, else TF32-class
  Epilogue epilogue;
  const float* x_scales;  // (batch, m), what codes of quantized x are multiplied by; null if x is not quantized

  QG_HD int64_t out_columns() const { return epilogue.gated ? n / 2 : n; }

  QG_HD int64_t tile_rows() const { return (n + kTileN - 1) / kTileN; }  // of one weight
};

// Rows [16 first_tile_row, 16 first_tile_row + rows) of n of each weight of the batch, decoded: out (batch, rows, k).
struct DenseRows {
  std::string_view format;
  Weight w;
  Stack stack;
  void* out;
  Scalar out_type;
  int64_t batch, tile_rows;  // of one weight
  int64_t first_tile_row, rows, k;
};

}  // namespace jax_qgemm
