// The scalar types on the device, and the two functions whose instructions we choose ourselves.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>
#include <type_traits>

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
// 2^x, one instruction of the special function unit. A result below 1e-38 becomes 0: it is negligible beside the row's
// maximum, whose exponential is 1.
__device__ __forceinline__ float power_of_2(float x) {
#ifdef __CUDACC__  // CUDA has no function for this instruction, and a C++ compiler for the CPU knows no PTX
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}
__device__ __forceinline__ float exponential(float x) { return power_of_2(x * 1.4426950408889634f); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float logarithm(float x) { return logf(x); }
__device__ __forceinline__ double logarithm(double x) { return log(x); }
// The 32 bits that start `bits` after the first bit of `low`.
__device__ __forceinline__ uint32_t shifted_words(uint32_t low, uint32_t high, unsigned bits) {
  return __funnelshift_r(low, high, bits);
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

// Words of 32 bits that hold a number, or two of 16 bits each.
template <class T>
inline constexpr int kWordNumbers = 4 / sizeof(T);

__device__ __forceinline__ uint32_t word_of(float x) { return __float_as_uint(x); }
__device__ __forceinline__ uint32_t word_of(BFloat16 x) { return x.bits * 0x10001u; }
__device__ __forceinline__ uint32_t word_of(Float16 x) { return x.bits * 0x10001u; }

template <class To, class From>
__device__ __forceinline__ To same_bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// The larger number in each place; the other one where one is NaN.
template <class T>
__device__ __forceinline__ uint32_t larger_words(uint32_t a, uint32_t b) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return same_bits<uint32_t>(__hmax2(same_bits<__nv_bfloat162>(a), same_bits<__nv_bfloat162>(b)));
  } else if constexpr (std::is_same_v<T, Float16>) {
    return same_bits<uint32_t>(__hmax2(same_bits<__half2>(a), same_bits<__half2>(b)));
  } else {
    return __float_as_uint(fmaxf(__uint_as_float(a), __uint_as_float(b)));
  }
}

template <class T>
__device__ __forceinline__ void widen_word(uint32_t word, float* out) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    out[0] = __uint_as_float(word << 16);
    out[1] = __uint_as_float(word & 0xffff0000u);
  } else if constexpr (std::is_same_v<T, Float16>) {
    out[0] = __low2float(same_bits<__half2>(word));
    out[1] = __high2float(same_bits<__half2>(word));
  } else {
    out[0] = __uint_as_float(word);
  }
}

template <class T>
__device__ __forceinline__ float largest_of_word(uint32_t word) {
  float numbers[kWordNumbers<T>];
  widen_word<T>(word, numbers);
  return fmaxf(numbers[0], numbers[kWordNumbers<T> - 1]);
}

template <class T>
__device__ __forceinline__ uint32_t narrow_word(const float* x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return same_bits<uint32_t>(__floats2bfloat162_rn(x[0], x[1]));
  } else if constexpr (std::is_same_v<T, Float16>) {
    return same_bits<uint32_t>(__floats2half2_rn(x[0], x[1]));
  } else {
    return __float_as_uint(x[0]);
  }
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
