// What the host code of the CUDA library calls of CUDA's runtime and of libtorch_cuda, on a machine without either: launches,
// with the arguments that a driver would get, go to a function of ours; questions about the device have set answers.
// Linked with the objects that nvcc made, in place of libcudart.
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdint>
#include <cstring>
#include <iterator>
#include <map>
#include <string>

#include "cuda/kernels.h"

#define VGPU_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

struct Kernel {
  std::string name;
  int dynamic_shared = 48 << 10;  // the most that a launch may ask for
  bool large_clusters = false;
};
std::map<const void*, Kernel>& kernels() {
  static std::map<const void*, Kernel> known;
  return known;
}

struct {
  int multiprocessors = 132, major = 9, shared = 227 << 10;
} device;

using Launch = int (*)(const char* name, void** arguments, const unsigned* grid, const unsigned* block,
                       unsigned cluster, unsigned shared);
Launch launch_function;
std::string why;                        // the last failure
std::map<uint64_t, uint64_t> storages;  // whose addresses were asked for, with their sizes
cudaError_t last = cudaSuccess;

cudaError_t failed(const std::string& what) {
  why = what;
  return last = cudaErrorInvalidValue;
}

// The cluster of a launch; 0: none that there can be.
unsigned cluster_of(const cudaLaunchConfig_t& config, const Kernel& kernel) {
  unsigned cluster = 1;
  for (unsigned k = 0; k < config.numAttrs; ++k) {
    if (config.attrs[k].id != cudaLaunchAttributeClusterDimension) return failed("an unknown launch attribute"), 0;
    const auto& dim = config.attrs[k].val.clusterDim;
    if (dim.y != 1 || dim.z != 1) return failed("a cluster of more than one dimension"), 0;
    cluster = dim.x;
  }
  if (cluster > 1 && device.major < 9) return failed("a cluster on a device that has none"), 0;
  if (!cluster || cluster > 16 || cluster & (cluster - 1)) return failed("a cluster of " + std::to_string(cluster)), 0;
  if (cluster > 8 && !kernel.large_clusters) return failed("a cluster above 8 that was not allowed"), 0;
  if (config.gridDim.x == 0 || config.gridDim.x % cluster) return failed("a grid that does not fill its clusters"), 0;
  if (int(config.dynamicSmemBytes) > kernel.dynamic_shared)
    return failed("more dynamic shared memory than was allowed"), 0;
  if (config.blockDim.x > 1024) return failed("a block of more than 1024 threads"), 0;
  return cluster;
}

}  // namespace

// ---- for the tests ---------------------------------------------------------------------------------------------------

VGPU_EXPORT void vgpu_on_launch(Launch function) { launch_function = function; }
VGPU_EXPORT void vgpu_device(int multiprocessors, int major, int shared) { device = {multiprocessors, major, shared}; }
VGPU_EXPORT const char* vgpu_why() { return why.c_str(); }
VGPU_EXPORT void vgpu_forget() {
  storages.clear();
  why.clear();
}
VGPU_EXPORT int vgpu_storages(uint64_t* pairs, int most) {
  int count = 0;
  for (const auto& [base, bytes] : storages) {
    if (count == most) break;
    pairs[2 * count] = base;
    pairs[2 * count++ + 1] = bytes;
  }
  return count;
}
VGPU_EXPORT void vgpu_force(int path, int warps, int cluster, int chunk, int slots, int tile_rows, int teams) {
  mlkernels::forced.path = path;
  mlkernels::forced.warps = warps;
  mlkernels::forced.cluster = cluster;
  mlkernels::forced.chunk = chunk;
  mlkernels::forced.slots = slots;
  mlkernels::forced.tile_rows = tile_rows;
  mlkernels::forced.teams = teams;
}

// ---- CUDA's runtime --------------------------------------------------------------------------------------------------

extern "C" {

void** __cudaRegisterFatBinary(void*) {
  static void* handle[1];
  return handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  kernels()[host].name = name;
}
// The symbol that host code launches by is its own handle here.
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return failed("a launch by <<<>>>"); }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) {
  return failed("a launch by <<<>>>");
}

cudaError_t cudaGetDevice(int* index) {
  *index = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return why.c_str(); }
