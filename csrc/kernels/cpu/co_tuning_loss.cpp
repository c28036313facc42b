#include "co_tuning_loss.h"

#include <algorithm>
#include <cmath>

#include "pages.h"
#include "row_target.h"
#include "rows.h"
#include "scratch.h"
#include "sparse_rows.h"

namespace cotuning::cpu {
namespace {

// What all rows of a class share, computed once per class of the batch.
struct ClassFacts {
  enum : char { kUnknown, kSupervised, kUnsupervised };
  char supervision = kUnknown;
  double sum_q_log_q = 0;
};

bool is_double(const ConstMatrix& matrix) { return matrix.type == ScalarType::kFloat64; }

// scale = stored * factor. A float16 gradient divided by a large batch, or multiplied by a class weight of 1e-3, would
// lose every entry below 6e-8. It is therefore stored with a scale that puts the largest mass of a row into
// [2^13, 2^14), so that rows of little mass keep their digits. A larger scale could overflow 65504: where entries
// cancel, a gradient can reach twice that mass. The factor is a power of two, so the backward pass multiplies by it
// without rounding.
double split_scale(ScalarType type, double scale, double largest_mass, double* stored) {
  *stored = scale;
  const double largest = std::fabs(scale * largest_mass);
  if (type != ScalarType::kFloat16 || !(largest > 0) || !std::isfinite(largest)) return 1.0;
  constexpr int kLargestExponent = 14;
  int exponent;
  std::frexp(largest, &exponent);
  *stored = std::ldexp(scale, kLargestExponent - exponent);
  return std::ldexp(1.0, exponent - kLargestExponent);
}

// Whether the gradient's memory holds a row's exponentials between the two passes. Scratch holds them where it fits
// in the first-level cache with the row, the next row, the distribution and the gradient. Where these five do not fit,
// using the gradient's memory sends a fifth less through the second-level cache. A gradient written over its logits
// cannot hold them: a second sweep (rows.h) would need logits that the first has overwritten.
constexpr int64_t kFirstLevelBytes = 32 << 10;
bool keeps_exponentials(const Matrix& gradient, const ConstMatrix& logits) {
  const bool same_type = logits.type == ScalarType::kFloat32 || is_double(logits);
  return same_type && gradient.data != nullptr && gradient.data != logits.data &&
         5 * logits.columns * size_of(logits.type) > kFirstLevelBytes;
}

// Prefetching the next row helps while the relationship fits in a cache. A larger one comes from memory, and the
// prefetch would delay its rows.
constexpr int64_t kCachedRelationshipBytes = 2 << 20;

constexpr double kUnknown = -INFINITY;

double loss_of(const SweepResult& s) { return s.mass * std::log(s.sum) - s.dot; }

// The shift is far below a row's maximum where the maximum comes late and is far above the first elements. The largest
// z - shift are then rounded coarsely, and so are their exponentials: by 7e-7 of their value where the sum is exp(12).
// Rows in random order hardly reach that.
constexpr double kFarSum = 162755;

// log sum and q (z - shift) are then large too, and so is the rounding error of their difference. True if the
// difference is smaller than either by a factor of 8, as in rows that are confident and right: their loss is near 0.
// Most rows have a sum below exp(8), which settles it.
bool is_coarse(const SweepResult& s) {
  constexpr double kMost = 8, kLeastSum = 2981;
  if (!(s.sum > kLeastSum)) return false;
  if (s.sum > kFarSum) return true;
  return std::fabs(s.mass) * std::log(s.sum) > kMost * (std::fabs(s.mass) + std::fabs(loss_of(s)));
}

class Loss {
 public:
  explicit Loss(const LossProblem& problem)
      : p_(problem),
        rows_(row_kernels()),
        batch_(problem.source_logits.rows),
        source_classes_(problem.source_logits.columns),
        target_classes_(problem.target_classes()),
        counts_source_(!problem.target_logits || problem.trade_off != 0) {}

  BadLabel read_targets() {
    if (has_probabilities()) return {};
    return read_row_targets(p_, batch_, target_classes_, &targets_);
  }

