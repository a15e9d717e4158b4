// From a Product to a kernel. One .cu file a family of formats instantiates launch_format, so that they compile in
// parallel.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <type_traits>

#include "kernels/gemm_sm80.cuh"
#include "kernels/gemm_transposed.cuh"
#include "kernels/gemv.cuh"
#include "kernels/product.h"

namespace jax_qgemm {

constexpr int64_t kMaxGridX = 0x7fffffff, kMaxGridY = 65535;
constexpr int kReservedShared = 1 << 10;  // that the system takes of each CTA's shared memory

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class... Args>
const char* launch(void (*kernel)(Args...), int64_t blocks, int64_t batch, int threads, int shared_bytes,
                   cudaStream_t stream, std::type_identity_t<Args>... args) {
  if (blocks > kMaxGridX) return "the product needs more thread blocks than a grid has";
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(std::min(batch, kMaxGridY)));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, args...);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <class F, class T>
const char* launch_gemm_sm80(const Product& p, int terms, cudaStream_t stream) {
  const int64_t row_groups = divide_up(p.tile_rows(), GemmSm80::kWarpsN);
  return launch(gemm_sm80<F, T>, row_groups * divide_up(p.m, GemmSm80::kTokens), p.batch, GemmSm80::kThreads, 0, stream,
                p, static_cast<int>(row_groups), terms);
}

// Of the GPU that the stream belongs to.
struct DeviceLimits {
  int device, multiprocessors, shared_bytes;
};

inline cudaError_t device_limits(DeviceLimits* limits) {
  cudaError_t error = cudaGetDevice(&limits->device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&limits->multiprocessors, cudaDevAttrMultiProcessorCount, limits->device);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&limits->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, limits->device);
  }
  return error;
}

// The split of a CTA's warps over rows and k, and how many CTAs share a multiprocessor. What takes the time is the
// largest number of row tiles that one multiprocessor gets; among splits within 4% of the best, the one that keeps the
// most warps, and so the most loads, in flight. `shared_bytes` gives the shared memory that a split needs.
template <class SharedBytes>
GemvConfig choose_gemv(int64_t tile_rows, int stages, int terms, int max_warps, const DeviceLimits& limits,
                       SharedBytes&& shared_bytes) {
  // Where n alone leaves multiprocessors idle, more slices of k.
  const int slices = std::min(stages, tile_rows <= limits.multiprocessors ? 16 : 8);
  GemvConfig best = {};
  double best_time = 0;
  for (int row_tiles = 1; row_tiles * slices <= max_warps; ++row_tiles) {
    GemvConfig c = {row_tiles, slices, static_cast<int>(divide_up(tile_rows, row_tiles)), terms, 1};
    const int shared = shared_bytes(c);
    if (shared > limits.shared_bytes) break;
    const int by_registers = max_warps / (row_tiles * slices);
    c.resident = std::max(1, std::min(by_registers, limits.shared_bytes / (shared + kReservedShared)));
    const auto time = static_cast<double>(divide_up(c.row_blocks, limits.multiprocessors) * row_tiles);
    const bool faster = time < best_time * 0.96, equal = time <= best_time * 1.04;
    if (row_tiles == 1 || faster || (equal && c.resident * c.threads() > best.resident * best.threads())) {
      best = c;
      best_time = row_tiles == 1 ? time : std::min(best_time, time);
    }
  }
  return best;
}

// Integer groups of 16 and float32 scales take more registers than gemv gives them.
template <class F>
bool gemv_serves(const Weight& w) {
  return F::kGroup != 0 || ((w.group == 0 || w.group >= 32) && w.scale_type != ScaleType::kF32);
}

// False in *served where gemv does not serve the product: x does not fit into shared memory.
template <class F, class T>
const char* launch_gemv(const Product& p, int terms, cudaStream_t stream, bool* served) {
  DeviceLimits limits;
  if (const cudaError_t error = device_limits(&limits); error != cudaSuccess) return cudaGetErrorString(error);
  const int64_t stages = divide_up(p.k, kStageOf<F>);
  *served = false;
  // The kernel counts tiles, pairs of rows and bytes of shared memory in 32 bits.
  if (p.batch * p.tile_rows() * p.w.k_blocks * (kStageOf<F> / 16) > std::numeric_limits<int>::max()) return nullptr;
  if (stages == 0 || p.batch > kMaxGridY || stages * kStageOf<F> * p.m * terms * 2 > limits.shared_bytes)
    return nullptr;
  const auto shared_bytes = [&](const GemvConfig& c) {
    return gemv_shared<F>(static_cast<int>(p.m), static_cast<int>(stages), c).total();
  };
  const GemvConfig config =
      choose_gemv(p.tile_rows(), static_cast<int>(stages), terms, kGemvMaxWarps<F>, limits, shared_bytes);
  if (config.resident == 0) return nullptr;
  *served = true;
  const int shared = shared_bytes(config);
  if (shared > 48 << 10) {
    // Once a device and kernel; threads that race set the same value.
    static std::atomic<uint64_t> raised{0};
    const uint64_t bit = uint64_t{1} << (limits.device % 64);
    if (!(raised.load(std::memory_order_relaxed) & bit)) {
      const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(gemv<F, T>),
                                                     cudaFuncAttributeMaxDynamicSharedMemorySize, limits.shared_bytes);
      if (error != cudaSuccess) return cudaGetErrorString(error);
      raised.fetch_or(bit, std::memory_order_relaxed);
    }
  }
  const int64_t ctas = std::min<int64_t>(config.row_blocks, int64_t{limits.multiprocessors} * config.resident);
  return launch(gemv<F, T>, ctas, p.batch, config.threads(), shared, stream, p, config);
}

template <class F, class T>
const char* launch_forward(const Product& p, int terms, cudaStream_t stream) {
  if (p.kernel != "gemm_sm80" && p.m <= kGemvTokens && gemv_serves<F>(p.w)) {
    bool served;
    const char* problem = launch_gemv<F, T>(p, terms, stream, &served);
    if (served || problem) return problem;
  }
  if (p.kernel == "gemv") {
    if (p.m > kGemvTokens) return "kernel gemv does not serve this product: x has more than 8 rows";
    if (!gemv_serves<F>(p.w)) return "kernel gemv does not serve integer groups of 16 or float32 scales";
    return "kernel gemv does not serve this product: the rows of x don't fit into shared memory, or the weights are "
           "more "
           "than it can count";
  }
  return launch_gemm_sm80<F, T>(p, terms, stream);
}

template <class F>
const char* launch_format(const Product& p, cudaStream_t stream) {
  if (p.transpose) {
    const int64_t k_tiles = divide_up(p.k, kTileK);
    return launch(gemm_transposed<F>, k_tiles * divide_up(p.m, kTransposedTokens), p.batch, kTransposedThreads, 0,
                  stream, p, static_cast<int>(k_tiles));
  }
  switch (p.x_type) {
    case Scalar::kF16:
      return launch_forward<F, MmaF16>(p, 1, stream);
    case Scalar::kBF16:
      return launch_forward<F, MmaBF16>(p, 1, stream);
    default:
      return launch_forward<F, MmaSplitF32>(p, p.highest ? 3 : 2, stream);
  }
}

}  // namespace jax_qgemm
