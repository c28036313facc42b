// The row primitives: what is compiled once per instruction set. Everything above them (labels, options, threads,
// reductions) is compiled once and calls them through this table.
//
// `n` is the number of columns. Logits and gradients are of the table's scalar type T; distributions and scratch rows
// are of its compute type, ComputeType<T>: double for double, else float. No primitive reads or writes past a row.
#pragma once

#include "../types.h"

namespace cotuning::cpu {

// What one sweep over a row of logits z against a distribution q finds, relative to `shift`, a value near max(z).
struct SweepResult {
  double shift;
  double sum;   // sum of exp(z - shift)
  double dot;   // sum of q * (z - shift), without the terms where q is 0
  double mass;  // sum of q
};

// Moments of z - shift under exp(b * (z - shift)), b being the inverse temperature.
struct MomentResult {
  double shift;
  double sum;     // sum of e = exp(b * (z - shift))
  double first;   // sum of e * (z - shift)
  double second;  // sum of e * (z - shift)^2
};

struct RowKernels {
  const char* name;

  // Writes exp(z - shift) to `exponentials` unless that is null. `q` may be null: dot and mass are then 0. `next` may
  // be null, or the row that will be swept next, and `written` null or the row that will be written next: they are
  // fetched into the cache meanwhile. `least_shift`: the shift is not below it, where the row is finite. What is
  // subtracted from one another later (log sum, and z - shift at the label) is then small, and loses no digits. At
  // most the logarithm of the sum of all exp(z); -inf where nothing is known.
  SweepResult (*sweep[kScalarTypes])(const void* z, const void* q, int64_t n, void* exponentials, const void* next,
                                     const void* written, double least_shift);
  // gradient = softmax_factor * exponentials - target_factor * q; `q` may be null. `stream`: write around the cache
  // (with a q only); the thread calls finish_streaming before another thread reads.
  void (*gradient[kScalarTypes])(const void* exponentials, const void* q, int64_t n, double softmax_factor,
                                 double target_factor, bool stream, void* gradient);
  void (*finish_streaming)();
  // row = factor * row
  void (*scale[kScalarTypes])(void* row, int64_t n, double factor);
  // out = factor_a * a + factor_b * b for rows a, b (b may be null) of the table's type and `out` in float or double.
  void (*mix_to_float[kScalarTypes])(const void* a, double factor_a, const void* b, double factor_b, int64_t n,
                                     float* out);
  void (*mix_to_double[kScalarTypes])(const void* a, double factor_a, const void* b, double factor_b, int64_t n,
                                      double* out);
  // row = values rounded to the table's type
  void (*store_float[kScalarTypes])(const float* values, int64_t n, void* row);
  // Whether any element of the row differs from 0 (a NaN does).
  bool (*any_nonzero[kScalarTypes])(const void* row, int64_t n);
  // sums += softmax(b * z); `exponentials` is scratch.
  void (*add_softmax_to_float[kScalarTypes])(const void* z, int64_t n, double b, void* exponentials, const void* next,
                                             float* sums);
  void (*add_softmax_to_double[kScalarTypes])(const void* z, int64_t n, double b, void* exponentials, const void* next,
                                              double* sums);
  MomentResult (*moments[kScalarTypes])(const void* z, int64_t n, double b, const void* next, double least_shift);

  // sum of q * log(q), 0 where q is 0
  double (*sum_q_log_q_float)(const float* q, int64_t n);
  double (*sum_q_log_q_double)(const double* q, int64_t n);
};

// The tables that this build has and this processor runs, fastest first, and the one in use.
int row_kernels_count();
const RowKernels& row_kernels_at(int i);
const RowKernels& row_kernels();
// False where there is no table of that name; the one in use then stays.
bool use_row_kernels(const char* name);
// What COTUNING_KERNELS_CPU_ISA asked for if it could not be had, else null.
const char* unmet_isa_request();

}  // namespace cotuning::cpu
