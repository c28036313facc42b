#include "temperature_terms.h"

#include <cmath>
#include <vector>

#include "rows.h"

namespace cotuning::cpu {
namespace {

struct Temperature {
  ConstMatrix logits;
  Labels labels;
  int64_t ignore_index;
  double inverse_temperature;
  std::vector<double> nll, first, second;
  std::vector<char> valid;

  void run(int64_t begin, int64_t end) {
    const RowKernels& rows = row_kernels();
    const int type = static_cast<int>(logits.type);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t label = labels[i];
      if (label == ignore_index) continue;
      const void* next = i + 1 < end ? logits.row(i + 1) : nullptr;
      const void* at_label = static_cast<const char*>(logits.row(i)) + label * size_of(logits.type);
      double logit;
      rows.mix_to_double[type](at_label, 1.0, nullptr, 0.0, 1, &logit);
      // Shift by at least the label's logit: in a confident row, log sum and mean are close to it.
      const MomentResult m = rows.moments[type](logits.row(i), logits.columns, inverse_temperature, next, logit);
      const double x = logit - m.shift, mean = m.first / m.sum;
      nll[i] = std::log(m.sum) - inverse_temperature * x;
      first[i] = mean - x;
      second[i] = m.second / m.sum - mean * mean;
      valid[i] = 1;
    }
  }
};

}  // namespace

BadLabel temperature_terms(const ConstMatrix& logits, const Labels& labels, int64_t ignore_index,
                           double inverse_temperature, double terms[4], ParallelFor parallel_for) {
  if (BadLabel bad = find_bad_label(labels, logits.rows, logits.columns, ignore_index)) return bad;
  const std::vector<double> zeros(logits.rows, 0.0);
  Temperature task{logits, labels, ignore_index, inverse_temperature,
                   zeros,  zeros,  zeros,        std::vector<char>(logits.rows, 0)};
  parallel_for(
      0, logits.rows, grain_rows(logits.columns),
      [](int64_t begin, int64_t end, void* context) { static_cast<Temperature*>(context)->run(begin, end); }, &task);
  // In the order of rows, for any number of threads.
  for (int k = 0; k < 4; ++k) terms[k] = 0;
  for (int64_t i = 0; i < logits.rows; ++i) {
    terms[0] += task.nll[i];
    terms[1] += task.first[i];
    terms[2] += task.second[i];
    terms[3] += task.valid[i];
  }
  return {};
}

}  // namespace cotuning::cpu
