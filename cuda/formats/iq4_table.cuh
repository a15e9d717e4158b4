// The 16 levels of iq4_nl and iq4_xs (ggml's kvalues_iq4nl), biased to be unsigned.
#pragma once

#include "formats/format.cuh"

namespace jax_qgemm {

constexpr int kIQ4Zero = 128;

QG_HD constexpr uint8_t iq4_level(int code) {
  constexpr int8_t kValues[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
  return static_cast<uint8_t>(kValues[code] + kIQ4Zero);
}

}  // namespace jax_qgemm
