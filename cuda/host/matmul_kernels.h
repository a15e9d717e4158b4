// The kernels of one instruction set. Included only by matmul_<instruction set>.cc, which defines QG_ISA, the namespace
// that keeps the copies apart, and QG_KERNELS, the name of the table at the end. What is outside of that namespace must
// be inlined always: of an inline function or a template the linker would keep one copy for all CPUs.
//
// An element of the result depends on its row of x, its column of w and the instruction set, never on how the work was
// divided or what else is in the batch.
#include "formats/formats.cuh"
#include "host/decode.h"
#include "host/epilogue.h"
#include "host/kernels.h"
#include "host/scalars.h"

namespace jax_qgemm::host::QG_ISA {

// Rows of x that the register blocks below hold, next to blocks of four rows of w.
constexpr int kTokens = kRegisters == 32 ? 6 : 3;
constexpr int kRows = 4;

// Tiles of codes to prefetch: without it, one token through q8_0 reads memory at half the speed.
constexpr int64_t kAhead = 8;

// sums[t][row] += the dot products of rows of the panel [16][kSlab] and of x, `count` long.
template <int Tokens>
void dot_block(const float* panel, int64_t count, const float* x, int64_t stride, Floats (*sums)[kTileN]) {
  for (int row = 0; row < kTileN; row += kRows) {
    Floats c[Tokens][kRows] = {};
    for (int64_t i = 0; i < count; i += kWidth) {
      Floats a[Tokens];
      for (int t = 0; t < Tokens; ++t) a[t] = load<Floats>(x + t * stride + i);
      for (int r = 0; r < kRows; ++r) {
        const auto w = load<Floats>(panel + (row + r) * kSlab + i);
        for (int t = 0; t < Tokens; ++t) c[t][r] = multiply_add(w, a[t], c[t][r]);
      }
    }
    for (int t = 0; t < Tokens; ++t) {
      for (int r = 0; r < kRows; ++r) sums[t][row + r] += c[t][r];
    }
  }
}

// sums[t][i] += the sum over the rows of the panel [kSpanRows][kSpan] of x[t][row] * panel[row][i], i below `count`.
template <int Tokens>
void outer_block(const float* panel, int64_t count, const float* x, int64_t stride, float* sums) {
  for (int64_t i = 0; i < count; i += kRows * kWidth) {
    Floats c[Tokens][kRows] = {};
    for (int row = 0; row < kSpanRows; ++row) {
      Floats a[Tokens];
      for (int t = 0; t < Tokens; ++t) a[t] = broadcast(x[t * stride + row]);
      for (int r = 0; r < kRows; ++r) {
        const auto w = load<Floats>(panel + row * kSpan + i + r * kWidth);
        for (int t = 0; t < Tokens; ++t) c[t][r] = multiply_add(w, a[t], c[t][r]);
      }
    }
    for (int t = 0; t < Tokens; ++t) {
      for (int r = 0; r < kRows; ++r) {
        float* sum = sums + t * kSpan + i + r * kWidth;
        store(sum, load<Floats>(sum) + c[t][r]);
      }
    }
  }
}

// Calls block(first, number) for all of [0, tokens), the number at most kTokens and an integral constant.
template <class Block>
QG_INLINE void for_token_blocks(int64_t tokens, Block&& block) {
  int64_t t = 0;
  for (; t + kTokens <= tokens; t += kTokens) block(t, std::integral_constant<int, kTokens>{});
  switch (tokens - t) {
    case 1:
      return block(t, std::integral_constant<int, 1>{});
    case 2:
      return block(t, std::integral_constant<int, 2>{});
    case 3:
      return block(t, std::integral_constant<int, 3>{});
    case 4:
      return block(t, std::integral_constant<int, 4>{});
    case 5:
      return block(t, std::integral_constant<int, 5>{});
  }
}

static void dot_panel(const float* panel, int64_t count, const Chunk& c, int64_t first, Floats (*sums)[kTileN]) {
  for_token_blocks(c.tokens, [&](int64_t t, auto number) {
    dot_block<number.value>(panel, count, c.x + t * c.stride + first, c.stride, sums + t);
  });
}

static void outer_panel(const float* panel, int64_t count, const Chunk& c, int64_t first, float* sums) {
  for_token_blocks(c.tokens, [&](int64_t t, auto number) {
    outer_block<number.value>(panel, count, c.x + t * c.stride + first, c.stride, sums + t * kSpan);
  });
}

template <class F>
int64_t k_block(const Weight& w) {
  return k_block_of<F>(w);
}

template <class F>
void forward(const Product& p, const Chunk& c) {
  const int64_t tiles = c.stride / kTileK, slab_tiles = kSlab / kTileK;
  auto* sums = reinterpret_cast<Floats(*)[kTileN]>(c.scratch + kTileN * kSlab);
  float* gates = c.scratch + kTileN * kSlab + c.tokens * kTileN * kWidth;
  const int64_t first_row = p.stack.weight_of(c.batch) * p.tile_rows();
  for (int64_t row = c.first; row < c.last; ++row) {
    const int64_t tile_row = first_row + row;
    for (int64_t t = 0; t < c.tokens; ++t) {
      for (int r = 0; r < kTileN; ++r) sums[t][r] = Floats{};
    }
    for (int64_t first = 0; first < tiles; first += slab_tiles) {
      const int64_t last = first + slab_tiles < tiles ? first + slab_tiles : tiles;
      if (c.tokens == 1) {
        // The sums of dot_block in the same order, without the panel.
        const float* x = c.x + first * kTileK;
        Floats slab[kTileN] = {};
        decode_tiles<F>(p.w, tile_row, first, last, kAhead,
                        [&](int r, int64_t i, Floats w) __attribute__((always_inline)) {
                          slab[r] = multiply_add(w, load<Floats>(x + i), slab[r]);
                        });
        for (int r = 0; r < kTileN; ++r) sums[0][r] += slab[r];
      } else {
        float* panel = c.scratch;
        decode_tiles<F>(p.w, tile_row, first, last, kAhead,
                        [&](int r, int64_t i, Floats w)
                            __attribute__((always_inline)) { store(panel + r * kSlab + i, w); });
        dot_panel(panel, (last - first) * kTileK, c, first * kTileK, sums);
      }
    }
    const TileEpilogue epilogue(p, c.batch, row);
    for (int64_t t = 0; t < c.tokens; ++t) write_columns(p, c, row, epilogue, t, sums[t], gates);
  }
}

// Position of element k of a tile in the permuted order.
QG_INLINE int permuted(int k) { return k % 2 * 32 + k / 8 % 2 * 16 + k / 2 % 4 * 4 + k / 16; }

template <class F>
void transpose(const Product& p, const Chunk& c) {
  float* panel = c.scratch;
  float* sums = c.scratch + kSpanRows * kSpan;
  const int64_t first_row = p.stack.weight_of(c.batch) * p.tile_rows();
  const int64_t step = kSpan / kTileK, tiles = p.w.k_blocks * (k_block_of<F>(p.w) / kTileK);
  for (int64_t first = c.first; first < c.last; first += step) {
    const int64_t last = first + step < c.last ? first + step : c.last, count = (last - first) * kTileK;
    memset(sums, 0, static_cast<size_t>(c.tokens * kSpan) * sizeof(float));
    for (int64_t row = 0; row < p.tile_rows(); row += kSpanRows / kTileN) {
      for (int half = 0; half < kSpanRows / kTileN; ++half) {
        float* rows = panel + half * kTileN * kSpan;
        if (row + half == p.tile_rows()) {
          memset(rows, 0, kTileN * kSpan * sizeof(float));
          break;
        }
        decode_tiles<F>(p.w, first_row + row + half, first, last, tiles,
                        [&](int r, int64_t i, Floats w)
                            __attribute__((always_inline)) { store(rows + r * kSpan + i, w); });
      }
      outer_panel(panel, count, c, row * kTileN, sums);
    }
    for (int64_t t = 0; t < c.tokens; ++t) {
      float values[kSpan];
      for (int64_t i = 0; i < count; ++i) {
        values[i] = sums[t * kSpan + i / kTileK * kTileK + permuted(static_cast<int>(i % kTileK))];
      }
      const int64_t column = first * kTileK, token = c.batch * p.m + c.first_token + t;
      from_f32(values, p.out_type, p.k - column < count ? p.k - column : count, p.out, token * p.k + column);
    }
  }
}

static const void* row_of_x(const Product& p, int64_t row, int64_t length) {
  return static_cast<const char*>(p.x) + row * length * bytes_of(p.x_type);
}

static void widen(const Product& p, int64_t row, float* out, int64_t stride) {
  to_f32(row_of_x(p, row, p.n), p.x_type, p.n, out);
  for (int64_t i = p.n; i < stride; ++i) out[i] = 0.0f;
}

static void permute(const Product& p, int64_t row, float* out, int64_t stride) {
  const auto* x = static_cast<const char*>(row_of_x(p, row, p.k));
  for (int64_t first = 0; first < stride; first += kTileK) {
    float values[kTileK] = {};
    const int64_t rest = p.k - first;
    if (rest > 0) to_f32(x + first * bytes_of(p.x_type), p.x_type, rest < kTileK ? rest : kTileK, values);
    for (int k = 0; k < kTileK; ++k) out[first + permuted(k)] = values[k];
  }
}

}  // namespace jax_qgemm::host::QG_ISA

namespace jax_qgemm::host {

#define X(F) {F::kName, &QG_ISA::k_block<F>, &QG_ISA::forward<F>, &QG_ISA::transpose<F>},
const KernelSet QG_KERNELS = {{
#include "formats/formats.def"
                              },
                              &QG_ISA::permute,
                              &QG_ISA::widen};
#undef X

}  // namespace jax_qgemm::host
