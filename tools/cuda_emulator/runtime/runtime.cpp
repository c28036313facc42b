// A CUDA runtime without a GPU: two devices that a CUDA build of torch takes for real ones, on which our kernels run
// through the emulator. When preloaded (LD_PRELOAD), the functions here come before those of the same names in
// libcudart.so.13; other calls reach that library and return its "no CUDA-capable device" or "driver too old".
//
// It tests what lies between torch and the kernels: the device and the stream of every launch, memory, captured graphs,
// and that the host never waits. So it keeps CUDA's promises, and no more:
//   - Nothing given to a stream happens until somebody waits for it. Then the operations of that stream run in order,
//     and of other streams only those that an event says must come before. So work on the wrong stream always meets
//     memory that is not ready yet.
//   - Only an operation on a device can touch its memory, and only while it runs. A host that reads or writes it, or a
//     kernel on the other device, dies by SIGSEGV. So does whoever reaches 256 bytes or a page beyond an allocation's
//     end, or a page before its start. Fresh memory is NaN.
//   - Host memory that is not page-locked is copied when the copy is requested. A copy into it waits.
//   - A call that waits is refused during a capture, and ends the capture.
//   - An error in a kernel stays with the device: every later call returns it. A bad launch is refused at once.
//   - A kernel's limit of dynamic shared memory is 48 KB less its static memory until it is set. It may be set to what
//     the device grants less the static memory. It belongs to the kernel and the device, whichever thread set it last,
//     and other threads get time to set theirs. The launch of a captured graph is refused if the limits of its kernels
//     have become too low.
// The only kernels are those of csrc/kernels/cuda. torch's own are refused with their name; the tests replace them by
// operations of the CPU, through cudaLaunchHostFunc (python_tests/support/simulated_gpu_operations.py).
//
// It cannot show what the emulator cannot (docs/cuda.md), nor anything of the driver: times, contexts, several
// processes on a device, the effect of page-locked memory, peer access.
#include <cuda_runtime_api.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include "kernels.h"

namespace {

using cotuning::emulator::Kernel;
using cotuning::emulator::Size3;

constexpr int kDevices = 2;
constexpr size_t kDeviceMemory = size_t{4} << 30, kPage = 4096;
constexpr int kSharedOptIn = 227 << 10, kSharedDefault = 48 << 10;

struct Operation {
  std::function<void()> run;
  std::set<int> devices;                // whose memory it may touch
  std::function<bool()> still_allowed;  // for a launch: whether its kernel's limit is high enough now
};

struct Graph {
  std::vector<Operation> operations;
  bool broken = false;
};

struct Stream {
  int device = 0;
  bool is_default = false, blocking = true;
  std::deque<Operation> waiting;
  uint64_t given = 0, done = 0;
  // Set during a capture, also for a stream that joined through an event.
  Graph* graph = nullptr;
  bool began_capture = false;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
  unsigned long long capture_id = 0;
};

struct Event {
  Stream* stream = nullptr;
  uint64_t position = 0;
  Graph* graph = nullptr;
  std::shared_ptr<double> time = std::make_shared<double>(0);
};

struct Allocation {
  size_t bytes;
  int device;  // -1: page-locked memory of the host
};

struct Function {
  const char* name;
  const Kernel* kernel;
  std::map<int, size_t> allowed_shared;  // by device, as on a GPU

