// The row primitives of rows.h, written once in the vector vocabulary. A translation unit defines COTUNING_ISA (a
// namespace) and includes this file; see rows_avx512.cpp.
//
// The mathematics: for logits z, a distribution q with mass Q = sum(q), and any shift m,
//
//   s = sum exp(z - m)     loss = Q log(s) - sum q (z - m)     dloss/dz = (Q / s) exp(z - m) - q
//
// One sweep stores exp(z - m) in scratch; another combines it with q. The products q (z - m) are summed after the
// shift: before it, logits with a common offset of 1e4 would cancel to noise.
#pragma once

#include "rows.h"
#include "simd.h"

namespace cotuning::cpu::COTUNING_ISA {

template <class T>
struct VectorOf {
  using type = Float;
};
template <>
struct VectorOf<double> {
  using type = Double;
};
template <class T>
using Vector = typename VectorOf<T>::type;

// The shift is the maximum of the first elements only, which saves a sweep over the row. While the sums are far from
// overflowing, they are as exact as with the true maximum.
constexpr int kProvisionalElements = 64;
constexpr double kLargestSum = 1e26;

// The value of z - m in the lanes past the end of a row. Its exponential is 1e-38, which is lost in a sum of at least
// 1. It is finite, so that 0 * kTail is 0.
constexpr float kTail = -87.0f;

template <class T>
static inline Vector<T> max_over(const T* z, int64_t n) {
  using V = Vector<T>;
  V m = broadcast(static_cast<typename V::Scalar>(-INFINITY));
  int64_t i = 0;
  for (; i + V::kLanes <= n; i += V::kLanes) m = max(load(z + i), m);
  if (i < n) {
    const int tail = static_cast<int>(n - i);
    m = max(keep_first(load_partial(z + i, tail), tail, m), m);
  }
  return m;
}

// The same over kProvisionalElements, which most rows have: a constant count unrolls the loop.
template <class T>
static inline Vector<T> max_over_first(const T* z) {
  using V = Vector<T>;
  V m = broadcast(static_cast<typename V::Scalar>(-INFINITY));
  for (int i = 0; i < kProvisionalElements; i += V::kLanes) m = max(load(z + i), m);
  return m;
}

// Each sum has two accumulators that take alternate vectors, so that each chain of additions is half as long.
template <class V>
struct SweepSums {
  V sum = broadcast(typename V::Scalar(0));
  V dot = broadcast(typename V::Scalar(0));
  V mass = broadcast(typename V::Scalar(0));
};

template <bool kMasked, bool kTarget, class V>
static inline V sweep_vector(V x, V q, SweepSums<V>& sums) {
  const V e = kMasked ? exp(x) : exp_in_range(x);
  sums.sum = sums.sum + e;
  if constexpr (kTarget) {
    sums.dot = kMasked ? sums.dot + keep_where_nonzero(q, q * x) : fma(q, x, sums.dot);
    sums.mass = sums.mass + q;
  }
  return e;
}

template <class C>
struct PartSums {
  C sum, dot, mass;
};

// Sweeps part of a row with fresh accumulators. kMasked: for rows with numbers that are not finite. exp(-inf) is 0, and
// a logit of -inf where q is 0 adds 0 to the dot product instead of 0 * -inf = NaN. kStore: whether to store the
// exponentials, which only a gradient needs.
template <bool kMasked, bool kTarget, bool kStore, class T>
[[gnu::always_inline]] static inline PartSums<ComputeType<T>> sweep_part(const T* z, const ComputeType<T>* q, int64_t n,
                                                                         ComputeType<T>* exponentials, const T* next,
                                                                         const T* written, ComputeType<T> shift_value) {
  using V = Vector<T>;
  const V shift = broadcast(shift_value);
  const V none = broadcast(ComputeType<T>(0));
  constexpr int kStep = 2 * V::kLanes;
  SweepSums<V> even, odd;
  const auto sweep_at = [&](int64_t i, SweepSums<V>& sums) {
    const V e = sweep_vector<kMasked, kTarget>(load(z + i) - shift, kTarget ? load(q + i) : none, sums);
    if constexpr (kStore) store(exponentials + i, e);
  };
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    if (next != nullptr) {
      prefetch(next + i);
      if constexpr (kStep * sizeof(T) > 64) prefetch(next + i + V::kLanes);
    }
    if (written != nullptr) {
      prefetch_to_write(written + i);
      if constexpr (kStep * sizeof(T) > 64) prefetch_to_write(written + i + V::kLanes);
    }
    sweep_at(i, even);
    sweep_at(i + V::kLanes, odd);
  }
  for (; i + V::kLanes <= n; i += V::kLanes) sweep_at(i, even);
  if (i < n) {
    const int tail = static_cast<int>(n - i) & (V::kLanes - 1);  // no change; tells g++ the range
    const V x = keep_first(load_partial(z + i, tail) - shift, tail, broadcast(static_cast<ComputeType<T>>(kTail)));
    const V e = sweep_vector<kMasked, kTarget>(x, kTarget ? load_partial(q + i, tail) : none, odd);
    if constexpr (kStore) store_partial(exponentials + i, e, tail);
  }
  if constexpr (!kTarget) return {reduce_add(even.sum + odd.sum), 0, 0};
  return {reduce_add(even.sum + odd.sum), reduce_add(even.dot + odd.dot), reduce_add(even.mass + odd.mass)};
}

