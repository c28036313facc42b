// A random problem for the loss that owns its memory, and the result of the formulas in long double.
#pragma once

#include <memory>
#include <vector>

#include "../kernels/cpu/co_tuning_loss.h"
#include "../kernels/cpu/scale_gradients.h"
#include "../kernels/cpu/translate_labels.h"
#include "check.h"
#include "memory.h"

namespace cotuning::test {

enum class Target { kLabels, kMixedLabels, kProbabilities };

struct LossCase {
  int64_t batch, source_classes, target_classes;
  Target target;
  std::unique_ptr<Grid> source_logits, target_logits;  // no target logits: only the source term
  std::unique_ptr<Grid> relationship, translated;      // translated: the given (B, N_s), for probabilities
  std::unique_ptr<Grid> probabilities;
  std::unique_ptr<LabelList> labels, labels_b;
  std::vector<double> mix;
  std::unique_ptr<Grid> source_gradient, target_gradient;
  cpu::LossProblem problem;

  LossCase(ScalarType source_type, ScalarType target_type, ScalarType relationship_type, int64_t batch,
           int64_t source_classes, int64_t target_classes);

  cpu::TranslateProblem translation(Grid* out) const {
    cpu::TranslateProblem translated;
    static_cast<TargetInputs&>(translated) = problem;
    translated.relationship = problem.relationship;
    translated.out = out->writable();
    return translated;
  }
  long double mix_of(int64_t i) const { return mix[i * problem.mix_stride]; }
};

inline std::unique_ptr<Grid> random_grid(ScalarType type, int64_t rows, int64_t columns, long double deviation) {
  auto grid = std::make_unique<Grid>(type, rows, columns, columns + (one_in(2) ? 0 : random_integer(1, 9)));
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) grid->set(i, j, normal(deviation));
  }
  return grid;
}

// Rows that sum to about 1, with some zero elements, and some rows of zeros.
inline void fill_distributions(Grid* grid, bool zero_rows) {
  for (int64_t i = 0; i < grid->rows(); ++i) {
    const bool zero = zero_rows && one_in(4);
    for (int64_t j = 0; j < grid->columns(); ++j) {
      grid->set(i, j, zero || one_in(3) ? 0 : 2 * uniform() / grid->columns());
    }
  }
}

inline std::unique_ptr<LabelList> random_labels(int64_t count, int64_t classes, int64_t ignore_index) {
  // Stride 0: one label for the whole batch.
  auto labels = std::make_unique<LabelList>(count, one_in(2), random_integer(0, 3));
  for (int64_t i = 0; i < count; ++i) labels->set(i, one_in(6) ? ignore_index : random_integer(0, classes - 1));
  return labels;
}

inline LossCase::LossCase(ScalarType source_type, ScalarType target_type, ScalarType relationship_type, int64_t batch,
                          int64_t source_classes, int64_t target_classes)
    : batch(batch), source_classes(source_classes), target_classes(target_classes) {
  target = static_cast<Target>(random_integer(0, 2));
  problem.ignore_index = one_in(2) ? -100 : random_integer(0, target_classes - 1);
  problem.trade_off = static_cast<double>(3 * uniform());
  problem.label_smoothing = one_in(2) ? 0 : static_cast<double>(0.3L * uniform());
  problem.reduction = static_cast<Reduction>(random_integer(0, 2));
  problem.kl_divergence = one_in(2);
  if (one_in(2)) {
    for (int64_t t = 0; t < target_classes; ++t) {
      problem.weight.push_back(one_in(8) ? 0 : static_cast<double>(0.1L + 2 * uniform()));
    }
  }

  const long double deviation = one_in(8) ? 30 : 3;
  source_logits = random_grid(source_type, batch, source_classes, deviation);
  problem.source_logits = source_logits->view();
  source_gradient = std::make_unique<Grid>(source_type, batch, source_classes, source_classes + random_integer(0, 5));
  if (!one_in(5)) {
    target_logits = random_grid(target_type, batch, target_classes, deviation);
    problem.target_logits = target_logits->view();
    target_gradient = std::make_unique<Grid>(target_type, batch, target_classes, target_classes + random_integer(0, 5));
  }
  relationship = random_grid(relationship_type, target_classes, source_classes, 1);
  fill_distributions(relationship.get(), true);
  problem.relationship = relationship->view();

  if (target == Target::kProbabilities) {
    probabilities = random_grid(target_type, batch, target_classes, 1);
    fill_distributions(probabilities.get(), false);
    translated = random_grid(relationship_type, batch, source_classes, 1);
    fill_distributions(translated.get(), true);
    problem.probabilities = probabilities->view();
    problem.relationship = translated->view();
    for (int64_t i = 0; i < batch; ++i) mix.push_back(static_cast<double>(uniform()));
    problem.mix_stride = 1;
  } else {
    labels = random_labels(batch, target_classes, problem.ignore_index);
    problem.labels = labels->view();
  }
  if (target == Target::kMixedLabels) {
    labels_b = random_labels(batch, target_classes, problem.ignore_index);
    problem.labels_b = labels_b->view();
    problem.mix_stride = one_in(2) ? 1 : 0;
    for (int64_t i = 0; i < (problem.mix_stride == 0 ? 1 : batch); ++i) {
      mix.push_back(one_in(4) ? 1 : static_cast<double>(uniform()));
    }
  }
  problem.mix = mix.data();
}

