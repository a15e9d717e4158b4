#include "tensor_core.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace emulation {

namespace {

// Of zero, and of what is not finite: out of the way of all others and their sums, and so is the sum of the two.
constexpr int kOfZero = -1000, kOfInfinity = 4000, kFar = 500;

int exponent_of(uint32_t magnitude, int mantissa_bits, int bias) {
  const auto exponent = static_cast<int>(magnitude >> mantissa_bits);
  if (magnitude == 0) return kOfZero;
  return exponent > 2 * bias ? kOfInfinity : std::max(exponent, 1) - bias;
}

double power_of_two(int exponent) {
  const uint64_t bits = static_cast<uint64_t>(1023 + exponent) << 52;
  double power;
  memcpy(&power, &bits, sizeof power);
  return power;
}

float cut_to_float(double value, int mantissa_bits) {
  uint64_t bits;
  memcpy(&bits, &value, sizeof bits);
  bits &= ~uint64_t{0} << (52 - mantissa_bits);
  memcpy(&value, &bits, sizeof value);
  return static_cast<float>(value);
}

template <int Products>
float fused_sum_of(float c, const float* a, const int16_t* a_exponents, const float* b, const int16_t* b_exponents,
                   int fraction_bits, int mantissa_bits) {
  double products[Products];
  int16_t largest = kOfZero;
  for (int k = 0; k < Products; ++k) {
    products[k] = static_cast<double>(a[k]) * b[k];
    largest = std::max<int16_t>(largest, static_cast<int16_t>(a_exponents[k] + b_exponents[k]));
  }
  const int exponent = std::max<int>(largest, exponent_of(__float_as_uint(c) & 0x7fffffffu, 23, 127));
  if (exponent <= -kFar || exponent >= kFar) {
    double sum = c;
    for (double product : products) sum += product;
    return static_cast<float>(sum);
  }
  // An aligned product is below 2^27, and no sum of them here reaches 2^31.
  const double scale = power_of_two(fraction_bits - exponent);
  int sums[4] = {static_cast<int>(c * scale)};
  for (int k = 0; k < Products; ++k) sums[k % 4] += static_cast<int>(products[k] * scale);
  const int64_t sum = int64_t{sums[0]} + sums[1] + sums[2] + sums[3];
  return cut_to_float(static_cast<double>(sum) * power_of_two(exponent - fraction_bits), mantissa_bits);
}

}  // namespace

Operand operand(uint32_t bits, bool is_bf16) {
  const auto low = static_cast<uint16_t>(bits);
  const uint32_t magnitude = low & 0x7fffu;
  if (is_bf16) return {__bfloat162float({low}), static_cast<int16_t>(exponent_of(magnitude, 7, 127))};
  return {__half2float({low}), static_cast<int16_t>(exponent_of(magnitude, 10, 15))};
}

Operand fp8_operand(uint8_t bits) {
  const int magnitude = bits & 0x7f, exponent = magnitude >> 3, mantissa = magnitude & 7;
  if (magnitude == 0x7f) return {std::numeric_limits<float>::quiet_NaN(), kOfInfinity};
  const float value = std::ldexp(static_cast<float>(exponent ? 8 + mantissa : mantissa), std::max(exponent, 1) - 10);
  const int scale = magnitude == 0 ? kOfZero : std::max(exponent, 1) - 7;
  return {bits & 0x80 ? -value : value, static_cast<int16_t>(scale)};
}

float fused_sum(float c, const Operands& a, const Operands& b) {
  if (device.major >= 9) return fused_sum_of<16>(c, a.values, a.exponents, b.values, b.exponents, 25, 23);
  for (int k = 0; k < 16; k += 8) {
    c = fused_sum_of<8>(c, a.values + k, a.exponents + k, b.values + k, b.exponents + k, 24, 23);
  }
  return c;
}

float fused_sum(float c, const Fp8Operands& a, const Fp8Operands& b) {
  return fused_sum_of<32>(c, a.values, a.exponents, b.values, b.exponents, 13, 13);
}

int32_t fused_sum(int32_t c, const Int8Operands& a, const Int8Operands& b) {
  int32_t products = 0;
  for (int k = 0; k < 32; ++k) products += a.values[k] * b.values[k];
  return static_cast<int32_t>(static_cast<uint32_t>(c) + static_cast<uint32_t>(products));
}

}  // namespace emulation
