// Stand-in for the CUDA runtime's header: what the kernels and launchers use of it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

#define threadIdx (emulation::current->index)

struct float2 {
  float x, y;
};
struct uint2 {
  uint32_t x, y;
};
struct __align__(16) uint4 {
  uint32_t x, y, z, w;
};
struct __align__(16) float4 {
  float x, y, z, w;
};

inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <class T>
T __ldg(const T* p) {
  // A misaligned load is a fault on the device.
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T) != 0) __builtin_trap();
  return *p;
}

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
// In double the sum is exact, or as good as that where a number is so small that it only counts as not zero.
inline float __fadd_rz(float a, float b) {
  const double sum = static_cast<double>(a) + b;
  const auto rounded = static_cast<float>(sum);
  return std::fabs(rounded) > std::fabs(sum) ? std::nextafterf(rounded, 0.0f) : rounded;
}
inline int __float2int_rz(float a) {
  return std::isnan(a) ? 0 : a >= 0x1p31f ? INT32_MAX : a <= -0x1p31f ? INT32_MIN : static_cast<int>(a);
}
inline float __uint_as_float(uint32_t bits) {
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}
inline uint32_t __float_as_uint(float f) {
  uint32_t bits;
  memcpy(&bits, &f, sizeof bits);
  return bits;
}
using std::isfinite;

inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selectors) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t r = 0;
  for (int i = 0; i < 4; ++i) r |= static_cast<uint32_t>(bytes >> (8 * (selectors >> (4 * i) & 7)) & 255) << (8 * i);
  return r;
}

inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 32; i += 8) c += static_cast<int8_t>(a >> i) * static_cast<int8_t>(b >> i);
  return c;
}

// What the lanes of a warp, all of which are here, show one another.
template <class T, class Use>
T with_lanes(T value, Use&& use) {
  auto& exchange = emulation::warp_exchange();
  exchange.pointers[emulation::current->lane()] = &value;
  emulation::sync_warp();
  const T result = use([&](int lane) { return *static_cast<const T*>(exchange.pointers[lane]); });
  emulation::sync_warp();
  return result;
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes) {
  if (mask != 0xffffffffu) __builtin_trap();
  return with_lanes(value, [&](auto of) { return of(emulation::current->lane() ^ lanes); });
}
inline uint32_t __reduce_max_sync(uint32_t mask, uint32_t value) {
  if (mask != 0xffffffffu) __builtin_trap();
  return with_lanes(value, [](auto of) {
    uint32_t largest = 0;
    for (int lane = 0; lane < 32; ++lane) largest = of(lane) > largest ? of(lane) : largest;
    return largest;
  });
}

inline void __syncthreads() { emulation::sync_block(); }
inline void __syncwarp() { emulation::sync_warp(); }

using emulation::blockDim;
using emulation::blockIdx;
using emulation::gridDim;

typedef struct CUstream_st* cudaStream_t;
enum cudaError_t { cudaSuccess = 0 };
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

enum cudaLaunchAttributeID { cudaLaunchAttributeIgnore, cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  union {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = emulation::device.number, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const emulation::Device& device = emulation::device;
  *value = attribute == cudaDevAttrComputeCapabilityMajor   ? device.major
           : attribute == cudaDevAttrComputeCapabilityMinor ? 0
           : attribute == cudaDevAttrMultiProcessorCount    ? device.multiprocessors
                                                            : device.shared_bytes;
  return cudaSuccess;
}
struct cudaFuncAttributes {
  int ptxVersion;
};
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->ptxVersion = emulation::device.compiled;
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

template <class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Args...), Args... args) {
  const unsigned cluster = config->numAttrs ? config->attrs->val.clusterDim.x : 1;
  emulation::run_grid({config->gridDim, config->blockDim, cluster, config->dynamicSmemBytes}, [&] { kernel(args...); });
  return cudaSuccess;
}

// The driver's only function that is asked for, which <cuda.h> declares.
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
constexpr unsigned cudaEnableDefault = 0;
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned version, unsigned flags,
                                             cudaDriverEntryPointQueryResult* found);