  size_t dynamic_shared_limit(int device) const {
    const auto asked = allowed_shared.find(device);
    return asked == allowed_shared.end() ? kSharedDefault - kernel->static_shared_bytes : asked->second;
  }
};

struct Variable {
  size_t bytes;
  void* at[kDevices];
};

struct Pushed {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};

// `state` guards what calls look up and change, and is held only briefly. A thread that runs an operation holds
// `one_runs`, and not `state`.
std::recursive_mutex state;
std::recursive_mutex one_runs;

std::map<uintptr_t, Allocation> allocations;
std::unordered_map<const void*, Function> functions;
std::unordered_map<const void*, Variable> variables;
std::set<Stream*> streams;
cudaError_t failed[kDevices] = {cudaSuccess, cudaSuccess};
std::mt19937 draw(1);
unsigned long long captures = 0;
uint64_t launches = 0, waits = 0, calls = 0;
cudaError_t refuse_with = cudaSuccess;

thread_local int current_device = 0;
thread_local cudaError_t last_error = cudaSuccess;
thread_local bool in_operation = false;
thread_local std::vector<Pushed> pushed;
thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

using Lock = std::lock_guard<std::recursive_mutex>;

cudaError_t give(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

double now() {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// ------------------------------------------------------------------------------------------------------------- memory

constexpr size_t kAlignment = 256;  // of cudaMalloc

size_t whole_pages(size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

void* first_page(uintptr_t memory) { return reinterpret_cast<void*>(memory / kPage * kPage); }

// The memory ends where its last page does, as far as its alignment allows. The page after that stays closed.
void* allocate(size_t bytes, int device, int filling = 0xff) {
  const size_t pages = whole_pages(bytes);
  void* first = mmap(nullptr, pages + kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (first == MAP_FAILED) return nullptr;
  mprotect(first, pages, PROT_READ | PROT_WRITE);
  void* memory = static_cast<char*>(first) + (pages - bytes) / kAlignment * kAlignment;
  std::memset(memory, filling, bytes);
  if (device >= 0) mprotect(first, pages, PROT_NONE);
  const Lock lock(state);
  allocations[reinterpret_cast<uintptr_t>(memory)] = {bytes, device};
  return memory;
}

cudaError_t release(void* memory) {
  if (memory == nullptr) return cudaSuccess;
  const Lock lock(state);
  const auto found = allocations.find(reinterpret_cast<uintptr_t>(memory));
  if (found == allocations.end()) return cudaErrorInvalidValue;
  munmap(first_page(found->first), whole_pages(found->second.bytes) + kPage);
  allocations.erase(found);
  return cudaSuccess;
}

const Allocation* find_allocation(const void* pointer) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  auto after = allocations.upper_bound(address);
  if (after == allocations.begin()) return nullptr;
  --after;
  return address < after->first + after->second.bytes ? &after->second : nullptr;
}

size_t used_memory(int device) {
  size_t used = 0;
  for (const auto& [at, allocation] : allocations) used += allocation.device == device ? allocation.bytes : 0;
  return used;
}

// The devices whose memory an operation between these addresses touches.
std::set<int> devices_of(std::initializer_list<const void*> pointers) {
  const Lock lock(state);
  std::set<int> devices;
  for (const void* pointer : pointers) {
    const Allocation* allocation = find_allocation(pointer);
    if (allocation != nullptr && allocation->device >= 0) devices.insert(allocation->device);
  }
  return devices;
}

bool is_pageable(const void* pointer) {
  const Lock lock(state);
  return find_allocation(pointer) == nullptr;
}

void protect(const std::set<int>& devices, int rights) {
  const Lock lock(state);
  for (const auto& [at, allocation] : allocations) {
    if (devices.count(allocation.device) == 0) continue;
    mprotect(first_page(at), whole_pages(allocation.bytes), rights);
  }
}

// ------------------------------------------------------------------------------------------------------------ streams

Stream* default_stream(int device) {
  static Stream* of_device[kDevices] = {};
  const Lock lock(state);
  if (of_device[device] == nullptr) {
    of_device[device] = new Stream;
    of_device[device]->device = device;
    of_device[device]->is_default = true;
    streams.insert(of_device[device]);
  }
  return of_device[device];
}

// nullptr if the handle is not ours.
Stream* stream_of(cudaStream_t handle) {
  if (handle == nullptr || handle == cudaStreamLegacy || handle == cudaStreamPerThread) {
    return default_stream(current_device);
  }
  const Lock lock(state);
  auto* stream = reinterpret_cast<Stream*>(handle);
  return streams.count(stream) ? stream : nullptr;
}

void fail_device(int device, cudaError_t error, const char* words) {
  std::fprintf(stderr, "simulated device %d: %s\n", device, words);
  const Lock lock(state);
  if (failed[device] == cudaSuccess) failed[device] = error;
}

// The devices whose memory can be touched now. Only the thread that runs operations uses this set.
std::set<int> opened;

void open_memory(const std::set<int>& devices) {
  if (devices == opened) return;
  protect(opened, PROT_NONE);
  protect(devices, PROT_READ | PROT_WRITE);
  opened = devices;
}

void run_operation(Stream* stream, const Operation& operation) {
  if (failed[stream->device] != cudaSuccess) return;
  open_memory(operation.devices);
  in_operation = true;
  try {
    operation.run();
  } catch (const std::exception& error) {
    const bool assertion = std::strstr(error.what(), "assertion") != nullptr;
    fail_device(stream->device, assertion ? cudaErrorAssert : cudaErrorLaunchFailure, error.what());
  }
  in_operation = false;
}

// Runs a stream up to a position. An operation that waits for an event calls this again for the event's stream.
void run_until(Stream* stream, uint64_t position) {
  const Lock running(one_runs);
  while (stream->done < position) {
    Operation next;
    {
      const Lock lock(state);
      next = std::move(stream->waiting.front());
      stream->waiting.pop_front();
    }
    run_operation(stream, next);
    const Lock lock(state);
    ++stream->done;
  }
  open_memory({});
}

Operation waiting_for(Stream* other, uint64_t position) {
  return {[=] {
            in_operation = false;
            run_until(other, position);
            in_operation = true;
          },
          {},
          nullptr};
}

void put(Stream* stream, Operation operation) {
  stream->waiting.push_back(std::move(operation));
  ++stream->given;
}

// The default stream waits for all blocking streams of its device, and they wait for it.
void keep_legacy_order(Stream* stream) {
  if (!stream->blocking) return;
  for (Stream* other : streams) {
    if (other == stream || other->device != stream->device || !other->blocking) continue;
    if (stream->is_default != other->is_default && other->done < other->given) {
      put(stream, waiting_for(other, other->given));
    }
  }
}

cudaError_t enqueue(cudaStream_t handle, std::function<void()> run, std::set<int> devices,
                    std::function<bool()> still_allowed = nullptr) {
  const Lock lock(state);
  Stream* stream = stream_of(handle);
  if (stream == nullptr) return give(cudaErrorInvalidResourceHandle);
  if (failed[stream->device] != cudaSuccess) return give(failed[stream->device]);
  devices.insert(stream->device);
  Operation operation{std::move(run), std::move(devices), std::move(still_allowed)};
  if (stream->graph != nullptr) {
    stream->graph->operations.push_back(std::move(operation));
    return cudaSuccess;
  }
  keep_legacy_order(stream);
  put(stream, std::move(operation));
  return cudaSuccess;
}

// Whether a capture forbids a call that waits or allocates. If so, the call ends the capture.
bool capture_forbids(Stream* stream = nullptr) {
  const Lock lock(state);
  for (Stream* other : streams) {
    if (other->graph == nullptr) continue;
    const bool global = other->mode == cudaStreamCaptureModeGlobal && thread_mode != cudaStreamCaptureModeRelaxed;
    if (other != stream && !global) continue;
    other->graph->broken = true;
    return true;
  }
  return false;
}

cudaError_t synchronize(Stream* stream) {
  if (stream == nullptr) return give(cudaErrorInvalidResourceHandle);
  if (in_operation) return give(cudaErrorNotPermitted);
  if (capture_forbids(stream)) return give(cudaErrorStreamCaptureUnsupported);
  ++waits;
  run_until(stream, stream->given);
  return give(failed[stream->device]);
}

cudaError_t copy(void* to, const void* from, size_t bytes, cudaStream_t stream) {
  if (bytes == 0) return cudaSuccess;
  const std::set<int> devices = devices_of({to, from});
  const bool from_host = is_pageable(from), to_host = is_pageable(to);
  const Stream* taken = stream_of(stream);
  if (taken == nullptr) return give(cudaErrorInvalidResourceHandle);
  if ((from_host || to_host) && taken->graph != nullptr) {
    taken->graph->broken = true;
    return give(cudaErrorStreamCaptureUnsupported);
  }
  if (from_host) {
    const auto* at = static_cast<const char*>(from);
    auto kept = std::make_shared<std::vector<char>>(at, at + bytes);
    return enqueue(stream, [=] { std::memcpy(to, kept->data(), bytes); }, devices);
  }
  const cudaError_t error = enqueue(stream, [=] { std::memmove(to, from, bytes); }, devices);
  return error != cudaSuccess || !to_host ? error : synchronize(stream_of(stream));
}

// ----------------------------------------------------------------------------------------------------------- launches

cudaError_t launch(const void* stub, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t handle) {
  const Lock lock(state);
  ++calls;
  const Stream* stream = stream_of(handle);
  if (stream == nullptr) return give(cudaErrorInvalidResourceHandle);
  if (stream->device != current_device) {
    std::fprintf(stderr, "simulated device %d: a launch on a stream of device %d\n", current_device, stream->device);
    return give(cudaErrorInvalidResourceHandle);
  }
  const auto found = functions.find(stub);
  if (found == functions.end()) return give(cudaErrorInvalidDeviceFunction);
  const Function& function = found->second;
  const Kernel* kernel = function.kernel;
  if (kernel == nullptr) {
    // torch.cuda._sleep: nothing to do, since time is not simulated.
    if (std::strstr(function.name, "spin_kernel") != nullptr) return enqueue(handle, [] {}, {});
    std::fprintf(stderr, "simulated device %d: no such kernel here: %s\n", current_device, function.name);
    return give(cudaErrorNotSupported);
  }
  const size_t allowed = function.dynamic_shared_limit(current_device);
  const size_t threads = size_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > 1024 || grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535) {
    return give(cudaErrorInvalidConfiguration);
  }
  if (shared > allowed) return give(cudaErrorInvalidValue);
  if (refuse_with != cudaSuccess) return give(std::exchange(refuse_with, cudaSuccess));
  ++launches;
  const auto thread = kernel->bind(arguments);
  const Size3 blocks{grid.x, grid.y, grid.z}, size{block.x, block.y, block.z};
  return enqueue(
      handle, [=] { cotuning::emulator::run_kernel(*kernel, blocks, size, shared, allowed, thread); }, {},
      [&function, device = current_device, shared] { return shared <= function.dynamic_shared_limit(device); });
}

}  // namespace

// ------------------------------------------------------------------------------------- what the compiler's stubs call

extern "C" {

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterManagedVar(void**, void**, char*, const char*, int, size_t, int, int) {}

void __cudaRegisterFunction(void**, const char* stub, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  const Lock lock(state);
  functions[stub] = {name, cotuning::emulator::find_kernel(name), {}};
}

void __cudaRegisterVar(void**, char* variable, char*, const char*, int, size_t bytes, int, int) {
  const Lock lock(state);
  variables[variable] = {bytes, {}};
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, CUstream_st* stream) {
  pushed.push_back({grid, block, shared, stream});
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  const Pushed last = pushed.back();
  pushed.pop_back();
  *grid = last.grid;
  *block = last.block;
  *shared = last.shared;
  *static_cast<cudaStream_t*>(stream) = last.stream;
  return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* stub) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(stub));
  return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t stream) {
  return launch(reinterpret_cast<const void*>(kernel), grid, block, arguments, shared, stream);
}

// ---------------------------------------------------------------------------------------- what torch asks the driver

// Whether a device has been used. torch asks this to avoid using a device needlessly.
int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) {
  *flags = 0;
  *active = 1;
  return 0;
}

