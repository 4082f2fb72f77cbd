// The device as library_cuda.cpp finds it: a GPU and its current stream, or for the tests a host.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <mutex>
#include <stdexcept>
#include <string>

#include "kernels.h"

#ifndef MLK_HOST
#include <cuda_runtime_api.h>
#endif

namespace mlkernels {

#ifdef MLK_HOST

inline int32_t device_type() { return aoti_torch_device_type_cpu(); }

// A device with clusters, and little shared memory: long rows begin early, and the fibers' shadow stays small.
inline Device pretended{0, 2, 9, 48 << 10, nullptr};

inline Device device_of(int) { return pretended; }

struct DeviceGuard {
  explicit DeviceGuard(const torch::stable::Tensor&) {}
  ~DeviceGuard() {}
};

#else

inline int32_t device_type() { return aoti_torch_device_type_cuda(); }

inline Device device_of(int index) {
  constexpr int MOST = 64;
  static Device known[MOST];
  static std::once_flag once[MOST];
  if (index < 0 || index >= MOST) throw std::runtime_error("CUDA: a device number beyond 64");
  std::call_once(once[index], [&] {
    Device found{};
    found.index = index;
    const auto ask = [&](int& to, cudaDeviceAttr what) {
      const cudaError_t status = cudaDeviceGetAttribute(&to, what, index);
      if (status == cudaSuccess) return;
      (void)cudaGetLastError();
      throw std::runtime_error(std::string("CUDA: the device does not say what it has: ") + cudaGetErrorString(status));
    };
    ask(found.multiprocessors, cudaDevAttrMultiProcessorCount);
    ask(found.major, cudaDevAttrComputeCapabilityMajor);
    ask(found.shared, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    known[index] = found;
  });
  Device out = known[index];
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &out.stream));
  return out;
}

struct DeviceGuard : torch::stable::accelerator::DeviceGuard {
  explicit DeviceGuard(const torch::stable::Tensor& tensor)
      : torch::stable::accelerator::DeviceGuard(tensor.get_device_index()) {}
};

#endif

}  // namespace mlkernels
