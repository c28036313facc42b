// The scalar types on the device, and the two functions whose instructions we choose ourselves.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "device.h"
#include "problems.h"

namespace cotuning::cuda {

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }

__device__ __forceinline__ float widen(BFloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
__device__ __forceinline__ float widen(Float16 x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ __forceinline__ void narrow(float x, BFloat16* out) {
  out->bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
}
__device__ __forceinline__ void narrow(float x, Float16* out) { out->bits = __half_as_ushort(__float2half_rn(x)); }
// One multiplication and one instruction of the special function unit. A result below 1e-38 becomes 0: it is negligible
// beside the row's maximum, whose exponential is 1.
__device__ __forceinline__ float exponential(float x) {
#ifdef __CUDACC__  // CUDA has no function for this instruction, and a C++ compiler for the CPU knows no PTX
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.4426950408889634f));
  return y;
#else
  return exp2f(x * 1.4426950408889634f);
#endif
}
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float logarithm(float x) { return logf(x); }
__device__ __forceinline__ double logarithm(double x) { return log(x); }
__device__ __forceinline__ uint32_t joined_halves(uint32_t low, uint32_t high) {
  return __funnelshift_r(low, high, 16);
}

__device__ __forceinline__ void narrow(float x, float* out) { *out = x; }
__device__ __forceinline__ void narrow(double x, double* out) { *out = x; }

// -inf in a type. It fills columns outside a row of logits, since its exponential is 0.
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

// Calls body(T{}) with a type that is known only at run time.
template <class Body>
__device__ __forceinline__ void with_type(ScalarType type, const Body& body) {
  switch (type) {
    case ScalarType::kFloat32: return body(float{});
    case ScalarType::kBFloat16: return body(BFloat16{});
    case ScalarType::kFloat16: return body(Float16{});
    default: return body(double{});
  }
}

// One number of a type that is known only at run time: for reads too rare to deserve a typed loop.
__device__ __forceinline__ double number_at(const void* data, ScalarType type, int64_t i) {
  switch (type) {
    case ScalarType::kFloat32: return static_cast<const float*>(data)[i];
    case ScalarType::kBFloat16: return widen(static_cast<const BFloat16*>(data)[i]);
    case ScalarType::kFloat16: return widen(static_cast<const Float16*>(data)[i]);
    default: return static_cast<const double*>(data)[i];
  }
}

}  // namespace cotuning::cuda
