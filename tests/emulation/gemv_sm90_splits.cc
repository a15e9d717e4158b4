// Every split that gemv_sm90 may be launched with, behind a C interface; int4 weights, x in float16.
#include <cuda_runtime.h>

#include <stdexcept>

#include "formats/formats.cuh"
#include "kernels/gemv_sm90_launch.cuh"

using namespace jax_qgemm;

namespace {

template <int Tokens>
const char* launch_number(int number, const Product& p, int* split) {
  DeviceLimits limits;
  device_limits(&limits);
  GemvSm90Sizes chosen = {};
  int count = 0;
  for_each_gemv_sm90(gemv_sm90_shape<Int4, Tokens>(p), limits, [&](const GemvSm90Sizes& s, double) {
    if (count++ == number) chosen = s;
  });
  if (number >= count) return "no such split";
  const GemvSm90Config& c = chosen.config;
  const int values[] = {c.rows, c.slices, c.cluster, chosen.x_stays, c.buffers, chosen.passes};
  std::copy(std::begin(values), std::end(values), split);
  return launch_gemv_sm90_split<Int4, MmaF16, Tokens>(p, chosen, limits, nullptr);
}

}  // namespace

// split: rows, slices, cluster, whether x stays, buffers, passes.
extern "C" const char* emulated_gemv_sm90_split(int number, const void* codes, const void* scales, int64_t k_blocks,
                                                const void* x, float* out, int64_t batch, int64_t m, int64_t n,
                                                int64_t k, int* split) {
  Product p = {};
  p.w.planes[0] = codes, p.w.planes[1] = scales;
  p.w.k_blocks = k_blocks;
  p.w.group = 128;
  p.stack = {batch, nullptr};
  p.x = x, p.x_type = Scalar::kF16;
  p.out = out, p.out_type = Scalar::kF32;
  p.batch = batch, p.m = m, p.n = n, p.k = k;
  static std::string problem;
  try {
    return m <= 16 ? launch_number<16>(number, p, split) : launch_number<64>(number, p, split);
  } catch (const std::exception& e) {
    problem = e.what();
    return problem.c_str();
  }
}
