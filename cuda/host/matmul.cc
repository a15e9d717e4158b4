#include "host/matmul.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>

#include "host/kernels.h"

namespace jax_qgemm::host {
namespace {

const KernelSet* find_kernels(std::string_view name) {
#ifdef JAX_QGEMM_HOST_AVX512
  if (name.empty() || name == "avx512") {
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      return &kAVX512Kernels;
    }
  }
#endif
#ifdef JAX_QGEMM_HOST_AVX2
  if (name.empty() || name == "avx2") {
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
      return &kAVX2Kernels;
    }
  }
#endif
  return name.empty() || name == "generic" ? &kGenericKernels : nullptr;
}

std::atomic<const KernelSet*>& current_kernels() {
  static std::atomic<const KernelSet*> kernels{find_kernels("")};
  return kernels;
}

struct AlignedDelete {
  void operator()(float* p) const { ::operator delete[](p, std::align_val_t{64}); }
};
using Scratch = std::unique_ptr<float[], AlignedDelete>;

Scratch allocate(int64_t floats) {
  return Scratch(
      static_cast<float*>(::operator new[](static_cast<size_t>(floats) * sizeof(float), std::align_val_t{64})));
}

// Costs on one core of a recent CPU: only the sizes of chunks depend on them.
constexpr double kDecodeSeconds = 1.5e-10;    // a weight
constexpr double kMultiplySeconds = 1.5e-11;  // a weight and a row of x
constexpr double kPermuteSeconds = 1e-9;      // an element of x
constexpr double kChunkSeconds = 50e-6;       // worth handing to another thread
constexpr int64_t kPermutedBytes = 8 << 20;   // of x, at a time

// Runs body over [0, count) in ranges of a good size, on threads if that pays.
template <class Body>
void parallel_ranges(const ParallelFor& parallel_for, int64_t width, int64_t count, double seconds_each, Body&& body) {
  const double wanted = seconds_each * static_cast<double>(count) / kChunkSeconds;
  const int64_t ranges = std::min({count, width * 8, static_cast<int64_t>(wanted)});
  if (width < 2 || ranges < 2) return body(0, count);
  parallel_for(ranges, [&](int64_t i) { body(count * i / ranges, count * (i + 1) / ranges); });
}

// The part of a product whose rows of x are permuted together: `tokens` rows of each of `entries` entries of the batch.
struct Pass {
  int64_t first_entry, entries, first_token, tokens;
};

class Driver {
 public:
  Driver(const Product& p, const KernelSet& kernels, const FormatKernels& format, const ParallelFor& parallel_for,
         int64_t width)
      : p_(p), kernels_(kernels), parallel_for_(parallel_for), width_(width) {
    kernel_ = p.transpose ? format.transpose : format.forward;
    const int64_t k_padded = format.k_block(p.w) * p.w.k_blocks;
    stride_ = p.transpose ? round_up(p.n, kSpanRows) : k_padded;
    // Forward, a unit of work is a tile row, or a gate's and the one that it opens; transposed, a k-block.
    const int64_t rows = p.epilogue.gated ? 2 : 1;
    units_ = p.transpose ? p.w.k_blocks : p.tile_rows() / rows;
    unit_tiles_ = p.transpose ? format.k_block(p.w) / kTileK : rows;
    weights_per_unit_ = static_cast<double>(p.transpose ? stride_ * format.k_block(p.w) : rows * kTileN * k_padded);
  }

  void run() {
    const int64_t rows = std::max<int64_t>(1, kPermutedBytes / std::max<int64_t>(1, stride_ * 4));
    const int64_t tokens = std::min(p_.m, rows), entries = std::max<int64_t>(1, rows / p_.m);
    x_ = allocate(std::min(p_.batch, entries) * tokens * stride_);
    for (int64_t b = 0; b < p_.batch; b += entries) {
      for (int64_t t = 0; t < p_.m; t += tokens) {
        run_pass({b, std::min(entries, p_.batch - b), t, std::min(tokens, p_.m - t)});
      }
    }
  }

 private:
  void run_pass(const Pass& pass) const {
    const auto prepare = p_.transpose ? kernels_.widen : kernels_.permute;
    parallel_ranges(parallel_for_, width_, pass.entries * pass.tokens, kPermuteSeconds * static_cast<double>(stride_),
                    [&](int64_t first, int64_t last) {
                      for (int64_t i = first; i < last; ++i) {
                        const int64_t entry = pass.first_entry + i / pass.tokens;
                        prepare(p_, entry * p_.m + pass.first_token + i % pass.tokens, &x_[i * stride_], stride_);
                      }
                    });
    const int64_t groups = (pass.tokens + kMaxTokens - 1) / kMaxTokens;  // of tokens, all of about the same size
    const int64_t tokens = (pass.tokens + groups - 1) / groups;
    const double seconds = weights_per_unit_ * (kDecodeSeconds + kMultiplySeconds * static_cast<double>(tokens));
    parallel_ranges(parallel_for_, width_, pass.entries * groups * units_, seconds, [&](int64_t first, int64_t last) {
      const Scratch scratch = allocate(scratch_floats(tokens));
      while (first < last) {
        const int64_t outer = first / units_, unit = first % units_;
        const int64_t end = std::min(units_, unit + last - first);
        const int64_t token = outer % groups * tokens, entry = outer / groups;
        kernel_(p_, {pass.first_entry + entry, pass.first_token + token, std::min(tokens, pass.tokens - token),
                     &x_[(entry * pass.tokens + token) * stride_], stride_, unit * unit_tiles_, end * unit_tiles_,
                     scratch.get()});
        first += end - unit;
      }
    });
  }

  const Product& p_;
  const KernelSet& kernels_;
  const ParallelFor& parallel_for_;
  const int64_t width_;
  void (*kernel_)(const Product&, const Chunk&);
  int64_t stride_, units_, unit_tiles_;
  double weights_per_unit_;
  Scratch x_;
};

}  // namespace

void matmul(const Product& p, const ParallelFor& parallel_for, int64_t width) {
  const KernelSet& kernels = *current_kernels().load(std::memory_order_relaxed);
  for (const FormatKernels& format : kernels.formats) {
    if (p.format == format.name) return Driver(p, kernels, format, parallel_for, width).run();
  }
}

bool set_instruction_set(std::string_view name) {
  const KernelSet* kernels = find_kernels(name);
  if (kernels) current_kernels().store(kernels, std::memory_order_relaxed);
  return kernels != nullptr;
}

}  // namespace jax_qgemm::host
