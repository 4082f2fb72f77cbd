// The autograd of a call: kernels without a dispatcher, a node of torch's graph, and Python for what is unusual.
#pragma once

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/python_cpp_function.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <memory>
#include <mutex>
#include <vector>

#include "../cpu/direct.h"
#include "arguments.h"

namespace mlkernels {

using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

inline const Direct* direct;

inline AtenTensorOpaque* handle_of(const Tensor& tensor) {
  return reinterpret_cast<AtenTensorOpaque*>(const_cast<Tensor*>(&tensor));
}

inline Tensor taken(AtenTensorOpaque* handle) {
  const std::unique_ptr<Tensor> owner(reinterpret_cast<Tensor*>(handle));
  return std::move(*owner);
}

struct Handles {
  std::vector<AtenTensorOpaque*> params;
  DirectCall call;

  Handles(const Resolved& of, const Tensor& input, const Tensor& target, const std::vector<Tensor>& tensors) {
    params.reserve(tensors.size());
    for (const Tensor& tensor : tensors) params.push_back(handle_of(tensor));
    call = {handle_of(input),           handle_of(target), of.numbers.data(),
            int64_t(of.numbers.size()), params.data(),     int64_t(params.size())};
  }
};

// The gradients that are needed, in the order of their bits; false: the operator says why not.
inline bool run_backward(const Resolved& of, const Tensor& upstream, const Tensor& input, const Tensor& target,
                         const std::vector<Tensor>& params, const Tensor& saved, variable_list& gradients) {
  std::array<AtenTensorOpaque*, SLOTS + 1> made;
  const Handles handles(of, input, target, params);
  if (!direct->loss_backward(handles.call, handle_of(upstream), handle_of(saved), of.needs, made.data())) return false;
  const int count = __builtin_popcountll(uint64_t(of.needs));
  for (int i = 0; i < count; ++i) gradients.push_back(taken(made[size_t(i)]));
  return true;
}

inline DirectLinear linear_of(const Resolved& of, const Tensor& weight, const Tensor& bias) {
  return {handle_of(weight), bias.defined() ? handle_of(bias) : nullptr, of.normalize, of.plan.data(), of.workspace};
}

// The same of a linear head's rows; tensors: features, weight, bias, target, params.
inline bool run_backward(const Resolved& of, const variable_list& upstream, const variable_list& tensors,
                         const Tensor& saved, variable_list& gradients) {
  std::array<AtenTensorOpaque*, SLOTS + 3> made;
  std::array<AtenTensorOpaque*, 4> ups{};
  for (size_t i = 0; i < upstream.size(); ++i)
    if (upstream[i].defined()) ups[i] = handle_of(upstream[i]);
  const std::vector<Tensor> params(tensors.begin() + 4, tensors.end());
  const Handles handles(of, tensors[0], tensors[3], params);
  if (!direct->linear_rows_backward(handles.call, linear_of(of, tensors[1], tensors[2]), handle_of(saved), ups.data(),
                                    of.needs, made.data()))
    return false;
  const int count = __builtin_popcountll(uint64_t(of.needs));
  for (int i = 0; i < count; ++i) gradients.push_back(taken(made[size_t(i)]));
  return true;
}

// What mlkernels/autograd.py's two Functions of a loss are, with their names: gradients made with the loss, or once the
// upstream gradient is known. Its edges are those of what needs a gradient, in the order of the bits.
struct LossNode : Node {
  Call call;
  // Gradients; or what is known of each row. As saved variables they would take a tenth of a microsecond more each.
  variable_list made;
  int64_t versions;  // of these, as they were made
  // Input, target, params; of a linear head whose gradients are made later run_backward's.
  std::vector<SavedVariable> arguments;

  std::string name() const override {
    return call->linear ? "_LinearLossBackward" : call->apart ? "_SoftmaxLossBackward" : "_LossWithGradientsBackward";
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    made.clear();
    for (SavedVariable& one : arguments) one.reset_data();
  }