  void look_up_classes() {
    if (has_probabilities()) return;
    facts_.resize(target_classes_);
    if (!counts_source_) return;
    for (const RowTarget& target : targets_) {
      for (int k = 0; k < target.count; ++k) look_up_class(target.index[k]);
    }
  }

  int64_t bad_row() const { return bad_row_; }

  // The divisors of the two means; 1 for the other reductions.
  void count() {
    if (p_.reduction != Reduction::kMean) return;
    double source_rows = 0, target_weight = 0;
    if (has_probabilities()) {
      for (int64_t i = 0; i < batch_ && counts_source_; ++i) source_rows += p_.mix[i * p_.mix_stride];
      target_weight = static_cast<double>(batch_);
      const int type = static_cast<int>(p_.probabilities.type);
      for (int64_t i = 0; i < batch_ && source_rows == 0 && !any_valid_; ++i) {
        any_valid_ = rows_.any_nonzero[type](p_.probabilities.row(i), target_classes_);
      }
    } else {
      for (const RowTarget& target : targets_) {
        for (int k = 0; k < target.count; ++k) {
          any_valid_ = true;
          target_weight += target.share[k] * weight_of(target.index[k]);
          if (supervised(target.index[k])) source_rows += target.share[k];
        }
      }
    }
    target_divisor_ = target_weight;
    // A batch without a supervised row is ordinary: its source term is 0. A batch without a valid row has no mean.
    source_divisor_ = source_rows == 0 && any_valid_ ? 1 : source_rows;
  }

  void choose_factors(LossResult* result) {
    // Without a valid row every gradient is 0. A factor of 0 keeps it 0, where 1 / 0 would make it NaN.
    const double trade_off = p_.target_logits ? p_.trade_off : 1.0;
    const double source = source_divisor_ == 0 && !any_valid_ ? 0.0 : trade_off / source_divisor_;
    const double target = target_divisor_ == 0 && !any_valid_ ? 0.0 : 1.0 / target_divisor_;
    result->source_factor = split_scale(p_.source_logits.type, source, largest_source_mass(), &source_scale_);
    result->target_factor = split_scale(p_.target_logits.type, target, largest_target_mass(), &target_scale_);
  }

  void run(ParallelFor parallel_for, LossResult* result) {
    result->source_term.assign(batch_, 0.0);
    result->target_term.assign(p_.target_logits ? batch_ : 0, 0.0);
    if (p_.source_gradient.data != nullptr) prefer_huge_pages(p_.source_gradient.data, gradient_bytes());
    if (p_.target_gradient.data != nullptr) {
      prefer_huge_pages(p_.target_gradient.data, batch_ * p_.target_logits.columns * size_of(p_.target_logits.type));
    }
    // Do not stream over the logits: their lines have just been read, and stores to cached lines cost least.
    const Matrix& gradient = p_.source_gradient;
    streams_source_gradient_ = gradient.data != nullptr && gradient.data != p_.source_logits.data &&
                               !keeps_exponentials(gradient, p_.source_logits) &&
                               worth_streaming(gradient.data, gradient_bytes());
    const int64_t relationship_bytes = p_.relationship.rows * p_.relationship.columns * size_of(p_.relationship.type);
    fetch_next_source_row_ = relationship_bytes <= kCachedRelationshipBytes;  // without R: 0 bytes
    source_rows_ = result->source_term.data();
    target_rows_ = result->target_term.data();
    parallel_for(
        0, batch_, grain_rows(source_classes_ + p_.target_logits.columns),
        [](int64_t begin, int64_t end, void* self) { static_cast<Loss*>(self)->run_rows(begin, end); }, this);
    reduce(&result->source_term, source_divisor_);
    if (p_.target_logits) reduce(&result->target_term, target_divisor_);
  }

 private:
  int64_t gradient_bytes() const { return batch_ * source_classes_ * size_of(p_.source_logits.type); }
  bool has_probabilities() const { return static_cast<bool>(p_.probabilities); }
  double weight_of(int64_t class_index) const { return p_.weight.empty() ? 1.0 : p_.weight[class_index]; }
  bool supervised(int64_t class_index) const { return facts_[class_index].supervision == ClassFacts::kSupervised; }

