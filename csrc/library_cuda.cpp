// The CUDA implementations of mlkernels/ops.py: tensors to a Visit, a visit to launches, row results to tensors. Nothing
// here looks at a number in a tensor, so nothing waits for the device, and all of it can be captured in a CUDA graph.
//
// Compiled without CUDA (MLK_HOST) it runs the same kernels on the CPU's memory by simt/host.h, for the tests.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>

#include "cuda/device.h"
#include "operators.h"

namespace mlkernels {

Forced forced;

namespace {

using namespace MLKERNELS_ISA;

// ---- a call ------------------------------------------------------------------------------------------------------------

template <class T>
const RowKernels<T>& kernels_of(Storage storage) {
  if constexpr (sizeof(T) == 8)
    return rows_double;
  else
    return storage == Storage::FLOAT ? rows_float : storage == Storage::BFLOAT16 ? rows_bfloat16 : rows_float16;
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
    p.label = indices_of(target);
    if (tensors[GROUP]) p.group = indices_of(*tensors[GROUP]);
    for (int slot = 0; slot < LOSS_SLOTS; ++slot) {
      if (!arguments.is_tensor_number(slot)) continue;
      const Tensor& number = as_it_is(*tensors[slot]);
      p.values[slot] = {T(0), number.data_ptr(), mode_of(number), storage_of(number.scalar_type())};
    }
    const auto vector_of = [&](int slot) -> const T* {
      return tensors[slot] ? data_of<T>(plain(*tensors[slot], type_of<T>())) : nullptr;
    };
    lay_out_classes(p, arguments, vector_of);
    lay_out_tables(p, arguments, vector_of);
    if (const Tensor* weight = tensors[ROW_WEIGHT]) p.row_weight = per_row(*weight);
    p.normalizer = {arguments.numbers[NORMALIZER], nullptr, Mode::BY_VALUE, Storage::DOUBLE};
    if (const Tensor* given = tensors[NORMALIZER])
      p.normalizer = {0, given->data_ptr(), Mode::SHARED, storage_of(given->scalar_type())};
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
  const Tensor& as_it_is(const Tensor& tensor) { return plain(tensor, tensor.scalar_type()); }
  Indices indices_of(const Tensor& tensor) { return {as_it_is(tensor).data_ptr(), *index_of(tensor.scalar_type())}; }
  const Tensor& keep(Tensor tensor) {
    if (kept.capacity() == 0) kept.reserve(2 * SLOTS + 16);  // references into it stay good
    STD_TORCH_CHECK(kept.size() < kept.capacity(), "a call keeps too many tensors");
    kept.push_back(std::move(tensor));
    return kept.back();
  }
  double* doubles(int64_t count) { return data_of<double>(keep(empty({count}, ScalarType::Double))); }

  // Numbers as T, where they lie if they can be read there.
  PerRow<T> per_row(const std::optional<Tensor>& tensor) {
    if (!tensor) return {};
    bool flat = true;  // every element is the same one
    for (const int64_t step : tensor->strides()) flat &= step == 0;
    const bool lies = flat && tensor->scalar_type() == type_of<T>();
    return {data_of<T>(lies ? keep(*tensor) : plain(*tensor, type_of<T>())), flat ? 0 : 1};
  }

  // What is known of each row, for a backward, and behind it what all rows share: what "mean" makes of their terms, and
  // the sum of the class weights. In pairs, as ops.py has them.
  int64_t saved_rows() const { return p.rows + shared_rows(); }
  int64_t shared_rows() const {
    return (p.spec.reduction == Reduction::MEAN) + (arguments.numbers[SMOOTHING] > 0 && p.weight);
  }
  Tensor save_rows() {
    Tensor saved = empty({saved_rows(), 2}, type_of<T>());
    p.save = data_of<T>(saved);
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
      double* sums = doubles(2 * blocks + 1);
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
      p.partials = doubles(partials);
    }
    kernels.run(p, device, choice, blocks);
    if (partials > 0 && !p.arrived) launch_sums<TotalLoss<T>>(device, 1, {partials}, p);
  }

