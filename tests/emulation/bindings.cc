// The launcher behind a C interface, for ctypes.
#include <cstdint>
#include <exception>
#include <string>

#include "kernels/matmul.h"

extern "C" const char* emulated_matmul(const char* format, const char* kernel, const void* const* planes,
                                       int plane_count, int64_t k_blocks, int group_size, int scale_type, const void* x,
                                       int x_type, void* out, int out_type, int64_t batch, int64_t m, int64_t n,
                                       int64_t k, int transpose, int highest) {
  using namespace jax_qgemm;
  static std::string problem;
  Product p = {};
  p.format = format;
  p.kernel = kernel;
  for (int i = 0; i < plane_count; ++i) p.w.planes[i] = planes[i];
  p.w.k_blocks = k_blocks;
  p.w.group = group_size;
  p.w.scale_type = static_cast<ScaleType>(scale_type);
  p.x = x;
  p.out = out;
  p.x_type = static_cast<Scalar>(x_type);
  p.out_type = static_cast<Scalar>(out_type);
  p.batch = batch, p.m = m, p.n = n, p.k = k;
  p.transpose = transpose;
  p.highest = highest;
  try {
    return launch_matmul(p, nullptr);
  } catch (const std::exception& e) {
    problem = e.what();
    return problem.c_str();
  }
}
