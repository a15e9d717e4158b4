// Launching a kernel, and what launchers ask of the GPU.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <type_traits>

namespace jax_qgemm {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Of the GPU that the stream belongs to.
struct DeviceLimits {
  int device, multiprocessors, shared_bytes;
  int capability;  // compute capability times 10
};

inline cudaError_t device_limits(DeviceLimits* limits) {
  cudaError_t error = cudaGetDevice(&limits->device);
  const auto get = [&](int* value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, limits->device);
  };
  int major = 0, minor = 0;
  get(&limits->multiprocessors, cudaDevAttrMultiProcessorCount);
  get(&limits->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  get(&major, cudaDevAttrComputeCapabilityMajor);
  get(&minor, cudaDevAttrComputeCapabilityMinor);
  limits->capability = 10 * major + minor;
  return error;
}

// Lets Kernel have `bytes` of dynamic shared memory, and more in later launches.
template <auto Kernel>
cudaError_t allow_shared(int bytes, const DeviceLimits& limits) {
  if (bytes <= 48 << 10) return cudaSuccess;
  // Once a device and kernel; threads that race set the same value.
  static std::atomic<uint64_t> raised{0};
  const uint64_t bit = uint64_t{1} << (limits.device % 64);
  if (raised.load(std::memory_order_relaxed) & bit) return cudaSuccess;
  const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(Kernel),
                                                 cudaFuncAttributeMaxDynamicSharedMemorySize, limits.shared_bytes);
  if (error == cudaSuccess) raised.fetch_or(bit, std::memory_order_relaxed);
  return error;
}

// The compute capability, times 10, that Kernel's code was compiled for. It may be older than the GPU, for the driver
// compiles the PTX of older ones.
template <auto Kernel>
cudaError_t compiled_capability(const DeviceLimits& limits, int* capability) {
  static std::atomic<int> known[64] = {};  // by device; threads that race find the same
  std::atomic<int>& here = known[limits.device % 64];
  *capability = here.load(std::memory_order_relaxed);
  if (*capability != 0) return cudaSuccess;
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(Kernel));
  if (error == cudaSuccess) here.store(*capability = attributes.ptxVersion, std::memory_order_relaxed);
  return error;
}

constexpr int64_t kMaxGridX = 0x7fffffff, kMaxGridY = 65535;

struct Grid {
  int64_t blocks, batch;
  int threads, shared_bytes = 0, cluster = 1;
};

template <class... Args>
const char* launch(void (*kernel)(Args...), const Grid& grid, cudaStream_t stream, std::type_identity_t<Args>... args) {
  if (grid.blocks > kMaxGridX) return "the product needs more thread blocks than a grid has";
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks), static_cast<unsigned>(std::min(grid.batch, kMaxGridY)));
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = static_cast<size_t>(grid.shared_bytes);
  config.stream = stream;
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(grid.cluster);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  if (grid.cluster > 1) {
    config.attrs = &cluster;
    config.numAttrs = 1;
  }
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, args...);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace jax_qgemm
