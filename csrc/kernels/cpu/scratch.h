// Scratch rows that a thread keeps between calls, so that a training step allocates nothing.
#pragma once

#include <cstddef>
#include <memory>

namespace cotuning::cpu {

class Scratch {
 public:
  // At least `bytes`, aligned to 64; valid until the next call with the same slot on this thread.
  static void* get(int slot, size_t bytes) {
    thread_local Scratch slots[kSlots];
    Scratch& scratch = slots[slot];
    if (scratch.size_ < bytes) {
      scratch.memory_.reset(new char[bytes + kAlignment]);
      scratch.size_ = bytes;
    }
    void* start = scratch.memory_.get();
    size_t space = scratch.size_ + kAlignment;
    return std::align(kAlignment, bytes, start, space);
  }

  static constexpr int kSlots = 3;

 private:
  static constexpr size_t kAlignment = 64;
  std::unique_ptr<char[]> memory_;
  size_t size_ = 0;
};

}  // namespace cotuning::cpu