cudaError_t cudaGetLastError() {
  const cudaError_t found = last;
  last = cudaSuccess;
  return found;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = device.multiprocessors; break;
    case cudaDevAttrComputeCapabilityMajor: *value = device.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = device.shared; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = device.shared + 1024; break;
    default: return failed("an unknown device attribute");
  }
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* host) {
  if (!kernels().count(host)) return failed("an unknown kernel");
  memset(attributes, 0, sizeof *attributes);
  attributes->ptxVersion = attributes->binaryVersion = 10 * device.major;
  attributes->maxThreadsPerBlock = 1024;
  attributes->maxDynamicSharedSizeBytes = kernels()[host].dynamic_shared;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* host, cudaFuncAttribute attribute, int value) {
  if (!kernels().count(host)) return failed("an unknown kernel");
  Kernel& kernel = kernels()[host];
  switch (attribute) {
    case cudaFuncAttributeMaxDynamicSharedMemorySize:
      if (value > device.shared) return failed("more shared memory than there is");
      kernel.dynamic_shared = value;
      break;
    case cudaFuncAttributeNonPortableClusterSizeAllowed:
      if (device.major < 9) return failed("clusters on a device that has none");
      kernel.large_clusters = value;
      break;
    case cudaFuncAttributePreferredSharedMemoryCarveout: break;
    default: return failed("an unknown attribute of a kernel");
  }
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveClusters(int* count, const void* host, const cudaLaunchConfig_t* config) {
  const auto found = kernels().find(host);
  if (found == kernels().end()) return failed("an unknown kernel");
  const unsigned cluster = cluster_of(*config, found->second);
  if (!cluster) return cudaErrorInvalidValue;
  *count = cluster == 16 ? 4 : device.multiprocessors / int(cluster);
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* count, const void* host, int threads,
                                                                   size_t shared, unsigned) {
  constexpr int THREADS = 2048, BLOCKS = 3, RESERVED = 1024;
  const auto found = kernels().find(host);
  if (found == kernels().end()) return failed("an unknown kernel");
  if (int(shared) > found->second.dynamic_shared) return failed("more dynamic shared memory than was allowed");
  *count = std::min({BLOCKS, THREADS / threads, (device.shared + RESERVED) / (int(shared) + RESERVED)});
  return cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* host, void** arguments) {
  const auto found = kernels().find(host);
  if (found == kernels().end()) return failed("an unknown kernel");
  const unsigned cluster = cluster_of(*config, found->second);
  if (!cluster) return cudaErrorInvalidValue;
  const unsigned grid[] = {config->gridDim.x, config->gridDim.y, config->gridDim.z};
  const unsigned block[] = {config->blockDim.x, config->blockDim.y, config->blockDim.z};
  if (launch_function(found->second.name.c_str(), arguments, grid, block, cluster, unsigned(config->dynamicSmemBytes)))
    return last = cudaErrorLaunchFailure;
  return cudaSuccess;
}

// ---- torch -----------------------------------------------------------------------------------------------------------
// Tensors are the CPU's, and the library takes them for a device's.

int32_t aoti_torch_device_type_cuda() { return aoti_torch_device_type_cpu(); }
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_get_device_index(AtenTensorHandle, int32_t* index) {
  *index = 0;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }

// A kernel reaches what the host code has asked the address of, and nothing else.
AOTITorchError __real_aoti_torch_get_data_ptr(AtenTensorHandle tensor, void** data);
AOTITorchError __wrap_aoti_torch_get_data_ptr(AtenTensorHandle tensor, void** data) {
  const AOTITorchError status = __real_aoti_torch_get_data_ptr(tensor, data);
  int64_t offset = 0, bytes = 0;
  int32_t dtype = 0;
  aoti_torch_get_storage_offset(tensor, &offset);
  aoti_torch_get_storage_size(tensor, &bytes);
  aoti_torch_get_dtype(tensor, &dtype);
  if (*data && bytes > 0) {
    const uint64_t base = reinterpret_cast<uint64_t>(*data) - uint64_t(offset) * aoti_torch_dtype_element_size(dtype);
    // What overlaps it was freed since: its memory is handed out again within one call.
    auto first = storages.lower_bound(base);
    if (first != storages.begin() && std::prev(first)->first + std::prev(first)->second > base) --first;
    while (first != storages.end() && first->first < base + uint64_t(bytes)) first = storages.erase(first);
    storages[base] = uint64_t(bytes);
  }
  return status;
}

// New memory holds NaN, or -1.
AOTITorchError __real_aoti_torch_empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides,
                                               int32_t dtype, int32_t device_type, int32_t device_index,
                                               AtenTensorHandle* tensor);
AOTITorchError __wrap_aoti_torch_empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides,
                                               int32_t dtype, int32_t device_type, int32_t, AtenTensorHandle* tensor) {
  const AOTITorchError status = __real_aoti_torch_empty_strided(dims, sizes, strides, dtype, device_type, 0, tensor);
  int64_t bytes = 0;
  void* data = nullptr;
  if (status == AOTI_TORCH_SUCCESS) {
    aoti_torch_get_storage_size(*tensor, &bytes);
    __real_aoti_torch_get_data_ptr(*tensor, &data);
    if (data) memset(data, 0xff, size_t(bytes));
  }
  return status;
}

}  // extern "C"
