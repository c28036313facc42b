// The row primitives, compiled once per instruction set. Everything above them (labels, options, threads, reductions)
// is compiled once and calls them through this table.
//
// `n` is the number of columns. Logits and gradients have the table's scalar type T; distributions and scratch rows
// have its compute type, ComputeType<T>: double for double, else float. No primitive reads or writes past a row.
#pragma once

#include "../types.h"

namespace cotuning::cpu {

// The result of one sweep over a row of logits z and a distribution q, relative to `shift`, a value near max(z).
struct SweepResult {
  double shift;
  double sum;   // sum of exp(z - shift)
  double dot;   // sum of q * (z - shift) over the terms where q is not 0
  double mass;  // sum of q
};

// Moments of z - shift under exp(b * (z - shift)), where b is the inverse temperature.
struct MomentResult {
  double shift;
  double sum;     // sum of e = exp(b * (z - shift))
  double first;   // sum of e * (z - shift)
  double second;  // sum of e * (z - shift)^2
};

struct RowKernels {
  const char* name;

  // Writes exp(z - shift) to `exponentials` unless that is null. If `q` is null, dot and mass are 0. `next` is the row
  // to be swept next, `written` the row to be written next; either may be null. The sweep prefetches both.
  // `least_shift` is a lower bound of the shift if the row is finite: log sum, and z - shift at the label, then stay
  // small, and their difference loses no digits. It must be at most the logarithm of the sum of all exp(z); -inf if
  // nothing is known.
  SweepResult (*sweep[kScalarTypes])(const void* z, const void* q, int64_t n, void* exponentials, const void* next,
                                     const void* written, double least_shift);
  // The largest logit of a row, if all are numbers.
  double (*largest[kScalarTypes])(const void* z, int64_t n);
  // The sums of a sweep with this shift, in double, from the exponentials that it stored. Without q only their own.
  SweepResult (*sums_in_double[kScalarTypes])(const void* z, const void* q, const void* exponentials, int64_t n,
                                              double shift);
  // gradient = softmax_factor * exponentials - target_factor * q; `q` may be null. `stream`: the stores bypass the
  // cache, and the thread calls finish_streaming before another thread reads.
  void (*gradient[kScalarTypes])(const void* exponentials, const void* q, int64_t n, double softmax_factor,
                                 double target_factor, bool stream, void* gradient);
  void (*finish_streaming)();
  // row = factor * row
  void (*scale[kScalarTypes])(void* row, int64_t n, double factor);
  // out = factor_a * a + factor_b * b for rows a and b (b may be null) of the table's type; `out` is float or double.
  void (*mix_to_float[kScalarTypes])(const void* a, double factor_a, const void* b, double factor_b, int64_t n,
                                     float* out);
  void (*mix_to_double[kScalarTypes])(const void* a, double factor_a, const void* b, double factor_b, int64_t n,
                                      double* out);
  // row = the values, rounded to the table's type
  void (*store_float[kScalarTypes])(const float* values, int64_t n, void* row);
  // Whether any element of the row differs from 0; a NaN does.
  bool (*any_nonzero[kScalarTypes])(const void* row, int64_t n);
  // sums = before + softmax(b * z), where `before` is `sums` or does not overlap it; `exponentials` is scratch. False
  // if the row has no softmax: the sums are NaN then.
  bool (*add_softmax_to_float[kScalarTypes])(const void* z, int64_t n, double b, void* exponentials, const void* next,
                                             const float* before, float* sums);
  bool (*add_softmax_to_double[kScalarTypes])(const void* z, int64_t n, double b, void* exponentials, const void* next,
                                              const double* before, double* sums);
  MomentResult (*moments[kScalarTypes])(const void* z, int64_t n, double b, const void* next, double least_shift);

  // sum of q * log(q), 0 where q is 0
  double (*sum_q_log_q_float)(const float* q, int64_t n);
  double (*sum_q_log_q_double)(const double* q, int64_t n);
};

// The tables that this build has and this processor runs, fastest first; and the one in use.
int row_kernels_count();
const RowKernels& row_kernels_at(int i);
const RowKernels& row_kernels();
// Returns false and changes nothing if no table has that name.
bool use_row_kernels(const char* name);
// The value of COTUNING_KERNELS_CPU_ISA if no table has that name, else null.
const char* unmet_isa_request();

}  // namespace cotuning::cpu
