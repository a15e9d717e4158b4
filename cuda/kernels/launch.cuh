// From a Product to a kernel. One .cu file a family of formats instantiates launch_format, so that they compile in parallel.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "kernels/gemm_sm80.cuh"
#include "kernels/gemm_transposed.cuh"
#include "kernels/product.h"

namespace jax_qgemm {

constexpr int64_t kMaxGridX = 0x7fffffff, kMaxGridY = 65535;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class Kernel, class... Args>
const char* launch(Kernel kernel, int64_t blocks, int64_t batch, int threads, cudaStream_t stream, Args... args) {
  if (blocks > kMaxGridX) return "the product needs more thread blocks than a grid has";
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(std::min(batch, kMaxGridY)));
  kernel<<<grid, threads, 0, stream>>>(args...);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <class F, class T, class Shape>
const char* launch_gemm_sm80(const Product& p, int terms, cudaStream_t stream) {
  using S = GemmSm80<Shape>;
  const int64_t row_groups = divide_up(p.tile_rows(), Shape::kWarpsN);
  return launch(gemm_sm80<F, T, Shape>, row_groups * divide_up(p.m, S::kTokens), p.batch, S::kThreads, stream, p,
                static_cast<int>(row_groups), terms);
}

template <class F>
const char* launch_format(const Product& p, cudaStream_t stream) {
  if (p.transpose) {
    const int64_t k_tiles = divide_up(p.k, kTileK);
    return launch(gemm_transposed<F>, k_tiles * divide_up(p.m, kTransposedTokens), p.batch, kTransposedThreads, stream,
                  p, static_cast<int>(k_tiles));
  }
  const bool few_rows = p.m <= 8;
  if (p.x_type == Scalar::kF16) {
    return few_rows ? launch_gemm_sm80<F, MmaF16, GemvShape>(p, 1, stream)
                    : launch_gemm_sm80<F, MmaF16, GemmShape>(p, 1, stream);
  }
  const int terms = p.x_type == Scalar::kBF16 ? 1 : p.highest ? 3 : 2;
  return few_rows ? launch_gemm_sm80<F, MmaBF16, GemvShape>(p, terms, stream)
                  : launch_gemm_sm80<F, MmaBF16, GemmShape>(p, terms, stream);
}

}  // namespace jax_qgemm
