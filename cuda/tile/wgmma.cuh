// wgmma, Hopper's product of four warps: c (64 x N) += or = a (64 x K) * b (K x N), K being 16 for operands of 16 bits
// and 32 for those of 8. Only code for sm_90a has it. tests/emulation provides the same functions on the CPU.
//
// a is in registers: warp w of the warpgroup has rows 16w to 16w + 15 as the A operand of mma.m16n8k16 (m16n8k32). b
// lies in shared memory, k fastest. c: sums[4j + i] is result i of mma.m16n8k16 for columns 8j to 8j + 7.
#pragma once

#include <type_traits>

#include "tile/mma.cuh"

namespace jax_qgemm {

// The descriptor of the first K of b's 128 bytes of k, which TMA has written with the 128-byte swizzle: rows of 128
// bytes, 8 of them 1024 bytes, the pattern being one of address bits. (PTX ISA, "Matrix Descriptor Format".)
__device__ __forceinline__ uint64_t swizzled_operand(ptx::SharedAddress first) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kStride = uint64_t{1024 >> 4} << 32, kLeading = uint64_t{1} << 16;
  return kSwizzle128 | kStride | kLeading | (ptx::shared_offset(first) & 0x3ffff) >> 4;
}

// The same of an address that is the same in all lanes, in a uniform register, from which wgmma takes it.
__device__ __forceinline__ uint64_t uniform_operand(ptx::SharedAddress first) {
  const uint64_t operand = swizzled_operand(first);
  const int low = ptx::uniform(static_cast<int>(operand));
  return (operand & ~uint64_t{0xffffffff}) | static_cast<uint32_t>(low);
}

// The same for k-step `step` of the four. Its low half does not overflow.
__device__ __forceinline__ uint64_t operand_of_step(uint64_t first, int step) {
  return (first & ~uint64_t{0xffffffff}) | (static_cast<uint32_t>(first) + static_cast<uint32_t>(2 * step));
}

}  // namespace jax_qgemm

#ifdef JAX_QGEMM_EMULATION
#include "emulated_wgmma.h"
#else

namespace jax_qgemm::ptx {

// Before the first wgmma, and after registers that one reads or adds to were written.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until all of the warp's wgmmas are done; only then may `sums` be read, or a and b be overwritten.
template <class Sum, int Sums>
__device__ __forceinline__ void wgmma_wait(Sum (&sums)[Sums]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (int i = 0; i < Sums; ++i) {  // no use of them moves above the wait
    if constexpr (std::is_same_v<Sum, int>) {
      asm volatile("" : "+r"(sums[i])::"memory");
    } else {
      asm volatile("" : "+f"(sums[i])::"memory");
    }
  }
}

// Until at most kPending of its committed groups are under way, which are the latest.
template <int kPending>
__device__ __forceinline__ void wgmma_wait_but() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Registers of a thread from here on; a whole warpgroup, which has had at most (at least) as many before.
template <int Count>
__device__ __forceinline__ void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Count));
}
template <int Count>
__device__ __forceinline__ void lower_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Count));
}

#define QG_OUT_4(R, i) "+" R(c[i]), "+" R(c[i + 1]), "+" R(c[i + 2]), "+" R(c[i + 3])
#define QG_OUT_8(R, i) QG_OUT_4(R, i), QG_OUT_4(R, i + 4)
#define QG_OUT_16(R, i) QG_OUT_8(R, i), QG_OUT_8(R, i + 8)
#define QG_OUT_32(R, i) QG_OUT_16(R, i), QG_OUT_16(R, i + 16)
#define QG_OUT_48(R, i) QG_OUT_32(R, i), QG_OUT_16(R, i + 32)
#define QG_OUT_64(R, i) QG_OUT_32(R, i), QG_OUT_32(R, i + 32)
#define QG_OUT_128(R, i) QG_OUT_64(R, i), QG_OUT_64(R, i + 64)

#define QG_NAMES_8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define QG_NAMES_16 QG_NAMES_8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define QG_NAMES_32                                                                                                    \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30," \
  "%31"
#define QG_NAMES_48 QG_NAMES_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define QG_NAMES_64 QG_NAMES_48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define QG_NAMES_128                                                                                               \
  QG_NAMES_64                                                                                                      \
  ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%" \
  "91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114," \
  "%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

// KIND: K and the types; R: the sums' register; SCALES: what else the instruction takes. Operands: the sums, then a, b
// and whether to add to the sums, whose numbers follow.
#define QG_WGMMA(N, KIND, SCALES, R, SUMS, A, B, ADD)                                                        \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " ADD ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N KIND \
               " {" QG_NAMES_##SUMS "}, {" A "}, " B ", add" SCALES ";\n}"                                   \
               : QG_OUT_##SUMS(R, 0)                                                                         \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(static_cast<int>(kAdd)))
