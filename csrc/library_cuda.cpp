// The CUDA implementations of mlkernels/ops.py: tensors to a Visit, a visit to launches, row results to tensors. Nothing
// here looks at a number in a tensor, so nothing waits for the device, and all of it can be captured in a CUDA graph.
//
// Compiled without CUDA (MLK_HOST) it runs the same kernels on the CPU's memory by simt/host.h, for the tests.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/device.h"
#include "cuda/kernels.h"
#include "operators.h"
#include "schemas.h"

namespace mlkernels {

Forced forced;

namespace {

using namespace MLKERNELS_ISA;

// ---- tensors -----------------------------------------------------------------------------------------------------------

Index index_of(ScalarType type) {
  switch (type) {
    case ScalarType::Long: return Index::INT64;
    case ScalarType::Int: return Index::INT32;
    case ScalarType::Short: return Index::INT16;
    case ScalarType::Char: return Index::INT8;
    case ScalarType::Byte: return Index::UINT8;
    case ScalarType::UInt16: return Index::UINT16;
    case ScalarType::UInt32: return Index::UINT32;
    case ScalarType::UInt64: return Index::UINT64;
    default: throw std::runtime_error("labels must be integers");
  }
}

// ---- a call ------------------------------------------------------------------------------------------------------------

template <class T>
const RowKernels<T>& kernels_of(Storage storage);
template <>
const RowKernels<float>& kernels_of<float>(Storage storage) {
  return storage == Storage::FLOAT ? rows_float : storage == Storage::BFLOAT16 ? rows_bfloat16 : rows_float16;
}
template <>
const RowKernels<double>& kernels_of<double>(Storage) {
  return rows_double;
}

// A launch costs more than a look at so many labels, or at so many classes' weights.
constexpr int64_t FEW = 512;

// The arguments that the operators share, laid out. The order of the numbers is that of ops.py.
template <class T>
struct Call {
  const DeviceGuard guard;
  const Device device;
  Visit<T> p{};
  const Arguments arguments;
  const std::array<const Tensor*, SLOTS>& tensors;
  std::vector<Tensor> kept;                         // what the launches still read
  const int64_t *keys = nullptr, *order = nullptr;  // the labels in order, and whose they are

  Call(const Tensor& input, const Tensor& target, const std::vector<double>& numbers, const std::vector<Tensor>& params)
      : guard(input),
        device(device_of(input.get_device_index())),
        arguments(numbers, params),
        tensors(arguments.tensors) {
    lay_out(p, arguments, target, check_shapes(input, target));
    lay_out_input(p, input);
    int64_t reach = 0;
    for (int64_t d = 0; d < input.dim(); ++d) reach += (input.size(d) - 1) * input.stride(d);
    p.begin = static_cast<const char*>(p.input);
    p.end = p.begin + (reach + 1) * int64_t(input.element_size());
    p.label = plain(target, target.scalar_type()).data_ptr();
    p.label_type = index_of(target.scalar_type());

    for (int slot = 0; slot < LOSS_SLOTS; ++slot) {
      if (!arguments.is_tensor_number(slot)) continue;
      const Tensor& tensor = *tensors[slot];
      const Tensor& number = plain(tensor, tensor.scalar_type());
      p.values[slot] = {T(0), number.data_ptr(), mode_of(tensor), storage_of(tensor.scalar_type())};
    }
    lay_out_classes(p, arguments, [&](int slot) { return vector_of(slot); });
    if (const Tensor* weight = tensors[ROW_WEIGHT]) take(*weight, p.row_weight, p.row_weight_stride);
    p.normalizer = {arguments.numbers[NORMALIZER], nullptr, Mode::BY_VALUE, Storage::DOUBLE};
    if (const Tensor* given = tensors[NORMALIZER])
      p.normalizer = {0, given->data_ptr(), Mode::SHARED, storage_of(given->scalar_type())};
    if (p.spec.transform == Transform::PIECEWISE) p.t = tables(TRANSFORM_A, TRANSFORM_B);
    if (p.spec.head == Head::TAU) p.tau = tables(HEAD_A, HEAD_B);
    if (tensors[GROUP]) {
      p.group = plain(*tensors[GROUP], tensors[GROUP]->scalar_type()).data_ptr();
      p.group_type = index_of(tensors[GROUP]->scalar_type());
    }
  }
  Call(const Call&) = delete;

  Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype) const {
    return empty_on(device_type(), device.index, sizes, dtype);
  }
  Tensor empty_of(const Tensor& like, ScalarType dtype) const {
    return empty_on(device_type(), device.index, like.sizes(), dtype);
  }
  // The tensor as it is, or a contiguous copy in another dtype; kept alive by the call.
  const Tensor& plain(const Tensor& tensor, ScalarType dtype) {
    if (tensor.scalar_type() == dtype && tensor.is_contiguous()) return keep(tensor);
    Tensor out = empty_of(tensor, dtype);
    return keep(torch::stable::copy_(out, tensor));
  }
  const Tensor& keep(Tensor tensor) {
    if (kept.capacity() == 0) kept.reserve(2 * SLOTS + 16);  // references into it stay good
    STD_TORCH_CHECK(kept.size() < kept.capacity(), "a call keeps too many tensors");
    kept.push_back(std::move(tensor));
    return kept.back();
  }
  double* numbers_of(int64_t count) {
    return static_cast<double*>(keep(empty({count}, ScalarType::Double)).data_ptr());
  }

