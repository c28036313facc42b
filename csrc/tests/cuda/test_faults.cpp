// The textbook kernel with the fault named by --plant, under every schedule.
#include <cstdio>
#include <memory>

#include "faults.h"

namespace cotuning::test {
namespace {

using emulator::Order;

constexpr int kRows = 16, kBlocks = 8, kThreads = 128, kColumns = 301;

struct Outcome {
  float sums[kRows];
  float total;
};

Outcome run_textbook(const std::vector<float>& rows) {
  // Exactly the size of the rows, so that AddressSanitizer sees accesses beyond it.
  std::unique_ptr<float[]> memory(new float[rows.size()]);
  std::memcpy(memory.get(), rows.data(), rows.size() * sizeof(float));
  Outcome outcome;
  float parts[kBlocks], careless = 0;
  unsigned finished = 0, tickets = 0;
  const Textbook problem{memory.get(), kRows,    kColumns,       outcome.sums, parts,
                         &finished,    &tickets, &outcome.total, &careless};
  size_t bytes = kColumns * sizeof(float);
  if (planted("much-shared-memory")) bytes = 60 << 10;
  if (planted("all-but-static-memory")) bytes = 48 << 10;
  emulator::launch_kernel(textbook_kernel, dim3(kBlocks), dim3(kThreads), bytes, problem, Faults::planted());
  return outcome;
}

TEST(textbook) {
  std::vector<float> rows;
  // The sums of the first two blocks are large and cancel: numbers added between them lose their last digits.
  for (int i = 0; i < kRows * kColumns; ++i) {
    const int row_block = i / kColumns % kBlocks;
    const float value = static_cast<float>(normal(1));
    rows.push_back(row_block == 0 ? 1e5f * (5 + value) : row_block == 1 ? -rows[i - kColumns] : value);
  }
  Outcome first{};
  for (int k = 0; k < 25; ++k) {
    emulator::settings().order = k == 0 ? Order::kForward : k == 1 ? Order::kReverse : Order::kRandom;
    emulator::settings().seed = static_cast<uint64_t>(random_integer(0, 1 << 30));
    Outcome outcome;
    try {
      outcome = run_textbook(rows);
    } catch (const emulator::Error& error) {
      CHECK(false, "the emulator reports: %s", error.what());
      return;
    }
    if (k == 0) first = outcome;
    for (int i = 0; i < kRows; ++i) {
      long double exact = 0, size = 0;
      for (int c = 0; c < kColumns; ++c) {
        exact += rows[i * kColumns + c];
        size += std::fabs(rows[i * kColumns + c]);
      }
      CHECK(std::fabs(outcome.sums[i] - exact) <= 1e-5L * size, "wrong value: row %d, schedule %d: %g, expected %Lg", i,
            k, outcome.sums[i], exact);
    }
    CHECK(std::memcmp(&first, &outcome, sizeof first) == 0, "schedule %d gives other bits", k);
  }
}

}  // namespace
}  // namespace cotuning::test
