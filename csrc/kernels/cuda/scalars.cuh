// The scalar types on the device, and the two functions whose instructions we choose ourselves.
#pragma once

#include "device.h"
#include "types.h"

#ifndef COTUNING_EMULATE
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace cotuning::cuda {

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }

#ifdef COTUNING_EMULATE

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float widen(BFloat16 x) { return float_of(uint32_t{x.bits} << 16); }
inline float widen(Float16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return float_of(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  // The exponents' biases differ by 112; the product is exact, among subnormal numbers too.
  return float_of(sign | rest << 13) * 0x1p112f;
}
inline void narrow(float x, BFloat16* out) {
  const uint32_t bits = bits_of(x);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out->bits = static_cast<uint16_t>(nan ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}
inline void narrow(float x, Float16* out) {
  const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000u;
  const float size = float_of(bits & 0x7fffffffu);
  if (std::isnan(x)) {
    out->bits = 0x7fffu;
  } else if (size >= 65520.0f) {
    out->bits = static_cast<uint16_t>(sign | 0x7c00u);
  } else if (size < 0x1p-14f) {
    out->bits = static_cast<uint16_t>(sign | static_cast<uint32_t>(std::nearbyint(size * 0x1p24f)));
  } else {
    const uint32_t rounded = bits_of(size) + 0xfffu + (bits_of(size) >> 13 & 1);
    out->bits = static_cast<uint16_t>(sign | ((rounded >> 13) - (112u << 10)));
  }
}
// As the device computes it, so that the rounding of the product is seen here too.
inline float exponential(float x) { return std::exp2(x * 1.4426950408889634f); }
inline double exponential(double x) { return std::exp(x); }
inline float logarithm(float x) { return std::log(x); }
inline double logarithm(double x) { return std::log(x); }
inline uint32_t joined_halves(uint32_t low, uint32_t high) { return low >> 16 | high << 16; }

#else

__device__ __forceinline__ float widen(BFloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
__device__ __forceinline__ float widen(Float16 x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ __forceinline__ void narrow(float x, BFloat16* out) {
  out->bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
}
__device__ __forceinline__ void narrow(float x, Float16* out) { out->bits = __half_as_ushort(__float2half_rn(x)); }
// One multiplication and one instruction of the special function unit. What is below 1e-38 becomes 0: beside a row's
// maximum, whose exponential is 1, it does not count.
__device__ __forceinline__ float exponential(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.4426950408889634f));
  return y;
}
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float logarithm(float x) { return logf(x); }
__device__ __forceinline__ double logarithm(double x) { return log(x); }
__device__ __forceinline__ uint32_t joined_halves(uint32_t low, uint32_t high) {
  return __funnelshift_r(low, high, 16);
}

#endif

__device__ __forceinline__ void narrow(float x, float* out) { *out = x; }
__device__ __forceinline__ void narrow(double x, double* out) { *out = x; }

// -inf of a type: what stands where a row of logits has no column, since its exponential is 0.
template <class T>
__device__ __forceinline__ T minus_infinity() {
  return -static_cast<T>(INFINITY);
}
template <>
__device__ __forceinline__ BFloat16 minus_infinity<BFloat16>() {
  return {0xff80};
}
template <>
__device__ __forceinline__ Float16 minus_infinity<Float16>() {
  return {0xfc00};
}

// body(T{}) with a type that is known only now.
template <class Body>
__device__ __forceinline__ void with_type(ScalarType type, const Body& body) {
  switch (type) {
    case ScalarType::kFloat32: return body(float{});
    case ScalarType::kBFloat16: return body(BFloat16{});
    case ScalarType::kFloat16: return body(Float16{});
    default: return body(double{});
  }
}

// One number of a type that is known only now: for the few that are not worth a loop of their own.
__device__ __forceinline__ double number_at(const void* data, ScalarType type, int64_t i) {
  switch (type) {
    case ScalarType::kFloat32: return static_cast<const float*>(data)[i];
    case ScalarType::kBFloat16: return widen(static_cast<const BFloat16*>(data)[i]);
    case ScalarType::kFloat16: return widen(static_cast<const Float16*>(data)[i]);
    default: return static_cast<const double*>(data)[i];
  }
}

}  // namespace cotuning::cuda