  bool is_table(int slot) const { return mlkernels::is_table(p.spec, slot); }
  const T* vector_of(int slot) {
    return tensors[slot] ? static_cast<const T*>(plain(*tensors[slot], type_of<T>()).data_ptr()) : nullptr;
  }
  Tables<T> tables(int slope, int bias) {
    const Tensor& table = *tensors[slope];
    const int64_t groups = table.dim() == 2 ? table.size(0) : 0;
    return {vector_of(slope), vector_of(bias), int(table.size(table.dim() - 1)), groups};
  }

  // An upstream gradient as T, where it lies if it can be read there.
  void take(const std::optional<Tensor>& tensor, const T*& data, int64_t& stride) {
    if (!tensor) return;
    bool flat = true;  // every element is the same one
    for (const int64_t step : tensor->strides()) flat &= step == 0;
    stride = flat ? 0 : 1;
    if (flat && tensor->scalar_type() == type_of<T>())
      data = static_cast<const T*>(keep(*tensor).data_ptr());
    else
      data = static_cast<const T*>(plain(*tensor, type_of<T>()).data_ptr());
  }

  // What is known of each row, for a backward, and behind it what all rows share: what "mean" makes of their terms, and
  // the sum of the class weights. In pairs, as ops.py has them.
  int64_t saved_rows() const { return p.rows + shared_rows(); }
  int64_t shared_rows() const {
    return (p.spec.reduction == Reduction::MEAN) + (arguments.numbers[SMOOTHING] > 0 && p.weight);
  }
  Tensor save_rows() {
    Tensor saved = empty({saved_rows(), 2}, type_of<T>());
    p.save = static_cast<T*>(saved.data_ptr());
    if (shared_rows()) p.shared = p.save + 2 * p.rows;
    return saved;
  }

  // Everything of the visit is wanted by now: the rows, and the sums around them.
  void run() {
    const bool reduced = p.losses && p.spec.reduction != Reduction::NONE;
    const RowKernels<T>& kernels = kernels_of<T>(p.storage);
    if (p.rows == 0) {
      if (!reduced) return;
      p.parts = is_counted(p) ? -1 : 0;
      launch_sums<TotalLoss<T>>(device, 1, {0}, p);
      return;
    }
    p.simple = is_simple(p);
    const Choice choice = kernels.choose(p, device);
    const bool alone = choice.path == Path::SHORT && choice.tiles.alone;
    const bool counts = is_counted(p) && (p.losses || p.grad || p.want_parameters) && !alone;
    if (counts)
      p.parts = p.rows <= FEW ? -1 : int(std::min<int64_t>(MLKERNELS_ISA::MOST_PARTS, (p.rows + 1023) / 1024));
    const bool adds = is_weight_summed(p) && p.classes > FEW && !p.known && !p.weight_total;
    if (p.parts > 0 || adds) {
      const int parts = std::max(p.parts, 0), blocks = parts + adds;
      double* sums = numbers_of(2 * blocks + 1);
      p.divisors = sums;
      if (adds) p.weight_total = sums + 2 * parts;
      if (reduced) p.arrived = reinterpret_cast<uint32_t*>(sums + 2 * blocks);
      launch_sums<Prologue<T>>(device, blocks, {parts, sums}, p);
    }
    const int blocks = kernels.blocks(p, device, choice);
    int64_t partials = 0;
    if (reduced && !alone) {
      const bool by_warp = choice.path == Path::SHORT || choice.path == Path::STRIDED;
      partials = by_warp ? int64_t(blocks) * choice.warps : blocks / choice.cluster;
      p.partials = numbers_of(partials);
    }
    kernels.run(p, device, choice, blocks);
    if (partials > 0 && !p.arrived) launch_sums<TotalLoss<T>>(device, 1, {partials}, p);
  }

