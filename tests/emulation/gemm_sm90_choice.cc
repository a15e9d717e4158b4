// How gemm_sm90 would divide a product, behind a C interface.
#include "kernels/gemm_sm90_config.cuh"

// out: tokens of a tile, its blocks of 64 rows, pairs of tiles that are computed whole, items.
extern "C" void emulated_gemm_sm90_choice(int64_t m, int64_t n, int64_t k, double bits, int clusters, int64_t* out) {
  using namespace jax_qgemm;
  const GemmSm90Shape shape = {m, (n + kTileN - 1) / kTileN, k, 1, bits};
  const GemmSm90Config config = choose_gemm_sm90(shape, clusters);
  const GemmSm90Split split(shape, config, clusters);
  out[0] = config.tokens, out[1] = config.blocks, out[2] = split.whole, out[3] = split.items;
}