  void look_up_class(int64_t class_index) {
    ClassFacts& facts = facts_[class_index];
    if (facts.supervision != ClassFacts::kUnknown) return;
    if (p_.sparse) return look_up_sparse_class(class_index);
    const int type = static_cast<int>(p_.relationship.type);
    const void* row = p_.relationship.row(class_index);
    facts.supervision =
        rows_.any_nonzero[type](row, source_classes_) ? ClassFacts::kSupervised : ClassFacts::kUnsupervised;
    if (p_.kl_divergence && facts.supervision == ClassFacts::kSupervised) {
      facts.sum_q_log_q = sum_q_log_q(distribution(row, 1.0, nullptr, 0.0));
    }
  }

  void look_up_sparse_class(int64_t class_index) {
    if (!is_valid_row(p_.sparse, class_index, source_classes_)) {
      bad_row_ = class_index;
      return;
    }
    bool any = false;
    visit_entries(rows_, p_.sparse, class_index, [&](int64_t, double) { any = true; });
    facts_[class_index].supervision = any ? ClassFacts::kSupervised : ClassFacts::kUnsupervised;
  }

  // A row's source distribution in the compute type of the source logits.
  const void* distribution(const void* a, double share_a, const void* b, double share_b) const {
    return mixed_row(rows_, p_.relationship, is_double(p_.source_logits), a, share_a, b, share_b);
  }

  double sum_q_log_q(const void* q) const {
    return is_double(p_.source_logits) ? rows_.sum_q_log_q_double(static_cast<const double*>(q), source_classes_)
                                       : rows_.sum_q_log_q_float(static_cast<const float*>(q), source_classes_);
  }

  // About the largest mass of a row's distribution, or the largest entry if entries cancel: it bounds the gradients.
  // Only split_scale for float16 needs it.
  double largest_source_mass() const {
    if (p_.source_gradient.data == nullptr || p_.source_logits.type != ScalarType::kFloat16) return 1;
    double largest = 0;
    const auto look_at = [&](const void* row) {
      const auto* q = static_cast<const float*>(distribution(row, 1.0, nullptr, 0.0));
      double mass = 0;
      for (int64_t j = 0; j < source_classes_; ++j) {
        mass += q[j];
        largest = std::max(largest, static_cast<double>(std::fabs(q[j])));
      }
      largest = std::max(largest, std::fabs(mass));
    };
    if (has_probabilities()) {
      for (int64_t i = 0; i < batch_; ++i) look_at(p_.relationship.row(i));
    }
    for (size_t t = 0; t < facts_.size(); ++t) {
      const auto row = static_cast<int64_t>(t);
      if (!supervised(row)) continue;
      if (!p_.sparse) {
        look_at(p_.relationship.row(row));
        continue;
      }
      double mass = 0;
      visit_entries(rows_, p_.sparse, row, [&](int64_t, double q) {
        mass += q;
        largest = std::max(largest, std::fabs(q));
      });
      largest = std::max(largest, std::fabs(mass));
    }
    return largest;
  }

  double largest_target_mass() const {
    if (p_.target_gradient.data == nullptr || p_.target_logits.type != ScalarType::kFloat16) return 1;
    if (p_.weight.empty()) return 1;
    double total = 0, largest = 0;
    for (double weight : p_.weight) total += std::fabs(weight);
    const auto look_at = [&](double weight) { largest = std::max(largest, std::fabs(weight)); };
    if (has_probabilities()) std::for_each(p_.weight.begin(), p_.weight.end(), look_at);
    for (const RowTarget& target : targets_) {
      for (int k = 0; k < target.count; ++k) look_at(p_.weight[target.index[k]]);
    }
    const double smoothing = p_.label_smoothing;
    return (1 - smoothing) * largest + smoothing * total / static_cast<double>(p_.weight.size());
  }

  // Those classes of a row's target that have source supervision.
  RowTarget supervised_target(int64_t row) const {
    RowTarget target;
    for (int k = 0; k < targets_[row].count; ++k) {
      if (supervised(targets_[row].index[k])) target.add(targets_[row].index[k], targets_[row].share[k]);
    }
    return target;
  }

