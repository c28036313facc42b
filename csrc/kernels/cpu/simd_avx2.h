// The vector vocabulary (see simd_portable.h) in AVX2, FMA and F16C: 8 floats.
#pragma once

#include <immintrin.h>

#include "simd_portable.h"

namespace cotuning::cpu::COTUNING_ISA {

struct Float {
  static constexpr int kLanes = 8;
  using Scalar = float;
  __m256 v;
};

static inline __m256i first(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

static inline Float broadcast(float x) { return {_mm256_set1_ps(x)}; }
static inline Float operator+(Float a, Float b) { return {_mm256_add_ps(a.v, b.v)}; }
static inline Float operator-(Float a, Float b) { return {_mm256_sub_ps(a.v, b.v)}; }
static inline Float operator*(Float a, Float b) { return {_mm256_mul_ps(a.v, b.v)}; }
static inline Float fma(Float a, Float b, Float c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
static inline Float max(Float a, Float b) { return {_mm256_max_ps(a.v, b.v)}; }
static inline Float min(Float a, Float b) { return {_mm256_min_ps(a.v, b.v)}; }
static inline float reduce_add(Float a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
static inline float reduce_max(Float a) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_shuffle_ps(m, m, 1)));
}
static inline Float keep_first(Float x, int n, Float other) {
  return {_mm256_blendv_ps(other.v, x.v, _mm256_castsi256_ps(first(n)))};
}
static inline Float keep_where_nonzero(Float test, Float x) {
  return {_mm256_and_ps(_mm256_cmp_ps(test.v, _mm256_setzero_ps(), _CMP_NEQ_UQ), x.v)};
}

static inline Float from_bf16(__m128i x) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16))};
}
static inline __m128i to_bf16(Float x) {
  const __m256i bits = _mm256_castps_si256(x.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256 nan = _mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q);
  const __m256i result =
      _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7fc0), _mm256_castps_si256(nan));
  return _mm_packus_epi32(_mm256_castsi256_si128(result), _mm256_extracti128_si256(result, 1));
}
static inline Float from_fp16(__m128i x) { return {_mm256_cvtph_ps(x)}; }
static inline __m128i to_fp16(Float x) { return _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT); }

static inline __m128i load_16bit(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
static inline void store_16bit(void* p, __m128i x) { _mm_storeu_si128(static_cast<__m128i*>(p), x); }
// AVX2 has no masked 16-bit access.
static inline __m128i load_16bit_partial(const void* p, int n) {
  __m128i x = _mm_setzero_si128();
  memcpy(&x, p, 2 * static_cast<size_t>(n));
  return x;
}

static inline Float load(const float* p) { return {_mm256_loadu_ps(p)}; }
static inline Float load(const BFloat16* p) { return from_bf16(load_16bit(p)); }
static inline Float load(const Float16* p) { return from_fp16(load_16bit(p)); }
static inline Float load_partial(const float* p, int n) { return {_mm256_maskload_ps(p, first(n))}; }
static inline Float load_partial(const BFloat16* p, int n) { return from_bf16(load_16bit_partial(p, n)); }
static inline Float load_partial(const Float16* p, int n) { return from_fp16(load_16bit_partial(p, n)); }
static inline void store(float* p, Float x) { _mm256_storeu_ps(p, x.v); }
static inline void store(BFloat16* p, Float x) { store_16bit(p, to_bf16(x)); }
static inline void store(Float16* p, Float x) { store_16bit(p, to_fp16(x)); }
static inline void store_partial(float* p, Float x, int n) { _mm256_maskstore_ps(p, first(n), x.v); }
static inline void store_partial(BFloat16* p, Float x, int n) {
  const __m128i bits = to_bf16(x);
  memcpy(p, &bits, 2 * static_cast<size_t>(n));
}
static inline void store_partial(Float16* p, Float x, int n) {
  const __m128i bits = to_fp16(x);
  memcpy(p, &bits, 2 * static_cast<size_t>(n));
}

static inline Float scale_by_power_of_two(Float x, Float shifted) {
  return {_mm256_castsi256_ps(
      _mm256_add_epi32(_mm256_castps_si256(x.v), _mm256_slli_epi32(_mm256_castps_si256(shifted.v), 23)))};
}
static inline Float zero_below(Float test, Float bound, Float x) {
  return {_mm256_and_ps(_mm256_cmp_ps(test.v, bound.v, _CMP_NLT_UQ), x.v)};
}
static inline void store_streaming(float* p, Float x) { _mm256_stream_ps(p, x.v); }
static inline void store_streaming(BFloat16* p, Float x) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), to_bf16(x));
}
static inline void store_streaming(Float16* p, Float x) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), to_fp16(x)); }
static inline void finish_streaming() { _mm_sfence(); }
static inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

}  // namespace cotuning::cpu::COTUNING_ISA
