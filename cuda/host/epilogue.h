// What happens to the sums of 16 columns before they are stored. Included only by matmul_<instruction set>.cc.
#pragma once

#include "host/activations.h"
#include "host/kernels.h"
#include "host/scalars.h"

namespace jax_qgemm::host::QG_ISA {

using TileRow = Floats[kTileVectors];  // 16 columns

// `count` values from element `first` on, then zeros.
static void load_columns(const void* values, Scalar type, int64_t first, int64_t count, TileRow& out) {
  alignas(64) float columns[kTileN] = {};
  if (values) to_f32(static_cast<const char*>(values) + first * bytes_of(type), type, count, columns);
  for (int j = 0; j < kTileVectors; ++j) out[j] = load<Floats>(columns + j * kWidth);
}

// The part of an epilogue that the rows of x share, and the columns where it is applied.
struct TileEpilogue {
  int64_t count;  // columns of w
  Floats scale;
  TileRow bias;

  TileEpilogue(const Product& p, int64_t batch, int64_t tile_row) {
    const Epilogue& e = p.epilogue;
    const int64_t column = tile_row * kTileN;
    count = p.n - column < kTileN ? p.n - column : kTileN;
    scale = broadcast(e.scale ? e.scale[batch * e.scale_stride] : 1.0f);
    load_columns(e.bias, e.bias_type, batch * e.bias_stride + column, count, bias);
  }
};

// Sums the lanes of the 16 columns of tile row `tile_row` of one token and writes those that exist. Of a gate, the
// activated values only go to `gates`, [tokens][16], where the tile row behind it finds them.
static void write_columns(const Product& p, const Chunk& c, int64_t tile_row, const TileEpilogue& tile, int64_t token,
                          Floats (&sums)[kTileN], float* gates) {
  const Epilogue& e = p.epilogue;
  const bool is_gate = e.gated && tile_row % 2 == 0, is_up = e.gated && !is_gate;
  TileRow values;
  for (int j = 0; j < kTileVectors; ++j) {
    Floats part[kWidth];
    for (int i = 0; i < kWidth; ++i) part[i] = sums[j * kWidth + i];
    values[j] = tile.scale * sum_lanes(part) + tile.bias[j];
    if (!is_up) values[j] = activate(e.activation, values[j]);
    float* gate = gates + token * kTileN + j * kWidth;
    if (is_gate) store(gate, values[j]);
    if (is_up) values[j] *= load<Floats>(gate);
  }
  if (is_gate) return;
  const int64_t row = c.batch * p.m + c.first_token + token;
  const int64_t first = row * p.out_columns() + (e.gated ? tile_row / 2 : tile_row) * kTileN;
  if (e.residual) {
    TileRow residual;
    load_columns(e.residual, e.residual_type, first, tile.count, residual);
    for (int j = 0; j < kTileVectors; ++j) values[j] += residual[j];
  }
  alignas(64) float columns[kTileN];
  for (int j = 0; j < kTileVectors; ++j) store(columns + j * kWidth, values[j]);
  from_f32(columns, p.out_type, tile.count, p.out, first);
}

}  // namespace jax_qgemm::host::QG_ISA
