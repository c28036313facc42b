// The row primitives in AVX-512. csrc/sources.txt has the compiler flags.
#define COTUNING_ISA avx512
#include "rows_impl.h"

namespace cotuning::cpu {

extern const RowKernels kRows_avx512;
const RowKernels kRows_avx512 = avx512::table("avx512");

}  // namespace cotuning::cpu
