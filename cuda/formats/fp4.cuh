// Formats of 4-bit floats (e2m1, OCP Microscaling Formats v1.0): 16 values, doubled to be integers, and biased to be
// unsigned, times an 8-bit float scale that is halved to match.
#pragma once

#include "formats/format.cuh"

namespace jax_qgemm {

struct FP4 {
  static constexpr int kKBlock = 64, kLowBits = 4, kHighBits = 0;
  static constexpr bool kHasMinimum = false, kHasTable = true, kIsE2M1 = true;
  static constexpr int kZero = 12;

  QG_HD static constexpr uint8_t table(int code) {
    constexpr int8_t kValues[8] = {0, 1, 2, 3, 4, 6, 8, 12};
    return static_cast<uint8_t>(code < 8 ? kZero + kValues[code] : kZero - kValues[code - 8]);
  }
  QG_HD static uint32_t levels(uint32_t codes) { return table_levels<FP4>(codes); }
};

}  // namespace jax_qgemm