  Tensor loss_like(const Tensor& target) {
    Tensor loss = p.spec.reduction == Reduction::NONE ? empty_of(target, type_of<T>()) : empty({}, type_of<T>());
    p.losses = data_of<T>(loss);
    return loss;
  }
  std::tuple<Tensor> factors() {
    Tensor shared = empty({shared_rows(), 2}, type_of<T>());
    if (shared_rows()) p.shared = data_of<T>(shared);
    return {shared};
  }
  void prepare_backward(Tensor& saved, bool of_entropy) {
    if (saved.numel() > 0 && shared_rows()) p.known = data_of<T>(saved) + 2 * p.rows;
    if (!of_entropy || saved.numel() > 0) return;
    saved = keep(save_rows());  // its derivative by s adds up what needs the maximum first
    run();
    p.save = nullptr;
  }

  // The visit, and the gradients that are needed in the order of their bits.
  std::vector<Tensor> run_with_gradients(const Tensor& input, int64_t needs) {
    lay_out_needs(p, arguments, needs);
    for (int slot = 0; slot < TRAINABLE_SLOTS; ++slot) {
      if (!(needs >> slot & 1)) continue;
      p.by_parameter[slot] = data_of<T>(keep(empty({p.rows}, type_of<T>())));
      if (!arguments.is_table(slot) || p.t_bin) continue;
      p.t_bin = data_of<int>(keep(empty({2, p.rows}, ScalarType::Int)));
      p.tau_bin = p.t_bin + p.rows;
    }
    Tensor grad;
    if (needs >> INPUT & 1) {
      grad = torch::stable::empty_like(input);
      p.grad = grad.data_ptr();
      p.out = layout_of(grad);
    }
    run();
    std::vector<Tensor> gradients;
    for (int slot = 0; slot < TRAINABLE_SLOTS; ++slot) {
      if (!(needs >> slot & 1)) continue;
      const Tensor& tensor = *tensors[size_t(slot)];
      gradients.push_back(empty_of(tensor, tensor.scalar_type()));
      reduce(slot, gradients.back());
    }
    if (needs >> INPUT & 1) gradients.push_back(std::move(grad));
    return gradients;
  }

  // A parameter's gradient from those of the rows.
  void reduce(int slot, const Tensor& out) {
    const Storage storage = storage_of(out.scalar_type());
    const int64_t count = out.numel(), rows = p.rows;
    const T* const values = p.by_parameter[slot];
    const bool is_table = arguments.is_table(slot), of_t = arguments.is_table_of_t(slot);
    const auto store = [&](const auto* sums, int terms) {
      using Sum = std::decay_t<decltype(*sums)>;
      launch_sums<StoreSums<Sum>>(device, blocks_for(terms > 1 ? count * LANES : count, device),
                                  {sums, count, terms, out.data_ptr(), storage});
    };
    if (!is_table && out.dim() >= 2) {
      if (count > 0) store(values, 1);
      return;
    }
    if (!is_table && out.dim() == 1) {
      if (!keys) sort_labels();
      Tensor sums = keep(empty({count}, ScalarType::Double));
      torch::stable::zero_(sums);
      double* const at = data_of<double>(sums);
      if (rows > 0) launch_sums<SumRuns<T>>(device, blocks_for(rows * LANES, device), {values, keys, order, at}, p);
      store(at, 1);
      return;
    }
    const int* bins = !is_table ? nullptr : of_t ? p.t_bin : p.tau_bin;
    const int per_group = of_t ? p.t.bins : p.tau.bins;
    // Blocks are numbered by an int.
    const int chunks =
        int(std::clamp<int64_t>((rows + 4095) / 4096, 1, std::clamp<int64_t>((1 << 20) / (count + 1), 1, 64)));
    double* sums = doubles(count * chunks);
    launch_sums<SumBuckets<T>>(device, count * chunks, {values, bins, per_group, chunks, sums}, p);
    store(sums, chunks);
  }

