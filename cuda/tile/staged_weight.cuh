// Weights in shared memory, where the copy engine brings them: of each plane a box, of some rows of tiles by a stage of
// k, that lies there as [row of tiles][bytes].
#pragma once

#include <iterator>

#include "formats/format.cuh"
#include "tile/lane_codes.cuh"

namespace jax_qgemm {

// The smallest part of a plane along k: tiles of 64 k, and bytes of a row of tiles. Of per-channel values it is all of
// k.
struct PlaneBlock {
  int tiles, bytes;

  // Of a stage of `stage_tiles`, which is a whole number of blocks or a part of one.
  constexpr int box_bytes(int stage_tiles) const { return tiles < stage_tiles ? stage_tiles / tiles * bytes : bytes; }
};

// Planes of a weight, with the zero points that an integer format may have.
template <class F>
constexpr int kPlaneCount = static_cast<int>(std::size(F::kPlanes)) + (F::kGroup == 0);
template <class F>
constexpr int kCodePlanes = F::kHighBits ? 2 : 1;

// group: elements of k per scale, of an integer format.
template <class F>
constexpr PlaneBlock plane_block(int plane, int group) {
  if (plane < kCodePlanes<F>) return {1, 128 * (plane == 0 ? F::kLowBits : F::kHighBits)};
  if constexpr (F::kGroup == 0) {
    const int bits = plane == F::kScales ? 16 : 8;
    if (group == 0) return {1 << 24, 2 * bits};
    return group < kTileK ? PlaneBlock{1, 2 * bits * (kTileK / group)} : PlaneBlock{group / kTileK, 2 * bits};
  } else {
    return {F::kKBlock / kTileK, 2 * F::kPlanes[plane].bits * (F::kKBlock / F::kPlanes[plane].group)};
  }
}

// function.operator()<I>() for each plane I that the weight has.
template <class F, int I = 0, class Function>
__device__ __forceinline__ void for_each_plane(const Weight& w, const Function& function) {
  if constexpr (I < kPlaneCount<F>) {
    if (w.has_plane(I)) function.template operator()<I>();
    for_each_plane<F, I + 1>(w, function);
  }
}

// A lane's two rows of a row of tiles. Tiles: of a stage; Span: k-steps of 16 that share a scale, at most the 4 of a
// tile. RowTiles: of a box.
template <class F, int Tiles, int Span, int RowTiles>
class StagedWeight {
  static constexpr bool kIsInteger = F::kGroup == 0;
  static constexpr int kGroups = kPlaneCount<F> - kCodePlanes<F>;
  // consteval, here and below: F::kPlanes is not in the device's memory.
  static consteval PlaneBlock block(int plane) { return plane_block<F>(plane, Span == 2 ? 32 : 64); }

  // 32-bit words of a lane and tile of group plane i, and where they begin.
  static consteval int words(int i) {
    const PlaneBlock b = block(kCodePlanes<F> + i);
    const int bytes = b.bytes / 8 / b.tiles;
    return bytes < 4 ? 1 : bytes / 4;
  }
  static consteval int offset(int i) {
    int sum = 0;
    for (int j = 0; j < i && j < kGroups; ++j) sum += words(j);
    return sum;
  }

 public:
  // Where the box of a plane begins in a stage, and how much that takes. The boxes of integer formats may be smaller.
  static consteval int first(int plane) {
    int sum = 0;
    for (int i = 0; i < plane; ++i) sum += RowTiles * block(i).box_bytes(Tiles);
    return sum;
  }
  static constexpr int kBytes = first(kPlaneCount<F>);

  struct Tile {
    LaneCodes<F> codes;
    uint32_t raw[offset(kGroups)];

    // The reader's side of affine_at(); plane and index are constants once loops are unrolled.
    template <class T>
    __device__ __forceinline__ Pair<T> pair(int plane, int index) const {
      constexpr int kOffsets[] = {0, offset(1), offset(2), offset(3)};
      const uint32_t word = raw[kOffsets[plane - kCodePlanes<F>] + index * static_cast<int>(sizeof(T)) / 4];
      if constexpr (sizeof(T) == 2) return {{static_cast<T>(word), static_cast<T>(word >> 16)}};
      const int shift = index % 4 * 8;
      return {{static_cast<T>(word >> shift), static_cast<T>(word >> (shift + 8))}};
    }

    // Of a k-step.
    __device__ __forceinline__ AffinePair affine(const Weight& w, int step) const {
      if constexpr (kIsInteger) {
        return F::affine_at(IntegerReader{*this, w}, step / Span * 2, 0);
      } else {
        return F::affine_at(*this, step / Span * 2, 0);
      }
    }
  };

