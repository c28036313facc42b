// The scalar types as the standards define them, in long double arithmetic and independent of the kernels.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include "../kernels/views.h"

namespace cotuning::test {

inline constexpr ScalarType kAllTypes[] = {ScalarType::kFloat32, ScalarType::kBFloat16, ScalarType::kFloat16,
                                           ScalarType::kFloat64};
inline constexpr long double kInfinity = std::numeric_limits<long double>::infinity();
inline constexpr long double kNaN = std::numeric_limits<long double>::quiet_NaN();

inline const char* name_of(ScalarType type) {
  constexpr const char* kNames[] = {"float32", "bfloat16", "float16", "float64"};
  return kNames[static_cast<int>(type)];
}

// The type that the kernels compute in.
inline ScalarType compute_type(ScalarType type) {
  return type == ScalarType::kFloat64 ? ScalarType::kFloat64 : ScalarType::kFloat32;
}

struct Format {
  int digits;  // of the significand, including the hidden one
  int min_exponent, max_exponent;
};

inline Format format_of(ScalarType type) {
  constexpr Format kFormats[] = {{24, -126, 127}, {8, -126, 127}, {11, -14, 15}, {53, -1022, 1023}};
  return kFormats[static_cast<int>(type)];
}

inline long double epsilon_of(ScalarType type) { return std::ldexp(1.0L, 1 - format_of(type).digits); }

inline long double lowest_of(ScalarType type) {
  const Format format = format_of(type);
  return -std::ldexp(2 - epsilon_of(type), format.max_exponent);
}

// The distance between neighbours of the type around x.
inline long double ulp(ScalarType type, long double x) {
  const Format format = format_of(type);
  if (!std::isfinite(x)) return 0;
  const int exponent = x == 0 ? format.min_exponent : std::max(std::ilogb(x), format.min_exponent);
  return std::ldexp(1.0L, exponent - format.digits + 1);
}

// The nearest number of the type, ties to even. The only rounding is the processor's, of long double to an integer.
inline long double round_to(ScalarType type, long double x) {
  if (!std::isfinite(x) || x == 0) return x;
  const long double rounded = std::rint(x / ulp(type, x)) * ulp(type, x);
  const bool overflows = std::fabs(rounded) >= std::ldexp(1.0L, format_of(type).max_exponent + 1);
  return std::copysign(overflows ? kInfinity : std::fabs(rounded), x);
}

inline long double decode_half(ScalarType type, uint16_t bits) {
  const Format format = format_of(type);
  const int fraction_bits = format.digits - 1;
  const int exponent = (bits & 0x7fff) >> fraction_bits;
  const int fraction = bits & ((1 << fraction_bits) - 1);
  const long double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == format.max_exponent - format.min_exponent + 2) return fraction != 0 ? kNaN : sign * kInfinity;
  const int significand = exponent == 0 ? fraction : fraction + (1 << fraction_bits);
  return sign *
         std::ldexp(1.0L * significand, format.min_exponent - fraction_bits + (exponent == 0 ? 0 : exponent - 1));
}

inline uint16_t encode_half(ScalarType type, long double x) {
  const Format format = format_of(type);
  const int fraction_bits = format.digits - 1;
  const int infinity = (format.max_exponent - format.min_exponent + 2) << fraction_bits;
  const long double rounded = round_to(type, x);
  int bits;
  if (std::isnan(rounded)) {
    bits = infinity | (1 << (fraction_bits - 1));
  } else if (std::isinf(rounded)) {
    bits = infinity;
  } else {
    const int exponent = rounded == 0 ? format.min_exponent : std::max(std::ilogb(rounded), format.min_exponent);
    // The hidden digit of a normal number carries into the exponent field, which is 0 for a subnormal one.
    bits = ((exponent - format.min_exponent) << fraction_bits) +
           static_cast<int>(std::ldexp(std::fabs(rounded), fraction_bits - exponent));
  }
  return static_cast<uint16_t>(bits | (std::signbit(rounded) ? 0x8000 : 0));
}

inline long double read_number(ScalarType type, const void* p) {
  if (type == ScalarType::kFloat64) {
    double value;
    std::memcpy(&value, p, sizeof value);
    return value;
  }
  if (type == ScalarType::kFloat32) {
    float value;
    std::memcpy(&value, p, sizeof value);
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, p, sizeof bits);
  return decode_half(type, bits);
}

inline void write_number(ScalarType type, void* p, long double x) {
  if (type == ScalarType::kFloat64) {
    const double value = static_cast<double>(x);
    std::memcpy(p, &value, sizeof value);
  } else if (type == ScalarType::kFloat32) {
    const float value = static_cast<float>(x);
    std::memcpy(p, &value, sizeof value);
  } else {
    const uint16_t bits = encode_half(type, x);
    std::memcpy(p, &bits, sizeof bits);
  }
}

// Equal within the tolerance. NaN equals NaN; an infinity equals only itself.
inline bool close(long double value, long double expected, long double tolerance) {
  if (std::isnan(expected) || std::isnan(value)) return std::isnan(expected) && std::isnan(value);
  if (std::isinf(expected) || std::isinf(value)) return value == expected;
  return std::fabs(value - expected) <= tolerance;
}

}  // namespace cotuning::test