  // Of a backward that is compiled: what it may not take for other numbers, and what it replaces while it traces.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    args.collect(made);
    args.collect(arguments, false);
    args.collect(call->numbers);
    args.collect(call->needs);
    args.collect(call->apart);
    args.collect(call->normalize);
  }

  variable_list apply_with_saved(const variable_list& inputs,
                                 torch::dynamo::autograd::SwapSavedVariables& saved) override {
    saved.before(made);
    saved.before(arguments);
    variable_list gradients = apply(variable_list(inputs));
    saved.after(made);
    saved.after(arguments);
    return gradients;
  }

  variable_list unpacked() {
    variable_list tensors;
    tensors.reserve(arguments.size());
    for (const SavedVariable& one : arguments) tensors.push_back(one.unpack(getptr()));
    return tensors;
  }
  // Their sum, by which it is seen whether one has grown; -1 where a compiler has put others in their places.
  static int64_t versions_of(const variable_list& tensors) {
    int64_t sum = 0;
    for (const Tensor& one : tensors) {
      if (one.unsafeGetTensorImpl()->key_set() != ordinary) return -1;
      sum += one._version();
    }
    return sum;
  }
  const variable_list& kept() const {
    TORCH_CHECK(!made.empty(), torch::autograd::ERR_BACKWARD_TWICE);
    const int64_t now = versions_of(made);
    TORCH_CHECK(now < 0 || now == versions, "what a loss keeps for its backward was modified by an inplace operation");
    return made;
  }

  variable_list apply(variable_list&& upstream) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (call->linear && call->apart) return of_rows(upstream);
    if (!upstream[0].defined()) upstream[0] = input_metadata(0).zeros_like();
    const Tensor& grad = upstream[0];
    if (!at::GradMode::is_enabled() && unwatched() && is_plain(grad)) {
      if (call->apart) {
        const variable_list tensors = unpacked();
        variable_list gradients;
        const std::vector<Tensor> params(tensors.begin() + 2, tensors.end());
        if (run_backward(*call, grad, tensors[0], tensors[1], params, kept()[0], gradients)) return gradients;
      } else {
        const double by =
            grad.scalar_type() == at::kDouble ? *grad.const_data_ptr<double>() : double(*grad.const_data_ptr<float>());
        // 0 * inf would be NaN in rows that are not read. Logits that were changed since are not needed again.
        if (by == 1 || (std::isfinite(by) && !call->half)) return scaled(kept(), by);
      }
    }
    return by_python({grad});
  }

  variable_list of_rows(const variable_list& upstream) {
    bool plain = !at::GradMode::is_enabled() && unwatched();
    for (const Tensor& one : upstream) plain = plain && (!one.defined() || is_plain(one));
    if (plain) {
      variable_list gradients;
      if (run_backward(*call, upstream, unpacked(), kept()[0], gradients)) return gradients;
    }
    return by_python(upstream);
  }

  static variable_list scaled(variable_list gradients, double by) {
    const bool again = torch::autograd::get_current_graph_task_keep_graph();
    for (Tensor& gradient : gradients) {
      if (again)
        gradient = at::mul(gradient, by);
      else if (by != 1)
        gradient.mul_(by);
    }
    return gradients;
  }

  static THPObjectPtr wrapped(const variable_list& tensors) {
    THPObjectPtr all(PyTuple_New(Py_ssize_t(tensors.size())));
    if (!all) throw python_error();
    for (size_t i = 0; i < tensors.size(); ++i)
      PyTuple_SET_ITEM(all.get(), Py_ssize_t(i), THPVariable_Wrap(tensors[i]));
    return all;
  }

  // Of a linear head (call, tensors, saved, upstream gradients), of a loss (call, tensors, saved, upstream gradient).
  variable_list by_python(const variable_list& upstream) {
    const variable_list tensors = call->linear && !call->apart ? kept() : unpacked();
    const Tensor saved = call->apart ? kept()[0] : Tensor();
    const pybind11::gil_scoped_acquire gil;
    const THPObjectPtr given = wrapped(tensors), statistics(THPVariable_Wrap(saved));
    const THPObjectPtr ups = call->linear ? wrapped(upstream) : THPObjectPtr(THPVariable_Wrap(upstream[0]));
    THPObjectPtr found(PyObject_CallFunctionObjArgs(call->linear ? linear_backward : backward, call->call, given.get(),
                                                    statistics.get(), ups.get(), nullptr));
    if (!found) {
      python_error error;
      error.persist();
      throw error;
    }
    variable_list gradients;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(found.get()); ++i) {
      PyObject* const one = PyList_GET_ITEM(found.get(), i);
      gradients.push_back(one == Py_None ? Tensor() : THPVariable_Unpack(one));
    }
    return gradients;
  }
};