  // The translated label of a row, or null where it has no source supervision. Inlined in both of its callers: a call
  // costs cross entropy 20 instructions a row.
  [[gnu::always_inline]] const void* translated(int64_t row, double* q_log_q) const {
    const void* q = nullptr;
    if (has_probabilities()) {
      const int type = static_cast<int>(p_.relationship.type);
      const void* relationship_row = p_.relationship.row(row);
      if (!rows_.any_nonzero[type](relationship_row, source_classes_)) return nullptr;
      q = distribution(relationship_row, 1.0, nullptr, 0.0);
    } else {
      const RowTarget target = supervised_target(row);
      if (target.count == 0) return nullptr;
      const void* second = target.count == 2 ? p_.relationship.row(target.index[1]) : nullptr;
      q = distribution(p_.relationship.row(target.index[0]), target.share[0], second,
                       target.count == 2 ? target.share[1] : 0);
      if (target.count == 1 && target.share[0] == 1.0) {
        *q_log_q = facts_[target.index[0]].sum_q_log_q;
        return q;
      }
    }
    if (p_.kl_divergence) *q_log_q = sum_q_log_q(q);
    return q;
  }

  void run_rows(int64_t begin, int64_t end) {
    // Look up thread-local scratch once per chunk: each access is a function call in a shared library.
    void* const scratch =
        Scratch::get(0, std::max(exponentials_bytes(p_.source_logits), exponentials_bytes(p_.target_logits)));
    if (!counts_source_) {
      for (int64_t i = begin; i < end; ++i) zero_gradient(p_.source_logits, i, p_.source_gradient);
    } else if (p_.kl_divergence) {
      run_source_rows<true>(begin, end, scratch);
    } else {
      run_source_rows<false>(begin, end, scratch);
    }
    if (p_.target_logits) {
      for (int64_t i = begin; i < end; ++i) {
        target_row(i, scratch, i + 1 < end ? p_.target_logits.row(i + 1) : nullptr);
      }
    }
    rows_.finish_streaming();
  }

  // Bytes of one row of exponentials, in the compute type of its logits.
  static size_t exponentials_bytes(const ConstMatrix& logits) {
    return static_cast<size_t>(logits.columns) * (is_double(logits) ? sizeof(double) : sizeof(float));
  }

  template <bool kKl>
  void run_source_rows(int64_t begin, int64_t end, void* scratch) {
    std::vector<Entry> entries;
    for (int64_t i = begin; i < end; ++i) {
      const void* next = fetch_next_source_row_ && i + 1 < end ? p_.source_logits.row(i + 1) : nullptr;
      if (p_.sparse) {
        source_rows_[i] = sparse_source_row<kKl>(i, scratch, next, &entries);
      } else {
        source_row<kKl>(i, scratch, next);
      }
    }
  }

  template <bool kKl>
  void source_row(int64_t row, void* scratch, const void* next) {
    double q_log_q = 0;
    const void* q = translated(row, &q_log_q);
    source_rows_[row] = dense_row<kKl>(p_.source_logits, row, q, scratch, next, source_scale_, p_.source_gradient,
                                       streams_source_gradient_) +
                        q_log_q;
  }