  Tensor loss_like(const Tensor& target) {
    Tensor loss = p.spec.reduction == Reduction::NONE ? empty_of(target, type_of<T>()) : empty({}, type_of<T>());
    p.losses = static_cast<T*>(loss.data_ptr());
    return loss;
  }
  std::tuple<Tensor> factors() {
    Tensor shared = empty({shared_rows(), 2}, type_of<T>());
    if (shared_rows()) p.shared = static_cast<T*>(shared.data_ptr());
    return {shared};
  }
  void prepare_backward(Tensor& saved, bool of_entropy) {
    if (saved.numel() > 0 && shared_rows()) p.known = static_cast<const T*>(saved.data_ptr()) + 2 * p.rows;
    if (!of_entropy || saved.numel() > 0) return;
    saved = keep(save_rows());  // its derivative by s adds up what needs the maximum first
    run();
    p.save = nullptr;
  }

  // The visit, and the gradients that are needed in the order of their bits.
  std::vector<Tensor> run_with_gradients(const Tensor& input, int64_t needs) {
    check_needs(arguments, needs);
    std::vector<Tensor> gradients;
    std::array<T*, TRAINABLE_SLOTS> values{};
    int* bins = nullptr;
    const int64_t rows = p.rows;
    for (int slot = 0; slot < TRAINABLE_SLOTS; ++slot) {
      if (!(needs >> slot & 1)) continue;
      p.want_parameters = true;
      if (OF_SCALE >> slot & 1) p.want_shift = true, p.want_square = p.up_entropy;
      values[size_t(slot)] = static_cast<T*>(keep(empty({rows}, type_of<T>())).data_ptr());
      p.by_parameter[slot] = values[size_t(slot)];
      if (!is_table(slot) || bins) continue;
      bins = static_cast<int*>(keep(empty({2, rows}, ScalarType::Int)).data_ptr());
      p.t_bin = bins;
      p.tau_bin = bins + rows;
    }
    if (p.up_entropy) p.want_shift = true;
    std::vector<Tensor> grad;
    if (needs >> INPUT & 1) {
      grad.push_back(torch::stable::empty_like(input));
      p.grad = grad[0].data_ptr();
      p.out = layout_of(grad[0]);
    }
    run();
    for (int slot = 0; slot < TRAINABLE_SLOTS; ++slot) {
      if (!(needs >> slot & 1)) continue;
      const Tensor& tensor = *tensors[size_t(slot)];
      gradients.push_back(empty_of(tensor, tensor.scalar_type()));
      reduce(slot, values[size_t(slot)], gradients.back());
    }
    if (!grad.empty()) gradients.push_back(std::move(grad[0]));
    return gradients;
  }

  // A parameter's gradient from those of the rows.
  void reduce(int slot, const T* values, const Tensor& out) {
    const Storage storage = storage_of(out.scalar_type());
    const int64_t count = out.numel(), rows = p.rows;
    const auto store = [&](const auto* sums, int terms) {
      using Sum = std::decay_t<decltype(*sums)>;
      launch_sums<StoreSums<Sum>>(device, blocks_for(terms > 1 ? count * LANES : count, device),
                                  {sums, count, terms, out.data_ptr(), storage});
    };
    if (!is_table(slot) && out.dim() >= 2) {
      if (count > 0) store(values, 1);
      return;
    }
    if (!is_table(slot) && out.dim() == 1) {
      if (!keys) sort_labels();
      Tensor sums = empty({count}, ScalarType::Double);
      torch::stable::zero_(sums);
      double* at = static_cast<double*>(keep(std::move(sums)).data_ptr());
      if (rows > 0) launch_sums<SumRuns<T>>(device, blocks_for(rows * LANES, device), {values, keys, order, at}, p);
      store(at, 1);
      return;
    }
    const bool of_t = is_table_of_t(p.spec, slot);
    const int* bins = !is_table(slot) ? nullptr : of_t ? p.t_bin : p.tau_bin;
    const int per_group = of_t ? p.t.bins : p.tau.bins;
    // Blocks are numbered by an int.
    const int chunks =
        int(std::clamp<int64_t>((rows + 4095) / 4096, 1, std::clamp<int64_t>((1 << 20) / (count + 1), 1, 64)));
    double* sums = numbers_of(count * chunks);
    launch_sums<SumBuckets<T>>(device, count * chunks, {values, bins, per_group, chunks, sums}, p);
    store(sums, chunks);
  }

