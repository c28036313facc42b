// The row primitives that AVX512_BF16 makes faster: those that store rows of bfloat16. isa.cpp takes the others from
// AVX-512. csrc/sources.txt has the compiler flags.
#define COTUNING_ISA avx512_bf16
#include "rows_impl.h"

namespace cotuning::cpu {

static constexpr RowKernels stores_of_bfloat16() {
  constexpr auto kType = static_cast<int>(ScalarType::kBFloat16);
  RowKernels kernels{};
  kernels.name = "avx512_bf16";
  kernels.gradient[kType] = avx512_bf16::gradient<BFloat16>;
  kernels.scale[kType] = avx512_bf16::scale<BFloat16>;
  return kernels;
}

// Must be a compile-time constant: code that runs at load time would run on processors without these instructions.
extern const RowKernels kRows_avx512_bf16;
constexpr RowKernels kRows_avx512_bf16 = stores_of_bfloat16();

}  // namespace cotuning::cpu
