// From a Product to gemm_sm90.
#pragma once

#include "kernels/gemm_sm90.cuh"
#include "kernels/gemm_sm90.h"
#include "kernels/gemm_sm90_plan.cuh"

namespace jax_qgemm {

// Why the product cannot be computed, or nullptr.
template <class F>
const char* gemm_sm90_refusal(const Product& p, const DeviceLimits& limits) {
  if (limits.capability != 90) return "kernel gemm_sm90 needs a GPU of compute capability 9.0";
  if (p.x_type == Scalar::kF32) return "kernel gemm_sm90 does not serve float32 x";
  if (p.k % 8 != 0 || p.k == 0) return "kernel gemm_sm90 needs a k that is a multiple of 8";
  if (reinterpret_cast<uintptr_t>(p.x) % 16 != 0) return "kernel gemm_sm90 needs x aligned to 16 bytes";
  if (F::kGroup == 0 && (p.w.group == 16 || p.w.scale_type == ScaleType::kF32)) {
    return "kernel gemm_sm90 does not serve integer groups of 16 or float32 scales";
  }
  return too_large_for_gemm_sm90(p) ? "kernel gemm_sm90 does not serve this product: it is more than it can count"
                                    : nullptr;
}

template <class F, class T, int Tokens, int Blocks, int Span>
const char* launch_gemm_sm90_span(const Product& p, const GemmSm90Shape& shape, const DeviceLimits& limits,
                                  int clusters, cudaStream_t stream) {
  return launch_pairs<F, GemmSm90<F, Tokens, Blocks, Span>, gemm_sm90<F, T, Tokens, Blocks, Span>>(
      p, shape, GemmSm90Split(shape, GemmSm90Config{Tokens, Blocks}, clusters), limits, clusters, stream);
}

template <class F, class T, int Tokens, int Blocks>
const char* launch_gemm_sm90_tile(const Product& p, const GemmSm90Shape& shape, const DeviceLimits& limits,
                                  int clusters, cudaStream_t stream) {
  if constexpr (F::kGroup == 0) {
    return p.w.group == 32 ? launch_gemm_sm90_span<F, T, Tokens, Blocks, 2>(p, shape, limits, clusters, stream)
                           : launch_gemm_sm90_span<F, T, Tokens, Blocks, 4>(p, shape, limits, clusters, stream);
  } else {
    return launch_gemm_sm90_span<F, T, Tokens, Blocks, F::kGroup / 16>(p, shape, limits, clusters, stream);
  }
}

template <class F, class T>
const char* launch_gemm_sm90_type(const Product& p, const DeviceLimits& limits, cudaStream_t stream) {
  const GemmSm90Shape shape = {p.m, p.tile_rows(), p.k, p.batch, stored_bits<F>(p.w)};
  const int clusters = std::max(1, limits.multiprocessors / 2);
  const GemmSm90Config config = choose_gemm_sm90(shape, clusters);
  const auto launch_tile = config.blocks == 2     ? launch_gemm_sm90_tile<F, T, 128, 2>
                           : config.tokens == 64  ? launch_gemm_sm90_tile<F, T, 64, 1>
                           : config.tokens == 128 ? launch_gemm_sm90_tile<F, T, 128, 1>
                                                  : launch_gemm_sm90_tile<F, T, 256, 1>;
  return launch_tile(p, shape, limits, clusters, stream);
}

template <class F>
const char* launch_gemm_sm90(const Product& p, cudaStream_t stream, const char** refusal) {
  DeviceLimits limits;
  if (const cudaError_t error = device_limits(&limits); error != cudaSuccess) return cudaGetErrorString(error);
  *refusal = gemm_sm90_refusal<F>(p, limits);
  if (*refusal) return nullptr;
  return p.x_type == Scalar::kF16 ? launch_gemm_sm90_type<F, MmaF16>(p, limits, stream)
                                  : launch_gemm_sm90_type<F, MmaBF16>(p, limits, stream);
}

}  // namespace jax_qgemm
