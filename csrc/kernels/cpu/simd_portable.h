// The vector vocabulary in the compiler's generic vectors (GCC and Clang): 16 bytes, which is SSE2 on every x86-64 and
// NEON on ARM. Serves processors without AVX2, and double on all processors (double is for gradcheck and exact work,
// not for speed).
//
// The vocabulary, the same in all simd_*.h: Float (a vector of kLanes floats) and Double; load, load_partial (the
// first n lanes; the others are 0), store, store_partial, store_streaming, broadcast, + - *, fma(a, b, c) = a * b + c,
// max, min (the second argument where one is NaN), reduce_add, reduce_max, exp, keep_first(x, n, other) = x in the
// first n lanes, and keep_where_nonzero(test, x) = x where test is not 0, else 0.
//
// Everything is in the namespace of its instruction set. If translation units with different flags shared a symbol, the
// linker could give the AVX-512 copy to a processor without AVX-512. For the same reason nothing below this line uses a
// std:: function template.
#pragma once

#include <math.h>
#include <string.h>

#include "../types.h"

namespace cotuning::cpu::COTUNING_ISA {

static inline float widen(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

static inline float widen(Float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t exponent = (x.bits >> 10) & 0x1fu;
  const uint32_t fraction = x.bits & 0x3ffu;
  float value;
  if (exponent == 0) {  // zero or subnormal: fraction * 2^-24, exact in float
    value = static_cast<float>(fraction) * 0x1p-24f;
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    bits |= sign;
    memcpy(&value, &bits, sizeof value);
    return value;
  }
  // 31 is infinity or NaN; otherwise the exponent's bias goes from 15 to 127.
  const uint32_t bits = sign | ((exponent == 31 ? 255u : exponent + 112u) << 23) | (fraction << 13);
  memcpy(&value, &bits, sizeof value);
  return value;
}

static inline float widen(float x) { return x; }
static inline double widen(double x) { return x; }

// Round to nearest, ties to even, as torch does.
static inline void narrow(float value, BFloat16* out) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  // The rounding carry would turn a NaN into an infinity or a zero.
  out->bits = value != value ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static inline void narrow(float value, Float16* out) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  uint32_t half;
  if (bits > 0x7f800000u) {
    half = 0x7e00u;  // NaN
  } else if (bits >= 0x477ff000u) {
    half = 0x7c00u;  // 65520 and above round to infinity
  } else if (bits < 0x38800000u) {
    // Below 2^-14 the result is subnormal. Adding 0.5 puts its last bit, 2^-24, at the last bit of a float, and the
    // processor rounds there.
    float magnitude;
    memcpy(&magnitude, &bits, sizeof magnitude);
    magnitude += 0.5f;
    memcpy(&half, &magnitude, sizeof half);
    half -= 0x3f000000u;
  } else {
    half = (bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

static inline void narrow(float value, float* out) { *out = value; }
static inline void narrow(double value, double* out) { *out = value; }
static inline void narrow(float value, double* out) { *out = value; }

template <class F>
struct Lanes {
  typedef F Vector __attribute__((vector_size(16)));
  static constexpr int kLanes = 16 / sizeof(F);
  using Scalar = F;
  Vector v;
};

template <class F>
static inline Lanes<F> broadcast_lanes(F x) {
  return {x - typename Lanes<F>::Vector{}};
}
template <class F>
static inline Lanes<F> operator+(Lanes<F> a, Lanes<F> b) {
  return {a.v + b.v};
}
template <class F>
static inline Lanes<F> operator-(Lanes<F> a, Lanes<F> b) {
  return {a.v - b.v};
}
template <class F>
static inline Lanes<F> operator*(Lanes<F> a, Lanes<F> b) {
  return {a.v * b.v};
}
template <class F>
static inline Lanes<F> fma(Lanes<F> a, Lanes<F> b, Lanes<F> c) {
  return {a.v * b.v + c.v};
}
template <class F>
static inline Lanes<F> max(Lanes<F> a, Lanes<F> b) {
  return {a.v > b.v ? a.v : b.v};
}
template <class F>
static inline Lanes<F> min(Lanes<F> a, Lanes<F> b) {
  return {a.v < b.v ? a.v : b.v};
}
template <class F>
static inline F reduce_add(Lanes<F> a) {
  F s = a.v[0];
  for (int k = 1; k < Lanes<F>::kLanes; ++k) s += a.v[k];
  return s;
}
template <class F>
static inline F reduce_max(Lanes<F> a) {
  F m = a.v[0];
  for (int k = 1; k < Lanes<F>::kLanes; ++k) m = a.v[k] > m ? a.v[k] : m;
  return m;
}
template <class F>
static inline Lanes<F> keep_first(Lanes<F> x, int n, Lanes<F> other) {
  for (int k = n; k < Lanes<F>::kLanes; ++k) x.v[k] = other.v[k];
  return x;
}
template <class F>
static inline Lanes<F> keep_where_nonzero(Lanes<F> test, Lanes<F> x) {
  const typename Lanes<F>::Vector zero{};
  return {test.v != zero ? x.v : zero};
}
template <class F, class T>
static inline Lanes<F> load_lanes(const T* p) {
  Lanes<F> r;
  for (int k = 0; k < Lanes<F>::kLanes; ++k) r.v[k] = static_cast<F>(widen(p[k]));
  return r;
}
template <class F, class T>
static inline Lanes<F> load_lanes_partial(const T* p, int n) {
  Lanes<F> r{};
  for (int k = 0; k < n; ++k) r.v[k] = static_cast<F>(widen(p[k]));
  return r;
}
template <class F, class T>
static inline void store(T* p, Lanes<F> x) {
  for (int k = 0; k < Lanes<F>::kLanes; ++k) narrow(static_cast<F>(x.v[k]), p + k);
}
template <class F, class T>
static inline void store_partial(T* p, Lanes<F> x, int n) {
  for (int k = 0; k < n; ++k) narrow(static_cast<F>(x.v[k]), p + k);
}
// Streaming stores, if the instruction set has them. `p` must be aligned to the size stored, at most to 64 bytes. Here
// they are plain stores.
template <class F, class T>
static inline void store_streaming(T* p, Lanes<F> x) {
  store(p, x);
}
// Stores two consecutive vectors: an instruction set may have a faster way for two.
template <class T, class V>
static inline void store_two(T* p, V a, V b) {
  store(p, a);
  store(p + V::kLanes, b);
}
template <class T, class V>
static inline void store_two_streaming(T* p, V a, V b) {
  store_streaming(p, a);
  store_streaming(p + V::kLanes, b);
}
static inline Lanes<double> exp(Lanes<double> x) {
  for (int k = 0; k < Lanes<double>::kLanes; ++k) x.v[k] = ::exp(x.v[k]);
  return x;
}

static inline Lanes<double> exp_in_range(Lanes<double> x) { return exp(x); }

using Double = Lanes<double>;
static inline Double broadcast(double x) { return broadcast_lanes(x); }
static inline Double load(const double* p) { return load_lanes<double>(p); }
static inline Double load_partial(const double* p, int n) { return load_lanes_partial<double>(p, n); }

}  // namespace cotuning::cpu::COTUNING_ISA
