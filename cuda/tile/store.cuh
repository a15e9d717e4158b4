// From a float32 sum to an element of the result.
#pragma once

#include "tile/epilogue.cuh"
#include "tile/scalar.cuh"

namespace jax_qgemm {

// column: of w. Gated, it is one of a gate, whose partner in the next tile row has the sum `up`.
__device__ __forceinline__ void store_result(const Product& p, int64_t batch, int64_t token, int64_t column, float sum,
                                             float up) {
  const Epilogue& e = p.epilogue;
  if (e.scale) {
    const float scale = e.scale[batch * e.scale_stride];
    sum *= scale;
    up *= scale;
  }
  if (e.bias) {
    const int64_t at = batch * e.bias_stride + column;
    sum += load_scalar(e.bias, at, e.bias_type);
    if (e.gated) up += load_scalar(e.bias, at + kTileN, e.bias_type);
  }
  float value = activate(e.activation, sum);
  if (e.gated) {
    value *= up;
    column = column / (2 * kTileN) * kTileN + column % kTileN;
  }
  const int64_t at = (batch * p.m + token) * p.out_columns() + column;
  if (e.residual) value += load_scalar(e.residual, at, e.residual_type);
  store_scalar(p.out, at, p.out_type, value);
}

// Results of columns `column` and 8 further, of `token` and the next each, as mma leaves them in a lane; there is no
// epilogue.
__device__ __forceinline__ void store_fragment(const Product& p, int64_t batch, int64_t token, int64_t column,
                                               float4 sums) {
  const auto store = [&]<class To>(To* out, const auto& convert) {
    To* to = out + (batch * p.m + token) * p.n + column;
    if (token < p.m && column < p.n) to[0] = convert(sums.x);
    if (token + 1 < p.m && column < p.n) to[p.n] = convert(sums.y);
    if (token < p.m && column + 8 < p.n) to[8] = convert(sums.z);
    if (token + 1 < p.m && column + 8 < p.n) to[p.n + 8] = convert(sums.w);
  };
  switch (p.out_type) {
    case Scalar::kF16:
      return store(static_cast<__half*>(p.out), [](float v) { return __float2half_rn(v); });
    case Scalar::kBF16:
      return store(static_cast<__nv_bfloat16*>(p.out), [](float v) { return __float2bfloat16_rn(v); });
    default:
      return store(static_cast<float*>(p.out), [](float v) { return v; });
  }
}

// Columns [column, column + 64) of w for kTokens tokens, whose sums are in shared memory, kStride floats a token, and
// are overwritten; by the 128 threads of a warpgroup. Neighbouring threads write neighbouring elements.
template <int kTokens, int kStride>
__device__ __forceinline__ void store_block(const Product& p, int64_t batch, int64_t token, int64_t column,
                                            float* sums) {
  const Epilogue& e = p.epilogue;
  const int thread = static_cast<int>(threadIdx.x) % 128;
  const int tokens = static_cast<int>(p.m - token < kTokens ? p.m - token : kTokens);
  const auto addresses = reinterpret_cast<uintptr_t>(p.out) | reinterpret_cast<uintptr_t>(e.residual);
  if (p.n % 4 != 0 || addresses % 16 != 0) {
    const int results_log = e.gated ? 5 : 6;
#pragma unroll 1
    for (int i = thread; i < tokens << results_log; i += 128) {
      const int result = i & ((1 << results_log) - 1), t = i >> results_log;
      const int row = e.gated ? result / kTileN * (2 * kTileN) + result % kTileN : result;
      const float* sum = sums + t * kStride + row;
      if (column + row < p.n) {
        store_result(p, batch, token + t, column + row, sum[0], e.gated ? sum[kTileN] : 0.0f);
      }
    }
    return;
  }

  // Four neighbouring results a thread and token, the same ones for all tokens.
  const int quads_log = e.gated ? 3 : 4, quad = thread & ((1 << quads_log) - 1);
  const int row = e.gated ? quad / 4 * (2 * kTileN) + quad % 4 * 4 : quad * 4;
  if (column + row >= p.n) return;
  const int first = thread >> quads_log, step = 128 >> quads_log;
  if (e.scale || e.bias || e.gated || e.activation != Activation::kNone) {
    const float scale = e.scale ? e.scale[batch * e.scale_stride] : 1.0f;
    float bias[4] = {}, up_bias[4] = {};
    if (e.bias) {
      const int64_t at = batch * e.bias_stride + column + row;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        bias[i] = load_scalar(e.bias, at + i, e.bias_type);
        if (e.gated) up_bias[i] = load_scalar(e.bias, at + kTileN + i, e.bias_type);
      }
    }
#pragma unroll 1
    for (int t = first; t < tokens; t += step) {
      float* sum = sums + t * kStride + row;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float value = activate(e.activation, sum[i] * scale + bias[i]);
        sum[i] = e.gated ? value * (sum[kTileN + i] * scale + up_bias[i]) : value;
      }
    }
  }

  const int64_t columns = p.out_columns();
  const int64_t at = (batch * p.m + token) * columns + (e.gated ? column / 2 + quad * 4 : column + row);
  constexpr int kAtOnce = 4;  // residuals under way
#pragma unroll 1
  for (int t = first; t < tokens; t += kAtOnce * step) {
    float4 residual[kAtOnce] = {};
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int of = t + i * step;
      if (e.residual && of < tokens) residual[i] = load_quad(e.residual, at + of * columns, e.residual_type);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int of = t + i * step;
      if (of >= tokens) break;
      const float4 v = *reinterpret_cast<const float4*>(sums + of * kStride + row), &r = residual[i];
      store_quad(p.out, at + of * columns, p.out_type, make_float4(v.x + r.x, v.y + r.y, v.z + r.z, v.w + r.w));
    }
  }
}

}  // namespace jax_qgemm