// The result of the formulas: each row's terms and their gradients, and the divisors of the means.
struct ExpectedLoss {
  struct Head {
    std::vector<long double> rows, tolerance;
    std::vector<std::vector<long double>> gradient, gradient_tolerance;
    long double divisor = 0;
  };
  Head source, target;
};

// Cross entropy of one row against q, its gradient, and the rounding error in the compute type that each may have.
inline void add_expected_row(const Grid& logits, int64_t row, const std::vector<long double>& q, bool kl_divergence,
                             ExpectedLoss::Head* head) {
  const int64_t n = logits.columns();
  const long double epsilon = epsilon_of(compute_type(logits.type())) * (32 + n / 4);
  std::vector<long double> gradient(n, 0.0L), tolerance(n, 0.0L);
  long double largest = -kInfinity, sum = 0, mass = 0, loss = 0, size = 0;
  bool takes_part = false;
  for (int64_t j = 0; j < n; ++j) {
    largest = std::isnan(logits.at(row, j)) ? kNaN : std::max(largest, logits.at(row, j));
    takes_part |= q[j] != 0;
  }
  if (takes_part) {
    for (int64_t j = 0; j < n; ++j) sum += std::exp(logits.at(row, j) - largest);
    for (int64_t j = 0; j < n; ++j) mass += q[j];
    for (int64_t j = 0; j < n; ++j) {
      const long double x = logits.at(row, j) - largest, softmax = std::exp(x) / sum;
      if (q[j] != 0) {
        loss += q[j] * (std::log(sum) - x) + (kl_divergence ? q[j] * std::log(q[j]) : 0);
        size += q[j] * (std::fabs(x) + std::log(sum) + std::fabs(std::log(q[j])) + 1);
      }
      gradient[j] = mass * softmax - q[j];
      // With a provisional maximum, the softmax is flushed to 0 slightly above float's smallest number.
      tolerance[j] = epsilon * (mass * softmax + q[j]) + 1e-30L;
    }
  }
  head->rows.push_back(loss);
  head->tolerance.push_back(epsilon * size);
  head->gradient.push_back(gradient);
  head->gradient_tolerance.push_back(tolerance);
}

inline ExpectedLoss expected_loss(const LossCase& c) {
  ExpectedLoss expected;
  for (int64_t i = 0; i < c.batch; ++i) {
    std::vector<long double> p(c.target_classes, 0.0L), q(c.source_classes, 0.0L), smooth(c.target_classes, 0.0L);
    long double share = 0, supervised = 0, weighted = 0;
    const auto add_label = [&](int64_t label, long double part) {
      if (label == c.problem.ignore_index) return;
      p[label] += part;
      share += part;
    };
    if (c.target == Target::kProbabilities) {
      for (int64_t t = 0; t < c.target_classes; ++t) p[t] = c.probabilities->at(i, t);
      for (int64_t s = 0; s < c.source_classes; ++s) q[s] = c.translated->at(i, s);
      share = 1;
      supervised = c.mix_of(i);
      weighted = 1;
    } else {
      const long double part = c.target == Target::kMixedLabels ? c.mix_of(i) : 1;
      add_label((*c.labels)[i], part);
      if (c.labels_b != nullptr) add_label((*c.labels_b)[i], 1 - part);
      for (int64_t t = 0; t < c.target_classes; ++t) {
        bool any = false;
        for (int64_t s = 0; s < c.source_classes; ++s) {
          q[s] += p[t] * c.relationship->at(t, s);
          any |= c.relationship->at(t, s) != 0;
        }
        if (any) supervised += p[t];
        weighted += p[t] * (c.problem.weight.empty() ? 1 : c.problem.weight[t]);
      }
    }
    for (int64_t t = 0; t < c.target_classes; ++t) {
      const long double smoothing = c.problem.label_smoothing;
      smooth[t] = ((1 - smoothing) * p[t] + smoothing / c.target_classes * share) *
                  (c.problem.weight.empty() ? 1 : c.problem.weight[t]);
    }
    add_expected_row(*c.source_logits, i, q, c.problem.kl_divergence, &expected.source);
    if (c.target_logits != nullptr) add_expected_row(*c.target_logits, i, smooth, false, &expected.target);
    expected.source.divisor += supervised;
    expected.target.divisor += weighted;
  }
  bool any_valid = c.target == Target::kProbabilities && c.batch > 0;
  for (int64_t i = 0; i < c.batch && !any_valid; ++i) {
    const bool first = (*c.labels)[i] != c.problem.ignore_index && (c.labels_b == nullptr || c.mix_of(i) != 0);
    any_valid = first || (c.labels_b != nullptr && (*c.labels_b)[i] != c.problem.ignore_index && c.mix_of(i) != 1);
  }
  if (expected.source.divisor == 0 && any_valid) expected.source.divisor = 1;
  return expected;
}

}  // namespace cotuning::test
