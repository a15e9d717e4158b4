// Activations on their way from device memory through shared memory to the B operands of mma.sync.
#pragma once

#include "tile/ptx.cuh"
#include "tile/stage_x.cuh"

namespace jax_qgemm {

constexpr int kXRingAhead = 2;           // steps that are loaded before they are read
constexpr int kXAtOnceBytes = 32 << 10;  // so little x is waited for once, not step by step

// i / tokens == i * x_ring_inverse(tokens) >> 20 as long as i * tokens < 2^20.
inline uint32_t x_ring_inverse(int tokens) { return ((1u << 20) + static_cast<uint32_t>(tokens) - 1) / tokens; }

// A ring of slots, each holding `rows` rows of x over `chunks` x 64 elements of k, as [term][chunk][row][64] 16-bit
// operands. The eight 16-byte pieces of a 128-byte row are permuted by the row's last three bits, which keeps ldmatrix
// free of bank conflicts.
//
// A step of k at a time goes into the next slot, kXRingAhead steps before it is read. Where all steps have a slot each,
// they stay and are loaded once; else they are loaded again for every pass over k.
template <class T>
struct XRing {
  struct Shape {
    int tokens;  // rows to load
    int rows, chunks, terms, steps, slots;
    uint32_t inverse;  // of tokens: see x_ring_inverse()
  };

  const Product& p;
  int64_t first;  // element of row 0 where k begins
  int first_k;    // of step 0
  char* memory;
  Shape shape;
  int to_read = 0;  // steps that are still waited for, over all passes
  int read_slot = 0;

  __device__ __forceinline__ void start(int passes, int slot_bytes) {
    const bool stays = shape.slots == shape.steps;
    if (stays && shape.steps * slot_bytes <= kXAtOnceBytes) {
#pragma unroll 1
      for (int i = 0; i < shape.steps; ++i) load(i, i);
      ptx::copy_async_commit();
      ptx::copy_async_wait<0>();
      __syncthreads();
      return;
    }
    to_read = stays ? shape.steps : shape.steps * passes;
#pragma unroll
    for (int i = 0; i < kXRingAhead; ++i) {
      if (i < to_read) load(i, i);
      ptx::copy_async_commit();
    }
  }

  // Of the whole thread block, before it reads a step, while to_read is not 0.
  __device__ __forceinline__ void advance(int step) {
    ptx::copy_async_wait<kXRingAhead - 1>();
    __syncthreads();
    if (--to_read >= kXRingAhead) {
      const int next = step + kXRingAhead, slot = read_slot + kXRingAhead;
      load(next < shape.steps ? next : next - shape.steps, slot < shape.slots ? slot : slot - shape.slots);
    }
    ptx::copy_async_commit();
  }

  // Where the step to read lies; next() moves on.
  __device__ __forceinline__ ptx::SharedAddress slot(int slot_bytes) const {
    return ptx::shared_address(memory) + read_slot * slot_bytes;
  }
  __device__ __forceinline__ void next() { read_slot = read_slot + 1 == shape.slots ? 0 : read_slot + 1; }

 private:
  // Eight threads a row of a chunk. Elements of x are counted in 32 bits.
  __device__ __forceinline__ void load(int step, int slot) const {
    const auto* x = static_cast<const uint16_t*>(p.x) + first;
    const int items = shape.tokens * shape.chunks, stride = static_cast<int>(blockDim.x) / 8;
    const int piece = static_cast<int>(threadIdx.x) % 8, k_end = static_cast<int>(p.k);
    const int first_of_piece = first_k + step * shape.chunks * 64 + piece * 8;
    char* to = memory + slot * shape.terms * shape.chunks * shape.rows * 128;
    const bool vectors = p.x_type == (T::kIsBF16 ? Scalar::kBF16 : Scalar::kF16) && k_end % 8 == 0 &&
                         reinterpret_cast<uintptr_t>(x) % 16 == 0;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x) / 8; i < items; i += stride) {
      const int chunk = static_cast<int>(static_cast<uint32_t>(i) * shape.inverse >> 20),
                row = i - chunk * shape.tokens;
      const int k = first_of_piece + chunk * 64, offset = (chunk * shape.rows + row) * 128 + ((piece ^ row) & 7) * 16;
      if (vectors) {
        ptx::copy_async<16>(ptx::shared_address(to) + offset, x + (k < k_end ? row * k_end + k : 0), k < k_end);
      } else {
        convert(reinterpret_cast<uint16_t*>(to + offset), first + row * p.k + k, k_end - k < 8 ? k_end - k : 8);
      }
    }
  }

  // Rolled loops: this is the slow way, and must not take registers from the fast one.
  __device__ __forceinline__ void convert(uint16_t* out, int64_t from, int count) const {
#pragma unroll 1
    for (int i = 0; i < 8; ++i) {
      const float value = i < count ? load_scalar(p.x, from + i, p.x_type) : 0.0f;
      stage_scalar<T>(out + i, shape.chunks * shape.rows * 64, value, shape.terms);
    }
  }
};

}  // namespace jax_qgemm