// The same for a part that begins later. Not inlined: the sums over all parts would take registers that the loop
// needs.
template <bool kMasked, bool kTarget, bool kStore, class T>
[[gnu::noinline]] static PartSums<ComputeType<T>> sweep_later_part(const T* z, const ComputeType<T>* q, int64_t begin,
                                                                   int64_t n, ComputeType<T>* exponentials,
                                                                   const T* next, const T* written,
                                                                   ComputeType<T> shift_value) {
  return sweep_part<kMasked, kTarget, kStore>(
      z + begin, kTarget ? q + begin : nullptr, n, kStore ? exponentials + begin : nullptr,
      next == nullptr ? nullptr : next + begin, written == nullptr ? nullptr : written + begin, shift_value);
}

// Sums a row in parts of kChain additions to each accumulator. One chain through a long row would add small numbers to
// an ever larger sum. Where the numbers are equal (smoothed labels, a uniform distribution), each addition errs in the
// same direction: 1e-5 of the mass for 22 000 classes.
template <bool kMasked, bool kTarget, bool kStore, class T>
static inline SweepResult sweep_with_shift(const T* z, const ComputeType<T>* q, int64_t n, ComputeType<T>* exponentials,
                                           const T* next, const T* written, ComputeType<T> shift_value) {
  constexpr int kChain = 32;
  constexpr int64_t kPart = kChain * 2 * Vector<T>::kLanes;
  const auto first =
      sweep_part<kMasked, kTarget, kStore>(z, q, n < kPart ? n : kPart, exponentials, next, written, shift_value);
  SweepResult result{shift_value, first.sum, first.dot, first.mass};
  for (int64_t begin = kPart; begin < n; begin += kPart) {
    const int64_t count = n - begin < kPart ? n - begin : kPart;
    const auto sums =
        sweep_later_part<kMasked, kTarget, kStore>(z, q, begin, count, exponentials, next, written, shift_value);
    result.sum += sums.sum;
    result.dot += sums.dot;
    result.mass += sums.mass;
  }
  return result;
}

// The maximum of the first elements, but at least least_shift.
template <class T>
static inline ComputeType<T> provisional_shift(const T* z, int64_t n, double least_shift) {
  using C = ComputeType<T>;
  const C first = reduce_max(n < kProvisionalElements ? max_over(z, n) : max_over_first(z));
  const C least = static_cast<C>(least_shift);
  return least > first ? least : first;
}

