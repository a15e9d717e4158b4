// The decoder of every format, element by element: what the kernels' decoding is compared with.
#pragma once

#include <cstdint>
#include <string_view>

#include "formats/format.cuh"

namespace jax_qgemm::host {

// Writes float32 (n, k), row-major. w.k_blocks is derived from k. False: unknown format.
bool dequantize(std::string_view format, Weight w, int64_t n, int64_t k, float* out);

// The same for `count` q8_1 blocks.
void dequantize_q8_1(const void* blocks, int64_t count, float* out);

}  // namespace jax_qgemm::host
