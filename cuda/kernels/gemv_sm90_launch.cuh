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
  // Others are operands without their scales: see kGemvSm90Exact.
  const bool rounds = F::kGroup == 0 && p.w.group != 0 && p.w.group < kTileK;
  if (p.x_type == Scalar::kF16 && rounds && !scales_fit_f16<F>(p.w)) {
    return "kernel gemv_sm90 does not serve float16 x with scales that float16 does not hold";
  }
  if (!fits_group_registers<F>(p.w)) return "kernel gemv_sm90 does not serve integer groups of 16 or float32 scales";
  // The kernel counts rows of x, rows of tiles of w and columns of both in 32 bits.
  if (p.batch > kMaxGridY || p.batch * p.m > kMax ||
      p.stack.weights * p.tile_rows() * p.w.k_blocks * (k_block_of<F>(p.w) / 16) * 8 > kMax) {
    return "kernel gemv_sm90 does not serve this product: it is more than it can count";
  }
  return nullptr;
}

// A slot for a stage of a warpgroup's weights.
template <class F>
int gemv_sm90_stage_bytes(const Weight& w) {
  const int bytes =
      w.group == 32 ? GemvSm90Staged<F, Grouping<2, true>>::kBytes : GemvSm90Staged<F, Grouping<4, true>>::kBytes;
  if constexpr (F::kGroup != 0) return GemvSm90Staged<F, Grouping<F::kGroup / 16, false>>::kBytes;
  return bytes;
}

template <class F, int Tokens>
GemvSm90Shape gemv_sm90_shape(const Product& p) {
  return {p.batch,
          p.m,
          p.tile_rows(),
          p.k,
          static_cast<int>(divide_up(gemv_sm90_stage_bytes<F>(p.w), 128) * 128),
          Tokens,
          stored_bits<F>(p.w),
          kGemvSm90Super<F> ? 2 : 1,
          gemv_sm90_sum_bytes<F>(Tokens)};
}

template <auto kKernel, class F>
const char* launch_gemv_sm90_kernel(const Product& p, const GemvSm90Sizes& sizes, const DeviceLimits& limits,
                                    cudaStream_t stream) {
  constexpr int kRowTiles = kGemvSm90Rows / kTileN;
  const PlaneBoxes boxes = plane_boxes<F>(p.w, kRowTiles, kGemvSm90Stage / kTileK);
  ProductMaps maps;
  const char* problem = encode_rows(&maps.x, p.x, p.x_type, p.batch * p.m, p.k, sizes.tokens);
  if (!problem) problem = encode_planes<F>(maps.planes, p, boxes, kRowTiles);
  if (problem) return problem;
  if (const cudaError_t error = allow_shared<kKernel>(sizes.total, limits); error != cudaSuccess) {
    return cudaGetErrorString(error);
  }
  const GemvSm90Config& c = sizes.config;
  return launch(kKernel,
                {int64_t{sizes.clusters} * c.cluster, p.batch, 128 * (c.warpgroups() + 1), sizes.total, c.cluster},
                stream, p, sizes, boxes, maps);
}

template <class F, class T, int Tokens, int GroupSteps>
const char* launch_gemv_sm90_integer(const Product& p, const GemvSm90Sizes& sizes, const DeviceLimits& limits,
                                     cudaStream_t stream) {
  return p.w.has_plane(F::kScales + 1)
             ? launch_gemv_sm90_kernel<gemv_sm90<F, T, Tokens, Grouping<GroupSteps, true>>, F>(p, sizes, limits, stream)
             : launch_gemv_sm90_kernel<gemv_sm90<F, T, Tokens, Grouping<GroupSteps, false>>, F>(p, sizes, limits,
                                                                                                stream);
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
    return launch_gemv_sm90_kernel<gemv_sm90<F, T, Tokens, G>, F>(p, sizes, limits, stream);
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