// --------------------------------------------------------------------------------------------------- for the tests

// Since the last call: launches of our kernels, and how often the host waited.
void simulated_runtime_take_counts(uint64_t* counts) {
  const Lock lock(state);
  counts[0] = std::exchange(launches, 0);
  counts[1] = std::exchange(waits, 0);
}

// Since the last call: calls of the kinds that a launch of ours may need, which are launches and calls about the
// device, the stream, an error, a kernel or a variable. torch makes some of them too.
uint64_t simulated_runtime_take_calls() {
  const Lock lock(state);
  return std::exchange(calls, 0);
}

// The next launch of one of our kernels is refused with this error.
void simulated_runtime_refuse(int error) {
  const Lock lock(state);
  refuse_with = static_cast<cudaError_t>(error);
}

}  // extern "C"

// ------------------------------------------------------------------------------------------- the runtime's own calls

cudaError_t cudaLaunchKernel(const void* stub, dim3 grid, dim3 block, void** arguments, size_t shared,
                             cudaStream_t stream) {
  return launch(stub, grid, block, arguments, shared, stream);
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  // Unlike on a GPU, the function may touch the memory of the stream's device: it stands for a kernel of torch.
  return enqueue(stream, [=] { function(data); }, {});
}

cudaError_t cudaFuncSetAttribute(const void* stub, cudaFuncAttribute attribute, int value) {
  {
    const Lock lock(state);
    ++calls;
    const auto found = functions.find(stub);
    if (found == functions.end()) return give(cudaErrorInvalidDeviceFunction);
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || found->second.kernel == nullptr) return cudaSuccess;
    const auto granted = static_cast<int>(kSharedOptIn - found->second.kernel->static_shared_bytes);
    if (value < 0 || value > granted) return give(cudaErrorInvalidValue);
    found->second.allowed_shared[current_device] = static_cast<size_t>(value);
  }
  std::this_thread::sleep_for(std::chrono::milliseconds(2));
  return cudaSuccess;
}

