// The row primitives in AVX2. csrc/sources.txt has the compiler flags.
#define COTUNING_ISA avx2
#include "rows_impl.h"

namespace cotuning::cpu {

extern const RowKernels kRows_avx2;
const RowKernels kRows_avx2 = avx2::table("avx2");

}  // namespace cotuning::cpu
