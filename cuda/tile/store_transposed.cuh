// From wgmma's sums, whose rows are columns of the result, to a result of 16-bit elements. Every warp stores its own:
// 16 columns are a whole sector of 32 bytes, and no warp waits for another one.
#pragma once

#include "tile/scalar.cuh"
#include "tile/value_operand.cuh"

namespace jax_qgemm {

// Whether store_transposed<T>() serves the product: it stores elements of x's type, of bias and residual at most.
template <class T>
__device__ __forceinline__ bool stores_transposed(const Product& p) {
  constexpr Scalar kType = T::kIsBF16 ? Scalar::kBF16 : Scalar::kF16;
  const Epilogue& e = p.epilogue;
  const auto addresses = reinterpret_cast<uintptr_t>(p.out) | reinterpret_cast<uintptr_t>(e.residual);
  return p.out_type == kType && !(e.residual && e.residual_type != kType) && !e.gated &&
         e.activation == Activation::kNone && p.n % 8 == 0 && addresses % 16 == 0;
}

// A unit is 16 tokens by 16 columns; this many pass through a warp's buffer at a time.
constexpr int kTransposedUnits = 4, kTransposedUnitBytes = 512;

// By a warp: columns column + 64b + [0, 16) of w for `tokens` tokens, whose sums are sums[b]. They are overwritten.
// `buffer` is the warp's own shared memory.
template <class T, int Blocks, int Sums>
__device__ __forceinline__ void store_transposed(const Product& p, int64_t batch, int64_t token, int64_t column,
                                                 int64_t tokens, char* buffer, float (&sums)[Blocks][Sums]) {
  constexpr int kUnits = Sums / 8, kAhead = kUnits % 8 == 0 ? 8 : 4;  // units whose residual is loaded at a time
  static_assert(kUnits % kAhead == 0);
  const Epilogue& e = p.epilogue;
  const int lane = static_cast<int>(threadIdx.x) % 32;

  if (e.scale) {
    const float scale = e.scale[batch * e.scale_stride];
#pragma unroll
    for (int b = 0; b < Blocks; ++b) {
#pragma unroll
      for (int i = 0; i < Sums; ++i) sums[b][i] *= scale;
    }
  }
  if (e.bias) {
#pragma unroll
    for (int b = 0; b < Blocks; ++b) {
      float bias[2] = {};
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int64_t of = column + 64 * b + 8 * h + lane / 4;
        if (of < p.n) bias[h] = load_scalar(e.bias, batch * e.bias_stride + of, e.bias_type);
      }
#pragma unroll
      for (int i = 0; i < Sums; ++i) sums[b][i] += bias[i / 2 % 2];
    }
  }

  // In the buffer, a half of a token's columns is 16 bytes, and 8 tokens of a half fill the banks. So do four whole
  // tokens, since the second half has its tokens in another order.
  const auto in_buffer = [](int t, int half) { return 256 * half + (16 * t ^ 64 * half); };
  const auto matrices =
      ptx::shared_address(buffer + in_buffer(lane / 16 * 8 + lane % 8, lane / 8 % 2));  // a row of the four of a unit
  auto* own = reinterpret_cast<uint4*>(buffer + in_buffer(lane / 2, lane % 2));
  constexpr int kStep = kTransposedUnitBytes / 16;  // of `own`, a unit
  const int64_t left = p.m - token < tokens ? p.m - token : tokens;
#pragma unroll
  for (int b = 0; b < Blocks; ++b) {
    const int64_t first_column = column + 64 * b + lane % 2 * 8;
    const int here = first_column < p.n ? static_cast<int>(left) - lane / 2 : 0;
    // In 16 bytes; the next unit is 2n of them behind.
    const int64_t at = ((batch * p.m + token + lane / 2) * p.n + first_column) / 8;
#pragma unroll
    for (int ahead = 0; ahead < kUnits; ahead += kAhead) {
      uint4 residual[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        residual[i] = {};
        if (e.residual && 16 * (ahead + i) < here) {
          residual[i] = static_cast<const uint4*>(e.residual)[at + 2 * p.n * (ahead + i)];
        }
      }
#pragma unroll
      for (int first = ahead; first < ahead + kAhead; first += kTransposedUnits) {
        if (e.residual) {
#pragma unroll
          for (int i = 0; i < kTransposedUnits; ++i) own[i * kStep] = residual[first - ahead + i];
          __syncwarp();
#pragma unroll
          for (int i = 0; i < kTransposedUnits; ++i) {
            uint32_t pairs[4];
            ptx::ldmatrix_x4_transposed(pairs, matrices + i * kTransposedUnitBytes);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              float* sum = &sums[b][8 * (first + i) + 2 * j];
              sum[0] += Packed<T>{pairs[j]}.first();
              sum[1] += Packed<T>{pairs[j] >> 16}.first();
            }
          }
          __syncwarp();
        }
#pragma unroll
        for (int i = 0; i < kTransposedUnits; ++i) {
          uint32_t pairs[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const float* sum = &sums[b][8 * (first + i) + 2 * j];
            pairs[j] = Packed<T>::of(sum[0], sum[1]).bits;
          }
          ptx::stmatrix_x4_transposed(matrices + i * kTransposedUnitBytes, pairs);
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < kTransposedUnits; ++i) {
          const uint4 results = own[i * kStep];
          if (16 * (first + i) < here) static_cast<uint4*>(p.out)[at + 2 * p.n * (first + i)] = results;
        }
        __syncwarp();
      }
    }
  }
}

}  // namespace jax_qgemm
