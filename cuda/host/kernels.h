// The product's inner kernels, compiled once for each instruction set, and what the driver in matmul.cc needs of them.
//
// Permuted order: inside a tile of 64 of k, position 16e + 4t + s holds k = 16s + 2t + (e>>1) + 8(e&1), so that the codes
// of a row are 16 words [t][s] of four bytes e, as in the planes. x is permuted once; weights decode into this order.
#pragma once

#include <cstdint>

#include "kernels/product.h"

namespace jax_qgemm::host {

constexpr int kSlab = 512;      // elements of k decoded at a time, and summed before they join the total
constexpr int kSpan = 256;      // elements of k that a chunk of the transposed product owns
constexpr int kSpanRows = 32;   // rows of n decoded at a time for it
constexpr int kMaxTokens = 128;  // rows of x in one chunk

constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Some rows of x against a part of one weight of the batch.
struct Chunk {
  int64_t weight;       // index in the batch
  int64_t first_token;  // in [0, m)
  int64_t tokens;       // at most kMaxTokens
  const float* x;       // [tokens][stride], permuted, or as it is for the transposed product; zero beyond the tail
  int64_t stride;
  int64_t first, last;  // forward: tile rows. transposed: tiles of k, of whole k-blocks
  float* scratch;       // scratch_floats(tokens), aligned to 64 bytes
};

// The larger of what the two products need.
constexpr int64_t scratch_floats(int64_t tokens) { return int64_t{kTileN} * kSlab + tokens * kSpan; }

struct FormatKernels {
  const char* name;
  int64_t (*k_block)(const Weight&);
  void (*forward)(const Product&, const Chunk&);
  void (*transpose)(const Product&, const Chunk&);
};

struct KernelSet {
  const char* name;
  FormatKernels formats[32];  // those of formats.def, then nulls
  void (*permute)(const Product&, int64_t row, float* out, int64_t stride);  // row of x to float32, permuted
  void (*widen)(const Product&, int64_t row, float* out, int64_t stride);    // row of x to float32
};

extern const KernelSet kGenericKernels;
extern const KernelSet kAVX2Kernels;
extern const KernelSet kAVX512Kernels;

}  // namespace jax_qgemm::host
