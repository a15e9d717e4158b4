// The PTX instructions that CUDA C++ has no intrinsic for. tests/emulation provides the same functions on the CPU.
#pragma once

#include <cstdint>

#ifdef JAX_QGEMM_EMULATION
#include "emulated_ptx.h"
#else

namespace jax_qgemm::ptx {

// The thread block's dynamic shared memory; TMA's swizzle needs it aligned to 1024 bytes.
__device__ __forceinline__ void* dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char memory[];
  return memory;
}

// prmt with all four selector bits: bit 3 of a selector replicates the sign of the byte it picks.
__device__ __forceinline__ uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selectors) {
  uint32_t r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(selectors));
  return r;
}

// The value, which the compiler may not compute again.
__device__ __forceinline__ int opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// What is computed from the values stays behind this, and what they are computed from before it.
__device__ __forceinline__ void pin(int& value) { asm volatile("" : "+r"(value)::"memory"); }
__device__ __forceinline__ void pin(float& value) { asm volatile("" : "+f"(value)::"memory"); }
__device__ __forceinline__ void pin(uint32_t (&values)[4]) {
  asm volatile("" : "+r"(values[0]), "+r"(values[1]), "+r"(values[2]), "+r"(values[3])::"memory");
}

// (value & mask) | bits in one instruction; with both as constants there would be two.
template <uint32_t kMask>
__device__ __forceinline__ uint32_t and_or(uint32_t value, uint32_t bits) {
  uint32_t r;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(r) : "r"(value), "n"(kMask), "r"(bits));
  return r;
}

// (value & mask) ^ bits, likewise.
template <uint32_t kMask>
__device__ __forceinline__ uint32_t and_xor(uint32_t value, uint32_t bits) {
  uint32_t r;
  asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(r) : "r"(value), "n"(kMask), "r"(bits));
  return r;
}

// The value in both halves, rounded to 16 bits; beyond their range it is the largest number.
template <bool IsBF16>
__device__ __forceinline__ uint32_t twice_saturated(float value) {
  uint32_t r;
  if constexpr (IsBF16) {
    asm("cvt.rn.satfinite.bf16x2.f32 %0, %1, %1;" : "=r"(r) : "f"(value));
  } else {
    asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %1;" : "=r"(r) : "f"(value));
  }
  return r;
}

// A value that is the same in all lanes of the warp, for the compiler to know it.
__device__ __forceinline__ int uniform(int value) {
  int r;
  asm("redux.sync.or.b32 %0, %1, 0xffffffff;" : "=r"(r) : "r"(value));
  return r;
}

// True in one lane of a warp, all of whose lanes are here. (What only one thread does, ptxas can do with uniform
// registers; of a thread that a comparison has chosen it does not know that it is alone.)
__device__ __forceinline__ bool elect_one() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint32_t elected;
  asm volatile("{\n.reg .pred one;\nelect.sync _|one, 0xffffffff;\nselp.b32 %0, 1, 0, one;\n}" : "=r"(elected));
  return elected != 0;
#else
  return threadIdx.x % 32 == 0;
#endif
}

// Read-only data that is used once: it need not stay in L1.
__device__ __forceinline__ uint4 load_once(const uint4* p) {
  uint4 v;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

// An address in the shared memory of this thread block.
using SharedAddress = uint32_t;
__device__ __forceinline__ SharedAddress shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
__device__ __forceinline__ SharedAddress opaque(SharedAddress address) {
  asm volatile("" : "+r"(address));
  return address;
}
// As a number, for descriptors.
__device__ __forceinline__ uint32_t shared_offset(SharedAddress address) { return address; }

// The address with some of its low bits flipped.
__device__ __forceinline__ SharedAddress toggle(SharedAddress address, int bits) { return address ^ bits; }

// kWords words at an address that is aligned to as many bytes; where other instructions of this file put it.
template <int kWords>
__device__ __forceinline__ void load_shared(uint32_t* out, SharedAddress from) {
  static_assert(kWords == 1 || kWords == 2 || kWords == 4);
  if constexpr (kWords == 4) {
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(from));
  } else if constexpr (kWords == 2) {
    asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(out[0]), "=r"(out[1]) : "r"(from));
  } else {
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(out[0]) : "r"(from));
  }
}
__device__ __forceinline__ void store_shared(SharedAddress to, uint32_t value) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(value) : "memory");
}
// Two bytes.
__device__ __forceinline__ uint32_t load_shared_half(SharedAddress from) {
  uint16_t r;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(r) : "r"(from));
  return r;
}

