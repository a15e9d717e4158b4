// How gemm_sm90 and gemm_sm90_a8 would divide a product, behind a C interface.
#include "kernels/gemm_sm90_a8_config.cuh"

namespace jax_qgemm {
namespace {

GemmSm90Shape shape_of(int64_t m, int64_t n, int64_t k, double bits) {
  return {m, (n + kTileN - 1) / kTileN, k, 1, bits};
}

// out: tokens of a tile, its rows of n, pairs of tiles that are computed whole, items.
template <class Config>
void describe(const GemmSm90Shape& shape, const Config& config, int clusters, int64_t* out) {
  const GemmSm90Split split(shape, config, clusters);
  out[0] = config.tokens, out[1] = config.row_tiles() * kTileN, out[2] = split.whole, out[3] = split.items;
}

}  // namespace
}  // namespace jax_qgemm

extern "C" void emulated_gemm_sm90_choice(int64_t m, int64_t n, int64_t k, double bits, int clusters, int64_t* out) {
  const jax_qgemm::GemmSm90Shape shape = jax_qgemm::shape_of(m, n, k, bits);
  jax_qgemm::describe(shape, jax_qgemm::choose_gemm_sm90(shape, clusters), clusters, out);
}

// group: as the kernel's.
extern "C" void emulated_gemm_sm90_a8_choice(int64_t m, int64_t n, int64_t k, double bits, int group, int clusters,
                                             int64_t* out) {
  const jax_qgemm::GemmSm90Shape shape = jax_qgemm::shape_of(m, n, k, bits);
  jax_qgemm::describe(shape, jax_qgemm::choose_gemm_sm90_a8(shape, group, clusters), clusters, out);
}
