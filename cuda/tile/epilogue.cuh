// The nonlinearities of an epilogue, in float32, for host and device.
#pragma once

#include <cmath>

#include "kernels/product.h"

namespace jax_qgemm {

// As jax.nn defines them: silu(v) = v / (1 + exp(-v)); gelu(v) = v * Phi(v), exactly or by its tanh approximation
// (Hendrycks & Gimpel, "Gaussian Error Linear Units", 2016).
QG_HD float activate(Activation activation, float v) {
  switch (activation) {
    case Activation::kSilu:
      return v / (1.0f + expf(-v));
    case Activation::kGelu:
      return 0.5f * v * erfcf(-0.70710678f * v);
    case Activation::kGeluTanh:
      return 0.5f * v * (1.0f + tanhf(0.79788456f * (v + 0.044715f * v * v * v)));
    case Activation::kRelu:
      // A NaN stays one.
      return v < 0.0f ? 0.0f : v;
    default:
      return v;
  }
}

}  // namespace jax_qgemm
