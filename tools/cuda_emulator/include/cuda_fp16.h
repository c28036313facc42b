// What the kernels use of CUDA's header.
#pragma once

#include <cuda_runtime.h>

#include <cmath>

struct __half {
  unsigned short bits;
};

inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }

inline float __half2float(__half x) {
  const unsigned sign = (x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return __uint_as_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  // The exponents' biases differ by 112; the product is exact, for subnormal numbers too.
  return __uint_as_float(sign | rest << 13) * 0x1p112f;
}

// Rounds to the nearest, ties to even; every NaN becomes the NaN that the device produces.
inline __half __float2half_rn(float x) {
  const unsigned bits = __float_as_uint(x), sign = bits >> 16 & 0x8000u;
  const float size = __uint_as_float(bits & 0x7fffffffu);
  if (std::isnan(x)) return {0x7fffu};
  if (size >= 65520.0f) return {static_cast<unsigned short>(sign | 0x7c00u)};
  if (size < 0x1p-14f) {
    return {static_cast<unsigned short>(sign | static_cast<unsigned>(std::nearbyint(size * 0x1p24f)))};
  }
  const unsigned rounded = __float_as_uint(size) + 0xfffu + (__float_as_uint(size) >> 13 & 1);
  return {static_cast<unsigned short>(sign | ((rounded >> 13) - (112u << 10)))};
}

// A pair of numbers in a word; the first one in its low half.
struct __half2 {
  __half x, y;
};
inline float __low2float(__half2 pair) { return __half2float(pair.x); }
inline float __high2float(__half2 pair) { return __half2float(pair.y); }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
// If one number is NaN, the other one.
inline __half __hmax(__half a, __half b) { return __float2half_rn(fmaxf(__half2float(a), __half2float(b))); }
inline __half2 __hmax2(__half2 a, __half2 b) { return {__hmax(a.x, b.x), __hmax(a.y, b.y)}; }
