// The planes of a weight as the copy engine brings them, a box of each a stage: see StagedWeight.
#pragma once

#include "tile/staged_weight.cuh"
#include "tile/tensor_map.cuh"
#include "tile/tma.cuh"

namespace jax_qgemm {

// Of a product: x and the planes of w.
struct ProductMaps {
  CUtensorMap x, planes[kMaxPlanes];
};

struct PlaneBoxes {
  int columns[kMaxPlanes], stages_log[kMaxPlanes];  // 8 bytes wide each; logarithm of the stages that a box serves
  int bytes;                                        // of all boxes of a stage
};

// row_tiles: of a box; stage_tiles: of 64 k, a stage.
template <class F>
PlaneBoxes plane_boxes(const Weight& w, int row_tiles, int stage_tiles) {
  PlaneBoxes boxes = {};
  for (int i = 0; i < kPlaneCount<F>; ++i) {
    const PlaneBlock block = plane_block<F>(i, w.group);
    boxes.columns[i] = block.box_bytes(stage_tiles) / 8;
    for (int tiles = stage_tiles; tiles < block.tiles; tiles *= 2) ++boxes.stages_log[i];
    if (w.has_plane(i)) boxes.bytes += row_tiles * boxes.columns[i] * 8;
  }
  return boxes;
}

// Describes the planes to the copy engine. Returns what went wrong, or nullptr.
template <class F>
const char* encode_planes(CUtensorMap* maps, const Product& p, const PlaneBoxes& boxes, int row_tiles) {
  const char* problem = nullptr;
  for (int i = 0; i < kPlaneCount<F> && !problem; ++i) {
    if (!p.w.has_plane(i)) continue;
    const PlaneBlock block = plane_block<F>(i, p.w.group);
    const bool per_channel = F::kGroup == 0 && p.w.group == 0 && i >= kCodePlanes<F>;
    const int64_t blocks = per_channel ? 1 : p.w.k_blocks * (k_block_of<F>(p.w) / kTileK) / block.tiles;
    problem = encode_bytes(&maps[i], p.w.planes[i], p.stack.weights * p.tile_rows(), blocks * block.bytes, row_tiles,
                           boxes.columns[i] * 8);
  }
  return problem;
}

// Has a stage brought, from row of tiles `tile_row` on. Staged: where each plane goes.
template <class F, class Staged, class Barrier>
__device__ __forceinline__ void load_planes(const Weight& w, const PlaneBoxes& boxes, const CUtensorMap* maps,
                                            ptx::SharedAddress to, int stage, int tile_row, Barrier barrier) {
  for_each_plane<F>(w, [&]<int I>() __attribute__((always_inline)) {
    ptx::load_box(to + Staged::first(I), maps + I, (stage >> boxes.stages_log[I]) * boxes.columns[I], tile_row,
                  barrier);
  });
}

}  // namespace jax_qgemm