static inline bool finite(double x) { return x - x == 0; }
static inline bool sum_in_range(double sum) { return sum > 0 && sum <= kLargestSum; }  // a NaN is neither

template <bool kTarget, bool kStore, class T>
static inline SweepResult sweep_row(const T* z, const ComputeType<T>* q, int64_t n, ComputeType<T>* exponentials,
                                    const T* next, const T* written, double least_shift) {
  const SweepResult result = sweep_with_shift<false, kTarget, kStore>(z, q, n, exponentials, next, written,
                                                                      provisional_shift(z, n, least_shift));
  if (sum_in_range(result.sum) && finite(result.dot)) return result;
  // A large logit late in the row, or one that is not finite: sweep again with the true maximum. A result that is still
  // not finite is what the formula gives: NaN for a row with a NaN, with +inf, or with only -inf.
  const T* none = nullptr;
  return sweep_with_shift<true, kTarget, kStore>(z, q, n, exponentials, none, none, reduce_max(max_over(z, n)));
}

template <class T>
SweepResult sweep(const void* z, const void* q, int64_t n, void* exponentials, const void* next, const void* written,
                  double least_shift) {
  using C = ComputeType<T>;
  const auto* logits = static_cast<const T*>(z);
  const auto* distribution = static_cast<const C*>(q);
  const auto* next_logits = static_cast<const T*>(next);
  const auto* next_written = static_cast<const T*>(written);
  auto* e = static_cast<C*>(exponentials);
  const auto row = q == nullptr ? (e == nullptr ? sweep_row<false, false, T> : sweep_row<false, true, T>)
                                : (e == nullptr ? sweep_row<true, false, T> : sweep_row<true, true, T>);
  return row(logits, distribution, n, e, next_logits, next_written, least_shift);
}

template <class T>
double largest(const void* z, int64_t n) {
  return static_cast<double>(reduce_max(max_over(static_cast<const T*>(z), n)));
}

// The sums of a sweep with the shift `shift` again, from the exponentials that it stored, in double: each number is one
// of float, so that only its own rounding counts.
template <bool kTarget, class T>
static inline SweepResult sums_in_double_of_row(const void* z, const void* q, const void* exponentials, int64_t n,
                                                double shift) {
  using C = ComputeType<T>;
  const auto* logits = static_cast<const T*>(z);
  const auto* distribution = static_cast<const C*>(q);
  const auto* e = static_cast<const C*>(exponentials);
  constexpr int kSums = 16;
  double sum[kSums] = {}, dot[kSums] = {}, mass[kSums] = {};
  const auto add = [&](int64_t i, int k) {
    sum[k] += static_cast<double>(e[i]);
    if constexpr (!kTarget) return;
    const auto p = static_cast<double>(distribution[i]);
    const double product = p * (static_cast<double>(widen(logits[i])) - shift);
    dot[k] += p == 0 ? 0 : product;
    mass[k] += p;
  };
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums) {
    for (int k = 0; k < kSums; ++k) add(i + k, k);
  }
  for (; i < n; ++i) add(i, 0);
  SweepResult result{shift, 0, 0, 0};
  for (int k = 0; k < kSums; ++k) {
    result.sum += sum[k];
    result.dot += dot[k];
    result.mass += mass[k];
  }
  return result;
}

template <class T>
SweepResult sums_in_double(const void* z, const void* q, const void* exponentials, int64_t n, double shift) {
  return q == nullptr ? sums_in_double_of_row<false, T>(z, q, exponentials, n, shift)
                      : sums_in_double_of_row<true, T>(z, q, exponentials, n, shift);
}

