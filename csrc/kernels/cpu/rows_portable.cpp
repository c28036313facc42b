// The row primitives in plain C++, for processors without AVX2. csrc/sources.txt has the compiler flags.
#define COTUNING_ISA portable
#include "rows_impl.h"

namespace cotuning::cpu {

extern const RowKernels kRows_portable;
const RowKernels kRows_portable = portable::table("portable");

}  // namespace cotuning::cpu
