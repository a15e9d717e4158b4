// All of a thread block's part of x in shared memory, row by row. The eight 16-byte pieces of each 128 bytes are
// permuted, by an exclusive or with the row, so that ldmatrix meets no bank conflicts. Not by padding: cp.async is slow
// where addresses in global and in shared memory differ modulo 128.
#pragma once

#include "kernels/product.h"
#include "tile/ptx.cuh"

namespace jax_qgemm {

QG_HD int x_row_bytes(int elements) { return elements * 2; }

// Where 8 elements from `k` of a row are.
__device__ __forceinline__ int x_piece(int k, int row) { return (k * 2 & ~127) + ((k / 8 ^ row) & 7) * 16; }

// Begins to copy elements [first_k, first_k + elements) of each of the rows of x, `stride` 16-bit elements apart: zeros
// behind the last. Not committed.
__device__ __forceinline__ void load_x_rows(const uint16_t* x, int rows, int stride, int first_k, int elements,
                                            char* memory) {
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const int row_bytes = x_row_bytes(elements), count = stride - first_k;
  x += first_k;
  if (stride % 8 == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0) {
#pragma unroll 1
    for (int k = thread * 8; k < elements; k += threads * 8) {
      const uint16_t* from = k < count ? x + k : x;
      ptx::SharedAddress to = ptx::shared_address(memory);
#pragma unroll 1
      for (int row = 0; row < rows; ++row, to += row_bytes, from += stride) {
        ptx::copy_async<16>(to + x_piece(k, row), from, k < count);
      }
    }
  } else {
#pragma unroll 1
    for (int row = 0; row < rows; ++row, memory += row_bytes, x += stride) {
#pragma unroll 1
      for (int k = thread; k < elements; k += threads) {
        reinterpret_cast<uint16_t*>(memory + x_piece(k, row))[k & 7] = k < count ? x[k] : 0;
      }
    }
  }
}

}  // namespace jax_qgemm
