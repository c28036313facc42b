#include "emulator.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "fiber.h"

#if defined(__SANITIZE_THREAD__)
#define COTUNING_TSAN 1
extern "C" {
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#else
#define COTUNING_TSAN 0
#endif

// All CUDA threads share the emulator's variables, which are not the kernel's. ThreadSanitizer must ignore functions
// with this mark, and the functions they call while a Quiet exists.
#define COTUNING_UNSEEN __attribute__((no_sanitize("thread")))

namespace cotuning::emulator {
namespace {

struct Quiet {
#if COTUNING_TSAN
  COTUNING_UNSEEN Quiet() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  COTUNING_UNSEEN ~Quiet() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
#else
  ~Quiet() {}
#endif
};

COTUNING_UNSEEN void order_after(void* token) {
#if COTUNING_TSAN
  __tsan_acquire(token);
#endif
  (void)token;
}
COTUNING_UNSEEN void order_before(void* token) {
#if COTUNING_TSAN
  __tsan_release(token);
#endif
  (void)token;
}

constexpr unsigned kLanes = 32;
constexpr size_t kMaxThreadsPerBlock = 1024;
constexpr size_t kDefaultSharedBytes = 48 << 10;
constexpr size_t kMaxSanitizedThreads = 7900;  // ThreadSanitizer's own limit is 8128

enum class Status : char { kReady, kAtBarrier, kAtWarp, kDone };

// Two tokens in turn: a thread that leaves one meeting late must not be ordered after what others did on the way to the
// next.
struct Meeting {
  char tokens[2] = {};
  unsigned generation = 0;
};

struct Warp {
  uint64_t values[2][kLanes];
  unsigned arrived = 0, mask = 0, ready = 0, exited = 0;
  const char* operation = nullptr;
  Meeting meeting;
};

struct Thread {
  Context context;
  Dim3 index;
  unsigned lane = 0;
  Warp* warp = nullptr;
  Status status = Status::kReady;
  bool started = false;
  const char* waits_for = "";
  int line = 0;
  uint64_t exchanges = 0;
  bool fenced = false;
  const void* last_atomic = nullptr;
};

struct Block {
  Dim3 index;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::unique_ptr<char, void (*)(void*)> dynamic_owner{nullptr, std::free};
  char* dynamic = nullptr;
  std::map<const void*, std::unique_ptr<char[]>> statics;
  size_t static_bytes = 0;
  size_t alive = 0, at_barrier = 0;
  const char* barrier_file = nullptr;
  int barrier_line = 0;
  Meeting meeting;
};

// What the emulator remembers about a kernel between launches.
struct KernelState {
  size_t static_bytes = 0;  // the most that a block has declared
  bool asked = false;       // whether allowed_dynamic was set
  size_t allowed_dynamic = 0;
};

struct Launch {
  const void* kernel = nullptr;
  Dim3 grid, block;
  size_t dynamic_bytes = 0;
  const std::function<void()>* body = nullptr;
  std::string error;
  bool cancelled = false;  // waiting threads must unwind their stacks
  Context scheduler;
  // Orders the host's work before the launch before every thread, and every thread's work before the launch's end.
  char begin = 0, end = 0;
};

// Only one launch runs at a time, whichever host thread made it.
std::mutex one_launch;
Launch* running = nullptr;
Block* block = nullptr;
Thread* current = nullptr;

// Guards the state of all kernels: host threads set limits while others launch.
std::mutex kernels_lock;
std::map<const void*, KernelState>& kernel_states() {
  static std::map<const void*, KernelState> kernels;
  return kernels;
}
KernelState& state_of(const void* kernel) { return kernel_states()[kernel]; }

// The driver's rule for dynamic shared memory: 48 KB less the static memory until the kernel's limit is set, then that
// limit. Limit and static memory together may be at most what the device grants a block. Returns why a launch is
// refused, or an empty string.
std::string refused_shared_memory(const KernelState& kernel, size_t dynamic_bytes) {
  const size_t device = settings().shared_memory;
  const std::string beside = " beside " + std::to_string(kernel.static_bytes) + " static ones";
  if (kernel.asked && kernel.allowed_dynamic + kernel.static_bytes > device) {
    return "a limit of " + std::to_string(kernel.allowed_dynamic) + " bytes of dynamic shared memory" + beside +
           ": static and dynamic shared memory together are more than the device has, " + std::to_string(device);
  }
  const size_t all = std::min(kDefaultSharedBytes, device);
  const size_t allowed = kernel.asked ? kernel.allowed_dynamic : all - std::min(all, kernel.static_bytes);
  if (dynamic_bytes <= allowed) return "";
  return "launch: " + std::to_string(dynamic_bytes) + " bytes of dynamic shared memory" + beside + ", but " +
         std::to_string(allowed) + " were allowed (48 KB less the static ones, until the kernel's limit is set)";
}

std::string place() {
  std::string text = "block " + std::to_string(block->index.x);
  if (current != nullptr) text += ", thread " + std::to_string(current->index.x);
  return text + ": ";
}

void report(const std::string& message) {
  if (running->error.empty()) running->error = place() + message;
}

COTUNING_UNSEEN void leave(bool last = false) { switch_to(&current->context, &running->scheduler, last); }

// Ends a CUDA thread from within: its stack is unwound up to thread_main.
struct Stopped {};

// Ends a thread that has found an error, and with it the launch.
[[noreturn]] void stop(const std::string& message) {
  report(message);
  throw Stopped();
}

void make_ready(Thread& thread) {
  thread.status = Status::kReady;
  thread.warp->ready |= 1u << thread.lane;
}

COTUNING_UNSEEN void wait(Status status, const char* what, int line) {
  current->status = status;
  current->waits_for = what;
  current->line = line;
  current->warp->ready &= ~(1u << current->lane);
  leave();
  if (running->cancelled) throw Stopped();
}

// A warp operation: waits for all lanes of the mask. The last lane to arrive does not wait.
void meet_lanes(unsigned mask, const char* operation) {
  Thread* self = current;
  Warp& warp = *self->warp;
  ++statistics().warp_operations;
  if ((mask >> self->lane & 1) == 0) stop(std::string(operation) + ": the calling lane is not in the mask");
  if ((mask & warp.exited) != 0) stop(std::string(operation) + ": a lane of the mask has returned");
  if (warp.arrived != 0 && (warp.mask != mask || std::strcmp(warp.operation, operation) != 0)) {
    stop(std::string("lanes of one warp meet in different operations: ") + warp.operation + " and " + operation);
  }
  warp.mask = mask;
  warp.operation = operation;
  warp.arrived |= 1u << self->lane;
  if (warp.arrived != mask) {
    wait(Status::kAtWarp, operation, 0);
    return;
  }
  warp.arrived = 0;
  ++warp.meeting.generation;
  Thread* first = self - self->lane;
  for (unsigned k = 0; k < kLanes; ++k) {
    if (mask >> k & 1 && k != self->lane) make_ready(first[k]);
  }
}

COTUNING_UNSEEN void thread_main() {
  started();
  order_after(&running->begin);
  bool stopped = false;
  try {
    (*running->body)();
  } catch (const Stopped&) {
    stopped = true;
  }
  order_before(&running->end);
  {
    Quiet quiet;
    current->status = Status::kDone;
    current->warp->ready &= ~(1u << current->lane);
    current->warp->exited |= 1u << current->lane;
    --block->alive;
    if (!stopped && block->at_barrier > 0 && block->at_barrier == block->alive)
      report("returned while others wait in a barrier");
    if (!stopped && (current->warp->mask & 1u << current->lane) != 0 && current->warp->arrived != 0) {
      report(std::string("returned while its warp waits in ") + current->warp->operation);
    }
  }
  leave(true);
  std::abort();
}

struct Schedule {
  explicit Schedule(size_t warps) : order(warps), random(settings().seed) {
    for (size_t k = 0; k < warps; ++k) order[k] = static_cast<unsigned>(k);
    for (unsigned k = 0; k < kLanes; ++k) lanes[k] = k;
    if (settings().order == Order::kReverse) {
      std::reverse(order.begin(), order.end());
      std::reverse(lanes, lanes + kLanes);
    }
    draw();
  }
  void draw() {
    if (settings().order != Order::kRandom) return;
    std::shuffle(order.begin(), order.end(), random);
    std::shuffle(lanes, lanes + kLanes, random);
  }
  void now_and_then() {
    if (settings().order == Order::kRandom && random() % 16 == 0) draw();
  }

  std::vector<unsigned> order;
  unsigned lanes[kLanes];
  std::mt19937_64 random;
};

std::string where_they_wait() {
  std::string text = "no thread can go on:";
  int told = 0;
  for (const Thread& thread : block->threads) {
    if (thread.status == Status::kDone || ++told > 3) continue;
    text += " thread " + std::to_string(thread.index.x) + " waits in " + thread.waits_for;
    if (thread.line > 0) text += " of line " + std::to_string(thread.line);
  }
  return text;
}

COTUNING_UNSEEN void run_block(Schedule& schedule) {
  while (block->alive > 0 && running->error.empty()) {
    schedule.now_and_then();
    bool any = false;
    for (unsigned w : schedule.order) {
      Warp& warp = block->warps[w];
      if (warp.ready == 0) continue;
      any = true;
      for (unsigned k : schedule.lanes) {
        if ((warp.ready >> k & 1) == 0 || !running->error.empty()) continue;
        current = &block->threads[w * kLanes + k];
        ++statistics().switches;
        current->started = true;
        switch_to(&running->scheduler, &current->context, false);
      }
      break;
    }
    current = nullptr;
    if (!any) report(where_they_wait());
  }
  if (running->error.empty()) return;
  running->cancelled = true;
  for (Thread& thread : block->threads) {
    if (!thread.started || thread.status == Status::kDone) continue;
    current = &thread;
    switch_to(&running->scheduler, &current->context, false);
  }
  current = nullptr;
}

void set_up_block(Block* b, size_t index, size_t first_stack) {
  const Dim3 grid = running->grid, size = running->block;
  b->index = Dim3(static_cast<unsigned>(index % grid.x), static_cast<unsigned>(index / grid.x % grid.y),
                  static_cast<unsigned>(index / grid.x / grid.y));
  const size_t count = size_t{size.x} * size.y * size.z;
  b->threads.resize(count);
  b->warps.resize((count + kLanes - 1) / kLanes);
  b->alive = count;
  for (size_t i = 0; i < count; ++i) {
    Thread& thread = b->threads[i];
    const auto flat = static_cast<unsigned>(i);
    thread.index = Dim3(flat % size.x, flat / size.x % size.y, flat / (size.x * size.y));
    thread.lane = flat % kLanes;
    thread.warp = &b->warps[i / kLanes];
    make_ready(thread);
    prepare(&thread.context, stack_at(first_stack + i), thread_main);
  }
  // If the last warp has fewer than 32 threads, a full mask waits for lanes that never come.
  if (count % kLanes != 0) b->warps.back().exited = ~0u << (count % kLanes);
  // Exactly the requested size, so that AddressSanitizer sees accesses beyond it.
  void* dynamic = nullptr;
  if (posix_memalign(&dynamic, 128, running->dynamic_bytes) != 0) throw std::bad_alloc();
  b->dynamic = static_cast<char*>(dynamic);
  b->dynamic_owner.reset(b->dynamic);
  std::memset(b->dynamic, 0xff, running->dynamic_bytes);
}

void check_configuration() {
  const Dim3 grid = running->grid, size = running->block;
  const size_t threads = size_t{size.x} * size.y * size.z;
  if (threads == 0 || threads > kMaxThreadsPerBlock || size.z > 64) {
    throw Error("launch: a block of " + std::to_string(threads) + " threads, expected 1 to 1024");
  }
  if (grid.x == 0 || grid.x > 0x7fffffffu || grid.y == 0 || grid.y > 65535 || grid.z == 0 || grid.z > 65535) {
    throw Error("launch: a grid of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " +
                std::to_string(grid.z) + " blocks");
  }
  const std::lock_guard<std::mutex> lock(kernels_lock);
  const std::string refused = refused_shared_memory(state_of(running->kernel), running->dynamic_bytes);
  if (!refused.empty()) throw Error(refused);
}

COTUNING_UNSEEN void run(const std::vector<size_t>& order) {
  const size_t threads = size_t{running->block.x} * running->block.y * running->block.z;
  Schedule schedule((threads + kLanes - 1) / kLanes);
  if (!COTUNING_TSAN) {
    for (size_t index : order) {
      Block b;
      block = &b;
      set_up_block(&b, index, 0);
      run_block(schedule);
      for (Thread& thread : b.threads) release(&thread.context);
      statistics().blocks += 1;
      if (!running->error.empty()) return;
    }
    return;
  }
  // All blocks exist before the first runs, each with its own stacks and shared memory: only the kernel's own fences
  // order one after another.
  if (order.size() * threads > kMaxSanitizedThreads) throw Error("launch: too many threads for ThreadSanitizer");
  std::vector<Block> blocks(order.size());
  for (size_t k = 0; k < order.size(); ++k) {
    block = &blocks[k];
    set_up_block(block, order[k], k * threads);
  }
  order_before(&running->begin);
  for (Block& b : blocks) {
    block = &b;
    if (running->error.empty()) run_block(schedule);
    statistics().blocks += 1;
  }
  order_after(&running->end);
  for (Block& b : blocks) {
    for (Thread& thread : b.threads) release(&thread.context);
  }
}

}  // namespace

Settings& settings() {
  static Settings instance;
  return instance;
}
Statistics& statistics() {
  static Statistics instance;
  return instance;
}

COTUNING_UNSEEN void count_read(size_t bytes) {
  Quiet quiet;
  (bytes == 16 ? statistics().vector_bytes_read : statistics().other_bytes_read) += bytes;
}
COTUNING_UNSEEN void count_written(size_t bytes) {
  Quiet quiet;
  (bytes == 16 ? statistics().vector_bytes_written : statistics().other_bytes_written) += bytes;
}

COTUNING_UNSEEN const Dim3& thread_index() { return current->index; }
COTUNING_UNSEEN const Dim3& block_index() { return block->index; }
COTUNING_UNSEEN const Dim3& block_size() { return running->block; }
COTUNING_UNSEEN const Dim3& grid_size() { return running->grid; }
COTUNING_UNSEEN unsigned lane() { return current->lane; }

COTUNING_UNSEEN void block_barrier(const char* file, int line) {
  char* token;
  {
    Quiet quiet;
    ++statistics().barriers;
    token = &block->meeting.tokens[block->meeting.generation & 1];
    order_before(token);
    if (block->at_barrier > 0 && (block->barrier_line != line || std::strcmp(block->barrier_file, file) != 0)) {
      stop("threads of one block wait in different barriers: line " + std::to_string(block->barrier_line) +
           " and line " + std::to_string(line));
    }
    block->barrier_file = file;
    block->barrier_line = line;
    if (++block->at_barrier < block->alive) {
      wait(Status::kAtBarrier, "__syncthreads", line);
    } else {
      if (block->alive < block->threads.size()) stop("a barrier that some threads of the block have returned before");
      block->at_barrier = 0;
      ++block->meeting.generation;
      for (Thread& thread : block->threads) {
        if (&thread != current) make_ready(thread);
      }
    }
  }
  order_after(token);
}

COTUNING_UNSEEN void warp_barrier(unsigned mask) {
  Quiet quiet;
  char* token = &current->warp->meeting.tokens[current->warp->meeting.generation & 1];
  order_before(token);
  meet_lanes(mask, "__syncwarp");
  order_after(token);
}

COTUNING_UNSEEN LaneValues exchange(unsigned mask, uint64_t value, const char* operation) {
  Quiet quiet;
  // Two buffers in turn: a lane may be one operation ahead of lanes that still read.
  uint64_t* values = current->warp->values[current->exchanges++ & 1];
  values[current->lane] = value;
  meet_lanes(mask, operation);
  return {values};
}

// A fence followed by an atomic operation publishes what was written before; an atomic operation followed by a fence
// sees it. Either alone orders nothing.
COTUNING_UNSEEN void fence() {
  current->fenced = true;
  if (current->last_atomic != nullptr) order_after(const_cast<void*>(current->last_atomic));
}
COTUNING_UNSEEN void before_atomic(const void* address) {
  if (current->fenced) order_before(const_cast<void*>(address));
}
COTUNING_UNSEEN void after_atomic(const void* address) { current->last_atomic = address; }

COTUNING_UNSEEN void* static_shared(const void* declaration, size_t bytes) {
  Quiet quiet;
  std::unique_ptr<char[]>& memory = block->statics[declaration];
  if (memory == nullptr) {
    memory.reset(new char[bytes]);
    std::memset(memory.get(), 0xff, bytes);
    block->static_bytes += bytes;
    if (block->static_bytes > kDefaultSharedBytes) stop("more than 48 KB of static shared memory");
    // A driver knows this before the launch and refuses it.
    std::string refused;
    {
      const std::lock_guard<std::mutex> lock(kernels_lock);
      KernelState& kernel = state_of(running->kernel);
      const size_t whole = (block->static_bytes + 15) / 16 * 16;  // dynamic memory starts at a multiple of 16
      if (whole > kernel.static_bytes) {
        kernel.static_bytes = whole;
        refused = refused_shared_memory(kernel, running->dynamic_bytes);
      }
    }
    if (!refused.empty()) stop(refused);
  }
  return memory.get();
}

COTUNING_UNSEEN void* dynamic_shared() { return block->dynamic; }

COTUNING_UNSEEN void fail(const char* message) {
  Quiet quiet;
  stop(message);
}

COTUNING_UNSEEN void fail_assertion(const char* condition, const char* file, int line) {
  Quiet quiet;
  stop(std::string("device-side assertion failed: ") + condition + " (" + file + ":" + std::to_string(line) + ")");
}

void allow_dynamic_shared(const void* kernel, size_t bytes) {
  {
    const std::lock_guard<std::mutex> lock(kernels_lock);
    KernelState& state = state_of(kernel);
    if (bytes + state.static_bytes > settings().shared_memory) {
      throw Error("a limit of " + std::to_string(bytes) + " bytes of dynamic shared memory beside " +
                  std::to_string(state.static_bytes) + " static ones, the device has " +
                  std::to_string(settings().shared_memory));
    }
    state.asked = true;
    state.allowed_dynamic = bytes;
  }
  // Gives other host threads time to set another limit before the caller launches. On a GPU that is rare; the tests
  // need it often.
  std::this_thread::sleep_for(std::chrono::milliseconds(2));
}

void forget_limits() {
  const std::lock_guard<std::mutex> lock(kernels_lock);
  for (auto& [kernel, state] : kernel_states()) state.asked = false;
}

size_t static_shared_bytes(const void* kernel) {
  const std::lock_guard<std::mutex> lock(kernels_lock);
  return state_of(kernel).static_bytes;
}

COTUNING_UNSEEN void launch(const void* kernel, Dim3 grid, Dim3 size, size_t dynamic_bytes,
                            const std::function<void()>& body) {
  const std::lock_guard<std::mutex> lock(one_launch);
  Launch launched;
  launched.kernel = kernel;
  launched.grid = grid;
  launched.block = size;
  launched.dynamic_bytes = dynamic_bytes;
  launched.body = &body;
  running = &launched;
  check_configuration();
  adopt(&launched.scheduler);
  std::vector<size_t> order(size_t{grid.x} * grid.y * grid.z);
  for (size_t k = 0; k < order.size(); ++k) order[k] = k;
  if (settings().order == Order::kReverse) std::reverse(order.begin(), order.end());
  if (settings().order == Order::kRandom) {
    std::mt19937_64 random(settings().seed + 1);
    std::shuffle(order.begin(), order.end(), random);
  }
  statistics().launches += 1;
  run(order);
  release(&launched.scheduler);
  running = nullptr;
  block = nullptr;
  if (!launched.error.empty()) throw Error(launched.error);
}

}  // namespace cotuning::emulator