  StagedWeight() = default;
  // row: of the box; boxes: as many times the rows of tiles that kBytes is for.
  __device__ __forceinline__ StagedWeight(const Weight& w, int row, int lane, int boxes = 1) {
    place<0>(w, row, lane, boxes);
  }

  // Keeps the compiler from computing it all again wherever it is used.
  __device__ __forceinline__ void pin() {
#pragma unroll
    for (int& offset : from) offset = ptx::opaque(offset);
  }

  // tile: of the stage; k_tile: of all.
  __device__ __forceinline__ void load(Tile& out, ptx::SharedAddress stage, int tile, int k_tile) const {
    load_codes_of(out.codes, stage, tile);
    load_groups<0>(out, stage, tile, k_tile);
  }
  // What affine() needs alone, of an integer format.
  __device__ __forceinline__ void load_affine(Tile& out, ptx::SharedAddress stage, int tile) const {
    static_assert(kIsInteger);
    load_groups<0>(out, stage, tile, 0);
  }
  __device__ __forceinline__ void load_codes_of(LaneCodes<F>& out, ptx::SharedAddress stage, int tile) const {
    load_codes(out.low, stage + from[0] + tile * (128 * F::kLowBits));
    if constexpr (F::kHighBits != 0) load_codes(out.high, stage + from[1] + tile * (128 * F::kHighBits));
  }
  // Where a plane's values of the lane's rows begin.
  __device__ __forceinline__ ptx::SharedAddress values(int plane, ptx::SharedAddress stage) const {
    return stage + from[plane];
  }

 private:
  template <int I>
  __device__ __forceinline__ void place(const Weight& w, int row, int lane, int boxes) {
    constexpr int kFirst = first(I), kGroup = I - kCodePlanes<F>;
    constexpr PlaneBlock kBlock = block(I);
    if constexpr (kGroup < 0) {
      constexpr int kBits = kBlock.bytes / 128;
      from[I] = kFirst * boxes + row * kBlock.box_bytes(Tiles) + lane * 4 * (kBits < 4 ? kBits : 4);
    } else {
      // A plane that is not there is not copied either; what is read in its place is not used.
      PlaneBlock b = kBlock;
      if constexpr (kIsInteger) b = plane_block<F>(I, w.group);
      from[I] = kFirst * boxes + row * b.box_bytes(Tiles) + lane / 4 * (b.bytes / 8);
      integer_step[kGroup] = b.tiles == 1 ? b.bytes : 0;
    }
    if constexpr (I + 1 < kPlaneCount<F>) place<I + 1>(w, row, lane, boxes);
  }

  struct IntegerReader {
    const Tile& tile;
    const Weight& w;
    // Never float32, so that there is no branch for it.
    ScaleType scale_type = w.scale_type == ScaleType::kBF16 ? ScaleType::kBF16 : ScaleType::kF16;

    __device__ __forceinline__ bool has_plane(int plane) const { return w.has_plane(plane); }
    template <class T>
    __device__ __forceinline__ Pair<T> pair(int plane, int index) const {
      return tile.template pair<T>(plane, index);
    }
  };

  template <int Bits>
  __device__ __forceinline__ static void load_codes(LanePlane<Bits>& plane, ptx::SharedAddress at) {
    constexpr int kPiece = Bits < 4 ? Bits : 4;
#pragma unroll
    for (int i = 0; i < Bits; i += kPiece) ptx::load_shared<kPiece>(plane.words + i, at + i * 128);
  }

  template <int I>
  __device__ __forceinline__ void load_groups(Tile& out, ptx::SharedAddress stage, int tile, int k_tile) const {
    if constexpr (I < kGroups) {
      constexpr PlaneBlock b = block(kCodePlanes<F> + I);
      int at = from[kCodePlanes<F> + I];
      if constexpr (kIsInteger) {
        at += tile * integer_step[I];
      } else if constexpr (b.tiles == 1) {
        at += tile * b.bytes;
      } else if constexpr (b.bytes / 8 / b.tiles >= 4) {
        at += k_tile % b.tiles * (b.bytes / 8 / b.tiles);
      }
      if constexpr (kIsInteger && I == 1 && Span != 2) {
        out.raw[offset(I)] = ptx::load_shared_half(stage + at);
      } else {
        ptx::load_shared<words(I)>(out.raw + offset(I), stage + at);
      }
      load_groups<I + 1>(out, stage, tile, k_tile);
    }
  }

  int from[kPlaneCount<F>];
  int integer_step[kGroups];  // from a tile's values to the next tile's
};

}  // namespace jax_qgemm
