// Codes that decode by a table of 16 entries as the A operand of an mma.
#pragma once

#include <cstdint>

#include "formats/format.cuh"

namespace jax_qgemm {

// An entry is level - zero as a 16-bit number, or, `Levels`, the bits of the level itself, or'd with those of kMagic:
// none, or of both high bytes.
template <class F, class T, bool Levels, uint32_t kMagic = 0>
class TableOperand {
 public:
  // prmt takes its selectors as nibbles, which is what the codes are: of an element of registers 0 to 3 in the word's
  // low half, and of their second elements in its high half.
  __device__ __forceinline__ static void decode(uint32_t (&a)[4], uint32_t word) {
    if constexpr (Levels) word = __byte_perm(word, 0, 0x3120);  // so that results lie as pairs of two registers
    const uint32_t in_half = word & 0x77777777u;
    const uint32_t half = ptx::and_or<0x44444444u>(word >> 1, 0x32103210u);  // byte i of the first eight, or the last
    const uint32_t first = entries<0>(in_half, half), second = entries<0>(in_half >> 16, half >> 16);
    if constexpr (Levels) {
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {  // of registers
        const uint32_t bytes = pair ? second : first;
        a[2 * pair] = kMagic ? ptx::and_or<0x00ff00ffu>(bytes, kMagic) : bytes & 0x00ff00ffu;
        a[2 * pair + 1] = __byte_perm(bytes, kMagic, kMagic ? 0x5351 : 0x4341);
      }
    } else {
      const uint32_t first_high = entries<1>(in_half, half), second_high = entries<1>(in_half >> 16, half >> 16);
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const uint32_t bytes = pair ? 0x7362u : 0x5140u;
        const uint32_t firsts = __byte_perm(first, first_high, bytes),
                       seconds = __byte_perm(second, second_high, bytes);
        a[2 * pair] = __byte_perm(firsts, seconds, 0x5410);
        a[2 * pair + 1] = __byte_perm(firsts, seconds, 0x7632);
      }
    }
  }

 private:
  __device__ __forceinline__ static constexpr uint32_t entry_bits(int i) {
    if (Levels) return F::table(i);
    const int value = F::table(i) - F::kZero;
    if (value == 0) return 0;
    const uint32_t magnitude = static_cast<uint32_t>(value < 0 ? -value : value);
    uint32_t exponent = 0;
    while (magnitude >> (exponent + 1)) ++exponent;
    constexpr int kMantissa = T::kIsBF16 ? 7 : 10, kBias = T::kIsBF16 ? 127 : 15;
    return (value < 0 ? 0x8000u : 0) | (exponent + kBias) << kMantissa |
           (magnitude << (kMantissa - exponent) & ((1u << kMantissa) - 1));
  }
  // Byte `byte` of entries 4i to 4i + 3.
  __device__ __forceinline__ static constexpr uint32_t entry_bytes(int i, int byte) {
    uint32_t bytes = 0;
    for (int e = 0; e < 4; ++e) bytes |= (entry_bits(4 * i + e) >> 8 * byte & 255) << 8 * e;
    return bytes;
  }

  // That byte of four entries, for as many nibbles of the selectors.
  template <int Byte>
  __device__ __forceinline__ static uint32_t entries(uint32_t in_half, uint32_t half) {
    constexpr uint32_t t[4] = {entry_bytes(0, Byte), entry_bytes(1, Byte), entry_bytes(2, Byte), entry_bytes(3, Byte)};
    // Zero, of which the compiler does not know it: prmt takes one constant, and it would move the other one into a
    // register each time.
    const uint32_t zero = Levels ? threadIdx.x >> 10 : 0;
    return ptx::permute_bytes(ptx::permute_bytes(t[0] | zero, t[1], in_half),
                              ptx::permute_bytes(t[2] | zero, t[3], in_half), half);
  }
};

}  // namespace jax_qgemm
