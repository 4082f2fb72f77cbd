// How a body of the kernels is started: on a device, or by the host's fibers.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "kernels.h"

namespace mlkernels {
namespace MLKERNELS_ISA {

#ifdef __CUDACC__

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();
  throw std::runtime_error(std::string("CUDA: ") + what + ": " + cudaGetErrorString(status));
}

// The arguments of a launch, one or two, which lie in constant memory.
template <class A, class B = void>
struct Arguments {
  A first;
  B second;
};
template <class A>
struct Arguments<A, void> {
  A first;
};

template <class Body, class A, class B = void>
__global__ void __launch_bounds__(Body::THREADS, Body::BLOCKS)
    entry(const __grid_constant__ Arguments<A, B> arguments) {
  const Simt simt;
  if constexpr (std::is_void<B>::value)
    Body::run(simt, arguments.first);
  else
    Body::run(simt, arguments.first, arguments.second);
}

template <class Body, class... A>
constexpr auto kernel_of() {
  return &entry<Body, A...>;
}

// What a kernel may use is set once per device. Two threads may both do it: the same, and no harm.
// False: the device has no clusters of that size.
template <class Body, class... A>
bool allow(const Device& device, int cluster) {
  enum : char { UNKNOWN, ALLOWED, REFUSED };
  static std::atomic<char> known[MOST_DEVICES][2];
  const bool large = cluster > 8;
  std::atomic<char>& state = known[device.index][large];
  if (const char found = state.load(std::memory_order_acquire)) return found == ALLOWED;
  check(cudaFuncSetAttribute(kernel_of<Body, A...>(), cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared),
        "shared memory");
  bool allowed = true;
  if (large &&
      cudaFuncSetAttribute(kernel_of<Body, A...>(), cudaFuncAttributeNonPortableClusterSizeAllowed, 1) != cudaSuccess) {
    (void)cudaGetLastError();
    allowed = false;
  }
  state.store(allowed ? ALLOWED : REFUSED, std::memory_order_release);
  return allowed;
}

// Asks for as much of a multiprocessor's memory to be shared as the most blocks that it can hold use: the rest are caches,
// which kernels without shared memory live by. A hint, and only given where it changes.
template <class Body, class... A>
void carve(const Device& device, int warps, int shared) {
  constexpr int MOST_WARPS = 64, RESERVED = 1024;  // of a multiprocessor; bytes per block
  const int64_t wanted = int64_t(MOST_WARPS / warps) * (shared + RESERVED), all = device.shared + RESERVED;
  const int percent = int(std::min<int64_t>(100, (100 * wanted + all - 1) / all));
  static std::atomic<int> given[MOST_DEVICES];
  if (given[device.index].exchange(percent, std::memory_order_relaxed) == percent) return;
  check(cudaFuncSetAttribute(kernel_of<Body, A...>(), cudaFuncAttributePreferredSharedMemoryCarveout, percent),
        "a carve-out");
}

// The generation that the code which runs here was compiled for: on a newer device it may be an older one's.
template <class Body, class... A>
int compiled_major(const Device& device) {
  static std::atomic<int> known[MOST_DEVICES];
  std::atomic<int>& major = known[device.index];
  if (const int found = major.load(std::memory_order_relaxed)) return found;
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel_of<Body, A...>()), "a kernel for this device");
  const int found = std::min(device.major, attributes.ptxVersion / 10);
  major.store(found, std::memory_order_relaxed);
  return found;
}

struct Configuration {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute cluster[1];
  Configuration(const Device& device, int blocks, int warps, int size, int shared) {
    config.gridDim = dim3(unsigned(blocks));
    config.blockDim = dim3(unsigned(warps * LANES));
    config.dynamicSmemBytes = size_t(shared);
    config.stream = static_cast<cudaStream_t>(device.stream);
    if (size > 1) {
      cluster[0].id = cudaLaunchAttributeClusterDimension;
      cluster[0].val.clusterDim.x = unsigned(size);
      cluster[0].val.clusterDim.y = cluster[0].val.clusterDim.z = 1;
      config.attrs = cluster;
      config.numAttrs = 1;
    }
  }
};

template <class Body, class... A>
void launch(const Device& device, int blocks, int warps, int cluster, int shared, const A&... arguments) {
  allow<Body, A...>(device, cluster);
  carve<Body, A...>(device, warps, shared);
  const Configuration c(device, blocks, warps, cluster, shared);
  check(cudaLaunchKernelEx(&c.config, kernel_of<Body, A...>(), Arguments<A...>{arguments...}), "a launch");
}

template <class Body, class... A>
int ask_at_once(const Device& device, int warps, int cluster, int shared) {
  if (!allow<Body, A...>(device, cluster)) return 0;
  int count = 0;
  if (cluster > 1) {
    const Configuration c(device, cluster, warps, cluster, shared);
    if (cudaOccupancyMaxActiveClusters(&count, kernel_of<Body, A...>(), &c.config) != cudaSuccess) {
      (void)cudaGetLastError();
      return 0;
    }
    return count;
  }
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel_of<Body, A...>(), warps * LANES, size_t(shared)),
        "occupancy");
  return count * device.multiprocessors;
}

// Blocks, or clusters, that the device runs at once; 0: it cannot. Asked once: it takes microseconds.
template <class Body, class... A>
int at_once(const Device& device, int warps, int cluster, int shared) {
  static std::mutex mutex;
  static std::map<std::array<int, 4>, int> known;
  const std::array<int, 4> key{device.index, warps, cluster, shared};
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  return known[key] = ask_at_once<Body, A...>(device, warps, cluster, shared);
}

#else

template <class Body, class... A>
int compiled_major(const Device& device) {
  return device.major;
}

template <class Body, class... A>
void launch(const Device&, int blocks, int warps, int cluster, int shared, const A&... arguments) {
  simt::Machine& machine = simt::Machine::get();
  machine.run(blocks, warps, cluster, shared, [&] {
    const Simt simt;
    Body::run(simt, arguments...);
  });
}

template <class Body, class... A>
int at_once(const Device&, int, int, int) {
  return 3;
}

#endif

}  // namespace MLKERNELS_ISA
}  // namespace mlkernels
