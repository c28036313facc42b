// The kernels of csrc/kernels/cuda in the emulator against long double: random problems, layouts, plans and schedules,
// with every matrix at the end of its page. The sanitizers run this file.
#include <atomic>
#include <cstdio>
#include <string>
#include <thread>
#include <vector>

#include "../../kernels/cuda/launch.h"
#include "../../kernels/cuda/scalars.cuh"
#include "../loss_case.h"

namespace cotuning::test {
namespace {

using emulator::Order;

void draw_schedule() {
  emulator::settings().order = static_cast<Order>(random_integer(0, 2));
  emulator::settings().seed = static_cast<uint64_t>(random_integer(0, 1 << 30));
}

cuda::PlanRules draw_rules() {
  cuda::PlanRules rules;
  // A small size has room for only a part of a row, or of its target.
  rules.shared_bytes = one_in(3) ? 0 : one_in(2) ? random_integer(500, 6000) : 200 << 10;
  rules.warp_vectors = one_in(2) ? 0 : 128;
  rules.max_blocks = random_integer(1, 4);
  rules.multiprocessors = one_in(2) ? 0 : 132;
  if (one_in(3)) rules.split_vectors = random_integer(1, 8);
  return rules;
}

// Memory that a launch writes, of exactly the size that it needs.
template <class T>
class Results {
 public:
  explicit Results(int64_t count) : memory_(new T[static_cast<size_t>(count)]) {
    std::memset(memory_.get(), 0xff, static_cast<size_t>(count) * sizeof(T));
  }
  T* data() { return memory_.get(); }
  T operator[](int64_t i) const { return memory_[static_cast<size_t>(i)]; }

 private:
  std::unique_ptr<T[]> memory_;
};

struct Run {
  LossCase& c;
  cuda::LossProblem problem;
  Results<double> loss, terms, factors;
  std::vector<double> parts;
  unsigned finished = 0;
  bool by_row;

  explicit Run(LossCase& c)
      : c(c), loss(c.batch + 1), terms(2 * c.batch + 2), factors(2), by_row(c.problem.reduction == Reduction::kNone) {
    static_cast<LossInputs&>(problem) = c.problem;
    problem.target_classes = c.target_classes;
    if (!c.problem.weight.empty()) problem.weight = {c.problem.weight.data(), ScalarType::kFloat64, 1};
    problem.trade_off = &c.problem.trade_off;
    if (problem.reduction == Reduction::kMean && c.batch > 0) problem.per_row = 1.0 / static_cast<double>(c.batch);
    problem.results_in_double = true;
    problem.loss = loss.data();
    problem.terms = terms.data();
    problem.factors = factors.data();
  }

  // With the rules of the device, under the schedule of the last test.
  void launch_as_planned() { launch_planned(cuda::device_at(0).rules); }

  void launch(const cuda::PlanRules& rules) {
    draw_schedule();
    launch_planned(rules);
    CHECK(finished == 0, "the counter is left at %u", finished);
  }