cudaError_t cudaGetSymbolAddress(void** address, const void* symbol) {
  const Lock lock(state);
  ++calls;
  const auto found = variables.find(symbol);
  if (found == variables.end()) return give(cudaErrorInvalidSymbol);
  void*& here = found->second.at[current_device];
  if (here == nullptr) {
    here = allocate(found->second.bytes, current_device, 0);
  }
  *address = here;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() {
  const Lock lock(state);
  ++calls;
  return std::exchange(last_error, cudaSuccess);
}
cudaError_t cudaPeekAtLastError() { return last_error; }
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) { return cudaRuntimeGetVersion(version); }

cudaError_t cudaGetDeviceCount(int* count) {
  *count = kDevices;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  {
    const Lock lock(state);
    ++calls;
  }
  *device = current_device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= kDevices) return give(cudaErrorInvalidDevice);
  current_device = device;
  return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 0;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  if (device < 0 || device >= kDevices) return give(cudaErrorInvalidDevice);
  std::memset(properties, 0, sizeof *properties);
  std::snprintf(properties->name, sizeof properties->name, "simulated device");
  properties->major = 9;
  properties->totalGlobalMem = kDeviceMemory;
  properties->sharedMemPerBlock = kSharedDefault;
  properties->sharedMemPerBlockOptin = kSharedOptIn;
  properties->sharedMemPerMultiprocessor = 228 << 10;
  properties->regsPerBlock = properties->regsPerMultiprocessor = 65536;
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = 1024;
  properties->maxThreadsPerMultiProcessor = 2048;
  properties->multiProcessorCount = 132;
  properties->maxThreadsDim[0] = properties->maxThreadsDim[1] = 1024;
  properties->maxThreadsDim[2] = 64;
  properties->maxGridSize[0] = 0x7fffffff;
  properties->maxGridSize[1] = properties->maxGridSize[2] = 65535;
  properties->l2CacheSize = 1 << 20;  // small: a stopwatch empties it before each call, in a CPU's time
  properties->pciBusID = device;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  {
    const Lock lock(state);
    ++calls;
  }
  cudaDeviceProp properties;
  if (cudaGetDeviceProperties(&properties, device) != cudaSuccess) return last_error;
  switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = kSharedOptIn; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = kSharedDefault; break;
    case cudaDevAttrMultiProcessorCount: *value = properties.multiProcessorCount; break;
    case cudaDevAttrComputeCapabilityMajor: *value = properties.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = properties.minor; break;
    case cudaDevAttrWarpSize: *value = properties.warpSize; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = properties.maxThreadsPerBlock; break;
    default: *value = 0;
  }
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** memory, size_t bytes) {
  if (capture_forbids()) return give(cudaErrorStreamCaptureUnsupported);
  const Lock lock(state);
  if (failed[current_device] != cudaSuccess) return give(failed[current_device]);
  if (used_memory(current_device) + bytes > kDeviceMemory) return give(cudaErrorMemoryAllocation);
  *memory = allocate(bytes, current_device);
  return *memory == nullptr ? give(cudaErrorMemoryAllocation) : cudaSuccess;
}

