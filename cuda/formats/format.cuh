// What every weight format is made of: its planes, its codes and its per-group scale, for host and device alike.
//
// The layout is described in jax_qgemm/formats/layout.py. In short: a tile is 16 rows of n by 64 of k; lane 4g+t holds
// 8 runs of 4 codes, run 2s+h being row g+8h of k-step s, element e being k = 16s + 2t + (e>>1) + 8(e&1); a plane of b
// bits keeps run r in the lane's word r/(8/b), at bit b*(r%(8/b)) of each byte. Per-group values keep rows g, g+8 side
// by side.
//
// A format F is a struct of static members:
//   kPlanes                 the plane table, which tests compare with the Python one
//   kName, kBlock, kKBlock  as in jax_qgemm/formats/format.py (kKBlock 0: known at run time only)
//   kGroup                  elements of k that share a scale (0: known at run time only)
//   kLowBits, kHighBits     widths of the code planes (kHighBits 0: only one)
//   kHasMinimum             whether minimum() is ever non-zero
//   kTable                  for formats that decode by table: 16 unsigned values (zero() is what they are biased by)
//   kIsE2M1                 (optional) the table's values are twice the 4-bit floats whose bits the codes are
//   kZero                   zero of every group; integer formats with zero points: the middle of the levels
//   levels(codes)           four codes, a byte each -> four unsigned levels, a byte each (in every lane of a vector T)
//   affine_at(w, j, super)  the two Affine at index j of the group planes; `super` indexes planes of one value per 256.
//                           w is a Weight, or another reader with its pair(), has_plane() and scale_type
//   affine(w, i, g, s)      the two Affine of rows g and g+8 of tile row i at k-step s
// and the value of an element is scale * (level - zero) + minimum, rounded after each operation.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_fp16.h>

#include "tile/ptx.cuh"
#define QG_HD __host__ __device__ __forceinline__
#else
#define QG_HD inline __attribute__((always_inline))
#endif

namespace jax_qgemm {

constexpr int kLayoutVersion = 1;
constexpr int kTileN = 16;
constexpr int kTileK = 64;
constexpr int kMaxPlanes = 6;

// One plane: `bits` of every code from bit `shift` up, or (code false) a value of `bits` for every `group` elements of
// k.
struct PlaneSpec {
  const char* name;
  bool code;
  int bits;
  int shift;
  int group;
};

constexpr PlaneSpec code_plane(const char* name, int bits, int shift = 0) { return {name, true, bits, shift, 0}; }
constexpr PlaneSpec group_plane(const char* name, int bits, int group) { return {name, false, bits, 0, group}; }

enum class ScaleType : int32_t { kF16 = 0, kBF16 = 1, kF32 = 2 };

template <class T>
struct Pair {
  T v[2];
};

// The values of rows g and g+8, one aligned load.
template <class T>
QG_HD Pair<T> load_pair(const void* plane, int64_t index);

// A weight as kernels see it. Leading axes of a stack are folded into the tile rows.
struct Weight {
  const void* planes[kMaxPlanes];
  int64_t k_blocks;      // length of the planes' k axis
  int32_t group;         // integer formats: elements of k per scale, 0 is per channel
  ScaleType scale_type;  // integer formats

