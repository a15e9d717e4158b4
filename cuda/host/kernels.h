// The product's inner kernels, compiled once for each instruction set, and what the driver in matmul.cc needs of them.
//
// Permuted order: inside a tile of 64 of k, position 16e + 4t + s holds k = 16s + 2t + (e>>1) + 8(e&1), because planes
// give the codes of a row as 16 words [t][s] of four bytes e. x is permuted once; weights decode into this order.
#pragma once

#include <cstdint>

#include "kernels/product.h"

namespace jax_qgemm::host {

constexpr int kSlab = 512;     // elements of k decoded at a time; their products are summed before they join the total
constexpr int kSpan = 256;     // the same for the transposed product, whose sums are over n: elements of k ...
constexpr int kSpanRows = 32;  // ... and rows of n
constexpr int kMaxTokens = 128;  // rows of x in one chunk
constexpr int kFormats = 0
#define X(F) +1
#include "formats/formats.def"
#undef X
    ;

constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Some rows of x (tokens) of an entry of the batch against a part of its weight.
struct Chunk {
  int64_t batch;
  int64_t first_token;  // in [0, m)
  int64_t tokens;       // at most kMaxTokens
  const float* x;       // [tokens][stride], permuted, or as it is for the transposed product; zero beyond the tail
  int64_t stride;
  int64_t first, last;  // forward: tile rows, gated in pairs. transposed: tiles of k, of whole k-blocks
  float* scratch;       // scratch_floats(tokens), aligned to 64 bytes
};

// The larger of what the two products need.
constexpr int64_t scratch_floats(int64_t tokens) { return int64_t{kTileN} * kSlab + tokens * (kSpan + kTileN); }

struct FormatKernels {
  const char* name;
  int64_t (*k_block)(const Weight&);
  void (*forward)(const Product&, const Chunk&);
  void (*transpose)(const Product&, const Chunk&);
};

struct KernelSet {
  FormatKernels formats[kFormats];
  void (*permute)(const Product&, int64_t row, float* out, int64_t stride);  // row of x to float32, permuted
  void (*widen)(const Product&, int64_t row, float* out, int64_t stride);    // row of x to float32
};

extern const KernelSet kGenericKernels;
extern const KernelSet kAVX2Kernels;
extern const KernelSet kAVX512Kernels;

}  // namespace jax_qgemm::host
