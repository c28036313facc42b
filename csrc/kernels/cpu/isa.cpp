// The row tables that this processor runs, and the one in use.
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "rows.h"

namespace cotuning::cpu {

#if defined(__x86_64__)
extern const RowKernels kRows_avx512_bf16;
extern const RowKernels kRows_avx512;
extern const RowKernels kRows_avx2;
#endif
extern const RowKernels kRows_portable;

namespace {

#if defined(__x86_64__)
// The AVX-512 table with the AVX512_BF16 primitives in place of their counterparts.
RowKernels avx512_with_bf16() {
  constexpr auto kType = static_cast<int>(ScalarType::kBFloat16);
  RowKernels kernels = kRows_avx512;
  kernels.name = kRows_avx512_bf16.name;
  kernels.gradient[kType] = kRows_avx512_bf16.gradient[kType];
  kernels.scale[kType] = kRows_avx512_bf16.scale[kType];
  return kernels;
}
#endif

struct Tables {
  const RowKernels* table[4] = {};
  int count = 0;
  const char* unmet_request = nullptr;
  std::atomic<const RowKernels*> current{nullptr};

  Tables() {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")) {
      if (__builtin_cpu_supports("avx512bf16")) {
        static const RowKernels with_bf16 = avx512_with_bf16();
        table[count++] = &with_bf16;
      }
      table[count++] = &kRows_avx512;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
      table[count++] = &kRows_avx2;
    }
#endif
    table[count++] = &kRows_portable;
    current = table[0];
    const char* request = std::getenv("COTUNING_KERNELS_CPU_ISA");
    if (request != nullptr && request[0] != '\0' && !use(request)) unmet_request = request;
  }

  bool use(const char* name) {
    for (int i = 0; i < count; ++i) {
      if (std::strcmp(table[i]->name, name) == 0) {
        current.store(table[i], std::memory_order_relaxed);
        return true;
      }
    }
    return false;
  }
};

Tables& tables() {
  static Tables instance;
  return instance;
}

}  // namespace

int row_kernels_count() { return tables().count; }
const RowKernels& row_kernels_at(int i) { return *tables().table[i]; }
const RowKernels& row_kernels() { return *tables().current.load(std::memory_order_relaxed); }
bool use_row_kernels(const char* name) { return tables().use(name); }
const char* unmet_isa_request() { return tables().unmet_request; }

}  // namespace cotuning::cpu
