// A fiber: a function with a stack of its own that runs until it switches away, and goes on there when switched to
// again. One CUDA thread is one fiber. ThreadSanitizer and AddressSanitizer are told of every switch.
#pragma once

#include <cstddef>
#include <cstdint>

#if (!defined(__x86_64__) || defined(COTUNING_EMULATOR_UCONTEXT)) && !defined(COTUNING_FIBERS_WITH_UCONTEXT)
#define COTUNING_FIBERS_WITH_UCONTEXT 1
#endif

namespace cotuning::emulator {

// Both ends of a switch. The context of the thread that runs the scheduler needs no stack of its own.
struct Context {
  void* stack_pointer = nullptr;  // or a ucontext_t, in the portable build
  void* sanitizer_stack = nullptr;
  void* thread_sanitizer = nullptr;
  char* stack = nullptr;
  bool done = false;  // left for the last time
};

inline constexpr size_t kStackBytes = 64 << 10;

// A stack with a page below it that faults: an overflow crashes instead of writing over another stack. Stacks are kept
// for later launches. Not under ThreadSanitizer, for which one stack in two CUDA threads would be a race.
char* stack_at(size_t index);

// `context` starts with `entry` on `stack` when it is first switched to. `entry` may not return.
void prepare(Context* context, char* stack, void (*entry)());
// Makes the calling thread a context.
void adopt(Context* context);
void release(Context* context);

// `last`: the context that is left is never switched to again.
void switch_to(Context* from, Context* to, bool last);
// What a fiber calls first.
void started();

}  // namespace cotuning::emulator
