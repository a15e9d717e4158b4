// What a tensor core makes of 32 bytes of products and an accumulator: every one of them is aligned to the largest
// exponent and cut off toward zero, a bit or two further down than float32, and so is their sum, to float32. GPUs
// before Hopper take 8 products at a time. Of 8-bit floats, Hopper keeps 13 bits behind the leading one, of what is
// aligned and of the sum. (Fasi, Higham, Mikaitis, Pranesh, "Numerical behavior of NVIDIA tensor cores", 2021; Xie et
// al., "MMA-Sim", arXiv:2511.10909, where the widths are from; DeepSeek-AI, "DeepSeek-V3 Technical Report",
// arXiv:2412.19437, section 3.3, finds about 14 bits too.) Sums of integers are exact, modulo 2^32.
#pragma once

#include <cstdint>

namespace emulation {

struct Operand {
  float value;
  int16_t exponent;
};

// Those of 32 bytes, a row of a or a column of b.
template <int Count>
struct OperandRow {
  float values[Count];
  int16_t exponents[Count];

  void set(int k, Operand operand) { values[k] = operand.value, exponents[k] = operand.exponent; }
};
using Operands = OperandRow<16>;
using Fp8Operands = OperandRow<32>;
struct Int8Operands {
  int16_t values[32];
};

// An f16 or bf16 number. Its exponent is that of its bits: subnormal numbers are aligned as the smallest normal one.
Operand operand(uint32_t bits, bool is_bf16);
// A float8_e4m3fn.
Operand fp8_operand(uint8_t bits);

// c + a * b
float fused_sum(float c, const Operands& a, const Operands& b);
float fused_sum(float c, const Fp8Operands& a, const Fp8Operands& b);
int32_t fused_sum(int32_t c, const Int8Operands& a, const Int8Operands& b);

}  // namespace emulation