// 4, 8 or 16 bytes from global to shared memory; done after commit and wait.
template <int kBytes>
__device__ __forceinline__ void copy_async(SharedAddress to, const void* from) {
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(kBytes) : "memory");
  }
}
// Zeros unless `valid`.
template <int kBytes>
__device__ __forceinline__ void copy_async(SharedAddress to, const void* from, bool valid) {
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(kBytes),
                 "r"(valid ? kBytes : 0)
                 : "memory");
  }
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most kPending of the thread's committed groups are under way.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], SharedAddress address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// The same, each matrix transposed.
__device__ __forceinline__ void ldmatrix_x4_transposed(uint32_t (&r)[4], SharedAddress address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// c += a (16 x 16) * b (16 x 8), float32 accumulation.
__device__ __forceinline__ void mma_m16n8k16_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_m16n8k16_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Waits for `threads` threads of the block, whole warps, that name the same barrier: 1 to 15, __syncthreads being 0.
__device__ __forceinline__ void sync_named(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Counts as `threads` there do, but does not wait.
__device__ __forceinline__ void arrive_named(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Clusters of thread blocks, what they need, and stmatrix: Hopper only. Launchers use them there alone.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

__device__ __forceinline__ int cluster_rank() {
  uint32_t r;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return static_cast<int>(r);
}

// Relaxed: a release would wait for every load in flight. Initialized barriers are published by their own fence.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
// What was written before, in shared memory of either block, is there afterwards.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// To the shared memory of block `rank` of the cluster; `to` is the address of this block's own copy.
__device__ __forceinline__ void store_shared(float4* to, float4 v, int rank) {
  asm volatile(
      "{\n.reg .b32 address;\nmapa.shared::cluster.u32 address, %0, %1;\n"
      "st.shared::cluster.v4.f32 [address], {%2,%3,%4,%5};\n}" ::"r"(shared_address(to)),
      "r"(rank), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
      : "memory");
}

// ldmatrix_x4_transposed()'s counterpart.
__device__ __forceinline__ void stmatrix_x4_transposed(SharedAddress address, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(r[0]),
               "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// One arrival, which lets the phase end only after `bytes` more have come.
__device__ __forceinline__ void barrier_expect(SharedAddress barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_expect(uint64_t* barrier, int bytes) {
  barrier_expect(shared_address(barrier), bytes);
}
// One arrival at a barrier of this block; whoever waits for it sees what this thread has written.
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// The same, if `on`: not by a branch, which ptxas does not want between wgmmas.
__device__ __forceinline__ void barrier_arrive_if(bool on, SharedAddress barrier) {
  asm volatile("{\n.reg .pred on;\nsetp.ne.b32 on, %1, 0;\n@on mbarrier.arrive.shared.b64 _, [%0];\n}" ::"r"(barrier),
               "r"(static_cast<int>(on))
               : "memory");
}
// At the barrier of block `rank` of the cluster, whose address is that of this block's own. Not a release: that would
// wait for every access under way, and what was read before has arrived.
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier, int rank) {
  asm volatile(
      "{\n.reg .b32 address;\nmapa.shared::cluster.u32 address, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [address];\n}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}
// The same at the barrier that lies `index` barriers behind, if `on`.
using ClusterAddress = uint32_t;
__device__ __forceinline__ ClusterAddress cluster_address(const void* p, int rank) {
  uint32_t r;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(shared_address(p)), "r"(rank));
  return r;
}
__device__ __forceinline__ void barrier_arrive_if(bool on, ClusterAddress barriers, int index) {
  asm volatile("{\n.reg .pred on;\nsetp.ne.b32 on, %1, 0;\n@on mbarrier.arrive.shared::cluster.b64 _, [%0];\n}" ::"r"(
                   barriers + 8 * index),
               "r"(static_cast<int>(on))
               : "memory");
}
// Until the phase of this parity has ended; for what this block itself or its copies have written.
__device__ __forceinline__ void barrier_wait(SharedAddress barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, int parity) {
  barrier_wait(shared_address(barrier), parity);
}
// For what other blocks of the cluster have written: this also empties the L1 cache.
__device__ __forceinline__ void barrier_wait_cluster(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Stores a value in another block's shared memory and counts its bytes on a barrier there, in one message. Both
// addresses are those of this block's own copies.
__device__ __forceinline__ void store_async(float* to, float value, uint64_t* barrier, int rank) {
  asm volatile(
      "{\n.reg .b32 address, counter;\nmapa.shared::cluster.u32 address, %0, %3;\n"
      "mapa.shared::cluster.u32 counter, %2, %3;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [address], %1, [counter];\n}" ::"r"(
          shared_address(to)),
      "f"(value), "r"(shared_address(barrier)), "r"(rank)
      : "memory");
}
// The same of four values, to an address that is a multiple of 16.
__device__ __forceinline__ void store_async(float4* to, float4 v, uint64_t* barrier, int rank) {
  asm volatile(
      "{\n.reg .b32 address, counter;\nmapa.shared::cluster.u32 address, %0, %6;\n"
      "mapa.shared::cluster.u32 counter, %5, %6;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [address], {%1,%2,%3,%4}, [counter];\n}" ::"r"(
          shared_address(to)),
      "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(shared_address(barrier)), "r"(rank)
      : "memory");
}

#else

__device__ __forceinline__ int cluster_rank() {
  __trap();
  return 0;
}
__device__ __forceinline__ void cluster_arrive() {}
__device__ __forceinline__ void cluster_wait() {}
__device__ __forceinline__ void cluster_sync() {}
__device__ __forceinline__ void store_shared(float4*, float4, int) {}
using ClusterAddress = uint32_t;
__device__ __forceinline__ ClusterAddress cluster_address(const void*, int) { return 0; }
__device__ __forceinline__ void barrier_arrive_if(bool, ClusterAddress, int) {}
__device__ __forceinline__ void barrier_init(uint64_t*, int) {}
__device__ __forceinline__ void barrier_init_fence() {}
__device__ __forceinline__ void barrier_expect(SharedAddress, int) {}
__device__ __forceinline__ void barrier_expect(uint64_t*, int) {}
__device__ __forceinline__ void stmatrix_x4_transposed(SharedAddress, const uint32_t (&)[4]) {}
__device__ __forceinline__ void barrier_arrive(uint64_t*) {}
__device__ __forceinline__ void barrier_arrive_if(bool, SharedAddress) {}
__device__ __forceinline__ void barrier_arrive(uint64_t*, int) {}
__device__ __forceinline__ void barrier_wait(SharedAddress, int) {}
__device__ __forceinline__ void barrier_wait(uint64_t*, int) {}
__device__ __forceinline__ void barrier_wait_cluster(uint64_t*, int) {}
__device__ __forceinline__ void store_async(float*, float, uint64_t*, int) {}
__device__ __forceinline__ void store_async(float4*, float4, uint64_t*, int) {}

#endif

}  // namespace jax_qgemm::ptx

#endif