// So that Python has a type of either name.
struct GradientsLater : LossNode {};
struct GradientsMade : LossNode {};
struct GradientsOfLinear : LossNode {};

inline PyObject* saved_tensors(PyObject* self, void*) {
  HANDLE_TH_ERRORS
  auto& node = static_cast<LossNode&>(*reinterpret_cast<torch::autograd::THPCppFunction*>(self)->cdata);
  variable_list all = node.kept();
  for (Tensor& one : node.unpacked()) all.push_back(std::move(one));
  THPObjectPtr found(PyTuple_New(Py_ssize_t(all.size())));
  if (!found) return nullptr;
  for (size_t i = 0; i < all.size(); ++i) PyTuple_SET_ITEM(found.get(), Py_ssize_t(i), THPVariable_Wrap(all[i]));
  return found.release();
  END_HANDLE_TH_ERRORS
}

using NodePointer = decltype(torch::autograd::Edge::function);

template <class Kind>
NodePointer make_node() {
  if constexpr (std::is_same_v<NodePointer, std::shared_ptr<Node>>)
    return NodePointer(new Kind, [](Kind* node) { deleteNode(node); });
  else
    return c10::make_intrusive<Kind>();
}

// The loss, with its history where a gradient is needed, as stats have theirs.
inline Tensor with_history(const Call& call, const Arguments& of, const std::vector<Tensor>& params, Tensor loss,
                           std::vector<Tensor>& stats, std::vector<Tensor> made) {
  const NodePointer pointer = call->linear  ? make_node<GradientsOfLinear>()
                              : call->apart ? make_node<GradientsLater>()
                                            : make_node<GradientsMade>();
  auto& node = static_cast<LossNode&>(*pointer);
  node.call = call;
  torch::autograd::edge_list edges;
  edges.reserve(size_t(__builtin_popcountll(uint64_t(call->needs))));
  for (int slot = 0; slot < SLOTS; ++slot)
    if (call->needs >> slot & 1) edges.push_back(torch::autograd::impl::gradient_edge(of.by_slot[size_t(slot)]));
  if (call->needs >> INPUT & 1) edges.push_back(torch::autograd::impl::gradient_edge(of.input));
  if (call->needs >> WEIGHT_BIT & 1) edges.push_back(torch::autograd::impl::gradient_edge(of.weight));
  if (call->needs >> BIAS_BIT & 1) edges.push_back(torch::autograd::impl::gradient_edge(of.bias));
  node.set_next_edges(std::move(edges));
  node.made = std::move(made);
  node.versions = LossNode::versions_of(node.made);
  if (!call->linear || call->apart) {
    node.arguments.reserve(4 + params.size());
    node.arguments.emplace_back(of.input, false);
    if (call->linear) {
      node.arguments.emplace_back(of.weight, false);
      node.arguments.emplace_back(of.bias, false);
    }
    node.arguments.emplace_back(of.target, false);
    for (const Tensor& one : params) node.arguments.emplace_back(one, false);
  }
  const auto output = node.add_input_metadata(loss);
  torch::autograd::impl::set_gradient_edge(loss, {pointer, output});
  // Of RowStats the first three.
  for (size_t i = 0; i < std::min<size_t>(3, stats.size()); ++i)
    torch::autograd::impl::set_gradient_edge(stats[i], {pointer, node.add_input_metadata(stats[i])});
  return loss;
}

}  // namespace mlkernels