  QG_HD bool has_plane(int i) const { return planes[i] != nullptr; }
  template <class T>
  QG_HD Pair<T> pair(int plane, int64_t index) const {
    return load_pair<T>(planes[plane], index);
  }
};

struct Affine {
  float scale;
  int32_t zero;
  float minimum;
};

struct AffinePair {
  Affine row[2];  // rows g and g+8
};

// Products and sums that must not be contracted into an fma. The host is compiled with -ffp-contract=off.
QG_HD float mul_rn(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

QG_HD float add_rn(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

QG_HD float float_from_bits(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
#endif
}

QG_HD float f16_to_f32(uint16_t bits) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(bits));
#else
  // Masks instead of branches, so that loops over scales vectorize; no float32 subnormals, which XLA's threads flush.
  const uint32_t magnitude = bits & 0x7fffu;
  const uint32_t is_subnormal = 0u - (magnitude < 0x0400u), is_special = 0u - (magnitude >= 0x7c00u);
  const uint32_t quiet = (0u - (magnitude > 0x7c00u)) & 0x400000u;  // a NaN becomes quiet, as in hardware
  const uint32_t normal = (magnitude << 13) + (112u << 23) + (is_special & (112u << 23));
  const float subnormal = float_from_bits((magnitude << 13) + (113u << 23)) - 0x1p-14f;
  uint32_t subnormal_bits;
  memcpy(&subnormal_bits, &subnormal, sizeof subnormal_bits);
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  return float_from_bits(sign | quiet | (is_subnormal & subnormal_bits) | (~is_subnormal & normal));
#endif
}

QG_HD float bf16_to_f32(uint16_t bits) { return float_from_bits(static_cast<uint32_t>(bits) << 16); }

// The exact value of an element. Adding an absent minimum would turn -0 into 0.
template <class F>
QG_HD float value_of(const Affine& a, int level) {
  const float product = mul_rn(static_cast<float>(level - a.zero), a.scale);
  return F::kHasMinimum ? add_rn(product, a.minimum) : product;
}

template <class T>
QG_HD Pair<T> load_pair(const void* plane, int64_t index) {
  Pair<T> p;
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) == 1) {
    const uint16_t raw = __ldg(reinterpret_cast<const uint16_t*>(plane) + index / 2);
    memcpy(&p, &raw, 2);
  } else if constexpr (sizeof(T) == 2) {
    const uint32_t raw = __ldg(reinterpret_cast<const uint32_t*>(plane) + index / 2);
    memcpy(&p, &raw, 4);
  } else {
    const uint2 raw = __ldg(reinterpret_cast<const uint2*>(plane) + index / 2);
    memcpy(&p, &raw, 8);
  }
#else
  const T* values = static_cast<const T*>(plane) + index;
  p = {{values[0], values[1]}};
#endif
  return p;
}

// Index of row g's value in a group plane: tile row i, k-step s (16 of k), `group` elements a value, a multiple of 16.
QG_HD int64_t group_index(const Weight& w, int64_t tile_row, int g, int64_t step, int group, int k_block) {
  const int steps_per_block = k_block / 16, per_block = k_block / group;
  const int64_t block = step / steps_per_block;
  const int within = static_cast<int>(step % steps_per_block) * 16 / group;
  return (((tile_row * w.k_blocks + block) * 8 + g) * per_block + within) * 2;
}

// affine() of a format that has affine_at().
template <class F>
struct AffineByIndex {
  QG_HD static AffinePair affine(const Weight& w, int64_t tile_row, int g, int64_t step) {
    if constexpr (F::kGroup == 0) {
      if (w.group == 0) return F::affine_at(w, (tile_row * 8 + g) * 2, 0);
      const int k_block = w.group < kTileK ? kTileK : w.group;
      return F::affine_at(w, group_index(w, tile_row, g, step, w.group, k_block), 0);
    } else {
      return F::affine_at(w, group_index(w, tile_row, g, step, F::kGroup, F::kKBlock),
                          group_index(w, tile_row, g, step, F::kKBlock, F::kKBlock));
    }
  }
};

// Four bytes looked up in a table of 16, each byte of `codes` below 16.
template <class F>
QG_HD uint32_t table_levels(uint32_t codes) {
#ifdef __CUDA_ARCH__
  constexpr auto word = [](int i) constexpr {
    return static_cast<uint32_t>(F::table(4 * i)) | static_cast<uint32_t>(F::table(4 * i + 1)) << 8 |
           static_cast<uint32_t>(F::table(4 * i + 2)) << 16 | static_cast<uint32_t>(F::table(4 * i + 3)) << 24;
  };
  constexpr uint32_t t0 = word(0), t1 = word(1), t2 = word(2), t3 = word(3);
  // prmt takes its four selectors as nibbles; bit 3 of one would replicate a sign, so it chooses the half instead.
  const uint32_t selector = __byte_perm(codes | codes >> 4, 0, 0x4420) & 0x7777u;
  const uint32_t low = __byte_perm(t0, t1, selector), high = __byte_perm(t2, t3, selector);
  const uint32_t is_high = ptx::permute_bytes(codes << 4, 0, 0xba98);
  return (high & is_high) | (low & ~is_high);
#else
  uint32_t out = 0;
  for (int e = 0; e < 4; ++e) out |= static_cast<uint32_t>(F::table(codes >> (8 * e) & 15)) << (8 * e);
  return out;
#endif
}

}  // namespace jax_qgemm
