// The kernels around the row kernels: sums, and copies of many tensors.
#include <algorithm>

#include "launch.h"
#include "sums.h"

namespace mlkernels {
namespace MLKERNELS_ISA {

// out[i] = the sum of in[i * terms ...], as a parameter's type.
template <class T>
struct StoreSums {
  static constexpr int THREADS = 256, BLOCKS = 2;
  struct Plan {
    const T* in;
    int64_t count;
    int terms;
    void* out;
    Storage storage;
  };
  template <class Simt>
  static MLK_DEVICE void run(const Simt& simt, const Plan& plan) {
    // A warp for each where there are terms to add.
    const int lanes = plan.terms > 1 ? LANES : 1, mine = simt.thread() % lanes;
    const int64_t every = int64_t(simt.blocks()) * simt.threads() / lanes;
    for (int64_t i = (int64_t(simt.block()) * simt.threads() + simt.thread()) / lanes; i < plan.count; i += every) {
      double sum = 0;
      for (int k = mine; k < plan.terms; k += lanes) sum += double(plan.in[i * plan.terms + k]);
      if (lanes > 1) sum = sum_over(simt, sum);
      if (mine != 0) continue;
      switch (plan.storage) {
        case Storage::FLOAT: static_cast<float*>(plan.out)[i] = float(sum); break;
        case Storage::DOUBLE: static_cast<double*>(plan.out)[i] = sum; break;
        case Storage::BFLOAT16: narrow(float(sum), static_cast<bfloat16*>(plan.out)[i]); break;
        default: narrow(float(sum), static_cast<float16*>(plan.out)[i]);
      }
    }
  }
};

constexpr int WARPS = 8;

inline int blocks_for(int64_t count, const Device& device) {
  return int(std::max<int64_t>(
      1, std::min<int64_t>((count + WARPS * LANES - 1) / (WARPS * LANES), 4 * device.multiprocessors)));
}

}  // namespace MLKERNELS_ISA

using namespace MLKERNELS_ISA;

template <class T>
void Sums::count(const Visit<T>& v, const Device& device, double* out, int blocks) {
  launch<CountRows<T>>(device, blocks, WARPS, 1, over_block_bytes(WARPS), v, typename CountRows<T>::Plan{out});
}
template <class T>
void Sums::total(const Visit<T>& v, const Device& device, int64_t partials) {
  launch<TotalLoss<T>>(device, 1, WARPS, 1, over_block_bytes(WARPS), v, typename TotalLoss<T>::Plan{partials});
}
template <class T>
void Sums::total_of(const T* in, int64_t count, double* out, const Device& device) {
  launch<TotalOf<T>>(device, 1, WARPS, 1, over_block_bytes(WARPS), typename TotalOf<T>::Plan{in, count, out});
}
template <class T>
void Sums::buckets(const Visit<T>& v, const Device& device, const T* values, const int* bins, int per_group,
                   int64_t buckets, int chunks, double* out) {
  launch<SumBuckets<T>>(device, int(buckets) * chunks, WARPS, 1, over_block_bytes(WARPS), v,
                        typename SumBuckets<T>::Plan{values, bins, per_group, chunks, out});
}
template <class T>
void Sums::keys(const Visit<T>& v, const Device& device, int64_t* out) {
  launch<SortKeys<T>>(device, blocks_for(v.rows, device), WARPS, 1, 0, v, typename SortKeys<T>::Plan{out});
}
template <class T>
void Sums::runs(const Visit<T>& v, const Device& device, const T* values, const int64_t* keys, const int64_t* order,
                double* out) {
  launch<SumRuns<T>>(device, blocks_for(v.rows * LANES, device), WARPS, 1, 0, v,
                     typename SumRuns<T>::Plan{values, keys, order, out});
}
template <class T>
void Sums::store(const T* in, int64_t count, int terms, void* out, Storage storage, const Device& device) {
  launch<StoreSums<T>>(device, blocks_for(terms > 1 ? count * LANES : count, device), WARPS, 1, 0,
                       typename StoreSums<T>::Plan{in, count, terms, out, storage});
}

#define MLK_INSTANTIATE(T)                                                                                          \
  template void Sums::count<T>(const Visit<T>&, const Device&, double*, int);                                       \
  template void Sums::total<T>(const Visit<T>&, const Device&, int64_t);                                            \
  template void Sums::total_of<T>(const T*, int64_t, double*, const Device&);                                       \
  template void Sums::buckets<T>(const Visit<T>&, const Device&, const T*, const int*, int, int64_t, int, double*); \
  template void Sums::keys<T>(const Visit<T>&, const Device&, int64_t*);                                            \
  template void Sums::runs<T>(const Visit<T>&, const Device&, const T*, const int64_t*, const int64_t*, double*);   \
  template void Sums::store<T>(const T*, int64_t, int, void*, Storage, const Device&);
MLK_INSTANTIATE(float)
MLK_INSTANTIATE(double)

void copy_many(const CopyTable& table, const Device& device) {
  const int blocks = int(std::max<int64_t>(1, std::min<int64_t>(table.pieces, 8 * device.multiprocessors)));
  if (table.count > SmallCopyTable::MOST) return launch<CopyMany>(device, blocks, WARPS, 1, 0, table);
  SmallCopyTable few{};
  few.flag = table.flag;
  few.count = table.count;
  few.pieces = table.pieces;
  std::copy_n(table.to, table.count, few.to);
  std::copy_n(table.from, table.count, few.from);
  std::copy_n(table.bytes, table.count, few.bytes);
  std::copy_n(table.end, table.count, few.end);
  launch<CopyMany>(device, blocks, WARPS, 1, 0, few);
}

#ifdef __CUDACC__
int probe(int device) {
  int before = 0;
  cudaError_t status = cudaGetDevice(&before);
  if (status == cudaSuccess) status = cudaSetDevice(device);
  cudaFuncAttributes attributes;
  if (status == cudaSuccess) status = cudaFuncGetAttributes(&attributes, kernel_of<CopyMany, SmallCopyTable>());
  if (before != device) (void)cudaSetDevice(before);
  (void)cudaGetLastError();
  return int(status);
}
#endif

}  // namespace mlkernels
