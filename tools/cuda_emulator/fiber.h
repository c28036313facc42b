// A fiber is a function with its own stack. It runs until it switches away, and resumes there when switched to again.
// One CUDA thread is one fiber. ThreadSanitizer and AddressSanitizer are told of every switch.
#pragma once

#include <cstddef>
#include <cstdint>

#if (!defined(__x86_64__) || defined(COTUNING_EMULATOR_UCONTEXT)) && !defined(COTUNING_FIBERS_WITH_UCONTEXT)
#define COTUNING_FIBERS_WITH_UCONTEXT 1
#endif

namespace cotuning::emulator {

// One end of a switch. The scheduler's context uses the stack of the thread that runs it.
struct Context {
  void* stack_pointer = nullptr;  // or a ucontext_t, in the portable build
  void* sanitizer_stack = nullptr;
  void* thread_sanitizer = nullptr;
  char* stack = nullptr;
  bool done = false;  // left for the last time
};

inline constexpr size_t kStackBytes = 64 << 10;

// The stack with this index. The page below it faults, so an overflow crashes instead of writing over another stack.
// Stacks are kept for later launches. Under ThreadSanitizer no two CUDA threads of a launch use one stack, which would
// be a race.
char* stack_at(size_t index);

// `context` starts with `entry` on `stack` when it is first switched to. `entry` must not return.
void prepare(Context* context, char* stack, void (*entry)());
// Makes the calling thread a context.
void adopt(Context* context);
void release(Context* context);

// `last`: `from` is never switched to again.
void switch_to(Context* from, Context* to, bool last);
// A fiber must call this first.
void started();

}  // namespace cotuning::emulator