template <bool kTarget, bool kStream, class T>
static inline void gradient_row(const ComputeType<T>* e, const ComputeType<T>* q, int64_t n,
                                ComputeType<T> softmax_factor, ComputeType<T> target_factor, T* gradient) {
  using V = Vector<T>;
  const V a = broadcast(softmax_factor), b = broadcast(-target_factor);
  const auto vector_at = [&](int64_t i) {
    const V p = a * load(e + i);
    return kTarget ? fma(b, load(q + i), p) : p;
  };
  int64_t i = 0;
  const auto go_to = [&](int64_t end) {
    for (; i + V::kLanes <= end; i += V::kLanes) store(gradient + i, vector_at(i));
    if (i == end) return;
    const int part = static_cast<int>(end - i);
    const V p = a * load_partial(e + i, part);
    store_partial(gradient + i, kTarget ? fma(b, load_partial(q + i, part), p) : p, part);
    i = end;
  };
  if constexpr (kStream) {  // up to the start of a cache line
    constexpr uintptr_t kLine = 64;
    const auto head = static_cast<int64_t>((kLine - reinterpret_cast<uintptr_t>(gradient) % kLine) % kLine / sizeof(T));
    go_to(head < n ? head : n);
  }
  for (; i + 2 * V::kLanes <= n; i += 2 * V::kLanes) {
    if constexpr (kStream) {
      store_two_streaming(gradient + i, vector_at(i), vector_at(i + V::kLanes));
    } else {
      store_two(gradient + i, vector_at(i), vector_at(i + V::kLanes));
    }
  }
  go_to(n);
}

template <class T>
void gradient(const void* exponentials, const void* q, int64_t n, double softmax_factor, double target_factor,
              bool stream, void* out) {
  using C = ComputeType<T>;
  const auto* e = static_cast<const C*>(exponentials);
  const auto* distribution = static_cast<const C*>(q);
  const C a = static_cast<C>(softmax_factor), b = static_cast<C>(target_factor);
  auto* row = static_cast<T*>(out);
  if (q == nullptr && stream) {
    gradient_row<false, true>(e, distribution, n, a, b, row);
  } else if (q == nullptr) {
    gradient_row<false, false>(e, distribution, n, a, b, row);
  } else if (stream) {
    gradient_row<true, true>(e, distribution, n, a, b, row);
  } else {
    gradient_row<true, false>(e, distribution, n, a, b, row);
  }
}

template <class T>
void scale(void* row, int64_t n, double factor) {
  using V = Vector<T>;
  auto* x = static_cast<T*>(row);
  const V f = broadcast(static_cast<ComputeType<T>>(factor));
  int64_t i = 0;
  for (; i + 2 * V::kLanes <= n; i += 2 * V::kLanes) store_two(x + i, f * load(x + i), f * load(x + i + V::kLanes));
  for (; i + V::kLanes <= n; i += V::kLanes) store(x + i, f * load(x + i));
  if (i < n) {
    const int tail = static_cast<int>(n - i);
    store_partial(x + i, f * load_partial(x + i, tail), tail);
  }
}

template <class T, class C>
void mix(const void* a, double factor_a, const void* b, double factor_b, int64_t n, C* out) {
  const auto* row_a = static_cast<const T*>(a);
  const auto* row_b = static_cast<const T*>(b);
  const C fa = static_cast<C>(factor_a), fb = static_cast<C>(factor_b);
  if (b == nullptr) {
    for (int64_t i = 0; i < n; ++i) out[i] = fa * static_cast<C>(widen(row_a[i]));
  } else {
    for (int64_t i = 0; i < n; ++i)
      out[i] = fa * static_cast<C>(widen(row_a[i])) + fb * static_cast<C>(widen(row_b[i]));
  }
}

template <class T>
void store_from_float(const float* values, int64_t n, void* row) {
  auto* out = static_cast<T*>(row);
  for (int64_t i = 0; i < n; ++i) narrow(values[i], out + i);
}

template <class T>
bool any_nonzero(const void* row, int64_t n) {
  const auto* x = static_cast<const T*>(row);
  for (int64_t i = 0; i < n; ++i) {
    if (widen(x[i]) != 0) return true;
  }
  return false;
}