  // The same against a distribution of few entries: the loss is the sum of q (log sum + shift - z) over them, the
  // gradient is the softmax times the mass, less q in their columns. No term is a difference of large numbers: the
  // shift is at least the largest of the entries' logits, and at most the logarithm of the sum.
  template <bool kKl>
  double sparse_source_row(int64_t row, void* scratch, const void* next, std::vector<Entry>* entries) const {
    const ConstMatrix& logits = p_.source_logits;
    const Matrix& gradient = p_.source_gradient;
    read_entries(rows_, p_.sparse, supervised_target(row), entries);
    if (entries->empty()) {
      zero_gradient(logits, row, gradient);
      return 0;
    }
    const int type = static_cast<int>(logits.type);
    double highest = -INFINITY, mass = 0, largest_q = 0;
    for (Entry& each : *entries) {  // in place, the gradient overwrites the logits
      each.logit = element(logits, row, each.column);
      highest = std::max(highest, each.logit);
      mass += each.q;
      largest_q = std::max(largest_q, std::fabs(each.q));
    }
    void* gradient_row = gradient.data != nullptr ? gradient.row(row) : nullptr;
    const bool kept = keeps_exponentials(gradient, logits);
    void* exponentials = kept || (gradient_row == nullptr && !kKl) ? gradient_row : scratch;
    const bool stream = streams_source_gradient_;
    if (stream) look_up_pages(gradient_row, logits.columns * size_of(logits.type));
    SweepResult s = rows_.sweep[type](logits.row(row), nullptr, logits.columns, exponentials, next,
                                      kept || stream ? nullptr : gradient_row,
                                      kKl ? rows_.largest[type](logits.row(row), logits.columns) : highest);
    if (kKl) {
      s.sum = rows_.sums_in_double[type](logits.row(row), nullptr, exponentials, logits.columns, s.shift).sum;
    } else if (s.sum > kFarSum) {
      s = sweep_again(s, logits, row, nullptr, exponentials);
    }
    const double log_sum = std::log(s.sum);
    double loss = 0;
    for (Entry& each : *entries) {
      const double own = kKl ? std::log(each.q) : 0;  // NaN for a negative q, as in the reference
      loss += each.q == 0 ? 0 : each.q * (own + log_sum - (each.logit - s.shift));
    }
    if (gradient_row == nullptr) return loss;
    // softmax_factor (e - q sum / mass) = scale (mass softmax - q): with the bracket stored in place of e, one pass
    // writes the whole gradient. Not if the mass is so small that the bracket could overflow.
    const double softmax_factor = source_scale_ * mass / s.sum, sum_per_mass = s.sum / mass;
    const bool in_one_pass = largest_q * std::fabs(sum_per_mass) < 1e30;
    for (Entry& each : *entries) {
      each.exponential = exponential(exponentials, logits, each.column);
      if (in_one_pass) set_exponential(exponentials, logits, each.column, each.exponential - each.q * sum_per_mass);
    }
    rows_.gradient[type](exponentials, nullptr, logits.columns, softmax_factor, 0.0, stream && in_one_pass,
                         gradient_row);
    if (in_one_pass) return loss;
    for (const Entry& each : *entries) {
      set_element(gradient, row, each.column, source_scale_ * (mass * (each.exponential / s.sum) - each.q));
    }
    return loss;
  }

  // Sweeps again with the first sweep's log of the sum of all exp(z) as the least shift.
  SweepResult sweep_again(const SweepResult& s, const ConstMatrix& logits, int64_t row, const void* q,
                          void* exponentials) const {
    const double shift = s.shift + std::log(s.sum);
    return rows_.sweep[static_cast<int>(logits.type)](logits.row(row), q, logits.columns, exponentials, nullptr,
                                                      nullptr, shift);
  }

  // Cross entropy of a row against the distribution q, and its gradient. Without q the loss and the gradient are 0.
  // `mass`: the mass of q, if known more exactly than its sum in the compute type.
  //
  // kKl: the sum of q log q will be added. Of a good prediction little is left then, so the sums are in double, and the
  // shift is the true maximum: the largest exponential is 1 without a rounding error.
  template <bool kKl>
  double dense_row(const ConstMatrix& logits, int64_t row, const void* q, void* scratch, const void* next, double scale,
                   const Matrix& gradient, bool stream, const double* mass = nullptr) {
    const int type = static_cast<int>(logits.type);
    if (q == nullptr) {
      zero_gradient(logits, row, gradient);
      return 0;
    }
    void* gradient_row = gradient.data != nullptr ? gradient.row(row) : nullptr;
    const bool kept = keeps_exponentials(gradient, logits);
    void* exponentials = kept || (gradient_row == nullptr && !kKl) ? gradient_row : scratch;
    if (stream) look_up_pages(gradient_row, logits.columns * size_of(logits.type));
    SweepResult s = rows_.sweep[type](logits.row(row), q, logits.columns, exponentials, next,
                                      kept || stream ? nullptr : gradient_row,
                                      kKl ? rows_.largest[type](logits.row(row), logits.columns) : kUnknown);
    if (kKl) {
      s = rows_.sums_in_double[type](logits.row(row), q, exponentials, logits.columns, s.shift);
    } else if (is_coarse(s)) {
      s = sweep_again(s, logits, row, q, exponentials);
    }
    if (mass != nullptr) s.mass = *mass;
    if (gradient_row != nullptr) {
      rows_.gradient[type](exponentials, q, logits.columns, scale * s.mass / s.sum, scale, stream, gradient_row);
    }
    return loss_of(s);
  }

