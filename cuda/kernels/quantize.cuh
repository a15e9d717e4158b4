// Activations to codes of 8 bits: a row, or a group of 32, is read once, and stays in registers while its largest
// magnitude is found.
//
// Vectors of 16 bytes lie at multiples of 16 bytes of the whole array, whatever k is. The first and the last one of a
// row may be another row's too: of these, elements are read and written one by one, and so is everything where the
// arrays themselves are not aligned.
#pragma once

#include "kernels/quantize.h"
#include "tile/rounding.cuh"
#include "tile/x_vector.cuh"

namespace jax_qgemm {

constexpr int kHeld = 4;       // vectors of a row, by each thread
constexpr int kLoneWarps = 4;  // of a block whose warps have a row each
constexpr int kGroupHeld = 2, kGroupThreads = 256;

// Largest magnitudes below this times the largest code count as zeros: jax_qgemm/formats/activations.py says why.
constexpr float kTiny = 0x1p-100f;
constexpr uint32_t kInfinity = 0x7f800000u, kQuietNaN = 0x7fc00000u;  // float32 bits

// Whether vectors of x, and their codes, can be read and written as such.
template <class T>
__host__ __device__ bool are_aligned(const Activations& a) {
  return reinterpret_cast<uintptr_t>(a.x) % 16 == 0 && reinterpret_cast<uintptr_t>(a.codes) % XVector<T>::kSize == 0;
}

// The codes of a vector.
template <class T>
struct CodeVector {
  static constexpr int kSize = XVector<T>::kSize;
  uint32_t words[kSize / 4];

  // Zeros unless `is_plain`, whatever the values.
  template <class Round, class Value>
  __device__ __forceinline__ void set(bool is_plain, Value&& value) {
#pragma unroll
    for (int i = 0; i < kSize; i += 4) {
      const uint32_t four = Round::four(value(i), value(i + 1), value(i + 2), value(i + 3));
      words[i / 4] = is_plain ? four : 0;
    }
  }

  // To an address that is a multiple of kSize.
  __device__ __forceinline__ void store(uint8_t* to) const {
    if constexpr (kSize == 8) {
      *reinterpret_cast<uint2*>(to) = {words[0], words[1]};
    } else {
      *reinterpret_cast<uint32_t*>(to) = words[0];
    }
  }

  __device__ __forceinline__ void store_some(uint8_t* to, int begin, int end) const {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (i >= begin && i < end) to[i] = static_cast<uint8_t>(words[i / 4] >> (i % 4 * 8));
    }
  }
};

// One scale a row. `warps` warps share a row, those of a block; or, if it is 1, each has its own. Rows that are longer
// than what the threads hold take several turns, of which the last begins at element `last_turn`, and are read again,
// backwards from there.
// kWhole: the arrays are aligned, and vectors belong to one row.
template <class Round, class T, bool kWhole>
__global__ void __launch_bounds__(1024) quantize_rows(const Activations a, int warps, int last_turn) {
  constexpr int kSize = XVector<T>::kSize;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t row = warps == 1 ? int64_t{blockIdx.x} * kLoneWarps + warp : blockIdx.x;
  if (row >= a.rows) return;
  const int thread = warps == 1 ? lane : threadIdx.x, stride = 32 * warps * kSize, a_turn = kHeld * stride;

  // The row is elements [begin, end) from the beginning of its first vector; the thread's vectors begin at `at`.
  const int64_t first = row * a.k;
  const int begin = kWhole ? 0 : static_cast<int>(first % kSize), end = begin + static_cast<int>(a.k);
  const int at = thread * kSize;
  const T* x = static_cast<const T*>(a.x) + (first - begin) + at;
  uint8_t* codes = static_cast<uint8_t*>(a.codes) + (first - begin) + at;
  const bool aligned = kWhole || are_aligned<T>(a);
  const auto is_full = [&](int v) { return kWhole ? v < end : aligned && v >= begin && v + kSize <= end; };

  XVector<T> held[kHeld];
  const auto load = [&](int turn) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) held[i].load(x + (turn + i * stride), is_full(at + turn + i * stride));
    if constexpr (!kWhole) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        const int next = at + turn + i * stride;
        if (!is_full(next)) held[i].load_some(x + (turn + i * stride), begin - next, end - next);
      }
    }
  };

  LargestMagnitude<T> largest;
