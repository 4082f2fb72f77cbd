// The few primitives that the CUDA kernels are written over: lane exchange, barriers of warp, block and cluster, shared
// memory, asynchronous copies into it, 16-byte accesses. On a device they are intrinsics; without one (host.h) a
// thread is a fiber, and every access to shared memory is checked.
//
// The rules, which the host holds every kernel to:
// * exchange, warp_sync and copy_async are called by all 32 lanes of a warp, block_sync by all threads of a block,
//   cluster_sync by all threads of a cluster;
// * what one thread writes to shared memory another reads only after a barrier between them, and likewise what it is
//   to overwrite; an own asynchronous copy is read after copy_wait, by each thread that reads it;
// * store_remote and store_async reach another block of the cluster, after a first cluster_sync; the latter is read after
//   copy_wait.
//
// Shared memory is addressed by bytes from its beginning.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__) && defined(MLK_ELEMENTARY)
#error "simt.h comes before elementary.h, which asks MLK_SIMT whether to use CUDA's own functions"
#endif
#define MLK_SIMT 1
#include "../half.h"

namespace mlkernels {

// 16 bytes as they lie in memory.
struct alignas(16) Vec16 {
  uint32_t word[4];
};

constexpr int LANES = 32;

}  // namespace mlkernels

#ifndef __CUDACC__
#include "host.h"
#else

#include <cuda_runtime.h>

#define MLK_DEVICE __device__ __forceinline__

namespace mlkernels {

extern __shared__ __align__(128) unsigned char shared_bytes[];

struct Simt {
  MLK_DEVICE int thread() const { return int(threadIdx.x); }
  MLK_DEVICE int threads() const { return int(blockDim.x); }
  MLK_DEVICE int lane() const { return int(threadIdx.x) % LANES; }
  MLK_DEVICE int warp() const { return int(threadIdx.x) / LANES; }
  MLK_DEVICE int warps() const { return int(blockDim.x) / LANES; }
  MLK_DEVICE int block() const { return int(blockIdx.x); }
  MLK_DEVICE int blocks() const { return int(gridDim.x); }

  // The block's number in its cluster, and how many are in it.
  MLK_DEVICE int rank() const {
#if __CUDA_ARCH__ >= 900
    uint32_t out;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(out));
    return int(out);
#else
    return 0;
#endif
  }
  MLK_DEVICE int ranks() const {
#if __CUDA_ARCH__ >= 900
    uint32_t out;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(out));
    return int(out);
#else
    return 1;
#endif
  }

  // The value of another lane: of lane `from`, or of lane() ^ mask.
  template <class V>
  MLK_DEVICE V exchange(V x, int from) const {
    return __shfl_sync(0xffffffffu, x, from);
  }
  template <class V>
  MLK_DEVICE V butterfly(V x, int mask) const {
    return __shfl_xor_sync(0xffffffffu, x, mask);
  }

  MLK_DEVICE void warp_sync() const { __syncwarp(); }
  MLK_DEVICE void block_sync() const { __syncthreads(); }
  MLK_DEVICE void cluster_sync() const {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
    __syncthreads();
#endif
  }

  template <class V>
  MLK_DEVICE V load(int at) const {
    return *reinterpret_cast<const V*>(shared_bytes + at);
  }
  template <class V>
  MLK_DEVICE void store(int at, V value) const {
    *reinterpret_cast<V*>(shared_bytes + at) = value;
  }
  // Into the shared memory of the cluster's block `rank`.
  MLK_DEVICE void store_remote(int rank, int at, double value) const {
#if __CUDA_ARCH__ >= 900
    asm volatile("st.shared::cluster.u64 [%0], %1;" ::"r"(remote(rank, at)), "l"(__double_as_longlong(value))
                 : "memory");
#else
    store(at, value);
#endif
  }

  // By one thread of each of `count` blocks: whether all others have come here before. It may then read, and so may whom it
  // meets at a barrier, what they and whom they had met at one wrote to global memory. The counter is 0 at first.
  MLK_DEVICE bool comes_last(uint32_t* counter, uint32_t count) const {
    __threadfence();
    const bool last = atomicAdd(counter, 1u) + 1 == count;
    __threadfence();
    return last;
  }

  // ---- asynchronous copies: a barrier of 8 bytes for each place that is filled again and again --------------------

  // By one lane of the warp that will copy. Afterwards, by every thread: barriers_ready, then block_sync.
  MLK_DEVICE void barrier_init(int barrier) const {
#if __CUDA_ARCH__ >= 900
    const uint32_t arrivals = 1;
#else
    const uint32_t arrivals = LANES;
#endif
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(local(barrier)), "r"(arrivals) : "memory");
  }
  MLK_DEVICE void barriers_ready() const {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
  }
  // Between ordinary accesses to shared memory and the next copy into it, by each thread that made them; then warp_sync.
  MLK_DEVICE void before_copy() const {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
  }
  // Whole vectors from global to shared memory, both 16-byte aligned; none at all is a copy that completes as well.
  MLK_DEVICE void copy_async(int barrier, int to, const void* from, int vectors) const {
#if __CUDA_ARCH__ >= 900
    if (lane() == 0) {
      asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(local(barrier)), "r"(vectors * 16)
                   : "memory");
      if (vectors > 0)
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(local(to)),
            "l"(from), "r"(vectors * 16), "r"(local(barrier))
            : "memory");
    }
