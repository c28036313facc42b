// When to write around the cache.
#pragma once

#include <cstdint>

namespace cotuning::cpu {

// An ordinary store to memory that is not in the cache first reads it: for an output that does not fit in the cache
// that is a third of all the traffic. A streaming store does not read, but on pages that the process has never touched
// (a large block fresh from the system) it is the slower one, 1.3 times (measured): the kernel has just brought the
// zeroed page into the cache. So: large outputs on memory that is already there.
bool worth_streaming(const void* output, int64_t bytes);

}  // namespace cotuning::cpu
