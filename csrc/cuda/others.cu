// The kernels around the row kernels: sums, and copies of many tensors.
#include <algorithm>

#include "launch.h"

namespace mlkernels {
using namespace MLKERNELS_ISA;

template <class Kernel, class... Visits>
void launch_sums(const Device& device, int64_t blocks, const typename Kernel::Plan& plan, const Visits&... visit) {
  launch<Kernel>(device, int(blocks), SUM_WARPS, 1, sum_over_cluster_bytes(SUM_WARPS, 1), visit..., plan);
}

#define MLK_OF_PLAN(KERNEL, T) template void launch_sums<KERNEL<T>>(const Device&, int64_t, const KERNEL<T>::Plan&);
#define MLK_OF_VISIT(KERNEL, T) \
  template void launch_sums<KERNEL<T>>(const Device&, int64_t, const KERNEL<T>::Plan&, const Visit<T>&);
#define MLK_INSTANTIATE(T)  \
  MLK_OF_PLAN(StoreSums, T) \
  MLK_OF_VISIT(Prologue, T) \
  MLK_OF_VISIT(TotalLoss, T) MLK_OF_VISIT(SumBuckets, T) MLK_OF_VISIT(SortKeys, T) MLK_OF_VISIT(SumRuns, T)
MLK_INSTANTIATE(float)
MLK_INSTANTIATE(double)

void copy_many(const CopyTable& table, const Device& device) {
  const int blocks = int(std::max<int64_t>(1, std::min<int64_t>(table.pieces, 8 * device.multiprocessors)));
  if (table.count > SmallCopyTable::MOST) return launch<CopyMany>(device, blocks, SUM_WARPS, 1, 0, table);
  SmallCopyTable few{table.flag, table.count, table.pieces, {}};
  std::copy_n(table.copies, table.count, few.copies);
  launch<CopyMany>(device, blocks, SUM_WARPS, 1, 0, few);
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