// Waits for the device, as CUDA does: work in flight may still use the memory.
cudaError_t cudaFree(void* memory) {
  if (memory == nullptr) return cudaSuccess;
  const cudaError_t error = cudaDeviceSynchronize();
  return error != cudaSuccess ? error : give(release(memory));
}

cudaError_t cudaMemGetInfo(size_t* available, size_t* total) {
  const Lock lock(state);
  *total = kDeviceMemory;
  *available = kDeviceMemory - used_memory(current_device);
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned) {
  *memory = allocate(bytes, -1);
  return *memory == nullptr ? give(cudaErrorMemoryAllocation) : cudaSuccess;
}
cudaError_t cudaFreeHost(void* memory) { return give(release(memory)); }

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  const Lock lock(state);
  const Allocation* allocation = find_allocation(pointer);
  std::memset(attributes, 0, sizeof *attributes);
  attributes->type = allocation == nullptr     ? cudaMemoryTypeUnregistered
                     : allocation->device >= 0 ? cudaMemoryTypeDevice
                                               : cudaMemoryTypeHost;
  attributes->device = allocation == nullptr ? 0 : std::max(allocation->device, 0);
  attributes->devicePointer = attributes->hostPointer = const_cast<void*>(pointer);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  return copy(to, from, bytes, stream);
}
cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes, cudaStream_t stream) {
  return copy(to, from, bytes, stream);
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  const cudaError_t error = copy(to, from, bytes, nullptr);
  return error != cudaSuccess ? error : synchronize(default_stream(current_device));
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  return enqueue(stream, [=] { std::memset(to, value, bytes); }, devices_of({to}));
}

