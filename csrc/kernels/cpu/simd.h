// The vector vocabulary of this translation unit's instruction set, and the functions written in it.
#pragma once

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include "simd_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "simd_avx2.h"
#else
#include "simd_portable.h"
namespace cotuning::cpu::COTUNING_ISA {
using Float = Lanes<float>;
static inline Float broadcast(float x) { return broadcast_lanes(x); }
template <class T>
static inline Float load(const T* p) {
  return load_lanes<float>(p);
}
template <class T>
static inline Float load_partial(const T* p, int n) {
  return load_lanes_partial<float>(p, n);
}
static inline Float scale_by_power_of_two(Float x, Float shifted) {
  typedef uint32_t Bits __attribute__((vector_size(16)));
  return {reinterpret_cast<Float::Vector>(reinterpret_cast<Bits>(x.v) + (reinterpret_cast<Bits>(shifted.v) << 23))};
}
static inline Float zero_below(Float test, Float bound, Float x) { return {test.v < bound.v ? Float::Vector{} : x.v}; }
static inline void prefetch(const void* p) { __builtin_prefetch(p); }
static inline void finish_streaming() {}
}  // namespace cotuning::cpu::COTUNING_ISA
#endif

namespace cotuning::cpu::COTUNING_ISA {

// Prefetches a line that is about to be written.
static inline void prefetch_to_write(const void* p) { __builtin_prefetch(p, 1); }

// exp(x) to about 1 ulp (and 3e-9 |x| with AVX-512) for x <= 88; 0 below -87.3 (so exp(-inf) = 0); NaN for NaN. The
// result is undefined above 88.
//
// exp_in_range(x) is as exact for x in [-87.3, 88]. Above 88 the result is at least 1e38. Below -87.3 it is less than
// 1e-37 or, at -1e13 and below, anything but a finite positive number. A sum of these therefore shows that an x was out
// of range.
#if !defined(COTUNING_HAS_EXP)
// x = n ln 2 + r with n the nearest integer, |r| <= ln 2 / 2: exp(x) = 2^n exp(r). Adding 1.5 * 2^23 rounds x / ln 2 to
// an integer and leaves that integer in the low bits, ready for the exponent field. ln 2 is subtracted in two parts.
// The first, 0.693359375, ends in zero bits, so that n times it is exact. exp(r) = 1 + r + r^2 p(r), with Cephes'
// coefficients for p.
static inline Float exp(Float x) {
  const Float round = broadcast(0x1.8p23f);
  const Float shifted = fma(x, broadcast(1.44269504088896341f), round);
  const Float n = shifted - round;
  const Float r = fma(n, broadcast(2.12194440e-4f), fma(n, broadcast(-0.693359375f), x));
  Float p = broadcast(1.9875691500e-4f);
  p = fma(p, r, broadcast(1.3981999507e-3f));
  p = fma(p, r, broadcast(8.3334519073e-3f));
  p = fma(p, r, broadcast(4.1665795894e-2f));
  p = fma(p, r, broadcast(1.6666665459e-1f));
  p = fma(p, r, broadcast(5.0000001201e-1f));
  const Float exp_r = fma(p, r * r, r) + broadcast(1.0f);
  return zero_below(x, broadcast(-87.3f), scale_by_power_of_two(exp_r, shifted));
}
static inline Float exp_in_range(Float x) { return exp(min(broadcast(88.0f), x)); }
#endif

// log(x) for a positive normal x, to 1e-12; undefined elsewhere. Plain C++ without branches, which compilers vectorise.
//
// x = 2^e m with m in [sqrt(1/2), sqrt(2)): log x = e ln 2 + log(m), and log(m) = 2 (s + s^3 / 3 + s^5 / 5 + ...) with
// s = (m - 1) / (m + 1), of which |s| < 0.172.
static inline double log_of_normal(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const uint32_t shifted = bits - 0x3f3504f3u;  // bits of sqrt(1/2): the exponent now changes there
  const double e = static_cast<double>(static_cast<int32_t>(shifted) >> 23);
  bits = (shifted & 0x7fffffu) + 0x3f3504f3u;
  float m;
  memcpy(&m, &bits, sizeof m);
  const double f = static_cast<double>(m) - 1.0;
  const double s = f / (2.0 + f), s2 = s * s;
  double p = 2.0 / 13;
  p = p * s2 + 2.0 / 11;
  p = p * s2 + 2.0 / 9;
  p = p * s2 + 2.0 / 7;
  p = p * s2 + 2.0 / 5;
  p = p * s2 + 2.0 / 3;
  return e * 0.69314718055994530942 + s * (2.0 + s2 * p);
}

}  // namespace cotuning::cpu::COTUNING_ISA
