// How gemm_sm90_a8 divides a product.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "kernels/gemm_sm90_config.cuh"

namespace jax_qgemm {

struct GemmSm90A8Config {
  int tokens, blocks;

  int row_tiles() const { return 8 * blocks; }
  int stage_tiles() const { return 2; }
};

// Estimated cycles, from measurements on an H200. group: as the kernel's.
inline double gemm_sm90_a8_cycles(const GemmSm90Shape& s, const GemmSm90A8Config& c, int group, int clusters) {
  constexpr double kL2Bytes = 28;                    // a cycle and multiprocessor
  constexpr double kDecode = 260;                    // of 64 rows of w by 128 k
  constexpr double kGroupDecode = 100;               // the same beside sums of groups,
  constexpr double kAdded = 1.5, kToken = 0.9;       // which take as much a token: each of them, and 128 k
  constexpr double kPerToken = 10, kPerTile = 1500;  // to store a tile, and to fill the pipeline
  const double tensor_cores = 2 * c.blocks * 4 * (c.tokens / 2 + 18);  // of two warpgroups and 128 k
  const double instructions =
      2 * c.blocks * (group ? kGroupDecode + c.tokens * (kToken + kAdded * 128 / group) : kDecode);
  const double l2 = (c.tokens * 128 / 2 + c.row_tiles() * kTileN * 128 * s.bits / 8) / kL2Bytes;
  const double tile = static_cast<double>(divide_up(s.k, 128)) * std::max({tensor_cores, instructions, l2});
  const double store = c.blocks * kPerToken * c.tokens + kPerTile;
  const GemmSm90Split split(s, c, clusters);
  return static_cast<double>(divide_up(split.whole, clusters)) * (tile + store) +
         (split.items > split.whole ? tile / 2 + store : 0);
}

inline GemmSm90A8Config choose_gemm_sm90_a8(const GemmSm90Shape& s, int group, int clusters) {
  const auto best = [&](std::initializer_list<GemmSm90A8Config> configs) {
    return *std::min_element(configs.begin(), configs.end(), [&](const auto& a, const auto& b) {
      return gemm_sm90_a8_cycles(s, a, group, clusters) < gemm_sm90_a8_cycles(s, b, group, clusters);
    });
  };
  // Sums in float32 beside those of a group leave less room.
  return group ? best({{64, 1}, {128, 1}, {192, 1}}) : best({{64, 1}, {128, 1}, {256, 1}, {128, 2}});
}

}  // namespace jax_qgemm
