// tile/ptx.cuh on the CPU, from the fragment tables of the PTX ISA.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace jax_qgemm::ptx {

inline void* dynamic_shared() { return emulation::dynamic_shared; }

inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selectors) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t r = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t selector = selectors >> (4 * i) & 15;
    uint32_t byte = static_cast<uint32_t>(bytes >> (8 * (selector & 7)) & 255);
    if (selector & 8) byte = byte & 128 ? 255 : 0;
    r |= byte << (8 * i);
  }
  return r;
}

// Register i of lane l is elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of matrix i.
inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row) {
  auto& exchange = emulation::warp_exchange();
  const int lane = emulation::current->lane();
  if (reinterpret_cast<uintptr_t>(shared_row) % 16 != 0) __builtin_trap();
  exchange.pointers[lane] = shared_row;
  emulation::sync_warp();
  for (int i = 0; i < 4; ++i) {
    memcpy(&r[i], static_cast<const char*>(exchange.pointers[8 * i + lane / 4]) + lane % 4 * 4, 4);
  }
  emulation::sync_warp();
}

// a: registers 0..3 are (row l/4, k 2(l%4)), (row +8, same k), (row, k + 8), (row + 8, k + 8), two elements each;
// b: registers 0, 1 are (k 2(l%4), column l/4), (k + 8, same column); c: (row l/4, column 2(l%4)), (same row, column +
// 1), (row + 8, column), (row + 8, column + 1).
template <class ToFloat>
inline void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, ToFloat to_float) {
  auto& exchange = emulation::warp_exchange();
  const int lane = emulation::current->lane();
  const uint32_t registers[6] = {a[0], a[1], a[2], a[3], b0, b1};
  for (int i = 0; i < 6; ++i) {
    for (int half = 0; half < 2; ++half) exchange.values[lane][i][half] = to_float(registers[i] >> (16 * half));
  }
  emulation::sync_warp();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    double sum = c[i];
    for (int k = 0; k < 16; ++k) {
      const float a_value = exchange.values[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2][k % 2];
      const float b_value = exchange.values[column * 4 + k % 8 / 2][4 + k / 8][k % 2];
      sum += static_cast<double>(a_value) * b_value;
    }
    c[i] = static_cast<float>(sum);
  }
  emulation::sync_warp();
}

inline void mma_m16n8k16_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma_m16n8k16(c, a, b0, b1, [](uint32_t w) { return __half2float({static_cast<uint16_t>(w)}); });
}

inline void mma_m16n8k16_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma_m16n8k16(c, a, b0, b1, [](uint32_t w) { return __bfloat162float({static_cast<uint16_t>(w)}); });
}

}  // namespace jax_qgemm::ptx