  void target_row(int64_t row, void* scratch, const void* next) {
    if (has_probabilities() || p_.label_smoothing > 0) {
      double mass = 0;
      const void* q = is_double(p_.target_logits) ? target_distribution<double>(row, &mass)
                                                  : target_distribution<float>(row, &mass);
      target_rows_[row] =
          dense_row<false>(p_.target_logits, row, q, scratch, next, target_scale_, p_.target_gradient, false, &mass);
    } else {
      target_rows_[row] = sparse_target_row(row, scratch, next);
    }
  }

  // weight * ((1 - smoothing) * target + smoothing / N_t), or null if all zeros; and its mass. The mass is a double:
  // in float, thousands of small smoothed entries would lose their digits beside the label's.
  template <class C>
  const void* target_distribution(int64_t row, double* mass) const {
    const double smoothing = p_.label_smoothing;
    const double share = has_probabilities() ? 1.0 : targets_[row].total();
    const double base = smoothing / static_cast<double>(target_classes_) * share;
    C* q = static_cast<C*>(Scratch::get(2, target_classes_ * sizeof(C)));
    if (has_probabilities()) {
      const int type = static_cast<int>(p_.probabilities.type);
      mix_into(type, p_.probabilities.row(row), 1.0 - smoothing, q);
      for (int64_t j = 0; j < target_classes_; ++j) q[j] += static_cast<C>(base);
    } else {
      for (int64_t j = 0; j < target_classes_; ++j) q[j] = static_cast<C>(base);
      for (int k = 0; k < targets_[row].count; ++k) {
        q[targets_[row].index[k]] += static_cast<C>((1.0 - smoothing) * targets_[row].share[k]);
      }
    }
    bool any = false;
    for (int64_t j = 0; j < target_classes_; ++j) {
      q[j] *= static_cast<C>(weight_of(j));
      *mass += q[j];
      any |= q[j] != 0;
    }
    return any ? q : nullptr;
  }

  void mix_into(int type, const void* a, double factor, float* out) const {
    rows_.mix_to_float[type](a, factor, nullptr, 0.0, target_classes_, out);
  }
  void mix_into(int type, const void* a, double factor, double* out) const {
    rows_.mix_to_double[type](a, factor, nullptr, 0.0, target_classes_, out);
  }

  // Cross entropy against one or two classes without building their distribution: the gradient is the softmax, less
  // the target at its classes.
  double sparse_target_row(int64_t row, void* scratch, const void* next) {
    const ConstMatrix& logits = p_.target_logits;
    RowTarget target;
    for (int k = 0; k < targets_[row].count; ++k) {
      target.add(targets_[row].index[k], targets_[row].share[k] * weight_of(targets_[row].index[k]));
    }
    if (target.count == 2 && target.index[0] == target.index[1]) {
      target.share[0] += target.share[1];
      target.count = 1;
    }
    if (target.count == 0) {
      zero_gradient(logits, row, p_.target_gradient);
      return 0;
    }
    const int type = static_cast<int>(logits.type);
    // In place, the gradient overwrites the logits: read the labels' logits first.
    double logit[2] = {};
    for (int k = 0; k < target.count; ++k) logit[k] = element(logits, row, target.index[k]);
    void* gradient_row = p_.target_gradient.data != nullptr ? p_.target_gradient.row(row) : nullptr;
    void* exponentials = gradient_row != nullptr ? scratch : nullptr;
    // Shift by at least the labels' higher logit: in a confident row, log sum is close to it.
    const double highest = target.count == 2 && logit[1] > logit[0] ? logit[1] : logit[0];
    SweepResult s =
        rows_.sweep[type](logits.row(row), nullptr, logits.columns, exponentials, next, gradient_row, highest);
    if (s.sum > kFarSum) s = sweep_again(s, logits, row, nullptr, exponentials);
    const double mass = target.total();
    double loss = mass * std::log(s.sum);
    for (int k = 0; k < target.count; ++k) loss -= target.share[k] * (logit[k] - s.shift);
    if (gradient_row == nullptr) return loss;
    rows_.gradient[type](exponentials, nullptr, logits.columns, target_scale_ * mass / s.sum, 0.0, false, gradient_row);
    for (int k = 0; k < target.count; ++k) {
      const double softmax = exponential(exponentials, logits, target.index[k]) / s.sum;
      set_element(p_.target_gradient, row, target.index[k], target_scale_ * (mass * softmax - target.share[k]));
    }
    return loss;
  }

