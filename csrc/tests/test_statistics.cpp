// Class sums for the relationship, and the terms of the temperature.
#include <string>

#include "../kernels/cpu/class_sums.h"
#include "../kernels/cpu/rows.h"
#include "../kernels/cpu/temperature_terms.h"
#include "loss_case.h"
#include "threads.h"

namespace cotuning::test {
namespace {

struct DataSet {
  std::unique_ptr<Grid> logits;
  std::unique_ptr<LabelList> labels;
  int64_t ignore_index;
  double b;

  DataSet(ScalarType type, int64_t rows, int64_t columns, int64_t classes)
      : logits(random_grid(type, rows, columns, 3)), ignore_index(one_in(2) ? -100 : 0) {
    labels = random_labels(rows, classes, ignore_index);
    b = static_cast<double>(round_to(compute_type(type), 0.2L + 2 * uniform()));
  }
  bool ignored(int64_t i) const { return (*labels)[i] == ignore_index; }
  long double error_factor() const { return epsilon_of(compute_type(logits->type())) * (64 + logits->columns() / 4); }
};

// softmax(b z) of a row
std::vector<long double> softmax(const Grid& logits, int64_t row, double b) {
  std::vector<long double> values;
  long double largest = -kInfinity, sum = 0;
  for (int64_t j = 0; j < logits.columns(); ++j) largest = std::max(largest, logits.at(row, j));
  for (int64_t j = 0; j < logits.columns(); ++j) {
    values.push_back(std::exp(b * (logits.at(row, j) - largest)));
    sum += values.back();
  }
  for (long double& value : values) value /= sum;
  return values;
}

void check_class_sums(const char* isa, ScalarType type, ScalarType sum_type, bool in_place) {
  const int64_t classes = random_integer(1, 9);
  const DataSet data(type, random_integer(0, 30), random_integer(1, 120), classes);
  const auto before = random_grid(sum_type, classes, data.logits->columns(), 1);
  const auto sums = in_place ? nullptr : random_grid(sum_type, classes, data.logits->columns(), 1);
  std::vector<int64_t> counts(classes, 5), counts_before(classes, 5), expected_counts(classes, 5);
  std::vector<std::vector<long double>> expected(classes, std::vector<long double>(data.logits->columns(), 0.0L));
  for (int64_t t = 0; t < classes; ++t) {
    const bool stale = one_in(2);  // has other sums after an earlier batch, and another count
    if (stale) counts[t] = 3;
    for (int64_t j = 0; j < before->columns(); ++j) {
      before->set(t, j, uniform());
      expected[t][j] = before->at(t, j);
      if (!in_place) sums->set(t, j, stale ? NAN : before->at(t, j));
    }
  }
  const cpu::ClassSums old{before->writable(), counts_before.data()};
  const cpu::ClassSums after = in_place ? old : cpu::ClassSums{sums->writable(), counts.data()};
  int64_t first_bad_row = 0;
  const cpu::BadLabel bad = cpu::add_class_sums(data.logits->view(), data.labels->view(), data.ignore_index, data.b,
                                                old, after, serial_for, &first_bad_row);
  const std::string text =
      std::string(isa) + " " + name_of(type) + " into " + name_of(sum_type) + (in_place ? " in place" : "");
  CHECK(!bad && first_bad_row == -1 && before->gaps_untouched(), "%s", text.c_str());
  CHECK(in_place || sums->gaps_untouched(), "%s", text.c_str());
  CHECK(in_place || counts_before == std::vector<int64_t>(classes, 5), "%s: counts before", text.c_str());
  const Grid& result = in_place ? *before : *sums;
  for (int64_t i = 0; i < data.logits->rows(); ++i) {
    if (data.ignored(i)) continue;
    const int64_t label = (*data.labels)[i];
    ++expected_counts[label];
    const std::vector<long double> p = softmax(*data.logits, i, data.b);
    for (size_t j = 0; j < p.size(); ++j) expected[label][j] += p[j];
  }
  CHECK((in_place ? counts_before : counts) == expected_counts, "%s: counts", text.c_str());
  for (int64_t t = 0; t < classes; ++t) {
    for (int64_t j = 0; j < data.logits->columns(); ++j) {
      const long double value = result.at(t, j);
      const long double relative = data.error_factor() + epsilon_of(sum_type) * data.logits->rows();
      CHECK(close(value, expected[t][j], relative * expected[t][j] + 1e-30L), "%s: [%lld, %lld] %.9Lg, not %.9Lg",
            text.c_str(), static_cast<long long>(t), static_cast<long long>(j), value, expected[t][j]);
    }
  }
}

TEST(class_sums) {
  for (int i = 0; i < cpu::row_kernels_count(); ++i) {
    cpu::use_row_kernels(cpu::row_kernels_at(i).name);
    for (ScalarType type : kAllTypes) {
      for (int repeat = 0; repeat < 8; ++repeat) {
        check_class_sums(cpu::row_kernels_at(i).name, type, one_in(2) ? ScalarType::kFloat32 : ScalarType::kFloat64,
                         repeat % 2 == 0);
      }
    }
  }
}

TEST(rows_without_a_softmax) {
  for (int i = 0; i < cpu::row_kernels_count(); ++i) {
    cpu::use_row_kernels(cpu::row_kernels_at(i).name);
    for (ScalarType type : kAllTypes) {
      for (const long double wrong : {static_cast<long double>(NAN), kInfinity, -kInfinity}) {
        const auto logits = random_grid(type, 9, 70, 1);
        LabelList labels(9, true, 1);
        for (int64_t row = 0; row < 9; ++row) labels.set(row, row == 4 ? -100 : 8 - row);
        // A masked class is no fault, a row of masked classes is; an ignored row may have any numbers.
        for (int64_t j = 0; j < 70; ++j) logits->set(4, j, wrong);
        logits->set(1, 3, -kInfinity);
        const int64_t bad = random_integer(0, 1) ? 6 : 3;
        for (int64_t row = bad; row < 9; row += 2) {
          for (int64_t j = 0; j < 70; ++j) {
            if (wrong == -kInfinity || j == 69) logits->set(row, j, wrong);
          }
        }
        Grid sums(ScalarType::kFloat32, 9, 70);
        std::vector<int64_t> counts(9, 0);
        const cpu::ClassSums in_place{sums.writable(), counts.data()};
        int64_t first_bad_row = 0;
        cpu::add_class_sums(logits->view(), labels.view(), -100, 1.0, in_place, in_place, parallel_for, &first_bad_row);
        CHECK(first_bad_row == bad, "%s %s: row %lld, not %lld", cpu::row_kernels_at(i).name, name_of(type),
              static_cast<long long>(first_bad_row), static_cast<long long>(bad));
      }
    }
  }
}

TEST(temperature) {
  for (int isa = 0; isa < cpu::row_kernels_count(); ++isa) {
    cpu::use_row_kernels(cpu::row_kernels_at(isa).name);
    for (ScalarType type : kAllTypes) {
      for (int repeat = 0; repeat < 10; ++repeat) {
        const int64_t columns = random_integer(1, 120);
        const DataSet data(type, random_integer(0, 30), columns, columns);
        if (one_in(3)) {  // an impossible class
          for (int64_t i = 0; i < data.logits->rows(); ++i) {
            const int64_t impossible = random_integer(0, columns - 1);
            if (impossible != (*data.labels)[i]) data.logits->set(i, impossible, -kInfinity);
          }
        }
        double terms[4] = {9, 9, 9, 9};
        CHECK(!cpu::temperature_terms(data.logits->view(), data.labels->view(), data.ignore_index, data.b, terms,
                                      serial_for),
              "temperature_terms");
        long double expected[4] = {}, size[4] = {};
        for (int64_t i = 0; i < data.logits->rows(); ++i) {
          if (data.ignored(i)) continue;
          const std::vector<long double> p = softmax(*data.logits, i, data.b);
          const long double z_label = data.logits->at(i, (*data.labels)[i]);
          long double mean = 0, square = 0, mean_size = 0;
          for (int64_t j = 0; j < columns; ++j) {
            if (p[j] == 0) continue;
            mean += p[j] * data.logits->at(i, j);
          }
          for (int64_t j = 0; j < columns; ++j) {
            if (p[j] == 0) continue;
            const long double x = data.logits->at(i, j) - mean;
            square += p[j] * x * x;
            mean_size += p[j] * std::fabs(x);
          }
          expected[0] -= std::log(p[(*data.labels)[i]]);
          expected[1] += mean - z_label;
          expected[2] += square;
          expected[3] += 1;
          size[0] += std::fabs(std::log(p[(*data.labels)[i]])) + 1;
          size[1] += mean_size + std::fabs(mean - z_label) + 1;
          // The kernel takes moments about the largest logit, which is up to about 20 from the mean.
          size[2] += 20 * 20 + square;
        }
        for (int k = 0; k < 4; ++k) {
          CHECK(close(terms[k], expected[k], data.error_factor() * size[k]), "%s %s: term %d is %.9g, expected %.9Lg",
                cpu::row_kernels_at(isa).name, name_of(type), k, terms[k], expected[k]);
        }
      }
    }
  }
}

// Rows that are confident in their label, which comes after the first elements. NLL and slope are near 0, without a
// rounding error of the logits' size, which would have the same sign in all rows.
TEST(temperature_of_confident_rows) {
  for (int isa = 0; isa < cpu::row_kernels_count(); ++isa) {
    cpu::use_row_kernels(cpu::row_kernels_at(isa).name);
    for (ScalarType type : kAllTypes) {
      constexpr int64_t kRows = 40, kColumns = 200;
      const auto logits = random_grid(type, kRows, kColumns, 1);
      LabelList labels(kRows, false, 1);
      for (int64_t i = 0; i < kRows; ++i) {
        labels.set(i, random_integer(64, kColumns - 1));
        logits->set(i, labels[i], 30 + 25 * uniform());
      }
      double terms[4];
      cpu::temperature_terms(logits->view(), labels.view(), -100, 1.0, terms, serial_for);
      const long double tolerance = epsilon_of(compute_type(type)) / 8 + 1e-9L;
      CHECK(std::fabs(terms[0]) <= kRows * tolerance && std::fabs(terms[1]) <= kRows * tolerance,
            "%s %s: NLL %g, slope %g", cpu::row_kernels_at(isa).name, name_of(type), terms[0], terms[1]);
    }
  }
}

TEST(bad_labels_of_statistics) {
  for (int repeat = 0; repeat < 50; ++repeat) {
    const auto logits = random_grid(ScalarType::kFloat32, 6, 20, 1);
    LabelList labels(6, one_in(2), 1);
    const int64_t row = random_integer(0, 5), value = one_in(2) ? 4 : -1;
    for (int64_t i = 0; i < 6; ++i) labels.set(i, i == row ? value : i % 4);
    Grid sums(ScalarType::kFloat32, 4, 20);
    std::vector<int64_t> counts(4, 7);
    const cpu::ClassSums in_place{sums.writable(), counts.data()};
    int64_t first_bad_row;
    const cpu::BadLabel bad =
        cpu::add_class_sums(logits->view(), labels.view(), -100, 1.0, in_place, in_place, serial_for, &first_bad_row);
    CHECK(bad.row == row && bad.value == value, "row %lld", static_cast<long long>(bad.row));
    CHECK(sums.never_written() && counts == std::vector<int64_t>(4, 7), "sums were written in spite of a bad label");
    labels.set(row, value == 4 ? 20 : -1);  // a class index is now a column
    double terms[4];
    const cpu::BadLabel of_temperature =
        cpu::temperature_terms(logits->view(), labels.view(), -100, 1.0, terms, serial_for);
    CHECK(of_temperature.row == row, "row %lld", static_cast<long long>(of_temperature.row));
  }
}

}  // namespace
}  // namespace cotuning::test
