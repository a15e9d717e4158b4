// From planes to float32 values, in the permuted order of kernels.h. Included only by matmul_<instruction set>.cc.
#pragma once

#include <type_traits>

#include "formats/tile_codes.cuh"
#include "host/vector.h"

namespace jax_qgemm::host::QG_ISA {

// Scales, minimums and zero points of a tile row for kTiles tiles of k, in the order of the group planes.
template <class F>
struct Affines {
  static constexpr bool kFixed = F::kGroup != 0;  // else the group size is a run-time value, and there are zero points
  static constexpr int kGroup = kFixed ? F::kGroup : 16;
  static constexpr int kTiles = kFixed ? F::kKBlock / kTileK : 1;
  static constexpr int kGroups = kTiles * kTileK / kGroup;

  using Values = float[8][kGroups][2];
  struct Absent {};
  alignas(64) Values scale;
  std::conditional_t<F::kHasMinimum, Values, Absent> minimum;
  std::conditional_t<kFixed, Absent, Values> zero;  // minus F::kZero
  int64_t loaded = -1;                              // where the values of an integer format came from

  QG_INLINE void set(int g, int j, const AffinePair& pair) {
    for (int h = 0; h < 2; ++h) {
      scale[g][j][h] = pair.row[h].scale;
      if constexpr (F::kHasMinimum) minimum[g][j][h] = pair.row[h].minimum;
      if constexpr (!kFixed) zero[g][j][h] = static_cast<float>(pair.row[h].zero - F::kZero);
    }
  }

  // `tile` is the first of kTiles.
  QG_INLINE void load(const Weight& w, int64_t tile_row, int64_t tile) {
    if constexpr (kFixed) {
      const int64_t row = (tile_row * w.k_blocks + tile / kTiles) * 8;
      for (int g = 0; g < 8; ++g) {
        for (int j = 0; j < kGroups; ++j) set(g, j, F::affine_at(w, ((row + g) * kGroups + j) * 2, (row + g) * 2));
      }
    } else {
      const int64_t groups = w.group && w.group < kTileK ? kTileK / w.group : 1;  // in a k-block
      const int64_t block = w.group ? tile * kTileK / (w.group * groups) : 0;
      const int64_t row = (tile_row * (w.group ? w.k_blocks : 1) + block) * 8;
      if (row == loaded) return;
      loaded = row;
      for (int g = 0; g < 8; ++g) {
        const AffinePair first = F::affine_at(w, (row + g) * groups * 2, 0);
        for (int j = 0; j < kGroups; ++j) {
          set(g, j, groups == 1 ? first : F::affine_at(w, ((row + g) * groups + j * groups / kGroups) * 2, 0));
        }
      }
    }
  }

