// Threads: any number of them gives the same bits, and calls do not disturb each other.
#include <string>
#include <thread>

#include "../kernels/cpu/class_sums.h"
#include "../kernels/cpu/rows.h"
#include "../kernels/cpu/temperature_terms.h"
#include "loss_case.h"
#include "threads.h"

namespace cotuning::test {
namespace {

// All outputs of a call, as bytes.
using Bytes = std::vector<char>;

void append(Bytes* bytes, const void* data, size_t size) {
  const char* start = static_cast<const char*>(data);
  bytes->insert(bytes->end(), start, start + size);
}
void append(Bytes* bytes, const std::vector<double>& values) {
  append(bytes, values.data(), values.size() * sizeof(double));
}
void append(Bytes* bytes, const Grid& grid) {
  const Bytes part = grid.bytes();
  append(bytes, part.data(), part.size());
}

// A few times kGrainElements: large enough to be split.
struct Work {
  LossCase loss;
  Grid sums;
  std::vector<int64_t> counts;
  LabelList classes;

  explicit Work(ScalarType type)
      : loss(type, type, type, 600, 500, 20), sums(ScalarType::kFloat64, 20, 500), counts(20), classes(600, false, 1) {
    for (int64_t i = 0; i < 600; ++i) classes.set(i, random_integer(0, 19));
    loss.problem.source_gradient = loss.source_gradient->writable();
    if (loss.target_logits) loss.problem.target_gradient = loss.target_gradient->writable();
  }

  Bytes run() {
    Bytes bytes;
    cpu::LossResult result;
    cpu::co_tuning_loss(loss.problem, parallel_for, &result);
    append(&bytes, result.source_term);
    append(&bytes, result.target_term);
    const double upstream = 0.37;
    cpu::scale_gradients(loss.source_gradient->writable(), result.source_factor, &upstream, 0, parallel_for);
    append(&bytes, *loss.source_gradient);
    if (loss.target_gradient) append(&bytes, *loss.target_gradient);

    if (loss.target != Target::kProbabilities) {
      Grid translated(loss.relationship->type(), 600, 500);
      cpu::translate_labels(loss.translation(&translated), parallel_for);
      append(&bytes, translated);
    }
    for (int64_t t = 0; t < 20; ++t) {
      counts[t] = 0;
      for (int64_t j = 0; j < 500; ++j) sums.set(t, j, 0);
    }
    const ConstMatrix logits = loss.source_logits->view();
    const cpu::ClassSums in_place{sums.writable(), counts.data()};
    int64_t first_bad_row;
    cpu::add_class_sums(logits, classes.view(), -100, 0.7, in_place, in_place, parallel_for, &first_bad_row);
    append(&bytes, sums);
    append(&bytes, counts.data(), counts.size() * sizeof(int64_t));
    double terms[4];
    cpu::temperature_terms(logits, classes.view(), -100, 0.7, terms, parallel_for);
    append(&bytes, terms, sizeof terms);
    return bytes;
  }
};

TEST(same_bits_in_any_threads) {
  for (ScalarType type : kAllTypes) {
    Work work(type);
    number_of_threads = 1;
    const Bytes serial = work.run();
    for (int threads : {2, 3, 7}) {
      number_of_threads = threads;
      CHECK(work.run() == serial, "%s: %d threads gave other bits than one", name_of(type), threads);
    }
    number_of_threads = 1;
  }
}

// Several threads call at once, each with its own worker threads, while another changes the instruction set.
TEST(calls_at_once) {
  std::vector<std::unique_ptr<Work>> work;
  std::vector<Bytes> alone;
  const std::string isa = cpu::row_kernels().name;
  for (ScalarType type : {ScalarType::kFloat32, ScalarType::kBFloat16, ScalarType::kFloat32}) {
    work.push_back(std::make_unique<Work>(type));
    alone.push_back(work.back()->run());
  }
  std::vector<Bytes> together(work.size());
  std::vector<std::thread> callers;
  for (size_t k = 0; k < work.size(); ++k) {
    callers.emplace_back([&, k] {
      number_of_threads = 2;
      together[k] = work[k]->run();
    });
  }
  std::thread chooser([&] {
    for (int repeat = 0; repeat < 100; ++repeat) cpu::use_row_kernels(isa.c_str());
  });
  chooser.join();
  for (std::thread& caller : callers) caller.join();
  for (size_t k = 0; k < work.size(); ++k) CHECK(together[k] == alone[k], "call %zu was disturbed", k);
}

}  // namespace
}  // namespace cotuning::test