 private:
  void launch_planned(const cuda::PlanRules& rules) {
    const cuda::LossPlan plan = cuda::plan_loss(c.batch, c.source_classes, problem.source_logits.type,
                                                problem.target_logits.columns, problem.target_logits.type, rules);
    parts.assign(static_cast<size_t>(cuda::shared_sums(plan)), std::nan(""));
    problem.sums.finished = &finished;
    cuda::launch_co_tuning_loss(problem, plan, cuda::device_at(0), parts.data(), nullptr);
  }
};

std::string describe(const LossCase& c) {
  char text[200];
  std::snprintf(text, sizeof text, "source %s target %s R %s, %lld x (%lld, %lld), target kind %d reduction %d%s%s%s",
                name_of(c.source_logits->type()), c.target_logits ? name_of(c.target_logits->type()) : "none",
                name_of(c.relationship->type()), static_cast<long long>(c.batch),
                static_cast<long long>(c.source_classes), static_cast<long long>(c.target_classes),
                static_cast<int>(c.target), static_cast<int>(c.problem.reduction), c.problem.kl_divergence ? " KL" : "",
                c.problem.weight.empty() ? "" : " weighted", c.problem.label_smoothing > 0 ? " smoothed" : "");
  return text;
}

void check_term(const Run& run, int64_t offset, const ExpectedLoss::Head& head, const std::string& text) {
  if (run.by_row) {
    for (int64_t i = 0; i < run.c.batch; ++i) {
      const double given = run.terms[offset * run.c.batch + i];
      CHECK(close(given, head.rows[i], head.tolerance[i]), "%s: row %lld is %.9g, expected %.9Lg", text.c_str(),
            static_cast<long long>(i), given, head.rows[i]);
    }
    return;
  }
  long double sum = 0, tolerance = 0;
  for (size_t i = 0; i < head.rows.size(); ++i) {
    sum += head.rows[i];
    tolerance += head.tolerance[i];
  }
  const long double divisor = run.c.problem.reduction == Reduction::kMean ? head.divisor : 1;
  const double given = run.terms[offset];
  if (divisor == 0 && std::fabs(sum) <= tolerance) {  // 0 / 0, or a rounding error / 0
    CHECK(!std::isfinite(given), "%s: %.9g", text.c_str(), given);
    return;
  }
  CHECK(close(given, sum / divisor, tolerance / divisor), "%s: %.9g, expected %.9Lg", text.c_str(), given,
        sum / divisor);
}

// The factor on a head's stored gradient. `factors` has the rest.
long double stored_factor(const LossCase& c, const Grid& logits, bool of_source) {
  if (logits.type() == ScalarType::kFloat16) return 1;
  const bool mean = c.problem.reduction == Reduction::kMean && c.batch > 0;
  const long double trade_off = of_source && c.target_logits != nullptr ? c.problem.trade_off : 1;
  return mean ? trade_off / c.batch : trade_off;
}

void check_gradient(const Grid& gradient, const ExpectedLoss::Head& head, long double stored, const std::string& text) {
  // The factor itself is rounded to the compute type.
  const long double of_factor = gradient.type() == ScalarType::kFloat64 ? 0x1p-52L : 0x1p-23L;
  CHECK(gradient.gaps_untouched(), "%s: written between rows", text.c_str());
  for (int64_t i = 0; i < gradient.rows(); ++i) {
    for (int64_t j = 0; j < gradient.columns(); ++j) {
      const long double expected = stored * head.gradient[i][j], given = gradient.at(i, j);
      // The error of an exponential, in ulps, is about as large as its argument: up to about 100 in float.
      const long double tolerance = 4 * std::fabs(stored) * head.gradient_tolerance[i][j] +
                                    of_factor * std::fabs(expected) + 0.51L * ulp(gradient.type(), expected);
      CHECK(close(given, expected, tolerance), "%s: gradient [%lld, %lld] is %.9Lg, expected %.9Lg", text.c_str(),
            static_cast<long long>(i), static_cast<long long>(j), given, expected);
      if (head.gradient_tolerance[i][j] == 0)
        CHECK(given == 0, "%s: a row without target got %Lg", text.c_str(), given);
    }
  }
}

void check_factors(const Run& run, const ExpectedLoss& expected, const std::string& text) {
  const bool both = run.c.target_logits != nullptr, mean = run.c.problem.reduction == Reduction::kMean;
  const long double trade_off = both ? run.c.problem.trade_off : 1;
  const long double source = mean ? expected.source.divisor : 1, target = mean ? expected.target.divisor : 1;
  const auto check = [&](const char* head, double given, long double whole, const Grid& logits, bool of_source) {
    const long double stored = stored_factor(run.c, logits, of_source);
    CHECK(close(given * stored, whole, 1e-12L * std::fabs(whole)), "%s: %s %g", text.c_str(), head, given);
    // If every row counts as one, nothing is left for the backward pass, not even a rounding.
    const bool counts = close(stored, whole, 1e-14L * std::fabs(whole)) && logits.type() != ScalarType::kFloat16;
    if (counts) CHECK(static_cast<float>(given) == 1, "%s: %s %.17g, expected 1", text.c_str(), head, given);
  };
  if (source != 0) check("source", run.factors[0], trade_off / source, *run.c.source_logits, true);
  if (both && target != 0) check("target", run.factors[1], 1 / target, *run.c.target_logits, false);
}

void check_loss(LossCase& c, bool in_place, const cuda::PlanRules& rules) {
  const std::string text = describe(c) + (in_place ? " in place" : "");
  const ExpectedLoss expected = expected_loss(c);
  Grid* source_gradient = in_place ? c.source_logits.get() : c.source_gradient.get();
  Grid* target_gradient = in_place ? c.target_logits.get() : c.target_gradient.get();
  Run run(c);
  run.problem.source_gradient = source_gradient->writable();
  if (target_gradient != nullptr) run.problem.target_gradient = target_gradient->writable();
  run.launch(rules);
  const bool both = c.target_logits != nullptr;
  check_term(run, 1, expected.source, text + ", source term");
  if (both) check_term(run, 0, expected.target, text + ", target term");
  check_factors(run, expected, text);
  check_gradient(*source_gradient, expected.source, stored_factor(c, *c.source_logits, true), text + ", source");
  if (both) {
    check_gradient(*target_gradient, expected.target, stored_factor(c, *c.target_logits, false), text + ", target");
  }
}

TEST(cuda_loss) {
  for (ScalarType source : kAllTypes) {
    for (ScalarType relationship : kAllTypes) {
      for (int repetition = 0; repetition < 3; ++repetition) {
        const ScalarType target = one_in(3) ? kAllTypes[random_integer(0, 3)] : source;
        LossCase c(source, target, relationship, random_integer(1, 5), random_integer(1, 300), random_integer(1, 40));
        check_loss(c, one_in(3), draw_rules());
      }
    }
  }
}

// Rows that ordinary_row.cuh does: one label, cross entropy, R in float32 or in the logits' type, staged logits, and a
// gradient that is cut like them. Few rows of the tests above are.
TEST(cuda_ordinary_rows) {
  for (ScalarType type : {ScalarType::kFloat32, ScalarType::kBFloat16, ScalarType::kFloat16}) {
    for (ScalarType relationship : {ScalarType::kFloat32, type}) {
      for (int done = 0; done < 6;) {
        LossCase c(type, type, relationship, random_integer(1, 4), random_integer(9, 300), random_integer(2, 90));
        if (c.target != Target::kLabels || c.problem.kl_divergence) continue;
        cuda::PlanRules rules = draw_rules();
        rules.split_vectors = 4096;
        // A row takes 16 bytes a vector of logits, and 16 or 32 of the target as far as there is room.
        rules.shared_bytes = one_in(2) ? 200 << 10 : 4 * 16 * random_integer(76, 200);
        check_loss(c, !one_in(4), rules);
        ++done;
      }
    }
  }
}

// The part of the target that does not fit in shared memory stays in registers: at most two vectors per thread. Logits,
// R and gradients start anywhere in 16 bytes, independently.
TEST(cuda_target_in_registers) {
  const auto check = [](ScalarType type, int64_t vectors, int64_t rest, int threads) {
    const int64_t lanes = 16 / size_of(type), columns = lanes * vectors - random_integer(0, lanes - 1);
    LossCase c(type, type, one_in(2) ? type : ScalarType::kFloat32, random_integer(1, 3), columns, 5);
    cuda::PlanRules rules;
    rules.warp_vectors = threads == 32 ? 128 : 0;
    const int64_t at_once = 128 / threads, touched = cuda::row_vectors(columns, type);
    rules.shared_bytes = at_once * 16 * (2 * touched - rest);
    rules.max_blocks = random_integer(1, 4);
    const auto plan = cuda::plan_loss(1, columns, type, 0, type, rules).source;
    CHECK(plan.threads_per_row == threads && plan.staged_target == touched - rest, "another plan");
    CHECK(plan.kept_target == (rest <= 2 * threads ? rest : 0), "%d of %lld in registers", plan.kept_target,
          static_cast<long long>(rest));
    check_loss(c, one_in(3), rules);
  };
  for (ScalarType type : {ScalarType::kFloat32, ScalarType::kFloat64}) {
    for (int64_t rest : {0, 1, 31, 32, 33, 63, 64, 65, 96}) check(type, 96, rest, 32);
    for (int64_t rest : {1, 20}) check(type, 19, rest, 32);  // some threads have no vector, or only kept ones
    for (int64_t rest : {127, 128, 129, 255, 256, 257}) check(type, 300, rest, 128);
  }
}

// The only row of R ends with its page, at every alignment to the logits: reading beyond it faults.
TEST(cuda_rows_end_with_their_page) {
  for (ScalarType type : kAllTypes) {
    for (ScalarType relationship : kAllTypes) {
      for (int64_t columns = 61; columns < 69; ++columns) {
        LossCase c(type, type, relationship, 2, columns, 1);
        check_loss(c, false, draw_rules());
      }
    }
  }
}

TEST(cuda_loss_same_bits) {
  for (ScalarType type : kAllTypes) {
    LossCase c(type, type, ScalarType::kFloat32, 5, 150, 11);
    Run run(c);
    run.problem.source_gradient = c.source_gradient->writable();
    if (c.target_gradient != nullptr) run.problem.target_gradient = c.target_gradient->writable();
    const cuda::PlanRules rules = draw_rules();
    std::vector<char> first;
    for (int k = 0; k < 4; ++k) {
      run.launch(rules);
      std::vector<char> bytes = c.source_gradient->bytes();
      const auto* results = reinterpret_cast<const char*>(run.terms.data());
      bytes.insert(bytes.end(), results, results + (run.by_row ? 2 * c.batch : 2) * sizeof(double));
      if (k == 0) first = bytes;
      CHECK(bytes == first, "%s: another schedule, other bits", describe(c).c_str());
    }
  }
}

// Resets limits as in a new process, where no kernel has been launched. With 1 multiprocessor, one row is enough for
// warps that do a row each, and has as large a block as it can use.
void forget_limits() {
  cuda::device_at(0).rules.multiprocessors = 1;
  emulator::forget_limits();
  for (std::atomic<bool>& allowed : cuda::device_at(0).allowed) allowed = false;
}

// Launches the loss of one row first in a process, as planned for a device of 9.0. Returns the error, or an empty
// string.
std::string refused(ScalarType type, int64_t source_classes, int64_t target_classes) {
  LossCase c(type, type, ScalarType::kFloat32, 1, source_classes, target_classes);
  Run run(c);
  forget_limits();
  try {
    run.launch_as_planned();
  } catch (const emulator::Error& error) {
    return error.what();
  }
  return "";
}

// Common shapes need between 48 KB less the kernel's static memory, the default limit, and 48 KB of dynamic memory:
// iNaturalist has 8142 classes.
TEST(cuda_shapes_around_48_kilobytes) {
  struct Shape {
    ScalarType type;
    int64_t source, target;
  };
  const std::vector<Shape> shapes{
      {ScalarType::kFloat32, 5961, 10},  {ScalarType::kFloat32, 6140, 10},   {ScalarType::kBFloat16, 7945, 10},
      {ScalarType::kBFloat16, 8142, 10}, {ScalarType::kFloat16, 8184, 10},   {ScalarType::kFloat64, 2981, 10},
      {ScalarType::kFloat64, 3070, 10},  {ScalarType::kBFloat16, 4097, 985}, {ScalarType::kBFloat16, 7944, 1016},
      {ScalarType::kFloat32, 4097, 369}, {ScalarType::kFloat32, 5960, 380}};
  forget_limits();
  for (const Shape& shape : shapes) {
    const int64_t bytes =
        cuda::plan_loss(1, shape.source, shape.type, shape.target, shape.type, cuda::device_at(0).rules).shared_bytes;
    CHECK(bytes > (48 << 10) - 1424 && bytes <= 48 << 10, "%lld bytes", static_cast<long long>(bytes));
    const std::string error = refused(shape.type, shape.source, shape.target);
    CHECK(error.empty(), "%s, %lld and %lld classes: %s", name_of(shape.type), static_cast<long long>(shape.source),
          static_cast<long long>(shape.target), error.c_str());
  }
}

// The limit belongs to the kernel, not to a launch: one thread must not lower a limit that another relies on.
TEST(cuda_launches_of_two_threads) {
  LossCase short_rows(ScalarType::kFloat32, ScalarType::kFloat32, ScalarType::kFloat32, 1, 7000, 3);
  LossCase long_rows(ScalarType::kFloat32, ScalarType::kFloat32, ScalarType::kFloat32, 1, 12000, 3);
  Run first(short_rows), second(long_rows);
  forget_limits();
  std::string errors[2];
  std::atomic<int> ready{0};
  const auto repeat = [&](Run* run, int thread) {
    ++ready;
    while (ready < 2) std::this_thread::yield();
    try {
      for (int k = 0; k < 20; ++k) run->launch_as_planned();
    } catch (const emulator::Error& error) {
      errors[thread] = error.what();
    }
  };
  std::thread other(repeat, &second, 1);
  repeat(&first, 0);
  other.join();
  for (const std::string& error : errors) CHECK(error.empty(), "%s", error.c_str());
}

TEST(cuda_bad_label) {
  LossCase c(ScalarType::kFloat32, ScalarType::kFloat32, ScalarType::kFloat32, 4, 40, 7);
  LabelList labels(4, false, 1);
  for (int64_t bad : {int64_t{7}, int64_t{-1}, int64_t{1} << 40}) {
    for (int64_t i = 0; i < 4; ++i) labels.set(i, i == 2 ? bad : i);
    Run run(c);
    run.problem.labels = labels.view();
    run.problem.labels_b = {};
    run.problem.probabilities = {};
    run.problem.relationship = c.relationship->view();
    run.problem.ignore_index = -100;
    std::string error;
    try {
      run.launch(draw_rules());
    } catch (const emulator::Error& caught) {
      error = caught.what();
    }
    CHECK(error.find("device-side assertion failed: ignored || ") != std::string::npos, "%s", error.c_str());
  }
}

TEST(cuda_scale) {
  for (ScalarType type : kAllTypes) {
    for (int repetition = 0; repetition < 4; ++repetition) {
      const int64_t rows = random_integer(1, 5), columns = random_integer(1, 300);
      auto first = random_grid(type, rows, columns, 1), second = random_grid(ScalarType::kFloat32, rows, 3, 1);
      // A zero stays zero for any factor: tested at least once per type.
      if (repetition == 0 || one_in(2)) first->set(0, 0, 0);
      const bool infinite = repetition == 0 || one_in(4), by_row = one_in(2);
      const float factors[2] = {infinite ? INFINITY : 1.5f, -0.25f};
      double upstream[5];
      for (double& x : upstream) x = by_row ? static_cast<double>(normal(1)) : 0.75;
      std::vector<long double> before;
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < columns; ++j) before.push_back(first->at(i, j));
      }
      cuda::ScaleProblem problem;
      problem.gradients[0] = first->writable();
      problem.gradients[1] = second->writable();
      problem.factors = {factors, ScalarType::kFloat32, 1};
      problem.upstream = {upstream, ScalarType::kFloat64, by_row ? 1 : 0};
      draw_schedule();
      cuda::launch_scale_gradients(problem, draw_rules(), nullptr);
      CHECK(first->gaps_untouched() && second->gaps_untouched(), "written between rows");
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < columns; ++j) {
          const long double value = before[i * columns + j];
          const long double expected = value == 0 ? 0 : value * (factors[0] * upstream[by_row ? i : 0]);
          CHECK(close(first->at(i, j), expected, 2.01L * ulp(type, expected)), "%s [%lld, %lld]: %Lg, expected %Lg",
                name_of(type), static_cast<long long>(i), static_cast<long long>(j), first->at(i, j), expected);
        }
      }
    }
  }
}

