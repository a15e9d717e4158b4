// The launcher behind a C interface, for ctypes.
#include <cstdint>
#include <exception>
#include <string>

#include "emulator.h"
#include "kernels/matmul.h"

using jax_qgemm::Epilogue;
using jax_qgemm::Stack;

// Of the last kernel launched: blocks, threads, blocks of a cluster, bytes of shared memory.
extern "C" void emulated_launch(int* out) {
  const emulation::Launch& last = emulation::last_launch;
  out[0] = static_cast<int>(last.grid.x * last.grid.y);
  out[1] = static_cast<int>(last.block.x);
  out[2] = static_cast<int>(last.cluster);
  out[3] = static_cast<int>(last.shared_bytes);
}

extern "C" void emulated_device(int major, int multiprocessors, int shared_bytes, int compiled) {
  emulation::device = {major, multiprocessors, shared_bytes, compiled, compiled == 90 ? 0 : 1};
}

namespace {

jax_qgemm::Weight weight(const void* const* planes, int plane_count, int64_t k_blocks, int group_size, int scale_type) {
  jax_qgemm::Weight w = {};
  for (int i = 0; i < plane_count; ++i) w.planes[i] = planes[i];
  w.k_blocks = k_blocks;
  w.group = group_size;
  w.scale_type = static_cast<jax_qgemm::ScaleType>(scale_type);
  return w;
}

// What went wrong, or nullptr; an exception's text lives until the next one.
template <class Launch>
const char* guarded(Launch&& launch) {
  static std::string problem;
  try {
    return launch();
  } catch (const std::exception& e) {
    problem = e.what();
    return problem.c_str();
  }
}

}  // namespace

extern "C" const char* emulated_dequantize(const char* format, const void* const* planes, int plane_count,
                                           int64_t k_blocks, int group_size, int scale_type, const Stack* stack,
                                           void* out, int out_type, int64_t batch, int64_t tile_rows,
                                           int64_t first_tile_row, int64_t rows, int64_t k) {
  using namespace jax_qgemm;
  const DenseRows d = {format,
                       weight(planes, plane_count, k_blocks, group_size, scale_type),
                       *stack,
                       out,
                       static_cast<Scalar>(out_type),
                       batch,
                       tile_rows,
                       first_tile_row,
                       rows,
                       k};
  return guarded([&] { return launch_dequantize(d, nullptr); });
}

extern "C" const char* emulated_matmul(const char* format, const char* kernel, const void* const* planes,
                                       int plane_count, int64_t k_blocks, int group_size, int scale_type,
                                       const Stack* stack, const void* x, int x_type, void* out, int out_type,
                                       int64_t batch, int64_t m, int64_t n, int64_t k, int transpose, int highest,
                                       const Epilogue* epilogue, const float* x_scales) {
  using namespace jax_qgemm;
  Product p = {};
  p.format = format;
  p.kernel = kernel;
  p.w = weight(planes, plane_count, k_blocks, group_size, scale_type);
  p.stack = *stack;
  p.x = x;
  p.out = out;
  p.x_type = static_cast<Scalar>(x_type);
  p.out_type = static_cast<Scalar>(out_type);
  p.batch = batch, p.m = m, p.n = n, p.k = k;
  p.transpose = transpose;
  p.highest = highest;
  if (epilogue) p.epilogue = *epilogue;
  p.x_scales = x_scales;
  return guarded([&] { return launch_matmul(p, nullptr); });
}
