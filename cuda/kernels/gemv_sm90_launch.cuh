// From a Product to gemv_sm90.
#pragma once

#include <limits>

#include "kernels/gemv_sm90.cuh"
#include "kernels/gemv_sm90.h"
#include "tile/tensor_map.cuh"

namespace jax_qgemm {

template <class F>
const char* gemv_sm90_refusal(const Product& p, const DeviceLimits& limits) {
  constexpr int64_t kMax = std::numeric_limits<int>::max();
  if (limits.capability != 90) return "kernel gemv_sm90 needs a GPU of compute capability 9.0";
  if (p.x_type == Scalar::kF32) return "kernel gemv_sm90 does not serve float32 x";
  if (p.m > 64) return "kernel gemv_sm90 does not serve more than 64 rows of x";
  if (p.k % 8 != 0 || p.k == 0) return "kernel gemv_sm90 needs a k that is a multiple of 8";
  if (reinterpret_cast<uintptr_t>(p.x) % 16 != 0) return "kernel gemv_sm90 needs x aligned to 16 bytes";
  if (p.x_type == Scalar::kF16 && !scales_fit_f16<F>(p.w)) {
    return "kernel gemv_sm90 does not serve float16 x with scales that float16 does not hold";
  }
  if (!fits_group_registers<F>(p.w)) return "kernel gemv_sm90 does not serve integer groups of 16 or float32 scales";
  // The kernel counts rows of x, pairs of rows of w and a lane's vectors of codes in 32 bits.
  if (p.batch > kMaxGridY || p.batch * p.m > kMax ||
      p.batch * p.tile_rows() * p.w.k_blocks * (k_block_of<F>(p.w) / 16) * 8 > kMax) {
    return "kernel gemv_sm90 does not serve this product: it is more than it can count";
  }
  return nullptr;
}

template <class F, int Tokens>
GemvSm90Shape gemv_sm90_shape(const Product& p) {
  return {p.batch,
          p.m,
          p.tile_rows(),
          p.w.k_blocks,
          p.w.k_blocks * (k_block_of<F>(p.w) / kTileK),
          p.k,
          kStageOf<F>,
          lane_stage_bytes<F>(p.w),
          kCopyDepth<F>,
          Tokens,
          stored_bits<F>(p.w)};
}

template <auto kKernel>
const char* launch_gemv_sm90_kernel(const Product& p, const GemvSm90Sizes& sizes, const DeviceLimits& limits,
                                    cudaStream_t stream) {
  CUtensorMap x_map;
  if (const char* problem = encode_rows(&x_map, p.x, p.x_type, p.batch * p.m, p.k, sizes.tokens)) return problem;
  if (const cudaError_t error = allow_shared<kKernel>(sizes.total, limits); error != cudaSuccess) {
    return cudaGetErrorString(error);
  }
  const GemvSm90Config& c = sizes.config;
  return launch(kKernel, {int64_t{sizes.clusters} * c.cluster, p.batch, 128 * c.warpgroups(), sizes.total, c.cluster},
                stream, p, sizes, x_map);
}

template <class F, class T, int Tokens, int GroupSteps>
const char* launch_gemv_sm90_integer(const Product& p, const GemvSm90Sizes& sizes, const DeviceLimits& limits,
                                     cudaStream_t stream) {
  return p.w.has_plane(F::kScales + 1)
             ? launch_gemv_sm90_kernel<gemv_sm90<F, T, Tokens, Grouping<GroupSteps, true>>>(p, sizes, limits, stream)
             : launch_gemv_sm90_kernel<gemv_sm90<F, T, Tokens, Grouping<GroupSteps, false>>>(p, sizes, limits, stream);
}

template <class F, class T, int Tokens>
const char* launch_gemv_sm90_split(const Product& p, const GemvSm90Sizes& sizes, const DeviceLimits& limits,
                                   cudaStream_t stream) {
  if constexpr (F::kGroup == 0) {
    const auto launch_integer = p.w.group == 32   ? launch_gemv_sm90_integer<F, T, Tokens, 2>
                                : p.w.group == 64 ? launch_gemv_sm90_integer<F, T, Tokens, 4>
                                                  : launch_gemv_sm90_integer<F, T, Tokens, 8>;
    return launch_integer(p, sizes, limits, stream);
  } else {
    using G = Grouping<F::kGroup / 16, false>;
    return launch_gemv_sm90_kernel<gemv_sm90<F, T, Tokens, G>>(p, sizes, limits, stream);
  }
}

template <class F, class T, int Tokens>
const char* launch_gemv_sm90_tokens(const Product& p, const DeviceLimits& limits, cudaStream_t stream) {
  const GemvSm90Sizes sizes = choose_gemv_sm90(gemv_sm90_shape<F, Tokens>(p), limits);
  if (sizes.config.rows == 0) return "kernel gemv_sm90 does not serve this product: its shared memory is too small";
  return launch_gemv_sm90_split<F, T, Tokens>(p, sizes, limits, stream);
}

template <class F, class T>
const char* launch_gemv_sm90_type(const Product& p, const DeviceLimits& limits, cudaStream_t stream) {
  const auto launch_tokens = p.m <= 16   ? launch_gemv_sm90_tokens<F, T, 16>
                             : p.m <= 32 ? launch_gemv_sm90_tokens<F, T, 32>
                                         : launch_gemv_sm90_tokens<F, T, 64>;
  return launch_tokens(p, limits, stream);
}

template <class F>
const char* launch_gemv_sm90(const Product& p, cudaStream_t stream, const char** refusal) {
  DeviceLimits limits;
  if (const cudaError_t error = device_limits(&limits); error != cudaSuccess) return cudaGetErrorString(error);
  *refusal = gemv_sm90_refusal<F>(p, limits);
  if (*refusal) return nullptr;
  return p.x_type == Scalar::kF16 ? launch_gemv_sm90_type<F, MmaF16>(p, limits, stream)
                                  : launch_gemv_sm90_type<F, MmaBF16>(p, limits, stream);
}

}  // namespace jax_qgemm
