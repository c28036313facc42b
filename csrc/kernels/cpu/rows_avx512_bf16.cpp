// The row primitives in AVX-512 with AVX512_BF16. Compiled with the flags that csrc/sources.txt gives it.
#define COTUNING_ISA avx512_bf16
#include "rows_impl.h"

namespace cotuning::cpu {

extern const RowKernels kRows_avx512_bf16;
const RowKernels kRows_avx512_bf16 = avx512_bf16::table("avx512_bf16");

}  // namespace cotuning::cpu