#define QG_WGMMA_SIZE(NAME, N, SUM, SUMS, ...)                                              \
  template <bool kAdd>                                                                      \
  __device__ __forceinline__ void NAME(SUM(&c)[SUMS], const uint32_t (&a)[4], uint64_t b) { \
    QG_WGMMA(N, __VA_ARGS__);                                                               \
  }
#define QG_WGMMA_SIZES(NAME, SUM, ...)                                                \
  QG_WGMMA_SIZE(NAME, 64, SUM, 32, __VA_ARGS__, 32, "%32,%33,%34,%35", "%36", "%37")  \
  QG_WGMMA_SIZE(NAME, 128, SUM, 64, __VA_ARGS__, 64, "%64,%65,%66,%67", "%68", "%69") \
  QG_WGMMA_SIZE(NAME, 256, SUM, 128, __VA_ARGS__, 128, "%128,%129,%130,%131", "%132", "%133")
#define QG_WGMMA_FEW(NAME, SUM, ...)                                             \
  QG_WGMMA_SIZE(NAME, 16, SUM, 8, __VA_ARGS__, 8, "%8,%9,%10,%11", "%12", "%13") \
  QG_WGMMA_SIZE(NAME, 32, SUM, 16, __VA_ARGS__, 16, "%16,%17,%18,%19", "%20", "%21")
#define QG_WGMMA_96(NAME, SUM, ...) QG_WGMMA_SIZE(NAME, 96, SUM, 48, __VA_ARGS__, 48, "%48,%49,%50,%51", "%52", "%53")
#define QG_F16 "k16.f32.f16.f16", ", 1, 1, 0", "f"
#define QG_BF16 "k16.f32.bf16.bf16", ", 1, 1, 0", "f"
#define QG_S8 "k32.s32.s8.s8", "", "r"
#define QG_E4M3 "k32.f32.e4m3.e4m3", ", 1, 1", "f"

// N is twice the number of sums. Enqueues only: see wgmma_wait(). kAdd false: whatever the sums were before.
QG_WGMMA_FEW(wgmma_f16, float, QG_F16)
QG_WGMMA_FEW(wgmma_bf16, float, QG_BF16)
QG_WGMMA_SIZES(wgmma_f16, float, QG_F16)
QG_WGMMA_SIZES(wgmma_bf16, float, QG_BF16)
QG_WGMMA_SIZES(wgmma_s8, int, QG_S8)
QG_WGMMA_96(wgmma_s8, int, QG_S8)
QG_WGMMA_SIZES(wgmma_e4m3, float, QG_E4M3)
QG_WGMMA_96(wgmma_e4m3, float, QG_E4M3)

#undef QG_E4M3
#undef QG_S8
#undef QG_BF16
#undef QG_F16
#undef QG_WGMMA_96
#undef QG_WGMMA_FEW
#undef QG_WGMMA_SIZES
#undef QG_WGMMA_SIZE
#undef QG_WGMMA
#undef QG_NAMES_128
#undef QG_NAMES_64
#undef QG_NAMES_48
#undef QG_NAMES_32
#undef QG_NAMES_16
#undef QG_NAMES_8
#undef QG_OUT_128
#undef QG_OUT_64
#undef QG_OUT_48
#undef QG_OUT_32
#undef QG_OUT_16
#undef QG_OUT_8
#undef QG_OUT_4

}  // namespace jax_qgemm::ptx

#endif

namespace jax_qgemm {

template <class T, bool kAdd = true, int Sums>
__device__ __forceinline__ void wgmma(float (&sums)[Sums], const uint32_t (&a)[4], uint64_t b) {
  if constexpr (T::kIsBF16) {
    ptx::wgmma_bf16<kAdd>(sums, a, b);
  } else {
    ptx::wgmma_f16<kAdd>(sums, a, b);
  }
}

// X: Int8Codes or Fp8Codes.
template <class X, bool kAdd = true, int Sums>
__device__ __forceinline__ void wgmma8(typename X::Sum (&sums)[Sums], const uint32_t (&a)[4], uint64_t b) {
  if constexpr (X::kIsFp8) {
    ptx::wgmma_e4m3<kAdd>(sums, a, b);
  } else {
    ptx::wgmma_s8<kAdd>(sums, a, b);
  }
}

}  // namespace jax_qgemm