#else
    const char* source = static_cast<const char*>(from);
    for (int i = lane(); i < vectors; i += LANES)
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(local(to + 16 * i)), "l"(source + 16 * i)
                   : "memory");
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(local(barrier)) : "memory");
#endif
  }
  // Between the blocks of a cluster, without waiting for anything else that they do: a number for another block's memory,
  // which counts it at its own barrier; and, by one thread of each block, how many bytes that barrier is to wait for.
  MLK_DEVICE void store_async(int rank, int at, float value, int barrier) const {
#if __CUDA_ARCH__ >= 900
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(remote(rank, at)),
                 "r"(__float_as_uint(value)), "r"(remote(rank, barrier))
                 : "memory");
#endif
  }
  MLK_DEVICE void store_async(int rank, int at, double value, int barrier) const {
#if __CUDA_ARCH__ >= 900
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b64 [%0], %1, [%2];" ::"r"(remote(rank, at)),
                 "l"(__double_as_longlong(value)), "r"(remote(rank, barrier))
                 : "memory");
#endif
  }
  MLK_DEVICE void expect(int barrier, int bytes) const {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(local(barrier)), "r"(bytes) : "memory");
#endif
  }
  // Until the barrier's phase of this parity (0 for the first copy, then 1, 0, ...) is complete.
  MLK_DEVICE void copy_wait(int barrier, int parity) const {
#if __CUDA_ARCH__ >= 900
#define MLK_ASK "mbarrier.try_wait"
#else
#define MLK_ASK "mbarrier.test_wait"
#endif
    asm volatile("{\n.reg .pred done;\nWAIT:\n" MLK_ASK
                 ".parity.shared.b64 done, [%0], %1;\n@!done bra WAIT;\n}" ::"r"(local(barrier)),
                 "r"(parity)
                 : "memory");
  }

 private:
  MLK_DEVICE static uint32_t local(int at) { return uint32_t(__cvta_generic_to_shared(shared_bytes + at)); }
#if __CUDA_ARCH__ >= 900
  MLK_DEVICE static uint32_t remote(int rank, int at) {
    uint32_t address;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(local(at)), "r"(rank));
    return address;
  }
#endif
};

// ---- arithmetic and storage ------------------------------------------------------------------------------------------

// 2^x for the element-wise work of a row.
MLK_DEVICE float exp2_of(float x) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}
MLK_DEVICE double exp2_of(double x) { return ::exp2(x); }

// Two halves from two floats, the first one in the low bits.
MLK_DEVICE uint32_t narrow_pair(float low, float high, bfloat16) {
  uint32_t out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}
MLK_DEVICE uint32_t narrow_pair(float low, float high, float16) {
  uint32_t out;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}

// The larger of each of two halves; a NaN is passed over.
MLK_DEVICE uint32_t larger_pair(uint32_t a, uint32_t b, bfloat16) {
  asm("max.bf16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
  return a;
}
MLK_DEVICE uint32_t larger_pair(uint32_t a, uint32_t b, float16) {
  asm("max.f16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
  return a;
}
MLK_DEVICE float larger(float a, float b) { return ::fmaxf(a, b); }
MLK_DEVICE double larger(double a, double b) { return ::fmax(a, b); }
MLK_DEVICE float multiply_add(float a, float b, float c) { return ::fmaf(a, b, c); }
MLK_DEVICE double multiply_add(double a, double b, double c) { return ::fma(a, b, c); }

// 16 bytes of global memory, read or written once.
MLK_DEVICE Vec16 load_vector(const void* at) {
  Vec16 out;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(out.word[0]), "=r"(out.word[1]), "=r"(out.word[2]), "=r"(out.word[3])
               : "l"(at));
  return out;
}
MLK_DEVICE void store_vector(void* at, const Vec16& v) {
  asm volatile("st.global.L1::no_allocate.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(v.word[0]), "r"(v.word[1]),
               "r"(v.word[2]), "r"(v.word[3])
               : "memory");
}

}  // namespace mlkernels

#endif