// Sums over a row of e = exp(x), e x and e x^2 with x = b (z - m) for the inverse temperature b.
template <bool kMasked, class V>
struct MomentSums {
  V sum = broadcast(typename V::Scalar(0));
  V first = broadcast(typename V::Scalar(0));
  V second = broadcast(typename V::Scalar(0));

  void add(V x, V e) {
    // exp(-inf) * -inf is NaN, but an impossible class contributes nothing.
    const V ex = kMasked ? keep_where_nonzero(e, e * x) : e * x;
    sum = sum + e;
    first = first + ex;
    second = kMasked ? second + keep_where_nonzero(e, ex * x) : fma(ex, x, second);
  }
  void add(V x) { add(x, kMasked ? exp(x) : exp_in_range(x)); }
};

template <bool kMasked, class T>
static inline MomentResult moments_with_shift(const T* z, int64_t n, ComputeType<T> b_value, const T* next,
                                              ComputeType<T> shift_value) {
  using V = Vector<T>;
  using C = ComputeType<T>;
  const V shift = broadcast(shift_value), b = broadcast(b_value);
  constexpr int kStep = 2 * V::kLanes;
  MomentSums<kMasked, V> even, odd;
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    if (next != nullptr) {
      prefetch(next + i);
      if constexpr (kStep * sizeof(T) > 64) prefetch(next + i + V::kLanes);
    }
    even.add(b * (load(z + i) - shift));
    odd.add(b * (load(z + i + V::kLanes) - shift));
  }
  for (; i + V::kLanes <= n; i += V::kLanes) even.add(b * (load(z + i) - shift));
  if (i < n) {
    const int tail = static_cast<int>(n - i);
    const V x = b * (load_partial(z + i, tail) - shift);
    const V exponent = keep_first(x, tail, broadcast(static_cast<C>(kTail)));
    odd.add(keep_first(x, tail, broadcast(C(0))), kMasked ? exp(exponent) : exp_in_range(exponent));
  }
  const double per_b = 1 / static_cast<double>(b_value);
  return {shift_value, reduce_add(even.sum + odd.sum), reduce_add(even.first + odd.first) * per_b,
          reduce_add(even.second + odd.second) * per_b * per_b};
}

template <class T>
MomentResult moments(const void* z, int64_t n, double b, const void* next, double least_shift) {
  using C = ComputeType<T>;
  const auto* logits = static_cast<const T*>(z);
  const MomentResult result = moments_with_shift<false>(logits, n, static_cast<C>(b), static_cast<const T*>(next),
                                                        provisional_shift(logits, n, least_shift));
  if (sum_in_range(result.sum) && finite(result.second)) return result;
  const T* none = nullptr;
  return moments_with_shift<true>(logits, n, static_cast<C>(b), none, reduce_max(max_over(logits, n)));
}

// Writes exp(b (z - m)) to `exponentials`; returns their sum. Prefetches `next`, which may be null, and `written`.
template <bool kMasked, class T, class S>
static inline ComputeType<T> exponentials_with_shift(const T* z, int64_t n, ComputeType<T> b_value,
                                                     ComputeType<T>* exponentials, const T* next, const S* written,
                                                     ComputeType<T> shift_value) {
  using V = Vector<T>;
  using C = ComputeType<T>;
  const V b = broadcast(b_value), shift = broadcast(shift_value);
  const auto exponential = [](V x) { return kMasked ? exp(x) : exp_in_range(x); };
  V even = broadcast(C(0)), odd = even;
  constexpr int kStep = 2 * V::kLanes;
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    if (next != nullptr) {
      prefetch(next + i);
      if constexpr (kStep * sizeof(T) > 64) prefetch(next + i + V::kLanes);
    }
    for (int k = 0; k < kStep; k += 64 / sizeof(S)) prefetch_to_write(written + i + k);
    const V e0 = exponential(b * (load(z + i) - shift)), e1 = exponential(b * (load(z + i + V::kLanes) - shift));
    store(exponentials + i, e0);
    store(exponentials + i + V::kLanes, e1);
    even = even + e0;
    odd = odd + e1;
  }
  for (; i + V::kLanes <= n; i += V::kLanes) {
    const V e = exponential(b * (load(z + i) - shift));
    store(exponentials + i, e);
    even = even + e;
  }
  if (i < n) {
    const int tail = static_cast<int>(n - i);
    const V x = keep_first(b * (load_partial(z + i, tail) - shift), tail, broadcast(static_cast<C>(kTail)));
    const V e = exponential(x);
    store_partial(exponentials + i, e, tail);
    odd = odd + e;
  }
  return reduce_add(even + odd);
}

