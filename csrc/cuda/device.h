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

// A device as it said it was when first asked, and why the kernels do not run on it, or nothing: the library's CUDA runtime
// may be too new for the driver, or there may be no code for the device.
struct AskedDevice {
  std::once_flag once;
  Device device{};
  std::string fault;
};
inline AskedDevice& asked_device(int index) {
  static AskedDevice known[MOST_DEVICES];
  AskedDevice& found = known[index];
  std::call_once(found.once, [&] {
    found.device.index = index;
    int status = probe(index);
    const auto ask = [&](int& to, cudaDeviceAttr what) {
      if (status == cudaSuccess) status = cudaDeviceGetAttribute(&to, what, index);
    };
    ask(found.device.multiprocessors, cudaDevAttrMultiProcessorCount);
    ask(found.device.major, cudaDevAttrComputeCapabilityMajor);
    ask(found.device.shared, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    if (status == cudaSuccess) return;
    (void)cudaGetLastError();
    found.fault =
        std::string("built for " MLK_ARCHS "; CUDA says: ") + cudaGetErrorString(static_cast<cudaError_t>(status));
  });
  return found;
}

// The same, or null. Losses, copies and the choice of a backend all go by this.
inline const char* why_unusable(int index) {
  if (index < 0 || index >= MOST_DEVICES) return "its number is beyond 64";
  const std::string& fault = asked_device(index).fault;
  return fault.empty() ? nullptr : fault.c_str();
}

inline Device device_of(int index) {
  if (const char* why = why_unusable(index))
    throw std::runtime_error("the CUDA kernels do not run on cuda:" + std::to_string(index) + ": " + why);
  Device out = asked_device(index).device;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &out.stream));
  return out;
}

struct DeviceGuard : torch::stable::accelerator::DeviceGuard {
  explicit DeviceGuard(const torch::stable::Tensor& tensor)
      : torch::stable::accelerator::DeviceGuard(tensor.get_device_index()) {}
};

#endif

}  // namespace mlkernels
