// 16 bytes of float16, bfloat16 or float32 elements in registers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <type_traits>

#include "formats/format.cuh"
#include "tile/ptx.cuh"

namespace jax_qgemm {

template <class T>
struct XVector {
  static constexpr int kSize = 16 / sizeof(T);
  uint32_t words[4];

  // The elements at `from`, an address that is a multiple of 16; zeros unless they exist.
  __device__ __forceinline__ void load(const T* from, bool exists) {
    const uint4 all = exists ? ptx::load_once(reinterpret_cast<const uint4*>(from)) : uint4{};
    words[0] = all.x, words[1] = all.y, words[2] = all.z, words[3] = all.w;
  }

  // Of the elements at `from`, whatever its address, those from `begin` up to `end`; zeros for the others.
  __device__ __forceinline__ void load_some(const T* from, int begin, int end) {
    clear();
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (i < begin || i >= end) continue;
      if constexpr (sizeof(T) == 4) {
        words[i] = __ldg(reinterpret_cast<const uint32_t*>(from) + i);
      } else {
        words[i / 2] |= static_cast<uint32_t>(__ldg(reinterpret_cast<const uint16_t*>(from) + i)) << (i % 2 * 16);
      }
    }
  }

  __device__ __forceinline__ void clear() { words[0] = words[1] = words[2] = words[3] = 0; }

  // Magnitudes to at most `most`, or the next number above it that T has.
  __device__ __forceinline__ void clamp(float most) {
    if constexpr (sizeof(T) == 4) {
      for (uint32_t& word : words) word = (word & 0x80000000u) | std::min(word & 0x7fffffffu, __float_as_uint(most));
    } else {
      const uint32_t largest = std::is_same_v<T, __half> ? 0x7bff : (__float_as_uint(most) + 0xffffu) >> 16;
      for (uint32_t& word : words) {
        const uint32_t low = std::min(word & 0x7fffu, largest), high = std::min(word >> 16 & 0x7fffu, largest);
        word = (word & 0x80008000u) | high << 16 | low;
      }
    }
  }

  __device__ __forceinline__ float operator[](int i) const {
    if constexpr (sizeof(T) == 4) {
      return __uint_as_float(words[i]);
    } else {
      const auto half = static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16));
      return std::is_same_v<T, __half> ? f16_to_f32(half) : bf16_to_f32(half);
    }
  }
};

// The largest magnitude of many elements. A NaN is larger than all numbers.
template <class T>
class LargestMagnitude {
 public:
  __device__ __forceinline__ void add(const XVector<T>& v) {
#pragma unroll
    for (const uint32_t word : v.words) {
      if constexpr (sizeof(T) == 4) {
        largest_ = std::max(largest_, word & 0x7fffffffu);
      } else {  // of both halves apart
        using Two = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
        Two two, largest;
        memcpy(&two, &word, 4), memcpy(&largest, &largest_, 4);
        largest = __hmax2_nan(largest, __habs2(two));
        memcpy(&largest_, &largest, 4);
      }
    }
  }

  // As float32 bits, which are ordered as unsigned integers are.
  __device__ __forceinline__ uint32_t bits() const {
    if constexpr (sizeof(T) == 4) return largest_;
    const XVector<T> both = {{largest_}};
    return std::max(__float_as_uint(both[0]), __float_as_uint(both[1]));
  }

 private:
  uint32_t largest_ = 0;
};

}  // namespace jax_qgemm
