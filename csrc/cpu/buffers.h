// Memory of large gradients, kept from one step to the next: of fresh memory every page is a fault and is cleared
// before it is written, which takes longer than the loss.
#pragma once

#include <chrono>
#include <cstddef>

namespace mlkernels {

// Smaller ones are torch's, whose allocator keeps them itself: from here on glibc's maps anew at every step.
constexpr size_t BUFFER_FROM = size_t(4) << 20;

struct Buffer {
  void* data;
  size_t bytes;
  std::chrono::steady_clock::time_point idle_since;
  bool lent;  // to the system, since then
};

// At least so many bytes, with anything in them, aligned to huge pages. Null where buffers are switched off
// (MLKERNELS_CPU_BUFFERS=0), or where there is no memory.
Buffer* take_buffer(size_t bytes);

// To be taken again. Never throws: it runs where the last tensor dies, at the exit of the process too.
void give_buffer(Buffer* buffer) noexcept;

// Unmaps what nobody uses; how many bytes that were.
size_t release_buffers();

}  // namespace mlkernels
