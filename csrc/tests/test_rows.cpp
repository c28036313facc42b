// The row primitives of rows.h, in every instruction set and scalar type, against long double arithmetic.
#include <cfloat>
#include <cstdio>

#include "../kernels/cpu/rows.h"
#include "check.h"
#include "memory.h"

namespace cotuning::test {
namespace {

using cpu::MomentResult;
using cpu::RowKernels;
using cpu::SweepResult;

// ---- Faults that these tests must find (--plant) ----

const RowKernels& right() { return cpu::row_kernels(); }

SweepResult read_past_the_row(const void* z, const void* q, int64_t n, void* e, const void* next, const void* written,
                              double least_shift) {
  char scratch[64 * 1024];
  const SweepResult result = right().sweep[0](z, nullptr, n + 1, scratch, nullptr, nullptr, -INFINITY);
  return result.sum < 0 ? result : right().sweep[0](z, q, n, e, next, written, least_shift);
}
SweepResult write_past_the_row(const void* z, const void* q, int64_t n, void* e, const void* next, const void* written,
                               double least_shift) {
  if (e != nullptr) static_cast<float*>(e)[n] = 1;
  return right().sweep[0](z, q, n, e, next, written, least_shift);
}
SweepResult miss_a_late_maximum(const void* z, const void* q, int64_t n, void* e, const void* next, const void* written,
                                double least_shift) {
  const SweepResult start = right().sweep[0](z, q, std::min<int64_t>(n, 64), e, next, written, least_shift);
  SweepResult result = right().sweep[0](z, q, n, e, next, written, least_shift);
  result.shift = start.shift;
  return result;
}
SweepResult hide_nan(const void* z, const void* q, int64_t n, void* e, const void* next, const void* written,
                     double least_shift) {
  SweepResult result = right().sweep[0](z, q, n, e, next, written, least_shift);
  if (std::isnan(result.sum)) result.sum = 1;
  return result;
}
SweepResult take_a_coarse_exp(const void* z, const void* q, int64_t n, void* e, const void* next, const void* written,
                              double least_shift) {
  const SweepResult result = right().sweep[0](z, q, n, e, next, written, least_shift);
  if (e != nullptr) static_cast<float*>(e)[n / 2] *= 1 + 4 * FLT_EPSILON;
  return result;
}
void forget_the_last_element(const void* e, const void* q, int64_t n, double a, double b, bool stream, void* out) {
  right().gradient[0](e, q, n - 1, a, b, stream, out);
}
void truncate(const float* values, int64_t n, void* row) {
  for (int64_t i = 0; i < n; ++i) {
    std::memcpy(static_cast<uint16_t*>(row) + i, reinterpret_cast<const char*>(values + i) + 2, 2);
  }
}
MomentResult take_the_first_moment(const void* z, int64_t n, double b, const void* next, double least_shift) {
  MomentResult result = right().moments[0](z, n, b, next, least_shift);
  result.second = result.first;
  return result;
}

// The tables under test: all tables that this processor runs, or one with the planted fault.
std::vector<RowKernels> tables() {
  RowKernels broken = right();
  if (planted("read-past-row")) broken.sweep[0] = read_past_the_row;
  if (planted("write-past-row")) broken.sweep[0] = write_past_the_row;
  if (planted("late-maximum")) broken.sweep[0] = miss_a_late_maximum;
  if (planted("hidden-nan")) broken.sweep[0] = hide_nan;
  if (planted("coarse-exp")) broken.sweep[0] = take_a_coarse_exp;
  if (planted("short-gradient")) broken.gradient[0] = forget_the_last_element;
  if (planted("truncation")) broken.store_float[static_cast<int>(ScalarType::kBFloat16)] = truncate;
  if (planted("wrong-moment")) broken.moments[0] = take_the_first_moment;
  if (std::memcmp(&broken, &right(), sizeof broken) != 0) return {broken};
  std::vector<RowKernels> all;
  for (int i = 0; i < cpu::row_kernels_count(); ++i) all.push_back(cpu::row_kernels_at(i));
  return all;
}

// ---- Cases ----

// Every tail of every vector width, and rows with more elements than the provisional maximum reads.
std::vector<int64_t> row_lengths() {
  std::vector<int64_t> lengths;
  for (int64_t n = 1; n <= 70; ++n) lengths.push_back(n);
  for (int64_t n : {127, 128, 129, 255, 1000, 4099}) lengths.push_back(n);
  return lengths;
}

struct Case {
  const RowKernels& kernels;
  ScalarType type;
  int64_t n;
  Place place;

