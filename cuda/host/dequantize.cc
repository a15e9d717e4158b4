#include "host/dequantize.h"

#include <algorithm>

#include "formats/formats.cuh"
#include "formats/tile_codes.cuh"

namespace jax_qgemm::host {
namespace {

template <class F>
void dequantize_format(const Weight& w, int64_t n, int64_t k, float* out) {
  const int64_t k_tiles = w.k_blocks * k_block_of<F>(w) / kTileK;
  for (int64_t row = 0; row < n; ++row) {
    const int64_t tile_row = row / kTileN;
    const int g = static_cast<int>(row % 8), h = static_cast<int>(row % kTileN / 8);
    for (int64_t step = 0; step * 16 < k; ++step) {
      const Affine affine = F::affine(w, tile_row, g, step).row[h];
      for (int t = 0; t < 4; ++t) {
        const int64_t tile = tile_row * k_tiles + step / 4;
        const uint32_t levels = F::levels(run_codes<F>(w, tile, 4 * g + t, 2 * static_cast<int>(step % 4) + h));
        for (int e = 0; e < 4; ++e) {
          const int64_t column = step * 16 + 2 * t + (e >> 1) + 8 * (e & 1);
          if (column < k) out[row * k + column] = value_of<F>(affine, static_cast<int>(levels >> (8 * e) & 255));
        }
      }
    }
  }
}

}  // namespace

bool dequantize(std::string_view format, Weight w, int64_t n, int64_t k, float* out) {
  return with_format(format, [&](auto f) {
    using F = decltype(f);
    w.k_blocks = (k + k_block_of<F>(w) - 1) / k_block_of<F>(w);
    dequantize_format<F>(w, n, k, out);
  });
}

void dequantize_q8_1(const void* blocks, int64_t count, float* out) {
  for (int64_t b = 0; b < count; ++b) {
    Q8_1::Block block;
    memcpy(&block, static_cast<const char*>(blocks) + b * sizeof block, sizeof block);
    for (int i = 0; i < Q8_1::kBlock; ++i) out[b * Q8_1::kBlock + i] = Q8_1::value(block, i);
  }
}

}  // namespace jax_qgemm::host