  // Rows in the order of their labels. The sort is stable: the same order, and so the same sums, on every run.
  void sort_labels() {
    Tensor labels = empty({p.rows}, ScalarType::Long);
    if (p.rows > 0)
      launch_sums<SortKeys<T>>(device, blocks_for(p.rows, device), {static_cast<int64_t*>(labels.data_ptr())}, p);
    std::array<StableIValue, 4> stack{torch::stable::detail::from(labels),
                                      torch::stable::detail::from(std::optional<bool>(true)),
                                      torch::stable::detail::from(int64_t(-1)), torch::stable::detail::from(false)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
    keys = static_cast<const int64_t*>(keep(torch::stable::detail::to<Tensor>(stack[0])).data_ptr());
    order = static_cast<const int64_t*>(keep(torch::stable::detail::to<Tensor>(stack[1])).data_ptr());
  }
};

// ---- the operators; see ops.py ---------------------------------------------------------------------------------------

void softmax_loss_refresh(const Tensor& grad_loss, const Tensor& factors, const Tensor& input, const Tensor& target,
                          std::vector<double> numbers, std::vector<Tensor> params, Tensor gradient) {
  by_type(input, [&](auto zero) {
    using T = decltype(zero);
    Call<T> call(input, target, numbers, params);
    STD_TORCH_CHECK(
        factors.numel() == 2 * call.shared_rows() && factors.is_contiguous() && factors.scalar_type() == type_of<T>(),
        "factors must be what the loss returned");
    if (call.shared_rows()) call.p.known = static_cast<const T*>(factors.data_ptr());
    call.take(grad_loss, call.p.up_loss, call.p.up_loss_stride);
    call.p.up_loss_stride = 0;
    call.p.unless_one = call.p.up_loss;
    call.p.grad = gradient.data_ptr();
    call.p.out = layout_of(gradient);
    call.run();
    return 0;
  });
}

// ---- copies of many tensors ------------------------------------------------------------------------------------------

bool dense(const Tensor& tensor) {
  // Its elements fill one piece of memory, in whatever order.
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (int64_t d = 0; d < tensor.dim(); ++d)
    if (tensor.size(d) != 1) dims.emplace_back(tensor.stride(d), tensor.size(d));
  std::sort(dims.begin(), dims.end());
  int64_t step = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != step) return false;
    step *= size;
  }
  return true;
}

bool alike(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  return true;
}

void copy_apart(Tensor& dst, const Tensor& src, const std::optional<Tensor>& flag) {
  if (!flag) {
    torch::stable::copy_(dst, src);
    return;
  }
  std::array<StableIValue, 3> stack{torch::stable::detail::from(*flag), torch::stable::detail::from(src),
                                    torch::stable::detail::from(dst)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::where", "self", stack.data(), TORCH_ABI_VERSION));
  torch::stable::copy_(dst, torch::stable::detail::to<Tensor>(stack[0]));
}

// The device's type and number.
std::pair<int32_t, int32_t> device_of_tensor(const Tensor& tensor) {
  int32_t type = 0, index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &index));
  return {type, index};
}

// Not where the kernels run.
bool on_host(const Tensor& tensor) { return device_of_tensor(tensor).first != device_type(); }

void check_pairs(const std::vector<Tensor>& dst, const std::vector<Tensor>& src, const std::optional<Tensor>& flag) {
  const auto require = [](bool good, const std::string& what) {
    if (!good) throw std::runtime_error(what);
  };
  require(dst.size() == src.size(), "src must hold one tensor per tensor of dst, " + std::to_string(dst.size()) +
                                        ", got " + std::to_string(src.size()));
  for (size_t i = 0; i < dst.size(); ++i) {
    const std::string names = "src[" + std::to_string(i) + "] must have the ";
    bool same = dst[i].dim() == src[i].dim();
    for (int64_t d = 0; same && d < dst[i].dim(); ++d) same = dst[i].size(d) == src[i].size(d);
    require(same, names + "shape of dst[" + std::to_string(i) + "]");
    require(dst[i].scalar_type() == src[i].scalar_type(), names + "dtype of dst[" + std::to_string(i) + "]");
    require(device_of_tensor(dst[i]) == device_of_tensor(src[i]), names + "device of dst[" + std::to_string(i) + "]");
    if (flag && !on_host(*flag))
      require(device_of_tensor(dst[i]) == device_of_tensor(*flag),
              "dst[" + std::to_string(i) + "] must be on flag's device");
  }
  if (flag) require(flag->scalar_type() == ScalarType::Bool && flag->numel() == 1, "flag takes one boolean");
}

