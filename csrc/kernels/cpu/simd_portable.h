// The vector vocabulary in plain C++: an array of lanes. Serves processors without AVX2, and double everywhere (which
// exists for gradcheck and for exact work, not for speed).
//
// The vocabulary, the same in all simd_*.h: Float (a vector of kLanes floats) and Double; load, load_partial (the
// first n lanes; the others are 0), store, store_partial, broadcast, + - *, fma(a, b, c) = a * b + c, max,
// reduce_add, reduce_max, exp, keep_first(x, n, other) = x in the first n lanes, and
// keep_where_nonzero(test, x) = x where test is not 0, else 0.
//
// Everything is in the namespace of its instruction set: two translation units compiled with different flags must not
// share one symbol, or the linker may give the AVX-512 copy to a processor without AVX-512. For the same reason no
// std:: function template is used below this line.
#pragma once

#include <math.h>
#include <string.h>

#include "types.h"

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
  static constexpr int kLanes = 8;
  using Scalar = F;
  F lane[kLanes];
};

#define COTUNING_EACH_LANE for (int k = 0; k < Lanes<F>::kLanes; ++k)

template <class F>
static inline Lanes<F> broadcast_lanes(F x) {
  Lanes<F> r;
  COTUNING_EACH_LANE r.lane[k] = x;
  return r;
}
template <class F>
static inline Lanes<F> operator+(Lanes<F> a, Lanes<F> b) {
  COTUNING_EACH_LANE a.lane[k] += b.lane[k];
  return a;
}
template <class F>
static inline Lanes<F> operator-(Lanes<F> a, Lanes<F> b) {
  COTUNING_EACH_LANE a.lane[k] -= b.lane[k];
  return a;
}
template <class F>
static inline Lanes<F> operator*(Lanes<F> a, Lanes<F> b) {
  COTUNING_EACH_LANE a.lane[k] *= b.lane[k];
  return a;
}
template <class F>
static inline Lanes<F> fma(Lanes<F> a, Lanes<F> b, Lanes<F> c) {
  COTUNING_EACH_LANE a.lane[k] = a.lane[k] * b.lane[k] + c.lane[k];
  return a;
}
template <class F>
static inline Lanes<F> max(Lanes<F> a, Lanes<F> b) {
  COTUNING_EACH_LANE a.lane[k] = a.lane[k] > b.lane[k] ? a.lane[k] : b.lane[k];
  return a;
}
template <class F>
static inline F reduce_add(Lanes<F> a) {
  F s = a.lane[0];
  for (int k = 1; k < Lanes<F>::kLanes; ++k) s += a.lane[k];
  return s;
}
template <class F>
static inline F reduce_max(Lanes<F> a) {
  F m = a.lane[0];
  for (int k = 1; k < Lanes<F>::kLanes; ++k) m = a.lane[k] > m ? a.lane[k] : m;
  return m;
}
template <class F>
static inline Lanes<F> keep_first(Lanes<F> x, int n, Lanes<F> other) {
  COTUNING_EACH_LANE x.lane[k] = k < n ? x.lane[k] : other.lane[k];
  return x;
}
template <class F>
static inline Lanes<F> keep_where_nonzero(Lanes<F> test, Lanes<F> x) {
  COTUNING_EACH_LANE x.lane[k] = test.lane[k] != 0 ? x.lane[k] : 0;
  return x;
}
template <class F, class T>
static inline Lanes<F> load_lanes(const T* p) {
  Lanes<F> r;
  COTUNING_EACH_LANE r.lane[k] = static_cast<F>(widen(p[k]));
  return r;
}
template <class F, class T>
static inline Lanes<F> load_lanes_partial(const T* p, int n) {
  Lanes<F> r;
  COTUNING_EACH_LANE r.lane[k] = k < n ? static_cast<F>(widen(p[k])) : 0;
  return r;
}
template <class F, class T>
static inline void store(T* p, Lanes<F> x) {
  COTUNING_EACH_LANE narrow(x.lane[k], p + k);
}
template <class F, class T>
static inline void store_partial(T* p, Lanes<F> x, int n) {
  for (int k = 0; k < n; ++k) narrow(x.lane[k], p + k);
}
static inline Lanes<double> exp(Lanes<double> x) {
  using F = double;
  COTUNING_EACH_LANE x.lane[k] = ::exp(x.lane[k]);
  return x;
}
#undef COTUNING_EACH_LANE

using Double = Lanes<double>;
static inline Double broadcast(double x) { return broadcast_lanes(x); }
static inline Double load(const double* p) { return load_lanes<double>(p); }
static inline Double load_partial(const double* p, int n) { return load_lanes_partial<double>(p, n); }

}  // namespace cotuning::cpu::COTUNING_ISA