  int index() const { return static_cast<int>(type); }
  ScalarType compute() const { return compute_type(type); }
  // The error of a sum is at most this times the sum of the terms' sizes: at least two lanes, two sums per lane, and a
  // few roundings in each term.
  long double sum_epsilon() const { return epsilon_of(compute()) * (16 + n / 4); }
  std::string text() const {
    char buffer[96];
    std::snprintf(buffer, sizeof buffer, "%s %s n=%lld at the page's %s", kernels.name, name_of(type),
                  static_cast<long long>(n), place == Place::kPageEnd ? "end" : "start");
    return buffer;
  }
};

template <class Check>
void for_each_case(Check check) {
  for (const RowKernels& kernels : tables()) {
    for (ScalarType type : kAllTypes) {
      for (int64_t n : row_lengths()) {
        for (Place place : {Place::kPageEnd, Place::kPageStart}) check(Case{kernels, type, n, place});
      }
    }
  }
}

enum class Logits {
  kPlain,
  kOffset,
  kLate,      // a maximum at the end, about as large as the provisional maximum tolerates
  kVeryLate,  // a maximum at the end, far larger than that
  kMasked,    // most at the lowest finite number, as models mask them
  kHuge,      // all magnitudes and both signs
  kImpossible,
  kOnlyOnePossible,
  kNonePossible,
  kNaN,
  kInfinite,
};
constexpr Logits kAllLogits[] = {Logits::kPlain,        Logits::kOffset, Logits::kLate,       Logits::kVeryLate,
                                 Logits::kMasked,       Logits::kHuge,   Logits::kImpossible, Logits::kOnlyOnePossible,
                                 Logits::kNonePossible, Logits::kNaN,    Logits::kInfinite};

void fill_logits(Row* z, Logits kind) {
  const int64_t n = z->size();
  for (int64_t i = 0; i < n; ++i) z->set(i, normal(4) + (kind == Logits::kOffset ? 1e4L : 0));
  const int64_t somewhere = random_integer(0, n - 1);
  switch (kind) {
    case Logits::kPlain:
    case Logits::kOffset: break;
    case Logits::kLate: z->set(n - 1, 50 + 50 * uniform()); break;
    case Logits::kVeryLate: z->set(n - 1, 1000); break;
    case Logits::kMasked:
      for (int64_t i = 0; i < n; ++i) {
        if (i != somewhere && one_in(2)) z->set(i, z->lowest());
      }
      break;
    case Logits::kHuge:
      for (int64_t i = 0; i < n; ++i) z->set(i, (one_in(2) ? 1 : -1) * std::pow(-z->lowest(), uniform()));
      break;
    case Logits::kImpossible:
      for (int64_t i = 0; i < n; ++i) {
        if (i != somewhere && one_in(3)) z->set(i, -kInfinity);
      }
      break;
    case Logits::kOnlyOnePossible:
      for (int64_t i = 0; i < n; ++i) {
        if (i != somewhere) z->set(i, -kInfinity);
      }
      break;
    case Logits::kNaN: z->set(somewhere, kNaN); break;
    case Logits::kInfinite: z->set(somewhere, kInfinity); break;
    case Logits::kNonePossible:
      for (int64_t i = 0; i < n; ++i) z->set(i, -kInfinity);
      break;
  }
  z->make_read_only();
}

// A distribution over the possible classes, sometimes over impossible ones too. It need not sum to 1.
void fill_distribution(Row* q, const Row& z) {
  const bool also_impossible = one_in(4);
  for (int64_t i = 0; i < q->size(); ++i) {
    q->set(i, one_in(3) || (z[i] == -kInfinity && !also_impossible) ? 0 : uniform());
  }
  q->make_read_only();
}

void fill_uniform(Row* row, long double scale) {
  for (int64_t i = 0; i < row->size(); ++i) row->set(i, scale * uniform());
}

// a - b and a * b in the compute type, with one rounding; through long double there would be two.
long double difference(ScalarType compute, long double a, long double b) {
  return compute == ScalarType::kFloat64 ? static_cast<double>(a) - static_cast<double>(b)
                                         : static_cast<float>(a) - static_cast<float>(b);
}
long double product(ScalarType compute, long double a, long double b) {
  return compute == ScalarType::kFloat64 ? static_cast<double>(a) * static_cast<double>(b)
                                         : static_cast<float>(a) * static_cast<float>(b);
}

// Below this the kernels' float exp may be any value that is lost in a sum of 1. Above, its error is at most 1.01 ulp
// (every seventh float tried), plus 3e-9 |x| of its value with AVX-512. That is less than one rounding of x costs, and
// x is a rounded difference of logits.
constexpr float kExpUnderflow = -87.3f;

bool good_exp(ScalarType compute, long double value, long double x) {
  if (compute == ScalarType::kFloat32 && x < kExpUnderflow) return value >= 0 && value <= 1e-37L;
  const long double expected = std::exp(x);
  const long double argument = compute == ScalarType::kFloat32 ? 3e-9L * std::fabs(x) : 0;
  return close(value, expected, 1.05L * ulp(compute, expected) + argument * expected);
}

// ---- Tests ----

void check_sweep(const Case& c, Logits kind, bool with_target) {
  Row z(c.type, c.n, c.place), q(c.compute(), c.n, c.place), e(c.compute(), c.n, c.place);
  fill_logits(&z, kind);
  fill_distribution(&q, z);
  const void* target = with_target ? q.data() : nullptr;
  const double least_shift = one_in(2) ? -INFINITY : static_cast<double>(z[random_integer(0, c.n - 1)]);
  const SweepResult result = c.kernels.sweep[c.index()](z.data(), target, c.n, e.data(), nullptr, nullptr, least_shift);
  const std::string text = c.text() + " logits " + std::to_string(static_cast<int>(kind));
  const char* what = text.c_str();
  CHECK(e.surroundings_untouched(), "%s", what);

  long double largest = -kInfinity;
  bool undefined = false;
  for (int64_t i = 0; i < c.n; ++i) {
    largest = std::max(largest, z[i]);
    undefined |= std::isnan(z[i]) || z[i] == kInfinity;
  }
  if (undefined || largest == -kInfinity) {
    CHECK(std::isnan(result.sum), "%s: sum %g", what, result.sum);
    return;
  }
  CHECK(result.shift <= largest && largest - result.shift <= 61, "%s: shift %g, maximum %Lg", what, result.shift,
        largest);
  CHECK(result.shift >= least_shift, "%s: shift %g, at least %g", what, result.shift, least_shift);
  long double sum = 0, dot = 0, dot_size = 0, mass = 0;
  for (int64_t i = 0; i < c.n; ++i) {
    const long double x = difference(c.compute(), z[i], result.shift);
    CHECK(good_exp(c.compute(), e[i], x), "%s: exp(%.9Lg) is %.9Lg", what, x, e[i]);
    sum += std::exp(x);
    if (!with_target || q[i] == 0) continue;
    dot += q[i] * x;
    dot_size += std::fabs(q[i] * x);
    mass += q[i];
  }
  CHECK(close(result.sum, sum, c.sum_epsilon() * sum), "%s: sum %.9g, expected %.9Lg", what, result.sum, sum);
  if (dot_size < -lowest_of(c.compute())) {
    CHECK(close(result.dot, dot, c.sum_epsilon() * dot_size), "%s: dot %.9g, expected %.9Lg", what, result.dot, dot);
  } else {  // beyond the type's range, or q has an impossible class
    CHECK(result.dot <= lowest_of(c.compute()) / 2, "%s: dot %.9g, expected %.9Lg", what, result.dot, dot);
  }
  CHECK(close(result.mass, mass, c.sum_epsilon() * mass), "%s: mass %.9g, expected %.9Lg", what, result.mass, mass);

  // Neither leaving the exponentials unstored nor prefetching the next rows changes the results.
  const SweepResult unstored =
      c.kernels.sweep[c.index()](z.data(), target, c.n, nullptr, nullptr, nullptr, least_shift);
  CHECK(unstored.sum == result.sum && close(unstored.dot, result.dot, 0) && unstored.mass == result.mass, "%s", what);
  Row next(c.type, c.n, c.place), written(c.type, c.n, c.place);
  const SweepResult again =
      c.kernels.sweep[c.index()](z.data(), target, c.n, e.data(), next.data(), written.data(), least_shift);
  CHECK(written.surroundings_untouched() && std::isnan(written[0]), "%s", what);
  CHECK(again.sum == result.sum && close(again.dot, result.dot, 0) && again.mass == result.mass, "%s", what);
}

// Logits of every kind, but only two kinds for the longest row: it would take longer than all others together.
template <class Check>
void for_each_kind(Check check) {
  for_each_case([&check](const Case& c) {
    for (Logits kind : kAllLogits) {
      if (c.n <= 1000 || kind == Logits::kPlain || kind == Logits::kLate) check(c, kind);
    }
  });
}

TEST(sweep) {
  for_each_kind([](const Case& c, Logits kind) { check_sweep(c, kind, !one_in(4)); });
}

TEST(gradient) {
  for_each_case([](const Case& c) {
    Row e(c.compute(), c.n, c.place), q(c.compute(), c.n, c.place), out(c.type, c.n, c.place);
    fill_uniform(&e, 2);
    fill_uniform(&q, 1);
    e.make_read_only();
    q.make_read_only();
    const bool with_target = !one_in(3);
    const long double a = round_to(c.compute(), normal(1)), b = round_to(c.compute(), normal(1));
    c.kernels.gradient[c.index()](e.data(), with_target ? q.data() : nullptr, c.n, static_cast<double>(a),
                                  static_cast<double>(b), false, out.data());
    CHECK(out.surroundings_untouched(), "%s", c.text().c_str());
    for (int64_t i = 0; i < c.n; ++i) {
      const long double part_e = a * e[i], part_q = with_target ? b * q[i] : 0, expected = part_e - part_q;
      // Up to three roundings in the compute type, and one to the row's type.
      const long double tolerance =
          1.5L * epsilon_of(c.compute()) * (std::fabs(part_e) + std::fabs(part_q)) + 0.5L * ulp(c.type, expected);
      CHECK(close(out[i], expected, tolerance), "%s: [%lld] is %.9Lg, expected %.9Lg", c.text().c_str(),
            static_cast<long long>(i), out[i], expected);
    }
    if (!with_target) return;
    // Streaming stores begin at the row's first aligned vector. The bits are the same.
    Row streamed(c.type, c.n, c.place);
    c.kernels.gradient[c.index()](e.data(), q.data(), c.n, static_cast<double>(a), static_cast<double>(b), true,
                                  streamed.data());
    c.kernels.finish_streaming();
    CHECK(streamed.surroundings_untouched(), "%s", c.text().c_str());
    CHECK(std::memcmp(streamed.data(), out.data(), c.n * size_of(c.type)) == 0, "%s", c.text().c_str());
  });
}

TEST(scale) {
  for_each_case([](const Case& c) {
    Row row(c.type, c.n, c.place);
    std::vector<long double> expected;
    const long double factor = round_to(c.compute(), normal(2));
    for (int64_t i = 0; i < c.n; ++i) {
      row.set(i, normal(3));
      expected.push_back(round_to(c.type, product(c.compute(), factor, row[i])));
    }
    c.kernels.scale[c.index()](row.data(), c.n, static_cast<double>(factor));
    CHECK(row.surroundings_untouched(), "%s", c.text().c_str());
    for (int64_t i = 0; i < c.n; ++i) {
      CHECK(row[i] == expected[i], "%s: [%lld] is %.9Lg, expected %.9Lg", c.text().c_str(), static_cast<long long>(i),
            row[i], expected[i]);
    }
  });
}

void check_mix(const Case& c, ScalarType out_type) {
  Row a(c.type, c.n, c.place), b(c.type, c.n, c.place), out(out_type, c.n, c.place);
  fill_uniform(&a, 1);
  fill_uniform(&b, 1);
  a.make_read_only();
  b.make_read_only();
  const bool two = one_in(2);
  const double factor_a = static_cast<double>(uniform()), factor_b = 1 - factor_a;
  const void* second = two ? b.data() : nullptr;
  if (out_type == ScalarType::kFloat64) {
    c.kernels.mix_to_double[c.index()](a.data(), factor_a, second, factor_b, c.n, static_cast<double*>(out.data()));
  } else {
    c.kernels.mix_to_float[c.index()](a.data(), factor_a, second, factor_b, c.n, static_cast<float*>(out.data()));
  }
  CHECK(out.surroundings_untouched(), "%s", c.text().c_str());
  for (int64_t i = 0; i < c.n; ++i) {
    const long double expected = factor_a * a[i] + (two ? factor_b * b[i] : 0);
    CHECK(close(out[i], expected, 2 * epsilon_of(out_type) * expected), "%s: [%lld] is %.9Lg, expected %.9Lg",
          c.text().c_str(), static_cast<long long>(i), out[i], expected);
  }
}

TEST(mix) {
  for_each_case([](const Case& c) {
    check_mix(c, ScalarType::kFloat32);
    check_mix(c, ScalarType::kFloat64);
  });
}

TEST(store) {
  for_each_case([](const Case& c) {
    Row values(ScalarType::kFloat32, c.n, c.place), row(c.type, c.n, c.place);
    for (int64_t i = 0; i < c.n; ++i) values.set(i, normal(100));
    values.make_read_only();
    c.kernels.store_float[c.index()](static_cast<const float*>(values.data()), c.n, row.data());
    CHECK(row.surroundings_untouched(), "%s", c.text().c_str());
    for (int64_t i = 0; i < c.n; ++i) {
      CHECK(row[i] == round_to(c.type, values[i]), "%s: %.9Lg became %.9Lg", c.text().c_str(), values[i], row[i]);
    }
  });
}

TEST(any_nonzero) {
  for_each_case([](const Case& c) {
    Row row(c.type, c.n, c.place);
    for (int64_t i = 0; i < c.n; ++i) row.set(i, one_in(2) ? 0.0L : -0.0L);
    CHECK(!c.kernels.any_nonzero[c.index()](row.data(), c.n), "%s", c.text().c_str());
    const int64_t somewhere = random_integer(0, c.n - 1);
    const long double smallest = std::ldexp(1.0L, format_of(c.type).min_exponent - format_of(c.type).digits + 1);
    for (long double value : {1.0L, -smallest, kNaN, kInfinity}) {
      row.set(somewhere, value);
      CHECK(c.kernels.any_nonzero[c.index()](row.data(), c.n), "%s: %Lg", c.text().c_str(), value);
    }
  });
}

void check_add_softmax(const Case& c, Logits kind, ScalarType sum_type) {
  Row z(c.type, c.n, c.place), e(c.compute(), c.n, c.place), sums(sum_type, c.n, c.place), old(sum_type, c.n, c.place);
  fill_logits(&z, kind);
  Row& added_to = one_in(2) ? sums : old;
  std::vector<long double> before;
  for (int64_t i = 0; i < c.n; ++i) {
    added_to.set(i, 3 * uniform());
    before.push_back(added_to[i]);
  }
  const double b = static_cast<double>(round_to(c.compute(), 0.2L + 2 * uniform()));
  const bool good = sum_type == ScalarType::kFloat64
                        ? c.kernels.add_softmax_to_double[c.index()](z.data(), c.n, b, e.data(), nullptr,
                                                                     static_cast<const double*>(added_to.data()),
                                                                     static_cast<double*>(sums.data()))
                        : c.kernels.add_softmax_to_float[c.index()](z.data(), c.n, b, e.data(), nullptr,
                                                                    static_cast<const float*>(added_to.data()),
                                                                    static_cast<float*>(sums.data()));
  CHECK(e.surroundings_untouched() && sums.surroundings_untouched(), "%s", c.text().c_str());
  long double largest = -kInfinity, sum = 0;
  bool has_nan = false;
  for (int64_t i = 0; i < c.n; ++i) {
    largest = std::max(largest, z[i]);
    has_nan |= std::isnan(z[i]);
  }
  for (int64_t i = 0; i < c.n; ++i) sum += std::exp(b * (z[i] - largest));
  CHECK(good == std::isfinite(sum), "%s logits %d: has a softmax: %d", c.text().c_str(), static_cast<int>(kind), good);
  for (int64_t i = 0; i < c.n; ++i) {
    const long double x = b * (z[i] - largest);
    const long double softmax = has_nan ? kNaN : std::exp(x) / sum;
    const long double tolerance = softmax == 0
                                      ? 0
                                      : softmax * (c.sum_epsilon() + 2 * epsilon_of(c.compute()) * std::fabs(x)) +
                                            epsilon_of(sum_type) * (before[i] + softmax) + 1e-37L;
    CHECK(close(sums[i], before[i] + softmax, tolerance), "%s logits %d: [%lld] is %.9Lg, expected %.9Lg",
          c.text().c_str(), static_cast<int>(kind), static_cast<long long>(i), sums[i], before[i] + softmax);
  }
}

TEST(add_softmax) {
  for_each_kind([](const Case& c, Logits kind) {
    check_add_softmax(c, kind, one_in(2) ? ScalarType::kFloat64 : ScalarType::kFloat32);
  });
}

void check_moments(const Case& c, Logits kind) {
  Row z(c.type, c.n, c.place);
  fill_logits(&z, kind);
  const double b = static_cast<double>(round_to(c.compute(), 0.2L + 2 * uniform()));
  const double least_shift = one_in(2) ? -INFINITY : static_cast<double>(z[random_integer(0, c.n - 1)]);
  const MomentResult result = c.kernels.moments[c.index()](z.data(), c.n, b, nullptr, least_shift);
  long double sum = 0, first = 0, second = 0, first_size = 0, error = 0, first_error = 0, second_error = 0;
  bool has_nan = false;
  for (int64_t i = 0; i < c.n; ++i) {
    has_nan |= std::isnan(z[i]) || std::isnan(z[i] - result.shift);
    const long double x = difference(c.compute(), z[i], result.shift);
    if (x == -kInfinity) continue;
    const long double e = std::exp(b * x);
    // b * x is rounded before its exponential is taken.
    const long double relative = c.sum_epsilon() + 2 * epsilon_of(c.compute()) * std::fabs(b * x);
    sum += e;
    first += e * x;
    second += e * x * x;
    first_size += e * std::fabs(x);
    error += relative * e;
    first_error += relative * e * std::fabs(x);
    second_error += relative * e * x * x;
  }
  const std::string text = c.text() + " logits " + std::to_string(static_cast<int>(kind));
  if (has_nan) {
    CHECK(std::isnan(result.sum), "%s: sum %g", text.c_str(), result.sum);
    return;
  }
  constexpr long double kFlushed = 1e-30L;  // terms whose exponential is flushed to 0
  CHECK(close(result.sum, sum, error + kFlushed), "%s: sum %.9g, expected %.9Lg", text.c_str(), result.sum, sum);
  CHECK(close(result.first, first, first_error + kFlushed), "%s: first moment %.9g, expected %.9Lg", text.c_str(),
        result.first, first);
  CHECK(close(result.second, second, second_error + kFlushed), "%s: second moment %.9g, expected %.9Lg", text.c_str(),
        result.second, second);
}

TEST(moments) { for_each_kind(check_moments); }

TEST(sum_q_log_q) {
  for_each_case([](const Case& c) {
    if (c.type != c.compute()) return;  // exists for float and double only
    Row q(c.type, c.n, c.place);
    const long double smallest = c.type == ScalarType::kFloat32 ? 1e-44L : 1e-320L;  // subnormal
    for (int64_t i = 0; i < c.n; ++i) {
      q.set(i, one_in(4) ? 0 : one_in(16) ? smallest : one_in(8) ? 1 + 1e-3L * uniform() : uniform());
    }
    q.make_read_only();
    const double value = c.type == ScalarType::kFloat32
                             ? c.kernels.sum_q_log_q_float(static_cast<const float*>(q.data()), c.n)
                             : c.kernels.sum_q_log_q_double(static_cast<const double*>(q.data()), c.n);
    long double expected = 0, size = 0;
    for (int64_t i = 0; i < c.n; ++i) {
      if (q[i] == 0) continue;
      expected += q[i] * std::log(q[i]);
      size += std::fabs(q[i] * std::log(q[i]));
    }
    CHECK(close(value, expected, c.sum_epsilon() * size + 1e-36L), "%s: %.9g, expected %.9Lg", c.text().c_str(), value,
          expected);
  });
  for (const RowKernels& kernels : tables()) {
    std::vector<float> q(40, 0.025f);
    q[random_integer(0, 39)] = NAN;
    const double value = kernels.sum_q_log_q_float(q.data(), 40);
    CHECK(std::isnan(value), "%s: %g", kernels.name, value);
  }
}

// All halves in one row of 65536 + 5 elements, so that the conversions of both vectors and tails see each half.
constexpr int64_t kHalves = 65536;

std::vector<uint16_t> every_half(int64_t start) {
  std::vector<uint16_t> halves;
  for (int64_t i = 0; i < kHalves + 5; ++i) halves.push_back(static_cast<uint16_t>(start + i));
  return halves;
}

bool same_half(ScalarType type, uint16_t a, uint16_t b) {
  return a == b || (std::isnan(decode_half(type, a)) && std::isnan(decode_half(type, b)));
}

TEST(every_half_survives) {
  for (const RowKernels& kernels : tables()) {
    for (ScalarType type : {ScalarType::kBFloat16, ScalarType::kFloat16}) {
      const int index = static_cast<int>(type);
      const std::vector<uint16_t> halves = every_half(random_integer(0, kHalves - 1));
      std::vector<float> widened(halves.size());
      kernels.mix_to_float[index](halves.data(), 1.0, nullptr, 0.0, static_cast<int64_t>(halves.size()),
                                  widened.data());
      std::vector<uint16_t> stored(halves.size()), scaled = halves;
      kernels.store_float[index](widened.data(), static_cast<int64_t>(widened.size()), stored.data());
      kernels.scale[index](scaled.data(), static_cast<int64_t>(scaled.size()), 1.0);
      for (size_t i = 0; i < halves.size(); ++i) {
        CHECK(close(widened[i], decode_half(type, halves[i]), 0), "%s %s %04x widens to %g", kernels.name,
              name_of(type), halves[i], widened[i]);
        CHECK(same_half(type, stored[i], halves[i]), "%s %s %04x came back as %04x", kernels.name, name_of(type),
              halves[i], stored[i]);
        CHECK(same_half(type, scaled[i], halves[i]), "%s %s %04x in a vector came back as %04x", kernels.name,
              name_of(type), halves[i], scaled[i]);
      }
    }
  }
}

// Between two neighbouring halves: halfway, and one float to either side.
TEST(halves_round_to_even) {
  std::vector<float> values;
  for (ScalarType type : {ScalarType::kBFloat16, ScalarType::kFloat16}) {
    for (uint16_t bits = 0; std::isfinite(decode_half(type, bits)); ++bits) {
      const long double low = decode_half(type, bits), high = low + ulp(type, low);
      const auto middle = static_cast<float>((low + high) / 2);
      for (float value : {std::nextafter(middle, 0.0f), middle, std::nextafter(middle, INFINITY)}) {
        values.push_back(one_in(2) ? value : -value);
      }
    }
  }
  for (float value : {FLT_MAX, FLT_MIN, FLT_TRUE_MIN, 1e5f, INFINITY, NAN}) {
    values.push_back(value);
    values.push_back(-value);
  }
  // NaNs whose fraction is lost with the last bits, or whose rounding would carry into the sign.
  for (uint32_t bits : {0x7f800001u, 0xff800001u, 0x7fffffffu, 0xffffffffu}) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    values.push_back(value);
  }
  const auto n = static_cast<int64_t>(values.size());
  for (const RowKernels& kernels : tables()) {
    for (ScalarType type : {ScalarType::kBFloat16, ScalarType::kFloat16}) {
      std::vector<uint16_t> stored(values.size()), from_vector(values.size());
      kernels.store_float[static_cast<int>(type)](values.data(), n, stored.data());
      kernels.gradient[static_cast<int>(type)](values.data(), nullptr, n, 1.0, 0.0, false, from_vector.data());
      for (size_t i = 0; i < values.size(); ++i) {
        const uint16_t expected = encode_half(type, values[i]);
        CHECK(same_half(type, stored[i], expected), "%s %s: %.9g became %04x, expected %04x", kernels.name,
              name_of(type), values[i], stored[i], expected);
        CHECK(same_half(type, from_vector[i], expected), "%s %s: %.9g in a vector became %04x, expected %04x",
              kernels.name, name_of(type), values[i], from_vector[i], expected);
      }
    }
  }
}

// exp over the range that a sweep with a provisional maximum uses. The shift of a row that begins with zeros is 0,
// unless its sum grows too large.
TEST(exp_over_its_range) {
  constexpr int64_t kCount = 100'000;
  std::vector<float> z(kCount, 0.0f), e(kCount);
  for (int64_t i = 64; i < kCount; ++i) z[i] = static_cast<float>(-90 + 130 * uniform());
  for (int64_t i = 64; i < 2000; ++i)
    z[i] = static_cast<float>(normal(1) * std::ldexp(1.0L, -static_cast<int>(i % 40)));
  for (int64_t i = 2000; i < 2200; ++i) z[i] = static_cast<float>(40 + 13 * uniform());
  z[2200] = kExpUnderflow;
  z[2201] = std::nextafter(kExpUnderflow, -INFINITY);
  z[2202] = -1000;
  z[2203] = -FLT_TRUE_MIN;
  for (const RowKernels& kernels : tables()) {
    const SweepResult result = kernels.sweep[0](z.data(), nullptr, kCount, e.data(), nullptr, nullptr, -INFINITY);
    CHECK(result.shift == 0, "%s: shift %g", kernels.name, result.shift);
    long double worst = 0;
    for (int64_t i = 0; i < kCount; ++i) {
      CHECK(good_exp(ScalarType::kFloat32, e[i], z[i]), "%s: exp(%.9g) is %.9g", kernels.name, z[i], e[i]);
      if (z[i] < kExpUnderflow) continue;
      const long double expected = std::exp(static_cast<long double>(z[i]));
      worst = std::max(worst, std::fabs(e[i] - expected) / ulp(ScalarType::kFloat32, expected));
    }
    std::printf("  exp, %s: at most %.3Lf ulp\n", kernels.name, worst);
  }
}

// The logarithm in sum_q_log_q, alone: sixteen elements take the vector path, and fifteen of them are 0.
TEST(log_over_its_range) {
  for (const RowKernels& kernels : tables()) {
    long double worst = 0;
    for (int i = 0; i < 50'000; ++i) {
      float q[16] = {};
      const long double exponent = i % 2 == 0 ? -126 * uniform() : -0.1L * uniform();
      q[i % 16] = static_cast<float>(std::exp2(exponent));
      const long double x = q[i % 16], expected = x * std::log(x);
      const long double value = kernels.sum_q_log_q_float(q, 16);
      // x log x is 0 at 1. There the logarithm's error is that of 1 + f.
      const long double unit = std::max(ulp(ScalarType::kFloat32, expected), ulp(ScalarType::kFloat32, x) * 0x1p-3L);
      worst = std::max(worst, std::fabs(value - expected) / unit);
      CHECK(close(value, expected, 1e-3L * unit), "%s: x log x at %.9Lg is %.9Lg, expected %.9Lg", kernels.name, x,
            value, expected);
    }
    std::printf("  x log x, %s: at most %.3Lf ulp\n", kernels.name, worst);
  }
}

}  // namespace
}  // namespace cotuning::test
