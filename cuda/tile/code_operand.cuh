// Codes of integer weights as the A operand of a wgmma of 8 bits, whose lane t has 4t to 4t + 3 of 16 k.
#pragma once

#include "formats/tile_codes.cuh"
#include "tile/ptx.cuh"

namespace jax_qgemm {

// The codes of a tile that a lane multiplies. In fragment order lanes t and t + 1, t even, have 2t to 2t + 3 and 2t + 8
// to 2t + 11 of each 16 k: a lane reads the words of both and takes half of the bytes of each.
template <int Bits>
class PairedCodes {
 public:
  // tile: where its codes begin.
  __device__ __forceinline__ void load(ptx::SharedAddress tile, int lane) {
    const ptx::SharedAddress at = tile + (lane / 4 * 4 + lane % 2 * 2) * 16;
#pragma unroll
    for (int i = 0; i < Bits; i += 4) {
      ptx::load_shared<4>(first + i, at + i * 128);
      ptx::load_shared<4>(second + i, at + i * 128 + 16);
    }
  }

  // selector(lane) is constant; word: as LanePlane<Bits> counts them.
  __device__ __forceinline__ static uint32_t selector(int lane) { return lane % 4 < 2 ? 0x6420 : 0x7531; }
  __device__ __forceinline__ uint32_t word(int word, uint32_t selector) const {
    return __byte_perm(first[word], second[word], selector);
  }

 private:
  uint32_t first[Bits], second[Bits];
};

// Differences of levels of 4 bits and their zero points: of the low or the high halves of the bytes of a word, four of
// a row. zeros: in each byte.
//
// Level + 128 - zero needs no carry; that flips the sign bit of a difference in two's complement.
struct Int8Codes {
  using Sum = int;
  static constexpr bool kIsFp8 = false;
  static constexpr float kUnit = 1.0f;  // of a sum

  __device__ __forceinline__ static uint32_t low(uint32_t word, uint32_t zeros) {
    return biased(word, zeros) ^ 0x80808080u;
  }
  __device__ __forceinline__ static uint32_t high(uint32_t word, uint32_t zeros) { return low(word >> 4, zeros); }
  __device__ __forceinline__ static uint32_t biased(uint32_t word, uint32_t zeros) {
    return ptx::and_or<0x0f0f0f0fu>(word, 0x80808080u) - zeros;
  }
};

// Where all zero points are 8: 16 times the difference is a level in the high half of a byte, its highest bit flipped.
struct Int8SymmetricCodes : Int8Codes {
  static constexpr float kUnit = 0x1p-4f;

  __device__ __forceinline__ static uint32_t low(uint32_t word, uint32_t) { return high(word << 4, 0); }
  __device__ __forceinline__ static uint32_t high(uint32_t word, uint32_t) {
    return ptx::and_xor<0xf0f0f0f0u>(word, 0x80808080u);
  }
};

// As float8_e4m3fn, whose exponent fields 0 and 1 are one linear range: the bits of an integer below 16 are that
// integer times 2^-9.
struct Fp8Codes {
  using Sum = float;
  static constexpr bool kIsFp8 = true;
  static constexpr float kUnit = 0x1p9f;

  __device__ __forceinline__ static uint32_t low(uint32_t word, uint32_t zeros) {
    const uint32_t biased = Int8Codes::biased(word, zeros), sign = ~biased & 0x80808080u, one = sign >> 7;
    // 128 - biased is (biased ^ 127) + 1.
    return ptx::and_xor<0x7f7f7f7fu>(biased, sign - one) + one + sign;
  }
  __device__ __forceinline__ static uint32_t high(uint32_t word, uint32_t zeros) { return low(word >> 4, zeros); }
};

// a: of k-step `step`, 0 or 1, of 32 of the tile's 64 k. zeros: of rows g and g + 8, in each byte; codes of 8 bits have
// none.
template <class X, int Bits>
__device__ __forceinline__ void decode_codes(uint32_t (&a)[4], const PairedCodes<Bits>& codes, int step,
                                             const uint32_t (&zeros)[2], uint32_t selector) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int k_step = 2 * step + half;  // of 16
    if constexpr (Bits == 8) {
      a[2 * half] = codes.word(2 * k_step, selector);
      a[2 * half + 1] = codes.word(2 * k_step + 1, selector);
    } else {
      const uint32_t word = codes.word(k_step, selector);
      a[2 * half] = X::low(word, zeros[0]);
      a[2 * half + 1] = X::high(word, zeros[1]);
    }
  }
}

}  // namespace jax_qgemm
