// A libcuda.so.1 without a GPU: answers what Triton's driver asks, counts what it is told, and runs nothing.
//
// Enough for Triton's own host path (argument binder, cache, compilation, launcher) on tensors in the host's memory.
// Devices are alike; memory is not managed: every address is a device address. Types are declared here, so that no
// CUDA header is needed; only those fields of CUlaunchConfig are read that every version of it has.

#include <stdint.h>
#include <stdio.h>
#include <string.h>

typedef int Result;
enum { SUCCESS = 0, INVALID_VALUE = 1, NOT_INITIALIZED = 3, INVALID_DEVICE = 101, NOT_FOUND = 500 };

#define EXPORT __attribute__((visibility("default")))

enum { DEVICES = 2, MODULES = 4096, NAME = 128 };

typedef struct {
    unsigned grid[3], block[3], shared;
    void *stream;
    void *attributes;
    unsigned attribute_count;
} Config;

typedef struct {
    char name[NAME];
} Function;

static int initialised;
static int capability = 90;
static __thread int current = -1; // the device whose context the thread has
static Function functions[MODULES];
static int modules;

// What happened since stub_reset; read by stub_driver/__init__.py.
typedef struct {
    int64_t modules;
    int64_t launches;
    int64_t pointers;
} Counts;
static Counts counts;

// The latest launch.
typedef struct {
    char name[NAME];
    unsigned grid[3], block[3], shared;
    int device;
    uint64_t stream;
} Launch;
static Launch latest;

// Called at every launch, if there is one: what, and its parameters' addresses.
static void (*watcher)(const Launch *, void **);

EXPORT void stub_reset(void) { memset(&counts, 0, sizeof counts); }
EXPORT void stub_capability(int number) { capability = number; }
EXPORT const Counts *stub_counts(void) { return &counts; }
EXPORT const Launch *stub_latest(void) { return &latest; }
EXPORT void stub_watch(void (*function)(const Launch *, void **)) { watcher = function; }

// ---- the driver ------------------------------------------------------------------------------------------------------

EXPORT Result cuInit(unsigned flags) {
    initialised = 1;
    return flags ? INVALID_VALUE : SUCCESS;
}

EXPORT Result cuDriverGetVersion(int *version) {
    *version = 13000;
    return SUCCESS;
}

EXPORT Result cuGetErrorString(Result error, const char **words) {
    *words = error == INVALID_DEVICE ? "invalid device ordinal" : "an error of the stub driver";
    return SUCCESS;
}

EXPORT Result cuGetErrorName(Result error, const char **name) {
    *name = error == INVALID_DEVICE ? "CUDA_ERROR_INVALID_DEVICE" : "CUDA_ERROR_UNKNOWN";
    return SUCCESS;
}

// ---- devices ---------------------------------------------------------------------------------------------------------

EXPORT Result cuDeviceGetCount(int *count) {
    *count = DEVICES;
    return initialised ? SUCCESS : NOT_INITIALIZED;
}

EXPORT Result cuDeviceGet(int *device, int ordinal) {
    *device = ordinal;
    return ordinal < 0 || ordinal >= DEVICES ? INVALID_DEVICE : SUCCESS;
}

EXPORT Result cuDeviceGetName(char *name, int length, int device) {
    snprintf(name, length, "stub %d", device);
    return SUCCESS;
}

EXPORT Result cuDeviceTotalMem_v2(size_t *bytes, int device) {
    *bytes = (size_t)80 << 30;
    return SUCCESS;
}

// Those of an H100, but for the capability.
EXPORT Result cuDeviceGetAttribute(int *value, int attribute, int device) {
    switch (attribute) {
    case 1: *value = 1024; break;          // MAX_THREADS_PER_BLOCK
    case 8: *value = 49152; break;         // MAX_SHARED_MEMORY_PER_BLOCK
    case 10: *value = 32; break;           // WARP_SIZE
    case 12: *value = 65536; break;        // MAX_REGISTERS_PER_BLOCK
    case 13: *value = 1980000; break;      // CLOCK_RATE
    case 16: *value = 132; break;          // MULTIPROCESSOR_COUNT
    case 36: *value = 2619000; break;      // MEMORY_CLOCK_RATE
    case 37: *value = 5120; break;         // GLOBAL_MEMORY_BUS_WIDTH
    case 39: *value = 2048; break;         // MAX_THREADS_PER_MULTIPROCESSOR
    case 75: *value = capability / 10; break;
    case 76: *value = capability % 10; break;
    case 81: *value = 233472; break;       // MAX_SHARED_MEMORY_PER_MULTIPROCESSOR
    case 97: *value = 232448; break;       // MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    default: *value = 0; break;
    }
    return SUCCESS;
}