void multi_copy_(std::vector<Tensor> dst, std::vector<Tensor> src, std::optional<Tensor> flag) {
  check_pairs(dst, src, flag);
  if (flag && on_host(*flag)) {
    if (!*static_cast<const bool*>(flag->data_ptr())) return;
    flag.reset();
  }
  // By device, in the order in which they come; the arguments of a launch are too large for some stacks.
  std::vector<bool> done(dst.size(), false);
  const std::unique_ptr<CopyTable> table(new CopyTable);
  for (size_t first = 0; first < dst.size(); ++first) {
    if (done[first]) continue;
    const auto index = device_of_tensor(dst[first]);
    if (on_host(dst[first]) || why_unusable(index.second)) {
      copy_apart(dst[first], src[first], flag);
      continue;
    }
    const DeviceGuard here(dst[first]);
    const Device device = device_of(index.second);
    table->flag = flag ? static_cast<const bool*>(flag->data_ptr()) : nullptr;
    table->count = 0;
    table->pieces = 0;
    std::vector<Tensor> kept;
    const auto launch = [&] {
      if (table->pieces > 0) copy_many(*table, device);
      table->count = 0;
      table->pieces = 0;
    };
    for (size_t i = first; i < dst.size(); ++i) {
      if (done[i] || device_of_tensor(dst[i]) != index) continue;
      done[i] = true;
      const int64_t bytes = dst[i].numel() * int64_t(dst[i].element_size());
      if (bytes == 0) continue;
      if (!dense(dst[i]) || !alike(dst[i], src[i])) {  // not two pieces of memory of one order
        copy_apart(dst[i], src[i], flag);
        continue;
      }
      table->to[table->count] = static_cast<char*>(dst[i].data_ptr());
      table->from[table->count] = static_cast<const char*>(src[i].data_ptr());
      table->bytes[table->count] = bytes;
      table->pieces += (bytes + CopyTable::PIECE - 1) / CopyTable::PIECE;
      table->end[table->count] = table->pieces;
      if (++table->count == CopyTable::MOST) launch();
    }
    launch();
  }
}

}  // namespace
}  // namespace mlkernels

STABLE_TORCH_LIBRARY_IMPL(MLK_LIBRARY, MLK_KEY, m) {
  mlkernels::Operators<mlkernels::Call>::implement(m);
  m.impl("softmax_loss_refresh", TORCH_BOX(&mlkernels::softmax_loss_refresh));
}
STABLE_TORCH_LIBRARY_IMPL(MLK_LIBRARY_OF_COPIES, MLK_KEY, m) {
  m.impl("multi_copy_", TORCH_BOX(&mlkernels::multi_copy_));
}

// Of which numbers: a library that is older than numbering.py would take one loss for another.
extern "C" __attribute__((visibility("default"))) const char* mlkernels_numbering() { return mlkernels::NUMBERING; }
// Of which schemas: it would take one argument for another.
extern "C" __attribute__((visibility("default"))) const char* mlkernels_schemas() { return mlkernels::SCHEMAS; }

#ifndef MLK_HOST
// Why the kernels do not run on a device; null: they do.
extern "C" __attribute__((visibility("default"))) const char* mlkernels_cuda_unusable(int index) {
  return mlkernels::why_unusable(index);
}
#endif

#ifdef MLK_HOST
// For the tests: launches of a given shape, and the order of the fibers.
extern "C" __attribute__((visibility("default"))) void mlkernels_simt_force(int path, int warps, int cluster, int chunk,
                                                                            int slots, int tile_rows, int teams,
                                                                            uint64_t seed) {
  mlkernels::forced = {path, warps, cluster, chunk, slots, tile_rows, teams};
  mlkernels::simt::Machine::get().seed = seed;
}
// Counts from now on how shared memory is accessed, or reports: the turns that it took, and those that it had to.
extern "C" __attribute__((visibility("default"))) void mlkernels_simt_banks(int counts, uint64_t* turns,
                                                                            uint64_t* least) {
  mlkernels::simt::Machine& machine = mlkernels::simt::Machine::get();
  *turns = machine.banks.turns;
  *least = machine.banks.least;
  machine.counts_banks = counts != 0;
  machine.banks = {};
}
// How many launches there were so far.
extern "C" __attribute__((visibility("default"))) uint64_t mlkernels_simt_launches() {
  return mlkernels::simt::Machine::get().launches;
}
// A device that the kernels do not run on, for this reason; null: they do.
extern "C" __attribute__((visibility("default"))) void mlkernels_simt_unusable(const char* why) {
  mlkernels::pretended_fault = why ? why : "";
}
#endif
