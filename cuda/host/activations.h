// The nonlinearities of tile/epilogue.cuh on vectors. Included only by matmul_<instruction set>.cc.
#pragma once

#include "host/vector.h"
#include "kernels/product.h"

namespace jax_qgemm::host::QG_ISA {

// Within 2 units in the last place; infinity, zero and NaN where they belong.
QG_INLINE Floats exponential(Floats v) {
  v = v < -104.0f ? broadcast(-104.0f) : v;
  v = v > 89.0f ? broadcast(89.0f) : v;
  // v = n ln 2 + r: adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits. ln 2 in two parts.
  constexpr float kRound = 12582912.0f;
  const Floats shifted = v * 1.44269504f + kRound, n = shifted - kRound;
  const Floats r = multiply_add(n, broadcast(2.12194440e-4f), multiply_add(n, broadcast(-0.693359375f), v));
  Floats sum = broadcast(1.0f / 5040);  // the Taylor series, on |r| <= ln(2) / 2
  for (float coefficient : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) {
    sum = multiply_add(sum, r, broadcast(coefficient));
  }
  // 2^n in two factors, since n goes beyond the exponents of float32.
  const Ints exponent = (Ints)shifted - 0x4b400000, half = exponent >> 1;
  return sum * (Floats)((half + 127) << 23) * (Floats)((exponent - half + 127) << 23);
}

// Phi(v) = erfc(-v / sqrt(2)) / 2, by the fit of erfc in Press et al., "Numerical Recipes", 2nd ed., section 6.2
// (erfcc), whose relative error is below 1.2e-7.
QG_INLINE Floats normal_cdf(Floats v) {
  const Floats z = (v < 0.0f ? -v : v) * 0.70710678f, t = 1.0f / (1.0f + 0.5f * z);
  Floats sum = broadcast(0.17087277f);
  for (float coefficient : {-0.82215223f, 1.48851587f, -1.13520398f, 0.27886807f, -0.18628806f, 0.09678418f,
                            0.37409196f, 1.00002368f, -1.26551223f}) {
    sum = multiply_add(sum, t, broadcast(coefficient));
  }
  const Floats tail = 0.5f * t * exponential(sum - z * z);
  return v < 0.0f ? tail : 1.0f - tail;
}

QG_INLINE Floats activate(Activation activation, Floats v) {
  switch (activation) {
    case Activation::kSilu:
      return v / (1.0f + exponential(-v));
    case Activation::kGelu:
      return v * normal_cdf(v);
    case Activation::kGeluTanh:
      // (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u))
      return v / (1.0f + exponential(-1.59576912f * (v + 0.044715f * v * v * v)));
    case Activation::kRelu:
      // A NaN stays one.
      return v < 0.0f ? Floats{} : v;
    default:
      return v;
  }
}

}  // namespace jax_qgemm::host::QG_ISA