// ------------------------------------------------------------------------------------------------ streams and events

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* handle, unsigned flags, int) {
  const Lock lock(state);
  auto* stream = new Stream;
  stream->device = current_device;
  stream->blocking = (flags & cudaStreamNonBlocking) == 0;
  streams.insert(stream);
  *handle = reinterpret_cast<cudaStream_t>(stream);
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* handle, unsigned flags) {
  return cudaStreamCreateWithPriority(handle, flags, 0);
}
cudaError_t cudaStreamCreate(cudaStream_t* handle) { return cudaStreamCreateWithPriority(handle, 0, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t handle) {
  const Lock lock(state);
  streams.erase(reinterpret_cast<Stream*>(handle));  // kept in memory: events may still name it
  return cudaSuccess;
}
cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) {
  *priority = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = *greatest = 0;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle) { return synchronize(stream_of(handle)); }

cudaError_t cudaDeviceSynchronize() {
  if (in_operation) return give(cudaErrorNotPermitted);
  if (capture_forbids()) return give(cudaErrorStreamCaptureUnsupported);
  ++waits;
  const Lock running(one_runs);
  for (;;) {
    // Run one operation of a random stream: only events order streams.
    std::vector<Stream*> ready;
    {
      const Lock lock(state);
      for (Stream* stream : streams) {
        if (stream->device == current_device && stream->done < stream->given) ready.push_back(stream);
      }
    }
    if (ready.empty()) return give(failed[current_device]);
    Stream* next = ready[draw() % ready.size()];
    run_until(next, next->done + 1);
  }
}

// Each query runs one operation, so that polling makes progress.
static cudaError_t query(Stream* stream, uint64_t position) {
  if (stream->done >= position) return give(failed[stream->device]);
  if (!in_operation) run_until(stream, stream->done + 1);
  return cudaErrorNotReady;
}

cudaError_t cudaStreamQuery(cudaStream_t handle) {
  Stream* stream = stream_of(handle);
  if (stream == nullptr) return give(cudaErrorInvalidResourceHandle);
  if (capture_forbids(stream)) return give(cudaErrorStreamCaptureUnsupported);
  return query(stream, stream->given);
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* handle, unsigned) {
  *handle = reinterpret_cast<cudaEvent_t>(new Event);
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* handle) { return cudaEventCreateWithFlags(handle, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t handle) {
  delete reinterpret_cast<Event*>(handle);
  return cudaSuccess;
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t handle, cudaStream_t stream_handle, unsigned) {
  const Lock lock(state);
  auto* event = reinterpret_cast<Event*>(handle);
  Stream* stream = stream_of(stream_handle);
  if (stream == nullptr) return give(cudaErrorInvalidResourceHandle);
  event->graph = stream->graph;
  auto time = event->time;
  const cudaError_t error = enqueue(stream_handle, [=] { *time = now(); }, {});
  event->stream = stream;
  event->position = stream->given;
  return error;
}
cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t stream) {
  return cudaEventRecordWithFlags(handle, stream, 0);
}

cudaError_t cudaEventQuery(cudaEvent_t handle) {
  const auto* event = reinterpret_cast<Event*>(handle);
  if (event->stream == nullptr) return cudaSuccess;
  if (capture_forbids(event->stream)) return give(cudaErrorStreamCaptureUnsupported);
  return query(event->stream, event->position);
}

cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  const auto* event = reinterpret_cast<Event*>(handle);
  if (event->stream == nullptr) return cudaSuccess;
  if (in_operation) return give(cudaErrorNotPermitted);
  if (capture_forbids(event->stream)) return give(cudaErrorStreamCaptureUnsupported);
  ++waits;
  run_until(event->stream, event->position);
  return give(failed[event->stream->device]);
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  const auto *first = reinterpret_cast<Event*>(start), *last = reinterpret_cast<Event*>(end);
  if (last->stream == nullptr || last->stream->done < last->position) return give(cudaErrorNotReady);
  *milliseconds = static_cast<float>(*last->time - *first->time);
  return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event_handle, unsigned) {
  const Lock lock(state);
  Stream* stream = stream_of(handle);
  const auto* event = reinterpret_cast<Event*>(event_handle);
  if (stream == nullptr) return give(cudaErrorInvalidResourceHandle);
  if (event->stream == nullptr) return cudaSuccess;
  if (event->graph != nullptr && stream->graph == nullptr) {  // the capture spreads to this stream
    stream->graph = event->graph;
    stream->mode = event->stream->mode;
    stream->capture_id = event->stream->capture_id;
    return cudaSuccess;
  }
  if (stream->graph != nullptr) {
    if (event->graph == stream->graph) return cudaSuccess;  // a graph runs in the order in which it was captured
    stream->graph->broken = true;
    return give(cudaErrorStreamCaptureIsolation);
  }
  if (event->stream == stream) return cudaSuccess;
  return enqueue(handle, waiting_for(event->stream, event->position).run, {});
}

// ------------------------------------------------------------------------------------------------------------- graphs

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  const Lock lock(state);
  Stream* stream = stream_of(handle);
  if (stream == nullptr || stream->is_default) return give(cudaErrorStreamCaptureUnsupported);
  if (stream->graph != nullptr) return give(cudaErrorIllegalState);
  stream->graph = new Graph;
  stream->began_capture = true;
  stream->mode = mode;
  stream->capture_id = ++captures;
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  const Lock lock(state);
  Stream* stream = stream_of(handle);
  if (stream == nullptr || !stream->began_capture) return give(cudaErrorIllegalState);
  Graph* captured = stream->graph;
  for (Stream* other : streams) {
    if (other->graph == captured) other->graph = nullptr;
  }
  stream->began_capture = false;
  *graph = captured->broken ? nullptr : reinterpret_cast<cudaGraph_t>(captured);
  return captured->broken ? give(cudaErrorStreamCaptureInvalidated) : cudaSuccess;
}

static cudaStreamCaptureStatus capture_status(const Stream* stream) {
  if (stream->graph == nullptr) return cudaStreamCaptureStatusNone;
  return stream->graph->broken ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  const Lock lock(state);
  ++calls;
  const Stream* stream = stream_of(handle);
  if (stream == nullptr) return give(cudaErrorInvalidResourceHandle);
  *status = capture_status(stream);
  return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t* graph, const cudaGraphNode_t** dependencies,
                                     const cudaGraphEdgeData** edges, size_t* count) {
  const Lock lock(state);
  const Stream* stream = stream_of(handle);
  if (stream == nullptr) return give(cudaErrorInvalidResourceHandle);
  *status = capture_status(stream);
  if (id != nullptr) *id = stream->capture_id;
  if (graph != nullptr) *graph = reinterpret_cast<cudaGraph_t>(stream->graph);
  if (dependencies != nullptr) *dependencies = nullptr;
  if (edges != nullptr) *edges = nullptr;
  if (count != nullptr) *count = 0;
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, thread_mode);
  return cudaSuccess;
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
  const size_t there = reinterpret_cast<Graph*>(graph)->operations.size();
  if (nodes != nullptr) std::memset(nodes, 0, *count * sizeof *nodes);
  *count = there;
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  *executable = reinterpret_cast<cudaGraphExec_t>(new Graph(*reinterpret_cast<Graph*>(graph)));
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  const auto* graph = reinterpret_cast<Graph*>(executable);
  for (const Operation& operation : graph->operations) {
    const Lock lock(state);
    if (operation.still_allowed != nullptr && !operation.still_allowed()) return give(cudaErrorInvalidValue);
  }
  std::set<int> devices;
  for (const Operation& operation : graph->operations)
    devices.insert(operation.devices.begin(), operation.devices.end());
  return enqueue(
      stream,
      [operations = graph->operations] {
        for (const Operation& operation : operations) operation.run();
      },
      devices);
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete reinterpret_cast<Graph*>(graph);
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  delete reinterpret_cast<Graph*>(executable);
  return cudaSuccess;
}