TEST(cuda_statistics) {
  for (ScalarType type : kAllTypes) {
    for (int repetition = 0; repetition < 2; ++repetition) {
      const int64_t rows = random_integer(1, 40), columns = random_integer(3, 200), classes = random_integer(1, 3);
      const double b = static_cast<double>(0.2L + 2 * uniform());
      const auto logits = random_grid(type, rows, columns, 3);
      const auto labels = random_labels(rows, classes, -100);
      Grid sums(ScalarType::kFloat64, classes, columns);
      std::vector<long double> expected(classes * columns, 0.5L);
      std::vector<int64_t> counts(classes, 4), expected_counts(classes, 4);
      long double terms[4] = {};
      for (int64_t i = 0; i < classes * columns; ++i) sums.set(i / columns, i % columns, 0.5L);
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t label = (*labels)[i];
        if (label == -100) continue;
        long double sum = 0, mean = 0, square = 0;
        for (int64_t j = 0; j < columns; ++j) sum += std::exp(b * logits->at(i, j));
        for (int64_t j = 0; j < columns; ++j) {
          const long double p = std::exp(b * logits->at(i, j)) / sum, z = logits->at(i, j);
          expected[label * columns + j] += p;
          mean += p * z;
          square += p * z * z;
        }
        ++expected_counts[label];
        terms[0] += std::log(sum) - b * logits->at(i, label);
        terms[1] += mean - logits->at(i, label);
        terms[2] += square - mean * mean;
        terms[3] += 1;
      }
      const cuda::PlanRules rules = draw_rules();
      draw_schedule();
      Results<double> norms(2 * rows);
      cuda::ClassSumsProblem problem{logits->view(),  labels->view(), -100,        b,
                                     sums.writable(), counts.data(),  norms.data()};
      cuda::launch_class_sums(problem, cuda::plan_class_sums(rows, columns, type, classes, rules), nullptr);
      for (int64_t i = 0; i < classes * columns; ++i) {
        CHECK(close(sums.at(i / columns, i % columns), expected[i], 1e-5L * expected[i]), "%s: sum %Lg, expected %Lg",
              name_of(type), sums.at(i / columns, i % columns), expected[i]);
      }
      CHECK(counts == expected_counts, "counts");

      const cuda::PassPlan plan = cuda::plan_pass(rows, columns, type, rules);
      Results<double> found(4);
      std::vector<double> parts(plan.blocks * cuda::kTemperatureSums);
      unsigned finished = 0;
      cuda::TemperatureProblem temperature{logits->view(), labels->view(), -100, b, found.data(), {}};
      temperature.sums.parts = parts.data();
      temperature.sums.finished = &finished;
      cuda::launch_temperature_terms(temperature, plan, nullptr);
      for (int k = 0; k < 4; ++k) {
        CHECK(close(found[k], terms[k], 1e-4L * (rows + std::fabs(terms[k]))), "%s: term %d is %g, expected %Lg",
              name_of(type), k, found[k], terms[k]);
      }
    }
  }
}

