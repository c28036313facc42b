// The operations of the CPU kernels: labels, mixtures, options, reductions, strides, in-place gradients, bad labels.
#include <cstdio>
#include <fstream>
#include <limits>
#include <string>

#include "../kernels/cpu/pages.h"
#include "../kernels/cpu/rows.h"
#include "loss_case.h"
#include "threads.h"

namespace cotuning::test {
namespace {

using cpu::LossResult;

template <class Check>
void for_each_isa(Check check) {
  const std::string before = cpu::row_kernels().name;
  for (int i = 0; i < cpu::row_kernels_count(); ++i) {
    cpu::use_row_kernels(cpu::row_kernels_at(i).name);
    check(cpu::row_kernels_at(i).name);
  }
  cpu::use_row_kernels(before.c_str());
}

std::string describe(const char* isa, const LossCase& c) {
  char text[256];
  std::snprintf(text, sizeof text,
                "%s source %s target %s R %s, %lld x (%lld, %lld), target kind %d reduction %d%s%s%s", isa,
                name_of(c.source_logits->type()), c.target_logits ? name_of(c.target_logits->type()) : "none",
                name_of(c.relationship->type()), static_cast<long long>(c.batch),
                static_cast<long long>(c.source_classes), static_cast<long long>(c.target_classes),
                static_cast<int>(c.target), static_cast<int>(c.problem.reduction), c.problem.kl_divergence ? " KL" : "",
                c.problem.weight.empty() ? "" : " weighted", c.problem.label_smoothing > 0 ? " smoothed" : "");
  return text;
}

void check_term(const std::vector<double>& term, const ExpectedLoss::Head& head, Reduction reduction,
                const char* what) {
  if (reduction == Reduction::kNone) {
    CHECK(term.size() == head.rows.size(), "%s: %zu rows", what, term.size());
    for (size_t i = 0; i < term.size(); ++i) {
      CHECK(close(term[i], head.rows[i], head.tolerance[i]), "%s: row %zu is %.9g, expected %.9Lg", what, i, term[i],
            head.rows[i]);
    }
    return;
  }
  long double sum = 0, tolerance = 0;
  for (size_t i = 0; i < head.rows.size(); ++i) {
    sum += head.rows[i];
    tolerance += head.tolerance[i];
  }
  const long double divisor = reduction == Reduction::kMean ? head.divisor : 1;
  CHECK(term.size() == 1, "%s: %zu entries", what, term.size());
  if (divisor == 0 && std::fabs(sum) <= tolerance) {  // 0 / 0, or a rounding error / 0
    CHECK(!std::isfinite(term[0]), "%s: %.9g", what, term[0]);
    return;
  }
  CHECK(close(term[0], sum / divisor, tolerance / divisor), "%s: %.9g, expected %.9Lg", what, term[0], sum / divisor);
}

void check_gradient(const Grid& gradient, const ExpectedLoss::Head& head, Reduction reduction, long double trade_off,
                    double factor, const char* what) {
  const bool half = gradient.type() == ScalarType::kFloat16;
  CHECK(gradient.gaps_untouched(), "%s: written between rows", what);
  CHECK(half || factor == 1, "%s: factor %g", what, factor);
  const long double divisor = reduction == Reduction::kMean ? head.divisor : 1;
  // Without a valid row the gradient is 0. Rows that take part but weigh 0 in total are divided by 0.
  const long double scale = divisor == 0 ? 0 : trade_off / divisor;
  for (int64_t i = 0; i < gradient.rows(); ++i) {
    for (int64_t j = 0; j < gradient.columns(); ++j) {
      const long double written = gradient.at(i, j);
      if (divisor == 0 && trade_off != 0 && head.gradient_tolerance[i][j] != 0) {
        CHECK(!std::isfinite(written), "%s: %Lg where the mean is divided by 0", what, written);
        continue;
      }
      const long double expected = scale * head.gradient[i][j];
      const long double tolerance =
          scale * head.gradient_tolerance[i][j] +
          0.51L * ulp(gradient.type(), factor == 0 ? 0 : expected / factor) * std::fabs(factor);
      CHECK(close(factor * written, expected, tolerance), "%s: gradient [%lld, %lld] is %.9Lg, expected %.9Lg", what,
            static_cast<long long>(i), static_cast<long long>(j), factor * written, expected);
      if (head.gradient_tolerance[i][j] == 0) CHECK(written == 0, "%s: a row without target got %Lg", what, written);
    }
  }
}

void check_loss(const char* isa, LossCase& c, bool in_place) {
  const std::string text = describe(isa, c) + (in_place ? " in place" : "");
  const ExpectedLoss expected = expected_loss(c);
  const std::vector<char> logits_before = c.source_logits->bytes();
  Grid& source_gradient = in_place ? *c.source_logits : *c.source_gradient;
  c.problem.source_gradient = source_gradient.writable();
  Grid* target_gradient = in_place ? c.target_logits.get() : c.target_gradient.get();
  if (target_gradient != nullptr) c.problem.target_gradient = target_gradient->writable();
  if (planted("class-too-many")) c.problem.source_logits.columns += 1;
  if (planted("signed-overflow")) c.problem.source_logits.row_stride = std::numeric_limits<int64_t>::max();
  if (planted("misaligned-label") && c.labels)
    c.problem.labels.data = static_cast<const char*>(c.problem.labels.data) + 1;

  LossResult result;
  const cpu::BadLabel bad = cpu::co_tuning_loss(c.problem, serial_for, &result);
  CHECK(!bad, "%s: label %lld of row %lld", text.c_str(), static_cast<long long>(bad.value),
        static_cast<long long>(bad.row));
  const Reduction reduction = c.problem.reduction;
  check_term(result.source_term, expected.source, reduction, (text + ", source term").c_str());
  const bool both = c.target_logits != nullptr;
  if (both) check_term(result.target_term, expected.target, reduction, (text + ", target term").c_str());
  check_gradient(source_gradient, expected.source, reduction, both ? c.problem.trade_off : 1, result.source_factor,
                 (text + ", source").c_str());
  if (both) {
    check_gradient(*target_gradient, expected.target, reduction, 1, result.target_factor, (text + ", target").c_str());
  }
  if (!in_place) CHECK(c.source_logits->bytes() == logits_before, "%s: the logits were written", text.c_str());
}

TEST(loss) {
  for_each_isa([](const char* isa) {
    for (ScalarType source : kAllTypes) {
      for (ScalarType target : kAllTypes) {
        for (ScalarType relationship : kAllTypes) {
          for (bool in_place : {false, true}) {
            for (int repeat = 0; repeat < 3; ++repeat) {
              LossCase c(source, target, relationship, random_integer(0, 9), random_integer(1, 150),
                         random_integer(1, 40));
              check_loss(isa, c, in_place);
            }
          }
        }
      }
    }
  });
}

// Rows that are ignored or not finite do not change the others.
TEST(loss_of_special_rows) {
  for_each_isa([](const char* isa) {
    for (ScalarType type : kAllTypes) {
      for (int repeat = 0; repeat < 12; ++repeat) {
        LossCase c(type, type, ScalarType::kFloat32, 8, random_integer(2, 150), random_integer(2, 40));
        c.problem.reduction = Reduction::kNone;
        for (Grid* logits : {c.source_logits.get(), c.target_logits.get()}) {
          if (logits == nullptr) continue;
          const int64_t last = logits->columns() - 1;
          logits->set(1, random_integer(0, last), kNaN);
          logits->set(2, random_integer(0, last), -kInfinity);
          logits->set(3, last, 200);
          for (int64_t j = 0; j <= last; ++j) logits->set(4, j, -kInfinity);
          for (int64_t j = 0; j < last; ++j) logits->set(5, j, -kInfinity);
          logits->set(6, random_integer(0, last), kInfinity);
        }
        check_loss(isa, c, one_in(2));
      }
    }
  });
}

// Rows that are confident in their label, or in three source classes, all after the first elements. The loss is near 0,
// or log 3, without a rounding error of the logits' size.
TEST(loss_of_confident_rows) {
  for_each_isa([](const char* isa) {
    for (ScalarType type : kAllTypes) {
      for (int repeat = 0; repeat < 6; ++repeat) {
        LossCase c(type, type, ScalarType::kFloat32, 6, random_integer(100, 300), random_integer(100, 200));
        if (c.target != Target::kLabels) continue;
        c.problem.reduction = Reduction::kNone;
        c.problem.kl_divergence = false;
        c.problem.label_smoothing = 0;
        c.problem.weight.clear();
        const int64_t first = random_integer(64, c.source_classes - 30);
        for (int64_t t = 0; t < c.target_classes; ++t) {
          for (int64_t s = 0; s < c.source_classes; ++s) c.relationship->set(t, s, 0);
          for (int64_t k = 0; k < 3; ++k) c.relationship->set(t, first + 9 * k, 0.3L + 0.03L * k);
        }
        long double mass = 0;
        for (int64_t k = 0; k < 3; ++k) mass += c.relationship->at(0, first + 9 * k);
        for (int64_t i = 0; i < c.batch; ++i) {
          const int64_t label = (*c.labels)[i] == c.problem.ignore_index ? 0 : (*c.labels)[i];
          const long double high = 30 + 25 * uniform();
          for (int64_t s = 0; s < c.source_classes; ++s) c.source_logits->set(i, s, normal(1));
          for (int64_t k = 0; k < 3; ++k) c.source_logits->set(i, first + 9 * k, high);
          if (c.target_logits == nullptr) continue;
          for (int64_t t = 0; t < c.target_classes; ++t) c.target_logits->set(i, t, normal(1));
          c.target_logits->set(i, label, high);
        }
        LossResult result;
        cpu::co_tuning_loss(c.problem, serial_for, &result);
        const long double tolerance = 4 * epsilon_of(compute_type(type)) + 1e-10L;
        for (int64_t i = 0; i < c.batch; ++i) {
          const bool ignored = (*c.labels)[i] == c.problem.ignore_index;
          CHECK(close(result.source_term[i], ignored ? 0 : mass * std::log(3.0L), tolerance), "%s: source loss %.9g",
                describe(isa, c).c_str(), result.source_term[i]);
          if (c.target_logits == nullptr) continue;
          CHECK(close(result.target_term[i], 0, tolerance), "%s: target loss %.9g", describe(isa, c).c_str(),
                result.target_term[i]);
        }
        check_loss(isa, c, one_in(2));
      }
    }
  });
}

// Class weights and sums of R's rows down to 1e-8: a float16 gradient keeps its digits, because dividing by the total
// weight may make it large again.
TEST(half_gradients_of_small_masses) {
  for_each_isa([](const char* isa) {
    for (int repeat = 0; repeat < 20; ++repeat) {
      LossCase c(ScalarType::kFloat16, ScalarType::kFloat16, ScalarType::kFloat32, 8, 50, 20);
      const long double small = std::pow(10.0L, -8 * uniform());
      c.problem.weight.assign(20, 0);
      for (double& weight : c.problem.weight) weight = static_cast<double>(small * (1 + uniform()));
      for (Grid* rows : {c.relationship.get(), c.translated.get()}) {
        for (int64_t i = 0; rows != nullptr && i < rows->rows(); ++i) {
          for (int64_t j = 0; j < rows->columns(); ++j) rows->set(i, j, small * rows->at(i, j));
        }
      }
      check_loss(isa, c, false);
      const ExpectedLoss expected = expected_loss(c);
      const auto check_digits = [&](const Grid& written, const ExpectedLoss::Head& head, const char* what) {
        long double largest = 0, stored = 0;
        for (int64_t i = 0; i < written.rows(); ++i) {
          for (int64_t j = 0; j < written.columns(); ++j) {
            largest = std::max(largest, std::fabs(head.gradient[i][j]));
            stored = std::max(stored, std::fabs(written.at(i, j)));
          }
        }
        // The largest mass is stored as a number in [2^13, 2^14), and no gradient exceeds twice that.
        CHECK(largest == 0 || (stored > 8 && stored <= 0x1p15L), "%s %s: the largest number stored is %Lg", isa, what,
              stored);
      };
      check_digits(*c.source_gradient, expected.source, "source");
      if (c.target_logits != nullptr) check_digits(*c.target_gradient, expected.target, "target");
    }
  });
}

TEST(loss_of_ignored_batches) {
  for_each_isa([](const char* isa) {
    for (ScalarType type : kAllTypes) {
      for (int repeat = 0; repeat < 6; ++repeat) {
        LossCase c(type, type, type, 3, 20, 5);
        if (c.target == Target::kProbabilities) continue;
        for (LabelList* labels : {c.labels.get(), c.labels_b.get()}) {
          for (int64_t i = 0; labels != nullptr && i < c.batch; ++i) labels->set(i, c.problem.ignore_index);
        }
        check_loss(isa, c, false);
      }
    }
  });
}

// A gradient above 32 MB is written with streaming stores, one with half its rows is not: the bits are the same.
TEST(loss_of_large_batches) {
  constexpr int64_t kRows = 8192, kColumns = 1027;
  Grid logits(ScalarType::kFloat32, kRows, kColumns), relationship(ScalarType::kFloat32, 3, kColumns);
  LabelList labels(kRows, false, 1);
  for (int64_t i = 0; i < kRows; ++i) {
    labels.set(i, random_integer(0, 2));
    if (i < 8) {
      for (int64_t j = 0; j < kColumns; ++j) logits.set(i, j, normal(3));
    } else {  // the row 8 rows back, shifted by one column
      std::memcpy(logits.data() + i * kColumns * 4, logits.data() + ((i - 8) * kColumns + 1) * 4, kColumns * 4);
    }
  }
  fill_distributions(&relationship, false);
  cpu::LossProblem problem;
  problem.labels = labels.view();
  problem.relationship = relationship.view();
  problem.reduction = Reduction::kSum;
  for_each_isa([&](const char* isa) {
    Grid whole(ScalarType::kFloat32, kRows, kColumns), halves(ScalarType::kFloat32, kRows, kColumns);
    LossResult result;
    problem.source_logits = logits.view();
    problem.source_gradient = whole.writable();
    CHECK(cpu::worth_streaming(whole.data(), kRows * kColumns * 4), "%s", isa);
    cpu::co_tuning_loss(problem, serial_for, &result);
    for (int64_t start : {int64_t{0}, kRows / 2}) {
      problem.source_logits.rows = kRows / 2;
      problem.source_logits.data = logits.data() + start * kColumns * 4;
      problem.source_gradient.data = halves.data() + start * kColumns * 4;
      problem.labels.data = static_cast<const int64_t*>(labels.view().data) + start;
      cpu::co_tuning_loss(problem, serial_for, &result);
    }
    problem.labels = labels.view();
    CHECK(std::memcmp(whole.data(), halves.data(), kRows * kColumns * 4) == 0, "%s: other bits around the cache", isa);
  });
}

TEST(worth_streaming) {
  constexpr int64_t kLarge = int64_t{33} << 20;
  const Pages touched(kLarge, Place::kPageEnd);
  CHECK(cpu::worth_streaming(touched.data(), kLarge), "large, and there");
  CHECK(!cpu::worth_streaming(touched.data(), kLarge / 2), "half of it fits in a cache");
  void* fresh = mmap(nullptr, kLarge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  CHECK(!cpu::worth_streaming(fresh, kLarge), "large, but never touched");
  munmap(fresh, kLarge);
}

// Whether the process has asked for huge pages at an address ("hg" in /proc/self/smaps).
bool huge_pages_wanted(const void* address) {
  const auto wanted = reinterpret_cast<uintptr_t>(address);
  std::ifstream maps("/proc/self/smaps");
  bool here = false;
  for (std::string line; std::getline(maps, line);) {
    uintptr_t begin = 0, end = 0;
    if (std::sscanf(line.c_str(), "%lx-%lx ", &begin, &end) == 2) here = begin <= wanted && wanted < end;
    if (here && line.rfind("VmFlags:", 0) == 0) return line.find(" hg") != std::string::npos;
  }
  return false;
}

TEST(prefer_huge_pages) {
  if (!std::ifstream("/sys/kernel/mm/transparent_hugepage/enabled")) return;  // the system has none
  constexpr int64_t kHuge = int64_t{2} << 20;
  constexpr int64_t kLarge = 8 * kHuge;
  const Pages touched(kLarge, Place::kPageEnd);
  cpu::prefer_huge_pages(touched.data(), kLarge);
  CHECK(!huge_pages_wanted(touched.data() + kLarge / 2), "its pages are there");
  void* map = mmap(nullptr, kLarge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  char* first = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(map) + kHuge - 1) / kHuge * kHuge);
  cpu::prefer_huge_pages(first + 64, 2 * kHuge - 128);
  CHECK(!huge_pages_wanted(first + kHuge), "no huge page lies within");
  cpu::prefer_huge_pages(first + 64, 3 * kHuge);
  CHECK(huge_pages_wanted(first + kHuge) && huge_pages_wanted(first + 3 * kHuge - 1), "two lie within");
  CHECK(!huge_pages_wanted(first + kHuge - 1) && !huge_pages_wanted(first + 3 * kHuge), "its ends share theirs");
  munmap(map, kLarge);
}

TEST(bad_labels) {
  for (int repeat = 0; repeat < 200; ++repeat) {
    LossCase c(ScalarType::kFloat32, ScalarType::kFloat32, ScalarType::kFloat32, 7, 30, 5);
    if (c.target == Target::kProbabilities) continue;
    c.problem.ignore_index = -100;
    const bool second = c.target == Target::kMixedLabels && one_in(2);
    // Separate labels for each row. One is bad, and so are all after it.
    const bool is_int32 = one_in(2);
    LabelList good(7, is_int32, 1), bad(7, is_int32, 2);
    const int64_t lowest = is_int32 ? std::numeric_limits<int32_t>::min() : std::numeric_limits<int64_t>::min();
    const int64_t highest = is_int32 ? std::numeric_limits<int32_t>::max() : std::numeric_limits<int64_t>::max();
    const int64_t values[] = {-1, 5, -99, -101, lowest, highest};
    const int64_t value = values[random_integer(0, 5)], row = random_integer(0, 6);
    for (int64_t i = 0; i < 7; ++i) {
      good.set(i, i % 5);
      bad.set(i, i < row ? i % 5 : i == row ? value : -7);
    }
    c.problem.labels = second ? good.view() : bad.view();
    if (c.target == Target::kMixedLabels) c.problem.labels_b = second ? bad.view() : good.view();
    c.problem.source_gradient = c.source_gradient->writable();
    if (c.target_logits) c.problem.target_gradient = c.target_gradient->writable();
    LossResult result;
    const cpu::BadLabel found = cpu::co_tuning_loss(c.problem, serial_for, &result);
    CHECK(found && found.row == row && found.value == value && found.second == second,
          "row %lld value %lld reported as row %lld value %lld", static_cast<long long>(row),
          static_cast<long long>(value), static_cast<long long>(found.row), static_cast<long long>(found.value));
    CHECK(c.source_gradient->never_written() && (!c.target_gradient || c.target_gradient->never_written()),
          "a gradient was written in spite of a bad label");
    Grid out(ScalarType::kFloat32, 7, 30);
    CHECK(cpu::translate_labels(c.translation(&out), serial_for).row == row && out.never_written(), "translation");
  }
}

TEST(scaled_rows) {
  for_each_isa([](const char* isa) {
    for (ScalarType type : kAllTypes) {
      for (int repeat = 0; repeat < 10; ++repeat) {
        const auto rows = random_grid(type, random_integer(1, 6), random_integer(1, 90), 2);
        std::vector<std::vector<long double>> before(rows->rows());
        for (int64_t i = 0; i < rows->rows(); ++i) {
          for (int64_t j = 0; j < rows->columns(); ++j) before[i].push_back(rows->at(i, j));
        }
        const int64_t stride = random_integer(0, 2);
        std::vector<double> upstream(static_cast<size_t>((rows->rows() - 1) * stride + 1));
        for (double& value : upstream) value = static_cast<double>(normal(1));
        double factor = static_cast<double>(normal(1));
        // The factor, the upstream gradient or their product may be 1; only if the product is 1 is there nothing to do.
        if (one_in(4)) factor = 1;
        if (one_in(4)) upstream[0] = one_in(2) ? 1 : 1 / factor;
        const std::vector<double> upstream_of_fewer_rows(upstream.begin(), upstream.end() - 1);
        const bool fewer = planted("heap-overread") && stride > 0 && rows->rows() > 1;
        cpu::scale_gradients(rows->writable(), factor, fewer ? upstream_of_fewer_rows.data() : upstream.data(), stride,
                             serial_for);
        CHECK(rows->gaps_untouched(), "%s %s", isa, name_of(type));
        for (int64_t i = 0; i < rows->rows(); ++i) {
          for (int64_t j = 0; j < rows->columns(); ++j) {
            const long double expected = factor * upstream[i * stride] * before[i][j];
            const long double tolerance =
                1.5L * epsilon_of(compute_type(type)) * std::fabs(expected) + 0.51L * ulp(type, expected);
            CHECK(close(rows->at(i, j), expected, tolerance), "%s %s: %Lg, expected %Lg", isa, name_of(type),
                  rows->at(i, j), expected);
          }
        }
      }
    }
  });
}

TEST(translated_labels) {
  for_each_isa([](const char* isa) {
    for (ScalarType type : kAllTypes) {
      for (int repeat = 0; repeat < 20; ++repeat) {
        LossCase c(type, type, type, random_integer(0, 6), random_integer(1, 90), random_integer(1, 9));
        if (c.target == Target::kProbabilities) continue;
        Grid out(type, c.batch, c.source_classes);
        const cpu::BadLabel bad = cpu::translate_labels(c.translation(&out), serial_for);
        CHECK(!bad, "%s", isa);
        for (int64_t i = 0; i < c.batch; ++i) {
          const long double share = c.target == Target::kMixedLabels ? c.mix_of(i) : 1;
          const auto part = [&](const LabelList* labels, int64_t s) {
            const bool counts = labels != nullptr && (*labels)[i] != c.problem.ignore_index;
            return counts ? c.relationship->at((*labels)[i], s) : 0;
          };
          for (int64_t s = 0; s < c.source_classes; ++s) {
            const long double expected = share * part(c.labels.get(), s) + (1 - share) * part(c.labels_b.get(), s);
            const long double tolerance =
                2 * epsilon_of(compute_type(type)) * expected + (share == 1 ? 0 : 0.51L * ulp(type, expected));
            CHECK(close(out.at(i, s), expected, tolerance), "%s %s: %Lg, expected %Lg", isa, name_of(type),
                  out.at(i, s), expected);
          }
        }
      }
    }
  });
}

}  // namespace
}  // namespace cotuning::test
