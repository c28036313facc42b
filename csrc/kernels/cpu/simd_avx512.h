// The vector vocabulary (see simd_portable.h) in AVX-512: 16 floats, and masked loads and stores for the end of a row.
// With AVX512_BF16, one instruction rounds two vectors to bfloat16.
#pragma once

#include <immintrin.h>

#include "simd_portable.h"

namespace cotuning::cpu::COTUNING_ISA {

struct Float {
  static constexpr int kLanes = 16;
  using Scalar = float;
  __m512 v;
};

static inline __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1u); }

static inline Float broadcast(float x) { return {_mm512_set1_ps(x)}; }
static inline Float operator+(Float a, Float b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline Float operator-(Float a, Float b) { return {_mm512_sub_ps(a.v, b.v)}; }
static inline Float operator*(Float a, Float b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline Float fma(Float a, Float b, Float c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
static inline Float max(Float a, Float b) { return {_mm512_max_ps(a.v, b.v)}; }
static inline Float min(Float a, Float b) { return {_mm512_min_ps(a.v, b.v)}; }
static inline float reduce_add(Float a) { return _mm512_reduce_add_ps(a.v); }
static inline float reduce_max(Float a) { return _mm512_reduce_max_ps(a.v); }
static inline Float keep_first(Float x, int n, Float other) { return {_mm512_mask_mov_ps(other.v, first(n), x.v)}; }
static inline Float keep_where_nonzero(Float test, Float x) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(test.v, _mm512_setzero_ps(), _CMP_NEQ_UQ), x.v)};
}

// Moves each 16 bits to the upper half of 32 and zeros the lower: one instruction instead of widening and shifting.
static inline Float from_bf16(__m256i x) {
  const __m512i sources = _mm512_set_epi16(15, 15, 14, 14, 13, 13, 12, 12, 11, 11, 10, 10, 9, 9, 8, 8, 7, 7, 6, 6, 5, 5,
                                           4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
  return {_mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, sources, _mm512_castsi256_si512(x)))};
}
static inline __m256i to_bf16(Float x) {
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  const __m512i result = _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0));
  return _mm512_cvtepi32_epi16(result);
}
static inline Float from_fp16(__m256i x) { return {_mm512_cvtph_ps(x)}; }
static inline __m256i to_fp16(Float x) { return _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT); }

static inline __m256i load_16bit(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
static inline void store_16bit(void* p, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }

static inline Float load(const float* p) { return {_mm512_loadu_ps(p)}; }
static inline Float load(const BFloat16* p) { return from_bf16(load_16bit(p)); }
static inline Float load(const Float16* p) { return from_fp16(load_16bit(p)); }
static inline Float load_partial(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
static inline Float load_partial(const BFloat16* p, int n) { return from_bf16(_mm256_maskz_loadu_epi16(first(n), p)); }
static inline Float load_partial(const Float16* p, int n) { return from_fp16(_mm256_maskz_loadu_epi16(first(n), p)); }
static inline void store(float* p, Float x) { _mm512_storeu_ps(p, x.v); }
static inline void store(BFloat16* p, Float x) { store_16bit(p, to_bf16(x)); }
static inline void store(Float16* p, Float x) { store_16bit(p, to_fp16(x)); }
static inline void store_partial(float* p, Float x, int n) { _mm512_mask_storeu_ps(p, first(n), x.v); }
static inline void store_partial(BFloat16* p, Float x, int n) { _mm256_mask_storeu_epi16(p, first(n), to_bf16(x)); }
static inline void store_partial(Float16* p, Float x, int n) { _mm256_mask_storeu_epi16(p, first(n), to_fp16(x)); }

// x, but 0 where `test` is below `bound`; where `test` is NaN, x stays.
static inline Float zero_below(Float test, Float bound, Float x) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(test.v, bound.v, _CMP_NLT_UQ), x.v)};
}

// exp(x) = 2^k T_j exp(r) for x = (k + j / 16) ln 2 + r with T_j = 2^(j / 16). The table of 16 floats fits in one
// register, and one instruction looks up 16 of them.
//
// Adding 1.5 * 2^19 rounds x / ln 2 to a multiple of 1/16 and leaves j in the lowest bits, where the look-up reads it.
// |r| <= ln 2 / 32, where exp(r) = 1 + r + r^2 (c + d r) to 1.6e-9. ln 2 as a float is off by 3e-9 of its value, so one
// subtraction is enough: the exponential is off by 3e-9 |x|, less than from one rounding of x. scalef multiplies by
// 2^floor(n), and overflows and underflows correctly.
#define COTUNING_HAS_EXP
static inline Float exp_by_table(Float x) {
  const __m512 table =
      _mm512_setr_ps(0x1.000000p+0f, 0x1.0b5586p+0f, 0x1.172b84p+0f, 0x1.2387a6p+0f, 0x1.306fe0p+0f, 0x1.3dea64p+0f,
                     0x1.4bfdaep+0f, 0x1.5ab07ep+0f, 0x1.6a09e6p+0f, 0x1.7a1148p+0f, 0x1.8ace54p+0f, 0x1.9c4918p+0f,
                     0x1.ae89fap+0f, 0x1.c199bep+0f, 0x1.d5818ep+0f, 0x1.ea4afap+0f);
  const Float round = broadcast(0x1.8p19f);
  const Float shifted = fma(x, broadcast(1.44269504088896341f), round);
  const Float n = shifted - round;
  const Float r = fma(n, broadcast(-0.693147180559945309f), x);
  const Float power = {_mm512_permutexvar_ps(_mm512_castps_si512(shifted.v), table)};
  const Float p = fma(fma(r, broadcast(0.16666748f), broadcast(0.50001615f)), r * r, r);
  return {_mm512_scalef_ps(fma(power, p, power).v, n.v)};
}
// exp(x) for x <= 88; 0 below -87.3 (so exp(-inf) = 0); NaN for NaN. The result is undefined above 88.
static inline Float exp(Float x) { return zero_below(x, broadcast(-87.3f), exp_by_table(x)); }
static inline Float exp_in_range(Float x) { return exp_by_table(x); }

static inline void store_streaming(float* p, Float x) { _mm512_stream_ps(p, x.v); }
static inline void store_streaming(BFloat16* p, Float x) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), to_bf16(x));
}
static inline void store_streaming(Float16* p, Float x) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), to_fp16(x));
}
#if defined(__AVX512BF16__)
static inline __m512i to_bf16(Float a, Float b) { return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b.v, a.v)); }
// The AVX512_BF16 instruction turns subnormal numbers into 0. They are rare: testing for them costs less than rounding
// in several steps.
static inline bool any_subnormal(Float a, Float b) {
  constexpr int kSubnormal = 0x20;
  return !_kortestz_mask16_u8(_mm512_fpclass_ps_mask(a.v, kSubnormal), _mm512_fpclass_ps_mask(b.v, kSubnormal));
}
static inline void store_two(BFloat16* p, Float a, Float b) {
  if (!any_subnormal(a, b)) return _mm512_storeu_si512(p, to_bf16(a, b));
  store(p, a);
  store(p + Float::kLanes, b);
}
static inline void store_two_streaming(BFloat16* p, Float a, Float b) {
  if (!any_subnormal(a, b)) return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), to_bf16(a, b));
  store_streaming(p, a);
  store_streaming(p + Float::kLanes, b);
}
#endif
static inline void finish_streaming() { _mm_sfence(); }
static inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

}  // namespace cotuning::cpu::COTUNING_ISA
