#include <algorithm>
#include <limits>

#include "kernels/grid.cuh"
#include "kernels/quantize.cuh"

namespace jax_qgemm {
namespace {

template <class Round, class T>
const char* launch_rows(const Activations& a, cudaStream_t stream) {
  constexpr int kSize = XVector<T>::kSize, kOfWarp = 32 * kHeld * kSize;
  // The kernel counts a row's elements, and those of a turn that it may not need, in 32 bits.
  if (a.k > std::numeric_limits<int>::max() - 33 * kOfWarp) return "rows of x are too long";
  const bool whole = are_aligned<T>(a) && a.k % kSize == 0;
  const int64_t most = whole ? a.k : a.k + kSize - 1;  // elements, with those in front of the row
  const auto warps = static_cast<int>(std::min<int64_t>(divide_up(most, kOfWarp), 32));
  const int a_turn = warps * kOfWarp, last_turn = static_cast<int>((most - 1) / a_turn) * a_turn;
  const Grid grid = warps == 1 ? Grid{divide_up(a.rows, kLoneWarps), 1, 32 * kLoneWarps} : Grid{a.rows, 1, 32 * warps};
  const auto kernel = whole ? quantize_rows<Round, T, true> : quantize_rows<Round, T, false>;
  return launch(kernel, grid, stream, a, warps, last_turn);
}

template <class T>
const char* launch_type(const Activations& a, cudaStream_t stream) {
  switch (a.format) {
    case ActivationFormat::kInt8:
      return launch_rows<RoundToInt8, T>(a, stream);
    case ActivationFormat::kFp8:
      return launch_rows<RoundToE4M3, T>(a, stream);
    default: {
      const int64_t blocks = divide_up(a.rows * a.k, kGroupThreads * kGroupHeld * XVector<T>::kSize);
      const auto kernel = are_aligned<T>(a) ? quantize_groups<T, true> : quantize_groups<T, false>;
      return launch(kernel, {blocks, 1, kGroupThreads}, stream, a);
    }
  }
}

}  // namespace

const char* launch_quantize(const Activations& a, cudaStream_t stream) {
  DeviceLimits limits;
  if (const cudaError_t error = device_limits(&limits); error != cudaSuccess) return cudaGetErrorString(error);
  if (limits.capability < 80) return "the GPU is older than compute capability 8.0";
  switch (a.x_type) {
    case Scalar::kF16:
      return launch_type<__half>(a, stream);
    case Scalar::kBF16:
      return launch_type<__nv_bfloat16>(a, stream);
    default:
      return launch_type<float>(a, stream);
  }
}

}  // namespace jax_qgemm