  // Rows in the order of their labels. The sort is stable: the same order, and so the same sums, on every run.
  void sort_labels() {
    Tensor labels = empty({p.rows}, ScalarType::Long);
    if (p.rows > 0) launch_sums<SortKeys<T>>(device, blocks_for(p.rows, device), {data_of<int64_t>(labels)}, p);
    std::array<StableIValue, 4> stack{torch::stable::detail::from(labels),
                                      torch::stable::detail::from(std::optional<bool>(true)),
                                      torch::stable::detail::from(int64_t(-1)), torch::stable::detail::from(false)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
    keys = data_of<int64_t>(keep(torch::stable::detail::to<Tensor>(stack[0])));
    order = data_of<int64_t>(keep(torch::stable::detail::to<Tensor>(stack[1])));
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
    if (call.shared_rows()) call.p.known = data_of<T>(factors);
    call.p.up_loss = {call.per_row(grad_loss).data, 0};
    call.p.unless_one = call.p.up_loss.data;
    call.p.grad = gradient.data_ptr();
    call.p.out = layout_of(gradient);
    call.run();
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

// ops.py's check_copies says which and why.
void check_copies(const std::vector<Tensor>& dst, const std::vector<Tensor>& src, const std::optional<Tensor>& flag) {
  STD_TORCH_CHECK(dst.size() == src.size(), "src must hold one tensor per tensor of dst");
  STD_TORCH_CHECK(!flag || (flag->scalar_type() == ScalarType::Bool && flag->numel() == 1), "flag takes one boolean");
  for (size_t i = 0; i < dst.size(); ++i) {
    const auto here = dst[i].sizes(), there = src[i].sizes();
    STD_TORCH_CHECK(std::equal(here.begin(), here.end(), there.begin(), there.end()) &&
                        dst[i].scalar_type() == src[i].scalar_type() &&
                        device_of_tensor(dst[i]) == device_of_tensor(src[i]),
                    "src[", i, "] must have the shape, dtype and device of dst[", i, "]");
    STD_TORCH_CHECK(!flag || on_host(*flag) || device_of_tensor(dst[i]) == device_of_tensor(*flag), "dst[", i,
                    "] must be on flag's device");
  }
}

void multi_copy_(std::vector<Tensor> dst, std::vector<Tensor> src, std::optional<Tensor> flag) {
  check_copies(dst, src, flag);
  if (flag && on_host(*flag)) {
    if (!*data_of<bool>(*flag)) return;
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
    table->flag = flag ? data_of<bool>(*flag) : nullptr;
    table->count = table->pieces = 0;
    const auto launch = [&] {
      if (table->pieces > 0) copy_many(*table, device);
      table->count = table->pieces = 0;
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
      table->pieces += (bytes + CopyTable::PIECE - 1) / CopyTable::PIECE;
      table->copies[table->count] = {data_of<char>(dst[i]), data_of<char>(src[i]), bytes, table->pieces};
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

#ifndef MLK_HOST
// Why the kernels do not run on a device; null: they do.
MLK_EXPORT const char* mlkernels_cuda_unusable(int index) { return mlkernels::why_unusable(index); }
#else
// For the tests: launches of a given shape, and the order of the fibers.
MLK_EXPORT void mlkernels_simt_force(int path, int warps, int cluster, int chunk, int slots, int tile_rows, int teams,
                                     uint64_t seed) {
  mlkernels::forced = {path, warps, cluster, chunk, slots, tile_rows, teams};
  mlkernels::simt::Machine::get().seed = seed;
}
// Counts from now on how shared memory is accessed, or reports: the turns that it took, and those that it had to.
MLK_EXPORT void mlkernels_simt_banks(int counts, uint64_t* turns, uint64_t* least) {
  mlkernels::simt::Machine& machine = mlkernels::simt::Machine::get();
  *turns = machine.banks.turns;
  *least = machine.banks.least;
  machine.counts_banks = counts != 0;
  machine.banks = {};
}
// How many launches there were so far.
MLK_EXPORT uint64_t mlkernels_simt_launches() { return mlkernels::simt::Machine::get().launches; }
// A device that the kernels do not run on, for this reason; null: they do.
MLK_EXPORT void mlkernels_simt_unusable(const char* why) { mlkernels::pretended_fault = why ? why : ""; }
#endif
