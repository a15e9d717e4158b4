// Stand-in for cuda_fp16.h: IEEE half precision through the compiler's _Float16.
#pragma once

#include <cuda_runtime.h>

struct __half {
  uint16_t bits;
};
struct __half2 {
  __half x, y;
};

inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline uint16_t __half_as_ushort(__half h) { return h.bits; }
inline float __half2float(__half h) {
  _Float16 f;
  memcpy(&f, &h.bits, sizeof f);
  return static_cast<float>(f);
}
inline __half __float2half_rn(float f) {
  const auto h = static_cast<_Float16>(f);
  __half r;
  memcpy(&r.bits, &h, sizeof h);
  return r;
}
inline __half2 __floats2half2_rn(float a, float b) { return {__float2half_rn(a), __float2half_rn(b)}; }
inline __half2 __float2half2_rn(float f) { return {__float2half_rn(f), __float2half_rn(f)}; }
// The difference of two halves is exact in float, so this rounds once.
inline __half __hsub(__half a, __half b) { return __float2half_rn(__half2float(a) - __half2float(b)); }
inline __half2 __hsub2(__half2 a, __half2 b) { return {__hsub(a.x, b.x), __hsub(a.y, b.y)}; }
inline __half2 __hadd2(__half2 a, __half2 b) {
  return __floats2half2_rn(__half2float(a.x) + __half2float(b.x), __half2float(a.y) + __half2float(b.y));
}
inline __half2 __hmul2(__half2 a, __half2 b) {
  return __floats2half2_rn(__half2float(a.x) * __half2float(b.x), __half2float(a.y) * __half2float(b.y));
}
inline __half2 __low2half2(__half2 a) { return {a.x, a.x}; }
inline __half2 __high2half2(__half2 a) { return {a.y, a.y}; }
// In double the product is exact, and the sum as good as that.
inline __half __hfma(__half a, __half b, __half c) {
  const double sum = static_cast<double>(__half2float(a)) * __half2float(b) + __half2float(c);
  const auto h = static_cast<_Float16>(sum);
  __half r;
  memcpy(&r.bits, &h, sizeof h);
  return r;
}
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) { return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)}; }
inline __half2 __habs2(__half2 a) {
  return {{static_cast<uint16_t>(a.x.bits & 0x7fff)}, {static_cast<uint16_t>(a.y.bits & 0x7fff)}};
}
inline __half __hmax_nan(__half a, __half b) {
  if (std::isnan(__half2float(a)) || std::isnan(__half2float(b))) return {0x7fff};
  return __half2float(a) > __half2float(b) ? a : b;
}
inline __half2 __hmax2_nan(__half2 a, __half2 b) { return {__hmax_nan(a.x, b.x), __hmax_nan(a.y, b.y)}; }
