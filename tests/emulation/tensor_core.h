// What a tensor core makes of 16 products and an accumulator: every one of them is aligned to the largest exponent and
// cut off toward zero, a bit or two further down than float32, and so is their sum, to float32. GPUs before Hopper take
// 8 products at a time. (Fasi, Higham, Mikaitis, Pranesh, "Numerical behavior of NVIDIA tensor cores", 2021; Xie et
// al., "MMA-Sim", arXiv:2511.10909, where the widths are from.)
#pragma once

#include <cstdint>

namespace emulation {

struct Operand {
  float value;
  int16_t exponent;
};

// 16 of them, a row of a or a column of b.
struct Operands {
  float values[16];
  int16_t exponents[16];

  void set(int k, Operand operand) { values[k] = operand.value, exponents[k] = operand.exponent; }
};

// An f16 or bf16 number. Its exponent is that of its bits: subnormal numbers are aligned as the smallest normal one.
Operand operand(uint32_t bits, bool is_bf16);

// c + a * b
float fused_sum(float c, const Operands& a, const Operands& b);

}  // namespace emulation
