// Counts the machine instructions of the CPU kernels, by running them one instruction at a time under ptrace.
//
// A step takes about 20 us. Unlike a time, the count is the same on every run, even on a busy machine, so a test can
// compare it with a record (python_tests/builds/test_instruction_counts.py). It does not tell the time: an instruction
// may take one cycle or a cache miss.
//
// Prints one line per case: instruction set, operation, dtype of the logits, target classes, source classes, and the
// instructions of one more row divided by its elements (without the fixed cost of a call).
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "../kernels/cpu/class_sums.h"
#include "../kernels/cpu/co_tuning_loss.h"
#include "../kernels/cpu/rows.h"
#include "../kernels/cpu/temperature_terms.h"

using namespace cotuning;
using namespace cotuning::cpu;

namespace {

void serial(int64_t begin, int64_t end, int64_t, void (*body)(int64_t, int64_t, void*), void* context) {
  if (begin < end) body(begin, end, context);
}

constexpr const char* kTypeNames[] = {"float32", "bfloat16"};

// Steps through `work` in a forked child process and counts its instructions.
int64_t instructions_of(const std::function<void()>& work) {
  const pid_t child = fork();
  if (child < 0) throw std::runtime_error("fork failed");
  if (child == 0) {
    ptrace(PTRACE_TRACEME, 0, nullptr, nullptr);
    raise(SIGSTOP);
    work();
    raise(SIGSTOP);
    _exit(0);
  }
  const auto wait_for_stop = [child] {
    int status = 0;
    if (waitpid(child, &status, 0) != child || !WIFSTOPPED(status)) throw std::runtime_error("cannot trace a process");
    return WSTOPSIG(status);
  };
  wait_for_stop();
  int64_t count = 0;
  for (int signal = SIGTRAP; signal == SIGTRAP; ++count) {
    if (ptrace(PTRACE_SINGLESTEP, child, nullptr, nullptr) != 0) throw std::runtime_error("cannot step a process");
    signal = wait_for_stop();
  }
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
  return count;
}

// Rows of zeros: the values of logits change no branch that matters here.
struct Rows {
  Rows(int64_t rows, int64_t columns, ScalarType type)
      : bytes(rows * columns * size_of(type)), columns(columns), type(type) {}
  ConstMatrix view(int64_t rows) const { return {bytes.data(), type, rows, columns, columns}; }
  Matrix writable(int64_t rows) { return {bytes.data(), type, rows, columns, columns}; }

  std::vector<char> bytes;
  int64_t columns;
  ScalarType type;
};

struct Shape {
  int64_t target_classes, source_classes;
};

// The instructions for `2 rows` rows less those for `rows` rows, per row and element.
double per_element(int64_t rows, int64_t elements, const std::function<void(int64_t)>& work) {
  work(2 * rows);  // allocates the scratch memory
  const int64_t twice = instructions_of([&] { work(2 * rows); });
  const int64_t once = instructions_of([&] { work(rows); });
  return static_cast<double>(twice - once) / static_cast<double>(rows * elements);
}

void count(const char* isa, ScalarType type, Shape shape, int64_t rows) {
  const auto [target_classes, source_classes] = shape;
  Rows source(2 * rows, source_classes, type), target(2 * rows, target_classes, type);
  Rows source_gradient = source, target_gradient = target;
  Rows relationship(target_classes, source_classes, ScalarType::kFloat32);
  for (int64_t t = 0; t < target_classes; ++t) {
    const float one = 1.0f;  // a class with source supervision
    std::memcpy(relationship.bytes.data() + t * source_classes * 4, &one, 4);
  }
  std::vector<int64_t> labels(2 * rows);
  for (size_t i = 0; i < labels.size(); ++i) labels[i] = static_cast<int64_t>(i) % target_classes;
  const auto print = [&](const char* operation, double instructions) {
    std::printf("%s %s %s %lld %lld %.4f\n", isa, operation, kTypeNames[static_cast<int>(type)],
                static_cast<long long>(target_classes), static_cast<long long>(source_classes), instructions);
  };
  print("loss_and_gradients", per_element(rows, source_classes + target_classes, [&](int64_t batch) {
          LossProblem problem;
          problem.source_logits = source.view(batch);
          problem.target_logits = target.view(batch);
          problem.labels = {labels.data(), false, 1};
          problem.relationship = relationship.view(target_classes);
          problem.trade_off = 2.3;
          problem.source_gradient = source_gradient.writable(batch);
          problem.target_gradient = target_gradient.writable(batch);
          LossResult result;
          if (co_tuning_loss(problem, serial, &result)) throw std::runtime_error("a bad label");
        }));
  if (source_classes > 1000) return;  // the other two operations need no second shape
  std::vector<float> sums(target_classes * source_classes);
  std::vector<int64_t> counts(target_classes);
  print("class_sums", per_element(rows, source_classes, [&](int64_t batch) {
          const ClassSums in_place{{sums.data(), ScalarType::kFloat32, target_classes, source_classes, source_classes},
                                   counts.data()};
          int64_t first_bad_row;
          add_class_sums(source.view(batch), {labels.data(), false, 1}, -100, 0.7, in_place, in_place, serial,
                         &first_bad_row);
        }));
  double terms[4];
  print("temperature", per_element(rows, source_classes, [&](int64_t batch) {
          temperature_terms(source.view(batch), {labels.data(), false, 1}, -100, 0.7, terms, serial);
        }));
}

}  // namespace

int main() {
  try {
    for (int i = 0; i < row_kernels_count(); ++i) {
      const char* isa = row_kernels_at(i).name;
      if (std::strcmp(isa, "portable") == 0) continue;  // depends on the compiler
      use_row_kernels(isa);
      count(isa, ScalarType::kFloat32, {200, 1000}, 1);  // shows the fixed cost of a row; the next line, the loop's
      count(isa, ScalarType::kFloat32, {9, 8000}, 1);
      count(isa, ScalarType::kBFloat16, {200, 1000}, 1);
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "count_instructions: %s\n", error.what());
    return 2;
  }
}
