#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#ifdef COTUNING_FIBERS_WITH_UCONTEXT
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define COTUNING_ASAN 1
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {
void* __tsan_get_current_fiber(void);
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
}
#define COTUNING_TSAN 1
#endif

// ThreadSanitizer keeps a call stack for each fiber. It must not see a function that is entered on one fiber and left
// on another.
#define COTUNING_UNSEEN __attribute__((no_sanitize("thread"), noinline))

namespace cotuning::emulator {
namespace {

#ifdef COTUNING_ASAN
// The stack of the context that adopted this thread, as reported to the first fiber that it switched to.
const void* scheduler_stack = nullptr;
size_t scheduler_stack_bytes = 0;
#endif

#ifndef COTUNING_FIBERS_WITH_UCONTEXT
// Saves the callee-saved registers (System V), swaps the stack pointer, restores the other side's registers.
extern "C" void cotuning_emulator_switch(void** from, void* to);
asm(R"(
.text
.hidden cotuning_emulator_switch
.globl cotuning_emulator_switch
.type cotuning_emulator_switch,@function
cotuning_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cotuning_emulator_switch,.-cotuning_emulator_switch
)");
#endif

#ifdef COTUNING_TSAN
// Creating a fiber of ThreadSanitizer's takes a hundred microseconds, so a later launch reuses one whose CUDA thread
// returned. That is safe: the first thread's work came before the later launch anyway, and the second thread's work
// gets later times.
std::vector<void*>& spare_fibers() {
  static thread_local std::vector<void*> fibers;
  return fibers;
}
#endif

}  // namespace

char* stack_at(size_t index) {
  static thread_local std::vector<char*> stacks;
  const auto guard = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  while (stacks.size() <= index) {
    void* map = mmap(nullptr, guard + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED || mprotect(map, guard, PROT_NONE) != 0) {
      std::perror("emulator: no memory for the stack of a CUDA thread");
      std::abort();
    }
    stacks.push_back(static_cast<char*>(map) + guard);
  }
  return stacks[index];
}

COTUNING_UNSEEN void prepare(Context* context, char* stack, void (*entry)()) {
  context->stack = stack;
#ifdef COTUNING_ASAN
  ASAN_UNPOISON_MEMORY_REGION(stack, kStackBytes);  // frames that an aborted launch left there
#endif
#ifdef COTUNING_FIBERS_WITH_UCONTEXT
  auto* ucontext = static_cast<ucontext_t*>(std::malloc(sizeof(ucontext_t)));
  if (ucontext == nullptr || getcontext(ucontext) != 0) std::abort();
  ucontext->uc_stack.ss_sp = stack;
  ucontext->uc_stack.ss_size = kStackBytes;
  ucontext->uc_link = nullptr;
  makecontext(ucontext, entry, 0);
  context->stack_pointer = ucontext;
#else
  // As if `entry` had been called and had switched away at once: six registers, then the return address.
  void** top = reinterpret_cast<void**>(stack + kStackBytes);
  *--top = nullptr;  // keeps the stack aligned as after a call
  *--top = reinterpret_cast<void*>(entry);
  for (int k = 0; k < 6; ++k) *--top = nullptr;
  context->stack_pointer = top;
#endif
#ifdef COTUNING_TSAN
  if (spare_fibers().empty()) {
    context->thread_sanitizer = __tsan_create_fiber(1);  // 1: nothing that happened before is ordered before it
  } else {
    context->thread_sanitizer = spare_fibers().back();
    spare_fibers().pop_back();
  }
#endif
}

void adopt(Context* context) {
#ifdef COTUNING_FIBERS_WITH_UCONTEXT
  context->stack_pointer = std::malloc(sizeof(ucontext_t));
#endif
#ifdef COTUNING_TSAN
  context->thread_sanitizer = __tsan_get_current_fiber();
#endif
  (void)context;
}

void release(Context* context) {
#ifdef COTUNING_FIBERS_WITH_UCONTEXT
  std::free(context->stack_pointer);
#endif
#ifdef COTUNING_TSAN
  if (context->stack != nullptr && context->done) {
    spare_fibers().push_back(context->thread_sanitizer);
  } else if (context->stack != nullptr) {
    __tsan_destroy_fiber(context->thread_sanitizer);
  }
#endif
  *context = {};
}

COTUNING_UNSEEN void switch_to(Context* from, Context* to, bool last) {
  from->done = last;
#ifdef COTUNING_ASAN
  const bool to_fiber = to->stack != nullptr;
  __sanitizer_start_switch_fiber(last ? nullptr : &from->sanitizer_stack, to_fiber ? to->stack : scheduler_stack,
                                 to_fiber ? kStackBytes : scheduler_stack_bytes);
#endif
#ifdef COTUNING_TSAN
  __tsan_switch_to_fiber(to->thread_sanitizer, 1);  // 1: a switch orders nothing
#endif
#ifdef COTUNING_FIBERS_WITH_UCONTEXT
  swapcontext(static_cast<ucontext_t*>(from->stack_pointer), static_cast<ucontext_t*>(to->stack_pointer));
#else
  cotuning_emulator_switch(&from->stack_pointer, to->stack_pointer);
#endif
#ifdef COTUNING_ASAN
  __sanitizer_finish_switch_fiber(from->sanitizer_stack, nullptr, nullptr);
#endif
}

COTUNING_UNSEEN void started() {
#ifdef COTUNING_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
}

}  // namespace cotuning::emulator
