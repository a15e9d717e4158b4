// The quantizer of activations behind a C interface, for ctypes.
#include <exception>
#include <string>

#include "kernels/quantize.h"

extern "C" const char* emulated_quantize(int format, const void* x, int x_type, void* codes, void* scales,
                                         int16_t* sums, int64_t rows, int64_t k) {
  using namespace jax_qgemm;
  static std::string problem;
  try {
    return launch_quantize(
        {static_cast<ActivationFormat>(format), static_cast<Scalar>(x_type), x, codes, scales, sums, rows, k}, nullptr);
  } catch (const std::exception& e) {
    problem = e.what();
    return problem.c_str();
  }
}