  // For row g + 8h: the values of tile `tile` of kTiles, a lane for every word [t][s].
  static QG_INLINE Floats lanes(const Values& values, int g, int h, int tile) {
    constexpr Words index = each_lane([](int i) { return i % 4 * 16 / kGroup * 2; });
    const float* first = values[g][tile * kTileK / kGroup];
    return (Floats)spread<kTileK / kGroup * 2>(first, index + static_cast<uint32_t>(h));
  }
};

// The codes of rows g and g+8 of a tile of one plane, words [t][s] of four bytes. Prefetches those `ahead` tiles on.
template <int Bits>
QG_INLINE void plane_rows(const void* plane, int64_t tile, int64_t ahead, int g, Words (&out)[2][kTileVectors]) {
  const auto* words = static_cast<const uint32_t*>(plane) + tile * (32 * Bits);
  constexpr uint32_t kMask = 0x01010101u * ((1u << Bits) - 1);
  constexpr int kParts = Bits == 8 ? 2 : 1;
  for (int i = 0; i < kParts; ++i) {
    __builtin_prefetch(words + ahead * (32 * Bits) + i * 128 + g * (4 * Bits / kParts));
  }
  for (int j = 0; j < kTileVectors; ++j) {
    if constexpr (Bits == 8) {
      // Words 2s+h, s = 0, 1 in the first half of the tile and s = 2, 3 in the second.
      const auto a = load<Words>(words + g * 16 + j * kWidth), b = load<Words>(words + 128 + g * 16 + j * kWidth);
      constexpr Words even = each_lane([](int i) { return i / 4 * 4 + i % 2 * 2 + (i % 4 < 2 ? 0 : kWidth); });
      out[0][j] = shuffle(a, b, even);
      out[1][j] = shuffle(a, b, even + 1);
    } else if constexpr (Bits == 4) {
      const auto v = load<Words>(words + g * 16 + j * kWidth);
      out[0][j] = v & kMask;
      out[1][j] = v >> 4 & kMask;
    } else {
      // A word holds the runs of kShare values of s, two rows each.
      constexpr int kShare = 4 / Bits;
      constexpr Words index = each_lane([](int i) { return i / kShare; });
      constexpr Words shift = each_lane([](int i) { return i % kShare * 2 * Bits; });
      const auto v = spread<kWidth / kShare>(words + (g * 16 + j * kWidth) / kShare, index);
      out[0][j] = v >> shift & kMask;
      out[1][j] = v >> (shift + Bits) & kMask;
    }
  }
}

// level - zero of four elements a word, as signed bytes.
template <class F>
QG_INLINE Bytes signed_levels(Words codes) {
  if constexpr (F::kHasTable) {
    static constexpr struct Table {
      uint8_t entry[4 * kWidth];
      constexpr Table() : entry() {
        for (int i = 0; i < 4 * kWidth; ++i) entry[i] = static_cast<uint8_t>(F::table(i % 16) - F::kZero);
      }
    } kTable;
    return look_up(kTable.entry, codes);
  } else {
    return (Bytes)F::levels(codes) - static_cast<uint8_t>(F::kZero);
  }
}

// Calls sink(row, position, values) for the 16 rows of tiles [first, last), which are whole k-blocks. The kWidth values
// from a position on are permuted; positions count from the first tile. Every value is the format's own, to the bit.
template <class F, class Sink>
QG_INLINE void decode_tiles(const Weight& w, int64_t tile_row, int64_t first, int64_t last, int64_t ahead,
                            Sink&& sink) {
  using A = Affines<F>;
  const int64_t tiles = w.k_blocks * (k_block_of<F>(w) / kTileK);
  A affines;
  for (int64_t block = first; block < last; block += A::kTiles) {
    affines.load(w, tile_row, block);
    for (int i = 0; i < A::kTiles; ++i) {
      const int64_t tile = tile_row * tiles + block + i, position = (block - first + i) * kTileK;
      for (int g = 0; g < 8; ++g) {
        Words codes[2][kTileVectors];
        plane_rows<F::kLowBits>(w.planes[0], tile, ahead, g, codes);
        if constexpr (F::kHighBits != 0) {
          Words high[2][kTileVectors];
          plane_rows<F::kHighBits>(w.planes[1], tile, ahead, g, high);
          for (int h = 0; h < 2; ++h) {
            for (int j = 0; j < kTileVectors; ++j) codes[h][j] |= high[h][j] << F::kLowBits;
          }
        }
        for (int h = 0; h < 2; ++h) {
          const Floats scale = A::lanes(affines.scale, g, h, i);
          Floats minimum{}, zero{};
          if constexpr (F::kHasMinimum) minimum = A::lanes(affines.minimum, g, h, i);
          if constexpr (!A::kFixed) zero = A::lanes(affines.zero, g, h, i);
          Ints levels[kTileVectors];
          for (int j = 0; j < kTileVectors; ++j) levels[j] = (Ints)signed_levels<F>(codes[h][j]);
          for (int e = 0; e < 4; ++e) {
            for (int j = 0; j < kTileVectors; ++j) {
              Floats value = __builtin_convertvector(levels[j] << (24 - 8 * e) >> 24, Floats);
              if constexpr (!A::kFixed) value -= zero;
              value *= scale;
              if constexpr (F::kHasMinimum) value += minimum;
              sink(g + 8 * h, position + 16 * e + kWidth * j, value);
            }
          }
        }
      }
    }
  }
}

}  // namespace jax_qgemm::host::QG_ISA