template <class T, class S>
bool add_softmax(const void* z, int64_t n, double b, void* exponentials, const void* next, const S* before, S* sums) {
  using C = ComputeType<T>;
  const auto* logits = static_cast<const T*>(z);
  auto* e = static_cast<C*>(exponentials);
  const C factor = static_cast<C>(b);
  C sum = exponentials_with_shift<false>(logits, n, factor, e, static_cast<const T*>(next), sums,
                                         provisional_shift(logits, n, -INFINITY));
  if (!sum_in_range(sum)) {
    const T* none = nullptr;
    sum = exponentials_with_shift<true>(logits, n, factor, e, none, sums, reduce_max(max_over(logits, n)));
  }
  const C normaliser = C(1) / sum;
#pragma GCC ivdep
  for (int64_t j = 0; j < n; ++j) sums[j] = before[j] + static_cast<S>(normaliser * e[j]);
  return sum_in_range(sum);
}

static inline double sum_q_log_q(const float* q, int64_t n) {
  // Below the smallest normal float q log q is less than 1e-36; log_of_normal needs a normal number.
  constexpr float kSmallest = 0x1p-126f;
  constexpr int kSums = 16;
  double sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums) {
    for (int k = 0; k < kSums; ++k) {
      const float x = q[i + k] < kSmallest ? kSmallest : q[i + k];
      sums[k] += q[i + k] < 0 ? static_cast<double>(NAN) : q[i + k] * log_of_normal(x);
    }
  }
  double total = 0;
  for (; i < n; ++i)
    total += q[i] > 0 ? static_cast<double>(q[i]) * ::log(static_cast<double>(q[i])) : q[i] < 0 ? NAN : q[i] * 0.0;
  for (int k = 0; k < kSums; ++k) total += sums[k];
  return total;
}

static inline double sum_q_log_q(const double* q, int64_t n) {
  double total = 0;
  for (int64_t i = 0; i < n; ++i) total += q[i] > 0 ? q[i] * ::log(q[i]) : q[i] < 0 ? NAN : q[i] * 0.0;
  return total;
}

// One entry per scalar type, in the order of ScalarType.
#define COTUNING_EACH_TYPE(function) {function<float>, function<BFloat16>, function<Float16>, function<double>}
#define COTUNING_EACH_TYPE_TO(function, C) \
  {function<float, C>, function<BFloat16, C>, function<Float16, C>, function<double, C>}

static constexpr RowKernels table(const char* name) {
  return {name,
          COTUNING_EACH_TYPE(sweep),
          COTUNING_EACH_TYPE(largest),
          COTUNING_EACH_TYPE(sums_in_double),
          COTUNING_EACH_TYPE(gradient),
          finish_streaming,
          COTUNING_EACH_TYPE(scale),
          COTUNING_EACH_TYPE_TO(mix, float),
          COTUNING_EACH_TYPE_TO(mix, double),
          COTUNING_EACH_TYPE(store_from_float),
          COTUNING_EACH_TYPE(any_nonzero),
          COTUNING_EACH_TYPE_TO(add_softmax, float),
          COTUNING_EACH_TYPE_TO(add_softmax, double),
          COTUNING_EACH_TYPE(moments),
          sum_q_log_q,
          sum_q_log_q};
}

}  // namespace cotuning::cpu::COTUNING_ISA
