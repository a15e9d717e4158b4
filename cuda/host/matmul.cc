#include "host/matmul.h"

#include <cmath>
#include <cstring>
#include <vector>

#include "formats/formats.cuh"
#include "formats/tile_codes.cuh"

namespace jax_qgemm::host {
namespace {

uint16_t f32_to_bf16(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  if (f != f) return static_cast<uint16_t>(u >> 16 | 0x40);
  return static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

uint16_t f32_to_f16(float f) {
  const _Float16 h = static_cast<_Float16>(f);
  uint16_t u;
  memcpy(&u, &h, 2);
  return u;
}

float load(const void* p, Scalar type, int64_t i) {
  if (type == Scalar::kF32) return static_cast<const float*>(p)[i];
  const uint16_t u = static_cast<const uint16_t*>(p)[i];
  return type == Scalar::kF16 ? f16_to_f32(u) : bf16_to_f32(u);
}

void store(void* p, Scalar type, int64_t i, float v) {
  if (type == Scalar::kF32) static_cast<float*>(p)[i] = v;
  else static_cast<uint16_t*>(p)[i] = type == Scalar::kF16 ? f32_to_f16(v) : f32_to_bf16(v);
}

template <class F>
void decode_row(const Weight& w, int64_t tile_row, int row, int64_t k, float* out) {
  const int64_t k_tiles = w.k_blocks * k_block_of<F>(w) / kTileK;
  const int g = row % 8, h = row / 8;
  for (int64_t step = 0; step * 16 < k; ++step) {
    const Affine affine = F::affine(w, tile_row, g, step).row[h];
    for (int t = 0; t < 4; ++t) {
      const int64_t tile = tile_row * k_tiles + step / 4;
      const uint32_t levels = F::levels(run_codes<F>(w, tile, 4 * g + t, 2 * static_cast<int>(step % 4) + h));
      for (int e = 0; e < 4; ++e) {
        const int64_t column = step * 16 + 2 * t + (e >> 1) + 8 * (e & 1);
        if (column < k) out[column] = value_of<F>(affine, static_cast<int>(levels >> (8 * e) & 255));
      }
    }
  }
}

template <class F>
void run(const Product& p, const ParallelFor& parallel_for) {
  const int64_t contraction = p.transpose ? p.n : p.k, width = p.transpose ? p.k : p.n;
  parallel_for(p.batch * (p.transpose ? 1 : p.tile_rows()), [&](int64_t i) {
    const int64_t batch = p.transpose ? i : i / p.tile_rows();
    std::vector<float> row(p.k);
    std::vector<double> sums(p.transpose ? p.m * p.k : 0);
    for (int64_t n = p.transpose ? 0 : i % p.tile_rows() * 16; n < p.n; ++n) {
      if (!p.transpose && n == (i % p.tile_rows() + 1) * 16) break;
      decode_row<F>(p.w, batch * p.tile_rows() + n / 16, static_cast<int>(n % 16), p.k, row.data());
      for (int64_t m = 0; m < p.m; ++m) {
        const int64_t token = (batch * p.m + m);
        if (p.transpose) {
          const double g = load(p.x, p.x_type, token * contraction + n);
          for (int64_t k = 0; k < p.k; ++k) sums[m * p.k + k] += g * row[k];
        } else {
          double sum = 0;
          for (int64_t k = 0; k < p.k; ++k) sum += static_cast<double>(load(p.x, p.x_type, token * contraction + k)) * row[k];
          store(p.out, p.out_type, token * width + n, static_cast<float>(sum));
        }
      }
    }
    for (size_t j = 0; j < sums.size(); ++j) store(p.out, p.out_type, batch * p.m * p.k + j, static_cast<float>(sums[j]));
  });
}

}  // namespace

void matmul(const Product& p, const ParallelFor& parallel_for, int64_t width) {
  (void)width;
  with_format(p.format, [&](auto f) { run<decltype(f)>(p, parallel_for); });
}

}  // namespace jax_qgemm::host