TEST(cuda_halves_round_to_even) {
  const auto check = [](ScalarType type, float value, uint16_t bits) {
    const uint16_t expected = encode_half(type, value);
    const bool both_nan = std::isnan(decode_half(type, bits)) && std::isnan(value);
    CHECK(both_nan || bits == expected, "%s of %.9g is %04x, expected %04x", name_of(type), value, bits, expected);
  };
  for (int i = 0; i < 200000; ++i) {
    const float value = __uint_as_float(static_cast<uint32_t>(random_bits()()));
    cuda::BFloat16 brain;
    cuda::Float16 half;
    cuda::narrow(value, &brain);
    check(ScalarType::kBFloat16, value, brain.bits);
    // Most floats are too large or too small for float16.
    int exponent;
    const float near = std::ldexp(std::frexp(value, &exponent), static_cast<int>(random_integer(-30, 18)));
    cuda::narrow(near, &half);
    check(ScalarType::kFloat16, near, half.bits);
  }
  for (int bits = 0; bits < 1 << 16; ++bits) {
    const long double half = decode_half(ScalarType::kFloat16, static_cast<uint16_t>(bits));
    CHECK(close(cuda::widen(cuda::Float16{static_cast<uint16_t>(bits)}), half, 0), "%04x", bits);
  }
}

}  // namespace
}  // namespace cotuning::test
