// The order in which gemm_sm90 computes the tiles of a result, and where it finds what they are made of.
#pragma once

#include "tile/plane_boxes.cuh"

namespace jax_qgemm {

// Clusters of two thread blocks take items in turn, so neighbouring items are computed at the same time. They are
// neighbours in both directions, that the tiles of x and of w which they read be few: all rows of n of `group` blocks
// of tokens, blocks of tokens fastest.
//
// An item is a pair of tiles, one a thread block, that share their rows of x. Where the last turn would leave most of
// the clusters without one, each of its tiles is an item, whose k the two thread blocks split.
struct GemmSm90Walk {
  struct Tile {
    int batch, row_block, token_block;
    bool split;
    int first_stage, last_stage;
  };

  int stages;                           // of k
  int row_blocks, token_blocks, group;  // of the result; blocks of tokens side by side
  int pairs_per_batch;
  int whole, items;  // pairs that are an item; all items
  // Of a weight, as stored.
  int tile_rows;
  PlaneBoxes boxes;

  // That of block `rank` of the cluster.
  QG_HD Tile tile(int item, int rank) const {
    const bool split = item >= whole;
    const int pair = split ? whole + (item - whole) / 2 : item, side = split ? (item - whole) % 2 : rank;
    const int batch = pair / pairs_per_batch, in_batch = pair - batch * pairs_per_batch;
    const int row_pairs = (row_blocks + 1) / 2;
    const int first = in_batch / (row_pairs * group) * group, in_group = in_batch - first * row_pairs;
    const int width = token_blocks - first < group ? token_blocks - first : group;
    const int half = (stages + 1) / 2;
    return {batch, in_group / width * 2 + side,   first + in_group % width,
            split, split && rank == 1 ? half : 0, split && rank == 0 ? half : stages};
  }
  // The second tile of a pair may not exist. Its thread block computes it nevertheless, for the sake of the other.
  QG_HD bool skipped(const Tile& tile) const { return tile.split && tile.row_block >= row_blocks; }
  // Whether a cluster's last item is one of a split k. It has at most one of them.
  QG_HD bool ends_split(int cluster, int clusters) const {
    const int last = cluster + (items - 1 - cluster) / clusters * clusters;
    return last >= whole && !skipped(tile(last, 0));
  }
};

}  // namespace jax_qgemm
