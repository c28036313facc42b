// kernel_tests [--seed N] [--plant FAULT] [TEST...]: runs the named tests, or all. Exits with 1 after a failure.
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "../kernels/cpu/rows.h"
#include "check.h"

namespace cotuning::test {
namespace {

constexpr int kReportsPerTest = 5;
int failures = 0;
std::string planted_fault;

}  // namespace

std::vector<Test>& all_tests() {
  static std::vector<Test> tests;
  return tests;
}

void report_failure(const char* file, int line, const char* condition, const char* format, ...) {
  if (++failures > kReportsPerTest) return;
  std::printf("FAILED %s:%d: %s\n  ", file, line, condition);
  va_list arguments;
  va_start(arguments, format);
  std::vprintf(format, arguments);
  va_end(arguments);
  std::printf("\n");
}

std::mt19937_64& random_bits() {
  static std::mt19937_64 generator;
  return generator;
}
long double normal(double deviation) { return std::normal_distribution<double>(0.0, deviation)(random_bits()); }
long double uniform() { return std::uniform_real_distribution<double>()(random_bits()); }
int64_t random_integer(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(random_bits());
}
bool one_in(int64_t n) { return random_integer(1, n) == 1; }

bool planted(const char* name) { return planted_fault == name; }

}  // namespace cotuning::test

int main(int count, char** arguments) {
  using namespace cotuning::test;
  uint64_t seed = std::random_device{}();
  std::vector<std::string> wanted;
  for (int i = 1; i < count; ++i) {
    const std::string argument = arguments[i];
    if (argument == "--seed" && i + 1 < count) {
      seed = std::strtoull(arguments[++i], nullptr, 10);
    } else if (argument == "--plant" && i + 1 < count) {
      planted_fault = arguments[++i];
    } else {
      wanted.push_back(argument);
    }
  }
  std::setvbuf(stdout, nullptr, _IOLBF, 0);  // keep the output before a crash
  std::printf("seed %llu, instruction sets:", static_cast<unsigned long long>(seed));
  for (int i = 0; i < cotuning::cpu::row_kernels_count(); ++i)
    std::printf(" %s", cotuning::cpu::row_kernels_at(i).name);
  std::printf("\n");
  for (const std::string& name : wanted) {
    bool known = false;
    for (const Test& test : all_tests()) known |= name == test.name;
    if (!known) {
      std::printf("no test is called %s\n", name.c_str());
      return 2;
    }
  }
  int failed_tests = 0;
  for (const Test& test : all_tests()) {
    bool run = wanted.empty();
    for (const std::string& name : wanted) run |= name == test.name;
    if (!run) continue;
    random_bits().seed(seed);  // a test draws the same numbers alone and with others
    failures = 0;
    test.run();
    std::printf("%-24s %s", test.name, failures == 0 ? "passed\n" : "");
    if (failures > 0) std::printf("%d checks FAILED\n", failures);
    failed_tests += failures > 0;
  }
  return failed_tests > 0;
}
