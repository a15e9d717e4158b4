// The order in which gemm_sm90 computes the tiles of a result.
#pragma once

#include "kernels/product.h"

namespace jax_qgemm {

// Thread blocks take items in turn, so neighbouring items are computed at the same time. They are neighbours in both
// directions, that the tiles of x and of w which they read be few: all rows of n of `group` blocks of tokens, blocks of
// tokens fastest.
struct GemmSm90Walk {
  struct Tile {
    int batch, row_block, token_block;
  };

  int cluster;                          // thread blocks: 1, or 2 that take a block of rows each
  int tile_rows, k_tiles, k_blocks;     // of a weight, as stored
  int stages, whole_stages;             // of k; rounded up to whole rounds of the rings in registers
  int row_blocks, token_blocks, group;  // of the result, of a cluster's rows; blocks of tokens side by side
  int items_per_batch, items;

  // Items of a thread block.
  QG_HD int first(unsigned block) const { return static_cast<int>(block) / cluster; }
  QG_HD int stride(unsigned blocks) const { return static_cast<int>(blocks) / cluster; }

  // That of block `rank` of the cluster.
  QG_HD Tile tile(int item, int rank) const {
    const int batch = item / items_per_batch, in_batch = item - batch * items_per_batch;
    const int first = in_batch / (row_blocks * group) * group, in_group = in_batch - first * row_blocks;
    const int width = token_blocks - first < group ? token_blocks - first : group;
    return {batch, in_group / width * cluster + rank, first + in_group % width};
  }
};

}  // namespace jax_qgemm
