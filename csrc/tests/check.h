// A test is a function registered with TEST(name). CHECK reports a failure and goes on, so that one run shows all.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

namespace cotuning::test {

struct Test {
  const char* name;
  void (*run)();
};
std::vector<Test>& all_tests();

struct Registration {
  Registration(const char* name, void (*run)()) { all_tests().push_back({name, run}); }
};

#define TEST(name)                                                                     \
  static void test_##name();                                                           \
  static const ::cotuning::test::Registration registration_##name(#name, test_##name); \
  static void test_##name()

// CHECK(condition, "printf format", ...): the text names the case and is formatted only after a failure.
#define CHECK(condition, ...) \
  ((condition) ? void() : ::cotuning::test::report_failure(__FILE__, __LINE__, #condition, __VA_ARGS__))

__attribute__((format(printf, 4, 5))) void report_failure(const char* file, int line, const char* condition,
                                                          const char* format, ...);

// Random numbers from the seed that the program printed.
std::mt19937_64& random_bits();
long double normal(double deviation);
long double uniform();                              // in [0, 1)
int64_t random_integer(int64_t low, int64_t high);  // low and high included
bool one_in(int64_t n);

// Whether --plant NAME asked for this fault, which shows that a test can fail. Only csrc/tests makes faults; the
// kernels do not know about them.
bool planted(const char* name);

}  // namespace cotuning::test