// ---- contexts: a device's is its number plus one ---------------------------------------------------------------------

EXPORT Result cuDevicePrimaryCtxRetain(void **context, int device) {
    if (device < 0 || device >= DEVICES) return INVALID_DEVICE;
    *context = (void *)(intptr_t)(device + 1);
    return SUCCESS;
}

EXPORT Result cuDevicePrimaryCtxRelease_v2(int device) { return SUCCESS; }

EXPORT Result cuCtxGetCurrent(void **context) {
    *context = (void *)(intptr_t)(current + 1);
    return SUCCESS;
}

EXPORT Result cuCtxSetCurrent(void *context) {
    current = (int)(intptr_t)context - 1;
    return SUCCESS;
}

EXPORT Result cuCtxPushCurrent_v2(void *context) { return cuCtxSetCurrent(context); }

EXPORT Result cuCtxPopCurrent_v2(void **context) { return cuCtxGetCurrent(context); }

EXPORT Result cuCtxGetDevice(int *device) {
    *device = current;
    return current < 0 ? INVALID_DEVICE : SUCCESS;
}

EXPORT Result cuCtxGetLimit(size_t *value, int limit) {
    *value = 1 << 20;
    return SUCCESS;
}

EXPORT Result cuCtxSetLimit(int limit, size_t value) { return SUCCESS; }

EXPORT Result cuCtxSynchronize(void) { return SUCCESS; }

// ---- code ------------------------------------------------------------------------------------------------------------

EXPORT Result cuModuleLoadData(void **module, const void *image) {
    counts.modules++;
    // A cubin is an ELF file.
    if (memcmp(image, "\177ELF", 4) != 0 || modules == MODULES) return INVALID_VALUE;
    *module = &functions[modules++];
    return SUCCESS;
}

EXPORT Result cuModuleUnload(void *module) { return SUCCESS; }

EXPORT Result cuModuleGetFunction(void **function, void *module, const char *name) {
    snprintf(((Function *)module)->name, NAME, "%s", name);
    *function = module;
    return SUCCESS;
}

EXPORT Result cuModuleGetGlobal_v2(void **address, size_t *bytes, void *module, const char *name) { return NOT_FOUND; }

EXPORT Result cuFuncGetAttribute(int *value, int attribute, void *function) {
    switch (attribute) {
    case 0: *value = 1024; break; // MAX_THREADS_PER_BLOCK
    case 4: *value = 64; break;   // NUM_REGS
    default: *value = 0; break;
    }
    return SUCCESS;
}

EXPORT Result cuFuncSetAttribute(void *function, int attribute, int value) { return SUCCESS; }

EXPORT Result cuFuncSetCacheConfig(void *function, int config) { return SUCCESS; }

EXPORT Result cuOccupancyMaxActiveClusters(int *clusters, void *function, const void *config) {
    *clusters = 66;
    return SUCCESS;
}

EXPORT Result cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, void *function, int threads, size_t shared) {
    *blocks = 2048 / threads;
    return SUCCESS;
}

EXPORT Result cuLaunchKernelEx(const Config *config, void *function, void **parameters, void **extra) {
    if (current < 0) return NOT_INITIALIZED;
    counts.launches++;
    memcpy(latest.name, ((Function *)function)->name, NAME);
    memcpy(latest.grid, config->grid, sizeof latest.grid);
    memcpy(latest.block, config->block, sizeof latest.block);
    latest.shared = config->shared;
    latest.device = current;
    latest.stream = (uint64_t)(uintptr_t)config->stream;
    if (watcher) watcher(&latest, parameters);
    return SUCCESS;
}

EXPORT Result cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                             unsigned shared, void *stream, void **parameters, void **extra) {
    const Config config = {{x, y, z}, {bx, by, bz}, shared, stream, 0, 0};
    return cuLaunchKernelEx(&config, function, parameters, extra);
}

// ---- memory and streams ----------------------------------------------------------------------------------------------

EXPORT Result cuPointerGetAttribute(void *value, int attribute, uint64_t address) {
    counts.pointers++;
    memcpy(value, &address, sizeof address);
    return SUCCESS;
}

EXPORT Result cuStreamIsCapturing(void *stream, int *status) {
    *status = 0;
    return SUCCESS;
}

EXPORT Result cuStreamSynchronize(void *stream) { return SUCCESS; }

EXPORT Result cuTensorMapEncodeTiled(void) { return INVALID_VALUE; }

EXPORT Result cuTensorMapEncodeIm2col(void) { return INVALID_VALUE; }
