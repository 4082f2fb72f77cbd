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

// Why it is of no use, or empty.
inline std::string pretended_fault;

inline const char* why_unusable(int) { return pretended_fault.empty() ? nullptr : pretended_fault.c_str(); }

inline Device device_of(int) {
  if (const char* why = why_unusable(0))
    throw std::runtime_error(std::string("the CUDA kernels do not run here: ") + why);
  return pretended;
}

struct DeviceGuard {
  explicit DeviceGuard(const torch::stable::Tensor&) {}
  ~DeviceGuard() {}
};

#else

inline int32_t device_type() { return aoti_torch_device_type_cuda(); }

// Why the kernels do not run on a device, or null: the library's CUDA runtime may be too new for the driver, or there may be
// no code for the device. Losses, copies and the choice of a backend all go by this.
inline const char* why_unusable(int index) {
  static std::string known[MOST_DEVICES];
  static std::once_flag once[MOST_DEVICES];
  if (index < 0 || index >= MOST_DEVICES) return "its number is beyond 64";
  std::call_once(once[index], [&] {
    const int status = probe(index);
    if (status != 0)
      known[index] =
          std::string("built for " MLK_ARCHS "; CUDA says: ") + cudaGetErrorString(static_cast<cudaError_t>(status));
  });
  return known[index].empty() ? nullptr : known[index].c_str();
}

inline Device device_of(int index) {
  static Device known[MOST_DEVICES];
  static std::once_flag once[MOST_DEVICES];
  if (const char* why = why_unusable(index))
    throw std::runtime_error("the CUDA kernels do not run on cuda:" + std::to_string(index) + ": " + why);
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