  // The exponential that the sweep stored for a column, in the compute type of the logits.
  static double exponential(const void* exponentials, const ConstMatrix& logits, int64_t column) {
    return is_double(logits) ? static_cast<const double*>(exponentials)[column]
                             : static_cast<const float*>(exponentials)[column];
  }

  static void set_exponential(void* exponentials, const ConstMatrix& logits, int64_t column, double value) {
    if (is_double(logits)) {
      static_cast<double*>(exponentials)[column] = value;
    } else {
      static_cast<float*>(exponentials)[column] = static_cast<float>(value);
    }
  }

  double element(const ConstMatrix& matrix, int64_t row, int64_t column) const {
    return value_at(rows_, matrix.row(row), matrix.type, column);
  }

  void set_element(const Matrix& matrix, int64_t row, int64_t column, double value) const {
    void* p = static_cast<char*>(matrix.row(row)) + column * size_of(matrix.type);
    if (matrix.type == ScalarType::kFloat64) {
      *static_cast<double*>(p) = value;
    } else if (matrix.type == ScalarType::kFloat32) {
      *static_cast<float*>(p) = static_cast<float>(value);
    } else {
      const float narrow = static_cast<float>(value);
      rows_.store_float[static_cast<int>(matrix.type)](&narrow, 1, p);
    }
  }

  static void zero_gradient(const ConstMatrix& logits, int64_t row, const Matrix& gradient) {
    if (gradient.data == nullptr) return;
    auto* bytes = static_cast<char*>(gradient.row(row));
    std::fill(bytes, bytes + logits.columns * size_of(logits.type), char(0));
  }

  // Adds serially in the order of rows, so that the result does not depend on the number of threads.
  void reduce(std::vector<double>* terms, double divisor) const {
    if (p_.reduction == Reduction::kNone) return;
    constexpr int kSums = 8;  // independent chains of additions
    double sums[kSums] = {};
    for (size_t i = 0; i < terms->size(); ++i) sums[i % kSums] += (*terms)[i];
    double total = 0;
    for (double sum : sums) total += sum;
    terms->assign(1, total / divisor);  // no valid row: 0 / 0, as in F.cross_entropy
  }

  const LossProblem& p_;
  const RowKernels& rows_;
  int64_t batch_, source_classes_, target_classes_;
  // A trade-off of 0 takes the source supervision from every row. An infinite or NaN source term times 0 would be NaN.
  const bool counts_source_;
  std::vector<RowTarget> targets_;
  std::vector<ClassFacts> facts_;
  int64_t bad_row_ = -1;
  bool any_valid_ = false;
  double source_divisor_ = 1, target_divisor_ = 1, source_scale_ = 1, target_scale_ = 1;
  bool streams_source_gradient_ = false;  // stores bypass the cache
  bool fetch_next_source_row_ = false;
  double* source_rows_ = nullptr;
  double* target_rows_ = nullptr;
};

}  // namespace

BadLabel co_tuning_loss(const LossProblem& problem, ParallelFor parallel_for, LossResult* result) {
  Loss loss(problem);
  if (BadLabel bad = loss.read_targets()) return bad;
  loss.look_up_classes();
  if ((result->bad_row = loss.bad_row()) >= 0) return {};
  loss.count();
  loss.choose_factors(result);
  loss.run(parallel_for, result);
  return {};
}

}  // namespace cotuning::cpu
