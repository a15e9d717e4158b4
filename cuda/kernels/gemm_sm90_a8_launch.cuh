// From a Product of codes to gemm_sm90_a8.
#pragma once

#include <limits>

#include "kernels/gemm_sm90_a8.cuh"
#include "kernels/gemm_sm90_a8.h"
#include "kernels/gemm_sm90_a8_config.cuh"
#include "kernels/gemm_sm90_plan.cuh"

namespace jax_qgemm {

// Each in a source of its own.
template <class F>
const char* launch_int8_codes(const Product& p, const DeviceLimits& limits, cudaStream_t stream);
template <class F>
const char* launch_fp8_codes(const Product& p, const DeviceLimits& limits, cudaStream_t stream);

// Why the product cannot be computed, or nullptr.
template <class F>
const char* gemm_sm90_a8_refusal(const Product& p, const DeviceLimits& limits) {
  constexpr int64_t kMaxSum = std::numeric_limits<int32_t>::max();
  if (limits.capability != 90) return "kernel gemm_sm90_a8 needs a GPU of compute capability 9.0";
  if (p.k % 16 != 0 || p.k == 0) return "kernel gemm_sm90_a8 needs a k that is a multiple of 16";
  if (reinterpret_cast<uintptr_t>(p.x) % 16 != 0) return "kernel gemm_sm90_a8 needs x aligned to 16 bytes";
  if (p.w.group != 0 && p.w.group < 64) return "kernel gemm_sm90_a8 does not serve groups of less than 64";
  if (p.w.group != 0 && p.w.scale_type == ScaleType::kF32) {
    return "kernel gemm_sm90_a8 does not serve float32 scales of groups";
  }
  if (F::kLowBits == 8 && p.w.has_plane(F::kScales + 1)) {
    return "kernel gemm_sm90_a8 does not serve zero points of 8 bits";
  }
  if (F::kLowBits == 8 && p.x_type == Scalar::kFp8) return "kernel gemm_sm90_a8 does not serve int8 weights with fp8 x";
  if (p.w.group == 0 && p.x_type == Scalar::kInt8 && p.k > kMaxSum / (127 << F::kLowBits)) {
    return "kernel gemm_sm90_a8 does not serve this product: its sums may leave int32";
  }
  return too_large_for_gemm_sm90(p) ? "kernel gemm_sm90_a8 does not serve this product: it is more than it can count"
                                    : nullptr;
}

// Group: as the kernel's.
template <class F, class X, int Group, bool Channel>
const char* launch_gemm_sm90_a8_codes(const Product& p, const DeviceLimits& limits, cudaStream_t stream) {
  const GemmSm90Shape shape = {p.m, p.tile_rows(), p.k, p.batch, stored_bits<F>(p.w)};
  const int clusters = std::max(1, limits.multiprocessors / 2);
  const GemmSm90A8Config config = choose_gemm_sm90_a8(shape, Group, clusters);
  const auto launch = [&]<int Tokens, int Blocks>() {
    using S = GemmSm90A8<F, X, Tokens, Blocks, Group, Channel>;
    return launch_pairs<F, S, gemm_sm90_a8<F, X, Tokens, Blocks, Group, Channel>>(
        p, shape, GemmSm90Split(shape, config, clusters), limits, clusters, stream);
  };
  if (config.tokens == 64) return launch.template operator()<64, 1>();
  if constexpr (Group != 0) {
    return config.tokens == 128 ? launch.template operator()<128, 1>() : launch.template operator()<192, 1>();
  } else {
    if (config.blocks == 2) return launch.template operator()<128, 2>();
    return config.tokens == 128 ? launch.template operator()<128, 1>() : launch.template operator()<256, 1>();
  }
}

template <class F, class X>
const char* launch_gemm_sm90_a8_groups(const Product& p, const DeviceLimits& limits, cudaStream_t stream) {
  return p.w.group == 64 ? launch_gemm_sm90_a8_codes<F, X, 64, false>(p, limits, stream)
                         : launch_gemm_sm90_a8_codes<F, X, 128, false>(p, limits, stream);
}

template <class F>
const char* launch_gemm_sm90_a8(const Product& p, cudaStream_t stream) {
  DeviceLimits limits;
  if (const cudaError_t error = device_limits(&limits); error != cudaSuccess) return cudaGetErrorString(error);
  if (const char* refusal = gemm_sm90_a8_refusal<F>(p, limits)) return refusal;
  if constexpr (F::kLowBits == 4) {
    if (p.x_type == Scalar::kFp8) return launch_fp8_codes<F>(p, limits, stream);
  }
  return launch_int8_codes<F>(p, limits, stream);
}

template <class F>
const char* launch_int8_codes(const Product& p, const DeviceLimits& limits, cudaStream_t stream) {
  if (p.w.group == 0) return launch_gemm_sm90_a8_codes<F, Int8Codes, 0, true>(p, limits, stream);
  if constexpr (F::kLowBits == 4) {
    if (!p.w.has_plane(F::kScales + 1)) return launch_gemm_sm90_a8_groups<F, Int8SymmetricCodes>(p, limits, stream);
  }
  return launch_gemm_sm90_a8_groups<F, Int8Codes>(p, limits, stream);
}

template <class F>
const char* launch_fp8_codes(const Product& p, const DeviceLimits& limits, cudaStream_t stream) {
  if (p.w.group == 0) return launch_gemm_sm90_a8_codes<F, Fp8Codes, 128, true>(p, limits, stream);
  return launch_gemm_sm90_a8_groups<F, Fp8Codes>(p, limits, stream);
}

}  // namespace jax_qgemm
