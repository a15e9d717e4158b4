// From a Product, or rows to decode, to a kernel. One .cu file a family of formats instantiates launch_format, so that
// they compile in parallel.
#pragma once

#include <algorithm>
#include <limits>

#include "kernels/dequantize.cuh"
#include "kernels/gemm_sm80.cuh"
#include "kernels/gemm_sm90.h"
#include "kernels/gemm_sm90_a8.h"
#include "kernels/gemm_transposed.cuh"
#include "kernels/gemv_config.cuh"
#include "kernels/gemv_sm90.h"
#include "kernels/grid.cuh"
#include "kernels/product.h"

namespace jax_qgemm {

template <class F, class T>
const char* launch_gemm_sm80(const Product& p, int terms, cudaStream_t stream) {
  const int64_t row_groups = divide_up(p.tile_rows(), GemmSm80::kWarpsN);
  return launch(gemm_sm80<F, T>, {row_groups * divide_up(p.m, GemmSm80::kTokens), p.batch, GemmSm80::kThreads}, stream,
                p, static_cast<int>(row_groups), terms);
}

// Launches gemv or gemv_tiles as `shape` is best split; false in *served where no split of it fits.
template <auto kKernel, class Shape, class Choose>
const char* launch_split(const Product& p, const Shape& shape, Choose&& choose, cudaStream_t stream, bool* served) {
  DeviceLimits limits;
  if (const cudaError_t error = device_limits(&limits); error != cudaSuccess) return cudaGetErrorString(error);
  int compiled = 0;
  cudaError_t error = compiled_capability<kKernel>(limits, &compiled);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const auto config = choose(shape, limits, compiled >= 90);
  *served = config.row_tiles != 0;
  if (!*served) return nullptr;
  const auto sizes = shape.sizes(config);
  error = allow_shared<kKernel>(sizes.total, limits);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const int clusters = std::max(1, std::min(sizes.row_blocks, limits.multiprocessors / config.cluster));
  return launch(kKernel, {clusters * config.cluster, p.batch, config.threads(), sizes.total, config.cluster}, stream, p,
                config, sizes);
}

template <class F, class T, int TokenTiles>
const char* launch_gemv_tiles(const Product& p, int terms, cudaStream_t stream, bool* served) {
  return launch_split<gemv_tiles<F, T, TokenTiles>>(p, gemv_tiles_shape<F, TokenTiles>(p, terms), choose_gemv_tiles,
                                                    stream, served);
}

template <class F, class T, class G>
const char* launch_gemv_few(const Product& p, cudaStream_t stream, bool* served) {
  return launch_split<gemv<F, T, G>>(p, gemv_shape<F, G>(p), choose_gemv, stream, served);
}

template <class F, class T, int GroupSteps>
const char* launch_gemv_integer(const Product& p, cudaStream_t stream, bool* served) {
  return p.w.has_plane(F::kScales + 1) ? launch_gemv_few<F, T, Grouping<GroupSteps, true>>(p, stream, served)
                                       : launch_gemv_few<F, T, Grouping<GroupSteps, false>>(p, stream, served);
}

template <class F, class T>
const char* launch_gemv_few(const Product& p, cudaStream_t stream, bool* served) {
  if constexpr (F::kGroup != 0) {
    return launch_gemv_few<F, T, Grouping<F::kGroup / 16, false>>(p, stream, served);
  } else {
    if (p.w.group == 32) return launch_gemv_integer<F, T, 2>(p, stream, served);
    if (p.w.group == 64) return launch_gemv_integer<F, T, 4>(p, stream, served);
    return launch_gemv_integer<F, T, 8>(p, stream, served);
  }
}

// Rows of x that gemv and gemv_tiles serve: one bucket for float32, four for 16-bit operands.
template <class T>
constexpr int kGemvTokens = T::kSplit ? 8 : 64;

// False in *served where they do not serve the product.
template <class F, class T>
const char* launch_gemv(const Product& p, int terms, cudaStream_t stream, bool* served) {
  *served = false;
  // The kernels count a lane's vectors of codes and the elements of x in 32 bits.
  const int64_t vectors = p.stack.weights * p.tile_rows() * p.w.k_blocks * (k_block_of<F>(p.w) / kTileK) * 32;
  constexpr int64_t kMost = std::numeric_limits<int>::max();
  if (p.k == 0 || p.batch > kMaxGridY || vectors > kMost || p.k > kMost / (128 * terms)) return nullptr;
  if constexpr (T::kSplit) {
    return launch_gemv_tiles<F, T, 1>(p, terms, stream, served);
  } else {
    if (p.m <= 8) {
      const char* problem = launch_gemv_few<F, T>(p, stream, served);
      if (*served || problem) return problem;
    }
    if (p.m <= 16) return launch_gemv_tiles<F, T, 2>(p, terms, stream, served);
    if (p.m <= 32) return launch_gemv_tiles<F, T, 4>(p, terms, stream, served);
    return launch_gemv_tiles<F, T, 8>(p, terms, stream, served);
  }
}

template <class F, class T>
const char* launch_forward(const Product& p, int terms, cudaStream_t stream) {
  if (p.kernel != "gemm_sm80" && p.m <= kGemvTokens<T> && fits_group_registers<F>(p.w)) {
    bool served = false;
    const char* problem = launch_gemv<F, T>(p, terms, stream, &served);
    if (served || problem) return problem;
  }
  if (p.kernel == "gemv") {
    if (p.m > kGemvTokens<T>)
      return "kernel gemv does not serve this product: x has more than 64 rows, or 8 in float32";
    if (!fits_group_registers<F>(p.w)) return "kernel gemv does not serve integer groups of 16 or float32 scales";
    return "kernel gemv does not serve this product: its shared memory is too small, or the weights are more than it "
           "can count";
  }
  return launch_gemm_sm80<F, T>(p, terms, stream);
}

// x is quantized: one kernel multiplies codes.
template <class F>
const char* launch_codes(const Product& p, cudaStream_t stream) {
  if (p.transpose) return "codes of x are not multiplied by a transposed weight";
#ifdef JAX_QGEMM_WITH_SM90A
  if constexpr (kServesCodes<F>) return launch_gemm_sm90_a8<F>(p, stream);
  return "codes of x are multiplied with int4 and int8 weights alone";
#else
  return "kernel gemm_sm90_a8 is not in this build: JAX_QGEMM_CUDA_ARCHITECTURES had no 90a";
#endif
}

template <class F>
const char* launch_format(const Product& p, cudaStream_t stream) {
  if (p.x_scales) return launch_codes<F>(p, stream);
  if (p.transpose) {
    const int64_t k_tiles = divide_up(p.k, kTileK);
    return launch(gemm_transposed<F>, {k_tiles * divide_up(p.m, kTransposedTokens), p.batch, kTransposedThreads},
                  stream, p, static_cast<int>(k_tiles));
  }
#ifdef JAX_QGEMM_WITH_SM90A
  // gemm_sm90 rounds the weight to the type of x; gemv_sm90 itself refuses where that would not do.
  const bool fits = p.x_type != Scalar::kF16 || scales_fit_f16<F>(p.w);
  const bool any = p.kernel == "auto" && p.m > 8 && (fits || p.m <= 64);
  if (any || p.kernel == "gemv_sm90" || p.kernel == "gemm_sm90") {
    const bool few = any ? p.m <= 64 : p.kernel == "gemv_sm90";
    const char* refusal = nullptr;
    const char* problem = (few ? launch_gemv_sm90<F> : launch_gemm_sm90<F>)(p, stream, &refusal);
    if (!refusal) return problem;
    if (!any) return refusal;
  }
#else
  if (p.kernel == "gemm_sm90" || p.kernel == "gemv_sm90") {
    return "kernels gemm_sm90 and gemv_sm90 are not in this build: JAX_QGEMM_CUDA_ARCHITECTURES had no 90a";
  }
#endif
  switch (p.x_type) {
    case Scalar::kF16:
      return launch_forward<F, MmaF16>(p, 1, stream);
    case Scalar::kBF16:
      return launch_forward<F, MmaBF16>(p, 1, stream);
    default:
      return launch_forward<F, MmaSplitF32>(p, p.highest ? 3 : 2, stream);
  }
}

template <class F>
const char* launch_format(const DenseRows& d, cudaStream_t stream) {
  const int64_t blocks = divide_up(d.rows, kTileN) * divide_up(divide_up(d.k, kTileK), kDequantizeWarps);
  return launch(dequantize<F>, {blocks, d.batch, 32 * kDequantizeWarps}, stream, d);
}

}  // namespace jax_qgemm
