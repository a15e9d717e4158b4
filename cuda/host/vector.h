// Vectors of float32 as wide as the instruction set that this file is compiled for, and the few operations that the
// compiler's vector extensions don't express. Included only by matmul_<instruction set>.cc, with QG_ISA defined.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace jax_qgemm::host::QG_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif
constexpr int kTileVectors = 16 / kWidth;  // vectors that hold one float32 for every word [t][s] of a row of a tile

using Floats = float __attribute__((vector_size(4 * kWidth)));
using Ints = int32_t __attribute__((vector_size(4 * kWidth)));
using Words = uint32_t __attribute__((vector_size(4 * kWidth)));
using Bytes = uint8_t __attribute__((vector_size(4 * kWidth)));

#define QG_INLINE inline __attribute__((always_inline))

template <class V>
QG_INLINE V load(const void* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}

QG_INLINE void store(float* p, Floats v) { memcpy(p, &v, sizeof v); }

QG_INLINE Floats broadcast(float f) { return f - Floats{}; }

QG_INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

// The constant whose lane i is rule(i).
template <class Rule, int... I>
constexpr Words each_lane(Rule rule, std::integer_sequence<int, I...>) {
  return Words{static_cast<uint32_t>(rule(I))...};
}

template <class Rule>
constexpr Words each_lane(Rule rule) {
  return each_lane(rule, std::make_integer_sequence<int, kWidth>{});
}

// Lane i is v[index[i]] of the two vectors put end to end.
template <class V>
QG_INLINE V shuffle(V a, V b, Words index) {
#if defined(__clang__)
  V out;
  for (int i = 0; i < kWidth; ++i) out[i] = index[i] < kWidth ? a[index[i]] : b[index[i] - kWidth];
  return out;
#else
  return __builtin_shuffle(a, b, index);
#endif
}

// Lane i is word index[i] of the N at p.
template <int N>
QG_INLINE Words spread(const void* p, Words index) {
#if defined(__AVX512F__)
  __m512i v;
  if constexpr (N == 8) v = _mm512_castsi256_si512(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
  if constexpr (N == 4) v = _mm512_castsi128_si512(_mm_loadu_si128(static_cast<const __m128i*>(p)));
  return shuffle((Words)v, (Words)v, index);
#elif defined(__AVX2__)
  __m256i v;
  if constexpr (N == 8) v = _mm256_loadu_si256(static_cast<const __m256i*>(p));
  if constexpr (N == 4) v = _mm256_castsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(p)));
  if constexpr (N == 2) v = _mm256_castsi128_si256(_mm_loadl_epi64(static_cast<const __m128i*>(p)));
  return shuffle((Words)v, (Words)v, index);
#else
  uint32_t words[N];
  memcpy(words, p, sizeof words);
  Words out;
  for (int i = 0; i < kWidth; ++i) out[i] = words[index[i]];
  return out;
#endif
}

// Lane i of the result is the sum of v[i]. In place, always in the same order.
QG_INLINE Floats sum_lanes(Floats (&v)[kWidth]) {
  constexpr Words even = each_lane([](int i) { return 2 * i; }), odd = each_lane([](int i) { return 2 * i + 1; });
  for (int count = kWidth / 2; count > 0; count /= 2) {
    for (int i = 0; i < count; ++i) v[i] = shuffle(v[2 * i], v[2 * i + 1], even) + shuffle(v[2 * i], v[2 * i + 1], odd);
  }
  return v[0];
}

// Each byte of `codes`, below 16, replaced by its entry in a table of 16, which is repeated to fill a vector.
QG_INLINE Bytes look_up(const uint8_t (&table)[4 * kWidth], Words codes) {
#if defined(__AVX512F__)
  return (Bytes)_mm512_shuffle_epi8((__m512i)load<Words>(table), (__m512i)codes);
#elif defined(__AVX2__)
  return (Bytes)_mm256_shuffle_epi8((__m256i)load<Words>(table), (__m256i)codes);
#elif defined(__aarch64__)
  return (Bytes)vqtbl1q_u8((uint8x16_t)load<Words>(table), (uint8x16_t)codes);
#else
  const auto bytes = (Bytes)codes;
  Bytes out;
  for (int i = 0; i < 4 * kWidth; ++i) out[i] = table[bytes[i]];
  return out;
#endif
}

}  // namespace jax_qgemm::host::QG_ISA