#pragma unroll 1
  for (int turn = 0; turn <= last_turn; turn += a_turn) {
    load(turn);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) largest.add(held[i]);
  }
  uint32_t top = __reduce_max_sync(0xffffffffu, largest.bits());
  if (warps > 1) {
    __shared__ uint32_t tops[32];
    if (lane == 0) tops[warp] = top;
    __syncthreads();
    top = __reduce_max_sync(0xffffffffu, lane < warps ? tops[lane] : 0);
  }

  const bool is_tiny = top < __float_as_uint(Round::kLargest * kTiny), is_plain = !is_tiny && top < kInfinity;
  if (thread == 0) {
    static_cast<float*>(a.scales)[row] =
        is_plain ? __fdiv_rn(__uint_as_float(top), Round::kLargest) : __uint_as_float(is_tiny ? 0 : kQuietNaN);
  }
  const float factor = is_plain ? __fdiv_rn(Round::kLargest, __uint_as_float(top)) : 0;

#pragma unroll 1
  for (int turn = last_turn; turn >= 0; turn -= a_turn) {
    if (turn != last_turn) load(turn);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      CodeVector<T> out;
      out.template set<Round>(is_plain, [&](int e) { return __fmul_rn(held[i][e], factor); });
      const int next = at + turn + i * stride;
      if (is_full(next)) {
        out.store(codes + (turn + i * stride));
      } else if constexpr (!kWhole) {
        out.store_some(codes + (turn + i * stride), begin - next, end - next);
      }
    }
  }
}

// value / 127 rounded once, where that is a normal number: the remainder of a quotient that is at most one unit off is
// exact, and corrects it. (Rounded, 1 / 127 is off by 2^-28 of itself.) __fdiv_rn does the same after a check.
__device__ __forceinline__ float divided_by_127(float value) {
  constexpr float kInverse = 1.0f / 127.0f;
  const float quotient = __fmul_rn(value, kInverse);
  return __fmaf_rn(__fmaf_rn(quotient, -127.0f, value), kInverse, quotient);
}

// q8_1: the array's vectors one after the other, those of a group in neighbouring lanes. kWhole: the arrays are
// aligned.
template <class T, bool kWhole>
__global__ void __launch_bounds__(kGroupThreads) quantize_groups(const Activations a) {
  constexpr int kSize = XVector<T>::kSize, kLanes = kQ8_1Group / kSize;
  constexpr float kLargestValue = 127.0f * 65504.0f;  // its scale is the largest finite float16
  const int64_t first = int64_t{blockIdx.x} * (kGroupThreads * kGroupHeld) + threadIdx.x;
  const int64_t vectors = a.rows * a.k / kSize;
  const T* x = static_cast<const T*>(a.x) + first * kSize;
  uint8_t* codes = static_cast<uint8_t*>(a.codes) + first * kSize;
  uint16_t* scales = static_cast<uint16_t*>(a.scales) + first / kLanes;
  int16_t* sums = a.sums + first / kLanes;

  XVector<T> held[kGroupHeld];
#pragma unroll
  for (int i = 0; i < kGroupHeld; ++i) {
    const bool exists = first + i * kGroupThreads < vectors;
    if constexpr (kWhole) {
      held[i].load(x + i * kGroupThreads * kSize, exists);
    } else {
      held[i].load_some(x + i * kGroupThreads * kSize, 0, exists ? kSize : 0);
    }
  }

#pragma unroll
  for (int i = 0; i < kGroupHeld; ++i) {
    LargestMagnitude<T> largest;
    largest.add(held[i]);
    uint32_t top = largest.bits();
#pragma unroll
    for (int lanes = 1; lanes < kLanes; lanes *= 2) top = std::max(top, __shfl_xor_sync(0xffffffffu, top, lanes));

    const bool is_plain = top >= __float_as_uint(127 * kTiny) && top < kInfinity;
    const bool is_large = is_plain && top > __float_as_uint(kLargestValue);
    if (is_large) held[i].clamp(kLargestValue);
    const float d = is_plain ? is_large ? 65504.0f : divided_by_127(__uint_as_float(top)) : 1.0f;
    const float inverse = __frcp_rn(d);

    CodeVector<T> out;
    out.template set<RoundAwayToInt8>(is_plain, [&](int e) { return __fmul_rn(held[i][e], inverse); });
    int sum = 0;
#pragma unroll
    for (const uint32_t word : out.words) sum = __dp4a(static_cast<int>(word), 0x01010101, sum);
#pragma unroll
    for (int lanes = 1; lanes < kLanes; lanes *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);

    if (first + i * kGroupThreads >= vectors) continue;
    if constexpr (kWhole) {
      out.store(codes + i * kGroupThreads * kSize);
    } else {
      out.store_some(codes + i * kGroupThreads * kSize, 0, kSize);
    }
    if (threadIdx.x % kLanes == 0) {
      const uint16_t special = top > kInfinity ? 0x7e00 : top == kInfinity ? 0x7c00 : 0;  // float16 bits
      scales[i * kGroupThreads / kLanes] = is_plain ? __half_as_ushort(__float2half_rn(d)) : special;
      sums[i * kGroupThreads / kLanes] = static_cast<int16_t>(sum);
    }
  }
}

}  // namespace jax_qgemm
